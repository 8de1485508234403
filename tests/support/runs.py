"""Run folders like those of `evaluation.run`, made without a model."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echo_ft.files import write_jsonl
from echo_ft.model.adapters import Adapter
from echo_ft.records import GOOD, QUESTION_TYPES, Prediction
from evaluation.run import main as run_main
from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS


def predictions(skill: float, seed: int = 0, images: int = 40) -> list[Prediction]:
    """Answer two questions per image, correctly with probability `skill`. The questions do not depend on `skill`.

    The names contain markup, which pages must escape (`require_self_contained`).
    """
    luck = random.Random(seed)
    rows = []
    for image in range(images):
        condition = GOOD if image % 2 else "<b>crack"
        for kind in QUESTION_TYPES[:2]:
            options = (
                {"A": "Yes.", "B": "No."} if kind == QUESTION_TYPES[0] else {"A": "Bend.", "B": "Hole.", "C": "Crack."}
            )
            answer = "A" if condition != GOOD else "B"
            parsed = answer if luck.random() < skill else {"A": "B", "B": "A"}[answer]
            probabilities = {letter: 0.7 if letter == parsed else 0.3 / (len(options) - 1) for letter in options}
            rows.append(
                Prediction(
                    f"tile-{image}", f"tile-{image}/{kind}", "tiles",
                    f"<b>product {image % 3}", f"part {image}",
                    f"{image}.png", condition, kind, "<b>Is there a defect?</b>",
                    options, answer, parsed, parsed, probabilities,
                )
            )  # fmt: skip
    return rows


def make_run(folder: Path, rows: list[Prediction], **changes: Any) -> Path:
    """Write a complete run with these predictions. `changes` override the values in run.json."""
    write_jsonl(folder / "predictions.jsonl", rows)
    run = {
        "dataset": "nowhere",
        "dataset_fingerprint": "f00d",
        "split": "test",
        "base_model": "<b>echo-tiny",
        "adapters": {},
    }
    run |= {"complete": True, "cases": len({row.case for row in rows}), **changes}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def run_command(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def require_self_contained(page: str) -> None:
    """Fail if a page refers to anything outside itself or contains unescaped text."""
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#)|@import|url\(""", page)
    assert not re.search("<b>(product|crack|echo-tiny|Is there)", page), "the text of a run must be escaped"


def run_evaluation(dataset, output, *more) -> None:
    """Run `evaluation.run` in this process, with echo-tiny and short outputs. Fails if a prediction fails."""
    options = {"dataset": dataset, "output": output, "model_name_or_path": ECHO_TINY, "dtype": "float32"}
    options |= {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "max_new_tokens": 6, "batch_size": 2}
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    assert run_main([*given, *map(str, more)]) == 0


def make_report(
    path: Path, found: Mapping[str, Adapter], changes: dict[str, Any] | None = None, **parts: dict[str, Any]
) -> Path:
    """Write a report.json of a run with these adapters, with only the fields that exports and inspectors read.

    `changes` override the provenance, and `parts` the other parts of the report.
    """
    provenance = {
        "split": "test", "dataset": "data/line", "questions": 100, "cases": 15, "routing": "full",
        "reference": "retrieved", "references": 1, "knowledge": "all", "reasoning": "off", "corruption": None,
        "answer": "logits", "option_order": "given", "max_new_tokens": 48,
        "base_fingerprint": next(iter(found.values())).card.base_fingerprint,
        "adapters": {role: {"fingerprint": one.fingerprint} for role, one in found.items()},
    }  # fmt: skip
    report = {
        "provenance": provenance | (changes or {}),
        "counts": {"images": 10},
        "kinds": {"Anomaly Detection": {"questions": 10}, "Object Analysis": {"questions": 60}},
        "tables": {"strict": {"Average": {"Anomaly Detection": 81.25, "Object Analysis": None, "Average": 70.0}}},
        "intervals": {"strict": {"Average": {"Anomaly Detection": [75.04, 88.96], "Average": None}}},
        "detection": {"All": {"auroc": 0.9125, "recall": None, "intervals": {"auroc": [0.85, 0.95]}}},
        "calibration": {"temperature": 2.0, "thresholds": {"f1": {"threshold": 0.4}}},
        "warnings": ["ten parts are few"],
    }
    path.write_text(json.dumps(report | parts))
    return path
