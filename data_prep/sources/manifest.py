"""A list of photographs that a person or an annotation tool can write.

- CSV with a header, or JSON lines, one row a photograph. Needed are `image`, `product` and `condition` (`good` for a
  part without a defect; several defects are joined in any order: `bent+melt`). Optional are `mask` (an image file),
  `boxes` ([[x0, y0, x1, y1], ...] in pixels; they count where there is no mask), `group` (photographs of one physical
  part share it), `split` (`train`, `validation` or `test`), `reference` (the normal image to compare with), `dataset`
  (by default the list's name) and `synthetic` (the method of `echo_ft.images.synthetic_defects` that made a defect which no camera
  saw: `data_prep.synthesize` fills it).
- COCO JSON: see `_coco`.
- No list: the files that labelme has written under the root, see `_labelme`.

Paths are relative to the root. Splits do not depend on the list's name, but on its rows: a longer list is split anew.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.sources import ItemPlace, Items, RowError, SourceConfig, locate
from data_prep.sources._coco import read_coco
from data_prep.sources._labelme import read_labelme
from data_prep.sources._rows import named_condition, needed_text, split_of, text_of
from echo_ft.errors import EchoError
from echo_ft.images.synthetic_defects import METHODS
from echo_ft.records import GOOD, Inspection, Rejection

NEEDED = ("image", "product", "condition")
COLUMNS = (*NEEDED, "mask", "boxes", "group", "split", "reference", "dataset", "synthetic")


def read(config: SourceConfig) -> Items:
    """The rows of the manifest; a row that cannot be used is rejected by its line number."""
    path = config.annotations
    if path is None:
        yield from read_labelme(config.root)
        return
    if not path.is_file():
        raise EchoError(f"the manifest {path} is not a file; set annotations to a CSV, a JSONL or a COCO JSON")
    if path.suffix.lower() == ".json":
        yield from read_coco(config.root, path)
        return
    rows = _csv_rows(path) if path.suffix.lower() in (".csv", ".tsv") else _jsonl_rows(path)
    first_line: dict[str, int] = {}
    for line, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            inspection = _inspection(row, config.root, path.stem)
            if inspection.image in first_line:
                raise RowError(f"image {inspection.image} is already on line {first_line[inspection.image]}")
            first_line[inspection.image] = line
            yield ItemPlace(inspection.id, f"{path.name}:{line}")
            yield inspection
        except RowError as error:
            yield Rejection(f"{path.name}:{line}", str(error))


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | RowError]]:
    """Line and cells of each row, or what is wrong with it; so for `_jsonl_rows`."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _check_columns(path, reader.fieldnames or ())
            for row in reader:
                cells: dict[Any, Any] = row
                surplus = cells.pop(None, [])
                if any(cell.strip() for cell in surplus):  # spreadsheets leave empty ones
                    words = "it has more cells than the header has columns; quote a cell that holds a comma"
                    yield reader.line_num, RowError(words)
                else:
                    yield reader.line_num, cells
    except (UnicodeDecodeError, csv.Error) as error:
        raise EchoError(f"{path} is not a CSV file in UTF-8 ({error}); save it as CSV UTF-8") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | RowError]]:
    try:
        # Not splitlines(): it also parts at U+2028, U+2029 and U+0085, which JSON leaves as they are within a text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise EchoError(f"{path} is not a text file in UTF-8 ({error}); save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, RowError(f"the line is not JSON ({error})")
            continue
        if isinstance(row, dict):
            _check_columns(path, row, needed=False)
            yield number, row
        else:
            yield number, RowError("the line is not a JSON object")


def _check_columns(path: Path, names: Collection[str], needed: bool = True) -> None:
    missing = [column for column in NEEDED if column not in names]
    if needed and missing:
        raise EchoError(f"{path} has no column {missing[0]!r}; needed are {', '.join(NEEDED)}; {_found(names)}")
    absent = [column for column in COLUMNS if column not in names]
    for name in names:
        # A misspelt `group` or `split` that went unnoticed would leak; columns of other meaning are left alone.
        near = name not in COLUMNS and difflib.get_close_matches(str(name), absent, n=1, cutoff=0.75)
        if near:
            raise EchoError(f"{path} has a column {name!r}; did you mean {near[0]!r}?")


def _found(names: Collection[str]) -> str:
    """What stands there instead of the columns that are needed, and what to do about it."""
    if not names:
        return "the file is empty; its first line has to name the columns"
    found = ", ".join(map(repr, names))
    for mark, words in ((";", "semicolons"), ("\t", "tabs")):
        if any(mark in name for name in names):
            return f"found is {found}: save the file with commas between the columns, not {words}"
    return f"found are {found}"


def _inspection(row: Mapping[str, Any], root: Path, dataset: str) -> Inspection:
    image, product = needed_text(row, "image"), needed_text(row, "product")
    condition = named_condition(needed_text(row, "condition"))
    split = split_of(row)
    boxes = _boxes(row.get("boxes"))
    if boxes and condition == GOOD:
        raise RowError(f"it has boxes although its condition is {GOOD!r}")
    image = locate(root, image, "image")
    mask, reference, synthetic = (text_of(row, column) for column in ("mask", "reference", "synthetic"))
    if synthetic and synthetic not in METHODS:
        raise RowError(
            f"synthetic is {synthetic!r}, none of {', '.join(METHODS)}; leave it empty for what a camera saw"
        )
    if synthetic and condition == GOOD:
        raise RowError(f"its defect is synthetic although its condition is {GOOD!r}")
    return Inspection(
        id=image,
        image=image,
        dataset=text_of(row, "dataset") or dataset,
        product=product,
        condition=condition,
        group=text_of(row, "group") or image,
        split=split,
        mask=locate(root, mask, "mask") if mask else None,
        boxes=boxes,
        reference=locate(root, reference, "reference") if reference else None,
        synthetic=synthetic,
    )


def _boxes(value: Any) -> tuple[tuple[float, float, float, float], ...]:
    if value is None or value == "" or value == []:
        return ()
    try:
        boxes = json.loads(value) if isinstance(value, str) else value
        return tuple((float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in boxes)
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise RowError(f"boxes {value!r} are not [[x0, y0, x1, y1], ...]") from error
