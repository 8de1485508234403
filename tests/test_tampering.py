"""If a byte of a dataset changes, the next command that uses it names the file."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep import audit, convert
from data_prep.build import main as build_main
from echo_ft.data.dataset import DIGESTS, KNOWLEDGE, MANIFEST, load_dataset, read_digests
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl
from echo_ft.model.rows import RowBuilder
from echo_ft.records import ROLES, Inspection
from echo_ft.training.collator import Collator
from evaluation import run
from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS
from train import export, show

RECORDS = ("inspections.jsonl", "references.jsonl", "questions.jsonl", KNOWLEDGE, DIGESTS, MANIFEST)
ROWS = [f"sft/{role}/train.jsonl" for role in ROLES]
FLIPS = 8


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tampering") / "parts"
    build_main(["--config", "recipes/tiny/data.yaml", "--output", str(folder), "--parts", "8"])
    return folder


@pytest.fixture
def dataset(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "parts")
    return tmp_path / "parts"


def flip(path: Path, seed: Any) -> bytes:
    """Change one bit of a random byte of a file; return the original content."""
    original, draw = path.read_bytes(), random.Random(f"{path.name} {seed}")
    changed = bytearray(original)
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    path.write_bytes(changed)
    return original


@pytest.mark.parametrize("name", [*RECORDS, *ROWS])
def test_any_changed_byte_of_a_dataset_is_refused_with_the_name_of_its_file(dataset: Path, name: str) -> None:
    load_dataset(dataset)
    for seed in range(FLIPS):
        original = flip(dataset / name, seed)
        with pytest.raises(EchoError, match=re.escape(str(dataset / name)) + ".*rebuild the dataset"):
            load_dataset(dataset)
        (dataset / name).write_bytes(original)
    (dataset / name).unlink()
    with pytest.raises(EchoError, match=r"is missing since|is not a dataset \(it has no manifest.json\)"):
        load_dataset(dataset)


def commands(dataset: Path, output: Path) -> dict[str, Callable[[], Any]]:
    model = ["--model_name_or_path", str(ECHO_TINY), "--min_pixels", str(MIN_PIXELS), "--max_pixels", str(MAX_PIXELS)]
    where = ["--output", str(output)]
    return {
        "audit": lambda: audit.main([str(dataset)]),
        "convert": lambda: convert.main(["--dataset", str(dataset), "--format", "trl", *where]),
        "show": lambda: show.main(["--dataset", str(dataset)]),
        "run": lambda: run.main(["--dataset", str(dataset), *model, *where]),
        "export": lambda: export.find_dataset(
            export.ExportConfig("adapters", str(output), dataset=str(dataset)),
            None,  # type: ignore[arg-type]
        ),
    }


@pytest.mark.parametrize("command", ["audit", "convert", "show", "run", "export"])
def test_every_command_on_a_changed_dataset_names_the_file(dataset: Path, tmp_path: Path, command: str) -> None:
    flip(dataset / "questions.jsonl", command)
    with pytest.raises(EchoError, match=r"questions\.jsonl has changed since the dataset was built; restore it or reb"):
        commands(dataset, tmp_path / "out")[command]()
    assert not (tmp_path / "out").exists()


def train(dataset: Path, output: Path) -> subprocess.CompletedProcess[str]:
    options = ["--config", "recipes/tiny/decision_maker.yaml", "--dataset", dataset, "--output_dir", output]
    command = [sys.executable, "train/sft.py", *map(str, options), "--max_steps", "1", "--use_cpu", "true"]
    return subprocess.run([*command, "--eval_strategy", "no"], capture_output=True, text=True)


def test_the_collator_names_a_changed_image_or_mask(dataset: Path, row_builder: RowBuilder) -> None:
    digests = read_digests(load_dataset(dataset))
    inspections = {one.id: one for one in read_jsonl(dataset / "inspections.jsonl", Inspection)}
    rows = [json.loads(line) for line in (dataset / ROWS[0]).read_text().splitlines()]
    row = next(row for row in rows if inspections[row["case"]].mask)
    mask = inspections[row["case"]].mask
    for name in (*row["images"], mask):
        content = (dataset / name).read_bytes()
        for changed in (content, content + b"."):  # still the same pixels
            (dataset / name).write_bytes(changed)
            collate = Collator(row_builder, dataset, pixel_dtype=torch.float32, marks=inspections, digests=digests)
            if changed == content:
                collate([{"exchanges": [row]}])
            else:
                with pytest.raises(EchoError, match=re.escape(f"{dataset / name} has changed since the dataset was b")):
                    collate([{"exchanges": [row]}])
        (dataset / name).write_bytes(content)


@pytest.mark.slow
def test_training_refuses_changed_rows_and_each_changed_image_when_it_reads_it(dataset: Path, tmp_path: Path) -> None:
    original = flip(dataset / ROWS[-1], "train")
    refused = train(dataset, tmp_path / "out")
    assert refused.returncode == 2, refused.stderr
    assert f"error: {dataset / ROWS[-1]} has changed since the dataset was built" in refused.stderr
    (dataset / ROWS[-1]).write_bytes(original)
    for image in json.loads((dataset / DIGESTS).read_text()):
        content = (dataset / image).read_bytes()
        (dataset / image).write_bytes(content + b".")  # still the same pixels
    refused = train(dataset, tmp_path / "out")
    assert refused.returncode == 2, refused.stderr
    assert "has changed since the dataset was built; restore it or rebuild the dataset" in refused.stderr
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
