"""Magnetic tiles (Huang, Qiu, Yuan: Surface defect saliency of magnetic tile, The Visual Computer 2020).

Layout: `MT_<Kind>/Imgs/<name>.jpg`, each with a pixel mask `<name>.png`. Files `exp<e>_num_<n>` are exposures of one
tile whose numbers are a few dozen apart. With all kinds sorted by `n`, a gap of more than 60 starts the next tile. Some
tiles were photographed again after a larger gap; REPEATED_RUNS lists them. The images of one tile form a group, because
a split by image would show tiles from the test split in training.
"""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.sources import Items, SourceConfig, reject_unused, subfolders
from echo_ft.errors import EchoError
from echo_ft.files import list_folder
from echo_ft.records import GOOD, Inspection, Rejection

CONDITIONS = {
    "MT_Blowhole": "blowhole",
    "MT_Break": "break",
    "MT_Crack": "crack",
    "MT_Fray": "fray",
    "MT_Free": GOOD,
    "MT_Uneven": "uneven",
}
MAX_GAP = 60
"""Largest difference between the numbers of two consecutive images of one tile."""

REPEATED_RUNS = (
    (461, 524), (1810, 1965), (3504, 3981), (4944, 5106), (5874, 13526), (7871, 8015), (8676, 9196, 10181, 10410,
    10642, 10714, 10790), (24793, 25007), (33365, 33487), (37056, 37243, 37556, 37636), (39412, 39559), (43817,
    43955), (53011, 65001), (61310, 61501), (75090, 75343), (77531, 77692), (85602, 85781, 85846, 85998, 86828,
    88149), (94899, 95059), (98080, 98305, 98402), (108719, 108889), (124592, 124690), (136254, 136351), (148923,
    149097), (154549, 154721), (155300, 155478), (165362, 165523), (187505, 187701), (193104, 193234), (240048,
    240188), (241889, 242089), (246296, 246442), (257103, 257273, 257334), (257630, 257938, 258043), (258511,
    258703), (262480, 262572), (271361, 271512), (283203, 283465), (293709, 293876), (339819, 339932), (348629,
    348888), (355636, 358102),
)  # fmt: skip
"""First numbers of the runs of images that show the same tile despite a larger gap, one tuple per tile.

`data_prep.audit` found these by comparing pixels, and each pair was checked by eye."""

FIRST_RUN = {f"tile-{number}": f"tile-{numbers[0]}" for numbers in REPEATED_RUNS for number in numbers}
"""Maps the group of each of these runs to the group of the first run of its tile."""


def read(config: SourceConfig) -> Items:
    """Yield the images of all six kinds, grouped by tile and without splits, since there is no official split."""
    root = config.root
    images: list[tuple[int, str, Path]] = []
    kinds = [folder for folder in subfolders(root, root) if folder.name in CONDITIONS]
    yield from reject_unused(
        root, root, kinds, f"the folders of this dataset are {', '.join(CONDITIONS)}", allow_text=True
    )
    for kind in kinds:
        folder = kind / "Imgs"
        if folder not in subfolders(root, kind):
            continue
        yield from reject_unused(root, kind, [folder], "images must be in Imgs", allow_text=True)
        found = [path for path in list_folder(folder) if path.suffix == ".jpg" and path.is_file()]
        used = {*found, *(path.with_suffix(".png") for path in found)}
        reason = "it is neither a .jpg image nor a .png mask with the same name"
        yield from reject_unused(root, folder, used, "images must be directly in Imgs", reason)
        for path in found:
            match = re.fullmatch(r"exp\d+_num_(\d+)", path.stem)
            if match:
                images.append((int(match.group(1)), kind.name, path))
            else:
                reason = "the name is not exp<exposure>_num_<number>, so its tile is unknown"
                yield Rejection(path.relative_to(root).as_posix(), reason)
    if not images:
        raise EchoError(
            f"there is no image MT_<Kind>/Imgs/exp<e>_num_<n>.jpg under {root}; "
            "set root to the folder that contains MT_Blowhole to MT_Uneven"
        )
    group, last = "", -MAX_GAP - 1
    for number, name, path in sorted(images):
        if number - last > MAX_GAP:
            group = f"tile-{number}"
        last = number
        image = path.relative_to(root).as_posix()
        mask: str | None = path.with_suffix(".png").relative_to(root).as_posix()
        if not path.with_suffix(".png").is_file():
            yield Rejection(str(mask), f"the mask of {image} is missing; the image is used without it", "mask")
            mask = None
        yield Inspection(
            id=image,
            image=image,
            dataset="magnetic_tile",
            product="magnetic_tile",
            condition=CONDITIONS[name],
            group=FIRST_RUN.get(group, group),
            mask=mask,
        )
