"""Images of every bit depth are decoded to the same eight bits, wherever they are read."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from data_prep.faults import check_image
from data_prep.preview import load_scaled
from echo_ft.errors import EchoError
from echo_ft.images import decode, masks
from echo_ft.retrieval import descriptors
from evaluation.case_images import encode_image

SIZE = (64, 16)


def ramp(top: float, dtype: str = "<u2") -> np.ndarray:
    """Values (16, 64) that increase from 0 on the left to `top` on the right."""
    return np.tile(np.linspace(0, top, SIZE[0]).astype(dtype), (SIZE[1], 1))


def save(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("top", "bits"), [(255, 8), (1023, 10), (4095, 12), (16383, 14), (65535, 16)])
def test_gradient_of_any_bit_depth_becomes_the_8_bit_gradient(tmp_path, suffix, top, bits):
    path = save(tmp_path / f"part.{suffix}", ramp(top))
    with Image.open(path) as opened:
        assert opened.mode == "I;16"
    assert decode.bit_depth(path) == bits
    assert check_image(path).fault is None
    expected = np.rint(ramp(top) * (255 / top))
    rgb = np.asarray(decode.load_image(path))
    assert rgb.shape == (16, 64, 3)
    assert (rgb == expected[..., None]).all()
    assert (rgb.min(), rgb.max()) == (0, 255)
    assert len(np.unique(rgb)) == 64


@pytest.mark.parametrize("dtype", [">u2", "<i4", "<f4"])
def test_other_greyscale_formats_are_scaled_too(tmp_path, dtype):
    path = save(tmp_path / "part.tif", ramp(4095, dtype))
    assert np.asarray(decode.load_image(path, "L")).max() == 255
    assert decode.bit_depth(path) == 12
    floats = save(tmp_path / "unit.tif", ramp(1.0, "<f4"))
    np.testing.assert_array_equal(np.asarray(decode.load_image(floats, "L")), np.rint(ramp(1.0, "<f4") * 255))


def colours(top: int) -> np.ndarray:
    """Values (16, 64, 3) of a channel that rises to `top`, one that falls from it, and one in between."""
    rising = ramp(top)
    return np.dstack([rising, rising[:, ::-1], np.full_like(rising, top // 2)])


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("top", "bits"), [(255, 8), (1023, 10), (4095, 12), (16383, 14), (65535, 16)])
def test_colours_of_any_bit_depth_become_8_bits(tmp_path, suffix, top, bits):
    path = tmp_path / f"part.{suffix}"
    cv2.imwrite(str(path), colours(top)[..., ::-1])
    assert decode.bit_depth(path) == check_image(path).bits == bits
    expected = np.rint(colours(top) * (255 / top)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(decode.load_image(path)), expected)
    grey = np.asarray(Image.fromarray(expected).convert("L"))
    np.testing.assert_array_equal(np.asarray(decode.load_image(path, "L")), grey)


def test_opacity_and_orientation_of_16_bit_colours_are_those_of_8_bits(tmp_path):
    opacity = np.full((16, 64, 1), 7, np.uint16)
    cv2.imwrite(str(tmp_path / "clear.png"), np.dstack([colours(4095)[..., ::-1], opacity]))
    expected = np.rint(colours(4095) * (255 / 4095)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(decode.load_image(tmp_path / "clear.png")), expected)
    turned = [(274, "H", 1, 6, True)]
    tifffile.imwrite(tmp_path / "turned.tif", colours(4095), photometric="rgb", extratags=turned)
    assert decode.image_size(tmp_path / "turned.tif") == SIZE[::-1]
    np.testing.assert_array_equal(np.asarray(decode.load_image(tmp_path / "turned.tif")), np.rot90(expected, -1))


def test_16_bit_colours_that_two_libraries_read_differently_are_refused(tmp_path):
    path = tmp_path / "planes.tif"
    tifffile.imwrite(path, np.moveaxis(colours(4095), 2, 0), planarconfig="separate", photometric="rgb")
    with pytest.raises(EchoError, match="Pillow and OpenCV read its 16-bit colours differently; save it as a PNG"):
        decode.load_image(path)
    assert "read its 16-bit colours differently" in (check_image(path).fault or "")


def test_every_reader_of_images_scales_to_8_bits(tmp_path):
    """Pillow on its own would return an image that is white everywhere."""
    path, plain = save(tmp_path / "a.png", ramp(65535)), save(tmp_path / "b.png", ramp(255, "u1"))
    shown = Image.open(io.BytesIO(encode_image(path)))
    assert len(np.unique(np.asarray(shown.convert("L")))) > 32
    np.testing.assert_allclose(masks.load_grey(path, SIZE), masks.load_grey(plain, SIZE), atol=0.005)
    assert len(np.unique(np.asarray(load_scaled(path)))) > 32
    (wide, narrow), faults = descriptors.ScikitImage().vectors([path, plain])
    assert faults == [None, None]
    assert wide @ narrow > 0.999


def test_two_exposures_stay_different(tmp_path):
    bright, dark = save(tmp_path / "a.png", ramp(3800)), save(tmp_path / "b.png", ramp(1900))
    light, shade = (np.asarray(decode.load_image(path, "L")).astype(int) for path in (bright, dark))
    assert abs(light - 2 * shade).max() <= 1


@pytest.mark.parametrize("values", [ramp(70000, "<i4"), ramp(-5, "<i4"), ramp(70000, "<f4"), ramp(np.nan, "<f4")])
def test_values_beyond_every_bit_depth_are_rejected(tmp_path, values):
    path = save(tmp_path / "part.tif", values)
    assert "the same scale" in str(check_image(path).fault)
    assert check_image(path, is_mask=True).fault is None, "a mask may use any values for its regions"
    with pytest.raises(EchoError, match=r"part\.tif.*its values range from.*8 to 16 bits"):
        decode.load_image(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_dropped_and_colours_stay(tmp_path, mode):
    opaque = Image.fromarray(ramp(255, "u1"))
    clear = opaque.convert("P") if mode in ("P", "PA") else opaque.convert(mode)
    if mode == "P":
        clear.info["transparency"] = bytes([0] * 256)
    else:
        clear = clear.convert(mode)
        clear.putalpha(Image.new("L", SIZE, 0))
    suffix = "tif" if mode == "PA" else "png"
    clear.save(tmp_path / f"part.{suffix}")
    for wanted in ("RGB", "L"):
        found = decode.load_image(tmp_path / f"part.{suffix}", wanted)
        assert found.mode == wanted
        np.testing.assert_array_equal(np.asarray(found), np.asarray(opaque.convert(wanted)))


@pytest.mark.parametrize("size", [(6, 500), (500, 6), (2, 2)])
def test_narrow_jpeg_is_accepted(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "narrow.jpg")
    assert check_image(tmp_path / "narrow.jpg").fault is None


def test_errors_name_missing_and_broken_files(tmp_path):
    with pytest.raises(EchoError, match=r"there is no image .*gone\.png; restore it"):
        decode.load_image(tmp_path / "gone.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    for read in (decode.load_image, decode.image_size):
        with pytest.raises(EchoError, match=r"bad\.png cannot be read: .*; replace it"):
            read(tmp_path / "bad.png")


@pytest.mark.parametrize("kind", [b"P4", b"P5", b"P6"])
def test_comments_in_a_ppm_header_are_read_up_to_a_limit(tmp_path, kind):
    width, values = 64, {b"P4": b"", b"P5": b"255\n", b"P6": b"255\n"}[kind]
    size = {b"P4": 64 // 8, b"P5": 64, b"P6": 64 * 3}[kind] * 2000
    for length, readable in ((60, True), (5000, False)):
        (tmp_path / "a.ppm").write_bytes(kind + b"\n#" + b"c" * length + b"\n%d 2000\n" % width + values + b"#" * size)
        assert (check_image(tmp_path / "a.ppm").fault is None) == readable
