"""Predictions as aligned arrays in a fixed order, with their images and physical parts: the input of every metric.

Shapes: Q predictions, N images, R bootstrap resamples.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from echo_ft.errors import EchoError
from echo_ft.metrics import intervals
from echo_ft.records import GOOD, LETTERS, QUESTION_TYPES, UNLABELLED, Prediction

MISSPELT = 0.9
"""The difflib similarity above which a question type counts as a misspelling of another. MMAD's own types reach 0.76
with each other."""

SUMMARY_ROWS = ("All", "Average")
"""Rows of tables by dataset that cover all datasets: `detection.ALL_IMAGES` and `metric_values.AVERAGE`."""


@dataclass(frozen=True)
class PredictionTable:
    """Predictions in a fixed order and the images that they refer to. Create it with `make_prediction_table`."""

    predictions: tuple[Prediction, ...]
    images: tuple[tuple[str, str, str, str], ...]
    """N sorted tuples (dataset, product, condition, image)."""
    image_index: np.ndarray
    """(Q,): index into `images` of each prediction."""

    @cached_property
    def defective(self) -> np.ndarray:
        """(N,) bool: whether each image shows a defect."""
        return np.array([condition != GOOD for _, _, condition, _ in self.images])

    @cached_property
    def correct(self) -> np.ndarray:
        """(Q,) bool: whether each answer is correct. Unparsed and failed answers are incorrect."""
        return np.array([is_correct(prediction) for prediction in self.predictions])

    @cached_property
    def type_index(self) -> np.ndarray:
        """(Q,): index into QUESTION_TYPES of each prediction; -1 for a type that is not one of MMAD's."""
        index = {kind: place for place, kind in enumerate(QUESTION_TYPES)}
        return np.array([index.get(prediction.kind, -1) for prediction in self.predictions])

    @cached_property
    def other_types(self) -> tuple[str, ...]:
        """The question types that are not part of MMAD, sorted. They are scored separately, outside MMAD's tables."""
        return tuple(sorted({prediction.kind for prediction in self.predictions} - {*QUESTION_TYPES}))

    @cached_property
    def other_type_index(self) -> np.ndarray:
        """(Q,): index into `other_types` of each prediction; -1 for MMAD's types."""
        index = {kind: place for place, kind in enumerate(self.other_types)}
        return np.array([index.get(prediction.kind, -1) for prediction in self.predictions])

    @cached_property
    def defect_scores(self) -> np.ndarray:
        """(N,): P(defect) of each image, averaged if several questions ask for it; nan if it is unknown."""
        scores_by_image: list[list[float]] = [[] for _ in self.images]
        for image, prediction in zip(self.image_index, self.predictions, strict=True):
            score = p_defect(prediction)
            if score is not None:
                scores_by_image[image].append(score)
        return np.array([np.mean(scores) if scores else np.nan for scores in scores_by_image])

    @cached_property
    def scored(self) -> np.ndarray:
        """(N,) bool: whether each image has a P(defect)."""
        return ~np.isnan(self.defect_scores)

    @cached_property
    def parts(self) -> list[tuple[str, str, str]]:
        """The part that each image shows. Dataset, product and group identify a part, as in `splits.part_key`."""
        group = {image_key(prediction): prediction.group for prediction in self.predictions}
        return [(image[0], image[1], group[image]) for image in self.images]

    @cached_property
    def part_index(self) -> np.ndarray:
        """(N,): index among the sorted `parts` of the part that each image shows."""
        index = {part: place for place, part in enumerate(sorted(set(self.parts)))}
        return np.array([index[part] for part in self.parts])

    def smaller_class_parts(self, members: np.ndarray) -> int:
        """Count the parts of the smaller class, normal or defective, among the images `members`, (N,) bool.

        If only one class is present, its parts are counted.
        """
        counts = [len(np.unique(self.part_index[members & of_class])) for of_class in (self.defective, ~self.defective)]
        return min(filter(None, counts), default=0)

    def group_images(self, by: str) -> tuple[list[str], np.ndarray]:
        """Sorted names of datasets (`by="dataset"`) or `dataset/product`, and (N,) the index of each image's name.

        A dataset with the name of one of SUMMARY_ROWS is called `dataset All`, for example.
        """
        datasets = {image[0]: f"dataset {image[0]}" if image[0] in SUMMARY_ROWS else image[0] for image in self.images}
        names = [datasets[image[0]] if by == "dataset" else f"{image[0]}/{image[1]}" for image in self.images]
        found = sorted(set(names))
        return found, np.array([found.index(name) for name in names])

    def weights(self, by: str = "dataset") -> np.ndarray:
        """(R, N): how often each resample of the physical parts draws each image; see `intervals.resample`.

        Images of one part are not independent, so they are drawn together. Each row of the table has three strata:
        parts with only normal images, parts with only defective images, and parts with both. Every stratum is
        resampled to its own number of parts, so each class of a row occurs in every resample. A part with images of
        both classes is drawn as a whole. Drawing its classes separately would lose their correlation. The interval of
        Anomaly Detection, the mean of both classes, would then be too narrow.
        """
        classes: dict[tuple[int, int], set[bool]] = {}
        units = list(zip(self.group_images(by)[1].tolist(), self.part_index.tolist(), strict=True))
        for unit, defective in zip(units, self.defective.tolist(), strict=True):
            classes.setdefault(unit, set()).add(defective)
        stratum = {unit: (unit[0], max(found) + (len(found) > 1)) for unit, found in classes.items()}
        order = sorted(classes, key=lambda unit: (stratum[unit], unit))
        place = {unit: index for index, unit in enumerate(order)}
        return intervals.resample([stratum[unit] for unit in order])[:, [place[unit] for unit in units]]

    def unit_weights(self) -> np.ndarray:
        """(1, N): weights that count every image once, for the metrics themselves."""
        return np.ones((1, len(self.images)))


def make_prediction_table(predictions: Sequence[Prediction]) -> PredictionTable:
    """Sort predictions into a table that does not depend on the order in which they were made.

    Raises EchoError if there are no predictions, if one of MMAD's question types is misspelt, if a true answer is not
    one of the options, or if a question is answered twice.
    """
    if not predictions:
        raise EchoError("there are no predictions to score; run the evaluation first")
    for prediction in predictions:
        where = f"question {prediction.question} of case {prediction.case}"
        meant = misspelt_type(prediction.kind)
        if meant:
            raise EchoError(f"{where} has the type {prediction.kind!r}; did you mean {meant!r}?")
        if prediction.answer not in prediction.options:
            raise EchoError(
                f"{where}: the true answer {prediction.answer!r} is not one of its options; correct the dataset"
            )
    return arrange_predictions(predictions)


def arrange_predictions(predictions: Sequence[Prediction]) -> PredictionTable:
    """Sort predictions of any question type into a table. Raises EchoError if a question is answered twice."""
    ordered = sorted(predictions, key=lambda one: (image_key(one), one.case, one.question))
    for one, other in itertools.pairwise(ordered):
        if (one.case, one.question) == (other.case, other.question):
            raise EchoError(f"question {one.question} of case {one.case} is answered twice; remove one of the rows")
    images = sorted({image_key(prediction) for prediction in ordered})
    place = {image: index for index, image in enumerate(images)}
    return PredictionTable(
        tuple(ordered), tuple(images), np.array([place[image_key(prediction)] for prediction in ordered])
    )


@lru_cache  # a run has many questions, but few question types
def misspelt_type(kind: str) -> str | None:
    """Return the MMAD type that `kind` seems to misspell; None if it is spelt correctly or resembles none."""
    folded = {known.casefold(): known for known in QUESTION_TYPES}
    near = difflib.get_close_matches(kind.casefold(), folded, n=1, cutoff=MISSPELT)
    return folded[near[0]] if near and kind not in QUESTION_TYPES else None


def image_key(prediction: Prediction) -> tuple[str, str, str, str]:
    """Return the image of a prediction as (dataset, product, condition, image), as in `PredictionTable.images`."""
    return prediction.dataset, prediction.product, prediction.condition, prediction.image


def is_correct(prediction: Prediction) -> bool:
    """Return whether the parsed answer is the true option."""
    return prediction.error is None and prediction.parsed == prediction.answer


def p_defect(prediction: Prediction) -> float | None:
    """Return the probability of the option that states a defect; None if it is unknown.

    The true answer identifies this option: the correct one for a defective image, and the other one for a normal image.
    With more than two options, the other one is not known for a normal image. P(defect) is then unknown for all images,
    because the metrics count a normal image without one as flagged. For an unlabelled image, it is the first option, as
    `open_questions` writes it.
    """
    if prediction.kind != "Anomaly Detection" or prediction.probabilities is None or prediction.error:
        return None
    if prediction.condition == UNLABELLED:
        return prediction.probabilities.get(LETTERS[0])
    if len(prediction.options) > 2:
        return None
    if prediction.condition != GOOD:
        return prediction.probabilities.get(prediction.answer)
    others = [letter for letter in prediction.options if letter != prediction.answer]
    return prediction.probabilities.get(others[0]) if others else None
