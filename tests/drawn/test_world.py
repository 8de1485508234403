"""The wider drawn world contains nothing from the demo, and its masks mark what a defect visibly changes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest

from echo_ft.drawn import parts, shapes, world
from echo_ft.drawn.assemblies import (
    ASSEMBLY,
    STRUCTURAL_DEFECTS,
    fills_image,
    plan_assembly,
    structural_defect,
    structural_names,
)
from echo_ft.drawn.stations import random_station, station_coordinates
from train.tiny.pool import draw_product

DEMO_CODE = {
    *(shapes.PART_SHAPES[product].__code__ for product in parts.DEMO_PRODUCTS),
    *(shapes.FORMS[name].__code__ for name in ("scratch", "stain", "chip")),
    parts.demo_part.__code__,
}


def sharp_product(seed: int, kind: str) -> world.Product:
    """A product in colour whose images are neither blurred nor compressed."""
    rng = np.random.default_rng(seed)
    station = replace(random_station(rng), mode="colour", blur=0.0, quality=0, fixed_noise=0.0)
    return world.Product(parts.random_style(rng, kind), station)


def product_with(name: str, seed: int) -> tuple[world.Product, parts.Defect]:
    """A product and a defect with this name."""
    rng = np.random.default_rng(seed)
    for attempt in range(100):
        product = sharp_product(1000 * seed + attempt, ASSEMBLY if name in STRUCTURAL_DEFECTS else "plate")
        if name in structural_names(product.style):
            return product, structural_defect(rng, product.style, name)
        if name not in STRUCTURAL_DEFECTS:
            tone = world.WORLD_DEFECTS[name][0]
            return product, parts.place_defect(rng, product.style, name, 0.2, tone)
    raise AssertionError(name)


def called(function: Callable[[], Any]) -> set[CodeType]:
    """The code objects of all Python functions that run during a call."""
    found: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            found.add(frame.f_code)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


def test_the_world_runs_no_code_of_the_demo() -> None:
    demo = called(lambda: [parts.demo_part(product, "good", 1) for product in parts.DEMO_PRODUCTS])
    assert demo & DEMO_CODE == {parts.demo_part.__code__}
    drawn = called(lambda: parts.render_part(parts.demo_part("flange", "scratch", 1), 1))
    assert len(drawn & DEMO_CODE) == 3, "the check sees the product, the defect and the maker"
    assert not called(lambda: [draw_product(seed) for seed in range(20)]) & DEMO_CODE


def test_the_world_has_no_name_of_the_demo() -> None:
    words = {*parts.DEMO_PRODUCTS, *(name for names in parts.DEMO_DEFECTS.values() for name in names)}
    words |= {word for name in words for word in name.split()}
    assert not words & {word for name in (*world.WORLD_KINDS, *world.WORLD_DEFECTS) for word in name.split()}
    assert world.WORLD_KINDS[: len(parts.PRETRAINING_KINDS)] == parts.PRETRAINING_KINDS
    assert tuple(world.WORLD_DEFECTS)[: len(parts.PRETRAINING_DEFECTS)] == tuple(parts.PRETRAINING_DEFECTS)


@pytest.mark.parametrize("name", world.WORLD_DEFECTS)
def test_the_mask_holds_the_pixels_that_the_defect_changes(name: str) -> None:
    visible = 0
    for seed in range(6):
        product, defect = product_with(name, seed)
        bad, good = (world.render_product(product, 5, 9, d) for d in (defect, None))
        limit = 255 * (0.06 + product.station.read_noise + product.station.shot_noise / 2)
        change = np.abs(bad.image.astype(int) - good.image).max(axis=-1)
        assert not good.mask.any()
        assert change[~bad.mask].max() < 1.3 * limit + 2
        if bad.mask.any():
            assert np.percentile(change[bad.mask], 5) > 0.7 * limit - 2
            visible += bad.mask.sum() >= world.MIN_VISIBLE_PIXELS
    assert visible >= 3


@pytest.mark.parametrize("name", STRUCTURAL_DEFECTS)
def test_a_structural_defect_lies_at_its_component(name: str) -> None:
    for seed in range(12):
        product, defect = product_with(name, seed)
        rng, surface = np.random.default_rng((9, 12)), fills_image(product.style)
        u, v, _ = station_coordinates(product.station, parts.IMAGE_SIZE, rng, surface)
        product = replace(product, style=replace(product.style, marks=()))
        mask = world.render_product(product, 5, 9, defect).mask
        if mask.sum() >= world.MIN_VISIBLE_PIXELS:
            reach = {"absence": 1, "extra": 1, "displacement": 4, "bridge": 1, "break": 3}[name]
            away = np.hypot(u[mask].mean() - defect.u, v[mask].mean() - defect.v)
            assert away < reach * max(defect.size, 0.03), (name, seed)


def test_patterns_are_dense_and_their_components_stand_apart() -> None:
    rng = np.random.default_rng(0)
    patterns = [p for _ in range(300) for p in plan_assembly(tuple(rng.random(4).tolist())).patterns]
    assert max(p.count for p in patterns) in range(60, 65)
    assert min(p.pitch[0] for p in patterns if p.layout == "grid") * 84 < 8.5, "pixels at 168 x 168"
    for pattern in patterns:
        rows, columns = pattern.counts
        if pattern.layout == "circle":
            assert 2 * pattern.size < 2 * np.pi * pattern.pitch[0] / columns
        elif pattern.layout == "grid":
            assert columns == 1 or 2 * pattern.size < pattern.pitch[0]
            assert rows == 1 or 2 * pattern.size * (pattern.ratio if pattern.square else 1) < pattern.pitch[1]


def test_products_are_as_mixed_as_promised() -> None:
    rng = np.random.default_rng(1)
    products = [world.random_product(rng) for _ in range(2000)]
    kinds = Counter(product.style.kind for product in products)
    modes = Counter(product.station.mode for product in products)
    assert set(kinds) == set(world.WORLD_KINDS)
    assert abs(kinds[ASSEMBLY] / 2000 - 0.5) < 0.04
    assert modes["binary"] > 150
    assert modes["grey"] > 350
    assert modes["colour"] > 1100
    for assembly, share in ((True, 0.15 * 0.8), (False, 0.35)):
        marked = [bool(p.style.marks) for p in products if (p.style.kind == ASSEMBLY) == assembly]
        assert abs(np.mean(marked) - share) < 0.05


def test_every_defect_occurs_with_a_tone_of_its_own() -> None:
    rng = np.random.default_rng(2)
    seen = Counter()
    for _ in range(600):
        style = world.random_product(rng).style
        defect = world.random_world_defect(rng, style)
        seen[defect.name] += 1
        assert defect.tone in world.WORLD_DEFECTS[defect.name]
        assert defect.name not in STRUCTURAL_DEFECTS or style.kind == ASSEMBLY
    assert set(seen) == set(world.WORLD_DEFECTS)
    assert min(seen.values()) >= 5


def test_black_and_white_images_show_no_grain() -> None:
    rng = np.random.default_rng(3)
    products = [world.random_product(rng) for _ in range(200)]
    binary = [p for p in products if p.station.mode == "binary"][:12]
    for product in binary:
        product = replace(product, station=replace(product.station, quality=0, play=0.0))
        first, second = (world.render_product(product, part, 4).image for part in (1, 2))
        assert set(np.unique(first)) <= {0, 255}
        differs = np.lib.stride_tricks.sliding_window_view((first != second)[..., 0], (3, 3))
        assert not differs.all((2, 3)).any(), "two normal parts differ by ragged edges only"
