"""Training reads the rows of exactly the dataset that it names, and does not copy them anywhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import datasets
import pytest
from trl import SFTConfig

from echo_ft.data.dataset import load_dataset
from echo_ft.errors import EchoError
from echo_ft.records import Branch, Exchange
from echo_ft.training.cases import EXCHANGE_SCHEMA, load_training_cases
from echo_ft.training.config import EchoConfig
from tests.conftest import MAX_PIXELS, MIN_PIXELS, make_dataset

ROLE = "decision_maker"

NEIGHBOURS = [
    ("parts[2]", "parts2"),
    ("parts[!a]", "partsb"),
    ("parts*", "parts2"),
    ("parts?", "parts2"),
    ("{parts}", "parts"),
    ("parts::2", "parts"),
    ("**", "parts"),
    ("부품[가-힣]", "부품품"),
]
"""The name of a dataset, and the name of another one that would match the first if it were read as a pattern."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("drawn") / "parts", train=3, validation=1, test=0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty cache of Hugging Face Datasets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def rows_of(folder: Path) -> list[dict]:
    return list(map(json.loads, (folder / "sft" / ROLE / "train.jsonl").read_text(encoding="utf-8").splitlines()))


def load_rows(folder: Path, row_builder, output: Path) -> list[dict]:
    config = EchoConfig(role=ROLE, dataset=str(folder), min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    sft = SFTConfig(output_dir=str(output), use_cpu=True, bf16=False, report_to="none")
    cases, planned = load_training_cases(row_builder, load_dataset(folder), config, sft, "train")
    assert len(cases) == len(planned.cases())
    return [row for case in cases for row in case["exchanges"]]


@pytest.mark.parametrize(("name", "neighbour"), NEIGHBOURS)
def test_rows_are_those_of_the_named_dataset(name: str, neighbour: str, drawn: Path, row_builder, cache, tmp_path):
    for folder in (name, neighbour):
        shutil.copytree(drawn, tmp_path / folder)
    path = tmp_path / neighbour / "sft" / ROLE / "train.jsonl"
    path.write_text(path.read_text().replace("Scratch.", "Graze."))
    assert load_rows(tmp_path / name, row_builder, tmp_path / "out") == rows_of(drawn)
    assert load_rows(tmp_path / neighbour, row_builder, tmp_path / "out") == rows_of(tmp_path / neighbour)
    assert not cache.exists()


def test_rejected_rows_are_left_out_and_the_dataset_folder_stays_as_it_is(drawn, row_builder, cache, tmp_path):
    folder = tmp_path / "parts"
    shutil.copytree(drawn, folder)
    (folder / "images" / "train_1_2.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert load_rows(folder, row_builder, tmp_path / "out") == [r for r in rows_of(folder) if r["case"] != "train/1"]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert not cache.exists()


def test_the_schema_has_every_field_of_an_exchange():
    exchange = Exchange(ROLE, "c", ("a.png",), "x", (Branch("1", "y", "A"), Branch("2", "z")), "1")
    assert EXCHANGE_SCHEMA.names == [field.name for field in fields(Exchange)]
    branch = EXCHANGE_SCHEMA.field("branches").type.value_type
    assert [field.name for field in branch] == list(asdict(exchange)["branches"][0])


def test_an_empty_split_names_a_remedy_that_works_for_given_splits(drawn: Path, row_builder, tmp_path: Path) -> None:
    """Without `--split seeded`, `fractions` have no effect on a source that gives its splits, such as MVTec AD."""
    shutil.copytree(drawn, tmp_path / "parts")
    (tmp_path / "parts" / "sft" / ROLE / "validation.jsonl").write_text("")
    config = EchoConfig(role=ROLE, dataset=str(tmp_path / "parts"), min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    sft = SFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(EchoError, match=r"validation\.jsonl is empty; .*--split seeded.* or set eval_strategy: \"no\""):
        load_training_cases(row_builder, load_dataset(tmp_path / "parts"), config, sft, "validation")
