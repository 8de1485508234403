"""The intervals cover, the weighted AUROC and the calibration are scikit-learn's, the tests are the textbook's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm, skew, t
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from benchmarks.evaluation.coverage import SETTINGS, Coverage, Setting, coverage, latents, of_accuracy, of_reports
from echo_ft.metrics import intervals


def test_every_stratum_is_resampled_to_its_own_size_and_the_seed_repeats_it() -> None:
    strata = ["a", "b", "a", "a", "b", "c"]
    weights = intervals.resample(strata, resamples=50, seed=3)
    for name in "abc":
        members = [index for index, stratum in enumerate(strata) if stratum == name]
        assert (weights[:, members].sum(axis=1) == len(members)).all()
    assert (weights == intervals.resample(strata, resamples=50, seed=3)).all()
    assert (weights != intervals.resample(strata, resamples=50, seed=4)).any()


def test_auroc_in_a_resample_is_that_of_scikit_learn_with_multiplicities_as_sample_weights() -> None:
    random = np.random.default_rng(0)
    positive = random.random(80) < 0.4
    scores = np.round(random.normal(size=80) + positive, 1)  # rounding makes ties
    weights = intervals.resample(positive.tolist(), resamples=25)
    expected = [roc_auc_score(positive, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(intervals.auroc(weights, scores, positive), expected, rtol=0, atol=1e-12)


def test_auroc_without_one_of_the_sides_is_nan() -> None:
    assert np.isnan(intervals.auroc(np.ones((2, 3)), np.array([0.1, 0.2, 0.3]), np.array([True, True, True]))).all()
    assert np.isnan(intervals.auroc(np.ones((1, 0)), np.array([]), np.array([], dtype=bool))).all()


def test_an_interval_leaves_resamples_without_the_figure_out() -> None:
    values = np.array([[np.nan, np.nan], [1.0, np.nan], [3.0, np.nan]])
    low, high = intervals.percentile_interval(values)
    assert (low[0], high[0]) == pytest.approx(np.percentile([1.0, 3.0], [2.5, 97.5]), abs=1e-12)
    assert np.isnan(low[1]) and np.isnan(high[1])


def test_the_interval_is_the_accelerated_one_at_expanded_quantiles() -> None:
    """Written out for one figure at a time."""
    random = np.random.default_rng(0)
    values = random.gamma(2, size=(500, 3)) * [1, -1, 1]
    values[random.random(500) < 0.1, 2] = np.nan
    units = np.array([7, 40, 1000])
    low, high = intervals.percentile_interval(values, units, level=0.9)
    for place, count in enumerate(units):
        known = values[:, place][~np.isnan(values[:, place])]
        lean = skew(known) / 6
        reach = t.ppf(0.95, count - 1) * math.sqrt(count / (count - 1))
        shares = [norm.cdf(lean + (lean + z) / (1 - lean * (lean + z))) for z in (-reach, reach)]
        assert (low[place], high[place]) == pytest.approx(np.quantile(known, shares), abs=1e-9)


def test_the_interval_is_the_plain_percentile_one_for_many_units_and_symmetric_resamples() -> None:
    half = np.random.default_rng(0).normal(size=500)
    values = np.concatenate([half, -half])
    assert intervals.percentile_interval(values) == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=1e-9)
    wider = intervals.percentile_interval(values, units=10)
    assert wider[0] < np.percentile(values, 2.5) and np.percentile(values, 97.5) < wider[1]


@pytest.mark.parametrize("units", [0, 1, 2])
def test_the_interval_of_hardly_any_units_is_all_that_the_resamples_hold(units: int) -> None:
    assert intervals.percentile_interval(np.array([1.0, 2.0, 4.0]), units) == pytest.approx([1, 4])


@pytest.mark.parametrize("units", [1, 5, 12, 400])
@pytest.mark.parametrize("top", [1.0, 100.0])
def test_where_no_resample_differs_the_interval_of_a_share_is_the_exact_one(units: int, top: float) -> None:
    exact = binomtest(units, units).proportion_ci(0.95, "exact")
    for value, bounds in ((1.0, (exact.low, 1.0)), (0.0, (0.0, 1 - exact.low))):
        found = intervals.percentile_interval(np.full(50, top * value), units, (0.0, top))
        assert found == pytest.approx([top * bound for bound in bounds])
    difference = intervals.percentile_interval(np.zeros(50), units, (-top, top))
    assert difference == pytest.approx([-top * (1 - exact.low), top * (1 - exact.low)])
    half = np.full(50, 0.5 * top)  # the mean of a side that is all right and one that is all wrong
    mean = intervals.percentile_interval(half, units, (0.0, top), sides=2)
    assert mean == pytest.approx([top * exact.low / 2, top * (1 - exact.low / 2)])
    assert np.isnan(intervals.percentile_interval(np.full(50, np.nan), units)).all()
    some = np.full((50, 2), top)
    some[0, 1] = 0.9 * top
    varying = intervals.percentile_interval(some, units, (0.0, top))
    assert varying[0, 0] < top and varying[:, 1] == pytest.approx(
        intervals.percentile_interval(some[:, 1], units, (0.0, top))
    )


@pytest.mark.parametrize(("parts", "accuracy"), [(15, 0.9), (15, 0.95), (30, 0.95)])
def test_intervals_of_a_few_single_questions_hold_the_truth(parts: int, accuracy: float) -> None:
    """One question a part, as in a row of a kind: often all are right, where resamples alone say nothing."""
    weights = intervals.resample([0] * parts)
    luck = np.random.default_rng(0).random((400, parts)) < accuracy
    low, high = intervals.percentile_interval(weights @ luck.T / parts, parts)
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
    """93 to 97 %, as far as so many runs can tell: a true share in between fails here once in a thousand times."""
    least, most = binom.ppf(0.0005, runs, 0.93), binom.ppf(0.9995, runs, 0.97)
    assert least <= round(found.held * runs) <= most, found


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_interval_holds_the_truth_where_questions_hang_together(setting: Setting) -> None:
    require_coverage(of_accuracy(setting, runs=500)["interval"], 500)


def test_the_plain_percentile_interval_would_not() -> None:
    found = of_accuracy(Setting(60, 3, 0.95), runs=4000)
    require_coverage(found["interval"], 4000)
    with pytest.raises(AssertionError):
        require_coverage(found["plain percentile"], 4000)


def test_questions_drawn_one_by_one_would_make_an_interval_too_narrow() -> None:
    drawn = (latents(np.random.default_rng(0), 300, 40, 1) < 0).reshape(300, -1)
    values = intervals.resample([0] * drawn.shape[1]) @ drawn.T / drawn.shape[1]
    assert coverage(intervals.percentile_interval(values), 0.5).held < 0.87


def test_the_intervals_of_a_report_hold_the_truth() -> None:
    for found in of_reports(Setting(60, 2, 0.8), runs=100).values():
        require_coverage(found, 100)


def believed(count: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overconfident log odds, and the truth."""
    random = np.random.default_rng(seed)
    positive = random.random(count) < 0.4
    return 3 * (random.normal(size=count) + 1.5 * positive - 1), positive


def test_the_temperature_is_logistic_regression_without_an_intercept() -> None:
    logits, positive = believed()
    fitted = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(logits[:, None], positive)
    assert intervals.temperature(logits, positive) == pytest.approx(1 / fitted.coef_[0, 0], rel=1e-5)
    assert intervals.temperature(5 * logits, positive) == pytest.approx(5 * intervals.temperature(logits, positive))


def test_the_temperature_stops_where_the_scores_separate_the_sides_or_say_nothing_of_them() -> None:
    positive = np.array([True, True, False, False])
    assert intervals.temperature(np.array([1.0, 2, -1, -2]), positive) == intervals.TEMPERATURES[0]
    assert intervals.temperature(np.array([-1.0, -2, 1, 2]), positive) == intervals.TEMPERATURES[1]


def test_log_loss_and_the_bins_of_reliability_are_those_of_scikit_learn() -> None:
    logits, positive = believed()
    probabilities = 1 / (1 + np.exp(-logits))
    assert intervals.log_loss(logits, positive) == pytest.approx(sklearn_metrics.log_loss(positive, probabilities))
    bins = intervals.reliability(probabilities, positive)
    shares, means = calibration_curve(positive, probabilities, n_bins=intervals.BINS)
    np.testing.assert_allclose([one[:2] for one in bins], np.column_stack([means, shares]))
    assert sum(number for *_, number in bins) == len(positive)
    assert intervals.reliability(np.array([1.0, 0.0]), np.array([True, False])) == [(0, 0, 1), (1, 1, 1)]


def test_the_expected_calibration_error_weighs_each_bin_by_its_number() -> None:
    assert intervals.expected_calibration_error([(0.25, 0.5, 3), (0.9, 0.8, 1)]) == pytest.approx(0.85 / 4)


@pytest.mark.parametrize(("count", "share", "above"), [(19, 0.05, 0), (100, 0.05, 4), (99, 0.1, 9), (9, 0.1, 0)])
def test_the_threshold_for_false_alarms_has_the_conformal_rank(count: int, share: float, above: int) -> None:
    scores = np.random.default_rng(0).permutation(np.arange(count) / count)
    threshold = intervals.false_alarm_threshold(scores, share)
    assert threshold is not None
    assert (scores >= threshold).sum() == above <= share * count
    assert intervals.false_alarm_threshold(scores[: math.ceil(1 / share) - 2], share) is None


def test_the_threshold_for_false_alarms_holds_for_new_negatives_and_takes_no_tie_for_an_alarm() -> None:
    random = np.random.default_rng(0)
    thresholds = [intervals.false_alarm_threshold(random.random(30), 0.1) or 1 for _ in range(4000)]
    alarms = 1 - np.mean(thresholds)  # the share of new uniform scores at or above
    assert alarms == pytest.approx(3 / 31, abs=0.004)
    tied = intervals.false_alarm_threshold(np.full(40, 0.5), 0.1)
    assert tied is not None and tied > 0.5


def test_the_best_threshold_has_the_highest_f1_of_all() -> None:
    logits, positive = believed(60)
    scores = np.round(logits)  # ties
    best = intervals.best_f1_threshold(scores, positive)
    found = {score: sklearn_metrics.f1_score(positive, scores >= score) for score in scores}
    assert found[best] == pytest.approx(max(found.values()))


def test_rates_are_those_of_scikit_learn_with_multiplicities_as_sample_weights() -> None:
    logits, positive = believed(50)
    called, weights = logits > 0, intervals.resample([0] * 50, resamples=10)
    found = intervals.rates(weights, called, positive)
    for place, row in enumerate(weights):
        recall, specificity = (
            sklearn_metrics.recall_score(positive, called, sample_weight=row, pos_label=side) for side in (True, False)
        )
        f1 = sklearn_metrics.f1_score(positive, called, sample_weight=row)
        assert [found[key][place] for key in ("recall", "false_alarms", "f1")] == pytest.approx(
            [recall, 1 - specificity, f1]
        )
    nothing = intervals.rates(np.ones((1, 3)), np.zeros(3, dtype=bool), np.ones(3, dtype=bool))
    assert nothing["recall"] == nothing["f1"] == 0 and np.isnan(nothing["false_alarms"])
