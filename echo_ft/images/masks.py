"""What a defect's mask says in words: where it is, how large, of what shape, and how it differs from its reference.

Masks are boolean arrays (height, width), True where the part is defective; grey images are float32 arrays
(height, width) in 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from echo_ft.errors import EchoError
from echo_ft.images.decode import UNREADABLE, load_image

Mask = NDArray[np.bool_]
Grey = NDArray[np.float32]

PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
"""The cells of the 3 x 3 grid, row by row."""

SPREAD = "across much of the image"
"""The place of a region that no single cell tells."""

SPREAD_CELLS = 5
"""A region is spread where it lies in at least so many of the nine cells."""


class Marked(Protocol):
    """A record that says where a defect is: an `Inspection` or a `Truth`."""

    @property
    def mask(self) -> str | None: ...
    @property
    def masks(self) -> tuple[str, ...]: ...
    @property
    def polygons(self) -> tuple[tuple[float, ...], ...]: ...
    @property
    def boxes(self) -> tuple[tuple[float, float, float, float], ...]: ...


@dataclass(frozen=True)
class Region:
    """What a mask marks."""

    place: str
    """One of PLACES, or SPREAD."""
    cells: tuple[str, ...]
    """Every cell of the grid in which any of it lies."""
    extent: float
    """Share of the image, 0..1."""
    shape: str
    """`elongated`, `round`, `irregular` or `scattered` (several pieces, none of which is most of it)."""
    count: int
    """Connected pieces (8-connectivity)."""

    @property
    def size(self) -> str:
        """The extent in a word: `tiny` under 0.3 % of the image, `small` under 2 %, `large` up to 15 %, then `huge`."""
        if self.extent < 0.003:
            return "tiny"
        if self.extent < 0.02:
            return "small"
        return "large" if self.extent <= 0.15 else "huge"


def at(place: str) -> str:
    """The place as it stands in a sentence: `at the top left`, `in the center`, `across much of the image`."""
    if place == SPREAD:
        return place
    return f"in the {place}" if place == "center" else f"at the {place}"


def measure(mask: Mask) -> Region | None:
    """What `mask` (height, width) marks, or None where it marks nothing.

    The place is the cell of the 3 x 3 grid that holds the centroid; where less than a fifth of the region lies in it
    (a ring, several pieces), the cell that holds most; `SPREAD` where five cells hold at least a twentieth each.
    """
    total = int(mask.sum())
    if total == 0:
        return None
    height, width = mask.shape
    ys, xs = np.nonzero(mask)
    shares = np.bincount((ys * 3 // height) * 3 + xs * 3 // width, minlength=9) / total
    centroid = int(3 * (ys.mean() + 0.5) / height) * 3 + int(3 * (xs.mean() + 0.5) / width)
    place = PLACES[centroid if shares[centroid] >= 0.2 else int(shares.argmax())]
    if (shares >= 0.05).sum() >= SPREAD_CELLS:
        place = SPREAD
    shape, count = _shape(mask, total)
    cells = tuple(cell for cell, share in zip(PLACES, shares, strict=True) if share > 0)
    return Region(place, cells, total / mask.size, shape, count)


def _shape(mask: Mask, total: int) -> tuple[str, int]:
    from skimage.measure import label, regionprops

    pieces = regionprops(label(mask, connectivity=2))
    largest = max(pieces, key=lambda piece: piece.area)
    if largest.area < 0.6 * total:
        return "scattered", len(pieces)
    # An ellipse three times as long as wide has eccentricity 0.94.
    if largest.eccentricity > 0.94:
        return "elongated", len(pieces)
    # Digital discs have a solidity near 1; the hull of a few pixels says nothing.
    solid = largest.area < 12 or largest.solidity > 0.85
    return ("round" if solid and largest.eccentricity < 0.8 else "irregular"), len(pieces)


def mask_files(marked: Marked) -> tuple[str, ...]:
    """The image files that are the mask of a record, if any: what one of them marks counts."""
    return marked.masks if marked.mask is None else (marked.mask, *marked.masks)


def is_marked(marked: Marked) -> bool:
    """Whether a record says where its defect is."""
    return bool(mask_files(marked) or marked.polygons or marked.boxes)


def load_mask(marked: Marked, root: Path, size: tuple[int, int]) -> Mask | None:
    """The mask of an inspection, or of a case's truth, as (height, width); None where it says nothing about the place.

    `size` is (width, height) of the photograph in pixels. True is where any of the mask images is not black (of a JPEG:
    brighter than half); without a mask image, inside any polygon or box. Raises EchoError where a mask cannot be read
    or has another size than the photograph, and where a polygon or box has no pixel in it.
    """
    files = mask_files(marked)
    if files:
        return np.logical_or.reduce([_read_mask(root, name, size) for name in files])
    if not is_marked(marked):
        return None
    return fill_polygons(marked.polygons, size) | fill_boxes(marked.boxes, size)


def _read_mask(root: Path, name: str, size: tuple[int, int]) -> Mask:
    values = _marks(root / name, name)
    width, height = size
    if values.shape != (height, width):
        found = f"{values.shape[1]} x {values.shape[0]}"
        raise EchoError(
            f"mask {name} has {found} pixels, its photograph {width} x {height}; "
            "use the mask that was made for this photograph"
        )
    return values


def _marks(path: Path, name: str) -> Mask:
    try:
        with Image.open(path) as image:
            # Pixels as stored: a palette of one colour, or values 0 and 1 alone, still mark something.
            values, stored = np.asarray(image), image.format != "JPEG"  # which leaves greys around what it compresses
            if image.mode in ("RGBA", "LA"):
                values = values[..., :-1]
    except UNREADABLE as error:
        raise EchoError(
            f"mask {name} cannot be read ({type(error).__name__}); repair the file or drop its row"
        ) from error
    marks: Mask = np.asarray(values != 0 if stored else values > 127)
    return marks if marks.ndim == 2 else np.asarray(marks.any(axis=-1))


def fill_polygons(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> Mask:
    """A mask (height, width) with the polygons (x0, y0, x1, y1, ...) filled; `size` is (width, height), all in pixels.

    Their outlines count. Raises EchoError where a polygon has no pixel in the image.
    """
    width, height = size
    image = Image.new("L", size)
    draw = ImageDraw.Draw(image)
    for polygon in polygons:
        xs, ys = polygon[::2], polygon[1::2]
        if max(xs) < 0 or min(xs) >= width or max(ys) < 0 or min(ys) >= height:
            raise EchoError(
                f"the polygon at {xs[0]:g}, {ys[0]:g} has no pixel of the {width} x {height} photograph; "
                "polygons are x0, y0, x1, y1, ... in pixels"
            )
        draw.polygon(list(polygon), fill=1, outline=1)
    return np.asarray(image) > 0


def fill_boxes(boxes: Sequence[tuple[float, float, float, float]], size: tuple[int, int]) -> Mask:
    """A mask (height, width) with the boxes (x0, y0, x1, y1) filled; `size` is (width, height), all in pixels.

    Every pixel that a box touches counts. Raises EchoError where a box has no pixel in the image.
    """
    width, height = size
    mask = np.zeros((height, width), dtype=np.bool_)
    for box in boxes:
        x0, y0, x1, y1 = box
        rows = slice(max(0, int(np.floor(y0))), max(0, int(np.ceil(y1))))
        columns = slice(max(0, int(np.floor(x0))), max(0, int(np.ceil(x1))))
        if mask[rows, columns].size == 0:
            raise EchoError(
                f"box {list(box)} has no pixel of the {width} x {height} photograph; boxes are x0, y0, x1, y1 in pixels"
            )
        mask[rows, columns] = True
    return mask


def load_grey(path: Path, size: tuple[int, int]) -> Grey:
    """The image in grey, resized to `size` (width, height): float32 (height, width) in 0..1.

    Raises EchoError where it cannot be read.
    """
    # Half the size at least: a large JPEG then decodes at a fraction of its own.
    grey = load_image(path, "L", (2 * size[0], 2 * size[1])).resize(size, Image.Resampling.BOX)
    return np.asarray(grey, dtype=np.float32) / np.float32(255)


def resize_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """The mask at another `size` (width, height): True wherever any of it falls, so that small defects stay."""
    height, width = mask.shape
    small = np.zeros((size[1], size[0]), dtype=np.bool_)
    ys, xs = np.nonzero(mask)
    small[ys * size[1] // height, xs * size[0] // width] = True
    return small


def misfit(query: Grey, reference: Grey, mask: Mask | None) -> float:
    """Mean absolute grey difference outside the mask, 0..1; over all pixels where the mask leaves none."""
    difference = np.abs(query - reference)
    if mask is None or mask.all():
        return float(difference.mean())
    return float(difference[~mask].mean())


def contrast(query: Grey, mask: Mask, reference: Grey | None = None) -> float:
    """How much brighter the region is than it should be, -1..1: against the reference at the same place, if any.

    Each image is first centred on its own median outside the region, so that two exposures compare.
    """
    if mask.all() or not mask.any():
        return 0.0
    inside = float(query[mask].mean() - np.median(query[~mask]))
    if reference is None:
        return inside
    return inside - float(reference[mask].mean() - np.median(reference[~mask]))


def tone(value: float) -> str:
    """The word for a contrast: `dark` below -0.06, `bright` above 0.06, `faint` between."""
    if value < -0.06:
        return "dark"
    return "bright" if value > 0.06 else "faint"
