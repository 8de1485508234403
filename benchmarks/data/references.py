"""Whether retrieval pays: `python -m benchmarks.data.references DATASET`, for a dataset made by data_prep.build.

A reference is closer to a photograph where it differs less from it outside the defect, in mean absolute grey over 64 x
64 cells of the whole image. Compared are, case by case, the first of the retrieved references with the first of the
random ones, and the closest of those retrieved, which the reference extractor is trained to choose, with the closest of
the random ones. Cases whose source names their reference are left out. As six exposures of one surface differ in
brightness above all, the same once more for images less their own mean outside the defect. Shares of cases with 95 %
intervals that resample parts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from echo_ft.data.dataset import Dataset, load_cases, load_dataset
from echo_ft.data.splits import SPLITS
from echo_ft.experts.targets import FIT, defect_mask, load_compared
from echo_ft.images import masks
from echo_ft.metrics.intervals import percentile_interval, ratio, resample
from echo_ft.records import Case

METHODS = ("retrieved", "random")
COLUMNS = ("first against first", "closest against closest", "first, less the mean", "closest, less the mean")


def misfits(case: Case, root: Path) -> np.ndarray:
    """(2, k): how far each reference of a case is from its query outside the defect, by rank; then less the means."""
    mask = defect_mask(case, root)
    small = np.zeros((FIT, FIT), np.bool_) if mask is None else masks.resize_mask(mask, (FIT, FIT))
    outside = ~small if not small.all() else np.ones_like(small)
    query, *references = (
        load_compared(root, image).coarse
        for image in (case.seen.query, *(one.image for one in sorted(case.seen.references, key=lambda one: one.rank)))
    )

    def centred(grey: masks.Grey) -> masks.Grey:
        return grey - grey[outside].mean()

    return np.array(
        [
            [masks.misfit(query, one, small) for one in references],
            [masks.misfit(centred(query), centred(one), small) for one in references],
        ]
    )


def compare(dataset: Dataset, split: str) -> tuple[list[str], np.ndarray]:
    """The part of each case of a split that has references of both methods, and (cases, 4) whether retrieval won.

    A reference that the source names stands in place of the retrieved ones, so such a case has none.
    """
    parts, wins = [], []
    retrieved, random = (load_cases(dataset, split, method) for method in METHODS)
    for own, drawn in zip(retrieved, random, strict=True):
        methods = [{one.method for one in case.seen.references} for case in (own, drawn)]
        if methods == [{method} for method in METHODS]:
            near, far = misfits(own, dataset.root), misfits(drawn, dataset.root)
            first, closest = near[:, 0] < far[:, 0], near.min(axis=1) < far.min(axis=1)
            parts.append("/".join((own.dataset, own.product, own.group)))
            wins.append([first[0], closest[0], first[1], closest[1]])
    return parts, np.array(wins, dtype=float).reshape(-1, len(COLUMNS))


def row(name: str, parts: Sequence[str], wins: np.ndarray) -> str:
    """A line of the table: each share in per cent, and its interval."""
    names, where = np.unique(np.array(parts), return_inverse=True)
    won, asked = np.zeros((len(names), len(COLUMNS))), np.bincount(where, minlength=len(names))
    np.add.at(won, where, wins)
    weights = resample([""] * len(names))
    drawn = ratio(weights @ won, np.repeat((weights @ asked)[:, None], len(COLUMNS), axis=1))
    low, high = percentile_interval(drawn, len(names))
    shares = (
        f"{100 * s:.1f} ({100 * a:.1f} to {100 * b:.1f})" for s, a, b in zip(wins.mean(0), low, high, strict=True)
    )
    return f"| {name} | {len(parts)} | {len(names)} | {' | '.join(shares)} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path, help="a dataset folder, made by data_prep.build")
    dataset = load_dataset(parser.parse_args().dataset)
    found = {split: compare(dataset, split) for split in SPLITS}
    if not any(parts for parts, _ in found.values()):
        raise SystemExit(f"{dataset.folder} has no case with retrieved and random references; nothing can be compared")
    print(
        f"Share of cases, in per cent, whose retrieved reference is closer; {dataset.manifest['config']['descriptor']}"
    )
    print(f"| split | cases | parts | {' | '.join(COLUMNS)} |\n|{'---|' * (3 + len(COLUMNS))}")
    for split, (parts, wins) in found.items():
        if parts:
            print(row(split, parts, wins))
    parts = [part for own, _ in found.values() for part in own]
    print(row("all", parts, np.concatenate([wins for _, wins in found.values()])))


if __name__ == "__main__":
    main()
