"""Attention over a row into which several prefixes with their branches are packed, without a mask over all of it.

A prefix is plain causal attention, for which fast kernels exist; only the branches, which are short, need a mask. What
belongs to different exchanges is never multiplied with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from echo_ft.layout import attention_mask

NAME = "prefix_sharing"
"""The name under which transformers finds `attend`; it computes what `sdpa` does with the whole mask."""


@dataclass(frozen=True)
class Span:
    """Where one exchange lies in a packed row."""

    start: int
    branches: int
    """Where its prefix ends and its first branch begins."""
    end: int
    mask: torch.Tensor
    """(1, 1, end - branches, end - start) bool: which tokens the branches' tokens see."""


def spans(segments: torch.Tensor, lengths: Sequence[tuple[int, int]]) -> list[Span]:
    """The spans of a packed row from its segments (1, T) and (prefix length, length) of each exchange."""
    found, start = [], 0
    for prefix, length in lengths:
        mask = attention_mask(segments[:, start : start + length])[:, :, prefix:]
        found.append(Span(start, start + prefix, start + length, mask))
        start += length
    return found


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    spans: Sequence[Span] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed row: query (1, heads, T, width), the result (1, T, heads, width).

    Without `spans`, transformers' own `sdpa` with the mask that it is given.
    """
    if spans is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
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


AttentionInterface.register(NAME, attend)
