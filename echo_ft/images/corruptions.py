"""Image corruptions that simulate a worse camera: blur, noise, compression, bad exposure, low resolution, shake.

There are six kinds with five severities each, after ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261).
ImageNet-C defines its values for images of 224 x 224 pixels. Here, lengths scale with the image (`_scale`), so a
severity has the same effect on an image of any size after it is resized to a model's pixel budget. JPEG compression is
the exception: it works on the original pixels, as in a camera, and hurts small images more.

Random draws depend only on the seed and the image name. All kinds and severities therefore use the same draw, and the
result is the same on every machine. The image size does not change, nor does anything derived from the file header.

Only the query is corrupted. A factory selects its references carefully and keeps good ones.
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
"""Side length in pixels of the images for which ImageNet-C defines its values."""

BLUR_SIGMAS = (1.0, 2.0, 3.0, 4.0, 6.0)
"""Standard deviation of the Gaussian blur in pixels, from ImageNet-C's gaussian_blur."""

NOISE_SIGMAS = (0.08, 0.12, 0.18, 0.26, 0.38)
"""Standard deviation of the Gaussian noise as a fraction of the value range, from ImageNet-C's gaussian_noise."""

JPEG_QUALITIES = (25, 18, 15, 10, 7)
"""JPEG quality, from ImageNet-C's jpeg_compression."""

EXPOSURE_STOPS = (0.5, 1.0, 1.5, 2.0, 2.5)
"""Over- or underexposure in stops, in the half-stop steps of camera bracketing. The sign is drawn at random.

ImageNet-C's brightness adds a constant instead, unlike a change of exposure.
"""

RESOLUTION_SHARES = (0.6, 0.5, 0.4, 0.3, 0.25)
"""Scale factor of the downsampling, from ImageNet-C's pixelate. Unlike ImageNet-C's, the upsampling is smooth."""

MOTION_KERNELS = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
"""Radius and standard deviation of the motion blur in pixels, from ImageNet-C's motion_blur.

The blur here is symmetric around the original position.
"""

MAX_MOTION_ANGLE = 45.0
"""Largest angle in degrees between the motion and the horizontal, as in ImageNet-C."""


def corrupt(image: Image.Image, kind: str, severity: int, seed: str | int) -> Image.Image:
    """Corrupt an image of mode `RGB` or `L`. The size and mode stay the same.

    `kind` is a key of CORRUPTIONS, `severity` is one of SEVERITIES, and `seed` determines the random draw. Raises
    EchoError for any other kind or severity.
    """
    if kind not in CORRUPTIONS:
        raise EchoError(f"corruption cannot be {kind!r}; choose from {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise EchoError(f"severity cannot be {severity}; choose from {', '.join(map(str, SEVERITIES))}")
    digest = hashlib.sha256(str(seed).encode()).digest()
    return CORRUPTIONS[kind](image, severity - 1, np.random.default_rng(list(digest)))


def _scale(image: Image.Image) -> float:
    """Return how many pixels of the image correspond to one pixel of ImageNet-C, along one axis."""
    return math.sqrt(image.width * image.height) / REFERENCE_SIDE


def _blur(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(BLUR_SIGMAS[level] * _scale(image)))


def _noise(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    # Each grain of noise is as large as one pixel of ImageNet-C. Finer noise would vanish when a large image is
    # downscaled.
    grain = max(1.0, _scale(image))
    coarse = math.ceil(image.width / grain), math.ceil(image.height / grain)
    values = np.asarray(image, np.float32).reshape(image.height, image.width, -1)
    grey = bool((values == values[:, :, :1]).all())  # a greyscale camera has greyscale noise
    layers = [_noise_layer(coarse, image.size, rng) for _ in range(1 if grey else values.shape[2])]
    return _to_image(values + 255 * NOISE_SIGMAS[level] * np.stack(layers, axis=-1), image)


def _noise_layer(coarse: tuple[int, int], size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return noise (height, width) with standard deviation 1 from a `coarse` grid. Both sizes are (width, height)."""
    layer = Image.fromarray(rng.standard_normal(coarse[::-1], dtype=np.float32))
    values = np.asarray(layer.resize(size, Image.Resampling.BICUBIC))
    return values / max(float(values.std()), 1e-6)


def _jpeg(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITIES[level])
    return Image.open(buffer).convert(image.mode)


def _exposure(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    gain = 2.0 ** (EXPOSURE_STOPS[level] * rng.choice((-1, 1)))
    values = np.arange(256) / 255
    # Exposure multiplies linear light, so convert from and to sRGB (IEC 61966-2-1).
    light = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    light = np.minimum(light * gain, 1)
    shown = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return image.point(np.rint(shown * 255).astype(int).tolist() * len(image.getbands()))


def _low_resolution(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    share = RESOLUTION_SHARES[level] / max(1.0, _scale(image))
    small = max(1, round(image.width * share)), max(1, round(image.height * share))
    return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)


def _motion(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    reach, deviation = (length * _scale(image) for length in MOTION_KERNELS[level])
    angle = math.radians(rng.uniform(-MAX_MOTION_ANGLE, MAX_MOTION_ANGLE))
    # Sample the line every half pixel and distribute each sample over the four nearest pixels.
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
    return _to_image(oaconvolve(values, kernel[:, :, None], mode="valid", axes=(0, 1)), image)


def _to_image(values: np.ndarray, like: Image.Image) -> Image.Image:
    """Convert values (height, width, bands) from 0 to 255 to an image with the mode of `like`."""
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
"""The function for each kind of corruption, which maps (image, severity - 1, rng) to the corrupted image."""


@dataclass(frozen=True)
class Corruption:
    """The kind, severity and seed of a corrupted query."""

    kind: str
    severity: int
    seed: int = 0


def draw_corruption(case: str, share: float, seed: int) -> Corruption | None:
    """Draw a corruption for the query of a training case, or None for a clean query.

    On average, a fraction `share` of the cases is corrupted. The draw depends only on `case` and `seed`, so it is the
    same for all four roles, in every epoch, on every rank and after a resume.
    """
    rng = random.Random(f"{seed}/corruption/{case}")
    chosen, kind, severity = rng.random() < share, rng.choice([*CORRUPTIONS]), rng.choice(SEVERITIES)
    return Corruption(kind, severity, seed) if chosen else None
