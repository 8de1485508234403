"""Image files as every part of the project sees them: one decoder, and one rule for more than 8 bits a pixel.

Pillow clips 16-bit grey to 255, which turns a photograph white. Here such grey values are scaled to 8 bits by the
smallest usual depth of a camera (`DEPTHS`) that holds the image's brightest pixel, as a file of 16 bits does not say
how many of them the camera filled. The image's own maximum is not stretched to white: two exposures of a part stay two
exposures, unless one is so dark that it fits a smaller depth; the build warns where the depths of a product differ.
Transparency is dropped: what lies under it is what the camera saw.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from echo_ft.errors import EchoError

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
"""What Pillow's readers raise on broken files."""

WIDE = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N", "F"})
"""Pillow's modes of grey with more than 8 bits a pixel; of colours it keeps the upper 8 bits by itself."""

DEPTHS = (8, 10, 12, 14, 16)
"""Bits a pixel that cameras deliver."""

READERS = 4
"""Threads that read images for a process that also has other work: decoding and hashing let go of the interpreter."""


class _RangeError(ValueError):
    """Grey values that no depth holds."""


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) from the file's header. Raises EchoError where the file is missing or no image."""
    try:
        with Image.open(path) as image:
            return image.size
    except UNREADABLE as error:
        raise _unusable(path, error) from error


def load_image(path: Path, mode: str = "RGB", least: tuple[int, int] | None = None) -> Image.Image:
    """The decoded image in `mode`, `RGB` or `L`. Raises EchoError where the file is missing or cannot be used.

    With `least` (width, height), a large JPEG may come smaller, at a fraction of its size that is not below that.
    """
    try:
        return decode(path, mode, least)
    except UNREADABLE as error:
        raise _unusable(path, error) from error


def decode(path: Path, mode: str = "RGB", least: tuple[int, int] | None = None) -> Image.Image:
    """As `load_image`, for callers with an error of their own: raises one of UNREADABLE, which `fault` tells."""
    with Image.open(path) as image:
        if image.mode in WIDE:
            return _eight_bits(np.asarray(image)).convert(mode)
        if least is not None:
            image.draft(mode, least)
        return image.convert(mode)


def fault(error: BaseException) -> str:
    """Why an image cannot be used, from what its reader raised."""
    if isinstance(error, Image.DecompressionBombError):
        return "the image has too many pixels"
    if isinstance(error, _RangeError):
        return str(error)
    return f"the image is broken or of an unknown format ({type(error).__name__})"


def depth(path: Path) -> int | None:
    """Bits a pixel from which a readable image is scaled to 8; None where Pillow gives 8 bits by itself."""
    with Image.open(path) as image:
        return _depth(np.asarray(image)) if image.mode in WIDE else None


def _depth(values: NDArray[np.generic]) -> int:
    """Bits that hold all grey values; 1 for floats from 0 to 1."""
    low, high = values.min(), values.max()
    if np.issubdtype(values.dtype, np.floating) and low >= 0 and high <= 1:
        return 1
    if low >= 0 and high < 2 ** DEPTHS[-1]:  # false for NaN too
        return next(bits for bits in DEPTHS if high < 2**bits)
    raise _RangeError(
        f"its grey values reach from {low:g} to {high:g}, neither 0 to 1 nor {DEPTHS[0]} to {DEPTHS[-1]} bits; "
        "save all photographs with 8 or 16 bits a pixel, by one scale"
    )


def _eight_bits(values: NDArray[np.generic]) -> Image.Image:
    top = 2 ** _depth(values) - 1
    if np.issubdtype(values.dtype, np.floating):
        return Image.fromarray(np.rint(np.minimum(values * (255 / top), 255)).astype(np.uint8))
    table = np.rint(np.arange(top + 1) * (255 / top)).astype(np.uint8)
    return Image.fromarray(table[values])


def _unusable(path: Path, error: BaseException) -> EchoError:
    if isinstance(error, FileNotFoundError):
        return EchoError(f"there is no image {path}; put it back or build the dataset again")
    return EchoError(f"image {path} cannot be read: {fault(error)}; replace it and build the dataset again")
