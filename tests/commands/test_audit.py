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
from echo_ft.data.dataset import DATASET_FORMAT, DIGESTS, images_fingerprint, load_dataset, write_manifest
from echo_ft.errors import EchoError
from echo_ft.files import write_jsonl
from echo_ft.leakage.matches import find_matches
from echo_ft.provenance import content_hash
from echo_ft.records import Inspection, Reference
from tests.conftest import ROOT


def dataset(folder: Path, rows: list[Inspection], references: list[Reference] = [], **config: str) -> Path:  # noqa: B006
    """Write the files of a dataset folder that the audit reads, with images in `folder.parent`."""
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


def noise_inspection(root: Path, name: str, split: str, seed: int, product: str = "cap", group: str = "") -> Inspection:
    """Write a noise image that depends only on `seed`, and return its inspection."""
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC)
    image.save(root / name)
    return Inspection(name, name, "line", product, "good", group or name, split)


def clean_rows(root: Path) -> list[Inspection]:
    """17 inspections without a leak: 12 for training, 1 for validation and 4 for testing."""
    rows = [noise_inspection(root, f"train{number}.png", "train", number) for number in range(12)]
    rows += [noise_inspection(root, "validation.png", "validation", 50)]
    return rows + [noise_inspection(root, f"test{number}.png", "test", 100 + number) for number in range(4)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_prep.audit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_audit_reports_leaks_with_images_and_stores_the_verdict(tmp_path):
    train = dataset(tmp_path / "train", clean_rows(tmp_path))
    rng = np.random.default_rng(0)
    leaks = [make_leak(tmp_path / "train3.png", tmp_path / "leak0", "copy", rng)]
    leaks += [make_leak(tmp_path / "validation.png", tmp_path / "leak1", "re-encoding", rng)]
    rows = [noise_inspection(tmp_path, f"other{number}.png", "test", 200 + number, "ring") for number in range(4)]
    rows += [Inspection(path.name, path.name, "line", "ring", "good", path.name, "test") for path in leaks]
    evaluation = dataset(tmp_path / "evaluation", rows)

    done = run(train, evaluation, "--output", tmp_path / "report")
    assert done.returncode == 1, done.stderr
    leak = f"LEAK: training data of {train} is in the test split of {evaluation}: 1 of 6"
    assert done.stderr.strip().startswith(leak)
    report = json.loads((tmp_path / "report" / "audit.json").read_text())
    assert [(pair["kind"], pair["trained"], pair["asked"]) for pair in report["pairs"]] == [
        ("copy", "train3.png", "leak0.png"),
        ("near-duplicate", "validation.png", "leak1.jpg"),
    ]
    assert {finding["name"]: finding["count"] for finding in report["findings"] if finding["count"]} == {
        "copies": 1,
        "near-duplicates": 1,
        "few images": 1,
    }
    assert report["verdict"].endswith(
        "look at the pairs: 1 may be different parts, because their product has few images"
    )
    page = (tmp_path / "report" / "audit.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == page.count("<img") == 4
    assert not re.search(r"https?://|<script|<link", page)
    assert "leak1.jpg" in page
    assert "validation.png" in page

    audits = load_dataset(train).manifest["audits"]
    assert audits["of evaluation"]["leak"] is True
    assert audits["of evaluation"]["verdict"] == report["verdict"]
    assert load_dataset(train).manifest["warnings"] == []


def test_near_duplicates_are_doubtful_only_in_products_with_few_images(tmp_path, monkeypatch):
    rows = clean_rows(tmp_path)
    leak = make_leak(tmp_path / "train3.png", tmp_path / "leak", "re-encoding", np.random.default_rng(0))
    rows.append(Inspection(leak.name, leak.name, "line", "ring", "good", leak.name, "test"))
    folder = dataset(tmp_path / "parts", rows)
    assert audit_findings(AuditConfig([folder]))["few images"] == (1, False)
    monkeypatch.setattr("data_prep.audit.FEW_IMAGES", 5)
    found = audit(AuditConfig([folder]))
    assert {one["name"]: one["count"] for one in found["findings"]}["few images"] == 0
    assert found["leak"] and "few images" not in found["verdict"]


def test_clean_dataset_exits_with_0_and_gets_a_report(tmp_path):
    folder = dataset(tmp_path / "parts", clean_rows(tmp_path), split="seeded")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("no leak found")
    report = json.loads((folder / "audit.json").read_text())
    assert report["leak"] is False
    assert report["pairs"] == []
    assert report["train"]["images"] == 13 and report["evaluation"]["images"] == 4
    assert (folder / "audit.html").is_file()
    assert load_dataset(folder).manifest["audits"]["of parts"]["leak"] is False


def audit_findings(config: AuditConfig) -> dict[str, tuple[int, bool]]:
    """Return (count, whether it is a leak) by the name of each finding."""
    return {one["name"]: (one["count"], one["leak"]) for one in audit(config)["findings"]}


def test_groups_references_and_products_are_compared_by_record(tmp_path):
    rows = clean_rows(tmp_path)
    rows += [noise_inspection(tmp_path, "part_1.png", "train", 300, group="part")]
    rows += [noise_inspection(tmp_path, "part_2.png", "test", 301, group="part")]
    references = [Reference("train0.png", "test1.png", 0.9, 1), Reference("test0.png", "train1.png", 0.9, 1)]
    seeded = dataset(tmp_path / "seeded", rows, references, split="seeded")
    findings = audit_findings(AuditConfig([seeded]))
    assert findings["groups"] == (1, True)
    assert findings["references"] == (1, True), "test1.png was the reference of train0.png"
    assert findings["products"] == (1, False), "a seeded split has every product on both sides"
    assert findings["test references"] == (1, False), "train1.png is the reference of test0.png"
    by_product = dataset(tmp_path / "by_product", rows, references, split="by_product")
    assert audit_findings(AuditConfig([by_product]))["products"] == (1, True)


def test_two_folders_may_share_products_only_if_allowed(tmp_path):
    rows = clean_rows(tmp_path)
    one, other = (dataset(tmp_path / split, [row for row in rows if row.split == split]) for split in ("train", "test"))
    assert audit_findings(AuditConfig([one, other]))["products"] == (1, True)
    allowed = audit(AuditConfig([one, other], shared_products=True))
    assert not allowed["leak"]
    assert allowed["verdict"].startswith("no leak found")


@pytest.mark.parametrize(
    ("names", "products", "namesakes"),
    [
        (("MVTec-AD", "DS-MVTec"), (1, True), (0, False)),  # MMAD's name for it
        (("parts_train", "parts_test"), (0, True), (1, False)),
    ],
)
def test_products_are_found_under_two_names_of_a_dataset(tmp_path, names, products, namesakes):
    rows = [dataclasses.replace(row, dataset=names[row.split == "test"]) for row in clean_rows(tmp_path)]
    one, other = (dataset(tmp_path / split, [row for row in rows if row.split == split]) for split in ("train", "test"))
    findings = audit_findings(AuditConfig([one, other]))
    assert (findings["products"], findings["same names"]) == (products, namesakes)


def test_products_with_many_images_are_reported(tmp_path, monkeypatch):
    rows = clean_rows(tmp_path)
    assert audit_findings(AuditConfig([dataset(tmp_path / "few", rows)]))["crowded"] == (0, False)
    monkeypatch.setattr("data_prep.audit.NEAREST_HASHES", 1)
    assert audit_findings(AuditConfig([dataset(tmp_path / "many", rows)]))["crowded"] == (1, False)


def test_manifest_keeps_the_verdict_of_each_evaluation(tmp_path):
    rows = clean_rows(tmp_path)
    folder = dataset(tmp_path / "parts", rows)
    copied = Path(shutil.copy(tmp_path / "train5.png", tmp_path / "copied.png"))
    leaking = Inspection("copied", copied.name, "elsewhere", "ring", "good", "ring", "test")
    other = dataset(tmp_path / "other", [leaking])
    audit(AuditConfig([folder, other]))
    audit(AuditConfig([folder]))
    audits = load_dataset(folder).manifest["audits"]
    assert {name: one["leak"] for name, one in audits.items()} == {"of other": True, "of parts": False}


def test_audit_does_not_undo_changes_made_while_it_runs(tmp_path, monkeypatch):
    rows = clean_rows(tmp_path)
    folder = dataset(tmp_path / "parts", rows)
    copied = Path(shutil.copy(tmp_path / "train5.png", tmp_path / "copied.png"))
    other = dataset(
        tmp_path / "other", [Inspection("copied", copied.name, "elsewhere", "ring", "good", "ring", "test")]
    )

    def during_the_audit(event):
        def find(*arguments):
            monkeypatch.undo()
            event()
            return find_matches(*arguments)

        monkeypatch.setattr("data_prep.audit.find_matches", find)

    def rebuild():
        manifest = json.loads((folder / "manifest.json").read_text())
        write_manifest(folder, manifest | {"fingerprint": "new"})

    during_the_audit(lambda: audit(AuditConfig([folder, other])))
    audit(AuditConfig([folder]))
    audits = load_dataset(folder).manifest["audits"]
    assert {name: one["leak"] for name, one in audits.items()} == {"of other": True, "of parts": False}
    during_the_audit(rebuild)
    with pytest.raises(EchoError, match="parts was rebuilt during the audit; rerun the audit"):
        audit(AuditConfig([folder]))
    assert load_dataset(folder).fingerprint == "new"


def test_image_changed_since_the_build_is_an_error(tmp_path):
    rows = clean_rows(tmp_path)
    folder = dataset(tmp_path / "parts", rows)
    digests = {row.image: content_hash(tmp_path / row.image).hex() for row in rows}
    (folder / DIGESTS).write_text(json.dumps(digests))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"images_fingerprint": images_fingerprint(digests)}))
    assert not audit(AuditConfig([folder]))["leak"]
    shutil.copy(tmp_path / "train5.png", tmp_path / "test1.png")
    with pytest.raises(EchoError, match=r"1 of 4 images have changed since .* was built \(first: test1.png\)"):
        audit(AuditConfig([folder]))


def test_parts_are_matched_across_roots_by_group_not_by_path(tmp_path):
    folders = []
    for name, seed in (("first", 0), ("second", 500)):
        root = tmp_path / name
        root.mkdir()
        rows = [
            noise_inspection(root, f"{number}.png", split, seed + number)
            for number, split in enumerate(["train", "test"])
        ]
        rows += [
            noise_inspection(root, f"part-{name}-{split}.png", split, seed + 9, group="part")
            for split in ("train", "test")
        ]
        folders.append(dataset(root / "dataset", rows))
    assert audit_findings(AuditConfig(folders, shared_products=True))["groups"] == (1, True)


def test_frames_without_a_group_share_no_part_across_roots(tmp_path):
    """Without a group, an image belongs to the part of its file, and the other root has another file of this name."""
    folders = []
    for name, seed, splits in (("first", 0, ("train", "test")), ("second", 500, ("test", "train"))):
        root = tmp_path / name
        root.mkdir()
        rows = []
        for number, split in enumerate(splits):
            one = noise_inspection(root, f"{number}.png", split, seed + number)
            image = f"{number}.png#frame=0"
            rows.append(dataclasses.replace(one, id=image, image=image, group=f"{number}.png"))
        folders.append(dataset(root / "dataset", rows))
    assert audit_findings(AuditConfig(folders, shared_products=True))["groups"] == (0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--folders"),
        (["a", "b", "c"], "3 folders were given"),
        (["missing"], "there is no dataset missing"),
        (["tests"], "tests is not a dataset"),
        (["missing", "--descripter", "x"], "unknown option --descripter"),
    ],
)
def test_user_mistake_exits_with_2_and_one_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_empty_split_and_unwritable_output_are_errors(tmp_path):
    rows = clean_rows(tmp_path)
    untested = dataset(tmp_path / "untested", [row for row in rows if row.split != "test"])
    with pytest.raises(EchoError, match="untested has no image in the split test"):
        audit(AuditConfig([untested]))
    whole = dataset(tmp_path / "whole", rows)
    (tmp_path / "file").write_text("")
    with pytest.raises(EchoError, match=r"the report cannot be written .*; choose another output"):
        audit(AuditConfig([whole], tmp_path / "file"))
