"""A prediction table rejects bad predictions, finds P(defect), and resamples whole parts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from echo_ft.errors import EchoError
from echo_ft.metrics.prediction_table import make_prediction_table, p_defect
from echo_ft.records import GOOD, UNLABELLED, Prediction
from tests.support.predictions import CLASSIFICATION, DETECTION, make_prediction


def test_bad_predictions_are_refused_by_name() -> None:
    row = make_prediction(0, DETECTION, True)
    with pytest.raises(EchoError, match="no predictions"):
        make_prediction_table([])
    with pytest.raises(EchoError, match=r"D-0.*type 'Anomaly detecton'; did you mean 'Anomaly Detection'"):
        make_prediction_table([dataclasses.replace(row, kind="Anomaly detecton")])
    with pytest.raises(EchoError, match="answered twice"):
        make_prediction_table([row, row])
    with pytest.raises(EchoError, match="true answer 'E'"):
        make_prediction_table([dataclasses.replace(row, answer="E")])


def test_p_defect_is_the_probability_of_the_option_that_states_a_defect() -> None:
    defective, normal = make_prediction(0, DETECTION, True), make_prediction(1, DETECTION, True, GOOD)
    assert p_defect(defective) == 0.8
    assert p_defect(normal) == 0.2
    assert p_defect(make_prediction(0, CLASSIFICATION, True)) is None
    assert p_defect(dataclasses.replace(defective, probabilities=None)) is None
    for row in (normal, defective):
        three = dataclasses.replace(row, options={"A": "Yes.", "B": "No.", "C": "Cannot tell."})
        assert p_defect(three) is None, "for a normal image, either of two wrong options may state the defect"
    unlabelled = dataclasses.replace(normal, condition=UNLABELLED, answer="", probabilities={"A": 0.7, "B": 0.3})
    assert p_defect(unlabelled) == 0.7


def test_equal_part_numbers_in_two_products_are_two_parts() -> None:
    """A manifest may number the parts of each product from 1."""
    rows = [
        make_prediction(place, DETECTION, place % 3 > 0, product=product, group=str(place % 10))
        for place, product in enumerate(["a"] * 10 + ["b"] * 10)
    ]
    for by in ("dataset", "product"):
        weights = make_prediction_table(rows).weights(by)
        assert (weights.sum(axis=1) == 20).all(), "every resample draws twenty parts"
        assert (weights[:, :10] != weights[:, 10:]).any(), "parts of different products are drawn independently"


def test_part_with_normal_and_defective_images_is_drawn_as_a_whole() -> None:
    def of_part(part: int, condition: str) -> Prediction:
        image, correct = 2 * part + (condition == GOOD), part % 2 == 0
        return make_prediction(image, DETECTION, correct, condition, group=f"part {part}")

    rows = [of_part(part, condition) for part in range(12) for condition in (GOOD, "crack")]
    table = make_prediction_table(rows)
    weights = table.weights()
    group_of_image = {row.image: row.group for row in rows}
    groups = np.array([group_of_image[image] for *_, image in table.images])
    for name in set(groups):
        normal, defective = weights[:, groups == name].T
        assert (normal == defective).all()
    rows += [of_part(part, GOOD) for part in range(12, 15)]
    rows += [of_part(part, "crack") for part in range(15, 18)]
    table = make_prediction_table(rows)
    for members in (table.defective, ~table.defective):
        assert (table.weights()[:, members].sum(axis=1) == 15).all()
