"""Boxes of defects follow from masks by a fixed rule, survive conversion to text and back, and are never guessed."""

from __future__ import annotations

import random
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from scipy.ndimage import label

from echo_ft.errors import EchoError
from echo_ft.images.boxes import (
    MANY_BOXES,
    MAX_BOXES,
    Box,
    box_ious,
    format_boxes,
    join_boxes,
    mask_boxes,
    matched_ious,
    parse_boxes,
    target_boxes,
    to_thousandths,
)
from echo_ft.images.outlines import Outlines, outlines_of
from echo_ft.records import BOX_END, BOX_START, Inspection

MASKS = arrays.arrays(
    np.bool_, st.tuples(st.integers(1, 140), st.integers(1, 140)), elements=st.booleans(), fill=st.just(False)
)
BOXES = st.tuples(st.integers(0, 39), st.integers(0, 39), st.integers(1, 20), st.integers(1, 20)).map(
    lambda one: (one[0], one[1], one[0] + one[2], one[1] + one[3])
)


def marked(**marks: object) -> Inspection:
    return Inspection("i", "i.png", "d", "p", "crack", "g", **marks)  # type: ignore[arg-type]


def drawn(size: tuple[int, int], *boxes: Box) -> np.ndarray:
    mask = np.zeros(size[::-1], dtype=np.bool_)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def test_separate_pieces_have_boxes_of_their_own_from_top_to_bottom() -> None:
    pieces = (100, 10, 130, 40), (20, 90, 30, 99), (60, 90, 70, 100)
    assert mask_boxes(drawn((200, 100), *pieces)) == pieces
    assert mask_boxes(drawn((200, 100))) == ()
    assert mask_boxes(np.eye(30, dtype=np.bool_)) == ((0, 0, 30, 30),), "corners connect pixels"


def test_near_pieces_are_joined() -> None:
    """In an image of 200 x 100 pixels, a gap of 4 pixels (2% of 200) is near, and one of 5 pixels is not."""
    left = (10, 10, 20, 20)
    assert mask_boxes(drawn((200, 100), left, (24, 10, 30, 20))) == ((10, 10, 30, 20),)
    assert mask_boxes(drawn((200, 100), left, (25, 10, 30, 20))) == (left, (25, 10, 30, 20))
    assert mask_boxes(drawn((200, 100), left, (24, 24, 30, 30))) == ((10, 10, 30, 30),)
    assert mask_boxes(drawn((200, 100), left, (24, 25, 30, 30))) == (left, (24, 25, 30, 30))
    ring, inside = drawn((200, 100), (50, 10, 150, 90)) & ~drawn((200, 100), (60, 20, 140, 80)), (90, 40, 110, 60)
    assert mask_boxes(ring | drawn((200, 100), inside)) == ((50, 10, 150, 90),), "a box inside another box"
    stairs = (10, 10, 20, 20), (23, 10, 26, 50), (29, 53, 40, 60)  # the first two reach the third only together
    assert mask_boxes(drawn((200, 100), *stairs)) == ((10, 10, 40, 60),)


def test_more_than_five_boxes_are_joined_with_growing_gaps() -> None:
    six = tuple((x, 10, x + 5, 15) for x in (0, 30, 60, 90, 120, 135))
    assert join_boxes(six, (200, 100)) == (*six[:4], (120, 10, 140, 15))
    assert join_boxes(six[:5], (200, 100)) == six[:5]
    many = [(x, y, x + 1, y + 1) for x in range(0, 200, 20) for y in range(0, 100, 20)]
    assert join_boxes(many, (200, 100)) == ((0, 0, 181, 81),)


@settings(deadline=None, max_examples=150)
@given(MASKS)
def test_any_mask_gives_few_separate_boxes_that_cover_it_and_survive_their_text(mask: np.ndarray) -> None:
    height, width = mask.shape
    boxes = mask_boxes(mask)
    assert len(boxes) <= MAX_BOXES
    assert (drawn((width, height), *boxes) >= mask).all()
    assert join_boxes(boxes[::-1], (width, height)) == boxes
    labels, count = label(mask, structure=np.ones((3, 3)))
    pieces = [np.argwhere(labels == number) for number in range(1, count + 1)]
    whole = [(*one.min(axis=0)[::-1], *(one.max(axis=0)[::-1] + 1)) for one in pieces]
    assert join_boxes(whole, (width, height)) == boxes, "cells give the boxes of the components"
    parsed = parse_boxes(format_boxes([to_thousandths(box, (width, height)) for box in boxes]))
    assert parsed is not None
    assert len(parsed) == len(boxes)
    for box, (x0, y0, x1, y1) in zip(boxes, parsed, strict=True):
        edges = (
            box[0] / width - x0 / 1000,
            box[1] / height - y0 / 1000,
            x1 / 1000 - box[2] / width,
            y1 / 1000 - box[3] / height,
        )
        assert all(-1e-12 < edge < 0.001 for edge in edges), "rounded outwards by less than a thousandth"
        assert x0 < x1
        assert y0 < y1


@settings(deadline=None)
@given(BOXES, BOXES)
def test_iou_equals_a_pixel_count(first: Box, second: Box) -> None:
    one, other = drawn((60, 60), first), drawn((60, 60), second)
    assert box_ious([first], [second])[0, 0] == pytest.approx((one & other).sum() / (one | other).sum(), abs=1e-12)


def test_a_predicted_box_matches_one_true_box() -> None:
    true = (0, 0, 10, 10), (100, 0, 110, 10)
    assert matched_ious([(0, 0, 10, 20), (100, 0, 110, 10)], true) == [0.5, 1.0]
    assert matched_ious([(100, 0, 110, 10), (0, 0, 10, 20)], true) == [0.5, 1.0]
    assert matched_ious([(0, 0, 10, 10)] * 3, true) == [1.0, 0.0], "repeats find nothing more"
    assert matched_ious([], true) == [0.0, 0.0]
    assert matched_ious([(0, 0, 5, 5)], []) == []
    # Taking the best pair first (0.625) would leave the second true box without a match.
    assert matched_ious([(0, 0, 10, 8), (0, 0, 10, 3)], [(0, 0, 10, 5), (0, 5, 10, 8)]) == [0.6, 0.375]


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("none", ()), (" None.\n", ()),
        (f"{BOX_START}(1,2),(30,400){BOX_END}", ((1, 2, 30, 400),)),
        (f"{BOX_START}(1,2),(3,4){BOX_END}{BOX_START}(0,0),(1000,1000){BOX_END}", ((1, 2, 3, 4), (0, 0, 1000, 1000))),
        ("(1,2),(3,4)(5,6),(7,8)", ((1, 2, 3, 4), (5, 6, 7, 8))),
        ("(1, 2), (3, 4),\n(5, 6), (7, 8)", ((1, 2, 3, 4), (5, 6, 7, 8))),
        ("", None), ("none, (1,2),(3,4)", None), ("no", None), ("nonee", None), ("none..", None), ("A", None),
        ("(1,2)", None), ("(1,2),(3,4", None), ("(1,2),(3,4),", None), ("(1,2),(3,4),(5,6)", None),
        ("(3,2),(1,4)", None), ("(1,2),(1,4)", None), ("(1,2),(3,2)", None), ("(1,2),(3,1001)", None),
        ("(-1,2),(3,4)", None), ("(1.5,2),(3,4)", None), ("(+1,2),(3,4)", None), ("[1,2,3,4]", None), ("1,2,3,4", None),
        ("(١,2),(3,4)", None), ("(00001,2),(3,4)", None), ("The defect is at (1,2),(3,4)", None),
        ("(1,2),(3,4) or (5,6),(7,8)", None), ("scratch(1,2),(3,4)", None), ("(1,2),(3,4).", None),
        (f"{BOX_START}(1,2),(3,4){BOX_END}(5,6),(7,8)", None), (f"{BOX_START}(1,2),(3,4)", None),
        (f"{BOX_START}(1,2){BOX_END}{BOX_START}(3,4){BOX_END}", None), (f"{BOX_START}{BOX_END}", None),
    ],
)  # fmt: skip
def test_boxes_are_parsed_strictly(text: str, boxes: tuple[Box, ...] | None) -> None:
    assert parse_boxes(text) == boxes
    if boxes is not None:
        assert parse_boxes(format_boxes(boxes)) == boxes


@pytest.mark.slow
def test_a_hundred_thousand_broken_answers_are_refused_and_never_guessed() -> None:
    """Try near-valid answers. An accepted one states the parsed boxes, digit by digit, and nothing else."""
    draw = random.Random(0)
    parts = [
        BOX_START,
        BOX_END,
        "(",
        ")",
        ",",
        " ",
        "\n",
        "none",
        "None.",
        "1000",
        "1001",
        "-",
        ".",
        "A",
        "(1,2),(3,4)",
        "｡",
        "\0",
    ]
    accepted = 0
    for _ in range(100_000):
        boxes = [
            (x, y, x + draw.randint(1, 500), y + draw.randint(1, 500))
            for x, y in ((draw.randint(0, 500), draw.randint(0, 500)) for _ in range(draw.randint(0, 4)))
        ]
        text = format_boxes(boxes)
        if draw.random() < 0.5:
            text = text.replace(BOX_START, "").replace(BOX_END, "")
        for _ in range(draw.randint(0, 3)):
            place, length = draw.randint(0, len(text)), draw.choice((0, 0, 1, 2, 5))
            text = text[:place] + draw.choice([*parts, str(draw.randint(0, 9999))]) + text[place + length :]
        parsed = parse_boxes(text)
        if parsed is None:
            continue
        accepted += 1
        told = re.sub(r"\s", "", text).replace(BOX_START, "").replace(BOX_END, "").replace("),(", ")(")
        told = re.sub(r"(?<=[(,])0+(?=[0-9])", "", told)
        said = "".join(f"({x0},{y0})({x1},{y1})" for x0, y0, x1, y1 in parsed)
        assert told == said if parsed else told.casefold() in ("none", "none.")
        assert text.count(BOX_START) == text.count(BOX_END)
        assert text.count(BOX_START) in (0, len(parsed))
    assert 10_000 < accepted < 90_000


def test_many_boxes_need_the_memory_of_few(tmp_path: Path) -> None:
    """labelme stores the rows of an irregular mask as boxes."""
    boxes = tuple((10.0 + row % 7, float(row), 900.0, row + 1.0) for row in range(500))
    polygons = ((20.0, 600.0, 39.0, 600.0, 39.0, 610.0),) * 50
    tracemalloc.start()
    try:
        found = target_boxes(marked(boxes=boxes, polygons=polygons), tmp_path, (1000, 1000))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == ((10, 0, 900, 500), (20, 600, 40, 611))
    assert peak < 20e6


@pytest.mark.parametrize("size", [(90, 70), (1000, 400)])
def test_any_number_of_boxes_is_joined_in_the_same_way(tmp_path: Path, size: tuple[int, int]) -> None:
    draw = random.Random(0)
    for count in (MANY_BOXES, MANY_BOXES + 1, 600):
        for most in (1, size[0] // 30):
            corners = [(draw.randrange(size[0] // 3), draw.randrange(size[1])) for _ in range(count)]
            boxes = [(x, y, x + draw.randint(1, most), y + draw.randint(1, most)) for x, y in corners]
            whole = [(x0, y0, min(x1, size[0]), min(y1, size[1])) for x0, y0, x1, y1 in boxes]
            found = target_boxes(marked(boxes=tuple(boxes)), tmp_path, size)
            assert found == join_boxes(whole, size)


def test_the_rows_of_a_large_mask_take_little_memory_and_are_shown_as_pieces(tmp_path: Path) -> None:
    """labelme stores a speckled mask as tens of thousands of boxes. They took 56 GB."""
    specks = tuple((float(x), float(y), x + 1.0, y + 1.0) for x in range(0, 400, 2) for y in range(0, 400, 2))
    record = marked(boxes=(*specks, (900.0, 900.0, 990.0, 990.0)), polygons=((700.0, 10.0, 799.0, 10.0, 799.0, 99.0),))
    Image.new("L", (1000, 1000)).save(tmp_path / "i.png")
    pieces = ((0, 0, 399, 399), (900, 900, 990, 990))
    tracemalloc.start()
    try:
        found, shown = target_boxes(record, tmp_path, (1000, 1000)), outlines_of(record, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == ((0, 0, 399, 399), (700, 10, 800, 100), (900, 900, 990, 990))
    assert shown == Outlines(pieces, record.polygons)
    assert peak < 50e6


def test_masks_polygons_and_boxes_give_targets(tmp_path: Path) -> None:
    size = (200, 100)
    pieces = (20, 10, 40, 30), (150, 60, 170, 90)
    for number, piece in enumerate(pieces):
        Image.fromarray(drawn(size, piece)).save(tmp_path / f"{number}.png")
    Image.fromarray(drawn(size)).save(tmp_path / "empty.png")
    assert target_boxes(marked(masks=("0.png", "1.png")), tmp_path, size) == pieces
    assert target_boxes(marked(mask="0.png", boxes=((1.0, 2.0, 3.0, 4.0),)), tmp_path, size) == pieces[:1]
    assert target_boxes(marked(mask="empty.png"), tmp_path, size) == target_boxes(marked(), tmp_path, size) == ()
    assert target_boxes(marked(boxes=((150.2, 60.0, 169.5, 90.4), (-1.0, 10.0, 40.0, 30.0))), tmp_path, size) == (
        (0, 10, 40, 30),
        (150, 60, 170, 91),
    )
    polygon = (20.0, 10.0, 39.0, 10.0, 39.0, 29.0, 20.0, 29.0)
    assert target_boxes(marked(polygons=(polygon,), boxes=(pieces[1],)), tmp_path, size) == pieces
    touching = marked(boxes=((20, 10, 40, 30), (100, 10, 140, 30), (138, 20, 150, 40)))
    assert target_boxes(touching, tmp_path, size) == (pieces[0], (100, 10, 150, 40))
    with pytest.raises(EchoError, match="outside the 200 x 100 image"):
        target_boxes(marked(boxes=((300.0, 1.0, 310.0, 9.0),)), tmp_path, size)
