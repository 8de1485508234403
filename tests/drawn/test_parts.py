"""Drawn images are deterministic, and a defect changes only the pixels inside its mask."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.sources import SourceConfig, synthetic
from echo_ft.drawn import parts
from echo_ft.drawn.shapes import FORMS, PART_SHAPES
from echo_ft.errors import EchoError
from echo_ft.records import GOOD, Inspection


def render_random(seed: int, name: str | None = None, kind: str | None = None) -> parts.RenderedPart:
    rng = np.random.default_rng(seed)
    style = parts.random_style(rng, kind)
    return parts.render_part(parts.Part(style, seed, parts.random_defect(rng, style, name)), seed)


def test_pretraining_and_demo_share_no_product_and_no_defect() -> None:
    demo_defects = {defect for defects in parts.DEMO_DEFECTS.values() for defect in defects}
    assert not set(parts.PRETRAINING_KINDS) & {style.kind for style in parts.DEMO_PRODUCTS.values()}
    assert not set(parts.PRETRAINING_KINDS) & set(parts.DEMO_PRODUCTS)
    assert not set(parts.PRETRAINING_DEFECTS) & demo_defects
    shapes = [PART_SHAPES[kind] for kind in parts.PRETRAINING_KINDS]
    assert not any(PART_SHAPES[style.kind] in shapes for style in parts.DEMO_PRODUCTS.values())
    forms = [FORMS[name] for name in parts.PRETRAINING_DEFECTS]
    assert not any(FORMS[name] in forms for name in demo_defects if not name.startswith("missing"))


def test_random_styles_and_defects_stay_in_the_pretraining_set() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        style = parts.random_style(rng, marks=True)
        names = {parts.random_defect(rng, style).name, *(mark.name for mark in style.marks)}
        assert style.kind in parts.PRETRAINING_KINDS
        assert names <= set(parts.PRETRAINING_DEFECTS)


@pytest.mark.parametrize("size", [(168, 168), (112, 252), (224, 224)])
def test_image_keeps_its_size_under_qwen2_vl_resizing(size: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    rng = np.random.default_rng(1)
    rendered = parts.render_part(parts.Part(parts.random_style(rng, "brushed sheet"), 1), 1, size)
    assert (rendered.image.shape, rendered.image.dtype) == ((*size, 3), np.uint8)
    assert (rendered.mask.shape, rendered.mask.dtype) == (size, bool)
    assert smart_resize(*size) == size


def test_same_seeds_give_the_same_image() -> None:
    first, second = render_random(3), render_random(3)
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.mask, second.mask)


@pytest.mark.parametrize("name", parts.PRETRAINING_DEFECTS)
def test_defect_changes_the_image_only_inside_its_mask(name: str) -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        style = parts.random_style(rng, "plate")
        part = parts.Part(style, seed, parts.random_defect(rng, style, name))
        bad, good = parts.render_part(part, 9), parts.render_part(dataclasses.replace(part, defect=None), 9)
        change = np.abs(bad.image.astype(int) - good.image).max(axis=-1)
        assert not good.mask.any()
        if bad.mask.sum() < 12:  # mostly outside the part
            continue
        assert change[bad.mask].mean() > 4
        assert change[~bad.mask].mean() < 0.5


@pytest.mark.parametrize("product", parts.DEMO_PRODUCTS)
def test_both_exposures_of_a_demo_part_show_the_same_defect(product: str) -> None:
    for condition in parts.DEMO_DEFECTS[product]:
        part = parts.demo_part(product, condition, seed=4)
        first, second = parts.render_part(part, 1), parts.render_part(part, 2)
        assert first.mask.any()
        assert second.mask.any()
        assert not np.array_equal(first.image, second.image)
        centres = [np.argwhere(rendered.mask).mean(axis=0) for rendered in (first, second)]
        assert np.abs(centres[0] - centres[1]).max() < 20
    assert not parts.render_part(parts.demo_part(product, GOOD, seed=4), 1).mask.any()


def test_masks_have_a_grid_cell_and_a_size_word() -> None:
    mask = np.zeros((90, 90), bool)
    mask[5:10, 5:10] = True
    assert (parts.grid_cell(mask), parts.size_word(mask)) == ("top left", "small")
    mask[:] = True
    assert (parts.grid_cell(mask), parts.size_word(mask)) == ("center", "large")
    mask[:, :60] = False
    assert parts.grid_cell(mask) == "right"


def read(root: Path, count: int = 8, seed: int = 0) -> list[Inspection]:
    items = list(synthetic.read(SourceConfig(root=root, parts=count, seed=seed)))
    assert all(isinstance(item, Inspection) for item in items)
    return items  # type: ignore[return-value]


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_synthetic_source_is_deterministic_and_balanced(tmp_path: Path) -> None:
    inspections = read(tmp_path / "a")
    assert inspections == read(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    groups = {inspection.group: inspection.condition for inspection in inspections}
    assert len(groups) == 8 * len(parts.DEMO_PRODUCTS)
    assert sum(condition == GOOD for condition in groups.values()) == len(groups) // 2
    for product, defects in parts.DEMO_DEFECTS.items():
        assert {i.condition for i in inspections if i.product == product} == {GOOD, *defects}
    assert len(inspections) > len(groups), "some parts have two exposures"
    for inspection in inspections:
        assert (tmp_path / "a" / inspection.image).is_file()
        assert (inspection.mask is None) == (inspection.condition == GOOD)
        if inspection.mask:
            assert np.asarray(Image.open(tmp_path / "a" / inspection.mask)).any()


def test_more_parts_do_not_change_the_first_ones(tmp_path: Path) -> None:
    few, many = read(tmp_path / "few", 8), read(tmp_path / "many", 10)
    assert set(few) < set(many)
    assert all((tmp_path / "few" / i.image).read_bytes() == (tmp_path / "many" / i.image).read_bytes() for i in few)


def test_another_seed_draws_other_parts(tmp_path: Path) -> None:
    read(tmp_path / "a"), read(tmp_path / "b", seed=1)
    before, after = contents(tmp_path / "a"), contents(tmp_path / "b")
    images = [name for name in after if name.startswith("images/")]
    assert images
    assert all(after[name] != before.get(name) for name in images)


def test_too_few_parts_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(EchoError, match="at least 8 parts"):
        read(tmp_path, 3)
