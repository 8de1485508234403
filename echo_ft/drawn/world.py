"""The wider world of drawn parts, for pretraining: more kinds, more defects, and real cameras.

A product is a style with the station that takes its images. Kinds and defects are those of the pretraining set in
`echo_ft.drawn.parts`, plus assemblies and their structural defects. A defect is any difference from a reference of the
same product that camera, light and grain do not explain. The demo's products and defects do not occur.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from echo_ft.drawn.assemblies import (
    ASSEMBLY,
    STRUCTURAL_DEFECTS,
    fills_image,
    part_layers,
    plan_assembly,
    structural_defect,
    structural_names,
)
from echo_ft.drawn.camera import smooth_noise
from echo_ft.drawn.painting import COLOURS, Defect, Style, paint_defect, paint_part
from echo_ft.drawn.parts import (
    IMAGE_SIZE,
    PRETRAINING_DEFECTS,
    PRETRAINING_KINDS,
    RenderedPart,
    place_defect,
    random_defect,
    random_style,
)
from echo_ft.drawn.shapes import SURFACES
from echo_ft.drawn.stations import (
    Station,
    light_canvases,
    random_station,
    station_coordinates,
    take_image,
    visible_change,
)

WORLD_KINDS = (*PRETRAINING_KINDS, ASSEMBLY)
WORLD_DEFECTS: Mapping[str, tuple[str, ...]] = {
    **PRETRAINING_DEFECTS,
    "streak": ("dark", "bright"),
    "tint": tuple(COLOURS),
    "roughness": ("",),
    **dict.fromkeys(STRUCTURAL_DEFECTS, ("",)),
}
"""The defects of the world, with the tones of each. Those of the pretraining set come first."""
MIN_VISIBLE_PIXELS = 12
"""A defect that changes fewer pixels is not visible."""

_SIZES = {"streak": (0.12, 0.45), "tint": (0.12, 0.45), "roughness": (0.14, 0.4)}
_SMALLEST = {"spot": 0.03, "hole": 0.03, "cut": 0.06, "patch": 0.1, "dent": 0.09, "speckles": 0.1, "crack": 0.1}


@dataclass(frozen=True)
class Product:
    """A style and the station that takes its images."""

    style: Style
    station: Station


def random_product(rng: np.random.Generator) -> Product:
    """Draw a product. Half of all products are assemblies. Some carry printed marks that look like defects."""
    station = random_station(rng)
    if rng.random() < 0.5:
        style = random_style(rng, ASSEMBLY, marks=rng.random() < 0.15)
        return _binary(rng, style, station) if rng.random() < 0.2 else Product(style, station)
    kind = str(rng.choice(list(SURFACES))) if rng.random() < 0.4 else None
    return Product(random_style(rng, kind, marks=rng.random() < 0.35), station)


def _binary(rng: np.random.Generator, style: Style, station: Station) -> Product:
    """Return a product in black and white.

    Its base is medium grey, and the threshold is far from its shades. Otherwise, its grain would look like defects.
    """
    background = (0.08, 0.08, 0.08) if rng.random() < 0.5 else (0.92, 0.92, 0.92)
    shade = plan_assembly(style.proportions).patterns[0].shade
    threshold = 0.42 if (background[0] if shade is None else shade) < 1 else 0.57
    style = replace(style, rgb=(0.5, 0.5, 0.5), background=background, marks=())
    blur = float(rng.uniform(0.5, 0.9))
    return Product(style, replace(station, mode="binary", threshold=threshold, blur=blur))


def random_world_defect(rng: np.random.Generator, style: Style) -> Defect:
    """Draw a defect for a style. About half of an assembly's defects are structural."""
    names = structural_names(style)
    if names and rng.random() < 0.55:
        return structural_defect(rng, style, str(rng.choice(names)))
    if rng.random() < 0.25:
        name = str(rng.choice(list(_SIZES)))
        tones = [tone for tone in WORLD_DEFECTS[name] if tone != style.colour]
        low, high = _SIZES[name]
        size = float(low * (high / low) ** rng.random())
        return place_defect(rng, style, name, size, str(rng.choice(tones)))
    names = tuple(name for name in PRETRAINING_DEFECTS if name != "cut" or not fills_image(style))
    defect = random_defect(rng, style, str(rng.choice(names)))
    if rng.random() < 0.4:  # this mark is small, from about 5 pixels across in an image of 168 x 168
        size = max(_SMALLEST.get(defect.name, 0.1), defect.size * float(rng.uniform(0.3, 0.9)))
        return replace(defect, size=min(defect.size, size))
    return defect


def render_product(
    product: Product, part: int, exposure: int, defect: Defect | None = None, size: tuple[int, int] = IMAGE_SIZE
) -> RenderedPart:
    """Render an image of part number `part` of a product. `exposure` seeds the viewpoint, light and noise.

    The mask contains the pixels that the defect visibly changes. Changing only `defect` makes no visible change
    elsewhere.
    """
    style, station = product.style, product.station
    rng = np.random.default_rng((exposure, 12))
    u, v, pixel = station_coordinates(station, size, rng, surface=fills_image(style))
    backdrop = 1 + 0.05 * smooth_noise(rng, size, (5, 5))

    def paint(structural: Defect | None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        layers = part_layers(style, u, v, structural)
        return paint_part(style, layers, backdrop, u, v, pixel, np.random.default_rng((part, 13)))[:2]

    canvas, cover = paint(None)
    if not defect:
        lit = light_canvases(station, [canvas], rng)[0]
        return RenderedPart(take_image(station, lit, rng), np.zeros(size, np.bool_))
    if defect.name in STRUCTURAL_DEFECTS:
        changed = paint(defect)[0]
    else:
        changed = canvas.copy()
        paint_defect(changed, cover, style.background, defect, u, v, pixel)
    before, after = light_canvases(station, [canvas, changed], rng)
    return RenderedPart(take_image(station, after, rng), visible_change(station, before, after))


def render_defective(product: Product, rng: np.random.Generator) -> tuple[RenderedPart, Defect | None]:
    """Render a new part with a random visible defect.

    After four draws without a visible defect, the part stays normal and the returned defect is None.
    """
    part, exposure = rng.integers(2**31, size=2).tolist()
    for _ in range(4):
        defect = random_world_defect(rng, product.style)
        rendered = render_product(product, part, exposure, defect)
        if rendered.mask.sum() >= MIN_VISIBLE_PIXELS:
            return rendered, defect
    return render_product(product, part, exposure), None
