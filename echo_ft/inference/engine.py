"""Generate with a local model: encode images once, prefill prefixes once, and decode branches from their caches.

For B exchanges with N branches, the prefix of Lp tokens runs once per exchange. The branches, left-padded to Lb tokens,
continue from copies of its key-value cache. Decoding is greedy. The result equals that of generating each answer
separately (tests/inference/test_engine.py compares with `generate`).

If an adapter acts only after the prefix (rows.ADAPT_FROM), the base model computes the prefix. Its images then run once
for all roles that see them in this order.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from echo_ft.errors import EchoError
from echo_ft.images.corruptions import Corruption
from echo_ft.images.views import View, views
from echo_ft.model.adapter_layers import adapter_layers, switched_off
from echo_ft.model.attention import States
from echo_ft.model.batches import float32_logits, join_caches, join_states, pad_rows
from echo_ft.model.loading import project_patches
from echo_ft.model.rows import PADDING, Row, RowBuilder
from echo_ft.model.vision import ImageEncoder, ImageFeatureCache
from echo_ft.records import LETTERS, ROLES, Exchange, Generation
from echo_ft.terminal import LOGGER

PREFILL_TOKENS = 8_192
"""Maximum number of prefix tokens, including padding, that run through the model at once."""

LOOK_TOKENS = 32_768
"""Maximum number of tokens whose keys and values are kept for the next role: 1.8 GiB for a 7B in 16 bits."""

_TURNS: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()
"""A lock per model. A model has one active adapter, so threads take turns."""


class Engine:
    """Generates with one base model, with or without adapters named after the roles."""

    def __init__(
        self,
        model: Any,
        row_builder: RowBuilder,
        root: Path,
        max_new_tokens: int = 128,
        answer_tokens: int | None = None,
        corruption: Corruption | None = None,
        features: ImageFeatureCache | None = None,
        max_batch_tokens: int | None = None,
    ) -> None:
        """Make an engine for images relative to `root`.

        `answer_tokens` limits the decision maker's generations; None means `max_new_tokens`. A single answer token
        needs no decoding step, because it comes from the same logits as the letters' probabilities. `corruption`
        corrupts every query. `features` may be shared with other engines on the same model and pixel budget.

        `max_batch_tokens` limits the tokens in the key-value cache at the end of decoding. Larger batches are split; an
        exchange that exceeds the limit runs in its own batch.
        """
        self.model = model.eval()
        self._turn = _TURNS.setdefault(model, threading.Lock())
        self.row_builder = row_builder
        self.root = root
        self.max_new_tokens = max_new_tokens
        self.answer_tokens = answer_tokens or max_new_tokens
        self.corruption = corruption
        self.max_batch_tokens = max_batch_tokens
        self.adapted = hasattr(model, "peft_config")
        self.base = model.get_base_model() if self.adapted else model
        self._adapt_from = "prefix"
        self._layers = adapter_layers(self.base)
        self._looks: dict[tuple[View, ...], States] = {}
        project_patches(self.base)
        self.device = self.base.device
        self._encoder = ImageEncoder(self.base, row_builder, features)
        tower = [name for name, _ in self.base.named_parameters() if ".visual." in name]
        self._tower_roles = {role for role in ROLES if any(f".{role}." in name for name in tower)}
        self._ends = torch.atleast_1d(torch.tensor(self.base.generation_config.eos_token_id, device=self.device))
        self._letters = {letter: row_builder.tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS}

    @torch.inference_mode()
    def generate(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        """Generate the outputs of `role` for every branch of every exchange, in order. Threads take turns.

        Raises EchoError if an image is missing or broken, or if a row cannot be built.
        """
        with self._turn:
            return self._generate(role, exchanges) if exchanges else []

    def _generate(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        if self.adapted:
            self.model.set_adapter(role)
            self._adapt_from = getattr(self.model, "adapt_from", {}).get(role, "prefix")
        shown = [view for exchange in exchanges for view in views(exchange, self.root, self.corruption)]
        # Roles share features unless an adapter changes the vision tower or the merger.
        owner = role if role in self._tower_roles else ""
        encoded = iter(self._encoder.encode(owner, shown))
        images = [[next(encoded) for _ in exchange.images] for exchange in exchanges]
        rows = [
            self.row_builder.row(exchange, [size for _, size in features])
            for exchange, features in zip(exchanges, images, strict=True)
        ]
        if self._adapt_from != "prefix":
            wanted = {self._views(exchange) for exchange in exchanges}
            self._looks = {key: look for key, look in self._looks.items() if key in wanted}
        limit = self.answer_tokens if role == "decision_maker" else self.max_new_tokens
        generations: list[Generation] = []
        for start, end in pairwise(self._batch_boundaries(rows, limit)):
            features = [[feature for feature, _ in own] for own in images[start:end]]
            generations += self._generate_batch(rows[start:end], features, limit)
        remaining = iter(generations)
        return [[next(remaining) for _ in exchange.branches] for exchange in exchanges]

    def _generate_batch(
        self, rows: Sequence[Row], features: Sequence[Sequence[torch.Tensor]], limit: int
    ) -> list[Generation]:
        """Generate for all branches of `rows`. If memory runs out, halve the rows and `max_batch_tokens`."""
        try:
            return self._generate_together(rows, features, limit)
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise EchoError(
                    "a single case does not fit into memory; lower max_pixels, references or max_new_tokens, or use "
                    "a GPU with more memory"
                ) from error
        # Here, neither the handler's traceback nor a variable keeps the tensors of the failed attempt alive.
        self._looks.clear()
        torch.cuda.empty_cache()
        lengths = [np.bincount(row.segments).tolist() for row in rows]
        branches = [length for _, *own in lengths for length in own]
        tokens = len(branches) * (max(prefix for prefix, *_ in lengths) + max(branches) + limit)
        self.max_batch_tokens = tokens // 2
        LOGGER.warning("out of memory: max_batch_tokens is now %d", self.max_batch_tokens)
        middle = len(rows) // 2
        first = self._generate_batch(rows[:middle], features[:middle], limit)
        return first + self._generate_batch(rows[middle:], features[middle:], limit)

    def _generate_together(
        self, rows: Sequence[Row], features: Sequence[Sequence[torch.Tensor]], limit: int
    ) -> list[Generation]:
        cache, visible, starts = self._prefill_in_groups(rows, features)
        owners = torch.tensor([index for index, row in enumerate(rows) for _ in row.exchange.branches])
        return self._decode(rows, owners.to(self.device), cache, visible, starts, limit)

    def _batch_boundaries(self, rows: Sequence[Row], limit: int) -> list[int]:
        """Split rows into batches within `max_batch_tokens`; returns the start of each batch and the end of the last.

        `limit` is the maximum number of new tokens per branch. Every branch has a copy of its prefix in the cache, and
        all are padded to the longest.
        """
        boundaries, prefix, branch, count = [0], 0, 0, 0
        for index, row in enumerate(rows):
            own_prefix, *own = np.bincount(row.segments).tolist()
            prefix, branch, count = max(prefix, own_prefix), max(branch, *own), count + len(own)
            fits = self.max_batch_tokens is None or count * (prefix + branch + limit) <= self.max_batch_tokens
            if not fits and index > boundaries[-1]:
                boundaries.append(index)
                prefix, branch, count = own_prefix, max(own), len(own)
        return [*boundaries, len(rows)]

    def _prefill_in_groups(
        self, rows: Sequence[Row], features: Sequence[Sequence[torch.Tensor]]
    ) -> tuple[DynamicCache, torch.Tensor, list[int]]:
        """Like `_prefill`, but in groups of at most PREFILL_TOKENS, because activations grow with a group's tokens."""
        boundaries, longest = [0], 0
        for index, row in enumerate(rows):
            longest = max(longest, row.prefix_length)
            if (index + 1 - boundaries[-1]) * longest > PREFILL_TOKENS and index > boundaries[-1]:
                boundaries.append(index)
                longest = row.prefix_length
        groups = [
            self._prefill(rows[start:end], tuple(feature for own in features[start:end] for feature in own))
            for start, end in pairwise([*boundaries, len(rows)])
        ]
        length = max(visible.shape[1] for _, visible, _ in groups)
        visible = torch.cat([torch.nn.functional.pad(one, (0, length - one.shape[1])) for _, one, _ in groups])
        return join_caches([cache for cache, _, _ in groups]), visible, [start for *_, own in groups for start in own]

    def _prefill(
        self, rows: Sequence[Row], features: tuple[torch.Tensor, ...]
    ) -> tuple[DynamicCache, torch.Tensor, list[int]]:
        """Run the prefixes through the model.

        Returns their key-value cache, a mask (B, Lp) that is False for padding, and the first position of each row's
        branches.
        """
        prefixes = [row.select(row.segments == 0) for row in rows]
        starts = [int(prefix.positions.max()) + 1 for prefix in prefixes]
        if self._adapt_from != "prefix":
            with switched_off(self._layers):
                return *self._prefill_after_images(prefixes, features), starts
        return *self._run_prefixes(prefixes, features), starts

    def _run_prefixes(
        self, prefixes: Sequence[Row], features: tuple[torch.Tensor, ...]
    ) -> tuple[DynamicCache, torch.Tensor]:
        """Return the key-value cache of prefixes, and a mask (B, Lp) that is False for padding."""
        batch = {
            name: tensor.to(self.device) for name, tensor in pad_rows(prefixes, self.row_builder.pad_token_id).items()
        }
        cache = DynamicCache(config=self.base.config.get_text_config())
        pooled: Any = features  # the type that transformers declares, a single tensor, is wrong
        self.base.model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=None,  # Padding is on the right, so causal attention is enough, and it has fast kernels.
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=pooled)},
            past_key_values=cache,
            use_cache=True,
        )
        return cache, batch["segments"] != PADDING

    def _prefill_after_images(
        self, prefixes: Sequence[Row], features: tuple[torch.Tensor, ...]
    ) -> tuple[DynamicCache, torch.Tensor]:
        """Like `_run_prefixes`, but consecutive calls share one pass over the tokens up to the last image.

        These tokens run one exchange at a time: in a batch, the lowest bits would depend on which are stored already.
        """
        looks, rest, remaining = [], [], iter(features)
        for prefix in prefixes:
            own = tuple(next(remaining) for _ in prefix.exchange.images)
            end = self.row_builder.look_length(prefix)
            looks.append(self._look(prefix.select(slice(end)), own))
            rest.append(prefix.select(slice(end, None)))
        cache, visible = join_states(looks)
        batch = {name: tensor.to(self.device) for name, tensor in pad_rows(rest, self.row_builder.pad_token_id).items()}
        real = batch["segments"] != PADDING
        mask = torch.cat([visible, real], dim=1)[:, None].repeat(1, real.shape[1], 1)
        mask[:, :, visible.shape[1] :].tril_()
        self.base.model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=mask[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        return cache, torch.cat([visible, real], dim=1)

    def _look(self, start: Row, features: tuple[torch.Tensor, ...]) -> States:
        """Return the keys and values of a prefix up to its last image, and keep up to LOOK_TOKENS of them."""
        key = self._views(start.exchange)
        found = self._looks.get(key)
        if found is None:
            cache, _ = self._run_prefixes([start], features)
            layers: list[Any] = cache.layers  # the layer type that transformers declares has no keys
            found = {index: (layer.keys, layer.values) for index, layer in enumerate(layers)}
            if len(start.input_ids) + sum(one[0][0].shape[-2] for one in self._looks.values()) <= LOOK_TOKENS:
                self._looks[key] = found
        return found

    def _views(self, exchange: Exchange) -> tuple[View, ...]:
        return tuple(views(exchange, self.root, self.corruption))

    def _decode(
        self,
        rows: Sequence[Row],
        owners: torch.Tensor,
        cache: DynamicCache,
        visible: torch.Tensor,
        starts: Sequence[int],
        limit: int,
    ) -> list[Generation]:
        """Decode every branch greedily, up to `limit` new tokens.

        `owners` (N,) is the row index of each branch; `cache`, `visible` (B, Lp) and `starts` come from `_prefill`.
        """
        tokens, real = self._pad_branches(rows)
        (count, length), lengths = tokens.shape, real.sum(dim=1)
        first = torch.tensor(starts, device=self.device)[owners]
        positions = (first[:, None] + real.cumsum(dim=1) - 1).clamp(min=0)
        cache.batch_select_indices(owners)
        visible = torch.cat([visible[owners], real], dim=1)
        causal = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        mask = visible[:, None, :].repeat(1, length, 1)
        mask[:, :, -length:] &= causal

        if self._adapt_from == "answer":
            own = len(self.row_builder.generation_prompt)  # every branch ends with the generation prompt
            with switched_off(self._layers):
                self._step(tokens[:, :-own], positions[:, :-own], mask[:, :-own, :-own], cache)
            tokens, positions, mask = tokens[:, -own:], positions[:, -own:], mask[:, -own:]
        logits = self._step(tokens, positions, mask, cache)
        scores = torch.log_softmax(logits, dim=-1)
        letters = [
            {letter: float(scores[index, token]) for letter, token in self._letters.items()} for index in range(count)
        ]
        generated: list[list[int]] = [[] for _ in range(count)]
        cut: set[int] = set()
        active = torch.arange(count, device=self.device)
        position = first + lengths
        for step in range(limit):
            token = logits.argmax(dim=-1)
            unfinished = ~torch.isin(token, self._ends)
            for index, value, continues in zip(active.tolist(), token.tolist(), unfinished.tolist(), strict=True):
                if continues:
                    generated[index].append(value)
            if not unfinished.any() or step + 1 == limit:
                cut = set(active[unfinished].tolist())
                break
            if not unfinished.all():
                kept = unfinished.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                active, token, position, visible = active[kept], token[kept], position[kept], visible[kept]
            visible = torch.cat([visible, visible.new_ones(len(active), 1)], dim=1)
            logits = self._step(token[:, None], position[:, None], visible[:, None, :], cache)
            position = position + 1
        decode = self.row_builder.tokenizer.decode
        return [
            Generation(decode(ids, skip_special_tokens=True).strip(), letters[index], index in cut)
            for index, ids in enumerate(generated)
        ]

    def _pad_branches(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens (N, Lb) of all branches, left-padded, and a mask (N, Lb) that is False for padding."""
        branches = [
            torch.from_numpy(row.input_ids[row.segments == number + 1])
            for row in rows
            for number in range(len(row.exchange.branches))
        ]
        count, length = len(branches), max(len(branch) for branch in branches)
        tokens = torch.full((count, length), self.row_builder.pad_token_id, device=self.device)
        real = torch.zeros(count, length, dtype=torch.bool, device=self.device)
        for index, branch in enumerate(branches):
            tokens[index, length - len(branch) :] = branch.to(self.device)
            real[index, length - len(branch) :] = True
        return tokens, real

    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """Return the logits (N, vocabulary) after the last of `tokens` (N, T); `mask` is (N, T, cached + T)."""
        hidden = self.base.model(
            input_ids=tokens,
            position_ids=positions.expand(3, *positions.shape),
            attention_mask=mask[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return float32_logits(self.base.lm_head, hidden[:, -1])
