"""The leakage search finds images of the same surface and does not confuse different parts of a product."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from benchmarks.data.audit import LEAK_TYPES, DrawnImage, audit_drawn, draw_splits, make_leak
from data_prep.sources import SourceConfig, magnetic_tile
from echo_ft.errors import EchoError
from echo_ft.leakage.matches import evidence, find_matches
from echo_ft.records import Inspection
from tests.conftest import ROOT

DATA = Path(os.environ.get("ECHO_FT_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> tuple[list[DrawnImage], list[DrawnImage]]:
    """220 training images of 5 products, and 80 test images: 55 show other parts, and 25 are leaks."""
    return draw_splits(tmp_path_factory.mktemp("drawn"), products=5, training=44, clean=11, leaks=5, seed=1)


def test_every_planted_leak_is_found_without_false_alarms(splits):
    training, test = splits
    matches = audit_drawn(training, test)
    found = {(training[match.train_index].path, test[match.query_index].path) for match in matches}
    sources = {(image.product, image.part): image.path for image in training}
    leaks = [image for image in test if image.leak]
    assert [sum(image.leak == leak for image in leaks) for leak in LEAK_TYPES] == [5] * len(LEAK_TYPES)
    assert found == {(sources[image.product, image.part], image.path) for image in leaks}
    assert {test[match.query_index].leak for match in matches if match.copy} == {"copy"}
    assert all(match.similarity == 1 if match.copy else 0.6 <= match.similarity < 1 for match in matches)


def test_crop_is_found_among_many_images_of_its_product(tmp_path, monkeypatch):
    """Measured by plain hashes, a third of the product's other images are closer to a crop than its source is."""
    monkeypatch.setattr("echo_ft.leakage.perceptual_hash.NEAREST_HASHES", 24)
    monkeypatch.setattr("echo_ft.leakage.perceptual_hash.EXTRA_CANDIDATES", 12)
    training, _ = draw_splits(tmp_path, products=1, training=120, clean=0, leaks=0, seed=0)
    rng = np.random.default_rng(0)
    sources = training[::20]
    crops = [make_leak(one.path, tmp_path / f"crop{number}", "crop", rng) for number, one in enumerate(sources)]
    paths = [image.path for image in training]
    products = ["part"] * len(paths)
    pairs = [(match.train_index, match.query_index) for match in find_matches(paths, products, crops)]
    assert pairs == [(20 * number, number) for number in range(6)]
    monkeypatch.setattr("echo_ft.leakage.perceptual_hash.EXTRA_CANDIDATES", 0)
    assert len(find_matches(paths, products, crops)) < len(crops)


def test_leaks_on_a_flat_background_are_found(tmp_path):
    """Without noise, as in drawn or masked images, a running sum of squares may end slightly below 0."""
    paths = []
    for seed in range(24):
        image = Image.new("RGB", (160, 160), (200, 200, 200))
        rng = np.random.default_rng(seed)
        for x, y, width, height in zip(*rng.integers(20, 120, (2, 12)), *rng.integers(5, 30, (2, 12)), strict=True):
            box = tuple(map(int, (x, y, x + width, y + height)))
            ImageDraw.Draw(image).ellipse(box, fill=tuple(map(int, rng.integers(0, 255, 3))))
        paths.append(tmp_path / f"{seed}.png")
        image.save(paths[-1])
    rng = np.random.default_rng(0)
    leaks = [make_leak(path, tmp_path / f"leak{path.stem}", "brightness", rng) for path in paths[:4]]
    matches = find_matches(paths[:20], ["cap"] * 20, [*leaks, *paths[20:]])
    assert [(match.train_index, match.query_index) for match in matches] == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_leak_is_found_if_the_altered_image_is_in_training(splits):
    training, test = splits
    altered = [image for image in test if image.leak in ("crop", "half size", "brightness")]
    sources = {(image.product, image.part): image for image in training}
    originals = [sources[image.product, image.part] for image in altered]
    swapped = [image for image in test if not image.leak] + altered
    matches = audit_drawn(swapped, originals)
    pairs = {(swapped[match.train_index].path, match.query_index) for match in matches}
    assert pairs == {(image.path, index) for index, image in enumerate(altered)}


def test_new_products_are_clean(splits):
    images = [image for split in splits for image in split if not image.leak]
    known, new = ([image for image in images if (image.product < 3) == side][::2] for side in (True, False))
    assert audit_drawn(known, new) == []


def test_copy_matches_every_equal_file_and_hides_no_altered_copy(splits, tmp_path):
    training = splits[0][:88]
    duplicate = dataclasses.replace(training[3], path=Path(shutil.copy(training[3].path, tmp_path / "duplicate.png")))
    half = make_leak(duplicate.path, tmp_path / "half", "half size", np.random.default_rng(0))
    matches = audit_drawn([*training, duplicate], [duplicate, dataclasses.replace(duplicate, path=half)])
    assert [(match.train_index, match.query_index, match.copy) for match in matches] == [
        (3, 0, True),
        (len(training), 0, True),
        (3, 1, False),
        (len(training), 1, False),
    ]


def test_chunk_and_block_sizes_do_not_change_the_matches(splits, monkeypatch):
    training, test = splits[0][:44], [image for image in splits[1] if image.product == 0]
    expected = audit_drawn(training, test)
    assert expected
    monkeypatch.setattr("echo_ft.leakage.matches.QUERIES_PER_PASS", 7)
    monkeypatch.setattr("echo_ft.leakage.perceptual_hash.IMAGES_PER_BLOCK", 11)
    assert audit_drawn(training, test) == expected


def test_empty_sides_are_clean_and_unreadable_images_are_errors(splits, tmp_path):
    path = splits[0][0].path
    assert find_matches([], [], [path]) == find_matches([path], ["cap"], []) == []
    with pytest.raises(EchoError, match=r"gone.png cannot be opened .*; restore it"):
        find_matches([path], ["cap"], [tmp_path / "gone.png"])
    (tmp_path / "cut.png").write_bytes(path.read_bytes()[:200])
    with pytest.raises(EchoError, match=r"cut.png cannot be read"):
        find_matches([tmp_path / "cut.png"], ["cap"], [path])


def test_evidence_tells_a_part_from_its_product_in_any_light():
    rng = np.random.default_rng(0)
    product = 12 * rng.normal(size=(64, 64)).astype(np.float32)
    parts = [product + 4 * rng.normal(size=(64, 64)).astype(np.float32) for _ in range(20)]
    similarity, excess = evidence(0.7 * parts[4], np.ones((64, 64), np.float32), np.stack(parts), ["cap"] * 20)
    assert np.argmax(similarity) == np.argmax(excess) == 4
    assert similarity[4] == pytest.approx(1, abs=1e-3)
    assert excess[4] > 1
    others = np.delete(np.arange(20), 4)
    assert similarity[others].min() > 0.8, "the parts look alike"
    assert np.abs(excess[others]).max() < 0.3


@pytest.mark.real_data
def test_exposures_of_one_tile_match_and_different_tiles_do_not():
    root = DATA / "magnetic_tile"
    if not root.is_dir():
        pytest.skip(f"no magnetic tiles in {root}")
    inspections = [one for one in magnetic_tile.read(SourceConfig(root)) if isinstance(one, Inspection)]
    groups: dict[str, list[Inspection]] = {}
    for one in inspections:
        groups.setdefault(one.group, []).append(one)
    tiles = random.Random(0).sample(sorted(group for group, rows in groups.items() if len(rows) == 6), 24)
    chosen = [groups[tile] for tile in tiles]
    training = [inspection for rows in chosen for inspection in rows[:4]]
    queries = [inspection for rows in chosen for inspection in rows[4:]]
    products = [inspection.product for inspection in training]
    training_paths, query_paths = ([root / one.image for one in side] for side in (training, queries))
    matches = find_matches(training_paths, products, query_paths)
    # The exposures were cropped by hand, one of them by more than the search covers, so 47 of the 48 are found.
    assert len({match.query_index for match in matches}) >= 45, "a split by image leaks everywhere"
    assert all(training[match.train_index].group == queries[match.query_index].group for match in matches)
