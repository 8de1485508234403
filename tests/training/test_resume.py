"""A resume compares its options with the checkpoint's: it refuses changes it cannot honour and reports the others."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler
from trl import ModelConfig

from echo_ft.config import build
from echo_ft.data.dataset import load_dataset
from echo_ft.errors import EchoError
from echo_ft.model.adapters import ADAPTER_CARD, AdapterCard, make_card, read_card, write_card
from echo_ft.provenance import CHECKSUMS, seal_folder
from echo_ft.training.checkpoints import COMPLETE_MARKER, find_checkpoint
from echo_ft.training.checks import UNSUPPORTED, WITHOUT_EFFECT
from echo_ft.training.config import EchoConfig, TrainingConfig, lora_config
from echo_ft.training.option_changes import (
    FIXED,
    FREE,
    IRRELEVANT,
    apply_options,
    optimizer_options,
    training_options,
)
from echo_ft.training.sampler import DrawnEpoch
from tests.conftest import ECHO_TINY, make_dataset
from tests.support.training import run_in_process, tiny_options

TYPES = [EchoConfig, TrainingConfig, ModelConfig]

DERIVED = {
    "per_device_train_batch_size": ("cases_per_step", 4),
    "gradient_accumulation_steps": ("cases_per_step", 2),
    "bf16": ("mixed_precision", True),
    "fp16": ("mixed_precision", True),
}
"""Options that the card records under another name, with a changed value."""

REFUSED_VALUES: dict[str, Any] = {
    "shuffle_options": False,
    "seed": 1,
    "data_seed": 1,
    "train_sampling_strategy": "sequential",
    "dataloader_drop_last": True,
    "accelerator_config": {"even_batches": False},
    "dtype": "bfloat16",
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "optim_target_modules": "q_proj",
    "loss_type": "dft",
    "average_tokens_across_devices": False,
    "metric_for_best_model": "entropy",
    "greater_is_better": True,
    "use_peft": False,
    "lora_r": 8,
    "lora_alpha": 4,
    "lora_target_modules": ["q_proj"],
    "lora_modules_to_save": ["norm"],
    "use_rslora": True,
    "use_dora": True,
    "init_lora_weights": "gaussian",
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 4},
}
FREE_VALUES: dict[str, Any] = {
    "learning_rate": 1e-5,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "warmup_steps": 3,
    "num_train_epochs": 9,
    "max_steps": 7,
    "weight_decay": 0.5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 1e-3,
    "max_grad_norm": 0.01,
    "lora_dropout": 0.5,
    "eval_strategy": "no",
    "eval_steps": 3,
    "eval_delay": 1,
    "load_best_model_at_end": True,
    "early_stopping_patience": 3,
    "early_stopping_threshold": 0.1,
    "max_tokens": 500,
    "ignore_data_skip": True,
}
SET_ONLY = {"tf32": "needs a GPU", "bnb_4bit_quant_type": "", "use_bnb_nested_quant": "", "bnb_4bit_quant_storage": ""}
"""Options in FIXED that matter only on a GPU or for a quantized model, which has its own test below."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def card_of(recipe, dataset, architecture):
    """The card of a run with some options changed, and its TrainingConfig."""
    plain = make_card("decision_maker", str(ECHO_TINY), None, 12544, 28224, load_dataset(dataset))

    def card_of(changed: dict[str, Any]) -> tuple[AdapterCard, TrainingConfig]:
        config, sft, base = build(TYPES, {**recipe, **changed}, "recipe.yaml")
        return replace(
            plain, training=training_options(config, sft, base, lora_config(config, base, architecture))
        ), sft

    return card_of


@pytest.fixture
def resume(card_of, tmp_path):
    """Look for a checkpoint of the recipe that was trained with `before`, for a run with `now`."""

    def resume(now: dict[str, Any], before: dict[str, Any] | None = None, files: tuple[str, ...] = ("optimizer.pt",)):
        checkpoint = tmp_path / "checkpoint-2"
        checkpoint.mkdir(exist_ok=True)
        for name in (*files, COMPLETE_MARKER):
            (checkpoint / name).parent.mkdir(exist_ok=True)
            (checkpoint / name).touch()
        (checkpoint / "adapter_config.json").write_text("{}")
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 2, "epoch": 1.0}))
        write_card(checkpoint, card_of(before or {})[0])
        card, sft = card_of(now)
        sft.output_dir, sft.resume_from_checkpoint = str(tmp_path), str(checkpoint)
        return find_checkpoint(sft, {".": card})

    return resume


def test_every_training_option_is_classified():
    classes = [*FIXED, *FREE, *IRRELEVANT, *UNSUPPORTED, *WITHOUT_EFFECT, *DERIVED]
    # check_options refuses every value of these but one
    classes += ["max_length", "lora_task_type"]
    names = {option.name for record in TYPES for option in fields(record) if option.init}
    assert len(classes) == len({*classes})
    assert names - {*classes} == set(), "say in echo_ft.training.option_changes what a resume does with these options"
    assert {*classes} - names == {"cases_per_step", "mixed_precision"}
    assert {*FIXED} == {*REFUSED_VALUES, *SET_ONLY, "cases_per_step", "mixed_precision"}
    assert {*FREE} == {*FREE_VALUES, "vision_learning_rate", "merger_learning_rate"}


@pytest.mark.parametrize("name", [*REFUSED_VALUES, *DERIVED])
def test_a_changed_option_that_a_checkpoint_determines_is_refused(resume, name):
    recorded, value = DERIVED[name] if name in DERIVED else (name, REFUSED_VALUES[name])
    before = {"metric_for_best_model": "loss", "greater_is_better": False}
    message = rf"checkpoint-2 was trained with {recorded} .*, not .*; resume with the same"
    if recorded == "cases_per_step":
        message = r"trained with 8 cases per step, not \d+; set gradient_accumulation_steps so that .* is 8, or"
    with pytest.raises(EchoError, match=message):
        resume({**before, name: value}, before)


@pytest.mark.parametrize("name", FREE_VALUES)
def test_a_changed_option_that_a_resume_can_honour_is_reported_and_recorded(resume, name, capsys):
    now = {name: FREE_VALUES[name]}
    if name == "load_best_model_at_end":
        now |= {"save_strategy": "epoch"}
    found = resume(now)
    (change,) = found.resumed["."]
    assert change.startswith(f"{name} from ")
    assert change.endswith(" after step 2")
    assert f"the resumed run changes {name} from" in capsys.readouterr().err


def test_options_that_do_not_change_what_is_learnt_are_free(resume, capsys):
    found = resume(
        {"logging_steps": 3, "save_strategy": "epoch", "gradient_checkpointing": True, "dataloader_num_workers": 2}
        | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "run_name": "again", "data_seed": 0}
        | {"accelerator_config": {"non_blocking": True}}
    )
    assert found.resumed == {".": []}
    assert capsys.readouterr().err == ""


def test_separate_rates_of_parts_change_only_from_rate_to_rate(resume):
    assert len(resume({"vision_learning_rate": 1e-5}, {"vision_learning_rate": 1e-4}).resumed["."]) == 1
    for before, now in ((None, 1e-5), (1e-5, None)):
        with pytest.raises(EchoError, match="trained with merger_learning_rate"):
            resume({"merger_learning_rate": now}, {"merger_learning_rate": before})


def test_a_schedule_that_reacts_to_the_loss_keeps_its_rates(resume):
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss", "greater_is_better": False}
    with pytest.raises(EchoError, match="trained with lr_scheduler_type cosine, not reduce_lr_on_plateau"):
        resume(plateau)
    with pytest.raises(EchoError, match=r"trained with learning_rate 0\.001, not 1e-05"):
        resume({**plateau, "learning_rate": 1e-5}, plateau)


def test_a_checkpoint_without_the_optimizer_of_this_topology_is_refused(resume):
    with pytest.raises(EchoError, match=r"checkpoint-2 has no optimizer state .*; give another checkpoint, or choose"):
        resume({}, files=())


@pytest.mark.parametrize(
    ("file", "kind"), [("global_step2/rank_0_optim_states.pt", "ZeRO"), ("optimizer_0/part.distcp", "FSDP")]
)
def test_a_checkpoint_of_another_topology_is_refused(resume, file, kind):
    with pytest.raises(EchoError, match=f"holds the optimizer state of {kind}; resume it with the accelerate config"):
        resume({}, files=(file,))


def test_fsdp_of_an_accelerate_config_reads_its_own_optimizer_state(resume, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(EchoError, match="holds the optimizer state of a run without ZeRO or FSDP"):
        resume({})
    assert resume({}, files=("optimizer_0/part.distcp",)).resumed == {".": []}


def test_options_apply_although_zero_leaves_out_an_empty_group():
    weight = torch.nn.Parameter(torch.zeros(1))
    new = torch.optim.AdamW([{"params": [weight], "weight_decay": 0.5}, {"params": [], "weight_decay": 0.0}], lr=1e-5)
    old = torch.optim.AdamW([{"params": [weight]}], lr=1e-3)
    schedule = get_scheduler("linear", old, 0, 10)
    schedule.last_epoch = 5
    apply_options(schedule, optimizer_options(new))
    assert (old.param_groups[0]["lr"], old.param_groups[0]["weight_decay"]) == (0.5e-5, 0.5)
    assert schedule.get_last_lr() == [0.5e-5]
    old.step()
    schedule.step()
    assert old.param_groups[0]["lr"] == pytest.approx(0.4e-5)


def test_a_schedule_that_reacts_to_the_loss_takes_all_options_but_rates():
    weight = torch.nn.Parameter(torch.zeros(1))
    new = torch.optim.AdamW([weight], lr=1e-5, weight_decay=0.5, betas=(0.5, 0.6), eps=1e-3)
    for name in ("reduce_lr_on_plateau", "greedy"):
        old = torch.optim.AdamW([weight], lr=1e-3)
        apply_options(get_scheduler(name, old), optimizer_options(new))
        group = old.param_groups[0]
        assert [group[key] for key in ("lr", "weight_decay", "betas", "eps")] == [1e-3, 0.5, (0.5, 0.6), 1e-3]


def test_any_changed_byte_of_a_checkpoint_is_refused_with_the_name_of_its_file(resume, card_of, tmp_path):
    resume({})
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "global_step2").mkdir()
    for name in ("optimizer.pt", "rng_state.pth", "global_step2/states.pt"):
        (checkpoint / name).write_bytes(bytes(range(256)))
    seal_folder(checkpoint)
    card, sft = card_of({})
    sft.output_dir, sft.resume_from_checkpoint = str(tmp_path), str(checkpoint)
    assert find_checkpoint(sft, {".": card}).resumed == {".": []}
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) >= 8
    for path in files:
        content = path.read_bytes()
        for place in random.Random(path.name).sample(range(len(content)), min(5, len(content))):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(
                EchoError, match=r"since it was saved; give another|SHA256SUMS cannot be read"
            ) as refused:
                find_checkpoint(sft, {".": card})
            assert path.name == CHECKSUMS or f"{path} has changed" in str(refused.value)
        path.write_bytes(content)


def test_a_run_shorter_than_its_checkpoint_is_refused(resume):
    for short, shown in (({"max_steps": 1}, "max_steps 1"), ({"num_train_epochs": 0.5}, r"num_train_epochs 0\.5")):
        with pytest.raises(EchoError, match=f"was trained for longer .* than {shown}; give an earlier checkpoint"):
            resume(short)
    assert resume({"max_steps": 2}, {"max_steps": 2}).resumed == {".": []}


def test_an_earlier_checkpoint_is_not_resumed_beside_a_later_one(resume, tmp_path):
    """If that run were stopped before step 4, `true` would resume from the weights that the user went back from."""
    later = tmp_path / "checkpoint-4"
    later.mkdir()
    assert resume({}).path.endswith("checkpoint-2")  # an incomplete checkpoint is never resumed from
    (later / COMPLETE_MARKER).touch()
    with pytest.raises(EchoError, match=r"checkpoint-4 is later than .*checkpoint-2, .*; delete it, or choose another"):
        resume({})


def test_a_card_of_an_older_version_resumes_with_a_warning(resume, card_of, tmp_path, capsys):
    resume({})
    checkpoint = tmp_path / "checkpoint-2"
    old = json.loads((checkpoint / ADAPTER_CARD).read_text())
    del old["training"], old["resumed"]
    (checkpoint / ADAPTER_CARD).write_text(json.dumps(old))
    (checkpoint / CHECKSUMS).unlink()  # an older version wrote none
    assert read_card(checkpoint).training == {}
    card, sft = card_of({})
    peft = {"r": 16, "lora_alpha": 32, "target_modules": card.training["lora_target_modules"], "use_dora": False}
    sft.output_dir, sft.resume_from_checkpoint = str(tmp_path), str(checkpoint)
    for changed, message in (({}, ""), ({"r": 4}, "lora_r 4, not 16"), ({"target_modules": ["q_proj"]}, "lora_target")):
        (checkpoint / "adapter_config.json").write_text(json.dumps({**peft, **changed}))
        if changed:
            with pytest.raises(EchoError, match=f"trained with {message}"):
                find_checkpoint(sft, {".": card})
        else:
            assert find_checkpoint(sft, {".": card}).resumed == {".": []}
            assert "does not list its training options" in capsys.readouterr().err


STEPS = ["--max_steps", 4, "--logging_steps", 1, "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", 2]
STEPS += ["--warmup_steps", 0, "--per_device_train_batch_size", 2, "--lora_target_modules", "q_proj", "v_proj"]


@pytest.fixture(scope="module")
def stopped(dataset, tmp_path_factory):
    """The checkpoint after two of four steps."""
    output = tmp_path_factory.mktemp("stopped") / "decision_maker"
    run_in_process(*tiny_options("decision_maker", dataset, output, *STEPS))
    return output / "checkpoint-2"


def switch(option: str, value: Any, trainer: Any, optimizer: Any, schedule: Any) -> None:
    """Change an option while a training is running, without the trainer's own code for resumes."""
    groups = optimizer.param_groups
    for group in groups:
        if option == "learning_rate":
            group["initial_lr"] = value
        elif option == "weight_decay":
            group["weight_decay"] = value if group["weight_decay"] or group is groups[0] else 0.0
        elif option == "adam_beta1":
            group["betas"] = (value, group["betas"][1])
    if option == "max_grad_norm":
        trainer.args.max_grad_norm = value
    if option == "lora_dropout":
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.ModuleDict) and "default" in module:
                module.update(
                    {
                        name: torch.nn.Dropout(value)
                        for name, one in module.items()
                        if isinstance(one, (torch.nn.Dropout, torch.nn.Identity))
                    }
                )
    name, steps = (value if option == "lr_scheduler_type" else "cosine"), (value if option == "max_steps" else 4)
    fresh = get_scheduler(name, torch.optim.SGD([torch.zeros(1)], lr=1.0), 0, steps)
    schedule.base_lrs = [group["initial_lr"] for group in groups]
    schedule.lr_lambdas = [fresh.lr_lambdas[0]] * len(groups)
    for group in groups:
        group["lr"] = group["initial_lr"] * fresh.lr_lambdas[0](2)


SLOW_SWITCHES = {"lr_scheduler_type": "linear", "max_steps": 6, "weight_decay": 0.5, "adam_beta1": 0.5}
SLOW_SWITCHES |= {"max_grad_norm": 1e-3, "lora_dropout": 0.5}


@pytest.mark.parametrize(
    ("option", "value"),
    [("learning_rate", 1e-5), *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW_SWITCHES.items())],
)
def test_a_changed_option_gives_the_adapter_of_a_run_that_changes_it(
    stopped, dataset, tmp_path, monkeypatch, option, value
):
    resumed = [*STEPS, f"--{option}", value, "--resume_from_checkpoint", stopped]
    run_in_process(*tiny_options("decision_maker", dataset, tmp_path / "resumed", *resumed))

    def on_step_end(self, args, state, control, optimizer, lr_scheduler, **kwargs):
        if state.global_step == 2:
            switch(option, value, self.trainer, optimizer, lr_scheduler)

    monkeypatch.setattr(DrawnEpoch, "on_step_end", on_step_end)
    whole = [*STEPS, *(["--max_steps", value] if option == "max_steps" else [])]
    if option == "max_steps":  # the first two steps belong to the schedule of four

        def on_train_begin(self, args, state, control, lr_scheduler, **kwargs):
            four = get_scheduler("cosine", torch.optim.SGD([torch.zeros(1)], lr=1.0), 0, 4)
            lr_scheduler.lr_lambdas = [four.lr_lambdas[0]] * len(lr_scheduler.lr_lambdas)

        monkeypatch.setattr(DrawnEpoch, "on_train_begin", on_train_begin)
    run_in_process(*tiny_options("decision_maker", dataset, tmp_path / "whole", *whole))
    found = load_file(tmp_path / "resumed" / "adapter_model.safetensors")
    expected = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    before = load_file(stopped.parent / "adapter_model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(found[name], before[name]) for name in expected)
    card = read_card(tmp_path / "resumed")
    assert card.training[option] == value
    assert [sentence.split()[0] for sentence in card.resumed] == [option]


def test_a_resume_with_other_cases_is_refused(stopped, dataset, tmp_path):
    """The order of an epoch depends on their number, so some would come twice in it and others never."""
    assert read_card(stopped).cases == 8
    copied = tmp_path / "copied"
    shutil.copytree(dataset, copied)
    next((copied / "images").glob("train_0_2.png")).unlink()
    arguments = [*STEPS, "--resume_from_checkpoint", stopped]
    with pytest.raises(EchoError, match=r"trained on 8 cases, not \d; rejected_train.jsonl lists .* ignore_data_skip"):
        run_in_process(*tiny_options("decision_maker", copied, tmp_path / "out", *arguments))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora_r", 8], "lora_r 16, not 8"),
        (["--lora_alpha", 4], "lora_alpha 32, not 4"),
        (["--lora_target_modules", "q_proj"], 'lora_target_modules .*, not ."q_proj".'),
    ],
)
def test_another_adapter_is_refused_before_the_model_is_loaded(
    stopped, dataset, tmp_path, monkeypatch, options, message
):
    def load_model(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("train.sft.load_model", load_model)
    arguments = [*STEPS, *options, "--resume_from_checkpoint", stopped]
    with pytest.raises(EchoError, match=f"trained with {message}"):
        run_in_process(*tiny_options("decision_maker", dataset, tmp_path / "out", *arguments))
