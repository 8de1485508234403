"""Outlines of parts and shapes of defects as functions of part coordinates (see `echo_ft.drawn.parts`).

Distances are signed, negative inside. Arrays are float32 (height, width).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.float32]


class Layer(NamedTuple):
    """One shape of a part, painted over the layers before it."""

    distance: _Array
    shade: float | _Array | None
    """Multiplier for the part's colour. None is a hole that shows the background."""
    component: int = -1
    """Index of the component that can be missing, or -1."""


def pixel_coverage(distance: _Array, pixel: float) -> _Array:
    """Return the fraction of each pixel that lies inside a shape, given the distances and the width of a pixel."""
    return np.clip(0.5 - distance / np.float32(pixel), 0, 1)


def _box(u: _Array, v: _Array, a: float, b: float) -> _Array:
    return np.maximum(np.abs(u) - np.float32(a), np.abs(v) - np.float32(b))


def _circle(u: _Array, v: _Array, x: float, y: float, r: float) -> _Array:
    return np.hypot(u - np.float32(x), v - np.float32(y)) - np.float32(r)


def _around(count: int, radius: float, start: float = 0.0) -> list[tuple[float, float]]:
    angles = [start + 2 * np.pi * i / count for i in range(count)]
    return [(float(radius * np.cos(t)), float(radius * np.sin(t))) for t in angles]


def _ring(u: _Array, v: _Array, n: Sequence[float]) -> list[Layer]:
    r = np.hypot(u, v)
    return [Layer(r - np.float32(0.84), 1.0), Layer(r - np.float32(0.28 + 0.3 * n[0]), None)]


def _disc(u: _Array, v: _Array, n: Sequence[float]) -> list[Layer]:
    r = np.hypot(u, v)
    return [Layer(r - np.float32(0.84), 1.0), Layer(np.abs(r - np.float32(0.35 + 0.3 * n[0])) - np.float32(0.05), 0.8)]


def _plate(u: _Array, v: _Array, n: Sequence[float]) -> list[Layer]:
    b, r = 0.5 + 0.34 * n[0], 0.07 + 0.07 * n[1]
    corners = _circle(np.abs(u), np.abs(v), 0.84 - 0.22, b - 0.22, r)
    return [Layer(_box(u, v, 0.84, b), 1.0), Layer(corners, None)]


def _gear(u: _Array, v: _Array, n: Sequence[float]) -> list[Layer]:
    teeth = np.clip(np.sin(np.arctan2(v, u) * (8 + round(6 * n[0]))) * 3, -1, 1)
    r = np.hypot(u, v)
    return [
        Layer(r - np.float32(0.08) * teeth - np.float32(0.78), 1.0),
        Layer(r - np.float32(0.15 + 0.15 * n[1]), None),
    ]


def _bar(u: _Array, v: _Array, n: Sequence[float]) -> list[Layer]:
    b = 0.3 + 0.2 * n[0]
    return [Layer(_box(u, v, 0.88, b), 1.0), Layer(_box(u, v, 0.88, b * 0.3), 1.15)]


def _nut(u: _Array, v: _Array, n: Sequence[float]) -> list[Layer]:
    a, b = np.abs(u), np.abs(v)
    hexagon = np.maximum(a * np.float32(0.866) + b * np.float32(0.5), b) - np.float32(0.74)
    return [Layer(hexagon, 1.0), Layer(np.hypot(u, v) - np.float32(0.25 + 0.2 * n[0]), None)]


def _cross(u: _Array, v: _Array, n: Sequence[float]) -> list[Layer]:
    b = 0.26 + 0.16 * n[0]
    return [Layer(np.minimum(_box(u, v, 0.86, b), _box(u, v, b, 0.86)), 1.0)]


def _frame(u: _Array, v: _Array, n: Sequence[float]) -> list[Layer]:
    wall = 0.24 + 0.14 * n[0]
    return [Layer(_box(u, v, 0.84, 0.84), 1.0), Layer(_box(u, v, 0.84 - wall, 0.84 - wall), None)]


def _tube(u: _Array, v: _Array, n: Sequence[float]) -> list[Layer]:
    b = 0.35 + 0.2 * n[0]
    round_ = np.sqrt(np.clip(1 - (v / np.float32(b)) ** 2, 0.05, 1)) * np.float32(0.75) + np.float32(0.35)
    return [Layer(_box(u, v, 0.88, b), round_)]


def _tablet(u: _Array, v: _Array, n: Sequence[float]) -> list[Layer]:
    b = 0.4 + 0.2 * n[0]
    capsule = np.hypot(np.maximum(np.abs(u) - np.float32(0.86 - b), 0), v) - np.float32(b)
    return [Layer(capsule, 1.0), Layer(_box(u, v, 0.03, b * 0.8), 0.75)]


def _panel(u: _Array, v: _Array, n: Sequence[float]) -> list[Layer]:
    pitch = 0.4 + 0.16 * n[0]
    a, b = (np.abs((w + np.float32(pitch / 2)) % np.float32(pitch) - np.float32(pitch / 2)) for w in (u, v))
    slots = np.maximum(_box(a, b, pitch * 0.25, pitch * 0.18), _box(u, v, 0.7, 0.7))
    return [Layer(_box(u, v, 0.86, 0.86), 1.0), Layer(slots, 0.55)]


def _sheet(u: _Array, v: _Array, n: Sequence[float]) -> list[Layer]:
    return [Layer(np.full(u.shape, -1, np.float32), 1.0)]


def _flange(u: _Array, v: _Array, n: Sequence[float]) -> list[Layer]:
    r = np.hypot(u, v)
    layers = [Layer(r - np.float32(0.88), 1.0), Layer(r - np.float32(0.4), 1.18), Layer(r - np.float32(0.2), 0.25)]
    for number, (x, y) in enumerate(_around(6, 0.63, np.pi / 6)):
        layers.append(Layer(_circle(u, v, x, y, 0.09), 0.3))
        layers.append(Layer(_circle(u, v, x, y, 0.125), 1.3, number))
        layers.append(Layer(_box(u - np.float32(x), v - np.float32(y), 0.075, 0.02), 0.7, number))
    return layers


def _connector(u: _Array, v: _Array, n: Sequence[float]) -> list[Layer]:
    layers = [Layer(_box(u, v, 0.9, 0.6), 1.0), Layer(_box(u, v, 0.78, 0.47), 0.62)]
    for number in range(10):
        x, y = -0.62 + 0.31 * (number % 5), -0.22 + 0.44 * (number // 5)
        layers.append(Layer(_box(u - np.float32(x), v - np.float32(y), 0.075, 0.13), 0.35))
        layers.append(Layer(_box(u - np.float32(x), v - np.float32(y), 0.065, 0.12), 2.6, number))
    return layers


def _bearing(u: _Array, v: _Array, n: Sequence[float]) -> list[Layer]:
    r = np.hypot(u, v)
    layers = [Layer(r - np.float32(0.88), 1.0), Layer(r - np.float32(0.66), 0.35), Layer(r - np.float32(0.38), 1.0)]
    layers.append(Layer(r - np.float32(0.22), None))
    for number, (x, y) in enumerate(_around(9, 0.52)):
        ball = _circle(u, v, x, y, 0.13)
        layers.append(Layer(ball, np.float32(0.85) - np.clip(ball * 4, -0.5, 0), number))
    return layers


SURFACES = ("brushed sheet", "mottled sheet", "woven sheet", "grainy sheet")
"""Kinds that fill the image: grey surfaces with a texture."""

SHAPES: Mapping[str, Callable[[_Array, _Array, Sequence[float]], list[Layer]]] = {
    "ring": _ring, "disc": _disc, "plate": _plate, "gear": _gear, "bar": _bar, "nut": _nut, "cross": _cross,
    "frame": _frame, "tube": _tube, "tablet": _tablet, "panel": _panel,
}  # fmt: skip

PART_SHAPES = {
    **SHAPES,
    **dict.fromkeys(SURFACES, _sheet),
    "flange": _flange,
    "connector": _connector,
    "bearing": _bearing,
}
COMPONENTS = {"flange": 6, "connector": 10, "bearing": 9}
"""Number of components of each kind that can be missing."""

Form = Callable[[_Array, _Array, float, float, np.random.Generator], _Array]
"""Maps (p, q, size, pixel, rng) to a coverage from 0 to 1. From the centre, p runs along the defect and q across it."""


def _spot(p: _Array, q: _Array, size: float, pixel: float, rng: np.random.Generator) -> _Array:
    return pixel_coverage(_rough(p, q / np.float32(rng.uniform(0.55, 1)), size, 0.1, rng), pixel)


def _rough(p: _Array, q: _Array, size: float, roughness: float, rng: np.random.Generator) -> _Array:
    """Return the distance to a round outline with a varying radius."""
    theta = np.arctan2(q, p)
    wave = np.zeros_like(theta)
    for k in (2, 3, 5):
        wave += np.float32(rng.uniform(-1, 1)) * np.sin(k * theta + np.float32(rng.uniform(0, 6.3)))
    return np.hypot(p, q) - np.float32(size) * (1 + np.float32(roughness) * wave)


def _line(p: _Array, q: _Array, size: float, pixel: float, course: Sequence[float], width: float) -> _Array:
    """Return the coverage of a line along p with half width `width`. The knots in `course` give its offset in q."""
    knots = np.linspace(-size, size, len(course))
    path = np.interp(p, knots, np.asarray(course)).astype(np.float32)
    slope = np.float32(1 + np.abs(np.diff(course)).mean() / (knots[1] - knots[0]))
    return pixel_coverage(np.maximum(np.abs(q - path) / slope - np.float32(width), np.abs(p) - np.float32(size)), pixel)


def _crack(p: _Array, q: _Array, size: float, pixel: float, rng: np.random.Generator) -> _Array:
    course = np.cumsum(rng.normal(0, 0.1 * size, 12))
    return _line(p, q, size, pixel, course - course.mean(), rng.uniform(0.5, 1.2) * pixel)


def _fibre(p: _Array, q: _Array, size: float, pixel: float, rng: np.random.Generator) -> _Array:
    bend = rng.uniform(0.15, 0.4) * size
    course = bend * np.sin(np.linspace(0, rng.uniform(2, 6), 24) + rng.uniform(0, 6))
    return _line(p, q, size, pixel, course - course.mean(), 0.9 * pixel)


def _patch(p: _Array, q: _Array, size: float, pixel: float, rng: np.random.Generator) -> _Array:
    ratio = np.float32(rng.uniform(0.5, 1))
    if rng.random() < 0.5:
        return pixel_coverage(_box(p, q / ratio, 0.8 * size, 0.8 * size), pixel * rng.uniform(1, 5))
    return pixel_coverage(_rough(p, q / ratio, size, 0.12, rng), pixel * rng.uniform(1, 5))


def _hole(p: _Array, q: _Array, size: float, pixel: float, rng: np.random.Generator) -> _Array:
    return pixel_coverage(np.hypot(p, q) - np.float32(size), pixel)


def _dent(p: _Array, q: _Array, size: float, pixel: float, rng: np.random.Generator) -> _Array:
    return np.clip(1.3 - 1.3 * (np.hypot(p, q) / np.float32(size)) ** 2, 0, 1)


def _smear(p: _Array, q: _Array, size: float, pixel: float, rng: np.random.Generator) -> _Array:
    width = np.float32(rng.uniform(0.2, 0.35))
    return np.exp(-2 * ((p / np.float32(size)) ** 4 + (q / (width * np.float32(size))) ** 2))


def _speckles(p: _Array, q: _Array, size: float, pixel: float, rng: np.random.Generator) -> _Array:
    dots = rng.uniform(-0.7 * size, 0.7 * size, (int(rng.integers(7, 14)), 2))
    radius = np.float32(rng.uniform(1.0, 1.8) * pixel)
    nearest = np.min([np.maximum(np.abs(p - np.float32(a)), np.abs(q - np.float32(b))) for a, b in dots], axis=0)
    return pixel_coverage(nearest - radius, pixel)


def _cut(p: _Array, q: _Array, size: float, pixel: float, rng: np.random.Generator) -> _Array:
    return pixel_coverage(np.maximum(np.abs(q), -p) - np.float32(0.75 * size), pixel)


def _streak(p: _Array, q: _Array, size: float, pixel: float, rng: np.random.Generator) -> _Array:
    """An arc that is thin at both ends."""
    path = np.float32(rng.uniform(-0.3, 0.3) / size) * (p * p - np.float32(size * size / 2))
    taper = np.clip(1 - (p / np.float32(size)) ** 2, 0, 1)
    return pixel_coverage(np.abs(q - path) - np.float32(rng.uniform(0.6, 1.3) * pixel) * taper, pixel) * (taper > 0)


def _scratch(p: _Array, q: _Array, size: float, pixel: float, rng: np.random.Generator) -> _Array:
    gaps = rng.uniform(2.2, 4, int(rng.integers(1, 4))).cumsum() * pixel
    lines = [
        _line(p, q - np.float32(gap - gaps.mean()), size * rng.uniform(0.7, 1), pixel, (0, 0), 0.6 * pixel)
        for gap in gaps
    ]
    return np.max(lines, axis=0)


def _stain(p: _Array, q: _Array, size: float, pixel: float, rng: np.random.Generator) -> _Array:
    distance = _rough(p, q, size, 0.14, rng)
    rim = np.exp(-((distance / np.float32(0.12 * size)) ** 2))
    return np.clip(pixel_coverage(distance, 3 * pixel) * np.float32(0.55) + 0.4 * rim, 0, 1)


def _chip(p: _Array, q: _Array, size: float, pixel: float, rng: np.random.Generator) -> _Array:
    theta = np.arctan2(q, p)
    jags = np.interp(theta, np.linspace(-np.pi, np.pi, 14), rng.uniform(0.6, 1.1, 14)).astype(np.float32)
    return pixel_coverage(np.hypot(p, q) - np.float32(size) * jags, pixel)


FORMS: Mapping[str, Form] = {
    "spot": _spot, "crack": _crack, "fibre": _fibre, "patch": _patch, "hole": _hole, "dent": _dent, "smear": _smear,
    "speckles": _speckles, "cut": _cut,
    "streak": _streak, "tint": _patch, "roughness": _patch,
    "scratch": _scratch, "stain": _stain, "chip": _chip,
}  # fmt: skip
