"""Sources: one file a dataset layout, each with `read(config)` that yields records in a stable order.

A source yields an `Inspection`, then the `Question`s it has for it, or a `Rejection` where a photograph or row cannot
be used. Paths in records are relative to `SourceConfig.root`, where a source only reads: outlines that no file of the
dataset holds as a mask stand in the record. What a dataset lacks (a mask, the name of a defect) is
absent from its records; what lies in its tree and is not used is named in a `Rejection`.

A list may tell with a `Place` where a photograph stands in it.

A file whose name begins with an underscore is no source but what several of them share.
"""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.faults import SUFFIXES
from echo_ft.records import Inspection, Question, Rejection

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))
"""The sources, by the names of their files."""


@dataclass(frozen=True)
class ItemPlace:
    """Where in its list an inspection stands, as `parts.csv:3`: told where its photograph turns out to be unusable."""

    inspection: str
    place: str


Item = Inspection | Question | Rejection | ItemPlace

UNNAMED = "defective"
"""The condition of a defect that its dataset does not name."""

TEXT_SUFFIXES = frozenset({".txt", ".md", ".pdf", "license", "license-dataset", "licence", "readme"})
"""Suffixes and stems of files that go with a dataset and hold no data."""

SYSTEM = frozenset({"Thumbs.db", "desktop.ini", "__MACOSX"})


@dataclass(frozen=True)
class SourceConfig:
    """What a source may need to know."""

    root: Path
    """Folder that the image paths are relative to; `synthetic` draws into it."""
    annotations: Path | None = None
    """The file that lists the photographs: mmad.json, a split of VisA, or a manifest's CSV, JSONL or COCO JSON."""
    seed: int = 0
    parts: int = 0
    """How many parts of each product `synthetic` draws."""


Items = Iterator[Item]


def place_name(source: str, root: Path, annotations: Path | None) -> str | None:
    """The dataset's name where a source takes it from the list or the root, and None where it has one of its own."""
    if source == "manifest" and annotations is not None:
        return annotations.stem
    return root.resolve().name if source in ("folder", "manifest") else None


class RowError(Exception):
    """Why one photograph or row cannot be used: the reason of its `Rejection`."""


def locate(root: Path, text: str, what: str) -> str:
    """The path `text` of a list as records have it: relative to the root, with forward slashes.

    Raises RowError where it leads out of the root or to no file; `what` names it there.
    """
    base = os.path.join(os.path.abspath(root), "")  # links below the root are left as they are
    path = os.path.abspath(os.path.join(base, text.replace("\\", "/")))
    if not path.startswith(base):
        raise RowError(f"{what} {text} lies outside the root; set root to a folder that holds all images")
    if not os.path.isfile(path):
        raise RowError(f"{what} {text} does not exist under the root")
    return path[len(base) :].replace(os.sep, "/")


def entries(folder: Path) -> list[Path]:
    """What lies directly in a folder, by name, less what an operating system put there."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in SYSTEM)


def passed_over(
    root: Path,
    folder: Path,
    used: Collection[Path],
    why: str,
    photograph: str = "the photograph does not lie in <product>/<split>/<condition>",
    texts: bool = False,
) -> Items:
    """A rejection for every file, and for every folder with files, that lies in `folder` and is not `used`.

    `why` says what is wrong with a folder and `photograph` what is wrong with an image; with `texts`, text files
    belong there.
    """
    for path in entries(folder):
        if path in used:
            continue
        item = path.relative_to(root).as_posix()
        if path.is_dir():
            count = sum(file.is_file() for file in path.rglob("*"))
            if count:
                yield Rejection(item, f"the folder is passed over (files in it: {count}): {why}")
        elif path.suffix.lower() in SUFFIXES:
            yield Rejection(item, photograph)
        elif not texts or not is_text(path):
            yield not_an_image(item)


def strays(root: Path, folder: Path, used: Collection[str]) -> Iterator[Path]:
    """The files at any depth in `folder` whose paths below the root are not `used`, less those of texts and systems."""
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(root)
        hidden = any(part.startswith(".") or part in SYSTEM for part in place.parts)
        if not hidden and place.as_posix() not in used and path.is_file() and not is_text(path):
            yield path


def unlisted(root: Path, folder: Path, used: Collection[str], why: str) -> Items:
    """Rejections for what lies at any depth in `folder` and is not `used`: one for all images, one for each other file.

    `why` says what is wrong with the images, as in `12 images in it <why>: a.png, b.png`.
    """
    images = []
    for path in strays(root, folder, used):
        item = path.relative_to(root).as_posix()
        if path.suffix.lower() in SUFFIXES:
            images.append(item)
        else:
            yield not_an_image(item)
    if images:
        first = ", ".join(images[:3]) + (" and so on" if len(images) > 3 else "")
        yield Rejection(folder.relative_to(root).as_posix(), f"{len(images)} images in it {why}: {first}")


def is_text(path: Path) -> bool:
    """Whether a file is one of those that go with a dataset and hold no data."""
    return path.suffix.lower() in TEXT_SUFFIXES or path.stem.lower() in TEXT_SUFFIXES


def not_an_image(item: str) -> Rejection:
    """The rejection of a file with a suffix that no photograph has."""
    return Rejection(item, f"the file is no photograph: its name ends in none of {', '.join(sorted(SUFFIXES))}")
