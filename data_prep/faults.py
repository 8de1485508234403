"""What can be told about image files before anything is built from them: readable, whole, of one size with the mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image

from echo_ft.errors import EchoError
from echo_ft.images import decode, masks
from echo_ft.records import GOOD, Inspection

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})


def list_images(folder: Path) -> Iterator[Path]:
    """The image files directly in `folder`, by name; nothing where there is no such folder."""
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def name_fault(inspection: Inspection) -> str | None:
    """Why the names of a record's files cannot be written down, or None: Linux has names that are no text in UTF-8."""
    names = (inspection.image, *masks.mask_files(inspection), inspection.reference or "")
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        return "the name of the file, of its mask or of its reference is not UTF-8; rename it"
    return None


def image_fault(path: Path, photograph: bool = True) -> str | None:
    """Why `path` cannot be used as an image, or None. Truncation is found without decoding at full size.

    A `photograph`, unlike a mask, must also have grey values that 8 bits can tell.
    """
    if not path.is_file():
        return "the file is missing"
    try:
        with Image.open(path) as image:
            if min(image.size) < 2:
                return f"the image is only {image.size[0]} x {image.size[1]} pixels"
            wide = image.mode in decode.WIDE
            if image.format == "PNG":
                image.verify()  # reads every chunk and its checksum
            else:
                eighth = max(1, image.width // 8), max(1, image.height // 8)
                image.draft("L", eighth)  # a JPEG then decodes at an eighth
                image.load()
        if photograph and wide:
            decode.depth(path)
    except decode.UNREADABLE as error:
        return decode.fault(error)
    return None


@dataclass(frozen=True)
class MaskFault:
    """Why a mask cannot be used. The photograph itself stands where the mask of a defect merely marks nothing."""

    reason: str
    photograph_stands: bool = False


def mask_fault(inspection: Inspection, root: Path) -> MaskFault | None:
    """Why the mask or the polygons of a readable image cannot be used, or None where they can or there are none."""
    names = masks.mask_files(inspection)
    if not names and not inspection.polygons:
        return None
    for name in names:
        fault = image_fault(root / name, photograph=False)
        if fault:
            return MaskFault(f"mask {name}: {fault}")
    try:
        marks = masks.load_mask(inspection, root, decode.image_size(root / inspection.image))
    except EchoError as error:
        return MaskFault(str(error), photograph_stands=not names)
    marked = marks is not None and bool(marks.any())
    what = f"mask {', '.join(names)}: it marks" if names else "its polygons mark"
    if marked and inspection.condition == GOOD:
        return MaskFault(f"{what} a defect on a photograph labelled {GOOD}")
    if not marked and inspection.condition != GOOD:
        return MaskFault(f"{what} nothing although the condition is {inspection.condition}", photograph_stands=True)
    return None


def boxes_fault(inspection: Inspection, root: Path) -> str | None:
    """Why the boxes or outlines of a readable image cannot be used, or None."""
    if not inspection.boxes and not inspection.polygons:
        return None
    if inspection.boxes and inspection.condition == GOOD:
        return f"it has boxes although it is labelled {GOOD}"
    with Image.open(root / inspection.image) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation, 1)
    if turned not in (0, 1):  # 0 stands for unknown
        return (
            f"its rotation mark (EXIF orientation {turned}) turns it where it is shown, and its boxes or outlines may "
            "be meant for either; save it turned and without the mark, and annotate that file"
        )
    for box in inspection.boxes:
        x0, y0, x1, y1 = box
        near = min(x0, y0) > -1 and x1 < width + 1 and y1 < height + 1  # less than a pixel outside is rounding
        inside = near and max(0, x0) < min(x1, width) and max(0, y0) < min(y1, height)
        if not all(map(math.isfinite, box)) or not inside:
            return f"box {list(box)} is not (x0, y0, x1, y1) inside the {width} x {height} pixels"
        if x1 - x0 < 1 and y1 - y0 < 1:
            return (
                f"box {list(box)} is smaller than a pixel; write boxes in pixels of the {width} x {height} image, "
                "[[x0, y0, x1, y1], ...], not in shares of it"
            )
    return None
