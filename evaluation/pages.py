"""What the pages share: the template environment, thumbnails, the sample of cases, how a number is shown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from echo_ft.data.dataset import load_dataset
from echo_ft.errors import EchoError
from echo_ft.html import jpeg_uri, render_page, thumbnail
from echo_ft.images import decode
from echo_ft.metrics.detection import roc_points
from echo_ft.metrics.loading import Run
from echo_ft.metrics.prediction_table import is_correct, make_prediction_table
from echo_ft.records import QUESTION_TYPES, Prediction

SAMPLES = 24
THUMBNAIL = 192
"""Pixels of a thumbnail's longer side."""

DETECTION_FIGURES = ("AUROC", "recall", "specificity")
"""Shown from 0 to 1; everything else is in percent."""


DETECTION_LABELS = {
    "auroc": "AUROC",
    "recall": "recall of defects",
    "specificity": "specificity",
    "balanced_accuracy": "balanced accuracy",
}
"""Keys of `report.detection` with an interval, and their names."""

EXPERT_LABELS = {
    "best_reference": "extractor: the best reference",
    "condition": "guide: the true condition",
    "condition_recall": "the same, mean over conditions",
    "place": "reasoner: the mask's place",
    "place_touched": "reasoner: a place with some of the defect",
    "conclusion": "reasoner's conclusion is the decision",
}
"""Keys of `report.experts.figures`, and their names."""

THRESHOLD_LABELS = {
    "false_alarms": "false alarms at most {:g}, by validation",
    "f1": "highest F1, by validation",
    "best": "highest F1, by this run itself",
}
"""Keys of `report.calibration.thresholds`, and how each was chosen."""


def render(template: str, **values: Any) -> str:
    """A self-contained HTML page."""
    filters = {
        "percent": percent,
        "hundredfold": hundredfold,
        "share": share_text,
        "signed": signed,
        "compact": compact,
    }
    return render_page(Path(__file__).parent / template, filters, **values)


def report_page(report: Mapping[str, Any], run: Run) -> str:
    """report.html's text from report.json's content."""
    return render(
        "report.html.jinja",
        report=report,
        kinds=QUESTION_TYPES,
        detection_labels=DETECTION_LABELS,
        expert_labels=EXPERT_LABELS,
        threshold_labels=THRESHOLD_LABELS,
        roc=roc_points(make_prediction_table(run.predictions)),
        samples=samples(run.predictions, run.provenance),
    )


def percent(value: float | None) -> str:
    """`81.7`, or a dash where there is no figure."""
    return "–" if value is None else f"{value:.1f}"


def hundredfold(value: float | None) -> str:
    """A share as `81.7` percent, or a dash where there is none."""
    return percent(None if value is None else 100 * value)


def share_text(value: float | None) -> str:
    """`0.907`, or a dash where there is no figure."""
    return "–" if value is None else f"{value:.3f}"


def signed(value: float | None, digits: int = 1) -> str:
    """`+3.2`, or a dash where there is no figure."""
    return "–" if value is None else f"{value:+.{digits}f}"


def show(name: str, value: float | None) -> str:
    """A figure in its own unit: detection from 0 to 1, the rest in percent."""
    return share_text(value) if name in DETECTION_FIGURES else percent(value)


def interval_text(name: str, value: Sequence[float] | None) -> str:
    """`71.7 to 90.0`, or a dash."""
    return "–" if value is None else f"{show(name, value[0])} to {show(name, value[1])}"


def p_text(value: float) -> str:
    """`0.013`, or `< 0.001`."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def reach(bounds: Iterable[float]) -> int:
    """Points to each side of zero that a drawing of differences needs, `bounds` being their sizes."""
    largest = max(bounds, default=0)
    return next((points for points in (10, 25, 50) if largest <= points), 100)


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text: the first column to the left, the others to the right, the first row a header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def compact(value: Any) -> str:
    """A provenance value in one piece of text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def image_root(provenance: Mapping[str, Any]) -> Path | None:
    """Where a run's images lie, or None where its dataset is not reachable from here."""
    if "dataset" not in provenance:
        return None

    try:
        return load_dataset(Path(str(provenance["dataset"]))).root
    except EchoError:
        return None


def thumbnail_uri(root: Path | None, image: str) -> str | None:
    """A small JPEG as a data URI, or None where the image cannot be read: pages are made without images too."""
    if root is None:
        return None
    try:
        small = decode.decode(root / image)
    except decode.UNREADABLE:
        return None
    return jpeg_uri(thumbnail(small, THUMBNAIL))


def samples(predictions: Sequence[Prediction], provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Up to SAMPLES cases for a page, evenly spread over the run; half of them with a wrong answer where there are."""
    cases: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        cases.setdefault(prediction.case, []).append(prediction)
    wrong = [case for case, rows in cases.items() if not all(map(is_correct, rows))]
    right = [case for case, rows in cases.items() if all(map(is_correct, rows))]
    share_wrong = max(SAMPLES // 2, SAMPLES - len(right))
    chosen = {*_spread(wrong, share_wrong), *_spread(right, SAMPLES - min(len(wrong), share_wrong))}
    root = image_root(provenance)
    return [
        {
            "case": case,
            "first": rows[0],
            "thumbnail": thumbnail_uri(root, rows[0].image),
            "questions": [{"row": row, "correct": is_correct(row)} for row in rows],
            "right": sum(map(is_correct, rows)),
        }
        for case, rows in cases.items()
        if case in chosen
    ]


def _spread(items: Sequence[str], count: int) -> list[str]:
    """`count` items at even steps; all of them where there are fewer."""
    return [items[index * len(items) // count] for index in range(count)] if len(items) > count else list(items)
