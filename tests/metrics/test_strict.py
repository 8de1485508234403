"""Strict scores count unparsed answers as wrong, leave out missing question types, and do not depend on order."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from echo_ft.metrics import comparison, detection, strict
from echo_ft.metrics.loading import Run
from echo_ft.metrics.metric_values import AVERAGE, metric_interval
from echo_ft.metrics.mmad import from_predictions, official_table
from echo_ft.metrics.prediction_table import make_prediction_table
from echo_ft.records import GOOD, QUESTION_TYPES, Prediction
from tests.support.predictions import CLASSIFICATION, DETECTION, make_prediction, mixed_predictions


def test_unparsed_or_failed_answer_is_wrong_and_counted() -> None:
    rows = [make_prediction(image, CLASSIFICATION, correct=True) for image in range(4)]
    rows[0] = dataclasses.replace(rows[0], parsed=None, text="perhaps")
    rows[1] = dataclasses.replace(rows[1], parsed=None, text="", error="broken image")
    assert strict.strict_table(make_prediction_table(rows))["D"][CLASSIFICATION] == 50.0
    counts = strict.answer_counts(rows)
    assert (counts["questions"], counts["unparsed"], counts["failed"]) == (4, 1, 1)
    assert counts["unparsed_share"] == 0.25


def test_question_types_without_questions_are_left_out_of_means() -> None:
    rows = [
        make_prediction(0, CLASSIFICATION, True),
        make_prediction(1, QUESTION_TYPES[2], False),
        make_prediction(0, QUESTION_TYPES[2], True, dataset="E"),
    ]
    scores = strict.strict_table(make_prediction_table(rows))
    assert scores["D"][DETECTION] is None
    assert scores["D"]["Average"] == 50.0
    assert scores["E"]["Average"] == 100.0
    assert scores["Average"][CLASSIFICATION] == 100.0
    assert scores["Average"]["Average"] == 75.0


def test_detection_is_the_mean_of_unequally_large_classes() -> None:
    rows = [make_prediction(image, DETECTION, True) for image in range(9)]
    table = make_prediction_table([*rows, make_prediction(9, DETECTION, False, GOOD)])
    assert strict.strict_table(table)["D"][DETECTION] == 50.0
    assert strict.single_class_rows(table) == {}


def test_detection_with_one_class_is_its_accuracy_and_reported() -> None:
    table = make_prediction_table(
        [
            make_prediction(0, DETECTION, True),
            make_prediction(1, DETECTION, False),
            make_prediction(0, DETECTION, True, GOOD, "E"),
        ]
    )
    assert strict.strict_table(table)["D"][DETECTION] == 50.0
    assert strict.single_class_rows(table) == {"D": "defective", "E": "normal"}


def test_order_of_predictions_changes_nothing() -> None:
    rows = mixed_predictions()
    shuffled = random.Random(1).sample(rows, len(rows))
    for compute in (strict.strict_table, strict.strict_intervals, detection.score_detection, detection.roc_points):
        assert compute(make_prediction_table(rows)) == compute(make_prediction_table(shuffled))


@pytest.mark.parametrize("by", ["dataset", "product"])
def test_weight_of_two_equals_the_image_twice(by: str) -> None:
    rows = mixed_predictions()
    table = make_prediction_table(rows)
    weights = np.random.default_rng(0).integers(0, 3, size=(1, len(table.images))).astype(float)
    times = {image: int(weight) for image, weight in zip(table.images, weights[0], strict=True)}
    copies = [
        dataclasses.replace(row, case=f"{row.case}#{copy}", image=f"{row.image}#{copy}")
        for row in rows
        for copy in range(times[row.dataset, row.product, row.condition, row.image])
    ]
    repeated = make_prediction_table(copies)
    assert repeated.group_images(by)[0] == table.group_images(by)[0]
    expected = strict.strict_array(repeated, repeated.unit_weights(), by)
    np.testing.assert_allclose(strict.strict_array(table, weights, by), expected)
    expected_metrics = comparison.compared_metrics(repeated, repeated.unit_weights())
    for key, value in comparison.compared_metrics(table, weights).items():
        if "parts" not in key:  # each copy is a part of its own here
            np.testing.assert_allclose(value, expected_metrics[key], err_msg=key)


def test_every_score_lies_in_its_interval() -> None:
    table = make_prediction_table(mixed_predictions())
    scores, intervals = strict.strict_table(table), strict.strict_intervals(table)
    for row, columns in scores.items():
        for column, value in columns.items():
            if value is None:
                assert intervals[row][column] is None
            else:
                low, high = intervals[row][column] or (0, 100)
                assert low < high
                assert low <= value <= high


def test_images_of_one_part_are_resampled_together() -> None:
    """Six images of a part hold little more information than one, so the interval must not shrink as for six parts."""
    draw = random.Random(1)
    correct_by_part = {part: draw.random() < 0.6 for part in range(30)}
    one_image = [make_prediction(part, DETECTION, correct) for part, correct in correct_by_part.items()]
    six_images = [
        make_prediction(part * 10 + image, DETECTION, correct, group=f"part {part}")
        for part, correct in correct_by_part.items()
        for image in range(6)
    ]
    six_parts = [dataclasses.replace(row, group=row.image) for row in six_images]
    single, together, separate = (
        strict.strict_intervals(make_prediction_table(rows))["D"][DETECTION] or [0, 0]
        for rows in (one_image, six_images, six_parts)
    )
    assert together == pytest.approx(single, abs=7)
    assert separate[1] - separate[0] < 0.6 * (together[1] - together[0])


def test_score_rests_on_the_parts_of_its_smaller_class() -> None:
    rows = [make_prediction(image, DETECTION, True, group=f"part {image // 3}") for image in range(12)]
    rows += [make_prediction(image, DETECTION, True, GOOD) for image in range(20, 23)]
    rows += [make_prediction(image, CLASSIFICATION, True, group="part 0") for image in range(2)]
    rows += [make_prediction(0, DETECTION, True, dataset="E"), make_prediction(0, QUESTION_TYPES[5], True, dataset="E")]
    table = make_prediction_table(rows)
    counts = strict.strict_part_counts(table)
    columns = [QUESTION_TYPES.index(kind) for kind in (DETECTION, CLASSIFICATION, QUESTION_TYPES[5])]
    assert counts[:, [*columns, -1]].tolist() == [[3, 1, 0, 7], [1, 0, 1, 1], [1, 1, 1, 1]]
    compared = comparison.compared_part_counts(table)
    assert [compared[key] for key in ("AUROC", "recall", "specificity", "Average")] == [3, 5, 3, 1]


@pytest.mark.parametrize("count", [8, 20])
def test_detection_with_one_class_has_the_exact_interval_of_a_share(count: int) -> None:
    rows = [make_prediction(image, DETECTION, True) for image in range(count)]
    both = [*rows, *(make_prediction(count + image, DETECTION, True, GOOD) for image in range(count))]
    exact = 100 * binomtest(count, count).proportion_ci(0.95, "exact").low
    for some, low in ((rows, exact), (both, (100 + exact) / 2)):
        run = Run(Path("run"), some, {}, [], [])
        group = comparison.RunGroup("run", ["run"], [run], [make_prediction_table(some)])
        for row in ("D", AVERAGE):
            assert strict.strict_intervals(group.tables[0])[row][DETECTION] == pytest.approx([low, 100])
        found = comparison.build_comparison([group, dataclasses.replace(group, name="other")])
        assert found["runs"][0]["figures"][DETECTION]["interval"] == pytest.approx([low, 100])
        difference = found["differences"][0]["figures"][DETECTION]["interval"]
        assert difference == pytest.approx([low - 100, 100 - low])


def test_auroc_is_compared_on_the_images_that_all_runs_score() -> None:
    """The second run equals the first, but fails on most images that the first gets wrong."""
    draw = np.random.default_rng(0)
    first = []
    for image in range(120):
        condition, score = (GOOD, "crack")[image % 2], float(np.clip(draw.normal(0.4 + 0.2 * (image % 2), 0.2), 0, 1))
        row = make_prediction(image, DETECTION, (score >= 0.5) == (image % 2), condition)
        first.append(dataclasses.replace(row, probabilities={"A": score, "B": 1 - score}))
    second = [
        row
        if row.parsed == row.answer
        else dataclasses.replace(row, probabilities=None, parsed=None, error="out of memory")
        for row in first
    ]
    groups = [
        comparison.RunGroup(name, [name], [Run(Path(name), rows, {}, [], [])], [make_prediction_table(rows)])
        for name, rows in (("first", first), ("second", second))
    ]
    found, count = comparison.build_comparison(groups), sum(row.error is None for row in second)
    assert found["differences"][0]["figures"]["AUROC"]["difference"] == 0
    alone = detection.score_detection(groups[1].tables[0])["All"]["auroc"]
    assert [run["figures"]["AUROC"]["value"] for run in found["runs"]] == [alone, alone]
    assert found["warnings"] == [
        f"AUROC covers only {count} of 120 images, because it needs their P(defect) from every run "
        f"(second has one for {count})"
    ]
    unscored = [dataclasses.replace(row, probabilities=None) for row in first]
    table = make_prediction_table(unscored)
    silent = comparison.RunGroup("silent", ["silent"], [Run(Path("silent"), unscored, {}, [], [])], [table])
    found = comparison.build_comparison([groups[0], silent])
    assert found["warnings"] == []
    own, other = (run["figures"]["AUROC"]["value"] for run in found["runs"])
    assert (own, other) == (detection.score_detection(groups[0].tables[0])["All"]["auroc"], None)


def test_both_classes_of_a_part_widen_the_detection_interval() -> None:
    rows: list[Prediction] = []
    for part in range(12):
        for condition in (GOOD, "crack"):
            image, correct = 2 * part + (condition == GOOD), part % 2 == 0
            rows.append(make_prediction(image, DETECTION, correct, condition, group=f"part {part}"))
    separate = [dataclasses.replace(row, group=f"{row.group} {row.condition}") for row in rows]
    low, high = strict.strict_intervals(make_prediction_table(rows))["D"][DETECTION] or (0, 0)
    separate_low, separate_high = strict.strict_intervals(make_prediction_table(separate))["D"][DETECTION] or (0, 0)
    assert high - low > 1.2 * (separate_high - separate_low), "the classes of a part are correlated"


def test_other_question_types_are_scored_apart_and_leave_mmads_tables_alone() -> None:
    ours = mixed_predictions()
    riddles = [make_prediction(image, "Riddle", image < 30, dataset="D") for image in range(40)]
    puzzles = [make_prediction(image, "Puzzle", image % 2 == 0, dataset="D") for image in range(20)]
    alone, mixed = make_prediction_table(ours), make_prediction_table([*ours, *riddles, *puzzles])
    assert strict.strict_table(mixed) == strict.strict_table(alone)
    assert official_table(from_predictions(mixed.predictions)) == official_table(from_predictions(alone.predictions))
    assert strict.other_type_report(alone) == {}
    found = strict.other_type_report(mixed)
    assert [(kind, one["strict"], one["questions"]) for kind, one in found.items()] == [
        ("Puzzle", 50.0, 20),
        ("Riddle", 75.0, 40),
    ]
    low, high = found["Riddle"]["interval"]
    assert 55 < low < 75 < high < 95
    assert strict.other_type_array(mixed, mixed.unit_weights())[0].tolist() == [50.0, 75.0, 62.5]


def test_the_other_types_of_a_product_are_scored_from_its_own_images(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        make_prediction(image, kind, image % 3 > 0, product=f"P{image // 20}")
        for kind, images in (("Riddle", 60), (DETECTION, 60), ("Puzzle", 20))
        for image in range(images)
    ]
    table, columns, scores = make_prediction_table(rows), [], strict._other_type_scores
    names, row_index = table.group_images("product")
    weights, expected = table.weights("product"), {}
    for place, name in enumerate(names):
        masked = strict.other_type_array(table, np.concatenate([table.unit_weights(), weights]) * (row_index == place))
        expected[name] = masked[0, -1], metric_interval(masked[1:, -1], 20, percent=True)

    def record(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
        columns.append(weights.shape[1])
        return scores(counts, weights)

    monkeypatch.setattr(strict, "_other_type_scores", record)
    found = strict.other_type_products(table)
    assert {name: (one["strict"], one["interval"]) for name, one in found.items()} == expected
    assert columns == [20] * 6, "time must not grow with products x images"
    monkeypatch.setattr(type(table), "weights", None)
    alone = strict.other_type_products(make_prediction_table([row for row in rows if row.kind == DETECTION]))
    assert alone == {name: {"strict": None, "interval": None} for name in names}
    assert len({id(one) for one in alone.values()}) == 3


def test_run_without_mmads_types_has_no_average_of_theirs() -> None:
    table = make_prediction_table([make_prediction(image, "Riddle", True) for image in range(8)])
    assert strict.strict_table(table)["Average"]["Average"] is None
    assert set(strict.strict_intervals(table)["Average"].values()) == {None}
    official = official_table(from_predictions(table.predictions))
    assert official == {AVERAGE: dict.fromkeys([*QUESTION_TYPES, AVERAGE])}
    low, high = strict.other_type_report(table)["Riddle"]["interval"]
    assert low == pytest.approx(100 * 0.025 ** (1 / 8)), "all eight parts are right: the exact bound"
    assert high == 100
