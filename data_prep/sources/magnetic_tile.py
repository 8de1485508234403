"""Magnetic tiles (Huang, Qiu, Yuan: Surface defect saliency of magnetic tile, The Visual Computer 2020).

Layout: `MT_<Kind>/Imgs/<name>.jpg` with a pixel mask `<name>.png` of the same stem. The names `exp<e>_num_<n>` are
exposures of one tile with numbers a few dozen apart: in the order of `n` over all kinds, a gap of more than 60
starts the next tile. Those exposures are one group: a split by photograph would show the test's tiles in training.
"""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.images import list_images
from data_prep.sources import Items, SourceConfig
from echo_ft.records import GOOD, EchoError, Inspection, Rejection

CONDITIONS = {
    "MT_Blowhole": "blowhole",
    "MT_Break": "break",
    "MT_Crack": "crack",
    "MT_Fray": "fray",
    "MT_Free": GOOD,
    "MT_Uneven": "uneven",
}
GAP = 60


def read(config: SourceConfig) -> Items:
    """Photographs of all six kinds, without splits (there is no official one), grouped by tile."""
    root = config.root
    photographs: list[tuple[int, str, Path]] = []
    for kind in CONDITIONS:
        for path in list_images(root / kind / "Imgs"):
            if path.suffix == ".png":
                continue  # a mask
            match = re.fullmatch(r"exp\d+_num_(\d+)", path.stem)
            if match:
                photographs.append((int(match.group(1)), kind, path))
            else:
                reason = "the name is not exp<exposure>_num_<number>, so its tile is unknown"
                yield Rejection(path.relative_to(root).as_posix(), reason)
    if not photographs:
        raise EchoError(
            f"no photograph MT_<Kind>/Imgs/exp<e>_num_<n>.jpg under {root}; "
            "set root to the folder that holds MT_Blowhole to MT_Uneven"
        )
    group, last = "", -GAP - 1
    for number, kind, path in sorted(photographs):
        if number - last > GAP:
            group = f"tile-{number}"
        last = number
        image = path.relative_to(root).as_posix()
        mask = path.with_suffix(".png").relative_to(root).as_posix()
        yield Inspection(
            id=image,
            image=image,
            dataset="magnetic_tile",
            product="magnetic_tile",
            condition=CONDITIONS[kind],
            group=group,
            mask=mask,
        )
