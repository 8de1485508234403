"""Calibration corrects overconfidence, agrees with scikit-learn, and judges its thresholds on another run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from echo_ft.data.dataset import DATASET_FORMAT, DIGESTS, images_fingerprint
from echo_ft.errors import EchoError
from echo_ft.metrics import calibration, intervals
from echo_ft.metrics.loading import Run
from echo_ft.metrics.prediction_table import make_prediction_table
from echo_ft.metrics.report import calibrate_run
from echo_ft.records import GOOD
from tests.support.predictions import uncertain_predictions


def test_calibration_corrects_overconfidence_on_the_other_run() -> None:
    validation, test = (
        make_prediction_table(uncertain_predictions(count, seed)) for seed, count in ((1, 2000), (2, 600))
    )
    found = calibration.fit_calibration(test, validation, false_alarms=0.1)
    assert found["temperature"] == pytest.approx(4, rel=0.15)
    for name in ("expected_calibration_error", "log_loss"):
        assert found[name]["after"] < 0.6 * found[name]["before"]
    assert found["validation"]["normal"] + found["validation"]["defective"] == 2000
    alarms = found["thresholds"]["false_alarms"]
    assert 0.09 < alarms["validation"]["false_alarms"] <= 0.1
    low, high = alarms["intervals"]["false_alarms"]
    assert low < 0.1 < high
    assert low < alarms["test"]["false_alarms"] < high
    chosen, best = (found["thresholds"][name]["test"]["f1"] for name in ("f1", "best"))
    assert 0 < best - chosen < 0.1
    assert found["thresholds"]["best"]["intervals"] == {}


def test_thresholds_are_evaluated_on_both_runs() -> None:
    validation, test = (
        make_prediction_table(uncertain_predictions(count, seed)) for seed, count in ((1, 400), (2, 200))
    )
    found = calibration.fit_calibration(test, validation, false_alarms=0.1)
    fitted, scores = (expit(logit(one.defect_scores) / found["temperature"]) for one in (validation, test))
    assert set(found["thresholds"]) == {"false_alarms", "f1", "best"}
    for one in found["thresholds"].values():
        for table, values, rates in ((validation, fitted, one["validation"]), (test, scores, one["test"])):
            called = values >= one["threshold"]
            assert rates["recall"] == pytest.approx(called[table.defective].mean())
            assert rates["false_alarms"] == pytest.approx(called[~table.defective].mean())


def test_images_without_probability_do_not_affect_calibration() -> None:
    rows = uncertain_predictions(300, seed=1)
    without = [dataclasses.replace(row, probabilities=None) for row in uncertain_predictions(50, seed=3)]
    validation, more = make_prediction_table(rows), make_prediction_table(rows + without)
    test = make_prediction_table(uncertain_predictions(60, seed=2))
    assert calibration.fit_calibration(test, more, 0.1) == calibration.fit_calibration(test, validation, 0.1)
    with pytest.raises(EchoError, match="P\\(defect\\) for 0 normal and 0 defective"):
        calibration.fit_calibration(test, make_prediction_table(without), 0.1)
    with pytest.raises(EchoError, match="the run has no P\\(defect\\) for any image"):
        calibration.fit_calibration(make_prediction_table(without), validation, 0.1)


def test_too_few_normal_images_give_no_false_alarm_threshold() -> None:
    rows = uncertain_predictions(300, seed=1)
    few = [row for row in rows if row.condition != GOOD] + [row for row in rows if row.condition == GOOD][:8]
    test = make_prediction_table(uncertain_predictions(60, seed=2))
    assert "false_alarms" not in calibration.fit_calibration(test, make_prediction_table(few), 0.1)["thresholds"]


def test_certain_probabilities_and_a_single_class_are_calibrated() -> None:
    certain = [
        dataclasses.replace(row, probabilities={"A": float(place % 2), "B": float(1 - place % 2)})
        for place, row in enumerate(uncertain_predictions(200, seed=2))
    ]
    normal = make_prediction_table([row for row in certain if row.condition == GOOD])
    found = calibration.fit_calibration(normal, make_prediction_table(certain), 0.1)
    assert np.isfinite(found["log_loss"]["after"])
    assert found["temperature"] <= calibration.TEMPERATURE_BOUNDS[1]
    assert found["thresholds"]["f1"]["test"]["recall"] is None
    assert "best" not in found["thresholds"]


def run_on(folder: Path, seed: int, digests: dict[str, str] | None) -> Run:
    """A run on a dataset of its own, with other parts than those of other seeds. Without digests, it is missing."""
    rows = uncertain_predictions(40, seed)
    if digests is not None:
        folder.mkdir()
        manifest = {"format": DATASET_FORMAT, "root": ".", "fingerprint": folder.name, "config": {}}
        manifest["images_fingerprint"] = images_fingerprint(digests)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / DIGESTS).write_text(json.dumps(digests))
    provenance = {"dataset": str(folder), "dataset_fingerprint": folder.name}
    return Run(Path(f"runs/{folder.name}"), rows, provenance, ["odd"], [])


def test_copies_of_the_same_images_do_not_calibrate(tmp_path: Path) -> None:
    """The names of parts begin with the name of the dataset, so they cannot show that two datasets share images."""
    run = run_on(tmp_path / "test", 1, {"10000.png": "1", "10001.png": "2", "reference.png": "3"})
    copies = run_on(tmp_path / "val", 2, {"20000.png": "0", "20007.png": "2", "reference.png": "3"})
    message = (
        "runs/val cannot calibrate runs/test: 1 images have the same content in both, such as 10001.png and 20007.png; "
        "give a run on other images"
    )
    with pytest.raises(EchoError, match=message):
        calibrate_run(run, copies, 0.1)
    other = run_on(tmp_path / "other", 2, {"20000.png": "0", "20007.png": "4", "reference.png": "3"})
    assert calibrate_run(run, other, 0.1)["warnings"] == ["runs/other: odd"], "both may show the same reference"


def test_images_that_cannot_be_compared_are_stated(tmp_path: Path) -> None:
    run, gone = run_on(tmp_path / "test", 1, {"10000.png": "1"}), run_on(tmp_path / "gone", 2, None)
    _, warning = calibrate_run(run, gone, 0.1)["warnings"]
    assert warning.startswith(
        "the images of runs/test and runs/gone could not be compared, because a dataset is missing"
    )
    same = dataclasses.replace(run, predictions=gone.predictions, provenance=gone.provenance)
    assert calibrate_run(same, run_on(tmp_path / "gone", 3, None), 0.1)["warnings"] == ["runs/gone: odd"]


def overconfident_scores(count: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overconfident log odds and the truth, both (count,)."""
    random = np.random.default_rng(seed)
    positive = random.random(count) < 0.4
    return 3 * (random.normal(size=count) + 1.5 * positive - 1), positive


def test_temperature_equals_logistic_regression_without_intercept() -> None:
    logits, positive = overconfident_scores()
    fitted = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(logits[:, None], positive)
    temperature = calibration.fit_temperature(logits, positive)
    assert temperature == pytest.approx(1 / fitted.coef_[0, 0], rel=1e-5)
    assert calibration.fit_temperature(5 * logits, positive) == pytest.approx(5 * temperature)


def test_temperature_stops_at_its_bounds() -> None:
    positive = np.array([True, True, False, False])
    lowest, highest = calibration.TEMPERATURE_BOUNDS
    assert calibration.fit_temperature(np.array([1.0, 2, -1, -2]), positive) == lowest, "scores separate the classes"
    assert calibration.fit_temperature(np.array([-1.0, -2, 1, 2]), positive) == highest, "scores are useless"


def test_log_loss_and_reliability_bins_equal_scikit_learn() -> None:
    logits, positive = overconfident_scores()
    probabilities = 1 / (1 + np.exp(-logits))
    assert calibration.log_loss(logits, positive) == pytest.approx(sklearn_metrics.log_loss(positive, probabilities))
    bins = calibration.reliability(probabilities, positive)
    shares, means = calibration_curve(positive, probabilities, n_bins=calibration.RELIABILITY_BINS)
    np.testing.assert_allclose([one[:2] for one in bins], np.column_stack([means, shares]))
    assert sum(number for *_, number in bins) == len(positive)
    assert calibration.reliability(np.array([1.0, 0.0]), np.array([True, False])) == [(0, 0, 1), (1, 1, 1)]


def test_expected_calibration_error_weighs_bins_by_their_counts() -> None:
    assert calibration.expected_calibration_error([(0.25, 0.5, 3), (0.9, 0.8, 1)]) == pytest.approx(0.85 / 4)


@pytest.mark.parametrize(("count", "share", "above"), [(19, 0.05, 0), (100, 0.05, 4), (99, 0.1, 9), (9, 0.1, 0)])
def test_false_alarm_threshold_has_the_conformal_rank(count: int, share: float, above: int) -> None:
    scores = np.random.default_rng(0).permutation(np.arange(count) / count)
    threshold = calibration.false_alarm_threshold(scores, share)
    assert threshold is not None
    assert (scores >= threshold).sum() == above <= share * count
    assert calibration.false_alarm_threshold(scores[: math.ceil(1 / share) - 2], share) is None


def test_false_alarm_threshold_holds_for_new_negatives_and_excludes_ties() -> None:
    random = np.random.default_rng(0)
    thresholds = [calibration.false_alarm_threshold(random.random(30), 0.1) or 1 for _ in range(4000)]
    alarms = 1 - np.mean(thresholds)  # share of new uniform scores that reach the threshold
    assert alarms == pytest.approx(3 / 31, abs=0.004)
    tied = calibration.false_alarm_threshold(np.full(40, 0.5), 0.1)
    assert tied is not None
    assert tied > 0.5


def test_best_threshold_has_the_highest_f1() -> None:
    logits, positive = overconfident_scores(60)
    scores = np.round(logits)  # rounding makes ties
    best = calibration.best_f1_threshold(scores, positive)
    f1 = {score: sklearn_metrics.f1_score(positive, scores >= score) for score in scores}
    assert f1[best] == pytest.approx(max(f1.values()))


def test_threshold_rates_equal_scikit_learn_with_sample_weights() -> None:
    logits, positive = overconfident_scores(50)
    called, weights = logits > 0, intervals.resample([0] * 50, resamples=10)
    rates = calibration.threshold_rates(weights, called, positive)
    for place, row in enumerate(weights):
        recall, specificity = (
            sklearn_metrics.recall_score(positive, called, sample_weight=row, pos_label=label)
            for label in (True, False)
        )
        f1 = sklearn_metrics.f1_score(positive, called, sample_weight=row)
        found = [rates[key][place] for key in ("recall", "false_alarms", "f1")]
        assert found == pytest.approx([recall, 1 - specificity, f1])
    none_called = calibration.threshold_rates(np.ones((1, 3)), np.zeros(3, dtype=bool), np.ones(3, dtype=bool))
    assert none_called["recall"] == none_called["f1"] == 0
    assert np.isnan(none_called["false_alarms"])
