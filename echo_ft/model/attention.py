"""Attention over a packed row of several prefixes and their branches, without a mask for the whole row.

A prefix needs only causal attention, which has fast kernels; only the short branches need a mask. Tokens of different
exchanges are never multiplied with each other. There are two implementations with the same result:

- `sdpa` processes one exchange after another.
- `flex_attention` processes the whole row in one kernel that skips fully masked blocks. It needs a GPU, because
  torch 2.15 has no backward pass for it on a CPU.

Shapes: T tokens of the packed row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION_NAME = "prefix_sharing"
"""Name of `attend` in transformers. It computes what `sdpa` computes with a mask for the whole row."""

IMPLEMENTATIONS = ("sdpa", "flex_attention")
"""Implementations of `attend`, by their names in transformers."""

FLEX_BLOCK = 128
"""Tokens per block of flex_attention (torch's default)."""

MASK_QUERY_BLOCKS = 8
"""Number of query blocks whose mask `make_block_mask` holds in memory at once."""


@dataclass(frozen=True)
class Span:
    """The place of one exchange in a packed row, in tokens."""

    start: int
    branches: int
    """End of the prefix and start of the first branch."""
    end: int
    mask: torch.Tensor
    """(1, 1, end - branches, end - start) bool: True if a token of a branch (row) attends to a token (column)."""


def make_spans(segments: torch.Tensor, lengths: Sequence[tuple[int, int]]) -> list[Span]:
    """Return the spans of a packed row, from its segments (1, T) and the (prefix length, length) of each exchange."""
    found, start = [], 0
    for prefix, length in lengths:
        segment = segments[0, start : start + length]
        found.append(Span(start, start + prefix, start + length, _branch_mask(segment, prefix)))
        start += length
    return found


def _branch_mask(segment: torch.Tensor, prefix: int) -> torch.Tensor:
    """Return the rows of `make_attention_mask` for the branches, (1, 1, L - prefix, L), from the segments (L,).

    The whole mask of 32,768 tokens would take 1 GiB, and 5 GiB while it is built.
    """
    token = torch.arange(len(segment), device=segment.device)
    query, key = segment[prefix:, None], segment[None, :]
    visible = (query == key) | ((key == 0) & (query > 0))
    return (visible & (token[None, :] <= token[prefix:, None]))[None, None]


def make_block_mask(segments: torch.Tensor, lengths: Sequence[tuple[int, int]]) -> BlockMask:
    """Return the mask of `make_spans` for flex_attention, as partly and fully visible FLEX_BLOCK x FLEX_BLOCK blocks.

    `segments` is (1, T); `lengths` has the (prefix length, length) of each exchange. The result equals that of torch's
    `create_block_mask`, which first builds the (T, T) mask: several GiB for a row of 32,768 tokens. Here, only the
    queries of MASK_QUERY_BLOCKS blocks are in memory at once.
    """
    segment = segments[0]
    length, device = len(segment), segments.device
    sizes = torch.tensor([length for _, length in lengths], device=device)
    exchange = torch.arange(len(lengths), device=device).repeat_interleave(sizes)

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        branch = (segment[key] == 0) | (segment[key] == segment[query])
        return (exchange[key] == exchange[query]) & branch & (key <= query)

    tokens = torch.arange(length, device=device)
    padding = -length % FLEX_BLOCK
    counts = []
    for queries in tokens.split(MASK_QUERY_BLOCKS * FLEX_BLOCK):
        seen = visible(None, None, queries[:, None], tokens[None])
        seen = torch.nn.functional.pad(seen, (0, padding, 0, -len(queries) % FLEX_BLOCK))
        counts.append(seen.unflatten(1, (-1, FLEX_BLOCK)).sum(2).unflatten(0, (-1, FLEX_BLOCK)).sum(1))
    count = torch.cat(counts)[None, None]
    part, whole = _ordered((count > 0) & (count < FLEX_BLOCK**2)), _ordered(count == FLEX_BLOCK**2)
    return BlockMask.from_kv_blocks(
        *part, *whole, BLOCK_SIZE=FLEX_BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the set blocks (..., N) and order all block indices with the set ones first; int32, as BlockMask needs."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1).int(), order.int()


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    spans: Sequence[Span] | BlockMask | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the attention of a packed row: `query` is (1, heads, T, width), the result (1, T, heads, width).

    `spans` comes from `make_spans` (sdpa) or `make_block_mask` (flex_attention). Without it, this is transformers'
    `sdpa` with the given `attention_mask`.
    """
    if spans is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if isinstance(spans, BlockMask):
        return flex_attention_forward(module, query, key, value, spans, **kwargs)[0], None
    kwargs.pop("is_causal", None)
    parts = []
    for span in spans:
        for first, last, mask in ((span.start, span.branches, None), (span.branches, span.end, span.mask)):
            parts.append(
                sdpa_attention_forward(
                    module,
                    query[:, :, first:last],
                    key[:, :, span.start : last],
                    value[:, :, span.start : last],
                    mask,
                    is_causal=mask is None,
                    **kwargs,
                )[0]
            )
    return torch.cat(parts, dim=1), None


AttentionInterface.register(ATTENTION_NAME, attend)
