"""Photographs and defects of a COCO JSON, the format of CVAT, Label Studio, Roboflow and others.

An image without annotations is `good`; of the others, the names of the categories are the condition. An annotation's
outline counts (`segmentation` of polygons), its `bbox` where it has none. `product`, `group` and `split` are read from
the image where it has such fields; by default the product is the first folder of `file_name`, which is relative to the
root.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.sources import ItemPlace, Items, RowError, locate
from data_prep.sources._rows import condition_of, needed_text, polygon_of, product_of, size_of, split_of, text_of
from echo_ft.errors import EchoError
from echo_ft.records import Inspection, Rejection

LISTS = ("images", "annotations", "categories")


def read_coco(root: Path, path: Path) -> Items:
    """The images of a COCO JSON, in its order; raises EchoError where the file is another one."""
    content = _load(path)
    categories = {row["id"]: row["name"] for row in content["categories"]}
    marked: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for row in content["annotations"]:
        marked[row.get("image_id")].append(row)
    known = set()
    for number, image in enumerate(content["images"]):
        place = f"{path.name}:images[{number}]"
        try:
            if image.get("id") is None or image["id"] in known:
                raise RowError(f"its id {image.get('id')!r} is missing or that of another image")
            known.add(image["id"])
            yield from _inspection(root, path, image, marked.get(image["id"], []), categories, place)
        except RowError as error:
            yield Rejection(place, str(error))
    for identifier, rows in marked.items():
        if identifier not in known:
            reason = f"{len(rows)} are of an image with the id {identifier!r}, which is not among the images"
            yield Rejection(f"{path.name}:annotations", reason)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EchoError(f"{path} cannot be read as JSON ({error}); export it again") from error
    whole = isinstance(content, dict) and all(
        isinstance(content.get(name), list) and all(isinstance(row, dict) for row in content[name]) for name in LISTS
    )
    if not whole or not all("id" in row and isinstance(row.get("name"), str) for row in content["categories"]):
        raise EchoError(f"{path} is not COCO: it needs the lists {', '.join(LISTS)}; export it as COCO JSON")
    return dict(content)


def _inspection(
    root: Path,
    path: Path,
    image: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    categories: Mapping[Any, str],
    place: str,
) -> Items:
    name = locate(root, needed_text(image, "file_name"), "image")
    size_of(root, name, (image.get("width"), image.get("height")))
    labels, polygons, boxes = [], [], []
    for row in rows:
        if row.get("category_id") not in categories:
            raise RowError(f"{name}: there is no category {row.get('category_id')!r}")
        labels.append(categories[row["category_id"]])
        outline = row.get("segmentation")
        if outline and isinstance(outline, list):
            polygons += [_polygon(name, corners) for corners in outline]
            continue
        boxes.append(_box(name, row.get("bbox")))
        if outline:
            yield Rejection(name, f"a run-length mask of {labels[-1]} is not read; its bbox is used", "mask")
    yield ItemPlace(name, place)
    yield Inspection(
        id=name,
        image=name,
        dataset=path.stem,
        product=text_of(image, "product") or product_of(name, path.stem),
        condition=condition_of(labels),
        group=text_of(image, "group") or name,
        split=split_of(image),
        boxes=tuple(boxes),
        polygons=tuple(polygons),
    )


def _polygon(name: str, values: Any) -> tuple[float, ...]:
    try:
        numbers = [float(value) for value in values]
        return polygon_of(zip(numbers[::2], numbers[1::2], strict=True))
    except (TypeError, ValueError) as error:
        raise RowError(f"{name}: the segmentation {str(values)[:60]} is not [x, y, x, y, ...]") from error


def _box(name: str, value: Any) -> tuple[float, float, float, float]:
    try:
        x, y, width, height = map(float, value)
    except (TypeError, ValueError) as error:
        raise RowError(f"{name}: the bbox {str(value)[:60]} is not [x, y, width, height]") from error
    return x, y, x + width, y + height
