"""Collect the raw images of a build: check the config, read the source, and reject what cannot be used."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from data_prep import sources
from data_prep.config import BuildConfig
from data_prep.faults import MaskFault, boxes_fault, image_fault, mask_fault, name_fault
from data_prep.progress import first_rejection, progress
from data_prep.sources import Item
from data_prep.truth import SourceRecords, put_together
from echo_ft.data.splits import check_fractions
from echo_ft.data.text import control_token
from echo_ft.errors import EchoError
from echo_ft.images.masks import mask_files
from echo_ft.records import GOOD, Inspection, Question, Rejection


def check_config(config: BuildConfig) -> None:
    """Raise EchoError for every mistake in the config that can be found before images are read."""
    _source(config.source)
    for key in ("annotations", "knowledge"):
        path = getattr(config, key)
        if path is not None and not (path.is_file() or (key == "knowledge" and path.is_dir())):
            raise EchoError(f"{key}: there is no file {path}; check the path")
    check_fractions(config.fractions)
    for pair, (first, second) in {
        "folds and fold": (config.folds is not None, config.fold is not None),
        "upstream predicted and traces": (config.upstream == "predicted", bool(config.traces)),
    }.items():
        if first != second:
            raise EchoError(f"{pair} go together; give both or neither")
    if config.source == "synthetic":
        if config.root is not None:
            raise EchoError("the source synthetic draws its images into the dataset folder; remove root")
        return
    root = _root(config, config.output)
    if not root.is_dir():
        raise EchoError(f"root: there is no folder {root} (looked from {Path.cwd()}); check the path")
    if root.resolve().is_relative_to(config.output.resolve()):
        raise EchoError(f"the images in {root} lie inside the output {config.output}; choose another output")


@dataclass(frozen=True)
class UsableImages:
    """What a build can use of a source."""

    root: Path
    """The folder that the paths of images are relative to."""
    inspections: list[Inspection]
    questions: list[Question]
    rejections: list[Rejection]
    merged: int
    """Number of images whose truth was put together from several places of the source."""
    unannotated: list[str]
    """Images that are `good` because their annotation file marks and names nothing."""


def usable_images(config: BuildConfig, folder: Path) -> UsableImages:
    """The usable records of the config's source (see `check_records`).

    A source that draws its images writes them into `folder`. Raises EchoError if no image can be used.
    """
    root, items = source_items(config, folder)
    records = put_together(progress(items, "reading", "records"))
    inspections, questions, rejections = check_records(records, root)
    if not inspections:
        where = config.annotations or root
        why = first_rejection(rejections) or "; it lists none: add a row per image, or check the path"
        raise EchoError(f"the source {config.source} has no usable image in {where}{why}")
    merged = sum(inspection.id in records.merged for inspection in inspections)
    unannotated = [inspection.image for inspection in inspections if inspection.id in records.unannotated]
    return UsableImages(root, inspections, questions, rejections, merged, unannotated)


def source_items(config: BuildConfig, folder: Path) -> tuple[Path, sources.Items]:
    """The root of the config's source and the records that it yields.

    A source that draws its images writes them into `folder`.
    """
    root = _root(config, folder)
    root.mkdir(exist_ok=True)
    source = sources.SourceConfig(
        root, config.annotations, config.seed, config.parts, tuple(config.good or ()), config.split
    )
    return root, _source(config.source).read(source)


def collect(items: Iterable[Item], root: Path) -> tuple[list[Inspection], list[Question], list[Rejection]]:
    """The usable inspections and questions of a source, and a rejection with a reason for everything else."""
    return check_records(put_together(items), root)


def check_records(records: SourceRecords, root: Path) -> tuple[list[Inspection], list[Question], list[Rejection]]:
    """The inspections and questions whose files can be used, and a rejection with a reason for everything else.

    If a mask contradicts its image, the image is rejected too. It is kept if the source has its own questions about
    it: the questions of a benchmark are valid without a mask.
    """
    rejections = [*records.rejections]
    with_questions = {question.inspection for question in records.questions}
    places = {name: f" ({place})" for name, place in records.places.items()}
    cached_image_fault = cache(image_fault)
    inspections: dict[str, Inspection] = {}
    for item in progress(records.inspections, "checking", "images"):
        inspection = item
        fault = name_fault(inspection) or cached_image_fault(root / inspection.image) or boxes_fault(inspection, root)
        place = places.get(inspection.id, "")
        if fault:
            rejections.append(Rejection(inspection.image, fault + place))
            continue
        merged = inspection.id in records.merged
        mask = mask_fault(inspection, root) or (
            _first_mask_fault(inspection, root) if merged and inspection.masks else None
        )
        if mask:
            keep = mask.image_usable or inspection.id in with_questions
            note = "; the image is used without it" if keep else ""
            rejections.append(Rejection(inspection.image, mask.reason + note + place, "mask" if keep else None))
            if not keep:
                continue
            boxes = () if merged else inspection.boxes  # of some places only
            inspection = dataclasses.replace(inspection, mask=None, masks=(), boxes=boxes)
        inspections[inspection.id] = inspection
    by_image = {inspection.image: inspection for inspection in inspections.values()}
    unusable = {*records.rejected, *(one.image for one in records.inspections)} - {*by_image}
    for inspection in list(inspections.values()):
        if inspection.reference is None:
            continue
        fault = cached_image_fault(root / inspection.reference) or _reference_fault(
            by_image.get(inspection.reference), inspection
        )
        if inspection.reference in unusable:
            fault = fault or "the reference was rejected, so it may show a defect"
        if fault:
            place = places.get(inspection.id, "")
            reason = f"{fault}; {inspection.image} gets a retrieved reference instead{place}"
            rejections.append(Rejection(inspection.reference, reason, "reference"))
            inspections[inspection.id] = dataclasses.replace(inspection, reference=None)
    usable_questions = []
    for question in records.questions:
        token = control_token(question.text, *question.options.values())
        if question.inspection not in inspections:
            rejections.append(Rejection(question.id, "its image cannot be used"))
        elif token:
            rejections.append(Rejection(question.id, f"it contains {token}, a control token of the chat template"))
        else:
            usable_questions.append(question)
    return list(inspections.values()), usable_questions, rejections


def _first_mask_fault(inspection: Inspection, root: Path) -> MaskFault | None:
    """The first fault of one of several masks, or None. Each of them comes from a place that names a defect."""
    single = (dataclasses.replace(inspection, mask=name, masks=()) for name in mask_files(inspection))
    return next(filter(None, (mask_fault(one, root) for one in single)), None)


def _reference_fault(reference: Inspection | None, inspection: Inspection) -> str | None:
    """Why an image of the source cannot be the reference of `inspection`, or None."""
    if reference is inspection:
        return "the image is its own reference"
    if reference is None or reference.condition == GOOD:
        return None
    return f"the reference shows a defect ({reference.condition})"


def _source(name: str) -> Any:
    """The module of a source. Raises EchoError for an unknown name, with the nearest known one."""
    if name not in sources.SOURCE_NAMES:
        near = difflib.get_close_matches(name, sources.SOURCE_NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sources.SOURCE_NAMES)}"
        raise EchoError(f"there is no source {name!r}; {hint}")
    return importlib.import_module(f"data_prep.sources.{name}")


def _root(config: BuildConfig, folder: Path) -> Path:
    """The folder that image paths are relative to. Raises EchoError if the config names none.

    A source that draws its images uses `folder`.
    """
    if config.source == "synthetic":
        return folder  # it draws into images/ and masks/ there
    if config.root is not None:
        return config.root
    if config.annotations is not None:
        return config.annotations.parent
    raise EchoError(f"the source {config.source} needs root: the folder that holds its images")
