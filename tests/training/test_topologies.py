"""Training on several processes gives the losses of one process, and no process waits forever."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import RandomSampler

from echo_ft.records import ROLES
from echo_ft.training.cases import EXCHANGE_SCHEMA, group_by_case, pad_cases
from echo_ft.training.sampler import BalancedSampler
from tests.conftest import ROOT, make_dataset
from tests.support.training import (
    BEST_OF_SIX,
    BFLOAT16,
    BIN,
    SAME_TRAINING,
    history,
    launch,
    launch_bfloat16,
    launch_deepspeed,
    logged_state,
    losses,
    tiny_options,
)

LANGUAGE = ["--lora_target_modules", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TWO_RANKS = [*SAME_TRAINING, "--save_strategy", "no", "--per_device_train_batch_size", 2]
EVALUATED = ["--eval_strategy", "steps", "--eval_steps", 3, "--per_device_eval_batch_size"]
FULL_TUNING = [*SAME_TRAINING, "--save_strategy", "no", "--use_peft", "false", "--learning_rate", "1e-3"]


def keep_one_question(folder, split):
    """Make the cases of a split differ in length: every other case keeps only one question to the reasoning expert."""
    path = folder / "sft" / "reasoning_expert" / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if int(row["case"].split("/")[1]) % 2:
            row["branches"] = row["branches"][:1]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return keep_one_question(make_dataset(tmp_path_factory.mktemp("dataset"), validation=5), "validation")


@pytest.fixture(scope="module")
def one_rank(dataset, tmp_path_factory):
    """The reasoning expert after three steps of four cases, evaluated one case at a time."""
    output = tmp_path_factory.mktemp("one") / "reasoning_expert"
    options = [*SAME_TRAINING, "--save_strategy", "no", "--per_device_train_batch_size", 4, *EVALUATED, 1]
    launch(*tiny_options("reasoning_expert", dataset, output, *options))
    return output


def evaluation(output):
    """The means over the trained tokens of the validation cases."""
    logged = logged_state(output)["log_history"]
    (found,) = [entry for entry in logged if "eval_loss" in entry]
    return [found[name] for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")]


def assert_same_adapter(found, expected):
    """Check that two adapters are equal except for the order of sums."""
    weights = load_file(expected / "adapter_model.safetensors")
    for name, weight in load_file(found / "adapter_model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-2, atol=1e-3)


def test_two_ranks_give_the_losses_and_the_adapter_of_one(one_rank, dataset, tmp_path):
    # Five validation cases fill one batch of two on each process; one case remains for the next pair of batches.
    launch(*tiny_options("reasoning_expert", dataset, tmp_path / "two", *TWO_RANKS, *EVALUATED, 2), ranks=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(one_rank), rel=1e-4)
    assert evaluation(tmp_path / "two") == pytest.approx(evaluation(one_rank), rel=1e-4)
    assert_same_adapter(tmp_path / "two", one_rank)


# In a new environment, DeepSpeed first compiles its communication for the CPU and, with offload, its AdamW. That takes
# minutes.
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["zero2", "zero3", "zero3_offload"])
def test_two_deepspeed_ranks_give_the_losses_and_adapter_of_one(one_rank, dataset, tmp_path, recipe):
    checkpoint = ["--save_strategy", "steps", "--save_steps", 3, *EVALUATED, 8]
    launch_deepspeed(recipe, *tiny_options("reasoning_expert", dataset, tmp_path / "two", *TWO_RANKS, *checkpoint))
    # Each process saved its part of the optimizer states, so DeepSpeed was in use.
    assert len(list((tmp_path / "two" / "checkpoint-3" / "global_step3").glob("*rank_[01]*optim_states.pt"))) == 2
    assert losses(tmp_path / "two") == pytest.approx(losses(one_rank), rel=1e-4)
    assert evaluation(tmp_path / "two") == pytest.approx(evaluation(one_rank), rel=1e-4)
    assert_same_adapter(tmp_path / "two", one_rank)


@pytest.fixture(scope="module")
def one_rank_bfloat16(dataset, tmp_path_factory):
    """The reasoning expert after three steps of four cases in bfloat16."""
    output = tmp_path_factory.mktemp("bfloat16") / "reasoning_expert"
    options = [*SAME_TRAINING, *BFLOAT16, "--save_strategy", "no", "--per_device_train_batch_size", 4]
    cpu = ["--config_file", "recipes/accelerate/cpu.yaml"]
    launch(*tiny_options("reasoning_expert", dataset, output, *options), launcher=cpu, ACCELERATE_USE_CPU="false")
    return output


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_ranks_in_bfloat16_give_the_losses_of_one(one_rank_bfloat16, dataset, tmp_path, recipe):
    output = tmp_path / "two"
    checkpoint = ["--save_strategy", "steps", "--save_steps", 3]
    launch_bfloat16(recipe, *tiny_options("reasoning_expert", dataset, output, *TWO_RANKS, *checkpoint))
    assert losses(output) == pytest.approx(losses(one_rank_bfloat16), abs=0.02)
    weights = load_file(output / "adapter_model.safetensors")
    expected = load_file(one_rank_bfloat16 / "adapter_model.safetensors")
    assert {name: weight.shape for name, weight in weights.items()} == {n: w.shape for n, w in expected.items()}
    assert all(weight.any() for weight in weights.values())
    saved = load_file(output / "checkpoint-3" / "adapter_model.safetensors")
    assert all(torch.equal(weight, saved[name]) for name, weight in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ddp", "zero2", "fsdp2"])
def test_two_ranks_stop_early_and_keep_the_best_adapter(dataset, tmp_path, recipe):
    output = tmp_path / "decision_maker"
    options = [*BEST_OF_SIX, "--early_stopping_patience", 2, "--per_device_train_batch_size", 2]
    arguments = tiny_options("decision_maker", dataset, output, *options)
    for _ in ("whole", "resumed"):
        launch_bfloat16(recipe, *arguments, "--resume_from_checkpoint", "true")
        evaluated = [entry["eval_loss"] for entry in logged_state(output)["log_history"] if "eval_loss" in entry]
        best = evaluated.index(min(evaluated)) + 1
        assert len(evaluated) == logged_state(output)["global_step"] == best + 2 < 6
        assert json.loads((output / "echo_ft.json").read_text())["best_step"] == best
        saved = load_file(output / f"checkpoint-{best}" / "adapter_model.safetensors")
        found = load_file(output / "adapter_model.safetensors")
        assert all(torch.equal(weight, saved[name]) for name, weight in found.items())
        # The second run resumes from the evaluation before the last one.
        shutil.rmtree(output / f"checkpoint-{best + 2}")
        (output / "adapter_model.safetensors").unlink()
        (output / "echo_ft.json").unlink()


@pytest.fixture(scope="module")
def fully_tuned(dataset, tmp_path_factory):
    """The reference extractor after full fine-tuning for three steps of four cases."""
    output = tmp_path_factory.mktemp("whole") / "reference_extractor"
    launch(*tiny_options("reference_extractor", dataset, output, *FULL_TUNING, "--per_device_train_batch_size", 4))
    return output


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ddp", "zero2", "zero3"])
def test_full_tuning_on_two_ranks_gives_the_model_of_one(fully_tuned, dataset, tmp_path, recipe):
    from echo_ft.model.loading import load_model

    arguments = tiny_options(
        "reference_extractor", dataset, tmp_path / "two", *FULL_TUNING, "--per_device_train_batch_size", 2
    )
    if recipe == "ddp":
        launch(*arguments, ranks=2)
    else:
        launch_deepspeed(recipe, *arguments)
    assert losses(tmp_path / "two") == pytest.approx(losses(fully_tuned), rel=1e-4)
    expected = load_model(str(fully_tuned)).state_dict()
    for name, weight in load_model(str(tmp_path / "two")).state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_zero_3_does_not_hang_if_a_rank_has_stored_its_images(dataset, tmp_path):
    options = [*TWO_RANKS, *LANGUAGE, "--features", tmp_path / "features"]
    launch_deepspeed("zero3", *tiny_options("reference_extractor", dataset, tmp_path / "first", *options))
    for path in sorted((tmp_path / "features").glob("*/*.safetensors"))[::3]:
        path.unlink()
    launch_deepspeed("zero3", *tiny_options("reference_extractor", dataset, tmp_path / "again", *options))
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "first"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("adapt_from", ["prefix", "answer"])
def test_fsdp2_gives_the_gradients_of_one_process(tmp_path, adapt_from):
    script = ["-m", "tests.support.fully_sharded", str(tmp_path), adapt_from]
    done = subprocess.run(
        [str(BIN / "torchrun"), "--nproc_per_node=2", *script],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "start"),
    [("ddp", "answer"), ("zero2", "branch"), ("zero2", "answer"), ("zero3", "branch"), ("zero3", "answer")],
)
def test_two_ranks_train_an_adapter_after_the_prefix_as_one_does(dataset, tmp_path, recipe, start):
    late = [*LANGUAGE, "--adapt_from", start, "--gradient_checkpointing", "true"]
    late += ["--adam_epsilon", "1e-2"]  # Adam would raise the rounding of small gradients to whole steps
    one = [*SAME_TRAINING, "--save_strategy", "no", "--per_device_train_batch_size", 4, *late]
    launch(*tiny_options("reasoning_expert", dataset, tmp_path / "one", *one, "--mask_loss", 0))
    two = tiny_options("reasoning_expert", dataset, tmp_path / "two", *TWO_RANKS, *late, "--mask_loss", 0)
    launch(*two, ranks=2) if recipe == "ddp" else launch_deepspeed(recipe, *two)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert_same_adapter(tmp_path / "two", tmp_path / "one")
    card = json.loads((tmp_path / "two" / "echo_ft.json").read_text())
    assert (card["adapt_from"], bool(card["invocation_tokens"])) == (start, start == "answer")


@pytest.mark.slow
def test_two_ranks_train_all_roles_as_one_does_although_a_role_has_one_row(dataset, tmp_path):
    """One process at most has that row, and in two of three steps none has it."""
    few = tmp_path / "few"
    shutil.copytree(dataset, few)
    path = few / "sft" / "reference_extractor" / "train.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    late = [*LANGUAGE, "--role", "all", "--adapt_from", "branch", "--mask_loss", 0, "--adam_epsilon", "1e-2"]
    one = [*SAME_TRAINING, "--save_strategy", "no", "--per_device_train_batch_size", 4, *late, *EVALUATED, 1]
    launch(*tiny_options("decision_maker", few, tmp_path / "one", *one))
    launch(*tiny_options("decision_maker", few, tmp_path / "two", *TWO_RANKS, *late, *EVALUATED, 2), ranks=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert evaluation(tmp_path / "two") == pytest.approx(evaluation(tmp_path / "one"), rel=1e-4)
    for role in ROLES:
        assert_same_adapter(tmp_path / "two" / role, tmp_path / "one" / role)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A dataset with cases of different lengths: every other case has only one question."""
    return keep_one_question(make_dataset(tmp_path_factory.mktemp("uneven"), train=7), "train")


@pytest.mark.slow
def test_uneven_cases_on_two_ranks_give_the_losses_of_one(uneven, tmp_path):
    # Seven cases and four per step: the third step begins the second epoch. The second and the fourth have three cases.
    steps = [*SAME_TRAINING, "--save_strategy", "steps", "--save_steps", 1, "--max_steps", 4]
    for ranks in (1, 2):
        more = [*steps, "--per_device_train_batch_size", 4 // ranks]
        launch(*tiny_options("reasoning_expert", uneven, tmp_path / str(ranks), *more), ranks=ranks)
    found = {ranks: history(tmp_path / str(ranks)) for ranks in (1, 2)}
    assert len(found[2]) == 4
    assert found[2] == pytest.approx(found[1], rel=1e-4)
    resumed = ["--resume_from_checkpoint", tmp_path / "2" / "checkpoint-3", "--per_device_train_batch_size", 2]
    launch(*tiny_options("reasoning_expert", uneven, tmp_path / "resumed", *steps, *resumed), ranks=2)
    expected = load_file(tmp_path / "2" / "adapter_model.safetensors")
    for name, weight in load_file(tmp_path / "resumed" / "adapter_model.safetensors").items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize(("batch", "ranks", "accumulation"), [(2, 4, 1), (2, 4, 4), (1, 4, 8), (3, 2, 2)])
def test_the_sampler_keeps_the_cases_of_a_step_and_balances_ranks(batch, ranks, accumulation):
    tokens = np.random.default_rng(0).integers(500, 5000, 811).tolist()
    sampler = BalancedSampler(tokens, batch, ranks, accumulation, seed=7)
    imbalance = {"balanced": [], "torch": []}
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        plain = list(RandomSampler(tokens, generator=torch.Generator().manual_seed(7 + epoch)))
        found = list(sampler)
        assert sorted(found) == list(range(len(tokens)))
        assert found != plain
        step = batch * ranks * accumulation
        for start in range(0, len(tokens) - step + 1, step):
            for name, order in (("balanced", found), ("torch", plain)):
                cases = np.array(order[start : start + step])
                assert sorted(cases) == sorted(plain[start : start + step])
                rank_tokens = np.array(tokens)[cases].reshape(accumulation, ranks, batch).sum(axis=2)
                imbalance[name].append(float((rank_tokens.max(axis=1) / rank_tokens.mean(axis=1)).mean()))
    assert np.mean(imbalance["balanced"]) - 1 < 0.7 * (np.mean(imbalance["torch"]) - 1)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_last_step_has_the_cases_of_one_process_and_copies_without_labels(accumulation):
    cases, ranks, batch = 9, 2, 4
    padded = pad_cases(made_cases(cases), ranks * batch, "length")
    assert padded["length"] == [10 + case for case in range(cases)] + [0] * 7
    answers = [exchanges[0]["branches"][0]["completion"] for exchanges in padded["exchanges"]]
    assert answers == ["A"] * cases + [None] * 7
    sampler = BalancedSampler(padded["length"], batch, ranks, accumulation, seed=7)
    plain = list(RandomSampler(range(cases), generator=torch.Generator().manual_seed(7)))
    found = list(sampler)
    assert sorted(found) == list(range(len(sampler)))
    (last,) = (case for case in found[8:] if case < cases)
    if accumulation == 1:
        assert last == plain[-1] and sorted(found[:8]) == sorted(plain[:8])
    else:
        assert last == 0, "the shortest case of the step"


def made_cases(count):
    """Cases of one exchange each, with 10 tokens and more."""
    rows = [
        {"role": "decision_maker", "case": str(case), "images": [], "context": "", "prompt_version": "1",
         "branches": [{"id": str(case), "prompt": "?", "completion": "A"}]}
        for case in range(count)
    ]  # fmt: skip
    cases = group_by_case(pa.Table.from_pylist(rows, EXCHANGE_SCHEMA))
    return cases.add_column("length", [10 + case for case in range(count)])
