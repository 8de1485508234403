"""Read images and defects from the JSON export of Label Studio: a list of tasks.

A task is one image. Its path below the root is `data.path`, or the `d` of a local file in `data.image`. Rectangles and
polygons mark defects, and their labels name the condition. `Choices` name the condition of the whole image, such as
`good` or a defect that cannot be outlined. By convention, an annotation with neither is a `good` part; the build counts
these images. `product`, `group` and `split` are read from `data` if it has these fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from data_prep.sources import ItemPlace, Items, RowError, SourceConfig, in_order, join_conditions, locate
from data_prep.sources._rows import (
    condition_of,
    drawn_view,
    named_condition,
    number_of,
    polygon_of,
    product_of,
    split_of,
    text_of,
)
from echo_ft.errors import EchoError
from echo_ft.inputs import open_text, read_json_file
from echo_ft.records import GOOD, Inspection, Rejection

IGNORED_RESULTS = ("textarea", "rating", "relation", "number", "datetime")
"""Types of results that do not describe a defect, such as a comment."""

NOT_ANNOTATED = "the task has no annotation"
"""Start of the reason for rejecting a task without an annotation."""


def is_task_list(path: Path) -> bool:
    """Return whether a JSON file holds a list, as Label Studio exports, rather than an object, as in COCO."""
    try:
        with open_text(path, "utf-8-sig") as file:
            return file.read(4096).lstrip().startswith("[")
    except (OSError, ValueError):  # the error is reported when the file is read
        return False


def read_labelstudio(config: SourceConfig, path: Path) -> Items:
    """Yield the images of a file in file order.

    The config's `good` lists labels and choices, besides `good`, for good parts. Raises EchoError if the file has
    another format.
    """
    for number, task in enumerate(_load(path)):
        place = f"{path.name}:tasks[{number}]"
        try:
            name = locate(config.root, _path(task["data"]), "image", config.frame)
            annotation = _annotation(task)
            if annotation is None:
                yield Rejection(place, f"{NOT_ANNOTATED} for {name}; submit an annotation, or remove the task")
                continue
            results = _results(annotation)
            yield ItemPlace(name, place, unannotated=not _outlining(results) and not _choices(results))
            yield _inspection(config.root, path, name, task["data"], results, config.good)
        except RowError as error:
            yield Rejection(place, str(error))


def _load(path: Path) -> list[dict[str, Any]]:
    try:
        content = read_json_file(path)
    except (OSError, ValueError) as error:
        raise EchoError(f"{path} cannot be read as JSON ({error}); export it again") from error
    valid = isinstance(content, list) and all(
        isinstance(task, dict) and isinstance(task.get("data"), dict) for task in content
    )
    if not valid or not content:
        raise EchoError(
            f"{path} is not an export of Label Studio: it needs a list of tasks with `data`; export it as JSON, not as "
            "JSON-MIN"
        )
    return content


def _path(data: Mapping[str, Any]) -> str:
    stated = text_of(data, "path")
    address = text_of(data, "image") or ""
    try:
        local = parse_qs(urlsplit(address).query).get("d", [""])[0]
    except ValueError:  # the address is malformed
        local = ""
    if not (stated or local):
        raise RowError(
            f"its image {address[:60]!r} is not below the root; set data.path to the path of the image, or serve "
            "local files"
        )
    return stated or local


def _annotation(task: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the annotation of a task, or None. Raises RowError if there are several."""
    annotations = task.get("annotations") or []
    if not isinstance(annotations, list) or not all(isinstance(one, dict) for one in annotations):
        raise RowError("its annotations are not a list of objects; export it again")
    found = [one for one in annotations if not one.get("was_cancelled")]
    if len(found) > 1:
        raise RowError(f"it has {len(found)} annotations; keep the correct one in Label Studio and export again")
    return found[0] if found else None


def _results(annotation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the results of an annotation that affect the condition. Raises RowError for other types."""
    found = annotation.get("result") or []
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise RowError("its result is not a list of objects; export it again")
    telling = [one for one in found if one.get("type") not in IGNORED_RESULTS]
    if not all(isinstance(one.get("value"), dict) for one in telling):
        raise RowError("one of its results has no value; export it again")
    return telling


def _names(result: Mapping[str, Any], key: str) -> list[str]:
    """Return the labels or choices of a result. Raises RowError if they are not strings."""
    found = result["value"].get(key) or [""]
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise RowError(f"its {key} {str(found)[:60]} are not a list of names")
    return found


def _outlining(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [one for one in results if one.get("type") != "choices"]


def _choices(results: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for one in results if one.get("type") == "choices" for name in _names(one, "choices")]


def _inspection(
    root: Path,
    path: Path,
    name: str,
    data: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    good: tuple[str, ...],
) -> Inspection:
    labels: list[str] = []
    boxes: list[tuple[float, float, float, float]] = []
    polygons: list[tuple[float, ...]] = []
    for result in _outlining(results):
        kind, value = result.get("type"), result["value"]
        if kind not in ("rectanglelabels", "polygonlabels"):
            raise RowError(f"results of the type {kind!r} are not supported; outline defects as rectangles or polygons")
        if result.get("image_rotation"):  # the percentages then refer to the rotated image
            raise RowError(
                f"its outlines were drawn with the image rotated by {result['image_rotation']} degrees; rotate it back "
                "in Label Studio and draw them again"
            )
        labels += _names(result, kind)
        view = drawn_view(root, name, (result.get("original_width"), result.get("original_height")))
        corners = _corners(kind, value, view.size)
        if kind == "rectanglelabels" and not value.get("rotation"):
            (x0, y0), (x1, y1) = corners[0], corners[2]
            boxes += view.boxes([(x0, y0, x1, y1)])
        else:
            polygons += view.polygons([polygon_of(corners)])
    condition = _condition(labels, _choices(results), good)
    defective = condition != GOOD  # regions of good parts do not mark a defect
    return Inspection(
        id=name,
        image=name,
        dataset=path.stem,
        product=text_of(data, "product") or product_of(name, path.stem),
        condition=condition,
        group=text_of(data, "group") or name,
        split=split_of(data, condition),
        boxes=in_order(boxes) if defective else (),
        polygons=in_order(polygons) if defective else (),
    )


def _condition(labels: Sequence[str], choices: Sequence[str], good: tuple[str, ...]) -> str:
    """Return the condition that the labels of the outlines and the choices state. Raises RowError if they differ."""
    outlined = condition_of(labels, good) if labels else None
    chosen = join_conditions({named_condition(name.strip(), good) for name in choices}) if choices else None
    if outlined is not None and chosen is not None and outlined != chosen:
        raise RowError(
            f"the condition is {chosen!r} by its choice but {outlined!r} by its outlines; correct one of them"
        )
    return outlined or chosen or GOOD


def _corners(kind: str, value: Mapping[str, Any], size: tuple[int, int]) -> list[tuple[float, float]]:
    """Return the vertices of an outline in pixels, clockwise. Label Studio stores percentages of the image's `size`.

    A rectangle is rotated around its top left corner. Raises RowError for values that are not finite numbers.
    """
    width, height = size
    try:
        if kind == "polygonlabels":
            corners = [(number_of(x) * width / 100, number_of(y) * height / 100) for x, y in value["points"]]
        else:
            x, y = number_of(value["x"]) * width / 100, number_of(value["y"]) * height / 100
            across, down = number_of(value["width"]) * width / 100, number_of(value["height"]) * height / 100
            angle = math.radians(number_of(value.get("rotation") or 0))
            cosine, sine = math.cos(angle), math.sin(angle)
            corners = [
                (x + dx * cosine - dy * sine, y + dx * sine + dy * cosine)
                for dx, dy in ((0.0, 0.0), (across, 0.0), (across, down), (0.0, down))
            ]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RowError(f"the outline {str(value)[:60]} is not a {kind.removesuffix('labels')} in percent") from error
    if not all(math.isfinite(number) for corner in corners for number in corner):
        raise RowError(f"the outline {str(value)[:60]} has a coordinate that is not a number")
    return [(round(x, 3), round(y, 3)) for x, y in corners]
