"""What the drawn photographs promise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.sources import SourceConfig, synthetic
from echo_ft.drawn import parts as drawing
from echo_ft.drawn.shapes import PART_SHAPES
from echo_ft.errors import EchoError
from echo_ft.records import GOOD, Inspection


def pretraining_photo(seed: int, name: str | None = None, kind: str | None = None) -> drawing.Photo:
    rng = np.random.default_rng(seed)
    style = drawing.random_style(rng, kind)
    return drawing.photograph(drawing.Part(style, seed, drawing.random_defect(rng, style, name)), seed)


def test_the_two_worlds_share_no_product_and_no_defect() -> None:
    demo_defects = {defect for defects in drawing.DEMO_DEFECTS.values() for defect in defects}
    assert not set(drawing.PRETRAINING_KINDS) & {style.kind for style in drawing.DEMO_PRODUCTS.values()}
    assert not set(drawing.PRETRAINING_KINDS) & set(drawing.DEMO_PRODUCTS)
    assert not set(drawing.PRETRAINING_DEFECTS) & demo_defects
    shapes = [PART_SHAPES[kind] for kind in drawing.PRETRAINING_KINDS]
    assert not any(PART_SHAPES[style.kind] in shapes for style in drawing.DEMO_PRODUCTS.values())
    forms = [drawing.FORMS[name] for name in drawing.PRETRAINING_DEFECTS]
    assert not any(drawing.FORMS[name] in forms for name in demo_defects if not name.startswith("missing"))


def test_random_styles_and_defects_stay_in_the_pretraining_world() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        style = drawing.random_style(rng, marks=True)
        names = {drawing.random_defect(rng, style).name, *(mark.name for mark in style.marks)}
        assert style.kind in drawing.PRETRAINING_KINDS
        assert names <= set(drawing.PRETRAINING_DEFECTS)


@pytest.mark.parametrize("size", [(168, 168), (112, 252), (224, 224)])
def test_a_photograph_keeps_its_size_under_qwen2_vl_resizing(size: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    rng = np.random.default_rng(1)
    photo = drawing.photograph(drawing.Part(drawing.random_style(rng, "brushed sheet"), 1), 1, size)
    assert photo.image.shape == (*size, 3) and photo.image.dtype == np.uint8
    assert photo.mask.shape == size and photo.mask.dtype == bool
    assert smart_resize(*size) == size


def test_the_same_seeds_give_the_same_photograph() -> None:
    first, second = pretraining_photo(3), pretraining_photo(3)
    assert np.array_equal(first.image, second.image) and np.array_equal(first.mask, second.mask)


@pytest.mark.parametrize("name", drawing.PRETRAINING_DEFECTS)
def test_a_defect_changes_the_photograph_inside_its_mask_only(name: str) -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        style = drawing.random_style(rng, "plate")
        part = drawing.Part(style, seed, drawing.random_defect(rng, style, name))
        bad, good = drawing.photograph(part, 9), drawing.photograph(dataclasses.replace(part, defect=None), 9)
        change = np.abs(bad.image.astype(int) - good.image).max(axis=-1)
        assert not good.mask.any()
        if bad.mask.sum() < 12:  # behind the outline
            continue
        assert change[bad.mask].mean() > 4
        assert change[~bad.mask].mean() < 0.5


@pytest.mark.parametrize("product", drawing.DEMO_PRODUCTS)
def test_every_demo_defect_is_visible_in_its_mask_and_both_exposures_show_the_same_part(product: str) -> None:
    for condition in drawing.DEMO_DEFECTS[product]:
        part = drawing.demo_part(product, condition, seed=4)
        first, second = drawing.photograph(part, 1), drawing.photograph(part, 2)
        assert first.mask.any() and second.mask.any()
        assert not np.array_equal(first.image, second.image)
        centres = [np.argwhere(photo.mask).mean(axis=0) for photo in (first, second)]
        assert np.abs(centres[0] - centres[1]).max() < 20
    assert not drawing.photograph(drawing.demo_part(product, GOOD, seed=4), 1).mask.any()


def test_place_and_extent_name_where_and_how_large() -> None:
    mask = np.zeros((90, 90), bool)
    mask[5:10, 5:10] = True
    assert (drawing.place(mask), drawing.extent(mask)) == ("top left", "small")
    mask[:] = True
    assert (drawing.place(mask), drawing.extent(mask)) == ("center", "large")
    mask[:, :60] = False
    assert drawing.place(mask) == "right"


def read(root: Path, parts: int = 8, seed: int = 0) -> list[Inspection]:
    items = list(synthetic.read(SourceConfig(root=root, parts=parts, seed=seed)))
    assert all(isinstance(item, Inspection) for item in items)
    return items  # type: ignore[return-value]


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_source_is_deterministic_and_balanced(tmp_path: Path) -> None:
    inspections = read(tmp_path / "a")
    assert inspections == read(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    groups = {inspection.group: inspection.condition for inspection in inspections}
    assert len(groups) == 8 * len(drawing.DEMO_PRODUCTS)
    assert sum(condition == GOOD for condition in groups.values()) == len(groups) // 2
    for product, defects in drawing.DEMO_DEFECTS.items():
        assert {i.condition for i in inspections if i.product == product} == {GOOD, *defects}
    assert len(inspections) > len(groups), "some parts are photographed twice"
    for inspection in inspections:
        assert (tmp_path / "a" / inspection.image).is_file()
        assert (inspection.mask is None) == (inspection.condition == GOOD)
        if inspection.mask:
            assert np.asarray(Image.open(tmp_path / "a" / inspection.mask)).any()


def test_more_parts_leave_the_first_ones_as_they_were(tmp_path: Path) -> None:
    few, many = read(tmp_path / "few", 8), read(tmp_path / "many", 10)
    assert set(few) < set(many)
    assert all((tmp_path / "few" / i.image).read_bytes() == (tmp_path / "many" / i.image).read_bytes() for i in few)


def test_another_seed_draws_other_parts(tmp_path: Path) -> None:
    read(tmp_path / "a"), read(tmp_path / "b", seed=1)
    before, after = contents(tmp_path / "a"), contents(tmp_path / "b")
    photographs = [name for name in after if name.startswith("images/")]
    assert photographs and all(after[name] != before.get(name) for name in photographs)


def test_too_few_parts_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(EchoError, match="at least 8 parts"):
        read(tmp_path, 3)
