"""Decide from P(defect): calibrate it by a temperature, and compare it with a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from echo_ft.errors import EchoError
from echo_ft.inputs import read_json_object


@dataclass(frozen=True)
class Calibration:
    """A temperature and a threshold of P(defect), as `evaluation.score --calibration` fits them."""

    temperature: float = 1.0
    threshold: float = 0.5

    def score(self, probability: float) -> float:
        """Return the calibrated probability."""
        return float(temper(log_odds(np.array(probability)), self.temperature))


def load_calibration(report: Path) -> Calibration:
    """Read the calibration in a report.json: the threshold that keeps the share of false alarms, else the best F1.

    Raises EchoError if the report has no calibration.
    """
    try:
        found = read_json_object(report)["calibration"]
        thresholds = found["thresholds"]
        return Calibration(found["temperature"], thresholds.get("false_alarms", thresholds["f1"])["threshold"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EchoError(
            f"{report} has no calibration; write it with python -m evaluation.score RUN --calibration VALIDATION_RUN"
        ) from error


def log_odds(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """Return the log odds of probabilities of any shape, clipped to finite values."""
    epsilon = np.finfo(float).eps
    return np.asarray(logit(np.clip(probabilities, epsilon, 1 - epsilon)))


def temper(logits: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Return the probabilities of logits of any shape that are divided by a temperature."""
    return np.asarray(expit(logits / temperature))
