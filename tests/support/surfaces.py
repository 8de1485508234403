"""Arrays that look like images of a part or of a surface."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def disc(height: int = 150, width: int = 200, seed: int = 0, grey: bool = False) -> np.ndarray:
    """A disc with a relief on a nearly black background, (height, width, 3), with camera noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(float)
    part = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (0.4 * height) ** 2
    relief = 140 + 60 * np.sin(x / 9 + seed) * np.cos(y / 13)
    bands = [np.where(part, relief * shade, 12) for shade in ((1, 1, 1) if grey else (1, 0.8, 0.6))]
    noise = rng.normal(0, 2, (height, width, 1 if grey else 3))
    return (np.stack(bands, axis=-1) + noise).clip(0, 255).astype(np.uint8)


def texture(height: int = 128, width: int = 160, seed: int = 0) -> np.ndarray:
    """A grey surface that fills the image, (height, width, 3)."""
    rng = np.random.default_rng(seed)
    values = 128 + 40 * ndimage.gaussian_filter(rng.normal(size=(height, width)), 2) * 7
    return np.repeat(values.clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)
