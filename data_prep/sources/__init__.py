"""Sources: one module per dataset layout. Its function `read(config)` yields records in a stable order.

A source yields an `Inspection` followed by its `Question`s, or a `Rejection` for an image or row that cannot be used.
Paths in records are relative to `SourceConfig.root`, which sources only read. Outlines without a mask file are stored
in the record. If a dataset lacks something, such as a mask or the name of a defect, its records lack it too. A
`Rejection` names files in the dataset that are not used.

A source that reads a manifest yields an `ItemPlace` before each item, to say where the manifest lists the image. A
manifest may list an image in several places, and `data_prep.truth` combines them. If the source rejects one of these
places, the whole image is rejected.

Modules with a leading underscore are not sources. They contain code that several sources share.
"""

from __future__ import annotations

import dataclasses
import os
import pkgutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from data_prep.faults import IMAGE_SUFFIXES
from echo_ft.data.splits import DEFECT_SEPARATOR, join_defects
from echo_ft.data.text import nfc, spelling_key
from echo_ft.files import leads_outside, list_folder, walk
from echo_ft.images.masks import mask_files
from echo_ft.inputs import FRAME, image_file, stays_inside, with_frame
from echo_ft.records import GOOD, Inspection, Question, Rejection

SOURCE_NAMES = tuple(
    sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
)
"""The names of the sources, which are the names of their modules."""


@dataclass(frozen=True)
class ItemPlace:
    """The place of an inspection in its manifest, such as `parts.csv:3`, which is reported if the image is unusable.

    The content of this place follows as the next `Inspection` with this id or the next `Rejection` of this place.
    """

    inspection: str
    place: str
    unannotated: bool = False
    """Whether this place has no mark and no label, so that the image is `good` only by convention."""


Item = Inspection | Question | Rejection | ItemPlace

UNNAMED_DEFECT = "defective"
"""The condition for a defect that its dataset does not name."""

TEXT_SUFFIXES = frozenset({".txt", ".md", ".pdf", "license", "license-dataset", "licence", "readme"})
"""Suffixes and stems of files that accompany a dataset without containing data."""


@dataclass(frozen=True)
class SourceConfig:
    """Everything that a source may need."""

    root: Path
    """Folder that image paths are relative to. `synthetic` draws into it."""
    annotations: Path | None = None
    """The file that lists the images: mmad.json, a split file of VisA, or a manifest in CSV, JSONL or COCO JSON."""
    seed: int = 0
    parts: int = 0
    """Number of parts per product that `synthetic` draws."""
    good: tuple[str, ...] = ()
    """Words in the dataset, besides `good`, that mean a part without a defect."""
    split: str = "given"
    """How the build splits the images. With `given`, a folder layout must contain the splits."""
    frame: int | None = None
    """The frame (from 0) of each image file to use, unless the dataset names one; None for files with one frame."""


Items = Iterator[Item]

T = TypeVar("T", bound=tuple[float, ...])


def inferred_dataset_name(source: str, root: Path, annotations: Path | None) -> str | None:
    """Return the dataset name that a source takes from its manifest or root, or None if the source has a fixed name.

    It is in NFC, as in records (`truth.with_composed_names`).
    """
    if source == "manifest" and annotations is not None:
        return nfc(annotations.stem)
    return nfc(root.resolve().name) if source in ("folder", "manifest") else None


class RowError(Exception):
    """Raised with the reason why an image or row cannot be used, which becomes its `Rejection`."""


def spelling(name: str) -> str:
    """Return the spelling key of a name, or the name itself if it is only punctuation."""
    return spelling_key(name) or name


def join_conditions(conditions: Collection[str]) -> str:
    """Return the condition of an image that has all of these conditions.

    Raises RowError if `good` occurs together with others, or if two names differ only in spelling.
    """
    names = {name for condition in conditions for name in condition.split(DEFECT_SEPARATOR)}
    if GOOD in names and len(names) > 1:
        raise RowError(f"it is {GOOD!r} and {join_defects(names - {GOOD})!r} at the same time; correct one")
    known: dict[str, str] = {}
    for name in sorted(names):
        if known.setdefault(spelling(name), name) != name:
            raise RowError(f"{known[spelling(name)]!r} and {name!r} seem to be the same defect; use one spelling")
    return join_defects(names)


def in_order(outlines: Iterable[T]) -> tuple[T, ...]:
    """Return each box or polygon once, in an order that does not depend on the source."""
    return tuple(sorted(set(outlines)))


def locate(root: Path, text: str, what: str, frame: int | None = None) -> str:
    """Return the path `text` as records store it: relative to the root, with forward slashes.

    A file whose name differs only in its Unicode form is also found; records store the name as on disk. `what` names
    the file in messages. `text` may name a frame, as in `stack.tif#frame=2`; otherwise `frame` counts. Raises RowError
    if the path is outside the root or no file exists.
    """
    named = FRAME.fullmatch(text)
    if named:
        return with_frame(locate(root, named[1], what), int(named[2]))
    base = os.path.join(os.path.abspath(root), "")  # do not resolve links below the root
    path = os.path.abspath(os.path.join(base, text.replace("\\", "/")))
    if not path.startswith(base):
        raise RowError(f"{what} {text} is outside the root; set root to a folder that contains all images")
    if not os.path.isfile(path):
        path = _on_disk(base, path[len(base) :])
        if not os.path.isfile(path):
            note = ", and #frame= needs a number from 0" if "#frame=" in text else ""
            raise RowError(f"{what} {text} does not exist under the root{note}")
    return with_frame(path[len(base) :].replace(os.sep, "/"), frame)


def select_frame(item: Item, frame: int | None) -> Item:
    """Return an item of a source that lists files, so that an inspection names this frame of its file."""
    if not isinstance(item, Inspection):
        return item
    image = with_frame(item.image, frame)
    return dataclasses.replace(item, id=image, image=image)


def _on_disk(folder: str, place: str) -> str:
    """Return the path of `place` below `folder`, with each name as the disk spells it.

    A name can be composed (NFC) in a list but decomposed on disk, as macOS writes it, or the other way around.
    """
    path = folder
    for part in place.split(os.sep):
        found = os.path.join(path, part)
        if not part.isascii() and not os.path.exists(found) and os.path.isdir(path):
            found = os.path.join(path, _names_by_form(path, os.stat(path).st_mtime_ns).get(nfc(part), part))
        path = found
    return path


@lru_cache  # a folder may be listed many times for the missing files of a list
def _names_by_form(folder: str, modified: int) -> dict[str, str]:
    return {nfc(name): name for name in sorted(os.listdir(folder))}


def subfolders(root: Path, folder: Path) -> list[Path]:
    """Return the folders directly in `folder`, except links that are not followed, which `reject_unused` reports.

    Links directly in the root are followed, because people keep products on other disks. Deeper links must stay inside
    the root, or inside the linked folder that contains them.
    """
    return [path for path in list_folder(folder) if path.is_dir() and not leads_outside(path, link_base(root, path))]


def walk_below(root: Path, folder: Path) -> tuple[list[Path], list[Path]]:
    """Return what `walk` returns for a folder below the root, but follow the same links as `subfolders`."""
    return walk(folder, link_base(root, folder))


def link_base(root: Path, folder: Path) -> Path:
    """Return the folder that links must not leave: the root, or a linked folder directly in it that holds `folder`.

    A link to a folder that contains the root would cause the root to be read again.
    """
    if not leads_outside(folder, root):
        return root
    top = root / folder.relative_to(root).parts[0]
    return root if root.resolve().is_relative_to(top.resolve()) else top


def link_fault(inspection: Inspection, root: Path, below_links: bool) -> str | None:
    """Return why a record's files may not be read because a link leads out of the root, or None.

    With `below_links`, files may be in a linked folder directly in the root, as folder layouts allow.
    """
    for name in (inspection.image, *mask_files(inspection), *filter(None, [inspection.reference])):
        if not _may_lead_outside(root, name):
            continue
        path = image_file(root / name)
        if leads_outside(path, link_base(root, path.parent) if below_links else root):
            return (
                f"{name} is a link out of the root to {path.resolve()}; copy the file, set root to a folder above both "
                "or, if you trust the source, pass --allow_links"
            )
    return None


def _may_lead_outside(root: Path, name: str) -> bool:
    """Return False if a record's path passes no link. Resolving it to find out where it leads takes much longer."""
    if "#frame=" in name or not stays_inside(name):
        return True
    return any(map(os.path.islink, accumulate(name.split("/"), os.path.join, initial=str(root))))


class LinkOutside(Rejection):
    """The rejection of a linked folder that leads out of the root."""


def reject_link(root: Path, folder: Path) -> LinkOutside:
    """Return the rejection of a linked folder that leads out of the root."""
    reason = f"the folder is a link out of the root to {folder.resolve()} and is skipped"
    return LinkOutside(folder.relative_to(root).as_posix(), f"{reason}; set root to a folder above both, or copy it")


def reject_unused(
    root: Path,
    folder: Path,
    used: Collection[Path],
    folder_reason: str,
    image_reason: str = "the image is not in <product>/<split>/<condition>",
    allow_text: bool = False,
) -> Items:
    """Yield a rejection for every file and every folder directly in `folder` that is not `used`.

    An empty folder is rejected only in the root, where it may be a product whose images are missing.

    `folder_reason` says why a folder is ignored and `image_reason` why an image is. With `allow_text`, text files are
    expected and not rejected.
    """
    for path in list_folder(folder):
        if path in used:
            continue
        item = path.relative_to(root).as_posix()
        if path.is_dir():
            files, outside = walk_below(root, path)
            yield from (reject_link(root, link) for link in outside)
            count = len(files)
            if count:
                yield Rejection(item, f"folder ignored (files: {count}): {folder_reason}")
            elif folder == root and not outside:
                yield Rejection(item, "folder ignored: it is empty")
        elif not path.is_file():
            yield Rejection(item, "it is not a file but a pipe, a device or a link to nothing")
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield Rejection(item, image_reason)
        elif not allow_text or not is_text(path):
            yield not_an_image(item)


def reject_unlisted(root: Path, folder: Path, used: Collection[str], reason: str) -> Items:
    """Yield rejections for the files at any depth in `folder` that are not `used`.

    A single rejection covers all images: `images ignored (12): <reason>: a.png, b.png`. Every other file gets its own
    rejection.
    """
    files, outside = walk_below(root, folder)
    for link in outside:
        if not any(name.startswith(f"{link.relative_to(root).as_posix()}/") for name in used):
            yield reject_link(root, link)
    images = []
    for path in files:
        item = path.relative_to(root).as_posix()
        if item in used or is_text(path):
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES:
            images.append(item)
        else:
            yield not_an_image(item)
    if images:
        first = ", ".join(images[:3]) + (", ..." if len(images) > 3 else "")
        yield Rejection(folder.relative_to(root).as_posix(), f"images ignored ({len(images)}): {reason}: {first}")


def is_text(path: Path) -> bool:
    """Return whether a file accompanies a dataset without containing data."""
    return path.suffix.lower() in TEXT_SUFFIXES or path.stem.lower() in TEXT_SUFFIXES


def not_an_image(item: str) -> Rejection:
    """Return the rejection of a file without an image suffix."""
    return Rejection(item, f"the file is not an image: its name does not end in {', '.join(sorted(IMAGE_SUFFIXES))}")
