"""The images of an inspection: files, folders and images in memory, copied so that nothing can change them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from echo_ft.errors import EchoError
from echo_ft.files import list_folder
from echo_ft.images.decode import (
    HIGH_DEPTH_MODES,
    READ_ERRORS,
    bit_depth,
    decode,
    describe_read_error,
    is_deep,
    to_upright,
)
from echo_ft.inputs import image_file, read_bytes
from echo_ft.records import Case
from echo_ft.terminal import LOGGER

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Suffixes of the files that count as images in a folder."""

ImageInput = str | Path | Image.Image | NDArray[Any]
"""An image file, a Pillow image, or an array (height, width, 3) or (height, width) of uint8."""


def list_images(folder: Path) -> list[Path]:
    """Return the image files directly in a folder, sorted by name, without hidden and system files.

    Raises EchoError if there are none.
    """
    if not folder.is_dir():
        raise EchoError(f"there is no folder {folder}; give a folder of images")
    found = [path for path in list_folder(folder) if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if not found:
        raise EchoError(f"{folder} has no image file ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def snapshot(image: ImageInput, folder: Path) -> Path:
    """Copy an image into `folder`, under the hash of its content.

    The engine remembers images by path, and a camera may write its next image to the same file. Raises EchoError if the
    image cannot be read.
    """
    if isinstance(image, str | Path):
        try:
            content = read_bytes(image_file(Path(image)))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise EchoError(f"image {image} cannot be opened ({reason}); check the path") from error
    else:
        content = _png(image)
    path = (
        folder
        / f"{hashlib.sha256(content).hexdigest()}{Path(image).suffix if isinstance(image, str | Path) else '.png'}"
    )
    image_file(path).write_bytes(content)
    try:
        decode(path)
    except READ_ERRORS as error:
        raise EchoError(f"image {image} cannot be read: {describe_read_error(error)}; replace it") from error
    return path


def snapshots(images: Sequence[ImageInput], folder: Path) -> tuple[list[Path], EchoError | None]:
    """Copy images as `snapshot` does, up to the first one that cannot be read. Return the copies, and its error."""
    copies: list[Path] = []
    try:
        for image in images:
            copies.append(snapshot(image, folder))
    except EchoError as error:
        return copies, error
    return copies, None


class ScaleCheck:
    """Warns about images of more than 8 bits that are scaled differently from their normal images, once per product."""

    def __init__(self) -> None:
        self._depths: dict[Path, int | None] = {}
        """The bit depths of the normal images that were compared."""
        self._warned: set[tuple[str, str]] = set()

    def check(self, name: str, case: Case, root: Path) -> None:
        """Compare the query of a case, which warnings call `name`, with its references below the folder `root`."""
        key = case.dataset, case.product
        bits = None if key in self._warned else _depth(Path(case.seen.query))
        if bits is None:
            return
        normals = [root / reference.image for reference in case.seen.references]
        self._depths |= {path: _depth(path) for path in normals if path not in self._depths}
        others = sorted({depth for path in normals if (depth := self._depths[path]) is not None})
        if others and bits not in others:
            self._warned.add(key)
            LOGGER.warning(
                f"the image {name} is scaled to 8 bits from {bits} bits, but the most similar normal images of "
                f"{case.product} from {' and '.join(map(str, others))}, each from the smallest depth that holds its "
                "brightest pixel; if one camera took them, convert all images to 8 bits with the same scale and build "
                "again (further images of this product are not named)"
            )


def _depth(path: Path) -> int | None:
    try:
        return bit_depth(path)
    except READ_ERRORS:  # the experts report it
        return None


def _png(image: Image.Image | NDArray[Any]) -> bytes:
    """Return an image in memory as a PNG file. Raises EchoError if it is unusable, or an array that is not uint8."""
    if isinstance(image, Image.Image):
        if is_deep(image) and image.mode not in HIGH_DEPTH_MODES:
            raise EchoError("Pillow keeps only 8 of the 16 bits of this image's colours; pass the path of the file")
        try:
            image = to_upright(image)
        except Exception as error:  # Pillow's readers raise many kinds of errors for broken files
            raise EchoError(f"the Pillow image cannot be read: {describe_read_error(error)}; replace it") from error
    elif image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise EchoError(
            f"an array of {image.dtype} with shape {image.shape} is not an image; pass uint8 values of shape "
            "(height, width, 3) in RGB, or (height, width)"
        )
    else:
        image = Image.fromarray(image).convert("RGB")
    if 0 in image.size:
        raise EchoError(f"the image has {image.width} x {image.height} pixels; pass an image with pixels")
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()
