"""The leakage search finds images of the same surface and does not confuse different parts of a product."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.data.audit import KINDS, Planted, alter, find, plant
from data_prep.sources import SourceConfig, magnetic_tile
from echo_ft.errors import EchoError
from echo_ft.leakage.matches import evidence, find_matches
from echo_ft.records import Inspection
from tests.conftest import ROOT

DATA = Path(os.environ.get("ECHO_FT_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[list[Planted], list[Planted]]:
    """5 products: 220 photographs trained on; asked about are 55 of other parts and 25 made from the former."""
    return plant(tmp_path_factory.mktemp("planted"), products=5, trained=44, clean=11, leaks=5, seed=1)


def test_every_planted_leak_is_found_and_no_other_part_is_taken_for_one(planted):
    trained, asked = planted
    matches = find(trained, asked)
    found = {(trained[match.train_index].path, asked[match.query_index].path) for match in matches}
    sources = {(one.product, one.part): one.path for one in trained}
    leaks = [one for one in asked if one.kind]
    assert [sum(one.kind == kind for one in leaks) for kind in KINDS] == [5] * len(KINDS)
    assert found == {(sources[one.product, one.part], one.path) for one in leaks}
    assert {asked[match.query_index].kind for match in matches if match.copy} == {"copy"}
    assert all(match.similarity == 1 if match.copy else 0.6 <= match.similarity < 1 for match in matches)


def test_a_crop_is_found_among_many_photographs_of_its_product(tmp_path, monkeypatch):
    """By the hashes alone a third of a product's other parts are nearer to a crop than what it was cut from."""
    monkeypatch.setattr("echo_ft.leakage.perceptual_hash.NEAREST_HASHES", 24)
    monkeypatch.setattr("echo_ft.leakage.perceptual_hash.EXTRA_CANDIDATES", 12)
    trained, _ = plant(tmp_path, products=1, trained=120, clean=0, leaks=0, seed=0)
    rng = np.random.default_rng(0)
    crops = [alter(one.path, tmp_path / f"crop{number}", "crop", rng) for number, one in enumerate(trained[::20])]
    paths = [one.path for one in trained]
    matches = find_matches(paths, ["part"] * len(paths), crops)
    assert [(match.train_index, match.query_index) for match in matches] == [
        (20 * number, number) for number in range(6)
    ]
    monkeypatch.setattr("echo_ft.leakage.perceptual_hash.EXTRA_CANDIDATES", 0)
    assert len(find_matches(paths, ["part"] * len(paths), crops)) < len(crops)


def test_the_altered_one_of_a_leaked_pair_may_be_the_one_that_is_trained_on(planted):
    trained, asked = planted
    altered = [one for one in asked if one.kind in ("crop", "half size", "brightness")]
    sources = {(one.product, one.part): one for one in trained}
    originals = [sources[one.product, one.part] for one in altered]
    known = [one for one in asked if not one.kind] + altered
    matches = find(known, originals)
    assert {(known[match.train_index].path, match.query_index) for match in matches} == {
        (one.path, place) for place, one in enumerate(altered)
    }


def test_new_products_are_clean(planted):
    everything = [one for side in planted for one in side if not one.kind]
    known, new = ([one for one in everything if (one.product < 3) == side][::2] for side in (True, False))
    assert find(known, new) == []


def test_a_copy_is_a_copy_of_every_equal_file_and_its_twins_hide_no_altered_one(planted, tmp_path):
    trained = planted[0][:88]
    twin = dataclasses.replace(trained[3], path=Path(shutil.copy(trained[3].path, tmp_path / "twin.png")))
    half = alter(twin.path, tmp_path / "half", "half size", np.random.default_rng(0))
    matches = find([*trained, twin], [twin, dataclasses.replace(twin, path=half)])
    assert [(match.train_index, match.query_index, match.copy) for match in matches] == [
        (3, 0, True),
        (len(trained), 0, True),
        (3, 1, False),
        (len(trained), 1, False),
    ]


def test_small_chunks_and_blocks_change_nothing(planted, monkeypatch):
    trained, asked = planted[0][:44], [one for one in planted[1] if one.product == 0]
    whole = find(trained, asked)
    assert whole
    monkeypatch.setattr("echo_ft.leakage.matches.QUERIES_PER_PASS", 7)
    monkeypatch.setattr("echo_ft.leakage.perceptual_hash.IMAGES_PER_BLOCK", 11)
    assert find(trained, asked) == whole


def test_nothing_to_compare_with_is_clean_and_a_missing_photograph_is_an_error(planted, tmp_path):
    path = planted[0][0].path
    assert find_matches([], [], [path]) == find_matches([path], ["cap"], []) == []
    with pytest.raises(EchoError, match=r"gone.png cannot be opened .*; put it back"):
        find_matches([path], ["cap"], [tmp_path / "gone.png"])
    (tmp_path / "cut.png").write_bytes(path.read_bytes()[:200])
    with pytest.raises(EchoError, match=r"cut.png cannot be read"):
        find_matches([tmp_path / "cut.png"], ["cap"], [path])


def test_evidence_sees_a_part_beyond_its_product_whatever_the_light():
    rng = np.random.default_rng(0)
    product = 12 * rng.normal(size=(64, 64)).astype(np.float32)
    parts = [product + 4 * rng.normal(size=(64, 64)).astype(np.float32) for _ in range(20)]
    similarity, excess = evidence(0.7 * parts[4], np.ones((64, 64), np.float32), np.stack(parts), ["cap"] * 20)
    assert np.argmax(similarity) == np.argmax(excess) == 4
    assert similarity[4] == pytest.approx(1, abs=1e-3) and excess[4] > 1
    others = np.delete(np.arange(20), 4)
    assert similarity[others].min() > 0.8, "the parts look alike"
    assert np.abs(excess[others]).max() < 0.3


@pytest.mark.real_data
def test_exposures_of_a_tile_are_one_surface_and_tiles_are_not():
    root = DATA / "magnetic_tile"
    if not root.is_dir():
        pytest.skip(f"no magnetic tiles in {root}")
    inspections = [one for one in magnetic_tile.read(SourceConfig(root)) if isinstance(one, Inspection)]
    groups: dict[str, list[Inspection]] = {}
    for one in inspections:
        groups.setdefault(one.group, []).append(one)
    tiles = random.Random(0).sample(sorted(group for group, rows in groups.items() if len(rows) == 6), 24)
    chosen = [groups[tile] for tile in tiles]
    trained, asked = ([one for rows in chosen for one in part(rows)] for part in (lambda r: r[:4], lambda r: r[4:]))
    products = [one.product for one in trained]
    matches = find_matches([root / one.image for one in trained], products, [root / one.image for one in asked])
    # Exposures are cropped by hand, some by more than is searched: 47 of the 48 are found.
    assert len({match.query_index for match in matches}) >= 45, "a split by photograph leaks everywhere"
    assert all(trained[match.train_index].group == asked[match.query_index].group for match in matches)
