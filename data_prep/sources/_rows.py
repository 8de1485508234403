"""Parse the values of manifests and annotation files: texts, conditions, splits, products and outlines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_prep.sources import RowError
from echo_ft.data.splits import DEFECT_SEPARATOR, SPLITS, join_defects
from echo_ft.errors import EchoError
from echo_ft.images.decode import image_size
from echo_ft.records import GOOD

GOOD_SYNONYMS = frozenset({"ok", "normal", "none", "free", "defect-free", "pass"})


def text_of(row: Mapping[str, Any], column: str) -> str | None:
    """Return the text of a column, or None if it is empty. Raises RowError for another type."""
    value = row.get(column)
    if value is not None and not isinstance(value, (str, int)):
        raise RowError(f"{column} is {value!r}, not a string")
    return (str(value).strip() if value is not None else "") or None


def required_text(row: Mapping[str, Any], column: str) -> str:
    """Return the text of a column. Raises RowError if it is empty or of another type."""
    text = text_of(row, column)
    if text is None:
        raise RowError(f"{column} is missing")
    return text


def split_of(row: Mapping[str, Any]) -> str | None:
    """Return the split of a row, or None if it names none. Raises RowError for an unknown split."""
    split = text_of(row, "split")
    if split is not None and split not in SPLITS:
        raise RowError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    return split


def check_condition(condition: str) -> str:
    """Return the condition. Raises RowError for a synonym or another spelling of `good`."""
    if condition != GOOD and (condition.casefold() == GOOD or condition.casefold() in GOOD_SYNONYMS):
        raise RowError(f"condition {condition!r} must be spelled {GOOD!r} for a part without a defect")
    return condition


def named_condition(text: str) -> str:
    """Return the condition that a manifest or folder names: one defect, several joined ones (`bent + melt`) or `good`.

    Raises RowError as `check_condition` does, or if a defect is joined with `good` or an empty name.
    """
    names = [check_condition(name.strip()) for name in text.split(DEFECT_SEPARATOR)]
    if "" in names or (GOOD in names and len(names) > 1):
        raise RowError(f"condition {text!r} joins a defect with {GOOD!r} or with nothing; name only the defects")
    return join_defects(names)


def condition_of(labels: Iterable[str]) -> str:
    """Return the condition of an image whose regions have these labels: `good` without labels.

    Raises RowError if a label is empty, `good` or a synonym of it.
    """
    names = {check_condition(label.strip()) for label in labels}
    if GOOD in names or "" in names:
        raise RowError(f"a region is labelled {GOOD!r} or has no label; label only defects, each with its name")
    return join_defects(names) if names else GOOD


def product_of(image: str, otherwise: str) -> str:
    """Return the default product of an image: the first folder of its path below the root, or `otherwise`."""
    return image.split("/")[0] if "/" in image else otherwise


def size_of(root: Path, image: str, stated: tuple[object, object]) -> tuple[int, int]:
    """Return an image's (width, height). Raises RowError if it is unreadable or its annotations state another size."""
    try:
        size = image_size(root / image)
    except EchoError as error:
        raise RowError(str(error)) from error
    if stated != (None, None) and stated != size:
        raise RowError(
            f"{image} has {size[0]} x {size[1]} pixels, but its annotations are for {stated[0]} x {stated[1]}; "
            "annotate the unscaled file without its EXIF rotation"
        )
    return size


def polygon_of(corners: Iterable[tuple[float, float]]) -> tuple[float, ...]:
    """Return a polygon as records store it: x0, y0, x1, y1, ...

    Raises RowError if it has fewer than three corners or a coordinate that is not finite.
    """
    values = tuple(value for corner in corners for value in corner)
    if len(values) < 6:
        raise RowError(f"a polygon has {len(values) // 2} corners; it needs at least three")
    if not all(map(math.isfinite, values)):
        raise RowError(f"a polygon has a corner that is not a number: {str(values)[:60]}")
    return values
