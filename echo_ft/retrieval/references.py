"""Reference retrieval: for each query, the most similar normal images, and random ones as a control.

Echo's Reference Extractor (arXiv 2501.15795) finds the nearest normal image with CLIP ViT-B/16 features and FAISS.
Here, the search stays within the product unless `scope` is `all`. It never returns the query itself, a copy of it, or
another image of the same part.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from echo_ft.data.splits import LEFT_OUT, PartKey, part_key
from echo_ft.errors import EchoError
from echo_ft.provenance import content_hash, fingerprint_bytes
from echo_ft.records import GOOD, Inspection, Reference, Rejection
from echo_ft.retrieval.descriptor_cache import DescriptorTable, extract_descriptors, hash_files
from echo_ft.retrieval.descriptors import DescriptorExtractor, load_extractor
from echo_ft.retrieval.index import VectorIndex

SCOPES = ("product", "all")

QUERIES_PER_SEARCH = 256
"""Number of queries searched at once."""


class ReferencePool:
    """The normal images that can be references in one search, and an index over their descriptors.

    Positions refer to `images`. Files with equal content share one position, listed under the first of their paths.
    `by_part` lists that position under the part of each of these files.
    """

    def __init__(
        self, normals: Sequence[Inspection], descriptors: DescriptorTable, kind: str, key: str, cache: Path | None
    ) -> None:
        """Index the `normals`, which all have descriptors. `key` is the extractor's key, and `kind` is an index type.

        If the folder `cache` is given, an approximate index is stored in it. Raises EchoError as `VectorIndex` does.
        """
        self.positions: dict[str, int] = {}
        """Maps a content hash to its position."""
        self.by_part: dict[PartKey, list[int]] = defaultdict(list)
        """Maps a part to its positions."""
        images: list[str] = []
        for normal in sorted(normals, key=lambda normal: normal.image):
            position = self.positions.setdefault(descriptors.hashes[normal.image], len(images))
            if position == len(images):
                images.append(normal.image)
            if position not in self.by_part[part_key(normal)]:
                self.by_part[part_key(normal)].append(position)
        self.images = tuple(images)
        name = fingerprint_bytes(kind.encode(), key.encode(), "\n".join(self.positions).encode())
        rows = np.array([descriptors.rows[image] for image in images])
        self.index = VectorIndex(descriptors.matrix, rows, kind, cache / f"index-{name}.faiss" if cache else None)

    def excluded(self, query: Inspection, descriptors: DescriptorTable) -> set[int]:
        """Return the positions that may not be references for a query: images of its part and copies of the query."""
        copy = self.positions.get(descriptors.hashes[query.image])
        own = set(self.by_part.get(part_key(query), ()))
        return own if copy is None else own | {copy}


@dataclass(frozen=True)
class SearchResults:
    """The references of all queries as arrays, so that a million queries fit into memory."""

    pools: list[tuple[str, ...]]
    """The images of each pool."""
    pool_of: NDArray[np.int32]
    """(q,) Index of each query's pool, or -1 if it has none."""
    positions: NDArray[np.int32]
    """(q, 2, k) Positions in the pool, retrieved and random; -1 if there are fewer than k."""
    similarities: NDArray[np.float32]
    """(q, 2, k) Cosine similarities."""

    def references_of(self, number: int, query: Inspection) -> Iterator[Reference]:
        """Yield the references of the query with this index: first the retrieved ones, then the random ones."""
        if self.pool_of[number] < 0:
            return
        images = self.pools[self.pool_of[number]]
        for method, positions, similarities in zip(
            ("retrieved", "random"), self.positions[number].tolist(), self.similarities[number].tolist(), strict=True
        ):
            for rank, (position, similarity) in enumerate(zip(positions, similarities, strict=True), start=1):
                if position >= 0:
                    yield Reference(query.id, images[position], _rounded(similarity), rank, method)


def find_references(
    queries: Sequence[Inspection],
    normals: Sequence[Inspection],
    root: Path,
    descriptor: str,
    k: int,
    scope: str,
    seed: int,
    cache: Path | None,
    index: str = "auto",
) -> tuple[Iterator[Reference], list[Rejection]]:
    """Find `k` retrieved references, most similar first, and `k` random references for each query.

    The random references depend only on `seed` and the query's id. A reference that the query itself names is added
    with the method `given` and rank 1. Similarity is the cosine, from -1 to 1. If fewer than `k` normal images are
    allowed, a query gets fewer references or none.

    `descriptor` is `skimage`, or `<model>/<pretrained>` from open_clip. `scope` is `product` or `all`. `index` is an
    index type of `echo_ft.retrieval.index`; each product has its own index unless `scope` is `all`. The folder `cache`
    keeps descriptors and approximate indexes between runs.

    Returns an iterator over the references, in the order of the queries, and one rejection for each image that cannot
    be read. Such images are used neither as queries nor as references. Raises EchoError for an unknown scope, index or
    descriptor, for `k` below 1, and for an item of `normals` that is not normal.
    """
    _check(normals, k, scope)
    given = {query.reference for query in queries if query.reference is not None}
    paths = sorted({item.image for item in (*queries, *normals)} | given)
    extractor = load_extractor(descriptor)
    descriptors, rejections = extract_descriptors(paths, root, extractor, cache)

    pools: dict[tuple[str, ...], list[Inspection]] = defaultdict(list)
    for normal in normals:
        if normal.image in descriptors.rows:
            pools[_pool(normal, scope)].append(normal)
    numbers_by_pool: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, query in enumerate(queries):
        if query.image in descriptors.rows:
            numbers_by_pool[_pool(query, scope)].append(number)

    positions = np.full((len(queries), 2, k), -1, np.int32)
    results = SearchResults([], np.full(len(queries), -1, np.int32), positions, np.zeros(positions.shape, np.float32))
    for name, numbers in numbers_by_pool.items():
        if pools[name]:
            pool = ReferencePool(pools[name], descriptors, index, extractor.key, cache)
            results.pool_of[numbers] = len(results.pools)
            results.pools.append(pool.images)
            for start in range(0, len(numbers), QUERIES_PER_SEARCH):
                chunk = numbers[start : start + QUERIES_PER_SEARCH]
                _search(pool, chunk, [queries[number] for number in chunk], descriptors, seed, results)
    return _references(queries, descriptors, results), rejections


def _check(normals: Sequence[Inspection], k: int, scope: str) -> None:
    if scope not in SCOPES:
        raise EchoError(f"references: scope cannot be {scope!r}; choose from {', '.join(SCOPES)}")
    if k < 1:
        raise EchoError(f"references: k is {k}; set it to at least 1")
    wrong = next((normal for normal in normals if normal.condition != GOOD), None)
    if wrong:
        raise EchoError(f"{wrong.image} is {wrong.condition}, not {GOOD}; use only normal images as references")


def _pool(inspection: Inspection, scope: str) -> tuple[str, ...]:
    return (inspection.dataset, inspection.product) if scope == "product" else ()


def _references(
    queries: Sequence[Inspection], descriptors: DescriptorTable, results: SearchResults
) -> Iterator[Reference]:
    for number, query in enumerate(queries):
        yield from results.references_of(number, query)
        if query.reference is not None and {query.image, query.reference} <= descriptors.rows.keys():
            (similarity,) = _similarities(descriptors.vector(query.image), descriptors.vectors([query.reference]))
            yield Reference(query.id, query.reference, _rounded(float(similarity)), 1, "given")


def _search(
    pool: ReferencePool,
    numbers: Sequence[int],
    queries: Sequence[Inspection],
    descriptors: DescriptorTable,
    seed: int,
    results: SearchResults,
) -> None:
    """Write the references of `queries` to `results`. `numbers` holds the index of each query."""
    k, count = results.positions.shape[2], len(pool.images)
    excluded = [pool.excluded(query, descriptors) for query in queries]
    # Search deep enough to skip the largest number of excluded positions.
    depth = min(count, k + max(map(len, excluded)))
    vectors = descriptors.vectors([query.image for query in queries])
    _, positions = pool.index.search(vectors, depth)
    for row, (number, query) in enumerate(zip(numbers, queries, strict=True)):
        allowed = (one for one in positions[row].tolist() if one >= 0 and one not in excluded[row])
        retrieved = [*islice(allowed, k)]
        if len(retrieved) < min(k, count - len(excluded[row])):  # the approximate search missed some neighbours
            retrieved = _exhaustive_search(pool, vectors[row], excluded[row], k)
        drawn = _draw_random(count, excluded[row], k, random.Random(f"{seed}/{query.id}"))
        for method, found in enumerate((retrieved, drawn)):
            similarities = _similarities(vectors[row], descriptors.vectors([pool.images[one] for one in found]))
            ranked = np.lexsort((found, -similarities)) if method == 0 else np.arange(len(found))
            results.positions[number, method, : len(found)] = np.array(found, np.int32)[ranked]
            results.similarities[number, method, : len(found)] = similarities[ranked]


def _similarities(vector: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the similarities (n,) of a vector (d,) to `others` (n, d).

    Those of the index are float32, and their last digit depends on the number of threads.
    """
    return others.astype(np.float64) @ vector.astype(np.float64)


def _exhaustive_search(pool: ReferencePool, vector: NDArray[np.float32], excluded: set[int], k: int) -> list[int]:
    similarities = pool.index.compare(vector)
    similarities[list(excluded)] = -np.inf
    count = min(k, len(similarities) - len(excluded))
    return np.argsort(-similarities, kind="stable")[:count].tolist()


def _draw_random(count: int, excluded: set[int], k: int, rng: random.Random) -> list[int]:
    positions = rng.sample(range(count), min(count, k + len(excluded)))
    return [position for position in positions if position not in excluded][:k]


def _rounded(similarity: float) -> float:
    return round(max(-1.0, min(1.0, similarity)), 6)


class ReferenceSearch:
    """Finds the normal images that are most similar to an image from outside the dataset."""

    def __init__(
        self,
        normals: Mapping[tuple[str, str], Sequence[str]],
        descriptors: DescriptorTable,
        extractor: DescriptorExtractor,
        k: int,
    ) -> None:
        """Index the `normals`, the images of each (dataset, product). A search returns `k` references.

        `extractor` made the `descriptors`. Images without a descriptor are left out, and files with equal content count
        as one reference.
        """
        self.k = k
        self.extractor = extractor
        self.descriptors = descriptors
        self.images: dict[tuple[str, str], tuple[str, ...]] = {}
        for key, images in normals.items():
            readable = [image for image in sorted(images) if image in descriptors.rows]
            distinct = {descriptors.hashes[image]: image for image in reversed(readable)}
            if distinct:
                self.images[key] = tuple(sorted(distinct.values()))
        self.indexes = {
            key: VectorIndex(descriptors.matrix, np.array([descriptors.rows[one] for one in pool]), "flat")
            for key, pool in self.images.items()
        }

    def find(self, path: Path, keys: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], list[Reference]]:
        """Return the (dataset, product) in `keys` that has the most similar normal image, and its `k` best references.

        The image itself shows its product, but is never its own reference. Raises EchoError if no product among `keys`
        has a normal image, or if the image cannot be read.
        """
        (vector,), (error,) = self.extractor.vectors([path])
        if vector is None:
            raise EchoError(f"image {path} cannot be read: {error}; replace it")
        own = content_hash(path).hex()
        found: dict[tuple[str, str], list[Reference]] = {}
        nearest: dict[tuple[str, str], float] = {}
        for key in keys:
            if key not in self.indexes:
                continue
            images = self.images[key]
            (similarities,), (positions,) = self.indexes[key].search(vector[None], min(len(images), self.k + 1))
            nearest[key] = float(similarities[0])
            near = [(images[position], float(value)) for position, value in zip(positions, similarities, strict=True)]
            near = [(image, value) for image, value in near if self.descriptors.hashes[image] != own][: self.k]
            found[key] = [Reference(str(path), image, value, rank) for rank, (image, value) in enumerate(near, start=1)]
        if not found:
            names = ", ".join(sorted({name for _, name in keys}))
            raise EchoError(f"the dataset has no normal image of {names} to compare with; add some and rebuild it")
        best = max(found, key=nearest.__getitem__)
        return best, found[best]


def references_in_left_out_fold(inspections: Sequence[Inspection], root: Path) -> dict[str, str]:
    """Return the given references of training images that are in the left-out fold, keyed by inspection id.

    Files are compared by content, so a copy of a left-out image counts as well.
    """
    left_out = [inspection.image for inspection in inspections if inspection.split == LEFT_OUT]
    given = {i.id: i.reference for i in inspections if i.split == "train" and i.reference is not None}
    if not left_out or not given:
        return {}
    hashes, _ = hash_files([*{*left_out, *given.values()}], root)
    left_out_hashes = {hashes[image] for image in left_out if image in hashes}
    return {name: reference for name, reference in given.items() if hashes.get(reference) in left_out_hashes}
