"""Files of a review in the import formats of Label Studio, COCO and FiftyOne."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from echo_ft.files import write_json, write_text
from echo_ft.images.decode import image_size
from echo_ft.images.outlines import Outlines, outlines_of
from echo_ft.records import GOOD, UNLABELLED
from evaluation.review import ReviewCase, ReviewQuestion

Write = Callable[[Path, Sequence[ReviewCase], Path, str], None]
"""Writes the files of a format; called with the folder, the cases, the root of their images, and the run's name."""


def write_labelstudio(folder: Path, cases: Sequence[ReviewCase], root: Path, run: str) -> None:
    """Write tasks for Label Studio with the truth as an annotation, and the interface that shows them.

    A task has no annotation if the condition of its image is not known.
    Label Studio serves the images as local files below `root`.
    """
    tasks = [_task(number, case, root, run) for number, case in enumerate(cases, start=1)]
    write_json(folder / "tasks.json", tasks)
    defects = sorted({name for case in cases for name in case.conditions} - {GOOD})
    write_text(folder / "config.xml", _interface(defects, any(case.predicted for case in cases)))


def _task(number: int, case: ReviewCase, root: Path, run: str) -> dict[str, Any]:
    inspection = case.inspection
    size = image_size(root / inspection.image)
    marks = outlines_of(inspection, root)
    common = {"to_name": "image", "original_width": size[0], "original_height": size[1], "image_rotation": 0}
    results: list[dict[str, Any]] = [
        {
            "type": "choices", "from_name": "condition", "to_name": "image",
            "value": {"choices": [inspection.condition]},
        }
    ]  # fmt: skip
    outlines = [("rectanglelabels", "box", _percent_box(box, size)) for box in marks.boxes]
    outlines += [("polygonlabels", "outline", _percent_polygon(one, size)) for one in marks.polygons]
    for kind, name, value in outlines:
        results.append({**common, "type": kind, "from_name": name, "value": {**value, kind: [inspection.condition]}})
    for index, result in enumerate(results):
        result["id"] = f"{number}-{index}"
    task = {
        "id": number,
        "data": {
            "image": _local_file(inspection.image),
            "path": inspection.image,
            "reference": _local_file(case.references[0]) if case.references else "",
            "product": inspection.product,
            "group": inspection.group,
            "answers": "\n\n".join(map(_question_text, case.questions)),
            **_facts(case),
        },
        "annotations": [] if inspection.condition == UNLABELLED else [{"result": results}],
    }
    if case.p_defect is not None or case.predicted:
        # Label Studio shows these boxes separately from the annotation, which holds the truth.
        found = [
            {
                **common, "id": f"{number}-predicted-{index}", "type": "rectanglelabels", "from_name": "box",
                "value": {**_percent_box(box, (1000, 1000)), "rectanglelabels": [PREDICTED]},
            }
            for index, box in enumerate(case.predicted)
        ]  # fmt: skip
        score = {} if case.p_defect is None else {"score": case.p_defect}
        task["predictions"] = [{"model_version": run, "result": found, **score}]
    return task


def _local_file(image: str) -> str:
    """Return the address of an image that Label Studio serves below LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT."""
    return f"/data/local-files/?d={quote(image)}"


def _percent_box(box: tuple[float, float, float, float], size: tuple[int, int]) -> dict[str, Any]:
    (x0, y0), (x1, y1) = _percent_points(box, size)
    return {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0, "rotation": 0}


def _percent_polygon(polygon: tuple[float, ...], size: tuple[int, int]) -> dict[str, Any]:
    return {"points": _percent_points(polygon, size), "closed": True}


def _percent_points(values: tuple[float, ...], size: tuple[int, int]) -> list[list[float]]:
    """Return points as Label Studio stores them, clamped to the image, because it rejects any outside."""

    def percent(value: float, whole: int) -> float:
        return min(max(100 * value / whole, 0.0), 100.0)

    points = zip(values[::2], values[1::2], strict=True)
    return [[percent(x, size[0]), percent(y, size[1])] for x, y in points]


def _interface(defects: Sequence[str], predicted: bool) -> str:
    """Return Label Studio's labelling interface for these defects, and for predicted boxes if there are any."""
    labels = "".join(f"<Label value={quoteattr(name)}/>" for name in (*defects, *([PREDICTED] if predicted else [])))
    choices = "".join(f"<Choice value={quoteattr(name)}/>" for name in (GOOD, *defects))
    texts = "".join(f'<Text name="{name}_text" value="${name}"/>' for name in (*FACTS, "answers"))
    outlines = f"""  <RectangleLabels name="box" toName="image">{labels}</RectangleLabels>
  <PolygonLabels name="outline" toName="image">{labels}</PolygonLabels>
"""
    return f"""<View>
  <Header value="$product"/>
  <View style="display: flex">
    <Image name="image" value="$image" zoom="true"/>
    <Image name="reference_image" value="$reference" zoom="true"/>
  </View>
  <Choices name="condition" toName="image" choice="single" showInline="true">{choices}</Choices>
{outlines if labels else ""}  {texts}
</View>
"""


PREDICTED = "predicted"
"""Label of the boxes that the run predicts."""

FACTS = ("tags", "p_defect", "reference_extractor", "knowledge_guide")


def _facts(case: ReviewCase) -> dict[str, str]:
    """Return the run's results for a whole case, as strings."""
    score = "" if case.p_defect is None else f"P(defect) {case.p_defect:.3f}"
    return dict(zip(FACTS, (" ".join(case.tags), score, case.extractor, case.guide), strict=True))


def _question_text(question: ReviewQuestion) -> str:
    row = question.prediction
    options = "\n".join(
        f"{letter}. {text}"
        + (f" (P {row.probabilities[letter]:.3f})" if row.probabilities and letter in row.probabilities else "")
        for letter, text in row.options.items()
    )
    verdict = "right" if question.right else ", ".join(question.tags)
    judged = "; ".join(filter(None, (verdict, row.answer and f"truth {row.answer}")))
    lines = (
        f"{row.kind}: {row.question_text}",
        options,
        question.reasoning and f"reasoning_expert: {question.reasoning}",
        f"decision_maker: {row.error or row.text}" + (f" ({judged})" if judged else ""),
    )
    return "\n".join(filter(None, lines))


def write_coco(folder: Path, cases: Sequence[ReviewCase], root: Path, run: str) -> None:
    """Write a COCO file with the truth as annotations. `review` in an image holds the run's results for it.

    Its `predicted_boxes` are x0, y0, x1, y1 in thousandths of the image. A defect without an outline becomes an
    annotation without `bbox` and `segmentation`.
    """
    categories = {
        name: number for number, name in enumerate(sorted({c.inspection.condition for c in cases} - {GOOD}), 1)
    }
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, case in enumerate(cases, start=1):
        inspection = case.inspection
        size = image_size(root / inspection.image)
        image = {"id": number, "file_name": inspection.image, "width": size[0], "height": size[1]}
        image |= {"product": inspection.product, "group": inspection.group}
        images.append(image | ({"split": inspection.split} if inspection.split else {}) | {"review": _review(case)})
        if inspection.condition == GOOD:
            continue
        for shape in _coco_shapes(outlines_of(inspection, root)):
            common = {"id": len(annotations) + 1, "image_id": number, "category_id": categories[inspection.condition]}
            annotations.append(common | {"iscrowd": 0} | shape)
    write_json(
        folder / "instances.json",
        {
            "info": {"description": f"review of the run {run}"},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for name, number in categories.items()],
        },
    )


def _coco_shapes(marks: Outlines) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for x0, y0, x1, y1 in marks.boxes:
        size = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
        found.append({**size, "segmentation": []})
    for polygon in marks.polygons:
        xs, ys = polygon[::2], polygon[1::2]
        turned = zip(xs, ys, (*xs[1:], xs[0]), (*ys[1:], ys[0]), strict=True)
        area = abs(sum(x * next_y - next_x * y for x, y, next_x, next_y in turned)) / 2  # the shoelace formula
        bbox = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        found.append({"bbox": bbox, "area": area, "segmentation": [list(polygon)]})
    return found or [{}]


def _review(case: ReviewCase) -> dict[str, Any]:
    return {
        "references": list(case.references),
        "reference_extractor": case.extractor,
        "knowledge_guide": case.guide,
        "p_defect": case.p_defect,
        "predicted_boxes": [list(box) for box in case.predicted],
        "tags": list(case.tags),
        "questions": [
            {
                "kind": one.prediction.kind,
                "question": one.prediction.question_text,
                "options": one.prediction.options,
                "reasoning_expert": one.reasoning,
                "decision_maker": one.prediction.error or one.prediction.text,
                "probabilities": one.prediction.probabilities,
                "answer": one.prediction.parsed,
                "truth": one.prediction.answer,
                "tags": list(one.tags),
            }
            for one in case.questions
        ],
    }


def write_fiftyone(folder: Path, cases: Sequence[ReviewCase], root: Path, run: str) -> None:
    """Write a dataset in FiftyOne's LegacyFiftyOneDataset format, whose samples refer to the images by full paths."""
    samples = [_sample(case, root) for case in cases]
    write_json(folder / "samples.json", {"samples": samples})
    write_json(folder / "metadata.json", {"media_type": "image", "info": {"run": run}})


def _sample(case: ReviewCase, root: Path) -> dict[str, Any]:
    inspection = case.inspection
    width, height = image_size(root / inspection.image)
    marks = outlines_of(inspection, root)
    detections = [
        _fiftyone_label("Detection", label=inspection.condition,
                        bounding_box=[x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height])
        for x0, y0, x1, y1 in marks.boxes
    ]  # fmt: skip
    predicted = [
        _fiftyone_label("Detection", label=PREDICTED, bounding_box=[v / 1000 for v in (x0, y0, x1 - x0, y1 - y0)])
        for x0, y0, x1, y1 in case.predicted
    ]
    polylines = [
        _fiftyone_label("Polyline", label=inspection.condition, closed=True, filled=True,
                        points=[[[x / width, y / height] for x, y in zip(one[::2], one[1::2], strict=True)]])
        for one in marks.polygons
    ]  # fmt: skip
    return {
        "filepath": str(root / inspection.image),
        "tags": list(case.tags),
        "condition": _fiftyone_label("Classification", label=inspection.condition) if inspection.condition else None,
        "ground_truth": _fiftyone_label("Detections", detections=detections),
        "outlines": _fiftyone_label("Polylines", polylines=polylines),
        "predictions": _fiftyone_label("Detections", detections=predicted),
        "product": inspection.product,
        "group_name": inspection.group,
        "reference": str(root / case.references[0]) if case.references else None,
        "p_defect": case.p_defect,
        "reference_extractor": case.extractor,
        "knowledge_guide": case.guide,
        "answers": "\n\n".join(map(_question_text, case.questions)),
    }


def _fiftyone_label(kind: str, **values: Any) -> dict[str, Any]:
    """Return a label of FiftyOne. `_cls` is the name of its class."""
    return {"_cls": kind, **values}


FORMATS: dict[str, Write] = {"fiftyone": write_fiftyone, "labelstudio": write_labelstudio, "coco": write_coco}
