"""Synthetic defects for photographs of normal parts, where no photograph of a defect is to be had.

Four methods, each changed as its docstring says: `cutpaste` and `scar` (Li et al. 2021, CutPaste, arXiv 2104.04015),
`perlin` (Zavrtanik et al. 2021, DRAEM, arXiv 2108.07610) and `poisson` (Schlüter et al. 2022, NSA, arXiv 2109.15222).
All take what they put into a photograph from that photograph alone, so that nothing of another part, which may be
tested on, gets into training, and put it onto the part, not beside it (`foreground`).

Shapes: photographs are uint8 (H, W, 3) in RGB, masks bool (H, W).
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

TOLERANCE = 8
"""Of 255: a pixel is part of a defect where one of its colours changed by more, on average over its surroundings (a
Gaussian of a pixel of WORKING_SIDE): a surface's own texture laid upon itself is no defect."""

VISIBLE = 16
"""Of 255: by so much a defect changes its pixels on average, smoothed like that. At 10, people do not find it on a
magnetic tile."""

MIN_IMAGE_SHARE = 5e-4
"""Share of the photograph that a defect covers at least; fainter and smaller ones are drawn anew."""

MAX_PART_SHARE = 0.15
"""Share of the part that a defect covers at most: CutPaste's largest patch."""

TRIES = 30
"""How often a defect is drawn anew before a photograph is given up."""

WORKING_SIDE = 256
"""Side in pixels at which the foreground is looked for, and of the images that CutPaste's lengths are made for."""

CLEAR = 0.75
"""Share of the variance of the distance from the background's colour that its two classes explain where there is a
part before a background; of noise and even gradients they explain less (a Gaussian: 0.64)."""


@dataclass(frozen=True)
class SyntheticDefect:
    """A photograph with a synthetic defect. Outside the mask it is the original, pixel by pixel."""

    image: ImageArray
    mask: Mask


@dataclass(frozen=True)
class Method:
    """A way to make a defect, and what people call what it makes."""

    draw: Callable[[ImageArray, Mask, np.random.Generator], tuple[ImageArray, Mask]]
    """From a photograph and where its part is, to a photograph and where it may differ."""
    condition: str
    description: str
    """What it looks like, then what follows from it, as knowledge files have it."""


def make_defect(method: str, image: ImageArray, seed: str) -> SyntheticDefect | None:
    """A defect on the foreground of a normal photograph, by one of METHODS; `seed` decides what and where.

    None where no draw changed enough of the photograph to be seen.
    """
    rng = np.random.default_rng(list(hashlib.sha256(seed.encode()).digest()))
    part = foreground(image)
    for _ in range(TRIES):
        made, region = METHODS[method].draw(image, part, rng)
        found = _marked(image, made, region & part)
        if found is not None and found.mask.sum() <= MAX_PART_SHARE * part.sum():
            return found
    return None


def foreground(image: ImageArray) -> Mask:
    """Where the part is: Otsu's threshold of the distance (CIE Lab) from the median colour of the image's border.

    The whole image where that finds no part before a background: the two classes are not clearly apart, the border is
    not background nearly all around, or what is left is next to nothing.
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
    if np.ptp(distance) < 1:  # less than an eye can tell
        return whole
    part = distance > threshold_otsu(distance)
    share = part.mean()
    between = share * (1 - share) * (distance[part].mean() - distance[~part].mean()) ** 2
    if between < CLEAR * distance.var() or part[rim].mean() > 0.1:
        return whole
    part = ndimage.median_filter(part, size=5)
    if part.mean() < 0.01:
        return whole
    return np.asarray(Image.fromarray(part).resize((width, height), Image.Resampling.NEAREST))


def _marked(image: ImageArray, made: ImageArray, region: Mask) -> SyntheticDefect | None:
    """`made` where it differs from `image` in `region`, gaps and specks evened out; None where that is too little."""
    if not region.any():
        return None
    if (image == image[..., :1]).all():  # a grey photograph stays grey
        made = np.repeat(np.asarray(Image.fromarray(made).convert("L"))[..., None], 3, axis=-1)
    grain = max(image.shape[:2]) / WORKING_SIDE
    (box,) = ndimage.find_objects(region.astype(np.int8))
    change = np.where(region[box][..., None], made[box].astype(np.float32) - image[box], 0)
    smooth = np.abs(ndimage.gaussian_filter(change, (grain, grain, 0))).max(axis=-1)
    changed = region[box] & (smooth > TOLERANCE)
    steps = max(1, round(grain))
    inner = (slice(2 * steps, -2 * steps),) * 2
    closed = ndimage.binary_closing(np.pad(changed, 2 * steps), iterations=steps)[inner]
    pieces, count = ndimage.label(ndimage.binary_fill_holes(closed) & region[box])
    if not count:
        return None
    sizes = ndimage.sum_labels(pieces > 0, pieces, np.arange(1, count + 1))
    mask = np.zeros(region.shape, bool)
    mask[box] = np.isin(pieces, 1 + np.flatnonzero(sizes >= 0.05 * sizes.max()))
    if mask.sum() < MIN_IMAGE_SHARE * mask.size or smooth[mask[box]].mean() < VISIBLE:
        return None
    return SyntheticDefect(np.where(mask[..., None], made, image), mask)


def cutpaste(image: ImageArray, part: Mask, rng: np.random.Generator) -> tuple[ImageArray, Mask]:
    """CutPaste: a rectangle of the part, its colours jittered by up to 0.1, pasted elsewhere on the part.

    Area 0.02 to 0.15 and aspect ratio 0.3 to 3.3 as in the paper; the area is of the part, not of the image.
    """
    area = rng.uniform(0.02, MAX_PART_SHARE) * part.sum()
    ratio = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
    height, width = _within(part, math.sqrt(area / ratio), math.sqrt(area * ratio))
    patch, shape = _cut(image, part, height, width, rng)
    return _paste(image, _jitter(patch, rng), shape, _somewhere(part, height, width, rng))


def scar(image: ImageArray, part: Mask, rng: np.random.Generator) -> tuple[ImageArray, Mask]:
    """CutPaste's scar: a thin strip of the part, jittered, turned by up to 45 degrees and pasted elsewhere on the part.

    2 to 16 by 10 to 25 pixels of an image of WORKING_SIDE, in proportion here.
    """
    scale = max(part.shape) / WORKING_SIDE
    height, width = _within(part, rng.uniform(10, 25) * scale, rng.uniform(2, 16) * scale)
    patch, shape = _cut(image, part, height, width, rng)
    angle = rng.uniform(-45, 45)
    strip = Image.fromarray(_jitter(patch, rng)).rotate(angle, Image.Resampling.BICUBIC, expand=True)
    outline = Image.fromarray(shape).rotate(angle, expand=True)
    return _paste(image, np.asarray(strip), np.asarray(outline), _somewhere(part, strip.height, strip.width, rng))


def perlin(image: ImageArray, part: Mask, rng: np.random.Generator) -> tuple[ImageArray, Mask]:
    """DRAEM: another texture, at an opacity of 0.2 to 1, where turned Perlin noise is above 0.5.

    Of the places above 0.5 one to three are taken, not all: defects are local, and questions ask where. There are no
    photographs of textures here (DRAEM takes the DTD): by halves the texture is the photograph itself after three of
    the paper's operations, or a marble of random colours (Perlin 1985, An Image Synthesizer).
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
    """NSA: a patch of the part, resized by 0.7 to 1.3 and perhaps mirrored, blended in elsewhere by Poisson editing.

    Sides of 0.03 to 0.4 of the image's, and gradients of the patch alone or the stronger of both, as in the paper's
    code; one patch a photograph, and labels are cut where nothing changed (`TOLERANCE`). The blending is OpenCV's
    `seamlessClone` (Pérez et al. 2003).
    """
    import cv2

    sides = (rng.uniform(0.03, 0.4, 2) * part.shape).tolist()
    height, width = _within(part, *sides)
    scale = np.clip(rng.normal(1, 0.5), 0.7, 1.3)
    patch, shape = _cut(image, part, *_within(part, height / scale, width / scale), rng)
    patch, shape = (
        np.asarray(Image.fromarray(one).resize((width, height), how))
        for one, how in ((patch, Image.Resampling.BICUBIC), (shape, Image.Resampling.NEAREST))
    )
    if rng.random() < 0.5:
        patch, shape = patch[:, ::-1], shape[:, ::-1]
    laid, region = _paste(image, patch, shape, _somewhere(part, height, width, rng))
    region &= part
    region[[0, 1, -2, -1]], region[:, [0, 1, -2, -1]] = False, False  # what is blended needs a neighbour
    mode = cv2.NORMAL_CLONE if rng.random() < 0.5 else cv2.MIXED_CLONE
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    if min(len(rows), len(columns)) < 5:  # OpenCV leaves the rim as it is, and fails where there is nothing else
        return image, np.zeros_like(part)
    centre = (
        int(columns[0] + (columns[-1] - columns[0] + 1) // 2),
        int(rows[0] + (rows[-1] - rows[0] + 1) // 2),
    )
    blended = cv2.seamlessClone(laid, image, region.astype(np.uint8) * 255, centre, mode)
    return blended.astype(np.uint8, copy=False), region


def perlin_noise(size: tuple[int, int], cells: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float32]:
    """Perlin noise from -1 to 1 of (height, width), turned at random, `cells` of the lattice down and across the image.

    Perlin 2002, Improving Noise, with gradients of all directions.
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
        place = top + below, left + right
        return vertical[place] * (down - below) + horizontal[place] * (across - right)

    def between(
        first: NDArray[np.float32], second: NDArray[np.float32], at: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        return first + (second - first) * at**3 * (at * (at * 6 - 15) + 10)

    upper, lower = (between(corner(below, 0), corner(below, 1), across) for below in (0, 1))
    return math.sqrt(2) * between(upper, lower, down)


def _marble(size: tuple[int, int], rng: np.random.Generator) -> ImageArray:
    """Veins of two random colours, bent by noise, with a grain."""
    bends, grain = perlin_noise(size, (4, 4), rng), perlin_noise(size, (48, 48), rng)
    along = np.linspace(0, rng.uniform(2, 20), size[1], dtype=np.float32)[None, :]
    vein = 0.5 + 0.5 * np.sin(2 * np.pi * (along + rng.uniform(0.5, 4) * bends) + grain)
    first, second = rng.uniform(0, 255, (2, 3))
    return np.rint(first + (second - first) * vein[..., None]).astype(np.uint8)


def _altered(image: ImageArray, rng: np.random.Generator) -> ImageArray:
    """The photograph after three of DRAEM's augmentations, as Pillow has them."""
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
    """CutPaste's jitter of brightness, contrast and saturation."""
    image = Image.fromarray(patch)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(0.9, 1.1))
    return np.asarray(image)


def _within(part: Mask, height: float, width: float) -> tuple[int, int]:
    """The lengths in whole pixels, from 2 to the image's own."""
    return min(max(2, round(height)), part.shape[0]), min(max(2, round(width)), part.shape[1])


def _somewhere(part: Mask, height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
    """(top, left) of a rectangle whose centre lies on the part, moved into the image where it would stick out."""
    inside = np.flatnonzero(part)
    row, column = divmod(int(rng.choice(inside)), part.shape[1])
    top = max(0, min(row - height // 2, part.shape[0] - height))
    return top, max(0, min(column - width // 2, part.shape[1] - width))


def _cut(image: ImageArray, part: Mask, height: int, width: int, rng: np.random.Generator) -> tuple[ImageArray, Mask]:
    """A rectangle of the photograph, and which of its pixels show the part."""
    top, left = _somewhere(part, height, width, rng)
    box = slice(top, top + height), slice(left, left + width)
    return image[box], part[box]


def _paste(image: ImageArray, patch: ImageArray, shape: Mask, place: tuple[int, int]) -> tuple[ImageArray, Mask]:
    """The image with the patch where `shape` (of the patch's size) is set, its top left corner at `place`."""
    top, left = place
    height, width = min(shape.shape[0], image.shape[0] - top), min(shape.shape[1], image.shape[1] - left)
    made, region = image.copy(), np.zeros(image.shape[:2], bool)
    region[top : top + height, left : left + width] = shape[:height, :width]
    made[top : top + height, left : left + width] = patch[:height, :width]
    return np.where(region[..., None], made, image), region


METHODS: Mapping[str, Method] = {
    "cutpaste": Method(cutpaste, "misplaced patch", SYNTHETIC_DESCRIPTIONS["cutpaste"]),
    "scar": Method(scar, "scar", SYNTHETIC_DESCRIPTIONS["scar"]),
    "perlin": Method(perlin, "foreign texture", SYNTHETIC_DESCRIPTIONS["perlin"]),
    "poisson": Method(poisson, "deformation", SYNTHETIC_DESCRIPTIONS["poisson"]),
}
"""The methods by name."""
