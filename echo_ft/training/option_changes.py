"""The options that decide what is learnt: which may change when training resumes, and what a change does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_ft.errors import EchoError
from echo_ft.terminal import LOGGER

if TYPE_CHECKING:
    from peft import LoraConfig
    from trl import ModelConfig, SFTConfig

    from echo_ft.training.config import EchoConfig

FIXED = (
    "cases_per_step", "seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last", "accelerator_config",
    "mixed_precision", "tf32", "dtype", "optim", "optim_args", "optim_target_modules", "loss_type",
    "average_tokens_across_devices", "shuffle_options", "metric_for_best_model", "greater_is_better", "use_peft",
    "lora_r", "lora_alpha", "lora_target_modules", "lora_modules_to_save", "use_rslora", "use_dora",
    "init_lora_weights", "rank_pattern", "alpha_pattern", "bnb_4bit_quant_type", "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
)  # fmt: skip
"""Options that a checkpoint determines. Training refuses to resume with other values.

`cases_per_step` is the batch of all processes with accumulation, and `mixed_precision` comes from bf16 and fp16.
"""

FREE = (
    "learning_rate", "vision_learning_rate", "merger_learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "num_train_epochs", "max_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "lora_dropout", "eval_strategy", "eval_steps", "eval_delay", "load_best_model_at_end",
    "early_stopping_patience", "early_stopping_threshold", "max_tokens", "ignore_data_skip",
)  # fmt: skip
"""Options that decide what is learnt, but may change when training resumes. They apply from the resumed step on."""

IRRELEVANT = (
    # The card has fields for the first of these.
    "role", "by_role", "dataset", "min_pixels", "max_pixels", "corrupted_share", "mask_loss", "adapt_from",
    "model_name_or_path", "model_revision", "load_in_4bit", "load_in_8bit", "features", "features_gib", "dry_run",
    "attn_implementation", "output_dir", "resume_from_checkpoint", "local_rank", "do_train", "do_eval", "do_predict",
    "use_cpu", "use_cache",
    # These options control what is logged, reported, pushed and saved.
    "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter",
    "include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name",
    "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "save_only_model", "save_strategy",
    "save_steps", "save_on_each_node", "save_total_limit", "enable_jit_checkpoint", "push_to_hub", "hub_token",
    "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "debug",
    "skip_memory_metrics", "restore_callback_states_from_checkpoint",
    # These options control how an evaluation runs.
    "per_device_eval_batch_size", "prediction_loss_only", "eval_on_start", "eval_do_concat_batches",
    "eval_use_gather_object", "eval_accumulation_steps", "bf16_full_eval", "fp16_full_eval",
    # These options affect only speed, memory and rounding.
    "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "use_liger_kernel", "liger_kernel_config", "torch_empty_cache_steps",
    "activation_offloading", "full_determinism", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
    "dataloader_in_order", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "parallelism_config",
)  # fmt: skip
"""Options that do not change what is learnt, or that other files and card fields of the checkpoint cover."""

_ORDER = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")
"""Keys of accelerator_config that decide which cases a step takes. The other keys affect only speed."""

_PEFT_NAMES = {
    "r": "lora_r", "lora_alpha": "lora_alpha", "target_modules": "lora_target_modules", "use_rslora": "use_rslora",
    "use_dora": "use_dora", "modules_to_save": "lora_modules_to_save", "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}  # fmt: skip
"""Options that PEFT's adapter_config.json records too, even where an older version wrote the card."""


def training_options(config: EchoConfig, sft: SFTConfig, base: ModelConfig, lora: LoraConfig | None) -> dict[str, Any]:
    """Return the options that decide what is learnt, FIXED and FREE, as JSON values for the card.

    `lora` is the adapter's config with the names of its target modules, or None for full fine-tuning.
    """
    merged = {**vars(base), **vars(sft), **vars(config)}
    merged["cases_per_step"] = sft.per_device_train_batch_size * sft.gradient_accumulation_steps * sft.world_size
    merged["data_seed"] = sft.seed if sft.data_seed is None else sft.data_seed
    merged["accelerator_config"] = sft.accelerator_config.to_dict()  # type: ignore[union-attr]
    if lora is None:
        merged |= {name: None for name in merged if name.startswith("lora_")}
        merged |= dict.fromkeys(("use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern"))
    else:
        merged["lora_target_modules"] = sorted(lora.target_modules or ())
        merged |= {name: merged[name] or {} for name in ("rank_pattern", "alpha_pattern")}
    if not (base.load_in_4bit or base.load_in_8bit):
        merged |= dict.fromkeys(("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"))
    found: dict[str, Any] = json.loads(json.dumps({name: merged[name] for name in (*FIXED, *FREE)}, default=str))
    return found


def compare_options(checkpoint: Path, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a sentence per changed option in FREE. Raises EchoError for a change that is not allowed."""
    if not before:  # an older version wrote the card
        before = _from_peft(checkpoint)
        LOGGER.warning(
            "the card of %s does not list its training options, because an older version wrote it; only LoRA's "
            "options are compared, so check the others, such as seed and batch size",
            checkpoint,
        )
    else:
        before = {"shuffle_options": False, **before}  # cards of older versions do not have this option
    for name in FIXED:
        # A run without a metric has no best value yet, so a metric may still be chosen.
        unset = name in ("metric_for_best_model", "greater_is_better") and None in (before.get(name), now.get(name))
        if name == "accelerator_config" and name in before:
            before, now = (
                {**options, name: {key: options[name].get(key) for key in _ORDER}} for options in (before, now)
            )
        if name == "cases_per_step" and before.get(name, now[name]) != now[name]:
            raise EchoError(
                f"{checkpoint} was trained with {before[name]} cases per step, not {now[name]}; set "
                "gradient_accumulation_steps so that per_device_train_batch_size x processes x accumulation is "
                f"{before[name]}, or choose another output_dir to start a new run"
            )
        if name in before and name in now and not unset:
            require_equal(checkpoint, name, before[name], now[name])
    changed = [name for name in FREE if name in before and before[name] != now[name]]
    adaptive = {"reduce_lr_on_plateau", "greedy"} & {before.get("lr_scheduler_type"), now["lr_scheduler_type"]}
    for name in changed:
        # These schedules keep learning rates in their state. A separate rate for one part needs an optimizer group of
        # its own.
        part = name in ("vision_learning_rate", "merger_learning_rate") and None in (before[name], now[name])
        if part or (adaptive and ("rate" in name or "lr_" in name)):
            require_equal(checkpoint, name, before[name], now[name])
    step = checkpoint.name.removeprefix("checkpoint-")
    return [f"{name} from {_shown(before[name])} to {_shown(now[name])} after step {step}" for name in changed]


def require_equal(checkpoint: Any, name: str, before: Any, now: Any) -> None:
    if before != now:
        raise EchoError(
            f"{checkpoint} was trained with {name} {_shown(before)}, not {_shown(now)}; resume with the same config, "
            "or choose another output_dir to start a new run"
        )


def _shown(value: Any) -> str:
    if value in (None, "", [], {}):
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _from_peft(checkpoint: Path) -> dict[str, Any]:
    """What PEFT's config in `checkpoint` says about the options of `training_options`."""
    file = checkpoint / "adapter_config.json"
    if not file.is_file():
        return {"use_peft": False}
    config = json.loads(file.read_text(encoding="utf-8"))
    found = {name: config[peft] for peft, name in _PEFT_NAMES.items() if peft in config}
    return {"use_peft": True, **found, "lora_target_modules": sorted(config["target_modules"])}


def optimizer_options(optimizer: Any) -> list[dict[str, Any]]:
    """Return the options of each nonempty parameter group of `optimizer`, as a new optimizer has them."""
    names, groups = ("lr", "weight_decay", "betas", "eps"), getattr(optimizer, "param_groups", ())
    return [{name: group[name] for name in names if name in group} for group in groups if group["params"]]


def apply_options(schedule: Any, options: list[dict[str, Any]]) -> None:
    """Make a resumed run use `options`, those of a new optimizer, instead of the checkpoint's, from its next step on.

    torch's `load_state_dict` restores the options of the optimizer and the schedule together with their states.
    Schedules that are not a function of the step keep the checkpoint's learning rates.
    """
    from torch.optim.lr_scheduler import LambdaLR

    optimizer = getattr(schedule, "optimizer", None)
    if optimizer is None:
        return
    # If no weight is exempt from weight decay, one group is empty. ZeRO (DeepSpeed 0.19) leaves it out.
    groups = optimizer.param_groups
    filled = [index for index, group in enumerate(groups) if group["params"]]
    for index, new in zip(filled, options, strict=True):
        groups[index].update({name: value for name, value in new.items() if name != "lr"})
        if not isinstance(schedule, LambdaLR):
            continue
        groups[index]["initial_lr"] = schedule.base_lrs[index] = new["lr"]
        groups[index]["lr"] = new["lr"] * schedule.lr_lambdas[index](schedule.last_epoch)
    if isinstance(schedule, LambdaLR):
        schedule._last_lr = [group["lr"] for group in groups]
