"""Check image files before a build: are they readable and complete, and does each mask fit its image?"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echo_ft.data.text import control_token
from echo_ft.errors import EchoError
from echo_ft.files import list_folder
from echo_ft.images import decode, masks
from echo_ft.images.mask_reading import is_lossy
from echo_ft.inputs import image_file
from echo_ft.records import GOOD, Inspection

MAX_SHARE = 0.5
MAX_BORDER = 0.75
"""A mask seems inverted if it marks more than these fractions of the image and of its border. No mask of the magnetic
tiles marks more than 0.50 and 0.49."""

CONTROL_CHARACTER = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Characters that control a terminal, break a line or change the order in which the rest of the line is shown."""

MAX_ASPECT = 200
"""Largest aspect ratio of an image. Qwen2-VL's processor in transformers refuses larger ones."""

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})


def list_images(folder: Path) -> Iterator[Path]:
    """Yield the image files directly in `folder`, sorted by name, or none if the folder does not exist."""
    if folder.is_dir():
        yield from (path for path in list_folder(folder) if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def name_fault(inspection: Inspection) -> str | None:
    """Return why the names of a record cannot be stored or shown to a model, or None.

    Linux allows file names that are not valid UTF-8.
    """
    files = (inspection.image, *masks.mask_files(inspection), inspection.reference or "")
    if not _is_utf8("".join(files)):
        return "the name of the image, its mask or its reference is not UTF-8; rename the file"
    if CONTROL_CHARACTER.search("".join(files)):
        return "the name of the image, its mask or its reference has a control character; rename the file"
    for field in ("dataset", "product", "condition", "group"):
        name = getattr(inspection, field)
        if not _is_utf8(name):
            return f"its {field} {name!r} is not valid Unicode; correct it"
        if CONTROL_CHARACTER.search(name):
            return f"its {field} {name!a} has a control character; remove it"
        token = control_token(name)
        if token:
            return f"its {field} {name!r} contains {token}, a control token of the model's chat template; rename it"
    return None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class ImageCheck:
    """The result of checking an image or mask file. Without a fault, all fields are known."""

    fault: str | None = None
    """The reason why the file cannot be used as an image, or None."""
    size: tuple[int, int] = (0, 0)
    """(width, height) of the upright image in pixels."""
    orientation: int = 1
    """The EXIF orientation, from 1 (upright) to 8."""
    lossy: bool = False
    """Whether the file's format alters pixels."""
    bits: int | None = None
    """The bit depth from which an image (but not a mask) is scaled to 8 bits; None if it already has 8."""


def check_image(path: Path, is_mask: bool = False) -> ImageCheck:
    """Check a file before it is used as an image. Finds truncated files without decoding them at full size.

    Unlike a mask, an image must also have grey values that can be scaled to 8 bits.
    """
    if not image_file(path).is_file():
        return ImageCheck("the file is missing")
    try:
        with decode.open_image(path, any_frames=is_mask) as image:  # `mask_fault` refuses masks of several frames
            size = decode.upright_size(image)
            if min(size) < 2:
                return ImageCheck(f"the image is only {size[0]} x {size[1]} pixels")
            if max(size) > MAX_ASPECT * min(size) and not is_mask:
                return ImageCheck(
                    f"one side of the image ({size[0]} x {size[1]} pixels) is more than {MAX_ASPECT} times as long as "
                    "the other, which Qwen2-VL does not accept; crop it"
                )
            high_depth, orientation, lossy = (
                decode.is_deep(image),
                decode.orientation(image),
                is_lossy(image),
            )
            if image.format == "PNG" and not image.tell():
                image.verify()  # this reads every chunk and its checksum
            else:
                eighth = max(1, image.width // 8), max(1, image.height // 8)
                image.draft("L", eighth)  # this decodes a JPEG at an eighth of its size
                image.load()
        bits = decode.bit_depth(path) if high_depth and not is_mask else None
    except decode.READ_ERRORS as error:
        return ImageCheck(decode.describe_read_error(error))
    return ImageCheck(None, size, orientation, lossy, bits)


@dataclass(frozen=True)
class MaskFault:
    """Why a mask cannot be used."""

    reason: str
    image_usable: bool = False
    """Whether the image can be used without the mask, because its condition is not in doubt."""


def mask_fault(inspection: Inspection, root: Path, image: ImageCheck, files: Sequence[ImageCheck]) -> MaskFault | None:
    """Return why the mask files of a readable image cannot be used, or None if they can be used or do not exist.

    `image` is the check of the image, and `files` are the checks of the mask files. A mask that is ambiguous or marks
    an implausible part of the image does not cast doubt on the condition of a defect. A broken mask, or a mask of a
    different size, may belong to another image.
    """
    names = masks.mask_files(inspection)
    if not names:
        return None
    for name, file in zip(names, files, strict=True):
        if file.fault:
            return MaskFault(f"mask {name}: {file.fault}")
    subject, defective = f"mask {', '.join(names)}", inspection.condition != GOOD
    try:
        mask = masks.load_mask(inspection, root, image.size, image.orientation)
    except EchoError as error:
        return MaskFault(str(error), image_usable=defective and all(file.size == image.size for file in files))
    if mask is None or not mask.any():
        if not defective:
            return None
        lossy = any(file.lossy for file in files)
        note = "; in a lossy format, only pixels brighter than half count" if lossy else ""
        reason = f"{subject} marks nothing, but the condition is {inspection.condition}{note}"
        return MaskFault(reason, image_usable=True)
    if not defective:
        return MaskFault(f"{subject} marks a defect ({mask.mean():.1%} of the image) on an image labelled {GOOD}")
    fault = _inversion_fault(mask)
    return MaskFault(f"{subject} {fault}", image_usable=True) if fault else None


def _inversion_fault(mask: masks.Mask) -> str | None:
    """Return why a mask (height, width) seems to mark the background or everything, or None.

    The border distinguishes an inverted mask from a large defect, because a defect that covers most of an image rarely
    covers all of its border.
    """
    share = mask.mean()
    border = np.concatenate([mask[0], mask[-1], mask[1:-1, 0], mask[1:-1, -1]]).mean()
    if share == 1:
        return "marks the whole image, so it shows no location; mark only the defect"
    if share > MAX_SHARE and border > MAX_BORDER:
        return (
            f"marks {share:.1%} of the image and {border:.1%} of its border, so it seems inverted: inverted, it marks "
            f"{1 - share:.1%}; make the defect white and everything else black"
        )
    return None


def boxes_fault(inspection: Inspection, size: tuple[int, int]) -> str | None:
    """Return why the boxes or polygons of an image of `size` (width, height) cannot be used, or None."""
    outlines = [*inspection.boxes, *inspection.polygons]
    if not outlines:
        return None
    if inspection.condition == GOOD:
        return f"the image has {'boxes' if inspection.boxes else 'polygons'}, but it is labelled {GOOD}"
    width, height = size
    for number, outline in enumerate(outlines):
        is_box = number < len(inspection.boxes)
        what = f"box {list(outline)}" if is_box else f"the polygon at {outline[0]:g}, {outline[1]:g}"
        form = "(x0, y0, x1, y1)" if is_box else "x0, y0, x1, y1, ..."
        xs, ys = outline[::2], outline[1::2]
        x0, y0, x1, y1 = (xs[0], ys[0], xs[1], ys[1]) if is_box else (min(xs), min(ys), max(xs), max(ys))
        near = min(x0, y0) > -1 and x1 < width + 1 and y1 < height + 1  # up to a pixel outside may be rounding
        inside = near and max(0, x0) < min(x1, width) and max(0, y0) < min(y1, height)
        if not all(map(math.isfinite, outline)) or not inside:
            return f"{what} is not {form} inside the {width} x {height} pixels"
        if x1 - x0 < 1 and y1 - y0 < 1:
            return (
                f"{what} is smaller than a pixel; give {form} in pixels of the {width} x {height} image, "
                "not in fractions of it"
            )
    return None


def orientation_fault(inspection: Inspection, image: ImageCheck) -> str | None:
    """Return why a defect's boxes or polygons are ambiguous because viewers rotate the image, or None.

    If the rotation swaps width and height, the source has already inferred the right view from the stated size.
    """
    outlined = inspection.boxes or inspection.polygons
    if image.orientation == 1 or not outlined or inspection.condition == GOOD:
        return None
    if image.orientation in decode.SIDEWAYS and image.size[0] != image.size[1]:
        return None
    return (
        f"viewers rotate the image (EXIF orientation {image.orientation}), so its boxes or polygons may mean either "
        "orientation; save the image rotated and without the EXIF tag, and mark the defect there"
    )
