"""Detection metrics equal those of scikit-learn, in a resample too."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from echo_ft.metrics import intervals
from echo_ft.metrics.detection import auroc, score_detection
from echo_ft.metrics.prediction_table import make_prediction_table
from echo_ft.records import GOOD
from tests.support.predictions import DETECTION, make_prediction, mixed_predictions


def test_resampled_auroc_equals_scikit_learn_with_sample_weights() -> None:
    random = np.random.default_rng(0)
    positive = random.random(80) < 0.4
    scores = np.round(random.normal(size=80) + positive, 1)  # rounding makes ties
    weights = intervals.resample(positive.tolist(), resamples=25)
    expected = [roc_auc_score(positive, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(auroc(weights, scores, positive), expected, rtol=0, atol=1e-12)


def test_auroc_without_one_of_the_classes_is_nan() -> None:
    assert np.isnan(auroc(np.ones((2, 3)), np.array([0.1, 0.2, 0.3]), np.array([True, True, True]))).all()
    assert np.isnan(auroc(np.ones((1, 0)), np.array([]), np.array([], dtype=bool))).all()


def test_reported_auroc_equals_scikit_learn() -> None:
    random = np.random.default_rng(2)
    rows, truth, scores = [], [], []
    for image in range(30):
        row = make_prediction(image, DETECTION, True, GOOD if image % 3 else "crack")
        score = float(np.round(random.random(), 1))
        rows.append(dataclasses.replace(row, probabilities={"A": score, "B": 1 - score}))
        truth.append(row.condition != GOOD)
        scores.append(score)
    found = score_detection(make_prediction_table(rows))["All"]
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, scores))
    assert (found["normal"], found["defective"], found["scored"]) == (20, 10, 30)
    low, high = found["intervals"]["auroc"]
    assert low < found["auroc"] < high


def test_detection_without_probabilities_scores_the_decisions() -> None:
    rows = [dataclasses.replace(row, probabilities=None) for row in mixed_predictions() if row.kind == DETECTION]
    found = score_detection(make_prediction_table(rows))["All"]
    assert found["auroc"] is None
    assert found["average_precision"] is None
    assert found["scored"] == 0
    assert found["balanced_accuracy"] == pytest.approx((found["recall"] + found["specificity"]) / 2)
