"""Options that would make training fail are refused, and named, before the first weight is loaded."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
import torch
from safetensors.torch import load_file
from trl import ModelConfig

from echo_ft.config import build
from echo_ft.errors import EchoError
from echo_ft.model.architectures import meta_model
from echo_ft.training.checks import check_optimizer, check_options, check_precision, check_trained_parts
from echo_ft.training.config import EchoConfig, TrainingConfig, check_adapt_from, lora_config
from echo_ft.training.costs.memory import trainable_meta_model
from tests.conftest import ECHO_TINY, make_dataset
from tests.support.training import run_in_process, tiny_options

TYPES: list[Any] = [EchoConfig, TrainingConfig, ModelConfig]

FREE_TEXT = {
    "dataset": "load_dataset refuses it",
    "model_name_or_path": "load_processor refuses it",
    "model_revision": "load_processor refuses it",
    "resume_from_checkpoint": "find_checkpoint refuses it",
    "features": "a folder that is created",
    "output_dir": "a folder that is created",
    "optim_target_modules": "used by optimizers that look into the model",
    "run_name": "a name",
    "project": "a name",
    "trackio_space_id": "a name",
    "trackio_bucket_id": "a name",
    "trackio_static_space_id": "a name",
    "hub_model_id": "read with push_to_hub",
    "hub_token": "read with push_to_hub",
    "hub_revision": "read with push_to_hub",
    "bnb_4bit_quant_storage": "read with load_in_4bit",
    "metric_for_best_model": "read with an evaluation, and tried below",
}
"""Options for which any text is accepted at first, and why."""

NO_MAPPING_CHECK = {"liger_kernel_config": "read with use_liger_kernel", "fsdp_config": "read with fsdp"}
"""Options with a mapping that nothing reads in a plain run."""


@pytest.fixture(scope="module")
def check(recipe, architecture):
    """Check the recipe with some options changed, as a dry run does before it reads the dataset."""

    def check(changed: dict[str, Any]) -> TrainingConfig:
        config, sft, base = build(TYPES, {**recipe, **changed}, "recipe.yaml")
        check_options(sft, base, config)
        check_precision(sft, base, on_cpu=True)
        lora_config(config, base, architecture)
        check_optimizer(sft, architecture)
        return sft

    return check


def broken_values(name: str, hint: Any) -> list[Any]:
    """Values that no option of this type can have, and numbers that are outside every range."""
    text = str(hint)
    values: list[Any] = []
    if "bool" in text or name not in FREE_TEXT:
        values += ["nonsense"]
    if "int" in text.replace("hint", "") or "float" in text:
        values += [float("nan"), -2, 1e300]
    if "int" in text and "float" not in text:
        values += [1.5]
    if "dict" in text:
        values += ["{broken"]
        values += [] if name in NO_MAPPING_CHECK else [{"nonsense": 1}]
    elif "Any" not in text:
        values += [{"nonsense": 1}]
    return values


OPTIONS = [(option.name, get_type_hints(record)[option.name]) for record in TYPES for option in fields(record)]


def test_the_recipe_itself_passes(check):
    check({})


@pytest.mark.parametrize(("name", "hint"), [one for one in OPTIONS if one[0] != "dry_run"])
def test_a_broken_value_is_refused_with_the_name_of_the_option(check, name, hint):
    for value in broken_values(name, hint):
        with pytest.raises(EchoError) as caught:
            check({name: value})
        assert name in str(caught.value).lower(), value
        assert "\n" not in str(caught.value) or name == "parallelism_config"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; set a value from 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0, so nothing would be trained"),
        ({"lora_r": 0}, "lora_r is 0; set a value from 1 to 16384"),
        ({"lora_alpha": 10**9}, r"lora_alpha is 1e\+09; set a value from 1"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1; set a value from 0"),
        ({"adam_beta1": 1.0}, "adam_beta1 is 1; set a value from 0"),
        ({"corrupted_share": 1.5}, r"corrupted_share is 1\.5; set a value from 0 to 1"),
        ({"seed": 2**32}, "seed is"),
        ({"optim": "galore_adamw"}, "optim galore_adamw cannot be used .*galore_torch"),
        ({"optim": "lomo"}, "optim lomo cannot be used .*lomo"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim sgd with optim_args momentum cannot be used"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "optim sgd with optim_args momentum=-1 cannot be used"),
        ({"report_to": "mlflow"}, "report_to mlflow needs a package that is not installed"),
        ({"report_to": "wanbd"}, "report_to cannot be 'wanbd'; choose from none, .*wandb"),
        ({"use_liger_kernel": True}, "use_liger_kernel needs a package"),
        ({"torch_compile": True, "torch_compile_backend": "x"}, "torch_compile_backend cannot be 'x'; choose from"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type cosine_with_min_lr cannot be used"),
        ({"lr_scheduler_kwargs": {"cycles": 2}}, "lr_scheduler_kwargs .*'cycles'"),
        ({"lr_scheduler_kwargs": {"num_cycles": "two"}}, "lr_scheduler_kwargs .* cannot be used"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1}}, "lr_scheduler_type polynomial"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "no"}, "reduce_lr_on_plateau requires"),
        ({"load_best_model_at_end": True, "save_strategy": "epoch", "metric_for_best_model": "f1"}, "'f1'; choose fr"),
        *(
            ({"metric_for_best_model": name}, f"metric_for_best_model cannot be '{name}'; choose from loss, mean_token")
            for name in ("runtime", "samples_per_second", "eval_steps_per_second", "num_tokens")
        ),
        ({"metric_for_best_model": "entropy"}, "'entropy'; choose from .*, or set greater_is_better: false"),
        ({"metric_for_best_model": "entropy", "greater_is_better": True}, "or set greater_is_better: false"),
        ({"save_strategy": "best"}, "save_strategy best needs metric_for_best_model"),
        ({"fp16": True}, "fp16 needs a GPU.*set fp16: false or bf16"),
        ({"attn_implementation": "flex_attention"}, "flex_attention has no backward pass on a CPU"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers needs workers; set dataloader_num_w"),
        ({"dataloader_multiprocessing_context": "spawn"}, "dataloader_multiprocessing_context needs workers"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config: dispatch_batches needs .*remove it"),
        ({"fsdp": "full_shard"}, "fsdp needs several processes; remove it, and use python -m train.launch"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha is not supported: rows are packed"),
        ({"push_to_hub": True}, "push_to_hub needs a connection, but HF_HUB_OFFLINE is set"),
        ({"push_to_hub": True, "hub_model_id": "a b"}, "hub_model_id a b cannot be used"),
        (
            {"gradient_checkpointing_kwargs": {"every": 2}},
            "gradient_checkpointing_kwargs or .*every",
        ),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "int3"}, "bnb_4bit_quant_storage int3 cannot be used"),
        ({"load_in_4bit": True, "dtype": "auto"}, "dtype auto is incompatible with load_in_4bit.*set dtype: bfloat16"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is not supported: .*cases per step"),
        ({"lora_r": 1, "lora_alpha": 1001}, "lora_alpha 1001 with lora_r 1 is a scale of 1001 in model"),
        (
            {"lora_r": 1, "alpha_pattern": {"q_proj": 5000}},
            r"lora_alpha 5000 with lora_r 1 is a scale of 5000 in .*q_proj; set at most 1000 times lora_r",
        ),
        (
            {"lora_r": 16, "lora_alpha": 2000, "rank_pattern": {"v_proj": 1}},
            r"lora_alpha 2000 with lora_r 1 is a scale of 2000 in .*v_proj",
        ),
        ({"lora_task_type": "SEQ_CLS"}, "lora_task_type cannot be 'SEQ_CLS'"),
        ({"lora_modules_to_save": ["head"]}, "lora_modules_to_save: the model has no module head"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights cannot be 'pissa'; choose from true, false, gaussian"),
        ({"rank_pattern": {"lm_head": 4}}, "rank_pattern: lm_head matches no module in lora_target_modules"),
        ({"rank_pattern": {"q_proj": 2.5}}, r"rank_pattern: q_proj is 2\.5; set a whole number"),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern: .* is not a regular expression"),
    ],
)
def test_an_option_that_training_would_fail_on_is_refused(check, changed, message):
    with pytest.raises(EchoError, match=message):
        check(changed)


def test_batches_are_not_split_among_processes(check, monkeypatch):
    options = {"accelerator_config": {"split_batches": True}}
    check(options)
    monkeypatch.setattr(TrainingConfig, "world_size", 2)
    with pytest.raises(EchoError, match=r"split_batches would divide each batch among the processes.*remove it"):
        check(options)


def test_numbers_in_a_mapping_are_numbers(check):
    text = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "1e-6"}}
    assert check(text).lr_scheduler_kwargs == {"min_lr": 1e-6}


@pytest.mark.parametrize("name", ["runs[2]", "runs*", "run?", "runs[2]/decision_maker"])
def test_a_run_with_deepspeed_needs_an_output_that_is_no_pattern(check, recipe, tmp_path, name):
    check({"output_dir": str(tmp_path / name)})
    _, sft, base = build(TYPES, {**recipe, "output_dir": str(tmp_path / name)}, "recipe.yaml")
    sft.deepspeed_plugin = object()  # type: ignore[assignment]
    with pytest.raises(EchoError, match=r"could not resume from .* as a pattern; choose an output_dir without"):
        check_options(sft, base)


def test_a_push_to_the_hub_needs_a_token(check, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(EchoError, match="push_to_hub needs a Hugging Face Hub token; run `hf auth login`"):
        check({"push_to_hub": True})


def test_only_the_first_process_of_a_training_asks_the_hub(check, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    check({"push_to_hub": True, "dry_run": True})
    monkeypatch.setattr(TrainingConfig, "process_index", 1)
    check({"push_to_hub": True})


def test_entropy_may_choose_the_best_checkpoint_if_less_is_better(check):
    check({"metric_for_best_model": "entropy", "greater_is_better": False})


def test_peft_refuses_an_odd_rank_for_an_orthogonal_start(recipe):
    config, _, base = build(TYPES, {**recipe, "init_lora_weights": "orthogonal", "lora_r": 3}, "recipe.yaml")
    with pytest.raises(EchoError, match=r"PEFT refuses the adapter: .*even.*init_lora_weights"):
        trainable_meta_model(config, base)


def test_every_linear_layer_and_patterns_are_found_as_in_peft(recipe, architecture):
    def targets(value: Any) -> list[str]:
        config, _, base = build(TYPES, {**recipe, "lora_target_modules": value}, "recipe.yaml")
        return sorted(lora_config(config, base, architecture).target_modules)

    language = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    vision = ["attn.proj", "fc1", "fc2", "merger.mlp.0", "merger.mlp.2", "qkv"]
    assert targets("all-linear") == targets(["all-linear"]) == sorted([*language, *vision])
    assert targets(r".*language_model.*\.(q|v)_proj") == ["q_proj", "v_proj"]
    assert targets(r".*layers\.0\..*(q|v)_proj") == ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"]
    assert targets("q_proj") == targets(["q_proj"]) == ["q_proj"]
    for wrong, message in ((".*head", "lm_head, the output layer"), (".*", "a Qwen2VLModel"), ("(q", "regular expres")):
        with pytest.raises(EchoError, match=message):
            targets(wrong)


@pytest.mark.parametrize("target", ["all-linear", r".*language_model.*\.(q|v)_proj"])
def test_resolved_targets_are_the_modules_that_peft_adapts(recipe, target):
    from peft import LoraConfig, get_peft_model

    config, _, base = build(TYPES, {**recipe, "lora_target_modules": target}, "recipe.yaml")
    ours = trainable_meta_model(config, base)
    theirs = get_peft_model(meta_model(str(ECHO_TINY)), LoraConfig(r=16, target_modules=target))

    def adapted(model: Any) -> set[str]:
        return {name for name, _ in model.named_parameters() if "lora_A" in name}

    assert adapted(ours) == adapted(theirs)
    assert adapted(ours)


def test_a_rate_without_trained_weights_is_refused_on_the_meta_device(recipe):
    changed = {"lora_target_modules": ["q_proj"], "vision_learning_rate": 1e-5}
    config, _, base = build(TYPES, {**recipe, **changed}, "recipe.yaml")
    with pytest.raises(EchoError, match="no weights of the vision tower are trained"):
        check_trained_parts(trainable_meta_model(config, base), config)


def test_a_dry_run_refuses_what_the_training_refuses(tmp_path):
    dataset = make_dataset(tmp_path / "data", train=2, validation=1, test=1)
    for wrong in (["--lora_target_modules", "q_prj"], ["--optim", "lomo"], ["--lora_r", 0]):
        options = tiny_options("decision_maker", dataset, tmp_path / "out", *wrong)
        messages = []
        for more in ([], ["--dry_run"]):
            with pytest.raises(EchoError) as caught:
                run_in_process(*options, *more)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    "options",
    [
        ["--lora_target_modules", "all-linear"],
        ["--lora_target_modules", r".*language_model.*\.(q|v)_proj", "--rank_pattern", '{"q_proj": 4}'],
        pytest.param(
            ["--init_lora_weights", "gaussian", "--alpha_pattern", '{"layers.0.self_attn.q_proj": 64}'],
            marks=pytest.mark.slow,
        ),
        pytest.param(["--init_lora_weights", "orthogonal"], marks=pytest.mark.slow),
        pytest.param(["--init_lora_weights", "false"], marks=pytest.mark.slow),
    ],
    ids=lambda options: options[1],
)
def test_options_of_peft_train_and_load_again(tmp_path, options):
    from echo_ft.model.adapters import attach_adapters, read_card
    from echo_ft.model.loading import load_model

    dataset = make_dataset(tmp_path / "data", train=2, validation=1, test=1)
    once = ["--max_steps", 1, "--eval_strategy", "no", "--per_device_train_batch_size", 1, *options]
    run_in_process(*tiny_options("decision_maker", dataset, tmp_path / "out", *once))
    training = read_card(tmp_path / "out").training
    assert isinstance(training["lora_target_modules"], list)
    assert "all-linear" not in training["lora_target_modules"]
    model = attach_adapters(load_model(str(ECHO_TINY)), {"decision_maker": tmp_path / "out"})
    ranks = {name.split(".layers.")[-1]: one.shape[0] for name, one in model.named_parameters() if "lora_A" in name}
    assert set(ranks.values()) == ({4, 16} if "--rank_pattern" in options else {16})
    scales = {name: one.scaling["decision_maker"] for name, one in model.named_modules() if hasattr(one, "lora_A")}
    changed = [
        name for name, scale in scales.items() if scale == 64 / 16 and name.endswith("layers.0.self_attn.q_proj")
    ]
    assert len(changed) == ("--alpha_pattern" in options)


LATE = {"lora_target_modules": ["q_proj", "v_proj"], "mask_loss": 0.0}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_target_modules": ["q_proj", "attn.qkv"]}, r"names blocks.0.attn.qkv of the vision tower; name only"),
        ({"lora_target_modules": ["q_proj", "merger.mlp.0"]}, r"names merger.mlp.0 of the merger; name only"),
        ({"use_peft": False}, "needs an adapter; set use_peft: true, or adapt_from: prefix"),
        ({"mask_loss": 0.5}, "incompatible with mask_loss; remove mask_loss"),
        ({"lora_modules_to_save": ["norm"]}, "incompatible with lora_modules_to_save"),
        ({"use_dora": True}, "incompatible with use_dora"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_an_adapter_after_the_prefix_cannot_have_is_refused(recipe, changed, message):
    for start in ("branch", "answer"):
        config, _, base = build(TYPES, {**recipe, **LATE, **changed, "adapt_from": start}, "recipe.yaml")
        if start == "branch" and "use_dora" in changed:
            check_adapt_from(config, base, trainable_meta_model(config, base))
            continue
        with pytest.raises(EchoError, match=f"adapt_from {start} .*{message}"):
            check_adapt_from(config, base, trainable_meta_model(config, base))


@pytest.mark.parametrize("start", [pytest.param("branch", marks=pytest.mark.slow), "answer"])
def test_an_adapter_after_the_prefix_trains_resumes_and_says_where_it_acts(tmp_path, start):
    from echo_ft.model.adapters import read_card

    dataset = make_dataset(tmp_path / "data", train=2, validation=1, test=1)
    late = ["--adapt_from", start, "--mask_loss", 0, "--lora_target_modules", "q_proj", "v_proj"]
    once = [*late, "--max_steps", 2, "--per_device_train_batch_size", 1, "--save_strategy", "steps", "--save_steps", 1]
    run_in_process(*tiny_options("decision_maker", dataset, tmp_path / "out", *once))
    resumed = ["--resume_from_checkpoint", tmp_path / "out" / "checkpoint-1"]
    run_in_process(*tiny_options("decision_maker", dataset, tmp_path / "again", *once, *resumed))
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "again")]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert any(weight.any() for name, weight in weights[0].items() if "lora_B" in name)
    assert read_card(tmp_path / "out").adapt_from == start
    assert f'| adapt_from | "{start}" |' in (tmp_path / "out" / "README.md").read_text()
    for folder in ("out", "out/checkpoint-1"):
        tokens = json.loads((tmp_path / folder / "adapter_config.json").read_text())["alora_invocation_tokens"]
        assert bool(tokens) == (start == "answer")
    with pytest.raises(EchoError, match=f"was trained with adapt_from {start}, not prefix"):
        other = [*once, *resumed, "--adapt_from", "prefix"]
        run_in_process(*tiny_options("decision_maker", dataset, tmp_path / "other", *other))
