"""Pools: drawn images in memory-mapped files, which pretraining reads.

A product has four consecutive images of different parts: a normal reference, a normal part and two defective parts.
Each product is drawn from its own seed, so processes can draw ranges of one endless sequence in parallel.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from echo_ft.drawn.parts import COLOURS, IMAGE_SIZE, RenderedPart, size_word
from echo_ft.drawn.world import (
    WORLD_DEFECTS,
    WORLD_KINDS,
    Defect,
    Product,
    random_product,
    render_defective,
    render_product,
)
from echo_ft.errors import EchoError
from echo_ft.files import atomic_folder

IMAGES_PER_PRODUCT = 4
PATCH = 7
"""Side length of a vision tower patch, in pixels. `shares` has one value for each patch."""

KIND_NAMES = WORLD_KINDS
COLOUR_NAMES = tuple(COLOURS)
DEFECT_NAMES = tuple(WORLD_DEFECTS)
TONE_NAMES = ("", "dark", "bright", *COLOURS)
EXTENT_NAMES = ("small", "medium", "large")

LABELS = np.dtype([(name, np.int16) for name in ("kind", "colour", "defect", "tone", "extent")])
"""Indices into the names above, or -1 for none. Images without colour have no colour and no coloured tone."""


@dataclass(frozen=True)
class Pool:
    """The memory-mapped arrays of a pool of `products` products."""

    images: NDArray[np.uint8]
    """(4 products, 168, 168, 3)."""
    shares: NDArray[np.uint8]
    """(4 products, 24, 24): 255 times the fraction of each patch that is on the defect."""
    labels: NDArray[np.void]
    """(4 products,) of type LABELS."""

    @property
    def products(self) -> int:
        return len(self.images) // IMAGES_PER_PRODUCT


def draw_pool(folder: Path, products: int, first: int) -> None:
    """Draw products `first` to `first + products - 1` into a folder, which appears once it is complete.

    It replaces a folder of the same name. Raises EchoError if the parent folder is not writable.
    """
    count, grid = IMAGES_PER_PRODUCT * products, [side // PATCH for side in IMAGE_SIZE]
    with atomic_folder(folder) as partial:
        images = _create(partial, "images", np.dtype(np.uint8), (count, *IMAGE_SIZE, 3))
        shares = _create(partial, "shares", np.dtype(np.uint8), (count, *grid))
        labels = _create(partial, "labels", LABELS, (count,))
        for number in range(products):
            product, drawn = draw_product(first + number)
            for place, (rendered, defect) in enumerate(drawn, IMAGES_PER_PRODUCT * number):
                images[place] = rendered.image
                shares[place] = patch_shares(rendered.mask)
                labels[place] = _labels(product, rendered, defect)
        for array in (images, shares, labels):
            array.flush()


def _create(folder: Path, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    return np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)


def draw_product(seed: int) -> tuple[Product, list[tuple[RenderedPart, Defect | None]]]:
    """Draw a product and its four images, each with its defect or None."""
    rng = np.random.default_rng((seed, 11))
    product = random_product(rng)
    seeds = rng.integers(2**31, size=(2, 2)).tolist()
    drawn: list[tuple[RenderedPart, Defect | None]] = [(render_product(product, *pair), None) for pair in seeds]
    return product, drawn + [render_defective(product, rng) for _ in range(2)]


def patch_shares(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return 255 times the fraction of each patch of 7 x 7 pixels that a mask (height, width) covers."""
    rows, columns = mask.shape[0] // PATCH, mask.shape[1] // PATCH
    return np.rint(255 * mask.reshape(rows, PATCH, columns, PATCH).mean((1, 3))).astype(np.uint8)


def _labels(product: Product, rendered: RenderedPart, defect: Defect | None) -> tuple[int, ...]:
    style, coloured = product.style, product.station.mode == "colour"
    kind, colour = KIND_NAMES.index(style.kind), COLOUR_NAMES.index(style.colour) if coloured else -1
    if not defect:
        return kind, colour, -1, -1, -1
    tone = -1 if defect.tone in COLOURS and not coloured else TONE_NAMES.index(defect.tone)
    extent = EXTENT_NAMES.index(size_word(rendered.mask))
    return kind, colour, DEFECT_NAMES.index(defect.name), tone, extent


def open_pool(folder: Path) -> Pool:
    """Open the pool in a folder for reading.

    Raises EchoError if the folder holds no complete pool of this edition.
    """
    try:
        images, shares, labels = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "shares", "labels")
        )
    except (OSError, ValueError, EOFError) as error:
        raise EchoError(f"{folder} holds no pool of drawn images ({error}); draw it again with draw_pool") from error
    shapes = (*IMAGE_SIZE, 3), tuple(side // PATCH for side in IMAGE_SIZE), ()
    count = len(images) if images.ndim else 0
    arrays = zip((images, shares, labels), (np.uint8, np.uint8, LABELS), shapes, strict=True)
    if not all((array.dtype, array.shape) == (dtype, (count, *shape)) for array, dtype, shape in arrays):
        raise EchoError(f"{folder} holds a pool of another edition; draw it again with draw_pool")
    return Pool(images, shares, labels)
