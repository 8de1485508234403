"""Boxes around defects: targets from masks, polygons or boxes, their text in Qwen2-VL's format, and their overlap.

A box (x0, y0, x1, y1) ends before the column x1 and the row y1. Boxes in an image are in pixels, and boxes in text are
in thousandths of the image's width and height. Training targets, scores and rewards share these functions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.ndimage import find_objects, label
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components

from echo_ft.images.mask_reading import Mask
from echo_ft.images.masks import Marked, covered_pixels, fill_boxes, fill_polygons, load_mask, mask_files
from echo_ft.records import BOX_END, BOX_START

Box = tuple[int, int, int, int]

NO_BOXES = "none"
"""The answer for an image without a defect."""

NEAR = 0.02
"""Boxes are joined if they overlap, or if their gap is at most this fraction of the image's longer side."""

MAX_BOXES = 5
"""Largest number of boxes in a target. A box has at most 23 tokens, so all fit into MAX_NEW_TOKENS."""

MANY_BOXES = 256
"""More boxes than this are joined on a mask, because `join_boxes` compares each of them with all others."""

_PAIR = r"\(([0-9]{1,4}), ?([0-9]{1,4})\), ?\(([0-9]{1,4}), ?([0-9]{1,4})\)"
_MARKED_PAIR = re.escape(BOX_START) + _PAIR + re.escape(BOX_END)
_ANSWER = re.compile("|".join(rf"{one}(?:,?\s*{one})*" for one in (_PAIR, _MARKED_PAIR)))


def target_boxes(marked: Marked, root: Path, size: tuple[int, int], orientation: int = 1) -> tuple[Box, ...]:
    """Return the boxes of the defects that a record marks, in pixels; empty if nothing is marked.

    `size` is (width, height) of the upright image in pixels, and `orientation` its EXIF orientation. For mask files,
    the result is the `mask_boxes` of their union. Otherwise, the boxes of all polygons and the record's own boxes are
    joined as `join_boxes` does. Raises EchoError as `masks.load_mask` does.
    """
    if mask_files(marked):
        mask = load_mask(marked, root, size, orientation)
        return () if mask is None else mask_boxes(mask)
    drawn = (fill_polygons([polygon], size) for polygon in marked.polygons)  # one mask in memory at a time
    boxes = [_bounding_box(mask) for mask in drawn if mask.any()]
    boxes += [covered_pixels(box, size) for box in marked.boxes]
    return mask_boxes(fill_boxes(boxes, size)) if len(boxes) > MANY_BOXES else join_boxes(boxes, size)


def mask_boxes(mask: Mask) -> tuple[Box, ...]:
    """Return the boxes, in pixels, around the connected components of a mask (height, width), after `join_boxes`.

    Pixels that share an edge or a corner are connected.
    """
    height, width = mask.shape
    # `join_boxes` would join pixels in adjacent cells of this size anyway. With cells instead of pixels, a mask full of
    # specks has a few thousand pieces at most.
    cell = _largest_gap((width, height)) // 2 + 1
    padded = np.pad(mask, ((0, -height % cell), (0, -width % cell)))
    rows, columns = padded.shape[0] // cell, padded.shape[1] // cell
    labels, _ = label(padded.reshape(rows, cell, columns, cell).any(axis=(1, 3)), structure=np.ones((3, 3)))
    boxes = []
    for number, place in enumerate(find_objects(labels), start=1):
        down, across = (slice(part.start * cell, part.stop * cell) for part in place)
        own = np.kron(labels[place] == number, np.ones((cell, cell), dtype=np.bool_))
        boxes.append(_bounding_box(padded[down, across] & own, across.start, down.start))
    return join_boxes(boxes, (width, height))


def _bounding_box(mask: Mask, left: int = 0, top: int = 0) -> Box:
    """Return the box of all pixels of a mask that starts at column `left` and row `top` of its image."""
    columns, rows = (np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1))
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1


def _largest_gap(size: tuple[int, int]) -> int:
    """Return the largest gap in pixels between boxes that are joined, for an image of (width, height)."""
    return int(NEAR * max(size))


def join_boxes(boxes: Sequence[Box], size: tuple[int, int]) -> tuple[Box, ...]:
    """Join neighbouring boxes and return at most MAX_BOXES, sorted from top to bottom, then from left to right.

    Boxes that overlap or are close together (NEAR) are replaced by their common bounding box until no such boxes
    remain. If more than MAX_BOXES are left, this is repeated with twice the gap. The gap between two boxes is the
    larger of their horizontal and vertical gaps. The result does not depend on the order of `boxes`. `size` is (width,
    height) in pixels.
    """
    gap = _largest_gap(size)
    joined = _join_near(np.array(boxes, dtype=np.int64).reshape(-1, 4), gap)
    while len(joined) > MAX_BOXES:
        gap = 2 * gap + 1
        joined = _join_near(joined, gap)
    ordered = sorted(joined.tolist(), key=lambda box: (box[1], box[0]))
    return tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in ordered)


def _join_near(boxes: np.ndarray, largest: int) -> np.ndarray:
    """Join boxes (N, 4) with a gap of at most `largest` pixels until there are none."""
    while len(boxes):
        count, group = connected_components(_gaps(boxes) <= largest)
        if count == len(boxes):
            break
        boxes = np.array([_common_box(boxes[group == number]) for number in range(count)])
    return boxes


def _gaps(boxes: np.ndarray) -> np.ndarray:
    """Return the gaps (N, N) between boxes (N, 4) in pixels, negative if they overlap."""
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    return (low - high).max(axis=2)


def _common_box(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2:] - boxes[..., :2]).clip(min=0).prod(axis=-1)


def to_thousandths(box: Box, size: tuple[int, int]) -> Box:
    """Convert a box in an image of (width, height) from pixels to thousandths. Rounding outwards keeps it non-empty."""
    (width, height), (x0, y0, x1, y1) = size, box
    return x0 * 1000 // width, y0 * 1000 // height, -(-x1 * 1000 // width), -(-y1 * 1000 // height)


def to_pixels(box: Box, size: tuple[int, int]) -> Box:
    """Convert a box from thousandths to pixels of an image of (width, height), rounded outwards, so it is not empty."""
    (width, height), (x0, y0, x1, y1) = size, box
    return x0 * width // 1000, y0 * height // 1000, -(-x1 * width // 1000), -(-y1 * height // 1000)


def format_boxes(boxes: Sequence[Box]) -> str:
    """Write boxes in thousandths as Qwen2-VL does: `<|box_start|>(x0,y0),(x1,y1)<|box_end|>` each, or `none`."""
    return "".join(f"{BOX_START}({x0},{y0}),({x1},{y1}){BOX_END}" for x0, y0, x1, y1 in boxes) or NO_BOXES


def parse_boxes(text: str) -> tuple[Box, ...] | None:
    """Return the boxes in thousandths that an answer names, or None if it cannot be parsed. Boxes are never guessed.

    An answer is either `none`, in upper or lower case and with or without a full stop, or a list of boxes and nothing
    else. Either all boxes have Qwen2-VL's tokens or none do, because decoding drops special tokens. A comma or
    whitespace may separate boxes. Coordinates are whole numbers from 0 to 1000, and each box has a positive width and
    height.
    """
    text = text.strip()
    if text.casefold() in (NO_BOXES, f"{NO_BOXES}."):
        return ()
    if not _ANSWER.fullmatch(text):
        return None
    corners = (map(int, numbers) for numbers in re.findall(_PAIR, text))
    boxes = tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in corners)
    return boxes if all(x0 < x1 <= 1000 and y0 < y1 <= 1000 for x0, y0, x1, y1 in boxes) else None


def box_ious(first: Sequence[Box], second: Sequence[Box]) -> np.ndarray:
    """Return the intersection over union, from 0 to 1, of each pair of boxes: (boxes of first, boxes of second)."""
    one, other = (np.array(boxes, dtype=np.float64).reshape(-1, 4) for boxes in (first, second))
    low, high = np.maximum(one[:, None, :2], other[None, :, :2]), np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = (high - low).clip(min=0).prod(axis=2)
    return shared / (_areas(one)[:, None] + _areas(other)[None] - shared)


def matched_ious(predicted: Sequence[Box], true: Sequence[Box]) -> list[float]:
    """Return the IoU of each true box with its matched predicted box, or 0 if no predicted box matches.

    Each predicted box matches at most one true box. The matching maximises the sum of IoUs (Kuhn, "The Hungarian method
    for the assignment problem", 1955). None of the boxes may be empty.
    """
    ious = box_ious(predicted, true)
    rows, columns = linear_sum_assignment(ious, maximize=True)
    found = np.zeros(len(true))
    found[columns] = ious[rows, columns]
    return found.tolist()
