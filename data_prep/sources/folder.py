"""A tree of folders as MVTec-AD has it: `<product>/<split>/<condition>/<image>`.

Splits are `train`, `validation` and `test`; the condition of normal parts is `good`. The mask of a defect, where
there is one, is `<product>/ground_truth/<condition>/<stem>_mask.png` or `<stem>.png`.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.images import list_images
from data_prep.sources import Items, SourceConfig
from echo_ft.records import GOOD, EchoError, Inspection, Rejection

SPLITS = ("train", "validation", "test")


def read(config: SourceConfig) -> Items:
    """Photographs of every product folder under the root, with the tree's own splits."""
    root = config.root
    products = [
        folder
        for folder in sorted(root.iterdir())
        if folder.is_dir() and any((folder / split).is_dir() for split in SPLITS)
    ]
    if not products:
        hint = ""
        if any((root / split).is_dir() for split in SPLITS):
            hint = f" (it looks like one product's own folder: set root to {root.resolve().parent})"
        raise EchoError(f"no folder <product>/train/{GOOD} or <product>/test/<condition> under {root}{hint}")
    for product in products:
        for split in SPLITS:
            if (product / split).is_dir():
                for folder in sorted(path for path in (product / split).iterdir() if path.is_dir()):
                    yield from _photographs(root, product, split, folder)


def _photographs(root: Path, product: Path, split: str, folder: Path) -> Items:
    masks = product / "ground_truth" / folder.name
    for path in list_images(folder):
        image = path.relative_to(root).as_posix()
        mask = next((p for p in (masks / f"{path.stem}_mask.png", masks / f"{path.stem}.png") if p.is_file()), None)
        if mask is None and masks.is_dir():
            wanted = (masks / f"{path.stem}_mask.png").relative_to(root).as_posix()
            yield Rejection(wanted, f"the mask of {image} is missing; the photograph is used without one")
        yield Inspection(
            id=image,
            image=image,
            dataset=root.resolve().name,
            product=product.name,
            condition=folder.name,
            group=image,
            split=split,
            mask=mask.relative_to(root).as_posix() if mask else None,
        )
