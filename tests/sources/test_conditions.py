"""Conditions are read as the source states them, with several names in any form and declared words for `good`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.collect import check_config
from data_prep.config import BuildConfig
from data_prep.sources import SourceConfig, folder, manifest
from data_prep.sources._rows import condition_cell, condition_in
from echo_ft.errors import EchoError
from tests.support.collected import collect
from tests.support.folder_layouts import draw, labelme_file, split_items, write_csv, write_json

RECTANGLE = [[1, 1], [9, 9]]

GOOD_WORDS = """
no defect|no_defect|No-Defects|non-defective|nondefect|-|--|0|negative|undamaged|normal|OK|O.K.|pass|PASSED|
none|defect free|clean|perfect|good.|False|i.O.|i. O.|in Ordnung|gut|fehlerfrei|o.B.|unbeschaedigt|UNBESCHÄDIGT|
bon|sans défaut|sans defaut|bueno|sin defectos|buono|nessun difetto|bom|sem defeito|合格|良品|正常|无缺陷|異常なし|
정상|양품|결함 없음|no crack|No Cracks|non-crack|no visible defect|no finding|no findings|without scratches|
no anomaly found|not cracked|ok_front|OK-2|good top side|go\u200bod|\ufeffOK|no de\u00adfect
""".replace("\n", "")

DEFECT_WORDS = (
    "fine|sound|free|skip|skipped|n.i.O.|NOK|NG|not ok|no solder|negative bump|free end|ko|defective|不良|abnormal|1|"
    "no crack stop|no label|nonconformity|not flat|good_side_bent|okular|"
    f"good{'9' * 60}x"  # a pattern that repeats what repeats itself would never end here
)


def read_cell(root: Path, cell: object, good: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """The condition of an image with this cell in a JSONL manifest, and the reasons for rejections."""
    draw(root / "a.png")
    path = root / "parts.jsonl"
    path.write_text(json.dumps({"image": "a.png", "product": "cap", "condition": cell}))
    inspections, _, rejections = split_items(manifest.read(SourceConfig(root, path, good=good)))
    return [one.condition for one in inspections], [one.reason for one in rejections]


@pytest.mark.parametrize("mark", ["+", ";", ",", "|", " ; ", "；", "，", "、"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_several_names_in_a_cell_are_joined(tmp_path, mark, kind):
    rows = [
        {"image": f"{number}.png", "product": "cap", "condition": mark.join(names)}
        for number, names in enumerate((["melt", "bent"], ["bent", "melt", "bent"], ["long melt", "bent"]))
    ]
    for row in rows:
        draw(tmp_path / row["image"])
    path = tmp_path / f"parts.{kind}"
    if kind == "csv":
        write_csv(path, rows, list(rows[0]))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    inspections, _, rejections = split_items(manifest.read(SourceConfig(tmp_path, path)))
    assert rejections == []
    assert [one.condition for one in inspections] == ["bent+melt", "bent+melt", "bent+long melt"]


@pytest.mark.parametrize("cell", [["melt", "bent"], ["melt+bent"], "['melt', 'bent']", '["bent", "melt"]'])
def test_a_list_of_names_is_joined(tmp_path, cell):
    assert read_cell(tmp_path, cell) == (["bent+melt"], [])


@pytest.mark.parametrize("cell", [["crack, long", "a/b"], "['crack, long', 'a/b']"])
def test_a_name_in_a_list_is_one_name(tmp_path, cell):
    assert read_cell(tmp_path, cell) == (["a/b+crack, long"], [])


def test_brackets_and_digits_within_names_do_not_matter(tmp_path):
    for cell, names in (
        ("dent (large), crack (deep)", "crack (deep)+dent (large)"), ("3,5", "3+5"), ("D1, D2,D3", "D1+D2+D3"),
        (["dent (large, deep)"], "dent (large, deep)"), ("['cut 0,5 mm']", "cut 0,5 mm"), ("dent (", "dent ("),
    ):  # fmt: skip
        assert read_cell(tmp_path, cell) == ([names], [])


@pytest.mark.parametrize("condition", ["dent", "bent+melt", "Crack, longitudinal", "a/b+c", "[x]", "a|b", "キズ、大"])
def test_a_written_cell_is_read_back(condition):
    assert condition_in({"condition": condition_cell(condition)}, ()) == condition


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("dent/crack", "write 'dent+crack' for several defects or 'dent_crack' for one"),
        ("dent / crack", "write 'dent+crack'"),
        ("dent\\crack", "write 'dent+crack'"),
        ("dent;", "or with an empty name"),
        ("dent (large, deep)", 'write a list of names, such as ["dent (large, deep)"]'),
        ("dent [a|b];crack", "has brackets around a list mark"),
        ("cut (long, deep)+dent", 'such as ["cut (long, deep)", "dent"]'),
        ("cut (long+deep)", 'such as ["cut (long_deep)"]'),
        ("傷（大、深）", 'such as ["傷（大、深）"]'),
        ("scratch 0,5 mm", 'such as ["scratch 0,5 mm"]'),
        ("dent;good", "joins a defect with 'good'"),
        ("dent,OK", "must be spelled 'good'"),
        (["dent", "good"], "'good' and 'dent' at the same time"),
        ([], "is not a list of names"),
        (["dent", 3], "is not a list of names"),
        (["dent", " "], "is not a list of names"),
        ("[dent, crack]", "is not a list of names"),
        ({"dent": 1}, "not a string"),
        (True, "not the name of a defect"),
        (False, "must be spelled 'good'"),
        ("dent\ncrack", "has a line break"),
        ("dent;Dent", "seem to be the same defect"),
        ("long dent;long_dent", "seem to be the same defect"),
        ("dent;de\u00adnt", "seem to be the same defect"),
    ],
)
def test_a_cell_that_may_mean_two_things_is_rejected(tmp_path, cell, message):
    conditions, reasons = read_cell(tmp_path, cell)
    assert conditions == []
    assert message in reasons[0]


def test_words_that_mean_good_are_rejected_until_they_are_declared(tmp_path):
    for word in GOOD_WORDS.split("|"):
        conditions, (reason,) = read_cell(tmp_path, word)
        assert conditions == [], word
        assert "must be spelled 'good'" in reason and "--good" in reason
        assert read_cell(tmp_path, word, good=("fine part", word)) == (["good"], [])
        joined, reasons = read_cell(tmp_path, f"dent;{word}", good=(word,))
        assert joined == [] and "joins a defect with 'good'" in reasons[0]


def test_a_declared_word_covers_other_spellings_but_no_other_word(tmp_path):
    for word in ("no_defect", "No-Defect", "NO  DEFECT"):
        assert read_cell(tmp_path, word, good=("no defect",)) == (["good"], [])
    assert read_cell(tmp_path, "OK", good=("no defect",))[0] == []
    assert read_cell(tmp_path, "ok?", good=("ok",))[0] == []
    assert read_cell(tmp_path, "no solder", good=("no crack",)) == (["no solder"], [])
    assert read_cell(tmp_path, "type A", good=("type A",)) == (["good"], [])
    assert read_flags(tmp_path, {"": True}, good=("-",)) == "a flag that is set has no name; unset or rename it"


@pytest.mark.parametrize(
    ("one", "other"), [("キズ", "キス"), ("バリ", "ハリ"), ("เส้น", "เสน"), ("má", "mà"), ("й", "и"), ("★", "☆")]
)
def test_marks_of_other_scripts_tell_words_apart(tmp_path, one, other):
    joined = "+".join(sorted((one, other)))
    assert read_cell(tmp_path, [one, other]) == ([joined], [])
    assert read_cell(tmp_path, other, good=(one,)) == ([other], [])
    assert read_cell(tmp_path, one, good=(one,)) == (["good"], [])


@pytest.mark.parametrize("source", ["btad", "magnetic_tile", "mvtec_ad", "real_iad", "synthetic", "visa"])
def test_a_source_that_ignores_declared_words_refuses_them(tmp_path, source):
    root = None if source == "synthetic" else tmp_path
    config = BuildConfig(source, tmp_path / "out", root)
    check_config(config)
    with pytest.raises(
        EchoError, match=rf"good: the source {source} already says .*; remove good \(only folder and manifest"
    ):
        check_config(replace(config, good=["OK"]))
    for other in ("folder", "manifest"):
        check_config(replace(config, source=other, root=tmp_path, good=["OK"]))


def test_good_may_have_any_case(tmp_path):
    for word in ("Good", "GOOD"):
        assert read_cell(tmp_path, word) == (["good"], [])
        assert read_coco(tmp_path, {"a.png": [word]})[0] == {}, "a region labelled good needs a declaration"
        assert read_flags(tmp_path, {word: True}) == "good"
        draw(tmp_path / "parts" / "cap" / "train" / word / "0.png")
    inspections, _, rejections = split_items(folder.read(SourceConfig(tmp_path / "parts")))
    assert ({one.condition for one in inspections}, rejections) == ({"good"}, [])


@pytest.mark.parametrize("word", DEFECT_WORDS.split("|"))
def test_names_of_defects_are_not_taken_for_good(tmp_path, word):
    assert read_cell(tmp_path, word) == ([word], [])


UNKNOWN = [
    "N/A",
    "n.a.",
    "NaN",
    "null",
    "unknown",
    "?",
    "Un-labeled",
    "TODO",
    "not annotated",
    "unbekannt",
    "未标注",
    "reviewed",
    "good?",
    "OK ?",
    "crack？",
    "un\u200bknown",
]


@pytest.mark.parametrize("word", UNKNOWN)
def test_words_that_say_nothing_are_rejected(tmp_path, word):
    conditions, (reason,) = read_cell(tmp_path, word)
    assert conditions == []
    assert "does not say whether the part has a defect" in reason
    assert "declare the word with --good" in reason
    assert read_cell(tmp_path, word, good=(word,)) == (["good"], [])


def test_folder_names_follow_the_same_rules(tmp_path):
    for name in ("good", "no_defect", "unknown", "dent+crack", "dent, deep"):
        draw(tmp_path / "cap" / "train" / name / "0.png")
    inspections, _, rejections = split_items(folder.read(SourceConfig(tmp_path)))
    assert {one.condition for one in inspections} == {"good", "crack+dent", "dent, deep"}
    assert {one.item for one in rejections} == {"cap/train/no_defect", "cap/train/unknown"}
    declared, _, rejections = split_items(folder.read(SourceConfig(tmp_path, good=("no defect",))))
    assert {one.image for one in declared if one.condition == "good"} == {
        "cap/train/good/0.png",
        "cap/train/no_defect/0.png",
    }
    assert {one.item for one in rejections} == {"cap/train/unknown"}


# COCO


def read_coco(root: Path, labels: dict[str, list[str]], good: tuple[str, ...] = (), **changes: object):
    """The usable inspections, by image, of a COCO file whose images have boxes with these labels."""
    images, rows, names = [], [], sorted({label for found in labels.values() for label in found})
    for number, (name, found) in enumerate(labels.items()):
        draw(root / name)
        images.append({"id": number, "file_name": name})
        rows += [{"image_id": number, "category_id": names.index(one), "bbox": [4, 6, 8, 4]} for one in found]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    content = {"images": images, "annotations": rows, "categories": categories, **changes}
    path = write_json(root / "instances.json", content)
    inspections, _, rejections = collect(manifest.read(SourceConfig(root, path, good=good)), root)
    return {one.image: one for one in inspections}, {one.item: one.reason for one in rejections}


def test_regions_of_good_parts_need_a_declared_word(tmp_path):
    labels = {"a.png": ["dent"], "b.png": ["OK", "OK"], "c.png": [], "d.png": ["OK", "dent"]}
    found, rejections = read_coco(tmp_path, labels)
    assert {name: one.condition for name, one in found.items()} == {"a.png": "dent", "c.png": "good"}
    assert "--good OK" in rejections["instances.json:images[1]"]
    found, rejections = read_coco(tmp_path, labels, good=("ok",))
    assert {name: one.condition for name, one in found.items()} == {"a.png": "dent", "b.png": "good", "c.png": "good"}
    assert found["b.png"].boxes == ()
    assert "'good' and 'dent' at the same time" in rejections["instances.json:images[3]"]
    assert read_coco(tmp_path, {"a.png": ["good"]}, good=("good",))[0]["a.png"].condition == "good"


@pytest.mark.parametrize("name", ["Crack, longitudinal", "dent;deep", "dent/crack", "a|b", "キズ、大"])
def test_a_category_or_label_is_one_class(tmp_path, name):
    found, rejections = read_coco(tmp_path, {"a.png": [name, "melt"], "b.png": [name]})
    joined = "+".join(sorted((name, "melt")))
    assert ({image: one.condition for image, one in found.items()}, rejections) == (
        {"a.png": joined, "b.png": name},
        {},
    )
    assert read_flags(tmp_path / "shape", {}, [(name, "rectangle", RECTANGLE)]) == name
    assert read_flags(tmp_path / "flag", {name: True}) == name


@pytest.mark.parametrize("word", ["unknown", "todo", "NaN"])
def test_a_region_of_an_unclear_category_rejects_its_image(tmp_path, word):
    found, rejections = read_coco(tmp_path, {"a.png": [word, "dent"], "b.png": ["dent"]})
    assert list(found) == ["b.png"]
    assert repr(word) in rejections["instances.json:images[0]"]


def test_ids_match_as_numbers_and_as_text(tmp_path):
    rows = [{"image_id": "0", "category_id": "0", "bbox": [4, 6, 8, 4]}]
    found, rejections = read_coco(tmp_path, {"a.png": ["dent"], "b.png": []}, annotations=rows)
    assert rejections == {}
    assert {name: one.condition for name, one in found.items()} == {"a.png": "dent", "b.png": "good"}


def test_no_image_is_good_while_annotations_of_the_file_belong_to_none(tmp_path):
    rows = [{"image_id": n, "category_id": 0, "bbox": [4, 6, 8, 4]} for n in (0, 101, 102)]
    found, rejections = read_coco(tmp_path, {"a.png": ["dent"], "b.png": []}, annotations=rows)
    assert list(found) == ["a.png"]
    assert "2 annotations of the file belong to no image (image_id 101, 102)" in rejections["instances.json:images[1]"]
    assert "may belong to this image; correct or remove them" in rejections["instances.json:images[1]"]
    assert "no image has the id 101, 102" in rejections["instances.json:annotations"]


def test_lost_annotations_are_reported_once(tmp_path):
    rows = [{"image_id": n, "category_id": 0, "bbox": [4, 6, 8, 4]} for n in range(500)]
    draw(tmp_path / "a.png")
    content = {"images": [], "annotations": rows, "categories": [{"id": 0, "name": "dent"}]}
    path = write_json(tmp_path / "instances.json", content)
    (rejection,) = manifest.read(SourceConfig(tmp_path, path))
    assert rejection.reason == "annotations ignored (500): no image has the id 0, 1, 2 and 497 more"


# labelme


def read_flags(root: Path, flags: object, shapes: list | None = None, good: tuple[str, ...] = ()):
    """The condition of an image with these flags and shapes, or the reason for its rejection."""
    draw(root / "part.png")
    write_json(root / "part.json", labelme_file("part.png", shapes or []) | {"flags": flags})
    kept, _, rejections = collect(manifest.read(SourceConfig(root, good=good)), root)
    return kept[0].condition if kept else rejections[0].reason


@pytest.mark.parametrize(
    ("flags", "shapes", "expected"),
    [
        ({"dent": True}, [], "dent"),
        ({"dent": True, "crack": True, "melt": False}, [], "crack+dent"),
        ({"dent": True, "ok": False}, [], "dent"),
        ({"ok": True, "dent": False}, [], "good"),
        ({"Okay": True}, [], "good"),
        ({"no_defect": True}, [], "good"),
        ({"dent": False, "crack": False}, [], "good"),
        ({}, [], "good"),
        (None, [], "good"),
        ({"dent": True}, ["dent"], "dent"),
        ({"dent": False, "ok": False}, ["dent"], "dent"),
        ({"crack": True}, ["dent"], "crack+dent"),
        ({"ok": False, "dent": False}, [], "none of its flags (ok, dent) is set"),
        ({"ok": True, "dent": True}, [], "'good' and 'dent' at the same time"),
        ({"ok": True}, ["dent"], "the condition is 'good' by its flags but 'dent' by its shapes"),
        ({"todo": True}, [], "'todo' does not say"),
        ({"reviewed": True}, [], "unset or rename it"),
        ({"reviewed": True, "Verified": True}, ["dent"], "dent"),
        ({"reviewed": True, "dent": True}, [], "dent"),
        ({"checked": True, "ok": True}, [], "good"),
        (
            {"unclear": True},
            ["dent"],
            "its flag 'unclear' does not say whether the part has a defect; unset or rename it",
        ),
        ({"n/a": True, "ok": False, "dent": False}, [], "its flag 'n/a' does not say whether the part has a defect"),
        ({"null": True}, [], "pass --good null if it means a part without a defect"),
        ({"correct": True}, [], "its flag 'correct' does not say"),
        ({"pass": True}, [], "its flag 'pass' does not say"),
        ({"accepted": True}, ["dent"], "its flag 'accepted' does not say"),
        ({" ": True}, [], "a flag that is set has no name"),
        ({"dent": "yes"}, [], "are not {name: true or false}"),
        (["dent"], [], "are not {name: true or false}"),
    ],
)
def test_flags_of_a_labelme_file_count(tmp_path, flags, shapes, expected):
    found = read_flags(tmp_path, flags, [(label, "rectangle", RECTANGLE) for label in shapes])
    assert found == expected if " " not in expected else expected in found


def test_declared_words_count_as_flags_and_labels(tmp_path):
    shapes = [("Gutteil A", "rectangle", RECTANGLE)]
    assert read_flags(tmp_path, {"Gutteil A": True}, shapes, good=("gutteil a",)) == "good"
    assert read_flags(tmp_path, {"accepted": True}, good=("accepted",)) == "good"
    assert read_flags(tmp_path, {"reviewed": True}, good=("reviewed",)) == "good"
    assert read_flags(tmp_path, {"Gutteil A": False, "dent": False}, good=("gutteil a",)).startswith("it has no shapes")


# duplicates


@pytest.mark.parametrize(
    "header",
    [
        "image,product,condition,split,condition",
        "image,product,condition,Condition",
        "image,product,condition, condition ",
        "image,product,condition,group,group",
        "image,image,product,condition",
    ],
)
def test_a_column_that_occurs_twice_is_an_error(tmp_path, header):
    path = tmp_path / "parts.csv"
    path.write_text(f"{header}\n")
    with pytest.raises(EchoError, match=r"parts\.csv has several columns '(condition|group|image)'"):
        split_items(manifest.read(SourceConfig(tmp_path, path)))


def test_other_columns_may_occur_twice(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "parts.csv").write_text("image,product,condition,note,note,,\na.png,cap,good,1,2,,\n")
    found, _, rejections = split_items(manifest.read(SourceConfig(tmp_path, tmp_path / "parts.csv")))
    assert ([one.condition for one in found], rejections) == (["good"], [])


@pytest.mark.parametrize("key", ['"condition": "good"', '"group": "2"', '"product": "ring"'])
def test_a_key_that_occurs_twice_in_a_line_rejects_its_image(tmp_path, key):
    draw(tmp_path / "a.png"), draw(tmp_path / "b.png")
    row = {"product": "cap", "condition": "dent", "group": "1"}
    whole = [json.dumps({"image": name, **row}) for name in ("a.png", "b.png")]
    twice = json.dumps({"image": "a.png", **row})[:-1] + f", {key}}}"
    path = tmp_path / "parts.jsonl"
    path.write_text("\n".join([*whole, twice]))
    found, _, rejections = collect(manifest.read(SourceConfig(tmp_path, path)), tmp_path)
    assert [one.image for one in found] == ["b.png"]
    reasons = {one.item: one.reason for one in rejections}
    assert set(reasons) == {"parts.jsonl:3", "a.png"}
    assert f"duplicate key '{key.split(chr(34))[1]}'" in reasons["parts.jsonl:3"]


@pytest.mark.parametrize("part", ['"bbox": [4, 6, 8, 4]', '"category_id": 0', '"image_id": 0'])
def test_a_key_that_occurs_twice_in_a_coco_file_is_an_error(tmp_path, part):
    read_coco(tmp_path, {"a.png": ["dent"]})
    path = tmp_path / "instances.json"
    text = path.read_text()
    assert part in text
    path.write_text(text.replace(part, f"{part}, {part.split(':')[0]}: 1"))
    with pytest.raises(EchoError, match=r"instances\.json cannot be read as JSON \(duplicate key"):
        split_items(manifest.read(SourceConfig(tmp_path, path)))


def test_two_coco_categories_of_one_id_are_an_error(tmp_path):
    two = [{"id": 0, "name": "dent"}, {"id": "0", "name": "crack"}]
    with pytest.raises(EchoError, match=r"two categories with the id '0', 'dent' and 'crack'"):
        read_coco(tmp_path, {"a.png": ["dent"]}, categories=two)
    found, _ = read_coco(tmp_path, {"a.png": ["dent"]}, categories=[{"id": 0, "name": "dent"}] * 2)
    assert found["a.png"].condition == "dent"
