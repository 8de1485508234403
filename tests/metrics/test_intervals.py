"""Intervals contain the truth as often as they claim, and tests follow their textbook definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm, skew, t

from benchmarks.evaluation.coverage import (
    SETTINGS,
    Coverage,
    Setting,
    accuracy_coverage,
    coverage,
    latents,
    report_coverage,
)
from echo_ft.metrics import intervals


def test_strata_keep_their_sizes_and_the_seed_repeats_the_draws() -> None:
    strata = ["a", "b", "a", "a", "b", "c"]
    weights = intervals.resample(strata, resamples=50, seed=3)
    for name in "abc":
        members = [index for index, stratum in enumerate(strata) if stratum == name]
        assert (weights[:, members].sum(axis=1) == len(members)).all()
    assert (weights == intervals.resample(strata, resamples=50, seed=3)).all()
    assert (weights != intervals.resample(strata, resamples=50, seed=4)).any()


def test_interval_ignores_resamples_without_a_value() -> None:
    values = np.array([[np.nan, np.nan], [1.0, np.nan], [3.0, np.nan]])
    low, high = intervals.percentile_interval(values)
    assert (low[0], high[0]) == pytest.approx(np.percentile([1.0, 3.0], [2.5, 97.5]), abs=1e-12)
    assert np.isnan(low[1])
    assert np.isnan(high[1])


def test_interval_is_the_accelerated_one_at_expanded_quantiles() -> None:
    """The expected bounds are computed for one metric at a time."""
    random = np.random.default_rng(0)
    values = random.gamma(2, size=(500, 3)) * [1, -1, 1]
    values[random.random(500) < 0.1, 2] = np.nan
    units = np.array([7, 40, 1000])
    low, high = intervals.percentile_interval(values, units, level=0.9)
    for place, count in enumerate(units):
        known = values[:, place][~np.isnan(values[:, place])]
        acceleration = skew(known) / 6
        reach = t.ppf(0.95, count - 1) * math.sqrt(count / (count - 1))
        shares = [
            norm.cdf(acceleration + (acceleration + z) / (1 - acceleration * (acceleration + z)))
            for z in (-reach, reach)
        ]
        assert (low[place], high[place]) == pytest.approx(np.quantile(known, shares), abs=1e-9)


def test_interval_of_many_symmetric_values_is_the_plain_percentile_one() -> None:
    half = np.random.default_rng(0).normal(size=500)
    values = np.concatenate([half, -half])
    plain_low, plain_high = np.percentile(values, [2.5, 97.5])
    assert intervals.percentile_interval(values) == pytest.approx([plain_low, plain_high], abs=1e-9)
    low, high = intervals.percentile_interval(values, units=10)
    assert low < plain_low
    assert plain_high < high


@pytest.mark.parametrize("units", [0, 1, 2])
def test_interval_of_two_units_at_most_spans_all_resamples(units: int) -> None:
    assert intervals.percentile_interval(np.array([1.0, 2.0, 4.0]), units) == pytest.approx([1, 4])


@pytest.mark.parametrize("units", [1, 5, 12, 400])
@pytest.mark.parametrize("top", [1.0, 100.0])
def test_interval_of_equal_resamples_is_the_exact_one(units: int, top: float) -> None:
    exact = binomtest(units, units).proportion_ci(0.95, "exact")
    for value, bounds in ((1.0, (exact.low, 1.0)), (0.0, (0.0, 1 - exact.low))):
        found = intervals.percentile_interval(np.full(50, top * value), units, (0.0, top))
        assert found == pytest.approx([top * bound for bound in bounds])
    difference = intervals.percentile_interval(np.zeros(50), units, (-top, top))
    assert difference == pytest.approx([-top * (1 - exact.low), top * (1 - exact.low)])
    half = np.full(50, 0.5 * top)  # the mean of a class that is all right and one that is all wrong
    mean = intervals.percentile_interval(half, units, (0.0, top), classes=2)
    assert mean == pytest.approx([top * exact.low / 2, top * (1 - exact.low / 2)])
    assert np.isnan(intervals.percentile_interval(np.full(50, np.nan), units)).all()


@pytest.mark.parametrize("units", [1, 5, 12, 400])
@pytest.mark.parametrize("top", [1.0, 100.0])
def test_exact_interval_replaces_only_that_of_equal_resamples(units: int, top: float) -> None:
    values = np.full((50, 2), top)
    values[0, 1] = 0.9 * top
    both = intervals.percentile_interval(values, units, (0.0, top))
    assert both[0, 0] < top
    assert both[:, 1] == pytest.approx(intervals.percentile_interval(values[:, 1], units, (0.0, top)))


@pytest.mark.parametrize(("parts", "accuracy"), [(15, 0.9), (15, 0.95), (30, 0.95)])
def test_interval_of_a_few_single_questions_contains_the_truth(parts: int, accuracy: float) -> None:
    """With one question per part, often all answers are right, and resamples cannot show the uncertainty."""
    weights = intervals.resample([0] * parts)
    correct = np.random.default_rng(0).random((400, parts)) < accuracy
    low, high = intervals.percentile_interval(weights @ correct.T / parts, parts)
    assert ((low <= accuracy) & (accuracy <= high)).mean() > 0.93


def test_mcnemar_is_the_exact_two_sided_binomial_test() -> None:
    assert intervals.mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert intervals.mcnemar(9, 1) == intervals.mcnemar(1, 9)
    assert intervals.mcnemar(0, 0) == 1.0


def test_holm_multiplies_step_by_step_and_never_decreases() -> None:
    assert intervals.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert intervals.holm([0.9, 0.8]) == [1.0, 1.0]
    assert intervals.holm([]) == []


def require_coverage(found: Coverage, runs: int) -> None:
    """Require a coverage of 93% to 97%, allowing for the noise of this many runs.

    If the true coverage is in this range, the check fails once in a thousand times.
    """
    lowest, highest = binom.ppf(0.0005, runs, 0.93), binom.ppf(0.9995, runs, 0.97)
    assert lowest <= round(found.contained * runs) <= highest, found


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_interval_contains_the_truth_for_correlated_questions(setting: Setting) -> None:
    require_coverage(accuracy_coverage(setting, runs=500)["interval"], 500)


def test_plain_percentile_interval_misses_the_truth_too_often() -> None:
    found = accuracy_coverage(Setting(60, 3, 0.95), runs=4000)
    require_coverage(found["interval"], 4000)
    with pytest.raises(AssertionError):
        require_coverage(found["plain percentile"], 4000)


def test_resampling_single_questions_makes_intervals_too_narrow() -> None:
    correct = (latents(np.random.default_rng(0), 300, 40, 1) < 0).reshape(300, -1)
    values = intervals.resample([0] * correct.shape[1]) @ correct.T / correct.shape[1]
    assert coverage(intervals.percentile_interval(values), 0.5).contained < 0.87


def test_intervals_of_reports_contain_the_truth() -> None:
    for found in report_coverage(Setting(60, 2, 0.8), runs=100).values():
        require_coverage(found, 100)
