"""HTML pages of the evaluation commands: report.html, compare.html, and what all templates share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from echo_ft.data.dataset import load_dataset
from echo_ft.errors import EchoError
from echo_ft.html import jpeg_uri, render_page, thumbnail
from echo_ft.images import decode
from echo_ft.metrics.comparison import ALL_QUESTIONS, RunGroup
from echo_ft.metrics.detection import roc_points
from echo_ft.metrics.loading import Run
from echo_ft.metrics.prediction_table import PredictionTable, is_correct, make_prediction_table
from echo_ft.records import QUESTION_TYPES, ROBUSTMAD_TYPES, Prediction
from evaluation import formatting
from evaluation.formatting import DETECTION_METRICS, axis_limit, mmad_counts

SAMPLE_CASES = 24
"""Number of cases on a report page."""

SAMPLE_CHANGES = 12
"""Number of questions that a comparison page shows of those that are newly right, and of those newly wrong."""

THUMBNAIL_SIDE = 192
"""Longer side of a thumbnail, in pixels."""


def render(template: str, **values: Any) -> str:
    """Render a template of this folder as a self-contained HTML page."""
    filters: dict[str, Callable[..., Any]] = {
        "percent": formatting.percent,
        "share_percent": formatting.share_percent,
        "share": formatting.share_text,
        "share_interval": formatting.share_interval_text,
        "signed": formatting.signed,
        "box": formatting.box_text,
        "box_interval": formatting.box_interval_text,
        "p": formatting.p_text,
        "unparsed_or_failed": formatting.unparsed_or_failed,
        "gate_cells": formatting.gate_cells,
        "gate_notes": formatting.gate_notes,
    }
    return render_page(Path(__file__).parent / template, filters, **values)


def report_page(report: Mapping[str, Any], run: Run) -> str:
    """Return the text of report.html for the content of report.json."""
    return render(
        "report.html.jinja",
        report=report,
        question_types=QUESTION_TYPES,
        mmad_counts=mmad_counts(report["kinds"]),
        robustmad_types=list(ROBUSTMAD_TYPES.values()),
        detection_labels=formatting.DETECTION_LABELS,
        alarm_labels=formatting.ALARM_LABELS,
        box_labels=formatting.BOX_LABELS,
        gate_labels=formatting.GATE_LABELS,
        expert_labels=formatting.EXPERT_LABELS,
        threshold_labels=formatting.THRESHOLD_LABELS,
        roc=roc_points(make_prediction_table(run.predictions)),
        samples=sample_cases(run.predictions, run.provenance),
    )


def compare_page(comparison: Mapping[str, Any], groups: Sequence[RunGroup]) -> str:
    """Return the text of compare.html for the content of comparison.json.

    The page shows which answers changed from the first run of the baseline to the last run of the last group.
    """
    provenances = [run["provenance"] for run in comparison["runs"]]
    keys = list(dict.fromkeys(key for one in provenances for key in one))
    differing = [key for key in keys if any(one.get(key) != provenances[0].get(key) for one in provenances)]
    before, after = groups[0].tables[0], groups[-1].tables[-1]
    root = image_root(groups[-1].runs[-1].provenance)
    return render(
        "compare.html.jinja",
        comparison=comparison,
        curves=[
            (name, area, roc_points(table), place)
            for place, (group, run) in enumerate(zip(groups, comparison["runs"], strict=True))
            for name, area, table in zip(group.members, run["figures"]["AUROC"]["values"], group.tables, strict=True)
        ],
        changed_runs=(groups[0].members[0], groups[-1].members[-1]),
        detection_metrics=DETECTION_METRICS,
        all_questions=ALL_QUESTIONS,
        unparsed_label=formatting.UNPARSED_LABEL,
        box_labels=formatting.BOX_LABELS,
        limit=_difference_limit(comparison["differences"]),
        changed={
            "Newly right": sample_changes(before, after, root, improved=True),
            "Newly wrong": sample_changes(before, after, root, improved=False),
        },
        same={key: provenances[0].get(key) for key in keys if key not in differing},
        differing={key: [one.get(key) for one in provenances] for key in differing},
    )


def _difference_limit(differences: Sequence[Mapping[str, Any]]) -> int:
    """Return the axis limit, in points, that fits the intervals of all differences."""
    return axis_limit(
        abs(bound) * (100 if key in DETECTION_METRICS else 1)
        for difference in differences
        for key, one in difference["figures"].items()
        for bound in one["interval"] or ()
    )


def sample_changes(
    before: PredictionTable, after: PredictionTable, root: Path | None, improved: bool
) -> tuple[int, list[dict[str, Any]]]:
    """Count the questions that became right, or wrong, and describe up to SAMPLE_CHANGES of them for a page."""
    correct, wrong = (after.correct, before.correct) if improved else (before.correct, after.correct)
    changed = [place for place in range(len(correct)) if correct[place] and not wrong[place]]
    chosen = [
        {
            "before": before.predictions[place],
            "after": after.predictions[place],
            "improved": improved,
            "thumbnail": thumbnail_uri(root, before.predictions[place].image),
        }
        for place in _evenly_spaced(changed, SAMPLE_CHANGES)
    ]
    return len(changed), chosen


def image_root(provenance: Mapping[str, Any]) -> Path | None:
    """Return the image folder of a run's dataset, or None if the dataset is not available."""
    if "dataset" not in provenance:
        return None
    try:
        return load_dataset(Path(str(provenance["dataset"]))).root
    except EchoError:
        return None


def thumbnail_uri(root: Path | None, image: str) -> str | None:
    """Return a small JPEG as a data URI, or None if the image cannot be read: a page can do without images."""
    if root is None:
        return None
    try:
        decoded = decode.decode(root / image)
    except decode.READ_ERRORS:
        return None
    return jpeg_uri(thumbnail(decoded, THUMBNAIL_SIDE))


def sample_cases(predictions: Sequence[Prediction], provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Describe up to SAMPLE_CASES evenly spaced cases, half of them with a wrong answer if there are enough."""
    cases: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        cases.setdefault(prediction.case, []).append(prediction)
    wrong = [case for case, rows in cases.items() if not all(map(is_correct, rows))]
    right = [case for case, rows in cases.items() if all(map(is_correct, rows))]
    wrong_count = max(SAMPLE_CASES // 2, SAMPLE_CASES - len(right))
    right_count = SAMPLE_CASES - min(len(wrong), wrong_count)
    chosen = {*_evenly_spaced(wrong, wrong_count), *_evenly_spaced(right, right_count)}
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


def _evenly_spaced(items: Sequence[Any], count: int) -> list[Any]:
    """Return `count` evenly spaced items, or all of them if there are fewer."""
    return [items[index * len(items) // count] for index in range(count)] if len(items) > count else list(items)
