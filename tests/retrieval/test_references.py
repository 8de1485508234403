from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from echo_ft.data.dataset import candidate_order
from echo_ft.errors import EchoError
from echo_ft.records import Inspection, Reference
from echo_ft.retrieval import index
from echo_ft.retrieval import references as retrieval
from echo_ft.retrieval.descriptors import OpenClip, ScikitImage, describer
from echo_ft.retrieval.index import VectorIndex
from echo_ft.retrieval.references import find_references
from tests.conftest import ROOT


def draw(path: Path, seed: int, spot: bool = False) -> None:
    """A smooth texture that `seed` decides, 48 x 48, with a black spot if asked."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((48, 48), Image.Resampling.BICUBIC))
    if spot:
        pixels[20:26, 20:26] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def inspect(image: str, group: str = "", product: str = "tile", condition: str = "good", **more: object) -> Inspection:
    return Inspection(image, image, "drawn", product, condition, group or image, **more)  # type: ignore[arg-type]


def find(
    queries: list[Inspection],
    normals: list[Inspection],
    root: Path,
    k: int = 2,
    scope: str = "product",
    seed: int = 0,
    cache: Path | None = None,
    kind: str = "auto",
) -> list[Reference]:
    references, rejections = find_references(queries, normals, root, "skimage", k, scope, seed, cache, kind)
    assert not rejections
    return list(references)


def of(references: list[Reference], query: str, method: str = "retrieved") -> list[str]:
    return [row.image for row in references if row.inspection == query and row.method == method]


@pytest.fixture
def normals(tmp_path: Path) -> list[Inspection]:
    for number in range(8):
        draw(tmp_path / f"n{number}.png", number)
    return [inspect(f"n{number}.png") for number in range(8)]


def test_the_same_texture_is_nearest_in_spite_of_a_defect(tmp_path: Path, normals: list[Inspection]) -> None:
    for number in range(8):
        draw(tmp_path / f"q{number}.png", number, spot=True)
    queries = [inspect(f"q{number}.png", condition="spot") for number in range(8)]
    references = find(queries, normals, tmp_path, k=3)
    assert [of(references, f"q{number}.png")[0] for number in range(8)] == [f"n{number}.png" for number in range(8)]
    for query in queries:
        rows = [row for row in references if row.inspection == query.id and row.method == "retrieved"]
        assert [row.rank for row in rows] == [1, 2, 3]
        assert [row.similarity for row in rows] == sorted((row.similarity for row in rows), reverse=True)
        assert len(of(references, query.id, "random")) == 3


def test_the_query_its_copies_and_its_own_part_never_come_back(tmp_path: Path, normals: list[Inspection]) -> None:
    shutil.copy(tmp_path / "n0.png", tmp_path / "copy.png")
    draw(tmp_path / "other.png", 0, spot=True)
    everything = [*normals, inspect("copy.png", group="elsewhere"), inspect("other.png", group="n0.png")]
    references = find([normals[0]], everything, tmp_path, k=20)
    allowed = {f"n{number}.png" for number in range(1, 8)}
    assert set(of(references, "n0.png")) == set(of(references, "n0.png", "random")) == allowed
    assert len(of(references, "n0.png")) == 7  # fewer than k: what exists, each once


def test_a_copy_of_the_own_part_under_another_group_stays_out(tmp_path: Path, normals: list[Inspection]) -> None:
    draw(tmp_path / "query.png", 0, spot=True)
    shutil.copy(tmp_path / "n0.png", tmp_path / "copy.png")
    query = inspect("query.png", group="n0.png", condition="spot")
    references = find([query], [*normals, inspect("copy.png", group="elsewhere")], tmp_path, k=20)
    assert not {"n0.png", "copy.png"} & {row.image for row in references}


def test_copies_among_the_normals_are_one_candidate(tmp_path: Path, normals: list[Inspection]) -> None:
    draw(tmp_path / "query.png", 0, spot=True)
    for number in range(5):
        shutil.copy(tmp_path / "n0.png", tmp_path / f"copy{number}.png")
    many = [*normals, *(inspect(f"copy{number}.png") for number in range(5))]
    found = of(find([inspect("query.png")], many, tmp_path, k=2), "query.png")
    assert found[0] == "copy0.png" and not found[1].startswith("copy")


def test_scope_product_stays_in_the_product_and_scope_all_does_not(tmp_path: Path, normals: list[Inspection]) -> None:
    draw(tmp_path / "query.png", 3, spot=True)
    foreign = [inspect(normal.image, product="other") for normal in normals[3:]]
    query = inspect("query.png")
    within = find([query], [*normals[:3], *foreign], tmp_path, k=1)
    assert of(within, "query.png")[0] in {"n0.png", "n1.png", "n2.png"}
    assert of(find([query], [*normals[:3], *foreign], tmp_path, k=1, scope="all"), "query.png") == ["n3.png"]


def test_the_order_of_queries_and_normals_changes_nothing(tmp_path: Path, normals: list[Inspection]) -> None:
    queries = normals[:4]
    references = find(queries, normals, tmp_path)
    turned = find(queries[::-1], normals[::-1], tmp_path)
    assert sorted(map(repr, references)) == sorted(map(repr, turned))
    assert find(queries[:1], normals, tmp_path) == [r for r in references if r.inspection == "n0.png"]


def test_the_seed_decides_the_random_control_alone(tmp_path: Path, normals: list[Inspection]) -> None:
    first, second = find(normals, normals, tmp_path), find(normals, normals, tmp_path, seed=1)
    assert [r for r in first if r.method == "retrieved"] == [r for r in second if r.method == "retrieved"]
    assert [r for r in first if r.method == "random"] != [r for r in second if r.method == "random"]


def test_a_named_reference_stands_as_given(tmp_path: Path, normals: list[Inspection]) -> None:
    query = inspect("n0.png", group="pair", reference="n1.png")
    references = find([query], [inspect("n1.png", group="pair"), *normals[2:]], tmp_path)
    given = [row for row in references if row.method == "given"]
    assert [(row.image, row.rank) for row in given] == [("n1.png", 1)]
    assert -1 <= given[0].similarity <= 1
    alone = find([query], [], tmp_path)
    assert [row.method for row in alone] == ["given"]


def test_a_query_without_an_admissible_normal_has_no_reference(tmp_path: Path, normals: list[Inspection]) -> None:
    assert find([normals[0]], [normals[0]], tmp_path) == []
    assert find([normals[0]], [], tmp_path) == []


def test_a_broken_image_is_rejected_and_shifts_no_neighbour(tmp_path: Path, normals: list[Inspection]) -> None:
    draw(tmp_path / "query.png", 5, spot=True)
    (tmp_path / "a_first.png").write_bytes(b"not an image")
    (tmp_path / "n2_cut.png").write_bytes((tmp_path / "n2.png").read_bytes()[:200])
    broken = [inspect("a_first.png"), inspect("n2_cut.png"), inspect("gone.png")]
    cache = tmp_path / "cache"
    for _ in range(2):  # the second time from the cache
        found, rejections = find_references(
            [inspect("query.png"), *broken], [*broken, *normals], tmp_path, "skimage", 1, "product", 0, cache
        )
        references = list(found)
        assert of(references, "query.png") == ["n5.png"]
        assert [rejection.item for rejection in rejections] == ["a_first.png", "gone.png", "n2_cut.png"]
        assert all(rejection.reason for rejection in rejections)
        assert {row.inspection for row in references} == {"query.png"}


def test_the_cache_spares_unchanged_files_and_notices_changed_ones(
    tmp_path: Path, normals: list[Inspection], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "query.png", 5, spot=True)
    cache = tmp_path / "cache"
    fresh = find([inspect("query.png")], normals, tmp_path)
    assert find([inspect("query.png")], normals, tmp_path, cache=cache) == fresh
    described: list[str] = []
    plain = ScikitImage.vectors

    def count(self: ScikitImage, paths: list[Path]) -> object:
        described.extend(path.name for path in paths)
        return plain(self, paths)

    monkeypatch.setattr(ScikitImage, "vectors", count)
    assert find([inspect("query.png")], normals, tmp_path, cache=cache) == fresh
    assert described == []
    draw(tmp_path / "n5.png", 99)
    assert of(find([inspect("query.png")], normals, tmp_path, cache=cache), "query.png")[0] != "n5.png"
    assert described == ["n5.png"]


def test_a_damaged_cache_is_named_with_the_remedy(tmp_path: Path, normals: list[Inspection]) -> None:
    cache = tmp_path / "cache"
    find(normals[:1], normals, tmp_path, cache=cache, kind="hnsw")
    next(cache.glob("index-*.faiss")).write_bytes(b"cut")
    with pytest.raises(EchoError, match=r"the index .*index-.*faiss is damaged; delete it"):
        find(normals[:1], normals, tmp_path, cache=cache, kind="hnsw")
    next(cache.glob("features-skimage*/*.npz")).write_bytes(b"cut")
    with pytest.raises(EchoError, match=r"features-skimage.*npz cannot be read .*; delete it"):
        find(normals[:1], normals, tmp_path, cache=cache)


def mixture(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Unit vectors (count, width) around fifty centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(50, width))
    vectors = centres[rng.integers(50, size=count)] + 0.5 * rng.normal(size=(count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ivf_pq` learns its codes from 256 vectors already, so that tests need not have ten thousand."""
    monkeypatch.setattr(index, "IVF_LEAST", 256)


@pytest.mark.parametrize("kind", ["hnsw", "ivf_pq"])
def test_an_approximate_index_finds_what_the_exact_search_finds(few_are_many: None, kind: str) -> None:
    vectors, queries, places = mixture(3000, 32), mixture(200, 32, seed=1), np.arange(500, 3000)
    exact = VectorIndex(vectors, places, "flat").search(queries, 5)
    found = VectorIndex(vectors, places, kind)
    assert found.kind == kind
    similarities, near = found.search(queries, 5)
    assert (near == exact[1]).mean() > 0.98
    ours = np.einsum("qd,qnd->qn", queries, vectors[places[near]])
    np.testing.assert_allclose(similarities, ours, atol=1e-6)  # by the vectors, not by their codes
    assert (np.diff(similarities) <= 0).all()


def test_the_graph_is_the_same_each_time_however_many_threads_there_are() -> None:
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


def test_the_graph_is_that_of_the_papers_code() -> None:
    graph = VectorIndex(mixture(300, 16), np.arange(300), "hnsw").faiss
    assert graph.hnsw.nb_neighbors(1) == 64


@pytest.mark.parametrize(
    ("kind", "count", "taken"),
    [
        ("auto", 20_000, "flat"),
        ("auto", 20_001, "hnsw"),
        ("auto", 1_000_000, "ivf_pq"),
        ("ivf_pq", 500, "flat"),  # too few to learn codes from
        ("ivf_pq", 50_000, "ivf_pq"),
        ("hnsw", 2, "hnsw"),
        ("flat", 1_000_000, "flat"),
    ],
)
def test_the_number_of_vectors_chooses_the_kind(kind: str, count: int, taken: str) -> None:
    assert index.index_type_for(kind, count) == taken


@pytest.mark.parametrize("width", [7, 30, 512, 2116])
def test_codes_fit_any_width(few_are_many: None, width: int) -> None:
    vectors = mixture(300, width)
    found = VectorIndex(vectors, np.arange(300), "ivf_pq").search(vectors[:20], 1)[1]
    assert (found[:, 0] == np.arange(20)).all()


def test_an_approximate_index_is_written_once_and_read_again(
    tmp_path: Path, few_are_many: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, file = mixture(600, 16), tmp_path / "index.faiss"
    made = VectorIndex(vectors, np.arange(600), "ivf_pq", file).search(vectors[:30], 4)
    monkeypatch.setattr(VectorIndex, "_build", None)
    read = VectorIndex(vectors, np.arange(600), "ivf_pq", file).search(vectors[:30], 4)
    assert (made[0] == read[0]).all() and (made[1] == read[1]).all()
    with pytest.raises(EchoError, match=r"index\.faiss is damaged; delete it"):
        VectorIndex(vectors, np.arange(599), "ivf_pq", file)


def test_the_graph_passes_over_barred_normals_as_the_exact_search_does(
    tmp_path: Path, normals: list[Inspection]
) -> None:
    exact = find(normals, normals, tmp_path, kind="flat")
    for _ in range(2):  # the second time from the cache
        assert find(normals, normals, tmp_path, cache=tmp_path / "cache", kind="hnsw") == exact


def test_normals_that_an_approximate_search_misses_are_found_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All near neighbours are of the query's own part: what the search brings is barred, and others are admissible."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(600, 16)).astype(np.float32)
    vectors[:300] = vectors[0] + 0.01 * vectors[:300]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    images = [f"{number}.png" for number in range(600)]
    for number, image in enumerate(images):
        (tmp_path / image).write_bytes(b"%d" % number)
    rows = dict(zip(images, vectors, strict=True))

    class Known:
        key = "known"

        def vectors(self, paths: list[Path]) -> tuple[list[np.ndarray], list[None]]:
            return [rows[path.name] for path in paths], [None] * len(paths)

    monkeypatch.setattr(retrieval, "describer", lambda name: Known())
    monkeypatch.setattr(index, "IVF_LEAST", 256)
    monkeypatch.setattr(index, "PROBES", 1)
    pool = [inspect(image, group="own" if number < 300 else "") for number, image in enumerate(images)]
    queries = [pool[0], pool[299], pool[300], pool[599]]
    found = {kind: find(queries, pool, tmp_path, k=3, kind=kind) for kind in ("flat", "ivf_pq", "hnsw")}
    assert [len(of(found["flat"], query.id)) for query in queries] == [3, 3, 3, 3]
    for query in queries[:2]:
        assert not {f"{number}.png" for number in range(300)} & set(of(found["ivf_pq"], query.id))
        for kind in ("ivf_pq", "hnsw"):
            assert of(found[kind], query.id) == of(found["flat"], query.id)
    for query in queries[2:]:
        assert len(of(found["ivf_pq"], query.id)) == 3


def test_candidates_come_in_an_order_of_the_case_alone() -> None:
    references = [Reference("q", f"n{rank}.png", 1 - rank / 10, rank) for rank in range(1, 5)]
    order = candidate_order("q", references)
    assert order == candidate_order("q", references[::-1])
    assert sorted(order, key=lambda row: row.rank) == references
    firsts = {candidate_order(f"case {number}", references)[0].rank for number in range(50)}
    assert firsts == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scope": "everything"}, "scope cannot be 'everything'; choose from product, all"),
        ({"k": 0}, "k is 0"),
        ({"index": "tree"}, "index cannot be 'tree'; choose from auto, flat, hnsw, ivf_pq"),
        ({"descriptor": "ViT-B-17/openai"}, r"no model 'ViT-B-17'; did you mean .*ViT-B-16"),
        ({"descriptor": "scikit"}, "did you mean skimage"),
        ({"descriptor": "ViT-B-16/openay"}, "did you mean ViT-B-16/openai"),
        ({"descriptor": "ViT-B-16"}, r"no weights '' for ViT-B-16; choose from ViT-B-16/openai"),
    ],
)
def test_a_wrong_option_is_named_with_the_right_ones(
    tmp_path: Path, normals: list[Inspection], arguments: dict[str, object], message: str
) -> None:
    options: dict[str, object] = {"descriptor": "skimage", "k": 1, "scope": "product", "seed": 0, "cache": None}
    with pytest.raises(EchoError, match=message):
        find_references(normals, normals, tmp_path, **{**options, **arguments})  # type: ignore[arg-type]


def test_a_defective_photograph_cannot_serve_as_reference(tmp_path: Path, normals: list[Inspection]) -> None:
    with pytest.raises(EchoError, match=r"n0.png is crack, not good"):
        find(normals, [inspect("n0.png", condition="crack")], tmp_path)


@pytest.fixture(scope="module")
def small_clip() -> OpenClip:
    """The smallest of open_clip's architectures, with random weights."""
    return OpenClip("ViT-S-32-alt", None)


def test_clip_features_in_a_batch_are_those_one_by_one(
    tmp_path: Path, normals: list[Inspection], small_clip: OpenClip
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    paths = [tmp_path / normal.image for normal in normals]
    paths.insert(3, tmp_path / "broken.png")
    batched, faults = small_clip.vectors(paths)
    for path, vector, fault in zip(paths, batched, faults, strict=True):
        alone = small_clip.vectors([path])[0][0]
        if path.name == "broken.png":
            assert vector is None and alone is None and fault
        else:
            assert vector is not None and alone is not None and fault is None
            assert vector.dtype == np.float32
            np.testing.assert_allclose(vector, alone, atol=1e-5)
            assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_clip_retrieval_finds_the_same_texture(
    tmp_path: Path, normals: list[Inspection], small_clip: OpenClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "describer", lambda name: small_clip)
    draw(tmp_path / "query.png", 5)
    pixels = np.array(Image.open(tmp_path / "query.png"))
    pixels[:2, :2] = 0
    Image.fromarray(pixels).save(tmp_path / "query.png")
    references, _ = find_references([inspect("query.png")], normals, tmp_path, "clip", 1, "product", 0, None)
    assert of(list(references), "query.png") == ["n5.png"]


def test_openai_weights_meet_the_activation_they_were_trained_with(
    tmp_path: Path, normals: list[Inspection], monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    asked = {}

    def create(model: str, pretrained: str, **options: object) -> None:
        asked[f"{model}/{pretrained}"] = options["force_quick_gelu"]
        raise OSError("no weights here")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    for name in ("ViT-B-16/openai", "ViT-B-16/laion2b_s34b_b88k"):
        with pytest.raises(EchoError, match="cannot be loaded"):
            describer(name).vectors([tmp_path / "n0.png"])
    assert asked == {"ViT-B-16/openai": True, "ViT-B-16/laion2b_s34b_b88k": False}


def test_the_features_of_a_local_folder_are_kept_apart_by_folder_and_by_weights(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "b", tmp_path / "a-b"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "open_clip_model.safetensors").write_bytes(b"one")
    keys = [describer(f"local-dir:{folder}").key for folder in folders]
    assert len(set(keys)) == 2 and all("/" not in key for key in keys)
    assert keys[0] == describer(f"local-dir:{folders[0]}").key
    (folders[0] / "open_clip_model.safetensors").write_bytes(b"other")
    assert describer(f"local-dir:{folders[0]}").key not in keys


def test_weights_that_cannot_be_fetched_end_in_one_sentence_with_the_remedy(tmp_path: Path) -> None:
    draw(tmp_path / "n0.png", 0)
    script = (
        "import sys; from pathlib import Path\n"
        "from echo_ft.config import run_main\n"
        "from echo_ft.records import Inspection\n"
        "from echo_ft.retrieval.references import find_references\n"
        "one = Inspection('a', 'n0.png', 'd', 'p', 'good', 'g')\n"
        "run_main(lambda argv: find_references([one], [one], Path(argv[0]), 'ViT-B-16/openai', 1, 'all', 0, None))\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: descriptor ViT-B-16/openai: its weights cannot be loaded")
    assert error.endswith("or set `descriptor: skimage`, which needs no weights")
    assert "Traceback" not in done.stderr
