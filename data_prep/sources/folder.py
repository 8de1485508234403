"""Read the folder layout of MVTec AD: `<product>/<split>/<condition>/<image>`.

Splits are `train`, `validation` (or `val`) and `test`. The condition of normal parts is `good`. The optional mask of a
defect is `<product>/ground_truth/<condition>/<stem>_mask.png` or `<stem>.png`, in any image format. A folder
`<stem>` of several masks is also accepted and counts as one mask: their union.

Everything else in the layout is rejected with a reason, and a whole folder with one. Text files next to the products
and splits (`license.txt`, `readme.md`) and system files are ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from data_prep.faults import list_images
from data_prep.sources import Items, RowError, SourceConfig, list_folder, reject_unused
from data_prep.sources._rows import named_condition
from echo_ft.data.splits import SPLITS
from echo_ft.errors import EchoError
from echo_ft.records import Inspection, Rejection

SPLIT_FOLDERS = {**{split: split for split in SPLITS}, "val": "validation"}
"""Folder name to split."""

MASK_FOLDER = "ground_truth"


def read(config: SourceConfig) -> Items:
    """Yield the images of every product folder under the root, with the splits of the folder layout."""
    yield from read_folder_layout(config.root, config.root.resolve().name, good=config.good)


def read_folder_layout(
    root: Path,
    dataset: str,
    conditions: Mapping[str, str] | None = None,
    companions: Collection[str] = (),
    good: tuple[str, ...] = (),
) -> Items:
    """Yield the images of a dataset with this folder layout, under the name `dataset`.

    `conditions` maps folder names to conditions. `companions` are names of other files that belong in a product folder.
    `good` are names of condition folders, besides `good`, for parts without a defect. Raises EchoError if there is no
    product.
    """
    products = [path for path in list_folder(root) if path.is_dir() and _splits(path)]
    if not products:
        hint = "check root"
        if _splits(root):
            hint = f"root looks like the folder of one product: set it to {root.resolve().parent}"
        raise EchoError(
            f"there is no folder <product>/train/<condition> or <product>/test/<condition> under {root}; {hint}"
        )
    names = ", ".join(SPLIT_FOLDERS)
    yield from reject_unused(root, root, products, f"a product folder contains one of {names}", allow_text=True)
    for product in products:
        used = [*_splits(product), product / MASK_FOLDER, *(product / name for name in companions)]
        yield from reject_unused(root, product, used, f"a split folder is one of {names}", allow_text=True)
        masks: set[Path] = set()
        for folder in _splits(product):
            condition_folders = [path for path in list_folder(folder) if path.is_dir()]
            yield from reject_unused(root, folder, condition_folders, "")
            for condition_folder in condition_folders:
                try:
                    name = condition_folder.name
                    condition = (conditions or {}).get(name) or named_condition(name, good)
                except RowError as error:
                    yield Rejection(condition_folder.relative_to(root).as_posix(), f"folder ignored: {error}")
                    continue
                yield from _images(root, dataset, product, condition_folder, condition, masks)
        yield from _unused_masks(root, product / MASK_FOLDER, masks)


def _splits(product: Path) -> list[Path]:
    return [product / name for name in SPLIT_FOLDERS if (product / name).is_dir()]


def _images(root: Path, dataset: str, product: Path, folder: Path, condition: str, masks_used: set[Path]) -> Items:
    masks = product / MASK_FOLDER / folder.name
    named = {path.stem: path for path in list_images(masks)}
    images = list(list_images(folder))
    yield from reject_unused(root, folder, set(images), "images must be directly in the folder of their condition")
    for path in images:
        image = path.relative_to(root).as_posix()
        found = named.get(f"{path.stem}_mask") or named.get(path.stem)
        several = masks / path.stem
        files: list[Path] = []
        if found is not None:
            masks_used.add(found)
            files = [found]
        elif several.is_dir():
            masks_used.add(several)
            files = list(list_images(several))
            yield from reject_unused(
                root, several, set(files), f"the masks of {image} must be directly in their folder"
            )
        if not files and masks.is_dir():
            wanted = (masks / f"{path.stem}_mask.png").relative_to(root).as_posix()
            yield Rejection(wanted, f"the mask of {image} is missing; the image is used without it", "mask")
        names = tuple(file.relative_to(root).as_posix() for file in files)
        yield Inspection(
            id=image,
            image=image,
            dataset=dataset,
            product=product.name,
            condition=condition,
            group=image,
            split=SPLIT_FOLDERS[folder.parent.name],
            mask=names[0] if len(names) == 1 else None,
            masks=names if len(names) > 1 else (),
        )


def _unused_masks(root: Path, masks: Path, used: Collection[Path]) -> Items:
    """Yield rejections for files under `ground_truth` that are not the mask of an image."""
    if not masks.is_dir():
        return
    reason = "no image has this name and condition"
    folders = {path.parent for path in used}
    yield from reject_unused(root, masks, folders, reason, reason)
    for folder in sorted(folders):
        yield from reject_unused(root, folder, used, reason, reason)
