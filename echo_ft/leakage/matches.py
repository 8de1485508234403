"""Photographs that show the same surface: copies, altered copies, and one part under another light.

Photographs of one product look alike, so similarity alone tells little. For each photograph that is asked about, three
steps: the nearest photographs that were trained on are found by a perceptual hash of their crops; those are laid over
it to a fraction of a pixel; and what remains where the product has least structure (texture, scratches, grain of the
sensor) is compared, first by itself, then beyond what other photographs like these explain. Two parts of a product
agree in the product; two photographs of one part agree in what no other part has.

Photographs must be upright: a copy that was turned or mirrored is not found. `echo_ft.leakage.perceptual_hash` says what a
photograph is compared as, and does the first step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from echo_ft.errors import EchoError
from echo_ft.leakage.perceptual_hash import (
    INNER_BOX,
    VIEWS,
    _Array,
    cut,
    inside,
    load_grey_image,
    map_ordered,
    nearest,
    perceptual_hashes,
    unit,
)
from echo_ft.provenance import content_hash

ALIGNMENT_SIDES = (32, 64)
"""Sides, in pixels, at which a pair is laid over one another, one after the other."""

SAME, BEYOND = 0.6, 0.7
"""Least `similarity` and least `excess` of two photographs of one surface; see `evidence`."""

MIN_PRODUCT_IMAGES = 3
"""Photographs of a product that are too few to tell how alike its parts are: those of all products then stand in."""

MIN_USABLE_SHARE = 0.05
"""Share of a photograph that must be neither clipped nor flat, for the rest to be passed over."""

QUERIES_PER_PASS = 1024
"""Photographs that are asked about, held at once; those that were trained on are read again for each chunk."""


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
class _Query:
    """What is kept of the INNER of a photograph that is asked about."""

    hash: _Array
    templates: tuple[_Array, ...]
    """Evened, at each of LOOKS."""
    detail: _Array
    seen: _Array
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
    for start in range(0, len(asked), QUERIES_PER_PASS):
        chunk = asked[start : start + QUERIES_PER_PASS]
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
    queries = list(map_ordered(_query, asked))
    candidates, views = nearest(trained, products, np.stack([query.hash for query in queries]))
    wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row, slot in np.ndindex(candidates.shape):
        wanted[int(candidates[row, slot])].append((row, slot))
    laid = np.empty((*candidates.shape, ALIGNMENT_SIDES[-1], ALIGNMENT_SIDES[-1]), np.float16)

    def lay(place: int) -> None:
        look = load_grey_image(trained[place])
        for row, slot in wanted[place]:
            box = VIEWS[views[row, slot]]
            for template in queries[row].templates:
                box = _fit(template, look.evened, box)
            laid[row, slot] = cut(look.detail, box, ALIGNMENT_SIDES[-1])

    for _ in map_ordered(lay, sorted(wanted)):
        pass
    found = []
    for row, query in enumerate(queries):
        kinds = [products[place] for place in candidates[row]]
        similarity, excess = evidence(query.detail, query.seen, laid[row].astype(np.float32), kinds)
        for slot in np.flatnonzero((similarity >= SAME) & (excess >= BEYOND)):
            found.append((int(candidates[row, slot]), row, round(float(similarity[slot]), 4)))
    return found


def evidence(detail: _Array, seen: _Array, laid: _Array, products: Sequence[str]) -> tuple[_Array, _Array]:
    """How alike a photograph's detail (s, s) and that of each photograph laid over it (n, s, s) are: two figures each.

    `seen` (s, s) is 0 where the photograph's light is clipped, 1 elsewhere.

    `similarity` (n,) is the mean correlation of small windows of little structure. `excess` (n,) is what a pair shares
    beyond the product: its partial correlation given all the other photographs, which is near 0 for two parts, plus
    half of what its similarity has ahead (in Fisher's z) of the least similar third of its `products`' others, which
    stands where several photographs show the same part and so explain one another. Both compare: where a product has
    fewer than about ten photographs, its parts may pass for one.
    """
    similarity = np.array([_agreement(detail, one) for one in laid], np.float32)
    weight = seen if seen.mean() >= MIN_USABLE_SHARE else np.ones_like(seen)
    rows = np.stack([unit(weight * one / (_deviation(one, 9) + 1)).ravel() for one in (detail, *laid)])
    # The inverse of correlations holds the partial ones; the ridge keeps noise from explaining anything.
    inverse = np.linalg.inv(rows @ rows.T + 0.003 * np.eye(len(rows)))
    partial = -inverse[0, 1:] / np.sqrt(inverse[0, 0] * np.diag(inverse)[1:])
    z = np.arctanh(np.clip(similarity, -0.999, 0.999))
    ahead = np.zeros_like(z)
    for place, product in enumerate(products):
        fellows = [other for other, its in enumerate(products) if its == product and other != place]
        others = fellows if len(fellows) >= MIN_PRODUCT_IMAGES else [other for other in range(len(z)) if other != place]
        if others:
            ahead[place] = z[place] - np.quantile(z[others], 1 / 3)
    return similarity, (partial + ahead / 2).astype(np.float32)


def _agreement(one: _Array, other: _Array, window: int = 5, share: float = 1 / 3) -> float:
    """Mean correlation over the windows of least structure: a `share` of those that have a grey level of it in both."""
    inside = (slice(window // 2, -(window // 2)),) * 2

    def mean(values: _Array) -> _Array:
        return np.asarray(ndimage.uniform_filter(values, window)[inside])

    a, b = mean(one), mean(other)
    var_a = np.maximum(mean(one * one) - a * a, 0)
    var_b = np.maximum(mean(other * other) - b * b, 0)
    detailed = (var_a > 1) & (var_b > 1)
    if detailed.mean() < MIN_USABLE_SHARE:
        detailed[:] = True
    structure = np.sqrt(var_a * var_b)
    least = detailed & (structure <= np.quantile(structure[detailed], share))
    return float(((mean(one * other) - a * b)[least] / (structure[least] + 1e-6)).mean())


def _query(path: Path) -> _Query:
    look = load_grey_image(path)
    templates = tuple(unit(cut(look.evened, INNER_BOX, side)) for side in ALIGNMENT_SIDES)
    seen = (cut(look.clipped, INNER_BOX, ALIGNMENT_SIDES[-1]) < 0.1).astype(np.float32)
    return _Query(
        perceptual_hashes(look, INNER_BOX[None])[0], templates, cut(look.detail, INNER_BOX, ALIGNMENT_SIDES[-1]), seen
    )


def _fit(template: _Array, image: Image.Image, box: _Array, steps: int = 6) -> _Array:
    """The box of `image` that is most like `template` (s, s; mean 0, length 1), near the one given.

    Gauss-Newton on the correlation over the box's four numbers (Evangelidis, Psarakis: Parametric image alignment
    using enhanced correlation coefficient maximization, PAMI 2008).
    """
    side = len(template)
    along = (np.arange(side, dtype=np.float32) + 0.5) / side
    best, kept = -1.0, box
    for _ in range(steps):
        box = inside(box)
        seen = unit(cut(image, box, side))
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


def _deviation(detail: _Array, window: int) -> _Array:
    return np.sqrt(ndimage.uniform_filter(detail * detail, window))


def digests(paths: Sequence[Path]) -> Iterator[bytes]:
    """SHA-256 of each file. Raises EchoError where one cannot be opened."""
    for path in paths:
        try:
            yield content_hash(path)
        except OSError as error:
            reason = f"{path} cannot be opened ({error.strerror})"
            raise EchoError(f"{reason}; put it back or build the dataset again") from error
