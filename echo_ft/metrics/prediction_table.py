"""Predictions in a fixed order with the images and physical parts that they hang on: what all figures are made of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from echo_ft.errors import EchoError
from echo_ft.metrics import intervals
from echo_ft.records import GOOD, QUESTION_TYPES, Prediction


@dataclass(frozen=True)
class PredictionTable:
    """Predictions in a fixed order, with the images that they hang on. Make it with `make_prediction_table`."""

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
        return np.array([QUESTION_TYPES.index(prediction.kind) for prediction in self.predictions])

    @cached_property
    def defect_scores(self) -> np.ndarray:
        """(N,): P(defect) of each image, the mean where it is asked twice; nan where the run has none."""
        found: list[list[float]] = [[] for _ in self.images]
        for image, prediction in zip(self.image_of, self.predictions, strict=True):
            score = p_defect(prediction)
            if score is not None:
                found[image].append(score)
        return np.array([np.mean(scores) if scores else np.nan for scores in found])

    @cached_property
    def parts(self) -> np.ndarray:
        """(N,): which physical part an image shows: dataset, product and group, as `splits.part` has it."""
        group = {image_key(prediction): prediction.group for prediction in self.predictions}
        names = [(image[0], image[1], group[image]) for image in self.images]
        place = {name: index for index, name in enumerate(sorted(set(names)))}
        return np.array([place[name] for name in names])

    def smaller_side(self, members: np.ndarray) -> int:
        """How many parts the smaller side of some images (N,) bool shows, normal or defective, if it has two."""
        sides = [len(np.unique(self.parts[members & side])) for side in (self.defective, ~self.defective)]
        return min(filter(None, sides), default=0)

    def rows(self, by: str) -> tuple[list[str], np.ndarray]:
        """Names of the datasets (`by="dataset"`) or products (`dataset/product`), and (N,) which one an image is of."""
        names = [image[0] if by == "dataset" else f"{image[0]}/{image[1]}" for image in self.images]
        found = sorted(set(names))
        return found, np.array([found.index(name) for name in names])

    def weights(self, by: str = "dataset") -> np.ndarray:
        """(R, N) from statistics.resample over physical parts (`parts`).

        Photographs of one part are no independent draws, so they are drawn together. The strata are, within a row of
        the table, the parts with normal photographs alone, those with defective ones alone, and those with both. Each
        stratum is resampled to its own number of parts, so a side that the row has is in every resample. A part with
        both is drawn whole: were its two sides drawn apart, what they have in common would be lost, and the interval
        of Anomaly Detection, their mean, too narrow.
        """
        sides: dict[tuple[int, int], set[bool]] = {}
        units = list(zip(self.rows(by)[1].tolist(), self.parts.tolist(), strict=True))
        for unit, defective in zip(units, self.defective.tolist(), strict=True):
            sides.setdefault(unit, set()).add(defective)
        stratum = {unit: (unit[0], max(found) + (len(found) > 1)) for unit, found in sides.items()}
        order = sorted(sides, key=lambda unit: (stratum[unit], unit))
        place = {unit: index for index, unit in enumerate(order)}
        return intervals.resample([stratum[unit] for unit in order])[:, [place[unit] for unit in units]]

    def once(self) -> np.ndarray:
        """(1, N): every image once, for the figures themselves."""
        return np.ones((1, len(self.images)))


def make_prediction_table(predictions: Sequence[Prediction]) -> PredictionTable:
    """Predictions put in an order that does not depend on the order in which they were made.

    Raises EchoError where there are none, one is of an unknown kind, has a true answer that is no option, or comes
    twice.
    """
    if not predictions:
        raise EchoError("there are no predictions to score; run the evaluation first")
    for prediction in predictions:
        where = f"question {prediction.question} of case {prediction.case}"
        if prediction.kind not in QUESTION_TYPES:
            raise EchoError(
                f"{where} is of the unknown kind {prediction.kind!r}; the kinds are {', '.join(QUESTION_TYPES)}"
            )
        if prediction.answer not in prediction.options:
            raise EchoError(
                f"{where}: the true answer {prediction.answer!r} is none of its options; correct the dataset"
            )
    ordered = sorted(predictions, key=lambda one: (image_key(one), one.case, one.question))
    for one, other in itertools.pairwise(ordered):
        if (one.case, one.question) == (other.case, other.question):
            raise EchoError(f"question {one.question} of case {one.case} is answered twice; remove one of the rows")
    images = sorted({image_key(prediction) for prediction in ordered})
    place = {image: index for index, image in enumerate(images)}
    return PredictionTable(
        tuple(ordered), tuple(images), np.array([place[image_key(prediction)] for prediction in ordered])
    )


def image_key(prediction: Prediction) -> tuple[str, str, str, str]:
    """(dataset, product, condition, image): which image a prediction is about, as `Sheet.images` has it."""
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
