"""Photographs that show the same surface: copies, altered copies, and one part under another light.

Photographs of one product look alike, so similarity alone tells little. For each photograph that is asked about, three
steps: the nearest photographs that were trained on are found by a perceptual hash of their crops; those are laid over
it to a fraction of a pixel; and what remains where the product has least structure (texture, scratches, grain of the
sensor) is compared, first by itself, then beyond what other photographs like these explain. Two parts of a product
agree in the product; two photographs of one part agree in what no other part has.

Grey images are squares of SIDE pixels whatever the file's shape, boxes in them are (x, y, width, height) in shares of
the side. Photographs must be upright: a copy that was turned or mirrored is not found.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, linalg, ndimage

from echo_ft.images import load_image
from echo_ft.provenance import content_hash
from echo_ft.records import EchoError

Array = NDArray[np.float32]
Item = TypeVar("Item")
Made = TypeVar("Made")

SIDE = 160
"""Side of the grey squares, in pixels."""

LOOKS = (32, 64)
"""Sides, in pixels, at which a pair is laid over one another, one after the other."""

INNER = np.array([0.1, 0.1, 0.8, 0.8], np.float32)
"""The part of a photograph that is looked for in others: a crop of 90 % of each side still has all of it."""

HASH = 16
"""Lowest frequencies of each axis in a hash."""

POOL = 256
"""Photographs whose hashes are nearest; what sets one apart from them ranks it."""

APART = 128
"""Photographs that join them of products with more than POOL, by what sets them apart from their product: there, many
others are nearer to a crop than what it was cut from.
"""

LEARNT = 256
"""Photographs from which is learnt how those of a product usually differ."""

NEAREST = 24
"""Photographs that are laid over one that is asked about."""

SAME, BEYOND = 0.6, 0.7
"""Least `similarity` and least `excess` of two photographs of one surface; see `evidence`."""

FEW = 3
"""Photographs of a product that are too few to tell how alike its parts are: those of all products then stand in."""

LEAST = 0.05
"""Share of a photograph that must be neither clipped nor flat, for the rest to be passed over."""

CHUNK = 1024
"""Photographs that are asked about, held at once; those that were trained on are read again for each chunk."""

BLOCK = 128
"""Photographs that were trained on, held at once."""


@dataclass(frozen=True)
class Match:
    """Two photographs of one surface, by their places in the sequences compared."""

    trained: int
    asked: int
    similarity: float
    """Mean correlation of small windows where the pair has least structure, SAME to 1; 1 for equal files."""
    copy: bool = False
    """Whether the files are equal."""


@dataclass(frozen=True)
class _Look:
    """A photograph as it is compared: without the local mean, in grey levels, and in units of the local deviation."""

    detail: Image.Image
    evened: Image.Image
    clipped: Image.Image
    """1 where the grey is black or white."""


@dataclass(frozen=True)
class _Query:
    """What is kept of the INNER of a photograph that is asked about."""

    hash: Array
    templates: tuple[Array, ...]
    """Evened, at each of LOOKS."""
    detail: Array
    seen: Array
    """1 where neither black nor white is clipped, 0 elsewhere."""


def find_matches(trained: Sequence[Path], products: Sequence[str], asked: Sequence[Path]) -> list[Match]:
    """Pairs of one of `trained` and one of `asked` that show the same surface, by the order of `asked`.

    `products` are those of `trained`: they tell how alike two parts of one product are. Files of equal content match
    without a look. Memory depends on neither number, but for 100 bytes or so a file, and 20 MB for each product with
    more than POOL of them.
    Raises EchoError where a photograph is missing or cannot be read: what was not looked at is not clean.
    """
    equal: dict[bytes, list[int]] = defaultdict(list)
    for place, digest in enumerate(digests(trained)):
        equal[digest].append(place)
    # Of equal files one is looked at: the others would explain what it has in common with a photograph.
    twins = list(equal.values())
    known, kinds = [trained[places[0]] for places in twins], [products[places[0]] for places in twins]
    found = []
    for start in range(0, len(asked), CHUNK):
        chunk = asked[start : start + CHUNK]
        copies = [equal.get(digest, []) for digest in digests(chunk)]
        found += [Match(place, start + row, 1.0, True) for row, places in enumerate(copies) for place in places]
        rest = [row for row, places in enumerate(copies) if not places]
        for one, row, similarity in _near(known, kinds, [chunk[row] for row in rest]):
            found += [Match(place, start + rest[row], similarity) for place in twins[one]]
    return sorted(found, key=lambda match: (match.asked, -match.similarity, match.trained))


def _near(trained: Sequence[Path], products: Sequence[str], asked: Sequence[Path]) -> list[tuple[int, int, float]]:
    """(place among trained, place among asked, similarity) of each pair of one surface."""
    if not trained or not asked:
        return []
    queries = list(_each(_query, asked))
    candidates, views = _candidates(trained, products, np.stack([query.hash for query in queries]))
    wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row, slot in np.ndindex(candidates.shape):
        wanted[int(candidates[row, slot])].append((row, slot))
    laid = np.empty((*candidates.shape, LOOKS[-1], LOOKS[-1]), np.float16)

    def lay(place: int) -> None:
        look = _look(trained[place])
        for row, slot in wanted[place]:
            box = VIEWS[views[row, slot]]
            for template in queries[row].templates:
                box = _fit(template, look.evened, box)
            laid[row, slot] = _cut(look.detail, box, LOOKS[-1])

    for _ in _each(lay, sorted(wanted)):
        pass
    found = []
    for row, query in enumerate(queries):
        kinds = [products[place] for place in candidates[row]]
        similarity, excess = evidence(query.detail, query.seen, laid[row].astype(np.float32), kinds)
        for slot in np.flatnonzero((similarity >= SAME) & (excess >= BEYOND)):
            found.append((int(candidates[row, slot]), row, round(float(similarity[slot]), 4)))
    return found


def evidence(detail: Array, seen: Array, laid: Array, products: Sequence[str]) -> tuple[Array, Array]:
    """How alike a photograph's detail (s, s) and that of each photograph laid over it (n, s, s) are: two figures each.

    `seen` (s, s) is 0 where the photograph's light is clipped, 1 elsewhere.

    `similarity` (n,) is the mean correlation of small windows of little structure. `excess` (n,) is what a pair shares
    beyond the product: its partial correlation given all the other photographs, which is near 0 for two parts, plus
    half of what its similarity has ahead (in Fisher's z) of the least similar third of its `products`' others, which
    stands where several photographs show the same part and so explain one another. Both compare: where a product has
    fewer than about ten photographs, its parts may pass for one.
    """
    similarity = np.array([_agreement(detail, one) for one in laid], np.float32)
    weight = seen if seen.mean() >= LEAST else np.ones_like(seen)
    rows = np.stack([_unit(weight * one / (_deviation(one, 9) + 1)).ravel() for one in (detail, *laid)])
    # The inverse of correlations holds the partial ones; the ridge keeps noise from explaining anything.
    inverse = np.linalg.inv(rows @ rows.T + 0.003 * np.eye(len(rows)))
    partial = -inverse[0, 1:] / np.sqrt(inverse[0, 0] * np.diag(inverse)[1:])
    z = np.arctanh(np.clip(similarity, -0.999, 0.999))
    ahead = np.zeros_like(z)
    for place, product in enumerate(products):
        fellows = [other for other, its in enumerate(products) if its == product and other != place]
        others = fellows if len(fellows) >= FEW else [other for other in range(len(z)) if other != place]
        if others:
            ahead[place] = z[place] - np.quantile(z[others], 1 / 3)
    return similarity, (partial + ahead / 2).astype(np.float32)


def _agreement(one: Array, other: Array, window: int = 5, share: float = 1 / 3) -> float:
    """Mean correlation over the windows of least structure: a `share` of those that have a grey level of it in both."""
    inside = (slice(window // 2, -(window // 2)),) * 2

    def mean(values: Array) -> Array:
        return np.asarray(ndimage.uniform_filter(values, window)[inside])

    a, b = mean(one), mean(other)
    var_a = np.maximum(mean(one * one) - a * a, 0)
    var_b = np.maximum(mean(other * other) - b * b, 0)
    detailed = (var_a > 1) & (var_b > 1)
    if detailed.mean() < LEAST:
        detailed[:] = True
    structure = np.sqrt(var_a * var_b)
    least = detailed & (structure <= np.quantile(structure[detailed], share))
    return float(((mean(one * other) - a * b)[least] / (structure[least] + 1e-6)).mean())


def _views() -> Array:
    """Boxes (n, 4) in which a photograph may show another's INNER: if either is a crop of the other, at several places.

    `linear` is the share of the sides that the crop keeps; the places are at most 0.05 apart.
    """
    boxes = []
    for linear in (0.9, 0.925, 0.95, 0.975):
        x, side = float(INNER[0]), float(INNER[2])
        for scale, low, high in (
            (side * linear, x * linear, x * linear + 1 - linear),  # the other is a crop of this one
            (side / linear, (x - 1 + linear) / linear, x / linear),  # this one is a crop of the other
        ):
            steps = np.linspace(low, high, int(np.ceil((high - low) / 0.05 - 1e-6)) + 1)
            boxes += [(left, top, scale, scale) for left in steps for top in steps]
    shifts = (-0.025, 0.0, 0.025)
    boxes += [(INNER[0] + right, INNER[1] + down, INNER[2], INNER[3]) for right in shifts for down in shifts]
    return _inside(np.array(boxes, np.float32))


def _inside(boxes: Array) -> Array:
    """The boxes (..., 4), moved into the image and made no smaller than 0.6 of its sides."""
    size = np.clip(boxes[..., 2:], 0.6, 1)
    return np.concatenate([np.clip(boxes[..., :2], 0, 1 - size), size], axis=-1)


VIEWS = _views()


def _candidates(
    trained: Sequence[Path], products: Sequence[str], hashes: Array
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each hash of an INNER (n, d) the NEAREST photographs, (n, k), and in which of VIEWS each shows it."""
    members = {product: np.flatnonzero(np.array(products) == product) for product in dict.fromkeys(products)}
    crowds = {product: _Crowd(trained, own) for product, own in members.items() if len(own) > POOL}
    size = min(POOL + bool(crowds) * APART, len(trained))
    near = np.full((len(hashes), 0), -1, np.float32)
    places, views = (np.zeros((len(hashes), 0), np.int64) for _ in range(2))
    vectors = np.zeros((len(hashes), 0, hashes.shape[1]), np.float16)
    apart = near
    for start in range(0, len(trained), BLOCK):
        block = np.stack(list(_each(_view_hashes, trained[start : start + BLOCK])))
        cosines = (hashes @ block.reshape(-1, block.shape[-1]).T).reshape(len(hashes), len(block), len(VIEWS))
        best = cosines.argmax(axis=2)
        here = np.broadcast_to(np.arange(len(block)), best.shape)
        near = np.concatenate([near, np.take_along_axis(cosines, best[..., None], 2)[..., 0]], axis=1)
        apart = np.concatenate([apart, _apart(hashes, block, products[start : start + BLOCK], crowds)], axis=1)
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
    order = np.argsort(-np.stack(ranked), axis=1, kind="stable")[:, :NEAREST]
    return np.take_along_axis(places, order, axis=1), np.take_along_axis(views, order, axis=1)


def _first(near: Array, apart: Array, size: int) -> NDArray[np.int64]:
    """Places (n, size) of the POOL nearest (n, m), and of those of the others that are most `apart` (n, m)."""
    top = np.argpartition(-near, POOL - 1, axis=1)
    if size == POOL:
        return top[:, :POOL]
    rest = np.take_along_axis(apart, top[:, POOL:], axis=1)
    more = np.argpartition(-rest, size - POOL - 1, axis=1)[:, : size - POOL]
    return np.concatenate([top[:, :POOL], np.take_along_axis(top[:, POOL:], more, axis=1)], axis=1)


class _Crowd:
    """How the photographs of a product that has more than POOL of them usually differ, in each of VIEWS."""

    def __init__(self, trained: Sequence[Path], members: NDArray[np.int64]) -> None:
        """Learnt from up to LEARNT of the `members`, places in `trained`, at even distances."""
        some = members[np.linspace(0, len(members) - 1, min(LEARNT, len(members))).astype(int)]
        hashes = np.stack(list(_each(_view_hashes, [trained[place] for place in some])))
        self.means = hashes.mean(axis=0)
        self.factors = np.stack([_factor(hashes[:, view] - mean) for view, mean in enumerate(self.means)])

    def cosines(self, hashes: Array, block: Array) -> Array:
        """Of hashes (n, d) and photographs (m, views, d), the greatest over the views, each whitened: (n, m)."""
        most = np.full((len(hashes), len(block)), -1, np.float32)
        for view, (mean, factor) in enumerate(zip(self.means, self.factors, strict=True)):
            rows = np.concatenate([hashes, block[:, view]]) - mean
            white = linalg.solve_triangular(factor, rows.T, lower=True)
            white /= np.linalg.norm(white, axis=0) + 1e-9
            np.maximum(most, white[:, : len(hashes)].T @ white[:, len(hashes) :], out=most)
        return most


def _apart(hashes: Array, block: Array, products: Sequence[str], crowds: Mapping[str, _Crowd]) -> Array:
    """What sets photographs (m, views, d) apart as it does the hashes (n, d), by their crowds: (n, m); -1 without."""
    found = np.full((len(hashes), len(block)), -1, np.float32)
    for product in set(products) & crowds.keys():
        own = np.flatnonzero(np.array(products) == product)
        found[:, own] = crowds[product].cosines(hashes, block[own])
    return found


def _factor(spread: Array) -> Array:
    """The Cholesky factor (d, d) of the covariance of rows (n, d) of mean 0, with a ridge."""
    covariance = spread.T @ spread / len(spread)
    covariance[np.diag_indices_from(covariance)] += 5e-5 * np.trace(covariance) + 1e-9
    return np.linalg.cholesky(covariance)


def _set_apart(one: Array, pool: Array) -> Array:
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


def _query(path: Path) -> _Query:
    look = _look(path)
    templates = tuple(_unit(_cut(look.evened, INNER, side)) for side in LOOKS)
    seen = (_cut(look.clipped, INNER, LOOKS[-1]) < 0.1).astype(np.float32)
    return _Query(_hashes(look, INNER[None])[0], templates, _cut(look.detail, INNER, LOOKS[-1]), seen)


def _view_hashes(path: Path) -> Array:
    return _hashes(_look(path), VIEWS)


def _hashes(look: _Look, boxes: Array) -> Array:
    """Perceptual hashes (n, HASH * HASH) of boxes (n, 4), of length 1: the lowest frequencies, less the mean.

    As pHash, but with real numbers: the signs alone cannot tell one part of a product from the next.
    """
    cuts = np.stack([_cut(look.evened, box, 2 * HASH) for box in boxes])
    low = fft.dctn(cuts, axes=(1, 2), norm="ortho")[:, :HASH, :HASH].reshape(len(boxes), -1)
    low[:, 0] = 0
    return np.asarray(low / (np.linalg.norm(low, axis=1, keepdims=True) + 1e-9))


def _fit(template: Array, image: Image.Image, box: Array, steps: int = 6) -> Array:
    """The box of `image` that is most like `template` (s, s; mean 0, length 1), near the one given.

    Gauss-Newton on the correlation over the box's four numbers (Evangelidis, Psarakis: Parametric image alignment
    using enhanced correlation coefficient maximization, PAMI 2008).
    """
    side = len(template)
    along = (np.arange(side, dtype=np.float32) + 0.5) / side
    best, kept = -1.0, box
    for _ in range(steps):
        box = _inside(box)
        seen = _unit(_cut(image, box, side))
        score = float((seen * template).sum())
        if score > best:
            best, kept = score, box
        down, right = np.gradient(seen)
        right, down = right * (side / box[2]), down * (side / box[3])
        slopes = np.stack([right, down, right * along[None, :], down * along[:, None]]).reshape(4, -1)
        slopes -= (slopes @ seen.ravel())[:, None] * seen.ravel()
        error = (template.ravel() - score * seen.ravel()) / max(score, 0.3)
        normal = slopes @ slopes.T
        normal[np.diag_indices(4)] *= 1.001
        move = np.linalg.solve(normal + 1e-9 * np.eye(4), slopes @ error)
        box = (box + np.clip(move, -0.04, 0.04)).astype(np.float32)
        if np.abs(move).max() < 1e-4:
            break
    return kept


def _look(path: Path) -> _Look:
    image = load_image(path, "L", (SIDE, SIDE))
    grey = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    detail = grey - _smooth(grey)
    deviation = np.sqrt(np.maximum(_smooth(detail * detail), 0))
    clipped = ((grey < 2) | (grey > 253)).astype(np.float32)
    return _Look(*(Image.fromarray(values) for values in (detail, detail / (deviation + 3), clipped)))


def _smooth(values: Array) -> Array:
    return np.asarray(ndimage.gaussian_filter(values, SIDE / 20, mode="nearest", truncate=3))


def _deviation(detail: Array, window: int) -> Array:
    return np.sqrt(ndimage.uniform_filter(detail * detail, window))


def _cut(image: Image.Image, box: Array, side: int) -> Array:
    """What a box of an image holds, (side, side)."""
    left, top, width, height = (float(value) * SIDE for value in box)
    edges = left, top, min(left + width, SIDE), min(top + height, SIDE)
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=edges), np.float32)


def _unit(values: Array) -> Array:
    centred = values - values.mean()
    return np.asarray(centred / (np.linalg.norm(centred) + 1e-9))


def digests(paths: Sequence[Path]) -> Iterator[bytes]:
    """SHA-256 of each file. Raises EchoError where one cannot be opened."""
    for path in paths:
        try:
            yield content_hash(path)
        except OSError as error:
            reason = f"{path} cannot be opened ({error.strerror})"
            raise EchoError(f"{reason}; put it back or build the dataset again") from error


def _each(work: Callable[[Item], Made], items: Sequence[Item]) -> Iterator[Made]:
    """`work` of each item, in order, by several threads."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(work, items)
