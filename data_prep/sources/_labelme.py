"""Read images and defects from labelme files (labelme writes one JSON file per image).

The labels of the shapes and the flags that are set (`labelme --flags`) form the condition. By convention, a file with
neither is a `good` part; the build counts these images. Records store circles as polygons, and store rectangles and the
pixels of masks as boxes. The product is the first folder of the image's path below the root.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.faults import IMAGE_SUFFIXES
from data_prep.sources import (
    ItemPlace,
    Items,
    RowError,
    SourceConfig,
    is_text,
    join_conditions,
    locate,
    not_an_image,
    reject_link,
)
from data_prep.sources._rows import (
    Box,
    DrawnView,
    condition_of,
    drawn_view,
    means_good,
    named_condition,
    number_of,
    polygon_of,
    product_of,
    required_text,
    sounds_good,
)
from data_prep.sources._words import GOOD_FLAGS, REVIEW_FLAGS, is_doubtful, plain_word
from echo_ft.errors import EchoError
from echo_ft.files import walk
from echo_ft.images.decode import READ_ERRORS, open_image
from echo_ft.images.mask_reading import marked_pixels
from echo_ft.inputs import image_file, read_json_file, with_frame
from echo_ft.records import GOOD, Inspection, Rejection


def read_labelme(config: SourceConfig) -> Items:
    """Yield the images of all labelme files under the root, sorted by path.

    The config's `good` lists labels and flags, besides `good`, that mean a part without a defect. Raises EchoError if
    there is no file.
    """
    root = config.root
    files, outside = walk(root)
    annotations = [path for path in files if path.suffix.lower() == ".json"]
    if not annotations:
        links = f" ({outside[0].name} is a link out of it, which is not followed)" if outside else ""
        raise EchoError(
            f"there is no labelme file (.json) under {root}{links}; set annotations to a CSV, JSONL or COCO JSON file, "
            "or root to the folder with the images and their labelme files"
        )
    yield from (reject_link(root, link) for link in outside)
    used = {path.relative_to(root).as_posix() for path in annotations}
    images: defaultdict[Path, list[str]] = defaultdict(list)
    for path in files:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            images[path.with_suffix("")].append(with_frame(path.relative_to(root).as_posix(), config.frame))
    unusable: dict[str, str] = {}
    for path in annotations:
        item = path.relative_to(root).as_posix()
        claimed = beside = images[path.with_suffix("")]  # `imagePath` may name another image below
        try:
            content = _load(path)
            stated = _image(config, path, content)
            claimed = [stated]
            if beside and stated not in beside:  # in a copied file, imagePath still names the original image
                claimed = [*beside, stated]
                raise RowError(
                    f"it is next to {beside[0]}, but its imagePath is {stated}; correct its imagePath, or name the "
                    "file after the image that it annotates"
                )
            inspections = _inspections(root, stated, content, config.good)
            yield ItemPlace(stated, item, unannotated=not inspections)
            yield from inspections or [_record(root, stated, GOOD)]
            used.add(image_file(Path(stated)).as_posix())
        except RowError as error:
            for image in claimed:
                unusable[image_file(Path(image)).as_posix()] = item
                yield ItemPlace(image, item)
            yield Rejection(item, str(error))
    for path in files:
        item = path.relative_to(root).as_posix()
        if item in used or is_text(path):
            continue
        if item in unusable:
            yield Rejection(item, f"its labelme file {unusable[item]} cannot be used")
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield Rejection(item, "it has no labelme file; for a part without a defect, save one without shapes")
        else:
            yield not_an_image(item)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = read_json_file(path)
    except (OSError, ValueError) as error:
        raise RowError(f"the file cannot be read as JSON ({error}); save it again with labelme") from error
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise RowError("the file is not a labelme file: it has no list of shapes; move it elsewhere, or save it again")
    return content


def _image(config: SourceConfig, path: Path, content: Mapping[str, Any]) -> str:
    # labelme stores the path of the image relative to its own file.
    stated = required_text(content, "imagePath").replace("\\", "/")
    return locate(config.root, os.path.relpath(path.parent / stated, config.root), "image", config.frame)


def _inspections(root: Path, image: str, content: Mapping[str, Any], good: tuple[str, ...]) -> list[Inspection]:
    """Return the inspections that the shapes and the flags of an image imply.

    Raises RowError if they contradict each other.

    An empty list means that the file has no shapes and that none of its flags should be set.
    """
    view = drawn_view(root, image, (content.get("imageWidth"), content.get("imageHeight")))
    said = [_shapes(root, image, view, content, good)] if content["shapes"] else []
    flags = content.get("flags") or {}
    if not isinstance(flags, dict) or not all(isinstance(value, bool) for value in flags.values()):
        raise RowError(f"the flags {str(flags)[:60]} are not {{name: true or false}}")
    for_good = {name for name in flags if means_good(name, good) or sounds_good(name)}
    chosen = {name for name, value in flags.items() if value}
    reviewed = {name for name in chosen if plain_word(name) in REVIEW_FLAGS and not means_good(name, good)}
    if said or chosen - reviewed:
        chosen -= reviewed  # review flags describe the annotations
    if not said and not chosen and for_good:
        raise RowError(f"it has no shapes, and none of its flags ({', '.join(flags)}) is set; set the one that applies")
    if chosen:
        condition = join_conditions({_flag(name, good) for name in chosen})
        if said and (said[0].condition == GOOD) != (condition == GOOD):
            raise RowError(
                f"the condition is {condition!r} by its flags but {said[0].condition!r} by its shapes; correct one of "
                "them"
            )
        said.append(_record(root, image, condition))
    return said


def _flag(name: str, good: tuple[str, ...]) -> str:
    """Return the condition that a flag states. Raises RowError if the flag may describe the annotations instead."""
    word = plain_word(name)
    if not name.strip():
        raise RowError("a flag that is set has no name; unset or rename it")
    if word in GOOD_FLAGS or means_good(name, good):  # `ok` agrees with a file without shapes, even if not declared
        return GOOD
    if sounds_good(name) or is_doubtful(name):
        raise RowError(
            f"its flag {name!r} does not say whether the part has a defect; unset or rename it, or pass "
            f"--good {shlex.quote(name)} if it means a part without a defect"
        )
    return named_condition(name, good)


def _record(root: Path, image: str, condition: str, **marks: Any) -> Inspection:
    dataset = root.resolve().name
    product = product_of(image, dataset)
    return Inspection(
        id=image, image=image, dataset=dataset, product=product, condition=condition, group=image, **marks
    )


def _shapes(root: Path, image: str, view: DrawnView, content: Mapping[str, Any], good: tuple[str, ...]) -> Inspection:
    size = view.size
    labels, polygons, boxes = [], [], list[Box]()
    for shape in content["shapes"]:
        if not isinstance(shape, dict):
            raise RowError("a shape is not an object; save the file again with labelme")
        labels.append(required_text(shape, "label"))
        kind, points = shape.get("shape_type", "polygon"), _points(shape)
        if kind == "polygon":
            polygons.append(polygon_of(points))
        elif kind == "circle" and len(points) == 2:
            polygons.append(_circle(points[0], points[1], size))
        elif kind == "rectangle" and len(points) in (2, 4):
            xs, ys = zip(*points, strict=True)
            boxes.append((min(xs), min(ys), max(xs), max(ys)))
        elif kind == "mask" and len(points) == 2:
            boxes += _pixels(shape, points[0], size)
        else:
            raise RowError(
                f"a {kind!r} shape with {len(points)} points encloses no area; draw a polygon, rectangle or circle"
            )
    condition = condition_of(labels, good)
    if condition == GOOD:  # regions of good parts do not mark a defect
        return _record(root, image, GOOD)
    return _record(root, image, condition, boxes=view.boxes(boxes), polygons=view.polygons(polygons))


def _points(shape: Mapping[str, Any]) -> list[tuple[float, float]]:
    try:
        points = [(number_of(x), number_of(y)) for x, y in shape["points"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RowError(f"the points {str(shape.get('points'))[:60]} are not [[x, y], ...]") from error
    if not all(math.isfinite(value) for point in points for value in point):
        raise RowError(f"the points {str(points)[:60]} are not all finite numbers")
    return points


def _circle(centre: tuple[float, float], rim: tuple[float, float], size: tuple[int, int]) -> tuple[float, ...]:
    """Return a circle as a polygon that is accurate to a tenth of a pixel up to a radius of 10,000 pixels.

    Vertices beyond the image of `size` (width, height) are moved to its border. If the centre is inside the image, this
    does not change the part of the circle inside it.
    """
    radius = math.dist(centre, rim)
    if not math.isfinite(radius):
        raise RowError(f"a circle from {centre} to {rim} has no finite radius; draw it again or delete it")
    # A side is up to r (pi / count)^2 / 2 away from the circle.
    count = min(720, 8 + math.ceil(math.pi * math.sqrt(5 * radius)))
    angles = [2 * math.pi * index / count for index in range(count)]
    corners = [(centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)) for angle in angles]
    if 0 <= centre[0] <= size[0] and 0 <= centre[1] <= size[1]:
        corners = [(min(max(x, 0), size[0]), min(max(y, 0), size[1])) for x, y in corners]
    return polygon_of((round(x, 2), round(y, 2)) for x, y in corners)


def _pixels(shape: Mapping[str, Any], corner: tuple[float, float], size: tuple[int, int]) -> Iterator[Box]:
    """Yield the pixels of a `mask` shape as boxes. The mask is a base64 image with its top left corner at `corner`.

    Each box is a run of marked pixels in a row, extended over the following rows with the same run.
    """
    try:
        with open_image(io.BytesIO(base64.b64decode(str(shape.get("mask"))))) as image:
            piece = marked_pixels(image, "a shape's mask")
    except EchoError as error:
        raise RowError(str(error)) from error
    except (*READ_ERRORS, binascii.Error) as error:
        raise RowError(f"a shape's mask cannot be read ({type(error).__name__})") from error
    left, top = round(corner[0]), round(corner[1])
    height, width = piece.shape
    if left < 0 or top < 0 or top + height > size[1] or left + width > size[0]:
        raise RowError(f"a shape's mask of {width} x {height} pixels at {left}, {top} extends beyond the image")
    if not piece.any():
        raise RowError("a shape's mask marks nothing; draw it again or delete it")
    starts: dict[tuple[int, int], int] = {}
    for y, row in enumerate([*piece, np.zeros_like(piece[0])], start=top):
        edges = (left + np.flatnonzero(np.diff(row, prepend=False, append=False))).tolist()
        runs = set(zip(edges[::2], edges[1::2], strict=True))
        for run in sorted(starts.keys() - runs):
            yield run[0], starts.pop(run), run[1], y
        for run in runs - starts.keys():
            starts[run] = y
