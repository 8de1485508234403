"""Comparison of runs on the same questions: metrics, paired differences, tests, and one sentence per run.

Shapes: R resamples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from echo_ft.metrics import intervals, strict
from echo_ft.metrics.detection import (
    alarm_metrics,
    alarm_part_counts,
    detection_images,
    detection_metrics,
    detection_part_counts,
)
from echo_ft.metrics.intervals import BOOTSTRAP
from echo_ft.metrics.loading import Run, describe_protocol
from echo_ft.metrics.metric_values import (
    ALARM_METRICS,
    AVERAGE,
    MIN_PARTS,
    OTHER_AVERAGE,
    json_number,
    metric_interval,
)
from echo_ft.metrics.prediction_table import PredictionTable
from echo_ft.records import QUESTION_TYPES, Prediction

ALL_QUESTIONS = "All questions"
"""Name of the McNemar test over all questions behind the headline."""


@dataclass(frozen=True)
class RunGroup:
    """One run, or several runs that differ only in how their adapters were trained, for example in the seed."""

    name: str
    members: list[str]
    """Names of the runs."""
    runs: list[Run]
    tables: list[PredictionTable]

    @property
    def title(self) -> str:
        """The name, followed by the number of runs if there are several."""
        return f"{self.name} ({len(self.runs)} runs)" if len(self.runs) > 1 else self.name


def build_comparison(groups: Sequence[RunGroup]) -> dict[str, Any]:
    """Return the content of comparison.json. All runs share resamples of the parts; the first group is the baseline.

    The runs of a group are resampled too, independently of the parts (Owen, "The Pigeonhole Bootstrap", 2007). The
    intervals then include the variation between seeds, as far as a few runs can show it.
    """
    base, first = groups[0], groups[0].tables[0]
    key_figure, single_class = headline(first), bool(strict.single_class_rows(first))
    weights, scored = first.weights(), scored_in_all(groups)
    part_counts = [compared_part_counts(group.tables[0], scored) for group in groups]
    resampled = [
        resample_runs([compared_metrics(table, weights, scored) for table in group.tables], seed)
        for seed, group in enumerate(groups, start=1)
    ]
    described = [_describe_group(*one, scored) for one in zip(groups, resampled, part_counts, strict=True)]
    tests = _corrected_tests(base, groups[1:])
    asked = [one for one, behind in zip(first.predictions, headline_questions(first), strict=True) if behind]
    differences = []
    for place, group in enumerate(groups[1:], start=1):
        rows = {}
        for key, count in part_counts[0].items():
            before, after = (described[which]["figures"][key]["value"] for which in (0, place))
            change, parts = resampled[place][key] - resampled[0][key], min(count, part_counts[place][key])
            rows[key] = {
                "difference": None if after is None or before is None else after - before,
                "interval": metric_interval(
                    change,
                    parts,
                    key,
                    difference=True,
                    percent=_in_percent(first, key),
                    single_class=single_class,
                ),
            }
        sentence = describe_difference(group.title, base.title, key_figure, rows[key_figure], asked)
        differences.append({"run": group.name, "figures": rows, "mcnemar": tests[place - 1], "verdict": sentence})
    return {
        "baseline": base.name,
        "headline": key_figure,
        "questions": len(first.predictions),
        "images": len(first.images),
        "cases": len({one.case for one in first.predictions}),
        "warnings": [
            f"{name}: {text}"
            for group in groups
            for name, run in zip(group.members, group.runs, strict=True)
            for text in run.warnings
        ]
        + server_warnings(groups)
        + scored_warnings(groups),
        "note": seed_note(groups),
        "runs": described,
        "differences": differences,
        "bootstrap": BOOTSTRAP,
    }


def scored_in_all(groups: Sequence[RunGroup]) -> np.ndarray:
    """Return which images have a P(defect) in every run, (N,) bool. Runs without any P(defect) do not count."""
    tables = [table for group in groups for table in group.tables]
    return np.logical_and.reduce([table.scored for table in tables if table.scored.any()] or [tables[0].scored])


def scored_warnings(groups: Sequence[RunGroup]) -> list[str]:
    """Warn if AUROC leaves out images because a run has no P(defect) for them."""
    images, scored = detection_images(groups[0].tables[0]), scored_in_all(groups)
    runs = [
        (name, int((images & table.scored).sum()))
        for group in groups
        for name, table in zip(group.members, group.tables, strict=True)
    ]
    short = [f"{name} has one for {count}" for name, count in runs if 0 < count < images.sum()]
    if not short:
        return []
    return [
        f"AUROC covers only {(images & scored).sum()} of {images.sum()} images, because it needs their P(defect) from "
        f"every run ({', '.join(short)})"
    ]


def server_warnings(groups: Sequence[RunGroup]) -> list[str]:
    """Warn if only some of the runs come from a server, which may round logits more coarsely."""
    places: dict[bool, list[str]] = {}
    for group in groups:
        for name, run in zip(group.members, group.runs, strict=True):
            places.setdefault(run.provenance.get("server") is not None, []).append(name)
    if len(places) < 2:
        return []
    return [
        f"a server answered {', '.join(places[True])} but not {', '.join(places[False])}; a local run reads letters "
        "from float32 logits, but a server may round them (vLLM to the model's dtype), so answers near a tie may differ"
    ]


def seed_note(groups: Sequence[RunGroup]) -> str:
    """Say which groups were trained only once. Empty if there is none, or if all runs have the same adapters."""
    adapters = [
        sorted(str(card.get("fingerprint")) for card in (run.provenance.get("adapters") or {}).values())
        for group in groups
        for run in group.runs
    ]
    once = [group.name for group in groups if len(group.runs) == 1 and group.runs[0].provenance.get("adapters")]
    if not once or all(one == adapters[0] for one in adapters):
        return ""
    verb = "was" if len(once) == 1 else "were"
    return (
        f"{' and '.join(once)} {verb} trained only once, so the intervals leave out what another seed would change; "
        "to include it, train with several seeds and join their runs with commas"
    )


def _corrected_tests(base: RunGroup, others: Sequence[RunGroup]) -> list[dict[str, dict[str, Any]]]:
    """Test each group against the baseline.

    There are three Holm families: the tests over all questions, those per MMAD type, and those per other type.
    """
    tests = [mcnemar_tests(base, group) for group in others]
    for family in ([ALL_QUESTIONS], list(QUESTION_TYPES), base.tables[0].other_types):
        found = [test[row] for test in tests for row in family if row in test]
        for test, adjusted in zip(found, intervals.holm([test["p"] for test in found]), strict=True):
            test["p_holm"] = adjusted
    return tests


def resample_runs(resampled: Sequence[dict[str, np.ndarray]], seed: int) -> dict[str, np.ndarray]:
    """Return the mean of each metric over the runs of a group, (R,). If there are several runs, they are resampled too.

    `resampled` holds the metrics of each run in the same resamples of the parts. A resample draws one run fewer than
    the group has, so the variance of its mean is unbiased (Rao and Wu, 1988).
    """
    count = len(resampled)
    if count == 1:
        return resampled[0]
    resamples = len(next(iter(resampled[0].values())))
    draws = np.random.default_rng(seed).multinomial(count - 1, np.full(count, 1 / count), size=resamples)
    shares = draws.T / (count - 1)
    return {key: (shares * np.array([metrics[key] for metrics in resampled])).sum(axis=0) for key in resampled[0]}


def _describe_group(
    group: RunGroup, resampled: Mapping[str, np.ndarray], part_counts: Mapping[str, int], scored: np.ndarray
) -> dict[str, Any]:
    """Return the metrics of a group with their intervals, its answer counts and its provenance."""
    first = group.tables[0]
    values = [compared_metrics(table, first.unit_weights(), scored) for table in group.tables]
    single_class = bool(strict.single_class_rows(first))
    return {
        "name": group.name,
        "title": group.title,
        "members": group.members,
        "protocol": "; or ".join(dict.fromkeys(map(describe_protocol, group.runs))),
        "figures": {
            key: mean_over_runs([json_number(metrics[key][0]) for metrics in values])
            | {
                "interval": metric_interval(
                    resampled[key], parts, key, percent=_in_percent(first, key), single_class=single_class
                )
            }
            for key, parts in part_counts.items()
        },
        "counts": strict.answer_counts([one for run in group.runs for one in run.predictions]),
        "provenance": _merge_provenance([run.provenance for run in group.runs]),
    }


def mean_over_runs(values: Sequence[float | None]) -> dict[str, Any]:
    """Return the mean, the standard deviation (None for one run), the number of runs, and the value of each run."""
    known = [value for value in values if value is not None]
    complete = len(known) == len(values)
    return {
        "value": float(np.mean(known)) if complete else None,
        "standard_deviation": float(np.std(known, ddof=1)) if complete and len(values) > 1 else None,
        "runs": len(values),
        "values": list(values),
    }


def _merge_provenance(provenances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Keep each value that all runs share; for the other keys, list the value of every run."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for one in provenances for key in one):
        values = [one.get(key) for one in provenances]
        merged[key] = values[0] if all(value == values[0] for value in values) else values
    return merged


def mcnemar_tests(first: RunGroup, second: RunGroup) -> dict[str, dict[str, Any]]:
    """Return {ALL_QUESTIONS or question type: questions that only one run answered correctly, and the exact p-value}.

    Empty if a group has several runs, because a question with several answers does not form one pair.
    """
    if len(first.runs) > 1 or len(second.runs) > 1:
        return {}
    base, other = first.tables[0], second.tables[0]
    tests = {}
    rows = {kind: base.type_index == place for place, kind in enumerate(QUESTION_TYPES)}
    rows |= {kind: base.other_type_index == place for place, kind in enumerate(base.other_types)}
    rows[ALL_QUESTIONS] = headline_questions(base)
    for row, chosen in rows.items():
        if chosen.any():
            lost = int((base.correct & ~other.correct & chosen).sum())
            won = int((other.correct & ~base.correct & chosen).sum())
            tests[row] = {"only_baseline": lost, "only_run": won, "p": intervals.mcnemar(lost, won)}
    return tests


def describe_difference(
    name: str, baseline: str, figure: str, average: Mapping[str, Any], asked: Sequence[Prediction]
) -> str:
    """Describe the difference between two runs' headlines, the `figure`, in one sentence.

    `average` is the difference, and `asked` are the questions that it covers, as one of the runs answered them.
    """
    difference = average["difference"]
    where = f"on {len(asked)} questions from {len({one.case for one in asked})} cases"
    if average["interval"] is None:
        few = "dataset" if figure == AVERAGE else "question type"
        return (
            f"{name} and {baseline} cannot be told apart: the difference is {difference:+.1f} points {where}, and a "
            f"{few} with fewer than {MIN_PARTS} parts gives no interval"
        )
    low, high = average["interval"]
    if low > 0:
        by = f"{difference:.1f} points (95% interval {low:.1f} to {high:.1f})"
        return f"{name} is better than {baseline} by {by} {where}"
    if high < 0:
        by = f"{-difference:.1f} points (95% interval {-high:.1f} to {-low:.1f})"
        return f"{name} is worse than {baseline} by {by} {where}"
    return (
        f"{name} and {baseline} cannot be told apart: the difference is {difference:+.1f} points "
        f"(95% interval {low:+.1f} to {high:+.1f}) {where}"
    )


def compared_metrics(
    table: PredictionTable, weights: np.ndarray, scored: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return the compared metrics (R,): the `Average` row and ALARM_METRICS in percent, and detection from 0 to 1.

    AUROC covers the images in `scored`, (N,) bool, that have a P(defect), by default all that have one.
    The scores, in percent, for question types that are not part of MMAD come last. If the table has only such types,
    their mean comes first.
    """
    row = strict.strict_array(table, weights)[:, -1].T
    ours = _in_order(row, detection_metrics(table, weights, scored=scored), alarm_metrics(table, weights))
    return _with_other_types(table, ours, strict.other_type_array(table, weights).T)


def compared_part_counts(table: PredictionTable, scored: np.ndarray | None = None) -> dict[str, int]:
    """Count the parts behind each of `compared_metrics`."""
    counts, images = strict.strict_part_counts(table)[-1].tolist(), detection_images(table)
    alarms = alarm_part_counts(table, images)
    by_name = {name: alarms[by, rate] for name, (_, by, rate) in ALARM_METRICS.items()}
    ours = _in_order(counts, detection_part_counts(table, images, scored), by_name)
    return _with_other_types(table, ours, strict.other_type_part_counts(table))


def headline(table: PredictionTable) -> str:
    """Return the figure that sums up a run: MMAD's average, or that of the other types if there are no MMAD types."""
    return AVERAGE if (table.type_index >= 0).any() else OTHER_AVERAGE


def headline_questions(table: PredictionTable) -> np.ndarray:
    """Return which questions the `headline` covers, (Q,) bool."""
    return (table.type_index if headline(table) == AVERAGE else table.other_type_index) >= 0


def _in_percent(table: PredictionTable, key: str) -> bool:
    return key in (*table.other_types, OTHER_AVERAGE)


def _with_other_types(table: PredictionTable, ours: Mapping[str, Any], row: Iterable[Any]) -> dict[str, Any]:
    others = dict(zip((*table.other_types, OTHER_AVERAGE), row, strict=True))
    average = {OTHER_AVERAGE: others.pop(OTHER_AVERAGE)}
    return {**ours, **others} if headline(table) == AVERAGE else {**average, **ours, **others}


def _in_order(row: Iterable[Any], detection: Mapping[str, Any], alarms: Mapping[str, Any]) -> dict[str, Any]:
    """Combine a row of the strict table with detection values and ALARM_METRICS; the average comes first."""
    columns = dict(zip([*QUESTION_TYPES, AVERAGE], row, strict=True))
    chosen = {"AUROC": detection["auroc"], "recall": detection["recall"], "specificity": detection["specificity"]}
    first = {name: columns.pop(name) for name in (AVERAGE, "Anomaly Detection")}
    return {**first, **chosen, **alarms, **columns}
