"""What runs on the same questions say about each other: figures, paired differences, tests, a sentence each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from echo_ft.metrics import intervals, strict
from echo_ft.metrics.detection import _asked_for_defects, detection_arrays, detection_units
from echo_ft.metrics.figures import AVERAGE, MIN_PARTS, figure_interval, number
from echo_ft.metrics.intervals import BOOTSTRAP
from echo_ft.metrics.loading import Run
from echo_ft.metrics.prediction_table import PredictionTable
from echo_ft.metrics.strict import strict_array, strict_units
from echo_ft.records import QUESTION_TYPES

TOGETHER = "All questions"
"""The row of all kinds together in the McNemar tests."""


@dataclass(frozen=True)
class Group:
    """One run, or several of one kind."""

    name: str
    members: list[str]
    """The runs' own names."""
    runs: list[Run]
    tables: list[PredictionTable]

    @property
    def title(self) -> str:
        """The name, with the number of runs where there are several."""
        return f"{self.name} ({len(self.runs)} runs)" if len(self.runs) > 1 else self.name


def compare(groups: Sequence[Group]) -> dict[str, Any]:
    """comparison.json's content. All runs are resampled together: the same parts in the same resample.

    Where a group has several runs, these are resampled too, apart from the parts (Owen, "The Pigeonhole Bootstrap",
    2007), so that its intervals hold what another seed would change as far as a few runs can tell it.
    """
    base, first = groups[0], groups[0].tables[0]
    weights, once = first.weights(), first.once()
    units = [compared_units(group.tables[0]) for group in groups]
    values = [[compared_figures(table, once) for table in group.tables] for group in groups]
    spreads = [_pooled(group, weights, seed) for seed, group in enumerate(groups, start=1)]
    tests = [mcnemar_tests(base, group) for group in groups[1:]]
    for family in ([TOGETHER], list(QUESTION_TYPES)):
        found = [test[row] for test in tests for row in family if row in test]
        for test, adjusted in zip(found, intervals.holm([test["p"] for test in found]), strict=True):
            test["p_holm"] = adjusted
    described: list[dict[str, Any]] = [
        {
            "name": group.name,
            "title": group.title,
            "members": group.members,
            "figures": {
                key: _figure([number(one[key][0]) for one in some])
                | {"interval": figure_interval(spread[key], count, key)}
                for key, count in rests_on.items()
            },
            "counts": strict.counts([one for run in group.runs for one in run.predictions]),
            "provenance": _merged([run.provenance for run in group.runs]),
        }
        for group, some, spread, rests_on in zip(groups, values, spreads, units, strict=True)
    ]
    questions, cases = len(first.predictions), len({one.case for one in first.predictions})
    differences = []
    for place, group in enumerate(groups[1:], start=1):
        rows = {}
        for key, count in units[0].items():
            before, after = (described[which]["figures"][key]["value"] for which in (0, place))
            rows[key] = {
                "difference": None if after is None or before is None else after - before,
                "interval": figure_interval(
                    spreads[place][key] - spreads[0][key], min(count, units[place][key]), key, difference=True
                ),
            }
        sentence = verdict(group.title, base.title, rows["Average"], questions, cases)
        differences.append({"run": group.name, "figures": rows, "mcnemar": tests[place - 1], "verdict": sentence})
    return {
        "baseline": base.name,
        "questions": questions,
        "images": len(first.images),
        "cases": cases,
        "warnings": [
            f"{name}: {text}"
            for group in groups
            for name, run in zip(group.members, group.runs, strict=True)
            for text in run.warnings
        ],
        "runs": described,
        "differences": differences,
        "bootstrap": BOOTSTRAP,
    }


def _pooled(group: Group, weights: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Each figure's mean over the group's runs, (R,), in resamples of the parts and, where there are several, of them.

    One run less is drawn than there are, which gives their mean its true variance (Rao and Wu, 1988).
    """
    spreads = [compared_figures(table, weights) for table in group.tables]
    count = len(spreads)
    if count == 1:
        return spreads[0]
    draws = np.random.default_rng(seed).multinomial(count - 1, np.full(count, 1 / count), size=len(weights))
    shares = draws.T / (count - 1)
    return {key: (shares * np.array([spread[key] for spread in spreads])).sum(axis=0) for key in spreads[0]}


def _figure(values: Sequence[float | None]) -> dict[str, Any]:
    """The mean over runs, their standard deviation (None for one run), how many, and each run's own."""
    known = [value for value in values if value is not None]
    complete = len(known) == len(values)
    return {
        "value": float(np.mean(known)) if complete else None,
        "standard_deviation": float(np.std(known, ddof=1)) if complete and len(values) > 1 else None,
        "runs": len(values),
        "values": list(values),
    }


def _merged(provenances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the runs of a group have in common as it stands, the rest as a list of each run's."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for one in provenances for key in one):
        values = [one.get(key) for one in provenances]
        merged[key] = values[0] if all(value == values[0] for value in values) else values
    return merged


def mcnemar_tests(first: Group, second: Group) -> dict[str, dict[str, Any]]:
    """{All questions and each kind: questions that one run alone answered correctly, and the exact p-value}.

    Empty where either has several runs: a question that was answered several times makes no one pair.
    """
    if len(first.runs) > 1 or len(second.runs) > 1:
        return {}
    base, other = first.tables[0], second.tables[0]
    tests = {}
    for row in (TOGETHER, *QUESTION_TYPES):
        of_kind = base.kinds >= 0 if row == TOGETHER else base.kinds == QUESTION_TYPES.index(row)
        if of_kind.any():
            lost = int((base.correct & ~other.correct & of_kind).sum())
            won = int((other.correct & ~base.correct & of_kind).sum())
            tests[row] = {"only_baseline": lost, "only_run": won, "p": intervals.mcnemar(lost, won)}
    return tests


def verdict(name: str, baseline: str, average: Mapping[str, Any], questions: int, cases: int) -> str:
    """One plain sentence about the strict averages of two runs."""
    difference = average["difference"]
    where = f"on {questions} questions of {cases} cases"
    if average["interval"] is None:
        return (
            f"{name} and {baseline} cannot be told apart: the difference is {difference:+.1f} points {where}, and a "
            f"dataset with fewer than {MIN_PARTS} parts gives no interval"
        )
    low, high = average["interval"]
    if low > 0:
        by = f"{difference:.1f} points (95 % interval {low:.1f} to {high:.1f})"
        return f"{name} is better than {baseline} by {by} {where}"
    if high < 0:
        by = f"{-difference:.1f} points (95 % interval {-high:.1f} to {-low:.1f})"
        return f"{name} is worse than {baseline} by {by} {where}"
    return (
        f"{name} and {baseline} cannot be told apart: the difference is {difference:+.1f} points "
        f"(95 % interval {low:+.1f} to {high:+.1f}) {where}"
    )


def compared_figures(table: PredictionTable, weights: np.ndarray) -> dict[str, np.ndarray]:
    """What two runs are compared by, each (R,): the `Average` row in percent, and all images' detection from 0 to 1."""
    return _ordered(strict_array(table, weights)[:, -1].T, detection_arrays(table, weights))


def compared_units(table: PredictionTable) -> dict[str, int]:
    """How many parts each of `figures` rests on."""
    return _ordered(strict_units(table)[-1].tolist(), detection_units(table, _asked_for_defects(table)))


def _ordered(row: Iterable[Any], found: Mapping[str, Any]) -> dict[str, Any]:
    table = dict(zip([*QUESTION_TYPES, AVERAGE], row, strict=True))
    chosen = {"AUROC": found["auroc"], "recall": found["recall"], "specificity": found["specificity"]}
    return {AVERAGE: table.pop(AVERAGE), "Anomaly Detection": table.pop("Anomaly Detection"), **chosen, **table}
