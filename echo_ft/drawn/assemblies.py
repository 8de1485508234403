"""Assemblies: random boards, discs, hexagons and frames that carry patterns of small components or lines.

Only pretraining uses them. A pattern holds up to about 60 equal components in a grid or on a circle, or parallel lines.
Its neighbours may lie as close as 8 pixels at 168 x 168. For speed, a pattern is folded: each pixel gets coordinates
(p, q) around its nearest component, so that all components cost as much as one. See `echo_ft.drawn.shapes` for layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from echo_ft.drawn.painting import Defect, Style
from echo_ft.drawn.shapes import PART_SHAPES, SURFACES, Layer

_Array = NDArray[np.float32]
_Point = tuple[float, float, float]
"""(u, v, angle) of a component or a defect."""

ASSEMBLY = "assembly"
STRUCTURAL_DEFECTS = ("absence", "displacement", "extra", "break", "bridge")
"""Defects of a pattern: a component is gone, off its place or one too many; a line is cut, or neighbours are joined."""


@dataclass(frozen=True)
class Pattern:
    """Equal components in a grid, on a circle, or as parallel lines."""

    layout: str
    """`grid`, `circle`, `rows` (lines along u) or `columns` (lines along v)."""
    u: float
    v: float
    """Centre of the pattern."""
    counts: tuple[int, int]
    """Rows and columns of a grid; 1 and the number of components or lines otherwise."""
    pitch: tuple[float, float]
    """Distance of neighbours along u and v. The first is the radius of a circle."""
    size: float
    """Half width of a component or line."""
    ratio: float
    """Half height over half width of a square component."""
    square: bool
    shade: float | None
    inner: float
    """Size of the inner part over the size of the component, 0 for none."""
    inner_shade: float
    footprint: float
    """Shade below a component, which shows where the component is gone. 1 is the bare base."""
    staggered: bool = False
    start: float = 0.0
    """Angle of a circle's first component."""
    knots: tuple[float, ...] = ()
    """Course of all lines at equal steps along them."""
    ends: tuple[tuple[float, float], ...] = ()
    """First and last coordinate of each line."""

    @property
    def is_lines(self) -> bool:
        return self.layout in ("rows", "columns")

    @property
    def count(self) -> int:
        return self.counts[0] * self.counts[1]


@dataclass(frozen=True)
class Assembly:
    """The geometry of one product."""

    base: str
    """`board` (fills the image), `disc`, `plate`, `hexagon`, `cushion` or `rim`."""
    height: float
    rings: tuple[tuple[float, float, float | None], ...]
    """(radius, half width, shade) of each ring. Radius 0 is a boss."""
    patterns: tuple[Pattern, ...]


def _shade(rng: np.random.Generator) -> float:
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
        layout, u, v, (1, count), (pitch, pitch), size, 1, False, _shade(rng), pads, 1, 1, knots=knots, ends=ends
    )


def _random_pattern(rng: np.random.Generator, u: float, v: float, a: float, b: float) -> Pattern:
    """Draw a pattern that fills the box of half width `a` and half height `b` around (u, v)."""
    draw = rng.random()
    if draw < 0.28:
        return _random_lines(rng, u, v, a, b)
    square, inner = bool(rng.random() < 0.5), float(rng.uniform(0.3, 0.65)) if rng.random() < 0.5 else 0.0
    shade = None if rng.random() < 0.15 else _shade(rng)
    inner = 0.0 if shade is None else inner
    inner_shade = _shade(rng)
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


@lru_cache(maxsize=64)
def plan_assembly(proportions: tuple[float, ...]) -> Assembly:
    """Draw the geometry that belongs to a style's proportions."""
    rng = np.random.default_rng([int(x * 2**32) for x in proportions])
    base = str(rng.choice(["board", "board", "disc", "plate", "hexagon", "cushion", "rim"]))
    height = float(rng.uniform(0.5, 0.9))
    a, b = {
        "board": (0.82, 0.82), "disc": (0.6, 0.6), "plate": (0.8, height - 0.1), "hexagon": (0.58, 0.58),
        "cushion": (0.76, height - 0.12), "rim": (0.68, max(0.35, height - 0.2)),
    }[base]  # fmt: skip
    rings: list[tuple[float, float, float | None]] = []
    if rng.random() < 0.35:
        radius = float(rng.uniform(0.3, 0.95) * min(a, b))
        rings.append((radius, float(rng.uniform(0.02, 0.06)), _shade(rng)))
    if rng.random() < 0.25:
        rings.append((0.0, float(rng.uniform(0.15, 0.4) * min(a, b)), None if rng.random() < 0.2 else _shade(rng)))
    if rng.random() < 0.6:
        boxes = [(0.0, 0.0, a, b)]
    elif rng.random() < 0.5:
        boxes = [(-a / 2, 0.0, 0.45 * a, b), (a / 2, 0.0, 0.45 * a, b)]
    else:
        boxes = [(0.0, -b / 2, a, 0.45 * b), (0.0, b / 2, a, 0.45 * b)]
    return Assembly(base, height, tuple(rings), tuple(_random_pattern(rng, *box) for box in boxes))


def _local(u: _Array, v: _Array, point: _Point) -> tuple[_Array, _Array]:
    cos, sin = np.float32(np.cos(point[2])), np.float32(np.sin(point[2]))
    x, y = u - np.float32(point[0]), v - np.float32(point[1])
    return x * cos + y * sin, y * cos - x * sin


def _fold(pattern: Pattern, u: _Array, v: _Array) -> tuple[_Array, _Array, NDArray[np.int64]]:
    """Return (p, q) of every pixel around its nearest component and the number of that component."""
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
            across = across + _course(pattern, along)
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


def _course(pattern: Pattern, along: _Array) -> _Array:
    span = max(end for _, end in pattern.ends)
    return np.asarray(np.interp(along, np.linspace(-span, span, len(pattern.knots)), pattern.knots), np.float32)


def _centre(pattern: Pattern, number: int) -> _Point:
    """Return the place of a component of a grid or circle."""
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


def _pattern_layers(pattern: Pattern, u: _Array, v: _Array, defect: Defect | None) -> list[Layer]:
    p, q, number = _fold(pattern, u, v)
    name = defect.name if defect else ""
    if pattern.is_lines:
        ends = np.asarray(pattern.ends, np.float32)
        start, end = ends[number, 0], ends[number, 1]
        distance = np.maximum(np.abs(q) - np.float32(pattern.size), np.maximum(start - p, p - end))
        if pattern.inner:  # pads at both ends
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


def part_layers(style: Style, u: _Array, v: _Array, defect: Defect | None = None) -> list[Layer]:
    """Return the layers of any kind of part. `defect` is a structural one of an assembly, if any."""
    if style.kind != ASSEMBLY:
        return PART_SHAPES[style.kind](u, v, style.proportions)
    plan = plan_assembly(style.proportions)
    layers = _base_layers(plan, u, v)
    for radius, width, shade in plan.rings:
        layers.append(Layer(np.abs(np.hypot(u, v) - np.float32(radius)) - np.float32(width), shade))
    first = 0
    for pattern in plan.patterns:
        own = defect if defect and first <= defect.component < first + pattern.count else None
        if own:
            own = Defect(own.name, own.u, own.v, own.size, own.angle, component=own.component - first)
        layers += _pattern_layers(pattern, u, v, own)
        first += pattern.count
    return layers


def _base_layers(plan: Assembly, u: _Array, v: _Array) -> list[Layer]:
    a, b, height = np.abs(u), np.abs(v), np.float32(plan.height)
    if plan.base == "board":
        return [Layer(np.full(u.shape, -1, np.float32), 1.0)]
    if plan.base == "disc":
        return [Layer(np.hypot(u, v) - np.float32(0.88), 1.0)]
    if plan.base == "hexagon":
        return [Layer(np.maximum(a * np.float32(0.866) + b * np.float32(0.5), b) - np.float32(0.8), 1.0)]
    if plan.base == "cushion":
        corner = np.hypot(np.maximum(a - np.float32(0.6), 0), np.maximum(b - height + np.float32(0.3), 0))
        return [Layer(corner - np.float32(0.3), 1.0)]
    plate = Layer(np.maximum(a - np.float32(0.9), b - height), 1.0)
    if plan.base == "plate":
        return [plate]
    return [plate, Layer(np.maximum(a - np.float32(0.8), b - height + np.float32(0.1)), 0.75)]


def fills_image(style: Style) -> bool:
    """Return whether a part has no outline in the image."""
    return style.kind in SURFACES or (style.kind == ASSEMBLY and plan_assembly(style.proportions).base == "board")


def structural_names(style: Style) -> tuple[str, ...]:
    """Return the structural defects that a product can have."""
    if style.kind != ASSEMBLY:
        return ()
    patterns = plan_assembly(style.proportions).patterns
    lines, parts = any(p.is_lines for p in patterns), any(not p.is_lines for p in patterns)
    bridged = lines or any(p.shade is not None and p.count > 1 for p in patterns)
    possible = {"absence": parts, "displacement": parts, "extra": parts, "break": lines, "bridge": bridged}
    return tuple(name for name in STRUCTURAL_DEFECTS if possible[name])


def structural_defect(rng: np.random.Generator, style: Style, name: str) -> Defect:
    """Draw a structural defect, one of `structural_names`, at a random component."""
    plan = plan_assembly(style.proportions)
    fits = {
        "break": lambda p: p.is_lines,
        "bridge": lambda p: p.is_lines or (p.shade is not None and p.count > 1),
    }.get(name, lambda p: not p.is_lines)
    index = int(rng.choice([i for i, p in enumerate(plan.patterns) if fits(p)]))
    pattern, first = plan.patterns[index], sum(p.count for p in plan.patterns[:index])
    number = int(rng.integers(pattern.count))
    if name == "bridge" or pattern.is_lines:
        number, (u, v, angle), size = _between(rng, pattern, number, name)
        return Defect(name, float(u), float(v), float(size), float(angle), component=first + number)
    u, v, angle = _centre(pattern, number)
    if name != "absence":
        turn = rng.uniform(0, 2 * np.pi)
        away = max(0.035, pattern.size * rng.uniform(0.5, 1.2)) if name == "displacement" else 2 * pattern.size
        u, v = u + away * np.cos(turn), v + away * np.sin(turn)
        angle += rng.uniform(-0.8, 0.8)
    return Defect(name, float(u), float(v), pattern.size, float(angle), component=first + number)


def _between(rng: np.random.Generator, pattern: Pattern, number: int, name: str) -> tuple[int, _Point, float]:
    """Return the component, the point and the half length of a break or of a bridge to the next component."""
    columns = pattern.counts[1]
    if not pattern.is_lines:
        number = number - 1 if pattern.layout == "grid" and columns > 1 and number % columns == columns - 1 else number
        step = 1 if pattern.layout == "circle" or columns > 1 else columns
        number = min(number, pattern.count - 1 - step) if pattern.layout == "grid" else number
        a, b = _centre(pattern, number), _centre(pattern, (number + step) % pattern.count)
        angle = float(np.arctan2(b[1] - a[1], b[0] - a[0]))
        return number, ((a[0] + b[0]) / 2, (a[1] + b[1]) / 2, angle), float(np.hypot(b[0] - a[0], b[1] - a[1]) / 2)
    number = min(number, columns - 2) if name == "bridge" else number
    start, end = pattern.ends[number]
    if name == "bridge":
        start, end = max(start, pattern.ends[number + 1][0]), min(end, pattern.ends[number + 1][1])
    along = float(rng.uniform(0.85 * start + 0.15 * end, 0.15 * start + 0.85 * end))
    across = (number - (columns - 1) / 2 + 0.5 * (name == "bridge")) * pattern.pitch[0]
    if any(pattern.knots):
        across -= float(_course(pattern, np.asarray(along)))
    upright = pattern.layout == "columns"
    u, v = (across, along) if upright else (along, across)
    angle = np.pi / 2 if upright != (name == "bridge") else 0.0
    size = pattern.pitch[0] / 2 if name == "bridge" else float(rng.uniform(0.02, 0.06))
    return number, (pattern.u + u, pattern.v + v, angle), size
