"""Read images and defects from COCO JSON, the format of CVAT, Label Studio, Roboflow and others.

By these tools' convention, an image without annotations is `good`; the build counts these images. Otherwise, the
category names form the condition. If several entries of `images` have the same file, their annotations are combined. An
annotation's outline (`segmentation` as polygons) is used, or its `bbox` if it has no outline. An annotation with
neither adds its category to the condition and marks nothing. `product`, `group` and `split` are read from the image if
it has these fields. By default, the product is the first folder of `file_name`, which is relative to the root.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.sources import ItemPlace, Items, RowError, SourceConfig, locate
from data_prep.sources._rows import (
    condition_of,
    drawn_view,
    number_of,
    polygon_of,
    product_of,
    required_text,
    split_of,
    text_of,
)
from echo_ft.data.knowledge import first_names
from echo_ft.errors import EchoError
from echo_ft.inputs import read_json_file
from echo_ft.records import GOOD, Inspection, Rejection

REQUIRED_LISTS = ("images", "annotations", "categories")


def read_coco(config: SourceConfig, path: Path) -> Items:
    """Yield the images of a COCO JSON file in file order, once per entry.

    The config's `good` lists category names, besides `good`, for regions without a defect. Raises EchoError if the file
    has another format, or if two categories share an id.
    """
    content = _load(path)
    categories = _category_names(path, content["categories"])
    rows_by_image: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in content["annotations"]:
        rows_by_image[_key(row.get("image_id"))].append(row)
    files: dict[str, set[Any]] = defaultdict(set)
    for image in content["images"]:
        files[_key(image.get("id"))].add(_key(image.get("file_name")))
    lost = {identifier: len(rows) for identifier, rows in rows_by_image.items() if identifier not in files}
    lost_count, lost_ids = sum(lost.values()), first_names(lost)
    for number, image in enumerate(content["images"]):
        place = f"{path.name}:images[{number}]"
        rows = rows_by_image.get(_key(image.get("id")), [])
        try:
            name = locate(config.root, required_text(image, "file_name"), "image", config.frame)
            yield ItemPlace(name, place, unannotated=not rows)
            if image.get("id") is None or len(files[_key(image["id"])]) > 1:
                raise RowError(
                    f"its id {image.get('id')!r} is missing or already used by another image; give each image its own"
                )
            if lost and not rows:
                raise RowError(
                    f"it has no annotations, but {lost_count} annotations of the file belong to no image "
                    f"(image_id {lost_ids}) and may belong to this image; correct or remove them; the file for a part "
                    "of a dataset must have only the annotations of its images"
                )
            yield from _inspection(config.root, path, name, image, rows, categories, config.good)
        except RowError as error:
            yield Rejection(place, str(error))
    if lost:
        reason = f"annotations ignored ({lost_count}): no image has the id {lost_ids}"
        yield Rejection(f"{path.name}:annotations", reason)


def _key(identifier: Any) -> str:
    """Return an id as a string, because some tools write the same id both as a number and as a string."""
    return str(identifier)


def _category_names(path: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    names: dict[str, str] = {}
    for row in rows:
        known = names.setdefault(_key(row["id"]), row["name"])
        if known != row["name"]:
            raise EchoError(
                f"{path} has two categories with the id {row['id']!r}, {known!r} and {row['name']!r}; "
                "give each category its own id, also in the annotations"
            )
    return names


def _load(path: Path) -> dict[str, Any]:
    try:
        content = read_json_file(path)
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
    name: str,
    image: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    categories: Mapping[str, str],
    good: tuple[str, ...],
) -> Items:
    view = drawn_view(root, name, (image.get("width"), image.get("height")))
    labels, polygons, boxes, unmarked = [], [], [], set[str]()
    for row in rows:
        if _key(row.get("category_id")) not in categories:
            raise RowError(f"{name}: there is no category {row.get('category_id')!r}")
        labels.append(categories[_key(row["category_id"])])
        if "bbox" not in row and "segmentation" not in row:
            unmarked.add(labels[-1])
            continue
        outline = row.get("segmentation")
        if outline and isinstance(outline, list):
            polygons += [_polygon(name, corners) for corners in outline]
            continue
        boxes.append(_box(name, row.get("bbox")))
        if outline:
            yield Rejection(
                name, f"run-length masks are not supported ({labels[-1]}); its bbox is used instead", "mask"
            )
    condition = condition_of(labels, good)
    defective = condition != GOOD  # regions of good parts do not mark a defect
    if unmarked and (boxes or polygons):
        reason = f"an annotation of {min(unmarked)} has no bbox, but others mark defects; mark every defect"
        yield Rejection(name, f"{reason}; the image is used without its marks", "mask")
        polygons, boxes = [], []
    yield Inspection(
        id=name,
        image=name,
        dataset=path.stem,
        product=text_of(image, "product") or product_of(name, path.stem),
        condition=condition,
        group=text_of(image, "group") or name,
        split=split_of(image, condition),
        boxes=view.boxes(boxes) if defective else (),
        polygons=view.polygons(polygons) if defective else (),
    )


def _polygon(name: str, values: Any) -> tuple[float, ...]:
    try:
        numbers = [number_of(value) for value in values]
        return polygon_of(zip(numbers[::2], numbers[1::2], strict=True))
    except (TypeError, ValueError, OverflowError) as error:
        raise RowError(f"{name}: the segmentation {str(values)[:60]} is not [x, y, x, y, ...]") from error


def _box(name: str, value: Any) -> tuple[float, float, float, float]:
    try:
        x, y, width, height = map(number_of, value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RowError(f"{name}: the bbox {str(value)[:60]} is not [x, y, width, height]") from error
    return x, y, x + width, y + height
