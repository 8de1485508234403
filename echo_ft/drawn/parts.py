"""Procedurally drawn images of industrial parts with defect masks. Everything that runs offline uses them.

There are two sets, with no products or defects in common. The pretraining set trains echo-tiny: PRETRAINING_KINDS in
random styles, with PRETRAINING_DEFECTS. The demo set consists of DEMO_PRODUCTS with DEMO_DEFECTS.

Shapes are signed distances (negative inside) in part coordinates (u, v). Each axis runs from -1 to 1 across the image,
before the camera's shift, rotation and zoom. Arrays are float32 (height, width), and colours range from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from echo_ft.drawn.assemblies import part_layers
from echo_ft.drawn.camera import light_factor, part_coordinates, sensor_noise, smooth_noise
from echo_ft.drawn.painting import COLOURS, Defect, Rgb, Style, paint_defect, paint_part
from echo_ft.drawn.shapes import COMPONENTS, SHAPES, SURFACES
from echo_ft.images.masks import PLACES

_Array = NDArray[np.float32]
IMAGE_SIZE = (168, 168)
"""(height, width) in pixels. Qwen2-VL does not resize multiples of 28, so an image has exactly 36 tokens."""


@dataclass(frozen=True)
class Part:
    """One physical part. Its images differ only in the camera."""

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

    layers = part_layers(style, u, v)
    hidden = defect.component if defect else -1
    backdrop = 1 + 0.05 * smooth_noise(camera_rng, size, (5, 5))
    canvas, cover, missing = paint_part(style, layers, backdrop, u, v, pixel, grain_rng, hidden)
    painted = missing
    if defect and defect.component < 0:
        painted = paint_defect(canvas, cover, style.background, defect, u, v, pixel)

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
    return place_defect(rng, style, name, float(low * (high / low) ** rng.random()), tone)


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
    return Part(style, seed, place_defect(rng, style, condition, float(rng.uniform(low, high)), _TONES[condition]))


def place_defect(rng: np.random.Generator, style: Style, name: str, size: float, tone: str) -> Defect:
    edge = np.linspace(-0.92, 0.92, 24, dtype=np.float32)
    u, v = np.meshgrid(edge, edge)
    solid = np.zeros(u.shape, np.bool_)
    for layer in part_layers(style, u, v):
        solid = solid & (layer.distance > 0.04) if layer.shade is None else solid | (layer.distance < -0.05)
    angle = rng.uniform(0, np.pi)
    # These defects cut into the part from outside, so they start on its outline and face outwards.
    if name in ("cut", "chip"):
        outline = part_layers(style, u, v)[0].distance
        solid = np.abs(outline) < 0.06
    cell = int(rng.choice(np.flatnonzero(solid)))
    x, y = u.flat[cell], v.flat[cell]
    if name in ("cut", "chip"):
        angle = np.arctan2(y, x)
    jitter = rng.uniform(-0.03, 0.03, 2)
    return Defect(name, float(x + jitter[0]), float(y + jitter[1]), size, float(angle), tone, int(rng.integers(2**31)))


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
