"""Decide from P(defect) as a scored run does: with its options, its temperature and its threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import PipelineConfig
from echo_ft.inputs import read_json_object
from echo_ft.model.loading import DTYPES, checkpoint_dtype
from echo_ft.provenance import same_weights
from echo_ft.terminal import LOGGER

if TYPE_CHECKING:
    from echo_ft.model.adapters import Adapter, AdapterCard

PASSED = "pass"
"""The verdict of a gate that passed, as in `echo_ft.gate.certificate`, which this package may not import."""


@dataclass(frozen=True)
class Calibration:
    """A temperature and a threshold of P(defect), as `evaluation.score --calibration` fits them."""

    temperature: float = 1.0
    threshold: float = 0.5
    """The smallest calibrated P(defect) that is flagged."""
    raw_threshold: float | None = None
    """The smallest P(defect) without calibration that is flagged, if a gate judged it. It replaces `threshold`.

    A low temperature turns many probabilities into exactly 1, so the calibrated ones cannot decide as the gate did.
    """

    def score(self, probability: float) -> float:
        """Return the calibrated probability."""
        return float(temper(log_odds(np.array(probability)), self.temperature))

    def flags(self, probability: float) -> bool:
        """Return whether an image with this P(defect), without calibration, is flagged as defective."""
        if self.raw_threshold is not None:
            return probability >= self.raw_threshold
        return self.score(probability) >= self.threshold


def load_calibration(report: Path) -> Calibration:
    """Read temperature and threshold from a report.json.

    The threshold is that of the gate, if there is one, because no other threshold is judged on parts. Otherwise, it is
    the threshold that limits false alarms, or else the one with the best F1. Warns if the gate did not pass. Raises
    EchoError if the report has neither.
    """
    try:
        content = read_json_object(report)
        found, judged = content["calibration"], content.get("gate") or {}
        temperature, gate = found["temperature"] if found else 1.0, judged.get("threshold")
        if gate is not None:
            verdict, sentence = judged["verdict"], judged["sentence"]
            if verdict != PASSED:
                LOGGER.warning(
                    f"{report} gives the threshold of a gate that did not pass ({sentence}); do not rely on it before "
                    "a run passes"
                )
            # If a gate flags nothing, its threshold is above 1; `score` would clip it to 1.
            return Calibration(temperature, gate if gate > 1 else Calibration(temperature).score(gate), gate)
        thresholds = found["thresholds"]
        return Calibration(temperature, thresholds.get("false_alarms", thresholds["f1"])["threshold"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EchoError(
            f"{report} has neither a calibration nor a gate; write one with python -m evaluation.score RUN "
            "--calibration VALIDATION_RUN, or with --gate"
        ) from error


def with_threshold(calibration: Calibration | None, threshold: float | None) -> Calibration:
    """Replace the threshold of a calibration, if there is one. Raises EchoError if it is not a probability."""
    if threshold is None:
        return calibration or Calibration()
    if not 0 <= threshold <= 1:
        raise EchoError(f"threshold is {threshold:g}; set a probability from 0 to 1")
    return replace(calibration or Calibration(), threshold=threshold, raw_threshold=None)


@dataclass(frozen=True)
class Measurement:
    """The facts in a report about the pipeline that it measured."""

    report: Mapping[str, Any]
    pipeline: PipelineConfig
    max_new_tokens: int
    k: int | None
    """The number of references per image; None means all references in the dataset."""
    calibration: Calibration | None
    dtype: str | None = None
    """The data type of the run, one of DTYPES; None for a run on a server, and in reports of older versions."""


def read_measurement(path: Path, adapters: Mapping[str, Adapter], calibrated: bool = False) -> Measurement:
    """Read a report.json and check that it measures the `adapters`. If `calibrated`, it must have a threshold.

    Raises EchoError if it is not a run's report, if the run used different adapters or a different base model, or
    if an inspector cannot repeat it. An inspector cannot repeat a run with corrupted queries or random references.
    """
    try:
        report = read_json_object(path)
        run = report["provenance"]
        measured = {role: one["fingerprint"] for role, one in run["adapters"].items()}
        pipeline = PipelineConfig(**{option.name: run[option.name] for option in fields(PipelineConfig)})
        tokens, k, base = int(run["max_new_tokens"]), run["references"], run["base_fingerprint"]
        gate, corruption = report.get("gate") or {}, run["corruption"]
        calibrated = calibrated or bool(report["calibration"]) or gate.get("threshold") is not None
        dtype = run.get("dtype")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"its dtype is {dtype!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EchoError(
            f"{path} is not a run's report ({type(error).__name__}: {error}); write it with python -m "
            "evaluation.score RUN"
        ) from error
    for role, adapter in adapters.items():
        if measured.get(role) != adapter.fingerprint:
            raise EchoError(
                f"{path} measures a different {role} adapter than {adapter.path} ({measured.get(role)}, not "
                f"{adapter.fingerprint}); run and score these adapters"
            )
        # The report of a run on a server has no fingerprint of the weights.
        if base is not None and not same_weights(base, adapter.card.base_fingerprint):
            raise EchoError(f"{path} measures a different base model ({base}); run and score these adapters")
    if corruption is not None or pipeline.reference == "random":
        what = "corrupted images" if corruption is not None else "random references"
        raise EchoError(f"{path} measures {what}, which an inspector does not use; pass the report of another run")
    return Measurement(report, pipeline, tokens, k, load_calibration(path) if calibrated else None, dtype)


def describe_decision(measurement: Measurement | None) -> str:
    """Say from which P(defect) on a bundle with this measurement flags images, and where the threshold comes from."""
    if measurement is None or measurement.calibration is None:
        why = "no report was given" if measurement is None else "the report has neither a calibration nor a gate"
        return f"P(defect) as the model states it, with a threshold of 0.5, because {why}"
    one, report = measurement.calibration, measurement.report
    if one.raw_threshold is not None:
        threshold = f"{one.raw_threshold:.6g} before the temperature, which a gate judged. Its verdict is "
        threshold += report["gate"]["sentence"]
    else:
        limited = "false_alarms" in report["calibration"]["thresholds"]
        chosen = "limits the false alarms" if limited else "has the best F1"
        threshold = f"{one.threshold:.4g}, which {chosen} on the validation run"
    return f"P(defect) at temperature {one.temperature:.4g}, with a threshold of {threshold}"


def measured_dtype(dtype: str, measurement: Measurement | None, card: AdapterCard) -> str:
    """Return the data type in which to load the model with this `card`: that of the report if `dtype` is `auto`.

    Warns if the report measures another data type than the given one.
    """
    if measurement is None or measurement.dtype is None:
        return dtype
    if dtype == "auto":
        return measurement.dtype
    measured = measurement.dtype
    if measured == "auto":
        measured = checkpoint_dtype(card.base_model, card.base_revision)
    if dtype != measured:
        LOGGER.warning(
            f"the report measures {measured}, but the model is loaded in {dtype}, which may change answers near the "
            f"threshold; leave out the dtype, or run and score with --dtype {dtype}"
        )
    return dtype


def log_odds(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """Return the log odds of probabilities of any shape, clipped to finite values."""
    epsilon = np.finfo(float).eps
    return np.asarray(logit(np.clip(probabilities, epsilon, 1 - epsilon)))


def temper(logits: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Divide logits of any shape by a temperature, and return their probabilities."""
    return np.asarray(expit(logits / temperature))
