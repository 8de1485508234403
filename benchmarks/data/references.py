"""Measure whether retrieval pays off: `python -m benchmarks.data.references DATASET`.

DATASET is a folder written by `data_prep.build`. A reference fits a query better if the mean absolute grey difference
outside the defect is smaller, on 64 x 64 cells of the whole image. For each case, the benchmark compares the first
retrieved reference with the first random one, and the best of the retrieved references with the best of the random
ones. The reference extractor is trained to choose the best one. Cases with a reference named by the source are left
out.

The six exposures of one magnetic tile differ mostly in brightness. The benchmark therefore repeats both comparisons
after subtracting the mean grey value outside the defect from each image. It prints percentages of cases with 95%
intervals that resample parts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from echo_ft.data.dataset import Dataset, load_cases, load_dataset
from echo_ft.data.splits import SPLITS
from echo_ft.experts.targets import COARSE_GRID, defect_mask, load_compared
from echo_ft.images import masks
from echo_ft.metrics.intervals import percentile_interval, ratio, resample
from echo_ft.records import Case

METHODS = ("retrieved", "random")
COLUMNS = ("first against first", "best against best", "first, mean subtracted", "best, mean subtracted")


def misfits(case: Case, root: Path) -> np.ndarray:
    """Return the differences (2, k) of a case's references from its query outside the defect, by rank.

    The second row is computed after the mean grey value of each image was subtracted.
    """
    mask = defect_mask(case, root)
    size = (COARSE_GRID, COARSE_GRID)
    small = np.zeros(size, np.bool_) if mask is None else masks.resize_mask(mask, size)
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
    """Compare both methods in each case of a split; returns the part of each case and (cases, 4), 1 if retrieval won.

    Cases that lack the references of either method are left out: a reference named by the source replaces the retrieved
    ones.
    """
    parts, wins = [], []
    retrieved, random = (load_cases(dataset, split, method) for method in METHODS)
    for own, drawn in zip(retrieved, random, strict=True):
        methods = [{one.method for one in case.seen.references} for case in (own, drawn)]
        if methods == [{method} for method in METHODS]:
            ours, theirs = misfits(own, dataset.root), misfits(drawn, dataset.root)
            first, best = ours[:, 0] < theirs[:, 0], ours.min(axis=1) < theirs.min(axis=1)
            parts.append("/".join((own.dataset, own.product, own.group)))
            wins.append([first[0], best[0], first[1], best[1]])
    return parts, np.array(wins, dtype=float).reshape(-1, len(COLUMNS))


def row(name: str, parts: Sequence[str], wins: np.ndarray) -> str:
    """Return one line of the table: each fraction in percent with its interval."""
    names, part_of_case = np.unique(np.array(parts), return_inverse=True)
    won, cases = np.zeros((len(names), len(COLUMNS))), np.bincount(part_of_case, minlength=len(names))
    np.add.at(won, part_of_case, wins)
    weights = resample([""] * len(names))
    drawn = ratio(weights @ won, np.repeat((weights @ cases)[:, None], len(COLUMNS), axis=1))
    low, high = percentile_interval(drawn, len(names))
    shares = (
        f"{100 * s:.1f} ({100 * a:.1f} to {100 * b:.1f})" for s, a, b in zip(wins.mean(0), low, high, strict=True)
    )
    return f"| {name} | {len(parts)} | {len(names)} | {' | '.join(shares)} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path, help="A dataset folder written by data_prep.build.")
    dataset = load_dataset(parser.parse_args().dataset)
    found = {split: compare(dataset, split) for split in SPLITS}
    if not any(parts for parts, _ in found.values()):
        raise SystemExit(
            f"{dataset.folder} has no case with both retrieved and random references; there is nothing to compare"
        )
    print(f"Share of cases in which the retrieved reference fits better, %; {dataset.manifest['config']['descriptor']}")
    print(f"| split | cases | parts | {' | '.join(COLUMNS)} |\n|{'---|' * (3 + len(COLUMNS))}")
    for split, (parts, wins) in found.items():
        if parts:
            print(row(split, parts, wins))
    parts = [part for own, _ in found.values() for part in own]
    print(row("all", parts, np.concatenate([wins for _, wins in found.values()])))


if __name__ == "__main__":
    main()
