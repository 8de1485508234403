"""Floating point operations of training: what the arithmetic of a batch takes, and how much of a GPU that uses.

A multiplication with its addition counts as two. Counted is what the result needs (model FLOPs of PaLM, arXiv
2204.02311, appendix B): forward, the gradients of activations and of trained weights, each image and token once and
causal attention at its half; not what checkpointing computes again, nor norms, activations and embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from echo_ft.model.loading import parameter_group
from echo_ft.model.rows import IGNORED, Row

PEAKS = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L4", 121e12),
)
"""Dense bfloat16 operations a second from the makers' data sheets, by a part of the device's name; first match."""


@dataclass(frozen=True)
class Load:
    """How much of each kind of work a batch holds; two can be added."""

    tokens: int = 0
    pairs: int = 0
    """Of a token and one that it sees, in the language model."""
    labels: int = 0
    patches: int = 0
    patch_pairs: int = 0
    """Of two patches of one image."""

    def __add__(self, other: Load) -> Load:
        return Load(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


@dataclass(frozen=True)
class Costs:
    """Operations of forward and backward for one of each kind of work."""

    token: float
    pair: float
    label: float
    patch: float
    patch_pair: float

    def of(self, load: Load) -> float:
        """Operations of a batch."""
        return (
            self.token * load.tokens
            + self.pair * load.pairs
            + self.label * load.labels
            + self.patch * load.patches
            + self.patch_pair * load.patch_pairs
        )


def text_load(rows: Iterable[Row]) -> Load:
    """The language model's share of a batch."""
    total = Load()
    for row in rows:
        prefix, *branches = np.bincount(row.segments).tolist()
        total += row_load(prefix, branches, int((row.labels != IGNORED).sum()))
    return total


def row_load(prefix: int, branches: Sequence[int], labels: int) -> Load:
    """`text_load` of one row, by the tokens of its prefix and of each branch, and those that are trained on."""
    pairs = prefix * (prefix + 1) // 2 + sum(length * prefix + length * (length + 1) // 2 for length in branches)
    return Load(tokens=prefix + sum(branches), pairs=pairs, labels=labels)


def image_load(grids: Iterable[Iterable[int]]) -> Load:
    """The vision tower's share: grids are (t, h, w) in patches, one for each image that is encoded."""
    sizes = [math.prod(map(int, grid)) for grid in grids]
    return Load(patches=sum(sizes), patch_pairs=sum(size * size for size in sizes))


def costs(model: Any) -> Costs:
    """What training this Qwen2-VL costs, with or without PEFT's adapters, on whatever device.

    A linear layer with W weights takes 2 W a token forward, 2 W for the gradient of its input where anything before it
    is trained, and 2 W for that of its weights where they are trained themselves.
    """
    import torch

    trained = {parameter_group(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    tower = "vision tower" in trained
    # Whether gradients go through a part at all: the language model comes last, the tower first.
    passed = {"language model": True, "merger": tower or "merger" in trained, "vision tower": tower}
    vision, text = model.config.vision_config, model.config.text_config
    merged = vision.spatial_merge_size**2
    totals = {"language model": 0.0, "head": 0.0, "vision tower": 0.0, "merger": 0.0}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv3d):
            # Not the weight's own size: ZeRO-3 leaves an empty one on each rank.
            weights = module.in_channels * module.out_channels * math.prod(module.kernel_size)
            part = "vision tower"
            backward = int(module.weight.requires_grad)  # nothing is trained before it
        elif isinstance(module, torch.nn.Linear):
            weights, part = module.in_features * module.out_features, parameter_group(name)
            backward = int(passed[part]) + int(module.weight.requires_grad)
        else:
            continue
        totals["head" if "lm_head" in name else part] += 2 * weights * (1 + backward)
    attention = 4 * text.num_hidden_layers * text.hidden_size
    return Costs(
        token=totals["language model"],
        pair=3 * attention,
        label=totals["head"],
        patch=totals["vision tower"] + totals["merger"] / merged,
        patch_pair=4 * vision.depth * vision.embed_dim * (3 if tower else 1),
    )


def peak(device_name: str) -> float | None:
    """Dense bfloat16 operations a second of a GPU by its name; None for one that is not in PEAKS."""
    return next((operations for part, operations in PEAKS if part in device_name), None)
