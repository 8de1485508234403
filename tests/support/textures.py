"""Textured images for tests of retrieval."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def draw_texture(path: Path, seed: int, spot: bool = False) -> None:
    """Write a smooth texture of 48 x 48 pixels that depends only on `seed`, optionally with a black spot."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((48, 48), Image.Resampling.BICUBIC))
    if spot:
        pixels[20:26, 20:26] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
