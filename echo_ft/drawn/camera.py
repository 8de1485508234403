"""The simulated camera of `echo_ft.drawn.parts`: viewpoint, light and noise.

Arrays are float32 (height, width) unless stated otherwise, and sizes are (height, width) in pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_Array = NDArray[np.float32]


def part_coordinates(
    size: tuple[int, int], rng: np.random.Generator, surface: bool, play: float = 1.0
) -> tuple[_Array, _Array, float]:
    """Return the part coordinates u and v of every pixel, each (height, width), and the width of a pixel.

    The camera adds a small shift, rotation and zoom, all proportional to `play`. In an image of 168 x 168, a play of 1
    moves the centre by up to 3 pixels per axis and a corner by up to 12. A `surface` fills the image and gets less
    zoom.
    """
    height, width = size
    x = np.linspace(-1 + 1 / width, 1 - 1 / width, width, dtype=np.float32)[None, :]
    y = np.linspace(-1 + 1 / height, 1 - 1 / height, height, dtype=np.float32)[:, None]
    shift, angle = rng.uniform(-0.04 * play, 0.04 * play, 2), rng.uniform(-0.05 * play, 0.05 * play)
    zoom = rng.uniform(1 - 0.03 * play, 1 + 0.03 * play) * (1.0 if surface else 1.06)
    cos, sin = np.float32(zoom * np.cos(angle)), np.float32(zoom * np.sin(angle))
    x, y = x - np.float32(shift[0]), y - np.float32(shift[1])
    return x * cos + y * sin, y * cos - x * sin, 2 * zoom / min(size)


def smooth_noise(rng: np.random.Generator, size: tuple[int, int], cells: tuple[int, int]) -> _Array:
    """Return smooth noise with a standard deviation of 1, interpolated from a grid of `cells` (rows, columns)."""
    knots = Image.fromarray(rng.standard_normal(cells, np.float32))
    return np.asarray(knots.resize((size[1], size[0]), Image.Resampling.BICUBIC))


_GRAIN: _Array = np.random.default_rng(0).standard_normal((4, 512, 512), np.float32)
COLOUR_GRAIN: _Array = _GRAIN[0] + 0.5 * _GRAIN[1:]
"""A table of noise (3, 512, 512) for `white_noise`, mostly the same in all colour channels."""


def white_noise(rng: np.random.Generator, size: tuple[int, int], table: _Array = _GRAIN[0]) -> _Array:
    """Return white noise with a standard deviation of 1. For speed, it is a random window from a fixed table."""
    top, left = rng.integers(0, [table.shape[-2] - size[0], table.shape[-1] - size[1]]).tolist()
    return table[..., top : top + size[0], left : left + size[1]]


def sensor_noise(size: tuple[int, int], rng: np.random.Generator) -> _Array:
    """Return sensor noise (3, height, width), mostly the same in all colour channels."""
    return rng.uniform(0.008, 0.03) * white_noise(rng, size, COLOUR_GRAIN)


def light_factor(size: tuple[int, int], rng: np.random.Generator) -> _Array:
    """Return a brightness factor (height, width) that combines exposure, a gradient and vignetting."""
    x = np.linspace(-1, 1, size[1], dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, size[0], dtype=np.float32)[:, None]
    gx, gy = rng.uniform(-0.12, 0.12, 2).tolist()
    return rng.uniform(0.85, 1.12) * (1 + gx * x + gy * y - rng.uniform(0, 0.1) * (x * x + y * y))
