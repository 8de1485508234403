"""Scores of predicted boxes: how well they overlap with the true boxes, and how many there are on good images.

An unparsed or failed answer finds no box. Intervals resample physical parts, as for all other scores.

Shapes: R resamples, N images. Weights (R, N) are the number of times that each image is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from echo_ft.errors import EchoError
from echo_ft.images.boxes import MAX_BOXES, Box, matched_ious, parse_boxes
from echo_ft.metrics import intervals
from echo_ft.metrics.metric_values import MIN_PARTS, json_interval, json_number
from echo_ft.metrics.prediction_table import PredictionTable, arrange_predictions
from echo_ft.metrics.strict import answer_counts
from echo_ft.records import GOOD, Prediction

FOUND_AT = (0.1, 0.3, 0.5)
"""IoUs at which a true box counts as found."""

BOXES_PER_GOOD_IMAGE = "boxes_per_good_image"
"""The only metric that is not a fraction from 0 to 1."""


def box_metrics(table: PredictionTable, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return each metric of the boxes (R,); nan if it covers nothing.

    - `mean_iou`: mean IoU of the true boxes with the boxes matched to them (`boxes.matched_ious`), 0 for a missed one
    - `matched_iou`: the same over the true boxes that overlap with their match
    - `found_0.1`, `found_0.3`, `found_0.5`: share of the true boxes with a match of at least this IoU
    - `none_on_good`: share of the good images with the answer `none`
    - `boxes_per_good_image`: mean number of boxes in the parsed answers about good images

    Raises EchoError if the true answer to a question does not consist of boxes.
    """
    sums = _sums_by_image(table)
    return {name: intervals.ratio(weights @ above, weights @ below) for name, (above, below) in sums.items()}


def box_part_counts(table: PredictionTable) -> dict[str, int]:
    """Count the parts behind each of `box_metrics`."""
    return {name: len(np.unique(table.part_index[below > 0])) for name, (_, below) in _sums_by_image(table).items()}


def _sums_by_image(table: PredictionTable) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the numerator (N,) and the denominator (N,) of each metric."""
    names = ("mean_iou", "matched_iou", *(f"found_{iou:g}" for iou in FOUND_AT), "none_on_good", BOXES_PER_GOOD_IMAGE)
    sums = {name: (np.zeros(len(table.images)), np.zeros(len(table.images))) for name in names}

    def add(name: str, image: int, above: float, below: float) -> None:
        sums[name][0][image] += above
        sums[name][1][image] += below

    for image, prediction in zip(table.image_index, table.predictions, strict=True):
        found = named_boxes(prediction)
        ious = matched_ious(found or (), true_boxes(prediction))
        add("mean_iou", image, sum(ious), len(ious))
        add("matched_iou", image, sum(ious), sum(iou > 0 for iou in ious))
        for least in FOUND_AT:
            add(f"found_{least:g}", image, sum(iou >= least for iou in ious), len(ious))
        if prediction.condition == GOOD:
            add("none_on_good", image, found == (), 1)
            add(BOXES_PER_GOOD_IMAGE, image, len(found or ()), found is not None)
    return sums


def named_boxes(prediction: Prediction) -> tuple[Box, ...] | None:
    """Return the boxes of an answer in thousandths, or None if the answer is unparsed or failed."""
    return None if prediction.error is not None or prediction.parsed is None else parse_boxes(prediction.parsed)


def true_boxes(prediction: Prediction) -> tuple[Box, ...]:
    """Return the true boxes in thousandths. Raises EchoError if the true answer does not consist of boxes."""
    boxes = parse_boxes(prediction.answer)
    if boxes is None:
        raise EchoError(
            f"question {prediction.question} of case {prediction.case}: the true answer {prediction.answer!r} names no "
            "boxes; rebuild the dataset"
        )
    return boxes


def box_interval(name: str, values: np.ndarray, parts: int, difference: bool = False) -> list[float] | None:
    """Return the 95% interval of a metric with the resampled `values` (R,), as `metric_values.metric_interval` does.

    An answer may name any number of boxes on a good image. The interval assumes at most MAX_BOXES, or the largest of
    the `values` if it is higher.
    """
    if parts < MIN_PARTS:
        return None
    largest = max(MAX_BOXES, math.ceil(np.nanmax(np.abs(values), initial=0))) if name == BOXES_PER_GOOD_IMAGE else 1
    bounds = (-largest if difference else 0, largest)
    return json_interval(*map(json_number, intervals.percentile_interval(values, parts, bounds)))


def score_boxes(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return counts of answers and boxes, and `figures`: each of `box_metrics` with its interval and its parts.

    The result is empty if there are no predictions.
    """
    if not predictions:
        return {}
    table = arrange_predictions(predictions)
    values, resampled = (box_metrics(table, weights) for weights in (table.unit_weights(), table.weights()))
    return {
        **answer_counts(predictions),
        "true_boxes": sum(len(true_boxes(one)) for one in predictions),
        "named_boxes": sum(len(named_boxes(one) or ()) for one in predictions),
        "figures": {
            name: {
                "value": json_number(values[name][0]),
                "interval": box_interval(name, resampled[name], parts),
                "parts": parts,
            }
            for name, parts in box_part_counts(table).items()
        },
    }
