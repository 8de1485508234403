"""Synthetic defects change only the part, are visible, and depend only on the seed."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from echo_ft.images.synthetic_defects import (
    CHANGE_THRESHOLD,
    DEFECT_METHODS,
    MAX_PART_SHARE,
    MIN_IMAGE_SHARE,
    foreground,
    make_defect,
    perlin_noise,
)
from tests.support.surfaces import disc, texture


def test_the_foreground_is_the_part_before_a_background_and_all_of_a_surface():
    image = disc()
    y, x = np.mgrid[:150, :200]
    distance = np.hypot(y - 75, x - 100)
    found = foreground(image)
    assert found[distance < 57].all() and not found[distance > 63].any()
    bright = 255 - image  # as dark a part before as bright a background
    assert foreground(bright)[distance < 57].mean() > 0.95 and not foreground(bright)[distance > 63].any()
    gradient = np.repeat(np.linspace(40, 220, 200)[None, :, None], 120, axis=0).repeat(3, axis=2).astype(np.uint8)
    for whole in (texture(), gradient, np.full((40, 50, 3), 128, np.uint8)):
        assert foreground(whole).all()


def test_the_foreground_of_a_large_photograph_is_that_of_a_small_one():
    small, large = disc(), np.asarray(Image.fromarray(disc()).resize((800, 600), Image.Resampling.BICUBIC))
    shrunk = np.asarray(Image.fromarray(foreground(large)).resize((200, 150), Image.Resampling.NEAREST))
    assert (shrunk == foreground(small)).mean() > 0.98


@pytest.mark.parametrize("photograph", [disc, texture])
@pytest.mark.parametrize("method", DEFECT_METHODS)
def test_the_mask_is_where_the_photograph_changed_and_lies_on_the_part(method, photograph):
    made_of = []
    for seed in range(8):
        image = photograph(seed=seed)
        before = image.copy()
        found = make_defect(method, image, f"{seed}/x")
        assert found is not None and (image == before).all()
        change = np.abs(found.image.astype(int) - image).max(axis=-1)
        assert not change[~found.mask].any(), "outside the mask it is the photograph itself"
        assert (change > 0).sum() > 0 and not (found.mask & ~foreground(image)).any()
        assert found.mask.mean() >= MIN_IMAGE_SHARE and found.mask.sum() <= MAX_PART_SHARE * foreground(image).sum()
        made_of.append((change[found.mask] > CHANGE_THRESHOLD).mean())
    assert np.mean(made_of) > 0.6 and min(made_of) > 0.25, "most of a mask changed clearly, the rest lies between"


@pytest.mark.parametrize("method", DEFECT_METHODS)
def test_the_seed_alone_decides(method):
    image = disc()
    first, again, other = (make_defect(method, image, seed) for seed in ("0/a", "0/a", "1/a"))
    assert first is not None and again is not None and other is not None
    assert first.image.tobytes() == again.image.tobytes() and (first.mask == again.mask).all()
    assert (first.mask != other.mask).any()


@pytest.mark.parametrize("method", DEFECT_METHODS)
def test_a_grey_photograph_stays_grey(method):
    image = disc(grey=True)
    found = make_defect(method, image, "0/grey")
    assert found is not None and (found.image == found.image[..., :1]).all()


@pytest.mark.parametrize("method", DEFECT_METHODS)
def test_defects_are_drawn_all_over_the_part(method):
    """Of twenty defects, some lie in each quarter: a place must not tell that there is one."""
    image, centres = disc(), []
    for seed in range(20):
        found = make_defect(method, image, f"{seed}/place")
        assert found is not None
        centres.append(ndimage.center_of_mass(found.mask))
    quarters = {(y < 75, x < 100) for y, x in centres}
    assert len(quarters) == 4


def test_where_nothing_can_be_seen_nothing_is_made():
    """A patch of an even surface on the same surface changes nothing."""
    even = np.full((64, 64, 3), 3, np.uint8)
    assert make_defect("cutpaste", even, "0") is None
    assert make_defect("perlin", even, "0") is not None, "another texture does"


def test_a_scar_is_thin_and_a_blended_patch_has_softer_edges_than_a_pasted_one():
    image = ndimage.gaussian_filter(disc().astype(float), (1.5, 1.5, 0)).astype(np.uint8)
    widths, edges = [], {"cutpaste": [], "poisson": []}
    for seed in range(12):
        scar = make_defect("scar", image, f"{seed}/scar")
        assert scar is not None
        widths.append(2 * ndimage.distance_transform_edt(scar.mask).max())
        for method, found in edges.items():
            made = make_defect(method, image, f"{seed}/edge")
            assert made is not None
            change = np.abs(made.image.astype(int) - image).max(axis=-1)
            rim = made.mask & ~ndimage.binary_erosion(made.mask)
            found.append(change[rim].mean() / change[made.mask].mean())
    assert max(widths) <= 16 * 200 / 256 + 3
    assert np.mean(edges["poisson"]) < 0.85 * np.mean(edges["cutpaste"])


def test_perlin_noise_is_smooth_centred_and_has_the_cells_that_were_asked_for():
    rng = np.random.default_rng(0)
    fine, coarse = (np.stack([perlin_noise((96, 128), cells, rng) for _ in range(8)]) for cells in ((16, 16), (2, 2)))
    for noise in (fine, coarse):
        assert noise.shape == (8, 96, 128) and np.abs(noise).max() <= 1.01 and noise.max() > 0.5
        assert np.abs(noise.mean()) < 0.1
    steps = [np.abs(np.diff(noise, axis=2)).mean() for noise in (fine, coarse)]
    assert steps[0] > 4 * steps[1], "eight times as many cells are nearly eight times as steep"
    assert np.abs(np.diff(coarse, axis=2)).max() < 0.1
