"""Prepare a loaded Qwen2-VL for packed rows: patched attention, shared image features, frozen parts, learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from echo_ft.errors import EchoError
from echo_ft.model import attention
from echo_ft.model.adapter_layers import adapter_layers, choose_adapters, switched_off
from echo_ft.model.loading import PARAMETER_GROUPS, parameter_group, project_patches
from echo_ft.model.vision import BatchImages, TowerFeatureStore, encode_images_once


def packed_inputs(batch: Mapping[str, Any], implementation: str = "sdpa") -> dict[str, Any]:
    """Return the keyword arguments of the model for a collated batch, without the labels.

    attention.attend and run_base_first read `spans`, and vision.encode_images_once reads `images`. `implementation` is
    one of attention.IMPLEMENTATIONS.
    """
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    if "base_tokens" in batch:
        inputs["spans"] = attention.make_split(batch, implementation)
    else:
        make_masks = attention.make_block_mask if implementation == "flex_attention" else attention.make_spans
        inputs["spans"] = make_masks(batch["segments"], batch["lengths"])
    if batch["image_order"] or batch["image_views"]:
        inputs |= {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
        inputs["images"] = BatchImages(batch["image_order"], batch["image_views"], batch["image_features"])
    return inputs


def prepare_model(model: Any, store: TowerFeatureStore | None = None) -> None:
    """Patch a Qwen2-VL to accept `packed_inputs` and `keep`, the positions (N,) for which it returns logits.

    Raises EchoError if there is a `store` and the vision tower is trained.
    """
    project_patches(model)
    encode_images_once(model, store)
    run_base_first(model)
    choose_adapters(model)
    model.set_attn_implementation({"text_config": attention.ATTENTION_NAME})

    def select(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs.get("keep") is not None:
            output.last_hidden_state = output.last_hidden_state[:, kwargs["keep"]]
        return output

    model.model.register_forward_hook(select, with_kwargs=True)


def run_base_first(model: Any) -> None:
    """Patch the language model of a Qwen2-VL to run a packed row in parts if its spans are an `attention.Split`.

    The base model computes the first part without a graph. Each adapter computes its own part from the keys and values
    of the first. Nothing in the first part depends on an adapter, so the gradients equal those of the whole row.
    """
    language = model.model.language_model
    run, layers = language.forward, adapter_layers(model)

    def forward(*args: Any, spans: Any = None, **kwargs: Any) -> Any:
        if not isinstance(spans, attention.Split):
            return run(*args, spans=spans, **kwargs)
        embedded, positions = kwargs.pop("inputs_embeds"), kwargs.pop("position_ids")

        def run_part(tokens: torch.Tensor, **options: Any) -> Any:
            own = {"inputs_embeds": embedded[:, tokens], "position_ids": positions[..., tokens]}
            return run(*args, **own, **options, **kwargs)

        base: attention.States = {}
        with torch.no_grad(), switched_off(layers):
            output = run_part(spans.base_tokens, spans=spans.base_spans, record=base)
        whole = output.last_hidden_state.new_zeros(embedded.shape)  # nothing reads the hidden states of the base model
        for part in spans.parts:
            output = run_part(part.tokens, spans=part.spans, base=base, adapter=part.adapter)
            whole = whole.index_copy(1, part.tokens, output.last_hidden_state)
        output.last_hidden_state = whole
        return output

    language.forward = forward


def keep_adapter_input_dtype(model: Any) -> None:
    """Let LoRA layers take the inputs of bfloat16 autocast without converting them to float32 first.

    PEFT (0.21) converts every input to the dtype of its float32 adapter, and autocast converts it back. That costs 1.2
    GiB of a 7B's peak memory and three passes over each input, for the same result up to bfloat16 rounding.
    """
    for layer in adapter_layers(model):
        layer.cast_input_dtype_enabled = False


def train_in_float32(model: Any) -> None:
    """Convert the trained 16-bit weights of a quantized model to float32.

    TRL (1.16) makes them bfloat16, in which AdamW loses small updates to rounding and its second moment never
    decreases.
    """
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype in (torch.bfloat16, torch.float16):
            weight.data = weight.data.float()


def freeze_parts(model: Any, vision_learning_rate: float | None, merger_learning_rate: float | None) -> Any:
    """Make all parameters of `model` trainable except those of parts with learning rate 0; returns `model`."""
    rates = {"vision tower": vision_learning_rate, "merger": merger_learning_rate}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rates.get(parameter_group(name)) != 0)
    return model


def check_part_rates(model: Any, vision_learning_rate: float | None, merger_learning_rate: float | None) -> None:
    """Raise EchoError if a part of `model` has a learning rate but no trained weights.

    In full fine-tuning, a rate of 0 freezes a part.
    """
    trained = {parameter_group(name) for name, weight in model.named_parameters() if weight.requires_grad}
    full = not hasattr(model, "peft_config")
    for part, rate in (("vision tower", vision_learning_rate), ("merger", merger_learning_rate)):
        if rate is not None and part not in trained and not (full and rate == 0):
            modules = "attn.qkv, attn.proj" if part == "vision tower" else "merger.mlp.0"
            raise EchoError(
                f"{part.split()[0]}_learning_rate is {rate}, but no weights of the {part} are trained; add its modules "
                f"to lora_target_modules ({modules}, ...) or remove the learning rate"
            )


def set_part_rates(
    optimizer: Any, model: Any, vision_learning_rate: float | None, merger_learning_rate: float | None
) -> None:
    """Give the vision tower and the merger of `model` their own learning rates in `optimizer`, unless they are None.

    Raises EchoError if `check_part_rates` does.
    """
    check_part_rates(model, vision_learning_rate, merger_learning_rate)
    rates = {"vision tower": vision_learning_rate, "merger": merger_learning_rate}
    if all(rate is None for rate in rates.values()):
        return
    trained = {weight: parameter_group(name) for name, weight in model.named_parameters() if weight.requires_grad}
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        for name in PARAMETER_GROUPS:
            members = [weight for weight in group["params"] if trained[weight] == name]
            rate = rates.get(name)
            if members:
                optimizer.add_param_group({**group, "params": members, "lr": group["lr"] if rate is None else rate})


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
            f"lora_target_modules names the {' and the '.join(dead)}, but no gradient reaches these modules; set "
            "gradient_checkpointing: false or remove them"
        )
