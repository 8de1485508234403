"""A path may name one frame of an image file, and everything that reads the path then reads that frame."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.build import main as build
from data_prep.convert import is_portable
from data_prep.faults import check_image
from data_prep.sources import SourceConfig, manifest
from data_prep.truth import merge_records
from echo_ft.data.dataset import load_dataset, require_unchanged
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl
from echo_ft.images.decode import image_size, load_image
from echo_ft.images.snapshot import snapshot
from echo_ft.inputs import split_frame, with_frame
from echo_ft.provenance import content_hash
from echo_ft.records import Inspection, Reference
from evaluation.case_images import ImageStore

GREYS = (40, 120, 200)


def stack(path: Path, greys=GREYS, size=(48, 32)) -> Path:
    """An image file with a frame of each grey."""
    frames = [Image.new("RGB", size, (grey, grey, 255 - grey)) for grey in greys]
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(
        path, save_all=True, append_images=frames[1:], **({"lossless": True} if path.suffix == ".webp" else {})
    )
    return path


def test_a_path_names_the_file_and_the_frame():
    assert with_frame("a/b.tif", 2) == "a/b.tif#frame=2"
    assert with_frame("a/b.tif#frame=0", 2) == "a/b.tif#frame=0"
    assert with_frame("a/b.tif", None) == "a/b.tif"
    assert split_frame(Path("a/b.tif#frame=12")) == (Path("a/b.tif"), 12)
    for name in ("b.tif", "b.tif#frame=", "b.tif#frame=-1", "b.tif#frame=1.png", "b#frame=1/c.png", "#frame=1"):
        assert split_frame(Path("a") / name) == (Path("a") / name, None)


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp", "mpo"])
def test_every_format_with_frames_gives_the_named_one(tmp_path, suffix):
    path = stack(tmp_path / f"part.{suffix}")
    for frame, grey in enumerate(GREYS):
        named = tmp_path / f"part.{suffix}#frame={frame}"
        check = check_image(named)
        assert (check.fault, check.size) == (None, (48, 32))
        found = np.asarray(load_image(named))
        np.testing.assert_allclose(found.reshape(-1, 3), [[grey, grey, 255 - grey]] * 1536, atol=3)
    assert (
        len({content_hash(tmp_path / f"part.{suffix}#frame={frame}") for frame in range(3)} | {content_hash(path)}) == 4
    )
    beyond = check_image(tmp_path / f"part.{suffix}#frame=3").fault
    assert beyond == "the file has no frame 3; choose another, where 0 is the first"
    assert "several frames" in check_image(path).fault


def test_a_file_with_one_frame_has_only_the_frame_0(tmp_path):
    Image.new("L", (48, 32), 90).save(tmp_path / "part.png")
    assert np.asarray(load_image(tmp_path / "part.png#frame=0")).max() == 90
    with pytest.raises(EchoError, match="the file has no frame 1"):
        load_image(tmp_path / "part.png#frame=1")
    assert is_portable(tmp_path / "part.png") and not is_portable(tmp_path / "part.png#frame=0")


def test_pages_of_a_tiff_file_have_their_own_size_and_depth(tmp_path):
    import cv2

    values = np.random.default_rng(0).integers(0, 4096, (2, 32, 48, 3), dtype=np.uint16)
    assert cv2.imwritemulti(str(tmp_path / "deep.tif"), [values[0], values[1, :20]])
    second = tmp_path / "deep.tif#frame=1"
    assert image_size(second) == (48, 20)
    assert check_image(second).bits == 12
    expected = np.rint(values[1, :20, :, ::-1] * (255 / 4095))
    np.testing.assert_array_equal(np.asarray(load_image(second)), expected)


def test_an_inspection_copies_the_named_frame(tmp_path):
    stack(tmp_path / "part.tif")
    (tmp_path / "copies").mkdir()
    copy = snapshot(tmp_path / "part.tif#frame=2", tmp_path / "copies")
    assert np.asarray(load_image(copy)).max() == 200
    with pytest.raises(EchoError, match="the file has no frame 9"):
        snapshot(tmp_path / "part.tif#frame=9", tmp_path / "copies")


def rows(*names: str, product: str = "cap") -> str:
    conditions = ["good", "good", "dent"]
    return "".join(
        json.dumps({"image": name, "product": product, "condition": condition, "split": split}) + "\n"
        for name, condition, split in zip(names, conditions, ("train", "train", "test"), strict=True)
    )


def built(root: Path, *options: str) -> Path:
    where = ["--source", "manifest", "--annotations", str(root / "parts.jsonl"), "--output", str(root / "out")]
    build([*where, "--descriptor", "skimage", *options])
    return root / "out"


def test_a_build_records_the_frame_that_its_option_selects(tmp_path):
    for number in range(3):
        stack(tmp_path / f"{number}.tif", [grey + number for grey in GREYS])
    (tmp_path / "parts.jsonl").write_text(rows("0.tif", "1.tif", "2.tif"))
    data = load_dataset(built(tmp_path, "--frame", "1"))
    found = list(read_jsonl(data.folder / "inspections.jsonl", Inspection))
    assert [one.image for one in found] == [f"{number}.tif#frame=1" for number in range(3)]
    assert [one.group for one in found] == ["0.tif", "1.tif", "2.tif"]
    assert data.manifest["config"]["frame"] == 1
    references = read_jsonl(data.folder / "references.jsonl", Reference)
    assert {one.image for one in references} <= {one.image for one in found}
    require_unchanged(data, [one.image for one in found])
    store = ImageStore(tmp_path / "page.html", "page")
    store.read_from(data.root)
    assert [store.add(one.image) for one in found] == [0, 1, 2]
    assert store.finish() and all(store.embedded)
    stack(tmp_path / "2.tif", [grey + 9 for grey in GREYS])
    with pytest.raises(EchoError, match=r"1 of 3 images have changed .*2\.tif#frame=1"):
        require_unchanged(data, [one.image for one in found])


def test_rows_may_name_frames_of_one_file(tmp_path):
    stack(tmp_path / "stack.tif")
    stack(tmp_path / "part.gif")
    (tmp_path / "parts.jsonl").write_text(rows("stack.tif#frame=0", "stack.tif#frame=2", "part.gif"))
    found = list(read_jsonl(built(tmp_path, "--frame", "1") / "inspections.jsonl", Inspection))
    assert [one.image for one in found] == ["stack.tif#frame=0", "stack.tif#frame=2", "part.gif#frame=1"]
    assert [one.group for one in found] == ["stack.tif", "stack.tif", "part.gif"], "frames may show the same part"


def test_one_of_the_rows_about_a_frame_may_name_its_group(tmp_path):
    stack(tmp_path / "part.tif")
    row = {"image": "part.tif#frame=1", "product": "cap", "condition": "dent"}
    places = [row | {"boxes": [[1, 1, 9, 9]], "group": "7"}, row | {"boxes": [[20, 20, 29, 29]]}]
    (tmp_path / "parts.jsonl").write_text("".join(json.dumps(place) + "\n" for place in places))
    records = merge_records(manifest.read(SourceConfig(tmp_path, tmp_path / "parts.jsonl")))
    assert records.rejections == []
    assert [(one.group, len(one.boxes)) for one in records.inspections] == [("7", 2)]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("part.tif#frame=7", "the file has no frame 7"),
        ("part.tif#frame=-1", "does not exist under the root, and #frame= needs a number from 0"),
        ("gone.tif#frame=1", "image gone.tif does not exist under the root"),
    ],
)
def test_a_row_with_a_wrong_frame_is_rejected(tmp_path, name, reason):
    stack(tmp_path / "part.tif")
    (tmp_path / "parts.jsonl").write_text(json.dumps({"image": name, "product": "cap", "condition": "good"}))
    with pytest.raises(EchoError, match=reason):
        built(tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--frame", "-1"), "frame is -1; set a value from 0 to 999999"),
        (("--frame", "1000000"), "frame is 1000000; set a value from 0 to 999999"),
        (("--frame", "first"), "frame"),
        (("--frame", "1", "--source", "synthetic"), "frame: the source synthetic has one frame per image"),
    ],
)
def test_a_wrong_option_is_refused(tmp_path, options, reason):
    stack(tmp_path / "part.tif")
    (tmp_path / "parts.jsonl").write_text(json.dumps({"image": "part.tif", "product": "cap", "condition": "good"}))
    with pytest.raises(EchoError, match=reason):
        built(tmp_path, *options)


def test_folders_and_labelme_take_the_option_too(tmp_path):
    for number, condition in enumerate(("good", "good", "dent")):
        place = "train/good" if number == 0 else f"test/{condition}"
        stack(tmp_path / f"parts/cap/{place}/{number}.tif")
    build(["--source", "folder", "--root", str(tmp_path / "parts"), "--output", str(tmp_path / "a"), "--frame", "2",
           "--descriptor", "skimage"])  # fmt: skip
    found = [one.image for one in read_jsonl(tmp_path / "a" / "inspections.jsonl", Inspection)]
    assert sorted(found) == [
        "cap/test/dent/2.tif#frame=2",
        "cap/test/good/1.tif#frame=2",
        "cap/train/good/0.tif#frame=2",
    ]
    stack(tmp_path / "marked/a.tif")
    shape = {"label": "dent", "shape_type": "rectangle", "points": [[1, 1], [9, 9]]}
    content = {"imagePath": "a.tif", "imageWidth": 48, "imageHeight": 32, "shapes": [shape]}
    (tmp_path / "marked/a.json").write_text(json.dumps(content))
    found = manifest.read(SourceConfig(tmp_path / "marked", frame=2))
    (one,) = [item for item in found if isinstance(item, Inspection)]
    assert (one.image, one.boxes) == ("a.tif#frame=2", ((1.0, 1.0, 9.0, 9.0),))
