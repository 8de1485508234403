"""Measure how often a gate gives a wrong verdict: `python -m benchmarks.evaluation.certificates`.

The benchmark simulates factories. In each one, good and defective parts have 1 to 6 images, and a gate with limits on
false alarms and escapes judges them. The score of an image is the sum of a part effect and an image effect, so images
of one part are correlated, and defective images have higher scores. The true rates of flagged good parts and missed
defective parts are computed from the threshold by integration. A pass is wrong if one of them is above its limit, and a
fail is wrong if neither is. Thresholds and verdicts come from the functions that `evaluation.score --gate` uses.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

from echo_ft.gate.certificate import (
    CONFIDENCE,
    ESCAPES,
    FAIL,
    FALSE_ALARMS,
    PASS,
    Finding,
    choose_threshold,
    judge_share,
    overall,
)
from echo_ft.metrics.detection import Units

LIMITS = {FALSE_ALARMS: 0.05, ESCAPES: 0.1}

CORRELATION = 0.5
"""Correlation of the scores of two images of a part."""

BATCH = 500
"""Number of factories that are simulated at once."""


@dataclass(frozen=True)
class Factory:
    """A kind of factory."""

    parts: int
    """Number of good parts, and of defective parts, that choose the threshold. Twice as many are judged."""
    images: tuple[int, int]
    """Smallest and largest number of images per part; all numbers between them are equally frequent."""
    chosen: bool
    """Whether the gate chooses the threshold. Otherwise it is fixed, as for a run that is judged by its answers."""


@dataclass(frozen=True)
class Verdicts:
    """Fractions of the factories that passed, that passed wrongly, and that failed wrongly."""

    passed: float
    wrongly_passed: float
    wrongly_failed: float


PARTS, IMAGES = (50, 150, 500), ((1, 1), (1, 6), (6, 6))
CHOSEN = ((0.3, 0.3), (0.9, 0.9), (1.1, 1.1), (2.0, 2.0))
FIXED = ((0.3, 0.3), (0.98, 0.98), (1.02, 0.1), (0.1, 1.02), (1.02, 1.02))
"""True rates divided by their limits. If the gate chooses the threshold, they refer to the threshold at which both
ratios are equal."""


def flagged_share(threshold: np.ndarray | float, images: tuple[int, int]) -> np.ndarray:
    """Return the fraction of parts whose highest score reaches a threshold; scores of images are standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    part = (np.asarray(threshold)[..., None] - np.sqrt(CORRELATION) * nodes) / np.sqrt(1 - CORRELATION)
    below = np.mean([norm.cdf(part) ** count for count in range(images[0], images[1] + 1)], axis=0)
    return 1 - below @ (weights / weights.sum())


@cache
def threshold_with(share: float, images: tuple[int, int]) -> float:
    """Return the threshold that this fraction of parts reaches."""
    return brentq(lambda threshold: float(flagged_share(threshold, images)) - share, -8, 8)


def part_scores(random: np.random.Generator, factories: int, parts: int, images: tuple[int, int]) -> np.ndarray:
    """Draw the highest score of the images of each part, (factories, parts)."""
    effect = np.sqrt(CORRELATION) * random.standard_normal((factories, parts, 1))
    scores = effect + np.sqrt(1 - CORRELATION) * random.standard_normal((factories, parts, images[1]))
    count = random.integers(images[0], images[1] + 1, size=(factories, parts, 1))
    return np.where(np.arange(images[1]) < count, scores, -np.inf).max(axis=2)


def findings(errors: np.ndarray, parts: int, limit: float) -> np.ndarray:
    """Judge each number of errors among the parts, (factories,) of Finding."""
    known = {count: judge_share(count, parts, limit, len(LIMITS)) for count in np.unique(errors).tolist()}
    return np.array([known[count] for count in errors.tolist()], dtype=object)


def simulate(factory: Factory, shares: Sequence[tuple[float, float]], factories: int, seed: int = 0) -> list[Verdicts]:
    """Simulate factories with each pair of true rates (`shares`) of false alarms and escapes, and count their verdicts.

    Rates are given as ratios to their limits. The gate may choose another threshold than the one that gives these
    rates. All pairs use the same draws.
    """
    random, counts = np.random.default_rng(seed), np.zeros((len(shares), 3))
    for start in range(0, factories, BATCH):
        size = min(BATCH, factories - start)
        first = [part_scores(random, size, factory.parts, factory.images) for _ in range(2 * factory.chosen)]
        second = [part_scores(random, size, 2 * factory.parts, factory.images) for _ in range(2)]
        for place, (alarms, escapes) in enumerate(shares):
            threshold = threshold_with(alarms * LIMITS[FALSE_ALARMS], factory.images)
            shift = threshold - threshold_with(1 - escapes * LIMITS[ESCAPES], factory.images)
            thresholds = np.full(size, threshold)
            if factory.chosen:
                thresholds = np.array(list(_thresholds(first[0], first[1] + shift)))
            counts[place] += count_verdicts(factory, thresholds, shift, second[0], second[1] + shift)
    return [Verdicts(*row) for row in counts / factories]


def count_verdicts(
    factory: Factory, thresholds: np.ndarray, shift: float, good: np.ndarray, defective: np.ndarray
) -> tuple[int, int, int]:
    """Judge parts (factories, parts) with thresholds (factories,). Count passes, wrong passes and wrong fails.

    `shift` says by how much defective parts score higher than good ones.
    """
    true_alarms = flagged_share(thresholds, factory.images)
    true_escapes = 1 - flagged_share(thresholds - shift, factory.images)
    bad = (true_alarms > LIMITS[FALSE_ALARMS]) | (true_escapes > LIMITS[ESCAPES])
    errors = {FALSE_ALARMS: good >= thresholds[:, None], ESCAPES: defective < thresholds[:, None]}
    judged = {name: findings(one.sum(axis=1), one.shape[1], LIMITS[name]) for name, one in errors.items()}
    verdicts = np.array([overall(one) for one in _by_factory(judged)])
    passed, failed = verdicts == PASS, verdicts == FAIL
    return int(passed.sum()), int((passed & bad).sum()), int((failed & ~bad).sum())


def _thresholds(good: np.ndarray, defective: np.ndarray) -> Iterator[float]:
    truth = np.arange(good.shape[1] + defective.shape[1]) >= good.shape[1]
    for scores in np.concatenate([good, defective], axis=1):
        yield choose_threshold(Units(np.arange(len(truth)), truth, scores), LIMITS)


def _by_factory(judged: Mapping[str, np.ndarray]) -> Iterator[dict[str, Finding]]:
    for row in zip(*judged.values(), strict=True):
        yield dict(zip(judged, row, strict=True))


def print_table(factories: int, chosen: bool) -> list[Verdicts]:
    """Print the table for chosen or for fixed thresholds in Markdown, and return its cells."""
    shares = CHOSEN if chosen else FIXED
    names = [f"{alarms:g}, {escapes:g}" for alarms, escapes in shares]
    print(f"\n| {'chosen on, ' if chosen else ''}judged on | images per part | {' | '.join(names)} |")
    print("|" + "---|" * (len(names) + 2))
    found = []
    for parts, images in itertools.product(PARTS, IMAGES):
        cells = simulate(Factory(parts, images, chosen), shares, factories)
        counts = f"{parts}, {2 * parts}" if chosen else f"{2 * parts}"
        number = str(images[0]) if images[0] == images[1] else f"{images[0]} to {images[1]}"
        print(f"| {counts} | {number} | {' | '.join(map(format_verdicts, cells))} |", flush=True)
        found += cells
    return found


def format_verdicts(one: Verdicts) -> str:
    """Format as `87.4 (0.10, 0.42)`: percent that passed; in brackets, percent that wrongly passed and failed."""
    return f"{100 * one.passed:.1f} ({100 * one.wrongly_passed:.2f}, {100 * one.wrongly_failed:.2f})"


def main() -> None:
    """Print the tables in Markdown. The exit status is 1 if wrong verdicts are too frequent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factories", type=int, default=10_000, help="Simulated factories per cell of the tables.")
    factories = parser.parse_args().factories
    print(f"{factories} factories per cell: passed, % (wrongly passed, wrongly failed)")
    cells = [cell for chosen in (True, False) for cell in print_table(factories, chosen)]
    passed, failed = max(cell.wrongly_passed for cell in cells), max(cell.wrongly_failed for cell in cells)
    print(f"\nwrongly passed: at most {passed:.2%}; wrongly failed: at most {failed:.2%}")
    if max(passed, failed) > 1 - CONFIDENCE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
