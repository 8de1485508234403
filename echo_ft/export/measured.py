"""The measured results of an exported pipeline, from the report.json of `evaluation.score`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import PipelineConfig
from echo_ft.inference.decision import Calibration, load_calibration
from echo_ft.inputs import read_json_object
from echo_ft.model.adapters import Adapter


@dataclass(frozen=True)
class Measurement:
    """The facts in a report about the pipeline that it measured."""

    report: Mapping[str, Any]
    pipeline: PipelineConfig
    max_new_tokens: int
    k: int | None
    """The number of references per image; None means all references in the dataset."""
    calibration: Calibration | None


def read_measurement(path: Path, adapters: Mapping[str, Adapter]) -> Measurement:
    """Read a report.json and check that it measures the `adapters`.

    Raises EchoError if it is not the report of a run, if the run used different adapters or a different base model, or
    if an inspector cannot repeat it. An inspector cannot repeat a run with corrupted queries or random references.
    """
    try:
        report = read_json_object(path)
        run = report["provenance"]
        measured = {role: one["fingerprint"] for role, one in run["adapters"].items()}
        pipeline = PipelineConfig(**{option.name: run[option.name] for option in fields(PipelineConfig)})
        tokens, k, base = int(run["max_new_tokens"]), run["references"], run["base_fingerprint"]
        gate, corruption = report.get("gate") or {}, run["corruption"]
        calibrated = bool(report["calibration"]) or gate.get("threshold") is not None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EchoError(
            f"{path} is not the report of a run ({type(error).__name__}: {error}); write it with python -m "
            "evaluation.score RUN"
        ) from error
    for role, adapter in adapters.items():
        if measured.get(role) != adapter.fingerprint:
            raise EchoError(
                f"{path} measures another adapter of {role} than {adapter.path} ({measured.get(role)}, not "
                f"{adapter.fingerprint}); run and score these adapters"
            )
        # The report of a run on a server has no fingerprint of the weights.
        if base is not None and base != adapter.card.base_fingerprint:
            raise EchoError(f"{path} measures another base model ({base}); run and score these adapters")
    if corruption is not None or pipeline.reference == "random":
        what = "corrupted images" if corruption is not None else "random references"
        raise EchoError(f"{path} measures {what}, which an inspector does not use; pass the report of another run")
    return Measurement(report, pipeline, tokens, k, load_calibration(path) if calibrated else None)
