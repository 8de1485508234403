"""Figures that the report and comparison pages draw from predictions: reliability, confusion, position bias."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from echo_ft.experts.option_order import LetterBias, PermutedPrediction, position_bias
from echo_ft.metrics.calibration import expected_calibration_error, reliability
from echo_ft.metrics.prediction_table import PredictionTable, is_correct
from echo_ft.records import GOOD, Prediction

DETECTION, CLASSIFICATION = "Anomaly Detection", "Defect Classification"
NO_OPTION = "unparsed or failed"


@dataclass(frozen=True)
class Confusion:
    """Counts of the answers for each true condition, for one product or for all."""

    title: str
    said: tuple[str, ...]
    """The columns."""
    rows: Sequence[tuple[str, Sequence[int]]]
    """Each true condition and its count per column."""

    def is_right(self, condition: str, column: int) -> bool:
        """Return whether this column is the correct answer for a condition."""
        return self.said[column] in (condition, "no defect" if condition == GOOD else "defect")


def reliability_curve(table: PredictionTable) -> tuple[float, list[tuple[float, float, int]]] | None:
    """Return the expected calibration error of P(defect) and the bins of its `reliability`; None without P(defect)."""
    scored = ~np.isnan(table.defect_scores)
    if not scored.any():
        return None
    bins = reliability(table.defect_scores[scored], table.defective[scored])
    return expected_calibration_error(bins), bins


def confusions(predictions: Sequence[Prediction]) -> list[Confusion]:
    """Return tables of the answers for each true condition: whether there is a defect, and which one.

    Classification has one table per product, because products have different defects.
    """
    detected: defaultdict[str, Counter[str]] = defaultdict(Counter)
    classified: defaultdict[str, defaultdict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for one in predictions:
        if one.kind == DETECTION:
            detected[one.condition][_detection(one)] += 1
        elif one.kind == CLASSIFICATION and one.answer in one.options:
            said = NO_OPTION if one.error or one.parsed is None else one.options[one.parsed]
            classified[f"{one.dataset}/{one.product}"][one.options[one.answer]][said] += 1
    tables = [_confusion("Is there a defect?", detected, ("no defect", "defect", NO_OPTION))] if detected else []
    for product, counts in sorted(classified.items()):
        names = sorted({*counts, *(said for found in counts.values() for said in found)} - {NO_OPTION})
        tables.append(_confusion(f"Which defect? {product}", counts, (*names, NO_OPTION)))
    return tables


def _detection(one: Prediction) -> str:
    if one.error or one.parsed is None:
        return NO_OPTION
    return "defect" if is_correct(one) == (one.condition != GOOD) else "no defect"


def _confusion(title: str, counts: Mapping[str, Counter[str]], said: tuple[str, ...]) -> Confusion:
    """Make a table; the last column, for answers without an option, is left out if it is empty."""
    columns = said if any(found[NO_OPTION] for found in counts.values()) else said[:-1]
    order = sorted(counts, key=lambda condition: (condition != GOOD, condition))
    return Confusion(title, columns, [(name, [counts[name][one] for one in columns]) for name in order])


def letter_bias(predictions: Sequence[Prediction]) -> list[LetterBias]:
    """Return how often each letter was chosen, and how often it was correct, in the order of the given options."""
    return position_bias(PermutedPrediction(**vars(one)) for one in predictions if one.options)
