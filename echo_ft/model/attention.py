"""Attention over a packed row of several prefixes and their branches, without a mask for the whole row.

A prefix needs only causal attention, which has fast kernels; only the short branches need a mask. Tokens of different
exchanges are never multiplied with each other. There are two implementations with the same result:

- `sdpa` processes one exchange after another.
- `flex_attention` processes the whole row in one kernel that skips fully masked blocks. It needs a GPU, because
  torch 2.15 has no backward pass for it on a CPU.

Shapes: T tokens of the packed row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


States = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of tokens that have run before, (1, heads, tokens, width) each, by the index of the layer."""


@dataclass(frozen=True)
class Continuation:
    """The place of an exchange's adapted tokens, which attend to its earlier tokens and to each other."""

    start: int
    """First token, counted among the adapted tokens of the row."""
    end: int
    base_start: int
    """First earlier token, counted among those of the row."""
    base_end: int
    mask: torch.Tensor
    """(1, 1, tokens, earlier tokens + tokens) bool, as in `Span`."""


@dataclass(frozen=True)
class Split:
    """A packed row in two parts: the base model computes the first, then an adapter computes the second."""

    base_tokens: torch.Tensor
    """(F,) ascending indices in the packed row."""
    adapted_tokens: torch.Tensor
    """(A,) ascending indices in the packed row; F + A = T."""
    base_spans: Sequence[Span] | BlockMask
    adapted_spans: Sequence[Continuation] | BlockMask


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
    return _visible(segment, torch.arange(len(segment), device=segment.device), prefix)[None, None]


def _visible(segment: torch.Tensor, token: torch.Tensor, first: int) -> torch.Tensor:
    """Return which of L tokens of an exchange the tokens from `first` on attend to: (L - first, L) bool.

    `segment` and `token` (L,) are each token's segment and place in the row.
    """
    query, key = segment[first:, None], segment[None, :]
    return ((query == key) | ((key == 0) & (query > 0))) & (token[None, :] <= token[first:, None])


def make_block_mask(segments: torch.Tensor, lengths: Sequence[tuple[int, int]]) -> BlockMask:
    """Return the mask of `make_spans` for flex_attention, as partly and fully visible FLEX_BLOCK x FLEX_BLOCK blocks.

    `segments` is (1, T); `lengths` has the (prefix length, length) of each exchange.
    """
    segment, exchange = segments[0], _exchanges(segments, lengths)

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        branch = (segment[key] == 0) | (segment[key] == segment[query])
        return (exchange[key] == exchange[query]) & branch & (key <= query)

    return _block_mask(visible, len(segment), len(segment), segments.device)


def _exchanges(segments: torch.Tensor, lengths: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Return the number (T,) of each token's exchange."""
    sizes = torch.tensor([length for _, length in lengths], device=segments.device)
    return torch.arange(len(lengths), device=segments.device).repeat_interleave(sizes)


def _block_mask(visible: Any, queries: int, keys: int, device: torch.device) -> BlockMask:
    """Return the mask of `queries` tokens that attend to `keys` tokens as `visible` says (torch's `mask_mod`).

    The result equals that of torch's `create_block_mask`, which first builds the whole mask: several GiB for a row of
    32,768 tokens. Here, only the queries of MASK_QUERY_BLOCKS blocks are in memory at once.
    """
    columns = torch.arange(keys, device=device)
    counts = []
    for rows in torch.arange(queries, device=device).split(MASK_QUERY_BLOCKS * FLEX_BLOCK):
        seen = visible(None, None, rows[:, None], columns[None])
        seen = torch.nn.functional.pad(seen, (0, -keys % FLEX_BLOCK, 0, -len(rows) % FLEX_BLOCK))
        counts.append(seen.unflatten(1, (-1, FLEX_BLOCK)).sum(2).unflatten(0, (-1, FLEX_BLOCK)).sum(1))
    count = torch.cat(counts)[None, None]
    part, whole = _ordered((count > 0) & (count < FLEX_BLOCK**2)), _ordered(count == FLEX_BLOCK**2)
    return BlockMask.from_kv_blocks(*part, *whole, BLOCK_SIZE=FLEX_BLOCK, mask_mod=visible, seq_lengths=(queries, keys))


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the set blocks (..., N) and order all block indices with the set ones first; int32, as BlockMask needs."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1).int(), order.int()


def make_split(batch: Mapping[str, Any], implementation: str) -> Split:
    """Return the two parts of a packed row. `batch` comes from `batches.pack_rows` and `batches.split_rows`."""
    segments, base, adapted = batch["segments"], batch["base_tokens"], batch["adapted_tokens"]
    before, after = batch["base_lengths"], batch["adapted_lengths"]
    if implementation == "flex_attention":
        continued = _make_continued_mask(segments, batch["lengths"], base, adapted)
        return Split(base, adapted, make_block_mask(segments[:, base], before), continued)
    continuations, start, base_start = [], 0, 0
    for (_, earlier), own in zip(before, after, strict=True):
        tokens = torch.cat([base[base_start : base_start + earlier], adapted[start : start + own]])
        mask = _visible(segments[0, tokens], tokens, earlier)
        continuations.append(Continuation(start, start + own, base_start, base_start + earlier, mask[None, None]))
        start, base_start = start + own, base_start + earlier
    return Split(base, adapted, make_spans(segments[:, base], before), continuations)


def _make_continued_mask(
    segments: torch.Tensor, lengths: Sequence[tuple[int, int]], base: torch.Tensor, adapted: torch.Tensor
) -> BlockMask:
    """Return the mask of the adapted tokens (A,), which attend to the `base` tokens (F,) and then to each other."""
    token = torch.cat([base, adapted])
    segment, exchange = segments[0, token], _exchanges(segments, lengths)[token]
    own_segment, own_exchange = segment[len(base) :], exchange[len(base) :]

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        branch = (segment[key] == 0) | (segment[key] == own_segment[query])
        return (exchange[key] == own_exchange[query]) & branch & (token[key] <= adapted[query])

    return _block_mask(visible, len(adapted), len(token), segments.device)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    spans: Sequence[Span | Continuation] | BlockMask | None = None,
    record: States | None = None,
    base: States | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the attention of a packed row: `query` is (1, heads, T, width), the result (1, T, heads, width).

    `spans` comes from `make_spans` (sdpa) or `make_block_mask` (flex_attention). Without it, this is transformers'
    `sdpa` with the given `attention_mask`. The base part of a `Split` leaves its keys and values in `record`; its
    adapted part finds them in `base`.
    """
    if spans is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if record is not None:
        record[module.layer_idx] = key, value  # type: ignore[index]
    if isinstance(spans, BlockMask):
        if base is not None:
            earlier_key, earlier_value = base[module.layer_idx]  # type: ignore[index]
            key, value = torch.cat([earlier_key, key], dim=2), torch.cat([earlier_value, value], dim=2)
        return flex_attention_forward(module, query, key, value, spans, **kwargs)[0], None
    kwargs.pop("is_causal", None)
    parts = []
    for span in spans:
        if isinstance(span, Continuation):
            assert base is not None
            earlier = base[module.layer_idx]  # type: ignore[index]
            parts.append(_continue(module, query, key, value, span, earlier, **kwargs))
            continue
        for first, last, mask in ((span.start, span.branches, None), (span.branches, span.end, span.mask)):
            if first == last:
                continue
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


def _continue(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    span: Continuation,
    earlier: tuple[torch.Tensor, torch.Tensor],
    **kwargs: Any,
) -> torch.Tensor:
    """Compute the attention of an exchange's adapted tokens, with the `earlier` keys and values of the whole row."""
    own = slice(span.start, span.end)
    keys, values = (
        torch.cat([before[:, :, span.base_start : span.base_end], after[:, :, own]], dim=2)
        for before, after in zip(earlier, (key, value), strict=True)
    )
    found, _ = sdpa_attention_forward(module, query[:, :, own], keys, values, span.mask, is_causal=False, **kwargs)
    return found


AttentionInterface.register(ATTENTION_NAME, attend)
