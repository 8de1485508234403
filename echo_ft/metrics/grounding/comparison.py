"""Comparison of the boxes that runs predict in the same images: metrics and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from echo_ft.metrics.comparison import RunGroup, mean_over_runs, resample_runs
from echo_ft.metrics.grounding.scores import box_interval, box_metrics, box_part_counts
from echo_ft.metrics.metric_values import json_number
from echo_ft.metrics.prediction_table import arrange_predictions


def compare_boxes(groups: Sequence[RunGroup]) -> dict[str, Any]:
    """Return the metrics of the boxes of each group and their differences from the first; empty without boxes.

    All runs must answer the same questions. Parts and runs are resampled as in `comparison.build_comparison`.
    """
    if not groups[0].runs[0].grounding:
        return {}
    tables = [[arrange_predictions(run.grounding) for run in group.runs] for group in groups]
    weights, once = tables[0][0].weights(), tables[0][0].unit_weights()
    parts = [box_part_counts(own[0]) for own in tables]
    resampled = [
        resample_runs([box_metrics(table, weights) for table in own], seed) for seed, own in enumerate(tables, start=1)
    ]
    described: list[dict[str, Any]] = []
    for place, (group, own) in enumerate(zip(groups, tables, strict=True)):
        values = [box_metrics(table, once) for table in own]
        figures = {
            name: mean_over_runs([json_number(one[name][0]) for one in values])
            | {"interval": box_interval(name, resampled[place][name], count)}
            for name, count in parts[place].items()
        }
        described.append({"name": group.name, "title": group.title, "members": group.members, "figures": figures})
    differences = []
    for place, group in enumerate(groups[1:], start=1):
        figures = {}
        for name in parts[0]:
            before, after = (described[which]["figures"][name]["value"] for which in (0, place))
            change, count = resampled[place][name] - resampled[0][name], min(parts[0][name], parts[place][name])
            figures[name] = {
                "difference": None if before is None or after is None else after - before,
                "interval": box_interval(name, change, count, difference=True),
            }
        differences.append({"run": group.name, "figures": figures})
    return {"baseline": groups[0].name, "runs": described, "differences": differences}
