"""Strict figures of a run, with intervals: what a system got right of all that it was asked.

An answer that is no option letter, or that never came, counts as wrong and is counted. Anomaly Detection is the mean
of the accuracy on normal and on defective images; a kind that a dataset does not have is left out of its means.
Intervals come from resampling physical parts, with all their photographs and questions (`echo_ft.metrics.intervals`),
stratified by dataset and by what a part shows, so that no resample lacks a side (`sheets.Sheet.weights`).

Shapes: R resamples, N images, Q questions, D rows of a table, K = 7 kinds of question. Weights (R, N) are how often
each image was drawn; one row of ones gives the figures themselves, so both come from the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from echo_ft.metrics import intervals
from echo_ft.metrics.figures import AVERAGE, DETECTION, MIN_PARTS, Table, number, pair, side_count
from echo_ft.metrics.prediction_table import PredictionTable, image_key
from echo_ft.records import GOOD, QUESTION_TYPES, Prediction


def strict_array(table: PredictionTable, weights: np.ndarray, by: str = "dataset") -> np.ndarray:
    """(R, D + 1, K + 1): the strict table in percent for each resample; the last row and column are the averages.

    The average of a row is the mean of the kinds it has, the last row the unweighted mean of the rows that have a
    figure. nan where there is no question.
    """
    names, row_of = table.rows(by)
    shape = (len(names), 2, len(QUESTION_TYPES))
    cells = np.ravel_multi_index((row_of[table.image_of], table.defective[table.image_of] * 1, table.kinds), shape)
    used, column = np.unique(cells, return_inverse=True)
    sums = np.zeros((2, len(weights), int(np.prod(shape))))
    for which, amount in enumerate((np.ones(len(cells)), table.correct.astype(float))):
        per_image = np.zeros((len(table.images), len(used)))
        np.add.at(per_image, (table.image_of, column), amount)
        sums[which][:, used] = weights @ per_image
    asked, correct = sums.reshape(2, len(weights), *shape)
    percent = np.full((len(weights), len(names) + 1, len(QUESTION_TYPES) + 1), np.nan)
    percent[:, :-1, :-1] = intervals.ratio(correct.sum(axis=2), asked.sum(axis=2))
    sides = intervals.ratio(correct[..., DETECTION], asked[..., DETECTION])
    percent[:, :-1, DETECTION] = intervals.mean_of_present(sides, axis=2)
    percent[:, :-1, -1] = intervals.mean_of_present(percent[:, :-1, :-1], axis=2)
    percent[:, -1] = intervals.mean_of_present(percent[:, :-1], axis=1)
    return 100 * percent


def strict_units(table: PredictionTable, by: str = "dataset") -> np.ndarray:
    """(D + 1, K + 1): how many parts each figure of `strict_array` rests on: of its two sides the smaller one's, and
    of a mean of rows the smallest one's, as each counts the same.
    """
    names, row_of = table.rows(by)
    asked = np.zeros((table.parts.max() + 1, len(names), 2, len(QUESTION_TYPES)), dtype=bool)
    image = table.image_of
    asked[table.parts[image], row_of[image], table.defective[image] * 1, table.kinds] = True
    sides = asked[..., DETECTION].sum(axis=0)
    units = np.zeros((len(names) + 1, len(QUESTION_TYPES) + 1), dtype=int)
    units[:-1, :-1] = asked.any(axis=2).sum(axis=0)
    units[:-1, DETECTION] = np.where(sides.min(axis=1) > 0, sides.min(axis=1), sides.max(axis=1))
    units[:-1, -1] = asked.any(axis=(2, 3)).sum(axis=0)
    asked_of = np.where(units[:-1] > 0, units[:-1], np.iinfo(int).max).min(axis=0)
    units[-1] = np.where(units[:-1].any(axis=0), asked_of, 0)
    return units


def strict_table(table: PredictionTable, by: str = "dataset") -> Table:
    """{row: {column: percent}}; None where there is no question."""
    return _as_table(table, strict_array(table, table.once(), by)[0], by)


def strict_intervals(table: PredictionTable, by: str = "dataset") -> dict[str, dict[str, list[float] | None]]:
    """{row: {column: [low, high]}}: 95 % intervals in percent of every figure in `strict_table`; see `interval`."""
    units = strict_units(table, by)
    sides = np.array([side_count(kind) for kind in (*QUESTION_TYPES, AVERAGE)])
    resampled = strict_array(table, table.weights(by), by)
    spread = intervals.percentile_interval(resampled, units, (0.0, 100.0), sides=sides)
    low, high = np.where(units < MIN_PARTS, np.nan, spread)
    lows, highs = _as_table(table, low, by), _as_table(table, high, by)
    return {row: {column: pair(lows[row][column], highs[row][column]) for column in lows[row]} for row in lows}


def _as_table(table: PredictionTable, array: np.ndarray, by: str) -> Table:
    rows, columns = [*table.rows(by)[0], AVERAGE], [*QUESTION_TYPES, AVERAGE]
    return {
        row: {column: number(array[place, index]) for index, column in enumerate(columns)}
        for place, row in enumerate(rows)
    }


def one_sided(table: PredictionTable, by: str = "dataset") -> dict[str, str]:
    """Rows whose Anomaly Detection figure rests on one side alone, and which one: `normal` or `defective`."""
    names, row_of = table.rows(by)
    asked = table.image_of[table.kinds == DETECTION]
    found = {}
    for place, name in enumerate(names):
        sides = set(table.defective[asked[row_of[asked] == place]].tolist())
        if len(sides) == 1:
            found[name] = "defective" if sides.pop() else "normal"
    return found


def counts(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Questions, images, and how many answers were no option letter (`unparsed`) or never came (`failed`)."""
    images = {image_key(prediction) for prediction in predictions}
    failed = sum(prediction.error is not None for prediction in predictions)
    unparsed = sum(prediction.error is None and prediction.parsed is None for prediction in predictions)
    return {
        "questions": len(predictions),
        "images": len(images),
        "normal": sum(condition == GOOD for _, _, condition, _ in images),
        "defective": sum(condition != GOOD for _, _, condition, _ in images),
        "unparsed": unparsed,
        "unparsed_share": unparsed / len(predictions) if predictions else 0.0,
        "failed": failed,
    }
