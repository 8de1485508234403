"""However the cases of a step are divided, ordered, packed or resumed, each step has the same loss and gradient norm.

Each step trains on all cases, so the order of the rows does not matter either.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import make_dataset
from tests.support.training import (
    SAME_TRAINING,
    assert_equal_but_rounding,
    history,
    launch,
    launch_deepspeed,
    run_in_process,
    tiny_options,
)

CASES, STEPS = 8, 6
ROWS = "sft/reasoning_expert/train.jsonl"
TRAINING = [*SAME_TRAINING, "--max_steps", STEPS, "--optim", "sgd", "--learning_rate", 0.1]
WHOLE = ["--per_device_train_batch_size", CASES]
UNSAVED = ["--save_strategy", "no"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset"), train=CASES)


@pytest.fixture(scope="module")
def reference(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with one batch per step, and a checkpoint of each step."""
    output = tmp_path_factory.mktemp("reference")
    train(dataset, output, *WHOLE, "--save_strategy", "steps", "--save_steps", 1)
    assert len(history(output)) == STEPS
    return output


def train(dataset: Path, output: Path, *more: object) -> None:
    run_in_process(*tiny_options("reasoning_expert", dataset, output, *TRAINING, *more))


def assert_same_steps(found: Path, reference: Path, tolerance: float = 1e-5) -> None:
    """Check the losses, and the gradient norms to ten times the tolerance."""
    assert_equal_but_rounding(history(found), history(reference), tolerance)
    norms = (history(output, "grad_norm") for output in (found, reference))
    assert_equal_but_rounding(*norms, 10 * tolerance)


def rewritten(dataset: Path, folder: Path, one_question: bool) -> Path:
    """A dataset with the training rows in reverse order, or with a row for each question instead of shared rows."""
    shutil.copytree(dataset, folder)
    rows = [json.loads(line) for line in (dataset / ROWS).read_text().splitlines()]
    single = [{**row, "branches": [branch]} for row in rows for branch in row["branches"]]
    assert len(single) > len(rows)
    (folder / ROWS).write_text("".join(json.dumps(row) + "\n" for row in (single if one_question else rows[::-1])))
    return folder


@pytest.mark.parametrize("errors", [(1e-6, -2e-6, 1e-6, 1e-6), (0, 0, 9e-6, -8e-6)])
def test_errors_of_rounding_pass(errors):
    assert_equal_but_rounding([2 * (1 + error) for error in errors], [2] * 4, 1e-5)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([2, 2, 2, 2.0001], "e-05"),
        ([2, 2, 2], "3 steps instead of 4"),
        ([2.00001, 2.000008, 2.000006, 2.000009], "to one side"),
        ([float("nan")] * 4, "nan"),
    ],
)
def test_errors_that_are_large_or_lie_to_one_side_fail(found, message):
    with pytest.raises(AssertionError, match=message):
        assert_equal_but_rounding(found, [2] * 4, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_accumulation(dataset, reference, tmp_path, batch):
    divided = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", CASES // batch]
    train(dataset, tmp_path, *divided, *UNSAVED)
    assert_same_steps(tmp_path, reference)


@pytest.mark.slow
@pytest.mark.parametrize("one_question", [False, True], ids=["reverse order", "one question per row"])
def test_order_and_packing(dataset, reference, tmp_path, one_question):
    train(rewritten(dataset, tmp_path / "data", one_question), tmp_path / "out", *WHOLE, *UNSAVED)
    assert_same_steps(tmp_path / "out", reference)


@pytest.mark.slow
def test_stored_features(dataset, reference, tmp_path):
    for output in ("first", "again"):
        train(dataset, tmp_path / output, *WHOLE, *UNSAVED, "--features", tmp_path / "features")
        assert_same_steps(tmp_path / output, reference)


@pytest.mark.slow
def test_threads(dataset, reference, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        train(dataset, tmp_path, *WHOLE, *UNSAVED)
    finally:
        torch.set_num_threads(before)
    assert_same_steps(tmp_path, reference)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_resume_at_every_step(dataset, reference, tmp_path, step):
    train(dataset, tmp_path, *WHOLE, *UNSAVED, "--resume_from_checkpoint", reference / f"checkpoint-{step}")
    for name in ("loss", "grad_norm"):
        assert history(tmp_path, name) == history(reference, name)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks(dataset, reference, tmp_path, ranks):
    divided = ["--per_device_train_batch_size", CASES // ranks]
    launch(*tiny_options("reasoning_expert", dataset, tmp_path, *TRAINING, *divided, *UNSAVED), ranks=ranks)
    assert_same_steps(tmp_path, reference)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["zero2", "zero3", "fsdp2"])
def test_sharded_states(dataset, reference, tmp_path, recipe):
    divided = ["--per_device_train_batch_size", CASES // 2]
    options = tiny_options("reasoning_expert", dataset, tmp_path, *TRAINING, *divided, *UNSAVED)
    if recipe == "fsdp2":
        launcher = ["--config_file", "recipes/accelerate/fsdp2.yaml", "--num_processes", 2, "--mixed_precision", "no"]
        launch(*options, launcher=launcher, script=["-m", "tests.support.gpu_only_on_cpu"])
    else:
        launch_deepspeed(recipe, *options)
    assert_same_steps(tmp_path, reference, tolerance=1e-4)
