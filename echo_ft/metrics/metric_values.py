"""The form in which reports store metrics: score tables, JSON numbers, and intervals if there are enough parts."""

from __future__ import annotations

import numpy as np

from echo_ft.metrics import intervals
from echo_ft.metrics.prediction_table import PredictionTable
from echo_ft.records import QUESTION_TYPES

ScoreTable = dict[str, dict[str, float | None]]
"""{row: {column: percent}}. Rows are datasets and `Average`; columns are MMAD's seven question types and `Average`.
A cell without a question is None."""

AVERAGE = "Average"
"""Name of the row and of the column of averages."""

OTHER_AVERAGE = "Average of other types"
"""Name of the unweighted mean over the question types that are not part of MMAD."""

DETECTION_INDEX = QUESTION_TYPES.index("Anomaly Detection")
"""Index of Anomaly Detection in QUESTION_TYPES."""

ALARM_METRICS = {
    "False alarms, images": ("answers", "images", "false_alarms"),
    "Escapes, images": ("answers", "images", "escapes"),
    "False alarms, parts": ("answers", "parts", "false_alarms"),
    "Escapes, parts": ("answers", "parts", "escapes"),
    "False alarms by P(defect), images": ("p_defect", "images", "false_alarms"),
    "Escapes by P(defect), images": ("p_defect", "images", "escapes"),
    "False alarms by P(defect), parts": ("p_defect", "parts", "false_alarms"),
    "Escapes by P(defect), parts": ("p_defect", "parts", "escapes"),
}
"""Names of false alarms and escapes in comparisons, and their keys in the result of `detection.score_alarms`."""

MIN_PARTS = 5
"""Smallest number of parts for which a metric has an interval."""


TWO_CLASSES = (QUESTION_TYPES[DETECTION_INDEX], "balanced_accuracy")
"""The metrics that average two accuracies, one on normal images and one on defective images."""


def json_number(value: float) -> float | None:
    """Convert a value to a JSON number; nan becomes None."""
    return None if np.isnan(value) else float(value)


def json_interval(low: float | None, high: float | None) -> list[float] | None:
    """Convert two bounds to a JSON list; None if the metric has no interval."""
    return None if low is None or high is None else [low, high]


def metric_interval(
    values: np.ndarray,
    parts: int,
    metric: str = "",
    difference: bool = False,
    percent: bool = False,
    single_class: bool = False,
) -> list[float] | None:
    """Return the 95% interval of a metric with the resampled `values` (R,), which come from this number of `parts`.

    `metric` is the name of a column of the strict table, of one of ALARM_METRICS or of a detection metric. All other
    metrics are fractions from 0 to 1, or percentages with `percent`. `difference` is true if the value is the
    difference between two metrics, and `single_class` if only normal or only defective images have questions of
    Anomaly Detection, at least in one row of the strict table. Return None if all values are nan, or if there are fewer
    than MIN_PARTS parts: too few to resample.
    """
    if parts < MIN_PARTS:
        return None
    top = 100.0 if percent or metric in (*QUESTION_TYPES, AVERAGE, *ALARM_METRICS) else 1.0
    bounds = (-top if difference else 0.0, top)
    classes = 2 if metric in TWO_CLASSES and not single_class else 1
    interval = intervals.percentile_interval(values, parts, bounds, classes=classes)
    return json_interval(*map(json_number, interval))


def share_with_interval(
    table: PredictionTable, weights: np.ndarray, image_index: np.ndarray, correct: np.ndarray
) -> tuple[float, list[float] | None]:
    """Return the share of `correct` items and its 95% interval.

    There are M items: `correct` is (M,) bool, and `image_index` (M,) is the table's image of each item. `weights` is
    (R, N), as from `PredictionTable.weights`.
    """
    totals, hits = np.zeros(len(table.images)), np.zeros(len(table.images))
    np.add.at(totals, image_index, 1.0)
    np.add.at(hits, image_index, correct.astype(float))
    parts = len(np.unique(table.part_index[image_index]))
    resampled = intervals.ratio(weights @ hits, weights @ totals)
    return float(correct.mean()), metric_interval(resampled, parts)
