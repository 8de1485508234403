"""Measure recall, time and memory of vector search: `python -m benchmarks.data.index [--vectors 1000000]`.

The vectors imitate descriptors of images, with 512 dimensions. Each is the normalised sum of four parts: what all
images have in common (60% of the squared length), what the images of a product have in common (25%), variation within
the product (13%: 24 directions, the j-th with a weight of 1/j), and noise in all directions (2%). Two images then have
a cosine of 0.6 on average, and two images of one product 0.85. The nearest of a thousand has about 0.94. All products
(1,000, or --products) have the same number of images. Queries are drawn from the same products.

The benchmark builds `echo_ft.retrieval.index.VectorIndex` in its own process and reports the peak memory of that
process, which includes the vectors. Queries are searched in batches of 64; their time includes the exact reranking.
Recall is relative to the exact search.
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
"""Fractions of the squared length that the four parts take."""

BATCH, QUERIES = 64, 1280

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Measurement:
    """Cost and recall of one index type."""

    kind: str
    build_s: float
    """Wall-clock time."""
    build_processor_s: float
    """Processor time of all threads."""
    peak_gib: float
    query_ms: float
    query_processor_ms: float
    recall: float
    """Fraction of queries that return their nearest vector first."""


def draw(vectors: int, queries: int, products: int, seed: int) -> tuple[Vectors, Vectors]:
    """Draw from the mixture above; returns (vectors, 512) and (queries, 512), float32 rows of length 1."""
    rng = np.random.default_rng(seed)
    common = _unit(rng.standard_normal(WIDTH, np.float32))
    spread = np.sqrt(1 / np.arange(1, DIRECTIONS + 1, dtype=np.float32))
    spread *= np.sqrt(WITHIN / np.square(spread).sum())
    made = np.empty((vectors, WIDTH), np.float32), np.empty((queries, WIDTH), np.float32)
    for product in range(products):
        centre = np.sqrt(COMMON) * common + np.sqrt(PRODUCT) * _unit(rng.standard_normal(WIDTH, np.float32))
        directions, _ = np.linalg.qr(rng.standard_normal((WIDTH, DIRECTIONS), np.float32))
        for rows in made:
            part = rows[product * len(rows) // products : (product + 1) * len(rows) // products]
            part[:] = rng.standard_normal(part.shape, np.float32) * np.float32(np.sqrt(NOISE / WIDTH))
            part += (rng.standard_normal((len(part), DIRECTIONS), np.float32) * spread) @ directions.T + centre
            part /= np.linalg.norm(part, axis=1, keepdims=True)
    return made


def _unit(vector: Vectors) -> Vectors:
    return vector / np.linalg.norm(vector)


def measure(kind: str, vectors: int, products: int, queries: int = QUERIES, seed: int = 0) -> Measurement:
    """Draw, build, search and compare in a separate process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, kind, vectors, products, queries, seed).result()


def _measure(kind: str, vectors: int, products: int, queries: int, seed: int) -> Measurement:
    import faiss

    matrix, query_vectors = draw(vectors, queries, products, seed)
    started, processor = time.perf_counter(), time.process_time()
    index = VectorIndex(matrix, np.arange(vectors), kind)
    build_s, build_processor_s = time.perf_counter() - started, time.process_time() - processor
    index.search(query_vectors[:BATCH], 1)  # FAISS sets up once in the first search, which is not timed
    started, processor = time.perf_counter(), time.process_time()
    found = [index.search(query_vectors[start : start + BATCH], 1)[1][:, 0] for start in range(0, queries, BATCH)]
    query_ms = 1000 * (time.perf_counter() - started) / queries
    query_processor_ms = 1000 * (time.process_time() - processor) / queries
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    _, nearest = faiss.knn(query_vectors, matrix, 1, metric=faiss.METRIC_INNER_PRODUCT)
    recall = float((np.concatenate(found) == nearest[:, 0]).mean())
    return Measurement(index.kind, build_s, build_processor_s, peak_gib, query_ms, query_processor_ms, recall)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=1_000_000, help="Indexed vectors.")
    parser.add_argument("--products", type=int, default=1000, help="Products that the vectors belong to.")
    parser.add_argument("--kinds", nargs="+", choices=INDEX_TYPES, default=["auto"], help="Index types to measure.")
    parser.add_argument("--seed", type=int, default=0, help="Seed for the vectors.")
    options = parser.parse_args()
    print("| vectors | products | kind | build s | processor s | peak GiB | ms per query | processor ms | recall@1 |")
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
