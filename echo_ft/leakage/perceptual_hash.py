"""Perceptual hashes of photographs and of their crops, and the photographs that are nearest by them.

Photographs of one product look alike, so the nearest of many are not the same surface yet: `echo_ft.leakage.matches` compares
them closely. Grey images are squares of SIDE pixels whatever the file's shape, boxes in them are (x, y, width, height)
in shares of the side.
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
Item = TypeVar("Item")
Made = TypeVar("Made")

GREY_SIDE = 160
"""Side of the grey squares, in pixels."""

INNER_BOX = np.array([0.1, 0.1, 0.8, 0.8], np.float32)
"""The part of a photograph that is looked for in others: a crop of 90 % of each side still has all of it."""

HASH_SIDE = 16
"""Lowest frequencies of each axis in a hash."""

NEAREST_HASHES = 256
"""Photographs whose hashes are nearest; what sets one apart from them ranks it."""

EXTRA_CANDIDATES = 128
"""Photographs that join them of products with more than POOL, by what sets them apart from their product: there, many
others are nearer to a crop than what it was cut from.
"""

WHITENING_SAMPLES = 256
"""Photographs from which is learnt how those of a product usually differ."""

CANDIDATES = 24
"""Photographs that are laid over one that is asked about."""

IMAGES_PER_BLOCK = 128
"""Photographs that were trained on, held at once."""


@dataclass(frozen=True)
class GreyImage:
    """A photograph as it is compared: without the local mean, in grey levels, and in units of the local deviation."""

    detail: Image.Image
    evened: Image.Image
    clipped: Image.Image
    """1 where the grey is black or white."""


def load_grey_image(path: Path) -> GreyImage:
    """The photograph in a file. Raises EchoError where it cannot be read."""
    image = load_image(path, "L", (GREY_SIDE, GREY_SIDE))
    grey = np.asarray(image.resize((GREY_SIDE, GREY_SIDE), Image.Resampling.BICUBIC), np.float32)
    detail = grey - _smooth(grey)
    deviation = np.sqrt(np.maximum(_smooth(detail * detail), 0))
    clipped = ((grey < 2) | (grey > 253)).astype(np.float32)
    return GreyImage(*(Image.fromarray(values) for values in (detail, detail / (deviation + 3), clipped)))


def _smooth(values: _Array) -> _Array:
    return np.asarray(ndimage.gaussian_filter(values, GREY_SIDE / 20, mode="nearest", truncate=3))


def cut(image: Image.Image, box: _Array, side: int) -> _Array:
    """What a box of an image holds, (side, side)."""
    left, top, width, height = (float(value) * GREY_SIDE for value in box)
    edges = left, top, min(left + width, GREY_SIDE), min(top + height, GREY_SIDE)
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=edges), np.float32)


def unit(values: _Array) -> _Array:
    """The values less their mean, of length 1."""
    centred = values - values.mean()
    return np.asarray(centred / (np.linalg.norm(centred) + 1e-9))


def perceptual_hashes(look: GreyImage, boxes: _Array) -> _Array:
    """Perceptual hashes (n, HASH * HASH) of boxes (n, 4), of length 1: the lowest frequencies, less the mean.

    As pHash, but with real numbers: the signs alone cannot tell one part of a product from the next.
    """
    cuts = np.stack([cut(look.evened, box, 2 * HASH_SIDE) for box in boxes])
    low = fft.dctn(cuts, axes=(1, 2), norm="ortho")[:, :HASH_SIDE, :HASH_SIDE].reshape(len(boxes), -1)
    low[:, 0] = 0
    return np.asarray(low / (np.linalg.norm(low, axis=1, keepdims=True) + 1e-9))


def _views() -> _Array:
    """Boxes (n, 4) in which a photograph may show another's INNER: if either is a crop of the other, at several places.

    `linear` is the share of the sides that the crop keeps; the places are at most 0.05 apart.
    """
    boxes = []
    for linear in (0.9, 0.925, 0.95, 0.975):
        x, side = float(INNER_BOX[0]), float(INNER_BOX[2])
        for scale, low, high in (
            (side * linear, x * linear, x * linear + 1 - linear),  # the other is a crop of this one
            (side / linear, (x - 1 + linear) / linear, x / linear),  # this one is a crop of the other
        ):
            steps = np.linspace(low, high, int(np.ceil((high - low) / 0.05 - 1e-6)) + 1)
            boxes += [(left, top, scale, scale) for left in steps for top in steps]
    shifts = (-0.025, 0.0, 0.025)
    boxes += [
        (INNER_BOX[0] + right, INNER_BOX[1] + down, INNER_BOX[2], INNER_BOX[3]) for right in shifts for down in shifts
    ]
    return inside(np.array(boxes, np.float32))


def inside(boxes: _Array) -> _Array:
    """The boxes (..., 4), moved into the image and made no smaller than 0.6 of its sides."""
    size = np.clip(boxes[..., 2:], 0.6, 1)
    return np.concatenate([np.clip(boxes[..., :2], 0, 1 - size), size], axis=-1)


VIEWS = _views()


def _view_hashes(path: Path) -> _Array:
    return perceptual_hashes(load_grey_image(path), VIEWS)


def nearest(
    trained: Sequence[Path], products: Sequence[str], hashes: _Array
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each hash of an INNER (n, d) the NEAREST photographs, (n, k), and in which of VIEWS each shows it."""
    members = {product: np.flatnonzero(np.array(products) == product) for product in dict.fromkeys(products)}
    crowds = {product: _Crowd(trained, own) for product, own in members.items() if len(own) > NEAREST_HASHES}
    size = min(NEAREST_HASHES + bool(crowds) * EXTRA_CANDIDATES, len(trained))
    near = np.full((len(hashes), 0), -1, np.float32)
    places, views = (np.zeros((len(hashes), 0), np.int64) for _ in range(2))
    vectors = np.zeros((len(hashes), 0, hashes.shape[1]), np.float16)
    apart = near
    for start in range(0, len(trained), IMAGES_PER_BLOCK):
        block = np.stack(list(map_ordered(_view_hashes, trained[start : start + IMAGES_PER_BLOCK])))
        cosines = (hashes @ block.reshape(-1, block.shape[-1]).T).reshape(len(hashes), len(block), len(VIEWS))
        best = cosines.argmax(axis=2)
        here = np.broadcast_to(np.arange(len(block)), best.shape)
        near = np.concatenate([near, np.take_along_axis(cosines, best[..., None], 2)[..., 0]], axis=1)
        apart = np.concatenate(
            [apart, _apart(hashes, block, products[start : start + IMAGES_PER_BLOCK], crowds)], axis=1
        )
        places = np.concatenate([places, here + start], axis=1)
        views = np.concatenate([views, best], axis=1)
        vectors = np.concatenate([vectors, block.astype(np.float16)[here, best]], axis=1)
        if near.shape[1] > size:
            top = _first(near, apart, size)
            near = np.take_along_axis(near, top, axis=1)
            apart = np.take_along_axis(apart, top, axis=1)
            places = np.take_along_axis(places, top, axis=1)
            views = np.take_along_axis(views, top, axis=1)
            vectors = np.take_along_axis(vectors, top[..., None], axis=1)
    ranked = [_set_apart(one, pool.astype(np.float32)) for one, pool in zip(hashes, vectors, strict=True)]
    order = np.argsort(-np.stack(ranked), axis=1, kind="stable")[:, :CANDIDATES]
    return np.take_along_axis(places, order, axis=1), np.take_along_axis(views, order, axis=1)


def _first(near: _Array, apart: _Array, size: int) -> NDArray[np.int64]:
    """Places (n, size) of the POOL nearest (n, m), and of those of the others that are most `apart` (n, m)."""
    top = np.argpartition(-near, NEAREST_HASHES - 1, axis=1)
    if size == NEAREST_HASHES:
        return top[:, :NEAREST_HASHES]
    rest = np.take_along_axis(apart, top[:, NEAREST_HASHES:], axis=1)
    more = np.argpartition(-rest, size - NEAREST_HASHES - 1, axis=1)[:, : size - NEAREST_HASHES]
    return np.concatenate([top[:, :NEAREST_HASHES], np.take_along_axis(top[:, NEAREST_HASHES:], more, axis=1)], axis=1)


class _Crowd:
    """How the photographs of a product that has more than POOL of them usually differ, in each of VIEWS."""

    def __init__(self, trained: Sequence[Path], members: NDArray[np.int64]) -> None:
        """Learnt from up to LEARNT of the `members`, places in `trained`, at even distances."""
        some = members[np.linspace(0, len(members) - 1, min(WHITENING_SAMPLES, len(members))).astype(int)]
        hashes = np.stack(list(map_ordered(_view_hashes, [trained[place] for place in some])))
        self.means = hashes.mean(axis=0)
        self.factors = np.stack([_factor(hashes[:, view] - mean) for view, mean in enumerate(self.means)])

    def cosines(self, hashes: _Array, block: _Array) -> _Array:
        """Of hashes (n, d) and photographs (m, views, d), the greatest over the views, each whitened: (n, m)."""
        most = np.full((len(hashes), len(block)), -1, np.float32)
        for view, (mean, factor) in enumerate(zip(self.means, self.factors, strict=True)):
            rows = np.concatenate([hashes, block[:, view]]) - mean
            white = linalg.solve_triangular(factor, rows.T, lower=True)
            white /= np.linalg.norm(white, axis=0) + 1e-9
            np.maximum(most, white[:, : len(hashes)].T @ white[:, len(hashes) :], out=most)
        return most


def _apart(hashes: _Array, block: _Array, products: Sequence[str], crowds: Mapping[str, _Crowd]) -> _Array:
    """What sets photographs (m, views, d) apart as it does the hashes (n, d), by their crowds: (n, m); -1 without."""
    found = np.full((len(hashes), len(block)), -1, np.float32)
    for product in set(products) & crowds.keys():
        own = np.flatnonzero(np.array(products) == product)
        found[:, own] = crowds[product].cosines(hashes, block[own])
    return found


def _factor(spread: _Array) -> _Array:
    """The Cholesky factor (d, d) of the covariance of rows (n, d) of mean 0, with a ridge."""
    covariance = spread.T @ spread / len(spread)
    covariance[np.diag_indices_from(covariance)] += 5e-5 * np.trace(covariance) + 1e-9
    return np.linalg.cholesky(covariance)


def _set_apart(one: _Array, pool: _Array) -> _Array:
    """Cosines (n,) of a hash (d,) and those of its pool (n, d), whitened by the pool's own covariance.

    How photographs of a product usually differ (pose, light) counts little, what sets one apart counts: an exemplar's
    linear discriminant (Hariharan, Malik, Ramanan: Discriminative decorrelation, ECCV 2012), here as a cosine.
    """
    mean = pool.mean(axis=0)
    spread = pool - mean
    rows = np.vstack([one - mean, spread])
    white = linalg.solve_triangular(_factor(spread), rows.T, lower=True)
    white /= np.linalg.norm(white, axis=0) + 1e-9
    return np.asarray(white[:, 1:].T @ white[:, 0])


def map_ordered(work: Callable[[Item], Made], items: Sequence[Item]) -> Iterator[Made]:
    """`work` of each item, in order, by several threads."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(work, items)
