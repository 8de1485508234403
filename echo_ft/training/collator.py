from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from echo_ft.files import from_dict
from echo_ft.images.corruptions import Corruption
from echo_ft.images.views import View, views
from echo_ft.model.batches import blank_image_inputs, image_inputs, pack_rows
from echo_ft.model.rows import Row, RowBuilder
from echo_ft.model.vision import TowerFeatureStore
from echo_ft.records import Exchange
from echo_ft.training.flops import image_load, text_load


class Collator:
    """Makes a batch from cases of sft/<role>/*.jsonl; images are read here, in the loader's workers."""

    def __init__(
        self, row_builder: RowBuilder, root: Path, store: TowerFeatureStore | None = None, always_look: bool = False
    ) -> None:
        """With `always_look`, a batch without a new image brings a blank one that belongs to no place.

        Where the tower's weights or gradients are shared among processes, one that does not enter it leaves the others
        waiting for ever.
        """
        self.row_builder = row_builder
        self.root = root
        self.store = store
        self.always_look = always_look

    def __call__(self, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        exchanges, corruptions = [], []
        for case in cases:
            exchanges += [from_dict(Exchange, example) for example in case["exchanges"]]
            how = case.get("corruption")
            corruptions += [None if how is None else from_dict(Corruption, how)] * len(case["exchanges"])
        batch = self.batch([self.row_builder.load_row(exchange, self.root) for exchange in exchanges], corruptions)
        batch["done"] = [len(cases), sum(len(exchange.branches) for exchange in exchanges)]
        return batch

    def batch(self, rows: Sequence[Row], corruptions: Sequence[Corruption | None] = ()) -> dict[str, Any]:
        """Rows packed into one, with the pixels of each different image whose features are not kept.

        `corruptions` are those of the rows' queries, none by default. Beside `batches.pack_rows`: pixel_values (P, C),
        image_grid_thw (images, 3), and `image_order`, `image_views` and `image_features` as in vision.BatchImages.
        """
        pairs = zip(rows, corruptions or [None] * len(rows), strict=True)
        places = [view for row, corruption in pairs for view in views(row.exchange, self.root, corruption)]
        kept = {view: self.store.load(view) if self.store else None for view in dict.fromkeys(places)}
        new: list[View | None] = [view for view, features in kept.items() if features is None]
        known = {view: features for view, features in kept.items() if features is not None}
        image = image_inputs(self.row_builder, [view.load() for view in new if view is not None])
        if self.always_look and not new:
            new, image = [None], blank_image_inputs(self.row_builder)
        number = {view: index for index, view in enumerate((*new, *known))}
        return {
            **pack_rows(rows),
            **image,
            "load": astuple(text_load(rows) + image_load(image["image_grid_thw"].tolist())),
            "image_order": [number[view] for view in places],
            "image_views": new,
            "image_features": list(known.values()),
        }
