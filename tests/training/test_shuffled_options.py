"""`shuffle_options` draws the order of the options from seed, epoch and question, however the training runs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from trl import SFTConfig

from echo_ft.data.dataset import load_dataset
from echo_ft.training.cases import load_training_cases
from echo_ft.training.collator import Collator
from echo_ft.training.config import EchoConfig
from tests.conftest import MAX_PIXELS, MIN_PIXELS, make_dataset
from tests.support.training import SAME_TRAINING, launch, run_in_process, tiny_options

EPOCHS = [
    *SAME_TRAINING, "--max_steps", 4, "--per_device_train_batch_size", 2, "--shuffle_options", "true",
    "--lora_target_modules", "q_proj", "v_proj", "--save_strategy", "steps", "--save_steps", 3,
]  # fmt: skip
"""Two epochs of two steps, with a checkpoint during the second epoch."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"), train=4)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """An undisturbed run."""
    output = tmp_path_factory.mktemp("whole") / "decision_maker"
    run_in_process(*tiny_options("decision_maker", dataset, output, *EPOCHS))
    return output


def assert_same_adapter(found, expected, **tolerance):
    weights = load_file(expected / "adapter_model.safetensors")
    for name, weight in load_file(found / "adapter_model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], **tolerance)


def load_cases(dataset, row_builder, output, split, shuffle):
    config = EchoConfig("decision_maker", str(dataset), MIN_PIXELS, MAX_PIXELS, shuffle_options=shuffle)
    sft = SFTConfig(output_dir=str(output), use_cpu=True, bf16=False, report_to="none")
    return list(load_training_cases(row_builder, load_dataset(dataset), config, sft, split)[0])


def test_every_epoch_has_its_own_order_and_the_validation_keeps_the_dataset_s(dataset, row_builder, tmp_path):
    root = load_dataset(dataset).root
    collator = Collator(row_builder, root)

    def tokens(split, shuffle, epoch):
        collator.set_epoch(epoch)
        return collator(load_cases(dataset, row_builder, tmp_path, split, shuffle))["input_ids"].tolist()

    plain = tokens("train", False, 0)
    drawn = [tokens("train", True, epoch) for epoch in (0, 1, 0)]
    assert drawn[0] == drawn[2]
    assert drawn[0] != drawn[1]
    assert plain not in drawn
    assert tokens("train", False, 1) == plain
    assert tokens("validation", True, 0) == tokens("validation", False, 1)


def test_a_resumed_run_ends_in_the_adapter_of_an_undisturbed_one(whole, dataset, tmp_path):
    checkpoint = ["--resume_from_checkpoint", whole / "checkpoint-3"]
    run_in_process(*tiny_options("decision_maker", dataset, tmp_path, *EPOCHS, *checkpoint))
    assert_same_adapter(tmp_path, whole, rtol=0, atol=0)


@pytest.mark.slow
def test_workers_that_outlive_an_epoch_draw_the_same_orders(whole, dataset, tmp_path):
    workers = ["--dataloader_num_workers", 1, "--dataloader_persistent_workers", "true"]
    run_in_process(*tiny_options("decision_maker", dataset, tmp_path, *EPOCHS, *workers))
    assert_same_adapter(tmp_path, whole, rtol=0, atol=0)


@pytest.mark.slow
def test_two_ranks_draw_the_orders_of_one(whole, dataset, tmp_path):
    batch = ["--per_device_train_batch_size", 1]
    launch(*tiny_options("decision_maker", dataset, tmp_path, *EPOCHS, *batch), ranks=2)
    assert_same_adapter(tmp_path, whole, rtol=1e-2, atol=1e-3)
