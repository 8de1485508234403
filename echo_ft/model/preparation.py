"""Prepare a loaded Qwen2-VL for packed rows: patched attention, shared image features, frozen parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from echo_ft.model import attention
from echo_ft.model.loading import parameter_group, project_patches
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
