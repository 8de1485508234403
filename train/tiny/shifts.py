"""The vision tower as a small convolutional network, whose attention heads start as shifts to one neighbour.

A head with fixed queries and keys, whose rotary positions point to one offset, copies the value of the neighbour there.
While pretraining keeps it fixed, the copy is computed directly (`encode_as_shifts`), ten times faster than softmax over
576 patches. transformers' own tower can always load the weights. Its softmax attention gives the same features, apart
from a small contribution of other patches. Later training may change the queries and keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import gelu, layer_norm, linear, silu
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

Offset = tuple[int, int]
"""(rows, columns) from a patch to the neighbour that a head copies."""

_CROSS = ((-1, 0), (1, 0), (0, -1), (0, 1))
_DIAGONAL = ((-1, -1), (-1, 1), (1, -1), (1, 1))
BLOCKS: tuple[tuple[Offset | None, ...], ...] = (
    _CROSS,
    _DIAGONAL,
    ((-2, 0), (2, 0), (0, -2), (0, 2)),
    (None, None, (0, 0), (0, 0)),
)
"""The offset of each head, by block. None is the mean of all patches."""

ROTARY_SHARES = (1.0, 12.0, 0.0, 0.0)
"""Weight of each rotary frequency (1, 0.1, 0.01, 0.001 per patch). The second rules out patches one period away."""
SHARPNESS = 50.0
"""Logit at the offset per unit of ROTARY_SHARES, before attention's scaling. Adjacent patches get 1/10,000 as much."""
QUICK_GELU = 1.702
"""quick_gelu(x) = silu(1.702 x) / 1.702. silu is faster here, because the factors move into the weights."""


def prepare_shifts(visual: Any) -> None:
    """Initialise a Qwen2-VL vision tower: attention as shifts, other matrices at random, scaled by their fan-in."""
    width, head = visual.config.embed_dim, visual.config.embed_dim // visual.config.num_heads
    frequencies = visual.rotary_pos_emb.inv_freq
    count = len(frequencies)
    size = torch.sqrt(SHARPNESS * torch.tensor(ROTARY_SHARES))
    with torch.no_grad():
        for block, offsets in zip(visual.blocks, BLOCKS, strict=True):
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                layer.weight.normal_(std=layer.in_features**-0.5)
                layer.bias.zero_()
            block.attn.proj.weight.mul_(0.5)
            block.mlp.fc2.weight.mul_(0.5)
            block.attn.qkv.weight[: 2 * width] = 0
            # the axes are queries or keys, head, half of a rotation, axis and frequency
            bias = block.attn.qkv.bias[: 2 * width].view(2, -1, 2, 2, count)
            for number, offset in enumerate(offsets):
                if offset is None:
                    continue
                bias[1, number, 0] = size
                for axis in range(2):
                    bias[0, number, 0, axis] = size * torch.cos(offset[axis] * frequencies)
                    bias[0, number, 1, axis] = size * torch.sin(offset[axis] * frequencies)
        for layer in (visual.merger.mlp[0], visual.merger.mlp[2]):
            layer.weight.normal_(std=layer.in_features**-0.5)
            layer.bias.zero_()
        visual.patch_embed.proj.weight.normal_(std=(2 * 3 * visual.config.patch_size**2) ** -0.5)
    assert head == 4 * count


def normalize(images: Any, patch: int) -> Any:
    """Return images (B, height, width, 3) from 0 to 255 as normalised patches (B, rows, columns, 3 * patch * patch)."""
    mean, deviation = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    count, height, width, _ = images.shape
    pixels = (images / 255 - mean) / deviation
    blocks = pixels.view(count, height // patch, patch, width // patch, patch, 3).permute(0, 1, 3, 5, 2, 4)
    return blocks.reshape(count, height // patch, width // patch, 3 * patch * patch)


def encode_as_shifts(visual: Any, patches: Any) -> tuple[Any, Any]:
    """Encode patches (B, rows, columns, values) with the weights of a Qwen2-VL tower whose attention heads are shifts.

    Returns the last block's features (B, rows, columns, width) and the merged tokens (B, rows / merge, columns / merge,
    hidden).
    """
    width, merge = visual.config.embed_dim, visual.config.spatial_merge_size
    # Qwen2-VL repeats an image as two frames.
    states = linear(patches, visual.patch_embed.proj.weight.sum(2).flatten(1))
    for block, offsets in zip(visual.blocks, BLOCKS, strict=True):
        qkv, mlp = block.attn.qkv, block.mlp
        values = linear(block.norm1(states), qkv.weight[2 * width :], qkv.bias[2 * width :])
        heads = values.chunk(len(offsets), dim=-1)
        copied = [_copy(values, offset) for values, offset in zip(heads, offsets, strict=True)]
        states = states + block.attn.proj(torch.cat(copied, dim=-1))
        inner = linear(block.norm2(states), QUICK_GELU * mlp.fc1.weight, QUICK_GELU * mlp.fc1.bias)
        states = states + linear(silu(inner), mlp.fc2.weight / QUICK_GELU, mlp.fc2.bias)
    count, rows, columns, _ = states.shape
    blocks = visual.merger.ln_q(states).view(count, rows // merge, merge, columns // merge, merge, width)
    merged = blocks.permute(0, 1, 3, 2, 4, 5).flatten(3)
    return states, visual.merger.mlp[2](gelu(visual.merger.mlp[0](merged)))


def _copy(values: Any, offset: Offset | None) -> Any:
    """Shift `values` (B, rows, columns, channels) by an offset. Patches at the border repeat."""
    if offset is None:
        return values.mean((1, 2), keepdim=True).expand_as(values)
    for axis, distance in enumerate(offset, start=1):
        if distance:
            size = values.shape[axis]
            edge = values.narrow(axis, size - 1 if distance > 0 else 0, 1)
            edges = edge.expand(*(abs(distance) if n == axis else -1 for n in range(4)))
            kept = values.narrow(axis, max(0, distance), size - abs(distance))
            values = torch.cat([kept, edges] if distance > 0 else [edges, kept], axis)
    return values


def scale_tokens(visual: Any, tokens: Any, deviation: float) -> None:
    """Scale the merger's output so that `tokens`, a sample of that output, would have this standard deviation."""
    factor = deviation / tokens.std()
    with torch.no_grad():
        visual.merger.mlp[2].weight.mul_(factor)
        visual.merger.mlp[2].bias.mul_(factor)


def normal(states: Any) -> Any:
    """Return hidden states in float32, normalised to mean 0 and standard deviation 1 over their channels."""
    return layer_norm(states.float(), states.shape[-1:])
