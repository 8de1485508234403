"""Decide from P(defect): calibrate it with a temperature, and compare it with a threshold."""

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
    """Read temperature and threshold from a report.json.

    The threshold is that of the gate, if there is one, because no other threshold is judged on parts. Otherwise, it is
    the threshold that limits false alarms, or else the one with the best F1. Raises EchoError if the report has
    neither.
    """
    try:
        content = read_json_object(report)
        found, gate = content["calibration"], (content.get("gate") or {}).get("threshold")
        temperature = found["temperature"] if found else 1.0
        if gate is not None:
            # If a gate flags nothing, its threshold is above 1; `score` would clip it to 1.
            return Calibration(temperature, gate if gate > 1 else Calibration(temperature).score(gate))
        thresholds = found["thresholds"]
        return Calibration(temperature, thresholds.get("false_alarms", thresholds["f1"])["threshold"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EchoError(
            f"{report} has neither a calibration nor a gate; write one with python -m evaluation.score RUN "
            "--calibration VALIDATION_RUN, or with --gate"
        ) from error


def log_odds(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """Return the log odds of probabilities of any shape, clipped to finite values."""
    epsilon = np.finfo(float).eps
    return np.asarray(logit(np.clip(probabilities, epsilon, 1 - epsilon)))


def temper(logits: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Divide logits of any shape by a temperature, and return their probabilities."""
    return np.asarray(expit(logits / temperature))
