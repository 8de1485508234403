"""Checks before step 1: options, output layer, gradients and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import torch
from transformers import TrainingArguments
from trl import ModelConfig, SFTConfig

from echo_ft.errors import EchoError
from echo_ft.model import attention
from echo_ft.model.loading import parameter_group

# Options of SFTConfig that control how TRL turns text into rows. Here, echo_ft.model.rows makes the rows.
_WITHOUT_EFFECT = (
    "packing", "eval_packing", "padding_free", "completion_only_loss", "assistant_only_loss", "chat_template_path",
    "dataset_kwargs", "dataset_text_field", "dataset_num_proc", "eos_token", "pad_token", "pad_to_multiple_of",
    "shuffle_dataset", "truncation_mode", "model_init_kwargs", "remove_unused_columns",
)  # fmt: skip


def check_options(sft: SFTConfig, model: ModelConfig) -> None:
    """Set the options of `sft` that packed rows need.

    Raises EchoError for an option that has no effect here, that training does not support, or that is missing.
    """
    _check_row_options(sft)
    _check_trainer_options(sft)
    _check_model_options(model)
    if sft.ddp_find_unused_parameters is None:  # TRL (1.16) would search for them in every step
        sft.ddp_find_unused_parameters = False  # there are none: Collator has every process enter the tower
    sft.max_length = None
    sft.remove_unused_columns = False
    sft.dataset_kwargs = {"skip_prepare_dataset": True}


def _check_row_options(sft: SFTConfig) -> None:
    # Do not create a second SFTConfig for its defaults: that would initialise the process group again.
    defaults = {option.name: option.default for option in fields(SFTConfig)} | {"pad_to_multiple_of": None}
    for name in _WITHOUT_EFFECT:
        if getattr(sft, name) != defaults[name]:
            raise EchoError(
                f"{name} has no effect here, because echo_ft.model.rows makes the rows; remove it from the config"
            )
    if sft.max_length not in (None, defaults["max_length"]):
        raise EchoError(
            f"max_length {sft.max_length} would truncate rows, and rows are never truncated; set max_length: null, and "
            "use max_tokens to reject long rows by name"
        )


def _check_trainer_options(sft: SFTConfig) -> None:
    if sft.n_gpu > 1:
        raise EchoError(
            "one process sees several GPUs; start one process per GPU (accelerate launch --config_file "
            "recipes/accelerate/ddp.yaml ...), or select one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if sft.label_smoothing_factor:
        raise EchoError("label_smoothing_factor is not supported by TRL's loss; remove it from the config")
    if sft.train_sampling_strategy not in ("random", "sequential"):
        raise EchoError(
            f"train_sampling_strategy {sft.train_sampling_strategy} reduces padding, but packed rows have none; choose "
            "random, which balances the tokens of the processes in each step, or sequential"
        )
    checkpointing: Any = sft.gradient_checkpointing_kwargs or {}
    if checkpointing.get("use_reentrant"):
        raise EchoError(
            "use_reentrant: true is incompatible with the gradient check before step 1; remove it from "
            "gradient_checkpointing_kwargs (TRL sets it under ZeRO-3)"
        )
    if sft.trust_remote_code:
        raise EchoError("trust_remote_code is never used; Qwen2-VL is part of transformers, so remove the option")


def _check_model_options(model: ModelConfig) -> None:
    if model.attn_implementation not in (None, *attention.IMPLEMENTATIONS):
        raise EchoError(
            f"attn_implementation {model.attn_implementation} does not keep the branches of a row apart; choose from "
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
    if model.use_peft and not model.lora_target_modules:
        raise EchoError(
            "lora_target_modules is missing; those of the language model are [q_proj, k_proj, v_proj, o_proj, ...]"
        )


def check_output_layer(model: Any) -> None:
    """Raise EchoError if a trained output layer has its own weights, as in the 7B model. Call this only under FSDP.

    TRL (1.16) reads these weights without FSDP's hooks, so each process would apply the gradients of its own cases.
    """
    head = model.get_output_embeddings().weight
    if head.requires_grad and head is not model.get_input_embeddings().weight:
        raise EchoError(
            "full fine-tuning under FSDP gives wrong gradients for a model whose output layer has its own weights, as "
            "in the 7B model (TRL 1.16); use recipes/accelerate/zero3.yaml"
        )


def check_gradients(gradients: Mapping[str, torch.Tensor | None]) -> None:
    """Raise EchoError unless all `gradients` are finite and every trained part has a nonzero one.

    The keys are parameter names. LoRA's second matrix starts at zero, so the gradient of the first one is zero at step
    1. The check is therefore per part, not per matrix.
    """
    nonzero: dict[str, bool] = {}
    for name, gradient in gradients.items():
        if gradient is not None and not torch.isfinite(gradient).all():
            raise EchoError(
                f"the first gradient of {name} is not finite; use bf16 or full precision instead of fp16, and do not "
                "set use_dora if the weights have rows of zeros"
            )
        part = parameter_group(name)
        nonzero[part] = nonzero.get(part, False) or (gradient is not None and bool(gradient.any()))
    dead = [part for part, has_gradient in nonzero.items() if not has_gradient]
    if dead:
        raise EchoError(
            f"lora_target_modules names the {' and the '.join(dead)}, but no gradient arrives there; set "
            "gradient_checkpointing: false or remove those modules"
        )


def less_memory(args: TrainingArguments, max_pixels: int) -> str:
    """The cheapest option that makes the largest batch smaller, with the value to set."""
    batch = args.per_device_train_batch_size
    if not args.gradient_checkpointing:
        return "set gradient_checkpointing: true"
    if batch > 1:
        more = args.gradient_accumulation_steps * math.ceil(batch / (batch // 2))
        return f"set per_device_train_batch_size: {batch // 2} and gradient_accumulation_steps: {more}"
    return f"set max_pixels: {max_pixels // 2}, here and in the run, or use recipes/accelerate/zero3.yaml"
