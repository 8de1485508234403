"""The layers that PEFT puts into a model, and when they act."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def adapter_layers(model: Any) -> list[Any]:
    """The modules of `model` that PEFT has replaced."""
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


def act_when_switched_on(model: Any, role: str) -> None:
    """Make an aLoRA act on all tokens that it is given, as a LoRA does; the engine switches it on after the prefix.

    PEFT (0.21) would look for the invocation tokens in every call, and find none when the engine decodes.
    """
    if getattr(model.peft_config[role], "alora_invocation_tokens", None):
        model.peft_config[role].alora_invocation_tokens = None
        for layer in adapter_layers(model):
            layer.lora_variant.pop(role, None)
