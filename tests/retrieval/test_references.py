"""References are the most similar normal images, and never the query, its copies or its own part."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from echo_ft.data.dataset import candidate_order
from echo_ft.errors import EchoError
from echo_ft.records import Inspection, Reference
from echo_ft.retrieval import index
from echo_ft.retrieval import references as retrieval
from echo_ft.retrieval.descriptor_cache import DescriptorCache, extract_descriptors
from echo_ft.retrieval.descriptors import OpenClip, ScikitImage, load_extractor
from echo_ft.retrieval.references import ReferenceSearch, find_references
from tests.support.textures import draw_texture


def make_inspection(
    image: str, group: str = "", product: str = "tile", condition: str = "good", **more: object
) -> Inspection:
    return Inspection(image, image, "drawn", product, condition, group or image, **more)  # type: ignore[arg-type]


def find_all(
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


def images_of(references: list[Reference], query: str, method: str = "retrieved") -> list[str]:
    """Return the reference images of one query."""
    return [row.image for row in references if row.inspection == query and row.method == method]


@pytest.fixture
def normals(tmp_path: Path) -> list[Inspection]:
    for number in range(8):
        draw_texture(tmp_path / f"n{number}.png", number)
    return [make_inspection(f"n{number}.png") for number in range(8)]


def test_same_texture_is_nearest_despite_a_defect(tmp_path: Path, normals: list[Inspection]) -> None:
    for number in range(8):
        draw_texture(tmp_path / f"q{number}.png", number, spot=True)
    queries = [make_inspection(f"q{number}.png", condition="spot") for number in range(8)]
    references = find_all(queries, normals, tmp_path, k=3)
    assert [images_of(references, f"q{number}.png")[0] for number in range(8)] == [
        f"n{number}.png" for number in range(8)
    ]
    for query in queries:
        rows = [row for row in references if row.inspection == query.id and row.method == "retrieved"]
        assert [row.rank for row in rows] == [1, 2, 3]
        assert [row.similarity for row in rows] == sorted((row.similarity for row in rows), reverse=True)
        assert len(images_of(references, query.id, "random")) == 3


def test_query_and_its_copies_and_its_part_are_no_references(tmp_path: Path, normals: list[Inspection]) -> None:
    shutil.copy(tmp_path / "n0.png", tmp_path / "copy.png")
    draw_texture(tmp_path / "other.png", 0, spot=True)
    everything = [
        *normals,
        make_inspection("copy.png", group="elsewhere"),
        make_inspection("other.png", group="n0.png"),
    ]
    references = find_all([normals[0]], everything, tmp_path, k=20)
    allowed = {f"n{number}.png" for number in range(1, 8)}
    assert set(images_of(references, "n0.png")) == set(images_of(references, "n0.png", "random")) == allowed
    assert len(images_of(references, "n0.png")) == 7  # fewer than k exist, and each occurs once


def test_the_only_normal_image_of_a_product_shows_this_product(tmp_path: Path, normals: list[Inspection]) -> None:
    extractor = load_extractor("skimage")
    table, _ = extract_descriptors([one.image for one in normals], tmp_path, extractor, None)
    pools = {("drawn", "single"): ["n0.png"], ("drawn", "several"): [f"n{number}.png" for number in range(1, 8)]}
    search = ReferenceSearch(pools, table, extractor, 2)
    assert search.find(tmp_path / "n0.png", [*pools]) == (("drawn", "single"), [])
    product, references = search.find(tmp_path / "n1.png", [*pools])
    assert product == ("drawn", "several")
    assert len(references) == 2
    assert "n1.png" not in [one.image for one in references]


def test_copy_of_the_own_part_in_another_group_is_no_reference(tmp_path: Path, normals: list[Inspection]) -> None:
    draw_texture(tmp_path / "query.png", 0, spot=True)
    shutil.copy(tmp_path / "n0.png", tmp_path / "copy.png")
    query = make_inspection("query.png", group="n0.png", condition="spot")
    references = find_all([query], [*normals, make_inspection("copy.png", group="elsewhere")], tmp_path, k=20)
    assert not {"n0.png", "copy.png"} & {row.image for row in references}


def test_copies_among_the_normal_images_count_once(tmp_path: Path, normals: list[Inspection]) -> None:
    draw_texture(tmp_path / "query.png", 0, spot=True)
    for number in range(5):
        shutil.copy(tmp_path / "n0.png", tmp_path / f"copy{number}.png")
    many = [*normals, *(make_inspection(f"copy{number}.png") for number in range(5))]
    found = images_of(find_all([make_inspection("query.png")], many, tmp_path, k=2), "query.png")
    assert found[0] == "copy0.png"
    assert not found[1].startswith("copy")


def test_scope_limits_the_search_to_the_product(tmp_path: Path, normals: list[Inspection]) -> None:
    draw_texture(tmp_path / "query.png", 3, spot=True)
    foreign = [make_inspection(normal.image, product="other") for normal in normals[3:]]
    query = make_inspection("query.png")
    within = find_all([query], [*normals[:3], *foreign], tmp_path, k=1)
    assert images_of(within, "query.png")[0] in {"n0.png", "n1.png", "n2.png"}
    assert images_of(find_all([query], [*normals[:3], *foreign], tmp_path, k=1, scope="all"), "query.png") == ["n3.png"]


def test_order_of_queries_and_normals_does_not_matter(tmp_path: Path, normals: list[Inspection]) -> None:
    queries = normals[:4]
    references = find_all(queries, normals, tmp_path)
    reversed_order = find_all(queries[::-1], normals[::-1], tmp_path)
    assert sorted(map(repr, references)) == sorted(map(repr, reversed_order))
    assert find_all(queries[:1], normals, tmp_path) == [r for r in references if r.inspection == "n0.png"]


def test_seed_affects_only_the_random_control(tmp_path: Path, normals: list[Inspection]) -> None:
    first, second = find_all(normals, normals, tmp_path), find_all(normals, normals, tmp_path, seed=1)
    assert [r for r in first if r.method == "retrieved"] == [r for r in second if r.method == "retrieved"]
    assert [r for r in first if r.method == "random"] != [r for r in second if r.method == "random"]


def test_named_reference_is_kept_as_given(tmp_path: Path, normals: list[Inspection]) -> None:
    query = make_inspection("n0.png", group="pair", reference="n1.png")
    references = find_all([query], [make_inspection("n1.png", group="pair"), *normals[2:]], tmp_path)
    given = [row for row in references if row.method == "given"]
    assert [(row.image, row.rank) for row in given] == [("n1.png", 1)]
    assert -1 <= given[0].similarity <= 1
    only_given = find_all([query], [], tmp_path)
    assert [row.method for row in only_given] == ["given"]


def test_query_without_an_admissible_normal_has_no_reference(tmp_path: Path, normals: list[Inspection]) -> None:
    assert find_all([normals[0]], [normals[0]], tmp_path) == []
    assert find_all([normals[0]], [], tmp_path) == []


def test_broken_image_is_rejected_and_shifts_no_neighbour(tmp_path: Path, normals: list[Inspection]) -> None:
    draw_texture(tmp_path / "query.png", 5, spot=True)
    (tmp_path / "a_first.png").write_bytes(b"not an image")
    (tmp_path / "n2_cut.png").write_bytes((tmp_path / "n2.png").read_bytes()[:200])
    broken = [make_inspection("a_first.png"), make_inspection("n2_cut.png"), make_inspection("gone.png")]
    cache = tmp_path / "cache"
    for _ in range(2):  # the second pass uses the cache
        found, rejections = find_references(
            [make_inspection("query.png"), *broken], [*broken, *normals], tmp_path, "skimage", 1, "product", 0, cache
        )
        references = list(found)
        assert images_of(references, "query.png") == ["n5.png"]
        assert [rejection.item for rejection in rejections] == ["a_first.png", "gone.png", "n2_cut.png"]
        assert all(rejection.reason for rejection in rejections)
        assert {row.inspection for row in references} == {"query.png"}


def test_cache_skips_unchanged_files_and_detects_changed_ones(
    tmp_path: Path, normals: list[Inspection], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_texture(tmp_path / "query.png", 5, spot=True)
    cache = tmp_path / "cache"
    fresh = find_all([make_inspection("query.png")], normals, tmp_path)
    assert find_all([make_inspection("query.png")], normals, tmp_path, cache=cache) == fresh
    extracted: list[str] = []
    original = ScikitImage.vectors

    def count(self: ScikitImage, paths: list[Path]) -> object:
        extracted.extend(path.name for path in paths)
        return original(self, paths)

    monkeypatch.setattr(ScikitImage, "vectors", count)
    assert find_all([make_inspection("query.png")], normals, tmp_path, cache=cache) == fresh
    assert extracted == []
    draw_texture(tmp_path / "n5.png", 99)
    assert (
        images_of(find_all([make_inspection("query.png")], normals, tmp_path, cache=cache), "query.png")[0] != "n5.png"
    )
    assert extracted == ["n5.png"]


def test_any_changed_byte_of_a_cached_descriptor_is_refused_with_the_name_of_its_shard(tmp_path: Path) -> None:
    cache = DescriptorCache(ScikitImage(), tmp_path)
    cache.add(["a", "b"], np.random.default_rng(0).random((2, 32), np.float32))
    assert cache.folder is not None
    (path,) = cache.folder.iterdir()
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(EchoError, match=f"the descriptor cache {path} .*; delete it"):
            cache.gather({"a": 0, "b": 1})
    path.write_bytes(content)
    assert cache.gather({"a": 0, "b": 1}).any()


def test_damaged_cache_error_says_what_to_delete(tmp_path: Path, normals: list[Inspection]) -> None:
    cache = tmp_path / "cache"
    find_all(normals[:1], normals, tmp_path, cache=cache, kind="hnsw")
    next(cache.glob("index-*.faiss")).write_bytes(b"cut")
    with pytest.raises(EchoError, match=r"the index .*index-.*faiss has changed since it was written; delete it"):
        find_all(normals[:1], normals, tmp_path, cache=cache, kind="hnsw")
    next(cache.glob("features-skimage*/*.npz")).write_bytes(b"cut")
    with pytest.raises(EchoError, match=r"features-skimage.*npz cannot be read .*; delete it"):
        find_all(normals[:1], normals, tmp_path, cache=cache)


@pytest.mark.parametrize(
    "vectors",
    [np.full((2, 4), np.nan), np.ones((1, 4)), np.ones((2, 5)), np.ones(2)],
    ids=["NaN", "few", "wide", "flat"],
)
def test_descriptors_of_another_form_are_refused(tmp_path: Path, vectors: np.ndarray) -> None:
    cache = DescriptorCache(ScikitImage(), tmp_path)
    cache.add(["a", "b"], np.ones((2, 4), np.float32))
    cache.add(["c", "d"], np.ones((2, 4), np.float32))
    assert cache.gather({"d": 0, "a": 1}).shape == (2, 4)
    np.savez(cache.folder / f"{0:016}.npz", hashes=np.array(["c", "d"]), vectors=vectors.astype(np.float32))
    with pytest.raises(EchoError, match=r"the descriptor cache .*features-skimage.* is damaged .*; delete it"):
        cache.gather({"d": 0, "a": 1, "b": 2, "c": 3})


def test_graph_skips_excluded_normals_like_the_exact_search(tmp_path: Path, normals: list[Inspection]) -> None:
    exact = find_all(normals, normals, tmp_path, kind="flat")
    for _ in range(2):  # the second pass uses the cache
        assert find_all(normals, normals, tmp_path, cache=tmp_path / "cache", kind="hnsw") == exact


def test_normals_missed_by_the_approximate_search_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All near neighbours show the query's own part, so the search at first finds only excluded images."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(600, 16)).astype(np.float32)
    vectors[:300] = vectors[0] + 0.01 * vectors[:300]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    images = [f"{number}.png" for number in range(600)]
    for number, image in enumerate(images):
        (tmp_path / image).write_bytes(b"%d" % number)
    rows = dict(zip(images, vectors, strict=True))

    class FixedExtractor:
        key = "fixed"

        def vectors(self, paths: list[Path]) -> tuple[list[np.ndarray], list[None]]:
            return [rows[path.name] for path in paths], [None] * len(paths)

    monkeypatch.setattr(retrieval, "load_extractor", lambda name: FixedExtractor())
    monkeypatch.setattr(index, "MIN_IVF_VECTORS", 256)
    monkeypatch.setattr(index, "PROBED_LISTS", 1)
    pool = [make_inspection(image, group="own" if number < 300 else "") for number, image in enumerate(images)]
    queries = [pool[0], pool[299], pool[300], pool[599]]
    found = {kind: find_all(queries, pool, tmp_path, k=3, kind=kind) for kind in ("flat", "ivf_pq", "hnsw")}
    assert [len(images_of(found["flat"], query.id)) for query in queries] == [3, 3, 3, 3]
    for query in queries[:2]:
        assert not {f"{number}.png" for number in range(300)} & set(images_of(found["ivf_pq"], query.id))
        for kind in ("ivf_pq", "hnsw"):
            assert images_of(found[kind], query.id) == images_of(found["flat"], query.id)
    for query in queries[2:]:
        assert len(images_of(found["ivf_pq"], query.id)) == 3


def test_candidate_order_depends_only_on_the_case() -> None:
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
def test_wrong_option_error_lists_the_right_ones(
    tmp_path: Path, normals: list[Inspection], arguments: dict[str, object], message: str
) -> None:
    options: dict[str, object] = {"descriptor": "skimage", "k": 1, "scope": "product", "seed": 0, "cache": None}
    with pytest.raises(EchoError, match=message):
        find_references(normals, normals, tmp_path, **{**options, **arguments})  # type: ignore[arg-type]


def test_defective_image_is_rejected_as_reference(tmp_path: Path, normals: list[Inspection]) -> None:
    with pytest.raises(EchoError, match=r"n0.png is crack, not good"):
        find_all(normals, [make_inspection("n0.png", condition="crack")], tmp_path)


def test_clip_retrieval_finds_the_same_texture(
    tmp_path: Path, normals: list[Inspection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "load_extractor", lambda name: OpenClip("ViT-S-32-alt", None))
    draw_texture(tmp_path / "query.png", 5)
    pixels = np.array(Image.open(tmp_path / "query.png"))
    pixels[:2, :2] = 0
    Image.fromarray(pixels).save(tmp_path / "query.png")
    references, _ = find_references([make_inspection("query.png")], normals, tmp_path, "clip", 1, "product", 0, None)
    assert images_of(list(references), "query.png") == ["n5.png"]
