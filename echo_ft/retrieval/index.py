"""Nearest neighbours by cosine in a FAISS index, exact or approximate, with exact similarities in any case.

Three kinds: `flat` compares with every vector; `hnsw` is the graph of the paper's code (M = 64); `ivf_pq` looks into
the lists nearest to the query, over codes of about a byte for eight numbers, and ranks what it finds there anew by the
vectors themselves.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo_ft.errors import EchoError
from echo_ft.files import atomic_file
from echo_ft.retrieval.descriptors import Vector

INDEX_TYPES = ("auto", "flat", "hnsw", "ivf_pq")

FLAT_MOST, HNSW_MOST = 20_000, 100_000
"""Vectors up to which `auto` is `flat`, and then `hnsw`; more of them take `ivf_pq`."""

IVF_LEAST = 10_000
"""Vectors below which `ivf_pq` has too few to learn its codes from, and is `flat`."""

LEARNT_FROM = 64
"""Vectors for each list of `ivf_pq` from which its centres are learnt."""

PROBES = 128
"""Lists of `ivf_pq` that a query looks into, of four times the root of all vectors."""

RERANKED = 512
"""Neighbours by code that are ranked anew, at least."""

VECTORS_PER_CALL = 65_536
"""Vectors handed to FAISS at once."""


def index_type_for(kind: str, count: int) -> str:
    """The kind of index for so many vectors. Raises EchoError for an unknown one."""
    if kind not in INDEX_TYPES:
        raise EchoError(f"index cannot be {kind!r}; choose from {', '.join(INDEX_TYPES)}")
    if kind == "auto":
        kind = "flat" if count <= FLAT_MOST else "hnsw" if count <= HNSW_MOST else "ivf_pq"
    return "flat" if kind == "ivf_pq" and count < IVF_LEAST else kind


class VectorIndex:
    """The vectors `matrix[rows]`, each of length 1, ready to be searched; neighbours are places in `rows`."""

    def __init__(self, matrix: Vector, rows: NDArray[np.int64], kind: str, file: Path | None = None) -> None:
        """`matrix` (n, d) is kept, not copied. An approximate index is read from `file` where there is one, or written.

        Raises EchoError for an unknown kind and for a file that is damaged.
        """
        self.matrix, self.rows, self.kind = matrix, rows, index_type_for(kind, len(rows))
        kept = file if self.kind != "flat" else None
        if kept is not None and kept.is_file():
            self.faiss = _read(kept, len(rows))
        else:
            self.faiss = self._build()
            if kept is not None:
                _write(self.faiss, kept)

    def search(self, queries: Vector, depth: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Similarities and places (n, depth) of the neighbours of `queries` (n, d), most similar first.

        Where an approximate search finds fewer than `depth`, the rest have the place -1.
        """
        if self.kind == "flat":
            return self.faiss.search(queries, depth)
        if self.kind == "hnsw":
            self.faiss.hnsw.efSearch = max(256, 2 * depth)
            return self.faiss.search(queries, depth)
        self.faiss.nprobe = PROBES
        _, places = self.faiss.search(queries, max(RERANKED, 4 * depth))
        # Place -1 takes the last row, whatever it is.
        ranked = [self.matrix[self.rows[near]] @ query for near, query in zip(places, queries, strict=True)]
        similarities = np.where(places < 0, np.float32(-np.inf), np.stack(ranked))
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :depth]
        return np.take_along_axis(similarities, order, 1), np.take_along_axis(places, order, 1)

    def compare(self, query: Vector) -> NDArray[np.float32]:
        """The similarity of one query (d,) to every vector, by place."""
        parts = (
            self.matrix[self.rows[start : start + VECTORS_PER_CALL]] @ query
            for start in range(0, len(self.rows), VECTORS_PER_CALL)
        )
        return np.concatenate(list(parts))

    def _build(self) -> Any:
        import faiss

        count, width = len(self.rows), self.matrix.shape[1]
        index: Any
        if self.kind == "flat":
            index = faiss.IndexFlatIP(width)
        elif self.kind == "hnsw":
            index = faiss.IndexHNSWFlat(width, 64, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = 100  # with FAISS's 40, recall falls below 0.97 at 100,000 vectors
        else:
            lists = 4 * math.isqrt(count)
            codes = next(number for number in range(max(1, width // 8), 0, -1) if width % number == 0)
            index = faiss.IndexIVFPQ(faiss.IndexFlatIP(width), width, lists, codes, 8, faiss.METRIC_INNER_PRODUCT)
            index.cp.niter = 10
            index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, LEARNT_FROM
            sample = np.random.default_rng(0).permutation(count)[: LEARNT_FROM * lists]
            index.train(self.matrix[self.rows[np.sort(sample)]])
        threads = faiss.omp_get_max_threads()
        if self.kind == "hnsw":
            faiss.omp_set_num_threads(1)  # several would link the graph in another order each time
        try:
            for start in range(0, count, VECTORS_PER_CALL):
                index.add(self.matrix[self.rows[start : start + VECTORS_PER_CALL]])
        finally:
            faiss.omp_set_num_threads(threads)
        return index


def _read(file: Path, count: int) -> Any:
    import faiss

    try:
        index = faiss.read_index(str(file))
    except RuntimeError:
        index = None
    if index is None or index.ntotal != count:
        raise EchoError(f"the index {file} is damaged; delete it")
    return index


def _write(index: Any, file: Path) -> None:
    """Write the index as a file that appears whole or not at all."""
    import faiss

    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file, unique=True) as partial:
        faiss.write_index(index, str(partial))
