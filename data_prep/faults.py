"""Checks of image files before a build: are they readable and complete, and does a mask fit its image?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image

from echo_ft.errors import EchoError
from echo_ft.images import decode, masks
from echo_ft.records import GOOD, Inspection

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})


def list_images(folder: Path) -> Iterator[Path]:
    """The image files directly in `folder`, sorted by name; none if there is no such folder."""
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def name_fault(inspection: Inspection) -> str | None:
    """Why the file names of a record cannot be stored, or None. Linux allows names that are not valid UTF-8."""
    names = (inspection.image, *masks.mask_files(inspection), inspection.reference or "")
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        return "the name of the image, its mask or its reference is not UTF-8; rename the file"
    return None


def image_fault(path: Path, is_mask: bool = False) -> str | None:
    """Why `path` cannot be used as an image, or None. Finds truncated files without decoding them at full size.

    An image, unlike a mask, must also have grey values that can be scaled to 8 bits.
    """
    if not path.is_file():
        return "the file is missing"
    try:
        with Image.open(path) as image:
            if min(image.size) < 2:
                return f"the image is only {image.size[0]} x {image.size[1]} pixels"
            high_depth = image.mode in decode.HIGH_DEPTH_MODES
            if image.format == "PNG":
                image.verify()  # reads every chunk and its checksum
            else:
                eighth = max(1, image.width // 8), max(1, image.height // 8)
                image.draft("L", eighth)  # a JPEG then decodes at an eighth of its size
                image.load()
        if high_depth and not is_mask:
            decode.bit_depth(path)
    except decode.READ_ERRORS as error:
        return decode.describe_read_error(error)
    return None


@dataclass(frozen=True)
class MaskFault:
    """Why a mask cannot be used."""

    reason: str
    image_usable: bool = False
    """Whether the image can be used without the mask, for example because the mask of a defect marks nothing."""


def mask_fault(inspection: Inspection, root: Path) -> MaskFault | None:
    """Why the mask or the polygons of a readable image cannot be used; None if they can, or if it has neither."""
    names = masks.mask_files(inspection)
    if not names and not inspection.polygons:
        return None
    for name in names:
        fault = image_fault(root / name, is_mask=True)
        if fault:
            return MaskFault(f"mask {name}: {fault}")
    try:
        mask = masks.load_mask(inspection, root, decode.image_size(root / inspection.image))
    except EchoError as error:
        return MaskFault(str(error), image_usable=not names)
    marked = mask is not None and bool(mask.any())
    subject = f"mask {', '.join(names)} marks" if names else "the polygons mark"
    if marked and inspection.condition == GOOD:
        return MaskFault(f"{subject} a defect on an image labelled {GOOD}")
    if not marked and inspection.condition != GOOD:
        return MaskFault(f"{subject} nothing although the condition is {inspection.condition}", image_usable=True)
    return None


def boxes_fault(inspection: Inspection, root: Path) -> str | None:
    """Why the boxes or polygons of a readable image cannot be used, or None."""
    if not inspection.boxes and not inspection.polygons:
        return None
    if inspection.boxes and inspection.condition == GOOD:
        return f"the image has boxes although it is labelled {GOOD}"
    with Image.open(root / inspection.image) as image:
        width, height = image.size
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation not in (0, 1):  # 0 means unknown
        return (
            f"viewers rotate the image (EXIF orientation {orientation}), so its boxes or polygons are ambiguous; "
            "save the image rotated and without the EXIF tag, and annotate that file"
        )
    for box in inspection.boxes:
        x0, y0, x1, y1 = box
        near = min(x0, y0) > -1 and x1 < width + 1 and y1 < height + 1  # less than a pixel outside is rounding
        inside = near and max(0, x0) < min(x1, width) and max(0, y0) < min(y1, height)
        if not all(map(math.isfinite, box)) or not inside:
            return f"box {list(box)} is not (x0, y0, x1, y1) inside the {width} x {height} pixels"
        if x1 - x0 < 1 and y1 - y0 < 1:
            return (
                f"box {list(box)} is smaller than a pixel; give boxes in pixels of the {width} x {height} image, "
                "[[x0, y0, x1, y1], ...], not in fractions of it"
            )
    return None
