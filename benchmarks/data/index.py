"""What searching very many features takes: `python -m benchmarks.data.index [--vectors 1000000] [--kinds ivf_pq]`.

The vectors stand in for features of photographs, 512 numbers each. Every one is the sum of four parts, divided by its
length: what all photographs have in common (60 % of the squared length), what its product has (25 %), what varies
within the product (13 %: 24 directions, the j-th with a share of 1/j), and noise in all directions (2 %). So two
photographs have a cosine of 0.6 on average, two of one product 0.85, and the nearest of a thousand about 0.94. The
products (1,000, or --products) have equally many. Queries are further draws from the same products.

Building is `echo_ft.retrieval.index.VectorIndex`, in a process of its own whose peak memory, the vectors themselves included,
counts; searching is by batches of 64 and includes the ranking by exact similarity. Recall is against the exact search.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from echo_ft.retrieval.index import INDEX_TYPES, VectorIndex

WIDTH, DIRECTIONS = 512, 24
COMMON, PRODUCT, WITHIN, NOISE = 0.60, 0.25, 0.13, 0.02
"""Shares of the squared length."""

BATCH, QUERIES = 64, 1280

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Measured:
    """What one kind of index takes and gives."""

    kind: str
    build_s: float
    """Wall clock."""
    build_processor_s: float
    """Processor time of all threads."""
    peak_gib: float
    query_ms: float
    query_processor_ms: float
    recall: float
    """Share of queries whose nearest vector comes first."""


def draw(vectors: int, queries: int, products: int, seed: int) -> tuple[Vectors, Vectors]:
    """`vectors` and `queries` from the mixture above, float32 rows of length 1."""
    rng = np.random.default_rng(seed)
    common = _unit(rng.standard_normal(WIDTH, np.float32))
    spread = np.sqrt(1 / np.arange(1, DIRECTIONS + 1, dtype=np.float32))
    spread *= np.sqrt(WITHIN / np.square(spread).sum())
    made = np.empty((vectors, WIDTH), np.float32), np.empty((queries, WIDTH), np.float32)
    for product in range(products):
        centre = np.sqrt(COMMON) * common + np.sqrt(PRODUCT) * _unit(rng.standard_normal(WIDTH, np.float32))
        directions, _ = np.linalg.qr(rng.standard_normal((WIDTH, DIRECTIONS), np.float32))
        for side in made:
            part = side[product * len(side) // products : (product + 1) * len(side) // products]
            part[:] = rng.standard_normal(part.shape, np.float32) * np.float32(np.sqrt(NOISE / WIDTH))
            part += (rng.standard_normal((len(part), DIRECTIONS), np.float32) * spread) @ directions.T + centre
            part /= np.linalg.norm(part, axis=1, keepdims=True)
    return made


def _unit(vector: Vectors) -> Vectors:
    return vector / np.linalg.norm(vector)


def measure(kind: str, vectors: int, products: int, queries: int = QUERIES, seed: int = 0) -> Measured:
    """Draw, build, search and compare, in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, kind, vectors, products, queries, seed).result()


def _measure(kind: str, vectors: int, products: int, queries: int, seed: int) -> Measured:
    import faiss

    matrix, asked = draw(vectors, queries, products, seed)
    started, processor = time.perf_counter(), time.process_time()
    index = VectorIndex(matrix, np.arange(vectors), kind)
    build_s, build_processor_s = time.perf_counter() - started, time.process_time() - processor
    index.search(asked[:BATCH], 1)  # what is set up once
    started, processor = time.perf_counter(), time.process_time()
    found = [index.search(asked[start : start + BATCH], 1)[1][:, 0] for start in range(0, queries, BATCH)]
    query_ms = 1000 * (time.perf_counter() - started) / queries
    query_processor_ms = 1000 * (time.process_time() - processor) / queries
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    _, nearest = faiss.knn(asked, matrix, 1, metric=faiss.METRIC_INNER_PRODUCT)
    recall = float((np.concatenate(found) == nearest[:, 0]).mean())
    return Measured(index.kind, build_s, build_processor_s, peak_gib, query_ms, query_processor_ms, recall)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--products", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", choices=INDEX_TYPES, default=["auto"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| vectors | products | kind | build s | processor s | peak GiB | ms a query | processor ms | recall@1 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in options.kinds:
        found = measure(kind, options.vectors, options.products, seed=options.seed)
        print(
            f"| {options.vectors} | {options.products} | {found.kind} | {found.build_s:.0f} "
            f"| {found.build_processor_s:.0f} | {found.peak_gib:.1f} | {found.query_ms:.2f} "
            f"| {found.query_processor_ms:.2f} | {found.recall:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
