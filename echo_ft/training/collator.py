"""The data collator: packs the exchanges of a step's cases into one row and reads their images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from echo_ft.data.dataset import is_changed
from echo_ft.errors import EchoError
from echo_ft.experts.option_order import shuffle_options
from echo_ft.images.corruptions import Corruption
from echo_ft.images.masks import mask_files
from echo_ft.images.views import View, views
from echo_ft.inputs import from_dict
from echo_ft.model.batches import Look, blank_image_inputs, image_inputs, pack_looks, pack_rows
from echo_ft.model.rows import Row, RowBuilder
from echo_ft.model.vision import TowerFeatureStore
from echo_ft.records import Exchange, Inspection
from echo_ft.training.costs.flops import WorkCounts, image_work, repeated_work, text_work
from echo_ft.training.mask_loss import mask_inputs


class Collator:
    """Collates cases of sft/<role>/*.jsonl into a batch. It reads the images, in the data loader's workers."""

    def __init__(
        self,
        row_builder: RowBuilder,
        root: Path,
        store: TowerFeatureStore | None = None,
        always_encode: bool = False,
        pixel_dtype: torch.dtype | None = None,
        marks: Mapping[str, Inspection] | None = None,
        digests: Mapping[str, str] | None = None,
        adapt_from: str = "prefix",
        by_role: bool = False,
    ) -> None:
        """`root` is the image folder, and `store` holds tower features of earlier epochs, roles and runs.

        With `always_encode`, a batch without a new image gets a blank one that no placeholder refers to. If processes
        share the tower's weights or gradients and one process skips the tower, the others wait forever.

        `pixel_dtype` is the dtype of the model's weights, to which the model converts its pixels anyway. 16 bits halve
        their size in the workers and on the GPU. `marks` has, by case, the inspections from whose masks the mask loss
        learns; without it, there is no mask loss. `digests` has the SHA-256 of each image and mask; a file that differs
        raises EchoError when it is first read. `adapt_from`, one of rows.ADAPT_FROM, says where the adapter begins to
        act. With `by_role`, every role has its own adapter.
        """
        self.row_builder = row_builder
        self.root = root
        self.store = store
        self.always_encode = always_encode
        self.pixel_dtype = pixel_dtype
        self.marks = marks
        self.digests = digests
        self._verified: set[str] = set()
        self.adapt_from = adapt_from
        self.by_role = by_role
        # Shared memory, because workers may outlive an epoch (persistent_workers).
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, also for the data loader's workers; every epoch has its own order of the options."""
        self._epoch.fill_(epoch)

    def __call__(self, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        exchanges: list[Exchange] = []
        corruptions: list[Corruption | None] = []
        for case in cases:
            new = [from_dict(Exchange, exchange) for exchange in case["exchanges"]]
            if case.get("options_seed") is not None:
                new = [self._shuffled(exchange, case["options_seed"]) for exchange in new]
            exchanges += new
            values = case.get("corruption")
            corruption = None if values is None else from_dict(Corruption, values)
            corruptions += [corruption] * len(case["exchanges"])
        batch = self.batch([self.row_builder.load_row(exchange, self.root) for exchange in exchanges], corruptions)
        batch["done"] = [len(cases), sum(len(exchange.branches) for exchange in exchanges)]
        return batch

    def _shuffled(self, exchange: Exchange, seed: int) -> Exchange:
        """Return an exchange with the options of its questions in the order of this epoch."""
        drawn = f"{seed}/{self._epoch.item()}"
        return replace(exchange, branches=tuple(shuffle_options(branch, drawn) for branch in exchange.branches))

    def batch(self, rows: Sequence[Row], corruptions: Sequence[Corruption | None] = ()) -> dict[str, Any]:
        """Pack `rows` into one row, with the pixels of each distinct image that `store` does not hold.

        `corruptions` has one entry per row, for its query; by default no query is corrupted. In addition to the keys of
        `batches.pack_rows`, or of `batches.pack_looks` unless the adapter acts everywhere, the batch has pixel_values
        (P, C), image_grid_thw (images, 3), and `image_order`, `image_views` and `image_features` as in
        vision.BatchImages.
        """
        pairs = zip(rows, corruptions or [None] * len(rows), strict=True)
        seen = [tuple(views(row.exchange, self.root, corruption)) for row, corruption in pairs]
        if self.adapt_from == "prefix":
            packed, work = pack_rows(rows), text_work(rows)
        else:
            packed, work, seen = self._pack_looks(rows, seen)
        ordered = [view for own in seen for view in own]
        stored = {view: self.store.load(view) if self.store else None for view in dict.fromkeys(ordered)}
        new: list[View | None] = [view for view, features in stored.items() if features is None]
        known = {view: features for view, features in stored.items() if features is not None}
        self._require_unchanged(view.image for view in new if view is not None)
        image = image_inputs(self.row_builder, [view.load() for view in new if view is not None])
        if self.always_encode and not new:
            new, image = [None], blank_image_inputs(self.row_builder)
        number = {view: index for index, view in enumerate((*new, *known))}
        order = [number[view] for view in ordered]
        return {
            **packed,
            **image,
            "pixel_values": image["pixel_values"].to(self.pixel_dtype),
            "work_counts": astuple(work + image_work(image["image_grid_thw"].tolist())),
            "image_order": order,
            "image_views": new,
            "image_features": list(known.values()),
            **self._mask_inputs(rows, order, image["image_grid_thw"]),
        }

    def _pack_looks(
        self, rows: Sequence[Row], seen: Sequence[tuple[View, ...]]
    ) -> tuple[dict[str, Any], WorkCounts, list[tuple[View, ...]]]:
        """Pack `rows` by the images that each has `seen`; returns the batch, its work and the images of each look."""
        groups: dict[tuple[View, ...], list[Row]] = {}
        for row, own in zip(rows, seen, strict=True):
            groups.setdefault(own, []).append(row)
        looks, work = [], WorkCounts()
        for group in groups.values():
            adapted = [self.row_builder.adapted_tokens(row, self.adapt_from) for row in group]
            looks.append(Look(group, adapted, self.row_builder.look_length(group[0])))
            work += text_work(group, adapted) + repeated_work(looks[-1].shared, len(group) - 1)
        return pack_looks(looks, self.by_role), work, list(groups)

    def _mask_inputs(self, rows: Sequence[Row], order: Sequence[int], grids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `mask_loss.mask_inputs` of a batch whose encoded images have the `grids` (images, 3)."""
        if self.marks is None:
            return {}
        marked = [mark for row in rows if (mark := self.marks.get(row.exchange.case))]
        self._require_unchanged(name for mark in marked for name in mask_files(mark))
        builder = self.row_builder
        ends = (grids.prod(dim=1) // builder.merge**2).cumsum(0).tolist()
        starts = [0, *ends, *([0] * len(order))]  # stored features do not pass through the merger
        last = accumulate(len(row.exchange.images) for row in rows)
        queries = [starts[order[end - 1]] for end in last]
        return mask_inputs(rows, queries, self.marks, self.root, builder.image_token_id, builder.merge)

    def _require_unchanged(self, names: Iterable[str]) -> None:
        """Raise EchoError for a file that differs from its digest. Each file is checked once per process."""
        if self.digests is None:
            return
        for name in names:
            if name not in self._verified and is_changed(self.root, name, self.digests):
                raise EchoError(
                    f"{self.root / name} has changed since the dataset was built; restore it or rebuild the dataset"
                )
            self._verified.add(name)
