"""Find the images of a run that its adapters were trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_ft.data.dataset import Dataset, load_dataset
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl
from echo_ft.inputs import image_file
from echo_ft.model.adapters import Adapter
from echo_ft.provenance import content_hash
from echo_ft.records import Inspection

BASE_MODEL = "the base model"
"""Stands for the role of a fully fine-tuned base model."""


@dataclass(frozen=True)
class _TrainingData:
    """A dataset that some of a run's adapters were trained on."""

    folder: str
    fingerprint: str
    roles: list[str]
    overlap: list[str] | None
    """The run's images that are in the train split; None if the dataset is missing or was rebuilt."""

    @property
    def owners(self) -> str:
        adapters = ", ".join(role for role in self.roles if role != BASE_MODEL)
        names = [f"the adapters for {adapters}"] if adapters else []
        return " and ".join([*names, *([BASE_MODEL] if BASE_MODEL in self.roles else [])])


def describe_training_data(
    adapters: Mapping[str, Adapter], dataset: Dataset, split: str, images: Sequence[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Describe the training data of `adapters` and of a fine-tuned `BASE_MODEL`. Returns entries and warnings.

    `images` are the images of `dataset`'s `split` that the run uses. An image counts as trained on if an adapter's
    train split has its content, whatever the file name. The count is None if that dataset is missing or was rebuilt.
    """
    roles: dict[str, list[str]] = defaultdict(list)
    for role, adapter in adapters.items():
        roles[adapter.card.dataset_fingerprint].append(role)
    sources = [_compare(adapters, fingerprint, names, dataset, images) for fingerprint, names in roles.items()]
    entries = [
        {
            "dataset": source.folder,
            "dataset_fingerprint": source.fingerprint,
            "roles": source.roles,
            "photographs_trained_on": None if source.overlap is None else len(source.overlap),
            "of_photographs": len(images),
        }
        for source in sources
    ]
    warnings = _adapter_warnings(adapters, sources)
    for source in sources:
        # An audit may have run after one role was trained and before another.
        leaks = dict.fromkeys(adapters[name].card.leaks.get(dataset.fingerprint) for name in source.roles)
        warnings += [leak for leak in leaks if leak]
        warnings += _overlap_warnings(source, dataset, split, len(images))
    return entries, warnings


def _compare(
    adapters: Mapping[str, Adapter], fingerprint: str, roles: list[str], dataset: Dataset, images: Sequence[str]
) -> _TrainingData:
    folders = list(dict.fromkeys(adapters[name].card.dataset for name in roles))  # the dataset may have been moved
    overlaps = {
        folder: images_trained_on(folder, fingerprint, dataset.root, images, run_dataset=dataset) for folder in folders
    }
    folder = next((folder for folder, overlap in overlaps.items() if overlap is not None), folders[0])
    return _TrainingData(folder, fingerprint, roles, overlaps[folder])


def _adapter_warnings(adapters: Mapping[str, Adapter], sources: Sequence[_TrainingData]) -> list[str]:
    warnings = []
    if len(sources) > 1:
        datasets = "; ".join(f"{', '.join(source.roles)} on {source.fingerprint}" for source in sources)
        warnings.append(
            f"the adapters were trained on {len(sources)} different datasets ({datasets}): one adapter may have seen "
            "parts that are new to another; train the four roles on one dataset"
        )
    quantized = [role for role, adapter in adapters.items() if adapter.card.quantization]
    if quantized:
        warnings.append(
            f"the adapters for {', '.join(quantized)} were trained on a quantized base model but run on the "
            "unquantized one, which differs slightly; compare with adapters trained on the unquantized base model"
        )
    return warnings


def _overlap_warnings(source: _TrainingData, dataset: Dataset, split: str, count: int) -> list[str]:
    warnings = []
    if source.overlap:
        warnings.append(
            f"{len(source.overlap)} OF {count} IMAGES OF THE SPLIT {split} WERE TRAINED ON, for example "
            f"{source.overlap[0]}: they are in the train split ({source.folder}) of {source.owners}; scores on them "
            "measure memorisation, so evaluate on images outside every train split"
        )
    if source.fingerprint != dataset.fingerprint or source.overlap is None:
        limit = (
            "that dataset is missing or was rebuilt, so its images could not be compared"
            if source.overlap is None
            else "only identical files were detected; new images of the same parts were not"
        )
        warnings.append(
            f"the training data of {source.owners} ({source.folder}, {source.fingerprint}) differ from this run's "
            f"dataset ({dataset.folder}, {dataset.fingerprint}): images of the split {split} may have been trained on; "
            f"{limit}"
        )
    return warnings


def images_trained_on(
    folder: str, fingerprint: str, root: Path, images: Sequence[str], run_dataset: Dataset | None = None
) -> list[str] | None:
    """Return those of `images`, relative to `root`, whose content is in the train split of the dataset in `folder`.

    If `run_dataset` has that `fingerprint`, it is used instead of reading `folder`. Returns None if the dataset is
    missing or was rebuilt, so that its fingerprint differs.
    """
    try:
        if run_dataset is not None and run_dataset.fingerprint == fingerprint:
            source = run_dataset
        else:
            source = load_dataset(Path(folder))
        if source.fingerprint != fingerprint:
            return None
        inspections = read_jsonl(source.folder / "inspections.jsonl", Inspection)
        paths = {(source.root / one.image).resolve() for one in inspections if one.split == "train"}
        by_size: dict[int, list[Path]] = defaultdict(list)
        for path in paths:
            with suppress(FileNotFoundError):  # one missing image must not hide the others
                by_size[image_file(path).stat().st_size].append(path)
        hashes: dict[Path, bytes] = {}

        def content(path: Path) -> bytes:
            if path not in hashes:
                hashes[path] = content_hash(path)
            return hashes[path]

        def is_trained_on(path: Path) -> bool:
            # Files of different sizes differ, so only a few files need to be read.
            if path in paths or not image_file(path).is_file():
                return path in paths
            return any(content(path) == content(other) for other in by_size.get(image_file(path).stat().st_size, ()))

        return [image for image in images if is_trained_on((root / image).resolve())]
    except (EchoError, OSError, KeyError):
        return None
