"""Stopped and gone on with: killed runs, half-written checkpoints, W&B's run. (Beside test_sft.py for two workers.)"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, make_dataset
from tests.test_sft import ALIKE, BIN, launch, tiny


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))


def killed_after_a_checkpoint(arguments: list[object], output: Path, wait: float) -> None:
    """Start a run and kill its processes `wait` seconds after its first checkpoint is there."""
    done = subprocess.Popen(
        [str(BIN / "accelerate"), "launch", "--quiet", "train/sft.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not list(output.glob("checkpoint-*")):
            assert done.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(wait)
    finally:
        os.killpg(done.pid, signal.SIGKILL)
        done.wait()


# The default run kills once, at the moment of a save; the slow ones anywhere.
@pytest.mark.parametrize("wait", [0.0, *(pytest.param(0.4 * n, marks=pytest.mark.slow) for n in range(1, 8))])
def test_a_killed_run_goes_on_to_the_adapter_of_an_uninterrupted_one(dataset, tmp_path, wait):
    steps = [*ALIKE, "--lora_dropout", 0.2, "--max_steps", 6, "--save_strategy", "steps", "--save_steps", 1]
    alike = [*steps, "--save_total_limit", 2, "--per_device_train_batch_size", 2]
    launch(*tiny("reference_extractor", dataset, tmp_path / "whole", *alike))
    resumed = [*tiny("reference_extractor", dataset, tmp_path / "killed", *alike), "--resume_from_checkpoint", "true"]
    killed_after_a_checkpoint(resumed, tmp_path / "killed", wait)
    launch(*resumed)
    expected = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    for name, weight in load_file(tmp_path / "killed" / "adapter_model.safetensors").items():
        assert torch.equal(weight, expected[name]), name


def test_a_half_written_checkpoint_is_passed_over_with_a_word(tmp_path, capsys):
    from echo_ft.checkpoints import WHOLE, newest_checkpoint

    for number in (9, 10, 11):
        (tmp_path / f"checkpoint-{number}").mkdir()
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-9" / WHOLE).touch()
    (tmp_path / "checkpoint-10" / WHOLE).touch()
    capsys.readouterr()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert "checkpoint-11 is half written and passed over" in capsys.readouterr().out


def test_a_resumed_run_goes_on_with_its_wandb_run(dataset, tmp_path, monkeypatch):
    output = tmp_path / "reference_extractor"
    offline = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    steps = [*ALIKE, "--max_steps", 1, "--save_strategy", "steps", "--save_steps", 1]
    options = [*tiny("reference_extractor", dataset, output, *steps), "--report_to", "wandb"]
    launch(*options, **offline)
    launch(*options, "--max_steps", 2, "--resume_from_checkpoint", "true", **offline)
    runs = {path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2 and len(runs) == 1
    launch(*options, **offline)  # anew
    assert len({path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")}) == 2
