"""The raw photographs of a build: the config checked, its source read, and what cannot be used told apart."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from data_prep import sources
from data_prep.config import BuildConfig
from data_prep.faults import boxes_fault, image_fault, mask_fault, name_fault
from data_prep.progress import first_rejection, progress
from data_prep.sources import Item, ItemPlace
from echo_ft.data.splits import check_fractions
from echo_ft.errors import EchoError
from echo_ft.records import GOOD, Inspection, Question, Rejection


def check_config(config: BuildConfig) -> None:
    """Raise EchoError for whatever can be told to be wrong before the photographs are read."""
    _source(config.source)
    for key in ("annotations", "knowledge"):
        path = getattr(config, key)
        if path is not None and not (path.is_file() or (key == "knowledge" and path.is_dir())):
            raise EchoError(f"{key}: there is no file {path}; check the path")
    check_fractions(config.fractions)
    for pair, there in {
        "folds and fold": (config.folds is not None, config.fold is not None),
        "upstream predicted and traces": (config.upstream == "predicted", bool(config.traces)),
    }.items():
        if there[0] != there[1]:
            raise EchoError(f"{pair} go together; give both or neither")
    if config.source == "synthetic":
        if config.root is not None:
            raise EchoError("the source synthetic draws its images into the dataset folder; leave root out")
        return
    root = _root(config, config.output)
    if not root.is_dir():
        raise EchoError(f"root: there is no folder {root} (looked from {Path.cwd()}); check the path")
    if root.resolve().is_relative_to(config.output.resolve()):
        raise EchoError(f"the images in {root} lie inside the output {config.output}; choose another output")


def usable_images(config: BuildConfig, folder: Path) -> tuple[Path, list[Inspection], list[Question], list[Rejection]]:
    """The root of the config's source, and what is in it as `collect` has it; one that draws, draws into `folder`.

    Raises EchoError where nothing in it can be used.
    """
    root, items = source_items(config, folder)
    inspections, questions, rejections = collect(progress(items, "reading", "records"), root)
    if not inspections:
        where = config.annotations or root
        why = first_rejection(rejections) or "; it names none: add a row for each photograph, or check the path"
        raise EchoError(f"the source {config.source} holds no usable photograph in {where}{why}")
    return root, inspections, questions, rejections


def source_items(config: BuildConfig, folder: Path) -> tuple[Path, sources.Items]:
    """The root of the config's source, and what the source yields; one that draws, draws into `folder`."""
    root = _root(config, folder)
    root.mkdir(exist_ok=True)
    source = sources.SourceConfig(root, config.annotations, config.seed, config.parts)
    return root, _source(config.source).read(source)


def collect(items: Iterable[Item], root: Path) -> tuple[list[Inspection], list[Question], list[Rejection]]:
    """What a source yields, without the photographs that cannot be used; those and their reasons apart.

    A mask that contradicts its photograph rejects the photograph too, unless the source has questions of its own for
    it: a benchmark's questions stand without a mask.
    """
    read = list(items)
    questions = [item for item in read if isinstance(item, Question)]
    rejections = [item for item in read if isinstance(item, Rejection)]
    asked = {question.inspection for question in questions}
    places = {item.inspection: f" ({item.place})" for item in read if isinstance(item, ItemPlace)}
    fault_of = cache(image_fault)
    inspections: dict[str, Inspection] = {}
    for item in progress([i for i in read if isinstance(i, Inspection)], "checking", "photographs"):
        inspection = item
        fault = name_fault(inspection) or fault_of(root / inspection.image) or boxes_fault(inspection, root)
        if inspection.id in inspections:
            fault = "the source lists it twice"
        place = places.get(inspection.id, "")
        if fault:
            rejections.append(Rejection(inspection.image, fault + place))
            continue
        mask = mask_fault(inspection, root)
        if mask:
            stands = mask.photograph_stands or inspection.id in asked
            words = "; the photograph is used without it" if stands else ""
            rejections.append(Rejection(inspection.image, mask.reason + words + place, "mask" if stands else None))
            if not stands:
                continue
            boxes = () if inspection.polygons else inspection.boxes  # boxes beside polygons are half of what is marked
            inspection = dataclasses.replace(inspection, mask=None, masks=(), polygons=(), boxes=boxes)
        inspections[inspection.id] = inspection
    shown = {inspection.image: inspection for inspection in inspections.values()}
    for inspection in list(inspections.values()):
        if inspection.reference is None:
            continue
        fault = fault_of(root / inspection.reference) or _not_normal(shown.get(inspection.reference), inspection)
        if fault:
            place = places.get(inspection.id, "")
            reason = f"{fault}; {inspection.image} gets a retrieved reference instead{place}"
            rejections.append(Rejection(inspection.reference, reason, "reference"))
            inspections[inspection.id] = dataclasses.replace(inspection, reference=None)
    kept = []
    for question in questions:
        if question.inspection in inspections:
            kept.append(question)
        else:
            rejections.append(Rejection(question.id, "its photograph cannot be used"))
    return list(inspections.values()), kept, rejections


def _not_normal(named: Inspection | None, inspection: Inspection) -> str | None:
    """Why a photograph of the list cannot be the reference of another, or None."""
    if named is inspection:
        return "it is the photograph itself"
    return None if named is None or named.condition == GOOD else f"it shows a defect ({named.condition})"


def _source(name: str) -> Any:
    if name not in sources.NAMES:
        near = difflib.get_close_matches(name, sources.NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sources.NAMES)}"
        raise EchoError(f"no source is named {name!r}; {hint}")
    return importlib.import_module(f"data_prep.sources.{name}")


def _root(config: BuildConfig, folder: Path) -> Path:
    if config.source == "synthetic":
        return folder  # it draws into images/ and masks/ there
    if config.root is not None:
        return config.root
    if config.annotations is not None:
        return config.annotations.parent
    raise EchoError(f"the source {config.source} needs root: the folder that holds its images")
