"""Qwen2-VL architectures without weights, for checks that need no download.

The configs of the two published models are included, so that their recipes can be checked offline.

Sources: config.json of Qwen/Qwen2-VL-2B-Instruct and Qwen/Qwen2-VL-7B-Instruct; arXiv 2409.12191.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_ft.errors import EchoError
from echo_ft.model.adapter_layers import add_adapters
from echo_ft.model.loading import (
    PARAMETER_GROUPS,
    check_config_files,
    check_lora_targets,
    parameter_group,
    why_unusable,
)

_PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-VL-2B-Instruct": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2-VL-7B-Instruct": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
"""Settings that differ between the two sizes; `_config` adds the shared ones."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of one part of the model."""

    part: str
    total: int
    trainable: int


def model_config(model_name_or_path: str, revision: str | None = None) -> Any:
    """Load a Qwen2VLConfig from a local folder, the hub's cache, the two published configs, or the hub.

    The sources are tried in this order, so the published models need no connection. Raises EchoError if none of them
    has the config, or if the model is not a Qwen2-VL.
    """
    from transformers import AutoConfig, Qwen2VLConfig

    if Path(model_name_or_path).is_dir():
        check_config_files(Path(model_name_or_path))
    try:
        config = AutoConfig.from_pretrained(
            model_name_or_path, revision=revision, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        if Path(model_name_or_path).is_dir():
            raise EchoError(
                f"{model_name_or_path} has no usable config.json ({why_unusable(error)}); set model_name_or_path to "
                "the folder of a Qwen2-VL model or to a hub name"
            ) from error
        if model_name_or_path in _PUBLISHED:
            return _config(**_PUBLISHED[model_name_or_path])
        config = _hub_config(model_name_or_path, revision)
    if not isinstance(config, Qwen2VLConfig):
        raise EchoError(f"{model_name_or_path} is a {config.model_type} model; choose a Qwen2-VL model (qwen2_vl)")
    return config


def meta_model(model_name_or_path: str, revision: str | None = None) -> Any:
    """Build the model on the meta device, with its real modules and shapes but without weights or memory.

    Raises EchoError if `model_config` does.
    """
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.modeling_utils import set_zero3_state

    config = model_config(model_name_or_path, revision)
    # Under ZeRO-3, transformers (5.23) would distribute and initialise the weights, but meta tensors have none.
    # set_zero3_state prevents this.
    with torch.device("meta"), set_zero3_state():
        return AutoModelForImageTextToText.from_config(config)


def add_adapter(model: Any, peft_config: Any, names: Sequence[str] = ("default",)) -> Any:
    """`model` (on the meta device) with a PEFT adapter of each name.

    Raises EchoError if `check_lora_targets` does, or if PEFT refuses its config.
    """
    peft_config.target_modules = check_lora_targets(model, peft_config.target_modules)
    try:
        return add_adapters(model, peft_config, names, seed=0)
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise EchoError(f"PEFT refuses the adapter: {error}; check use_dora, init_lora_weights and lora_*") from error


def count_parameters(model: Any) -> list[ParameterCount]:
    """Count the total and trainable parameters of each part in PARAMETER_GROUPS. Tied weights count once."""
    parts = [(parameter_group(name), parameter) for name, parameter in model.named_parameters()]
    return [
        ParameterCount(
            group,
            sum(parameter.numel() for part, parameter in parts if part == group),
            sum(parameter.numel() for part, parameter in parts if part == group and parameter.requires_grad),
        )
        for group in PARAMETER_GROUPS
    ]


def frozen_bytes(model: Any, width: int, bits: int | None = None, nested: bool = False) -> int:
    """Return the size of the frozen weights in bytes, at `width` bytes each.

    With `bits` 4 or 8, bitsandbytes quantizes the linear layers of the language model, except the LM head. With 4 bits,
    every 64 weights need a scale: 4 bytes, or with `nested` 1 byte and a fraction of a second scale (QLoRA, arXiv
    2305.14314, section 3).
    """
    import torch

    scale = (1 + 4 / 256) / 64 if nested else 4 / 64
    quantized = {None: float(width), 4: 0.5 + scale, 8: 1.0}[bits]
    linear = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head") and ".visual." not in f".{name}."
    }
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return round(sum(weight.numel() * (quantized if id(weight) in linear else width) for weight in frozen))


def _hub_config(name: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    known = " or ".join(_PUBLISHED)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise EchoError(f"there is no model folder {name}; give a model folder or a hub name such as {known}")
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise EchoError(
            f"the config of {name} could not be loaded ({why_unusable(error)}); check the name and the "
            f"connection, or use {known}, which need no connection"
        ) from error


def _config(tie_word_embeddings: bool, **text: Any) -> Any:
    from transformers import Qwen2VLConfig

    return Qwen2VLConfig(
        text_config={
            **text,
            "num_hidden_layers": 28,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": text["hidden_size"],
            "num_heads": 16,
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        tie_word_embeddings=tie_word_embeddings,
    )
