"""Runs and files of answers, read to be scored and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_ft.errors import EchoError
from echo_ft.files import from_dict
from echo_ft.inference.run_folder import CONTINUED_WITH
from echo_ft.metrics.mmad import Answer, read_answers, to_predictions
from echo_ft.provenance import fingerprint_bytes
from echo_ft.records import Prediction, Rejection


@dataclass(frozen=True)
class Run:
    """A run's folder, or a file of answers, read."""

    folder: Path
    """The folder or the file."""
    predictions: list[Prediction]
    provenance: dict[str, Any]
    """run.json, with the fingerprint of predictions.jsonl; or the answers file and its fingerprint."""
    warnings: list[str]
    rejections: list[Rejection]


def load_run(folder: Path) -> Run:
    """The run in `folder`. Raises EchoError where there is none or it has no prediction."""
    meta, rows = folder / "run.json", folder / "predictions.jsonl"
    if not folder.is_dir():
        raise EchoError(f"there is no folder {folder}; make a run with python -m evaluation.run --output {folder}")
    for path in (meta, rows):
        if not path.is_file():
            raise EchoError(f"{folder} is not a run (it has no {path.name}); make one with python -m evaluation.run")
    try:
        provenance = json.loads(meta.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EchoError(f"{meta} is not JSON ({error}); start the same evaluation.run command again") from error
    if not isinstance(provenance, dict):
        raise EchoError(f"{meta} is not a run's description; start the same evaluation.run command again")
    content = rows.read_bytes()
    predictions, rejections = _predictions(rows, content, complete=provenance.get("complete") is True)
    if not predictions:
        raise EchoError(f"{rows} is empty; start the same evaluation.run command again, it goes on where it stopped")
    warnings = [*_missing(provenance, predictions), *_warned(provenance)]
    provenance["predictions_fingerprint"] = fingerprint_bytes(content)
    return Run(folder, predictions, provenance, warnings, rejections)


def load_answers(path: Path) -> tuple[Run, list[Answer]]:
    """A file in MMAD's format, as a run and as it stands. Raises EchoError where no row of it can be scored."""
    answers = read_answers(path)
    predictions, rejections = to_predictions(answers)
    if not predictions:
        raise EchoError(f"{path}: no row can be scored ({rejections[0].item}: {rejections[0].reason}); check the file")
    provenance = {"answers": str(path), "answers_fingerprint": fingerprint_bytes(path.read_bytes())}
    return Run(path, predictions, provenance, [], rejections), answers


def _missing(provenance: Mapping[str, Any], predictions: Sequence[Prediction]) -> list[str]:
    """A warning where the rows are not all that the run should have, whatever run.json says of being complete."""
    counts = {"cases": len({one.case for one in predictions}), "questions": len(predictions)}
    differing = [
        (count, provenance[name], name) for name, count in counts.items() if provenance.get(name, count) != count
    ]
    done, expected, what = differing[0] if differing else (counts["cases"], provenance.get("cases", "unknown"), "cases")
    if provenance.get("complete") is True and not differing:
        return []
    return [
        f"THE RUN IS NOT COMPLETE: {done} of {expected} {what}; the figures are of these alone; start the same "
        "evaluation.run command again, it goes on where it stopped"
    ]


def _warned(provenance: Mapping[str, Any]) -> list[str]:
    """What the run itself warned of, by any of the processes that wrote it."""
    notes = [provenance, *provenance.get(CONTINUED_WITH, [])]
    return list(dict.fromkeys(str(warning) for note in notes for warning in note.get("warnings", [])))


def _predictions(path: Path, content: bytes, complete: bool) -> tuple[list[Prediction], list[Rejection]]:
    predictions: list[Prediction] = []
    # splitlines would also part a text at U+2028, U+2029 and U+0085, which JSON leaves as they are.
    lines = content.decode("utf-8", errors="replace").removesuffix("\n").split("\n") if content else []
    for number, line in enumerate(lines, start=1):
        try:
            predictions.append(from_dict(Prediction, json.loads(line)))
        except (ValueError, TypeError, AttributeError) as error:
            if not complete and number == len(lines):  # stopped in the middle of a line
                return predictions, [Rejection(f"{path.name}:{number}", "cut off where the run stopped")]
            raise EchoError(
                f"{path}:{number} is not a prediction ({error}); take the line out and start evaluation.run again"
            ) from error
    return predictions, []
