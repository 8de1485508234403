"""Run folders of a dataset's test split with scripted answers, made by the pipeline without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echo_ft.data.dataset import load_cases, load_dataset
from echo_ft.experts.pipeline import PipelineConfig, run_cases
from echo_ft.files import write_jsonl
from tests.support.backends import ScriptedBackend

WORDS = {
    "best": "1",
    "normal": "An even ramp.",
    "guide": "dent: look for a black square.",
    "reason": "A black square is at the top. Conclude: Yes.",
    "decide": "B",
}
"""What the roles say by default."""


def write_scripted_run(folder: Path, dataset: Path, words: Mapping[str, str] = WORDS, **changes: Any) -> Path:
    """Write a complete run in which each role says the same about every case. `changes` override run.json."""
    loaded = load_dataset(dataset)
    reference = changes.get("reference", "retrieved")
    cases = load_cases(loaded, changes.get("split", "test"), reference, changes.get("references"))
    outcomes = run_cases(cases, ScriptedBackend(dict(words)), PipelineConfig(reference=reference))
    write_jsonl(folder / "predictions.jsonl", [row for outcome in outcomes for row in outcome.predictions])
    write_jsonl(folder / "traces.jsonl", [row for outcome in outcomes for row in outcome.traces])
    run = {"dataset": str(dataset), "dataset_fingerprint": loaded.fingerprint, "split": "test", "adapters": {}}
    run |= {"base_model": "echo-tiny", "complete": True, "cases": len(cases)} | changes
    (folder / "run.json").write_text(json.dumps(run))
    return folder
