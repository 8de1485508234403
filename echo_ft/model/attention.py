"""Attention over a row into which several prefixes with their branches are packed, without a mask over all of it.

A prefix is plain causal attention, for which fast kernels exist; only the branches, which are short, need a mask. What
belongs to different exchanges is never multiplied with each other. Two ways to one result: `sdpa` goes from exchange to
exchange, `flex_attention` takes the whole row in one kernel that passes over the blocks nobody sees (GPUs alone: on a
CPU, torch 2.15 has no backward pass for it).
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

from echo_ft.model.batches import make_attention_mask

ATTENTION_NAME = "prefix_sharing"
"""The name under which transformers finds `attend`; it computes what `sdpa` does with the whole mask."""

IMPLEMENTATIONS = ("sdpa", "flex_attention")
"""What `attend` can be made of, by transformers' names."""


FLEX_BLOCK = 128
"""Tokens of a block of flex_attention's, torch's default."""

MASK_ROWS = 8
"""Blocks of queries whose mask is made at a time."""


@dataclass(frozen=True)
class Span:
    """Where one exchange lies in a packed row."""

    start: int
    branches: int
    """Where its prefix ends and its first branch begins."""
    end: int
    mask: torch.Tensor
    """(1, 1, end - branches, end - start) bool: which tokens the branches' tokens see."""


def make_spans(segments: torch.Tensor, lengths: Sequence[tuple[int, int]]) -> list[Span]:
    """The spans of a packed row from its segments (1, T) and (prefix length, length) of each exchange."""
    found, start = [], 0
    for prefix, length in lengths:
        mask = make_attention_mask(segments[:, start : start + length])[:, :, prefix:]
        found.append(Span(start, start + prefix, start + length, mask))
        start += length
    return found


def make_block_mask(segments: torch.Tensor, lengths: Sequence[tuple[int, int]]) -> BlockMask:
    """What `spans` says, for flex_attention: which blocks of BLOCK x BLOCK tokens are seen in part and which wholly.

    Equal to torch's `create_block_mask`, which makes the (T, T) mask first, some GiB for a row of 32,768 tokens; here
    no more of it is there at a time than the queries of ROWS blocks.
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
    for queries in tokens.split(MASK_ROWS * FLEX_BLOCK):
        seen = visible(None, None, queries[:, None], tokens[None])
        seen = torch.nn.functional.pad(seen, (0, padding, 0, -len(queries) % FLEX_BLOCK))
        counts.append(seen.unflatten(1, (-1, FLEX_BLOCK)).sum(2).unflatten(0, (-1, FLEX_BLOCK)).sum(1))
    count = torch.cat(counts)[None, None]
    part, whole = _ordered((count > 0) & (count < FLEX_BLOCK**2)), _ordered(count == FLEX_BLOCK**2)
    return BlockMask.from_kv_blocks(
        *part, *whole, BLOCK_SIZE=FLEX_BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of the blocks (..., N) are set, and the numbers of all, those first: int32, as BlockMask has them."""
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
    """Attention of a packed row: query (1, heads, T, width), the result (1, T, heads, width).

    `spans` or `make_block_mask` choose between the two ways; with neither, transformers' own `sdpa` with the mask given.
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
