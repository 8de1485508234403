"""Training all roles in one run gives the adapters of four runs, and refuses what it cannot do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trl import ModelConfig

from echo_ft.config import build
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl, write_jsonl
from echo_ft.model.adapters import read_card
from echo_ft.records import ROLES, Exchange
from echo_ft.training.all_roles import AllRolesTrainer
from echo_ft.training.checks import check_options
from echo_ft.training.collator import Collator
from echo_ft.training.config import EchoConfig, TrainingConfig
from echo_ft.training.costs.flops import WorkCounts, image_work
from echo_ft.training.planning import Plan, PlannedRow, case_work, join_plans, plan
from tests.conftest import make_dataset
from tests.support.exchanges import exchanges_of, with_completions
from tests.support.training import logged_state, run_in_process, tiny_options

OWN = {
    "reasoning_expert": {"learning_rate": 0.02, "lr_scheduler_type": "linear"},
    "decision_maker": {"warmup_steps": 2},
}
"""Options of single roles. All other roles have those of SAME."""

SAME = [
    "--mask_loss", 0, "--lora_target_modules", "q_proj", "v_proj", "down_proj", "--lora_dropout", 0, "--max_steps", 3,
    "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2, "--learning_rate", 0.01,
    "--warmup_steps", 1, "--max_grad_norm", 0.05, "--weight_decay", 0.1, "--logging_steps", 1, "--save_strategy", "no",
    "--adam_epsilon", 0.01,  # Adam would raise the rounding of small gradients to whole steps
]  # fmt: skip


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "parts", train=4, validation=1, test=0)


@pytest.mark.parametrize("start", [pytest.param("branch", marks=pytest.mark.slow), "answer"])
def test_one_run_gives_the_adapters_of_four_runs_and_resumes(dataset, tmp_path, start):
    same = [*SAME, "--adapt_from", start, "--eval_strategy", "steps", "--eval_steps", 3]
    all_roles = [*same, "--role", "all", "--by_role", json.dumps(OWN), "--gradient_checkpointing", "true"]
    saved = ["--save_strategy", "steps", "--save_steps", 2]
    run_in_process(*tiny_options("decision_maker", dataset, tmp_path / "all", *all_roles, *saved))
    together, alone = logged_state(tmp_path / "all")["log_history"], []
    for role in ROLES:
        options = [one for name, value in OWN.get(role, {}).items() for one in (f"--{name}", value)]
        run_in_process(*tiny_options("decision_maker", dataset, tmp_path / role, *same, "--role", role, *options))
        found, expected = weights(tmp_path / "all" / role), weights(tmp_path / role)
        assert found.keys() == expected.keys()
        assert max(weight.abs().max() for name, weight in expected.items() if "lora_B" in name) > 1e-3  # from zero
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-7)
        cards = [replace(read_card(tmp_path / one), commit="") for one in (f"all/{role}", role)]
        assert cards[0] == cards[1]
        files = [{path.name for path in (tmp_path / one).iterdir()} for one in (f"all/{role}", role)]
        assert files[1] - files[0] <= {".lock", "trainer_state.json", "training_args.bin"}
        alone.append(logged_state(tmp_path / role)["log_history"])
        (evaluated,) = (entry["eval_loss"] for entry in alone[-1] if "eval_loss" in entry)
        (own,) = (entry[f"eval_{role}_loss"] for entry in together if "eval_loss" in entry)
        assert own == pytest.approx(evaluated, rel=1e-5)
    for step in range(3):  # learning rates differ, but no role disturbs another
        losses = [[entry["loss"] for entry in log if "loss" in entry][step] for log in (together, *alone)]
        assert losses[0] == pytest.approx(sum(losses[1:]), rel=1e-4)

    shutil.copytree(tmp_path / "all" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    resume = ["--resume_from_checkpoint", "true"]
    run_in_process(*tiny_options("decision_maker", dataset, tmp_path / "again", *all_roles, *resume))
    for role in ROLES:
        once = weights(tmp_path / "all" / role)
        assert all(torch.equal(weight, once[name]) for name, weight in weights(tmp_path / "again" / role).items())
    with pytest.raises(EchoError, match="again holds a finished adapter, and this run would replace it"):
        run_in_process(*tiny_options("decision_maker", dataset, tmp_path / "again", *all_roles))


def test_a_role_without_rows_in_a_step_keeps_its_weights(tmp_path):
    dataset = make_dataset(tmp_path / "data", train=2, validation=0, test=0)
    path = dataset / "sft" / "reference_extractor" / "train.jsonl"
    write_jsonl(path, list(read_jsonl(path, Exchange))[1:])
    options = [*SAME, "--role", "all", "--adapt_from", "branch", "--gradient_accumulation_steps", 1, "--max_steps", 1]
    options += ["--train_sampling_strategy", "sequential", "--eval_strategy", "no", "--warmup_steps", 0]
    run_in_process(*tiny_options("decision_maker", dataset, tmp_path / "out", *options))
    for role in ROLES:
        trained = any(weight.any() for name, weight in weights(tmp_path / "out" / role).items() if "lora_B" in name)
        assert trained == (role != "reference_extractor")


def test_the_norm_of_a_role_without_gradients_is_on_the_device_of_the_others():
    with_gradient, without = (torch.nn.Parameter(torch.ones(2, device="meta")) for _ in range(2))
    with_gradient.grad = torch.ones(2, device="meta")
    weights = {role: [without] for role in ROLES} | {"decision_maker": [with_gradient]}
    trainer: Any = SimpleNamespace(
        accelerator=SimpleNamespace(unscale_gradients=lambda: None),
        args=SimpleNamespace(max_grad_norm=1.0, device=torch.device("meta")),
        _weights=lambda role: weights[role],
    )
    norm = AllRolesTrainer._clip_grad_norm(trainer, None)
    assert (norm.shape, norm.device.type) == (torch.Size([]), "meta")


def test_a_dry_run_plans_the_rows_of_all_roles(dataset, tmp_path, capsys):
    options = [*SAME, "--role", "all", "--adapt_from", "branch", "--eval_strategy", "no", "--dry_run", "true"]
    run_in_process(*tiny_options("decision_maker", dataset, tmp_path / "out", *options))
    told = capsys.readouterr().out
    assert "4 cases, 2 per step (1 x 1 processes x 2 accumulated): 2 steps per epoch" in told
    assert "An upper bound: estimated for adapt_from prefix; branch needs less." in told
    rows = [int(line.split(" tokens")[0].rpartition(" ")[2]) for line in told.splitlines() if "rows rejected" in line]
    planned = int(told.split("per epoch: ")[1].split(" tokens")[0].replace(",", ""))
    assert len(rows) == len(ROLES) and 0 < planned < sum(rows), "rows of a case share looks"


REFUSED = [
    (
        {"adapt_from": "prefix"},
        "every adapter computes its own; set adapt_from: branch or answer",
    ),
    ({"load_best_model_at_end": True, "save_strategy": "epoch"}, "has no single best step.*remove load_best_model"),
    ({"lr_scheduler_type": "greedy"}, "follow one loss; choose another"),
    ({"by_role": {"decision_maker": {"lr_scheduler_type": "greedy"}}}, "follow one loss; choose another"),
    ({"by_role": {"decision_maker": {"lr_scheduler_type": "steps"}}}, "lr_scheduler_type steps cannot be used"),
    (
        {"by_role": {"decider": {"learning_rate": 1.0}}},
        "by_role cannot have decider: .*it takes reference_extr",
    ),
    ({"by_role": {"decision_maker": {"lora_r": 4}}}, "each with a mapping of learning_rate, lr_scheduler_type"),
    (
        {"by_role": {"decision_maker": {"learning_rate": "fast"}}},
        "learning_rate for decision_maker is 'fast'; set a nu",
    ),
    ({"role": "decision_maker", "by_role": {"decision_maker": {"warmup_steps": 1}}}, "no effect with role decision_m"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_what_roles_cannot_share_is_refused(recipe, changed, message):
    late = {"role": "all", "adapt_from": "answer", "mask_loss": 0.0, "eval_strategy": "epoch"}
    types = [EchoConfig, TrainingConfig, ModelConfig]
    config, sft, base = build(types, {**recipe, **late}, "recipe.yaml")
    check_options(sft, base, config)
    config, sft, base = build(types, {**recipe, **late, **changed}, "recipe.yaml")
    with pytest.raises(EchoError, match=message):
        check_options(sft, base, config)


def test_deepspeed_cannot_clip_each_role_on_its_own(recipe):
    late = {"role": "all", "adapt_from": "answer", "mask_loss": 0.0}
    config, sft, base = build([EchoConfig, TrainingConfig, ModelConfig], {**recipe, **late}, "recipe.yaml")
    sft.deepspeed_plugin = object()  # type: ignore[assignment]
    with pytest.raises(EchoError, match=r"DeepSpeed and FSDP cannot do; use recipes/accelerate/ddp\.yaml"):
        check_options(sft, base, config)


def test_plans_of_roles_are_joined_by_case_and_repeat():
    def planned(names):
        return Plan([PlannedRow(i, case, first, 1, 1, WorkCounts(), {}) for i, (case, first) in enumerate(names)])

    guide = planned([("b", "guide"), ("a", "guide")])
    decider = planned([("a", "1"), ("a", "2"), ("b", "1"), ("a", "1"), ("a", "2"), ("c", "1")])
    joined, order = join_plans([guide, decider])
    cases = [[(row.case, row.first_id) for row in case] for case in joined.cases()]
    both = [("a", "guide"), ("a", "1"), ("a", "2")]
    assert cases == [both, [("b", "guide"), ("b", "1")], [("a", "1"), ("a", "2")], [("c", "1")]]
    rows = [*guide.rows, *decider.rows]
    assert [rows[index] for index in order] == joined.rows


def test_the_plan_counts_what_a_batch_of_all_roles_computes(row_builder, case, tmp_path):
    exchanges = [with_completions(exchange) for exchange in exchanges_of(case)]
    rows = [row_builder.load_row(exchange, tmp_path) for exchange in exchanges]
    for start in ("branch", "answer"):
        batch = Collator(row_builder, tmp_path, adapt_from=start, by_role=True).batch(rows)
        planned = plan(row_builder, exchanges, tmp_path, 32768, start)
        assert len({row.seen for row in planned.rows}) < len(rows), "some rows share a look"
        images = image_work(batch["image_grid_thw"].tolist())
        assert case_work(planned.rows) + images == WorkCounts(*batch["work_counts"])
        assert batch["input_ids"].shape[1] == case_work(planned.rows).tokens
        assert [part["adapter"] for part in batch["parts"]] == list(ROLES)
        assert sum(len(part["tokens"]) for part in batch["parts"]) + len(batch["base_tokens"]) == len(
            batch["exchanges"]
        )
