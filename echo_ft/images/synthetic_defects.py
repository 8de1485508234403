"""Make synthetic defects on images of normal parts, for products without images of real defects.

There are four methods: `cutpaste` and `scar` (Li et al. 2021, CutPaste, arXiv 2104.04015), `perlin` (Zavrtanik et al.
2021, DRAEM, arXiv 2108.07610) and `poisson` (Schlüter et al. 2022, NSA, arXiv 2109.15222). Their docstrings list the
differences from the papers. All methods use only pixels of the image itself, because pixels of another part could leak
from the test split into training. They place the defect on the part, not on the background (`foreground`).

Shapes: images are uint8 (H, W, 3) in RGB, masks are bool (H, W).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from echo_ft.images.masks import Mask
from echo_ft.records import SYNTHETIC_DESCRIPTIONS

ImageArray = NDArray[np.uint8]

CHANGE_THRESHOLD = 8
"""Smallest change of a colour value, out of 255, at which a pixel belongs to the defect.

The change is smoothed with a Gaussian whose standard deviation is one pixel at WORKING_SIDE. Texture that is pasted
onto the same texture therefore does not count as a defect.
"""

MIN_MEAN_CHANGE = 16
"""Smallest mean change of a defect's pixels, out of 255, after the same smoothing.

At 10, people cannot find the defect on a magnetic tile.
"""

MIN_IMAGE_SHARE = 5e-4
"""Smallest fraction of the image that a defect may cover. Smaller and fainter defects are drawn again."""

MAX_PART_SHARE = 0.15
"""Largest fraction of the part that a defect may cover, from CutPaste's largest patch."""

MAX_ATTEMPTS = 30
"""Number of draws after which an image is skipped."""

WORKING_SIDE = 256
"""Side length in pixels at which the foreground is detected. CutPaste's lengths refer to images of this size."""

MIN_EXPLAINED_VARIANCE = 0.75
"""Otsu's two classes count as part and background only if they explain at least this fraction of the variance.

The variance in question is that of the distance from the background colour. For noise and even gradients, the classes
explain less (0.64 for a Gaussian).
"""


@dataclass(frozen=True)
class SyntheticDefect:
    """An image with a synthetic defect. Outside the mask, its pixels are identical to the original."""

    image: ImageArray
    mask: Mask


@dataclass(frozen=True)
class DefectMethod:
    """A method that makes defects, and the condition and description of the defects it makes."""

    draw: Callable[[ImageArray, Mask, np.random.Generator], tuple[ImageArray, Mask]]
    """Maps (image, part mask, rng) to the changed image and the region in which it may differ."""
    condition: str
    description: str
    """The appearance of the defect, then its consequences, as in knowledge files."""


def make_defect(method: str, image: ImageArray, seed: str) -> SyntheticDefect | None:
    """Make a defect on the foreground of a normal image (H, W, 3). `method` is one of DEFECT_METHODS.

    `seed` determines the shape and location. Returns None if no draw changed the image visibly.
    """
    rng = np.random.default_rng(list(hashlib.sha256(seed.encode()).digest()))
    part = foreground(image)
    for _ in range(MAX_ATTEMPTS):
        changed, region = DEFECT_METHODS[method].draw(image, part, rng)
        defect = _visible_defect(image, changed, region & part)
        if defect is not None and defect.mask.sum() <= MAX_PART_SHARE * part.sum():
            return defect
    return None


def foreground(image: ImageArray) -> Mask:
    """Return the mask (H, W) of the part in an image (H, W, 3).

    Otsu's threshold splits the distances (CIE Lab) from the median colour of the image border into part and background.
    The mask covers the whole image if there is no clear part. There is none if the two classes are not well separated,
    if the part covers over a tenth of the border, or if almost nothing remains.
    """
    from skimage.color import rgb2lab
    from skimage.filters import threshold_otsu

    height, width = image.shape[:2]
    whole = np.ones((height, width), bool)
    small = Image.fromarray(image)
    small.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BOX)
    lab = rgb2lab(np.asarray(small))
    rim = np.ones(lab.shape[:2], bool)
    rim[2:-2, 2:-2] = False
    distance = np.linalg.norm(lab - np.median(lab[rim], axis=0), axis=-1)
    if np.ptp(distance) < 1:  # the image has no visible structure
        return whole
    part = distance > threshold_otsu(distance)
    share = part.mean()
    between = share * (1 - share) * (distance[part].mean() - distance[~part].mean()) ** 2
    if between < MIN_EXPLAINED_VARIANCE * distance.var() or part[rim].mean() > 0.1:
        return whole
    part = ndimage.median_filter(part, size=5)
    if part.mean() < 0.01:
        return whole
    return np.asarray(Image.fromarray(part).resize((width, height), Image.Resampling.NEAREST))


def _visible_defect(image: ImageArray, changed_image: ImageArray, region: Mask) -> SyntheticDefect | None:
    """Return the visible difference between two images in `region` as a defect, or None if it is too small or faint.

    The mask of the defect has no gaps and no specks.
    """
    if not region.any():
        return None
    if (image == image[..., :1]).all():  # a grey image stays grey
        changed_image = np.repeat(np.asarray(Image.fromarray(changed_image).convert("L"))[..., None], 3, axis=-1)
    grain = max(image.shape[:2]) / WORKING_SIDE
    (box,) = ndimage.find_objects(region.astype(np.int8))
    change = np.where(region[box][..., None], changed_image[box].astype(np.float32) - image[box], 0)
    smooth = np.abs(ndimage.gaussian_filter(change, (grain, grain, 0))).max(axis=-1)
    changed = region[box] & (smooth > CHANGE_THRESHOLD)
    steps = max(1, round(grain))
    inner = (slice(2 * steps, -2 * steps),) * 2
    closed = ndimage.binary_closing(np.pad(changed, 2 * steps), iterations=steps)[inner]
    pieces, count = ndimage.label(ndimage.binary_fill_holes(closed) & region[box])
    if not count:
        return None
    sizes = ndimage.sum_labels(pieces > 0, pieces, np.arange(1, count + 1))
    mask = np.zeros(region.shape, bool)
    mask[box] = np.isin(pieces, 1 + np.flatnonzero(sizes >= 0.05 * sizes.max()))
    if mask.sum() < MIN_IMAGE_SHARE * mask.size or smooth[mask[box]].mean() < MIN_MEAN_CHANGE:
        return None
    return SyntheticDefect(np.where(mask[..., None], changed_image, image), mask)


def cutpaste(image: ImageArray, part: Mask, rng: np.random.Generator) -> tuple[ImageArray, Mask]:
    """CutPaste: copy a rectangle of the part, jitter its colours by up to 0.1, and paste it elsewhere on the part.

    As in the paper, the area is a fraction of 0.02 to 0.15 and the aspect ratio is 0.3 to 3.3. Here, however, the area
    is a fraction of the part, not of the image.
    """
    area = rng.uniform(0.02, MAX_PART_SHARE) * part.sum()
    ratio = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
    height, width = _pixel_size(part, math.sqrt(area / ratio), math.sqrt(area * ratio))
    patch, shape = _cut(image, part, height, width, rng)
    return _paste(image, _jitter(patch, rng), shape, _random_corner(part, height, width, rng))


def scar(image: ImageArray, part: Mask, rng: np.random.Generator) -> tuple[ImageArray, Mask]:
    """CutPaste-Scar: copy a thin strip of the part, jitter it, rotate it by up to 45 degrees and paste it elsewhere.

    The strip is 2 to 16 by 10 to 25 pixels in an image of WORKING_SIDE and scales with the image.
    """
    scale = max(part.shape) / WORKING_SIDE
    height, width = _pixel_size(part, rng.uniform(10, 25) * scale, rng.uniform(2, 16) * scale)
    patch, shape = _cut(image, part, height, width, rng)
    angle = rng.uniform(-45, 45)
    strip = Image.fromarray(_jitter(patch, rng)).rotate(angle, Image.Resampling.BICUBIC, expand=True)
    outline = Image.fromarray(shape).rotate(angle, expand=True)
    return _paste(image, np.asarray(strip), np.asarray(outline), _random_corner(part, strip.height, strip.width, rng))


def perlin(image: ImageArray, part: Mask, rng: np.random.Generator) -> tuple[ImageArray, Mask]:
    """DRAEM: blend in another texture, at an opacity of 0.2 to 1, where rotated Perlin noise exceeds 0.5.

    Only one to three of the regions above 0.5 are used, because defects are local and questions ask for their location.
    DRAEM takes its textures from the DTD dataset. Here, the texture is one of two, with equal probability: the image
    itself after three of the paper's augmentations, or marble in random colours (Perlin 1985, An Image Synthesizer).
    """
    height, width = part.shape
    down, across = (2 ** int(power) for power in rng.integers(0, 6, 2))
    pieces, count = ndimage.label((perlin_noise((height, width), (down, across), rng) > 0.5) & part)
    sizes = ndimage.sum_labels(part, pieces, np.arange(1, count + 1))
    usable = 1 + np.flatnonzero((sizes >= MIN_IMAGE_SHARE * part.size) & (sizes <= MAX_PART_SHARE * part.sum()))
    if not len(usable):
        return image, np.zeros_like(part)
    region = np.isin(pieces, rng.permutation(usable)[: rng.integers(1, 4)])
    texture = _altered(image, rng) if rng.random() < 0.5 else _marble((height, width), rng)
    opacity = rng.uniform(0.2, 1)
    mixed = np.rint(opacity * texture + (1 - opacity) * image).astype(np.uint8)
    return np.where(region[..., None], mixed, image), region


def poisson(image: ImageArray, part: Mask, rng: np.random.Generator) -> tuple[ImageArray, Mask]:
    """NSA: resize a patch of the part by 0.7 to 1.3, mirror it at random, and blend it in elsewhere (Poisson editing).

    As in the paper's code, the side lengths of the patch are 0.03 to 0.4 of those of the image. The gradients are those
    of the patch, or the stronger ones of patch and image. Unlike in that code, each image gets one patch, and the mask
    excludes pixels that hardly changed (`CHANGE_THRESHOLD`). OpenCV's `seamlessClone` does the blending (Pérez et al.
    2003).
    """
    import cv2

    sides = (rng.uniform(0.03, 0.4, 2) * part.shape).tolist()
    height, width = _pixel_size(part, *sides)
    scale = np.clip(rng.normal(1, 0.5), 0.7, 1.3)
    patch, shape = _cut(image, part, *_pixel_size(part, height / scale, width / scale), rng)
    patch, shape = (
        np.asarray(Image.fromarray(array).resize((width, height), resampling))
        for array, resampling in ((patch, Image.Resampling.BICUBIC), (shape, Image.Resampling.NEAREST))
    )
    if rng.random() < 0.5:
        patch, shape = patch[:, ::-1], shape[:, ::-1]
    pasted, region = _paste(image, patch, shape, _random_corner(part, height, width, rng))
    region &= part
    region[[0, 1, -2, -1]], region[:, [0, 1, -2, -1]] = False, False  # the blending needs the neighbours of each pixel
    mode = cv2.NORMAL_CLONE if rng.random() < 0.5 else cv2.MIXED_CLONE
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    if min(len(rows), len(columns)) < 5:  # OpenCV does not change the rim and fails if there is no interior
        return image, np.zeros_like(part)
    centre = (
        int(columns[0] + (columns[-1] - columns[0] + 1) // 2),
        int(rows[0] + (rows[-1] - rows[0] + 1) // 2),
    )
    blended = cv2.seamlessClone(pasted, image, region.astype(np.uint8) * 255, centre, mode)
    return blended.astype(np.uint8, copy=False), region


def perlin_noise(size: tuple[int, int], cells: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return Perlin noise (height, width) from -1 to 1, on a randomly rotated lattice.

    `size` is (height, width), and `cells` is the number of lattice cells (down, across) in the image. The method
    follows Perlin 2002, Improving Noise, but uses gradients in all directions.
    """
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    angle = rng.uniform(-np.pi / 2, np.pi / 2)
    down = (y * math.cos(angle) - x * math.sin(angle)) * (cells[0] / size[0])
    across = (y * math.sin(angle) + x * math.cos(angle)) * (cells[1] / size[1])
    down, across = down - down.min(), across - across.min()
    top, left = down.astype(int), across.astype(int)
    down, across = down - top, across - left
    directions = rng.uniform(0, 2 * np.pi, (top.max() + 2, left.max() + 2)).astype(np.float32)
    vertical, horizontal = np.sin(directions), np.cos(directions)

    def corner(below: int, right: int) -> NDArray[np.float32]:
        index = top + below, left + right
        return vertical[index] * (down - below) + horizontal[index] * (across - right)

    def interpolate(
        first: NDArray[np.float32], second: NDArray[np.float32], at: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        return first + (second - first) * at**3 * (at * (at * 6 - 15) + 10)

    upper, lower = (interpolate(corner(below, 0), corner(below, 1), across) for below in (0, 1))
    return math.sqrt(2) * interpolate(upper, lower, down)


def _marble(size: tuple[int, int], rng: np.random.Generator) -> ImageArray:
    """Return a marble texture (height, width, 3): grainy veins in two random colours, bent by noise."""
    bends, grain = perlin_noise(size, (4, 4), rng), perlin_noise(size, (48, 48), rng)
    along = np.linspace(0, rng.uniform(2, 20), size[1], dtype=np.float32)[None, :]
    vein = 0.5 + 0.5 * np.sin(2 * np.pi * (along + rng.uniform(0.5, 4) * bends) + grain)
    first, second = rng.uniform(0, 255, (2, 3))
    return np.rint(first + (second - first) * vein[..., None]).astype(np.uint8)


def _altered(image: ImageArray, rng: np.random.Generator) -> ImageArray:
    """Apply three of DRAEM's augmentations to an image, as implemented in Pillow."""
    operations: list[Callable[[Image.Image], Image.Image]] = [
        ImageOps.autocontrast,
        ImageOps.equalize,
        ImageOps.invert,
        ImageOps.flip,
        ImageOps.mirror,
        lambda image: ImageOps.solarize(image, int(rng.integers(32, 128))),
        lambda image: ImageOps.posterize(image, int(rng.integers(1, 4))),
        lambda image: ImageEnhance.Brightness(image).enhance(rng.uniform(0.5, 1.5)),
        lambda image: ImageEnhance.Sharpness(image).enhance(rng.uniform(2, 8)),
    ]
    altered = Image.fromarray(image)
    for number in rng.choice(len(operations), 3, replace=False):
        altered = operations[number](altered)
    return np.asarray(altered)


def _jitter(patch: ImageArray, rng: np.random.Generator) -> ImageArray:
    """Jitter brightness, contrast and saturation as in CutPaste."""
    image = Image.fromarray(patch)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(0.9, 1.1))
    return np.asarray(image)


def _pixel_size(part: Mask, height: float, width: float) -> tuple[int, int]:
    """Round a height and a width to whole pixels, between 2 and the size of the image."""
    return min(max(2, round(height)), part.shape[0]), min(max(2, round(width)), part.shape[1])


def _random_corner(part: Mask, height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw (top, left) of a rectangle that is centred on a random pixel of the part, then shifted into the image."""
    inside = np.flatnonzero(part)
    row, column = divmod(int(rng.choice(inside)), part.shape[1])
    top = max(0, min(row - height // 2, part.shape[0] - height))
    return top, max(0, min(column - width // 2, part.shape[1] - width))


def _cut(image: ImageArray, part: Mask, height: int, width: int, rng: np.random.Generator) -> tuple[ImageArray, Mask]:
    """Cut a random rectangle out of the image. Returns its pixels and the mask of those that show the part."""
    top, left = _random_corner(part, height, width, rng)
    box = slice(top, top + height), slice(left, left + width)
    return image[box], part[box]


def _paste(image: ImageArray, patch: ImageArray, shape: Mask, corner: tuple[int, int]) -> tuple[ImageArray, Mask]:
    """Paste the pixels of `patch` that `shape` marks, with the patch's top left corner at `corner` (top, left).

    `shape` has the size of the patch. Returns the image and the mask of the pasted pixels.
    """
    top, left = corner
    height, width = min(shape.shape[0], image.shape[0] - top), min(shape.shape[1], image.shape[1] - left)
    pasted, region = image.copy(), np.zeros(image.shape[:2], bool)
    region[top : top + height, left : left + width] = shape[:height, :width]
    pasted[top : top + height, left : left + width] = patch[:height, :width]
    return np.where(region[..., None], pasted, image), region


DEFECT_METHODS: Mapping[str, DefectMethod] = {
    "cutpaste": DefectMethod(cutpaste, "misplaced patch", SYNTHETIC_DESCRIPTIONS["cutpaste"]),
    "scar": DefectMethod(scar, "scar", SYNTHETIC_DESCRIPTIONS["scar"]),
    "perlin": DefectMethod(perlin, "foreign texture", SYNTHETIC_DESCRIPTIONS["perlin"]),
    "poisson": DefectMethod(poisson, "deformation", SYNTHETIC_DESCRIPTIONS["poisson"]),
}
"""The methods that make defects, keyed by name."""
