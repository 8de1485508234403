"""The images of a page's cases: inside the page, in a folder next to it, or left out."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from echo_ft.errors import EchoError
from echo_ft.files import atomic_file
from echo_ft.html import jpeg_bytes, thumbnail
from echo_ft.images import decode, masks
from echo_ft.inputs import image_file
from echo_ft.processes import remove_left_over_files
from echo_ft.provenance import fingerprint_bytes
from echo_ft.records import Case
from echo_ft.terminal import progress

IMAGE_CHOICES = ("auto", "page", "folder", "none")
"""Where a page keeps its images: `auto` embeds up to EMBEDDED_IMAGES of them, and writes more to a folder."""

IMAGES_HELP = (
    "Where the page stores its images: inside, or in a folder next to it, named after the page with _images. "
    "auto embeds up to 600."
)
"""Help of the option `--images`."""

EMBEDDED_IMAGES = 600
"""The most images that a page embeds by default. At 15 KB each, they make a page of about 12 MB."""

IMAGE_SIDE = 384
"""Longer side of an image on a page, in pixels. Smaller images keep their size."""


class ImageStore:
    """Collects the images of a page. An image's number is its index in `embedded`, or in the list from `finish`."""

    def __init__(self, page: Path, place: str = "auto") -> None:
        """Collect images for the page at this path. `place` is one of IMAGE_CHOICES."""
        self.folder = page.with_name(f"{page.stem}_images")
        self.place = place
        self._root: Path | None = None
        self._numbers: dict[str, int] = {}
        self.embedded: list[str] = []
        """Each image as base64-encoded JPEG, an empty string if unreadable; an empty list if the page embeds none."""

    def read_from(self, root: Path | None) -> None:
        """Read images below `root`. Without a root, or with the place `none`, the page has no images."""
        self._root = None if self.place == "none" else root

    def add(self, path: str) -> int:
        """Add an image and return its number on the page, or -1 if there is none."""
        if self._root is None or not image_file(self._root / path).is_file():
            return -1
        return self._numbers.setdefault(path, len(self._numbers))

    def add_query(self, path: str, case: Case | None) -> dict[str, Any]:
        """Add a query image. Return its number, and the outlines of its defect as [width, height, SVG path]."""
        number = self.add(path)
        outlines = None
        if number >= 0 and case is not None and masks.is_marked(case.truth) and self._root is not None:
            try:
                outlines = _outlines(self._root, path, case)
            except EchoError:
                outlines = None
        return {"image": number, "outlines": outlines}

    def finish(self) -> list[str]:
        """Embed or write the images. Return their addresses relative to the page; "" if embedded or unreadable."""
        paths = list(self._numbers)
        if self.place == "page" or (self.place == "auto" and len(paths) <= EMBEDDED_IMAGES):
            with ThreadPoolExecutor(decode.READER_THREADS) as pool:
                jpegs = pool.map(lambda path: encode_image(self._path(path)), paths)
                shown = progress(jpegs, "embedding images", "images", len(paths))
                self.embedded = [base64.b64encode(jpeg).decode() for jpeg in shown]
            return [""] * len(paths)
        return self._write(paths) if paths else []

    def _path(self, path: str) -> Path:
        assert self._root is not None
        return self._root / path

    def _write(self, paths: Sequence[str]) -> list[str]:
        """Write the images that are missing from the folder, and remove those that only an earlier page used."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_left_over_files(self.folder)
        names = [_file_name(self._path(path)) for path in paths]

        def write(path: str, name: str) -> bool:
            target = self.folder / name
            if target.is_file():
                return True
            jpeg = encode_image(self._path(path))
            if jpeg:
                with atomic_file(target, unique=True) as partial:
                    partial.write_bytes(jpeg)
            return bool(jpeg)

        with ThreadPoolExecutor(decode.READER_THREADS) as pool:
            written = list(progress(pool.map(write, paths, names), "writing images", "images", len(paths)))
        kept = set(names)
        for old in self.folder.glob("*.jpg"):
            if re.fullmatch(r"[0-9a-f]{16}\.jpg", old.name) and old.name not in kept:
                old.unlink()
        return [f"{self.folder.name}/{name}" if there else "" for name, there in zip(names, written, strict=True)]


def _file_name(path: Path) -> str:
    """Return a name that changes with the image file, so that an unchanged image is not encoded again."""
    state = image_file(path).stat()
    return (
        fingerprint_bytes(str(path.resolve()).encode(), f"{state.st_size} {state.st_mtime_ns} {IMAGE_SIDE}".encode())
        + ".jpg"
    )


def encode_image(path: Path) -> bytes:
    """Return the image as a small JPEG; empty if it cannot be read, because the page works without it."""
    try:
        return jpeg_bytes(thumbnail(decode.decode(path, min_size=(IMAGE_SIDE, IMAGE_SIDE)), IMAGE_SIDE))
    except decode.READ_ERRORS:
        return b""


def _outlines(root: Path, path: str, case: Case) -> list[Any] | None:
    """Return the outlines of a case's defect as [width, height, SVG path]; None if the mask is empty.

    Raises EchoError if the mask or the image cannot be read.
    """
    (width, height), orientation = decode.size_and_orientation(root / path)
    mask = masks.load_mask(case.truth, root, (width, height), orientation)
    if mask is None or not mask.any():
        return None
    scale = min(1, IMAGE_SIDE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return [*size, masks.outline_path(mask if scale == 1 else masks.resize_mask(mask, size))]
