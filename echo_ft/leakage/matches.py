"""Find images that show the same surface: copies, altered copies, and the same part under different light.

Images of one product look alike, so plain similarity is not enough. The search has three steps for each query. A
perceptual hash finds the training images that have the most similar crops (`echo_ft.leakage.perceptual_hash`). These
candidates are aligned with the query to a fraction of a pixel. Then details such as texture, scratches and sensor grain
are compared where the product has little structure: first directly, then beyond what the other candidates explain. Two
parts of a product agree in the features of the product, whereas two images of one part agree in features that no other
part has.

Images must be upright. Rotated and mirrored copies are not found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from echo_ft.errors import EchoError
from echo_ft.leakage.perceptual_hash import (
    CROP_BOXES,
    INNER_BOX,
    centred_unit,
    clip_boxes,
    crop,
    find_candidates,
    load_grey_image,
    map_ordered,
    perceptual_hashes,
)
from echo_ft.provenance import content_hash

_Array = NDArray[np.float32]

ALIGNMENT_SIDES = (32, 64)
"""Side lengths in pixels at which a pair of images is aligned, in this order."""

MIN_SIMILARITY, MIN_EXCESS = 0.6, 0.7
"""Thresholds of `similarity` and `excess` for two images of the same surface; see `evidence`."""

MIN_PRODUCT_IMAGES = 3
"""Smallest number of other candidates that can show how similar a product's parts are. With fewer, all candidates are
used."""

MIN_USABLE_SHARE = 0.05
"""Smallest usable fraction of an image. Below it, clipped and flat pixels are compared as well."""

QUERIES_PER_PASS = 1024
"""Number of queries in memory at once. Each pass reads the training images again."""


@dataclass(frozen=True)
class Match:
    """The indices, in the compared sequences, of a training image and a query that show the same surface."""

    train_index: int
    query_index: int
    similarity: float
    """Mean correlation of small windows with little structure, from MIN_SIMILARITY to 1, which means equal files."""
    copy: bool = False
    """Whether the files have equal content."""


@dataclass(frozen=True)
class _Query:
    """The data that the comparison needs from a query's INNER_BOX."""

    hash: _Array
    """(d,) Perceptual hash."""
    templates: tuple[_Array, ...]
    """(s, s) Evened crop for each of ALIGNMENT_SIDES."""
    detail: _Array
    """(s, s) Detail in grey levels."""
    unclipped: _Array
    """(s, s) 1 where the image is clipped neither to black nor to white, else 0."""


def find_matches(training: Sequence[Path], products: Sequence[str], queries: Sequence[Path]) -> list[Match]:
    """Find all pairs of a training image and a query that show the same surface, in the order of the queries.

    `products` holds the product of each training image. Other parts of a product show how similar two of its parts are.
    Files with equal content match without a comparison. Memory use grows by only about 100 bytes per file, and by 20 MB
    for each product with more than NEAREST_HASHES images.

    Raises EchoError if an image is missing or cannot be read, because only an image that was compared can count as
    clean.
    """
    equal: dict[bytes, list[int]] = defaultdict(list)
    for index, digest in enumerate(file_digests(training)):
        equal[digest].append(index)
    # Compare only one of several equal files, because its copies would explain everything that it shares with a query.
    duplicates = list(equal.values())
    unique, unique_products = [training[group[0]] for group in duplicates], [products[group[0]] for group in duplicates]
    matches = []
    for start in range(0, len(queries), QUERIES_PER_PASS):
        chunk = queries[start : start + QUERIES_PER_PASS]
        copies = [equal.get(digest, []) for digest in file_digests(chunk)]
        matches += [Match(index, start + row, 1.0, True) for row, group in enumerate(copies) for index in group]
        rest = [row for row, group in enumerate(copies) if not group]
        for number, row, similarity in _near_duplicates(unique, unique_products, [chunk[row] for row in rest]):
            matches += [Match(index, start + rest[row], similarity) for index in duplicates[number]]
    return sorted(matches, key=lambda match: (match.query_index, -match.similarity, match.train_index))


def _near_duplicates(
    training: Sequence[Path], products: Sequence[str], paths: Sequence[Path]
) -> list[tuple[int, int, float]]:
    """Return (training index, query index, similarity) of each pair with the same surface. `paths` are the queries."""
    if not training or not paths:
        return []
    queries = list(map_ordered(_load_query, paths))
    candidates, boxes = find_candidates(training, products, np.stack([query.hash for query in queries]))
    slots: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row, slot in np.ndindex(candidates.shape):
        slots[int(candidates[row, slot])].append((row, slot))
    aligned = np.empty((*candidates.shape, ALIGNMENT_SIDES[-1], ALIGNMENT_SIDES[-1]), np.float16)

    def align(index: int) -> None:
        grey = load_grey_image(training[index])
        for row, slot in slots[index]:
            box = CROP_BOXES[boxes[row, slot]]
            for template in queries[row].templates:
                box = _fit(template, grey.evened, box)
            aligned[row, slot] = crop(grey.detail, box, ALIGNMENT_SIDES[-1])

    for _ in map_ordered(align, sorted(slots)):
        pass
    found = []
    for row, query in enumerate(queries):
        row_products = [products[index] for index in candidates[row]]
        details = aligned[row].astype(np.float32)
        similarity, excess = evidence(query.detail, query.unclipped, details, row_products)
        for slot in np.flatnonzero((similarity >= MIN_SIMILARITY) & (excess >= MIN_EXCESS)):
            found.append((int(candidates[row, slot]), row, round(float(similarity[slot]), 4)))
    return found


def evidence(detail: _Array, unclipped: _Array, candidates: _Array, products: Sequence[str]) -> tuple[_Array, _Array]:
    """Return two scores, `similarity` (n,) and `excess` (n,), for a query and each of its aligned candidates.

    `detail` (s, s) is the query's detail, and `candidates` (n, s, s) holds the details of the candidates. `unclipped`
    (s, s) is 0 where the query's light is clipped, else 1. `products` names the product of each candidate.

    `similarity` is the mean correlation of small windows with little structure. `excess` measures what a pair shares
    beyond the features of the product. It is the sum of two terms. The first is the partial correlation given all other
    candidates, which is near 0 for two different parts. The second is half the margin, in Fisher's z, between the
    similarity and that of the least similar third of the product's other candidates. It remains high if several
    candidates show the same part and therefore explain each other. Both scores are relative: if a product has fewer
    than about ten images, its parts may be mistaken for one another.
    """
    similarity = np.array([_agreement(detail, candidate) for candidate in candidates], np.float32)
    weight = unclipped if unclipped.mean() >= MIN_USABLE_SHARE else np.ones_like(unclipped)
    rows = np.stack([centred_unit(weight * one / (_deviation(one, 9) + 1)).ravel() for one in (detail, *candidates)])
    # The inverse of the correlation matrix yields the partial correlations. The ridge suppresses noise.
    inverse = np.linalg.inv(rows @ rows.T + 0.003 * np.eye(len(rows)))
    partial = -inverse[0, 1:] / np.sqrt(inverse[0, 0] * np.diag(inverse)[1:])
    z = np.arctanh(np.clip(similarity, -0.999, 0.999))
    lead = np.zeros_like(z)
    for index, product in enumerate(products):
        same_product = [other for other, name in enumerate(products) if name == product and other != index]
        enough = len(same_product) >= MIN_PRODUCT_IMAGES
        others = same_product if enough else [other for other in range(len(z)) if other != index]
        if others:
            lead[index] = z[index] - np.quantile(z[others], 1 / 3)
    return similarity, (partial + lead / 2).astype(np.float32)


def _agreement(one: _Array, other: _Array, window: int = 5, share: float = 1 / 3) -> float:
    """Return the mean correlation of two details (s, s) over their least structured windows.

    Windows count only if both images vary by at least one grey level there. Of these, the fraction `share` with the
    least structure is used.
    """
    interior = (slice(window // 2, -(window // 2)),) * 2

    def mean(values: _Array) -> _Array:
        return np.asarray(ndimage.uniform_filter(values, window)[interior])

    a, b = mean(one), mean(other)
    var_a = np.maximum(mean(one * one) - a * a, 0)
    var_b = np.maximum(mean(other * other) - b * b, 0)
    detailed = (var_a > 1) & (var_b > 1)
    if detailed.mean() < MIN_USABLE_SHARE:
        detailed[:] = True
    structure = np.sqrt(var_a * var_b)
    least = detailed & (structure <= np.quantile(structure[detailed], share))
    return float(((mean(one * other) - a * b)[least] / (structure[least] + 1e-6)).mean())


def _load_query(path: Path) -> _Query:
    grey = load_grey_image(path)
    templates = tuple(centred_unit(crop(grey.evened, INNER_BOX, side)) for side in ALIGNMENT_SIDES)
    detail = crop(grey.detail, INNER_BOX, ALIGNMENT_SIDES[-1])
    unclipped = (crop(grey.clipped, INNER_BOX, ALIGNMENT_SIDES[-1]) < 0.1).astype(np.float32)
    return _Query(perceptual_hashes(grey, INNER_BOX[None])[0], templates, detail, unclipped)


def _fit(template: _Array, image: Image.Image, box: _Array, steps: int = 6) -> _Array:
    """Return the box (4,) of `image` that correlates best with `template` (s, s; mean 0, length 1), starting at `box`.

    Gauss-Newton maximises the correlation over the four box parameters (Evangelidis, Psarakis: Parametric image
    alignment using enhanced correlation coefficient maximization, PAMI 2008).
    """
    side = len(template)
    along = (np.arange(side, dtype=np.float32) + 0.5) / side
    best_score, best_box = -1.0, box
    for _ in range(steps):
        box = clip_boxes(box)
        patch = centred_unit(crop(image, box, side))
        score = float((patch * template).sum())
        if score > best_score:
            best_score, best_box = score, box
        down, right = np.gradient(patch)
        right, down = right * (side / box[2]), down * (side / box[3])
        slopes = np.stack([right, down, right * along[None, :], down * along[:, None]]).reshape(4, -1)
        slopes -= (slopes @ patch.ravel())[:, None] * patch.ravel()
        error = (template.ravel() - score * patch.ravel()) / max(score, 0.3)
        normal = slopes @ slopes.T
        normal[np.diag_indices(4)] *= 1.001
        step = np.linalg.solve(normal + 1e-9 * np.eye(4), slopes @ error)
        box = (box + np.clip(step, -0.04, 0.04)).astype(np.float32)
        if np.abs(step).max() < 1e-4:
            break
    return best_box


def _deviation(detail: _Array, window: int) -> _Array:
    # The filter adds and subtracts along a row, so on a flat surface its result may be slightly below 0.
    return np.sqrt(np.maximum(ndimage.uniform_filter(detail * detail, window), 0))


def file_digests(paths: Sequence[Path]) -> Iterator[bytes]:
    """Yield the SHA-256 of each file, 32 bytes. Raises EchoError if a file cannot be opened."""
    for path in paths:
        try:
            yield content_hash(path)
        except (OSError, ValueError) as error:
            reason = f"{path} cannot be opened ({error.strerror if isinstance(error, OSError) else error})"
            raise EchoError(f"{reason}; restore it or rebuild the dataset") from error
