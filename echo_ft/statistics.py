"""Intervals and paired tests for figures over units whose questions hang together. Numpy, and scipy for one p-value.

The bootstrap draws physical parts, not photographs and not questions: the answers to several questions about a part,
in however many photographs, share that part's luck, so questions drawn one by one would make intervals that are too
narrow (Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8). A resample is kept as how
often each unit was drawn, so that every figure which is made of sums is one matrix product, and two runs on the same
parts are compared within the same resamples. What a unit is the caller decides: `metrics.Sheet.weights` draws parts
and gives each photograph its part's count.

Shapes: R resamples, N units (parts in `resample`, photographs in `auroc`).
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES = 2000
SEED = 0
LEVEL = 0.95


def resample(strata: Sequence[Hashable], resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """(R, N): how often each unit is drawn, when every stratum is resampled to its own size with replacement.

    `strata` names each unit's stratum. The same strata in the same order and the same seed give the same draws.
    """
    random = np.random.default_rng(seed)
    members: dict[Hashable, list[int]] = {}
    for index, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(index)
    weights = np.empty((resamples, len(strata)))
    for indices in members.values():
        size = len(indices)
        weights[:, indices] = random.multinomial(size, np.full(size, 1 / size), size=resamples)
    return weights


def percentile_interval(values: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """(2, ...): the percentile interval over the first axis (Efron and Tibshirani, 1993, chapter 13).

    Resamples in which the figure does not exist (nan) are left out; a figure that never exists gives nan.
    """
    tail = 100 * (1 - level) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a figure that never exists: nan is the answer
        return np.nanpercentile(values, [tail, 100 - tail], axis=0)


def auroc(weights: np.ndarray, scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """(R,): the area under the ROC curve in each resample, ties counted half; nan where a side is missing.

    `weights` (R, N) are multiplicities (a row of ones gives the plain figure), `scores` (N,) grow with the belief in
    `positive` (N,). The Mann-Whitney form: P(score of a positive > score of a negative) + P(equal) / 2.
    """
    order = np.argsort(scores[~positive])
    negatives = scores[~positive][order]
    below = np.zeros((len(weights), len(negatives) + 1))
    np.cumsum(weights[:, ~positive][:, order], axis=1, out=below[:, 1:])
    less = below[:, np.searchsorted(negatives, scores[positive], side="left")]
    less_or_equal = below[:, np.searchsorted(negatives, scores[positive], side="right")]
    wins = (weights[:, positive] * (less + less_or_equal)).sum(axis=1) / 2
    return ratio(wins, weights[:, positive].sum(axis=1) * below[:, -1])


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise quotient, nan where the denominator is zero."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator != 0)


def mean_of_present(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean over an axis of what is not nan; nan where nothing is."""
    present = ~np.isnan(values)
    return ratio(np.where(present, values, 0.0).sum(axis=axis), present.sum(axis=axis))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar p-value (McNemar, 1947): the discordant pairs as tosses of a fair coin.

    The arguments count the questions that only the first and only the second run answered correctly. The test takes
    questions as independent; for several questions about one part the bootstrap interval is the safer reading.
    """
    from scipy.stats import binomtest

    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for several tests (Holm, 1979); adjusted p-values in the given order."""
    count = len(p_values)
    adjusted = [0.0] * count
    largest = 0.0
    for rank, index in enumerate(sorted(range(count), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
