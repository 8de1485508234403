"""Options of train/sft.py that TRL does not have, checks of TRL's own options, and early stopping."""

from __future__ import annotations

import copy
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from transformers import EarlyStoppingCallback
from transformers.utils import is_torch_bf16_gpu_available
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config

from echo_ft.errors import EchoError
from echo_ft.model.adapter_layers import MAX_LORA_SCALE
from echo_ft.model.loading import check_lora_targets, parameter_group
from echo_ft.model.rows import ADAPT_FROM
from echo_ft.records import ROLES

ALL_ROLES = "all"
"""The value of `role` that trains one adapter per role in one run."""

ROLE_OPTIONS = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
"""Options that `by_role` can set for one role."""


@dataclass(frozen=True)
class EchoConfig:
    """Options of train/sft.py in addition to TRL's SFTConfig and ModelConfig."""

    role: str = field(
        metadata={
            "help": "The role to train. all trains the four adapters in one run over shared prefixes, and needs "
            "adapt_from branch or answer; output_dir then gets one folder per role.",
            "choices": [*ROLES, ALL_ROLES],
        }
    )
    dataset: str = field(metadata={"help": "Dataset folder, made by `python -m data_prep.build`."})
    min_pixels: int = field(metadata={"help": "Minimum number of pixels of a resized image."})
    max_pixels: int = field(metadata={"help": "Maximum number of pixels of a resized image (the pixel budget)."})
    max_tokens: int = field(
        default=32768,
        metadata={"help": "Rows with more tokens are rejected and listed before step 1. Rows are never truncated."},
    )
    vision_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the vision tower's trainable weights; default: learning_rate. With use_peft: "
            "false, 0 freezes the tower."
        },
    )
    merger_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the merger's trainable weights; default: learning_rate. With use_peft: false, 0 "
            "freezes the merger."
        },
    )
    features: str | None = field(
        default=None,
        metadata={
            "help": "Folder that stores the output of the frozen vision tower for each image. Later epochs, roles and "
            "runs reuse it. A folder under /dev/shm is in memory."
        },
    )
    features_gib: float = field(default=20.0, metadata={"help": "Size limit of the features folder in GiB."})
    corrupted_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training cases with a corrupted query, from 0 to 1. The seed selects the cases, the "
            "type of corruption and its severity (echo_ft/images/corruptions.py)."
        },
    )
    shuffle_options: bool = field(
        default=False,
        metadata={
            "help": "Show the options of each question in a random order, drawn from the seed in each epoch, and "
            "train on the letter that the correct option then has. Two options keep their order. Only the decision "
            "maker's questions have options."
        },
    )
    mask_loss: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the mask loss, from 0 (off) to 1. It is added to the loss of the completions. Linear "
            "heads learn from masks, boxes or polygons which image tokens of the query show the defect."
        },
    )
    adapt_from: str = field(
        default="prefix",
        metadata={
            "help": "Where the adapter begins to act: everywhere, from the branch on, or from the answer on. The base "
            "model computes what comes before, without a backward pass.",
            "choices": list(ADAPT_FROM),
        },
    )
    by_role: dict[str, dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "With role all, options for individual roles: {decision_maker: {learning_rate: 1.0e-4}}. They "
            f"can be {', '.join(ROLE_OPTIONS)}."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after this many evaluations without a better metric_for_best_model. Needs "
            "load_best_model_at_end. Default: train to the end."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "Smallest improvement of the metric that counts for early stopping."}
    )
    init_lora_weights: str = field(
        default="true",
        metadata={
            "help": "PEFT's initialization of the adapter. Other PEFT initializations change the base model, which "
            "all roles share, or need calibration data.",
            "choices": ["true", "false", "gaussian", "orthogonal"],
        },
    )
    rank_pattern: dict[str, int] | None = field(
        default=None,
        metadata={"help": "LoRA rank for some modules, by name or pattern, as in PEFT: {down_proj: 4}."},
    )
    alpha_pattern: dict[str, int] | None = field(
        default=None,
        metadata={"help": "LoRA alpha for some modules, by name or pattern, as in PEFT: {down_proj: 8}."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check everything and print a plan with a memory estimate. Needs no GPU and no weights."},
    )


@dataclass
class TrainingConfig(SFTConfig):
    """SFTConfig with checks for mistakes that transformers reports unclearly, or only after hours of training."""

    def __post_init__(self) -> None:
        # accelerate (1.15) passes on `use_cpu: true` from its config in this variable. transformers (5.23) then trains
        # on the CPU, but its check of bf16 reads only the option.
        self.use_cpu = self.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        if (self.bf16 or self.bf16_full_eval) and not self.use_cpu and not is_torch_bf16_gpu_available():
            raise EchoError(
                "bf16 is set, but there is no GPU that computes in bfloat16; set use_cpu: true or start with "
                "recipes/accelerate/cpu.yaml to train on the CPU, or set bf16: false"
            )
        if self.load_best_model_at_end:
            self._check_checkpoints()
        super().__post_init__()

    def _check_checkpoints(self) -> None:
        """Raise EchoError unless every evaluation that may be the best one has a checkpoint."""
        evaluates, saves = (getattr(value, "value", value) for value in (self.eval_strategy, self.save_strategy))
        if evaluates == "no":
            raise EchoError(
                "load_best_model_at_end is set, but eval_strategy is no, so there is no best checkpoint; set "
                "eval_strategy and save_strategy to epoch, or remove load_best_model_at_end"
            )
        if saves not in (evaluates, "best"):
            raise EchoError(
                f"load_best_model_at_end needs a checkpoint for each evaluation, but eval_strategy is {evaluates} and "
                f"save_strategy is {saves}; set save_strategy: {evaluates}"
            )
        steps = self.eval_steps or self.logging_steps  # this is the default of transformers
        if saves == "steps" and steps != self.save_steps:
            raise EchoError(
                f"load_best_model_at_end needs a checkpoint for each evaluation, but eval_steps is {steps:g} and "
                f"save_steps is {self.save_steps:g}; set both to the same number"
            )


def check_early_stopping(config: EchoConfig, sft: SFTConfig) -> None:
    """Raise EchoError if the options of early stopping are out of range or contradict other options."""
    patience, threshold = config.early_stopping_patience, config.early_stopping_threshold
    if patience is None:
        if threshold:
            raise EchoError("early_stopping_threshold has no effect without early_stopping_patience; set both")
        return
    if patience < 1:
        raise EchoError(f"early_stopping_patience is {patience}; it must be a number of evaluations, at least 1")
    if not sft.load_best_model_at_end:
        raise EchoError(
            "early_stopping_patience is set without load_best_model_at_end, so training would stop late and keep the "
            "last weights; set load_best_model_at_end: true"
        )


def check_adapt_from(config: EchoConfig, base: ModelConfig, model: Any) -> None:
    """Raise EchoError for options that are incompatible with an adapter that acts after the prefix.

    `model` is what will be trained; it may be on the meta device.
    """
    name = f"adapt_from {config.adapt_from}"
    if config.adapt_from == "prefix":
        return
    if not base.use_peft:
        raise EchoError(f"{name} needs an adapter; set use_peft: true, or adapt_from: prefix")
    for weight, tensor in model.named_parameters():
        part = parameter_group(weight)
        if tensor.requires_grad and part != "language model":
            module = weight.partition(".lora_")[0].partition("visual.")[2]
            raise EchoError(
                f"{name} trains nothing that runs before it, but lora_target_modules names {module} of the {part}; "
                "name only modules of the language model, such as q_proj and v_proj, or set adapt_from: prefix"
            )
    refused = {"mask_loss": config.mask_loss, "lora_modules_to_save": base.lora_modules_to_save}
    if config.adapt_from == "answer":
        refused["use_dora"] = base.use_dora  # PEFT (0.21) has no aLoRA with DoRA
    for option, value in refused.items():
        if value:
            raise EchoError(f"{name} is incompatible with {option}; remove {option}, or set adapt_from: prefix")


def trained_roles(config: EchoConfig) -> tuple[str, ...]:
    """The roles that this run trains."""
    return ROLES if config.role == ALL_ROLES else (config.role,)


def adapter_folder(config: EchoConfig, output: Path, role: str) -> Path:
    """The folder of a role's adapter in `output`, which is output_dir or a checkpoint."""
    return output / role if config.role == ALL_ROLES else output


def role_arguments(sft: SFTConfig, config: EchoConfig, role: str) -> SFTConfig:
    """The options with which a role is trained, `by_role` included."""
    own = copy.copy(sft)
    for name, value in (config.by_role or {}).get(role, {}).items():
        setattr(own, name, value)
    return own


def check_by_role(config: EchoConfig) -> None:
    """Raise EchoError unless `by_role` has usable options for roles that are trained together."""
    given: Any = config.by_role or {}
    for role, options in given.items() if isinstance(given, dict) else [(given, None)]:
        if role not in ROLES or not isinstance(options, dict) or not set(options) <= set(ROLE_OPTIONS):
            raise EchoError(
                f"by_role cannot have {role}: {options!r}; it takes {', '.join(ROLES)}, each with a mapping of "
                + ", ".join(ROLE_OPTIONS)
            )
        for name in {"learning_rate", "warmup_steps"} & options.keys():
            value = options[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1e18:
                raise EchoError(f"by_role: {name} for {role} is {value!r}; set a number of at least 0")
    if given and config.role != ALL_ROLES:
        raise EchoError(f"by_role has no effect with role {config.role}; set role: all, or remove by_role")


def check_all_roles(config: EchoConfig, sft: SFTConfig) -> None:
    """Raise EchoError for options that are incompatible with training all roles in one run."""
    if config.role != ALL_ROLES:
        return
    if config.adapt_from == "prefix":
        raise EchoError(
            "role all shares the prefixes that the base model computes, but with adapt_from prefix every adapter "
            "computes its own; set adapt_from: branch or answer, or train each role in its own run"
        )
    if sft.deepspeed_plugin or sft.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise EchoError(
            "role all clips the gradients of each role separately, which DeepSpeed and FSDP cannot do; use "
            "recipes/accelerate/ddp.yaml, or train each role in its own run"
        )
    for role in ROLES:
        schedule: Any = role_arguments(sft, config, role).lr_scheduler_type
        if getattr(schedule, "value", schedule) in ("reduce_lr_on_plateau", "greedy"):
            raise EchoError(
                "role all cannot use lr_scheduler_type reduce_lr_on_plateau or greedy, which follow one loss; choose "
                "another, such as cosine"
            )
    if sft.load_best_model_at_end or sft.metric_for_best_model or config.early_stopping_patience is not None:
        raise EchoError(
            "role all has no single best step, because every role has its own; remove load_best_model_at_end, "
            "metric_for_best_model and early_stopping_patience, or train each role in its own run"
        )


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback for early stopping, except that it continues to count when the run resumes.

    transformers (5.23) restores the count only together with the patience of the earlier run, and forgets that the run
    had stopped. It also fails to save a checkpoint if the earlier run had no such callback.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience


def quantization_config(model: ModelConfig) -> Any:
    """Return the bitsandbytes config for TRL's options, or None. The vision tower is not quantized.

    Otherwise, the features of small defects would pass through 4-bit weights, and runs would combine the adapter with a
    full-precision tower. For the 7B model, keeping the tower's precision (0.67 billion parameters) takes 0.9 GiB.
    """
    config = get_quantization_config(model)
    if config is not None:
        config.llm_int8_skip_modules = ["model.visual", "lm_head"]
    return config


def lora_config(config: EchoConfig, base: ModelConfig, model: Any) -> LoraConfig | None:
    """Return PEFT's config for an adapter of `model`, with the names of its target modules; None for full fine-tuning.

    Raises EchoError if `check_lora_targets` does, or if a pattern matches no target module or sets no usable value.
    """
    lora: Any = get_peft_config(base)
    if lora is None:
        return None
    names = check_lora_targets(model, lora.target_modules)
    lora.target_modules = set(names)
    lora.init_lora_weights = {"true": True, "false": False}.get(config.init_lora_weights, config.init_lora_weights)
    for saved in lora.modules_to_save or ():  # PEFT ignores unknown names
        if not any(f".{name}".endswith(f".{saved}") for name, _ in model.named_modules()):
            raise EchoError(f"lora_modules_to_save: the model has no module {saved}; correct the name")
    modules = [name for name, _ in model.named_modules() if any(f".{name}".endswith(f".{target}") for target in names)]
    for option in ("rank_pattern", "alpha_pattern"):
        patterns: Any = getattr(config, option) or {}
        if not isinstance(patterns, dict):
            raise EchoError(f"{option} takes a mapping such as {{down_proj: 4}}, not {patterns!r}")
        for pattern, value in patterns.items():
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 2**14:
                raise EchoError(f"{option}: {pattern} is {value!r}; set a whole number from 1 to {2**14}")
            try:
                found = any(get_pattern_key([pattern], name) == pattern for name in modules)
            except re.error as error:
                raise EchoError(f"{option}: {pattern} is not a regular expression ({error}); correct it") from error
            if not found:
                raise EchoError(f"{option}: {pattern} matches no module in lora_target_modules; name one of those")
        setattr(lora, option, patterns)
    for module in modules:
        rank = lora.rank_pattern.get(get_pattern_key(lora.rank_pattern, module), lora.r)
        alpha = lora.alpha_pattern.get(get_pattern_key(lora.alpha_pattern, module), lora.lora_alpha)
        scale = alpha / (math.sqrt(rank) if lora.use_rslora else rank)
        if scale > MAX_LORA_SCALE:
            raise EchoError(
                f"lora_alpha {alpha} with lora_r {rank} is a scale of {scale:g} in {module}; set at most "
                f"{MAX_LORA_SCALE:g} times lora_r"
            )
    return lora
