"""Drawn photographs of industrial parts, with a pixel mask of the defect: the ground of everything that runs offline.

Two worlds that share no product and no defect: one to pretrain echo-tiny on (`PRETRAINING_KINDS`, whose styles are
drawn at random, and `PRETRAINING_DEFECTS`), one for the demo (`DEMO_PRODUCTS`, `DEMO_DEFECTS`).

Shapes are signed distances (negative inside) over part coordinates (u, v), each axis from -1 to 1 across the
photograph before the camera's shift, rotation and zoom. Arrays are (height, width) float32; colours lie in 0..1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from echo_ft.drawn.shapes import COMPONENTS, FORMS, PART_SHAPES, SHAPES, SURFACES, _Array, coverage
from echo_ft.images.masks import PLACES

Rgb = tuple[float, float, float]

SIZE = (168, 168)
"""(height, width) in pixels: a multiple of 28, which Qwen2-VL's resizing keeps; 36 image tokens."""


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
    """A defect, or a printed mark of a product, at (u, v) in part coordinates."""

    name: str
    u: float
    v: float
    size: float
    """Radius in part coordinates."""
    angle: float
    tone: str = ""
    """`dark`, `bright`, a name in COLOURS, or empty where the defect has no tone of its own."""
    seed: int = 0
    component: int = -1


@dataclass(frozen=True)
class Style:
    """What all parts of one product have in common."""

    kind: str
    colour: str
    rgb: Rgb
    background: Rgb
    numbers: tuple[float, ...] = (0.5, 0.5, 0.5, 0.5)
    """Proportions in 0..1; what each means is the kind's own affair."""
    marks: tuple[Defect, ...] = ()
    """Marks that belong to the product, and so are no defects."""


@dataclass(frozen=True)
class Part:
    """One physical part: photographs of it share all but the camera."""

    style: Style
    seed: int
    defect: Defect | None = None


@dataclass(frozen=True)
class Photo:
    image: NDArray[np.uint8]
    """(height, width, 3)"""
    mask: NDArray[np.bool_]
    """(height, width), true on the defect"""


def photograph(part: Part, camera: int, size: tuple[int, int] = SIZE) -> Photo:
    """Photograph a part; `camera` seeds position, exposure, light and sensor noise, `size` is (height, width)."""
    style, defect = part.style, part.defect
    eye, grain = np.random.default_rng((camera, 1)), np.random.default_rng((part.seed, 2))
    u, v, pixel = _coordinates(size, eye, still=style.kind in SURFACES)

    cover = np.zeros(size, np.float32)
    shade = np.ones(size, np.float32)
    gone = np.zeros(size, np.float32)
    for layer in PART_SHAPES[style.kind](u, v, style.numbers):
        alpha = coverage(layer.distance, pixel)
        if defect and defect.component >= 0 and layer.component == defect.component:
            gone = np.maximum(gone, alpha)
        elif layer.shade is None:
            cover *= 1 - alpha
        else:
            cover = np.maximum(cover, alpha)
            shade += alpha * (layer.shade - shade)
    shade *= _texture(style, size, grain)

    # Colour planes come first, (3, height, width): numpy is slow where the last axis has three entries.
    backdrop = 1 + 0.05 * _noise(eye, size, (5, 5))
    canvas = _planes(style.background) * (backdrop * (1 - cover))
    canvas += _planes(style.rgb) * (shade * cover)
    for mark in style.marks:
        _paint(canvas, cover, _planes(style.background), mark, u, v, pixel)
    touched = gone
    if defect and defect.component < 0:
        touched = _paint(canvas, cover, _planes(style.background), defect, u, v, pixel)

    canvas *= 255 * _light(size, eye)
    canvas += 255 * _sensor_noise(size, eye)
    image = np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)
    return Photo(np.ascontiguousarray(image.transpose(1, 2, 0)), touched > 0.3)


def place(mask: NDArray[np.bool_]) -> str:
    """The cell of the 3 x 3 grid in which the centre of gravity of a mask that is not empty lies."""
    rows, columns = np.nonzero(mask)
    row = int(3 * (rows.mean() + 0.5) / mask.shape[0])
    column = int(3 * (columns.mean() + 0.5) / mask.shape[1])
    return PLACES[3 * row + column]


def extent(mask: NDArray[np.bool_]) -> str:
    """`small` below 0.8 % of the photograph, `large` from 3 %, `medium` between."""
    share = float(mask.mean())
    return "small" if share < 0.008 else "medium" if share < 0.03 else "large"


def random_style(rng: np.random.Generator, kind: str | None = None, marks: bool = False) -> Style:
    """A product of the pretraining world; with `marks`, one that has printed marks which look like defects."""
    kind = kind or str(rng.choice(PRETRAINING_KINDS))
    grey = kind in SURFACES
    colour = "grey" if grey else str(rng.choice(list(COLOURS)))
    level = rng.uniform(0.4, 1.5) if grey else rng.uniform(0.8, 1.12)
    tint = rng.normal(1, 0.0 if grey and rng.random() < 0.7 else 0.03, 3)
    rgb = _rgb(np.asarray(COLOURS[colour]) * level * tint)
    backgrounds = [rng.uniform(0.04, 0.25), rng.uniform(0.75, 0.95)]
    background = _rgb(backgrounds[int(rng.random() < 0.4 and colour != "white")] * rng.normal(1, 0.04, 3))
    style = Style(kind, colour, rgb, background, tuple(float(x) for x in rng.random(4)))
    if not marks:
        return style
    names = [str(rng.choice(["spot", "crack", "fibre", "patch"])) for _ in range(int(rng.integers(1, 3)))]
    return Style(kind, colour, rgb, background, style.numbers, tuple(random_defect(rng, style, n) for n in names))


def random_defect(rng: np.random.Generator, style: Style, name: str | None = None) -> Defect:
    """A defect of the pretraining world for a product of it."""
    name = name or str(rng.choice([d for d in PRETRAINING_DEFECTS if d != "cut" or style.kind not in SURFACES]))
    if name == "fibre":
        tone = str(rng.choice([c for c in COLOURS if c not in (style.colour, "grey", "brown")]))
    elif name in ("spot", "smear"):
        tone = str(
            rng.choice(["dark", "bright", *(c for c in ("red", "green", "blue", "yellow") if c != style.colour)])
        )
        tone = "dark" if style.kind in SURFACES and rng.random() < 0.6 else tone
    else:
        tone = str(rng.choice(PRETRAINING_DEFECTS[name]))
    low, high = _SIZES[name]
    return _place_defect(rng, style, name, float(low * (high / low) ** rng.random()), tone)


def _rgb(values: NDArray[np.floating]) -> Rgb:
    red, green, blue = np.clip(values, 0, 0.95).tolist()
    return red, green, blue


def demo_part(product: str, condition: str, seed: int) -> Part:
    """One part of the demo; `condition` is `good` or one of DEMO_DEFECTS[product]."""
    style = DEMO_PRODUCTS[product]
    if condition == "good":
        return Part(style, seed)
    rng = np.random.default_rng((seed, 3))
    if condition.startswith("missing"):
        component = int(rng.integers(COMPONENTS[style.kind]))
        return Part(style, seed, Defect(condition, 0, 0, 0, 0, component=component))
    low, high = _SIZES[condition]
    return Part(style, seed, _place_defect(rng, style, condition, float(rng.uniform(low, high)), _TONES[condition]))


def _place_defect(rng: np.random.Generator, style: Style, name: str, size: float, tone: str) -> Defect:
    edge = np.linspace(-0.92, 0.92, 24, dtype=np.float32)
    u, v = np.meshgrid(edge, edge)
    solid = np.zeros(u.shape, np.bool_)
    for layer in PART_SHAPES[style.kind](u, v, style.numbers):
        solid = solid & (layer.distance > 0.04) if layer.shade is None else solid | (layer.distance < -0.05)
    angle = rng.uniform(0, np.pi)
    if name in ("cut", "chip"):  # these bite into the part from outside: start at a cell of the outline, face outwards
        outline = PART_SHAPES[style.kind](u, v, style.numbers)[0].distance
        solid = np.abs(outline) < 0.06
    cell = int(rng.choice(np.flatnonzero(solid)))
    x, y = u.flat[cell], v.flat[cell]
    if name in ("cut", "chip"):
        angle = np.arctan2(y, x)
    jitter = rng.uniform(-0.03, 0.03, 2)
    return Defect(name, float(x + jitter[0]), float(y + jitter[1]), size, float(angle), tone, int(rng.integers(2**31)))


def _coordinates(size: tuple[int, int], rng: np.random.Generator, still: bool) -> tuple[_Array, _Array, float]:
    """Part coordinates (u, v) of every pixel under a small shift, rotation and zoom, and a pixel's width in them."""
    height, width = size
    x = np.linspace(-1 + 1 / width, 1 - 1 / width, width, dtype=np.float32)[None, :]
    y = np.linspace(-1 + 1 / height, 1 - 1 / height, height, dtype=np.float32)[:, None]
    shift, angle = rng.uniform(-0.04, 0.04, 2), rng.uniform(-0.05, 0.05)
    zoom = rng.uniform(0.97, 1.03) * (1.0 if still else 1.06)
    cos, sin = np.float32(zoom * np.cos(angle)), np.float32(zoom * np.sin(angle))
    x, y = x - np.float32(shift[0]), y - np.float32(shift[1])
    return x * cos + y * sin, y * cos - x * sin, 2 * zoom / min(size)


def _noise(rng: np.random.Generator, size: tuple[int, int], cells: tuple[int, int]) -> _Array:
    """Smooth noise of deviation one, with `cells` (rows, columns) knots."""
    knots = Image.fromarray(rng.standard_normal(cells, np.float32))
    return np.asarray(knots.resize((size[1], size[0]), Image.Resampling.BICUBIC))


_GRAIN: _Array = np.random.default_rng(0).standard_normal((4, 512, 512), np.float32)
_COLOUR_GRAIN: _Array = _GRAIN[0] + 0.5 * _GRAIN[1:]


def _fine(rng: np.random.Generator, size: tuple[int, int], table: _Array = _GRAIN[0]) -> _Array:
    """White noise of deviation one: a window into one fixed table, for speed."""
    top, left = rng.integers(0, [table.shape[-2] - size[0], table.shape[-1] - size[1]]).tolist()
    return table[..., top : top + size[0], left : left + size[1]]


def _sensor_noise(size: tuple[int, int], rng: np.random.Generator) -> _Array:
    """(3, height, width); the colours share most of it."""
    return rng.uniform(0.008, 0.03) * _fine(rng, size, _COLOUR_GRAIN)


def _planes(colour: Rgb) -> _Array:
    return np.asarray(colour, np.float32)[:, None, None]


def _light(size: tuple[int, int], rng: np.random.Generator) -> _Array:
    """Exposure, a gradient and vignetting."""
    x = np.linspace(-1, 1, size[1], dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, size[0], dtype=np.float32)[:, None]
    gx, gy = rng.uniform(-0.12, 0.12, 2).tolist()
    return rng.uniform(0.85, 1.12) * (1 + gx * x + gy * y - rng.uniform(0, 0.1) * (x * x + y * y))


def _texture(style: Style, size: tuple[int, int], rng: np.random.Generator) -> _Array:
    """Factor on the part's colour; the pattern's character is the product's, its course the part's."""
    height, width = size
    if style.kind not in SURFACES:
        return 1 + 0.03 * _noise(rng, size, (7, 7)) + 0.015 * _fine(rng, size)
    depth = 0.05 + 0.09 * style.numbers[1]
    texture = 1 + 0.08 * _noise(rng, size, (4, 4)) + 0.05 * _fine(rng, size)
    if style.kind == "brushed sheet":  # streaks along one direction, a few of them strong
        streaks = _noise(rng, size, (3, width // 2)) if style.numbers[0] < 0.75 else _noise(rng, size, (height // 2, 3))
        texture += depth * (0.7 * streaks + 0.15 * streaks**3)
    elif style.kind == "mottled sheet":
        texture += depth * (_noise(rng, size, (16, 16)) + 0.6 * _noise(rng, size, (34, 34)))
    elif style.kind == "woven sheet":
        x = np.arange(width, dtype=np.float32)[None, :] * np.float32(0.5 + style.numbers[2])
        y = np.arange(height, dtype=np.float32)[:, None] * np.float32(0.5 + style.numbers[2])
        texture += depth * 1.5 * np.sin(x) * np.sin(y)
    else:
        texture += 1.3 * depth * _fine(rng, size)
    if style.numbers[3] > 0.5:  # unevenly lit, darker towards the sides, as a curved face is
        x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
        texture *= 1 - np.float32(0.9 * (style.numbers[3] - 0.5)) * np.abs(x) ** 3
    return texture


PRETRAINING_KINDS = (*SHAPES, *SURFACES)

PRETRAINING_DEFECTS: Mapping[str, tuple[str, ...]] = {
    "spot": ("dark", "bright", *COLOURS),
    "crack": ("dark",),
    "fibre": tuple(COLOURS),
    "patch": ("dark", "bright"),
    "hole": ("dark",),
    "dent": ("",),
    "smear": ("dark", "bright", *COLOURS),
    "speckles": ("dark", "bright"),
    "cut": ("",),
}
"""Defects of the pretraining world, and the tones in which each occurs."""

DEMO_PRODUCTS: Mapping[str, Style] = {
    "flange": Style("flange", "grey", (0.56, 0.57, 0.60), (0.13, 0.14, 0.16)),
    "connector": Style("connector", "green", (0.20, 0.34, 0.26), (0.80, 0.79, 0.76)),
    "bearing": Style("bearing", "grey", (0.66, 0.64, 0.60), (0.22, 0.18, 0.15)),
}
DEMO_DEFECTS: Mapping[str, tuple[str, ...]] = {
    "flange": ("scratch", "stain", "chip", "missing bolt"),
    "connector": ("scratch", "stain", "chip", "missing pin"),
    "bearing": ("scratch", "stain", "chip", "missing ball"),
}

_SIZES = {
    "spot": (0.045, 0.2), "crack": (0.18, 0.5), "fibre": (0.2, 0.45), "patch": (0.22, 0.55), "hole": (0.045, 0.16),
    "dent": (0.14, 0.3), "smear": (0.18, 0.4), "speckles": (0.15, 0.35), "cut": (0.14, 0.3),
    "scratch": (0.25, 0.45), "stain": (0.16, 0.3), "chip": (0.16, 0.28),
}  # fmt: skip
_TONES = {"scratch": "bright", "stain": "brown", "chip": ""}


def _paint(
    canvas: _Array, cover: _Array, backdrop: _Array, defect: Defect, u: _Array, v: _Array, pixel: float
) -> _Array:
    """Paint a defect onto `canvas` (3, height, width) where the part covers it; returns its share of each pixel."""
    reach = 1.5 * defect.size + 2 * pixel
    near = (np.abs(u - np.float32(defect.u)) < reach) & (np.abs(v - np.float32(defect.v)) < reach)
    touched = np.zeros(u.shape, np.float32)
    rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
    if not len(rows):
        return touched
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
        target = backdrop
    elif defect.name in ("dent", "hole"):
        # Light from the top left: the near wall lies in shadow, the far one shines.
        slope = (x + y) / np.float32(defect.size)
        relief = 1 + np.float32(0.45) * slope if defect.name == "dent" else np.where(slope > 0.75, 1.2, 0.25)
        target = below * relief.astype(np.float32)
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
    touched[crop] = alpha
    return touched
