"""Rows of the table for lists, annotations and options that people or tools write, each changed in one place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.fields import MISSING, NO_TEXT, named, table, without
from tests.faults.inputs import (
    VISA,
    Arguments,
    Fault,
    build,
    coco,
    config,
    described,
    labelme,
    listed,
    listing,
    mmad,
    only,
    picture,
)

# Cells of a list. The rejection of the only row names its line, so the build ends with the reason.

CELLS: dict[str, tuple[Sequence[Any], str]] = {
    "image": ((None, True, ["odd.png"], {}, "", " "), r"parts\.jsonl:1: image is"),
    "product": ((None, True, ["cap"], {}, "", " "), r"parts\.jsonl:1.*product is"),
    "condition": (
        (None, True, [3], {}, "", " ", "#REF!", "#DIV/0!"),
        r"parts\.jsonl:1.*condition|the images have no condition",
    ),
    "group": ((True, ["1"], {}), r"parts\.jsonl:1: group is"),
    "split": ((3, True, ["test"], "dev", "TEST set"), r"parts\.jsonl:1: split"),
    "mask": ((True, ["m.png"], "gone.png", "../m.png"), r"parts\.jsonl:1: .*mask"),
    "dataset": ((3.5, True, ["d"], {}), r"parts\.jsonl:1: dataset is"),
    "synthetic": ((3, True, "magic"), r"parts\.jsonl:1: .*synthetic"),
}
BOXES: Sequence[Any] = (
    3, True, {}, "x", [3], [[1, 2, 3]], [[1, 2, 3, 4, 5]], [["1", 2, 3, "x"]], [[1, 2, 3, None]], [[True, 2, 9, 9]],
    [[9, 9, 1, 1]], [[5, 5, 5, 9]], [[-5, 0, 9, 9]], [[0, 0, 999, 9]], [[0, 0, 9, 1e400]], "[[1, 2, 9, 8]", [[]],
)  # fmt: skip


def cells() -> Iterator[Fault]:
    for field, (values, says) in CELLS.items():
        for value in values:
            yield Fault(f"cell {field} {named(value)}", listed(picture, **{field: value}), says)
    for value in BOXES:
        make = listed(picture, condition="dent", boxes=value)
        yield Fault(
            f"cell boxes {json.dumps(value)[:30]}",
            make,
            r"parts\.jsonl:1: boxes .* are not|odd\.png: box .* is not .* \(parts\.jsonl:1\)",
        )


HEADERS = {
    "misspelt": "image,product,conditon",
    "semicolons": "image;product;condition",
    "tabs": "image\tproduct\tcondition",
    "no product": "image,condition",
    "corners": "image,product,condition,x0,y0,x1,y1",
    "bbox": "image,product,condition,bbox",
    "column twice in capitals": "image,Product,product,condition",
    "near group": "image,product,condition,grop",
    "empty": "",
    "binary": "\x89PNG\r\n\x1a",
}


def csv_lists() -> Iterator[Fault]:
    for name, header in HEADERS.items():
        content = f"{header}\na.png,cap,good,,,,\n".encode("latin-1")
        yield Fault(f"header {name}", listing(content, "p.csv"), r"p\.csv (has|is|cannot)")
    start = b"image,product,condition\n"
    rows = {
        "open quote": (b'a.png,"cap,good\nb.png,cap,good\n', r"p\.csv"),
        "surplus cells": (b"a.png,cap,good,more,cells\n", "more cells than the header has columns"),
        "missing cells": (b"a.png,cap\n", "condition"),
        "line break": (b'a.png,"ca\np",good\n', "a cell has a line break"),
        "long cell": (b"a.png," + b"x" * 200_000 + b",good\n", r"p\.csv"),
        "escape": (b"a.png,\x1b[31mcap,good\n", "control character"),
    }
    for name, (content, says) in rows.items():
        yield Fault(f"CSV {name}", listing(start + content, "p.csv"), says)


# Annotations

COCO: dict[str, Sequence[Any]] = {
    "images": (None, 3, "x", {}, [3], [None], ["a.png"], [[]], MISSING),
    "annotations": (None, 3, "x", {}, [3], [None], ["x"], MISSING),
    "categories": (None, 3, "x", {}, [3], [None], MISSING, [{"id": 1}, {"id": 1, "name": "b"}]),
}
COCO_IMAGE: dict[str, Sequence[Any]] = {
    "file_name": (*NO_TEXT, MISSING, "../a.png", "/a.png", "b.png", ""),
    "width": ("48", 0, -48, 47, [48], True),
    "height": ("32", 0, 31, {}),
}
COCO_MARK: dict[str, Sequence[Any]] = {
    "bbox": (3, "x", [1], [1, 2, 3], [1, 2, 3, "x"], [1, 2, 3, None], [1, 2, -3, 4], [0, 0, 99, 9], [True, 1, 2, 3]),
    "segmentation": (3, "x", [3], [[1, 2]], [[1, 2, 3, 4, 5]], [["a"] * 6], [[None] * 6], [[999] * 6]),
    "category_id": (None, 7, [1], MISSING),
    "image_id": (None, 7, [1], MISSING),
}


def coco_files() -> Iterator[Fault]:
    for field, value in table(COCO):
        make = coco(partial(_replace, field=field, value=value))
        yield Fault(f"COCO {field} {named(value)}", make, rf"c\.json.*(images\[0\]|{field}|has no usable)")
    for key, fields in (("images", COCO_IMAGE), ("annotations", COCO_MARK)):
        for field, value in table(fields):
            make = coco(partial(_replace_first, key=key, field=field, value=value))
            says = r"c\.json:images\[0\]|c\.json.*belong to no image|run-length masks are not supported"
            yield Fault(f"COCO {field} {named(value)}", make, says)


def _replace(content: dict[str, Any], field: str, value: Any) -> None:
    changed = without(content, field, value)
    content.clear()
    content.update(changed)


def _replace_first(content: dict[str, Any], key: str, field: str, value: Any) -> None:
    content[key][0] = without(content[key][0], field, value)


LABELME: dict[str, Sequence[Any]] = {
    "imagePath": (None, 3, ["a.png"], {}, "", "../../a.png", "/a.png", "b.png"),
    "imageWidth": ("48", 0, 47, [48]),
    "imageHeight": ("32", 0, 31),
    "shapes": (None, 3, "x", {}, [3], [None], [[]]),
    "flags": (3, "x", ["good"]),
}
SHAPE: dict[str, Sequence[Any]] = {
    "label": (None, True, ["dent"], {}, MISSING, ""),
    "shape_type": (3, ["rectangle"], "star", "mask"),
    "points": (None, 3, "x", {}, [], [3], [[1, 2]], [[1, 2], [3]], [["a", "b"], [3, 4]], [[None, 1], [3, 4]], MISSING),
}


def labelme_files() -> Iterator[Fault]:
    for field, value in table(LABELME):
        yield Fault(f"labelme {field} {named(value)}", labelme(partial(_replace, field=field, value=value)), r"a\.json")
    for field, value in table(SHAPE):
        make = labelme(partial(_replace_first, key="shapes", field=field, value=value))
        yield Fault(f"labelme {field} {named(value)}", make, r"a\.json")


TASK = {
    "data": {"image": "/data/local-files/?d=a.png", "product": "cap"},
    "annotations": [
        {
            "result": [
                {
                    "type": "rectanglelabels", "original_width": 48, "original_height": 32,
                    "value": {"x": 10, "y": 10, "width": 20, "height": 20, "rectanglelabels": ["dent"]},
                }
            ]
        }
    ],
}  # fmt: skip
LABEL_STUDIO: dict[str, Sequence[Any]] = {
    "data": (None, 3, "x", [], {}, {"image": 3}, {"image": "../a.png"}, {"image": "http://[::1"}),
    "annotations": (None, 3, "x", {}, [3], [None], [{"result": 3}], [{"result": [3]}], [{"result": [{"type": 3}]}]),
}
REGION: dict[str, Sequence[Any]] = {
    "type": ("brushlabels", "star", ["rectanglelabels"]),
    "original_width": ("48", 0, 47),
    "image_rotation": (90,),
    "value": (
        None, 3, [], {}, {"x": 1, "y": 1, "width": 900, "height": 5, "rectanglelabels": ["dent"]},
        {"x": "a", "y": 1, "width": 9, "height": 5, "rectanglelabels": ["dent"]},
        {"x": 1, "y": 1, "width": 9, "height": 5, "rectanglelabels": 3},
        {"x": 1, "y": 1, "width": 9, "height": 5, "rectanglelabels": [3]},
    ),
}  # fmt: skip


def label_studio_files() -> Iterator[Fault]:
    def file(task: Any) -> Callable[[Path], Arguments]:
        return listing(json.dumps([task]).encode(), "c.json")

    for field, value in table(LABEL_STUDIO):
        yield Fault(
            f"Label Studio {field} {named(value)}", file(without(TASK, field, value)), r"c\.json(:tasks\[0\]| )"
        )
    for field, value in table(REGION):
        region = TASK["annotations"][0]["result"][0]  # type: ignore[index]
        task = {**TASK, "annotations": [{"result": [without(region, field, value)]}]}
        yield Fault(f"Label Studio {field} {json.dumps(value)}", file(task), r"c\.json(:tasks\[0\]| )")


QUESTION = {"Question": "?", "Answer": "A", "type": "Anomaly Detection", "Options": {"A": "Yes.", "B": "No."}}
MMAD: dict[str, Sequence[Any]] = {
    "conversation": (None, "x", {}, 3, True),
    "mask_path": (True, ["m"], {}, "/m.png"),
    "random_templates": (3, "x", {}, [3], [None], ["/a.png"]),
}
MMAD_QUESTION: dict[str, Sequence[Any]] = {
    "Question": (*NO_TEXT, MISSING),
    "Answer": (None, 3, True, ["A"], "Z", MISSING),
    "type": (*NO_TEXT, MISSING),
    "Options": (None, 3, "x", [], {}, {"A": "Yes."}, {"A": "Yes.", "Z": "No."}, MISSING),
}


MMAD_REASONS = {
    "Question": "the question has no text",
    "Answer": "the answer .* is not one of the options A, B",
    "type": "the type .* is not one of MMAD's nine question types",
    "Options": "expected at least two options, each a string labelled with a letter from A to E",
}


def mmad_files() -> Iterator[Fault]:
    """An unusable query ends the build, because there is no other. A bad question is rejected, and the rest is used."""
    for field, value in table(MMAD):
        make = mmad(lambda rows, field=field, value=value: only(rows, **{field: value}))
        yield Fault(f"mmad {field} {named(value)}", make, rf"000\.JPG: it(s| has no) {field}")
    questions = [(field, without(QUESTION, field, value), value) for field, value in table(MMAD_QUESTION)]
    questions += [("", value, value) for value in (3, None, [], "x")]
    for field, question, value in questions:
        reason = MMAD_REASONS.get(field, "the question is not an object")
        make = mmad(lambda rows, question=question: only(rows, conversation=[question, QUESTION]))
        says = rf"1 rejected; see rejected\.jsonl\n  first: {VISA}#0: {reason}"
        yield Fault(f"mmad question {field} {named(value)}", make, says, status=0)


# Options and knowledge

OPTIONS: dict[str, Sequence[str]] = {
    "k": ("0", "-1", "2000000000", "1.5", "x", "[1]", "null", "true"),
    "seed": ("x", "1.5", "[1]", "-1", "4294967296"),
    "parts": ("0", "-3", "x"),
    "fractions": ("[]", "[1]", "[0.5, 0.5]", "[2, -1, 0]", "[a, b, c]", "[.inf, 0, 0]", "x"),
    "split": ("x", "3", "[given]", "true"),
    "index": ("x", "3"),
    "scope": ("x",),
    "routing": ("x", "null"),
    "unanswerable": ("2", "-1", ".nan", "x"),
    "folds": ("1", "0", "-2", "x"),
    "fold": ("3", "-1", "x"),
    "balance": ("3", "maybe", "[true]"),
    "grounding": ("3", "x"),
    "descriptor": ("3", "x/y/z", "''", "[skimage]"),
    "source": ("3", "x", "[synthetic]", "null"),
    "good": ("3", "{a: b}"),
    "traces": ("[nowhere]", "3"),
    "root": ("nowhere", "[a]", "''"),
    "cache": ("''",),
    "strict": ("2",),
    "knowledge": ("nowhere.yaml", "[a]"),
    "corrections": ("nowhere.json",),
    "upstream": ("x", "predicted"),
}


def options() -> Iterator[Fault]:
    for field, value in table(OPTIONS):
        text = f"{field}: {value}"
        yield Fault(f"option {text}", _set(field, value), rf"error: .*\b{field}\b")


def _set(field: str, value: str) -> Callable[[Path], Arguments]:
    make = config(f"{field}: {value}")

    def changed(root: Path) -> Arguments:
        arguments = make(root)
        if field in ("source", "descriptor"):  # the config has them already
            (root / "c.yaml").write_text((root / "c.yaml").read_text().replace(f"{field}: s", f"# {field}: s"))
        return arguments

    return changed


KNOWLEDGE = {
    "a list": "[a]",
    "a text": "x",
    "a number": "3",
    "empty": "",
    "dataset a text": "parts: x",
    "product a list": "parts: {cap: [good]}",
    "condition a number": "parts: {cap: {good: 3}}",
    "condition a list": "parts: {cap: {good: [a]}}",
    "condition null": "parts: {cap: {good: null}}",
    "condition empty": "parts: {cap: {good: ''}}",
    "twice": "parts: {cap: {good: a.}}\nparts: {cap: {good: b.}}",
    "name a number": "parts: {3: {good: a.}}",
    "tag": "parts: !!python/object:os.system {}",
    "tab": "parts:\n\tcap: {}",
}


def knowledge_files() -> Iterator[Fault]:
    for name, text in KNOWLEDGE.items():
        yield Fault(f"knowledge {name}", described(text), r"k\.yaml")


def real_iad(**changes: Any) -> Callable[[Path], Arguments]:
    """One manifest of Real-IAD with one row."""

    def make(root: Path) -> Arguments:
        picture(root / "raw" / "cap" / "OK" / "cap_0001_OK_C1_1.jpg")
        row = {"category": "cap", "anomaly_class": "OK", "image_path": "OK/cap_0001_OK_C1_1.jpg", "mask_path": None}
        content = {"meta": {"prefix": "cap/", "normal_class": "OK"}, "train": [{**row, **changes}], "test": []}
        (root / "cap.json").write_text(json.dumps(content))
        return build(root, source="real_iad", root=root / "raw", annotations=root / "cap.json")

    return make


REAL_IAD: dict[str, Sequence[Any]] = {
    "category": NO_TEXT,
    "anomaly_class": (*NO_TEXT, "ZZ"),
    "image_path": (*NO_TEXT, "", "../a.jpg", "/a.jpg"),
}


def real_iad_files() -> Iterator[Fault]:
    for field, value in table(REAL_IAD):
        yield Fault(
            f"Real-IAD {field} {named(value)}",
            real_iad(**{field: value}),
            rf"cap\.json:train\[0\]: .*({field}|does not exist|outside the root)",
        )


def empty_lists() -> Iterator[Fault]:
    for name in ("p.csv", "p.jsonl", "p.json", "p.tsv"):
        says = " ?(has no column 'image'|cannot be read|is |holds|lists|; it lists none)"
        yield Fault(f"empty list {name}", listing(b"", name), re.escape(name) + says)
    tasks = listing(b'\xef\xbb\xbf[{"data": {}}]', "c.json")
    yield Fault("Label Studio with a byte order mark", tasks, r"c\.json:tasks\[0\]: its image '' is not below the root")
    yield Fault("stray word", lambda root: [*build(root, source="manifest"), "stray"], "'stray' belongs to no option")
    many = ["--per_normal", "100000000"]
    yield Fault(
        "too many synthetic images",
        lambda root: ["data_prep.synthesize", *listing(b"", "p.csv")(root)[1:], *many],
        "per_normal is 100000000; set it to a number from 1 to 1000",
    )
    yield Fault("list without a suffix", listing(b"image,product,condition\n", "list"), "list")
    yield Fault("no source", lambda root: build(root), "source")
    yield Fault("list is a folder", lambda root: build(root, source="manifest", annotations=root), "annotations|file")


ANNOTATIONS = [
    *cells(), *csv_lists(), *coco_files(), *labelme_files(), *label_studio_files(), *mmad_files(), *options(),
    *knowledge_files(), *empty_lists(), *real_iad_files(),
]  # fmt: skip
"""Every row of this file."""
