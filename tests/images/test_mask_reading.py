"""Every encoding of a mask marks what a viewer shows, and a mask with two readings is refused with both percentages."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageOps

from echo_ft.errors import EchoError
from echo_ft.images.decode import load_image, size_and_orientation
from echo_ft.images.mask_reading import read_mask_file
from echo_ft.images.masks import load_mask, measure
from echo_ft.records import GOOD, Inspection
from tests.support.collected import collect

SIZE = (48, 40)

DENT = np.zeros((SIZE[1], SIZE[0]), bool)
DENT[28:36, 4:14] = True
"""A defect at the bottom left, 4.2% of the image."""


def inspect(root: Path, mask: Image.Image | None, name: str = "mask.png", condition: str = "dent", **saving):
    """Return what a build's checks leave of an inspection with this mask, and the reason if something is refused."""
    if not (root / "part.png").exists():
        Image.new("L", SIZE, 90).save(root / "part.png")
    if mask is not None:
        mask.save(root / name, **saving)
    made = Inspection("part.png", "part.png", "line", "cap", condition, "part.png", None, name)
    kept, _, rejections = collect([made], root)
    return (kept[0] if kept else None), "; ".join(rejection.reason for rejection in rejections)


def greys(marks: np.ndarray, on: int = 255, off: int = 0, dtype: str = "u1") -> Image.Image:
    return Image.fromarray(np.where(marks, on, off).astype(dtype))


def palette(marks: np.ndarray, entries: tuple[int, ...], on: int = 0) -> Image.Image:
    """Return a palette image whose index `on` marks; the other index is 1 - `on`."""
    image = Image.fromarray(np.where(marks, on, 1 - on).astype(np.uint8)).convert("L")
    image.putpalette(list(entries))
    return image


def layer(marks: np.ndarray, paint: tuple[int, ...], under: tuple[int, ...], alpha: int = 255) -> Image.Image:
    """Return a transparent layer of colour `under`, painted with `paint` where `marks` is True."""
    colours = np.where(marks[..., None], paint, under).astype(np.uint8)
    return Image.fromarray(np.dstack([colours, np.where(marks, alpha, 0).astype(np.uint8)]))


RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)

ENCODINGS = {
    "grey.png": lambda m: greys(m),
    "label.png": lambda m: greys(m, 3),
    "bits.png": lambda m: greys(m).convert("1"),
    "deep.png": lambda m: greys(m, 65535, dtype="<u2"),
    "deep-label.tif": lambda m: greys(m, 1, dtype="<u2"),
    "float.tif": lambda m: greys(m, 1, dtype="<f4"),
    "colour.png": lambda m: greys(m).convert("RGB"),
    "red.bmp": lambda m: Image.fromarray(np.where(m[..., None], RED, BLACK).astype(np.uint8)),
    "cmyk.tif": lambda m: greys(m).convert("RGB").convert("CMYK"),
    "first-red.png": lambda m: palette(m, (*RED, *BLACK), 0),
    "second-red.png": lambda m: palette(m, (*BLACK, *RED), 1),
    "opaque.png": lambda m: greys(m).convert("RGBA"),
    "white-layer.png": lambda m: layer(m, WHITE, WHITE),
    "black-layer.png": lambda m: layer(m, BLACK, BLACK),
    "red-layer.png": lambda m: layer(m, RED, BLACK),
    "red-on-white-layer.png": lambda m: layer(m, RED, WHITE),
    "faint-layer.png": lambda m: layer(m, RED, BLACK, 90),
    "grey-layer.png": lambda m: layer(m, WHITE, BLACK).convert("LA"),
    "label.webp": lambda m: greys(m, 2).convert("RGB"),
    "label.gif": lambda m: palette(m, (0, 0, 0, 1, 1, 1), 1),
}


@settings(max_examples=15, deadline=None)
@given(arrays(bool, st.tuples(st.integers(2, 12), st.integers(2, 12))).filter(lambda m: m.any() and not m.all()))
def test_every_encoding_marks_the_same_pixels(tmp_path_factory, marks):
    folder = tmp_path_factory.mktemp("masks", numbered=True)
    for name, encode in ENCODINGS.items():
        encode(marks).save(folder / name, **({"lossless": True} if name.endswith(".webp") else {}))
        np.testing.assert_array_equal(read_mask_file(folder / name, name), marks, err_msg=name)


def test_place_of_a_defect_is_the_same_in_every_encoding(tmp_path):
    for name, encode in ENCODINGS.items():
        encode(DENT).save(tmp_path / name, **({"lossless": True} if name.endswith(".webp") else {}))
        made = Inspection("1", "part.png", "line", "cap", "dent", "1", None, name)
        region = measure(load_mask(made, tmp_path, SIZE))
        assert region is not None and region.place == "bottom left", name


@pytest.mark.parametrize("name", ["mask.jpg", "mask.webp", "mask.tif", "mask.avif"])
def test_lossy_files_mark_the_pixels_brighter_than_half(tmp_path, name):
    saving = {"compression": "jpeg"} if name.endswith(".tif") else {"quality": 60}
    ys, xs = np.mgrid[:256, :256]
    disc = (ys - 100) ** 2 + (xs - 60) ** 2 < 20**2
    greys(disc).convert("RGB").save(tmp_path / name, **saving)
    with Image.open(tmp_path / name) as stored:
        noisy = np.asarray(stored.convert("L")) != 0
    assert (noisy ^ disc).sum() > 0.05 * disc.sum(), "a reading of all grey pixels would mark the noise"
    assert (read_mask_file(tmp_path / name, name) ^ disc).sum() < 0.03 * disc.sum()


@pytest.mark.parametrize(
    "mask",
    [
        greys(DENT, 255, 30),
        greys(DENT, 30, 255),
        greys(DENT, 2, 1),
        greys(DENT, 65535, 4000, "<u2"),
        greys(DENT, 200, 90).convert("RGB"),
    ],
    ids=["white on grey", "grey on white", "labels 1 and 2", "16 bits", "colour"],
)
def test_ground_that_covers_the_border_need_not_be_black(tmp_path, mask):
    kept, reason = inspect(tmp_path, mask)
    assert (kept.mask, reason) == ("mask.png", "")
    np.testing.assert_array_equal(read_mask_file(tmp_path / "mask.png", "mask.png"), DENT)


def test_colours_of_16_bits_mark_even_if_their_high_byte_is_0(tmp_path):
    values = np.where(DENT[..., None], (0, 3, 0), 0).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), values)
    np.testing.assert_array_equal(read_mask_file(tmp_path / "deep.png", "deep.png"), DENT)


def test_soft_edges_count_in_full(tmp_path):
    soft = np.asarray(greys(DENT).resize((24, 20)).resize(SIZE, Image.Resampling.BICUBIC))
    Image.fromarray(soft).save(tmp_path / "soft.png")
    np.testing.assert_array_equal(read_mask_file(tmp_path / "soft.png", "soft.png"), soft > 0)


FADING = [value * value // 255 for value in range(256)]

REFUSED = {
    "black stroke on a white layer": (
        lambda: layer(DENT, BLACK, WHITE),
        "two ways: its colours mark 95.8% of the image and its opaque part 4.2%; save it as white on the defect",
    ),
    "colours below a fully transparent layer": (
        lambda: layer(DENT, WHITE, BLACK, 0),
        "its colours mark 4.2% of the image and its opaque part 0.0%",
    ),
    "colours and opaque part elsewhere": (
        lambda: Image.merge("RGBA", [greys(DENT)] * 3 + [greys(DENT[::-1])]),
        "its colours mark 4.2% of the image and its opaque part 4.2%",
    ),
    "black palette": (
        lambda: palette(DENT, (*BLACK, *BLACK), 1),
        "its colours mark 0.0% of the image and its palette indexes 4.2%",
    ),
    "palette that starts with white": (
        lambda: palette(DENT, (*WHITE, *RED), 1),
        "its colours mark 100.0% of the image and its palette indexes 4.2%",
    ),
    "inverted": (lambda: greys(~DENT), "marks 95.8% of the image and 100.0% of its border, so it seems inverted"),
    "inverted at the border": (
        lambda: greys(np.roll(~DENT, (4, -4), (0, 1))),
        "so it seems inverted: inverted, it marks 4.2%; make the defect white and everything else black",
    ),
    "inverted bits": (lambda: greys(~DENT).convert("1"), "so it seems inverted"),
    "grey ground at the border": (
        lambda: greys(np.roll(DENT, 8, 0), 255, 30),
        "its pixels that are not black mark 100.0% of the image and its pixels unlike the ground (30) 4.2%",
    ),
    "ground of two greys": (
        lambda: Image.fromarray(np.where(DENT, 255, np.arange(SIZE[0]) % 2 + 30).astype(np.uint8)),
        "its pixels that are not black mark 100.0% of the image and its pixels unlike the ground (30) 5",
    ),
    "greys that are nearly alike": (lambda: greys(DENT, 220, 200), "its pixels unlike the ground (200) 4.2%"),
    "white": (lambda: greys(np.ones_like(DENT)), "marks the whole image"),
    "heat map": (
        lambda: Image.fromarray((255 * np.linspace(0, 1, DENT.size).reshape(DENT.shape) ** 3).astype(np.uint8)),
        "is too soft: 84.2% of the image is brighter than 0 but only 20.5% is brighter than 127.5",
    ),
    "opaque heat map": (
        lambda: Image.fromarray((255 * np.exp(-np.hypot(*np.mgrid[-20:20, -24:24]) / 8)).astype(np.uint8)).convert(
            "RGBA"
        ),
        "draw it in black and white only, and save it as PNG",
    ),
    "layer that fades": (
        lambda: Image.merge("LA", [Image.new("L", SIZE, 255), Image.linear_gradient("L").resize(SIZE).point(FADING)]),
        "is too soft: 92.5% of the image is more opaque than 0 but only 30.0% is more opaque than 124.5",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mask_with_two_readings_or_an_implausible_one_is_refused(tmp_path, case):
    make, message = REFUSED[case]
    kept, reason = inspect(tmp_path, make())
    assert kept is not None and (kept.condition, kept.mask) == ("dent", None), "nobody disputes the dent"
    assert reason.startswith("mask mask.png ")
    assert message in reason
    assert reason.endswith("; the image is used without it")


def test_mask_that_does_not_fit_its_image_rejects_it(tmp_path):
    """The mask may belong to another image, and so may the condition."""
    for name, mask in {"small.png": greys(DENT[:-1]), "soft.png": REFUSED["heat map"][0]().resize((9, 9))}.items():
        kept, reason = inspect(tmp_path, mask, name)
        assert kept is None
        assert not reason.endswith("the image is used without it")
    kept, reason = inspect(tmp_path, REFUSED["heat map"][0](), condition=GOOD)
    assert kept is None and "too soft" in reason, "it may mark a defect"


def test_labels_of_single_defects_are_no_heat_map(tmp_path):
    """Label 200 marks a few pixels, and labels 1 to 16 mark nearly all others."""
    labels = np.zeros_like(DENT, dtype=np.uint8)
    for number in range(16):
        y, x = divmod(number, 8)
        labels[1 + 8 * y : 7 + 8 * y, 1 + 6 * x : 5 + 6 * x] = number + 1
    labels[30:36, 4:24] = 200
    kept, reason = inspect(tmp_path, Image.fromarray(labels))
    assert reason == ""
    assert kept is not None and kept.mask == "mask.png"


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("profile", [b"", b"a colour profile" * 9, b"odd"])
def test_webp_with_a_colour_profile_is_lossless_if_its_picture_is(tmp_path, lossless, profile):
    saving = {"lossless": lossless} | ({"icc_profile": profile} if profile else {})
    greys(DENT, 3).convert("RGB").save(tmp_path / "mask.webp", **saving)
    assert read_mask_file(tmp_path / "mask.webp", "mask.webp").any() == lossless


def test_heat_map_in_a_lossy_file_is_refused(tmp_path):
    ramp = Image.fromarray(np.tile(np.linspace(0, 140, SIZE[0]), (SIZE[1], 1)).astype(np.uint8))
    kept, reason = inspect(tmp_path, ramp, "mask.jpg", quality=95)
    assert kept is not None and kept.mask is None
    assert re.search(r"too soft: 5\d\.\d% of the image is brighter than 63 but only 0\.0% is brighter than 191", reason)


def test_labels_in_a_lossy_file_are_noise(tmp_path):
    kept, reason = inspect(tmp_path, greys(DENT, 3), "mask.jpg", quality=95)
    assert kept is not None and kept.mask is None
    assert "in a lossy format, only pixels brighter than half count; the image is used without it" in reason


def test_mask_of_several_frames_is_refused(tmp_path):
    kept, reason = inspect(
        tmp_path, greys(DENT), "mask.tif", save_all=True, append_images=[greys(DENT[::-1]), greys(~DENT)]
    )
    assert kept is not None and kept.mask is None
    assert "mask mask.tif cannot be read (the file has several frames, so it is unclear which one to use" in reason


def test_large_defect_away_from_the_border_is_used(tmp_path):
    marks = np.zeros_like(DENT)
    marks[1:-1, 1:-1] = True
    kept, reason = inspect(tmp_path, greys(marks))
    assert kept is not None and kept.mask == "mask.png"
    assert reason == ""


def test_mask_on_a_good_image_is_refused_with_its_share(tmp_path):
    kept, reason = inspect(tmp_path, greys(DENT), condition=GOOD)
    assert kept is None
    assert "marks a defect (4.2% of the image) on an image labelled good" in reason
    assert inspect(tmp_path, greys(np.zeros_like(DENT)), condition=GOOD)[1] == ""


# EXIF orientation


def rotated(mark: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = mark
    return exif


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("mark", [1, 3, 6])
def test_mask_of_an_image_that_viewers_rotate_is_refused(tmp_path, suffix, mark):
    square = Image.new("L", (40, 40), 90)
    square.save(tmp_path / f"part.{suffix}", exif=rotated(mark))
    greys(DENT[:, :40]).save(tmp_path / "mask.png")
    made = Inspection("1", f"part.{suffix}", "line", "cap", "dent", "1", None, "mask.png")
    kept, _, rejections = collect([made], tmp_path)
    if mark == 1:
        assert (kept, rejections) == ([made], [])
        return
    unmarked = dataclasses.replace(made, mask=None)
    assert kept == [unmarked]
    (rejection,) = rejections
    assert f"viewers rotate the image (EXIF orientation {mark}), and mask mask.png may be drawn" in rejection.reason
    assert collect([unmarked], tmp_path) == ([unmarked], [], []), "without annotations, the image can be used"


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("mark", [5, 6, 7, 8])
def test_size_of_a_mask_tells_on_which_view_it_was_drawn(tmp_path, suffix, mark):
    stored = Image.new("RGB", DENT.shape[::-1], "grey")
    stored.putpixel((3, 1), (255, 255, 255))
    stored.save(tmp_path / f"part.{suffix}", exif=rotated(mark))
    turned = ImageOps.exif_transpose(Image.open(tmp_path / f"part.{suffix}"))
    wanted = ImageOps.exif_transpose(with_exif(greys(DENT), rotated(mark)))
    assert turned.size == wanted.size == DENT.shape
    greys(DENT).save(tmp_path / "stored.png")
    wanted.save(tmp_path / "upright.png")
    np.testing.assert_array_equal(load_image(tmp_path / f"part.{suffix}"), turned.convert("RGB"))
    for name in ("stored.png", "upright.png"):
        made = Inspection("1", f"part.{suffix}", "line", "cap", "dent", "1", None, name)
        assert collect([made], tmp_path) == ([made], [], [])
        found = load_mask(made, tmp_path, *size_and_orientation(tmp_path / made.image))
        np.testing.assert_array_equal(found, np.asarray(wanted) > 0)


def with_exif(image: Image.Image, exif: Image.Exif) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    return Image.open(file)


def test_mask_that_viewers_rotate_is_refused(tmp_path):
    kept, reason = inspect(tmp_path, greys(DENT), exif=rotated(3))
    assert kept is not None and kept.mask is None
    assert "mask mask.png has the EXIF orientation 3, so viewers rotate it" in reason


def test_broken_exif_data_counts_as_upright(tmp_path):
    Image.new("L", SIZE, 90).save(tmp_path / "part.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    kept, reason = inspect(tmp_path, greys(DENT))
    assert kept is not None and reason == ""


def test_error_of_a_missing_mask_names_it(tmp_path):
    with pytest.raises(EchoError, match=r"mask gone\.png cannot be read \(FileNotFoundError\)"):
        read_mask_file(tmp_path / "gone.png", "gone.png")
