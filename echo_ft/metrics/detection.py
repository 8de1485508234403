from __future__ import annotations

from typing import Any

import numpy as np

from echo_ft.metrics import intervals
from echo_ft.metrics.figures import DETECTION, figure_interval, number
from echo_ft.metrics.prediction_table import PredictionTable

ALL_IMAGES = "All"
"""The row of all images together in `detection`."""


def detection_arrays(
    table: PredictionTable, weights: np.ndarray, members: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Image-level detection from the Anomaly Detection questions of `members` (N,) bool, each figure (R,) from 0 to 1.

    `auroc` is over the images with a P(defect); `recall` (share of defective images called so), `specificity` (of
    normal ones) and `balanced_accuracy` (their mean) are over all decisions, an unread one wrong.
    """
    members = np.ones(len(table.images), dtype=bool) if members is None else members
    asked, correct = np.zeros(len(table.images)), np.zeros(len(table.images))
    of_kind = table.kinds == DETECTION
    np.add.at(asked, table.image_of[of_kind], 1.0)
    np.add.at(correct, table.image_of[of_kind], table.correct[of_kind].astype(float))

    def accuracy(side: np.ndarray) -> np.ndarray:
        chosen = members & side
        return intervals.ratio(weights[:, chosen] @ correct[chosen], weights[:, chosen] @ asked[chosen])

    recall, specificity = accuracy(table.defective), accuracy(~table.defective)
    scored = members & ~np.isnan(table.defect_scores)
    return {
        "auroc": intervals.auroc(weights[:, scored], table.defect_scores[scored], table.defective[scored]),
        "recall": recall,
        "specificity": specificity,
        "balanced_accuracy": (recall + specificity) / 2,
    }


def detection_units(table: PredictionTable, members: np.ndarray) -> dict[str, int]:
    """How many parts each figure of `detection_arrays` rests on; of its two sides the smaller one's."""
    return {
        "auroc": table.smaller_side(members & ~np.isnan(table.defect_scores)),
        "recall": table.smaller_side(members & table.defective),
        "specificity": table.smaller_side(members & ~table.defective),
        "balanced_accuracy": table.smaller_side(members),
    }


def detection(table: PredictionTable) -> dict[str, dict[str, Any]]:
    """{row: figures, their intervals and counts} for all images together and for each dataset, from 0 to 1."""
    weights = table.weights()
    rows = {}
    for name, members in detection_rows(table).items():
        figures = {key: number(value[0]) for key, value in detection_arrays(table, table.once(), members).items()}
        spread, units = detection_arrays(table, weights, members), detection_units(table, members)
        rows[name] = {
            "images": int(members.sum()),
            "normal": int((members & ~table.defective).sum()),
            "defective": int((members & table.defective).sum()),
            "scored": int((members & ~np.isnan(table.defect_scores)).sum()),
            **figures,
            "average_precision": average_precision(table, members),
            "intervals": {key: figure_interval(value, units[key], key) for key, value in spread.items()},
        }
    return rows


def detection_rows(table: PredictionTable) -> dict[str, np.ndarray]:
    """{row: (N,) bool}: the images with a question of Anomaly Detection, all together and each dataset's, if any."""
    names, row_of = table.rows("dataset")
    asked = _asked_for_defects(table)
    rows = {ALL_IMAGES: asked, **{name: asked & (row_of == place) for place, name in enumerate(names)}}
    return {name: members for name, members in rows.items() if members.any()}


def _asked_for_defects(table: PredictionTable) -> np.ndarray:
    """(N,) bool: the images with a question of Anomaly Detection."""
    asked = np.zeros(len(table.images), dtype=bool)
    asked[table.image_of[table.kinds == DETECTION]] = True
    return asked


def average_precision(table: PredictionTable, members: np.ndarray) -> float | None:
    """scikit-learn's average precision of P(defect) over `members` (N,) bool; None where a side is missing."""
    scored = members & ~np.isnan(table.defect_scores)
    truth = table.defective[scored]
    if not 0 < truth.sum() < len(truth):
        return None
    from sklearn.metrics import average_precision_score  # takes seconds to import

    return float(average_precision_score(truth, table.defect_scores[scored]))


def roc_points(table: PredictionTable) -> list[tuple[float, float]]:
    """(false positive rate, true positive rate) along the threshold on P(defect); empty where a side is missing."""
    scored = ~np.isnan(table.defect_scores)
    truth = table.defective[scored]
    if not 0 < truth.sum() < len(truth):
        return []
    from sklearn.metrics import roc_curve

    false_positive, true_positive, _ = roc_curve(truth, table.defect_scores[scored])
    return list(zip(false_positive.tolist(), true_positive.tolist(), strict=True))
