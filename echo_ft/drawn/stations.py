"""Inspection stations: the camera, lens, light and file format that all images of one product share.

A station lights a canvas from `echo_ft.drawn.painting`, which is float32 (3, height, width) with colours from 0 to 1.
It then photographs the canvas as a uint8 image (height, width, 3).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from echo_ft.drawn.camera import COLOUR_GRAIN, light_factor, part_coordinates, white_noise

_Array = NDArray[np.float32]
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Station:
    """How the images of one product are taken. Seeds differ from image to image, but the station stays the same."""

    seed: int
    """Seeds the fixed pattern of the sensor."""
    mode: str
    """`colour`, `grey` or `binary` (black and white)."""
    threshold: float
    """Grey level that separates black from white in a binary image."""
    play: float
    """Size of the shift, rotation and zoom between two images; see `part_coordinates`."""
    tilt: tuple[float, float]
    """Perspective: relative change of scale from the centre to the edges, along u and v."""
    read_noise: float
    """Standard deviation of the noise in the dark. Colours range from 0 to 1."""
    shot_noise: float
    """Standard deviation of the photon-counting noise of a white pixel."""
    fixed_noise: float
    """Standard deviation of the sensor's fixed-pattern noise: pixels and columns differ in gain."""
    vignette: float
    """Loss of light in the corners, in addition to the vignetting of every camera."""
    glare: float
    """Brightness of a soft reflection whose position differs from image to image; 0 for none."""
    blur: float
    """Standard deviation of the lens blur in pixels; 0 for none."""
    quality: int
    """JPEG quality; 0 for no compression."""


def random_station(rng: np.random.Generator) -> Station:
    """Draw a station for images in colour or grey."""
    fixture = rng.random() < 0.5  # a fixture holds the part within about a pixel
    return Station(
        seed=int(rng.integers(2**31)),
        mode="grey" if rng.random() < 0.25 else "colour",
        threshold=0.0,
        play=float(rng.uniform(0.05, 0.3) if fixture else rng.uniform(0.4, 1.0)),
        tilt=(0.0, 0.0) if rng.random() < 0.6 else (float(rng.uniform(-0.06, 0.06)), float(rng.uniform(-0.06, 0.06))),
        read_noise=float(rng.uniform(0.003, 0.012)),
        shot_noise=float(rng.uniform(0.004, 0.03)),
        fixed_noise=float(rng.uniform(0.004, 0.02) if rng.random() < 0.4 else 0),
        vignette=float(rng.uniform(0.05, 0.25) if rng.random() < 0.25 else 0),
        glare=float(rng.uniform(0.08, 0.22) if rng.random() < 0.15 else 0),
        blur=float(rng.uniform(0.4, 1.0) if rng.random() < 0.3 else 0),
        quality=int(rng.integers(45, 93)) if rng.random() < 0.3 else 0,
    )


def station_coordinates(
    station: Station, size: tuple[int, int], rng: np.random.Generator, surface: bool
) -> tuple[_Array, _Array, float]:
    """Return the part coordinates of every pixel and the width of a pixel, as `part_coordinates` does."""
    u, v, pixel = part_coordinates(size, rng, surface, station.play)
    if any(station.tilt):
        depth: _Array = np.float32(1) + np.float32(station.tilt[0]) * u + np.float32(station.tilt[1]) * v
        u, v = u / depth, v / depth
    return u, v, pixel


def light_canvases(station: Station, canvases: Sequence[_Array], rng: np.random.Generator) -> list[_Array]:
    """Light all canvases as if they were one image, and clip them to 0 to 1. The first canvas sets the exposure.

    Binary images are taken in even light, so their canvases are only clipped.
    """
    if station.mode == "binary":
        return [np.clip(canvas, 0, 1) for canvas in canvases]
    size = canvases[0].shape[1:]
    brightest = float(np.percentile(canvases[0][:, ::6, ::6].max(0), 97))
    light = light_factor(size, rng) * np.float32(min(1, 0.85 / max(brightest, 0.01)))
    if not (station.vignette or station.glare):
        return [np.clip(canvas * light, 0, 1) for canvas in canvases]
    x = np.linspace(-1, 1, size[1], dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, size[0], dtype=np.float32)[:, None]
    light *= 1 - np.float32(station.vignette / 2) * (x * x + y * y)
    a, b, width = rng.uniform(-0.8, 0.8, 3).astype(np.float32)
    width = np.float32(0.6) + width / 4
    glare = np.float32(station.glare) * np.exp(-((x - a) ** 2) / width**2) * np.exp(-((y - b) ** 2) / width**2)
    return [np.clip(canvas * light + glare, 0, 1) for canvas in canvases]


def visible_change(station: Station, before: _Array, after: _Array) -> NDArray[np.bool_]:
    """Return the pixels (height, width) that look different to a person in images of two canvases in the same light.

    A change must exceed 6% of the range plus the noise of a medium grey. Without colour, only changes in grey count.
    """
    if station.mode == "binary":
        return (_grey(before) > station.threshold) != (_grey(after) > station.threshold)
    change = np.abs(_grey(after - before)) if station.mode == "grey" else np.abs(after - before).max(0)
    return change > 0.06 + station.read_noise + station.shot_noise / 2


def take_image(station: Station, canvas: _Array, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Simulate photographing a lit canvas: add sensor noise, then blur and compress it."""
    size = canvas.shape[1:]
    if station.mode == "binary":
        plane = _grey(canvas) - np.float32(station.threshold) + 0.02 * white_noise(rng, size)
        return _develop(station, plane[None] + np.float32(0.5))
    grain = white_noise(rng, size, COLOUR_GRAIN) * np.float32(0.85)
    if station.mode == "grey":
        canvas, grain = _grey(canvas)[None], grain[:1]
    noise = (np.float32(station.read_noise) + np.float32(station.shot_noise) * np.sqrt(canvas)) * grain
    if station.fixed_noise:
        fixed = white_noise(np.random.default_rng(station.seed), size)
        noise += canvas * (np.float32(station.fixed_noise) * (fixed + fixed[:1]))
    return _develop(station, canvas + noise)


def _grey(canvas: _Array) -> _Array:
    return np.tensordot(_LUMA, canvas, 1)


def _develop(station: Station, canvas: _Array) -> NDArray[np.uint8]:
    """Blur and compress a canvas of 1 or 3 planes. For speed, the lens blur is applied after the noise."""
    pixels = np.clip(255 * canvas, 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    if station.blur:
        image = image.filter(ImageFilter.GaussianBlur(station.blur))
    if station.mode == "binary":
        image = image.point([255 * (level > 127) for level in range(256)])
    if station.quality:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=station.quality)
        image = Image.open(buffer)
    return np.asarray(image.convert("RGB"))
