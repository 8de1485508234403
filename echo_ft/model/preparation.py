"""Prepare a loaded Qwen2-VL for packed rows: patched attention, shared image features, frozen parts, learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from echo_ft.errors import EchoError
from echo_ft.model import attention
from echo_ft.model.loading import PARAMETER_GROUPS, parameter_group, project_patches
from echo_ft.model.vision import BatchImages, TowerFeatureStore, encode_images_once


def packed_inputs(batch: Mapping[str, Any], implementation: str = "sdpa") -> dict[str, Any]:
    """Return the keyword arguments of the model for a collated batch, without the labels.

    attention.attend reads `spans`, and vision.encode_images_once reads `images`. `implementation` is one of
    attention.IMPLEMENTATIONS.
    """
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
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
    model.set_attn_implementation({"text_config": attention.ATTENTION_NAME})

    def select(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs.get("keep") is not None:
            output.last_hidden_state = output.last_hidden_state[:, kwargs["keep"]]
        return output

    model.model.register_forward_hook(select, with_kwargs=True)


def keep_adapter_input_dtype(model: Any) -> None:
    """Let LoRA layers take the inputs of bfloat16 autocast without converting them to float32 first.

    PEFT (0.21) converts every input to the dtype of its float32 adapter, and autocast converts it back: 1.2 GiB of a
    7B's peak memory and three more passes over each input, for the same result up to bfloat16 rounding.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # type: ignore[attr-defined]


def freeze_parts(model: Any, vision_learning_rate: float | None, merger_learning_rate: float | None) -> Any:
    """Make all parameters of `model` trainable except those of parts with learning rate 0; returns `model`."""
    rates = {"vision tower": vision_learning_rate, "merger": merger_learning_rate}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rates.get(parameter_group(name)) != 0)
    return model


def set_part_rates(
    optimizer: Any, model: Any, vision_learning_rate: float | None, merger_learning_rate: float | None
) -> None:
    """Give the vision tower and the merger of `model` their own learning rates in `optimizer`, unless they are None.

    Raises EchoError if a part has a learning rate but no trained weights. In full fine-tuning, a rate of 0 freezes it.
    """
    from peft import PeftModel

    rates = {"vision tower": vision_learning_rate, "merger": merger_learning_rate}
    if all(rate is None for rate in rates.values()):
        return
    trained = {weight: parameter_group(name) for name, weight in model.named_parameters() if weight.requires_grad}
    for name, rate in rates.items():
        frozen_on_purpose = rate == 0 and not isinstance(model, PeftModel)
        if rate is not None and name not in trained.values() and not frozen_on_purpose:
            modules = "attn.qkv, attn.proj" if name == "vision tower" else "merger.mlp.0"
            raise EchoError(
                f"{name.split()[0]}_learning_rate is {rate}, but no weights of the {name} are trained; add its modules "
                f"to lora_target_modules ({modules}, ...) or remove the learning rate"
            )
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        for name in PARAMETER_GROUPS:
            members = [weight for weight in group["params"] if trained[weight] == name]
            rate = rates.get(name)
            if members:
                optimizer.add_param_group({**group, "params": members, "lr": group["lr"] if rate is None else rate})
