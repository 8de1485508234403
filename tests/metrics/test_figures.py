"""Strict figures: an unread answer is wrong and counted, what was not asked is left out, order does not matter."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score

from echo_ft.errors import EchoError
from echo_ft.metrics import calibration, comparison, detection, strict
from echo_ft.metrics import intervals as statistics
from echo_ft.metrics.prediction_table import make_prediction_table, p_defect
from echo_ft.records import GOOD, QUESTION_TYPES, Prediction

DETECTION, CLASSIFICATION = QUESTION_TYPES[0], QUESTION_TYPES[1]


def prediction(
    image: int,
    kind: str,
    right: bool,
    condition: str = "crack",
    dataset: str = "D",
    product: str = "p",
    group: str = "",
) -> Prediction:
    options = {"A": "Yes.", "B": "No."}
    answer = "B" if condition == GOOD else "A"
    parsed = answer if right else {"A": "B", "B": "A"}[answer]
    return Prediction(
        case=f"{dataset}-{image}",
        question=f"{dataset}-{image}/{kind}",
        dataset=dataset,
        product=product,
        group=group or f"{image}.png",
        image=f"{image}.png",
        condition=condition,
        kind=kind,
        question_text="?",
        options=options,
        answer=answer,
        text=parsed,
        parsed=parsed,
        probabilities={letter: 0.8 if letter == parsed else 0.2 for letter in options},
    )


def many(seed: int = 0, images: int = 40) -> list[Prediction]:
    """Two datasets, two products, normal and defective; several questions an image."""
    luck = random.Random(seed)
    rows = []
    for image in range(images):
        where = {
            "condition": GOOD if image % 2 else "crack",
            "dataset": "DE"[image % 3 == 0],
            "product": "pq"[image % 5 == 0],
        }
        for kind in QUESTION_TYPES if image % 4 == 0 else QUESTION_TYPES[:3]:
            rows.append(prediction(image, kind, luck.random() < 0.7, **where))
    return rows


def test_an_unread_or_failed_answer_is_wrong_and_counted() -> None:
    rows = [prediction(image, CLASSIFICATION, right=True) for image in range(4)]
    rows[0] = dataclasses.replace(rows[0], parsed=None, text="perhaps")
    rows[1] = dataclasses.replace(rows[1], parsed=None, text="", error="broken image")
    assert strict.strict_table(make_prediction_table(rows))["D"][CLASSIFICATION] == 50.0
    counts = strict.counts(rows)
    assert (counts["questions"], counts["unparsed"], counts["failed"]) == (4, 1, 1)
    assert counts["unparsed_share"] == 0.25


def test_kinds_that_were_not_asked_are_left_out_of_the_means() -> None:
    rows = [
        prediction(0, CLASSIFICATION, True),
        prediction(1, QUESTION_TYPES[2], False),
        prediction(0, QUESTION_TYPES[2], True, dataset="E"),
    ]
    table = strict.strict_table(make_prediction_table(rows))
    assert table["D"][DETECTION] is None
    assert table["D"]["Average"] == 50.0
    assert table["E"]["Average"] == 100.0
    assert table["Average"][CLASSIFICATION] == 100.0
    assert table["Average"]["Average"] == 75.0


def test_detection_is_the_mean_of_both_sides_however_unequal_they_are() -> None:
    rows = [prediction(image, DETECTION, True) for image in range(9)] + [prediction(9, DETECTION, False, GOOD)]
    table = make_prediction_table(rows)
    assert strict.strict_table(table)["D"][DETECTION] == 50.0
    assert strict.one_sided(table) == {}


def test_detection_on_one_side_alone_is_that_side_and_flagged() -> None:
    rows = [prediction(0, DETECTION, True), prediction(1, DETECTION, False), prediction(0, DETECTION, True, GOOD, "E")]
    table = make_prediction_table(rows)
    assert strict.strict_table(table)["D"][DETECTION] == 50.0
    assert strict.one_sided(table) == {"D": "defective", "E": "normal"}


def test_the_order_of_predictions_changes_nothing() -> None:
    rows = many()
    shuffled = random.Random(1).sample(rows, len(rows))
    for figure in (strict.strict_table, strict.strict_intervals, detection.detection, detection.roc_points):
        assert figure(make_prediction_table(rows)) == figure(make_prediction_table(shuffled))


@pytest.mark.parametrize("by", ["dataset", "product"])
def test_a_weight_of_two_is_the_same_as_the_image_twice(by: str) -> None:
    rows = many()
    table = make_prediction_table(rows)
    weights = np.random.default_rng(0).integers(0, 3, size=(1, len(table.images))).astype(float)
    times = {image: int(weight) for image, weight in zip(table.images, weights[0], strict=True)}
    copies = [
        dataclasses.replace(row, case=f"{row.case}#{copy}", image=f"{row.image}#{copy}")
        for row in rows
        for copy in range(times[row.dataset, row.product, row.condition, row.image])
    ]
    repeated = make_prediction_table(copies)
    assert repeated.rows(by)[0] == table.rows(by)[0]
    expected = strict.strict_array(repeated, repeated.once(), by)
    np.testing.assert_allclose(strict.strict_array(table, weights, by), expected)
    for key, value in comparison.compared_figures(table, weights).items():
        np.testing.assert_allclose(value, comparison.compared_figures(repeated, repeated.once())[key], err_msg=key)


def test_every_figure_lies_in_its_interval() -> None:
    table = make_prediction_table(many())
    table, intervals = strict.strict_table(table), strict.strict_intervals(table)
    for row, figures in table.items():
        for column, value in figures.items():
            if value is None:
                assert intervals[row][column] is None
            else:
                low, high = intervals[row][column] or (0, 100)
                assert low <= value <= high and low < high


def test_p_defect_is_the_probability_of_the_option_that_says_defect() -> None:
    defective, normal = prediction(0, DETECTION, True), prediction(1, DETECTION, True, GOOD)
    assert p_defect(defective) == 0.8
    assert p_defect(normal) == 0.2
    assert p_defect(prediction(0, CLASSIFICATION, True)) is None
    assert p_defect(dataclasses.replace(defective, probabilities=None)) is None
    three = dataclasses.replace(normal, options={"A": "1", "B": "2", "C": "3"})
    assert p_defect(three) is None, "which of two wrong options says defect is not known"


def test_detection_figures_are_those_of_scikit_learn() -> None:
    luck = np.random.default_rng(2)
    rows = []
    for image in range(30):
        row = prediction(image, DETECTION, True, GOOD if image % 3 else "crack")
        score = float(np.round(luck.random(), 1))
        rows.append(dataclasses.replace(row, probabilities={"A": score, "B": 1 - score}))
    found = detection.detection(make_prediction_table(rows))["All"]
    truth = [row.condition != GOOD for row in rows]
    assert found["auroc"] == pytest.approx(
        roc_auc_score(truth, [row.probabilities["A"] for row in rows if row.probabilities])
    )
    assert (found["normal"], found["defective"], found["scored"]) == (20, 10, 30)
    assert found["intervals"]["auroc"][0] < found["auroc"] < found["intervals"]["auroc"][1]


def test_detection_without_probabilities_keeps_what_the_decisions_say() -> None:
    rows = [dataclasses.replace(row, probabilities=None) for row in many() if row.kind == DETECTION]
    found = detection.detection(make_prediction_table(rows))["All"]
    assert found["auroc"] is None and found["average_precision"] is None and found["scored"] == 0
    assert found["balanced_accuracy"] == pytest.approx((found["recall"] + found["specificity"]) / 2)


def test_what_cannot_be_scored_is_refused_with_its_name() -> None:
    row = prediction(0, DETECTION, True)
    with pytest.raises(EchoError, match="no predictions"):
        make_prediction_table([])
    with pytest.raises(EchoError, match=r"D-0.*unknown kind 'Guess'"):
        make_prediction_table([dataclasses.replace(row, kind="Guess")])
    with pytest.raises(EchoError, match="answered twice"):
        make_prediction_table([row, row])
    with pytest.raises(EchoError, match="true answer 'E'"):
        make_prediction_table([dataclasses.replace(row, answer="E")])


def test_photographs_of_one_part_are_resampled_together() -> None:
    """Six exposures of a part say hardly more than one: the interval must not shrink as if they were six parts."""
    luck = random.Random(1)
    outcome = {part: luck.random() < 0.6 for part in range(30)}
    one = [prediction(part, DETECTION, right) for part, right in outcome.items()]
    six = [
        prediction(part * 10 + exposure, DETECTION, right, group=f"part {part}")
        for part, right in outcome.items()
        for exposure in range(6)
    ]
    parts = [dataclasses.replace(row, group=row.image) for row in six]
    alone, together, apart = (
        strict.strict_intervals(make_prediction_table(rows))["D"][DETECTION] for rows in (one, six, parts)
    )
    assert together == pytest.approx(alone, abs=7)
    assert apart[1] - apart[0] < 0.6 * (together[1] - together[0])


def test_parts_of_two_products_that_bear_one_number_are_two_parts() -> None:
    """A manifest may number the parts of each product from 1."""
    rows = [
        prediction(place, DETECTION, place % 3 > 0, product=product, group=str(place % 10))
        for place, product in enumerate(["a"] * 10 + ["b"] * 10)
    ]
    for by in ("dataset", "product"):
        weights = make_prediction_table(rows).weights(by)
        assert (weights.sum(axis=1) == 20).all(), "twenty parts are drawn, in any of the resamples"
        assert (weights[:, :10] != weights[:, 10:]).any(), "each for itself"


def test_a_part_with_normal_and_defective_photographs_is_drawn_whole() -> None:
    def of(part: int, condition: str) -> Prediction:
        return prediction(2 * part + (condition == GOOD), DETECTION, part % 2 == 0, condition, group=f"part {part}")

    both = [of(part, condition) for part in range(12) for condition in (GOOD, "crack")]
    table = make_prediction_table(both)
    weights = table.weights()
    group = {row.image: row.group for row in both}
    groups = np.array([group[image] for *_, image in table.images])
    for name in set(groups):
        normal, defective = weights[:, groups == name].T
        assert (normal == defective).all()
    low, high = strict.strict_intervals(table)["D"][DETECTION] or (0, 0)
    apart = [dataclasses.replace(row, group=f"{row.group} {row.condition}") for row in both]
    narrow, wide = strict.strict_intervals(make_prediction_table(apart))["D"][DETECTION] or (0, 0)
    assert high - low > 1.2 * (wide - narrow), "what the two sides of a part share widens the interval of their mean"
    mixed = [*both, *(of(part, GOOD) for part in range(12, 15)), *(of(part, "crack") for part in range(15, 18))]
    table = make_prediction_table(mixed)
    for side in (table.defective, ~table.defective):
        assert (table.weights()[:, side].sum(axis=1) == 15).all()


def test_a_figure_rests_on_the_parts_of_its_smaller_side() -> None:
    rows = [prediction(image, DETECTION, True, group=f"part {image // 3}") for image in range(12)]
    rows += [prediction(image, DETECTION, True, GOOD) for image in range(20, 23)]
    rows += [prediction(image, CLASSIFICATION, True, group="part 0") for image in range(2)]
    rows += [prediction(0, DETECTION, True, dataset="E"), prediction(0, QUESTION_TYPES[5], True, dataset="E")]
    table = make_prediction_table(rows)
    units = strict.strict_units(table)
    columns = [QUESTION_TYPES.index(kind) for kind in (DETECTION, CLASSIFICATION, QUESTION_TYPES[5])]
    assert units[:, [*columns, -1]].tolist() == [[3, 1, 0, 7], [1, 0, 1, 1], [1, 1, 1, 1]]
    found = comparison.compared_units(table)
    assert [found[key] for key in ("AUROC", "recall", "specificity", "Average")] == [3, 5, 3, 1]


def unsure(count: int, seed: int, sharpness: float = 4.0) -> list[Prediction]:
    """Anomaly Detection alone, with P(defect) as sharp as that: at 1 it would be calibrated."""
    random = np.random.default_rng(seed)
    rows = []
    for image in range(count):
        odds = random.normal() * 2
        condition = "crack" if random.random() < expit(odds) else GOOD
        sure = float(expit(sharpness * odds))
        row = prediction(image + 10_000 * seed, DETECTION, (sure > 0.5) == (condition != GOOD), condition)
        rows.append(dataclasses.replace(row, probabilities={"A": sure, "B": 1 - sure}))
    return rows


def test_calibration_undoes_overconfidence_and_judges_its_thresholds_on_the_other_run() -> None:
    validation, test = (make_prediction_table(unsure(count, seed)) for seed, count in ((1, 2000), (2, 600)))
    found = calibration.fitted_calibration(test, validation, false_alarms=0.1)
    assert found["temperature"] == pytest.approx(4, rel=0.15)
    for name in ("expected_calibration_error", "log_loss"):
        assert found[name]["after"] < 0.6 * found[name]["before"]
    assert found["validation"]["normal"] + found["validation"]["defective"] == 2000
    fitted, scores = (expit(logit(one.defect_scores) / found["temperature"]) for one in (validation, test))
    assert set(found["thresholds"]) == {"false_alarms", "f1", "best"}
    for one in found["thresholds"].values():
        for table, values, figures in ((validation, fitted, one["validation"]), (test, scores, one["test"])):
            called = values >= one["threshold"]
            assert figures["recall"] == pytest.approx(called[table.defective].mean())
            assert figures["false_alarms"] == pytest.approx(called[~table.defective].mean())
    alarms = found["thresholds"]["false_alarms"]
    assert 0.09 < alarms["validation"]["false_alarms"] <= 0.1
    low, high = alarms["intervals"]["false_alarms"]
    assert low < 0.1 < high and low < alarms["test"]["false_alarms"] < high
    chosen, best = (found["thresholds"][name]["test"]["f1"] for name in ("f1", "best"))
    assert 0 < best - chosen < 0.1 and found["thresholds"]["best"]["intervals"] == {}


def test_calibration_leaves_images_without_a_probability_out_and_tells_how_many_there_are() -> None:
    rows = unsure(300, seed=1)
    silent = [dataclasses.replace(row, probabilities=None) for row in unsure(50, seed=3)]
    validation, test = make_prediction_table(rows), make_prediction_table(unsure(60, seed=2))
    assert calibration.fitted_calibration(
        test, make_prediction_table(rows + silent), 0.1
    ) == calibration.fitted_calibration(test, validation, 0.1)
    few = [row for row in rows if row.condition != GOOD] + [row for row in rows if row.condition == GOOD][:8]
    assert "false_alarms" not in calibration.fitted_calibration(test, make_prediction_table(few), 0.1)["thresholds"]
    with pytest.raises(EchoError, match="P\\(defect\\) of 0 normal and 0 defective"):
        calibration.fitted_calibration(test, make_prediction_table(silent), 0.1)
    with pytest.raises(EchoError, match="the run has P\\(defect\\) of no image"):
        calibration.fitted_calibration(make_prediction_table(silent), validation, 0.1)


def test_certain_probabilities_and_a_run_of_one_side_are_calibrated_too() -> None:
    certain = [
        dataclasses.replace(row, probabilities={"A": float(place % 2), "B": float(1 - place % 2)})
        for place, row in enumerate(unsure(200, seed=2))
    ]
    normal = make_prediction_table([row for row in certain if row.condition == GOOD])
    found = calibration.fitted_calibration(normal, make_prediction_table(certain), 0.1)
    assert np.isfinite(found["log_loss"]["after"]) and found["temperature"] <= statistics.TEMPERATURES[1]
    assert found["thresholds"]["f1"]["test"]["recall"] is None and "best" not in found["thresholds"]
