"""Strict scores of a run with intervals: the share of all questions that it answered correctly.

Unparsed and failed answers count as wrong and are reported. Anomaly Detection is the mean of the accuracies on normal
and on defective images. Question types that a dataset does not have are left out of its means. Intervals come from
resampling physical parts with all their images and questions (`echo_ft.metrics.intervals`). The resamples are
stratified by dataset and by the classes that a part shows, so no resample lacks a class (`PredictionTable.weights`).

Question types that are not part of MMAD are scored separately (`other_type_report`) and do not enter MMAD's tables.

Shapes: R resamples, N images, Q questions, D rows of a table, K = 7 question types. Weights (R, N) are the number of
times that each image is drawn. One row of ones gives the scores themselves, so scores and intervals share their code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from echo_ft.experts.option_order import most_probable
from echo_ft.metrics import intervals
from echo_ft.metrics.metric_values import (
    AVERAGE,
    DETECTION_INDEX,
    MIN_PARTS,
    ScoreTable,
    json_interval,
    json_number,
    metric_interval,
    share_with_interval,
)
from echo_ft.metrics.prediction_table import PredictionTable, image_key, make_prediction_table
from echo_ft.records import GOOD, QUESTION_TYPES, UNKNOWN_CONDITION, Prediction


def strict_array(table: PredictionTable, weights: np.ndarray, by: str = "dataset") -> np.ndarray:
    """Return the strict table in percent per resample, (R, D + 1, K + 1), with averages in the last row and column.

    The average of a row is the mean over its question types. The last row is the unweighted mean over the rows that
    have a score. Cells without a question are nan.
    """
    names, row_index = table.group_images(by)
    shape = (len(names), 2, len(QUESTION_TYPES))
    ours = table.type_index >= 0
    image = table.image_index[ours]
    cells = np.ravel_multi_index((row_index[image], table.defective[image] * 1, table.type_index[ours]), shape)
    used, column = np.unique(cells, return_inverse=True)
    sums = np.zeros((2, len(weights), int(np.prod(shape))))
    for which, amount in enumerate((np.ones(len(cells)), table.correct[ours].astype(float))):
        per_image = np.zeros((len(table.images), len(used)))
        np.add.at(per_image, (image, column), amount)
        sums[which][:, used] = weights @ per_image
    total, correct = sums.reshape(2, len(weights), *shape)
    scores = np.full((len(weights), len(names) + 1, len(QUESTION_TYPES) + 1), np.nan)
    scores[:, :-1, :-1] = intervals.ratio(correct.sum(axis=2), total.sum(axis=2))
    by_class = intervals.ratio(correct[..., DETECTION_INDEX], total[..., DETECTION_INDEX])
    scores[:, :-1, DETECTION_INDEX] = intervals.mean_of_present(by_class, axis=2)
    scores[:, :-1, -1] = intervals.mean_of_present(scores[:, :-1, :-1], axis=2)
    scores[:, -1] = intervals.mean_of_present(scores[:, :-1], axis=1)
    return 100 * scores


def strict_part_counts(table: PredictionTable, by: str = "dataset") -> np.ndarray:
    """Count the parts behind each score of `strict_array`, (D + 1, K + 1).

    Classes and rows have equal weights. Anomaly Detection therefore takes the count of its smaller class, and a mean
    over rows takes the count of its smallest row.
    """
    names, row_index = table.group_images(by)
    shown = np.zeros((table.part_index.max() + 1, len(names), 2, len(QUESTION_TYPES)), dtype=bool)
    ours = table.type_index >= 0
    image = table.image_index[ours]
    shown[table.part_index[image], row_index[image], table.defective[image] * 1, table.type_index[ours]] = True
    by_class = shown[..., DETECTION_INDEX].sum(axis=0)
    counts = np.zeros((len(names) + 1, len(QUESTION_TYPES) + 1), dtype=int)
    counts[:-1, :-1] = shown.any(axis=2).sum(axis=0)
    counts[:-1, DETECTION_INDEX] = np.where(by_class.min(axis=1) > 0, by_class.min(axis=1), by_class.max(axis=1))
    counts[:-1, -1] = shown.any(axis=(2, 3)).sum(axis=0)
    smallest = np.where(counts[:-1] > 0, counts[:-1], np.iinfo(int).max).min(axis=0)
    counts[-1] = np.where(counts[:-1].any(axis=0), smallest, 0)
    return counts


def strict_table(table: PredictionTable, by: str = "dataset") -> ScoreTable:
    """Return {row: {column: percent}}; cells without a question are None."""
    return _as_score_table(table, strict_array(table, table.unit_weights(), by)[0], by)


def strict_intervals(table: PredictionTable, by: str = "dataset") -> dict[str, dict[str, list[float] | None]]:
    """Return {row: {column: [low, high]}}: the 95% interval in percent of every score in `strict_table`.

    A score that rests on fewer than MIN_PARTS parts has no interval.
    """
    counts, single = strict_part_counts(table, by), single_class_rows(table, by)
    classes = np.ones_like(counts)
    classes[:, DETECTION_INDEX] = [
        *(1 if name in single else 2 for name in table.group_images(by)[0]),
        1 if single else 2,
    ]
    resampled = strict_array(table, table.weights(by), by)
    bounds = intervals.percentile_interval(resampled, counts, (0.0, 100.0), classes=classes)
    low, high = np.where(counts < MIN_PARTS, np.nan, bounds)
    lows, highs = _as_score_table(table, low, by), _as_score_table(table, high, by)
    return {row: {column: json_interval(lows[row][column], highs[row][column]) for column in lows[row]} for row in lows}


def _as_score_table(table: PredictionTable, array: np.ndarray, by: str) -> ScoreTable:
    """Label the rows and columns of an array (D + 1, K + 1)."""
    rows, columns = [*table.group_images(by)[0], AVERAGE], [*QUESTION_TYPES, AVERAGE]
    return {
        row: {column: json_number(array[place, index]) for index, column in enumerate(columns)}
        for place, row in enumerate(rows)
    }


def single_class_rows(table: PredictionTable, by: str = "dataset") -> dict[str, str]:
    """Return {row: `normal` or `defective`} for rows with Anomaly Detection questions about one class only."""
    names, row_index = table.group_images(by)
    images = table.image_index[table.type_index == DETECTION_INDEX]
    found = {}
    for place, name in enumerate(names):
        classes = set(table.defective[images[row_index[images] == place]].tolist())
        if len(classes) == 1:
            found[name] = "defective" if classes.pop() else "normal"
    return found


def other_type_array(table: PredictionTable, weights: np.ndarray) -> np.ndarray:
    """Return the percentage of correct answers to each of `table.other_types` in each resample, (R, T + 1).

    There are T types. The last column is their unweighted mean, which is nan without types.
    """
    return _other_type_scores(_other_type_counts(table), weights)


def _other_type_counts(table: PredictionTable) -> np.ndarray:
    """Return the number of questions and of correct answers per other type and image, (2, T, N)."""
    counts = np.zeros((2, len(table.other_types), len(table.images)))
    ours = table.other_type_index >= 0
    place = table.other_type_index[ours], table.image_index[ours]
    np.add.at(counts[0], place, 1.0)
    np.add.at(counts[1], place, table.correct[ours].astype(float))
    return counts


def _other_type_scores(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the scores of `other_type_array` for the images that these counts (2, T, M) and weights (R, M) are of."""
    scores = np.full((len(weights), counts.shape[1] + 1), np.nan)
    for place, (total, correct) in enumerate(counts.swapaxes(0, 1)):
        scores[:, place] = intervals.ratio(weights @ correct, weights @ total)
    scores[:, -1] = intervals.mean_of_present(scores[:, :-1], axis=1)
    return 100 * scores


def other_type_part_counts(table: PredictionTable) -> list[int]:
    """Count the parts behind each score of `other_type_array`. The mean has the count of the rarest type."""
    parts = table.part_index[table.image_index]
    counts = [len(np.unique(parts[table.other_type_index == place])) for place in range(len(table.other_types))]
    return [*counts, min(counts, default=0)]


def other_type_report(table: PredictionTable) -> dict[str, dict[str, Any]]:
    """Return {type: strict score in percent, interval, and `answer_counts`} for types that are not part of MMAD."""
    scores = other_type_array(table, table.unit_weights())[0]
    resampled, parts = other_type_array(table, table.weights()), other_type_part_counts(table)
    return {
        kind: {
            "strict": json_number(scores[place]),
            "interval": metric_interval(resampled[:, place], parts[place], percent=True),
            **answer_counts([one for one in table.predictions if one.kind == kind]),
        }
        for place, kind in enumerate(table.other_types)
    }


def other_type_products(table: PredictionTable) -> dict[str, dict[str, Any]]:
    """Return {dataset/product: mean strict score over the other types in percent, and its interval}."""
    names, row_index = table.group_images("product")
    if not table.other_types:
        return {name: {"strict": None, "interval": None} for name in names}
    counts, weights, found = _other_type_counts(table), table.weights("product"), {}
    asked = counts[0].any(axis=0)
    for place, name in enumerate(names):
        own = np.flatnonzero(row_index == place)  # a product is scored from its own images, or many take quadratic time
        score = _other_type_scores(counts[..., own], np.ones((1, len(own))))[0, -1]
        resampled = _other_type_scores(counts[..., own], weights[:, own])[:, -1]
        parts = len(np.unique(table.part_index[own[asked[own]]]))
        found[name] = {"strict": json_number(score), "interval": metric_interval(resampled, parts, percent=True)}
    return found


def answer_counts(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Count questions, images, and answers that are `unparsed` (no option letter) or `failed` (no answer at all)."""
    images = {image_key(prediction) for prediction in predictions}
    failed = sum(prediction.error is not None for prediction in predictions)
    unparsed = sum(prediction.error is None and prediction.parsed is None for prediction in predictions)
    return {
        "questions": len(predictions),
        "images": len(images),
        "normal": sum(condition == GOOD for _, _, condition, _ in images),
        "defective": sum(condition not in (GOOD, UNKNOWN_CONDITION) for _, _, condition, _ in images),
        "unparsed": unparsed,
        "unparsed_share": unparsed / len(predictions) if predictions else 0.0,
        "failed": failed,
    }


def text_vs_logits(predictions: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    """Compare answers parsed from the text with the most probable options: {question type or `Average`: scores}.

    Only questions of MMAD's types that have both are used; if there are none, the result is empty. `agreement` (0 to 1,
    with its interval) is the share of `questions` whose text names the most probable option. Text that cannot be parsed
    agrees with none of the options. `text` and `logits` are the strict scores, in percent, of the two ways to answer.
    Their `Average` is computed as in the strict table.
    """
    both = [one for one in predictions if one.error is None and one.probabilities and one.kind in QUESTION_TYPES]
    if not both:
        return {}
    text = make_prediction_table(both)
    logits = make_prediction_table([replace(one, parsed=most_probable(one.probabilities)) for one in both])
    pairs = zip(text.predictions, logits.predictions, strict=True)
    agrees = np.array([one.parsed == other.parsed for one, other in pairs])
    text_scores, logits_scores = (strict_table(way)[AVERAGE] for way in (text, logits))
    weights = text.weights()
    comparison = {}
    for place, column in enumerate([*QUESTION_TYPES, AVERAGE]):
        chosen = np.ones(len(both), dtype=bool) if column == AVERAGE else text.type_index == place
        if not chosen.any():
            continue
        agreement, interval = share_with_interval(text, weights, text.image_index[chosen], agrees[chosen])
        comparison[column] = {
            "questions": int(chosen.sum()),
            "agreement": agreement,
            "interval": interval,
            "text": text_scores[column],
            "logits": logits_scores[column],
        }
    return comparison
