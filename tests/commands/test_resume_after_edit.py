"""A stopped run resumes after a change to the code, unless the change could alter its answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from echo_ft.inference.run_folder import PREDICTIONS
from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS, ROOT, make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), train=1, validation=1, test=3)


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    """A copy of the code that a test may edit."""
    folder = tmp_path_factory.mktemp("code")
    for name in ("echo_ft", "evaluation"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def evaluate(code: Path, dataset: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """The real command, run from the copy of the code."""
    values = {"dataset": dataset, "output": output, "model_name_or_path": ECHO_TINY, "dtype": "float32"}
    values |= {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "max_new_tokens": 4, "batch_size": 1}
    options = [str(part) for name, value in values.items() for part in (f"--{name}", value)]
    return subprocess.run(
        [sys.executable, "-m", "evaluation.run", *options],
        cwd=code,
        env={**os.environ, "PYTHONPATH": str(code), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def stop_early(output: Path) -> bytes:
    """Leave the run as if it had been stopped in its last case; returns the predictions it had."""
    predictions = (output / PREDICTIONS).read_bytes()
    lines = predictions.splitlines(keepends=True)
    (output / PREDICTIONS).write_bytes(b"".join(lines[:-1]))
    return predictions


def edit(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8") + "\n# an edit\n", encoding="utf-8")


def test_only_edits_of_answering_modules_stop_a_run_from_resuming(code, dataset, tmp_path):
    first = evaluate(code, dataset, tmp_path / "run")
    assert first.returncode == 0, first.stderr
    before = stop_early(tmp_path / "run")
    for name in ("retrieval/index.py", "metrics/strict.py", "images/synthetic_defects.py", "training/trainer.py"):
        edit(code / "echo_ft" / name)
    resumed = evaluate(code, dataset, tmp_path / "run")
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "run" / PREDICTIONS).read_bytes() == before

    stop_early(tmp_path / "run")
    edit(code / "echo_ft" / "experts" / "pipeline.py")
    refused = evaluate(code, dataset, tmp_path / "run")
    assert refused.returncode == 2
    assert "code" in refused.stderr
    assert "Traceback" not in refused.stderr
