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


def test_foreground_is_the_part_or_the_whole_of_a_surface():
    image = disc()
    y, x = np.mgrid[:150, :200]
    distance = np.hypot(y - 75, x - 100)
    found = foreground(image)
    assert found[distance < 57].all()
    assert not found[distance > 63].any()
    inverted = foreground(255 - image)  # a dark part on a bright background
    assert inverted[distance < 57].mean() > 0.95
    assert not inverted[distance > 63].any()
    gradient = np.repeat(np.linspace(40, 220, 200)[None, :, None], 120, axis=0).repeat(3, axis=2).astype(np.uint8)
    for whole in (texture(), gradient, np.full((40, 50, 3), 128, np.uint8)):
        assert foreground(whole).all()


def test_foreground_does_not_depend_on_the_image_size():
    small, large = disc(), np.asarray(Image.fromarray(disc()).resize((800, 600), Image.Resampling.BICUBIC))
    shrunk = np.asarray(Image.fromarray(foreground(large)).resize((200, 150), Image.Resampling.NEAREST))
    assert (shrunk == foreground(small)).mean() > 0.98


@pytest.mark.parametrize("draw", [disc, texture])
@pytest.mark.parametrize("method", DEFECT_METHODS)
def test_mask_covers_exactly_the_change_and_lies_on_the_part(method, draw):
    changed_shares = []
    for seed in range(8):
        image = draw(seed=seed)
        before = image.copy()
        found = make_defect(method, image, f"{seed}/x")
        assert found is not None
        assert (image == before).all()
        change = np.abs(found.image.astype(int) - image).max(axis=-1)
        assert not change[~found.mask].any(), "pixels outside the mask are unchanged"
        assert change.any()
        assert not (found.mask & ~foreground(image)).any()
        assert found.mask.mean() >= MIN_IMAGE_SHARE
        assert found.mask.sum() <= MAX_PART_SHARE * foreground(image).sum()
        changed_shares.append((change[found.mask] > CHANGE_THRESHOLD).mean())
    assert np.mean(changed_shares) > 0.6, "most of a mask has changed clearly; the rest lies in between"
    assert min(changed_shares) > 0.25


@pytest.mark.parametrize("method", DEFECT_METHODS)
def test_defect_depends_only_on_the_seed(method):
    image = disc()
    first, again, other = (make_defect(method, image, seed) for seed in ("0/a", "0/a", "1/a"))
    assert first is not None and again is not None and other is not None
    assert first.image.tobytes() == again.image.tobytes()
    assert (first.mask == again.mask).all()
    assert (first.mask != other.mask).any()


@pytest.mark.parametrize("method", DEFECT_METHODS)
def test_grey_image_stays_grey(method):
    image = disc(grey=True)
    found = make_defect(method, image, "0/grey")
    assert found is not None and (found.image == found.image[..., :1]).all()


@pytest.mark.parametrize("method", DEFECT_METHODS)
def test_defects_occur_all_over_the_part(method):
    """Each quarter contains some of twenty defects, so the location reveals nothing."""
    image, centres = disc(), []
    for seed in range(20):
        found = make_defect(method, image, f"{seed}/place")
        assert found is not None
        centres.append(ndimage.center_of_mass(found.mask))
    quarters = {(y < 75, x < 100) for y, x in centres}
    assert len(quarters) == 4


def test_invisible_defect_is_not_made():
    """Pasting a uniform surface onto itself changes nothing."""
    even = np.full((64, 64, 3), 3, np.uint8)
    assert make_defect("cutpaste", even, "0") is None
    assert make_defect("perlin", even, "0") is not None, "another texture is visible"


def test_scars_are_thin_and_blended_patches_have_soft_edges():
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


def test_perlin_noise_is_smooth_and_centred_with_the_given_cells():
    rng = np.random.default_rng(0)
    fine, coarse = (np.stack([perlin_noise((96, 128), cells, rng) for _ in range(8)]) for cells in ((16, 16), (2, 2)))
    for noise in (fine, coarse):
        assert noise.shape == (8, 96, 128)
        assert 0.5 < noise.max() <= np.abs(noise).max() <= 1.01
        assert np.abs(noise.mean()) < 0.1
    steps = [np.abs(np.diff(noise, axis=2)).mean() for noise in (fine, coarse)]
    assert steps[0] > 4 * steps[1], "with eight times as many cells, the noise is nearly eight times as steep"
    assert np.abs(np.diff(coarse, axis=2)).max() < 0.1
