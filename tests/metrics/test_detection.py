"""Detection metrics equal scikit-learn's, even in a resample; false alarms and escapes equal counts made by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from echo_ft.metrics import intervals
from echo_ft.metrics.comparison import compared_part_counts
from echo_ft.metrics.detection import (
    ALL_IMAGES,
    alarm_metrics,
    auroc,
    detection_metrics,
    score_alarms,
    score_detection,
)
from echo_ft.metrics.metric_values import ALARM_METRICS, AVERAGE
from echo_ft.metrics.prediction_table import SUMMARY_ROWS, make_prediction_table
from echo_ft.metrics.strict import strict_table
from echo_ft.records import GOOD, Prediction
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


def test_a_dataset_named_like_a_row_of_all_datasets_does_not_replace_it() -> None:
    names = ("All", "Average", "hard")
    rows = [
        make_prediction(image, DETECTION, dataset != "hard", GOOD if image % 2 else "crack", dataset)
        for dataset in names
        for image in range(12)
    ]
    table = make_prediction_table(rows)
    found, alarms, scores = score_detection(table), score_alarms(table), strict_table(table)
    assert [*found] == [*alarms] == ["All", "dataset All", "dataset Average", "hard"]
    assert (found["All"]["images"], found["All"]["recall"]) == (36, pytest.approx(2 / 3))
    assert (alarms["All"]["answers"]["images"]["good"], found["dataset All"]["images"]) == (18, 12)
    assert [scores[name]["Average"] for name in ("dataset Average", "hard", "Average")] == [
        100,
        0,
        pytest.approx(200 / 3),
    ]
    assert {ALL_IMAGES, AVERAGE} == set(SUMMARY_ROWS)


def test_detection_without_probabilities_scores_the_decisions() -> None:
    rows = [dataclasses.replace(row, probabilities=None) for row in mixed_predictions() if row.kind == DETECTION]
    found = score_detection(make_prediction_table(rows))["All"]
    assert found["auroc"] is None
    assert found["average_precision"] is None
    assert found["scored"] == 0
    assert found["balanced_accuracy"] == pytest.approx((found["recall"] + found["specificity"]) / 2)


def six_parts() -> list[Prediction]:
    """Three good and three defective parts. The last part also has a good image, which is its only flagged image."""
    images = [
        ("good, one image flagged", GOOD, True, 0.2),
        ("good, one image flagged", GOOD, False, 0.7),
        ("good", GOOD, True, 0.1),
        ("good", GOOD, True, 0.3),
        ("good, unparsed", GOOD, None, None),
        ("one image found", "crack", True, 0.5),
        ("one image found", "crack", False, 0.4),
        ("missed", "crack", False, 0.6),
        ("flagged for its good image", GOOD, False, 0.2),
        ("flagged for its good image", "crack", False, None),
    ]
    rows = []
    for place, (group, condition, correct, score) in enumerate(images):
        row = make_prediction(place, DETECTION, bool(correct), condition, group=group)
        known = None if score is None else {"A": score, "B": 1 - score}
        rows.append(dataclasses.replace(row, probabilities=known, parsed=None if correct is None else row.parsed))
    return rows


def test_false_alarms_and_escapes_are_counted_by_image_and_by_part() -> None:
    found = score_alarms(make_prediction_table(six_parts()))
    assert set(found) == {"All", "D"}
    shares = {
        (way, by): (one["good"], one["false_alarms"], one["defective"], one["escapes"])
        for way, units in found["All"].items()
        for by, one in units.items()
    }
    assert shares == {
        ("answers", "images"): (6, 3 / 6, 4, 3 / 4),
        ("answers", "parts"): (3, 2 / 3, 3, 1 / 3),
        # Images are flagged if P(defect) is at least 0.5. The part whose defective image has no P(defect) is not
        # flagged.
        ("p_defect", "images"): (6, 2 / 6, 4, 2 / 4),
        ("p_defect", "parts"): (3, 2 / 3, 3, 1 / 3),
    }
    assert found["All"]["answers"]["parts"]["intervals"] == {"false_alarms": None, "escapes": None}, "too few parts"


def test_parts_with_good_and_defective_images_are_behind_no_false_alarm_of_parts() -> None:
    rows = [make_prediction(place, DETECTION, True, GOOD, group=f"good {place}") for place in range(2)]
    for place in range(40):
        rows += [
            make_prediction(
                2 * place + 10 + condition, DETECTION, True, (GOOD, "crack")[condition], group=f"mixed {place}"
            )
            for condition in (0, 1)
        ]
    table = make_prediction_table(rows)
    found = score_alarms(table)["All"]["answers"]
    assert (found["parts"]["good"], found["parts"]["intervals"]["false_alarms"]) == (2, None), "two parts are too few"
    assert found["images"]["intervals"]["false_alarms"]
    assert found["parts"]["intervals"]["escapes"]
    counts = compared_part_counts(table)
    names = ("False alarms, images", "False alarms, parts", "Escapes, images", "Escapes, parts")
    assert [counts[name] for name in names] == [42, 2, 40, 40]


def test_a_resample_draws_all_images_of_a_part() -> None:
    """One part has all the false alarms, and it is drawn twice."""
    table = make_prediction_table(six_parts()[:4])
    assert table.part_index.tolist() == [1, 1, 0, 0]
    found = alarm_metrics(table, np.array([[2.0, 2.0, 1.0, 1.0]]))
    assert found["False alarms, images"] == pytest.approx(100 * 2 / 6)
    assert found["False alarms, parts"] == pytest.approx(100 * 2 / 3)
    assert np.isnan(found["Escapes, parts"])


def test_alarms_of_images_are_the_complements_of_recall_and_specificity() -> None:
    table = make_prediction_table(mixed_predictions(images=80))
    weights = table.weights()
    alarms, detection = alarm_metrics(table, weights), detection_metrics(table, weights)
    np.testing.assert_allclose(alarms["False alarms, images"], 100 * (1 - detection["specificity"]))
    np.testing.assert_allclose(alarms["Escapes, images"], 100 * (1 - detection["recall"]))
    found = score_alarms(table)["All"]
    low, high = found["answers"]["parts"]["intervals"]["escapes"]
    assert 0 < low < found["answers"]["parts"]["escapes"] < high < 1


def test_runs_without_probabilities_have_no_alarms_by_p_defect() -> None:
    rows = [dataclasses.replace(row, probabilities=None) for row in six_parts()]
    table = make_prediction_table(rows)
    assert set(score_alarms(table)["All"]) == {"answers"}
    found = alarm_metrics(table, table.unit_weights())
    assert set(found) == set(ALARM_METRICS)
    assert [name for name, value in found.items() if np.isnan(value[0])] == [n for n in found if "P(defect)" in n]
