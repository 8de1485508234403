"""The table of an ablation: each cell's own figures, and its paired difference to the baseline.

The figures are those of evaluation.compare. A cell on another dataset is compared with the baseline on the questions
that both were asked, word for word, if there are any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echo_ft.files import write_text
from echo_ft.metrics import intervals
from echo_ft.metrics.comparison import TOGETHER, Group, compare
from echo_ft.metrics.figures import AVERAGE, MIN_PARTS
from echo_ft.metrics.loading import load_run
from echo_ft.metrics.prediction_table import make_prediction_table
from echo_ft.metrics.report import small_side_warnings
from echo_ft.records import QUESTION_TYPES, Prediction
from evaluation import pages
from evaluation.pages import p_text, percent, show, signed, text_table

INITIALS = {kind: "".join(word[0] for word in kind.split()) for kind in QUESTION_TYPES}
"""Headings of the kinds' columns."""


def tabulate(
    cells: Sequence[tuple[str, Mapping[str, Any], Path]], baseline: str, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """ablation.json's content. `cells` are (name, options in which it differs, its run's folder), one run for several.

    Each has its `figures` with intervals, None where they rest on few parts, its `counts`, and its
    `difference` to the baseline, None for the baseline itself and where the two have no question in common. `p_holm` is
    corrected for all differences of the table.
    """
    folders = {name: folder for name, _, folder in cells}
    base = folders[baseline]
    first = {folder: name for name, folder in reversed(folders.items())}
    groups = {folder: _group(first[folder], folder) for folder in dict.fromkeys(folders.values())}
    same, own, differences = [groups[base]], dict[Path, Any](), dict[Path, Any]()
    warned: dict[str, list[str]] = {}
    for folder, group in groups.items():
        for warning in _warnings(group):
            warned.setdefault(warning, []).append(group.name)
        common = _common(groups[base], group)
        if len(common) == len(groups[base].tables[0].predictions) == len(group.tables[0].predictions):
            same += [group] if folder != base else []
            continue
        own[folder] = compare([group])["runs"][0]
        if common:
            pair = [_restricted(one, common) for one in (groups[base], group)]
            differences[folder] = _difference(compare(pair)["differences"][0], pair[0])
            for warning in small_side_warnings(pair[0].tables[0]):
                warned.setdefault(f"on the questions that {baseline} was asked too, {warning}", []).append(group.name)
    together = compare(same)
    for group, described in zip(same, together["runs"], strict=True):
        own[group.runs[0].folder] = described
    for group, found in zip(same[1:], together["differences"], strict=True):
        differences[group.runs[0].folder] = _difference(found, groups[base])
    corrected = intervals.holm([difference["p"] for difference in differences.values()])
    for difference, p_holm in zip(differences.values(), corrected, strict=True):
        difference["p_holm"] = p_holm
    return {
        "baseline": baseline,
        "cells": [
            {
                "name": name,
                "differs": dict(differs),
                "run": folder.name,
                "same_run_as": first[folder],
                "figures": {
                    key: {"value": figure["value"], "interval": figure["interval"]}
                    for key, figure in own[folder]["figures"].items()
                },
                "counts": own[folder]["counts"],
                "cases": len({one.case for one in groups[folder].runs[0].predictions}),
                "seconds": seconds.get(folder.name),
                "difference": differences.get(folder),
            }
            for name, differs, folder in cells
        ],
        "warnings": [f"{', '.join(names)}: {text}" for text, names in warned.items()],
        "bootstrap": together["bootstrap"],
        "provenance": {name: groups[folder].runs[0].provenance for name, folder in folders.items()},
    }


def _group(name: str, folder: Path) -> Group:
    run = load_run(folder)
    return Group(name, [name], [run], [make_prediction_table(run.predictions)])


def _warnings(group: Group) -> list[str]:
    """What a reader of one cell's figures must know."""
    (run,), (table,) = group.runs, group.tables
    failed = [one.error for one in run.predictions if one.error is not None]
    told = [f"{len(failed)} predictions failed ({failed[0]}); the same command asks again"] if failed else []
    return [*run.warnings, *told, *small_side_warnings(table)]


def _asked(one: Prediction) -> tuple[Any, ...]:
    """All of a question and of the photograph that it is about."""
    about = (one.case, one.dataset, one.product, one.image, one.condition)
    return (*about, one.question, one.kind, one.question_text, tuple(one.options.items()), one.answer)


def _common(base: Group, other: Group) -> set[tuple[Any, ...]]:
    first, second = ({_asked(one) for one in group.tables[0].predictions} for group in (base, other))
    return first & second


def _restricted(group: Group, asked: set[tuple[Any, ...]]) -> Group:
    """The group with these questions alone."""
    chosen = [one for one in group.tables[0].predictions if _asked(one) in asked]
    return Group(group.name, group.members, group.runs, [make_prediction_table(chosen)])


def _difference(found: Mapping[str, Any], base: Group) -> dict[str, Any]:
    """What the table shows of one of compare's differences, and on how much of the baseline it rests."""
    test, asked = found["mcnemar"][TOGETHER], base.tables[0].predictions
    return {
        "questions": len(asked),
        "cases": len({one.case for one in asked}),
        "figures": found["figures"],
        "won": test["only_run"],
        "lost": test["only_baseline"],
        "p": test["p"],
    }


def columns(table: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table's rows as text, the header first; kinds that no cell was asked are left out."""
    kinds = [
        kind for kind in QUESTION_TYPES if any(cell["figures"][kind]["value"] is not None for cell in table["cells"])
    ]
    header = ("cell", "average, %", "difference", "won, lost", "p", "AUROC", *(INITIALS[kind] for kind in kinds))
    rows = [(*header, "unparsed, %", "questions", "cases", "seconds")]
    for cell in table["cells"]:
        figures, counts, difference = cell["figures"], cell["counts"], cell["difference"]
        compared = ("", "", "")
        if difference is not None:
            average = difference["figures"][AVERAGE]
            between = " to ".join(signed(bound) for bound in average["interval"] or [None])
            compared = (
                f"{signed(average['difference'])} ({between})",
                f"{difference['won']}, {difference['lost']}",
                p_text(difference["p_holm"]),
            )
        unparsed = 100 * (counts["unparsed"] + counts["failed"]) / counts["questions"]
        rows.append(
            (
                cell["name"],
                _figure(AVERAGE, figures[AVERAGE]),
                *compared,
                _figure("AUROC", figures["AUROC"]),
                *(percent(figures[kind]["value"]) for kind in kinds),
                percent(unparsed),
                str(counts["questions"]),
                str(cell["cases"]),
                "–" if cell["seconds"] is None else f"{cell['seconds']:.0f}",
            )
        )
    return rows


def _figure(name: str, figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return "–"
    return f"{show(name, figure['value'])} ({pages.interval_text(name, figure['interval'])})"


def notes(table: Mapping[str, Any]) -> list[str]:
    """What a reader must know of the columns, and of cells that are unlike the others; a sentence or two each."""
    base, header = table["baseline"], columns(table)[0]
    kinds = ", ".join(f"{short} {kind}" for kind, short in INITIALS.items() if short in header)
    compared = sum(cell["difference"] is not None for cell in table["cells"] if cell["name"] == cell["same_run_as"])
    found = [
        f"Strict figures in percent: {kinds}; AUROC of P(defect) from 0 to 1. Difference: to {base}, paired. In "
        f"brackets: 95 % intervals over physical parts, none for fewer than {MIN_PARTS}. Won, lost: questions that "
        f"the cell alone and that {base} alone answered correctly; p: exact McNemar test on these, Holm-corrected for "
        f"{compared} differences. Unparsed: or failed; both count as wrong. Seconds: what a cell took beside what "
        "others had computed; the first cell of a model carries its loading."
    ]
    sizes = {cell["name"]: (cell["counts"]["questions"], cell["cases"]) for cell in table["cells"]}
    runs = {cell["name"]: cell["run"] for cell in table["cells"]}
    for cell in table["cells"]:
        difference, name = cell["difference"], cell["name"]
        if cell["same_run_as"] != name:
            found.append(f"{name} has the settings of {cell['same_run_as']}: one run.")
        elif difference is not None and {(difference["questions"], difference["cases"])} != {sizes[base], sizes[name]}:
            found.append(
                f"{name} was asked other questions than {base}: its difference, and what is won and lost, is on the "
                f"{difference['questions']} questions of {difference['cases']} cases that both were asked."
            )
        elif difference is None and cell["run"] != runs[base]:
            found.append(
                f"{name} was asked other questions than {base}, none of them the same: there is no difference."
            )
    return found


def text(table: Mapping[str, Any]) -> str:
    """The table as lines of text."""
    return "\n\n".join([text_table(columns(table)), *notes(table)])


def markdown(table: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    header, *rows = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in columns(table))
    rule = "|" + "---|" * len(columns(table)[0])
    return "\n".join([header, rule, *rows, *(f"\n{note}" for note in notes(table)), ""])


def write(output: Path, table: Mapping[str, Any]) -> None:
    """Write ablation.json, ablation.md and ablation.html."""
    header, *rows = columns(table)
    averages = [cell["difference"] and cell["difference"]["figures"][AVERAGE] for cell in table["cells"]]
    described = list(table["provenance"].values())
    page = pages.render(
        "ablation.html.jinja",
        table=table,
        header=header,
        rows=list(zip(table["cells"], rows, averages, strict=True)),
        notes=notes(table),
        reach=pages.reach(abs(bound) for average in averages if average for bound in average["interval"] or ()),
        same={key: value for key, value in described[0].items() if all(one.get(key) == value for one in described)},
    )
    write_text(output / "ablation.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    write_text(output / "ablation.md", markdown(table))
    write_text(output / "ablation.html", page)
