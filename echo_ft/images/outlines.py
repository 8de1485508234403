"""The outlines of defects as people correct them in annotation tools: boxes and polygons, in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from echo_ft.images.boxes import MANY_BOXES, target_boxes
from echo_ft.images.decode import size_and_orientation
from echo_ft.images.masks import mask_files
from echo_ft.records import Inspection

TOLERANCE = 1.0
"""Largest difference in pixels between the coordinates of equal outlines. Annotation tools round coordinates."""


@dataclass(frozen=True)
class Outlines:
    """The marked defects of an image, in any order."""

    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """As (x0, y0, x1, y1)."""
    polygons: tuple[tuple[float, ...], ...] = ()
    """As (x0, y0, x1, y1, ...)."""


def outlines_of(inspection: Inspection, root: Path) -> Outlines:
    """Return the outlines of a record: its boxes and polygons, or the boxes around the pieces of its mask files.

    More than MANY_BOXES boxes are the rows of a mask, so they are replaced in the same way. The outlines are for the
    upright image. Raises EchoError as `masks.load_mask` does.
    """
    if mask_files(inspection) or len(inspection.boxes) > MANY_BOXES:
        drawn = replace(inspection, polygons=())
        polygons = () if mask_files(inspection) else inspection.polygons
        return Outlines(target_boxes(drawn, root, *size_and_orientation(root / inspection.image)), polygons)
    return Outlines(inspection.boxes, inspection.polygons)


def same_outlines(first: Outlines, second: Outlines) -> bool:
    """Return whether two images have the same outlines, in any order and up to TOLERANCE."""
    return _pair_up(first.boxes, second.boxes) and _pair_up(first.polygons, second.polygons)


def _pair_up(first: Sequence[tuple[float, ...]], second: Sequence[tuple[float, ...]]) -> bool:
    remaining = list(second)
    for one in first:
        partner = next((other for other in remaining if _near(one, other)), None)
        if partner is None:
            return False
        remaining.remove(partner)
    return not remaining


def _near(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return len(one) == len(other) and all(abs(a - b) <= TOLERANCE for a, b in zip(one, other, strict=True))
