"""A run that is killed at any time resumes from its newest complete checkpoint and continues its W&B run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from echo_ft.errors import EchoError
from echo_ft.files import explain_full_disk
from echo_ft.processes import LOCK_FILE, lock_folder
from echo_ft.training.checkpoints import COMPLETE_MARKER
from echo_ft.training.trainer import PrefixSharingTrainer
from tests.conftest import ROOT, make_dataset
from tests.support.training import BIN, SAME_TRAINING, launch, run_in_process, tiny_options


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))


def kill_after_first_checkpoint(arguments: list[object], output: Path, wait: float) -> None:
    """Start a run, and kill its processes `wait` seconds after its first checkpoint appears."""
    process = subprocess.Popen(
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
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(wait)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


STEPS = [*SAME_TRAINING, "--lora_dropout", 0.2, "--max_steps", 6, "--save_strategy", "steps", "--save_steps", 1]
STEPS += ["--save_total_limit", 2, "--per_device_train_batch_size", 2]


@pytest.fixture(scope="module")
def uninterrupted(dataset, tmp_path_factory):
    """The adapter weights after six steps with a checkpoint at each."""
    output = tmp_path_factory.mktemp("whole") / "reference_extractor"
    launch(*tiny_options("reference_extractor", dataset, output, *STEPS))
    return load_file(output / "adapter_model.safetensors")


# A run takes about three seconds from its first checkpoint to its end. The default tier kills it once, during a save;
# the slow tier kills it at 19 random points too.
RANDOM = random.Random(0)
MOMENTS = [0.0, *(pytest.param(RANDOM.uniform(0, 3), marks=pytest.mark.slow) for _ in range(19))]


@pytest.mark.parametrize("wait", MOMENTS)
def test_a_killed_run_resumes_to_the_adapter_of_an_uninterrupted_run(uninterrupted, dataset, tmp_path, wait):
    resumed = [
        *tiny_options("reference_extractor", dataset, tmp_path / "killed", *STEPS),
        "--resume_from_checkpoint",
        "true",
    ]
    kill_after_first_checkpoint(resumed, tmp_path / "killed", wait)
    launch(*resumed)
    for name, weight in load_file(tmp_path / "killed" / "adapter_model.safetensors").items():
        assert torch.equal(weight, uninterrupted[name]), name


@pytest.mark.parametrize("save", ["_save_optimizer_and_scheduler", "_save"])
def test_a_full_disk_costs_nothing_that_was_saved(uninterrupted, dataset, tmp_path, monkeypatch, save):
    """torch reports a full disk in its own words while it saves the optimizer, and so does safetensors for the
    adapter."""
    output = tmp_path / "full"
    options = tiny_options("reference_extractor", dataset, output, *STEPS)
    errors = {
        "_save_optimizer_and_scheduler": RuntimeError(
            "[enforce fail at inline_container.cc:671] . unexpected pos 1 vs 0"
        ),
        "_save": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    }
    plain = getattr(PrefixSharingTrainer, save)

    def full(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise errors[save]
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PrefixSharingTrainer, save, full)
        with pytest.raises(
            EchoError, match=r"^no space left in .*full; free some space; --resume_from_checkpoint true"
        ):
            run_in_process(*options)
    whole = [path.parent.name for path in sorted(output.glob(f"checkpoint-*/{COMPLETE_MARKER}"))]
    assert whole == ["checkpoint-2", "checkpoint-3"]
    assert not (output / "echo_ft.json").exists()
    run_in_process(*options, "--resume_from_checkpoint", "true")
    for name, weight in load_file(output / "adapter_model.safetensors").items():
        assert torch.equal(weight, uninterrupted[name]), name


def test_a_broken_file_that_is_loaded_is_no_full_disk(tmp_path):
    def load():
        raise RuntimeError("basic_ios::clear: iostream error")

    def save():
        load()

    with pytest.raises(RuntimeError, match="iostream"), explain_full_disk(tmp_path, "free some space"):
        load()
    with pytest.raises(EchoError, match="no space left in"), explain_full_disk(tmp_path, "free some space"):
        save()


def test_an_incomplete_checkpoint_is_skipped_with_a_warning(tmp_path, capsys):
    from echo_ft.training.checkpoints import newest_checkpoint

    for number in (9, 10, 11):
        (tmp_path / f"checkpoint-{number}").mkdir()
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-9" / COMPLETE_MARKER).touch()
    (tmp_path / "checkpoint-10" / COMPLETE_MARKER).touch()
    capsys.readouterr()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert "checkpoint-11: it is incomplete" in capsys.readouterr().err


def test_a_finished_adapter_is_not_replaced(dataset, tmp_path, capsys):
    short = [*SAME_TRAINING, "--max_steps", 1, "--save_strategy", "steps", "--save_steps", 1]
    once = tiny_options("reference_extractor", dataset, tmp_path / "out", *short)
    run_in_process(*once, "--resume_from_checkpoint", "true")
    assert "there is no checkpoint in" in capsys.readouterr().out
    with pytest.raises(EchoError, match="holds a finished adapter, and this run would replace it; choose another"):
        run_in_process(*once)
    with pytest.raises(EchoError, match="holds a finished adapter"):
        elsewhere = tmp_path / "out" / "checkpoint-1"
        run_in_process(*once, "--resume_from_checkpoint", elsewhere.rename(tmp_path / "checkpoint-1"))
    (tmp_path / "checkpoint-1").rename(elsewhere)
    run_in_process(*once, "--dry_run")
    run_in_process(*once, "--resume_from_checkpoint", "true")
    assert "training resumes from" in capsys.readouterr().out
    (tmp_path / "out" / "echo_ft.json").unlink()
    with pytest.raises(EchoError, match="holds checkpoints of an earlier run; resume it with"):
        run_in_process(*once)


def test_a_second_run_into_the_same_folder_is_refused(dataset, tmp_path):
    once = tiny_options("reference_extractor", dataset, tmp_path / "out", *SAME_TRAINING, "--max_steps", 1)
    (tmp_path / "out").mkdir()
    with lock_folder(tmp_path / "out"):
        run_in_process(*once, "--dry_run")
        with pytest.raises(EchoError, match=r"another process is writing to .*out; .* choose another output_dir"):
            run_in_process(*once)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_FILE]
    run_in_process(*once)
    assert (tmp_path / "out" / "echo_ft.json").is_file()
    nowhere = tmp_path / "out" / "echo_ft.json" / "out"
    with pytest.raises(EchoError, match=r"output_dir .*out cannot be created \(Not a directory\); choose another"):
        run_in_process(*tiny_options("reference_extractor", dataset, nowhere, *SAME_TRAINING, "--max_steps", 1))


def test_resuming_from_the_last_step_keeps_the_adapter(dataset, tmp_path):
    """A queue may restart a finished job, or a job that was killed before it saved its adapter."""
    output = tmp_path / "out"
    steps = ["--max_steps", 3, "--save_strategy", "steps", "--save_steps", 1, "--eval_strategy", "no"]
    options = tiny_options("reference_extractor", dataset, output, *steps)
    run_in_process(*options)
    files = [output / name for name in ("adapter_model.safetensors", "echo_ft.json")]
    saved = [file.read_bytes() for file in files]
    for deleted in ([], files):
        for file in deleted:
            file.unlink()
        run_in_process(*options, "--resume_from_checkpoint", "true")
        assert [file.read_bytes() for file in files] == saved
        assert sorted(path.name for path in output.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3)]
        assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 3
    readme = (output / "README.md").read_text()
    assert "# reference_extractor" in readme
    assert "| max_pixels | 28224 |" in readme
    assert "More Information" not in readme


def test_a_resumed_run_continues_its_wandb_run(tmp_path, monkeypatch):
    from echo_ft.tracking import resume_wandb_run

    def run_id(resume: str | None, report_to: str = "wandb") -> str | None:
        monkeypatch.setenv("WANDB_RUN_ID", "")
        monkeypatch.delenv("WANDB_RUN_ID")
        monkeypatch.setenv("WANDB_RESUME", "")
        monkeypatch.delenv("WANDB_RESUME")
        options = {"report_to": [report_to], "process_index": 0, "output_dir": str(tmp_path / "out")}
        resume_wandb_run(SimpleNamespace(**options, resume_from_checkpoint=resume))
        return os.environ.get("WANDB_RUN_ID")

    first = run_id(None)
    assert first
    assert os.environ["WANDB_RESUME"] == "allow"
    assert run_id("true") == run_id(str(tmp_path / "out" / "checkpoint-1")) == first
    assert run_id("false") not in (None, first)
    assert run_id(None, "tensorboard") is None
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    options = {"report_to": ["wandb"], "process_index": 0, "output_dir": str(tmp_path / "out")}
    resume_wandb_run(SimpleNamespace(**options, resume_from_checkpoint="true"))
    assert os.environ["WANDB_RUN_ID"] == "mine"
