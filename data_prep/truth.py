"""Combine what a source says about each image.

A source may list an image several times: in one row per box, in two exports merged into one COCO file, or in two
labelme files. Everything that it says becomes one record, or the image is rejected with a list of all places. Neither
the order nor the number of the places matters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.sources import Item, ItemPlace, RowError, in_order, join_conditions
from echo_ft.data.splits import DEFECT_SEPARATOR
from echo_ft.data.text import nfc
from echo_ft.images.masks import is_marked, mask_files
from echo_ft.inputs import image_file
from echo_ft.records import GOOD, UNLABELLED, Inspection, Question, Rejection

AGREED_FIELDS = ("dataset", "product", "group", "split", "reference", "synthetic")
"""Fields of an inspection that must have the same value at all places. Optional fields may be missing at some
places."""


@dataclass(frozen=True)
class Statement:
    """What a source says about an image at one place."""

    place: str
    inspection: Inspection
    unannotated: bool = False
    """Whether the image is `good` there only by convention (see `ItemPlace`)."""


@dataclass(frozen=True)
class SourceRecords:
    """All records of a source, with one inspection per image."""

    inspections: list[Inspection]
    questions: list[Question]
    rejections: list[Rejection]
    places: dict[str, str]
    """The places of each inspection, keyed by its id, such as `parts.csv:3, parts.csv:7`, if the source names them."""
    rejected: frozenset[str]
    """Ids of the images whose truth is contradictory or incomplete."""
    merged: frozenset[str]
    """Ids of the inspections that were combined from several places."""
    unannotated: frozenset[str]
    """Ids of the inspections that are `good` only by convention."""
    source_conditions: Mapping[str, str] = field(default_factory=dict)
    """The condition in the source of each inspection whose condition a correction changed, keyed by its id."""


def merge_records(items: Iterable[Item]) -> SourceRecords:
    """Return the records of a source with one inspection per image, in the order of their first occurrence.

    An image is rejected if its places contradict each other, or if one of them cannot be used, because the truth might
    then be incomplete.
    """
    statements: dict[str, list[Statement]] = {}
    unusable: dict[str, list[str]] = {}
    questions: list[Question] = []
    rejections: list[Rejection] = []
    latest: list[ItemPlace] = []
    for item in items:
        if isinstance(item, ItemPlace):
            latest = [one for one in latest if one.place == item.place] + [item]
        elif isinstance(item, Inspection):
            place = next((one for one in latest if one.inspection == item.id), ItemPlace(item.id, ""))
            statements.setdefault(item.id, []).append(
                Statement(place.place, with_composed_names(item), place.unannotated)
            )
        elif isinstance(item, Rejection):
            rejections.append(item)
            if item.dropped is None:
                for one in latest:
                    if one.place == item.item:
                        unusable.setdefault(one.inspection, []).append(one.place)
        else:
            questions.append(item)
    inspections = []
    for name, said in statements.items():
        try:
            if name in unusable:
                others = ", ".join(dict.fromkeys(unusable[name]))
                raise RowError(
                    f"it is also in {others}, which cannot be used, so its truth may be incomplete; correct that entry"
                )
            inspection, unmarked = merge_statements(said)
        except RowError as error:
            rejections.append(Rejection(said[0].inspection.image, f"{error}{_suffix(said)}"))
            continue
        inspections.append(inspection)
        if unmarked:
            rejections.append(Rejection(inspection.image, unmarked + _suffix(said), "mask"))
    kept = {inspection.id for inspection in inspections}
    return SourceRecords(
        with_groups_as_paths(inspections),
        questions,
        rejections,
        {name: places for name, said in statements.items() if name in kept and (places := _places(said))},
        frozenset({*statements, *unusable} - kept),
        frozenset(name for name in kept if len({one.place for one in statements[name]}) > 1),
        frozenset(name for name in kept if all(one.unannotated for one in statements[name])),
    )


def default_group(inspection: Inspection) -> str:
    """Return the group of an image for which the source states none: the path of its file, without a frame."""
    return image_file(Path(inspection.image)).as_posix()


def with_composed_names(inspection: Inspection) -> Inspection:
    """Return the inspection with its names in NFC. Paths keep the form that they have on disk."""
    file = default_group(inspection)
    return dataclasses.replace(
        inspection,
        dataset=nfc(inspection.dataset),
        product=nfc(inspection.product),
        condition=nfc(inspection.condition),
        # By default, the group is the path. The frames of a file usually show the same part.
        group=file if inspection.group in (file, inspection.image) else nfc(inspection.group),
    )


def with_groups_as_paths(inspections: Sequence[Inspection]) -> list[Inspection]:
    """Return the inspections with the same group for all images whose group is the path of one of them.

    The image with this path has it as it is on disk, and the others have it in NFC.
    """
    own = {one.group for one in inspections if one.group == default_group(one)}
    on_disk = {nfc(path): path for path in own if nfc(path) not in own}
    return [dataclasses.replace(one, group=on_disk[one.group]) if one.group in on_disk else one for one in inspections]


def merge_statements(statements: Sequence[Statement]) -> tuple[Inspection, str | None]:
    """Return the inspection that results from all statements about one image.

    Defects, masks, boxes and polygons add up. If one place names a defect without marking it while another place has
    marks, all marks are left out. They would present the unmarked defect as normal, even if both have the same name.
    The shapes of a labelme file mark the defects in its flags. The second value is the reason, or None. Raises RowError
    if the statements contradict each other.
    """
    if len(statements) == 1:
        return statements[0].inspection, None
    fields = {field: _agreed(field, statements) for field in AGREED_FIELDS}
    annotated = [one for one in statements if not one.unannotated] or statements
    if any(len({one.inspection.condition == name for one in annotated}) > 1 for name in (GOOD, UNLABELLED)):
        raise RowError(f"its condition is {_by_place(annotated, 'condition')}; correct the wrong ones")
    files = [one for one in annotated if mask_files(one.inspection)]
    outlined = [one for one in annotated if is_marked(one.inspection) and one not in files]
    if files and outlined:
        raise RowError(
            f"a mask marks it in {_places(files)} but boxes or polygons in {_places(outlined)}; "
            "mark all of its defects in one way"
        )
    condition = join_conditions({one.inspection.condition for one in annotated})
    first = dataclasses.replace(statements[0].inspection, **fields, condition=condition)
    marked = [*files, *outlined]
    marked_names: dict[str, set[str]] = {}
    for one in marked:
        marked_names.setdefault(one.place, set()).update(_defects(one))
    missing = [
        one for one in annotated if not is_marked(one.inspection) and _defects(one) - marked_names.get(one.place, set())
    ]
    if marked and missing and condition != GOOD:
        unmarked, others = (", ".join(sorted(set().union(*map(_defects, said)))) for said in (missing, marked))
        reason = f"{unmarked} is not marked in {_places(missing) or 'the source'}, but {others} is in {_places(marked)}"
        return _with_marks(first, []), f"{reason}; mark every defect; the image is used without its marks"
    return _with_marks(first, [one.inspection for one in files or outlined]), None


def _defects(statement: Statement) -> set[str]:
    """Return the names of the defects at a place."""
    return {*statement.inspection.condition.split(DEFECT_SEPARATOR)}


def _agreed(field: str, statements: Sequence[Statement]) -> Any:
    """Return the value of a field, which must be equal at all places that have it, or None if no place has it."""

    def value(inspection: Inspection) -> Any:
        found = getattr(inspection, field)
        # Without a group, the record has the default one.
        return None if field == "group" and found == default_group(inspection) else found

    given = [one for one in statements if value(one.inspection) is not None]
    if len({value(one.inspection) for one in given}) > 1:
        raise RowError(f"its {field} is {_by_place(given, field)}; correct the wrong ones")
    if given:
        return value(given[0].inspection)
    return getattr(statements[0].inspection, field)


def _with_marks(inspection: Inspection, marked: Sequence[Inspection]) -> Inspection:
    """Return the inspection with all masks, boxes and polygons of `marked`, deduplicated and in a fixed order."""
    files = sorted({name for one in marked for name in mask_files(one)})
    return dataclasses.replace(
        inspection,
        mask=files[0] if len(files) == 1 else None,
        masks=tuple(files) if len(files) > 1 else (),
        boxes=in_order(box for one in marked for box in one.boxes),
        polygons=in_order(polygon for one in marked for polygon in one.polygons),
    )


def _by_place(statements: Sequence[Statement], field: str) -> str:
    """Return the values of a field with their places: `'good' in parts.csv:2, 'dent' in parts.csv:5`."""
    values: dict[Any, list[Statement]] = {}
    for one in statements:
        values.setdefault(getattr(one.inspection, field), []).append(one)
    return ", ".join(f"{value!r} in {_places(said) or 'the source'}" for value, said in values.items())


def _places(statements: Sequence[Statement]) -> str:
    return ", ".join(dict.fromkeys(one.place for one in statements if one.place))


def _suffix(statements: Sequence[Statement]) -> str:
    places = _places(statements)
    return f" ({places})" if places else ""
