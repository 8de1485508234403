"""Defect masks: loading, filling, and measuring a defect's location, size, shape and contrast with the reference.

Masks are boolean arrays (height, width) that are True on the defect. Grey images are float32 arrays (height, width)
from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from echo_ft.errors import EchoError
from echo_ft.images.decode import SIDEWAYS, TURNS, load_image
from echo_ft.images.mask_reading import Mask, read_mask_file

Grey = NDArray[np.float32]

PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
"""The cells of the 3 x 3 grid, row by row."""

SPREAD = "across much of the image"
"""The location of a region that no single cell describes."""

MIN_SPREAD_CELLS = 5
"""A region is spread if it covers at least this many of the nine cells."""


class Marked(Protocol):
    """A record that may mark a defect: an `Inspection` or a `Truth`."""

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
    """The measured properties of a mask."""

    place: str
    """One of PLACES, or SPREAD."""
    cells: tuple[str, ...]
    """All cells of the grid that the mask touches."""
    extent: float
    """Fraction of the image area, from 0 to 1."""
    shape: str
    """`elongated`, `round`, `irregular`, or `scattered` if no piece covers most of the area."""
    count: int
    """Number of connected pieces (8-connectivity)."""

    @property
    def size(self) -> str:
        """The extent as a word: `tiny` below 0.3% of the image, `small` below 2%, `large` up to 15%, then `huge`."""
        if self.extent < 0.003:
            return "tiny"
        if self.extent < 0.02:
            return "small"
        return "large" if self.extent <= 0.15 else "huge"


def location_phrase(place: str) -> str:
    """Return the phrase for a place, such as `at the top left`, `in the center` or `across much of the image`."""
    if place == SPREAD:
        return place
    return f"in the {place}" if place == "center" else f"at the {place}"


def measure(mask: Mask) -> Region | None:
    """Measure a mask (height, width). Returns None for an empty mask.

    The place is `SPREAD` if five cells of the 3 x 3 grid each contain at least a twentieth of the region. Otherwise it
    is the cell of the centroid. If that cell contains less than a fifth of the region, as for a ring or several pieces,
    the cell that contains the most is used.
    """
    total = int(mask.sum())
    if total == 0:
        return None
    height, width = mask.shape
    ys, xs = np.nonzero(mask)
    shares = np.bincount((ys * 3 // height) * 3 + xs * 3 // width, minlength=9) / total
    centroid = int(3 * (ys.mean() + 0.5) / height) * 3 + int(3 * (xs.mean() + 0.5) / width)
    place = PLACES[centroid if shares[centroid] >= 0.2 else int(shares.argmax())]
    if (shares >= 0.05).sum() >= MIN_SPREAD_CELLS:
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
    # An ellipse with an aspect ratio of 3 has an eccentricity of 0.94.
    if largest.eccentricity > 0.94:
        return "elongated", len(pieces)
    # Digital discs have a solidity near 1. For a few pixels, the convex hull is meaningless.
    solid = largest.area < 12 or largest.solidity > 0.85
    return ("round" if solid and largest.eccentricity < 0.8 else "irregular"), len(pieces)


def mask_files(marked: Marked) -> tuple[str, ...]:
    """Return the mask files of a record, if any. Together they form one mask."""
    return marked.masks if marked.mask is None else (marked.mask, *marked.masks)


def is_marked(marked: Marked) -> bool:
    """Return whether a record marks a defect with a mask, a polygon or a box."""
    return bool(mask_files(marked) or marked.polygons or marked.boxes)


def load_mask(marked: Marked, root: Path, size: tuple[int, int], orientation: int = 1) -> Mask | None:
    """Load the mask (height, width) of an inspection or a case's truth. Returns None if it marks nothing.

    `size` is (width, height) of the upright image in pixels, and `orientation` its EXIF orientation. The mask is the
    union of the mask files as `mask_reading` reads them. They are turned upright if their size shows that they were
    drawn on the image as stored. Without mask files, the mask is True inside any polygon or box; records store these
    for the upright image. Raises EchoError if a mask is ambiguous or differs in size from the image, or if a polygon or
    box lies outside the image.
    """
    files = mask_files(marked)
    if files:
        return np.logical_or.reduce([_read_mask(root, name, size, orientation) for name in files])
    if not is_marked(marked):
        return None
    return fill_polygons(marked.polygons, size) | fill_boxes(marked.boxes, size)


def _read_mask(root: Path, name: str, size: tuple[int, int], orientation: int) -> Mask:
    marks = read_mask_file(root / name, name)
    width, height = size
    if orientation != 1 and marks.any() and (orientation not in SIDEWAYS or width == height):
        shown, stored = measure(marks), measure(_upright(marks, orientation))
        if shown is not None and stored is not None and marks.shape == (height, width):
            raise EchoError(
                f"viewers rotate the image (EXIF orientation {orientation}), and mask {name} may be drawn on either "
                f"view: it marks {location_phrase(shown.place)} of the rotated one or {location_phrase(stored.place)}; "
                "save the image rotated and without the EXIF tag, and mark the defect there"
            )
    if orientation in SIDEWAYS and marks.shape == (width, height):
        marks = _upright(marks, orientation)
    if marks.shape != (height, width):
        found = f"{marks.shape[1]} x {marks.shape[0]}"
        raise EchoError(
            f"mask {name} has {found} pixels but its image has {width} x {height}; "
            "use the mask that belongs to this image"
        )
    return marks


def _upright(marks: Mask, orientation: int) -> Mask:
    turned: Mask = np.asarray(Image.fromarray(marks).transpose(TURNS[orientation]))
    return turned


def fill_polygons(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> Mask:
    """Return a mask (height, width) with the polygons (x0, y0, x1, y1, ...) filled, including their outlines.

    `size` is (width, height). All values are in pixels. Raises EchoError if a polygon lies outside the image.
    """
    width, height = size
    image = Image.new("L", size)
    draw = ImageDraw.Draw(image)
    for polygon in polygons:
        xs, ys = polygon[::2], polygon[1::2]
        if max(xs) < 0 or min(xs) >= width or max(ys) < 0 or min(ys) >= height:
            raise EchoError(
                f"the polygon at {xs[0]:g}, {ys[0]:g} lies outside the {width} x {height} image; "
                "write polygons as x0, y0, x1, y1, ... in pixels"
            )
        draw.polygon(list(polygon), fill=1, outline=1)
    return np.asarray(image) > 0


def fill_boxes(boxes: Sequence[tuple[float, float, float, float]], size: tuple[int, int]) -> Mask:
    """Return a mask (height, width) with the boxes (x0, y0, x1, y1) filled, including partly covered pixels.

    `size` is (width, height). All values are in pixels. Raises EchoError if a box lies outside the image.
    """
    width, height = size
    mask = np.zeros((height, width), dtype=np.bool_)
    for box in boxes:
        x0, y0, x1, y1 = covered_pixels(box, size)
        mask[y0:y1, x0:x1] = True
    return mask


def covered_pixels(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the box (x0, y0, x1, y1) of all pixels that a box covers at least partly, in an image (width, height).

    Raises EchoError if the box lies outside the image.
    """
    width, height = size
    x0, y0 = (max(0, math.floor(value)) for value in box[:2])
    x1, y1 = min(width, math.ceil(box[2])), min(height, math.ceil(box[3]))
    if x0 >= x1 or y0 >= y1:
        raise EchoError(
            f"box {list(box)} lies outside the {width} x {height} image; write boxes as x0, y0, x1, y1 in pixels"
        )
    return x0, y0, x1, y1


def load_grey(path: Path, size: tuple[int, int]) -> Grey:
    """Load an image in greyscale, resized to `size` (width, height), as float32 (height, width) from 0 to 1.

    Raises EchoError if the image cannot be read.
    """
    # A large JPEG decodes faster at a fraction of its size. Twice the target size is enough.
    grey = load_image(path, "L", (2 * size[0], 2 * size[1])).resize(size, Image.Resampling.BOX)
    return np.asarray(grey, dtype=np.float32) / np.float32(255)


def resize_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """Resize a mask to `size` (width, height). Pixels that touch the mask are True, so small defects remain.

    An enlarged mask repeats the nearest pixels, as an enlarged image does.
    """
    for axis, length in enumerate((size[1], size[0])):
        if length > mask.shape[axis]:
            mask = mask.take((2 * np.arange(length) + 1) * mask.shape[axis] // (2 * length), axis)
    height, width = mask.shape
    small = np.zeros((size[1], size[0]), dtype=np.bool_)
    ys, xs = np.nonzero(mask)
    small[ys * size[1] // height, xs * size[0] // width] = True
    return small


def outline_path(mask: Mask) -> str:
    """Return the borders of a mask (height, width) as an SVG path in pixels, one closed line per region or hole."""
    from skimage.measure import approximate_polygon, find_contours

    lines = []
    for contour in find_contours(np.pad(mask, 1).astype(float), 0.5):  # The padding closes lines at the image border.
        # Contours run through pixel centres, but whole numbers in the SVG path are pixel corners.
        points = approximate_polygon(contour, 0.4)[:-1] - 0.5
        lines.append("M" + "L".join(f"{x:.1f} {y:.1f}" for y, x in points) + "Z")
    return "".join(lines)


def misfit(query: Grey, reference: Grey, mask: Mask | None) -> float:
    """Return the mean absolute grey difference outside the mask, from 0 to 1.

    If there is no mask, or if it covers the whole image, all pixels count. All arrays are (height, width).
    """
    difference = np.abs(query - reference)
    if mask is None or mask.all():
        return float(difference.mean())
    return float(difference[~mask].mean())


def contrast(query: Grey, mask: Mask, reference: Grey | None = None) -> float:
    """Return how much brighter the masked region is than its surroundings, from -1 to 1. Arrays are (height, width).

    If a reference is given, its contrast in the same region is subtracted. Each image is compared with its own median
    outside the region, so differences in exposure cancel out.
    """
    if mask.all() or not mask.any():
        return 0.0
    inside = float(query[mask].mean() - np.median(query[~mask]))
    if reference is None:
        return inside
    return inside - float(reference[mask].mean() - np.median(reference[~mask]))


def tone(value: float) -> str:
    """Return the word for a contrast: `dark` below -0.06, `bright` above 0.06, `faint` in between."""
    if value < -0.06:
        return "dark"
    return "bright" if value > 0.06 else "faint"
