"""The table of an ablation: the scores of each cell, and its paired difference from the baseline.

Scores and differences equal those of evaluation.compare. If a cell's questions are not those of the baseline, its
difference covers only the questions that both share, if any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echo_ft.files import write_json, write_text
from echo_ft.metrics import intervals
from echo_ft.metrics.comparison import ALL_QUESTIONS, RunGroup, build_comparison, headline, scored_warnings
from echo_ft.metrics.intervals import BOOTSTRAP
from echo_ft.metrics.loading import load_run
from echo_ft.metrics.metric_values import MIN_PARTS, OTHER_AVERAGE
from echo_ft.metrics.prediction_table import make_prediction_table
from echo_ft.metrics.report import small_class_warnings
from echo_ft.records import QUESTION_TYPES, Prediction
from evaluation.formatting import (
    UNPARSED_LABEL,
    axis_limit,
    interval_text,
    metric_text,
    p_text,
    percent,
    signed,
    text_table,
    unparsed_or_failed,
)
from evaluation.pages import render

INITIALS = {kind: "".join(word[0] for word in kind.split()) for kind in QUESTION_TYPES}
"""Column headings of the question types."""

ALARM_COLUMNS = {"false alarms, %": "False alarms, parts", "escapes, %": "Escapes, parts"}
"""Column headings of false alarms and escapes, and their names in a comparison."""

NO_SCORE: Mapping[str, Any] = {"value": None, "difference": None, "interval": None}
"""Figure of a cell without questions of the types that the table sums up."""

QuestionKey = tuple[Any, ...]
"""Everything that identifies a question and the image that it is about."""


def build_table(
    cells: Sequence[tuple[str, Mapping[str, Any], Path]], baseline: str, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Return the content of ablation.json.

    `cells` are (name, options in which the cell differs, run folder); several cells may share a folder. `seconds` maps
    names of run folders to the time spent on them. Each cell of the result has its `figures` with intervals, None if
    they rest on too few parts, its `counts`, and its `difference` from the baseline. The difference is None for the
    baseline and for a cell that shares no question with it. `p_holm` is corrected for multiple comparisons across all
    differences in the table. `headline` names the figure that sums up a cell: the one of the baseline.

    Raises EchoError if a run cannot be loaded.
    """
    folders = {name: folder for name, _, folder in cells}
    first_names = {folder: name for name, folder in reversed(folders.items())}
    groups = {folder: _load_group(first_names[folder], folder) for folder in dict.fromkeys(folders.values())}
    scores, differences, warnings = _compare_cells(groups, folders[baseline], baseline)
    return {
        "baseline": baseline,
        "headline": headline(groups[folders[baseline]].tables[0]),
        "cells": [
            {
                "name": name,
                "differs": dict(differs),
                "run": folder.name,
                "same_run_as": first_names[folder],
                "protocol": scores[folder]["protocol"],
                "figures": {
                    key: {"value": score["value"], "interval": score["interval"]}
                    for key, score in scores[folder]["figures"].items()
                },
                "counts": scores[folder]["counts"],
                "cases": len({one.case for one in groups[folder].runs[0].predictions}),
                "seconds": seconds.get(folder.name),
                "difference": differences.get(folder),
            }
            for name, differs, folder in cells
        ],
        "warnings": [f"{', '.join(names)}: {text}" for text, names in warnings.items()],
        "bootstrap": BOOTSTRAP,
        "provenance": {name: groups[folder].runs[0].provenance for name, folder in folders.items()},
    }


def _compare_cells(
    groups: Mapping[Path, RunGroup], base_folder: Path, baseline: str
) -> tuple[dict[Path, Any], dict[Path, Any], dict[str, list[str]]]:
    """Return the scores of each run, its difference from the baseline, and {warning: names of cells}.

    Runs that answer the baseline's questions are compared together, so they share resamples.
    """
    base = groups[base_folder]
    same_questions, scores, differences = [base], dict[Path, Any](), dict[Path, Any]()
    warnings: dict[str, list[str]] = {}
    for folder, group in groups.items():
        for warning in _run_warnings(group):
            warnings.setdefault(warning, []).append(group.name)
        shared = _question_keys(base) & _question_keys(group)
        if len(shared) == len(base.tables[0].predictions) == len(group.tables[0].predictions):
            same_questions += [group] if group is not base else []
            continue
        scores[folder] = build_comparison([group])["runs"][0]
        if shared:
            pair = [_restrict(one, shared) for one in (base, group)]
            differences[folder] = _difference(build_comparison(pair)["differences"][0], pair[0])
            for warning in [*small_class_warnings(pair[0].tables[0]), *scored_warnings(pair)]:
                text = f"on the questions shared with {baseline}, {warning}"
                warnings.setdefault(text, []).append(group.name)
    comparison = build_comparison(same_questions)
    for warning in scored_warnings(same_questions):
        warnings[warning] = [group.name for group in same_questions]
    for group, described in zip(same_questions, comparison["runs"], strict=True):
        scores[group.runs[0].folder] = described
    for group, found in zip(same_questions[1:], comparison["differences"], strict=True):
        differences[group.runs[0].folder] = _difference(found, base)
    corrected = intervals.holm([difference["p"] for difference in differences.values()])
    for difference, p_holm in zip(differences.values(), corrected, strict=True):
        difference["p_holm"] = p_holm
    return scores, differences, warnings


def _load_group(name: str, folder: Path) -> RunGroup:
    run = load_run(folder)
    return RunGroup(name, [name], [run], [make_prediction_table(run.predictions)])


def _run_warnings(group: RunGroup) -> list[str]:
    """Return warnings for readers of a cell's scores."""
    (run,), (table,) = group.runs, group.tables
    failed = [one.error for one in run.predictions if one.error is not None]
    failures = []
    if failed:
        failures = [f"{len(failed)} predictions failed (first: {failed[0]}); rerun the same command to retry them"]
    return [*run.warnings, *failures, *small_class_warnings(table)]


def _question_key(one: Prediction) -> QuestionKey:
    image = (one.case, one.dataset, one.product, one.group, one.image, one.condition)
    return (*image, one.question, one.kind, one.question_text, tuple(one.options.items()), one.answer)


def _question_keys(group: RunGroup) -> set[QuestionKey]:
    return {_question_key(one) for one in group.tables[0].predictions}


def _restrict(group: RunGroup, questions: set[QuestionKey]) -> RunGroup:
    """Return the group with only these questions."""
    chosen = [one for one in group.tables[0].predictions if _question_key(one) in questions]
    return RunGroup(group.name, group.members, group.runs, [make_prediction_table(chosen)])


def _difference(found: Mapping[str, Any], base: RunGroup) -> dict[str, Any]:
    """Return the entries of the table about a difference, with the numbers of questions and cases that it covers."""
    test, predictions = found["mcnemar"][ALL_QUESTIONS], base.tables[0].predictions
    return {
        "questions": len(predictions),
        "cases": len({one.case for one in predictions}),
        "figures": found["figures"],
        "won": test["only_run"],
        "lost": test["only_baseline"],
        "p": test["p"],
    }


def table_rows(table: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table as text, the header first.

    Question types that do not occur in any cell are left out.
    """
    kinds = [
        kind for kind in QUESTION_TYPES if any(cell["figures"][kind]["value"] is not None for cell in table["cells"])
    ]
    header = ("cell", "average, %", "difference", "won, lost", "p", "AUROC", *ALARM_COLUMNS)
    rows = [(*header, *(INITIALS[kind] for kind in kinds), f"{UNPARSED_LABEL}, %", "questions", "cases", "seconds")]
    key = table["headline"]
    for cell in table["cells"]:
        scores, counts = cell["figures"], cell["counts"]
        rows.append(
            (
                cell["name"],
                _score_text(key, scores.get(key, NO_SCORE)),
                *_difference_cells(cell["difference"], key),
                _score_text("AUROC", scores["AUROC"]),
                *(_score_text(name, scores[name]) for name in ALARM_COLUMNS.values()),
                *(percent(scores[kind]["value"]) for kind in kinds),
                unparsed_or_failed(counts),
                str(counts["questions"]),
                str(cell["cases"]),
                "–" if cell["seconds"] is None else f"{cell['seconds']:.0f}",
            )
        )
    return rows


def _difference_cells(difference: Mapping[str, Any] | None, key: str) -> tuple[str, str, str]:
    """Return the columns `difference`, `won, lost` and `p`, empty if there is no difference."""
    if difference is None:
        return "", "", ""
    average = difference["figures"].get(key, NO_SCORE)
    interval = " to ".join(signed(bound) for bound in average["interval"] or [None])
    counts = f"{difference['won']}, {difference['lost']}"
    return f"{signed(average['difference'])} ({interval})", counts, p_text(difference["p_holm"])


def _score_text(name: str, score: Mapping[str, Any]) -> str:
    if score["value"] is None:
        return "–"
    return f"{metric_text(name, score['value'])} ({interval_text(name, score['interval'])})"


def notes(table: Mapping[str, Any]) -> list[str]:
    """Explain the columns, and list the cells that differ from the others in more than their options."""
    base, header = table["baseline"], table_rows(table)[0]
    kinds = ", ".join(f"{short} {kind}" for kind, short in INITIALS.items() if short in header)
    columns = f" ({kinds})" if kinds else ""
    average = (
        " The average covers question types that are not part of MMAD." if table["headline"] == OTHER_AVERAGE else ""
    )
    compared = sum(cell["difference"] is not None for cell in table["cells"] if cell["name"] == cell["same_run_as"])
    plural = "" if compared == 1 else "s"
    found = [
        f"Scores are strict and in percent{columns}; AUROC of P(defect) ranges from 0 to 1.{average} False alarms are "
        "good parts that an answer flags, and escapes are defective parts that no answer flags. Differences are paired "
        f"differences from {base}. Brackets contain 95% intervals over physical parts; there is none for fewer than "
        f"{MIN_PARTS} parts. Won, lost: questions that only the cell or only {base} answered correctly. p: exact "
        f"McNemar test on these, Holm-corrected for {compared} difference{plural}. Unparsed and failed answers count "
        "as wrong. Seconds: time for what no earlier cell had computed; the first cell of a model includes loading it."
    ]
    protocols: dict[str, list[str]] = {}
    for cell in table["cells"]:
        protocols.setdefault(cell["protocol"], []).append(f'"{cell["name"]}"')
    found += [f"Protocol for {', '.join(names)}: {protocol}." for protocol, names in protocols.items()]
    sizes = {cell["name"]: (cell["counts"]["questions"], cell["cases"]) for cell in table["cells"]}
    runs = {cell["name"]: cell["run"] for cell in table["cells"]}
    for cell in table["cells"]:
        difference, name = cell["difference"], cell["name"]
        if cell["same_run_as"] != name:
            found.append(f'"{name}" has the same options as "{cell["same_run_as"]}", so they share one run.')
        elif difference is not None and {(difference["questions"], difference["cases"])} != {sizes[base], sizes[name]}:
            found.append(
                f'"{name}" used a different question set; its difference and win/loss counts cover only the '
                f'{difference["questions"]} questions ({difference["cases"]} cases) it shares with "{base}".'
            )
        elif difference is None and cell["run"] != runs[base]:
            found.append(f'"{name}" shares no question with "{base}", so there is no difference.')
    return found


def text(table: Mapping[str, Any]) -> str:
    """Return the table and its notes as text for a terminal."""
    return "\n\n".join([text_table(table_rows(table)), *notes(table)])


def markdown(table: Mapping[str, Any]) -> str:
    """Return the table and its notes in Markdown."""
    rows = table_rows(table)
    header, *lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    rule = "|" + "---|" * len(rows[0])
    return "\n".join([header, rule, *lines, *(f"\n{note}" for note in notes(table)), ""])


def write(output: Path, table: Mapping[str, Any]) -> None:
    """Write ablation.json, ablation.md and ablation.html."""
    header, *rows = table_rows(table)
    key = table["headline"]
    averages = [cell["difference"] and cell["difference"]["figures"].get(key, NO_SCORE) for cell in table["cells"]]
    provenances = list(table["provenance"].values())
    page = render(
        "ablation.html.jinja",
        table=table,
        header=header,
        rows=list(zip(table["cells"], rows, averages, strict=True)),
        notes=notes(table),
        limit=axis_limit(abs(bound) for average in averages if average for bound in average["interval"] or ()),
        same={key: value for key, value in provenances[0].items() if all(one.get(key) == value for one in provenances)},
    )
    write_json(output / "ablation.json", table)
    write_text(output / "ablation.md", markdown(table))
    write_text(output / "ablation.html", page)
