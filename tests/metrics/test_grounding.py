"""Scores of boxes agree with counts made by hand, and unparsed answers never improve them."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest

from echo_ft.errors import EchoError
from echo_ft.images.boxes import Box
from echo_ft.metrics.comparison import RunGroup
from echo_ft.metrics.grounding.comparison import compare_boxes
from echo_ft.metrics.grounding.scores import box_metrics, score_boxes
from echo_ft.metrics.loading import Run, load_run
from echo_ft.metrics.prediction_table import arrange_predictions, make_prediction_table
from echo_ft.records import Prediction
from tests.support.predictions import box_prediction
from tests.support.runs import make_run, predictions

TRUE = (100, 100, 200, 200)


def values(rows: list[Prediction]) -> dict[str, float | None]:
    table = arrange_predictions(rows)
    found = {name: float(value[0]) for name, value in box_metrics(table, table.unit_weights()).items()}
    return {name: None if np.isnan(value) else value for name, value in found.items()}


def test_scores_equal_a_count_by_hand() -> None:
    other = (500, 500, 600, 600)
    rows = [
        box_prediction(0, (TRUE,), (TRUE,)),  # IoU 1
        box_prediction(1, (TRUE, other), ((100, 100, 200, 150),)),  # IoU 0.5, and one missed
        box_prediction(2, (TRUE,), ((150, 150, 250, 250), (700, 700, 800, 800))),  # IoU 2500 / 17500
        box_prediction(3, (TRUE,), None),  # unparsed
        box_prediction(4, (), ()),
        box_prediction(5, (), (TRUE, other)),
        box_prediction(6, (), None),
    ]
    report = score_boxes(rows)
    counts = {key: report[key] for key in ("questions", "normal", "defective", "unparsed", "failed")}
    assert counts == {"questions": 7, "normal": 3, "defective": 4, "unparsed": 2, "failed": 0}
    assert (report["true_boxes"], report["named_boxes"]) == (5, 6)
    third = 2500 / 17500
    assert values(rows) == {name: figure["value"] for name, figure in report["figures"].items()}
    assert values(rows) == {
        "mean_iou": pytest.approx((1 + 0.5 + third) / 5),
        "matched_iou": pytest.approx((1 + 0.5 + third) / 3),
        "found_0.1": pytest.approx(3 / 5),
        "found_0.3": pytest.approx(2 / 5),
        "found_0.5": pytest.approx(2 / 5),
        "none_on_good": pytest.approx(1 / 3),
        "boxes_per_good_image": pytest.approx(2 / 2),
    }


def test_a_metric_without_images_has_no_value() -> None:
    good = values([box_prediction(number, (), ()) for number in range(6)])
    assert good == {name: None for name in good if "good" not in name} | {"none_on_good": 1, "boxes_per_good_image": 0}
    defective = values([box_prediction(number, (TRUE,), ()) for number in range(6)])
    assert defective["matched_iou"] is None
    assert (defective["mean_iou"], defective["none_on_good"], defective["boxes_per_good_image"]) == (0, None, None)
    assert score_boxes([]) == {}


def test_an_unparsed_or_failed_answer_never_improves_a_score() -> None:
    draw = random.Random(0)
    rows = random_rows(draw, 30)
    better = values(rows)
    for place, row in enumerate(rows):
        for change in ({"parsed": None}, {"error": "broken"}):
            worse = values([*rows[:place], dataclasses.replace(row, **change), *rows[place + 1 :]])
            for name in ("mean_iou", "found_0.1", "found_0.3", "found_0.5", "none_on_good"):
                assert worse[name] <= better[name], (name, row)


def random_rows(draw: random.Random, images: int, skill: float = 0.6) -> list[Prediction]:
    """Rows about good and defective images, two images per part, some of them unparsed."""
    rows = []
    for image in range(images):
        x, y = draw.randint(0, 600), draw.randint(0, 600)
        true: tuple[Box, ...] = () if image % 3 == 0 else ((x, y, x + 100, y + 100),)
        shift = 0 if draw.random() < skill else draw.randint(0, 150)
        named: tuple[Box, ...] | None = tuple((a + shift, b, c + shift, d) for a, b, c, d in true)
        if draw.random() > skill:
            named = draw.choice((None, (), ((0, 0, 50, 50),)))
        rows.append(box_prediction(image, true, named, part=f"part {image // 6}-{image % 3}"))
    return rows


def test_intervals_contain_the_value_and_rest_on_parts() -> None:
    rows = random_rows(random.Random(1), 60)
    for name, figure in score_boxes(rows)["figures"].items():
        low, high = figure["interval"]
        assert low <= figure["value"] <= high, name
        assert low < high, name
    parts = {name: figure["parts"] for name, figure in score_boxes(rows)["figures"].items()}
    assert (parts["none_on_good"], parts["mean_iou"], parts["found_0.5"]) == (10, 20, 20)
    assert parts["matched_iou"] < 20, "only parts with a match"
    few = score_boxes(rows[:9])["figures"]
    assert few["none_on_good"]["interval"] is None, "two parts"
    copies = [
        dataclasses.replace(
            row, case=f"{row.case}/{copy}", image=f"{copy}/{row.image}", question=f"{row.question}/{copy}"
        )
        for row in rows
        for copy in range(4)
    ]
    for name, figure in score_boxes(copies)["figures"].items():
        assert figure["interval"] == pytest.approx(score_boxes(rows)["figures"][name]["interval"]), "same parts"


def test_intervals_of_no_boxes_on_good_images_are_not_empty() -> None:
    figures = score_boxes([box_prediction(number, (), ()) for number in range(20)])["figures"]
    low, high = figures["boxes_per_good_image"]["interval"]
    assert low == 0
    assert high == pytest.approx(5 * (1 - 0.025 ** (1 / 20)))
    low, high = figures["none_on_good"]["interval"]
    assert low == pytest.approx(0.025 ** (1 / 20))
    assert high == 1


def test_resampled_metrics_equal_those_of_repeated_images() -> None:
    rows = random_rows(random.Random(2), 12)
    table = arrange_predictions(rows)
    weights = np.random.default_rng(0).integers(0, 3, (5, len(table.images))).astype(float)
    resampled = box_metrics(table, weights)
    by_image = {prediction.image: image for image, prediction in zip(table.image_index, table.predictions, strict=True)}
    for number, weight in enumerate(weights):
        repeated = [
            dataclasses.replace(row, case=f"{row.case}/{copy}", image=f"{row.image}/{copy}")
            for row in rows
            for copy in range(int(weight[by_image[row.image]]))
        ]
        expected = values(repeated)
        for name, value in resampled.items():
            assert (None if np.isnan(value[number]) else value[number]) == pytest.approx(expected[name])


def test_a_true_answer_without_boxes_is_an_error() -> None:
    with pytest.raises(EchoError, match=r"question D-0/boxes of case D-0: the true answer 'here' names no boxes"):
        score_boxes([dataclasses.replace(box_prediction(0, (TRUE,), ()), answer="here")])


def test_a_run_keeps_boxes_apart_from_mmads_types(tmp_path: Path) -> None:
    boxes = [box_prediction(number, (TRUE,), (TRUE,)) for number in range(3)]
    run = load_run(make_run(tmp_path / "run", [*predictions(0.8, images=4), *boxes]))
    assert run.grounding == boxes
    assert run.predictions == predictions(0.8, images=4)


def group(name: str, *members: list[Prediction]) -> RunGroup:
    runs = [Run(Path(name), predictions(0.5), {}, [], [], rows) for rows in members]
    return RunGroup(
        name,
        [f"{name} {place}" for place in range(len(runs))],
        runs,
        [make_prediction_table(run.predictions) for run in runs],
    )


def test_a_comparison_pairs_the_parts() -> None:
    base = random_rows(random.Random(3), 60, skill=0.4)
    tuned = [dataclasses.replace(row, parsed=row.answer) for row in base]
    found = compare_boxes([group("base", base), group("tuned", tuned), group("same", base)])
    better, same = (difference["figures"] for difference in found["differences"])
    for name, figure in score_boxes(base)["figures"].items():
        described = found["runs"][0]["figures"][name]
        assert (described["value"], described["interval"]) == (figure["value"], figure["interval"])
        assert same[name]["difference"] == 0
        assert abs(better[name]["difference"]) == pytest.approx(
            abs(score_boxes(tuned)["figures"][name]["value"] - figure["value"])
        )
    assert better["mean_iou"]["interval"][0] > 0
    assert better["boxes_per_good_image"]["interval"][1] < 0
    assert compare_boxes([group("base", []), group("tuned", [])]) == {}


def test_seeds_are_averaged_and_their_spread_is_given() -> None:
    seeds = [random_rows(random.Random(4), 40, skill) for skill in (0.4, 0.6, 0.8)]
    for rows in seeds[1:]:  # the same truth
        rows[:] = [dataclasses.replace(row, answer=first.answer) for row, first in zip(rows, seeds[0], strict=True)]
    found = compare_boxes([group("base", seeds[0]), group("tuned", *seeds)])
    figure = found["runs"][1]["figures"]["mean_iou"]
    each = [score_boxes(rows)["figures"]["mean_iou"]["value"] for rows in seeds]
    assert figure["values"] == pytest.approx(each)
    assert figure["value"] == pytest.approx(np.mean(each))
    assert figure["standard_deviation"] == pytest.approx(np.std(each, ddof=1))
