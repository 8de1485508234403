"""Paints a part, its printed marks and its defect onto a canvas (see `echo_ft.drawn.parts`).

A canvas is float32 (3, height, width) with colours from 0 to 1, before light and noise. Colour planes come first
because numpy is slow if the last axis has only three entries. Other arrays are float32 (height, width).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from echo_ft.drawn.camera import smooth_noise, white_noise
from echo_ft.drawn.shapes import FORMS, SURFACES, Layer, pixel_coverage

_Array = NDArray[np.float32]
Rgb = tuple[float, float, float]

COLOURS: Mapping[str, Rgb] = {
    "grey": (0.55, 0.55, 0.56),
    "white": (0.88, 0.88, 0.86),
    "red": (0.75, 0.20, 0.18),
    "green": (0.22, 0.58, 0.28),
    "blue": (0.20, 0.34, 0.74),
    "yellow": (0.85, 0.74, 0.22),
    "brown": (0.48, 0.32, 0.20),
    "purple": (0.50, 0.26, 0.60),
}


@dataclass(frozen=True)
class Defect:
    """A defect, or a printed mark that belongs to a product, at (u, v) in part coordinates."""

    name: str
    u: float
    v: float
    size: float
    """Radius in part coordinates."""
    angle: float
    tone: str = ""
    """`dark`, `bright`, a key of COLOURS, or empty if the defect has no tone of its own."""
    seed: int = 0
    component: int = -1


@dataclass(frozen=True)
class Style:
    """The appearance that all parts of one product share."""

    kind: str
    colour: str
    rgb: Rgb
    background: Rgb
    proportions: tuple[float, ...] = (0.5, 0.5, 0.5, 0.5)
    """Proportions from 0 to 1. Their meaning depends on the kind."""
    marks: tuple[Defect, ...] = ()
    """Marks that belong to the product and are therefore not defects."""


def paint_part(
    style: Style,
    layers: Sequence[Layer],
    backdrop: _Array,
    u: _Array,
    v: _Array,
    pixel: float,
    rng: np.random.Generator,
    hidden: int = -1,
) -> tuple[_Array, _Array, _Array]:
    """Paint a part with its printed marks in front of a backdrop. `backdrop` multiplies the background's colour.

    `rng` draws the texture. The layers of the component with the index `hidden` are left out. Returns the canvas, the
    fraction of each pixel that the part covers, and the fraction that the hidden component would cover.
    """
    cover, shade, missing = np.zeros(u.shape, np.float32), np.ones(u.shape, np.float32), np.zeros(u.shape, np.float32)
    for layer in layers:
        alpha = pixel_coverage(layer.distance, pixel)
        if hidden >= 0 and layer.component == hidden:
            missing = np.maximum(missing, alpha)
        elif layer.shade is None:
            cover *= 1 - alpha
        else:
            cover = np.maximum(cover, alpha)
            shade += alpha * (layer.shade - shade)
    shade *= _texture(style, u.shape, rng)
    canvas = _planes(style.background) * (backdrop * (1 - cover))
    canvas += _planes(style.rgb) * (shade * cover)
    for mark in style.marks:
        paint_defect(canvas, cover, style.background, mark, u, v, pixel)
    return canvas, cover, missing


def _planes(colour: Rgb) -> _Array:
    return np.asarray(colour, np.float32)[:, None, None]


def _texture(style: Style, size: tuple[int, int], rng: np.random.Generator) -> _Array:
    """Return multipliers (height, width) for the part's colour. The style sets the pattern, `rng` its details."""
    height, width = size
    if style.kind not in SURFACES:
        return 1 + 0.03 * smooth_noise(rng, size, (7, 7)) + 0.015 * white_noise(rng, size)
    depth = 0.05 + 0.09 * style.proportions[1]
    texture = 1 + 0.08 * smooth_noise(rng, size, (4, 4)) + 0.05 * white_noise(rng, size)
    if style.kind == "brushed sheet":  # the texture consists of parallel streaks, some of them strong
        cells = (3, width // 2) if style.proportions[0] < 0.75 else (height // 2, 3)
        streaks = smooth_noise(rng, size, cells)
        texture += depth * (0.7 * streaks + 0.15 * streaks**3)
    elif style.kind == "mottled sheet":
        texture += depth * (smooth_noise(rng, size, (16, 16)) + 0.6 * smooth_noise(rng, size, (34, 34)))
    elif style.kind == "woven sheet":
        x = np.arange(width, dtype=np.float32)[None, :] * np.float32(0.5 + style.proportions[2])
        y = np.arange(height, dtype=np.float32)[:, None] * np.float32(0.5 + style.proportions[2])
        texture += depth * 1.5 * np.sin(x) * np.sin(y)
    else:
        texture += 1.3 * depth * white_noise(rng, size)
    if style.proportions[3] > 0.5:  # the part gets darker towards its sides, like a curved surface
        x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
        texture *= 1 - np.float32(0.9 * (style.proportions[3] - 0.5)) * np.abs(x) ** 3
    return texture


def paint_defect(
    canvas: _Array,
    cover: _Array,
    background: Rgb,
    defect: Defect,
    u: _Array,
    v: _Array,
    pixel: float,
) -> _Array:
    """Paint a defect onto `canvas` (3, height, width) where the part covers it.

    Returns the fraction of each pixel that the defect covers, (height, width).
    """
    reach = 1.5 * defect.size + 2 * pixel
    near = (np.abs(u - np.float32(defect.u)) < reach) & (np.abs(v - np.float32(defect.v)) < reach)
    painted = np.zeros(u.shape, np.float32)
    rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
    if not len(rows):
        return painted
    crop = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    x, y = u[crop] - np.float32(defect.u), v[crop] - np.float32(defect.v)
    cos, sin = np.float32(np.cos(defect.angle)), np.float32(np.sin(defect.angle))
    p, q = x * cos + y * sin, y * cos - x * sin
    rng = np.random.default_rng((defect.seed, 4))
    planes = slice(None), *crop
    below = canvas[planes]
    alpha = FORMS[defect.name](p, q, defect.size, pixel, rng) * cover[crop]
    strength = rng.uniform(0.6, 0.95)
    target: _Array
    if defect.name in ("cut", "chip"):
        target = _planes(background)
    elif defect.name in ("dent", "hole"):
        # The light comes from the top left, so the near wall is in shadow and the far wall is bright.
        slope = (x + y) / np.float32(defect.size)
        relief = 1 + np.float32(0.45) * slope if defect.name == "dent" else np.where(slope > 0.75, 1.2, 0.25)
        target = below * relief.astype(np.float32)
    elif defect.name == "roughness":
        blocks = np.kron(rng.standard_normal([(n + 1) // 2 for n in below.shape[1:]], np.float32), np.ones((2, 2)))
        grain = blocks[: below.shape[1], : below.shape[2]].astype(np.float32)
        target = below * (1 + np.float32(0.6 * strength - 0.25) * grain)
    elif defect.name == "tint":
        target = below + np.float32(0.6 * strength) * (_planes(COLOURS[defect.tone]) - below)
    elif defect.name == "patch":
        target = below * np.float32(rng.uniform(0.6, 0.8) if defect.tone == "dark" else rng.uniform(1.25, 1.45))
    elif defect.tone == "dark":
        target = below * np.float32(1 - 0.85 * strength)
    elif defect.tone == "bright":
        room = np.clip(1 - below, 0, None).astype(np.float32)
        target = below + np.float32(0.8 * strength) * room
    else:
        target = below + np.float32(strength) * (_planes(COLOURS[defect.tone]) - below)
    canvas[planes] = below + alpha * (target - below)
    painted[crop] = alpha
    return painted
