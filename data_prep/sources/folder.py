"""A tree of folders as MVTec-AD has it: `<product>/<split>/<condition>/<image>`.

Splits are `train`, `validation` (or `val`) and `test`; the condition of normal parts is `good`. The mask of a defect,
where there is one, is `<product>/ground_truth/<condition>/<stem>_mask.png` or `<stem>.png`.

Whatever else lies in the tree is rejected with the reason, a whole folder in one row. What goes with such a tree is
not: `ground_truth`, texts (`license.txt`, `readme.md`) beside the products and the splits, and files of the system.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from data_prep.images import SUFFIXES, list_images
from data_prep.sources import Items, SourceConfig
from echo_ft.records import GOOD, EchoError, Inspection, Rejection
from echo_ft.splits import SPLITS

FOLDERS = {**{split: split for split in SPLITS}, "val": "validation"}
"""Name of a folder to the split that its photographs are of."""

MASKS = "ground_truth"
TEXTS = frozenset({".txt", ".md", ".pdf", "license", "licence", "readme"})
SYSTEM = frozenset({"Thumbs.db", "desktop.ini", "__MACOSX"})


def read(config: SourceConfig) -> Items:
    """Photographs of every product folder under the root, with the tree's own splits."""
    root = config.root
    products = [path for path in _entries(root) if path.is_dir() and _splits(path)]
    if not products:
        hint = ""
        if _splits(root):
            hint = f" (it looks like one product's own folder: set root to {root.resolve().parent})"
        raise EchoError(f"no folder <product>/train/{GOOD} or <product>/test/<condition> under {root}{hint}")
    names = ", ".join(FOLDERS)
    yield from _passed_over(root, root, products, f"a product's folder holds one of {names}", texts=True)
    for product in products:
        splits = _splits(product)
        yield from _passed_over(root, product, [*splits, product / MASKS], f"a split is one of {names}", texts=True)
        for folder in splits:
            conditions = [path for path in _entries(folder) if path.is_dir()]
            yield from _passed_over(root, folder, conditions, "")
            for condition in conditions:
                yield from _photographs(root, product, FOLDERS[folder.name], condition)


def _splits(product: Path) -> list[Path]:
    return [product / name for name in FOLDERS if (product / name).is_dir()]


def _photographs(root: Path, product: Path, split: str, folder: Path) -> Items:
    masks = product / MASKS / folder.name
    photographs = list(list_images(folder))
    yield from _passed_over(root, folder, set(photographs), "photographs lie directly in their condition's folder")
    for path in photographs:
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


def _passed_over(root: Path, folder: Path, used: Collection[Path], why: str, texts: bool = False) -> Items:
    """A rejection for every file, and for every folder with files, that lies in `folder` and is not `used`.

    `why` says what is wrong with a folder; with `texts`, text files belong there.
    """
    for path in _entries(folder):
        if path in used:
            continue
        item = path.relative_to(root).as_posix()
        if path.is_dir():
            count = sum(file.is_file() for file in path.rglob("*"))
            if count:
                yield Rejection(item, f"the folder is passed over (files in it: {count}): {why}")
        elif path.suffix.lower() in SUFFIXES:
            yield Rejection(item, "the photograph does not lie in <product>/<split>/<condition>")
        elif not texts or (path.suffix.lower() not in TEXTS and path.stem.lower() not in TEXTS):
            yield Rejection(item, f"the file is no photograph: its name ends in none of {', '.join(sorted(SUFFIXES))}")


def _entries(folder: Path) -> list[Path]:
    """What lies directly in a folder, by name, less what an operating system put there."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in SYSTEM)
