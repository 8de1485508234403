"""A build says how it read the source: conditions, merged images, what was left out, and what looks wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from data_prep.build import build, main
from data_prep.manifest import MAX_CONDITIONS, condition_summary
from echo_ft.data.dataset import load_dataset
from tests.support.drawn_manifest import edit_rows, flags, make_config
from tests.support.folder_layouts import labelme_file, write_json


def rows_of(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def with_boxes(manifest: Path) -> list[dict]:
    """The rows, with two boxes instead of each mask; some of these images have two defects."""
    rows = rows_of(manifest)
    for number, row in enumerate(row for row in rows if row.pop("mask", None)):
        row["boxes"] = [[4, 4, 12, 12], [24, 20, 40, 32]]
        row["condition"] = ("dent", "stain", "dent+stain")[number % 3]
    return rows


def row_per_box(rows: list[dict]) -> list[dict]:
    made = []
    for row in rows:
        for number, box in enumerate(row.get("boxes", [])):
            names = row["condition"].split("+")
            made.append(row | {"boxes": [box], "condition": names[number % len(names)]})
        if not row.get("boxes"):
            made.append(row)
    return made


def test_a_row_per_box_gives_the_dataset_of_a_row_per_image(small_manifest, tmp_path):
    rows = with_boxes(small_manifest)
    small_manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = build(make_config(small_manifest, tmp_path / "whole"))
    boxes = row_per_box(rows)
    small_manifest.write_text("".join(json.dumps(row) + "\n" for row in boxes))
    divided = build(make_config(small_manifest, tmp_path / "divided"))
    assert len(boxes) == len(rows) + 12
    assert load_dataset(tmp_path / "whole").fingerprint == load_dataset(tmp_path / "divided").fingerprint
    assert (whole["counts"]["merged"], divided["counts"]["merged"]) == (0, 12)
    assert (
        whole["counts"]["conditions"]
        == divided["counts"]["conditions"]
        == {"good": 12, "dent": 4, "dent+stain": 4, "stain": 4}
    )
    assert condition_summary(divided) == "good 12, dent 4, dent+stain 4, stain 4; 12 combined from several entries"


def test_a_summary_names_the_most_frequent_conditions_only():
    counts = {"good": 3, **{f"d{n}": 9 - n for n in range(8)}}
    text = condition_summary({"counts": {"conditions": counts, "merged": 0}})
    assert text == "good 3, d0 9, d1 8, d2 7, d3 6, d4 5, d5 4, 2 others 5"
    assert text.count(",") == MAX_CONDITIONS + 1


def test_the_command_takes_words_for_good_and_prints_the_summary(small_manifest, tmp_path, capsys):
    words = iter(("no defect", "0", "N/A", "-", "正常"))
    edit_rows(
        small_manifest, lambda row: row.update(condition=next(words, "OK")) if row["condition"] == "good" else None
    )
    config = {"source": "manifest", "annotations": small_manifest, "descriptor": "skimage", "k": 2}
    declared = ["--good", "ok", "no_defect", "0", "n/a", "-"]
    main([*flags(**config, output=tmp_path / "out"), *declared])
    lines = capsys.readouterr().out.splitlines()
    assert "  conditions good 11, dent 6, stain 6" in lines
    assert "1 rejected; see rejected.jsonl" in lines
    assert any(line.startswith("  first: parts.jsonl:5: condition '正常' must be spelled 'good'") for line in lines)
    assert len(lines) <= 9
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["config"]["good"] == declared[1:]


def test_copies_with_different_conditions_are_a_warning(small_manifest, tmp_path):
    root = small_manifest.parent
    shutil.copy(root / "cap/good-0-1.png", root / "cap/again.png")
    row = {"image": "cap/again.png", "product": "cap", "condition": "dent"}
    small_manifest.write_text(small_manifest.read_text() + json.dumps(row) + "\n")
    warnings = build(make_config(small_manifest, tmp_path / "out"))["warnings"]
    (warning,) = (text for text in warnings if "different conditions in different files" in text)
    assert "cap/good-0-1.png (good) = cap/again.png (dent)" in warning


def test_a_reference_that_copies_a_defective_image_is_a_warning(small_manifest, tmp_path):
    """An image that the manifest does not list has no condition that could contradict its use."""
    root = small_manifest.parent
    shutil.copy(root / "cap/dent-0-1.png", root / "cap/baseline.png")
    shutil.copy(root / "cap/good-0-1.png", root / "cap/other.png")
    named = {"cap/dent-0-1.png": "cap/baseline.png", "cap/stain-0-1.png": "cap/baseline.png"}
    named["cap/stain-1-1.png"] = "cap/other.png"
    edit_rows(small_manifest, lambda row: row.update(reference=named.get(row["image"])))
    warnings = build(make_config(small_manifest, tmp_path / "out"))["warnings"]
    (warning,) = (text for text in warnings if "images that show a defect" in text)
    assert "references of 2 images are copies" in warning and "cap/dent-0-1.png, cap/stain-0-1.png; name" in warning


def test_one_mask_of_two_parts_is_a_warning(small_manifest, tmp_path):
    masks = {"cap/dent-0-1.png": "cap/dent-1-1_mask.png", "cap/stain-0-1.png": "cap/stain-0-2_mask.png"}
    edit_rows(small_manifest, lambda row: row.update(mask=masks.get(row["image"], row.get("mask"))))
    warnings = build(make_config(small_manifest, tmp_path / "out"))["warnings"]
    (warning,) = (text for text in warnings if "one mask belongs" in text)
    assert "cap/dent-1-1_mask.png of cap/dent-0-1.png and cap/dent-1-1.png" in warning
    assert "stain" not in warning, "two exposures of one part may share a mask"


def test_images_that_are_good_by_convention_are_counted(small_manifest, tmp_path):
    root = small_manifest.parent
    for row in rows_of(small_manifest):
        name = Path(row["image"])
        shapes = [(row["condition"], "rectangle", [[4, 4], [12, 12]])] if row.get("mask") else []
        content = labelme_file(name.name, shapes, (48, 40))
        content["flags"] = {"dent": False} if name.name.startswith("good-0") else {"ok": not shapes}
        write_json((root / name).with_suffix(".json"), content)
    small_manifest.unlink()
    manifest = build(make_config(None, tmp_path / "out", root=root, split="seeded"))
    assert manifest["counts"]["conditions"] == {"dent": 6, "good": 12, "stain": 6}
    assert manifest["counts"]["unannotated"] == 2
    assert any(
        text.startswith("2 images without annotations were read as good: cap/good-0-1.png, cap/good-0-2.png")
        for text in manifest["warnings"]
    )
