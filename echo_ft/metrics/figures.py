"""How figures are written to a report: the type of a table, JSON numbers, and when a figure has an interval."""

from __future__ import annotations

import numpy as np

from echo_ft.metrics.intervals import percentile_interval
from echo_ft.records import QUESTION_TYPES

Table = dict[str, dict[str, float | None]]
"""{row: {column: percent}}: datasets and `Average` by MMAD's seven kinds and `Average`; None where there is nothing."""


AVERAGE = "Average"


DETECTION = QUESTION_TYPES.index("Anomaly Detection")


def side_count(figure: str) -> int:
    """Of how many shares, of normal and of defective images, a figure is the mean."""
    return 2 if figure in (QUESTION_TYPES[DETECTION], "balanced_accuracy") else 1


MIN_PARTS = 5
"""Parts that a figure rests on at least to have an interval."""


def number(value: float) -> float | None:
    """A JSON number, None for nan."""
    return None if np.isnan(value) else float(value)


def pair(low: float | None, high: float | None) -> list[float] | None:
    """An interval, None where the figure has none."""
    return None if low is None or high is None else [low, high]


def figure_interval(values: np.ndarray, units: int, figure: str = "", difference: bool = False) -> list[float] | None:
    """The interval of a figure (R,) that rests on so many units, or of a difference of two.

    `figure` is its name where it is one of `figures` or of `detection`; any other is a share from 0 to 1. None where it
    never exists, and where it rests on fewer than FEW units: so few have too little to draw from.
    """
    if units < MIN_PARTS:
        return None
    top = 100.0 if figure in (*QUESTION_TYPES, AVERAGE) else 1.0
    bounds = (-top if difference else 0.0, top)
    return pair(*map(number, percentile_interval(values, units, bounds, sides=side_count(figure))))
