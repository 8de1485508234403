"""A checkpoint of N processes resumes on M with the same cases per step, with the losses of an undisturbed run."""

from __future__ import annotations

import pytest

from tests.conftest import make_dataset
from tests.support.training import SAME_TRAINING, history, launch, tiny_options

STEPS = [*SAME_TRAINING, "--max_steps", 4, "--save_strategy", "steps", "--save_steps", 1]
CASES_PER_STEP = 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """Runs on one, two and four processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for ranks in (1, 2, 4):
        options = [*STEPS, "--per_device_train_batch_size", CASES_PER_STEP // ranks]
        launch(*tiny_options("reasoning_expert", dataset, folder / str(ranks), *options), ranks=ranks)
    return folder


@pytest.mark.slow  # nine trainings of 4 steps take three minutes on two idle cores
@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2)])
def test_a_checkpoint_resumes_on_another_number_of_processes(dataset, undisturbed, tmp_path, before, after):
    options = [*STEPS, "--per_device_train_batch_size", CASES_PER_STEP // after]
    resumed = ["--resume_from_checkpoint", undisturbed / str(before) / "checkpoint-2"]
    launch(*tiny_options("reasoning_expert", dataset, tmp_path / "out", *options, *resumed), ranks=after)
    losses = history(tmp_path / "out")
    assert len(losses) == 4
    assert losses == pytest.approx(history(undisturbed / str(before)), rel=1e-6)
