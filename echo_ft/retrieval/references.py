"""References: for each photograph the most similar normal ones, and random ones as the control.

Echo's Reference Extractor (arXiv 2501.15795) takes the nearest normal image by CLIP ViT-B/16 features in a FAISS
index. Here the search stays within the product unless `scope` is `all`, and neither the photograph itself, nor a copy
of it, nor another photograph of the same part comes back.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from echo_ft.data.splits import LEFT_OUT, Key, part
from echo_ft.errors import EchoError
from echo_ft.provenance import fingerprint_bytes
from echo_ft.records import GOOD, Inspection, Reference, Rejection
from echo_ft.retrieval.descriptor_cache import DescriptorTable, describe_files, hash_files
from echo_ft.retrieval.descriptors import describer
from echo_ft.retrieval.index import VectorIndex

SCOPES = ("product", "all")

QUERIES_PER_SEARCH = 256
"""Queries searched at once."""


class Pool:
    """The normal photographs that one search chooses from, and the index over their features, by place in `images`.

    Files of equal content are one place, under the first path; `by_part` then has it for the parts of all of them.
    """

    def __init__(
        self, normals: Sequence[Inspection], features: DescriptorTable, kind: str, key: str, cache: Path | None
    ) -> None:
        """`normals` have features, of the describer with this `key`; see `VectorIndex` for `kind`."""
        self.places: dict[str, int] = {}
        """By the content's hash."""
        self.by_part: dict[Key, list[int]] = defaultdict(list)
        images: list[str] = []
        for normal in sorted(normals, key=lambda normal: normal.image):
            place = self.places.setdefault(features.hashes[normal.image], len(images))
            if place == len(images):
                images.append(normal.image)
            if place not in self.by_part[part(normal)]:
                self.by_part[part(normal)].append(place)
        self.images = tuple(images)
        name = fingerprint_bytes(kind.encode(), key.encode(), "\n".join(self.places).encode())
        rows = np.array([features.rows[image] for image in images])
        self.index = VectorIndex(features.matrix, rows, kind, cache / f"index-{name}.faiss" if cache else None)

    def barred(self, query: Inspection, features: DescriptorTable) -> set[int]:
        """The places that a query must not get: its own content, and its own part."""
        copy = self.places.get(features.hashes[query.image])
        own = set(self.by_part.get(part(query), ()))
        return own if copy is None else own | {copy}


@dataclass(frozen=True)
class Found:
    """What the searches found, as numbers: a million queries fit into memory."""

    pools: list[tuple[str, ...]]
    """The images of each pool."""
    pool_of: NDArray[np.int32]
    """(q,) Pool of each query, -1 without one."""
    places: NDArray[np.int32]
    """(q, 2, k) Retrieved and random places in the pool; -1 where there are fewer."""
    similarities: NDArray[np.float32]
    """(q, 2, k)"""

    def of(self, number: int, query: Inspection) -> Iterator[Reference]:
        """The references of one query: retrieved, then random."""
        if self.pool_of[number] < 0:
            return
        images = self.pools[self.pool_of[number]]
        for method, places, similarities in zip(
            ("retrieved", "random"), self.places[number].tolist(), self.similarities[number].tolist(), strict=True
        ):
            for rank, (place, similarity) in enumerate(zip(places, similarities, strict=True), start=1):
                if place >= 0:
                    yield Reference(query.id, images[place], _rounded(similarity), rank, method)


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
    """For each query `k` retrieved references, most similar first, and `k` random ones, which `seed` and its id decide.

    A reference that the query names stands as `given`, rank 1, beside them. `descriptor` is an open_clip
    `<model>/<pretrained>` or `skimage`; `scope` is `product` or `all`; `index` is the kind of `echo_ft.retrieval.index`, one
    index a product unless `scope` is `all`; similarity is the cosine, -1..1. Where fewer than `k` normals are
    admissible, those come; where none is, the query has none. Images that cannot be read are rejected by path, once
    each, and are neither query nor candidate. `cache` keeps features and approximate indices between runs. The
    references come in the order of the queries, each made when it is asked for.

    Raises EchoError for an unknown scope, index or descriptor, for `k` below 1, and for a normal that is not one.
    """
    _check(normals, k, scope)
    given = {query.reference for query in queries if query.reference is not None}
    paths = sorted({item.image for item in (*queries, *normals)} | given)
    describe = describer(descriptor)
    features, rejections = describe_files(paths, root, describe, cache)

    pools: dict[tuple[str, ...], list[Inspection]] = defaultdict(list)
    for normal in normals:
        if normal.image in features.rows:
            pools[_pool(normal, scope)].append(normal)
    asked: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, query in enumerate(queries):
        if query.image in features.rows:
            asked[_pool(query, scope)].append(number)

    places = np.full((len(queries), 2, k), -1, np.int32)
    found = Found([], np.full(len(queries), -1, np.int32), places, np.zeros(places.shape, np.float32))
    for name, numbers in asked.items():
        if pools[name]:
            pool = Pool(pools[name], features, index, describe.key, cache)
            found.pool_of[numbers] = len(found.pools)
            found.pools.append(pool.images)
            for start in range(0, len(numbers), QUERIES_PER_SEARCH):
                chunk = numbers[start : start + QUERIES_PER_SEARCH]
                _search(pool, chunk, [queries[number] for number in chunk], features, seed, found)
    return _references(queries, features, found), rejections


def _check(normals: Sequence[Inspection], k: int, scope: str) -> None:
    if scope not in SCOPES:
        raise EchoError(f"references: scope cannot be {scope!r}; choose from {', '.join(SCOPES)}")
    if k < 1:
        raise EchoError(f"references: k is {k}; at least one reference has to be asked for")
    wrong = next((normal for normal in normals if normal.condition != GOOD), None)
    if wrong:
        raise EchoError(f"{wrong.image} is {wrong.condition}, not {GOOD}; only normal photographs serve as references")


def _pool(inspection: Inspection, scope: str) -> tuple[str, ...]:
    return (inspection.dataset, inspection.product) if scope == "product" else ()


def _references(queries: Sequence[Inspection], features: DescriptorTable, found: Found) -> Iterator[Reference]:
    for number, query in enumerate(queries):
        yield from found.of(number, query)
        if query.reference is not None and {query.image, query.reference} <= features.rows.keys():
            similarity = float(features.of(query.image) @ features.of(query.reference))
            yield Reference(query.id, query.reference, _rounded(similarity), 1, "given")


def _search(
    pool: Pool,
    numbers: Sequence[int],
    queries: Sequence[Inspection],
    features: DescriptorTable,
    seed: int,
    found: Found,
) -> None:
    """Fill in what is found for these queries, which have these numbers."""
    k, count = found.places.shape[2], len(pool.images)
    barred = [pool.barred(query, features) for query in queries]
    # As many more as any of these queries may have to pass over.
    depth = min(count, k + max(map(len, barred)))
    vectors = features.stack([query.image for query in queries])
    similarities, places = pool.index.search(vectors, depth)
    for row, (number, query) in enumerate(zip(numbers, queries, strict=True)):
        near = [
            (place, similarity)
            for place, similarity in zip(places[row].tolist(), similarities[row].tolist(), strict=True)
            if place >= 0 and place not in barred[row]
        ][:k]
        if len(near) < min(k, count - len(barred[row])):  # the approximate search missed what there is
            near = _exhaustive(pool, vectors[row], barred[row], k)
        free = _draw(count, barred[row], k, random.Random(f"{seed}/{query.id}"))
        drawn = [(place, float(vectors[row] @ features.of(pool.images[place]))) for place in free]
        for method, chosen in enumerate((near, drawn)):
            for rank, (place, similarity) in enumerate(chosen):
                found.places[number, method, rank] = place
                found.similarities[number, method, rank] = similarity


def _exhaustive(pool: Pool, vector: NDArray[np.float32], barred: set[int], k: int) -> list[tuple[int, float]]:
    similarities = pool.index.compare(vector)
    similarities[list(barred)] = -np.inf
    count = min(k, len(similarities) - len(barred))
    order = np.argsort(-similarities, kind="stable")[:count]
    return [(int(place), float(similarities[place])) for place in order]


def _draw(count: int, barred: set[int], k: int, draw: random.Random) -> list[int]:
    places = draw.sample(range(count), min(count, k + len(barred)))
    return [place for place in places if place not in barred][:k]


def _rounded(similarity: float) -> float:
    return round(max(-1.0, min(1.0, similarity)), 6)


def references_in_left_out_fold(inspections: Sequence[Inspection], root: Path) -> dict[str, str]:
    """The references that the source names for photographs of the train split and that are `LEFT_OUT`, by inspection.

    It is the content of the files that counts.
    """

    left = [inspection.image for inspection in inspections if inspection.split == LEFT_OUT]
    named = {i.id: i.reference for i in inspections if i.split == "train" and i.reference is not None}
    if not left or not named:
        return {}
    hashes, _ = hash_files([*{*left, *named.values()}], root)
    away = {hashes[image] for image in left if image in hashes}
    return {name: reference for name, reference in named.items() if hashes.get(reference) in away}
