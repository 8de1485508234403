"""What the lists share that a person or an annotation tool writes: texts, conditions, splits, products and outlines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_prep.sources import RowError
from echo_ft.data.splits import SEVERAL, SPLITS, join_kinds
from echo_ft.errors import EchoError
from echo_ft.images.decode import image_size
from echo_ft.records import GOOD

OTHER_WORDS_FOR_GOOD = frozenset({"ok", "normal", "none", "free", "defect-free", "pass"})


def text_of(row: Mapping[str, Any], column: str) -> str | None:
    """A column's text, None where it is empty; raises RowError for another type."""
    value = row.get(column)
    if value is not None and not isinstance(value, (str, int)):
        raise RowError(f"{column} is {value!r}, not a text")
    return (str(value).strip() if value is not None else "") or None


def needed_text(row: Mapping[str, Any], column: str) -> str:
    """As `text_of`; raises RowError where it is empty."""
    text = text_of(row, column)
    if text is None:
        raise RowError(f"{column} is missing")
    return text


def split_of(row: Mapping[str, Any]) -> str | None:
    """The split of a row, if it names one; raises RowError for a word that is none."""
    split = text_of(row, "split")
    if split is not None and split not in SPLITS:
        raise RowError(f"split {split!r} is none of {', '.join(SPLITS)}")
    return split


def check_condition(condition: str) -> str:
    """The condition; raises RowError for a word that means `good` and is another."""
    if condition != GOOD and (condition.casefold() == GOOD or condition.casefold() in OTHER_WORDS_FOR_GOOD):
        raise RowError(f"condition {condition!r} is written {GOOD!r} for a part without a defect")
    return condition


def named_condition(text: str) -> str:
    """The condition that a list or a folder names: one kind of defect, several joined (`bent + melt`), or `good`.

    Raises RowError as `check_condition` does, and where `good` or nothing is joined with a defect.
    """
    kinds = [check_condition(kind.strip()) for kind in text.split(SEVERAL)]
    if "" in kinds or (GOOD in kinds and len(kinds) > 1):
        raise RowError(f"condition {text!r} joins a defect with {GOOD!r} or with nothing; name the defects alone")
    return join_kinds(kinds)


def condition_of(labels: Iterable[str]) -> str:
    """The condition of a photograph with these labels on it: `good` where there is none.

    Raises RowError where a label says that there is no defect.
    """
    names = {check_condition(label.strip()) for label in labels}
    if GOOD in names or "" in names:
        raise RowError(f"a region is labelled {GOOD!r} or not at all; label defects alone, each by its name")
    return join_kinds(names) if names else GOOD


def product_of(image: str, otherwise: str) -> str:
    """The product of a photograph whose list names none: the first folder of its path below the root."""
    return image.split("/")[0] if "/" in image else otherwise


def size_of(root: Path, image: str, stated: tuple[object, object]) -> tuple[int, int]:
    """(width, height) of an image; raises RowError where it is unreadable or its annotations state another size."""
    try:
        size = image_size(root / image)
    except EchoError as error:
        raise RowError(str(error)) from error
    if stated != (None, None) and stated != size:
        raise RowError(
            f"{image} has {size[0]} x {size[1]} pixels, its annotations are for {stated[0]} x {stated[1]}; "
            "annotate the file as it is, unscaled and without the camera's rotation mark"
        )
    return size


def polygon_of(corners: Iterable[tuple[float, float]]) -> tuple[float, ...]:
    """A polygon as records have it: x0, y0, x1, y1, ...

    Raises RowError where it has fewer than three corners or one that is no number.
    """
    values = tuple(value for corner in corners for value in corner)
    if len(values) < 6:
        raise RowError(f"a polygon has {len(values) // 2} corners; it takes three to enclose anything")
    if not all(map(math.isfinite, values)):
        raise RowError(f"a polygon has a corner that is no number: {str(values)[:60]}")
    return values
