"""The embedded default: photographs of three drawn products, half of them with a defect.

`read` draws into `config.root`: `images/<product>/<part>_<exposure>.png`, and a mask of the same name under `masks/`
where the part is defective. Every fourth part is photographed twice, under another exposure. A part looks the same
however many parts are drawn.
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

LEAST_PARTS = 8
"""Below this, a product would lack one of its four defects."""
_VISIBLE = 12
"""Pixels of a mask from which a defect counts as visible."""


def read(config: SourceConfig) -> Items:
    """The demo's inspections, each drawn before it is yielded.

    Raises EchoError where `config.parts` is too small or `config.root` cannot be written.
    """
    if config.parts < LEAST_PARTS:
        raise EchoError(f"parts is {config.parts}; synthetic needs at least {LEAST_PARTS} parts of each product")
    for inspection in _plan(config):
        photo = _photograph(inspection, config.seed)
        _save(config.root / inspection.image, photo.image)
        if inspection.mask:
            _save(config.root / inspection.mask, photo.mask.astype(np.uint8) * 255)
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


def _photograph(inspection: Inspection, seed: int) -> parts.Photo:
    products = list(parts.DEMO_DEFECTS)
    part, exposure = inspection.id.rsplit("/", 1)[1].split("_")
    rng = np.random.default_rng((seed, products.index(inspection.product), int(part)))
    while True:
        part_seed, *cameras = rng.integers(2**31, size=3).tolist()
        made = parts.demo_part(inspection.product, inspection.condition, part_seed)
        photos = [parts.photograph(made, camera) for camera in cameras]
        # The choice must not depend on the exposure, or two photographs of a part would show different parts.
        if inspection.condition == GOOD or all(photo.mask.sum() >= _VISIBLE for photo in photos):
            return photos[int(exposure) - 1]


def _save(path: Path, pixels: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, compress_level=1)
    except OSError as error:
        raise EchoError(f"cannot draw {path} ({error.strerror or error}); choose a root that can be written") from error
