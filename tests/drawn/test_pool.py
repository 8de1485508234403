"""A pool is the same however it is drawn, appears complete or not at all, and says what its images show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from echo_ft.errors import EchoError
from tests.conftest import ROOT
from train.tiny import pool

DRAW_AND_DIE = """
import os, signal, sys
from pathlib import Path
from train.tiny import pool
pool.draw_pool(Path(sys.argv[1]), 2, 7)
draw, drawn = pool.draw_product, []
def die(seed):
    drawn.append(seed)
    if len(drawn) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(seed)
pool.draw_product = die
pool.draw_pool(Path(sys.argv[2]), 4, 7)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of products 5 to 44."""
    path = tmp_path_factory.mktemp("pools") / "pool"
    pool.draw_pool(path, 40, 5)
    return path


def test_another_process_draws_the_same_products_and_a_killed_one_leaves_no_pool(folder: Path, tmp_path: Path) -> None:
    range_, dead = tmp_path / "range", tmp_path / "dead"
    done = subprocess.run([sys.executable, "-c", DRAW_AND_DIE, str(range_), str(dead)], cwd=ROOT, capture_output=True)
    assert done.returncode == -9, done.stderr
    whole, part = pool.open_pool(folder), pool.open_pool(range_)
    assert (whole.products, part.products) == (40, 2)
    for name in ("images", "shares", "labels"):
        assert np.array_equal(getattr(whole, name)[8:16], getattr(part, name)), name
    assert not dead.exists()
    with pytest.raises(EchoError, match="no pool of drawn images"):
        pool.open_pool(dead)
    pool.draw_pool(dead, 1, 7)
    assert np.array_equal(pool.open_pool(dead).images, whole.images[8:12])


def test_a_failed_draw_leaves_the_pool_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.draw_pool(tmp_path / "pool", 1, 0)
    before = pool.open_pool(tmp_path / "pool").images.copy()

    def fail(seed: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "draw_product", fail)
    with pytest.raises(KeyboardInterrupt):
        pool.draw_pool(tmp_path / "pool", 1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]
    assert np.array_equal(pool.open_pool(tmp_path / "pool").images, before)


def test_a_pool_of_another_edition_is_refused(folder: Path, tmp_path: Path) -> None:
    opened = pool.open_pool(folder)
    for name in ("images", "shares"):
        np.save(tmp_path / f"{name}.npy", getattr(opened, name))
    np.save(tmp_path / "labels.npy", np.zeros((160, 5), np.int16))
    with pytest.raises(EchoError, match="another edition"):
        pool.open_pool(tmp_path)
    np.save(tmp_path / "labels.npy", opened.labels)
    np.save(tmp_path / "shares.npy", np.zeros((160, 12, 12), np.uint8))
    with pytest.raises(EchoError, match="another edition"):
        pool.open_pool(tmp_path)
    for length in (90, 0):
        (tmp_path / "labels.npy").write_bytes((folder / "labels.npy").read_bytes()[:length])
        with pytest.raises(EchoError, match="no pool of drawn images"):
            pool.open_pool(tmp_path)


def test_a_product_has_two_normal_images_and_two_with_defects(folder: Path) -> None:
    drawn = pool.open_pool(folder)
    assert drawn.images.shape == (160, 168, 168, 3)
    assert drawn.shares.shape == (160, 24, 24)
    labels = np.asarray(drawn.labels).reshape(40, 4)
    area = drawn.shares.astype(float).sum((1, 2)).reshape(40, 4) * pool.PATCH**2 / 255
    assert (labels["defect"][:, :2] == -1).all()
    assert (labels["defect"][:, 2:] >= 0).mean() > 0.95
    assert np.array_equal(labels["defect"] >= 0, area > 11.5)
    assert np.array_equal(labels["defect"] >= 0, labels["extent"] >= 0)
    for name in ("kind", "colour"):
        assert (labels[name] == labels[name][:, :1]).all(), "one product"
    images = drawn.images.reshape(40, 4, -1)
    assert all(not np.array_equal(four[i], four[j]) for four in images for i in range(4) for j in range(i))


def test_labels_name_what_the_images_show(folder: Path) -> None:
    drawn = pool.open_pool(folder)
    for seed in range(5, 45):
        product, four = pool.draw_product(seed)
        for place, (rendered, defect) in enumerate(four, 4 * (seed - 5)):
            label, coloured = drawn.labels[place], product.station.mode == "colour"
            assert pool.KIND_NAMES[label["kind"]] == product.style.kind
            assert label["colour"] == (pool.COLOUR_NAMES.index(product.style.colour) if coloured else -1)
            if defect is None:
                assert label["tone"] == -1
                continue
            assert pool.DEFECT_NAMES[label["defect"]] == defect.name
            assert pool.EXTENT_NAMES[label["extent"]] == pool.size_word(rendered.mask)
            seen = coloured or defect.tone in ("", "dark", "bright")
            assert label["tone"] == (pool.TONE_NAMES.index(defect.tone) if seen else -1)
            if not coloured:
                assert (drawn.images[place] == drawn.images[place][..., :1]).all()


def test_shares_tell_how_much_of_a_patch_is_defective() -> None:
    mask = np.zeros((168, 168), bool)
    mask[7:14, 14:21] = True
    mask[14:21, 28] = True
    shares = pool.patch_shares(mask)
    assert (shares[1, 2], shares[2, 4], np.count_nonzero(shares)) == (255, round(255 / 7), 2)
