"""Approximate indexes find what exact search finds and are the same in every build."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from echo_ft.errors import EchoError
from echo_ft.retrieval import index
from echo_ft.retrieval.index import VectorIndex


def mixture(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Return unit vectors (count, width) around fifty centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(50, width))
    vectors = centres[rng.integers(50, size=count)] + 0.5 * rng.normal(size=(count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def small_ivf_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow `ivf_pq` from 256 vectors upwards, so that tests do not need ten thousand."""
    monkeypatch.setattr(index, "MIN_IVF_VECTORS", 256)


@pytest.mark.parametrize("kind", ["hnsw", "ivf_pq"])
def test_approximate_index_finds_what_the_exact_search_finds(small_ivf_allowed: None, kind: str) -> None:
    vectors, queries, places = mixture(3000, 32), mixture(200, 32, seed=1), np.arange(500, 3000)
    exact = VectorIndex(vectors, places, "flat").search(queries, 5)
    found = VectorIndex(vectors, places, kind)
    assert found.kind == kind
    similarities, near = found.search(queries, 5)
    assert (near == exact[1]).mean() > 0.98
    expected = np.einsum("qd,qnd->qn", queries, vectors[places[near]])
    np.testing.assert_allclose(similarities, expected, atol=1e-6)  # from the vectors, not from their codes
    assert (np.diff(similarities) <= 0).all()


def test_graph_does_not_depend_on_the_number_of_threads() -> None:
    import faiss

    vectors = mixture(3000, 32)
    before = faiss.omp_get_max_threads()
    try:
        graphs = []
        for threads in (1, 4, 4):
            faiss.omp_set_num_threads(threads)
            graphs.append(faiss.serialize_index(VectorIndex(vectors, np.arange(3000), "hnsw").faiss).tobytes())
            assert faiss.omp_get_max_threads() == threads
        assert graphs[0] == graphs[1] == graphs[2]
    finally:
        faiss.omp_set_num_threads(before)


def test_graph_has_the_size_of_the_papers_code() -> None:
    graph = VectorIndex(mixture(300, 16), np.arange(300), "hnsw").faiss
    assert graph.hnsw.nb_neighbors(1) == 64


@pytest.mark.parametrize(
    ("kind", "count", "index_type"),
    [
        ("auto", 20_000, "flat"),
        ("auto", 20_001, "hnsw"),
        ("auto", 1_000_000, "ivf_pq"),
        ("ivf_pq", 500, "flat"),  # too few to train its codes
        ("ivf_pq", 50_000, "ivf_pq"),
        ("hnsw", 2, "hnsw"),
        ("flat", 1_000_000, "flat"),
    ],
)
def test_number_of_vectors_selects_the_index_type(kind: str, count: int, index_type: str) -> None:
    assert index.index_type_for(kind, count) == index_type


@pytest.mark.parametrize("width", [7, 30, 512, 2116])
def test_ivf_pq_supports_any_vector_width(small_ivf_allowed: None, width: int) -> None:
    vectors = mixture(300, width)
    found = VectorIndex(vectors, np.arange(300), "ivf_pq").search(vectors[:20], 1)[1]
    assert (found[:, 0] == np.arange(20)).all()


def test_approximate_index_is_written_once_and_read_again(
    tmp_path: Path, small_ivf_allowed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, file = mixture(600, 16), tmp_path / "index.faiss"
    built = VectorIndex(vectors, np.arange(600), "ivf_pq", file).search(vectors[:30], 4)
    monkeypatch.setattr(VectorIndex, "_build", None)
    read = VectorIndex(vectors, np.arange(600), "ivf_pq", file).search(vectors[:30], 4)
    assert (built[0] == read[0]).all()
    assert (built[1] == read[1]).all()
    (path,) = tmp_path.iterdir()
    with pytest.raises(EchoError, match=r"index-\w+\.faiss has 600 vectors instead of 599; delete it"):
        VectorIndex(vectors, np.arange(599), "ivf_pq", file)
    content = path.read_bytes()
    for place in (0, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(EchoError, match=r"index-\w+\.faiss has changed since it was written; delete it"):
            VectorIndex(vectors, np.arange(600), "ivf_pq", file)
