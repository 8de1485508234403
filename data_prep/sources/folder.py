"""Read the folder layout of MVTec AD: `<product>/<split>/<condition>/<image>`.

Splits are `train`, `validation` (or `val`) and `test`. The condition of normal parts is `good`. The optional mask of a
defect is `<product>/ground_truth/<condition>/<stem>_mask.png` or `<stem>.png`, in any image format. A folder `<stem>`
with several masks is also accepted. All masks of an image are merged into their union. The case of these names does not
matter.

If the build makes the splits, a product may also be flat, as in anomalib's `Folder`: `<product>/<condition>/<image>` or
`<product>/images/<condition>/<image>`. One condition is `good`, and all other folders are defects, except for the masks
in `ground_truth`, `masks` or `mask`. The root may be a flat product itself. Folders such as `gt` or `labels` are
rejected because they seem to hold masks, as is `<stem>_mask` next to its image.

Everything else in the layout is rejected with a reason. All files of a folder get a single rejection. Text files next
to the products and splits (`license.txt`, `readme.md`) and system files are ignored. Product folders may be links.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_prep.faults import list_images
from data_prep.sources import Items, RowError, SourceConfig, reject_unused, select_frame, subfolders, walk_below
from data_prep.sources._rows import means_good, named_condition, sounds_good
from echo_ft.data.splits import SPLITS
from echo_ft.data.text import nfc
from echo_ft.errors import EchoError
from echo_ft.files import list_folder
from echo_ft.records import GOOD, Inspection, Rejection

SPLIT_FOLDERS = {**{split: split for split in SPLITS}, "val": "validation"}
"""Maps a folder name to a split."""

MASK_FOLDER = "ground_truth"

FLAT_MASK_FOLDERS = (MASK_FOLDER, "masks", "mask")
"""Names that the mask folder of a flat product may have."""

IMAGE_FOLDER = "images"

ANNOTATION_FOLDER = re.compile(
    r"(gts?|ground[ _-]?truths?|masks?|annotations?|seg|segmentations?)([ _-].*)?|labels?", re.IGNORECASE
)
"""Matches folders in a flat product that seem to hold masks or labels. `label_torn` may be a defect."""

MASK_STEM = re.compile(r"(.+)[ _-](masks?|gt|ground[_-]?truth|label|seg)", re.IGNORECASE)
"""Matches the stem of a mask next to its image. The first group is the stem of the image."""


@dataclass(frozen=True)
class _Product:
    folder: Path
    containers: tuple[tuple[str | None, Path], ...]
    """Pairs of a split and the folder of its condition folders. A flat product has one pair, without a split."""
    masks: Path | None
    """The folder of its masks."""

    @property
    def flat(self) -> bool:
        return self.containers[0][0] is None

    def conditions(self, root: Path, container: Path) -> list[Path]:
        """Return the condition folders in one of the containers."""
        return [folder for folder in subfolders(root, container) if folder != self.masks]


def read(config: SourceConfig) -> Items:
    """Yield the images of every product folder under the root, with the splits of the folder layout."""
    dataset, splits_made = config.root.resolve().name, config.split != "given"
    items = read_folder_layout(config.root, dataset, good=config.good, flat=True, splits_made=splits_made)
    yield from (select_frame(item, config.frame) for item in items)


def read_folder_layout(
    root: Path,
    dataset: str,
    conditions: Mapping[str, str] | None = None,
    companions: Collection[str] = (),
    good: tuple[str, ...] = (),
    flat: bool = False,
    splits_made: bool = False,
) -> Items:
    """Yield the images of a dataset with this folder layout, under the name `dataset`.

    `conditions` maps folder names to conditions. `companions` lists other files that belong in a product folder. `good`
    lists names of condition folders, besides `good`, for parts without a defect. `flat` says whether products may be
    flat; flat products are used only if the build makes the splits (`splits_made`). Raises EchoError if there is no
    product.
    """
    found = _products(root, flat, good)
    products = [product for product in found if splits_made or not product.flat]
    if not products:
        raise EchoError(
            f"there is no folder <product>/train/<condition> or <product>/test/<condition> under {root}; "
            + _hint(root, found, flat, splits_made)
        )
    names = ", ".join(SPLIT_FOLDERS)
    unused = {
        product.folder: "it has no train or test folder; set split to seeded to use it"
        for product in found
        if product not in products
    }
    unused |= {product.folder: "it has no image" for product in products if not _image_folders(root, product)}
    if products[0].folder != root:
        others = [path for path in subfolders(root, root) if path not in {product.folder for product in found}]
        unused |= _undeclared(root, others, splits_made) if flat else {}
        reason = f"a product folder contains one of {names}"
        used = [*unused, *(product.folder for product in products)]
        yield from reject_unused(root, root, used, reason, allow_text=True)
    for folder, reason in unused.items():
        count = len(walk_below(root, folder)[0])
        yield Rejection(folder.relative_to(root).as_posix(), f"folder ignored (files: {count}): {reason}")
    owners = _owners(root, products)
    for product in products:
        yield from _reject_unused(root, product, companions, f"a split folder is one of {names}")
        masks: set[Path] = set()
        for split, container in product.containers:
            for folder in product.conditions(root, container):
                item = folder.relative_to(root).as_posix()
                owner = owners[folder.resolve()]
                if owner != folder:
                    reason = f"it leads to {owner.relative_to(root).as_posix()}, which is read there"
                    yield Rejection(item, f"folder ignored: {reason}")
                    continue
                try:
                    condition = (conditions or {}).get(folder.name) or _condition(folder.name, good, product.flat)
                except RowError as error:
                    yield Rejection(item, f"folder ignored: {error}")
                    continue
                yield from _images(root, dataset, product, folder, condition, split, masks)
        if product.masks is not None:
            yield from _unused_masks(root, product.masks, masks)


def _condition(name: str, good: tuple[str, ...], flat: bool) -> str:
    """Return the condition of a folder. Raises RowError as `named_condition` does, and for names of mask folders."""
    if flat and ANNOTATION_FOLDER.fullmatch(nfc(name)):
        raise RowError(
            f"{name} seems to hold masks or labels; rename it to {MASK_FOLDER} if it holds masks, or give the defect "
            "another name"
        )
    return named_condition(name, good)


def _products(root: Path, flat: bool, good: tuple[str, ...]) -> list[_Product]:
    """Return the products directly under the root, or the root itself if it is a flat product."""
    own = _product(root, root, flat, good)
    products = [
        product
        for folder in subfolders(root, root)
        if (product := _product(root, folder, flat and not _is_part(folder.name, own is not None), good))
    ]
    return [own] if not products and own is not None and own.flat else products


def _is_part(name: str, own: bool) -> bool:
    """Return whether a folder in the root is not a product. `label` may be one, unless the root is one (`own`)."""
    parts = (*SPLIT_FOLDERS, *FLAT_MASK_FOLDERS, IMAGE_FOLDER)
    return name.casefold() in parts or (own and bool(ANNOTATION_FOLDER.fullmatch(nfc(name))))


def _product(root: Path, folder: Path, flat: bool, good: tuple[str, ...] = ()) -> _Product | None:
    """Return the product in a folder, or None if the folder holds neither splits nor, with `flat`, a flat product."""
    inside = subfolders(root, folder)
    order = list(SPLIT_FOLDERS)
    splits = [path for path in inside if path.name.casefold() in SPLIT_FOLDERS]
    if splits:
        splits.sort(key=lambda path: order.index(path.name.casefold()))
        containers = tuple((SPLIT_FOLDERS[path.name.casefold()], path) for path in splits)
        return _Product(folder, containers, _named(inside, (MASK_FOLDER,)))
    product = _flat_product(root, folder)
    return product if flat and any(means_good(name, good) for name in _image_folders(root, product)) else None


def _flat_product(root: Path, folder: Path) -> _Product:
    """Return a folder as a flat product, whether or not it is one."""
    inside = subfolders(root, folder)
    images = _named(inside, (IMAGE_FOLDER,))
    container = images if images is not None and subfolders(root, images) else folder
    return _Product(folder, ((None, container),), _named(inside, FLAT_MASK_FOLDERS))


def _image_folders(root: Path, product: _Product) -> list[str]:
    """Return the names of the condition folders of a product that hold images."""
    folders = (path for _, container in product.containers for path in product.conditions(root, container))
    return [path.name for path in folders if any(list_images(path))]


def _undeclared(root: Path, folders: Collection[Path], splits_made: bool) -> dict[Path, str]:
    """Map each folder that would be a flat product if a word for `good` were declared to a hint that says so."""
    remedies = {}
    for folder in folders:
        word = next(filter(sounds_good, _image_folders(root, _flat_product(root, folder))), None)
        if word is not None and (folder == root or not _is_part(folder.name, own=True)):
            seeded = "" if splits_made else " and set split to seeded"
            remedies[folder] = f"if {word} holds its parts without a defect, pass --good {shlex.quote(word)}{seeded}"
    return remedies


def _named(folders: Collection[Path], names: Collection[str]) -> Path | None:
    """Return the first folder whose name is in `names`, ignoring case and Unicode form, or None."""
    return next((path for path in folders if nfc(path.name).casefold() in names), None)


def _owners(root: Path, products: Collection[_Product]) -> dict[Path, Path]:
    """Map each real folder to the condition folder that reads it, preferably one that is reached without a link."""
    every = [
        folder
        for product in products
        for _, container in product.containers
        for folder in product.conditions(root, container)
    ]
    every.sort(key=lambda folder: folder.resolve() != root.resolve() / folder.relative_to(root))
    owners: dict[Path, Path] = {}
    for folder in every:
        owners.setdefault(folder.resolve(), folder)
    return owners


def _reject_unused(root: Path, product: _Product, companions: Collection[str], reason: str) -> Items:
    """Yield rejections for anything in a product besides its split, condition and mask folders."""
    images = "the image is not in <product>/<split>/<condition>"
    if product.flat:
        place = product.containers[0][1].relative_to(root).as_posix().removeprefix(".")
        reason = f"the folders of conditions are in {place or 'the root'}"
        images = f"the image is not in {place}{'/' if place else ''}<condition>"
    used = [product.folder / name for name in companions]
    used += [] if product.masks is None else [product.masks]
    for _, container in product.containers:
        if container == product.folder:
            used += product.conditions(root, container)
        else:
            used.append(container)
            yield from reject_unused(root, container, product.conditions(root, container), "", images)
    yield from reject_unused(root, product.folder, used, reason, images, allow_text=True)


def _hint(root: Path, flat_products: Collection[_Product], flat: bool, splits_made: bool) -> str:
    """Say what the root holds instead of products, and what to do. `flat_products` are its products without splits."""
    manifest = "list the images in a CSV file (source manifest)"
    for product in flat_products:
        conditions = ", ".join(folder.name for folder in product.conditions(root, product.containers[0][1]))
        return (
            f"{product.folder} has folders of conditions ({conditions}) but no train or test folder: "
            f"set split to seeded, or {manifest}"
        )
    folders = subfolders(root, root)
    if _product(root, root, flat=False):
        return f"root looks like the folder of one product: set it to {root.resolve().parent}"
    for folder, remedy in (_undeclared(root, [root, *folders], splits_made) if flat else {}).items():
        return f"{folder} has no folder {GOOD}: {remedy}"
    deeper = {
        folder: [inner.name for inner in subfolders(root, folder) if _product(root, inner, flat=True)]
        for folder in folders
    }
    parents = [folder for folder, products in deeper.items() if products]
    if len(parents) == 1:
        return (
            f"its products ({', '.join(deeper[parents[0]])}) lie one folder deeper: set root to {parents[0].resolve()}"
        )
    if parents:
        names = ", ".join(str(folder.resolve()) for folder in parents)
        return f"its products lie one folder deeper: build a dataset from each of {names}"
    for folder in (root, *folders):
        images = _named(subfolders(root, folder), (IMAGE_FOLDER,))
        if images is not None and any(list_images(images)):
            remedy = f"move them to {GOOD} and one folder per defect"
            return f"the images in {images} have no condition: {remedy}, or {manifest}"
    links = [path.name for path in list_folder(root) if path.is_dir() and path not in folders]
    found = [f"the folders {', '.join(path.name for path in folders[:5])}"] if folders else []
    found += [f"links out of it ({', '.join(links)}), which are not followed"] if links else []
    count = sum(1 for _ in list_images(root))
    found += [f"{count} images"] if count else []
    return f"it holds {' and '.join(found) or 'nothing'}: check root, or {manifest}"


def _images(
    root: Path,
    dataset: str,
    product: _Product,
    folder: Path,
    condition: str,
    split: str | None,
    masks_used: set[Path],
) -> Items:
    masks = _mask_folder(root, product, folder.name)
    named: dict[str, list[Path]] = defaultdict(list)
    for path in list_images(masks) if masks else ():
        named[nfc(path.stem)].append(path)
    groups = {nfc(path.name): path for path in list_folder(masks) if path.is_dir()} if masks else {}
    images = list(list_images(folder))
    yield from reject_unused(root, folder, set(images), "images must be directly in the folder of their condition")
    by_stem = {nfc(path.stem): path.name for path in images}
    for path in images:
        image = path.relative_to(root).as_posix()
        stem = nfc(path.stem)
        match = MASK_STEM.fullmatch(stem)
        if match and match[1] in by_stem:
            remedy = f"move it to {MASK_FOLDER}, or rename it if it shows a part"
            yield Rejection(image, f"it seems to be the mask of {by_stem[match[1]]} next to it; {remedy}")
            continue
        files = [*named.get(f"{stem}_mask", ()), *named.get(stem, ())]
        masks_used.update(files)
        several = groups.get(stem)
        if several is not None:
            masks_used.add(several)
            inside = list(list_images(several))
            files += inside
            yield from reject_unused(
                root, several, set(inside), f"the masks of {image} must be directly in their folder"
            )
        if not files and masks:
            wanted = (masks / f"{path.stem}_mask.png").relative_to(root).as_posix()
            yield Rejection(wanted, f"the mask of {image} is missing; the image is used without it", "mask")
        names = tuple(file.relative_to(root).as_posix() for file in files)
        yield Inspection(
            id=image,
            image=image,
            dataset=dataset,
            product=(root.resolve() if product.folder == root else product.folder).name,
            condition=condition,
            group=image,
            split=split,
            mask=names[0] if len(names) == 1 else None,
            masks=names if len(names) > 1 else (),
        )


def _mask_folder(root: Path, product: _Product, condition: str) -> Path | None:
    """Return the folder with the masks of a condition folder, or None."""
    if product.masks is None:
        return None
    folders = subfolders(root, product.masks)
    return _named([path for path in folders if path.name == condition] or folders, (nfc(condition).casefold(),))


def _unused_masks(root: Path, masks: Path, used: Collection[Path]) -> Items:
    """Yield rejections for files in the mask folder that are not the mask of an image."""
    reason = "no image has this name and condition"
    folders = {path.parent for path in used}
    yield from reject_unused(root, masks, folders, reason, reason)
    for folder in sorted(folders):
        yield from reject_unused(root, folder, used, reason, reason)
