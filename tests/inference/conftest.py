"""A small dataset of two products, random adapters whose cards say that they were trained on it, and their bundle."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from echo_ft.files import read_jsonl, write_json, write_jsonl
from echo_ft.inference.inspector import Inspector
from echo_ft.records import GOOD, ROLES, Inspection
from tests.conftest import draw, make_dataset, random_adapters
from train.export import main as export_main

TARGETS = {role: ["q_proj", "v_proj"] for role in ROLES} | {"reasoning_expert": ["q_proj", "attn.qkv", "attn.proj"]}
"""The reasoning expert's adapter also changes the vision tower."""


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Five normal washers, three normal caps, and three stained washers as test images."""
    folder = make_dataset(tmp_path_factory.mktemp("dataset"))
    rows = list(read_jsonl(folder / "inspections.jsonl", Inspection))
    normals = [
        replace(row, condition=GOOD, product="cap" if index > 4 else "washer") if row.split == "train" else row
        for index, row in enumerate(rows)
    ]
    write_jsonl(folder / "inspections.jsonl", normals)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"] |= {"descriptor": "skimage"}
    write_json(folder / "manifest.json", manifest)
    return folder


@pytest.fixture(scope="session")
def adapters(dataset, tmp_path_factory):
    return random_adapters(tmp_path_factory.mktemp("adapters"), dataset, TARGETS)


@pytest.fixture(scope="session")
def bundle(adapters, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "bundle"
    export_main(["--adapters", str(adapters), "--output", str(output), "--merge", "none", "--dtype", "float32"])
    return output


@pytest.fixture(scope="module")
def inspector(adapters):
    """An inspector that writes short outputs."""
    return Inspector.from_adapters(adapters, max_new_tokens=8)


@pytest.fixture
def image(tmp_path):
    return tmp_path / draw(tmp_path / "new.png", (90, 70), 99)
