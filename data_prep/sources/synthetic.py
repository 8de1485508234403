"""The built-in demo dataset: images of three drawn products. Half of the parts have a defect.

`read` draws `images/<product>/<part>_<exposure>.png` in `config.root`, and for a defective part also a mask with the
same name under `masks/`. Every fourth part has two images with different exposures. The appearance of a part does not
depend on the number of parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.sources import Items, SourceConfig
from echo_ft.drawn import parts
from echo_ft.errors import EchoError
from echo_ft.records import GOOD, Inspection

MIN_PARTS = 8
"""With fewer parts, a product would lack one of its four defects."""
_MIN_VISIBLE_PIXELS = 12
"""Smallest mask of a visible defect, in pixels."""


def read(config: SourceConfig) -> Items:
    """Draw and yield the demo's inspections.

    Raises EchoError if `config.parts` is too small or `config.root` is not writable.
    """
    if config.parts < MIN_PARTS:
        raise EchoError(f"parts is {config.parts}; synthetic needs at least {MIN_PARTS} parts per product")
    for inspection in _plan(config):
        render = _render(inspection, config.seed)
        _save(config.root / inspection.image, render.image)
        if inspection.mask:
            _save(config.root / inspection.mask, render.mask.astype(np.uint8) * 255)
        yield inspection


def _plan(config: SourceConfig) -> Iterator[Inspection]:
    for product, defects in parts.DEMO_DEFECTS.items():
        for number in range(config.parts):
            condition = GOOD if number % 2 == 0 else defects[number // 2 % len(defects)]
            for exposure in (1, 2) if number % 8 in (2, 5) else (1,):
                name = f"{product}/{number:04d}_{exposure}.png"
                yield Inspection(
                    id=f"{product}/{number:04d}_{exposure}",
                    image=f"images/{name}",
                    dataset="synthetic",
                    product=product,
                    condition=condition,
                    group=f"{product}/{number:04d}",
                    mask=None if condition == GOOD else f"masks/{name}",
                )


def _render(inspection: Inspection, seed: int) -> parts.RenderedPart:
    products = list(parts.DEMO_DEFECTS)
    part, exposure = inspection.id.rsplit("/", 1)[1].split("_")
    rng = np.random.default_rng((seed, products.index(inspection.product), int(part)))
    while True:
        part_seed, *cameras = rng.integers(2**31, size=3).tolist()
        made = parts.demo_part(inspection.product, inspection.condition, part_seed)
        renders = [parts.render_part(made, camera) for camera in cameras]
        # The choice must not depend on the exposure. Otherwise, two images of one part would show different parts.
        if inspection.condition == GOOD or all(render.mask.sum() >= _MIN_VISIBLE_PIXELS for render in renders):
            return renders[int(exposure) - 1]


def _save(path: Path, pixels: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, compress_level=1)
    except OSError as error:
        raise EchoError(f"cannot draw {path} ({error.strerror or error}); choose a writable root") from error
