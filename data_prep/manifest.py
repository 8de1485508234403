"""The manifest of a dataset: counts, warnings, fingerprints and versions."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.config import BuildConfig
from data_prep.prepare import DatasetDraft
from data_prep.training_rows import SideCounts
from data_prep.warnings import build_warnings
from echo_ft.data.dataset import DATASET_FORMAT, DIGESTS, images_fingerprint, record_digests
from echo_ft.data.splits import LEFT_OUT, SPLITS, UNLABELLED_SPLIT, reference_pool
from echo_ft.experts.roles import PROMPT_VERSION
from echo_ft.files import write_json
from echo_ft.images.masks import mask_files
from echo_ft.inputs import read_bytes
from echo_ft.provenance import commit, content_hash, fingerprint_bytes, fingerprint_files, versions
from echo_ft.records import GOOD, UNLABELLED, Inspection
from echo_ft.terminal import progress

MAX_CONDITIONS = 6
"""Number of defects that a summary lists by name. Rarer defects are counted together."""


def make_manifest(
    draft: DatasetDraft,
    side_counts: Mapping[str, SideCounts],
    unused: Sequence[Inspection],
    digests: Mapping[str, str],
    root: Path,
    config: BuildConfig,
) -> dict[str, Any]:
    """Return the manifest as JSON-compatible values. Also write the images' digests into the dataset folder.

    `side_counts` and `unused` come from `write_training_rows`, and `digests` from `image_digests`. Image paths are
    relative to `root`.
    """
    folder = draft.folder
    write_json(folder / DIGESTS, digests)
    images = images_fingerprint(digests)
    files = record_digests(folder)
    counts = _counts(draft, side_counts) | {"balanced_away": len(unused)}
    return {
        "format": DATASET_FORMAT,
        "source": config.source,
        "root": root.relative_to(folder).as_posix() if root.is_relative_to(folder) else str(root.resolve()),
        "config": config.dataset_options(),
        "seed": config.seed,
        "prompt_version": PROMPT_VERSION,
        "splits": draft.split_summary,
        "counts": counts,
        "products_without_knowledge": draft.unknown_products,
        "rejected": sum(rejection.dropped is None for rejection in draft.rejections),
        "dropped": _sorted_counts(Counter(one.dropped for one in draft.rejections if one.dropped)),
        "warnings": build_warnings(draft, digests, counts, unused, config),
        "fingerprint": fingerprint_bytes(
            fingerprint_files([folder / name for name in files if name != DIGESTS], folder).encode(), images.encode()
        ),
        "files": files,
        "annotations_fingerprint": fingerprint_bytes(read_bytes(config.annotations)) if config.annotations else None,
        "images_fingerprint": images,
        "versions": versions(),
        "commit": commit(),
    }


def rejection_summary(manifest: Mapping[str, Any]) -> str:
    """Summarise how many items were rejected, and what was dropped from images that are still used."""
    dropped = [f"{count} {what}{'s' if count > 1 else ''} dropped" for what, count in manifest["dropped"].items()]
    summary = f"{manifest['rejected']} rejected"
    if dropped:
        summary += f"; {', '.join(dropped)} (the images are still used)"
    return summary + ("; see rejected.jsonl" if manifest["rejected"] or dropped else "")


def condition_summary(manifest: Mapping[str, Any]) -> str:
    """Summarise how many images have each condition (`good` first, then the most frequent) and how many were merged."""
    counts = Counter(manifest["counts"]["conditions"])
    defects = sorted((name for name in counts if name != GOOD), key=lambda name: (-counts[name], name))
    shown, others = defects[:MAX_CONDITIONS], defects[MAX_CONDITIONS:]
    parts = [f"{name} {counts[name]}" for name in (GOOD, *shown)]
    if others:
        parts.append(f"{len(others)} others {sum(counts[name] for name in others)}")
    merged = manifest["counts"]["merged"]
    return ", ".join(parts) + (f"; {merged} combined from several entries" if merged else "")


def _counts(draft: DatasetDraft, side_counts: Mapping[str, SideCounts]) -> dict[str, Any]:
    present = {inspection.split for inspection in draft.inspections}
    splits = (*SPLITS, *(split for split in (LEFT_OUT, UNLABELLED_SPLIT) if split in present))
    cases: dict[str, Counter[str]] = {split: Counter() for split in splits}
    products: dict[str, Counter[str]] = {split: Counter() for split in splits}
    for inspection in draft.inspections:
        if inspection.id in draft.questions.inspections:
            cases[str(inspection.split)][inspection.condition] += 1
            products[str(inspection.split)][inspection.product] += 1
    return {
        "photographs": _sorted_counts(Counter(str(inspection.split) for inspection in draft.inspections)),
        "conditions": _sorted_counts(Counter(i.condition for i in draft.inspections if i.condition != UNLABELLED)),
        "merged": draft.merged_count,
        "unannotated": len(draft.unannotated),
        "reference_pool": len(reference_pool(draft.inspections)),
        "cases": {split: _sorted_counts(counts) for split, counts in cases.items()},
        "products": {split: _sorted_counts(counts) for split, counts in products.items()},
        "questions": _sorted_counts(draft.questions.counts),
        "references": _sorted_counts(draft.references.counts),
        "synthetic": _sorted_counts(Counter(i.synthetic for i in draft.inspections if i.synthetic)),
        "sft_rows": {name: sum(side["rows"] for side in sides.values()) for name, sides in sorted(side_counts.items())},
        "sft_sides": dict(sorted(side_counts.items())),
    }


def _sorted_counts(counter: Counter[str]) -> dict[str, int]:
    return {key: counter[key] for key in sorted(counter)}


def image_digests(inspections: Sequence[Inspection], root: Path) -> dict[str, str]:
    """Return the SHA-256 of every image, mask and named reference, keyed by path relative to `root`."""
    paths = {path for i in inspections for path in (i.image, *mask_files(i), i.reference) if path is not None}
    return {path: content_hash(os.path.join(root, path)).hex() for path in progress(sorted(paths), "hashing", "files")}
