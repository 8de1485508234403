"""The layers that PEFT puts into a model, and when they act."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from echo_ft.errors import EchoError
from echo_ft.inputs import read_json_object
from echo_ft.model.loading import require_finite

MAX_LORA_SCALE = 1000.0
"""Largest accepted scale of an adapter's update, alpha over rank. Usual scales are 0.5 to 64."""

_WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")
"""Types of an adapter's tensors, as safetensors names them."""

PATTERN_SECONDS = 10
"""Time limit for matching the patterns of an adapter with all module names. Usual patterns take milliseconds."""

_MATCH_ALL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.fullmatch(pattern, name)
        re.match(rf"(.*\\.)?({pattern})$", name)
"""
"""This code matches patterns as PEFT (0.21) does. It runs in its own process, which can be stopped."""


def adapter_layers(model: Any) -> list[Any]:
    """Return the modules of `model` that PEFT has replaced."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def switched_off(layers: Sequence[Any]) -> Iterator[None]:
    """Make `adapter_layers` compute what the base model alone would compute.

    PEFT's `disable_adapter` (0.21) would also freeze the adapter's weights and thaw them later, under the hooks of DDP,
    ZeRO and FSDP.
    """
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


def choose_adapters(model: Any) -> None:
    """Let each decoder layer of a Qwen2-VL use the adapter that the argument `adapter` of its attention names.

    PEFT's `set_adapter` (0.21) would freeze the other adapters. Checkpointing computes a layer again in the backward
    pass, when another adapter may be in use; its attention comes first and restores the right one.
    """
    for layer in model.model.language_model.layers:
        own = adapter_layers(layer)

        def choose(module: Any, args: Any, kwargs: dict[str, Any], own: Sequence[Any] = own) -> Any:
            adapter = kwargs.pop("adapter", None)
            for one in own if adapter is not None else ():
                one._active_adapter = [adapter]
            return args, kwargs

        layer.self_attn.register_forward_pre_hook(choose, with_kwargs=True)


def add_adapters(model: Any, lora: Any, names: Sequence[str], seed: int) -> Any:
    """Return `model` with one trainable adapter per name, each initialised as if it were the only one."""
    import torch
    from peft import get_peft_model

    devices = [model.device] if model.device.type == "cuda" else []
    for name in names:
        own = copy.deepcopy(lora)  # PEFT changes it
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            if name == names[0]:
                model = get_peft_model(model, own, adapter_name=name)
            else:
                model.add_adapter(name, own)
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(f".{one}." in f"{name}." for one in names))
    return model


def act_when_switched_on(model: Any, role: str) -> None:
    """Make an aLoRA act on all tokens of its input, as a LoRA does; the engine switches it on after the prefix.

    PEFT (0.21) would look for the invocation tokens in every call, and find none when the engine decodes.
    """
    if getattr(model.peft_config[role], "alora_invocation_tokens", None):
        model.peft_config[role].alora_invocation_tokens = None
        for layer in adapter_layers(model):
            layer.lora_variant.pop(role, None)


def check_patterns(folder: Path, names: Iterable[str]) -> None:
    """Raise EchoError if PEFT would take very long to match a pattern of an adapter with the `names` of modules."""
    config = read_json_object(folder / "adapter_config.json")
    patterns = [config[key] for key in ("target_modules", "exclude_modules") if isinstance(config.get(key), str)]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns += config.get(key) or {}
    if not patterns:
        return
    sent = json.dumps([patterns, [*names]])
    try:
        subprocess.run([sys.executable, "-c", _MATCH_ALL], input=sent, text=True, timeout=PATTERN_SECONDS, check=True)
    except subprocess.TimeoutExpired as error:
        raise EchoError(
            f"the patterns in {folder / 'adapter_config.json'} take more than {PATTERN_SECONDS} s to match; list the "
            "names of the modules instead"
        ) from error


def check_weights(model: Any, role: str, path: Path) -> None:
    """Check an adapter attached to `model` as `role` from the folder `path`.

    Raises ValueError if file and model have different tensors, or a tensor is of integers, and EchoError if a weight is
    not finite or the scale is unusual.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
        saved = set(file.keys())
        for name in sorted(saved):
            kind = file.get_slice(name).get_dtype()
            if kind not in _WEIGHT_TYPES:  # PEFT would convert them without a word
                raise ValueError(f"its tensor {name} is of type {kind}, not {', '.join(_WEIGHT_TYPES)}")
    state = get_peft_model_state_dict(model, adapter_name=role)
    loaded = set(state)
    if saved != loaded:
        name = sorted(saved ^ loaded)[0]
        raise ValueError(f"{'it' if name in saved else 'the model'} alone has the tensor {name}")
    require_finite(state.items(), path)
    for name, module in model.named_modules():
        scale = getattr(module, "scaling", {}).get(role, 1.0) if isinstance(module, BaseTunerLayer) else 1.0
        if not 0 < scale <= MAX_LORA_SCALE:
            raise EchoError(
                f"the adapter in {path} has the scale {scale:g} at {name}, which is not between 0 and "
                f"{MAX_LORA_SCALE:g}; correct lora_alpha and r in its adapter_config.json, or train it again"
            )
