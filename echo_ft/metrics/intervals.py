"""Intervals, paired tests and calibration for figures over units whose questions hang together. Numpy and scipy.

The bootstrap draws physical parts, not photographs and not questions: the answers to several questions about a part,
in however many photographs, share that part's luck, so questions drawn one by one would make intervals that are too
narrow (Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8). A resample is kept as how
often each unit was drawn, so that every figure which is made of sums is one matrix product, and two runs on the same
parts are compared within the same resamples. What a unit is the caller decides: `PredictionTable.weights` draws parts
and gives each photograph its part's count.

`benchmarks/evaluation/coverage.py` measures how often the intervals hold the truth.

Shapes: R resamples, N units (parts in `resample`, photographs elsewhere).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import binomtest, norm, t

RESAMPLES = 2000
SEED = 0
LEVEL = 0.95

BOOTSTRAP = {"unit": "part", "resamples": RESAMPLES, "seed": SEED, "level": LEVEL}
"""How reports describe where their intervals come from."""

TEMPERATURES = (0.01, 100.0)
"""Bounds of `temperature`: at the first the scores separate the sides, at the second they say nothing of them."""

BINS = 10
"""Equal bins of a probability in `reliability`."""


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


def percentile_interval(
    values: np.ndarray,
    units: np.ndarray | float = math.inf,
    bounds: tuple[float, float] = (0.0, 1.0),
    level: float = LEVEL,
    sides: np.ndarray | float = 1,
) -> np.ndarray:
    """(2, ...): the accelerated percentile interval over the first axis, widened for a small number of units.

    The plain percentile interval holds the truth too seldom where units are few or most answers are right: its spread
    is that of n - 1 of n units, it takes the normal for Student's t, and it leans away from the truth where resamples
    are skewed. The first two are put right as in Hesterberg ("What Teachers Should Know About the Bootstrap", 2015:
    the expanded percentile interval), the third as in Efron ("Better Bootstrap Confidence Intervals",
    1987), with the acceleration and the bias correction of a mean, both a sixth of the resamples' skewness.

    Where all resamples are the same (all answers right, or all wrong) they say nothing of how sure that is. There the
    interval reaches as far as the exact one of a share of n out of n (Clopper and Pearson, 1934), in the figure's
    range, whose ends are `bounds`; half as far in a mean of two such shares, of `sides` 2.

    `units` is how many were drawn from for each figure, of the smaller side where it has two; it broadcasts to
    `values[0]`. Resamples in which the figure does not exist (nan) are left out; a figure that never exists gives nan.
    """

    centred = values - mean_of_present(values, axis=0)
    skewness = ratio(mean_of_present(centred**3, axis=0), mean_of_present(centred**2, axis=0) ** 1.5)
    lean = np.nan_to_num(skewness) / 6
    drawn = np.maximum(units, 2)
    reach = t.ppf((1 + level) / 2, drawn - 1) / np.sqrt(1 - 1 / drawn)
    ordered = np.sort(values, axis=0)  # nan comes last
    last = np.maximum((~np.isnan(values)).sum(axis=0) - 1, 0)
    ends = []
    for z in (lean - reach, lean + reach):
        place = norm.cdf(lean + z / np.maximum(1 - lean * z, 1e-9)) * last
        below = np.floor(place).astype(int)
        low, high = (
            np.take_along_axis(ordered, index[None], axis=0)[0] for index in (below, np.minimum(below + 1, last))
        )
        ends.append(low + (place - below) * (high - low))
    low, high = ends
    span = np.take_along_axis(ordered, np.asarray(last)[None], axis=0)[0] - ordered[0]
    exact = bounds[1] * (1 - ((1 - level) / 2) ** (1 / np.maximum(units, 1))) / sides
    spare = np.where(span < 1e-9 * bounds[1], exact, 0.0)  # not where the figure never exists: its span is nan
    lowest, highest = np.minimum(low, bounds[0]), np.maximum(high, bounds[1])
    return np.stack([np.maximum(low - spare, lowest), np.minimum(high + spare, highest)])


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


def temperature(logits: np.ndarray, positive: np.ndarray) -> float:
    """T of `expit(logits / T)` with the least log loss (Guo et al., "On Calibration of Modern Neural Networks", 2017).

    `logits` (N,) grow with the belief in `positive` (N,). The loss is convex in 1 / T, so where its slope is zero is
    the one minimum; it lies beyond TEMPERATURES where the logits separate the sides, or do not grow with them.
    """

    def slope(inverse: float) -> float:
        return float((logits * (expit(inverse * logits) - positive)).sum())

    lowest, highest = TEMPERATURES
    if slope(1 / highest) >= 0:
        return highest
    if slope(1 / lowest) <= 0:
        return lowest
    return 1 / brentq(slope, 1 / highest, 1 / lowest)


def log_loss(logits: np.ndarray, positive: np.ndarray) -> float:
    """The mean of -log P(truth), in nats, of `expit(logits)` (N,)."""
    return float(np.logaddexp(0, np.where(positive, -logits, logits)).mean())


def reliability(probabilities: np.ndarray, positive: np.ndarray) -> list[tuple[float, float, int]]:
    """(mean probability, share of positives, number) of those (N,) in each of BINS equal bins that has any."""
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    return [
        (float(probabilities[bins == place].mean()), float(positive[bins == place].mean()), int((bins == place).sum()))
        for place in np.unique(bins)
    ]


def expected_calibration_error(bins: Sequence[tuple[float, float, int]]) -> float:
    """The mean gap between probability and share over the bins of `reliability`, weighted by number (Guo et al.)."""
    return sum(number * abs(mean - share) for mean, share, number in bins) / sum(number for *_, number in bins)


def false_alarm_threshold(negatives: np.ndarray, share: float) -> float | None:
    """The lowest threshold at or above which a new negative scores with a probability of at most `share`.

    Split conformal (Vovk et al., "Algorithmic Learning in a Random World", 2005): just above the score of rank
    ceil((n + 1) (1 - share)) of the n `negatives`, however scores are distributed, as long as the new one is drawn as
    they were. So no more than that share of these lies at or above it either. None where n is too small for the share.
    """
    rank = math.ceil((len(negatives) + 1) * (1 - share) - 1e-9)  # 20 * (1 - 0.05) is a hair more than 19
    return float(np.nextafter(np.sort(negatives)[rank - 1], math.inf)) if rank <= len(negatives) else None


def best_f1_threshold(scores: np.ndarray, positive: np.ndarray) -> float:
    """The score at or above which calling positive has the highest F1; the highest of several. Needs both sides."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(positive, scores)
    f1 = np.nan_to_num(ratio(2 * precision * recall, precision + recall))[:-1]  # the last point has no threshold
    return float(thresholds[np.flatnonzero(f1 == f1.max())[-1]])


def rates(weights: np.ndarray, called: np.ndarray, positive: np.ndarray) -> dict[str, np.ndarray]:
    """`recall`, the share of `false_alarms` among negatives, and `f1`, each (R,), of what is `called` positive (N,)."""
    found, missed, alarms, passed = (
        weights[:, said & side].sum(axis=1) for side in (positive, ~positive) for said in (called, ~called)
    )
    return {
        "recall": ratio(found, found + missed),
        "false_alarms": ratio(alarms, alarms + passed),
        "f1": ratio(2 * found, 2 * found + missed + alarms),
    }
