"""Labels and number formats that the pages and the terminal share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from echo_ft.metrics.detection import FLAGGED_FROM

DETECTION_METRICS = ("AUROC", "recall", "specificity")
"""Metrics shown from 0 to 1. All other metrics are shown in percent."""

DETECTION_LABELS = {
    "auroc": "AUROC",
    "recall": "recall",
    "specificity": "specificity",
    "balanced_accuracy": "balanced accuracy",
}
"""Labels of the keys of `report.detection` that have an interval."""

ALARM_LABELS = {"answers": "the answers", "p_defect": f"P(defect) from {FLAGGED_FROM:g}"}
"""Labels of the ways to decide in `report.alarms`."""

EXPERT_LABELS = {
    "best_reference": "reference extractor: best reference",
    "condition": "knowledge guide: true condition",
    "condition_recall": "knowledge guide: mean recall over conditions",
    "place": "reasoning expert: location of the defect",
    "place_touched": "reasoning expert: location of part of the defect",
    "conclusion": "reasoning expert: conclusion equals the decision",
}
"""Labels of the keys of `report.experts.figures`."""

GATE_LABELS = {"false_alarms": "good parts that are flagged", "escapes": "defective parts that are missed"}
"""Labels of the keys of `report.gate.findings`."""

THRESHOLD_LABELS = {
    "false_alarms": "false alarm rate at most {:g}, set on validation",
    "f1": "highest F1, set on validation",
    "best": "highest F1, set on this run",
}
"""Labels of the keys of `report.calibration.thresholds`, which say how each threshold was chosen."""

BOX_LABELS = {
    "mean_iou": "mean IoU, %",
    "matched_iou": "mean IoU of matched boxes, %",
    "found_0.1": "found at IoU 0.1, %",
    "found_0.3": "found at IoU 0.3, %",
    "found_0.5": "found at IoU 0.5, %",
    "none_on_good": "good images answered none, %",
    "boxes_per_good_image": "boxes per good image",
}
"""Labels of the keys of `report.boxes.figures`, with their unit."""

UNPARSED_LABEL = "unparsed + failed"
"""Label of the percentage of answers that are unparsed or failed; see `unparsed_or_failed`."""


def percent(value: float | None) -> str:
    """Format a percentage, as in `81.7`; a dash stands for a missing value."""
    return "–" if value is None else f"{value:.1f}"


def share_percent(value: float | None) -> str:
    """Format a fraction from 0 to 1 as a percentage, as in `81.7`; a dash stands for a missing value."""
    return percent(None if value is None else 100 * value)


def share_text(value: float | None) -> str:
    """Format a fraction from 0 to 1, as in `0.907`; a dash stands for a missing value."""
    return "–" if value is None else f"{value:.3f}"


def signed(value: float | None, digits: int = 1) -> str:
    """Format a difference with its sign, as in `+3.2`; a dash stands for a missing value."""
    return "–" if value is None else f"{value:+.{digits}f}"


def metric_text(name: str, value: float | None) -> str:
    """Format a metric in its own unit: detection from 0 to 1, and all other metrics in percent."""
    return share_text(value) if name in DETECTION_METRICS else percent(value)


def box_text(value: float | None, name: str, plus: bool = False) -> str:
    """Format a metric of boxes in its unit, with its sign if it is a difference."""
    if value is None:
        return "–"
    share = BOX_LABELS[name].endswith("%")
    return f"{100 * value if share else value:{'+' if plus else ''}.{1 if share else 2}f}"


def box_interval_text(value: Sequence[float] | None, name: str, plus: bool = False) -> str:
    """Format the interval of a metric of boxes; a dash stands for a missing interval."""
    return "–" if value is None else " to ".join(box_text(bound, name, plus) for bound in value)


def interval_text(name: str, value: Sequence[float] | None) -> str:
    """Format the interval of a metric, as in `71.7 to 90.0`; a dash stands for a missing interval."""
    return "–" if value is None else f"{metric_text(name, value[0])} to {metric_text(name, value[1])}"


def share_interval_text(value: Sequence[float] | None) -> str:
    """Format the interval of a fraction from 0 to 1 in percent; a dash stands for a missing interval."""
    return "–" if value is None else f"{share_percent(value[0])} to {share_percent(value[1])}"


def p_text(value: float) -> str:
    """Format a p-value, as in `0.013` or `< 0.001`."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def gate_cells(finding: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """Format one of `report.gate.findings`: limit, observed share, its bounds, errors among parts, and verdict."""
    errors, parts = finding["errors"], finding["parts"]
    seen = share_percent(errors / parts if parts else None)
    bounds = f"{100 * finding['lower']:.2f} to {100 * finding['upper']:.2f}"
    return f"{100 * finding['limit']:g}", seen, bounds, f"{errors} of {parts}", finding["verdict"]


def gate_notes(gate: Mapping[str, Any]) -> list[str]:
    """Return sentences on how the parts were divided, how many more would settle the verdict, and what it assumes."""
    choosing, judged = gate["split"]["choosing"], gate["split"]["judged"]
    counts = f"judged on {judged['good']} good and {judged['defective']} defective parts"
    if choosing:
        counts += f", chosen on {choosing['good']} and {choosing['defective']}"
    return [f"{gate['split']['how']} ({counts})", *gate["more_parts"], *gate["notes"]]


def unparsed_or_failed(counts: Mapping[str, Any]) -> str:
    """Format the percentage of answers that are unparsed or failed; both count as wrong."""
    return percent(100 * (counts["unparsed"] + counts["failed"]) / counts["questions"])


def mmad_counts(kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Add up the counts of MMAD's seven question types."""
    return {key: sum(kind[key] for kind in kinds.values()) for key in ("questions", "unparsed", "failed")}


def axis_limit(bounds: Iterable[float]) -> int:
    """Return the limit, in points to each side of zero, of a plot of differences with these absolute `bounds`."""
    largest = max(bounds, default=0)
    return next((points for points in (10, 25, 50) if largest <= points), 100)


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of cells as text. The first row is the header; all columns but the first are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
