"""A tree of folders as MVTec-AD has it: `<product>/<split>/<condition>/<image>`.

Splits are `train`, `validation` (or `val`) and `test`; the condition of normal parts is `good`. The mask of a defect,
where there is one, is `<product>/ground_truth/<condition>/<stem>_mask.png` or `<stem>.png` (any image format will do),
or a folder `<stem>` of several masks, which count as one: what any of them marks.

Whatever else lies in the tree is rejected with the reason, a whole folder in one row. What goes with such a tree is
not: texts (`license.txt`, `readme.md`) beside the products and the splits, and files of the system.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from data_prep.faults import list_images
from data_prep.sources import Items, RowError, SourceConfig, entries, passed_over
from data_prep.sources._rows import named_condition
from echo_ft.data.splits import SPLITS
from echo_ft.errors import EchoError
from echo_ft.records import Inspection, Rejection

FOLDERS = {**{split: split for split in SPLITS}, "val": "validation"}
"""Name of a folder to the split that its photographs are of."""

MASKS = "ground_truth"


def read(config: SourceConfig) -> Items:
    """Photographs of every product folder under the root, with the tree's own splits."""
    yield from read_tree(config.root, config.root.resolve().name)


def read_tree(
    root: Path, dataset: str, conditions: Mapping[str, str] | None = None, companions: Collection[str] = ()
) -> Items:
    """Photographs of a published dataset with such a tree, under its own name.

    `conditions` renames folders of conditions; `companions` are names of files without photographs that belong into a
    product's folder. Raises EchoError where there is no product.
    """
    products = [path for path in entries(root) if path.is_dir() and _splits(path)]
    if not products:
        hint = ""
        if _splits(root):
            hint = f" (it looks like one product's own folder: set root to {root.resolve().parent})"
        raise EchoError(f"no folder <product>/train/<condition> or <product>/test/<condition> under {root}{hint}")
    names = ", ".join(FOLDERS)
    yield from passed_over(root, root, products, f"a product's folder holds one of {names}", texts=True)
    for product in products:
        used = [*_splits(product), product / MASKS, *(product / name for name in companions)]
        yield from passed_over(root, product, used, f"a split is one of {names}", texts=True)
        masks: set[Path] = set()
        for folder in _splits(product):
            places = [path for path in entries(folder) if path.is_dir()]
            yield from passed_over(root, folder, places, "")
            for place in places:
                try:
                    condition = (conditions or {}).get(place.name) or named_condition(place.name)
                except RowError as error:
                    yield Rejection(place.relative_to(root).as_posix(), f"the folder is passed over: {error}")
                    continue
                yield from _photographs(root, dataset, product, place, condition, masks)
        yield from _masks_of_nothing(root, product / MASKS, masks)


def _splits(product: Path) -> list[Path]:
    return [product / name for name in FOLDERS if (product / name).is_dir()]


def _photographs(root: Path, dataset: str, product: Path, folder: Path, condition: str, masks_used: set[Path]) -> Items:
    masks = product / MASKS / folder.name
    named = {path.stem: path for path in list_images(masks)}
    photographs = list(list_images(folder))
    yield from passed_over(root, folder, set(photographs), "photographs lie directly in their condition's folder")
    for path in photographs:
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
            yield from passed_over(root, several, set(files), f"masks of {image} lie directly in their folder")
        if not files and masks.is_dir():
            wanted = (masks / f"{path.stem}_mask.png").relative_to(root).as_posix()
            yield Rejection(wanted, f"the mask of {image} is missing; the photograph is used without one", "mask")
        names = tuple(file.relative_to(root).as_posix() for file in files)
        yield Inspection(
            id=image,
            image=image,
            dataset=dataset,
            product=product.name,
            condition=condition,
            group=image,
            split=FOLDERS[folder.parent.name],
            mask=names[0] if len(names) == 1 else None,
            masks=names if len(names) > 1 else (),
        )


def _masks_of_nothing(root: Path, masks: Path, used: Collection[Path]) -> Items:
    """Rejections for what lies under `ground_truth` and is the mask of no photograph."""
    if not masks.is_dir():
        return
    why = "no photograph has this name and condition"
    folders = {path.parent for path in used}
    yield from passed_over(root, masks, folders, why, why)
    for folder in sorted(folders):
        yield from passed_over(root, folder, used, why, why)
