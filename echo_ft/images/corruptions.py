"""Photographs as a worse camera would have taken them: out of focus, noisy, compressed, badly lit, coarse, shaken.

Six kinds in five strengths, after ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261), whose numbers are made
for images of 224 x 224 pixels: what is a length there is a share of the photograph here (`_scale`), so that a severity
does the same to a photograph of any size once it is brought to a model's pixel budget. (Compression works on the
file's own pixels, as it does in a camera, and hurts a small photograph more.) The random draws depend on the
seed and the image's name alone: kinds and severities are compared on the same draw, and every machine makes the same
picture. The size stays, so all that is known of a photograph by its header does too.

A part's photograph is degraded, its references are not: a factory chooses them at leisure and keeps good ones.
"""

from __future__ import annotations

import hashlib
import io
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter
from scipy.signal import oaconvolve

from echo_ft.errors import EchoError

SEVERITIES = (1, 2, 3, 4, 5)

REFERENCE_SIDE = 224
"""Side in pixels of the images that ImageNet-C's numbers are made for."""

BLUR = (1.0, 2.0, 3.0, 4.0, 6.0)
"""Standard deviation of a Gaussian blur in pixels: ImageNet-C's gaussian_blur."""

NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
"""Standard deviation of Gaussian noise as a share of the range of values: ImageNet-C's gaussian_noise."""

JPEG = (25, 18, 15, 10, 7)
"""Quality of a JPEG: ImageNet-C's jpeg_compression."""

EXPOSURE = (0.5, 1.0, 1.5, 2.0, 2.5)
"""Stops by which the light is too much or too little, as drawn: in half stops, as cameras bracket. ImageNet-C's
brightness adds a constant instead, which no exposure does."""

LOW_RESOLUTION = (0.6, 0.5, 0.4, 0.3, 0.25)
"""Share of the side that is left: ImageNet-C's pixelate, enlarged again smoothly, as a resizing program does."""

MOTION = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
"""Reach and standard deviation of a shake in pixels: ImageNet-C's motion_blur, to both sides of where a point was."""

STEEPEST = 45.0
"""Degrees by which the direction of a shake leaves the horizontal at most, as in ImageNet-C."""


def corrupt(image: Image.Image, kind: str, severity: int, seed: str | int) -> Image.Image:
    """The image of mode `RGB` or `L` degraded by one of KINDS; size and mode stay.

    `seed` decides the draw. Raises EchoError for another kind or a severity that is none of SEVERITIES.
    """
    if kind not in CORRUPTIONS:
        raise EchoError(f"corruption cannot be {kind!r}; choose from {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise EchoError(f"severity cannot be {severity}; choose from {', '.join(map(str, SEVERITIES))}")
    digest = hashlib.sha256(str(seed).encode()).digest()
    return CORRUPTIONS[kind](image, severity - 1, np.random.default_rng(list(digest)))


def _scale(image: Image.Image) -> float:
    """Pixels of the image to one of ImageNet-C's, along a side."""
    return math.sqrt(image.width * image.height) / REFERENCE_SIDE


def _blur(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(BLUR[level] * _scale(image)))


def _noise(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    # In grains of a pixel of ImageNet-C's: finer noise is gone once a large photograph is made small.
    grain = max(1.0, _scale(image))
    coarse = math.ceil(image.width / grain), math.ceil(image.height / grain)
    values = np.asarray(image, np.float32).reshape(image.height, image.width, -1)
    grey = bool((values == values[:, :, :1]).all())  # a camera without colours has noise without colours
    layers = [_noise_layer(coarse, image.size, rng) for _ in range(1 if grey else values.shape[2])]
    return _image(values + 255 * NOISE[level] * np.stack(layers, axis=-1), image)


def _noise_layer(coarse: tuple[int, int], size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Noise of standard deviation 1, (height, width)."""
    layer = Image.fromarray(rng.standard_normal(coarse[::-1], dtype=np.float32))
    values = np.asarray(layer.resize(size, Image.Resampling.BICUBIC))
    return values / max(float(values.std()), 1e-6)


def _jpeg(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG[level])
    return Image.open(buffer).convert(image.mode)


def _exposure(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    gain = 2.0 ** (EXPOSURE[level] * rng.choice((-1, 1)))
    values = np.arange(256) / 255
    # sRGB's curve, IEC 61966-2-1: the light itself is what an exposure multiplies.
    light = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    light = np.minimum(light * gain, 1)
    shown = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return image.point(np.rint(shown * 255).astype(int).tolist() * len(image.getbands()))


def _low_resolution(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    share = LOW_RESOLUTION[level] / max(1.0, _scale(image))
    small = max(1, round(image.width * share)), max(1, round(image.height * share))
    return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)


def _motion(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:

    reach, deviation = (length * _scale(image) for length in MOTION[level])
    angle = math.radians(rng.uniform(-STEEPEST, STEEPEST))
    # At half pixels along the line, each shared out among the four pixels around it.
    along = np.linspace(-reach, reach, 2 * math.ceil(2 * reach) + 1)
    weights = np.exp(-0.5 * (along / deviation) ** 2)
    radius = math.ceil(reach)
    kernel = np.zeros((2 * radius + 3, 2 * radius + 3), np.float32)
    rows, columns = radius + 1 + along * math.sin(angle), radius + 1 + along * math.cos(angle)
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    for down in (0, 1):
        for right in (0, 1):
            share = np.abs(1 - down - (rows - top)) * np.abs(1 - right - (columns - left))
            np.add.at(kernel, (top + down, left + right), weights * share)
    kernel /= kernel.sum()
    values = np.asarray(image, np.float32).reshape(image.height, image.width, -1)
    values = np.pad(values, ((radius + 1,) * 2, (radius + 1,) * 2, (0, 0)), mode="symmetric")
    return _image(oaconvolve(values, kernel[:, :, None], mode="valid", axes=(0, 1)), image)


def _image(values: np.ndarray, like: Image.Image) -> Image.Image:
    """Values (height, width, bands) from 0 to 255 as an image of the mode of `like`."""
    rounded = np.rint(np.clip(values, 0, 255)).astype(np.uint8)
    return Image.fromarray(rounded.reshape(np.asarray(like).shape))


CORRUPTIONS: Mapping[str, Callable[[Image.Image, int, np.random.Generator], Image.Image]] = {
    "blur": _blur,
    "noise": _noise,
    "jpeg": _jpeg,
    "exposure": _exposure,
    "low_resolution": _low_resolution,
    "motion": _motion,
}
"""The ways in which a photograph can be degraded."""


@dataclass(frozen=True)
class Corruption:
    """How a query is degraded."""

    kind: str
    severity: int
    seed: int = 0


def draw_corruption(case: str, share: float, seed: int) -> Corruption | None:
    """One of KINDS and SEVERITIES for the query of a training case, or None, as it is in all but `share` of the cases.

    The same for the four roles, in every epoch, on every rank and after a resume.
    """
    rng = random.Random(f"{seed}/corruption/{case}")
    chosen, kind, severity = rng.random() < share, rng.choice([*CORRUPTIONS]), rng.choice(SEVERITIES)
    return Corruption(kind, severity, seed) if chosen else None
