"""Checks of the options of train/sft.py, before the dataset is read and the first weight is loaded.

Where transformers, PEFT or torch have their own check, it runs here on dummy objects. A dry run can therefore refuse
options that would make the training fail.
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import huggingface_hub
import torch
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from trl import ModelConfig, SFTConfig

from echo_ft.errors import EchoError
from echo_ft.model import attention
from echo_ft.model.preparation import check_part_rates
from echo_ft.model.vision import require_frozen_tower
from echo_ft.training.config import (
    EchoConfig,
    check_all_roles,
    check_by_role,
    quantization_config,
    role_arguments,
    trained_roles,
)

WITHOUT_EFFECT = (
    "packing", "eval_packing", "packing_strategy", "padding_free", "completion_only_loss", "assistant_only_loss",
    "chat_template_path", "dataset_kwargs", "dataset_text_field", "dataset_num_proc", "eos_token", "pad_token",
    "pad_to_multiple_of", "shuffle_dataset", "truncation_mode", "model_init_kwargs", "remove_unused_columns",
    "label_names", "length_column_name",
)  # fmt: skip
"""Options of SFTConfig that control how TRL turns text into rows. Here, echo_ft.model.rows makes the rows."""

UNSUPPORTED = {
    "label_smoothing_factor": "the loss on packed rows has no smoothing",
    "router_aux_loss_coef": "Qwen2-VL has no experts in its layers",
    "include_for_metrics": "an evaluation computes only the metrics of the loss",
    "batch_eval_metrics": "an evaluation computes only the metrics of the loss",
    "neftune_noise_alpha": "rows are packed and share prefixes, so the noise would depend on the batch size",
    "trust_remote_code": "Qwen2-VL is part of transformers",
    "auto_find_batch_size": "it would change the number of cases per step, on which the results depend",
    "lora_target_parameters": "Qwen2-VL has linear layers; use lora_target_modules",
}
"""Options that must stay unset, with the reasons."""

_LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1, "dataloader_prefetch_factor": 1, "torch_empty_cache_steps": 1,
    "ddp_bucket_cap_mb": 1, "ddp_timeout": 1, "max_tokens": 1, "lora_r": 1, "lora_alpha": 1,
    "min_pixels": 1, "max_pixels": 1, "max_steps": -1, "local_rank": -1,
}  # fmt: skip
"""Smallest values of numbers that may not be 0 or may be negative. All other numbers start at 0."""

_MOST = {
    "lora_r": 2**14, "lora_alpha": 2**20, "lora_dropout": 0.999, "adam_beta1": 0.99999, "adam_beta2": 0.99999,
    "corrupted_share": 1, "mask_loss": 1, "seed": 2**32 - 1, "ddp_timeout": 10**9, "max_length": 2**31,
}  # fmt: skip
"""Largest values. NumPy takes 32-bit seeds. PEFT accepts any rank and alpha, even values that give infinities."""

METRICS = ("loss", "mean_token_accuracy")
"""Metrics by which the best checkpoint may be chosen, without the prefix `eval_`."""


def check_options(sft: SFTConfig, model: ModelConfig, config: EchoConfig | None = None) -> None:
    """Set the options of `sft` that packed rows need.

    Raises EchoError for an option that has no effect here, that training does not support, that is out of its range,
    that needs a package that is not installed, or that is missing. The message names the option.
    """
    for record in (sft, model, *([config] if config else [])):
        _check_ranges(record)
        for name, reason in UNSUPPORTED.items():
            if getattr(record, name, None):
                raise EchoError(f"{name} is not supported: {reason}; remove it from the config")
    _check_row_options(sft)
    _check_trainer_options(sft)
    _check_libraries(sft)
    if config is not None:
        check_by_role(config)
        check_all_roles(config, sft)
    for own in [role_arguments(sft, config, role) for role in trained_roles(config)] if config else [sft]:
        _check_schedule(own)
    _check_best_model(sft, bool(config and config.mask_loss))
    _check_model_options(model)
    if sft.push_to_hub:
        _check_hub(sft, bool(config and config.dry_run))
    if sft.ddp_find_unused_parameters is None:  # TRL (1.16) would search for them in every step
        sft.ddp_find_unused_parameters = False  # there are none: Collator makes every process enter the tower
    sft.max_length = None
    sft.remove_unused_columns = False
    sft.dataset_kwargs = {"skip_prepare_dataset": True}


def _check_ranges(record: Any) -> None:
    for option in fields(record):
        value, least, most = getattr(record, option.name), _LEAST.get(option.name, 0), _MOST.get(option.name, 1e18)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not least <= value <= most:
            raise EchoError(f"{option.name} is {value:g}; set a value from {least} to {most:g}")


def _check_row_options(sft: SFTConfig) -> None:
    # Do not create a second SFTConfig for its defaults: that would initialise the process group again.
    defaults = {option.name: option.default for option in fields(SFTConfig)} | {"pad_to_multiple_of": None}
    for name in WITHOUT_EFFECT:
        if getattr(sft, name) != defaults[name]:
            raise EchoError(
                f"{name} has no effect here, because echo_ft.model.rows makes the rows; remove it from the config"
            )
    if sft.max_length not in (None, defaults["max_length"]):
        raise EchoError(
            f"max_length {sft.max_length} would truncate rows, and rows are never truncated; set max_length: null, and "
            "use max_tokens to reject long rows"
        )


def _check_trainer_options(sft: SFTConfig) -> None:
    if sft.n_gpu > 1:
        raise EchoError(
            "one process sees several GPUs; start one process per GPU (python -m train.launch --config_file "
            "recipes/accelerate/ddp.yaml ...), or select one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if sft.num_train_epochs == 0 and sft.max_steps <= 0:
        raise EchoError("num_train_epochs is 0, so nothing would be trained; set a larger number, or max_steps")
    if sft.train_sampling_strategy not in ("random", "sequential"):
        raise EchoError(
            f"train_sampling_strategy {sft.train_sampling_strategy} reduces padding, but packed rows have none; choose "
            "random, which balances the tokens of the processes in each step, or sequential"
        )
    _check_parallel_options(sft)
    output = os.path.abspath(str(sft.output_dir))
    if sft.deepspeed_plugin and glob.escape(output) != output:
        # transformers 5.23 and DeepSpeed 0.19 search for the files of a checkpoint with its path as a pattern.
        raise EchoError(
            f"a run with DeepSpeed could not resume from {output}, which it reads as a pattern; choose an output_dir "
            "without *, ? and [ in its path"
        )
    checkpointing: Any = sft.gradient_checkpointing_kwargs or {}
    if checkpointing.get("use_reentrant"):
        raise EchoError(
            "use_reentrant: true is incompatible with the gradient check before step 1; remove it from "
            "gradient_checkpointing_kwargs (TRL sets it under ZeRO-3)"
        )


def _check_parallel_options(sft: SFTConfig) -> None:
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if getattr(sft, name) and not sft.dataloader_num_workers:
            raise EchoError(f"{name} needs workers; set dataloader_num_workers to 1 or more, or remove {name}")
    accelerator: Any = sft.accelerator_config
    if accelerator.dispatch_batches:
        raise EchoError(
            "accelerator_config: dispatch_batches needs batches of one shape, but packed rows differ; remove it"
        )
    if accelerator.split_batches and sft.world_size > 1:
        raise EchoError(
            "accelerator_config: split_batches would divide each batch among the processes, but batches are planned "
            "per process; remove it, and set per_device_train_batch_size"
        )
    if sft.fsdp and sft.world_size == 1:
        raise EchoError(
            "fsdp needs several processes; remove it, and use python -m train.launch --config_file "
            "recipes/accelerate/fsdp2.yaml ..."
        )


def _try(option: str, check: Callable[[], Any], remedy: str) -> Any:
    """Return the result of a library's own check. Turns any error into an EchoError that names the option."""
    try:
        return check()
    except Exception as error:  # the libraries may raise any error, from ImportError to KeyError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise EchoError(f"{option} cannot be used ({reason}); {remedy}") from error


def _check_libraries(sft: SFTConfig) -> None:
    """Check the packages and arguments for the optimizer, reports, kernels, the compiler and checkpointing."""
    for name in sft.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            raise EchoError(
                f"report_to cannot be {name!r}; choose from none, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            )
        if name not in (*get_available_reporting_integrations(), "flyte"):
            raise EchoError(f"report_to {name} needs a package that is not installed; install {name}, or set none")
    if sft.use_liger_kernel and find_spec("liger_kernel") is None:
        raise EchoError(
            "use_liger_kernel needs a package that is not installed; pip install liger-kernel, or remove it"
        )
    if sft.torch_compile:
        backends = torch.compiler.list_backends(exclude_tags=None)
        if sft.torch_compile_backend not in backends:
            raise EchoError(
                f"torch_compile_backend cannot be {sft.torch_compile_backend!r}; choose from {', '.join(backends)}"
            )
        modes = [*torch._inductor.list_mode_options()]
        if sft.torch_compile_mode not in (None, *modes):
            raise EchoError(f"torch_compile_mode cannot be {sft.torch_compile_mode!r}; choose from {', '.join(modes)}")
    given: Any = sft.gradient_checkpointing_kwargs
    if given:
        options = {"use_reentrant": False, **given}
        # TRL (1.16) and transformers (5.23) use these arguments themselves.
        for name in ("selective", "every_n_layers"):
            options.pop(name, None)
        _try(
            "gradient_checkpointing_kwargs or activation_checkpointing_kwargs",
            lambda: torch.utils.checkpoint.checkpoint(torch.neg, torch.ones(1, requires_grad=True), **options),
            "use the arguments of torch.utils.checkpoint",
        )


def check_optimizer(sft: SFTConfig, model: Any) -> None:
    """Make the optimizer for a dummy weight. `model` is the model on the meta device, which some optimizers inspect.

    Raises EchoError if a package is missing or the optimizer refuses its arguments.
    """
    name = f"optim {sft.optim.value if hasattr(sft.optim, 'value') else sft.optim}"
    if sft.optim_args:
        name += f" with optim_args {sft.optim_args}"

    def make() -> None:
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(sft, model)
        if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
            options = {key: value for key, value in options.items() if key not in ("params", "model", "optimizer_dict")}
            optimizer([torch.nn.Parameter(torch.zeros(2, 2))], **options)

    _try(name, make, "choose another, such as adamw_torch")


def check_precision(sft: SFTConfig, model: ModelConfig, on_cpu: bool) -> None:
    """Raise EchoError for an option with which the CPU cannot train. `on_cpu` is False if the device is not known."""
    if not on_cpu:
        return
    for name in ("fp16", "fp16_full_eval"):
        if getattr(sft, name):
            raise EchoError(
                f"{name} needs a GPU, and this run uses the CPU; set {name}: false or {name.replace('fp16', 'bf16')}"
            )
    if model.attn_implementation == "flex_attention":
        raise EchoError("attn_implementation flex_attention has no backward pass on a CPU (torch 2.15); set sdpa")


def _check_schedule(sft: SFTConfig) -> None:
    """Make the schedule for a dummy optimizer, and evaluate its learning rate at the steps where it bends."""
    name: Any = sft.lr_scheduler_type
    steps = sft.max_steps if sft.max_steps > 0 else 100

    def evaluate() -> None:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=sft.learning_rate)
        options: Any = sft.lr_scheduler_kwargs
        schedule: Any = get_scheduler(name, optimizer, sft.get_warmup_steps(steps), steps, options)
        for factor in getattr(schedule, "lr_lambdas", ()):
            for step in {0, 1, steps // 2, steps - 1, steps}:
                if not math.isfinite(factor(step)):
                    raise ValueError(f"the rate at step {step} is not finite")

    arguments = f" with lr_scheduler_kwargs {sft.lr_scheduler_kwargs}" if sft.lr_scheduler_kwargs else ""
    remedy = "see the arguments for this schedule in transformers.optimization, and set lr_scheduler_kwargs"
    _try(f"lr_scheduler_type {getattr(name, 'value', name)}{arguments}", evaluate, remedy)


def _check_best_model(sft: SFTConfig, mask_loss: bool) -> None:
    metric, metrics = sft.metric_for_best_model, [*METRICS, *(["mask_loss"] if mask_loss else [])]
    metrics += ["entropy"] if sft.greater_is_better is False else []
    if metric is None and sft.save_strategy == "best":
        raise EchoError("save_strategy best needs metric_for_best_model, such as loss")
    if metric is not None and sft.eval_strategy != "no" and metric.removeprefix("eval_") not in metrics:
        more = ", or set greater_is_better: false" if "entropy" in metric else ""
        raise EchoError(f"metric_for_best_model cannot be {metric!r}; choose from {', '.join(metrics)}{more}")


def _check_hub(sft: SFTConfig, dry_run: bool) -> None:
    remedy = "remove push_to_hub, and push the adapter's folder with `hf upload` later"
    if sft.hub_model_id is not None:
        _try(
            f"hub_model_id {sft.hub_model_id}",
            lambda: huggingface_hub.utils.validate_repo_id(str(sft.hub_model_id)),
            remedy,
        )
    if dry_run or sft.process_index != 0:
        return
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise EchoError(f"push_to_hub needs a connection, but HF_HUB_OFFLINE is set; unset it, or {remedy}")
    token = sft.hub_token or huggingface_hub.get_token()
    if token is None:
        raise EchoError(f"push_to_hub needs a Hugging Face Hub token; run `hf auth login`, or {remedy}")
    _try(
        "push_to_hub", lambda: huggingface_hub.HfApi().whoami(token), f"check the connection and the token, or {remedy}"
    )


def _check_model_options(model: ModelConfig) -> None:
    if model.attn_implementation not in (None, *attention.IMPLEMENTATIONS):
        raise EchoError(
            f"attn_implementation {model.attn_implementation} does not separate the branches of a row; choose from "
            + ", ".join(attention.IMPLEMENTATIONS)
        )
    if model.model_name_or_path is None:
        raise EchoError(
            "model_name_or_path is missing; give a model folder or a hub name, e.g. Qwen/Qwen2-VL-2B-Instruct"
        )
    quantized = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(model, name)), None)
    if quantized and find_spec("bitsandbytes") is None:
        raise EchoError(f"{quantized} needs bitsandbytes; install it with pip install 'echo-ft[quantization]'")
    if quantized and not model.use_peft:
        raise EchoError(
            f"{quantized} is set with use_peft: false, but the weights of a quantized model cannot be trained; remove "
            "one of the two options"
        )
    if model.load_in_4bit and model.dtype == "auto":
        raise EchoError("dtype auto is incompatible with load_in_4bit, which computes in dtype; set dtype: bfloat16")
    if quantized:
        storage = f"bnb_4bit_quant_storage {model.bnb_4bit_quant_storage}"
        _try(storage, lambda: quantization_config(model), "name a torch type, such as uint8")
    if model.use_peft and not model.lora_target_modules:
        raise EchoError(
            "lora_target_modules is missing; those of the language model are [q_proj, k_proj, v_proj, o_proj, ...], "
            "and all-linear includes the vision tower and the merger"
        )
    if model.lora_task_type != "CAUSAL_LM":
        raise EchoError(f"lora_task_type cannot be {model.lora_task_type!r}; Qwen2-VL is trained as CAUSAL_LM")


def runs_on_cpu(sft: SFTConfig, dry_run: bool) -> bool:
    """Return whether this run trains on the CPU. A dry run on a machine without a GPU may be for another machine."""
    if dry_run:
        return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return sft.device.type == "cpu"


def check_trained_parts(model: Any, config: EchoConfig) -> None:
    """Raise EchoError for learning rates of untrained parts, or stored features of a trained tower.

    `model` may be on the meta device.
    """
    check_part_rates(model, config.vision_learning_rate, config.merger_learning_rate)
    if config.features:
        require_frozen_tower(model)
