"""Detection of defects: AUROC, recall, specificity and average precision, and false alarms and escapes, from 0 to 1.

The answers to Anomaly Detection questions are the decisions, and P(defect) is the score. A false alarm is a good image
or part that is flagged, and an escape is a defective one that is not flagged. A part is flagged if any of its images
is, and it is defective if any of its images shows a defect.

Shapes: R resamples, N images, M units (images or parts). Weights (R, N) are the number of times that each image is
drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from echo_ft.metrics import intervals
from echo_ft.metrics.metric_values import ALARM_METRICS, DETECTION_INDEX, json_number, metric_interval
from echo_ft.metrics.prediction_table import PredictionTable

ALL_IMAGES = "All"
"""Name of the row of all images in `score_detection` and `score_alarms`."""

FLAGGED_FROM = 0.5
"""P(defect) from which an image counts as flagged in `score_alarms`."""


@dataclass(frozen=True)
class Units:
    """Images or parts, each with its class and its score."""

    image: np.ndarray
    """(M,): one image of each unit. Its weight is the unit's weight, because images of a part are drawn together."""
    defective: np.ndarray
    """(M,) bool"""
    scores: np.ndarray
    """(M,): the unit is flagged at every threshold up to this score."""


def auroc(weights: np.ndarray, scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve in each resample, (R,); nan if a class is missing.

    `weights` (R, N) are multiplicities, and a row of ones gives the plain AUROC. `scores` (N,) are higher for images
    that are more likely `positive`, (N,) bool. Uses the Mann-Whitney form, P(score of a positive > score of a
    negative) + P(equal) / 2.
    """
    order = np.argsort(scores[~positive])
    negatives = scores[~positive][order]
    below = np.zeros((len(weights), len(negatives) + 1))
    np.cumsum(weights[:, ~positive][:, order], axis=1, out=below[:, 1:])
    less = below[:, np.searchsorted(negatives, scores[positive], side="left")]
    less_or_equal = below[:, np.searchsorted(negatives, scores[positive], side="right")]
    wins = (weights[:, positive] * (less + less_or_equal)).sum(axis=1) / 2
    return intervals.ratio(wins, weights[:, positive].sum(axis=1) * below[:, -1])


def detection_metrics(
    table: PredictionTable, weights: np.ndarray, members: np.ndarray | None = None, scored: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return each detection metric (R,) of the images `members`, (N,) bool, or of all images.

    `auroc` covers the images that have a P(defect), or those of them in `scored`, (N,) bool. `recall` (on defective
    images), `specificity` (on normal ones) and `balanced_accuracy` (their mean) cover all decisions and count unparsed
    ones as wrong.
    """
    members = np.ones(len(table.images), dtype=bool) if members is None else members
    total, correct = np.zeros(len(table.images)), np.zeros(len(table.images))
    detects = table.type_index == DETECTION_INDEX
    np.add.at(total, table.image_index[detects], 1.0)
    np.add.at(correct, table.image_index[detects], table.correct[detects].astype(float))

    def accuracy(of_class: np.ndarray) -> np.ndarray:
        chosen = members & of_class
        return intervals.ratio(weights[:, chosen] @ correct[chosen], weights[:, chosen] @ total[chosen])

    recall, specificity = accuracy(table.defective), accuracy(~table.defective)
    scored = members & table.scored & (True if scored is None else scored)
    return {
        "auroc": auroc(weights[:, scored], table.defect_scores[scored], table.defective[scored]),
        "recall": recall,
        "specificity": specificity,
        "balanced_accuracy": (recall + specificity) / 2,
    }


def detection_part_counts(
    table: PredictionTable, members: np.ndarray, scored: np.ndarray | None = None
) -> dict[str, int]:
    """Count the parts behind each of `detection_metrics`. A metric of two classes has the count of the smaller one."""
    return {
        "auroc": table.smaller_class_parts(members & table.scored & (True if scored is None else scored)),
        "recall": table.smaller_class_parts(members & table.defective),
        "specificity": table.smaller_class_parts(members & ~table.defective),
        "balanced_accuracy": table.smaller_class_parts(members),
    }


def score_detection(table: PredictionTable) -> dict[str, dict[str, Any]]:
    """Return {row: metrics from 0 to 1, their intervals and counts} for all images and for each dataset."""
    weights = table.weights()
    rows = {}
    for name, members in detection_subsets(table).items():
        metrics = detection_metrics(table, table.unit_weights(), members)
        resampled, parts = detection_metrics(table, weights, members), detection_part_counts(table, members)
        rows[name] = {
            "images": int(members.sum()),
            "normal": int((members & ~table.defective).sum()),
            "defective": int((members & table.defective).sum()),
            "scored": int((members & table.scored).sum()),
            **{key: json_number(value[0]) for key, value in metrics.items()},
            "average_precision": average_precision(table, members),
            "intervals": {key: metric_interval(value, parts[key], key) for key, value in resampled.items()},
        }
    return rows


def detection_subsets(table: PredictionTable) -> dict[str, np.ndarray]:
    """Return {row: (N,) bool}: images with an Anomaly Detection question, of all datasets and of each one."""
    names, row_index = table.group_images("dataset")
    images = detection_images(table)
    rows = {ALL_IMAGES: images, **{name: images & (row_index == place) for place, name in enumerate(names)}}
    return {name: members for name, members in rows.items() if members.any()}


def detection_images(table: PredictionTable) -> np.ndarray:
    """Return which images have an Anomaly Detection question, (N,) bool."""
    members = np.zeros(len(table.images), dtype=bool)
    members[table.image_index[table.type_index == DETECTION_INDEX]] = True
    return members


def average_precision(table: PredictionTable, members: np.ndarray) -> float | None:
    """Return scikit-learn's average precision of P(defect) over `members`, (N,) bool; None if a class is missing."""
    scored = members & table.scored
    truth = table.defective[scored]
    if not 0 < truth.sum() < len(truth):
        return None
    from sklearn.metrics import average_precision_score  # this import takes seconds

    return float(average_precision_score(truth, table.defect_scores[scored]))


def roc_points(table: PredictionTable, scored: np.ndarray | None = None) -> list[tuple[float, float]]:
    """Return the ROC curve of P(defect) as (false positive rate, true positive rate); empty if a class is missing.

    It covers the images that have a P(defect), or those of them in `scored`, (N,) bool, as `detection_metrics` does.
    """
    scored = table.scored & (True if scored is None else scored)
    truth = table.defective[scored]
    if not 0 < truth.sum() < len(truth):
        return []
    from sklearn.metrics import roc_curve

    false_positive, true_positive, _ = roc_curve(truth, table.defect_scores[scored])
    return list(zip(false_positive.tolist(), true_positive.tolist(), strict=True))


def answer_scores(table: PredictionTable) -> np.ndarray:
    """Return (N,): 1 if an answer says that the image shows a defect, 0 if none does, nan if no answer is parsed."""
    scores = np.full(len(table.images), np.nan)
    for image, kind, prediction in zip(table.image_index, table.type_index, table.predictions, strict=True):
        if kind == DETECTION_INDEX and prediction.error is None and prediction.parsed is not None:
            flagged = (prediction.parsed == prediction.answer) == table.defective[image]
            scores[image] = np.fmax(scores[image], float(flagged))
    return scores


def detection_units(table: PredictionTable, scores: np.ndarray, members: np.ndarray, by: str) -> Units:
    """Return the images (`by="images"`) or the parts (`by="parts"`) among the images `members`, (N,) bool.

    `scores` (N,) are the scores of the images, and a part has the highest score of its images. An image with the score
    nan counts against the run: its part is flagged if it is good, and not if it is defective.
    """
    chosen = np.flatnonzero(members)
    keys = table.part_index[chosen] if by == "parts" else chosen
    _, first, unit = np.unique(keys, return_index=True, return_inverse=True)
    defective, highest = np.zeros(len(first), dtype=bool), np.full(len(first), -np.inf)
    np.logical_or.at(defective, unit, table.defective[chosen])
    missing = np.where(defective[unit], -np.inf, np.inf)
    np.maximum.at(highest, unit, np.where(np.isnan(scores[chosen]), missing, scores[chosen]))
    return Units(chosen[first], defective, highest)


def alarm_rates(units: Units, weights: np.ndarray, threshold: float = FLAGGED_FROM) -> dict[str, np.ndarray]:
    """Return `false_alarms`, the share of good units flagged, and `escapes`, the share of defective units not flagged.

    Both are (R,). Units are flagged if their score reaches the threshold.
    """
    drawn, wrong = weights[:, units.image], (units.scores >= threshold) != units.defective
    return {
        name: intervals.ratio(drawn[:, of_class & wrong].sum(axis=1), drawn[:, of_class].sum(axis=1))
        for name, of_class in (("false_alarms", ~units.defective), ("escapes", units.defective))
    }


def alarm_units(table: PredictionTable, members: np.ndarray) -> dict[tuple[str, str], Units]:
    """Return {(`answers` or `p_defect`, `images` or `parts`): units}; no `p_defect` if no image has a P(defect)."""
    ways = {"answers": answer_scores(table), "p_defect": table.defect_scores}
    return {
        (way, by): detection_units(table, scores, members, by)
        for way, scores in ways.items()
        for by in ("images", "parts")
        if way == "answers" or not np.isnan(scores[members]).all()
    }


def alarm_part_counts(table: PredictionTable, members: np.ndarray) -> dict[tuple[str, str], int]:
    """Count the parts behind each rate: {(`images` or `parts`, `false_alarms` or `escapes`): parts}.

    A part with good and defective images is behind the false alarms of images, but not of parts, where it is defective.
    """
    good, defective, shown = (
        len(np.unique(table.part_index[members & chosen])) for chosen in (~table.defective, table.defective, True)
    )
    return {
        ("images", "false_alarms"): good,
        ("images", "escapes"): defective,
        ("parts", "false_alarms"): shown - defective,
        ("parts", "escapes"): defective,
    }


def alarm_metrics(table: PredictionTable, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return each of ALARM_METRICS for all images in percent, (R,); nan without any P(defect) or without a class."""
    units = alarm_units(table, detection_images(table))
    rates = {key: alarm_rates(one, weights) for key, one in units.items()}
    missing = np.full(len(weights), np.nan)
    return {
        name: 100 * rates[way, by][rate] if (way, by) in rates else missing
        for name, (way, by, rate) in ALARM_METRICS.items()
    }


def score_alarms(table: PredictionTable) -> dict[str, dict[str, Any]]:
    """Return {row: {`answers` or `p_defect`: {`images` or `parts`: counts, shares and intervals}}}.

    The rows are those of `score_detection`. `p_defect` flags an image if its P(defect) is at least FLAGGED_FROM; it is
    missing if no image has one.
    """
    weights, plain = table.weights(), table.unit_weights()
    rows: dict[str, dict[str, Any]] = {}
    for name, members in detection_subsets(table).items():
        parts = alarm_part_counts(table, members)
        rows[name] = {}
        for (way, by), units in alarm_units(table, members).items():
            shares, resampled = alarm_rates(units, plain), alarm_rates(units, weights)
            rows[name].setdefault(way, {})[by] = {
                "good": int((~units.defective).sum()),
                "defective": int(units.defective.sum()),
                **{key: json_number(value[0]) for key, value in shares.items()},
                "intervals": {key: metric_interval(value, parts[by, key]) for key, value in resampled.items()},
            }
    return rows
