"""The same cases per step give the same adapter, however they are divided, even after a resume; merged models train."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import make_dataset, random_adapters
from tests.support.training import SAME_TRAINING, history, launch, run_in_process, tiny_options
from train import export

pytestmark = pytest.mark.slow

EPOCH = [*SAME_TRAINING, "--max_steps", -1, "--num_train_epochs", 2, "--optim", "sgd", "--learning_rate", 0.1]
CHECKPOINTS = ["--save_strategy", "steps", "--save_steps", 1]


def train_whole(dataset, output):
    """Train two epochs of four cases per step, in one batch each, with a checkpoint of each step."""
    batch = ["--per_device_train_batch_size", 4]
    run_in_process(*tiny_options("reasoning_expert", dataset, output, *EPOCH, *CHECKPOINTS, *batch))
    return output


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Eight cases. Seven cases would be padded on two processes."""
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    return train_whole(dataset, tmp_path_factory.mktemp("whole") / "reasoning_expert")


def assert_same_run(found, expected):
    assert history(found) == pytest.approx(history(expected), rel=1e-5)
    weights = load_file(expected / "adapter_model.safetensors")
    for name, weight in load_file(found / "adapter_model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2])
def test_accumulation_with_an_incomplete_last_step_gives_the_adapter_of_whole_batches(tmp_path, batch):
    dataset = make_dataset(tmp_path / "data", train=7)  # the second step of an epoch has three cases
    whole = train_whole(dataset, tmp_path / "whole")
    split = [
        "--per_device_train_batch_size",
        batch,
        "--gradient_accumulation_steps",
        4 // batch,
        "--save_strategy",
        "no",
    ]
    run_in_process(*tiny_options("reasoning_expert", dataset, tmp_path / "split", *EPOCH, *split))
    assert len(history(whole)) == 4
    assert_same_run(tmp_path / "split", whole)


@pytest.mark.parametrize(("batch", "accumulation", "ranks"), [(2, 2, 1), (2, 1, 2), (1, 2, 2)])
def test_a_resume_with_another_division_of_the_batch_gives_the_same_adapter(
    whole, dataset, tmp_path, batch, accumulation, ranks
):
    split = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation]
    split += ["--save_strategy", "no", "--resume_from_checkpoint", whole / "checkpoint-2"]
    launch(*tiny_options("reasoning_expert", dataset, tmp_path, *EPOCH, *split), ranks=ranks)
    assert_same_run(tmp_path, whole)


def test_a_merged_model_can_be_tuned_again(dataset, tmp_path):
    adapters = random_adapters(tmp_path / "adapters", dataset)
    export.main(["--adapters", str(adapters), "--output", str(tmp_path / "bundle"), "--merge", "decision_maker"])
    merged = tmp_path / "bundle" / "merged" / "decision_maker"
    again = tmp_path / "again" / "decision_maker"
    options = [*SAME_TRAINING, "--save_strategy", "no", "--per_device_train_batch_size", 7]
    run_in_process(*tiny_options("decision_maker", dataset, again, *options, "--model_name_or_path", merged))
    losses = history(again)
    assert losses[2] < losses[0]
    assert json.loads((again / "echo_ft.json").read_text())["base_model"] == str(merged)
