"""`data_prep.audit` reports every leak between training and test images and stores its verdict in the manifest."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.data.audit import make_leak
from data_prep.audit import AuditConfig, audit
from echo_ft.data.dataset import DATASET_FORMAT, DIGESTS, images_fingerprint, load_dataset
from echo_ft.errors import EchoError
from echo_ft.files import write_jsonl
from echo_ft.leakage.matches import find_matches
from echo_ft.provenance import content_hash
from echo_ft.records import Inspection, Reference
from tests.conftest import ROOT


def dataset(folder: Path, rows: list[Inspection], references: list[Reference] = [], **config: str) -> Path:  # noqa: B006
    """A dataset folder over the images of `folder.parent`, as far as the audit reads one."""
    folder.mkdir()
    write_jsonl(folder / "inspections.jsonl", rows)
    write_jsonl(folder / "references.jsonl", references)
    manifest = {
        "format": DATASET_FORMAT,
        "root": "..",
        "fingerprint": f"of {folder.name}",
        "config": config,
        "warnings": [],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def photograph(root: Path, name: str, split: str, seed: int, product: str = "cap", group: str = "") -> Inspection:
    """An inspection with an image of noise, which `seed` decides."""
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC)
    image.save(root / name)
    return Inspection(name, name, "line", product, "good", group or name, split)


def clean(root: Path) -> list[Inspection]:
    rows = [photograph(root, f"train{number}.png", "train", number) for number in range(12)]
    rows += [photograph(root, "validation.png", "validation", 50)]
    return rows + [photograph(root, f"test{number}.png", "test", 100 + number) for number in range(4)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_prep.audit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_command_reports_a_leak_with_pictures_and_leaves_the_verdict_in_the_manifest(tmp_path):
    train = dataset(tmp_path / "train", clean(tmp_path))
    rng = np.random.default_rng(0)
    leaks = [make_leak(tmp_path / "train3.png", tmp_path / "leak0", "copy", rng)]
    leaks += [make_leak(tmp_path / "validation.png", tmp_path / "leak1", "re-encoding", rng)]
    rows = [photograph(tmp_path, f"other{number}.png", "test", 200 + number, "ring") for number in range(4)]
    rows += [Inspection(path.name, path.name, "line", "ring", "good", path.name, "test") for path in leaks]
    evaluation = dataset(tmp_path / "evaluation", rows)

    done = run(train, evaluation, "--output", tmp_path / "report")
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip().startswith(f"LEAK: what {train} trains on is in the test split of {evaluation}: 1 of 6")
    report = json.loads((tmp_path / "report" / "audit.json").read_text())
    assert [(pair["kind"], pair["trained"], pair["asked"]) for pair in report["pairs"]] == [
        ("copy", "train3.png", "leak0.png"),
        ("near-duplicate", "validation.png", "leak1.jpg"),
    ]
    assert {finding["name"]: finding["count"] for finding in report["findings"] if finding["count"]} == {
        "copies": 1,
        "near-duplicates": 1,
    }
    page = (tmp_path / "report" / "audit.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == page.count("<img") == 4
    assert not re.search(r"https?://|<script|<link", page)
    assert "leak1.jpg" in page and "validation.png" in page

    audits = load_dataset(train).manifest["audits"]
    assert audits["of evaluation"]["leak"] is True
    assert audits["of evaluation"]["verdict"] == report["verdict"]
    assert load_dataset(train).manifest["warnings"] == []


def test_a_clean_dataset_exits_0_and_says_so_in_its_own_folder(tmp_path):
    folder = dataset(tmp_path / "parts", clean(tmp_path), split="seeded")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("no leak found")
    report = json.loads((folder / "audit.json").read_text())
    assert report["leak"] is False and report["pairs"] == []
    assert report["train"]["photographs"] == 13 and report["evaluation"]["photographs"] == 4
    assert (folder / "audit.html").is_file()
    assert load_dataset(folder).manifest["audits"]["of parts"]["leak"] is False


def found(config: AuditConfig) -> dict[str, tuple[int, bool]]:
    return {one["name"]: (one["count"], one["leak"]) for one in audit(config)["findings"]}


def test_groups_and_references_and_products_are_compared_by_the_records(tmp_path):
    rows = clean(tmp_path)
    rows += [photograph(tmp_path, "part_1.png", "train", 300, group="part")]
    rows += [photograph(tmp_path, "part_2.png", "test", 301, group="part")]
    references = [Reference("train0.png", "test1.png", 0.9, 1), Reference("test0.png", "train1.png", 0.9, 1)]
    seeded = dataset(tmp_path / "seeded", rows, references, split="seeded")
    findings = found(AuditConfig([seeded]))
    assert findings["groups"] == (1, True)
    assert findings["references"] == (1, True), "test1.png stood beside train0.png"
    assert findings["products"] == (1, False), "a seeded split has every product on both sides"
    assert findings["tested beside"] == (1, False), "train1.png stands beside test0.png"
    by_product = dataset(tmp_path / "by_product", rows, references, split="by_product")
    assert found(AuditConfig([by_product]))["products"] == (1, True)


def test_two_folders_share_products_only_where_that_is_allowed(tmp_path):
    rows = clean(tmp_path)
    one, other = (dataset(tmp_path / split, [row for row in rows if row.split == split]) for split in ("train", "test"))
    assert found(AuditConfig([one, other]))["products"] == (1, True)
    allowed = audit(AuditConfig([one, other], shared_products=True))
    assert not allowed["leak"] and allowed["verdict"].startswith("no leak found")


@pytest.mark.parametrize(
    ("names", "products", "namesakes"),
    [
        (("MVTec-AD", "DS-MVTec"), (1, True), (0, False)),  # MMAD's name for it
        (("parts_train", "parts_test"), (0, True), (1, False)),
    ],
)
def test_products_under_two_names_of_a_dataset_are_told(tmp_path, names, products, namesakes):
    rows = [dataclasses.replace(row, dataset=names[row.split == "test"]) for row in clean(tmp_path)]
    one, other = (dataset(tmp_path / split, [row for row in rows if row.split == split]) for split in ("train", "test"))
    findings = found(AuditConfig([one, other]))
    assert (findings["products"], findings["same names"]) == (products, namesakes)


def test_products_of_many_photographs_are_named(tmp_path, monkeypatch):
    rows = clean(tmp_path)
    assert found(AuditConfig([dataset(tmp_path / "few", rows)]))["crowded"] == (0, False)
    monkeypatch.setattr("data_prep.audit.NEAREST_HASHES", 1)
    assert found(AuditConfig([dataset(tmp_path / "many", rows)]))["crowded"] == (1, False)


def test_each_evaluation_keeps_its_verdict_in_the_manifest(tmp_path):
    rows = clean(tmp_path)
    folder = dataset(tmp_path / "parts", rows)
    copied = Path(shutil.copy(tmp_path / "train5.png", tmp_path / "copied.png"))
    leaking = Inspection("copied", copied.name, "elsewhere", "ring", "good", "ring", "test")
    other = dataset(tmp_path / "other", [leaking])
    audit(AuditConfig([folder, other]))
    audit(AuditConfig([folder]))
    audits = load_dataset(folder).manifest["audits"]
    assert {name: one["leak"] for name, one in audits.items()} == {"of other": True, "of parts": False}


def test_what_happens_to_the_folder_during_an_audit_is_not_undone(tmp_path, monkeypatch):
    rows = clean(tmp_path)
    folder = dataset(tmp_path / "parts", rows)
    copied = Path(shutil.copy(tmp_path / "train5.png", tmp_path / "copied.png"))
    other = dataset(
        tmp_path / "other", [Inspection("copied", copied.name, "elsewhere", "ring", "good", "ring", "test")]
    )

    def meanwhile(event):
        def find(*arguments):
            monkeypatch.undo()
            event()
            return find_matches(*arguments)

        monkeypatch.setattr("data_prep.audit.find_matches", find)

    def build_anew():
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "new"}))

    meanwhile(lambda: audit(AuditConfig([folder, other])))
    audit(AuditConfig([folder]))
    audits = load_dataset(folder).manifest["audits"]
    assert {name: one["leak"] for name, one in audits.items()} == {"of other": True, "of parts": False}
    meanwhile(build_anew)
    with pytest.raises(EchoError, match="parts was built anew during the audit; audit it again"):
        audit(AuditConfig([folder]))
    assert load_dataset(folder).fingerprint == "new"


def test_a_photograph_that_was_changed_since_the_build_is_an_error(tmp_path):
    rows = clean(tmp_path)
    folder = dataset(tmp_path / "parts", rows)
    digests = {row.image: content_hash(tmp_path / row.image).hex() for row in rows}
    (folder / DIGESTS).write_text(json.dumps(digests))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"images_fingerprint": images_fingerprint(digests)}))
    assert not audit(AuditConfig([folder]))["leak"]
    shutil.copy(tmp_path / "train5.png", tmp_path / "test1.png")
    with pytest.raises(EchoError, match=r"1 of 4 images have changed since .* was built \(first: test1.png\)"):
        audit(AuditConfig([folder]))


def test_a_path_that_two_roots_have_is_no_part_on_both_sides_but_a_named_part_is(tmp_path):
    folders = []
    for place, seed in (("first", 0), ("second", 500)):
        root = tmp_path / place
        root.mkdir()
        rows = [
            photograph(root, f"{number}.png", split, seed + number) for number, split in enumerate(["train", "test"])
        ]
        rows += [
            photograph(root, f"part-{place}-{split}.png", split, seed + 9, group="part") for split in ("train", "test")
        ]
        folders.append(dataset(root / "dataset", rows))
    assert found(AuditConfig(folders, shared_products=True))["groups"] == (1, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--folders"),
        (["a", "b", "c"], "3 folders were given"),
        (["missing"], "there is no dataset missing"),
        (["tests"], "tests is not a dataset"),
        (["missing", "--descripter", "x"], "unknown option --descripter"),
    ],
)
def test_a_user_mistake_exits_2_with_one_sentence(arguments, words):
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_side_without_photographs_and_an_output_that_cannot_be_written_are_errors(tmp_path):
    rows = clean(tmp_path)
    untested = dataset(tmp_path / "untested", [row for row in rows if row.split != "test"])
    with pytest.raises(EchoError, match="untested has no photograph in the split test"):
        audit(AuditConfig([untested]))
    whole = dataset(tmp_path / "whole", rows)
    (tmp_path / "file").write_text("")
    with pytest.raises(EchoError, match=r"the report cannot be written .*; choose another output"):
        audit(AuditConfig([whole], tmp_path / "file"))
