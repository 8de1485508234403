"""Read a manifest of images that a person or an annotation tool wrote.

- CSV with a header, or JSON lines, with one row per image, or several rows that `data_prep.truth` combines, such as one
  per box. A .tsv file has tabs instead of commas, and a first line such as `sep=;` sets another separator. Required
  columns: `image`, `product` and `condition` (`good` for a part without a defect; several defects are joined in any
  order, as in `bent+melt`, or `melt;bent` as other tools write). Optional columns: `mask` (an image file), `boxes`
  ([[x0, y0, x1, y1], ...] in pixels, used if there is no mask), `group` (shared by the images of one physical part),
  `split` (`train`, `validation` or `test`), `reference` (the normal image to compare with), `dataset` (by default the
  name of the manifest) and `synthetic` (the method of `echo_ft.images.synthetic_defects` that made the defect, written
  by `data_prep.synthesize`).
- COCO JSON: see `_coco`. The JSON export of Label Studio: see `_labelstudio`.
- Without a manifest, the labelme files under the root: see `_labelme`.

Paths are relative to the root. The path of an image may name a frame of its file, as in `stack.tif#frame=2`. Splits
depend on the rows of a manifest, but not on its name. Adding rows changes the splits.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_prep.faults import IMAGE_SUFFIXES
from data_prep.sources import ItemPlace, Items, RowError, SourceConfig, in_order, locate
from data_prep.sources._coco import read_coco
from data_prep.sources._labelme import read_labelme
from data_prep.sources._labelstudio import is_task_list, read_labelstudio
from data_prep.sources._lists import ListFormat, list_format, not_text
from data_prep.sources._rows import condition_in, drawn_view, number_of, required_text, split_of, text_of
from echo_ft.errors import EchoError
from echo_ft.images.synthetic_defects import DEFECT_METHODS
from echo_ft.inputs import InputError, lines, open_text
from echo_ft.records import GOOD, UNLABELLED, Inspection, Rejection
from echo_ft.strict_yaml import DuplicateKeyError, read_json

IMAGE_KEY = re.compile(r'"image"\s*:\s*("(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])*")')
"""Finds the image in a line of JSON, even if the rest of the line is broken."""

UNREAD_MARKS = re.compile(
    r"(bbox_?|box_?)?[xy][ _]?(\d|min|max)|bbox(es)?|box|polygons?|segmentations?"
    r"|b?box[ _]?([xywh]|left|top|right|bottom|width|height)",
    re.IGNORECASE,
)
"""Matches the names of columns that seem to mark defects but are not read."""

UNREAD_SIDES = tuple(
    frozenset(names.split())
    for names in ("x y w h", "x y width height", "left top right bottom", "left top width height")
)
"""Names of columns that seem to mark defects together. Alone, such as the width of a photograph, they do not."""

MASK_COLUMN = re.compile(
    r"((gt|defect|anomaly|segmentation|ground[ _-]?truth)[ _-]?)?mask[ _-]?(path|file|file[ _-]?name|name|image)?s?",
    re.IGNORECASE,
)
"""Matches the names of columns that seem to name a mask."""

LINE_BREAK = re.compile(r"[\r\n]+")

REQUIRED = ("image", "product", "condition")
COLUMNS = (*REQUIRED, "mask", "boxes", "group", "split", "reference", "dataset", "synthetic")
ONE_LINE_COLUMNS = tuple(column for column in COLUMNS if column != "boxes")

Row = tuple[int, Mapping[str, Any], str | None]
"""The line number of a row, its readable cells, and the reason why the row cannot be used, or None."""


def read(config: SourceConfig) -> Items:
    """Yield the rows of the manifest. An unusable row is rejected with its line number.

    Raises EchoError if the manifest is missing or cannot be parsed, or if a column is missing or misspelt.
    """
    path = config.annotations
    if path is None:
        yield from read_labelme(config)
        return
    if not path.is_file():
        raise EchoError(f"the manifest {path} is not a file; set annotations to a CSV, JSONL or JSON file")
    if path.suffix.lower() == ".json":
        read_json_file = read_labelstudio if is_task_list(path) else read_coco
        yield from read_json_file(config, path)
        return
    form = list_format(path)
    rows = _jsonl_rows(path, form) if form.separator is None else _csv_rows(path, form)
    for line, row, fault in rows:
        place = f"{path.name}:{line}"
        try:
            image = locate(config.root, required_text(row, "image"), "image", config.frame)
        except RowError as error:
            yield Rejection(place, fault or str(error))
            continue
        yield ItemPlace(image, place)
        try:
            if fault:
                raise RowError(fault)
            inspection = _inspection(row, image, config, path.stem)
            if inspection.boxes and inspection.mask is None:
                drawn_view(config.root, image, (None, None)).boxes(inspection.boxes)
            yield inspection
        except RowError as error:
            yield Rejection(place, str(error))


def _csv_rows(path: Path, form: ListFormat) -> Iterator[Row]:
    separator, line = form.separator or ",", form.skipped
    try:
        with open_text(path, form.encoding, newline="") as file:
            for _ in range(form.skipped):
                file.readline()
            reader = csv.DictReader(lines(file), delimiter=separator)
            _check_columns(path, tuple(reader.fieldnames or ()))
            line = form.skipped + reader.line_num
            for row in reader:
                cells: dict[Any, Any] = row
                surplus = cells.pop(None, [])
                fault = None
                if any(cell.strip() for cell in surplus):  # spreadsheets append empty cells
                    fault = "it has more cells than the header has columns; quote cells that contain a comma"
                elif any(LINE_BREAK.search(cells.get(name) or "") for name in ONE_LINE_COLUMNS):
                    fault = "a cell has a line break; remove it"
                line = form.skipped + reader.line_num
                _check_quotes(f"{path}:{line}", cells, surplus, separator)
                yield line, cells, fault
    except csv.Error as error:
        raise EchoError(
            f"{path} cannot be read as CSV near line {line + 1} ({error}); close the quotation mark of a cell there, "
            "or shorten the cell"
        ) from error
    except (UnicodeError, InputError) as error:
        raise not_text(path, error) from error


def _check_quotes(place: str, row: Mapping[str, str | None], surplus: Collection[str], separator: str) -> None:
    """Raise EchoError if a cell holds a whole row, because an unclosed quotation mark hides the rows that follow.

    A line within a cell counts as a row if it has as many columns, and one of them looks like an image path. `surplus`
    holds the cells after the last column.
    """
    suffixes = {*IMAGE_SUFFIXES, Path(row["image"] or "").suffix.lower()} - {""}
    for cell in filter(None, (*row.values(), *surplus)):
        _, *others = LINE_BREAK.split(cell)
        for line in others:
            inside = line.split(separator)
            if len(inside) >= len(row) and any(Path(text.strip(' "')).suffix.lower() in suffixes for text in inside):
                raise EchoError(
                    f"{place}: the cell {cell[:20]!r} holds the next rows; close its quotation mark, or remove the "
                    "line breaks of the cell"
                )


def _jsonl_rows(path: Path, form: ListFormat) -> Iterator[Row]:
    try:
        with open_text(path, form.encoding) as file:
            # Unlike `lines`, splitlines() also splits at U+2028, U+2029 and U+0085, which are valid in JSON strings.
            for number, line in enumerate(lines(file), start=1):
                if line.strip():
                    yield number, *_parsed(path, line)
    except (UnicodeError, InputError) as error:
        raise not_text(path, error) from error


def _parsed(path: Path, line: str) -> tuple[Mapping[str, Any], str | None]:
    """Return the readable cells of a line of JSON, and the reason why the row cannot be used, or None."""
    fault = None
    try:
        try:
            row = read_json(line)
        except DuplicateKeyError as error:
            row, fault = read_json(line, unique_keys=False), f"the line is ambiguous ({error}); remove one of the two"
    except ValueError as error:
        return _image_in(line), f"the line is not JSON ({error})"
    if not isinstance(row, dict):
        return {}, "the line is not a JSON object"
    _check_columns(path, tuple(row), complete=False)
    return row, fault


def _image_in(line: str) -> dict[str, Any]:
    """Return the image that a broken line names, so that other lines about it do not count as its whole truth."""
    image = IMAGE_KEY.search(line)
    return {"image": read_json(image[1])} if image else {}


@lru_cache  # each line of JSON contains the names of its columns
def _check_columns(path: Path, names: tuple[str, ...], complete: bool = True) -> None:
    missing = [column for column in REQUIRED if column not in names]
    if complete and missing:
        raise EchoError(
            f"{path} has no column {missing[0]!r}; required columns are {', '.join(REQUIRED)}; {_found(names)}"
        )
    spelled = [str(name).strip().casefold() for name in names]
    twice = [column for column in COLUMNS if spelled.count(column) > 1]
    if twice:
        raise EchoError(f"{path} has several columns {twice[0]!r}; keep the correct one and rename the others")
    sides = next((sides for sides in UNREAD_SIDES if sides <= set(spelled)), frozenset())
    unread = [
        str(name) for name, plain in zip(names, spelled, strict=True) if UNREAD_MARKS.fullmatch(plain) or plain in sides
    ]
    if unread and "boxes" not in names:
        raise EchoError(
            f"{path} has {', '.join(map(repr, unread))}, which would not be read; write the marks as a column 'boxes' "
            "with [[x0, y0, x1, y1], ...] in pixels, use COCO JSON, or rename columns that do not mark defects"
        )
    absent = [column for column in COLUMNS if column not in names]
    for name in names:
        # An unnoticed misspelling of `group` or `split` would cause leakage. Other columns are ignored.
        plain = str(name).strip().casefold()
        near = name not in COLUMNS and difflib.get_close_matches(plain, absent, n=1, cutoff=0.75)
        if "mask" in absent and MASK_COLUMN.fullmatch(plain):
            near = ["mask"]
        if near:
            raise EchoError(f"{path} has a column {name!r}; did you mean {near[0]!r}?")


def _found(names: Collection[str]) -> str:
    """Describe the columns that were found instead of the required ones, and say what to do."""
    if not names:
        return "the file is empty; its first line must name the columns"
    found = ", ".join(map(repr, names))
    for separator, plural, remedy in (
        (";", "semicolons", "put the line sep=; before the header"),
        ("\t", "tabs", "rename it to .tsv"),
    ):
        if any(separator in name for name in names):
            return f"found {found}: save the file with commas between the columns, not {plural}, or {remedy}"
    if len(names) == 1 and "," in found:
        return f"found {found}: rename the file to .csv if its columns are separated by commas"
    return f"found {found}"


def _inspection(row: Mapping[str, Any], image: str, config: SourceConfig, dataset: str) -> Inspection:
    root, product = config.root, required_text(row, "product")
    condition = condition_in(row, config.good)
    split = split_of(row, condition)
    boxes = _boxes(row.get("boxes"))
    if boxes and condition == GOOD:
        raise RowError(f"it has boxes, but its condition is {GOOD!r}")
    mask, reference, synthetic = (text_of(row, column) for column in ("mask", "reference", "synthetic"))
    if synthetic and synthetic not in DEFECT_METHODS:
        raise RowError(
            f"synthetic is {synthetic!r}, not one of {', '.join(DEFECT_METHODS)}; leave it empty for a real image"
        )
    if condition == UNLABELLED and (mask or boxes or synthetic):
        raise RowError(f"it marks a defect, but its condition is empty; enter the defect's name or {GOOD!r}")
    if synthetic and condition == GOOD:
        raise RowError(f"its defect is synthetic, but its condition is {GOOD!r}")
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
        reference=locate(root, reference, "reference", config.frame) if reference else None,
        synthetic=synthetic,
    )


def _boxes(value: Any) -> tuple[tuple[float, float, float, float], ...]:
    if value is None or value == "" or value == []:
        return ()
    try:
        boxes = read_json(value) if isinstance(value, str) else value
        if not isinstance(boxes, list):
            raise TypeError("boxes form a list")
        numbers = (map(number_of, (x0, y0, x1, y1)) for x0, y0, x1, y1 in boxes)
        return in_order((x0, y0, x1, y1) for x0, y0, x1, y1 in numbers)
    except (TypeError, ValueError, OverflowError) as error:
        raise RowError(f"boxes {str(value)[:60]} are not [[x0, y0, x1, y1], ...]") from error
