"""Calibration of P(defect): a temperature and thresholds that are fitted on one run and evaluated on another.

Shapes: R resamples, N images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from echo_ft.errors import EchoError
from echo_ft.inference.decision import log_odds, temper
from echo_ft.metrics import intervals
from echo_ft.metrics.detection import detection_part_counts
from echo_ft.metrics.metric_values import json_number, metric_interval
from echo_ft.metrics.prediction_table import PredictionTable

TEMPERATURE_BOUNDS = (0.01, 100.0)
"""Limits of `fit_temperature`. It returns the lower limit if the scores separate the classes, and the upper one if they
are useless."""

RELIABILITY_BINS = 10
"""Number of equal-width probability bins in `reliability`."""


def fit_calibration(table: PredictionTable, validation: PredictionTable, false_alarms: float) -> dict[str, Any]:
    """Calibrate P(defect) on a validation run, and evaluate the result on the test run `table`.

    The result has `expected_calibration_error`, `log_loss` and the bins of a `reliability` diagram for the test run,
    before and after division by `temperature` (`fit_temperature`). A threshold applies to the calibrated P(defect);
    images that reach it are called defective. `thresholds` has recall, false-alarm share and F1 on both runs, with
    intervals on the test run, for three of them:

    - `false_alarms` keeps the given false-alarm share on normal images (`false_alarm_threshold`). It is missing if
      the validation run has too few normal images.
    - `f1` has the highest F1 on the validation run.
    - `best` has the highest F1 on the test run itself. It has no intervals, because it cannot be known in advance.

    Intervals reflect only the sampling of test images, because temperature and thresholds are fixed. Raises EchoError
    if the validation run has no P(defect) for normal or for defective images, or if the test run has none at all.
    """
    fitted_logits, fitted_truth = _logits_and_truth(validation)
    logits, truth = _logits_and_truth(table)
    fitted_counts, counts = _class_counts(fitted_truth), _class_counts(truth)
    if not all(fitted_counts.values()):
        raise EchoError(
            f"the validation run has P(defect) for {fitted_counts['normal']} normal and {fitted_counts['defective']} "
            "defective images; calibrate on a run with both, made with a backend that returns token probabilities"
        )
    if not len(truth):
        raise EchoError(
            "the run has no P(defect) for any image; rerun it with a backend that returns token probabilities"
        )
    temperature = fit_temperature(fitted_logits, fitted_truth)
    fitted, scores = temper(fitted_logits, temperature), temper(logits, temperature)
    thresholds = {
        "false_alarms": false_alarm_threshold(fitted[~fitted_truth], false_alarms),
        "f1": best_f1_threshold(fitted, fitted_truth),
        "best": best_f1_threshold(scores, truth) if truth.any() else None,
    }
    scaled = {"before": logits, "after": logits / temperature}
    bins = {key: reliability(expit(values), truth) for key, values in scaled.items()}
    return {
        "validation": fitted_counts,
        "test": counts,
        "temperature": temperature,
        "expected_calibration_error": {key: expected_calibration_error(values) for key, values in bins.items()},
        "log_loss": {key: log_loss(values, truth) for key, values in scaled.items()},
        "reliability": bins,
        "stated_false_alarms": false_alarms,
        "thresholds": _threshold_metrics(table, thresholds, (fitted, fitted_truth), (scores, truth)),
    }


def _logits_and_truth(table: PredictionTable) -> tuple[np.ndarray, np.ndarray]:
    """Return the log odds of P(defect), clipped to finite values, and the truth of the images that have one."""
    scored = ~np.isnan(table.defect_scores)
    return log_odds(table.defect_scores[scored]), table.defective[scored]


def _class_counts(truth: np.ndarray) -> dict[str, int]:
    return {"normal": int((~truth).sum()), "defective": int(truth.sum())}


def _threshold_metrics(
    table: PredictionTable,
    thresholds: Mapping[str, float | None],
    validation: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
) -> dict[str, Any]:
    """Evaluate thresholds on the (scores, truth) of both runs, with intervals on the test run."""
    scored = ~np.isnan(table.defect_scores)
    weights, counts = table.weights()[:, scored], detection_part_counts(table, scored)
    parts = {"recall": counts["recall"], "false_alarms": counts["specificity"], "f1": counts["balanced_accuracy"]}
    metrics = {}
    for name, threshold in thresholds.items():
        if threshold is not None:
            on_validation, on_test = (
                threshold_rates(np.ones((1, len(truth))), scores >= threshold, truth)
                for scores, truth in (validation, test)
            )
            resampled = threshold_rates(weights, test[0] >= threshold, test[1]) if name != "best" else {}
            metrics[name] = {
                "threshold": threshold,
                "validation": {key: json_number(value[0]) for key, value in on_validation.items()},
                "test": {key: json_number(value[0]) for key, value in on_test.items()},
                "intervals": {key: metric_interval(value, parts[key]) for key, value in resampled.items()},
            }
    return metrics


def fit_temperature(logits: np.ndarray, positive: np.ndarray) -> float:
    """Return the T that minimises the log loss of `expit(logits / T)`.

    This is temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", 2017). `logits` (N,) are higher
    for images that are more likely `positive`, (N,) bool. The loss is convex in 1 / T, so the zero of its slope is its
    only minimum. The minimum lies outside TEMPERATURE_BOUNDS if the logits separate the classes, or if they do not
    increase with `positive`; T is then the nearer bound.
    """

    def slope(inverse: float) -> float:
        return float((logits * (expit(inverse * logits) - positive)).sum())

    lowest, highest = TEMPERATURE_BOUNDS
    if slope(1 / highest) >= 0:
        return highest
    if slope(1 / lowest) <= 0:
        return lowest
    return 1 / brentq(slope, 1 / highest, 1 / lowest)


def log_loss(logits: np.ndarray, positive: np.ndarray) -> float:
    """Return the mean of -log P(truth) in nats, for probabilities `expit(logits)`, (N,)."""
    return float(np.logaddexp(0, np.where(positive, -logits, logits)).mean())


def reliability(probabilities: np.ndarray, positive: np.ndarray) -> list[tuple[float, float, int]]:
    """Return (mean probability, share of positives, count) of each non-empty bin.

    `probabilities` and `positive` are (N,). There are RELIABILITY_BINS bins of equal width.
    """
    bins = np.minimum((probabilities * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    return [
        (float(probabilities[bins == place].mean()), float(positive[bins == place].mean()), int((bins == place).sum()))
        for place in np.unique(bins)
    ]


def expected_calibration_error(bins: Sequence[tuple[float, float, int]]) -> float:
    """Return the mean gap between probability and share of positives over the `reliability` bins, weighted by count.

    Defined in Guo et al., "On Calibration of Modern Neural Networks", 2017.
    """
    return sum(number * abs(mean - share) for mean, share, number in bins) / sum(number for *_, number in bins)


def false_alarm_threshold(negatives: np.ndarray, share: float) -> float | None:
    """Return the lowest threshold that a new negative reaches with a probability of at most `share`.

    This is the split conformal threshold (Vovk et al., "Algorithmic Learning in a Random World", 2005). It lies just
    above the score of rank ceil((n + 1) (1 - share)) of the n `negatives`. The probability holds for any distribution
    of scores if all negatives are independent draws from it. Images of one part are not independent. The probability is
    an average over draws of `negatives`, not a bound for the given ones; `echo_ft.gate` gives such a bound for parts.
    At most the same share of `negatives` reaches it. Return None if n is too small for the share.
    """
    rank = math.ceil((len(negatives) + 1) * (1 - share) - 1e-9)  # 20 * (1 - 0.05) is slightly more than 19
    return float(np.nextafter(np.sort(negatives)[rank - 1], math.inf)) if rank <= len(negatives) else None


def best_f1_threshold(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the score that has the highest F1 as a threshold; the highest such score in case of ties.

    `scores` and `positive` are (N,) and must contain both classes.
    """
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(positive, scores)
    ratios = intervals.ratio(2 * precision * recall, precision + recall)
    f1 = np.nan_to_num(ratios)[:-1]  # the last point of the curve has no threshold
    return float(thresholds[np.flatnonzero(f1 == f1.max())[-1]])


def threshold_rates(weights: np.ndarray, called: np.ndarray, positive: np.ndarray) -> dict[str, np.ndarray]:
    """Return `recall`, `false_alarms` (their share of the negatives) and `f1`, each (R,).

    `weights` are (R, N); `called` (N,) bool are the images that reach the threshold, and `positive` (N,) bool is the
    truth.
    """
    found, missed, alarms, passed = (
        weights[:, decision & of_class].sum(axis=1)
        for of_class in (positive, ~positive)
        for decision in (called, ~called)
    )
    return {
        "recall": intervals.ratio(found, found + missed),
        "false_alarms": intervals.ratio(alarms, alarms + passed),
        "f1": intervals.ratio(2 * found, 2 * found + missed + alarms),
    }
