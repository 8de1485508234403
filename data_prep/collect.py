"""Collect the raw images of a build: check the config, read the source, and reject what cannot be used."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from data_prep import sources
from data_prep.config import BuildConfig
from data_prep.corrections import apply_corrections
from data_prep.faults import ImageCheck, boxes_fault, check_image, mask_fault, name_fault, orientation_fault
from data_prep.rejections import first_rejection
from data_prep.truth import SourceRecords, merge_records
from echo_ft.data.splits import check_fractions
from echo_ft.data.text import control_token
from echo_ft.errors import EchoError
from echo_ft.images.masks import mask_files
from echo_ft.inputs import MAX_FRAME
from echo_ft.records import GOOD, UNLABELLED, Inspection, Question, Rejection
from echo_ft.terminal import progress

CheckFile = Callable[..., ImageCheck]
"""A version of `check_image` that takes paths relative to the root and keeps its results."""

DECLARING_SOURCES = ("folder", "manifest")
"""The sources that read the options `good` and `frame`, because people arrange these datasets themselves."""

MAX_REFERENCES = 1000
"""Largest `k`. A prompt shows a few references, and a search reserves memory for all of them."""

MAX_SEED = 2**32 - 1
"""Largest seed that numpy and training accept."""


def check_config(config: BuildConfig) -> None:
    """Raise EchoError for any mistake in the config that can be found before images are read."""
    _source(config.source)
    for key in ("annotations", "corrections", "knowledge"):
        path = getattr(config, key)
        if path is not None and not (path.is_file() or (key == "knowledge" and path.is_dir())):
            raise EchoError(f"{key}: there is no file {path}; check the path")
    for key, reason in (("good", "already says which of its images are good"), ("frame", "has one frame per image")):
        if getattr(config, key) not in (None, []) and config.source not in DECLARING_SOURCES:
            known = " and ".join(DECLARING_SOURCES)
            raise EchoError(f"{key}: the source {config.source} {reason}; remove {key} (only {known} read it)")
    check_fractions(config.fractions)
    limits = (("k", config.k, MAX_REFERENCES), ("seed", config.seed, MAX_SEED), ("frame", config.frame or 0, MAX_FRAME))
    for name, value, most in limits:
        if not 0 <= value <= most:
            raise EchoError(f"{name} is {value}; set a value from 0 to {most}")
    if not 0 <= config.unanswerable <= 1:
        raise EchoError(
            f"unanswerable is {config.unanswerable:g}; give a fraction of the images from 0 to 1, such as 0.1"
        )
    for pair, (first, second) in {
        "folds and fold": (config.folds is not None, config.fold is not None),
        "upstream predicted and traces": (config.upstream == "predicted", bool(config.traces)),
    }.items():
        if first != second:
            raise EchoError(f"{pair} must be set together; give both or neither")
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
class Readings:
    """Images that are read in a way that may surprise their owner."""

    rotated: list[str]
    """Images that are turned upright by their EXIF orientation."""
    lossy: list[str]
    """Images with a mask in a lossy format."""
    bits: dict[str, int]
    """The bit depth of each image that has more than 8 bits and is therefore scaled down."""


@dataclass(frozen=True)
class UsableImages:
    """What a build can use of a source."""

    root: Path
    """The folder that the paths of images are relative to."""
    inspections: list[Inspection]
    questions: list[Question]
    rejections: list[Rejection]
    merged_count: int
    """Number of images whose truth was combined from several places in the source."""
    unannotated: list[str]
    """Images that are `good` only because their annotation file has no mark and no label for them."""
    readings: Readings
    source_conditions: Mapping[str, str] = field(default_factory=dict)
    """The condition in the source of each image whose condition a correction changed, keyed by its id."""


def usable_images(config: BuildConfig, folder: Path) -> UsableImages:
    """Return the usable records of the config's source (see `check_records`).

    Sources that draw their images write them into `folder`. Raises EchoError if no image can be used.
    """
    source, items = source_items(config, folder)
    root = source.root
    records = merge_records(progress(items, "reading", "records"))
    if config.corrections is not None:
        records = apply_corrections(records, config.corrections, source)
    usable = check_records(records, root, None if config.allow_links else config.source != "manifest")
    if not usable.inspections:
        where = config.annotations or root
        why = first_rejection(usable.rejections) or "; it lists none: add a row per image, or check the path"
        raise EchoError(f"the source {config.source} has no usable image in {where}{why}")
    return usable


def source_items(config: BuildConfig, folder: Path) -> tuple[sources.SourceConfig, sources.Items]:
    """Return the config of a build's source and the records that it yields.

    A source that draws its images writes them into `folder`.
    """
    root = _root(config, folder)
    root.mkdir(exist_ok=True)
    source = sources.SourceConfig(
        root, config.annotations, config.seed, config.parts, tuple(config.good or ()), config.split, config.frame
    )
    return source, _source(config.source).read(source)


def check_records(records: SourceRecords, root: Path, below_links: bool | None = None) -> UsableImages:
    """Return the inspections and questions whose files can be used, and a rejection with a reason for everything else.

    If a mask contradicts its image or seems to belong to another image, the image is rejected too. The image is kept if
    the source has its own questions about it, because a benchmark's questions are valid without a mask. `below_links`
    is passed to `link_fault`; None allows all links.
    """
    rejections = [*records.rejections]
    with_questions = {question.inspection for question in records.questions}

    @cache  # by name, because joining and hashing a Path takes longer
    def check(name: str, is_mask: bool = False) -> ImageCheck:
        return check_image(root / name, is_mask)

    inspections: dict[str, Inspection] = {}
    for item in progress(records.inspections, "checking", "images"):
        linked = None if below_links is None else sources.link_fault(item, root, below_links)
        if linked:
            rejections.append(_with_place(Rejection(item.image, linked), item, records))
            continue
        inspection, rejection = _checked(item, records, root, check, item.id in with_questions)
        if inspection is not None:
            inspections[item.id] = inspection
        if rejection is not None:
            rejections.append(_with_place(rejection, item, records))
    rejections += _drop_references(inspections, records, check)
    questions = []
    for question in records.questions:
        token = control_token(question.text, *question.options.values())
        if question.inspection not in inspections:
            rejections.append(Rejection(question.id, "its image cannot be used"))
        elif token:
            reason = f"it contains {token}, a control token of the model's chat template; reword it"
            rejections.append(Rejection(question.id, reason))
        else:
            questions.append(question)
    kept = list(inspections.values())
    bits = {one.image: check(one.image).bits for one in kept}
    readings = Readings(
        [one.image for one in kept if check(one.image).orientation != 1],
        [one.image for one in kept if any(check(name, True).lossy for name in mask_files(one))],
        {image: depth for image, depth in bits.items() if depth is not None},
    )
    unannotated = [one.image for one in kept if one.id in records.unannotated]
    merged_count = sum(one.id in records.merged for one in kept)
    return UsableImages(
        root, kept, questions, rejections, merged_count, unannotated, readings, records.source_conditions
    )


def _checked(
    item: Inspection, records: SourceRecords, root: Path, check: CheckFile, has_questions: bool
) -> tuple[Inspection | None, Rejection | None]:
    """Return the usable part of an inspection, or None, and the rejection of the inspection or its marks."""
    fault = name_fault(item) or check(item.image).fault
    if fault:
        return None, Rejection(item.image, fault)
    image = check(item.image)
    rotated = orientation_fault(item, image)
    if rotated:
        unmarked = dataclasses.replace(item, boxes=(), polygons=())
        return unmarked, Rejection(item.image, f"{rotated}; the image is used without them", "mask")
    fault = boxes_fault(item, image.size)
    if fault:
        return None, Rejection(item.image, fault)
    merged, names = item.id in records.merged, mask_files(item)
    # Each mask of a merged record comes from a place that names a defect, so none of them may be empty.
    several = [dataclasses.replace(item, mask=name, masks=()) for name in names] if merged and item.masks else []
    for one in (item, *several):
        files = [check(name, True) for name in mask_files(one)]
        mask = mask_fault(one, root, image, files)
        if mask is None:
            continue
        if not mask.image_usable and not has_questions:
            return None, Rejection(item.image, mask.reason)
        # The boxes of a merged record mark only the defects of some of its places.
        unmasked = dataclasses.replace(item, mask=None, masks=(), boxes=() if merged else item.boxes)
        return unmasked, Rejection(item.image, f"{mask.reason}; the image is used without it", "mask")
    return item, None


def _with_place(rejection: Rejection, inspection: Inspection, records: SourceRecords) -> Rejection:
    """Return the rejection with the places where the source lists the inspection, if they are known."""
    place = records.places.get(inspection.id)
    return dataclasses.replace(rejection, reason=f"{rejection.reason} ({place})") if place else rejection


def _drop_references(inspections: dict[str, Inspection], records: SourceRecords, check: CheckFile) -> list[Rejection]:
    """Remove unusable references from `inspections`, and return a rejection for each."""
    by_image = {inspection.image: inspection for inspection in inspections.values()}
    unusable = {*records.rejected, *(one.image for one in records.inspections)} - {*by_image}
    rejections = []
    for inspection in list(inspections.values()):
        if inspection.reference is None:
            continue
        fault = check(inspection.reference).fault or _reference_fault(by_image.get(inspection.reference), inspection)
        if inspection.reference in unusable:
            fault = fault or "the reference was rejected, so it may show a defect"
        if fault:
            reason = f"{fault}; {inspection.image} gets a retrieved reference instead"
            rejections.append(_with_place(Rejection(inspection.reference, reason, "reference"), inspection, records))
            inspections[inspection.id] = dataclasses.replace(inspection, reference=None)
    return rejections


def _reference_fault(reference: Inspection | None, inspection: Inspection) -> str | None:
    """Return why an image from the source cannot be the reference of `inspection`, or None."""
    if reference is inspection:
        return "the image is its own reference"
    if reference is None or reference.condition == GOOD:
        return None
    if reference.condition == UNLABELLED:
        return "the reference has no condition, so it may show a defect"
    return f"the reference shows a defect ({reference.condition})"


def _source(name: str) -> Any:
    """Return the module of a source. Raises EchoError for an unknown name, and suggests the closest known name."""
    if name not in sources.SOURCE_NAMES:
        near = difflib.get_close_matches(name, sources.SOURCE_NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sources.SOURCE_NAMES)}"
        raise EchoError(f"there is no source {name!r}; {hint}")
    return importlib.import_module(f"data_prep.sources.{name}")


def _root(config: BuildConfig, folder: Path) -> Path:
    """Return the folder that image paths are relative to. Raises EchoError if the config names none.

    A source that draws its images uses `folder`.
    """
    if config.source == "synthetic":
        return folder  # the source draws into the subfolders images/ and masks/
    if config.root is not None:
        return config.root
    if config.annotations is not None:
        return config.annotations.parent
    raise EchoError(f"the source {config.source} needs root: the folder that holds its images")
