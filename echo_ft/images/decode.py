"""Image decoding for the whole project, with one rule for images that have more than 8 bits per pixel.

Pillow clips 16-bit grey values to 255, which turns an image white. It keeps only the high byte of 16-bit colours, which
turns images from a 12-bit camera black. This module scales both to 8 bits instead. A 16-bit file does not say how many
bits the camera used, so the scale is the smallest common bit depth (`BIT_DEPTHS`) that holds the brightest value. The
brightest value itself is not stretched to white. Two exposures of a part therefore stay different, unless one is so
dark that it fits a smaller bit depth. The build warns if the bit depths of a product differ. Transparency is dropped,
because the colours below it are what the camera recorded.

Images are turned upright according to their EXIF orientation, as viewers show them. A file with several frames is
refused unless its path names one of them, as in `stack.tif#frame=2` (`inputs.FRAME`).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile

from echo_ft.errors import EchoError
from echo_ft.inputs import MAX_BYTES, InputError, open_input, split_frame

DECODER_VERSION = "8bit-upright-colour"
"""Name of the decoding rule. Every cache key includes it, so that no cache mixes images decoded in different ways."""

READ_ERRORS = (OSError, ValueError)
"""The exceptions of `open_image` for unusable files."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""The supported image formats, by Pillow's names; JPEG includes MPO. Pillow's other readers are rarely used or tested,
and the one for EPS starts another program."""

MAX_PIXELS = 100_000_000
"""Largest allowed number of pixels. Such an image takes 300 MB in RGB, although its file may have only 20 KB."""

MAX_TEXT_HEADER = 4096
"""Length in bytes within which the header of a PPM file must end."""

HIGH_DEPTH_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N", "F"})
"""Pillow's greyscale modes with more than 8 bits per pixel."""

BITS_PER_SAMPLE = 258
"""The TIFF tag that holds the number of bits in each channel."""

PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
"""The TIFF tag for the meaning of the values, and its value for grey values that decrease towards white."""

BIT_DEPTHS = (8, 10, 12, 14, 16)
"""Common bit depths of camera images."""

READER_THREADS = 4
"""Number of threads that read images in the background. Decoding and hashing release the GIL."""


class _RangeError(ValueError):
    """Raised for values that fit no bit depth."""


@contextmanager
def open_image(file: Path | BinaryIO, any_frames: bool = False) -> Iterator[Image.Image]:
    """Open an image file, on disk or in memory, to read its header or decode it within the block.

    A path may name a frame. Raises InputError if the image has more than MAX_PIXELS pixels or no such frame, or if the
    file is larger than MAX_BYTES. Without a frame and `any_frames`, also raises it if there are several. Raises one of
    READ_ERRORS if the image is broken, and also converts the errors that Pillow raises within the block.
    """
    try:
        path, frame = split_frame(file) if isinstance(file, Path) else (file, None)
        source = open_input(path) if isinstance(path, Path) else path
        with source:
            _check_file(source)
            with Image.open(source, formats=FORMATS) as image:
                _check_pixels(image)
                if frame is not None:
                    _select_frame(image, frame)
                elif not any_frames:
                    _check_single(image)
                yield image
    except (OSError, ValueError, EchoError):
        raise
    except Image.DecompressionBombError as error:
        raise _too_large() from error
    except Exception as error:  # Pillow's readers raise many kinds of errors for broken files
        raise InputError(_broken(error)) from error


def _check_file(source: BinaryIO) -> None:
    size = source.seek(0, io.SEEK_END)
    source.seek(0)
    start = source.read(MAX_TEXT_HEADER)
    source.seek(0)
    if size > MAX_BYTES:
        raise InputError(f"the file has {size:,} bytes, more than {MAX_BYTES:,}; save it with compression or crop it")
    # Pillow (13.0.0) reads this header byte by byte, so a comment of many megabytes takes minutes.
    parts = len(re.sub(rb"#[^\r\n]*", b"", start).split())  # type, width, height and, without P1 and P4, largest value
    if re.match(rb"P[0-6fy]", start) and parts < (3 if start[1:2] in b"14" else 4) and size > len(start):
        raise InputError(f"its header has more than {MAX_TEXT_HEADER:,} bytes; save it without comments")


def _check_pixels(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise _too_large()


def _select_frame(image: Image.Image, frame: int) -> None:
    try:
        image.seek(frame)
    except EOFError as error:
        raise InputError(f"the file has no frame {frame}; choose another, where 0 is the first") from error
    _check_pixels(image)  # the pages of a TIFF file differ in size


def _check_single(image: Image.Image) -> None:
    try:
        image.seek(1)
    except EOFError:
        return
    raise InputError(
        "the file has several frames, so it is unclear which one to use; append one to its path, such as #frame=0, "
        "build with --frame 0, or save it as a PNG file"
    )


def _too_large() -> InputError:
    return InputError(f"the image has more than {MAX_PIXELS // 1_000_000} million pixels; crop it or scale it down")


def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height) of the upright image from the file header.

    Raises EchoError if the file is missing or not an image.
    """
    return size_and_orientation(path)[0]


def size_and_orientation(path: Path) -> tuple[tuple[int, int], int]:
    """Return (width, height) of the upright image and its EXIF orientation from the file header.

    Raises EchoError if the file is missing or not an image.
    """
    try:
        with open_image(path) as image:
            return upright_size(image), orientation(image)
    except READ_ERRORS as error:
        raise _unusable(path, error) from error


def load_image(path: Path, mode: str = "RGB", min_size: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image in `mode`, which is `RGB` or `L`. Raises EchoError if the file is missing or unusable.

    With `min_size` (width, height), a large JPEG may be decoded at a fraction of its size, but not below `min_size`.
    """
    try:
        return decode(path, mode, min_size)
    except READ_ERRORS as error:
        raise _unusable(path, error) from error


def decode(path: Path, mode: str = "RGB", min_size: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image like `load_image`, but raise one of READ_ERRORS on failure. `describe_read_error` explains it.

    Callers use it to report the error in their own way.
    """
    with open_image(path) as image:
        return to_upright(image, mode, min_size)


def to_upright(image: Image.Image, mode: str = "RGB", min_size: tuple[int, int] | None = None) -> Image.Image:
    """Convert an opened image, or one in memory, as `decode` converts a file. Raises Pillow's errors or InputError."""
    turn = _turn(image)
    deep = deep_values(image)
    if deep is not None:
        decoded = _eight_bits(deep).convert(mode)
    else:
        if min_size is not None:
            image.draft(mode, min_size[::-1] if turn in _SIDEWAYS else min_size)
        decoded = image.convert(mode)
    return decoded if turn is None else decoded.transpose(turn)


def describe_read_error(error: BaseException) -> str:
    """Explain in one clause why an image is unusable. `error` is one of READ_ERRORS."""
    return str(error) if isinstance(error, (_RangeError, InputError)) else _broken(error)


def _broken(error: BaseException) -> str:
    return f"the image is broken or has an unknown format ({type(error).__name__})"


def bit_depth(path: Path) -> int | None:
    """Return the bit depth from which an image is scaled to 8 bits, or None if Pillow already returns 8 bits.

    Raises one of READ_ERRORS if the file cannot be read.
    """
    with open_image(path) as image:
        deep = deep_values(image)
        return None if deep is None else _bits_needed(deep)


def is_deep(image: Image.Image) -> bool:
    """Return whether an opened but not yet decoded image has more than 8 bits per channel.

    JPEG 2000, AVIF and PPM state their bit depth, so Pillow itself scales them to 8 bits.
    """
    if image.mode in HIGH_DEPTH_MODES:
        return True
    if image.format == "TIFF":
        return image.mode in ("RGB", "RGBA", "RGBX") and max(image.tag_v2.get(BITS_PER_SAMPLE, (8,))) > 8  # type: ignore[attr-defined]
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else ()
    return image.format == "PNG" and any(";16" in str(tile.args) for tile in tiles)


def deep_values(image: Image.Image) -> NDArray[np.generic] | None:
    """Return the values (height, width) or (height, width, 3) of an opened image, or None if it has 8 bits per channel.

    Raises one of READ_ERRORS if the image is broken.
    """
    if not is_deep(image):
        return None
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # type: ignore[attr-defined]
        raise InputError("its values decrease towards white (WhiteIsZero), which Pillow ignores; save it as a PNG file")
    if image.mode in HIGH_DEPTH_MODES:
        return np.asarray(image)
    import cv2

    assert isinstance(image, ImageFile.ImageFile) and image.fp is not None
    position = image.fp.tell()
    image.fp.seek(0)
    content = np.frombuffer(image.fp.read(), np.uint8)
    image.fp.seek(position)
    # Pillow (13.0.0) keeps only 8 of the 16 bits; this also checks the file.
    high_bytes = np.asarray(image.convert("RGB"))
    if image.format == "TIFF":
        _, pages = cv2.imdecodemulti(content, cv2.IMREAD_UNCHANGED, range=(image.tell(), image.tell() + 1))
        values: Any = pages[0] if pages else None
    else:
        values = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.ndim != 3:
        raise InputError(_UNCLEAR_COLOURS)
    values = values[..., 2::-1]  # OpenCV stores blue, green, red and opacity in this order
    if values.shape != high_bytes.shape or not np.array_equal(values >> 8, high_bytes):
        raise InputError(_UNCLEAR_COLOURS)
    colours: NDArray[np.generic] = values
    return colours


_UNCLEAR_COLOURS = "Pillow and OpenCV read its 16-bit colours differently; save it as a PNG file"


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns an image upright, keyed by EXIF orientation. Orientations not listed are already upright."""

SIDEWAYS = (5, 6, 7, 8)
"""The EXIF orientations that swap width and height."""

_SIDEWAYS = frozenset(TURNS[value] for value in SIDEWAYS)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image, from 1 (upright) to 8. Missing and invalid values count as 1."""
    try:
        # PngImageFile.getexif decodes all pixels to find EXIF data that follows them (Pillow 13.0.0). The method of the
        # base class reads only the data before the pixels, as browsers do.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF data raises many kinds of errors, and viewers ignore it
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn(image: Image.Image) -> Image.Transpose | None:
    # Pillow (13.0.0) already turns TIFF files upright and swaps their size.
    return None if image.format == "TIFF" else TURNS.get(orientation(image))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) of an opened image as viewers show it."""
    return image.size[::-1] if _turn(image) in _SIDEWAYS else image.size


def _bits_needed(values: NDArray[np.generic]) -> int:
    """Return the smallest bit depth that can hold all values, or 1 for floats from 0 to 1."""
    low, high = values.min(), values.max()
    if np.issubdtype(values.dtype, np.floating) and low >= 0 and high <= 1:
        return 1
    if low >= 0 and high < 2 ** BIT_DEPTHS[-1]:  # this is also false for NaN
        return next(bits for bits in BIT_DEPTHS if high < 2**bits)
    raise _RangeError(
        f"its values range from {low:g} to {high:g}, which is neither 0 to 1 nor an unsigned range of "
        f"{BIT_DEPTHS[0]} to {BIT_DEPTHS[-1]} bits; save all images with 8 or 16 bits per pixel and the same scale"
    )


def _eight_bits(values: NDArray[np.generic]) -> Image.Image:
    top = 2 ** _bits_needed(values) - 1
    if np.issubdtype(values.dtype, np.floating):
        return Image.fromarray(np.rint(np.minimum(values * (255 / top), 255)).astype(np.uint8))
    table = np.rint(np.arange(top + 1) * (255 / top)).astype(np.uint8)
    return Image.fromarray(table[values])


def _unusable(path: Path, error: BaseException) -> EchoError:
    if isinstance(error, FileNotFoundError):
        return EchoError(f"there is no image {path}; restore it or rebuild the dataset")
    return EchoError(f"image {path} cannot be read: {describe_read_error(error)}; replace it and rebuild the dataset")
