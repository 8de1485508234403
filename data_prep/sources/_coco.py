"""Read images and defects from COCO JSON, the format of CVAT, Label Studio, Roboflow and others.

An image without annotations is `good`; otherwise the category names form the condition. The outline of an annotation
counts (`segmentation` as polygons), or its `bbox` if it has none. `product`, `group` and `split` are read from the
image if it has these fields. By default, the product is the first folder of `file_name`, which is relative to the root.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.sources import ItemPlace, Items, RowError, locate
from data_prep.sources._rows import condition_of, polygon_of, product_of, required_text, size_of, split_of, text_of
from echo_ft.errors import EchoError
from echo_ft.records import Inspection, Rejection

REQUIRED_LISTS = ("images", "annotations", "categories")


def read_coco(root: Path, path: Path) -> Items:
    """Yield the images of a COCO JSON file in its order. Raises EchoError if the file has another format."""
    content = _load(path)
    categories = {row["id"]: row["name"] for row in content["categories"]}
    rows_by_image: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for row in content["annotations"]:
        rows_by_image[row.get("image_id")].append(row)
    known = set()
    for number, image in enumerate(content["images"]):
        place = f"{path.name}:images[{number}]"
        try:
            if image.get("id") is None or image["id"] in known:
                raise RowError(f"its id {image.get('id')!r} is missing or already used by another image")
            known.add(image["id"])
            yield from _inspection(root, path, image, rows_by_image.get(image["id"], []), categories, place)
        except RowError as error:
            yield Rejection(place, str(error))
    for identifier, rows in rows_by_image.items():
        if identifier not in known:
            reason = f"annotations ignored ({len(rows)}): no image has the id {identifier!r}"
            yield Rejection(f"{path.name}:annotations", reason)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EchoError(f"{path} cannot be read as JSON ({error}); export it again") from error
    valid = isinstance(content, dict) and all(
        isinstance(content.get(name), list) and all(isinstance(row, dict) for row in content[name])
        for name in REQUIRED_LISTS
    )
    if not valid or not all("id" in row and isinstance(row.get("name"), str) for row in content["categories"]):
        raise EchoError(
            f"{path} is not a COCO file: it needs the lists {', '.join(REQUIRED_LISTS)}; export it as COCO JSON"
        )
    return dict(content)


def _inspection(
    root: Path,
    path: Path,
    image: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    categories: Mapping[Any, str],
    place: str,
) -> Items:
    name = locate(root, required_text(image, "file_name"), "image")
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
            yield Rejection(
                name, f"run-length masks are not supported ({labels[-1]}); its bbox is used instead", "mask"
            )
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
