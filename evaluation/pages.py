"""HTML pages of the evaluation commands: report.html, compare.html, and what all templates share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from echo_ft.html import render_page
from echo_ft.metrics.comparison import ALL_QUESTIONS, RunGroup, scored_in_all
from echo_ft.metrics.detection import roc_points
from echo_ft.metrics.loading import Run
from echo_ft.metrics.prediction_table import make_prediction_table
from echo_ft.records import QUESTION_TYPES, ROBUSTMAD_TYPES
from evaluation import formatting
from evaluation.case_images import ImageStore
from evaluation.cases import make_viewer
from evaluation.figures import confusions, letter_bias, reliability_curve
from evaluation.formatting import DETECTION_METRICS, axis_limit, mmad_counts


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


def report_page(report: Mapping[str, Any], run: Run, images: ImageStore) -> str:
    """Return the text of report.html for the content of report.json. Images go where `images` puts them."""
    table = make_prediction_table(run.predictions)
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
        roc=roc_points(table),
        reliability=reliability_curve(table),
        confusions=[(report["name"], confusions(run.predictions))],
        bias=[(report["name"], letter_bias(run.predictions))],
        viewer=make_viewer({report["name"]: run}, images),
    )


def compare_page(comparison: Mapping[str, Any], groups: Sequence[RunGroup], images: ImageStore) -> str:
    """Return the text of compare.html for the content of comparison.json. Images go where `images` puts them.

    The page counts the answers that changed from the first run of the baseline to the last run of the last group.
    """
    provenances = [run["provenance"] for run in comparison["runs"]]
    keys = list(dict.fromkeys(key for one in provenances for key in one))
    differing = [key for key in keys if any(one.get(key) != provenances[0].get(key) for one in provenances)]
    before, after = groups[0].tables[0].correct, groups[-1].tables[-1].correct
    members = [
        (name, run, table, place)
        for place, group in enumerate(groups)
        for name, run, table in zip(group.members, group.runs, group.tables, strict=True)
    ]
    scored = scored_in_all(groups)
    areas = [area for run in comparison["runs"] for area in run["figures"]["AUROC"]["values"]]
    reliabilities = [(name, reliability_curve(table), place) for name, _, table, place in members]
    return render(
        "compare.html.jinja",
        comparison=comparison,
        roc=[
            (name, area, roc_points(table, scored), place)
            for (name, _, table, place), area in zip(members, areas, strict=True)
        ],
        reliabilities=[(name, *curve, place) for name, curve, place in reliabilities if curve],
        changed_runs=(groups[0].members[0], groups[-1].members[-1]),
        detection_metrics=DETECTION_METRICS,
        all_questions=ALL_QUESTIONS,
        unparsed_label=formatting.UNPARSED_LABEL,
        box_labels=formatting.BOX_LABELS,
        limit=_difference_limit(comparison["differences"]),
        changed={"right": int((after & ~before).sum()), "wrong": int((before & ~after).sum())},
        confusions=[(name, confusions(run.predictions)) for name, run, _, _ in members],
        bias=[(name, letter_bias(run.predictions)) for name, run, _, _ in members],
        viewer=make_viewer({name: run for name, run, _, _ in members}, images),
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
