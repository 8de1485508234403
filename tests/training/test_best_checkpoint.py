"""The adapter with the best evaluation is kept, training stops early, and contradictory options are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from echo_ft.errors import EchoError
from echo_ft.provenance import seal_folder
from echo_ft.training.config import TrainingConfig
from tests.conftest import make_dataset
from tests.support.training import BEST_OF_SIX, logged_state, run_in_process, tiny_options

STOPPING = [*BEST_OF_SIX, "--early_stopping_patience", 2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"), train=4)


def same_adapter(first, second):
    weights = load_file(second / "adapter_model.safetensors")
    return all(
        torch.equal(weight, weights[name]) for name, weight in load_file(first / "adapter_model.safetensors").items()
    )


@pytest.fixture(scope="module")
def stopped(dataset, tmp_path_factory):
    output = tmp_path_factory.mktemp("stopped") / "decision_maker"
    run_in_process(*tiny_options("decision_maker", dataset, output, *STOPPING))
    return output


def test_training_stops_early_and_keeps_the_best_adapter(stopped):
    losses = [entry["eval_loss"] for entry in logged_state(stopped)["log_history"] if "eval_loss" in entry]
    best = losses.index(min(losses)) + 1
    assert len(losses) == logged_state(stopped)["global_step"] == best + 2 < 6
    assert json.loads((stopped / "echo_ft.json").read_text())["best_step"] == best
    assert f"| best_step | {best} |" in (stopped / "README.md").read_text()
    assert same_adapter(stopped, stopped / f"checkpoint-{best}")
    assert not same_adapter(stopped, stopped / f"checkpoint-{best + 2}")
    assert json.loads((stopped / f"checkpoint-{best + 2}" / "echo_ft.json").read_text())["best_step"] == 0


def resume(stopped, dataset, output, *options, after=0):
    """Resume a copy of the stopped run from its last checkpoint, or from the one of step `after`."""
    shutil.copytree(stopped, output)
    for name in ("echo_ft.json", "adapter_model.safetensors"):
        (output / name).unlink()
    for folder in output.glob("checkpoint-*"):
        if after and int(folder.name.removeprefix("checkpoint-")) > after:
            shutil.rmtree(folder)
    run_in_process(*tiny_options("decision_maker", dataset, output, *options, "--resume_from_checkpoint", "true"))


def assert_same_end(found, expected):
    """Assert that two runs ended in the same step with the same adapter and card."""
    assert logged_state(found)["global_step"] == logged_state(expected)["global_step"]
    assert same_adapter(found, expected)
    cards = [json.loads((folder / "echo_ft.json").read_text()) for folder in (found, expected)]
    assert {**cards[0], "commit": ""} == {**cards[1], "commit": ""}  # a commit may fall between the runs
    assert cards[0]["best_step"] > 0


def test_a_resumed_run_stops_where_the_uninterrupted_run_did(stopped, dataset, tmp_path):
    end = logged_state(stopped)["global_step"]
    output = tmp_path / "decision_maker"
    resume(stopped, dataset, output, *STOPPING, after=end - 1)
    assert_same_end(output, stopped)


def test_a_finished_run_in_a_moved_folder_keeps_its_best_checkpoint(stopped, dataset, tmp_path):
    shutil.copytree(stopped, tmp_path / "first")
    for path in (tmp_path / "first").glob("**/trainer_state.json"):
        path.write_text(path.read_text().replace(str(stopped), str(tmp_path / "gone")))
        seal_folder(path.parent)
    resume(tmp_path / "first", dataset, tmp_path / "moved" / "decision_maker", *STOPPING)
    assert_same_end(tmp_path / "moved" / "decision_maker", stopped)


@pytest.mark.slow
def test_a_resumed_run_takes_its_own_patience(stopped, dataset, tmp_path):
    resume(stopped, dataset, tmp_path / "decision_maker", *BEST_OF_SIX, "--early_stopping_patience", 3)
    assert logged_state(tmp_path / "decision_maker")["global_step"] == logged_state(stopped)["global_step"] + 1


def test_a_run_that_did_not_count_evaluations_resumes_with_early_stopping(stopped, dataset, tmp_path):
    path = tmp_path / "without" / "checkpoint-1" / "trainer_state.json"
    shutil.copytree(stopped, tmp_path / "without")
    uncounted = json.loads(path.read_text())
    del uncounted["stateful_callbacks"]["EarlyStopping"]
    path.write_text(json.dumps(uncounted))
    seal_folder(path.parent)
    resume(tmp_path / "without", dataset, tmp_path / "decision_maker", *STOPPING, after=1)
    assert same_adapter(tmp_path / "decision_maker", stopped)


STEPS = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_strategy": "no", "save_strategy": "no"}, "load_best_model_at_end is set, but eval_strategy is no"),
        ({"eval_strategy": "epoch", "save_strategy": "no"}, "save_strategy is no; set save_strategy: epoch"),
        ({"eval_strategy": "epoch", "save_strategy": "steps"}, "save_strategy is steps; set save_strategy: epoch"),
        ({**STEPS, "save_steps": 4}, "eval_steps is 2 and save_steps is 4; set both to the same number"),
        ({**STEPS, "eval_steps": None, "logging_steps": 3}, "eval_steps is 3 and save_steps is 2"),
    ],
)
def test_a_best_checkpoint_needs_a_checkpoint_of_each_evaluation(tmp_path, options, message):
    settings = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    with pytest.raises(EchoError, match=message):
        TrainingConfig(**settings, load_best_model_at_end=True, **options)
    TrainingConfig(**settings, **options)
    for matching in (STEPS, {"eval_strategy": "epoch", "save_strategy": "best"}):
        TrainingConfig(**settings, load_best_model_at_end=True, **matching)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--early_stopping_patience", 2],
            "is set without load_best_model_at_end, .* set load_best_model_at_end: true",
        ),
        (["--early_stopping_threshold", 0.1], "early_stopping_threshold has no effect without early_stopping_patience"),
        ([*BEST_OF_SIX, "--early_stopping_patience", 0], "early_stopping_patience is 0; it must be a number"),
        ([*STOPPING, "--early_stopping_threshold", "nan"], "early-stopping-threshold: invalid float value: 'nan'"),
    ],
)
def test_contradicting_options_of_early_stopping_are_refused(dataset, tmp_path, options, message):
    with pytest.raises(EchoError, match=message):
        run_in_process(*tiny_options("decision_maker", dataset, tmp_path, *options, "--dry_run"))


def test_bf16_on_a_cpu_needs_only_the_config_of_accelerate(tmp_path, monkeypatch):
    monkeypatch.setattr("echo_ft.training.config.is_torch_bf16_gpu_available", lambda: False)
    settings = {"output_dir": str(tmp_path), "report_to": "none"}
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(EchoError, match=r"no GPU that computes in bfloat16; .* start with .*cpu\.yaml"):
        TrainingConfig(**settings, bf16=True)
    monkeypatch.setenv(
        "ACCELERATE_USE_CPU", "true"
    )  # as `accelerate launch --config_file recipes/accelerate/cpu.yaml` does
    found = TrainingConfig(**settings, bf16=True)
    assert (found.use_cpu, found.mixed_precision, found.device.type) == (True, "bf16", "cpu")
