"""If a source describes an image in several places, the entries are combined, or the whole image is rejected."""

from __future__ import annotations

import csv
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.sources import SourceConfig, _rows, folder, manifest, visa
from echo_ft.errors import EchoError
from echo_ft.images import masks
from echo_ft.images.decode import decode
from echo_ft.records import Inspection, Question, Rejection
from tests.support import folder_layouts
from tests.support.collected import collect
from tests.support.folder_layouts import SIZE, draw, draw_mask, labelme_file, write_json

NAMES = ("a.png", "b.png", "cap/c.png")
DEFECTS = ("bent", "crack", "dent")
BOXES = tuple((4.0 * n, 3.0 * n, 4.0 * n + 6, 3.0 * n + 5) for n in range(6))

many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def usable(root: Path, annotations: Path | None = None) -> tuple[dict[str, Inspection], list[Rejection]]:
    """The usable inspections by image, and the rejections."""
    inspections, _, rejections = collect(manifest.read(SourceConfig(root, annotations)), root)
    return {one.image: one for one in inspections}, rejections


def write_rows(root: Path, rows: list[dict], kind: str = "jsonl") -> Path:
    """Write a manifest as JSON lines or CSV."""
    path = root / f"parts.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    path.write_text(text.getvalue())
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with drawn images, and a mask of each defect."""
    folder = tmp_path_factory.mktemp("images")
    for name in NAMES:
        draw(folder / name)
    for number, defect in enumerate(DEFECTS):
        draw_mask(folder / f"{defect}_mask.png", (4 * number, 6, 4 * number + 3, 10))
    return folder


truths = st.dictionaries(
    st.sampled_from(NAMES), st.sets(st.tuples(st.sampled_from(DEFECTS), st.sampled_from(BOXES))), min_size=1
)
"""The defects of each image, each with its box; none for a good part."""


def expected(truth: dict) -> dict[str, tuple]:
    return {
        name: ("+".join(sorted({label for label, _ in found})) or "good", tuple(sorted({box for _, box in found})))
        for name, found in truth.items()
    }


def parts_of(data: st.DataObject, found: set) -> list[set]:
    """The defects, distributed over any number of places, with some of them repeated."""
    if not found:
        return [set()] * data.draw(st.integers(1, 2))
    listed = sorted(found)
    places = data.draw(st.lists(st.integers(0, 3), min_size=len(listed), max_size=len(listed)))
    parts = [{one for one, at in zip(listed, places, strict=True) if at == place} for place in sorted(set(places))]
    return parts + data.draw(st.lists(st.sampled_from(parts), max_size=1))


@many
@given(truth=truths, data=st.data(), kind=st.sampled_from(["csv", "jsonl"]))
def test_any_division_of_a_truth_into_rows_gives_the_same_records(root, truth, data, kind):
    rows = []
    for name, found in truth.items():
        for number, part in enumerate(parts_of(data, found)):
            labels = data.draw(st.permutations(sorted({label for label, _ in part})))
            row = {
                "image": name,
                "product": "cap",
                "condition": data.draw(st.sampled_from("+;|,")).join(labels) or "good",
            }
            rows.append(row | {"boxes": [list(box) for _, box in sorted(part)] or "", "group": "7" if number else ""})
    found, rejections = usable(root, write_rows(root, data.draw(st.permutations(rows)), kind))
    assert rejections == []
    assert {name: (one.condition, one.boxes) for name, one in found.items()} == expected(truth)
    repeated = {row["image"] for row in rows if row["group"]}
    assert {name for name, one in found.items() if one.group == "7"} == repeated, "one row names the group for all"


@many
@given(truth=truths, data=st.data())
def test_any_division_of_a_truth_into_coco_entries_gives_the_same_records(root, truth, data):
    images, annotations = [], []
    for name, found in truth.items():
        empty = [set()] if data.draw(st.booleans()) else []
        for part in [*parts_of(data, found), *empty]:
            images.append({"id": len(images) + 1, "file_name": name})
            for label, (x0, y0, x1, y1) in part:
                box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "category_id": DEFECTS.index(label)}
                annotations.append({"image_id": len(images), **box})
    categories = [{"id": number, "name": label} for number, label in enumerate(DEFECTS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    for key in content:
        content[key] = data.draw(st.permutations(content[key]))
    found, rejections = usable(root, write_json(root / "instances.json", content))
    assert rejections == []
    assert {name: (one.condition, one.boxes) for name, one in found.items()} == expected(truth)


@many
@given(truth=truths, data=st.data())
def test_any_division_of_a_truth_into_labelme_files_gives_the_same_records(root, tmp_path_factory, truth, data):
    folder = tmp_path_factory.mktemp("labelme")
    for name, found in truth.items():
        draw(folder / name)
        for number, part in enumerate(data.draw(st.permutations(parts_of(data, found)))):
            shapes = [(label, "rectangle", [[x0, y0], [x1, y1]]) for label, (x0, y0, x1, y1) in part]
            content = labelme_file(Path(name).name, shapes)
            content["flags"] = {label: any(label == one for one, _ in part) for label in DEFECTS}
            write_json((folder / name).with_name(f"{number}-{Path(name).stem}.json"), content)
    found, rejections = usable(folder)
    assert rejections == []
    assert {name: (one.condition, one.boxes) for name, one in found.items()} == expected(truth)


def test_the_masks_of_several_rows_count_as_one(root):
    row = {"image": "a.png", "product": "cap"}
    rows = [row | {"condition": label, "mask": f"{label}_mask.png"} for label in ("dent", "bent", "dent")]
    for order in itertools.permutations(rows):
        found, rejections = usable(root, write_rows(root, list(order)))
        assert rejections == []
        assert (found["a.png"].condition, found["a.png"].mask) == ("bent+dent", None)
        assert found["a.png"].masks == ("bent_mask.png", "dent_mask.png")


BOX = [[1, 2, 9, 9]]
DENT = {"image": "a.png", "product": "cap", "condition": "dent", "split": "train", "group": "1", "boxes": BOX}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"condition": "good", "boxes": []}, "condition is 'dent' in parts.jsonl:2, 'good' in parts.jsonl:3"),
        ({"product": "ring"}, "product is 'cap' in parts.jsonl:2, 'ring' in parts.jsonl:3"),
        ({"split": "test"}, "split is 'train' in parts.jsonl:2, 'test' in parts.jsonl:3"),
        ({"group": "2"}, "group is '1' in parts.jsonl:2, '2' in parts.jsonl:3"),
        ({"reference": "cap/c.png"}, "reference is 'b.png' in parts.jsonl:2, 'cap/c.png' in parts.jsonl:3"),
        ({"mask": "dent_mask.png"}, "a mask marks it in parts.jsonl:3 but boxes or polygons in parts.jsonl:2"),
        ({"boxes": [[1, 2]]}, "also in parts.jsonl:3, which cannot be used"),
        ({"split": "training"}, "also in parts.jsonl:3, which cannot be used"),
        ({"condition": "OK"}, "also in parts.jsonl:3, which cannot be used"),
        ({"condition": ""}, "also in parts.jsonl:3, which cannot be used"),
        ({"mask": "gone.png"}, "also in parts.jsonl:3, which cannot be used"),
    ],
)
def test_an_image_whose_rows_contradict_each_other_is_rejected_with_its_places(root, change, message):
    other = {"image": "b.png", "product": "cap", "condition": "good"}
    first, second = DENT | {"reference": "b.png"}, DENT | {"boxes": [[12, 2, 20, 9]], "reference": "b.png"} | change
    found, rejections = usable(root, write_rows(root, [other, first, second]))
    assert list(found) == ["b.png"]
    (rejection,) = (one for one in rejections if one.item == "a.png")
    assert message in rejection.reason
    assert "parts.jsonl:2" in rejection.reason and "parts.jsonl:3" in rejection.reason
    turned, _ = usable(root, write_rows(root, [second, other, first]))
    assert list(turned) == ["b.png"], "the order does not matter"


def test_a_row_with_an_unquoted_comma_rejects_its_image(root):
    path = root / "parts.csv"
    path.write_text("image,product,condition\na.png,cap,dent\na.png,cap,dent,crack\nb.png,cap,good\n")
    found, rejections = usable(root, path)
    assert list(found) == ["b.png"]
    assert {one.item for one in rejections} == {"parts.csv:3", "a.png"}


def test_marks_of_only_some_defects_are_left_out(root):
    """Otherwise, the location of the crack would count as free of defects."""
    rows = [DENT, {"image": "a.png", "product": "cap", "condition": "crack"}, DENT | {"image": "b.png"}]
    found, (rejection,) = usable(root, write_rows(root, rows))
    assert (found["a.png"].condition, found["a.png"].boxes) == ("crack+dent", ())
    assert (rejection.item, rejection.dropped) == ("a.png", "mask")
    assert "crack is not marked in parts.jsonl:2, but dent is in parts.jsonl:1; mark every defect" in rejection.reason
    assert "(parts.jsonl:1, parts.jsonl:2)" in rejection.reason
    assert found["b.png"].boxes


def test_an_unmarked_place_of_a_marked_defect_counts(root):
    """The unmarked row may be about a second dent. A repeated row, or a row about a good part, adds nothing."""
    unmarked = {"image": "a.png", "product": "cap", "condition": "dent"}
    for rows in itertools.permutations([DENT, DENT, unmarked]):
        found, (rejection,) = usable(root, write_rows(root, list(rows)))
        assert (found["a.png"].condition, found["a.png"].boxes) == ("dent", ())
        assert "dent is not marked in parts.jsonl:" in rejection.reason
    found, rejections = usable(root, write_rows(root, [DENT, DENT]))
    assert rejections == []
    assert len(found["a.png"].boxes) == 1
    Image.new("L", SIZE).save(root / "black_mask.png")
    rows = [unmarked | {"condition": "good"}, unmarked | {"condition": "good", "mask": "black_mask.png"}]
    found, rejections = usable(root, write_rows(root, rows))
    assert rejections == []
    assert found["a.png"].condition == "good"


def test_a_flag_needs_no_mark_in_its_own_file_but_in_another(tmp_path):
    draw(tmp_path / "part.png")
    shapes = labelme_file("part.png", [("dent", "rectangle", [[1, 1], [5, 5]])])
    write_json(tmp_path / "part.json", shapes | {"flags": {"dent": True}})
    found, rejections = usable(tmp_path)
    assert rejections == []
    assert len(found["part.png"].boxes) == 1
    write_json(tmp_path / "again.json", labelme_file("part.png", []) | {"flags": {"dent": True}})
    found, (rejection,) = usable(tmp_path)
    assert found["part.png"].boxes == ()
    assert "dent is not marked in again.json, but dent is in part.json" in rejection.reason


def test_a_coco_image_is_rejected_with_any_of_its_entries(root):
    images = [{"id": n, "file_name": name} for n, name in enumerate(["a.png", "a.png", "b.png", "./a.png"])]
    dent = {"category_id": 1, "bbox": [4, 6, 8, 4]}
    rows = [{"image_id": 0, **dent}, {"image_id": 3, **dent, "bbox": [4, 6]}, {"image_id": 2, **dent}]
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "dent"}]}
    found, rejections = usable(root, write_json(root / "instances.json", content))
    assert list(found) == ["b.png"]
    assert {one.item for one in rejections} == {"instances.json:images[3]", "a.png"}


def test_two_coco_images_of_one_id_are_both_rejected(root):
    """The annotations may belong to either of them."""
    images = [{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}, {"id": 2, "file_name": "cap/c.png"}]
    rows = [{"image_id": 1, "category_id": 1, "bbox": [4, 6, 8, 4]}]
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "dent"}]}
    found, rejections = usable(root, write_json(root / "instances.json", content))
    assert list(found) == ["cap/c.png"]
    assert {one.item for one in rejections} == {"instances.json:images[0]", "instances.json:images[1]"}


@pytest.mark.parametrize("name", [["a.png"], {"name": "a.png"}, 7.5])
def test_a_coco_image_without_a_text_as_its_name_is_rejected(root, name):
    images = [{"id": 1, "file_name": name}, {"id": 2, "file_name": "b.png"}]
    rows = [{"image_id": n, "category_id": 1, "bbox": [4, 6, 8, 4]} for n in (1, 2)]
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "dent"}]}
    found, (rejection,) = usable(root, write_json(root / "instances.json", content))
    assert list(found) == ["b.png"]
    assert rejection.item == "instances.json:images[0]"
    assert f"file_name is {name!r}, not a string" in rejection.reason


def test_a_labelme_image_is_opened_once_and_no_other_name_is_tried(tmp_path, monkeypatch):
    opened, tried = [], []
    draw(tmp_path / "part.png")
    write_json(tmp_path / "part.json", labelme_file("part.png", [("dent", "rectangle", [[1, 1], [5, 5]])]))

    def size_and_orientation(path, real=_rows.size_and_orientation):
        opened.append(path.name)
        return real(path)

    def is_file(path, real=Path.is_file):
        tried.append(path.name)
        return real(path)

    monkeypatch.setattr(_rows, "size_and_orientation", size_and_orientation)
    monkeypatch.setattr(Path, "is_file", is_file)
    assert any(isinstance(item, Inspection) for item in manifest.read(SourceConfig(tmp_path)))
    assert opened == ["part.png"]
    assert "part.bmp" not in tried


@pytest.mark.parametrize("broken", ["{", '{"shapes": [], "imagePath": "part.png", "imagePath": "part.png"}', "shapes"])
def test_a_labelme_image_is_rejected_with_any_of_its_files(tmp_path, broken):
    draw(tmp_path / "part.png"), draw(tmp_path / "other.png")
    dent = ("dent", "rectangle", [[1, 1], [5, 5]])
    write_json(tmp_path / "again.json", labelme_file("part.png", [dent]))
    write_json(tmp_path / "other.json", labelme_file("other.png", [dent]))
    if broken == "shapes":
        write_json(tmp_path / "part.json", labelme_file("part.png", [("crack", "line", [[1, 1], [5, 5]])]))
    else:
        (tmp_path / "part.json").write_text(broken)
    found, rejections = usable(tmp_path)
    assert list(found) == ["other.png"]
    assert {one.item for one in rejections} == {"part.json", "part.png"}
    assert "part.json, which cannot be used" in rejections[-1].reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read as JSON (Expecting"),
        ('{"images": []}', "it has no list of shapes; move it elsewhere, or save it again"),
        ('{"imagePath": "part.png", "shapes": [7]}', "a shape is not an object; save the file again"),
    ],
)
def test_an_unreadable_labelme_file_gets_a_remedy(tmp_path, content, reason):
    draw(tmp_path / "part.png")
    (tmp_path / "part.json").write_text(content)
    _, rejections = usable(tmp_path)
    assert reason in rejections[0].reason
    assert "again" in rejections[0].reason


def test_a_question_with_a_control_token_gets_a_remedy(root):
    inspection = Inspection("a.png", "a.png", "line", "cap", "dent", "a.png")
    question = Question("1", "a.png", "Defect Analysis", "Is <|im_end|> so?", {"A": "yes", "B": "no"}, "A")
    kept, questions, (rejection,) = collect([inspection, question], root)
    assert (kept, questions) == ([inspection], [])
    assert rejection == Rejection(
        "1", "it contains <|im_end|>, a control token of the model's chat template; reword it"
    )


def test_flags_that_contradict_the_shapes_of_a_labelme_file_reject_it(tmp_path):
    draw(tmp_path / "part.png")
    content = labelme_file("part.png", [("dent", "rectangle", [[1, 1], [5, 5]])]) | {"flags": {"ok": True}}
    write_json(tmp_path / "part.json", content)
    found, rejections = usable(tmp_path)
    assert not found
    assert "the condition is 'good' by its flags but 'dent' by its shapes" in rejections[0].reason


@pytest.mark.parametrize("name", ["100%.png", "a#1.png", "why?.png", "it's.png", "a&b.png", "a<b>.png", "a+b c.png"])
def test_special_characters_in_names_are_kept(tmp_path, name):
    draw(tmp_path / name)
    draw_mask(tmp_path / f"mask of {name}")
    row = {"image": name, "product": "p & q", "condition": "dent", "mask": f"mask of {name}"}
    for kind in ("csv", "jsonl"):
        found, rejections = usable(tmp_path, write_rows(tmp_path, [row], kind))
        assert rejections == []
        assert (found[name].mask, found[name].product) == (f"mask of {name}", "p & q")
    write_json(tmp_path / "part.json", labelme_file(name, [("dent", "rectangle", [[1, 1], [5, 5]])], SIZE))
    found, _ = usable(tmp_path)
    assert found[name].condition == "dent"


FORMATS = {
    "grey.png": ("L", {}),
    "colour.png": ("RGB", {}),
    "alpha.png": ("RGBA", {}),
    "palette.png": ("P", {}),
    "bilevel.png": ("1", {}),
    "deep.png": ("I;16", {}),
    "grey.jpg": ("L", {}),
    "colour.JPEG": ("RGB", {"progressive": True}),
    "colour.bmp": ("RGB", {}),
    "grey.tif": ("L", {"compression": "tiff_lzw"}),
    "deep.tiff": ("I;16", {}),
    "colour.webp": ("RGB", {"lossless": True}),
}


def test_twelve_formats_of_images_can_be_used(tmp_path):
    rows = []
    for name, (mode, options) in FORMATS.items():
        grey = Image.fromarray((np.arange(SIZE[0] * SIZE[1]).reshape(SIZE[1], SIZE[0]) * 80).astype(np.uint16))
        image = grey if mode == "I;16" else grey.point(lambda value: value / 256, "L").convert(mode)
        image.save(tmp_path / name, **options)
        rows.append({"image": name, "product": "cap", "condition": "dent", "boxes": [[4, 6, 12, 10]]})
    found, rejections = usable(tmp_path, write_rows(tmp_path, rows))
    assert rejections == []
    assert list(found) == list(FORMATS)
    assert all(np.asarray(decode(tmp_path / name)).shape == (SIZE[1], SIZE[0], 3) for name in found)


def test_names_that_differ_only_in_spelling_are_not_two_defects(root):
    rows = [DENT, DENT | {"condition": "Dent", "boxes": [[12, 2, 20, 9]]}, DENT | {"image": "b.png"}]
    found, rejections = usable(root, write_rows(root, rows))
    assert list(found) == ["b.png"]
    assert "'Dent' and 'dent' seem to be the same defect" in rejections[0].reason
    assert "(parts.jsonl:1, parts.jsonl:2)" in rejections[0].reason


@pytest.mark.parametrize(
    "broken", ['{"image": "a.png", "condition": "crack"', '{"condition": "crack",, "image" : "a.png"}']
)
def test_a_broken_line_rejects_its_image(root, broken):
    path = root / "parts.jsonl"
    path.write_text("\n".join([json.dumps(DENT), broken, json.dumps(DENT | {"image": "b.png"})]))
    found, rejections = usable(root, path)
    assert list(found) == ["b.png"]
    assert {one.item for one in rejections} == {"parts.jsonl:2", "a.png"}


@pytest.mark.parametrize("row", ['cap,"dent,1,', 'cap,dent,"1,', 'cap,dent,1,"3/4 inch'])
@pytest.mark.parametrize("end", ["", '2"'])
def test_a_quotation_mark_that_hides_the_next_rows_is_an_error(root, row, end):
    path = root / "parts.csv"
    path.write_text(
        f"image,product,condition,group,note\na.png,{row}\nb.png,cap,crack,2,\ncap/c.png,cap,good,3,{end}\n"
    )
    with pytest.raises(EchoError, match=r"parts\.csv:\d: the cell .* holds the next rows; close its quotation mark"):
        usable(root, path)


@pytest.mark.parametrize(
    "row",
    [
        'dent,,"seen twice,\nat the rim, below, beside, above, and so on"',
        'dent,"[[1, 2, 9, 9],\n[12, 2, 20, 9], [21, 2, 25, 9]]",',
        'dent,,"1, 2, 3\n4, 5.5, 6, v1.2, 7.png.old"',
    ],
)
def test_quoted_lines_with_commas_are_no_rows(root, row):
    path = root / "parts.csv"
    path.write_text(f"image,product,condition,boxes,note\na.png,cap,{row}\nb.png,cap,good,,\n")
    found, rejections = usable(root, path)
    assert rejections == []
    assert [*found] == ["a.png", "b.png"]
    assert len(found["a.png"].boxes) == (3 if "[[" in row else 0)


def test_hidden_rows_are_found_by_the_suffix_that_the_list_uses(root):
    path = root / "parts.csv"
    path.write_text('image,product,condition,note\na.jfif,cap,dent,"1\nb.jfif,cap,crack,\nc.jfif,cap,good,"2"\n')
    with pytest.raises(EchoError, match="holds the next rows; close its quotation mark, or remove the line breaks"):
        usable(root, path)


@pytest.mark.parametrize("note", ['"3/4 inch,' + "x" * 140_000, '"3/4 inch\n' + "b.png,cap,crack,\n" * 9000])
def test_a_cell_beyond_the_limit_of_csv_gets_its_own_remedy(root, note):
    path = root / "parts.csv"
    path.write_text(f"sep=,\nimage,product,condition,note\na.png,cap,good,\na.png,cap,dent,{note}")
    message = r"parts\.csv cannot be read as CSV near line 4 \(field larger.*\); close the quotation mark .* or shorten"
    with pytest.raises(EchoError, match=message):
        usable(root, path)


def test_the_columns_of_equal_lines_are_checked_once(root, monkeypatch):
    calls: list[str] = []

    def close_matches(name, *arguments, **options):
        calls.append(name)
        return []

    monkeypatch.setattr("difflib.get_close_matches", close_matches)
    extra = {f"extra{number}": number for number in range(6)}
    rows = [{"image": NAMES[0], "product": "cap", "condition": "dent"} | extra] * 50
    usable(root, write_rows(root, [*rows, rows[0] | {"another": 1}]))
    assert sorted(calls) == sorted([*extra, *extra, "another"])


def test_equal_conditions_are_parsed_once(root, monkeypatch):
    parsed: list[str] = []

    def plain_word(text, real=_rows.plain_word):
        parsed.append(text)
        return real(text)

    monkeypatch.setattr(_rows, "plain_word", plain_word)
    row = {"image": "a.png", "product": "cap", "condition": "deep dent; long crack"}
    usable(root, write_rows(root, [row]))
    once = len(parsed)
    usable(root, write_rows(root, [row] * 50))
    assert len(parsed) == once > 0


def test_a_note_may_have_several_lines_but_a_condition_may_not(root):
    path = root / "parts.csv"
    path.write_text('image,product,condition,note\na.png,cap,dent,"long,\nnote"\nb.png,cap,"dent\ncrack",\n')
    found, (rejection,) = usable(root, path)
    assert list(found) == ["a.png"]
    assert rejection.item == "parts.csv:5"
    assert "a cell has a line break" in rejection.reason


def test_a_published_list_that_repeats_an_image_is_put_together_or_rejected(tmp_path):
    layout = folder_layouts.visa(tmp_path)
    path = layout.config.root / "split_csv" / "1cls.csv"
    header, *rows = path.read_text().splitlines()
    other = rows[0].replace("train", "test")
    path.write_text("\n".join([header, *rows, rows[1], other]))
    with open(layout.config.root / "candle" / "image_anno.csv", "a", encoding="utf-8") as file:
        file.write("candle/Data/Images/Anomaly/001.JPG,melt,\ncandle/Data/Images/Normal/0002.JPG,melt,\n")
    found, _, rejections = collect(visa.read(layout.config), layout.config.root)
    assert {one.image: one.condition for one in found}["candle/Data/Images/Anomaly/001.JPG"] == "melt+other"
    assert {*layout.images} - {one.image for one in found} == {
        "candle/Data/Images/Normal/0000.JPG",
        "candle/Data/Images/Normal/0002.JPG",
    }
    reasons = [one.reason for one in rejections if not one.reason.startswith("images ignored")]
    assert "normal here but 'normal,melt'" in reasons[0]
    assert "its split is 'train' in 1cls.csv:2, 'test' in 1cls.csv:13" in reasons[1]


@pytest.mark.parametrize("names", itertools.permutations(["000_mask.png", "000.png", "000.bmp", "000/0.png"], 2))
def test_all_masks_of_an_image_in_a_folder_layout_count(tmp_path, names):
    draw(tmp_path / "cap/train/good/000.png"), draw(tmp_path / "cap/test/dent/000.png")
    for number, name in enumerate(names):
        draw_mask(tmp_path / "cap/ground_truth/dent" / name, (4 * number, 6, 4 * number + 3, 10))
    inspections, _, rejections = collect(folder.read(SourceConfig(tmp_path)), tmp_path)
    assert rejections == []
    dent = next(one for one in inspections if one.condition == "dent")
    assert {*dent.masks} == {f"cap/ground_truth/dent/{name}" for name in names}
    marked = masks.load_mask(dent, tmp_path, SIZE)
    assert marked is not None and marked.sum() == 2 * 3 * 4


def test_masks_of_several_rows_are_left_out_if_one_of_them_marks_nothing(root):
    Image.new("L", SIZE).save(root / "empty_mask.png")
    row = {"image": "a.png", "product": "cap"}
    rows = [row | {"condition": "dent", "mask": "dent_mask.png"}, row | {"condition": "bent", "mask": "empty_mask.png"}]
    rows[0]["boxes"] = BOX
    found, (rejection,) = usable(root, write_rows(root, rows))
    assert found["a.png"].condition == "bent+dent"
    assert not masks.is_marked(found["a.png"])
    assert (rejection.item, rejection.dropped) == ("a.png", "mask")
    assert "empty_mask.png marks nothing" in rejection.reason


@pytest.mark.parametrize(
    "bad", [[{"condition": "good"}, {"condition": "dent"}], [{"condition": "OK"}], [{"mask": "dent_mask.png"}]]
)
def test_a_rejected_image_is_no_reference(root, bad):
    listed = [{"image": "b.png", "product": "cap", "condition": "good"} | change for change in bad]
    found, rejections = usable(root, write_rows(root, [DENT | {"reference": "b.png"}, *listed]))
    assert list(found) == ["a.png"]
    assert found["a.png"].reference is None
    assert "the reference was rejected, so it may show a defect" in rejections[-1].reason
    assert usable(root, write_rows(root, [DENT | {"reference": "b.png"}]))[0]["a.png"].reference == "b.png"
