"""Patterns of identical components in a grid or on a circle, or of parallel lines, as layers of `echo_ft.drawn.shapes`.

Neighbours may be as close as 8 pixels at 168 x 168. For speed, a pattern is folded: each pixel gets coordinates (p, q)
around its nearest component, so drawing all components costs no more than drawing one. Arrays are float32 (height,
width).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from echo_ft.drawn.painting import Defect
from echo_ft.drawn.shapes import Layer

_Array = NDArray[np.float32]
Pose = tuple[float, float, float]
"""(u, v, angle) of a component or a defect."""


@dataclass(frozen=True)
class Pattern:
    """Identical components in a grid or on a circle, or parallel lines."""

    layout: str
    """`grid`, `circle`, `rows` (lines along u) or `columns` (lines along v)."""
    u: float
    v: float
    """Centre of the pattern."""
    counts: tuple[int, int]
    """Rows and columns of a grid; 1 and the number of components or lines otherwise."""
    pitch: tuple[float, float]
    """Distance between neighbours along u and v. For a circle, the first value is its radius."""
    size: float
    """Half width of a component or line."""
    ratio: float
    """Half height divided by half width of a square component."""
    square: bool
    shade: float | None
    inner: float
    """Size of the inner part divided by the size of the component; 0 for no inner part."""
    inner_shade: float
    footprint: float
    """Shade under a component, visible where the component is missing. 1 is the bare base."""
    staggered: bool = False
    start: float = 0.0
    """Angle of a circle's first component."""
    knots: tuple[float, ...] = ()
    """Offsets of all lines from a straight course, at equal steps along them."""
    ends: tuple[tuple[float, float], ...] = ()
    """First and last coordinate of each line."""

    @property
    def is_lines(self) -> bool:
        return self.layout in ("rows", "columns")

    @property
    def count(self) -> int:
        return self.counts[0] * self.counts[1]


def random_shade(rng: np.random.Generator) -> float:
    """Draw a random multiplier for the part's colour that clearly differs from 1."""
    return float(rng.uniform(0.2, 0.65) if rng.random() < 0.5 else rng.uniform(1.35, 1.9))


def _random_lines(rng: np.random.Generator, u: float, v: float, a: float, b: float) -> Pattern:
    """Draw parallel lines that fill the box of half width `a` and half height `b` around (u, v)."""
    layout = "rows" if rng.random() < 0.5 else "columns"
    along, across = (a, b) if layout == "rows" else (b, a)
    pitch = float(rng.uniform(0.09, 0.26))
    count = int(np.clip(2 * across / pitch, 2, 16))
    bend = float(rng.uniform(0.0, 0.35) * across) if rng.random() < 0.6 else 0.0
    count = max(2, count - round(2 * bend / pitch))
    knots = tuple(float(x) for x in bend * np.repeat(rng.choice([-1.0, 0.0, 1.0], 4), 2))
    ragged = rng.uniform(0, 0.5) * along * (rng.random() < 0.5)
    ends = tuple((float(-along + rng.random() * ragged), float(along - rng.random() * ragged)) for _ in range(count))
    pads = float(rng.uniform(1.5, 2.0)) if rng.random() < 0.5 else 0.0
    size = pitch * float(rng.uniform(0.18, 0.28))
    return Pattern(
        layout, u, v, (1, count), (pitch, pitch), size, 1, False, random_shade(rng), pads, 1, 1, knots=knots, ends=ends
    )


def random_pattern(rng: np.random.Generator, u: float, v: float, a: float, b: float) -> Pattern:
    """Draw a pattern that fills the box of half width `a` and half height `b` around (u, v)."""
    draw = rng.random()
    if draw < 0.28:
        return _random_lines(rng, u, v, a, b)
    square, inner = bool(rng.random() < 0.5), float(rng.uniform(0.3, 0.65)) if rng.random() < 0.5 else 0.0
    shade = None if rng.random() < 0.15 else random_shade(rng)
    inner = 0.0 if shade is None else inner
    inner_shade = random_shade(rng)
    footprint = 1.0 if shade is None or rng.random() < 0.5 else float(rng.choice([0.5, 0.75, 1.25]))
    look = (square, shade, inner, inner_shade, footprint)
    if draw < 0.45:
        count, radius = int(rng.integers(3, 21)), float(rng.uniform(0.55, 0.88) * min(a, b))
        size = min(0.16, 2.4 * radius / count) * float(rng.uniform(0.7, 1.0))
        ratio, start = float(rng.uniform(0.6, 1)), float(rng.uniform(0, 6.3))
        return Pattern("circle", u, v, (1, count), (radius, radius), size, ratio, *look, start=start)
    dense = rng.random() < 0.55
    pitch = float(rng.uniform(0.095, 0.19) if dense else rng.uniform(0.22, 0.6))
    stretch = float(rng.uniform(1, 1.4) if rng.random() < 0.4 else 1)
    rows, columns = (max(1, int(2 * side / step)) for side, step in ((b, pitch * stretch), (a, pitch)))
    while rows * columns > 64:
        rows, columns = (rows, columns - 1) if columns > rows else (rows - 1, columns)
    if not dense:
        rows, columns = min(rows, int(rng.integers(1, 5))), min(columns, int(rng.integers(2, 7)))
    size = min(0.2, pitch * float(rng.uniform(0.26, 0.4)))
    ratio = float(rng.uniform(0.6, 1.0) if rng.random() < 0.5 else 1) * stretch
    staggered = bool(rng.random() < 0.3 and columns > 1)
    return Pattern("grid", u, v, (rows, columns), (pitch, pitch * stretch), size, ratio, *look, staggered=staggered)


def _local(u: _Array, v: _Array, point: Pose) -> tuple[_Array, _Array]:
    cos, sin = np.float32(np.cos(point[2])), np.float32(np.sin(point[2]))
    x, y = u - np.float32(point[0]), v - np.float32(point[1])
    return x * cos + y * sin, y * cos - x * sin


def _fold(pattern: Pattern, u: _Array, v: _Array) -> tuple[_Array, _Array, NDArray[np.int64]]:
    """Return (p, q) of every pixel around its nearest component and the index of that component."""
    x, y = u - np.float32(pattern.u), v - np.float32(pattern.v)
    rows, columns = pattern.counts
    if pattern.layout == "circle":
        step = np.float32(2 * np.pi / columns)
        theta = np.arctan2(y, x) - np.float32(pattern.start)
        number = np.rint(theta / step)
        theta -= number * step
        r = np.hypot(x, y)
        return r * np.cos(theta) - np.float32(pattern.pitch[0]), r * np.sin(theta), number.astype(np.int64) % columns
    if pattern.is_lines:
        along, across = (x, y) if pattern.layout == "rows" else (y, x)
        if any(pattern.knots):
            across = across + line_course(pattern, along)
        middle, pitch = (columns - 1) / 2, np.float32(pattern.pitch[0])
        number = np.clip(np.rint(across / pitch + np.float32(middle)), 0, columns - 1)
        return along, across - (number - np.float32(middle)) * pitch, number.astype(np.int64)
    pitch_u, pitch_v = np.float32(pattern.pitch[0]), np.float32(pattern.pitch[1])
    row = np.clip(np.rint(y / pitch_v + np.float32((rows - 1) / 2)), 0, rows - 1)
    if pattern.staggered:
        x = x - (row % 2 - np.float32(0.5)) * (pitch_u / 2)
    column = np.clip(np.rint(x / pitch_u + np.float32((columns - 1) / 2)), 0, columns - 1)
    p = x - (column - np.float32((columns - 1) / 2)) * pitch_u
    q = y - (row - np.float32((rows - 1) / 2)) * pitch_v
    return p, q, (row * columns + column).astype(np.int64)


def line_course(pattern: Pattern, along: _Array) -> _Array:
    """Return how far the lines of a pattern deviate from a straight course at each coordinate along them."""
    span = max(end for _, end in pattern.ends)
    return np.asarray(np.interp(along, np.linspace(-span, span, len(pattern.knots)), pattern.knots), np.float32)


def component_centre(pattern: Pattern, number: int) -> Pose:
    """Return the position of a component in a grid or on a circle."""
    if pattern.layout == "circle":
        angle = pattern.start + 2 * np.pi * number / pattern.counts[1]
        radius = pattern.pitch[0]
        return float(pattern.u + radius * np.cos(angle)), float(pattern.v + radius * np.sin(angle)), angle
    row, column = divmod(number, pattern.counts[1])
    shift = (row % 2 - 0.5) * pattern.pitch[0] / 2 if pattern.staggered else 0.0
    u = pattern.u + shift + (column - (pattern.counts[1] - 1) / 2) * pattern.pitch[0]
    return u, pattern.v + (row - (pattern.counts[0] - 1) / 2) * pattern.pitch[1], 0.0


def _component(pattern: Pattern, p: _Array, q: _Array) -> list[tuple[_Array, float | None]]:
    """Return (distance, shade) of each piece of a component."""
    if pattern.square:
        distance = np.maximum(np.abs(p), np.abs(q) / np.float32(pattern.ratio)) - np.float32(pattern.size)
    else:
        distance = np.hypot(p, q) - np.float32(pattern.size)
    pieces: list[tuple[_Array, float | None]] = [(distance, pattern.shade)]
    if pattern.inner:
        pieces.append((distance + np.float32(pattern.size * (1 - pattern.inner)), pattern.inner_shade))
    return pieces


def pattern_layers(pattern: Pattern, u: _Array, v: _Array, defect: Defect | None) -> list[Layer]:
    """Return the layers of a pattern. The `component` of a structural defect is its index within the pattern."""
    p, q, number = _fold(pattern, u, v)
    name = defect.name if defect else ""
    if pattern.is_lines:
        ends = np.asarray(pattern.ends, np.float32)
        start, end = ends[number, 0], ends[number, 1]
        distance = np.maximum(np.abs(q) - np.float32(pattern.size), np.maximum(start - p, p - end))
        if pattern.inner:  # each component has a pad at both ends
            pads = np.hypot(np.minimum(np.abs(p - start), np.abs(p - end)), q)
            distance = np.minimum(distance, pads - np.float32(pattern.size * pattern.inner))
        pieces: list[tuple[_Array, float | None]] = [(distance, pattern.shade)]
    else:
        pieces = _component(pattern, p, q)
    layers = []
    if pattern.footprint != 1:
        layers.append(Layer(np.hypot(p, q) - np.float32(0.6 * pattern.size * min(1, pattern.ratio)), pattern.footprint))
    for distance, shade in pieces:
        if defect and name in ("absence", "displacement"):
            distance = np.where(number == defect.component, np.float32(1), distance)
        layers.append(Layer(distance, shade))
    if not defect or name == "absence":
        return layers
    p, q = _local(u, v, (defect.u, defect.v, defect.angle))
    if name == "break":
        gap = np.maximum(np.abs(p) - np.float32(defect.size), np.abs(q) - np.float32(2.2 * pattern.size))
        layers[-1] = Layer(np.maximum(layers[-1].distance, -gap), pattern.shade)
    elif name == "bridge":
        width = np.float32(max(0.016, 0.6 * pattern.size))
        layers.append(Layer(np.maximum(np.abs(p) - np.float32(defect.size), np.abs(q) - width), pattern.shade))
    else:
        layers += [Layer(*piece) for piece in _component(pattern, p, q)]
    return layers
