"""Asking a model: images encoded once, the prefix computed once, every branch continued from its cache.

For N branches of B exchanges the prefix of Lp tokens runs once an exchange, the branches (padded on the left to Lb
tokens) continue from copies of its key-value cache, and decoding is greedy. The result is that of asking every
question alone (tests/inference/test_engine.py compares with `generate`).
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

from echo_ft.images.corruptions import Corruption
from echo_ft.images.decode import READER_THREADS
from echo_ft.images.views import View, views
from echo_ft.model.batches import image_inputs, pad_rows
from echo_ft.model.rows import PADDING, Row, RowBuilder
from echo_ft.records import LETTERS, Exchange, Generation

RECENT_IMAGES = 256
"""Images whose features an engine has at hand, those used last: more than a batch has."""


ImageFeature = tuple[torch.Tensor, tuple[int, int]]
"""What the vision tower makes of an image, (tokens, hidden), and its (width, height)."""


class ImageFeatureCache:
    """Looks at images that engines on one model and pixel budget go on with: the first ones that fit into `most` bytes.

    None is dropped for another one: runs go through the same images in the same order, and of a store that is too small
    for all and drops what was used longest ago each run would find nothing.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.size = 0
        self._looks: dict[tuple[str, View], ImageFeature] = {}

    def get(self, image: tuple[str, View]) -> ImageFeature | None:
        """The look at an image as a role sees it, if it is kept."""
        return self._looks.get(image)

    def add(self, image: tuple[str, View], look: ImageFeature) -> None:
        """Keep it, if it fits."""
        if self.size + look[0].nbytes <= self.most:
            self.size += look[0].nbytes
            self._looks[image] = look


class Engine:
    """One base model, with or without adapters named after the roles, and a bounded store of image features."""

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
        """`answer_tokens` is the most that the decision maker says; None: as many as the others.

        One costs no step of decoding: it comes from the same logits as the letters' probabilities. `corruption` is how
        every query is degraded. `features` are shared with other engines on the same model and pixel budget.
        `max_batch_tokens` is the most that the cache may hold when all is said; exchanges that would need more are
        taken apart, one that needs more by itself runs alone.
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
        self.device = self.base.device
        self._shared = features
        self._recent: OrderedDict[tuple[str, View], ImageFeature] = OrderedDict()
        ends = self.base.generation_config.eos_token_id
        self._ends = torch.tensor(ends if isinstance(ends, list) else [ends], device=self.device)
        self._letters = {letter: row_builder.tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS}

    @torch.inference_mode()
    def generate(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        """What `role` says to every branch of every exchange, in order.

        Raises EchoError where an image is missing or broken.
        """
        if not exchanges:
            return []
        if self.adapted:
            self.model.set_adapter(role)
        shown = [view for exchange in exchanges for view in views(exchange, self.root, self.corruption)]
        looks = iter(zip(*self._encode_images(role, shown), strict=True))
        own = [[next(looks) for _ in exchange.images] for exchange in exchanges]
        rows = [self.row_builder.row(one, [size for _, size in seen]) for one, seen in zip(exchanges, own, strict=True)]
        limit = self.answer_tokens if role == "decision_maker" else self.max_new_tokens
        said: list[Generation] = []
        for start, end in pairwise(self._batch_boundaries(rows, limit)):
            part = rows[start:end]
            cache, visible, starts = self._prefill(
                part, tuple(feature for seen in own[start:end] for feature, _ in seen)
            )
            owners = torch.tensor([index for index, row in enumerate(part) for _ in row.exchange.branches])
            said += self._decode(part, owners.to(self.device), cache, visible, starts, limit)
        generations = iter(said)
        return [[next(generations) for _ in exchange.branches] for exchange in exchanges]

    def _batch_boundaries(self, rows: Sequence[Row], limit: int) -> list[int]:
        """Where rows are taken apart for the budget of tokens, and both ends; `limit` is the most that is said to each.

        Every branch has a copy of its prefix in the cache, and all are padded to the longest.
        """
        cuts, prefix, branch, count = [0], 0, 0, 0
        for index, row in enumerate(rows):
            own_prefix, *own = np.bincount(row.segments).tolist()
            prefix, branch, count = max(prefix, own_prefix), max(branch, *own), count + len(own)
            fits = self.max_batch_tokens is None or count * (prefix + branch + limit) <= self.max_batch_tokens
            if not fits and index > cuts[-1]:
                cuts.append(index)
                prefix, branch, count = own_prefix, max(own), len(own)
        return [*cuts, len(rows)]

    def _encode_images(self, role: str, images: Sequence[View]) -> tuple[Any, list[tuple[int, int]]]:
        """Features (tokens, hidden) and (width, height) of each image, encoded only where not kept from before."""
        # An adapter on the vision tower makes the features the role's own.
        owner = role if self.adapted and self._tower_is_adapted(role) else ""
        found = {view: look for view in images if (look := self._find((owner, view))) is not None}
        missing = [view for view in dict.fromkeys(images) if view not in found]
        with ThreadPoolExecutor(READER_THREADS) as pool:
            # One by one: the last bits of what stands beside others depend on them, and so on what was kept before.
            for view, (inputs, size) in zip(missing, pool.map(self._load, missing), strict=True):
                (feature,) = self.base.model.get_image_features(
                    inputs["pixel_values"].to(self.device), inputs["image_grid_thw"].to(self.device), return_dict=True
                ).pooler_output
                found[view] = feature, size
                if self._shared is not None:
                    self._shared.add((owner, view), found[view])
        for view, look in found.items():
            self._recent[owner, view] = look
            self._recent.move_to_end((owner, view))
        while len(self._recent) > RECENT_IMAGES:
            self._recent.popitem(last=False)
        looks = [found[view] for view in images]
        return tuple(feature for feature, _ in looks), [size for _, size in looks]

    def _find(self, image: tuple[str, View]) -> ImageFeature | None:
        shared = None if self._shared is None else self._shared.get(image)
        return shared or self._recent.get(image)

    def _load(self, view: View) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
        """An image's pixels as the model takes them, and its (width, height)."""
        image = view.load()
        return image_inputs(self.row_builder, [image]), image.size

    def _tower_is_adapted(self, role: str) -> bool:
        return any(
            ".visual." in name and role in getattr(module, "lora_A", ()) for name, module in self.model.named_modules()
        )

    def _prefill(self, rows: Sequence[Row], features: Any) -> tuple[DynamicCache, torch.Tensor, list[int]]:
        """The prefixes' cache, which of its tokens are no padding (B, Lp), and where each row's branches start."""
        prefixes = [_select_tokens(row, row.segments == 0) for row in rows]
        batch = {
            name: tensor.to(self.device) for name, tensor in pad_rows(prefixes, self.row_builder.pad_token_id).items()
        }
        cache = DynamicCache(config=self.base.config.get_text_config())
        self.base.model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=None,  # plain causal attention, for which fast kernels exist: the padding comes last
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
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
        """Greedy continuation of every branch by at most `limit` tokens; `owners` (N,) is the row of each."""
        branches = [
            torch.from_numpy(row.input_ids[row.segments == number + 1])
            for row in rows
            for number in range(len(row.exchange.branches))
        ]
        count, length = len(branches), max(len(branch) for branch in branches)
        tokens = torch.full((count, length), self.row_builder.pad_token_id, device=self.device)
        shown = torch.zeros(count, length, dtype=torch.bool, device=self.device)
        for index, branch in enumerate(branches):
            tokens[index, length - len(branch) :] = branch.to(self.device)
            shown[index, length - len(branch) :] = True
        lengths = shown.sum(dim=1)
        first = torch.tensor(starts, device=self.device)[owners]
        positions = (first[:, None] + shown.cumsum(dim=1) - 1).clamp(min=0)
        cache.batch_select_indices(owners)
        visible = torch.cat([visible[owners], shown], dim=1)
        causal = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        mask = visible[:, None, :].repeat(1, length, 1)
        mask[:, :, -length:] &= causal

        logits = self._step(tokens, positions, mask, cache)
        scores = torch.log_softmax(logits.float(), dim=-1)
        letters = [
            {letter: float(scores[index, token]) for letter, token in self._letters.items()} for index in range(count)
        ]
        said: list[list[int]] = [[] for _ in range(count)]
        alive = torch.arange(count, device=self.device)
        position = first + lengths
        for spent in range(limit):
            token = logits.argmax(dim=-1)
            going = ~torch.isin(token, self._ends)
            for index, value, goes in zip(alive.tolist(), token.tolist(), going.tolist(), strict=True):
                if goes:
                    said[index].append(value)
            if not going.any() or spent + 1 == limit:
                break
            if not going.all():
                kept = going.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                alive, token, position, visible = alive[kept], token[kept], position[kept], visible[kept]
            visible = torch.cat([visible, visible.new_ones(len(alive), 1)], dim=1)
            logits = self._step(token[:, None], position[:, None], visible[:, None, :], cache)
            position = position + 1
        decode = self.row_builder.tokenizer.decode
        return [
            Generation(decode(ids, skip_special_tokens=True).strip(), letters[index]) for index, ids in enumerate(said)
        ]

    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """Logits (N, vocabulary) after the last of `tokens` (N, T); `mask` is (N, T, cached + T)."""
        hidden = self.base.model(
            input_ids=tokens,
            position_ids=positions.expand(3, *positions.shape),
            attention_mask=mask[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self.base.lm_head(hidden[:, -1])


def _select_tokens(row: Row, tokens: Any) -> Row:
    return Row(
        row.exchange,
        row.input_ids[tokens],
        row.labels[tokens],
        row.segments[tokens],
        row.positions[:, tokens],
        row.grids,
    )
