"""MMAD, folder, manifest and magnetic-tile sources yield correct records and report everything they cannot use."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from data_prep.sources import SourceConfig, folder, magnetic_tile, manifest, mmad
from echo_ft.errors import EchoError
from echo_ft.records import QUESTION_TYPES, Inspection
from tests.conftest import ROOT
from tests.support import folder_layouts
from tests.support.folder_layouts import draw, split_items, write_csv

DATA = Path(os.environ.get("ECHO_FT_DATA", ROOT.parent / "shared" / "data"))


# mmad


@pytest.fixture
def mmad_root(tmp_path: Path) -> Path:
    """A complete root with one query from each of MMAD's layouts."""
    return folder_layouts.mmad(tmp_path).config.root


def read_mmad(root: Path):
    return split_items(mmad.read(SourceConfig(root, root / "mmad.json")))


def edit(root: Path, key: str, **changes) -> None:
    rows = json.loads((root / "mmad.json").read_text())
    rows[key].update(changes)
    (root / "mmad.json").write_text(json.dumps(rows))


def test_mmad_finds_queries_masks_and_normal_images_of_all_layouts(mmad_root):
    inspections, questions, rejections = read_mmad(mmad_root)
    assert rejections == []
    queries = {i.image: i for i in inspections if i.split == "test"}
    assert {path: i.condition for path, i in queries.items()} == {
        "DS-MVTec/bottle/image/broken_large/000.png": "broken_large",
        "DS-MVTec/bottle/image/good/000.png": "good",
        "MVTec-LOCO/pushpins/test/logical_anomalies/003.png": "logical_anomalies",
        "VisA/candle/test/bad/000.JPG": "bad",
        "GoodsAD/drink_can/test/opened/001_002.jpg": "opened",
    }
    assert all((mmad_root / i.mask).is_file() for i in queries.values() if i.mask)
    assert sum(i.mask is not None for i in queries.values()) == 3
    normals = Counter((i.dataset, i.product, i.condition) for i in inspections if i.split == "train")
    assert normals == {
        (*place, "good"): 2
        for place in (("DS-MVTec", "bottle"), ("MVTec-LOCO", "pushpins"), ("VisA", "candle"), ("GoodsAD", "drink_can"))
    }
    bottle = [i.image for i in inspections if i.split == "train" and i.dataset == "DS-MVTec"]
    assert all(image.startswith("MVTec-AD/bottle/train/good/") for image in bottle)
    assert len(questions) == 5


def test_mmad_takes_the_first_random_template_as_reference(mmad_root):
    inspections, _, _ = read_mmad(mmad_root)
    assert {i.reference for i in inspections} == {None, "MVTec-AD/bottle/train/good/001.png"}


def test_mmad_merges_nine_question_types_to_seven(mmad_root):
    _, questions, _ = read_mmad(mmad_root)
    assert {question.kind for question in questions} == {"Anomaly Detection", "Object Analysis"} <= set(QUESTION_TYPES)


def test_mmad_finds_a_mask_under_the_other_spelling(mmad_root):
    folder_ = mmad_root / "DS-MVTec" / "bottle"
    draw(folder_ / "rgb_mask" / "broken_large" / "000_rgb_mask.png", 255)
    (folder_ / "rbg_mask" / "broken_large" / "000_rbg_mask.png").unlink()
    inspections, _, rejections = read_mmad(mmad_root)
    assert rejections == []
    assert "DS-MVTec/bottle/rgb_mask/broken_large/000_rgb_mask.png" in {i.mask for i in inspections}


def test_mmad_reports_missing_files_and_continues(mmad_root):
    (mmad_root / "VisA/candle/test/bad/000.JPG").unlink()
    (mmad_root / "MVTec-AD/bottle/train/good/001.png").unlink()
    (mmad_root / "MVTec-LOCO/pushpins/ground_truth/logical_anomalies/003/000.png").unlink()
    for number in range(2):
        (mmad_root / f"GoodsAD/drink_can/train/good/00{number}.png").unlink()
    inspections, _, rejections = read_mmad(mmad_root)
    assert {r.item for r in rejections} == {
        "VisA/candle/test/bad/000.JPG",
        "MVTec-AD/bottle/train/good/001.png",
        "MVTec-LOCO/pushpins/ground_truth/logical_anomalies/003/000.png",
        "GoodsAD/drink_can/train/good",
    }
    assert sum(i.split == "test" for i in inspections) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Riddle"}, "not one of MMAD's nine"),
        ({"Answer": "C"}, "not one of the options"),
        ({"Options": {"1": "Yes."}}, "letter from A to E"),
        ({"Question": " "}, "no text"),
    ],
)
def test_mmad_rejects_malformed_questions(mmad_root, change, message):
    key = "DS-MVTec/bottle/image/good/000.png"
    question = json.loads((mmad_root / "mmad.json").read_text())[key]["conversation"][0]
    edit(mmad_root, key, conversation=[{**question, **change}, question])
    _, questions, rejections = read_mmad(mmad_root)
    assert [r.item for r in rejections] == [f"{key}#0"]
    assert message in rejections[0].reason
    assert len(questions) == 5


def test_mmad_without_any_image_is_an_error(mmad_root, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(EchoError, match=r"all 5 images .* missing .*DS-MVTec 2.*looked in .*elsewhere.*--root"):
        split_items(mmad.read(SourceConfig(elsewhere, mmad_root / "mmad.json")))


@pytest.mark.parametrize("content", ["[]", "{", "{}"])
def test_mmad_rejects_other_json_files(tmp_path, content):
    (tmp_path / "mmad.json").write_text(content)
    with pytest.raises(EchoError, match=r"mmad\.json"):
        read_mmad(tmp_path)


@pytest.mark.real_data
def test_mmad_reads_every_row_of_the_real_sample(tmp_path):
    sample = DATA / "mmad" / "mmad_sample.json"
    if not sample.is_file():
        pytest.skip(f"no {sample}; set ECHO_FT_DATA to the data folder")
    rows = json.loads(sample.read_text())
    for key, row in rows.items():
        for path in (key, "/".join([*key.split("/")[:2], row["mask_path"]]) if row["mask_path"] else None):
            if path:
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / path).touch()
        (tmp_path / row["random_templates"][0]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / row["random_templates"][0]).touch()
    inspections, questions, rejections = split_items(mmad.read(SourceConfig(tmp_path, sample)))
    queries = [i for i in inspections if i.split == "test"]
    assert rejections == []
    assert len(queries) == 150
    assert len(questions) == 735
    assert all((i.mask is None) == (i.condition == "good") for i in queries)


# folder


def test_folder_reads_the_layout_of_mvtec_ad(tmp_path):
    root = tmp_path / "line"
    draw(root / "cap/train/good/000.png")
    draw(root / "cap/test/good/000.png")
    draw(root / "cap/test/dent/000.png")
    draw(root / "cap/ground_truth/dent/000_mask.png", 255)
    draw(root / "cap/test/scratch/007.JPG")
    (root / "notes").mkdir()
    inspections, _, rejections = split_items(folder.read(SourceConfig(root)))
    assert [(i.image, i.condition, i.split, i.mask) for i in inspections] == [
        ("cap/train/good/000.png", "good", "train", None),
        ("cap/test/dent/000.png", "dent", "test", "cap/ground_truth/dent/000_mask.png"),
        ("cap/test/good/000.png", "good", "test", None),
        ("cap/test/scratch/007.JPG", "scratch", "test", None),
    ]
    assert [one.item for one in rejections] == ["notes"], "an empty folder may be a product without its images"
    assert {(i.dataset, i.product) for i in inspections} == {("line", "cap")}


def test_folder_takes_val_as_validation(tmp_path):
    for place in ("train/good", "val/good", "val/dent", "validation/dent", "test/dent"):
        draw(tmp_path / "cap" / place / "000.png")
    inspections, _, rejections = split_items(folder.read(SourceConfig(tmp_path)))
    assert rejections == []
    assert Counter(i.split for i in inspections) == {"train": 1, "validation": 3, "test": 1}


def test_folder_reports_everything_it_ignores(tmp_path):
    taken = [draw(tmp_path / "cap" / place) for place in ("train/good/000.png", "test/dent/000.png")]
    draw(tmp_path / "cap/ground_truth/dent/000_mask.png", 255)
    for number in range(3):
        draw(tmp_path / f"cap/holdout/good/{number}.png")
    for place in ("test/001.png", "test/dent/cam1/x.png", "test/dent/cam1/y.png", "002.png"):
        draw(tmp_path / "cap" / place)
    draw(tmp_path / "spare/x.png"), draw(tmp_path / "loose.png")
    for place in ("cap/test/dent/003.heic", "cap/test/dent/notes.txt", "cap/list.xlsx"):
        (tmp_path / place).write_bytes(b"content")
    for companion in ("cap/license.txt", "cap/LICENSE", "readme.md", "cap/.DS_Store", "cap/test/dent/Thumbs.db"):
        (tmp_path / companion).write_bytes(b"content")
    for empty in ("empty", "bolt/train/good", "cap/test/bent"):
        (tmp_path / empty).mkdir(parents=True)
    inspections, _, rejections = split_items(folder.read(SourceConfig(tmp_path)))
    assert sorted(i.image for i in inspections) == sorted(path.relative_to(tmp_path).as_posix() for path in taken)
    found = {rejection.item: rejection.reason for rejection in rejections}
    assert len(found) == len(rejections)
    assert set(found) == {
        "cap/holdout", "cap/test/001.png", "cap/test/dent/cam1", "cap/002.png", "spare", "loose.png",
        "cap/test/dent/003.heic", "cap/test/dent/notes.txt", "cap/list.xlsx", "empty", "bolt",
    }  # fmt: skip
    assert (found["empty"], found["bolt"]) == (
        "folder ignored: it is empty", "folder ignored (files: 0): it has no image"
    )  # fmt: skip
    assert "(files: 3)" in found["cap/holdout"]
    assert "train, validation, test, val" in found["cap/holdout"]
    assert "(files: 2)" in found["cap/test/dent/cam1"]
    assert "(files: 1)" in found["spare"]
    assert "<product>/<split>/<condition>" in found["cap/test/001.png"]
    assert ".png" in found["cap/test/dent/003.heic"]


def test_folder_rejects_synonyms_of_good(tmp_path):
    for name in ("bolt/train/good/0", "bolt/test/bent/1", "nut/train/OK/0", "nut/test/normal/1", "nut/test/bent/2"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(path)
    inspections, _, rejections = split_items(folder.read(SourceConfig(tmp_path)))
    assert [(i.product, i.condition) for i in inspections] == [("bolt", "good"), ("bolt", "bent"), ("nut", "bent")]
    assert [r.item for r in rejections] == ["nut/train/OK", "nut/test/normal"]
    assert all("must be spelled 'good' for a part without a defect" in r.reason for r in rejections)


def test_folder_reports_a_missing_mask_next_to_others(tmp_path):
    draw(tmp_path / "cap/test/dent/000.png")
    draw(tmp_path / "cap/test/dent/001.png")
    draw(tmp_path / "cap/ground_truth/dent/000_mask.png", 255)
    inspections, _, rejections = split_items(folder.read(SourceConfig(tmp_path)))
    assert len(inspections) == 2
    assert [r.item for r in rejections] == ["cap/ground_truth/dent/001_mask.png"]


def test_folder_set_to_one_product_says_so(tmp_path):
    draw(tmp_path / "cap/train/good/000.png")
    with pytest.raises(EchoError, match="the folder of one product"):
        split_items(folder.read(SourceConfig(tmp_path / "cap")))


# manifest


FULL = {"product": "cap", "condition": "dent", "mask": "m.png", "group": "7", "split": "train", "reference": "n.png"}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_manifest_reads_every_column_from_csv_and_jsonl(tmp_path, kind):
    for name in ("a.png", "m.png", "n.png", "b.png"):
        draw(tmp_path / name)
    boxes = [[1, 2, 10, 12]]
    rows = [{"image": "a.png", **FULL}, {"image": "b.png", "product": "cap", "condition": "dent", "boxes": boxes}]
    path = tmp_path / f"parts.{kind}"
    if kind == "csv":
        write_csv(path, [rows[0], {**rows[1], "boxes": json.dumps(boxes)}], ["image", *FULL, "boxes"])
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    inspections, _, rejections = split_items(manifest.read(SourceConfig(tmp_path, path)))
    assert rejections == []
    assert inspections == [
        Inspection("a.png", "a.png", "parts", "cap", "dent", "7", "train", "m.png", (), "n.png"),
        Inspection("b.png", "b.png", "parts", "cap", "dent", "b.png", None, None, ((1.0, 2.0, 10.0, 12.0),)),
    ]


BAD_ROWS = [
    ({"image": "missing.png"}, "does not exist"),
    ({"image": "../outside.png"}, "outside the root"),
    ({"product": ""}, "product is missing"),
    ({"condition": "", "split": "train"}, "its condition is empty, so it cannot be in the split train; add the"),
    ({"condition": " ", "boxes": [[1, 1, 4, 4]]}, "it marks a defect, but its condition is empty; enter the"),
    ({"condition": "OK"}, "'good'"),
    ({"condition": "O.K."}, "'good'"),
    ({"condition": "bent + OK"}, "'good'"),
    ({"condition": "bent+good"}, "joins a defect with 'good'"),
    ({"condition": "bent+"}, "or with an empty name"),
    ({"split": "training"}, "not one of train, validation, test"),
    ({"mask": "missing.png"}, "mask missing.png"),
    ({"reference": "missing.png"}, "reference missing.png"),
    ({"boxes": "[[1, 2]]"}, r"\[\[x0"),
    ({"boxes": "left"}, r"\[\[x0"),
    ({"boxes": "[[1, 2, 3, 4]]", "condition": "good"}, "boxes, but"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ROWS)
def test_manifest_rejects_a_bad_row_by_its_line(tmp_path, change, message):
    draw(tmp_path / "a.png"), draw(tmp_path / "b.png"), draw(tmp_path.parent / "outside.png")
    good = {"image": "a.png", "product": "cap", "condition": "dent"}
    columns = ["image", "product", "condition", "mask", "boxes", "split", "reference"]
    path = write_csv(tmp_path / "parts.csv", [good, {**good, "image": "b.png", **change}], columns)
    inspections, _, rejections = split_items(manifest.read(SourceConfig(tmp_path, path)))
    assert [i.image for i in inspections] == ["a.png"]
    assert [r.item for r in rejections] == ["parts.csv:3"]
    assert re.search(message, rejections[0].reason)


def test_manifest_joins_several_defects_in_one_order(tmp_path):
    """Otherwise they would be different conditions, and holding out `melt` would leave `bent + melt` in training."""
    rows = [
        {"image": f"{number}.png", "product": "cap", "condition": condition}
        for number, condition in enumerate(["bent + melt", "melt+bent", " bent+melt+bent "])
    ]
    for row in rows:
        draw(tmp_path / row["image"])
    path = write_csv(tmp_path / "parts.csv", rows, ["image", "product", "condition"])
    inspections, _, rejections = split_items(manifest.read(SourceConfig(tmp_path, path)))
    assert rejections == []
    assert [i.condition for i in inspections] == ["bent+melt"] * 3


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_manifest_ignores_other_columns(tmp_path, kind):
    others = {"image_id": "7", "product_id": "8", "bent": "0", "broken": "1"}
    rows = [{"image": "a.png", "product": "cap", "condition": "good", **others}]
    draw(tmp_path / "a.png")
    path = tmp_path / f"parts.{kind}"
    if kind == "csv":
        write_csv(path, rows, list(rows[0]))
    else:
        path.write_text(json.dumps(rows[0]) + "\n")
    inspections, _, rejections = split_items(manifest.read(SourceConfig(tmp_path, path)))
    assert rejections == []
    assert [i.image for i in inspections] == ["a.png"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize(
    "columns",
    [
        "x,y,w,h",
        "Left,top,Right,bottom",
        "bbox_x",
        "box width",
        "xmin,ymin,xmax,ymax",
        "X_min",
        "x1,y1,x2,y2",
        "bbox",
        "BBoxes",
        "Box",
        "polygon",
        "polygons",
        "Segmentation",
    ],
)
def test_marks_in_columns_that_are_not_read_are_refused(tmp_path, kind, columns):
    draw(tmp_path / "a.png")
    row = {"image": "a.png", "product": "cap", "condition": "dent"} | dict.fromkeys(columns.split(","), "1")
    path = tmp_path / f"parts.{kind}"

    def read():
        path.write_text(json.dumps(row)) if kind == "jsonl" else write_csv(path, [row], list(row))
        return split_items(manifest.read(SourceConfig(tmp_path, path)))

    with pytest.raises(EchoError, match=r"write the marks as a column 'boxes' with \[\[x0, y0, x1, y1\]") as raised:
        read()
    assert all(repr(column) in str(raised.value) for column in columns.split(","))
    row["boxes"] = "[[1, 1, 4, 4]]"
    manifest._check_columns.cache_clear()
    ((found,), _, rejections) = read()
    assert (found.boxes, rejections) == (((1, 1, 4, 4),), [])


def test_manifest_rejects_a_row_with_more_cells_than_columns(tmp_path):
    """An unquoted comma shifts all later cells by one column. Trailing empty cells are harmless."""
    for name in "abc":
        draw(tmp_path / f"{name}.png")
    path = tmp_path / "parts.csv"
    path.write_text(
        'image,product,condition,group\na.png,pcb,bent,melt,7\nb.png,pcb,bent,7,,\nc.png,pcb,"bent,melt",8\n'
    )
    inspections, _, (rejection,) = split_items(manifest.read(SourceConfig(tmp_path, path)))
    assert rejection.item == "parts.csv:2"
    assert "quote cells that contain a comma" in rejection.reason
    assert [(i.image, i.condition, i.group) for i in inspections] == [
        ("b.png", "bent", "7"),
        ("c.png", "bent+melt", "8"),
    ]


def test_manifest_rejects_lines_without_json(tmp_path):
    draw(tmp_path / "a.png")
    row = json.dumps({"image": "a.png", "product": "cap", "condition": "good"})
    path = tmp_path / "parts.jsonl"
    path.write_text(f"{row}\n{{broken\n[1]\n")
    inspections, _, rejections = split_items(manifest.read(SourceConfig(tmp_path, path)))
    assert len(inspections) == 1
    assert [r.item for r in rejections] == ["parts.jsonl:2", "parts.jsonl:3"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0c"])
def test_jsonl_rows_may_contain_unicode_line_separators(tmp_path, separator):
    draw(tmp_path / "a.png"), draw(tmp_path / "b.png")
    rows = [{"image": name, "product": f"cap{separator}7", "condition": "good"} for name in ("a.png", "b.png")]
    path = tmp_path / "parts.jsonl"
    path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline="")
    inspections, _, rejections = split_items(manifest.read(SourceConfig(tmp_path, path)))
    assert rejections == []
    assert [i.product for i in inspections] == [f"cap{separator}7"] * 2


@pytest.mark.parametrize(
    ("name", "header", "message"),
    [
        ("parts.csv", "image,product", "no column 'condition'.*found 'image', 'product'"),
        ("parts.csv", "image,product,condition,grop", "did you mean 'group'"),
        ("parts.csv", "image,product,condition,SPLIT", "column 'SPLIT'; did you mean 'split'"),
        ("parts.csv", "image,product,condition,mask_path", "column 'mask_path'; did you mean 'mask'"),
        ("parts.csv", "image,product,condition,Defect Mask", "column 'Defect Mask'; did you mean 'mask'"),
        ("parts.csv", "image,product,condition, MASK ", "column ' MASK '; did you mean 'mask'"),
        ("parts.csv", "image;product;condition", "with commas between the columns, not semicolons"),
        ("parts.csv", '"image";"product";"condition"', "not semicolons"),
        ("parts.csv", "image\tproduct\tcondition", "not tabs"),
        ("parts.tsv", "image;product;condition", "not semicolons"),
        ("parts.csv", "", "no column 'image'.*the file is empty; its first line must name the columns"),
    ],
)
def test_manifest_rejects_missing_or_misspelt_columns(tmp_path, name, header, message):
    path = tmp_path / name
    path.write_text(header and header + "\na.png;cap;good\n")
    with pytest.raises(EchoError, match=message) as raised:
        split_items(manifest.read(SourceConfig(tmp_path, path)))
    assert "\n" not in str(raised.value)


# magnetic_tile


def test_magnetic_tile_groups_exposures_over_all_kinds(tmp_path):
    names = {
        "MT_Free": ["exp1_num_100", "exp2_num_150", "exp1_num_999"],
        "MT_Crack": ["exp3_num_210", "exp1_num_271"],  # a gap of 60 is the same tile, 61 is not
        "MT_Break": ["exp1_num_1810", "exp6_num_1965"],  # one tile in spite of the gap
    }
    for kind, stems in names.items():
        for stem in stems:
            draw(tmp_path / kind / "Imgs" / f"{stem}.jpg")
            draw(tmp_path / kind / "Imgs" / f"{stem}.png", 0 if kind == "MT_Free" else 255)
    draw(tmp_path / "MT_Free" / "Imgs" / "holiday.jpg")
    inspections, _, rejections = split_items(magnetic_tile.read(SourceConfig(tmp_path)))
    assert [r.item for r in rejections] == ["MT_Free/Imgs/holiday.jpg"]
    groups = {Path(i.image).stem: i.group for i in inspections}
    assert groups == {
        "exp1_num_100": "tile-100",
        "exp2_num_150": "tile-100",
        "exp3_num_210": "tile-100",
        "exp1_num_271": "tile-271",
        "exp1_num_999": "tile-999",
        "exp1_num_1810": "tile-1810",
        "exp6_num_1965": "tile-1810",
    }
    assert {i.condition for i in inspections} == {"good", "crack", "break"}


@pytest.mark.real_data
def test_magnetic_tile_finds_208_groups_in_the_real_images():
    root = DATA / "magnetic_tile"
    if not root.is_dir():
        pytest.skip(f"no {root}; set ECHO_FT_DATA to the data folder")
    inspections, _, rejections = split_items(magnetic_tile.read(SourceConfig(root)))
    assert rejections == []
    assert Counter(i.condition for i in inspections) == {
        "good": 952, "blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 103,
    }  # fmt: skip
    groups = Counter(i.group for i in inspections)
    assert len(groups) == 208
    assert sum(count == 6 for count in groups.values()) == 178
    kinds = {group: {i.condition for i in inspections if i.group == group} for group in groups}
    assert sum(len(found) > 1 for found in kinds.values()) == 13
