"""Rows and images as batches for the model: padded, or packed into one row.

A look is what several rows with the same images share: the tokens up to the last image.

Shapes: B rows, L tokens in the longest row, T tokens of a packed row, P patches, C values per patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache

    from echo_ft.model.attention import States
from echo_ft.model.rows import IGNORED, PADDING, Row, RowBuilder
from echo_ft.records import ROLES

LOOK = 0
"""Exchange index of tokens that several exchanges share. Exchanges are numbered from 1."""


def image_inputs(row_builder: RowBuilder, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """Return `pixel_values` (P, C) and `image_grid_thw` (images, 3) for the model; both are empty without images."""
    import torch

    if not images:
        return {
            "pixel_values": blank_image_inputs(row_builder)["pixel_values"][:0],
            "image_grid_thw": torch.zeros(0, 3, dtype=torch.long),
        }
    batch = row_builder.image_processor(images=list(images), return_tensors="pt")
    return {"pixel_values": batch["pixel_values"], "image_grid_thw": batch["image_grid_thw"]}


def blank_image_inputs(row_builder: RowBuilder) -> dict[str, torch.Tensor]:
    """Return `image_inputs` of the smallest image that the model accepts: a blank one of a single token."""
    import torch

    processor, merge = row_builder.image_processor, row_builder.merge
    values = 3 * processor.temporal_patch_size * processor.patch_size**2
    return {"pixel_values": torch.zeros(merge**2, values), "image_grid_thw": torch.tensor([[1, merge, merge]])}


def pad_rows(rows: Sequence[Row], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Stack rows, padded on the right: input_ids, labels and segments (B, L), and position_ids (3, B, L)."""
    import torch

    length = max(len(row.input_ids) for row in rows)

    def stack(arrays: Sequence[np.ndarray], value: int) -> torch.Tensor:
        out = torch.full((len(arrays), length), value, dtype=torch.long)
        for index, array in enumerate(arrays):
            out[index, : len(array)] = torch.from_numpy(array)
        return out

    return {
        "input_ids": stack([row.input_ids for row in rows], pad_token_id),
        "labels": stack([row.labels for row in rows], IGNORED),
        "segments": stack([row.segments for row in rows], PADDING),
        "position_ids": torch.stack([stack([row.positions[axis] for row in rows], 0) for axis in range(3)]),
    }


def pack_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """Concatenate rows into a single row of T tokens, without padding.

    Returns input_ids, labels and segments (1, T), position_ids (3, 1, T), and `lengths` with the (prefix length,
    length) of each row.
    """
    import torch

    def join(arrays: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays, axis=-1))

    return {
        "input_ids": join([row.input_ids for row in rows])[None],
        "labels": join([row.labels for row in rows])[None],
        "segments": join([row.segments for row in rows])[None],
        "position_ids": join([row.positions for row in rows])[:, None],
        "lengths": [(row.prefix_length, len(row.input_ids)) for row in rows],
    }


@dataclass(frozen=True)
class Look:
    """Rows that see the same images, and from where on an adapter acts in them."""

    rows: Sequence[Row]
    adapted: Sequence[np.ndarray]
    """`RowBuilder.adapted_tokens` of each row."""
    shared: int
    """`RowBuilder.look_length` of the rows."""


def pack_looks(looks: Sequence[Look], by_role: bool = False) -> dict[str, Any]:
    """Concatenate the rows of looks as `pack_rows` does, but take the tokens that the rows of a look share only once.

    Tokens are of the base model or of an adapter: with `by_role` that of their role, otherwise the only one. Instead of
    the lengths of rows, `lengths` has the (shared tokens, tokens) of each look. In addition, returns

    - exchanges (T,): the index of each token's exchange, or LOOK;
    - base_tokens (F,): ascending indices of the base model's tokens, and `base_lengths` like `lengths`;
    - `parts`: for each adapter its name (None without `by_role`), its tokens (A,), ascending indices, and `lengths`,
      the number of its tokens in each look;
    - label_roles (N,): with `by_role`, the index in ROLES of each label's role.
    """
    import torch

    pieces: list[Row] = []
    exchanges, acting, sizes = [], [], []
    for look in looks:
        for index, (row, adapted) in enumerate(zip(look.rows, look.adapted, strict=True)):
            own = slice(look.shared if index else 0, None)
            number = np.full(len(row.segments), len(pieces) + 1)
            number[: look.shared] = LOOK
            pieces.append(row.select(own))
            exchanges.append(number[own])
            acting.append(np.where(adapted, ROLES.index(row.exchange.role) if by_role else 0, -1)[own])
        sizes.append(sum(len(piece.segments) for piece in pieces[-len(look.rows) :]))
    packed, actor = pack_rows(pieces), np.concatenate(acting)
    by_look = np.split(actor, np.cumsum(sizes)[:-1])

    def part(adapter: int) -> dict[str, Any]:
        return {
            "adapter": ROLES[adapter] if by_role else None,
            "tokens": torch.from_numpy(np.flatnonzero(actor == adapter)),
            "lengths": [int((own == adapter).sum()) for own in by_look],
        }

    base = part(-1)
    labelled = actor[packed["labels"][0].numpy() != IGNORED]
    return {
        **packed,
        "lengths": [(look.shared, size) for look, size in zip(looks, sizes, strict=True)],
        "exchanges": torch.from_numpy(np.concatenate(exchanges)),
        "base_tokens": base["tokens"],
        "base_lengths": [(look.shared, size) for look, size in zip(looks, base["lengths"], strict=True)],
        "parts": [part(adapter) for adapter in np.unique(actor[actor >= 0]).tolist()],
        **({"label_roles": torch.from_numpy(labelled)} if by_role else {}),
    }


def make_attention_mask(segments: torch.Tensor) -> torch.Tensor:
    """Return the attention mask (B, 1, L, L) bool for segments (B, L).

    An entry is True if the query token (row) attends to the key token (column). The mask is causal, and a branch
    attends only to the prefix and to itself. Padding tokens attend to padding, so that no softmax row is empty.
    """
    import torch

    length = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    visible = (query == key) | ((key == 0) & (query > 0))
    return (visible & causal)[:, None]


def float32_logits(head: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits (N, vocabulary) of hidden states (N, hidden) of any precision, in float32.

    A bfloat16 product rounds logits near 20 to steps of 0.125. Two options with a smaller difference would tie, and the
    earlier letter would always win.
    """
    import torch

    head = _acting_layer(head)
    if type(head) is not torch.nn.Linear or hidden.dtype == torch.float32:  # other heads are adapted or quantized
        return head(hidden).float()
    wide = hidden.float()
    # This is done in blocks, because a float32 copy of a 7B's whole output layer would take 2 GiB.
    return torch.cat([wide @ block.float().t() for block in head.weight.split(16_384)], dim=1)


def _acting_layer(head: Any) -> Any:
    """Return `head`, or the layer that acts in PEFT's wrapper for modules_to_save: an adapter's or the model's own."""
    own = getattr(head, "modules_to_save", None)
    if own is None:
        return head
    active = () if head.disable_adapters else head.active_adapters
    return own[active[0]] if active else head.original_module


def join_states(states: Sequence[States]) -> tuple[DynamicCache, torch.Tensor]:
    """Join keys and values of B prefixes, one each, into a cache that is right-padded to the longest of L tokens.

    Also returns a mask (B, L) that is False for padding.
    """
    import torch
    from transformers import DynamicCache

    lengths = torch.tensor([own[0][0].shape[-2] for own in states], device=states[0][0][0].device)
    longest = int(lengths.max())
    cache = DynamicCache()
    for layer in states[0]:
        pairs = [own[layer] for own in states]
        keys, values = (
            torch.cat([torch.nn.functional.pad(one, (0, 0, 0, longest - one.shape[-2])) for one in part])
            for part in zip(*pairs, strict=True)
        )
        cache.update(keys, values, layer)
    return cache, torch.arange(longest, device=lengths.device)[None] < lengths[:, None]


def join_caches(caches: Sequence[DynamicCache]) -> DynamicCache:
    """Join key-value caches along the batch, right-padded to the longest. This empties all but the first."""
    import torch

    length = max(cache.get_seq_length() for cache in caches)
    for index, joined in enumerate(caches[0].layers):
        layers: list[Any] = [cache.layers[index] for cache in caches]
        for name in ("keys", "values"):
            states = [getattr(layer, name) for layer in layers]
            padded = [torch.nn.functional.pad(one, (0, 0, 0, length - one.shape[-2])) for one in states]
            for layer in layers:
                setattr(layer, name, None)
            setattr(joined, name, torch.cat(padded))
    return caches[0]
