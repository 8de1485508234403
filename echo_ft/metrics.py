"""Strict figures of a run, with intervals: what a system got right of all that it was asked.

An answer that is no option letter, or that never came, counts as wrong and is counted. Anomaly Detection is the mean
of the accuracy on normal and on defective images; a kind that a dataset does not have is left out of its means.
Intervals come from resampling physical parts, with all their photographs and questions (`echo_ft.statistics`),
stratified by dataset and by what a part shows, so that no resample lacks a side (`Sheet.weights`).

Shapes: R resamples, N images, Q questions, D rows of a table, K = 7 kinds of question. Weights (R, N) are how often
each image was drawn; one row of ones gives the figures themselves, so both come from the same code.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from echo_ft import statistics
from echo_ft.mmad_scorer import AVERAGE, Table
from echo_ft.records import GOOD, KINDS, EchoError, Prediction

ALL = "All"
"""The row of all images together in `detection`."""

_DETECTION = KINDS.index("Anomaly Detection")


@dataclass(frozen=True)
class Sheet:
    """Predictions in a fixed order, with the images that they hang on. Make it with `sheet`."""

    predictions: tuple[Prediction, ...]
    images: tuple[tuple[str, str, str, str], ...]
    """(dataset, product, condition, image), N of them, sorted."""
    image_of: np.ndarray
    """(Q,): which image each prediction is about."""

    @cached_property
    def defective(self) -> np.ndarray:
        """(N,) bool."""
        return np.array([condition != GOOD for _, _, condition, _ in self.images])

    @cached_property
    def correct(self) -> np.ndarray:
        """(Q,) bool; False where the answer is no option letter or never came."""
        return np.array([is_correct(prediction) for prediction in self.predictions])

    @cached_property
    def kinds(self) -> np.ndarray:
        """(Q,): index into KINDS."""
        return np.array([KINDS.index(prediction.kind) for prediction in self.predictions])

    @cached_property
    def defect_scores(self) -> np.ndarray:
        """(N,): P(defect) of each image, the mean where it is asked twice; nan where the run has none."""
        found: list[list[float]] = [[] for _ in self.images]
        for image, prediction in zip(self.image_of, self.predictions, strict=True):
            score = p_defect(prediction)
            if score is not None:
                found[image].append(score)
        return np.array([np.mean(scores) if scores else np.nan for scores in found])

    def rows(self, by: str) -> tuple[list[str], np.ndarray]:
        """Names of the datasets (`by="dataset"`) or products (`dataset/product`), and (N,) which one an image is of."""
        names = [image[0] if by == "dataset" else f"{image[0]}/{image[1]}" for image in self.images]
        found = sorted(set(names))
        return found, np.array([found.index(name) for name in names])

    def weights(self, by: str = "dataset") -> np.ndarray:
        """(R, N) from statistics.resample over physical parts: dataset, product and group, as `splits.part` has it.

        Photographs of one part are no independent draws, so they are drawn together. The strata are, within a row of
        the table, the parts with normal photographs alone, those with defective ones alone, and those with both. Each
        stratum is resampled to its own number of parts, so a side that the row has is in every resample. A part with
        both is drawn whole: were its two sides drawn apart, what they have in common would be lost, and the interval
        of Anomaly Detection, their mean, too narrow.
        """
        group = {_image(prediction): prediction.group for prediction in self.predictions}
        parts = [
            (row, group[image], image[1]) for row, image in zip(self.rows(by)[1].tolist(), self.images, strict=True)
        ]
        sides: dict[tuple[int, str, str], set[bool]] = {}
        for part, defective in zip(parts, self.defective.tolist(), strict=True):
            sides.setdefault(part, set()).add(defective)
        stratum = {part: (part[0], max(found) + (len(found) > 1)) for part, found in sides.items()}
        units = sorted(sides, key=lambda part: (stratum[part], part))
        place = {unit: index for index, unit in enumerate(units)}
        return statistics.resample([stratum[unit] for unit in units])[:, [place[part] for part in parts]]

    def once(self) -> np.ndarray:
        """(1, N): every image once, for the figures themselves."""
        return np.ones((1, len(self.images)))


def sheet(predictions: Sequence[Prediction]) -> Sheet:
    """Predictions put in an order that does not depend on the order in which they were made.

    Raises EchoError where there are none, one is of an unknown kind, has a true answer that is no option, or comes
    twice.
    """
    if not predictions:
        raise EchoError("there are no predictions to score; run the evaluation first")
    for prediction in predictions:
        where = f"question {prediction.question} of case {prediction.case}"
        if prediction.kind not in KINDS:
            raise EchoError(f"{where} is of the unknown kind {prediction.kind!r}; the kinds are {', '.join(KINDS)}")
        if prediction.answer not in prediction.options:
            raise EchoError(
                f"{where}: the true answer {prediction.answer!r} is none of its options; correct the dataset"
            )
    ordered = sorted(predictions, key=lambda one: (_image(one), one.case, one.question))
    for one, other in itertools.pairwise(ordered):
        if (one.case, one.question) == (other.case, other.question):
            raise EchoError(f"question {one.question} of case {one.case} is answered twice; remove one of the rows")
    images = sorted({_image(prediction) for prediction in ordered})
    place = {image: index for index, image in enumerate(images)}
    return Sheet(tuple(ordered), tuple(images), np.array([place[_image(prediction)] for prediction in ordered]))


def _image(prediction: Prediction) -> tuple[str, str, str, str]:
    return prediction.dataset, prediction.product, prediction.condition, prediction.image


def is_correct(prediction: Prediction) -> bool:
    """Whether the decision is the true option."""
    return prediction.error is None and prediction.parsed == prediction.answer


def p_defect(prediction: Prediction) -> float | None:
    """The probability of the option that says there is a defect, known from the truth; None where there is none.

    That option is the right one for a defective image and the other of two for a normal one.
    """
    if prediction.kind != "Anomaly Detection" or prediction.probabilities is None or prediction.error:
        return None
    if prediction.condition != GOOD:
        return prediction.probabilities.get(prediction.answer)
    others = [letter for letter in prediction.options if letter != prediction.answer]
    return prediction.probabilities.get(others[0]) if len(others) == 1 else None


def strict_array(sheet: Sheet, weights: np.ndarray, by: str = "dataset") -> np.ndarray:
    """(R, D + 1, K + 1): the strict table in percent for each resample; the last row and column are the averages.

    The average of a row is the mean of the kinds it has, the last row the unweighted mean of the rows that have a
    figure. nan where there is no question.
    """
    names, row_of = sheet.rows(by)
    shape = (len(names), 2, len(KINDS))
    cells = np.ravel_multi_index((row_of[sheet.image_of], sheet.defective[sheet.image_of] * 1, sheet.kinds), shape)
    used, column = np.unique(cells, return_inverse=True)
    sums = np.zeros((2, len(weights), int(np.prod(shape))))
    for which, amount in enumerate((np.ones(len(cells)), sheet.correct.astype(float))):
        per_image = np.zeros((len(sheet.images), len(used)))
        np.add.at(per_image, (sheet.image_of, column), amount)
        sums[which][:, used] = weights @ per_image
    asked, correct = sums.reshape(2, len(weights), *shape)
    table = np.full((len(weights), len(names) + 1, len(KINDS) + 1), np.nan)
    table[:, :-1, :-1] = statistics.ratio(correct.sum(axis=2), asked.sum(axis=2))
    sides = statistics.ratio(correct[..., _DETECTION], asked[..., _DETECTION])
    table[:, :-1, _DETECTION] = statistics.mean_of_present(sides, axis=2)
    table[:, :-1, -1] = statistics.mean_of_present(table[:, :-1, :-1], axis=2)
    table[:, -1] = statistics.mean_of_present(table[:, :-1], axis=1)
    return 100 * table


def strict_table(sheet: Sheet, by: str = "dataset") -> Table:
    """{row: {column: percent}}; None where there is no question."""
    return _as_table(sheet, strict_array(sheet, sheet.once(), by)[0], by)


def strict_intervals(sheet: Sheet, by: str = "dataset") -> dict[str, dict[str, list[float] | None]]:
    """{row: {column: [low, high]}}: 95 % intervals in percent of every figure in `strict_table`."""
    low, high = statistics.percentile_interval(strict_array(sheet, sheet.weights(by), by))
    lows, highs = _as_table(sheet, low, by), _as_table(sheet, high, by)
    return {row: {column: pair(lows[row][column], highs[row][column]) for column in lows[row]} for row in lows}


def _as_table(sheet: Sheet, array: np.ndarray, by: str) -> Table:
    rows, columns = [*sheet.rows(by)[0], AVERAGE], [*KINDS, AVERAGE]
    return {
        row: {column: number(array[place, index]) for index, column in enumerate(columns)}
        for place, row in enumerate(rows)
    }


def one_sided(sheet: Sheet, by: str = "dataset") -> dict[str, str]:
    """Rows whose Anomaly Detection figure rests on one side alone, and which one: `normal` or `defective`."""
    names, row_of = sheet.rows(by)
    asked = sheet.image_of[sheet.kinds == _DETECTION]
    found = {}
    for place, name in enumerate(names):
        sides = set(sheet.defective[asked[row_of[asked] == place]].tolist())
        if len(sides) == 1:
            found[name] = "defective" if sides.pop() else "normal"
    return found


def detection_arrays(sheet: Sheet, weights: np.ndarray, members: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Image-level detection from the Anomaly Detection questions of `members` (N,) bool, each figure (R,) from 0 to 1.

    `auroc` is over the images with a P(defect); `recall` (share of defective images called so), `specificity` (of
    normal ones) and `balanced_accuracy` (their mean) are over all decisions, an unread one wrong.
    """
    members = np.ones(len(sheet.images), dtype=bool) if members is None else members
    asked, correct = np.zeros(len(sheet.images)), np.zeros(len(sheet.images))
    of_kind = sheet.kinds == _DETECTION
    np.add.at(asked, sheet.image_of[of_kind], 1.0)
    np.add.at(correct, sheet.image_of[of_kind], sheet.correct[of_kind].astype(float))

    def accuracy(side: np.ndarray) -> np.ndarray:
        chosen = members & side
        return statistics.ratio(weights[:, chosen] @ correct[chosen], weights[:, chosen] @ asked[chosen])

    recall, specificity = accuracy(sheet.defective), accuracy(~sheet.defective)
    scored = members & ~np.isnan(sheet.defect_scores)
    return {
        "auroc": statistics.auroc(weights[:, scored], sheet.defect_scores[scored], sheet.defective[scored]),
        "recall": recall,
        "specificity": specificity,
        "balanced_accuracy": (recall + specificity) / 2,
    }


def detection(sheet: Sheet) -> dict[str, dict[str, Any]]:
    """{row: figures, their intervals and counts} for all images together and for each dataset, from 0 to 1."""
    weights = sheet.weights()
    names, row_of = sheet.rows("dataset")
    asked = np.zeros(len(sheet.images), dtype=bool)
    asked[sheet.image_of[sheet.kinds == _DETECTION]] = True
    table = {}
    for name, members in [(ALL, asked), *((name, asked & (row_of == place)) for place, name in enumerate(names))]:
        if not members.any():
            continue
        figures = {key: number(value[0]) for key, value in detection_arrays(sheet, sheet.once(), members).items()}
        spread = detection_arrays(sheet, weights, members)
        table[name] = {
            "images": int(members.sum()),
            "normal": int((members & ~sheet.defective).sum()),
            "defective": int((members & sheet.defective).sum()),
            "scored": int((members & ~np.isnan(sheet.defect_scores)).sum()),
            **figures,
            "average_precision": average_precision(sheet, members),
            "intervals": {
                key: pair(*map(number, statistics.percentile_interval(value))) for key, value in spread.items()
            },
        }
    return table


def average_precision(sheet: Sheet, members: np.ndarray) -> float | None:
    """scikit-learn's average precision of P(defect) over `members` (N,) bool; None where a side is missing."""
    scored = members & ~np.isnan(sheet.defect_scores)
    truth = sheet.defective[scored]
    if not 0 < truth.sum() < len(truth):
        return None
    from sklearn.metrics import average_precision_score  # takes seconds to import

    return float(average_precision_score(truth, sheet.defect_scores[scored]))


def roc_points(sheet: Sheet) -> list[tuple[float, float]]:
    """(false positive rate, true positive rate) along the threshold on P(defect); empty where a side is missing."""
    scored = ~np.isnan(sheet.defect_scores)
    truth = sheet.defective[scored]
    if not 0 < truth.sum() < len(truth):
        return []
    from sklearn.metrics import roc_curve

    false_positive, true_positive, _ = roc_curve(truth, sheet.defect_scores[scored])
    return list(zip(false_positive.tolist(), true_positive.tolist(), strict=True))


def counts(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Questions, images, and how many answers were no option letter (`unparsed`) or never came (`failed`)."""
    images = {_image(prediction) for prediction in predictions}
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


def number(value: float) -> float | None:
    """A JSON number, None for nan."""
    return None if np.isnan(value) else float(value)


def pair(low: float | None, high: float | None) -> list[float] | None:
    """An interval, None where the figure has none."""
    return None if low is None or high is None else [low, high]


def figures(sheet: Sheet, weights: np.ndarray) -> dict[str, np.ndarray]:
    """What two runs are compared by, each (R,): the `Average` row in percent, and all images' detection from 0 to 1."""
    averages = strict_array(sheet, weights)[:, -1]
    table = {column: averages[:, place] for place, column in enumerate([*KINDS, AVERAGE])}
    found = detection_arrays(sheet, weights)
    chosen = {"AUROC": found["auroc"], "recall": found["recall"], "specificity": found["specificity"]}
    return {AVERAGE: table.pop(AVERAGE), "Anomaly Detection": table.pop("Anomaly Detection"), **chosen, **table}
