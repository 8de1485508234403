"""The dataset folder on disk, which appears whole or not at all, and its manifest."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.config import BuildConfig
from data_prep.prepare import DatasetDraft
from data_prep.progress import progress
from data_prep.training_rows import Sides
from data_prep.warnings import _balanced_away, _one_sided, _uneven_depths, _warnings
from echo_ft.data.dataset import DATASET_FORMAT, DIGESTS, images_fingerprint
from echo_ft.data.splits import LEFT_OUT, SPLITS, reference_pool
from echo_ft.experts.roles import PROMPT_VERSION
from echo_ft.files import write_json
from echo_ft.images.masks import mask_files
from echo_ft.provenance import commit, content_hash, fingerprint_bytes, fingerprint_files, versions
from echo_ft.records import Inspection


def make_manifest(
    material: DatasetDraft,
    sides: Mapping[str, Sides],
    unused: Sequence[Inspection],
    digests: Mapping[str, str],
    root: Path,
    config: BuildConfig,
) -> dict[str, Any]:
    """What the dataset holds, how it was made, and what to beware of; its images' digests go into its folder too.

    `sides` and `unused` are as `write_sft` gives them; `digests` is as `image_digests` gives it.
    """
    folder = material.folder
    write_json(folder / DIGESTS, digests)
    images = images_fingerprint(digests)
    names = [path for path in sorted(folder.rglob("*.jsonl")) if path.name != "rejected.jsonl"]
    counts = _counts(material, sides) | {"balanced_away": len(unused)}
    return {
        "format": DATASET_FORMAT,
        "source": config.source,
        "root": root.relative_to(folder).as_posix() if root.is_relative_to(folder) else str(root.resolve()),
        "config": config.settings(),
        "seed": config.seed,
        "prompt_version": PROMPT_VERSION,
        "splits": material.split_words,
        "counts": counts,
        "products_without_knowledge": material.unknown_products,
        "rejected": sum(rejection.dropped is None for rejection in material.rejections),
        "dropped": _sorted(Counter(rejection.dropped for rejection in material.rejections if rejection.dropped)),
        "warnings": [
            *_warnings(material, digests, config),
            *_one_sided(counts, config.routing),
            *_balanced_away(material, unused),
            *_uneven_depths(material.inspections, root),
        ],
        "fingerprint": fingerprint_bytes(
            fingerprint_files([*names, folder / "knowledge.json"], folder).encode(), images.encode()
        ),
        "annotations_fingerprint": fingerprint_bytes(config.annotations.read_bytes()) if config.annotations else None,
        "images_fingerprint": images,
        "versions": versions(),
        "commit": commit(),
    }


def rejected_words(manifest: Mapping[str, Any]) -> str:
    """How much was rejected, and apart from that how much was dropped of photographs that are used."""
    dropped = [f"{count} {what}{'s' if count > 1 else ''} dropped" for what, count in manifest["dropped"].items()]
    words = f"{manifest['rejected']} rejected"
    if dropped:
        words += f"; {', '.join(dropped)}, the photographs are used"
    return words + (" (see rejected.jsonl)" if manifest["rejected"] or dropped else "")


def _counts(material: DatasetDraft, sides: Mapping[str, Sides]) -> dict[str, Any]:
    splits = (*SPLITS, LEFT_OUT) if any(i.split == LEFT_OUT for i in material.inspections) else SPLITS
    cases: dict[str, Counter[str]] = {split: Counter() for split in splits}
    products: dict[str, Counter[str]] = {split: Counter() for split in splits}
    for inspection in material.inspections:
        if inspection.id in material.questions.inspections:
            cases[str(inspection.split)][inspection.condition] += 1
            products[str(inspection.split)][inspection.product] += 1
    return {
        "photographs": _sorted(Counter(str(inspection.split) for inspection in material.inspections)),
        "reference_pool": len(reference_pool(material.inspections)),
        "cases": {split: _sorted(found) for split, found in cases.items()},
        "products": {split: _sorted(found) for split, found in products.items()},
        "questions": _sorted(material.questions.kinds),
        "references": _sorted(material.references.kinds),
        "synthetic": _sorted(Counter(i.synthetic for i in material.inspections if i.synthetic)),
        "sft_rows": {name: sum(side["rows"] for side in found.values()) for name, found in sorted(sides.items())},
        "sft_sides": dict(sorted(sides.items())),
    }


def _sorted(counter: Counter[str]) -> dict[str, int]:
    return {key: counter[key] for key in sorted(counter)}


def image_digests(inspections: Sequence[Inspection], root: Path) -> dict[str, str]:
    """SHA-256 of every photograph, mask and named reference, by path."""
    paths = {path for i in inspections for path in (i.image, *mask_files(i), i.reference) if path is not None}
    return {
        path: content_hash(os.path.join(root, path)).hex() for path in progress(sorted(paths), "fingerprint", "files")
    }
