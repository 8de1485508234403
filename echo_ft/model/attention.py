"""Attention over a packed row of several prefixes and their branches, without a mask for the whole row.

A prefix needs only causal attention, which has fast kernels; only the short branches need a mask. In a look
(batches.pack_looks), several exchanges continue from the same images. Tokens of different exchanges without a common
look are never multiplied with each other. There are two implementations with the same result:

- `sdpa` processes one exchange or look after another.
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

from echo_ft.model.batches import LOOK

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
    """The position of one exchange or look in a packed row, in tokens."""

    start: int
    branches: int
    """End of the prefix and start of the first branch; in a look, end of the tokens that its exchanges share."""
    end: int
    mask: torch.Tensor
    """(1, 1, end - branches, end - start) bool: True if a token of a branch (row) attends to a token (column)."""


States = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of tokens that have run before, (1, heads, tokens, width) each, by the index of the layer."""


@dataclass(frozen=True)
class Continuation:
    """The position of a look's tokens of one adapter, which attend to the look's base tokens and to each other."""

    start: int
    """First token, counted among the adapter's tokens in the row."""
    end: int
    base_start: int
    """First token of the base model, counted among those in the row."""
    base_end: int
    mask: torch.Tensor
    """(1, 1, tokens, base model's tokens + tokens) bool, as in `Span`."""


@dataclass(frozen=True)
class AdapterPart:
    """The tokens of a packed row on which one adapter acts."""

    adapter: str | None
    """Name of the adapter; None for the one that is active anyway."""
    tokens: torch.Tensor
    """(A,) ascending indices in the packed row."""
    spans: Sequence[Continuation] | BlockMask


@dataclass(frozen=True)
class Split:
    """A packed row of looks: the base model computes some tokens, then each adapter computes its part."""

    base_tokens: torch.Tensor
    """(F,) ascending indices in the packed row. All other tokens are in one of the parts."""
    base_spans: Sequence[Span] | BlockMask
    parts: Sequence[AdapterPart]


def make_spans(
    segments: torch.Tensor, lengths: Sequence[tuple[int, int]], exchanges: torch.Tensor | None = None
) -> list[Span]:
    """Return the spans of a packed row, from its segments (1, T) and the (prefix length, length) of each exchange.

    With the index of each token's exchange (T,), the spans are those of looks, and `lengths` has their (shared tokens,
    tokens).
    """
    found, start = [], 0
    for prefix, length in lengths:
        place = slice(start, start + length)
        segment, token = segments[0, place], torch.arange(length, device=segments.device)
        exchange = torch.zeros_like(segment) if exchanges is None else exchanges[place]
        mask = _visible(segment, exchange, token, prefix)[None, None]
        found.append(Span(start, start + prefix, start + length, mask))
        start += length
    return found


def _visible(segment: torch.Tensor, exchange: torch.Tensor, token: torch.Tensor, first: int) -> torch.Tensor:
    """Return which of L tokens of a look the tokens from `first` on attend to: (L - first, L) bool.

    `segment`, `exchange` and `token` (L,) are each token's segment, the index of its exchange and its position in the
    row. The result has only the rows of `make_attention_mask` for the branches: the whole mask of 32,768 tokens would
    take 1 GiB, and 5 GiB while it is built.
    """
    branch = (segment == segment[first:, None]) | (segment == 0)
    own = (exchange == exchange[first:, None]) | (exchange == LOOK)
    return branch & own & (token <= token[first:, None])


def make_block_mask(
    segments: torch.Tensor, lengths: Sequence[tuple[int, int]], exchanges: torch.Tensor | None = None
) -> BlockMask:
    """Return the mask of `make_spans` for flex_attention: partly and fully visible FLEX_BLOCK x FLEX_BLOCK blocks."""
    segment, look = segments[0], _looks(segments, lengths)
    exchange = look + 1 if exchanges is None else exchanges

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        branch = (segment[key] == 0) | (segment[key] == segment[query])
        own = (exchange[key] == LOOK) | (exchange[key] == exchange[query])
        return (look[key] == look[query]) & own & branch & (key <= query)

    return _block_mask(visible, len(segment), len(segment), segments.device)


def _looks(segments: torch.Tensor, lengths: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Return the index (T,) of each token's look, or of its exchange if `lengths` are those of exchanges."""
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
    """Return the parts of a packed row. `batch` comes from `batches.pack_looks`."""
    base, flex = batch["base_tokens"], implementation == "flex_attention"
    make_masks, continue_look = (make_block_mask, _make_continued_mask) if flex else (make_spans, _continuations)
    spans = make_masks(batch["segments"][:, base], batch["base_lengths"], batch["exchanges"][base])
    parts = [AdapterPart(part["adapter"], part["tokens"], continue_look(batch, part)) for part in batch["parts"]]
    return Split(base, spans, parts)


def _continuations(batch: Mapping[str, Any], part: Mapping[str, Any]) -> list[Continuation]:
    """Return the positions of an adapter's tokens, one for each look that has any."""
    base, own_tokens = batch["base_tokens"], part["tokens"]
    found, start, base_start = [], 0, 0
    for (_, earlier), own in zip(batch["base_lengths"], part["lengths"], strict=True):
        end, base_end = start + own, base_start + earlier
        if own:
            token = torch.cat([base[base_start:base_end], own_tokens[start:end]])
            mask = _visible(batch["segments"][0, token], batch["exchanges"][token], token, earlier)
            found.append(Continuation(start, end, base_start, base_end, mask[None, None]))
        start, base_start = end, base_end
    return found


def _make_continued_mask(batch: Mapping[str, Any], part: Mapping[str, Any]) -> BlockMask:
    """Return the mask of an adapter's tokens (A,), which attend to the base model's (F,) and then to each other."""
    segments, base, adapted = batch["segments"], batch["base_tokens"], part["tokens"]
    token = torch.cat([base, adapted])
    segment, exchange, look = segments[0, token], batch["exchanges"][token], _looks(segments, batch["lengths"])[token]
    own_segment, own_exchange, own_look = segment[len(base) :], exchange[len(base) :], look[len(base) :]

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        branch = (segment[key] == 0) | (segment[key] == own_segment[query])
        own = (exchange[key] == LOOK) | (exchange[key] == own_exchange[query])
        return (look[key] == own_look[query]) & own & branch & (token[key] <= adapted[query])

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
    `sdpa` with the given `attention_mask`. The base model's part of a `Split` leaves its keys and values in `record`;
    the other parts find them in `base`.
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
    """Compute the attention of a look's adapted tokens, with the `earlier` keys and values of the whole row."""
    own = slice(span.start, span.end)
    keys, values = (
        torch.cat([before[:, :, span.base_start : span.base_end], after[:, :, own]], dim=2)
        for before, after in zip(earlier, (key, value), strict=True)
    )
    found, _ = sdpa_attention_forward(module, query[:, :, own], keys, values, span.mask, is_causal=False, **kwargs)
    return found


AttentionInterface.register(ATTENTION_NAME, attend)
