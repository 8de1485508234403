"""References: for each photograph the most similar normal ones, and random ones as the control.

Echo's Reference Extractor (arXiv 2501.15795) takes the nearest normal image by CLIP ViT-B/16 features in a FAISS
index. Here the search stays within the product unless `scope` is `all`, and neither the photograph itself, nor a copy
of it, nor another photograph of the same part comes back.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo_ft.features import Describer, Features, describer
from echo_ft.provenance import fingerprint_bytes
from echo_ft.records import GOOD, EchoError, Inspection, Reference, Rejection

SCOPES = ("product", "all")

EXACT = 20_000
"""Normals up to which the search is exact; more of them go into an HNSW graph, as in the paper's code (M = 64)."""

CHUNK = 1024
"""Queries searched at once."""


@dataclass(frozen=True)
class Index:
    """Normal photographs and the FAISS index over their features: row i of one is row i of the other.

    Files of equal content are one row, under the first path; `groups` then holds the parts of all of them.
    """

    images: tuple[str, ...]
    hashes: tuple[str, ...]
    groups: tuple[frozenset[str], ...]
    faiss: Any


def find_references(
    queries: Sequence[Inspection],
    normals: Sequence[Inspection],
    root: Path,
    descriptor: str,
    k: int,
    scope: str,
    seed: int,
    cache: Path | None,
) -> tuple[list[Reference], list[Rejection]]:
    """For each query `k` retrieved references, most similar first, and `k` random ones, which `seed` and its id decide.

    A reference that the query names stands as `given`, rank 1, beside them. `descriptor` is an open_clip
    `<model>/<pretrained>` or `skimage`; `scope` is `product` or `all`; similarity is the cosine, -1..1. Where fewer
    than `k` normals are admissible, those come; where none is, the query has none. Images that cannot be read are
    rejected by path, once each, and are neither query nor candidate. `cache` keeps features and indices between runs.

    Raises EchoError for an unknown scope or descriptor, for `k` below 1, and for a normal that is not one.
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
    asked: dict[tuple[str, ...], list[Inspection]] = defaultdict(list)
    for query in queries:
        if query.image in features.rows:
            asked[_pool(query, scope)].append(query)

    found: dict[str, list[Reference]] = {}
    for pool, members in asked.items():
        index = _index(pools[pool], features, describe.key, cache) if pools[pool] else None
        for start in range(0, len(members), CHUNK):
            chunk = members[start : start + CHUNK]
            if index is not None:
                found.update(_search(index, chunk, features, k, seed))
            for query in chunk:
                if query.reference in features.rows:
                    similarity = float(features.of(query.image) @ features.of(query.reference))
                    reference = Reference(query.id, query.reference, _rounded(similarity), 1, "given")
                    found.setdefault(query.id, []).append(reference)
    return [reference for query in queries for reference in found.get(query.id, [])], rejections


def candidate_order(case_id: str, references: Sequence[Reference]) -> tuple[Reference, ...]:
    """References as candidates of a case: an order that the case's id alone decides, so that 1 is not always best."""
    ordered = sorted(references, key=lambda reference: (reference.method, reference.rank, reference.image))
    random.Random(f"candidates/{case_id}").shuffle(ordered)
    return tuple(ordered)


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


def _part(inspection: Inspection) -> str:
    return "\0".join((inspection.dataset, inspection.product, inspection.group))


def describe_files(
    paths: Sequence[str], root: Path, describe: Describer, cache: Path | None
) -> tuple[Features, list[Rejection]]:
    """Features of the files that can be read, in the order given, and a rejection for every other.

    With `cache`, a file whose content has been described before is not read again.
    """
    store = cache / f"features-{describe.key}.npz" if cache else None
    known = _load_store(store)
    hashes: dict[str, str] = {}
    rejections = []
    for path in paths:
        try:
            with open(root / path, "rb") as file:
                hashes[path] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            rejections.append(Rejection(path, f"the image cannot be opened ({error.strerror}): {root / path}"))
    new = list({digest: path for path, digest in reversed(hashes.items()) if digest not in known}.items())
    vectors, faults = describe.vectors([root / path for _, path in new])
    made = {digest: vector for (digest, _), vector in zip(new, vectors, strict=True) if vector is not None}
    broken = {digest: fault for (digest, _), fault in zip(new, faults, strict=True) if fault is not None}
    if store and made:
        _save_store(store, {**known, **made})
    known = {**known, **made}
    readable = [path for path in hashes if hashes[path] in known]
    rejections += [Rejection(path, broken[hashes[path]]) for path in hashes if hashes[path] in broken]
    matrix = np.stack([known[hashes[path]] for path in readable]) if readable else np.zeros((0, 1), np.float32)
    rows = {path: row for row, path in enumerate(readable)}
    return Features(rows, hashes, matrix), sorted(rejections, key=lambda rejection: rejection.item)


def _load_store(store: Path | None) -> dict[str, NDArray[np.float32]]:
    if store is None or not store.is_file():
        return {}
    try:
        with np.load(store, allow_pickle=False) as content:
            return dict(zip(content["hashes"].tolist(), content["vectors"], strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise EchoError(f"the feature cache {store} cannot be read ({type(error).__name__}); delete it") from error


def _save_store(store: Path, vectors: dict[str, NDArray[np.float32]]) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    partial = store.with_name(f"{store.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        np.savez(file, hashes=np.array(list(vectors)), vectors=np.stack(list(vectors.values())))
    os.replace(partial, store)


def _index(normals: Sequence[Inspection], features: Features, key: str, cache: Path | None) -> Index:
    first: dict[str, str] = {}
    parts: dict[str, set[str]] = defaultdict(set)
    for normal in sorted(normals, key=lambda normal: normal.image):
        digest = features.hashes[normal.image]
        first.setdefault(digest, normal.image)
        parts[digest].add(_part(normal))
    images, hashes = tuple(first.values()), tuple(first)
    groups = tuple(frozenset(parts[digest]) for digest in hashes)
    rows = json.dumps([images, hashes])
    folder = cache / f"index-{fingerprint_bytes(key.encode(), rows.encode())}" if cache else None
    stored = _load_index(folder, rows)
    if stored is not None:
        return Index(images, hashes, groups, stored)
    index = build_index(np.stack([features.of(image) for image in images]))
    if folder is not None:
        _save_index(folder, rows, index)
    return Index(images, hashes, groups, index)


def build_index(vectors: NDArray[np.float32]) -> Any:
    """A FAISS inner-product index over normalised float32 rows (n, d): exact up to EXACT rows, HNSW (M = 64) beyond."""
    import faiss

    exact = len(vectors) <= EXACT
    width = vectors.shape[1]
    index: Any = faiss.IndexFlatIP(width) if exact else faiss.IndexHNSWFlat(width, 64, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    return index


def _load_index(folder: Path | None, rows: str) -> Any:
    import faiss

    if folder is None or not folder.is_dir():
        return None
    try:
        index = faiss.read_index(str(folder / "index.faiss"))
        whole = (folder / "images.json").read_text(encoding="utf-8") == rows and index.ntotal == len(
            json.loads(rows)[0]
        )
    except (OSError, RuntimeError):
        whole = False
    if not whole:
        raise EchoError(f"the index in {folder} is damaged; delete that folder")
    return index


def _save_index(folder: Path, rows: str, index: Any) -> None:
    """Write paths and index into one folder that appears whole or not at all."""
    import faiss

    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "images.json").write_text(rows, encoding="utf-8")
    faiss.write_index(index, str(partial / "index.faiss"))
    try:
        partial.rename(folder)
    except OSError:  # another process was faster, with the same content
        shutil.rmtree(partial)


def _search(
    index: Index, queries: Sequence[Inspection], features: Features, k: int, seed: int
) -> dict[str, list[Reference]]:
    by_hash = {digest: row for row, digest in enumerate(index.hashes)}
    by_part: dict[str, set[int]] = defaultdict(set)
    for row, parts in enumerate(index.groups):
        for part in parts:
            by_part[part].add(row)
    barred = []
    for query in queries:
        copy = by_hash.get(features.hashes[query.image])
        barred.append(by_part[_part(query)] | ({copy} if copy is not None else set()))

    # As many more as any of these queries may have to pass over.
    depth = min(len(index.images), k + max(map(len, barred)))
    if hasattr(index.faiss, "hnsw"):
        index.faiss.hnsw.efSearch = max(128, 2 * depth)
    vectors = np.stack([features.of(query.image) for query in queries])
    similarities, rows = index.faiss.search(vectors, depth)
    found = {}
    for number, query in enumerate(queries):
        near = [
            (int(row), float(similarity))
            for row, similarity in zip(rows[number], similarities[number], strict=True)
            if row >= 0 and row not in barred[number]
        ]
        references = _ranked(index, query, near[:k], "retrieved")
        free = _draw(len(index.images), barred[number], k, random.Random(f"{seed}/{query.id}"))
        drawn = [(row, float(vectors[number] @ features.of(index.images[row]))) for row in free]
        found[query.id] = references + _ranked(index, query, drawn, "random")
    return found


def _draw(count: int, barred: set[int], k: int, draw: random.Random) -> list[int]:
    rows = draw.sample(range(count), min(count, k + len(barred)))
    return [row for row in rows if row not in barred][:k]


def _ranked(index: Index, query: Inspection, rows: Iterable[tuple[int, float]], method: str) -> list[Reference]:
    return [
        Reference(query.id, index.images[row], _rounded(similarity), rank, method)
        for rank, (row, similarity) in enumerate(rows, start=1)
    ]


def _rounded(similarity: float) -> float:
    return round(max(-1.0, min(1.0, similarity)), 6)
