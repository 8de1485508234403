"""Assemblies: random boards, discs, hexagons and frames with patterns of small components or lines, for pretraining."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from echo_ft.drawn.painting import Defect, Style
from echo_ft.drawn.patterns import (
    Pattern,
    Pose,
    component_centre,
    line_course,
    pattern_layers,
    random_pattern,
    random_shade,
)
from echo_ft.drawn.shapes import PART_SHAPES, SURFACES, Layer

_Array = NDArray[np.float32]

ASSEMBLY = "assembly"
STRUCTURAL_DEFECTS = ("absence", "displacement", "extra", "break", "bridge")
"""Defects of a pattern: a component is missing, misplaced or extra, a line is cut, or neighbours are joined."""


@dataclass(frozen=True)
class Assembly:
    """The geometry of one product."""

    base: str
    """`board` (fills the image), `disc`, `plate`, `hexagon`, `cushion` or `rim`."""
    height: float
    rings: tuple[tuple[float, float, float | None], ...]
    """(radius, half width, shade) of each ring. Radius 0 is a boss."""
    patterns: tuple[Pattern, ...]


@lru_cache(maxsize=64)
def plan_assembly(proportions: tuple[float, ...]) -> Assembly:
    """Draw the geometry that a style's proportions determine."""
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
        rings.append((radius, float(rng.uniform(0.02, 0.06)), random_shade(rng)))
    if rng.random() < 0.25:
        boss = float(rng.uniform(0.15, 0.4) * min(a, b))
        rings.append((0.0, boss, None if rng.random() < 0.2 else random_shade(rng)))
    if rng.random() < 0.6:
        boxes = [(0.0, 0.0, a, b)]
    elif rng.random() < 0.5:
        boxes = [(-a / 2, 0.0, 0.45 * a, b), (a / 2, 0.0, 0.45 * a, b)]
    else:
        boxes = [(0.0, -b / 2, a, 0.45 * b), (0.0, b / 2, a, 0.45 * b)]
    return Assembly(base, height, tuple(rings), tuple(random_pattern(rng, *box) for box in boxes))


def part_layers(style: Style, u: _Array, v: _Array, defect: Defect | None = None) -> list[Layer]:
    """Return the layers of any kind of part. `defect` is the structural defect of an assembly, if it has one."""
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
            own = replace(own, component=own.component - first)
        layers += pattern_layers(pattern, u, v, own)
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
    """Draw a structural defect at a random component. `name` is one of `structural_names`."""
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
    u, v, angle = component_centre(pattern, number)
    if name != "absence":
        turn = rng.uniform(0, 2 * np.pi)
        away = max(0.035, pattern.size * rng.uniform(0.5, 1.2)) if name == "displacement" else 2 * pattern.size
        u, v = u + away * np.cos(turn), v + away * np.sin(turn)
        angle += rng.uniform(-0.8, 0.8)
    return Defect(name, float(u), float(v), pattern.size, float(angle), component=first + number)


def _between(rng: np.random.Generator, pattern: Pattern, number: int, name: str) -> tuple[int, Pose, float]:
    """Return the component, position and half length of a break, or of a bridge to the next component."""
    columns = pattern.counts[1]
    if not pattern.is_lines:
        number = number - 1 if pattern.layout == "grid" and columns > 1 and number % columns == columns - 1 else number
        step = 1 if pattern.layout == "circle" or columns > 1 else columns
        number = min(number, pattern.count - 1 - step) if pattern.layout == "grid" else number
        a, b = component_centre(pattern, number), component_centre(pattern, (number + step) % pattern.count)
        angle = float(np.arctan2(b[1] - a[1], b[0] - a[0]))
        return number, ((a[0] + b[0]) / 2, (a[1] + b[1]) / 2, angle), float(np.hypot(b[0] - a[0], b[1] - a[1]) / 2)
    number = min(number, columns - 2) if name == "bridge" else number
    start, end = pattern.ends[number]
    if name == "bridge":
        start, end = max(start, pattern.ends[number + 1][0]), min(end, pattern.ends[number + 1][1])
    along = float(rng.uniform(0.85 * start + 0.15 * end, 0.15 * start + 0.85 * end))
    across = (number - (columns - 1) / 2 + 0.5 * (name == "bridge")) * pattern.pitch[0]
    if any(pattern.knots):
        across -= float(line_course(pattern, np.asarray(along)))
    upright = pattern.layout == "columns"
    u, v = (across, along) if upright else (along, across)
    angle = np.pi / 2 if upright != (name == "bridge") else 0.0
    size = pattern.pitch[0] / 2 if name == "bridge" else float(rng.uniform(0.02, 0.06))
    return number, (pattern.u + u, pattern.v + v, angle), size
