"""Generate with a local model: encode images once, prefill prefixes once, and decode branches from their caches.

For B exchanges with N branches, the prefix of Lp tokens runs once per exchange. The branches, left-padded to Lb tokens,
continue from copies of its key-value cache. Decoding is greedy. The result equals that of generating each answer
separately (tests/inference/test_engine.py compares with `generate`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from echo_ft.errors import EchoError
from echo_ft.images.corruptions import Corruption
from echo_ft.images.decode import READER_THREADS
from echo_ft.images.views import View, views
from echo_ft.model.batches import float32_logits, image_inputs, join_caches, pad_rows
from echo_ft.model.loading import project_patches
from echo_ft.model.rows import PADDING, Row, RowBuilder
from echo_ft.records import LETTERS, Exchange, Generation
from echo_ft.terminal import LOGGER

PREFILL_TOKENS = 8_192
"""Maximum number of prefix tokens, including padding, that run through the model at once."""

RECENT_IMAGES = 128
"""Number of recently used images with cached features; more than a batch has."""

ImageFeature = tuple[torch.Tensor, tuple[int, int]]
"""The vision tower's features of an image, (tokens, hidden), and the image's (width, height) in pixels."""


class ImageFeatureCache:
    """Cache of image features, shared by engines with the same model and pixel budget.

    It keeps the first features that fit into `max_bytes` and evicts nothing. Every run visits the images in the same
    order, so an LRU cache that cannot hold them all would never hit.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._features: dict[tuple[str, View], ImageFeature] = {}

    def get(self, key: tuple[str, View]) -> ImageFeature | None:
        """Return the features of a view for a role, or None if they are not cached."""
        return self._features.get(key)

    def add(self, key: tuple[str, View], feature: ImageFeature) -> None:
        """Cache the features of a view for a role if they fit."""
        if self.used_bytes + feature[0].nbytes <= self.max_bytes:
            self.used_bytes += feature[0].nbytes
            self._features[key] = feature


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
        exchange that exceeds the limit runs in a batch of its own.
        """
        self.model = model.eval()
        self.row_builder = row_builder
        self.root = root
        self.max_new_tokens = max_new_tokens
        self.answer_tokens = answer_tokens or max_new_tokens
        self.corruption = corruption
        self.max_batch_tokens = max_batch_tokens
        self.adapted = hasattr(model, "peft_config")
        self.base = model.get_base_model() if self.adapted else model
        project_patches(self.base)
        self.device = self.base.device
        self._shared = features
        self._recent: OrderedDict[tuple[str, View], ImageFeature] = OrderedDict()
        ends = self.base.generation_config.eos_token_id
        self._ends = torch.tensor(ends if isinstance(ends, list) else [ends], device=self.device)
        self._letters = {letter: row_builder.tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS}

    @torch.inference_mode()
    def generate(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        """Generate the outputs of `role` for every branch of every exchange, in order.

        Raises EchoError if an image is missing or broken, or if a row cannot be built.
        """
        if not exchanges:
            return []
        if self.adapted:
            self.model.set_adapter(role)
        shown = [view for exchange in exchanges for view in views(exchange, self.root, self.corruption)]
        encoded = iter(self._encode_images(role, shown))
        images = [[next(encoded) for _ in exchange.images] for exchange in exchanges]
        rows = [
            self.row_builder.row(exchange, [size for _, size in features])
            for exchange, features in zip(exchanges, images, strict=True)
        ]
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
            cache, visible, starts = self._prefill_in_groups(rows, features)
            owners = torch.tensor([index for index, row in enumerate(rows) for _ in row.exchange.branches])
            return self._decode(rows, owners.to(self.device), cache, visible, starts, limit)
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise EchoError(
                    "a single case does not fit into memory; lower max_pixels, references or max_new_tokens, or use "
                    "a GPU with more memory"
                ) from error
        # Outside the handler, because the traceback would keep the tensors of the failed attempt alive.
        torch.cuda.empty_cache()
        lengths = [np.bincount(row.segments).tolist() for row in rows]
        branches = [length for _, *own in lengths for length in own]
        tokens = len(branches) * (max(prefix for prefix, *_ in lengths) + max(branches) + limit)
        self.max_batch_tokens = tokens // 2
        LOGGER.warning("out of memory: max_batch_tokens is now %d", self.max_batch_tokens)
        middle = len(rows) // 2
        first = self._generate_batch(rows[:middle], features[:middle], limit)
        return first + self._generate_batch(rows[middle:], features[middle:], limit)

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

    def _encode_images(self, role: str, images: Sequence[View]) -> list[ImageFeature]:
        """Return the features of each image, from the caches or the vision tower."""
        # Roles share features unless an adapter changes the vision tower.
        owner = role if self.adapted and self._tower_is_adapted(role) else ""
        found = {view: feature for view in images if (feature := self._find((owner, view))) is not None}
        missing = [view for view in dict.fromkeys(images) if view not in found]
        with ThreadPoolExecutor(READER_THREADS) as pool:
            # One image at a time: in a batch, the lowest bits would depend on which images are not cached yet.
            for view, (inputs, size) in zip(missing, pool.map(self._load, missing), strict=True):
                (encoded,) = self.base.model.get_image_features(
                    inputs["pixel_values"].to(self.device), inputs["image_grid_thw"].to(self.device), return_dict=True
                ).pooler_output
                found[view] = encoded, size
                if self._shared is not None:
                    self._shared.add((owner, view), found[view])
        for view, feature in found.items():
            self._recent[owner, view] = feature
            self._recent.move_to_end((owner, view))
        while len(self._recent) > RECENT_IMAGES:
            self._recent.popitem(last=False)
        return [found[view] for view in images]

    def _find(self, key: tuple[str, View]) -> ImageFeature | None:
        shared = None if self._shared is None else self._shared.get(key)
        return shared or self._recent.get(key)

    def _load(self, view: View) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
        """Load the model inputs of an image and its (width, height)."""
        image = view.load()
        return image_inputs(self.row_builder, [image]), image.size

    def _tower_is_adapted(self, role: str) -> bool:
        return any(
            ".visual." in name and role in getattr(module, "lora_A", ()) for name, module in self.model.named_modules()
        )

    def _prefill_in_groups(
        self, rows: Sequence[Row], features: Sequence[Sequence[torch.Tensor]]
    ) -> tuple[DynamicCache, torch.Tensor, list[int]]:
        """As `_prefill`, in groups of at most PREFILL_TOKENS, because activations grow with the tokens of a group."""
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
        prefixes = [_select_tokens(row, row.segments == 0) for row in rows]
        batch = {
            name: tensor.to(self.device) for name, tensor in pad_rows(prefixes, self.row_builder.pad_token_id).items()
        }
        cache = DynamicCache(config=self.base.config.get_text_config())
        pooled: Any = features  # transformers declares a single tensor
        self.base.model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=None,  # causal attention, which has fast kernels, is enough: padding is on the right
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=pooled)},
            past_key_values=cache,
            use_cache=True,
        )
        return cache, batch["segments"] != PADDING, [int(prefix.positions.max()) + 1 for prefix in prefixes]

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


def _select_tokens(row: Row, tokens: Any) -> Row:
    return Row(
        row.exchange,
        row.input_ids[tokens],
        row.labels[tokens],
        row.segments[tokens],
        row.positions[:, tokens],
        row.grids,
    )
