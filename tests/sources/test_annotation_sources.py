"""The outlines and boxes of COCO and labelme files are kept in the records, and unreadable entries are reported."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.draw import disk

from data_prep.sources import SourceConfig, manifest
from echo_ft.errors import EchoError
from echo_ft.images import masks
from echo_ft.images.decode import TURNS, size_and_orientation
from echo_ft.records import Inspection
from tests.support import folder_layouts
from tests.support.collected import collect
from tests.support.folder_layouts import SIZE, draw, labelme_file, split_items, write_json

SQUARE = np.zeros((SIZE[1], SIZE[0]), bool)
SQUARE[6:10, 4:12] = True


def marks(inspection: Inspection, root: Path) -> np.ndarray:
    found = masks.load_mask(inspection, root, SIZE)
    assert found is not None
    return found


def read(root: Path, annotations: Path | None = None):
    inspections, _, rejections = split_items(manifest.read(SourceConfig(root, annotations)))
    return {i.image: i for i in inspections}, {r.item: r.reason for r in rejections}


# COCO


def test_coco_outlines_stay_polygons_and_boxes_stay_boxes(tmp_path):
    layout = folder_layouts.coco(tmp_path)
    found, _ = read(tmp_path, layout.config.annotations)
    assert found["cap/1.jpg"].polygons == (tuple(folder_layouts.SQUARE),)
    assert found["cap/1.jpg"].boxes == ()
    assert np.array_equal(marks(found["cap/1.jpg"], tmp_path), SQUARE)
    assert found["ring/2.jpg"].polygons == ()
    assert found["ring/2.jpg"].boxes == ((4.0, 6.0, 12.0, 10.0),)
    assert np.array_equal(marks(found["ring/2.jpg"], tmp_path), SQUARE)
    both = marks(found["3.jpg"], tmp_path)
    assert both[SQUARE].all()
    assert both[3, 21]
    assert not both[20, 28]
    assert [i.product for i in found.values()] == ["cap", "cap", "ring", "instances"]
    assert {i.dataset for i in found.values()} == {"instances"}


def edited(tmp_path: Path, change) -> tuple[dict, dict]:
    path = folder_layouts.coco(tmp_path).config.annotations
    content = json.loads(path.read_text())
    change(content)
    return read(tmp_path, write_json(path, content))


def test_coco_images_may_name_product_group_and_split(tmp_path):
    found, rejections = edited(
        tmp_path, lambda c: c["images"][1].update(product="washer", group="part-7", split="validation")
    )
    one = found["cap/1.jpg"]
    assert (one.product, one.group, one.split) == ("washer", "part-7", "validation")
    assert not rejections


def test_coco_reports_that_a_run_length_mask_is_replaced_by_its_box(tmp_path):
    runs = {"size": [24, 32], "counts": [10, 5, 753]}
    found, rejections = edited(tmp_path, lambda c: c["annotations"][0].update(segmentation=runs, iscrowd=1))
    assert "run-length" in rejections["cap/1.jpg"]
    assert found["cap/1.jpg"].polygons == ()
    assert found["cap/1.jpg"].boxes == ((4.0, 6.0, 12.0, 10.0),)


def test_a_coco_annotation_without_a_place_names_the_condition_only(tmp_path):
    found, rejections = edited(tmp_path, lambda c: c["annotations"][1].pop("bbox"))
    assert (found["ring/2.jpg"].condition, found["ring/2.jpg"].boxes) == ("dent", ())
    assert not rejections
    bare = {"image_id": 12, "category_id": 2}
    found, rejections = edited(tmp_path, lambda c: c["annotations"].append(bare))
    assert (found["ring/2.jpg"].condition, found["ring/2.jpg"].boxes) == ("crack+dent", ()), "no crack may look normal"
    assert "an annotation of crack has no bbox, but others mark defects" in rejections["ring/2.jpg"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"segmentation": [[40, 2, 44, 2, 40, 6], folder_layouts.SQUARE]},
            "the polygon at 40, 2 is not x0, y0, x1, y1, ... inside the 32 x 24",
        ),
        ({"segmentation": [[-9, 2, -4, 2, -6, 6]]}, "the polygon at -9, 2 is not"),
        ({"segmentation": [[-20, 10, 10, -20, -20, -20]]}, "inside the 32 x 24"),
        ({"segmentation": [[20, 2, 44, 2, 44, 6]]}, "the polygon at 20, 2 is not"),
        ({"segmentation": [[0.1, 0.2, 0.4, 0.2, 0.4, 0.3]]}, "at 0.1, 0.2 is smaller than a pixel"),
        ({"segmentation": [], "bbox": [30, 2, 8, 4]}, "box [30.0, 2.0, 38.0, 6.0] is not (x0, y0, x1, y1) inside"),
        ({"segmentation": [], "bbox": [0.3, 0.2, 0.4, 0.4]}, "smaller than a pixel"),
    ],
)
def test_image_with_an_outline_outside_of_it_is_rejected(tmp_path, change, message):
    path = folder_layouts.coco(tmp_path).config.annotations
    content = json.loads(path.read_text())
    content["annotations"][0].update(change)
    write_json(path, content)
    kept, _, (rejection,) = collect(manifest.read(SourceConfig(tmp_path, path)), tmp_path)
    assert rejection.item == "cap/1.jpg"
    assert message in rejection.reason
    assert "cap/1.jpg" not in {i.image for i in kept}


@pytest.mark.parametrize("box", [[28, 2, 4 + 1e-9, 4], [-0.4, 6, 8, 4], [4, 20, 8, 4.7]])
def test_box_rounded_over_the_border_is_kept(tmp_path, box):
    path = folder_layouts.coco(tmp_path).config.annotations
    content = json.loads(path.read_text())
    content["annotations"][0].update(segmentation=[], bbox=box)
    write_json(path, content)
    kept, _, rejections = collect(manifest.read(SourceConfig(tmp_path, path)), tmp_path)
    assert not rejections
    (one,) = (inspection for inspection in kept if inspection.image == "cap/1.jpg")
    assert marks(one, tmp_path).any()


@pytest.mark.parametrize(("mark", "used"), [(1, True), (3, False)])
def test_outlines_of_a_rotated_image_are_ambiguous_and_left_out(tmp_path, mark, used):
    path = folder_layouts.coco(tmp_path).config.annotations
    turned = Image.Exif()
    turned[0x0112] = mark
    for name in ("cap/0.jpg", "cap/1.jpg", "ring/2.jpg"):  # none, a polygon, a box
        with Image.open(tmp_path / name) as image:
            image.save(tmp_path / name, exif=turned)
    kept, _, rejections = collect(manifest.read(SourceConfig(tmp_path, path)), tmp_path)
    assert {i.image for i in kept} == {"cap/0.jpg", "cap/1.jpg", "ring/2.jpg", "3.jpg"}
    assert {i.image for i in kept if masks.is_marked(i)} == {"3.jpg"} | ({"cap/1.jpg", "ring/2.jpg"} if used else set())
    assert {(r.item, r.dropped) for r in rejections} == (
        set() if used else {("cap/1.jpg", "mask"), ("ring/2.jpg", "mask")}
    )
    assert all(f"(EXIF orientation {mark})" in r.reason for r in rejections)


@pytest.mark.parametrize("mark", [5, 6, 7, 8])
def test_stated_size_tells_on_which_view_outlines_were_drawn(tmp_path, mark):
    path = folder_layouts.coco(tmp_path).config.annotations
    turned = Image.Exif()
    turned[0x0112] = mark
    for name in ("cap/1.jpg", "ring/2.jpg"):  # a polygon, a box
        with Image.open(tmp_path / name) as image:
            image.save(tmp_path / name, exif=turned)
    kept, _, rejections = collect(manifest.read(SourceConfig(tmp_path, path)), tmp_path)
    assert not rejections
    by_image = {i.image: i for i in kept}
    wanted = np.asarray(Image.fromarray(SQUARE).transpose(TURNS[mark]))
    for name in ("cap/1.jpg", "ring/2.jpg"):
        found = masks.load_mask(by_image[name], tmp_path, *size_and_orientation(tmp_path / name))
        np.testing.assert_array_equal(found, wanted)
    content = json.loads(path.read_text())
    for image in content["images"]:
        if image["file_name"] in ("cap/1.jpg", "ring/2.jpg"):
            image["width"], image["height"] = image["height"], image["width"]
    write_json(path, content)
    kept, _, _ = collect(manifest.read(SourceConfig(tmp_path, path)), tmp_path)
    assert {i.image: i.boxes for i in kept}["ring/2.jpg"] == ((4.0, 6.0, 12.0, 10.0),), "drawn on the upright image"
    for image in content["images"]:
        image.pop("width"), image.pop("height")
    write_json(path, content)
    kept, _, rejections = collect(manifest.read(SourceConfig(tmp_path, path)), tmp_path)
    assert [r.item for r in rejections] == ["instances.json:images[1]", "instances.json:images[2]"]
    assert all("have no image size that shows which view they are for" in r.reason for r in rejections)


def test_image_with_a_box_and_an_unusable_polygon_is_rejected(tmp_path):
    path = folder_layouts.coco(tmp_path).config.annotations
    content = json.loads(path.read_text())
    content["annotations"][2].update(segmentation=[[40, 2, 44, 2, 40, 6]])
    write_json(path, content)
    kept, _, (rejection,) = collect(manifest.read(SourceConfig(tmp_path, path)), tmp_path)
    assert rejection.item == "3.jpg"
    assert "3.jpg" not in {i.image for i in kept}, "its box alone would be half of the truth"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][1].update(file_name="gone.jpg"), "gone.jpg does not exist"),
        (lambda c: c["images"][1].update(file_name="../x.jpg"), "outside the root"),
        (lambda c: c["images"][1].update(file_name=None), "file_name is missing"),
        (lambda c: c["images"][1].update(width=24, height=32), "32 x 24 pixels, but its annotations are for 24 x 32"),
        (lambda c: c["images"][1].update(split="val"), "not one of train, validation, test"),
        (lambda c: c["annotations"][0].update(category_id=9), "no category 9"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3]]), r"not [x, y"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]]), "three"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "non-numeric"),
        (lambda c: c["annotations"][0].update(segmentation=[], bbox=[1, 2]), "not [x, y, width, height]"),
        (lambda c: c["categories"][0].update(name="OK"), "must be spelled 'good'"),
        (lambda c: c["categories"][0].update(name="good"), "label only defects"),
    ],
)
def test_coco_rejects_an_unusable_image_by_its_place(tmp_path, change, message):
    found, rejections = edited(tmp_path, change)
    assert message in rejections["instances.json:images[1]"]
    assert "cap/1.jpg" not in found
    assert "cap/0.jpg" in found


def test_coco_reports_annotations_without_an_image(tmp_path):
    _, rejections = edited(tmp_path, lambda c: c["annotations"].append({"image_id": 99, "category_id": 1}))
    assert "id 99" in rejections["instances.json:annotations"]


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"images": []}', '{"images": [1], "annotations": [], "categories": []}']
)
def test_other_json_is_not_accepted_as_coco(tmp_path, content):
    (tmp_path / "parts.json").write_text(content)
    with pytest.raises(EchoError, match=r"parts\.json"):
        read(tmp_path, tmp_path / "parts.json")


# labelme


def labelled(root: Path, drawn: list, size: tuple[int, int] = SIZE, **changes) -> tuple[dict, dict]:
    draw(root / "part.png", size=size)
    write_json(root / "part.json", {**labelme_file("part.png", drawn, size), **changes})
    return read(root)


def test_labelme_shapes_stay_polygons_and_rectangles_stay_boxes(tmp_path):
    layout = folder_layouts.labelme(tmp_path / "line")
    found, _ = read(layout.config.root)
    root = layout.config.root
    assert np.array_equal(marks(found["cap/1.png"], root), SQUARE)
    assert found["cap/1.png"].boxes == ()
    assert found["cap/2.png"].polygons == ()
    assert found["cap/2.png"].boxes == ((4.0, 6.0, 12.0, 10.0),)
    both = marks(found["ring/3.png"], root)
    rows, columns = disk((12, 16), 3.5)
    assert both[SQUARE].all()
    assert both[rows, columns].all()
    assert not both[2, 28]
    assert {i.product for i in found.values()} == {"cap", "ring"}
    assert {i.dataset for i in found.values()} == {"line"}


@pytest.mark.parametrize("radius", [0, 0.4, 3, 50, 700])
def test_labelme_circles_are_round_to_a_tenth_of_a_pixel(tmp_path, radius):
    found, _ = labelled(tmp_path, [("dent", "circle", [[750, 720], [750 + radius, 720]])], (1500, 1440))
    (polygon,) = found["part.png"].polygons
    corners = np.reshape(polygon, (-1, 2)) - (750, 720)
    middles = (corners + np.roll(corners, 1, axis=0)) / 2
    assert np.allclose(np.hypot(*corners.T), radius, atol=0.01)
    assert np.all(np.hypot(*middles.T) >= radius - 0.11)


@pytest.mark.parametrize("centre", [(2, 3), (30, 22), (0, 12), (16, 24)])
def test_labelme_circles_end_at_the_border_of_the_image(tmp_path, centre):
    drawn = [("dent", "circle", [centre, (centre[0] + 8, centre[1])])]
    (one,), _, rejections = collect(labelled(tmp_path, drawn)[0].values(), tmp_path)
    assert rejections == []
    ys, xs = np.mgrid[: SIZE[1], : SIZE[0]]
    distance = np.hypot(xs - centre[0], ys - centre[1])
    found = marks(one, tmp_path)
    assert found[distance < 7].all()
    assert not found[distance > 9].any()


def mask_shape(marked: np.ndarray, picture: Image.Image | None = None) -> dict:
    """Return the labelme shape of a mask with its top left corner at (4, 6), stored as `picture` if that is given."""
    buffer = io.BytesIO()
    (picture or Image.fromarray(marked.astype(np.uint8) * 255)).save(buffer, "PNG")
    height, width = marked.shape
    shape = {"label": "dent", "shape_type": "mask", "points": [[4, 6], [3 + width, 5 + height]]}
    return {**shape, "mask": base64.b64encode(buffer.getvalue()).decode()}


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98, 1.0])
def test_labelme_masks_are_placed_to_the_pixel(tmp_path, share):
    piece = np.random.default_rng(0).uniform(size=(9, 14)) < share
    found, rejections = labelled(tmp_path, [], shapes=[mask_shape(piece)])
    wanted = np.zeros_like(SQUARE)
    wanted[6:15, 4:18] = piece
    assert not rejections
    assert np.array_equal(marks(found["part.png"], tmp_path), wanted)
    assert share < 1 or found["part.png"].boxes == ((4, 6, 18, 15),), "equal rows form one box"


def test_labelme_masks_are_read_as_pictures_too(tmp_path):
    piece = np.random.default_rng(0).uniform(size=(9, 14)) < 0.5
    wanted = np.zeros_like(SQUARE)
    wanted[6:15, 4:18] = piece
    red_first = Image.fromarray((~piece).astype(np.uint8))
    red_first.putpalette([255, 0, 0, 0, 0, 0])
    opaque = Image.fromarray(piece.astype(np.uint8) * 255)
    layer = Image.merge("LA", [Image.new("L", opaque.size, 255), opaque])
    for number, picture in enumerate((red_first, layer)):
        found, rejections = labelled(tmp_path / str(number), [], shapes=[mask_shape(piece, picture)])
        assert not rejections
        assert np.array_equal(marks(found["part.png"], tmp_path), wanted)
    unclear = Image.merge("LA", [Image.fromarray((~piece).astype(np.uint8) * 255), opaque])
    _, rejections = labelled(tmp_path / "unclear", [], shapes=[mask_shape(piece, unclear)])
    assert "a shape's mask can be read in two ways" in rejections["part.json"]


def test_unusable_labelme_masks_are_reported(tmp_path):
    shape = mask_shape(np.ones((4, 8), bool))
    empty = mask_shape(np.zeros((4, 8), bool))
    for change in ({"points": [[28, 6], [35, 9]]}, {"mask": "no image"}, {"mask": None}, {"mask": empty["mask"]}):
        found, rejections = labelled(tmp_path, [], shapes=[{**shape, **change}])
        assert not found
        assert "mask" in rejections["part.json"]


@pytest.mark.parametrize(
    ("shapes", "changes", "message"),
    [
        ([("dent", "line", [[1, 1], [5, 5]])], {}, "a 'line' shape with 2 points encloses no area"),
        ([("dent", "point", [[1, 1]])], {}, "'point'"),
        ([("dent", "polygon", [[1, 1], [5, 5]])], {}, "three"),
        ([("dent", "polygon", [[1], [5, 5]])], {}, "not [[x, y]"),
        ([("dent", "circle", [[1, 1], [5, float("inf")]])], {}, "not all finite numbers"),
        ([("OK", "rectangle", [[1, 1], [5, 5]])], {}, "must be spelled 'good'"),
        ([("", "rectangle", [[1, 1], [5, 5]])], {}, "label is missing"),
        ([], {"imagePath": "gone.png"}, "gone.png does not exist"),
        ([], {"imagePath": "../../etc/passwd"}, "outside the root"),
        ([], {"imageWidth": 24, "imageHeight": 32}, "its annotations are for 24 x 32"),
        ([], {"shapes": None}, "not a labelme file"),
    ],
)
def test_unusable_labelme_files_are_rejected(tmp_path, shapes, changes, message):
    found, rejections = labelled(tmp_path, shapes, **changes)
    assert not found
    assert message in rejections["part.json"]
    assert "part.png" in rejections, "its image is not used either"


def test_image_without_a_labelme_file_is_not_assumed_good(tmp_path):
    draw(tmp_path / "other.png")
    found, rejections = labelled(tmp_path, [])
    assert found["part.png"].condition == "good"
    assert "no labelme file" in rejections["other.png"]


@pytest.mark.parametrize("own_file", [False, True])
def test_a_labelme_file_beside_one_image_that_names_another_rejects_both(tmp_path, own_file):
    square = [("dent", "rectangle", [[4, 6], [12, 10]])]
    draw(tmp_path / "a.png"), draw(tmp_path / "b.PNG"), draw(tmp_path / "c.png")
    write_json(tmp_path / "b.json", labelme_file("a.png", square))  # a copy whose imagePath was not changed
    write_json(tmp_path / "c.json", labelme_file("c.png", []))
    if own_file:
        write_json(tmp_path / "a.json", labelme_file("a.png", square))
    kept, _, rejections = collect(manifest.read(SourceConfig(tmp_path)), tmp_path)
    reasons = {one.item: one.reason for one in rejections}
    assert [one.image for one in kept] == ["c.png"]
    assert set(reasons) == {"a.png", "b.PNG", "b.json"}
    assert "it is next to b.PNG, but its imagePath is a.png; correct its imagePath" in reasons["b.json"]


def test_manifest_without_any_annotations_is_an_error(tmp_path):
    draw(tmp_path / "part.png")
    with pytest.raises(EchoError, match="no labelme file"):
        read(tmp_path)
    with pytest.raises(EchoError, match=r"parts\.csv is not a file"):
        read(tmp_path, tmp_path / "parts.csv")
