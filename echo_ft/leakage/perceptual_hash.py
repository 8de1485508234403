"""Perceptual hashes of images and their crops, and a search for the nearest images.

Images of one product look alike, so the nearest images need not show the same surface. `echo_ft.leakage.matches`
compares them closely. Grey images are squares of GREY_SIDE x GREY_SIDE pixels, whatever the shape of the file. Boxes
are (x, y, width, height) as fractions of the side length.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, linalg, ndimage

from echo_ft.images.decode import load_image

_Array = NDArray[np.float32]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

GREY_SIDE = 160
"""Side length of the grey images in pixels."""

INNER_BOX = np.array([0.1, 0.1, 0.8, 0.8], np.float32)
"""The region of a query that is searched for in training images. Any crop of 90% of each side contains all of it."""

HASH_SIDE = 16
"""Number of lowest frequencies per axis in a hash."""

NEAREST_HASHES = 256
"""Number of images with the nearest plain hashes. The candidates are chosen from these by whitened similarity."""

EXTRA_CANDIDATES = 128
"""Extra images from products with more than NEAREST_HASHES images, ranked by whitened similarity.

In such a large product, the plain hashes of many images are closer to that of a crop than the hash of its own image.
"""

WHITENING_SAMPLES = 256
"""Number of images from which the usual variation within a large product is estimated."""

MAX_CANDIDATES = 24
"""Number of candidates that are aligned with each query."""

IMAGES_PER_BLOCK = 128
"""Number of training images in memory at once."""


@dataclass(frozen=True)
class GreyImage:
    """An image in the forms that the comparison needs, each of GREY_SIDE x GREY_SIDE pixels."""

    detail: Image.Image
    """Difference from the local mean, in grey levels."""
    evened: Image.Image
    """Difference from the local mean, in units of the local standard deviation."""
    clipped: Image.Image
    """1 where the image is clipped to black or white, else 0."""


def load_grey_image(path: Path) -> GreyImage:
    """Load an image file for comparison. Raises EchoError if it cannot be read."""
    image = load_image(path, "L", (GREY_SIDE, GREY_SIDE))
    grey = np.asarray(image.resize((GREY_SIDE, GREY_SIDE), Image.Resampling.BICUBIC), np.float32)
    detail = grey - _smooth(grey)
    deviation = np.sqrt(np.maximum(_smooth(detail * detail), 0))
    clipped = ((grey < 2) | (grey > 253)).astype(np.float32)
    return GreyImage(*(Image.fromarray(values) for values in (detail, detail / (deviation + 3), clipped)))


def _smooth(values: _Array) -> _Array:
    return np.asarray(ndimage.gaussian_filter(values, GREY_SIDE / 20, mode="nearest", truncate=3))


def crop(image: Image.Image, box: _Array, side: int) -> _Array:
    """Resample the content of a box (4,) of an image to (side, side)."""
    left, top, width, height = (float(value) * GREY_SIDE for value in box)
    edges = left, top, min(left + width, GREY_SIDE), min(top + height, GREY_SIDE)
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=edges), np.float32)


def centred_unit(values: _Array) -> _Array:
    """Subtract the mean and scale the values to Euclidean length 1."""
    centred = values - values.mean()
    return np.asarray(centred / (np.linalg.norm(centred) + 1e-9))


def perceptual_hashes(grey: GreyImage, boxes: _Array) -> _Array:
    """Return the hashes (n, HASH_SIDE * HASH_SIDE), each of length 1, of boxes (n, 4) in an image.

    As in pHash, a hash holds the lowest frequencies without the mean. Unlike pHash, it keeps real numbers, because
    signs cannot distinguish the parts of a product.
    """
    crops = np.stack([crop(grey.evened, box, 2 * HASH_SIDE) for box in boxes])
    low = fft.dctn(crops, axes=(1, 2), norm="ortho")[:, :HASH_SIDE, :HASH_SIDE].reshape(len(boxes), -1)
    low[:, 0] = 0
    return np.asarray(low / (np.linalg.norm(low, axis=1, keepdims=True) + 1e-9))


def _crop_boxes() -> _Array:
    """Return the boxes (n, 4) in which a training image may show a query's INNER_BOX.

    They cover the cases in which either image is a crop of the other. A crop keeps a fraction `kept` of each side, and
    its possible positions are sampled in steps of at most 0.05.
    """
    boxes = []
    for kept in (0.9, 0.925, 0.95, 0.975):
        x, side = float(INNER_BOX[0]), float(INNER_BOX[2])
        for scale, low, high in (
            (side * kept, x * kept, x * kept + 1 - kept),  # the query is a crop of the training image
            (side / kept, (x - 1 + kept) / kept, x / kept),  # the training image is a crop of the query
        ):
            steps = np.linspace(low, high, int(np.ceil((high - low) / 0.05 - 1e-6)) + 1)
            boxes += [(left, top, scale, scale) for left in steps for top in steps]
    shifts = (-0.025, 0.0, 0.025)
    boxes += [
        (INNER_BOX[0] + right, INNER_BOX[1] + down, INNER_BOX[2], INNER_BOX[3]) for right in shifts for down in shifts
    ]
    return clip_boxes(np.array(boxes, np.float32))


def clip_boxes(boxes: _Array) -> _Array:
    """Limit the sides of boxes (..., 4) to the range 0.6 to 1 and shift the boxes into the image."""
    size = np.clip(boxes[..., 2:], 0.6, 1)
    return np.concatenate([np.clip(boxes[..., :2], 0, 1 - size), size], axis=-1)


CROP_BOXES = _crop_boxes()


def _crop_hashes(path: Path) -> _Array:
    return perceptual_hashes(load_grey_image(path), CROP_BOXES)


def find_candidates(
    training: Sequence[Path], products: Sequence[str], hashes: _Array
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the candidates for each query, given the hashes (n, d) of the queries' INNER_BOX.

    `products` holds the product of each training image. Returns the indices of up to MAX_CANDIDATES training images,
    (n, k), best first, and the index into CROP_BOXES of the best crop of each, (n, k).
    """
    members = {product: np.flatnonzero(np.array(products) == product) for product in dict.fromkeys(products)}
    whiteners = {product: _Whitener(training, own) for product, own in members.items() if len(own) > NEAREST_HASHES}
    size = min(NEAREST_HASHES + bool(whiteners) * EXTRA_CANDIDATES, len(training))
    plain = np.full((len(hashes), 0), -1, np.float32)
    indices, boxes = (np.zeros((len(hashes), 0), np.int64) for _ in range(2))
    vectors = np.zeros((len(hashes), 0, hashes.shape[1]), np.float16)
    whitened = plain
    for start in range(0, len(training), IMAGES_PER_BLOCK):
        block = np.stack(list(map_ordered(_crop_hashes, training[start : start + IMAGES_PER_BLOCK])))
        block_products = products[start : start + IMAGES_PER_BLOCK]
        cosines = (hashes @ block.reshape(-1, block.shape[-1]).T).reshape(len(hashes), len(block), len(CROP_BOXES))
        best = cosines.argmax(axis=2)
        block_index = np.broadcast_to(np.arange(len(block)), best.shape)
        plain = np.concatenate([plain, np.take_along_axis(cosines, best[..., None], 2)[..., 0]], axis=1)
        whitened = np.concatenate([whitened, _whitened_cosines(hashes, block, block_products, whiteners)], axis=1)
        indices = np.concatenate([indices, block_index + start], axis=1)
        boxes = np.concatenate([boxes, best], axis=1)
        vectors = np.concatenate([vectors, block.astype(np.float16)[block_index, best]], axis=1)
        if plain.shape[1] > size:
            top = _top(plain, whitened, size)
            plain = np.take_along_axis(plain, top, axis=1)
            whitened = np.take_along_axis(whitened, top, axis=1)
            indices = np.take_along_axis(indices, top, axis=1)
            boxes = np.take_along_axis(boxes, top, axis=1)
            vectors = np.take_along_axis(vectors, top[..., None], axis=1)
    scores = [_discriminant_scores(one, near.astype(np.float32)) for one, near in zip(hashes, vectors, strict=True)]
    order = np.argsort(-np.stack(scores), axis=1, kind="stable")[:, :MAX_CANDIDATES]
    return np.take_along_axis(indices, order, axis=1), np.take_along_axis(boxes, order, axis=1)


def _top(plain: _Array, whitened: _Array, size: int) -> NDArray[np.int64]:
    """Return the columns (n, size) to keep: the NEAREST_HASHES best in `plain` (n, m), then the best in `whitened`."""
    top = np.argpartition(-plain, NEAREST_HASHES - 1, axis=1)
    if size == NEAREST_HASHES:
        return top[:, :NEAREST_HASHES]
    rest = np.take_along_axis(whitened, top[:, NEAREST_HASHES:], axis=1)
    more = np.argpartition(-rest, size - NEAREST_HASHES - 1, axis=1)[:, : size - NEAREST_HASHES]
    return np.concatenate([top[:, :NEAREST_HASHES], np.take_along_axis(top[:, NEAREST_HASHES:], more, axis=1)], axis=1)


class _Whitener:
    """Whitens hashes by the usual variation within a product that has more than NEAREST_HASHES images."""

    def __init__(self, training: Sequence[Path], members: NDArray[np.int64]) -> None:
        """Estimate the mean and covariance per crop box from up to WHITENING_SAMPLES evenly spaced images.

        `members` (k,) are the indices of the product's images in `training`.
        """
        sample = members[np.linspace(0, len(members) - 1, min(WHITENING_SAMPLES, len(members))).astype(int)]
        hashes = np.stack(list(map_ordered(_crop_hashes, [training[index] for index in sample])))
        self.means = hashes.mean(axis=0)
        self.factors = np.stack([_cholesky(hashes[:, box] - mean) for box, mean in enumerate(self.means)])

    def cosines(self, hashes: _Array, block: _Array) -> _Array:
        """Return whitened cosines (n, m) between hashes (n, d) and images (m, boxes, d): the maximum over all boxes."""
        highest = np.full((len(hashes), len(block)), -1, np.float32)
        for box, (mean, factor) in enumerate(zip(self.means, self.factors, strict=True)):
            rows = np.concatenate([hashes, block[:, box]]) - mean
            white = linalg.solve_triangular(factor, rows.T, lower=True)
            white /= np.linalg.norm(white, axis=0) + 1e-9
            np.maximum(highest, white[:, : len(hashes)].T @ white[:, len(hashes) :], out=highest)
        return highest


def _whitened_cosines(
    hashes: _Array, block: _Array, products: Sequence[str], whiteners: Mapping[str, _Whitener]
) -> _Array:
    """Return the whitened cosines (n, m) between hashes (n, d) and images (m, boxes, d), or -1 without a whitener."""
    cosines = np.full((len(hashes), len(block)), -1, np.float32)
    for product in set(products) & whiteners.keys():
        own = np.flatnonzero(np.array(products) == product)
        cosines[:, own] = whiteners[product].cosines(hashes, block[own])
    return cosines


def _cholesky(centred: _Array) -> _Array:
    """Return the Cholesky factor (d, d) of the covariance of centred rows (n, d), with a ridge."""
    covariance = centred.T @ centred / len(centred)
    covariance[np.diag_indices_from(covariance)] += 5e-5 * np.trace(covariance) + 1e-9
    return np.linalg.cholesky(covariance)


def _discriminant_scores(query: _Array, neighbours: _Array) -> _Array:
    """Return the cosines (n,) between a hash (d,) and its neighbours (n, d), whitened with the neighbours' covariance.

    Common variation, such as pose and light, counts for little, and individual features count for much. This is the
    linear discriminant of an exemplar (Hariharan, Malik, Ramanan: Discriminative decorrelation, ECCV 2012) as a cosine.
    """
    mean = neighbours.mean(axis=0)
    centred = neighbours - mean
    rows = np.vstack([query - mean, centred])
    white = linalg.solve_triangular(_cholesky(centred), rows.T, lower=True)
    white /= np.linalg.norm(white, axis=0) + 1e-9
    return np.asarray(white[:, 1:].T @ white[:, 0])


def map_ordered(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
    """Apply a function to all items in several threads and yield the results in order."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, items)
