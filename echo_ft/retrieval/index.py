"""Nearest-neighbour search by cosine similarity in a FAISS index.

The search may be approximate, but similarities are exact.

There are three index types. `flat` compares a query with every vector. `hnsw` is the graph that the Echo paper's code
uses (M = 64). `ivf_pq` searches the lists nearest to the query, using codes of about one byte per eight numbers, and
reranks the results with the original vectors.
"""

from __future__ import annotations

import math
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo_ft.errors import EchoError
from echo_ft.files import flush
from echo_ft.processes import PARTIAL, held
from echo_ft.provenance import content_hash
from echo_ft.retrieval.descriptors import FloatArray

INDEX_TYPES = ("auto", "flat", "hnsw", "ivf_pq")

MAX_FLAT_VECTORS, MAX_HNSW_VECTORS = 20_000, 100_000
"""Largest numbers of vectors for which `auto` selects `flat` and `hnsw`. For more vectors, it selects `ivf_pq`."""

MIN_IVF_VECTORS = 10_000
"""Smallest number of vectors for `ivf_pq`. With fewer, its codes cannot be trained and `flat` is used instead."""

TRAINING_VECTORS_PER_LIST = 64
"""Number of vectors per list used to train the centroids of `ivf_pq`."""

PROBED_LISTS = 128
"""Number of lists that `ivf_pq` searches per query. In total there are 4 * sqrt(number of vectors) lists."""

MIN_RERANKED = 512
"""Smallest number of neighbours, found by their codes, to rerank with their vectors."""

VECTORS_PER_CALL = 65_536
"""Number of vectors passed to FAISS at once."""


def index_type_for(kind: str, count: int) -> str:
    """Return the index type for `count` vectors: `kind` itself, or the type that `auto` selects.

    Raises EchoError if the kind is unknown.
    """
    if kind not in INDEX_TYPES:
        raise EchoError(f"index cannot be {kind!r}; choose from {', '.join(INDEX_TYPES)}")
    if kind == "auto":
        kind = "flat" if count <= MAX_FLAT_VECTORS else "hnsw" if count <= MAX_HNSW_VECTORS else "ivf_pq"
    return "flat" if kind == "ivf_pq" and count < MIN_IVF_VECTORS else kind


class VectorIndex:
    """A search index over the vectors `matrix[rows]`, each of length 1. Neighbours are positions in `rows`."""

    def __init__(self, matrix: FloatArray, rows: NDArray[np.int64], kind: str, file: Path | None = None) -> None:
        """Build the index, or read it from `file`.

        `matrix` (n, d) is kept without copying it, and `rows` is (m,). An approximate index is read if one was written
        for `file`; otherwise, it is built and written. The name of the file includes the SHA-256 of its content. Raises
        EchoError for an unknown kind, and for a file that has changed since it was written.
        """
        self.matrix, self.rows, self.kind = matrix, rows, index_type_for(kind, len(rows))
        index_file = file if self.kind != "flat" else None
        written = sorted(index_file.parent.glob(f"{index_file.stem}-*{index_file.suffix}")) if index_file else []
        if written:  # several processes may have written the file at once
            self.faiss = _read(written[0], len(rows))
        else:
            self.faiss = self._build()
            if index_file is not None:
                _write(self.faiss, index_file)
                index_file.unlink(missing_ok=True)  # an older version wrote this file, without a checksum

    def search(self, queries: FloatArray, depth: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the similarities and positions, both (n, depth), of the neighbours of `queries` (n, d), best first.

        If an approximate search finds fewer than `depth` neighbours, the remaining positions are -1.
        """
        if self.kind == "flat":
            return self.faiss.search(queries, depth)
        if self.kind == "hnsw":
            self.faiss.hnsw.efSearch = max(256, 2 * depth)
            return self.faiss.search(queries, depth)
        self.faiss.nprobe = PROBED_LISTS
        _, positions = self.faiss.search(queries, max(MIN_RERANKED, 4 * depth))
        # Position -1 selects the last row here, and the next line discards its similarity.
        reranked = [self.matrix[self.rows[near]] @ query for near, query in zip(positions, queries, strict=True)]
        similarities = np.where(positions < 0, np.float32(-np.inf), np.stack(reranked))
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :depth]
        return np.take_along_axis(similarities, order, 1), np.take_along_axis(positions, order, 1)

    def compare(self, query: FloatArray) -> NDArray[np.float32]:
        """Return the similarities (m,) of one query (d,) to all vectors."""
        chunks = (
            self.matrix[self.rows[start : start + VECTORS_PER_CALL]] @ query
            for start in range(0, len(self.rows), VECTORS_PER_CALL)
        )
        return np.concatenate(list(chunks))

    def _build(self) -> Any:
        import faiss

        count, width = len(self.rows), self.matrix.shape[1]
        index: Any
        if self.kind == "flat":
            index = faiss.IndexFlatIP(width)
        elif self.kind == "hnsw":
            index = faiss.IndexHNSWFlat(width, 64, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = 100  # with FAISS's default of 40, recall is below 0.97 at 100,000 vectors
        else:
            lists = 4 * math.isqrt(count)
            codes = next(number for number in range(max(1, width // 8), 0, -1) if width % number == 0)
            index = faiss.IndexIVFPQ(faiss.IndexFlatIP(width), width, lists, codes, 8, faiss.METRIC_INNER_PRODUCT)
            index.cp.niter = 10
            index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, TRAINING_VECTORS_PER_LIST
            sample = np.random.default_rng(0).permutation(count)[: TRAINING_VECTORS_PER_LIST * lists]
            index.train(self.matrix[self.rows[np.sort(sample)]])
        threads = faiss.omp_get_max_threads()
        if self.kind == "hnsw":
            faiss.omp_set_num_threads(1)  # with several threads, the graph would differ between builds
        try:
            for start in range(0, count, VECTORS_PER_CALL):
                index.add(self.matrix[self.rows[start : start + VECTORS_PER_CALL]])
        finally:
            faiss.omp_set_num_threads(threads)
        return index


def _read(file: Path, count: int) -> Any:
    import faiss

    try:
        # faiss follows the links of a graph without checking them, so a changed file could crash the process.
        if content_hash(file).hex() != file.stem.rpartition("-")[2]:
            raise EchoError(f"the index {file} has changed since it was written; delete it")
        index = faiss.read_index(str(file))
    except (OSError, ValueError, RuntimeError) as error:
        raise EchoError(f"the index {file} cannot be read ({type(error).__name__}); delete it") from error
    if index.ntotal != count:
        raise EchoError(f"the index {file} has {index.ntotal} vectors instead of {count}; delete it")
    return index


def _write(index: Any, file: Path) -> None:
    """Write the index atomically, with the SHA-256 of its content in its name."""
    import faiss

    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}{PARTIAL}")  # the cache removes files of killed processes
    partial.touch()
    with held(partial):
        try:
            faiss.write_index(index, str(partial))
            flush(partial)
            partial.replace(file.with_name(f"{file.stem}-{content_hash(partial).hex()}{file.suffix}"))
        finally:
            partial.unlink(missing_ok=True)
