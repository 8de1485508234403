"""Floating-point operations (FLOPs) of a training batch, and the peak FLOP/s of known GPUs.

A multiply-add counts as two operations. The count includes only what the result needs, as the model FLOPs of PaLM do
(arXiv 2204.02311, appendix B): the forward pass and the gradients of activations and trained weights. Each image and
each token counts once, and causal attention counts as half of full attention. Recomputation under checkpointing, norms,
activation functions and embeddings do not count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo_ft.model.loading import parameter_group
from echo_ft.model.rows import IGNORED, Row

PEAK_FLOPS = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40", 181e12),
    ("L4", 121e12),
)
"""(words in the device name, peak): dense bfloat16 FLOP/s from the vendors' data sheets. The first match wins."""


@dataclass(frozen=True)
class WorkCounts:
    """Units of work in a batch, by kind. Two counts can be added."""

    tokens: int = 0
    pairs: int = 0
    """Pairs of a token and a token that it attends to, in the language model."""
    labels: int = 0
    patches: int = 0
    patch_pairs: int = 0
    """Pairs of two patches of the same image."""
    base_tokens: int = 0
    """The part of `tokens` that only the base model computes, without a backward pass."""
    base_pairs: int = 0
    """The part of `pairs` that belongs to `base_tokens`."""

    def __add__(self, other: WorkCounts) -> WorkCounts:
        return WorkCounts(*(getattr(self, kind.name) + getattr(other, kind.name) for kind in fields(self)))


@dataclass(frozen=True)
class UnitCosts:
    """FLOPs of one unit of each kind of work, forward and backward."""

    token: float
    pair: float
    label: float
    patch: float
    patch_pair: float
    base_token: float
    """A token that only the base model computes."""

    def flops(self, counts: WorkCounts) -> float:
        """Return the FLOPs of the work in `counts`."""
        return (
            self.token * (counts.tokens - counts.base_tokens)
            + self.base_token * counts.base_tokens
            + self.pair * (counts.pairs - counts.base_pairs * 2 / 3)  # two thirds of the cost are the backward pass
            + self.label * counts.labels
            + self.patch * counts.patches
            + self.patch_pair * counts.patch_pairs
        )


def text_work(rows: Iterable[Row], adapted: Sequence[NDArray[np.bool_]] | None = None) -> WorkCounts:
    """Count the language model's work for `rows`. `adapted` says which tokens an adapter acts on (default: all)."""
    total = WorkCounts()
    for index, row in enumerate(rows):
        prefix, *branches = np.bincount(row.segments).tolist()
        own = None if adapted is None else np.bincount(row.segments[adapted[index]], minlength=len(branches) + 1)
        after_prefix = None if own is None or own[0] else own[1:].tolist()
        total += row_work(prefix, branches, int((row.labels != IGNORED).sum()), after_prefix)
    return total


def row_work(prefix: int, branches: Sequence[int], labels: int, adapted: Sequence[int] | None = None) -> WorkCounts:
    """Count the language model's work for one row, from the numbers of prefix tokens, tokens per branch and labels.

    `adapted` has the number of tokens at the end of each branch that an adapter acts on; None means that it acts on the
    whole row.
    """

    def pairs(lengths: Iterable[int]) -> int:
        return prefix * (prefix + 1) // 2 + sum(length * prefix + length * (length + 1) // 2 for length in lengths)

    work = WorkCounts(tokens=prefix + sum(branches), pairs=pairs(branches), labels=labels)
    if adapted is None:
        return work
    base = [length - own for length, own in zip(branches, adapted, strict=True)]
    return work + WorkCounts(base_tokens=prefix + sum(base), base_pairs=pairs(base))


def repeated_work(look: int, times: int) -> WorkCounts:
    """What rows save by sharing a look of `look` tokens with a row before them, as negative work of the base model."""
    tokens, pairs = -look * times, -(look * (look + 1) // 2) * times
    return WorkCounts(tokens=tokens, pairs=pairs, base_tokens=tokens, base_pairs=pairs)


def image_work(grids: Iterable[Iterable[int]]) -> WorkCounts:
    """Count the vision tower's work. `grids` has one (t, h, w) in patches per encoded image."""
    sizes = [math.prod(map(int, grid)) for grid in grids]
    return WorkCounts(patches=sum(sizes), patch_pairs=sum(size * size for size in sizes))


def unit_costs(model: Any) -> UnitCosts:
    """Count the FLOPs per unit of work when training this Qwen2-VL, with or without PEFT adapters, on any device.

    A linear layer with W weights costs 2 W per token in the forward pass. The gradient of its input costs another 2 W
    if anything before the layer is trained. The gradient of its weights costs another 2 W if they are trained. Of
    several adapters, one acts on a token.
    """
    import torch

    trained = {parameter_group(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    tower = "vision tower" in trained
    # Whether a part passes gradients to its input. The tower comes first, the language model last.
    input_gradient = {"language model": True, "merger": tower or "merger" in trained, "vision tower": tower}
    vision, text = model.config.vision_config, model.config.text_config
    merged = vision.spatial_merge_size**2
    adapters: list[str] = []
    totals = {"language model": 0.0, "base": 0.0, "head": 0.0, "vision tower": 0.0, "merger": 0.0}
    for name, module in model.named_modules():
        if ".lora_" in name and isinstance(module, torch.nn.Linear):
            adapters.append(name.rpartition(".")[2])
            if adapters[-1] != adapters[0]:
                continue
        if isinstance(module, torch.nn.Conv3d):
            # Do not use the size of the weight: under ZeRO-3 it is empty on each rank.
            weights = module.in_channels * module.out_channels * math.prod(module.kernel_size)
            part = "vision tower"
            # There are no trained weights before this layer, so its input needs no gradient.
            backward = int(module.weight.requires_grad)
        elif isinstance(module, torch.nn.Linear):
            weights, part = module.in_features * module.out_features, parameter_group(name)
            backward = int(input_gradient[part]) + int(module.weight.requires_grad)
        else:
            continue
        totals["head" if "lm_head" in name else part] += 2 * weights * (1 + backward)
        if part == "language model" and "lm_head" not in name and not module.weight.requires_grad:
            totals["base"] += 2 * weights
    attention = 4 * text.num_hidden_layers * text.hidden_size
    return UnitCosts(
        token=totals["language model"],
        pair=3 * attention,
        label=totals["head"],
        patch=totals["vision tower"] + totals["merger"] / merged,
        patch_pair=4 * vision.depth * vision.embed_dim * (3 if tower else 1),
        base_token=totals["base"],
    )


def device_peak_flops(device_name: str) -> float | None:
    """Return the peak dense bfloat16 FLOP/s of a GPU; None if its name does not match PEAK_FLOPS."""
    return next((flops for words, flops in PEAK_FLOPS if re.search(rf"\b{words}\b", device_name)), None)
