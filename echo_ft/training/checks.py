"""Checks of model and gradients before step 1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainingArguments

from echo_ft.errors import EchoError
from echo_ft.model.loading import parameter_group


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
