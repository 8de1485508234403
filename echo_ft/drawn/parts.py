"""Procedurally drawn images of industrial parts with defect masks. Everything that runs offline uses them.

There are two sets that share no product and no defect. The pretraining set trains echo-tiny: PRETRAINING_KINDS in
random styles, with PRETRAINING_DEFECTS. The demo set consists of DEMO_PRODUCTS with DEMO_DEFECTS.

Shapes are signed distances (negative inside) in part coordinates (u, v). Each axis runs from -1 to 1 across the image,
before the camera's shift, rotation and zoom. Arrays are float32 (height, width), and colours range from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from echo_ft.drawn.camera import light_factor, part_coordinates, sensor_noise, smooth_noise, white_noise
from echo_ft.drawn.shapes import COMPONENTS, FORMS, PART_SHAPES, SHAPES, SURFACES, pixel_coverage
from echo_ft.images.masks import PLACES

_Array = NDArray[np.float32]
Rgb = tuple[float, float, float]

IMAGE_SIZE = (168, 168)
"""(height, width) in pixels. Qwen2-VL does not resize multiples of 28, so an image has exactly 36 tokens."""

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
    """Marks that belong to the product and are therefore no defects."""


@dataclass(frozen=True)
class Part:
    """One physical part. Images of it differ only in the camera."""

    style: Style
    seed: int
    defect: Defect | None = None


@dataclass(frozen=True)
class RenderedPart:
    """The image of a part and the mask of its defect."""

    image: NDArray[np.uint8]
    """RGB image (height, width, 3)."""
    mask: NDArray[np.bool_]
    """Defect mask (height, width)."""


def render_part(part: Part, camera: int, size: tuple[int, int] = IMAGE_SIZE) -> RenderedPart:
    """Render an image of a part. `camera` seeds its viewpoint, light and noise; `size` is (height, width)."""
    style, defect = part.style, part.defect
    camera_rng, grain_rng = np.random.default_rng((camera, 1)), np.random.default_rng((part.seed, 2))
    u, v, pixel = part_coordinates(size, camera_rng, surface=style.kind in SURFACES)

    cover = np.zeros(size, np.float32)
    shade = np.ones(size, np.float32)
    missing = np.zeros(size, np.float32)
    for layer in PART_SHAPES[style.kind](u, v, style.proportions):
        alpha = pixel_coverage(layer.distance, pixel)
        if defect and defect.component >= 0 and layer.component == defect.component:
            missing = np.maximum(missing, alpha)
        elif layer.shade is None:
            cover *= 1 - alpha
        else:
            cover = np.maximum(cover, alpha)
            shade += alpha * (layer.shade - shade)
    shade *= _texture(style, size, grain_rng)

    # Colour planes come first, (3, height, width), because numpy is slow if the last axis has only three entries.
    backdrop = 1 + 0.05 * smooth_noise(camera_rng, size, (5, 5))
    canvas = _planes(style.background) * (backdrop * (1 - cover))
    canvas += _planes(style.rgb) * (shade * cover)
    for mark in style.marks:
        _paint(canvas, cover, _planes(style.background), mark, u, v, pixel)
    painted = missing
    if defect and defect.component < 0:
        painted = _paint(canvas, cover, _planes(style.background), defect, u, v, pixel)

    canvas *= 255 * light_factor(size, camera_rng)
    canvas += 255 * sensor_noise(size, camera_rng)
    image = np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)
    return RenderedPart(np.ascontiguousarray(image.transpose(1, 2, 0)), painted > 0.3)


def grid_cell(mask: NDArray[np.bool_]) -> str:
    """Return the cell of the 3 x 3 grid that contains the centroid of a non-empty mask (height, width)."""
    rows, columns = np.nonzero(mask)
    row = int(3 * (rows.mean() + 0.5) / mask.shape[0])
    column = int(3 * (columns.mean() + 0.5) / mask.shape[1])
    return PLACES[3 * row + column]


def size_word(mask: NDArray[np.bool_]) -> str:
    """Return the size of a mask (height, width): `small` below 0.8% of the image, `large` from 3%, else `medium`."""
    share = float(mask.mean())
    return "small" if share < 0.008 else "medium" if share < 0.03 else "large"


def random_style(rng: np.random.Generator, kind: str | None = None, marks: bool = False) -> Style:
    """Draw a product of the pretraining set. With `marks`, it has printed marks that look like defects."""
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
    return Style(kind, colour, rgb, background, style.proportions, tuple(random_defect(rng, style, n) for n in names))


def random_defect(rng: np.random.Generator, style: Style, name: str | None = None) -> Defect:
    """Draw a defect for a product of the pretraining set."""
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
    """Make one part of the demo set. `condition` is `good` or one of DEMO_DEFECTS[product]."""
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
    for layer in PART_SHAPES[style.kind](u, v, style.proportions):
        solid = solid & (layer.distance > 0.04) if layer.shade is None else solid | (layer.distance < -0.05)
    angle = rng.uniform(0, np.pi)
    if name in ("cut", "chip"):  # they cut into the part from outside, so they start on its outline and face outwards
        outline = PART_SHAPES[style.kind](u, v, style.proportions)[0].distance
        solid = np.abs(outline) < 0.06
    cell = int(rng.choice(np.flatnonzero(solid)))
    x, y = u.flat[cell], v.flat[cell]
    if name in ("cut", "chip"):
        angle = np.arctan2(y, x)
    jitter = rng.uniform(-0.03, 0.03, 2)
    return Defect(name, float(x + jitter[0]), float(y + jitter[1]), size, float(angle), tone, int(rng.integers(2**31)))


def _planes(colour: Rgb) -> _Array:
    return np.asarray(colour, np.float32)[:, None, None]


def _texture(style: Style, size: tuple[int, int], rng: np.random.Generator) -> _Array:
    """Return a factor (height, width) on the part's colour. The style sets the kind of pattern, `rng` its details."""
    height, width = size
    if style.kind not in SURFACES:
        return 1 + 0.03 * smooth_noise(rng, size, (7, 7)) + 0.015 * white_noise(rng, size)
    depth = 0.05 + 0.09 * style.proportions[1]
    texture = 1 + 0.08 * smooth_noise(rng, size, (4, 4)) + 0.05 * white_noise(rng, size)
    if style.kind == "brushed sheet":  # parallel streaks, some of them strong
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
    if style.proportions[3] > 0.5:  # darker towards the sides, like a curved surface
        x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
        texture *= 1 - np.float32(0.9 * (style.proportions[3] - 0.5)) * np.abs(x) ** 3
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
"""The defects of the pretraining set, with the tones of each."""

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
    canvas: _Array,
    cover: _Array,
    backdrop: _Array,
    defect: Defect,
    u: _Array,
    v: _Array,
    pixel: float,
) -> _Array:
    """Paint a defect onto `canvas` (3, height, width) where the part covers it.

    Returns the share of each pixel that the defect covers, (height, width).
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
        target = backdrop
    elif defect.name in ("dent", "hole"):
        # The light comes from the top left, so the near wall is in shadow and the far wall is bright.
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
    painted[crop] = alpha
    return painted
