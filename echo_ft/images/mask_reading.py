"""Read a mask file the way an image viewer shows it, to find which pixels mark the defect.

Every pixel that is not black marks the defect, whether the file stores grey values, colours, palette entries or bits.
Label maps and soft edges need no special rule. Three kinds of files are treated differently:

- Lossy files have grey noise around every edge, so only pixels of more than half brightness count.
- On a transparent layer, the opaque pixels are the mask, because people may paint the defect in any colour there.
- A file without black has a background of another value. It is recognised only if the file has two values and one of
  them covers the whole border.

A file is refused if its readings disagree. The message gives the fraction of the image that each reading marks.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from echo_ft.errors import EchoError
from echo_ft.images.decode import READ_ERRORS, deep_values, open_image, orientation
from echo_ft.inputs import InputError

Mask = NDArray[np.bool_]

LOSSY_FORMATS = frozenset({"JPEG", "MPO", "JPEG2000", "AVIF"})
"""Pillow's names for formats that alter pixels. WebP and TIFF do so only in some files."""

SOFT_RATIO = 2.0
"""A mask is too soft if its widest reading marks more than this many times the area of its narrowest."""

SOFT_SHARE = 0.01
"""Readings that differ by at most this fraction of the image count as equal. For the magnetic tiles, readings that
differ by the factor SOFT_RATIO differ by at most 0.0003 of the image."""

MAX_LABELS = 16
"""With at most this many grey values, a file is a label map. Its values identify regions and do not mean brightness."""

MIN_CONTRAST = 32
"""Two values above MAX_LABELS count as background and defect if they differ by at least this much."""

MAX_HIDDEN = 0.1
"""Fraction of the opaque pixels that may be black, as at the edge of a brush stroke."""


def read_mask_file(path: Path, name: str) -> Mask:
    """Return the mask (height, width) of a file. Error messages refer to the file as `name`.

    Raises EchoError if the file cannot be read, and also as `marked_pixels` does.
    """
    try:
        with open_image(path) as image:
            return marked_pixels(image, f"mask {name}")
    except READ_ERRORS as error:
        reason = str(error) if isinstance(error, InputError) else type(error).__name__
        raise EchoError(f"mask {name} cannot be read ({reason}); repair the file or remove its row") from error


def marked_pixels(image: Image.Image, what: str) -> Mask:
    """Return the mask (height, width) of an opened image. Error messages refer to the image as `what`.

    Raises EchoError if viewers rotate the image, or if it can be read in two ways. Raises one of READ_ERRORS if it is
    broken.
    """
    if orientation(image) != 1:
        raise EchoError(
            f"{what} has the EXIF orientation {orientation(image)}, so viewers rotate it; save it rotated and without "
            "the EXIF tag"
        )
    lossy = is_lossy(image)
    values, alpha = _values(image, what)
    marks: Mask = values > 127 if lossy else values != 0
    if image.mode == "P" and (marks.all() or not marks.any()):
        indexes = np.asarray(image)
        if indexes.min() != indexes.max():
            raise _two_readings(what, "colours", marks, "palette indexes", indexes != 0)
    if alpha is None or alpha.all():
        _check_softness(values, (63, 191) if lossy else None, what, "brighter")
        return _on_ground(values, what) if marks.all() and not lossy and values.min() != values.max() else marks
    opaque: Mask = alpha > 0
    hidden = opaque & ~marks
    says_nothing = marks.all() or not marks.any()  # the pixels are all marked or all unmarked
    if says_nothing or (opaque.any() and hidden.sum() <= MAX_HIDDEN * opaque.sum()):
        _check_softness(alpha, None, what, "more opaque")
        return opaque
    raise _two_readings(what, "colours", marks, "opaque part", opaque)


def is_lossy(image: Image.Image) -> bool:
    """Return whether the format of an opened but not yet decoded image alters pixels."""
    if image.format == "TIFF":
        return "jpeg" in str(image.info.get("compression"))
    return image.format in LOSSY_FORMATS or (image.format == "WEBP" and not _is_lossless_webp(image))


def _is_lossless_webp(image: Image.Image) -> bool:
    # Pillow (13.0.0) does not report this. In the file, a VP8L chunk holds a lossless picture and a VP8 chunk a lossy
    # one. Other chunks, such as a colour profile, may precede it
    # (https://developers.google.com/speed/webp/docs/riff_container).
    if not isinstance(image, ImageFile.ImageFile) or image.fp is None:
        return False
    image.fp.seek(12)
    while len(header := image.fp.read(8)) == 8:
        name, size = header[:4], int.from_bytes(header[4:], "little")
        if name in (b"VP8L", b"VP8 "):
            return name == b"VP8L"
        # A frame of an animation holds its own chunks, which follow 16 bytes.
        image.fp.seek(16 if name == b"ANMF" else size + size % 2, io.SEEK_CUR)
    return False


def _values(image: Image.Image, what: str) -> tuple[NDArray[Any], NDArray[np.uint8] | None]:
    """Return the grey values, or the brightest channel, and the opacity, both (height, width).

    The opacity is None for an image without transparency. Raises EchoError for NaN and infinity.
    """
    deep = deep_values(image)
    if deep is not None and deep.ndim == 2:
        if not np.isfinite(deep).all():
            raise EchoError(f"{what} has values that are not finite numbers; save it with 0 outside the defect")
        return deep, None
    if deep is not None and not image.has_transparency_data:
        return deep.max(axis=2), None
    if image.has_transparency_data:
        pixels = np.asarray(image.convert("RGBA"))
        return pixels[..., :3].max(axis=2), pixels[..., 3]
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L")), None
    return np.asarray(image.convert("RGB")).max(axis=2), None


def _on_ground(values: NDArray[Any], what: str) -> Mask:
    """For a mask that contains no black, return the pixels that differ from its background.

    The background is taken to be the value at the border.

    Raises EchoError if there are more than two values, or if the two are too close to each other.
    """
    border = np.concatenate([values[0], values[-1], values[1:-1, 0], values[1:-1, -1]])
    counted, counts = np.unique(border, return_counts=True)
    ground = counted[counts.argmax()]
    found: Mask = values != ground
    low, high = np.unique(values)[[0, -1]]
    two = bool(((values == low) | (values == high)).all())
    if two and len(counted) == 1 and (high <= MAX_LABELS or high - low >= MIN_CONTRAST):
        return found
    raise _two_readings(what, "pixels that are not black", values != 0, f"pixels unlike the ground ({ground:g})", found)


def _check_softness(values: NDArray[Any], thresholds: tuple[int, int] | None, what: str, word: str) -> None:
    """Raise EchoError if the pixels that a mask marks depend on the threshold, as in a heat map.

    The default thresholds are zero and half of the highest value. With these, a file with few values, or with regions
    that end abruptly, is accepted as a label map. `word`, such as `brighter`, compares values in the message.
    """
    low, high = thresholds or (0, values.max() / 2)
    wide, narrow = (float((values > threshold).mean()) for threshold in (low, high))
    if wide <= SOFT_RATIO * narrow or wide - narrow <= SOFT_SHARE:
        return
    if thresholds is None and (len(np.unique(values)) <= MAX_LABELS or _ends_abruptly(values, high)):
        return
    raise EchoError(
        f"{what} is too soft: {wide:.1%} of the image is {word} than {low} but only {narrow:.1%} is {word} than "
        f"{high:g}; draw it in black and white only, and save it as PNG"
    )


def _ends_abruptly(values: NDArray[Any], high: float) -> bool:
    """Return whether most pixels just outside the regions above `high` are zero.

    The labels of single defects end abruptly like this, whereas heat maps fade.
    """
    beyond = [
        np.minimum(one, other)[(one > high) != (other > high)]
        for one, other in ((values[1:], values[:-1]), (values[:, 1:], values[:, :-1]))
    ]
    return bool((np.concatenate(beyond) == 0).mean() > 0.5)


def _two_readings(what: str, first: str, marks: Mask, second: str, others: Mask) -> EchoError:
    return EchoError(
        f"{what} can be read in two ways: its {first} mark {marks.mean():.1%} of the image and its {second} "
        f"{others.mean():.1%}; save it as white on the defect and black elsewhere, without transparency or palette"
    )
