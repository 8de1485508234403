"""Bootstrap intervals and paired tests for answers that are correlated within physical parts.

The bootstrap resamples physical parts, not images or questions. Answers about one part are correlated, whether one
image shows it or several, so resampling single questions would make the intervals too narrow (Davison and Hinkley,
"Bootstrap Methods and their Application", 1997, section 3.8). A resample is stored as the number of times that each
unit is drawn. Every metric that consists of sums then takes one matrix product, and runs on the same parts are compared
within the same resamples. The caller defines the units: `PredictionTable.weights` draws parts and gives each image the
count of its part.

`benchmarks/evaluation/coverage.py` measures how often the intervals contain the truth.

Shapes: R resamples, N units (parts in `resample`, images elsewhere).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.stats import binomtest, norm, t

RESAMPLES = 2000
RESAMPLING_SEED = 0
CONFIDENCE_LEVEL = 0.95

BOOTSTRAP = {"unit": "part", "resamples": RESAMPLES, "seed": RESAMPLING_SEED, "level": CONFIDENCE_LEVEL}
"""How reports describe the source of their intervals."""


def resample(strata: Sequence[Hashable], resamples: int = RESAMPLES, seed: int = RESAMPLING_SEED) -> np.ndarray:
    """Return (R, N): how often each unit is drawn if every stratum is resampled to its own size with replacement.

    `strata` has the stratum of each unit. Equal strata in equal order with the same seed give the same draws.
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
    level: float = CONFIDENCE_LEVEL,
    classes: np.ndarray | float = 1,
) -> np.ndarray:
    """Return the accelerated percentile interval (2, ...) of `values` (R, ...), widened if there are few units.

    The plain percentile interval contains the truth too rarely if there are few units or if most answers are correct.
    It underestimates the variance by a factor of (n - 1) / n, it uses normal quantiles instead of Student's t, and it
    is shifted away from the truth if the resamples are skewed. The first two are corrected as in Hesterberg ("What
    Teachers Should Know About the Bootstrap", 2015: the expanded percentile interval). The third is corrected as in
    Efron ("Better Bootstrap Confidence Intervals", 1987), with the acceleration and the bias correction of a mean. Both
    are a sixth of the resamples' skewness.

    If all resamples are equal (all answers correct, or all wrong), they do not reveal the uncertainty. The interval
    then has the width of the exact interval for n out of n (Clopper and Pearson, 1934), scaled to the metric's range
    `bounds`. For the mean of two such shares (`classes` is 2), it has half that width.

    `units` is the number of units behind each metric. For a metric of two classes, it is the number in the smaller
    class. It broadcasts to `values[0]`. Resamples with the value nan are ignored. If all are nan, so is the interval.
    """
    centred = values - mean_of_present(values, axis=0)
    skewness = ratio(mean_of_present(centred**3, axis=0), mean_of_present(centred**2, axis=0) ** 1.5)
    acceleration = np.nan_to_num(skewness) / 6
    drawn = np.maximum(units, 2)
    reach = t.ppf((1 + level) / 2, drawn - 1) / np.sqrt(1 - 1 / drawn)
    ordered = np.sort(values, axis=0)  # this puts nan last
    last = np.maximum((~np.isnan(values)).sum(axis=0) - 1, 0)
    ends = []
    for z in (acceleration - reach, acceleration + reach):
        place = norm.cdf(acceleration + z / np.maximum(1 - acceleration * z, 1e-9)) * last
        below = np.floor(place).astype(int)
        low, high = (
            np.take_along_axis(ordered, index[None], axis=0)[0] for index in (below, np.minimum(below + 1, last))
        )
        ends.append(low + (place - below) * (high - low))
    low, high = ends
    span = np.take_along_axis(ordered, np.asarray(last)[None], axis=0)[0] - ordered[0]
    exact = bounds[1] * (1 - ((1 - level) / 2) ** (1 / np.maximum(units, 1))) / classes
    margin = np.where(span < 1e-9 * bounds[1], exact, 0.0)  # if all values are nan, so is the span, and the margin is 0
    lowest, highest = np.minimum(low, bounds[0]), np.maximum(high, bounds[1])
    return np.stack([np.maximum(low - margin, lowest), np.minimum(high + margin, highest)])


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide elementwise; nan if the denominator is zero."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator != 0)


def mean_of_present(values: np.ndarray, axis: int) -> np.ndarray:
    """Average over an axis and ignore nan; the mean is nan if all values are."""
    present = ~np.isnan(values)
    return ratio(np.where(present, values, 0.0).sum(axis=axis), present.sum(axis=axis))


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value of McNemar's test (McNemar, 1947).

    It treats discordant pairs as tosses of a fair coin. The arguments count the questions that only the first and only
    the second run answered correctly. The test assumes independent questions. If there are several questions per part,
    the bootstrap interval is more reliable.
    """
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple tests with Holm's step-down method (Holm, 1979), in the given order."""
    count = len(p_values)
    adjusted = [0.0] * count
    largest = 0.0
    for rank, index in enumerate(sorted(range(count), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
