"""Parse the values in manifests and annotation files: strings, conditions, splits, products and outlines."""

from __future__ import annotations

import ast
import json
import math
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_prep.sources import RowError, in_order, join_conditions, spelling
from data_prep.sources._words import GOOD_PHRASE, GOOD_WORDS, is_doubtful, plain_word
from echo_ft.data.splits import DEFECT_SEPARATOR, LEFT_OUT, REFERENCE_SPLIT, SPLITS, UNLABELLED_SPLIT
from echo_ft.data.text import control_token, nfc
from echo_ft.errors import EchoError
from echo_ft.images.decode import SIDEWAYS, size_and_orientation
from echo_ft.records import GOOD, UNLABELLED, Knowledge

Box = tuple[float, float, float, float]

LIST_MARKS = re.compile(r"[+;,|；，、｜＋]")
"""Characters that separate the defects of one image in a cell. In a label, category or folder name, only `+` separates
defects."""

BRACKETS = (("(", ")"), ("[", "]"), ("{", "}"), ("（", "）"))

DECIMAL_COMMA = re.compile(r"\d,\d")


def text_of(row: Mapping[str, Any], column: str) -> str | None:
    """Return the text of a column, or None if it is empty. Raises RowError for another type."""
    value = row.get(column)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int))):
        raise RowError(f"{column} is {value!r}, not a string")
    return (str(value).strip() if value is not None else "") or None


def required_text(row: Mapping[str, Any], column: str) -> str:
    """Return the text of a column. Raises RowError if it is empty or of another type."""
    text = text_of(row, column)
    if text is None:
        raise RowError(f"{column} is missing")
    return text


def number_of(value: Any) -> float:
    """Return a coordinate as a number. Raises TypeError, ValueError or OverflowError for anything else."""
    if isinstance(value, bool):  # JSON's true would count as the number 1
        raise TypeError("a truth value is not a number")
    return float(value)


def split_of(row: Mapping[str, Any], condition: str) -> str | None:
    """Return the split of a row with this condition, or None if it has none.

    It may be copied from a dataset's inspections.jsonl, in which an image can also be in the reference, left_out or
    unlabelled split. Raises RowError for an unknown split, or one that does not fit the condition.
    """
    split = text_of(row, "split")
    if split == UNLABELLED_SPLIT:
        return None  # the build puts it there again, unless it has got a condition since
    if split == LEFT_OUT:
        return "train"  # of which it is a fold
    if split is not None and split not in (*SPLITS, REFERENCE_SPLIT):
        raise RowError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if split is not None and condition == UNLABELLED:
        raise RowError(
            f"its condition is empty, so it cannot be in the split {split}; add the condition or remove the split"
        )
    if split == REFERENCE_SPLIT and condition != GOOD:
        raise RowError(f"its split is {split}, but it shows {condition}; write test, or remove the split")
    return split


@lru_cache(maxsize=64)
def spellings(words: tuple[str, ...]) -> frozenset[str]:
    """Return the spelling of each word."""
    return frozenset(map(spelling, words))


def means_good(name: str, good: tuple[str, ...]) -> bool:
    """Return whether a name is `good`, ignoring case, or one of the words that the config declares in `good`."""
    # The declaration of `ok` does not cover `ok?`.
    alike = tuple(word for word in good if is_doubtful(word) == is_doubtful(name))
    return name.casefold() == GOOD or (bool(name) and spelling(name) in spellings(alike))


def sounds_good(name: str) -> bool:
    """Return whether a name clearly means a part without a defect, in any of the known languages and spellings."""
    word = plain_word(name)
    return bool(name) and (not word or word in GOOD_WORDS or GOOD_PHRASE.fullmatch(word) is not None)


def check_condition(name: str, good: tuple[str, ...] = ()) -> str:
    """Return the name of a defect in NFC, or `good` for `good` itself and for words that the config declares.

    Raises RowError for other words that mean `good` and for words that leave the condition open.
    """
    if means_good(name, good):
        return GOOD
    if sounds_good(name):
        raise RowError(
            f"condition {name!r} must be spelled {GOOD!r} for a part without a defect, "
            f"or be declared with --good {shlex.quote(name)}; if it is a defect, give it another name"
        )
    if is_doubtful(name):
        raise RowError(
            f"condition {name!r} does not say whether the part has a defect; write {GOOD!r} or the name of the defect, "
            f"leave the image out, or declare the word with --good {shlex.quote(name)} if it means a part without a "
            "defect"
        )
    if len(name.splitlines()) > 1:
        raise RowError(f"condition {name[:60]!r} has a line break; close the quotation marks, and join names with '+'")
    return nfc(name)


@lru_cache(maxsize=4096)  # a long list has few different conditions
def named_condition(text: str, good: tuple[str, ...] = (), cell: bool = False) -> str:
    """Return the condition in a text: one defect, several defects (`bent + melt`) or `good`.

    In a manifest's `cell`, any of LIST_MARKS separates defects (`melt;bent`). A slash is ambiguous, and so is a mark in
    brackets or in a number. Raises RowError as `check_condition` does, for a control token, for an ambiguous cell, or
    if a defect is joined with `good` or nothing.
    """
    token = control_token(text)
    if token:  # checked first, because the bars in a token would separate defects
        raise RowError(f"condition {text!r} contains {token}, a control token of the model's chat template; rename it")
    if means_good(text, good) or sounds_good(text):
        return check_condition(text, good)
    parts = LIST_MARKS.split(text) if cell else text.split(DEFECT_SEPARATOR)
    if cell and (divided := _divides_a_name(text, parts)):
        raise RowError(f"condition {text!r} has {divided}, so it may be one name or several; {_list_remedy(text)}")
    names = [check_condition(name.strip(), good) for name in parts]
    slashed = next((name for name in names if "/" in name or "\\" in name), None) if cell else None
    if slashed:
        one, several = (re.sub(r"\s*[/\\]+\s*", mark, slashed) for mark in ("_", DEFECT_SEPARATOR))
        raise RowError(f"condition {slashed!r} has a slash; write {several!r} for several defects or {one!r} for one")
    if "" in names or (GOOD in names and len(names) > 1):
        raise RowError(
            f"condition {text!r} joins a defect with {GOOD!r} or with an empty name; give only the names of the defects"
        )
    return join_conditions(names)


def _divides_a_name(text: str, parts: Sequence[str]) -> str | None:
    """Return what list marks divide although it seems to be one name: `dent (large, deep)`, `cut 0,5 mm`; or None.

    Codes such as `1,3` are several names.
    """
    if len(parts) > 1 and not all(map(_is_balanced, parts)):
        return "brackets around a list mark"
    codes = all(part.strip().isdigit() for part in parts)
    return "a comma between digits" if not codes and DECIMAL_COMMA.search(text) else None


def _is_balanced(name: str) -> bool:
    return all(name.count(first) == name.count(last) for first, last in BRACKETS)


def _list_remedy(text: str) -> str:
    """Say how to write a cell as a list. A plus sign separates names in a list too."""
    names = text.split(DEFECT_SEPARATOR)
    shown = [name.strip() for name in names] if all(map(_is_balanced, names)) else ["_".join(names)]
    return f"write a list of names, such as {json.dumps(shown, ensure_ascii=False)}"


def condition_in(row: Mapping[str, Any], good: tuple[str, ...]) -> str:
    """Return the condition of a row, which may be a string, a JSON list of names, or a cell that contains a list.

    A name in a list may contain list marks and slashes: `["crack, long"]` is one defect. Raises RowError as
    `named_condition` does, or if there is no condition. An empty text is UNLABELLED.
    """
    value = row.get("condition")
    if isinstance(value, str) and not value.strip():
        return UNLABELLED
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())  # pandas writes ['bent', 'melt']
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise RowError(f"condition {value[:60]!r} is not a list of names; write bent+melt") from error
    if value is False:
        return named_condition(str(value), good, cell=True)  # this raises an error that says how to write the condition
    if value is True:
        raise RowError("condition is true, which is not the name of a defect; write its name")
    if not isinstance(value, list):
        return named_condition(required_text(row, "condition"), good, cell=True)
    if not value or not all(isinstance(name, str) and name.strip() for name in value):
        raise RowError(
            f"condition {str(value)[:60]} is not a list of names; write {GOOD!r} or the names of the defects"
        )
    return join_conditions({named_condition(name.strip(), good) for name in value})


def with_record_names(knowledge: Knowledge, shown: Collection[str], good: tuple[str, ...] = ()) -> Knowledge:
    """Return the knowledge with the names that records have for the same conditions: `good` for `OK`, sorted defects.

    `shown` holds the conditions in the images, and `good` the words that the config declares. Raises EchoError if two
    entries of a product describe the same condition, or if another word seems to mean `good`.
    """
    renamed: dict[str, dict[str, dict[str, str]]] = {}
    for dataset, products in knowledge.items():
        for product, entries in products.items():
            found = renamed.setdefault(dataset, {})[product] = {}
            for name, text in entries.items():
                known = _record_name(name, shown, good)
                if known not in (GOOD, *shown) and sounds_good(known):  # it would become an option for defects
                    raise EchoError(
                        f"knowledge: {dataset}/{product} has {known!r}, which seems to mean a part without a defect; "
                        f"name it {GOOD!r}, or give the defect another name"
                    )
                if known in found:
                    raise EchoError(
                        f"knowledge: {dataset}/{product} describes {known!r} twice, once as {name!r}; keep one of them"
                    )
                found[known] = text
    return renamed


def _record_name(name: str, shown: Collection[str], good: tuple[str, ...]) -> str:
    if name in shown:
        return name
    names = []
    for cell in (False, True):
        try:
            names.append(named_condition(name, good, cell))
        except RowError:  # the images show no such condition, which the build reports
            names.append(name)
    # Unless an image shows all of its parts, `dent, long` is one name.
    return names[1] if names[1] in shown else names[0]


def condition_cell(condition: str) -> str | list[str]:
    """Return a condition as `condition_in` reads it back: a string, or a list if a name may look like several names."""
    names = condition.split(DEFECT_SEPARATOR)
    unclear = any(LIST_MARKS.search(name) or name.startswith("[") or re.search(r"[/\\]", name) for name in names)
    return names if unclear else condition


def condition_of(labels: Iterable[str], good: tuple[str, ...] = ()) -> str:
    """Return the condition of an image whose regions have these labels.

    It is `good` if there are no labels, or if the config declares all of them in `good`. Raises RowError as
    `named_condition` does, if a label is empty, or if a label is `good` without being declared.
    """
    conditions = set()
    for label in map(str.strip, labels):
        if not label or (label.casefold() == GOOD and GOOD not in spellings(good)):
            raise RowError(
                f"a region is labelled {GOOD!r} or has no label; label only defects, each with its name, or pass "
                f"--good {GOOD} if such regions show parts without a defect"
            )
        conditions.add(named_condition(label, good))
    return join_conditions(conditions) if conditions else GOOD


def product_of(image: str, otherwise: str) -> str:
    """Return the default product of an image: the first folder of its path below the root, or `otherwise`."""
    return image.split("/")[0] if "/" in image else otherwise


@dataclass(frozen=True)
class DrawnView:
    """The view of an image that its annotations are drawn on."""

    size: tuple[int, int]
    """(width, height) of the view in pixels."""
    orientation: int | None = 1
    """The EXIF orientation if the view is the image as stored, 1 if it is the upright image, None if unknown."""

    def boxes(self, boxes: Iterable[Box]) -> tuple[Box, ...]:
        """Return boxes for the upright image, in order. Raises RowError if the view is unknown."""
        if self.orientation == 1:
            return in_order(boxes)
        turned = [self._turned([(x0, y0), (x1, y1)], 0) for x0, y0, x1, y1 in boxes]
        return in_order((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)) for (x0, y0), (x1, y1) in turned)

    def polygons(self, polygons: Iterable[tuple[float, ...]]) -> tuple[tuple[float, ...], ...]:
        """Return polygons for the upright image, in order. Raises RowError if the view is unknown."""
        # Boxes end at the borders of pixels, whereas the vertices of polygons are in the middle of pixels.
        turned = [self._turned(zip(polygon[::2], polygon[1::2], strict=True), 1) for polygon in polygons]
        return in_order(tuple(value for corner in corners for value in corner) for corners in turned)

    def _turned(self, points: Iterable[tuple[float, float]], inset: int) -> list[tuple[float, float]]:
        if self.orientation is None:
            raise RowError(
                "viewers rotate the image, and its annotations have no image size that shows which view they are for; "
                "save it rotated and without the EXIF tag"
            )
        right, bottom = self.size[0] - inset, self.size[1] - inset
        turns: dict[int, Callable[[float, float], tuple[float, float]]] = {
            5: lambda x, y: (y, x),
            6: lambda x, y: (bottom - y, x),
            7: lambda x, y: (bottom - y, right - x),
            8: lambda x, y: (y, right - x),
        }
        turn = turns.get(self.orientation)
        return [turn(x, y) for x, y in points] if turn else list(points)


def drawn_view(root: Path, image: str, stated: tuple[object, object]) -> DrawnView:
    """Return the view of an image that the annotations, with their stated (width, height), are drawn on.

    Raises RowError if the image is unreadable or differs in size.
    """
    try:
        size, orientation = size_and_orientation(root / image)
    except EchoError as error:
        raise RowError(str(error)) from error
    sideways = orientation in SIDEWAYS and size[0] != size[1]
    if stated == (None, None):
        return DrawnView(size, None if sideways else 1)
    if sideways and stated == size[::-1]:
        return DrawnView(size[::-1], orientation)
    if stated != size:
        raise RowError(
            f"{image} has {size[0]} x {size[1]} pixels, but its annotations are for {stated[0]} x {stated[1]}; "
            "annotate the unscaled file"
        )
    return DrawnView(size)


def polygon_of(corners: Iterable[tuple[float, float]]) -> tuple[float, ...]:
    """Return a polygon as records store it: x0, y0, x1, y1, ...

    Raises RowError if it has fewer than three vertices or a coordinate that is not finite.
    """
    values = tuple(value for corner in corners for value in corner)
    if len(values) < 6:
        raise RowError(f"a polygon has {len(values) // 2} vertices; it needs at least three")
    if not all(map(math.isfinite, values)):
        raise RowError(f"a polygon has a vertex with a non-numeric coordinate: {str(values)[:60]}")
    return values
