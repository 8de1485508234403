"""Compare runs on the same questions: `python -m evaluation.compare BASELINE_DIR RUN_DIR ...`.

Writes comparison.json and compare.html and prints each run's figures and their paired differences to the first run,
with intervals, and ends with one sentence for each run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo_ft import config as configs
from echo_ft import metrics, statistics
from echo_ft.metrics import Sheet
from echo_ft.records import KINDS, EchoError, write_whole
from evaluation import pages
from evaluation.pages import DETECTION_FIGURES, interval, show, signed, text_table
from evaluation.score import Run, load_run, named_first

TOGETHER = "All questions"
"""The row of all kinds together in the McNemar tests."""


@dataclass(frozen=True)
class CompareConfig:
    """Options of `python -m evaluation.compare`."""

    runs: list[str] = field(
        metadata={"help": "Folders of two or more runs, the baseline first; may stand first, without --runs."}
    )
    output: str | None = field(
        default=None, metadata={"help": "Where the comparison goes; `compare` next to the last run if absent."}
    )
    report_to: str = field(
        default="none",
        metadata={"help": "Also log the table there; W&B's project is WANDB_PROJECT.", "choices": ["none", "wandb"]},
    )


def main(argv: list[str]) -> None:
    """Read, check that the runs can be compared, compare, write, print."""
    (config,) = configs.parse([CompareConfig], named_first(argv, "--runs"))
    if len(config.runs) < 2:
        raise EchoError("give two or more runs, the baseline first: python -m evaluation.compare BASE_DIR TUNED_DIR")
    runs = [load_run(Path(folder)) for folder in config.runs]
    sheets = [metrics.sheet(run.predictions) for run in runs]
    names = run_names([run.folder for run in runs])
    require_same_questions(names, runs, sheets)
    comparison = compare(names, runs, sheets)
    output = Path(config.output) if config.output else runs[-1].folder.resolve().parent / "compare"
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(comparison, indent=1, ensure_ascii=False)
    write_whole(output / "comparison.json", text + "\n")
    write_whole(output / "compare.html", page(comparison, runs, sheets))
    print(f"wrote comparison.json, compare.html to {output}\n")
    if config.report_to == "wandb":
        log_to_wandb(comparison)
    for warning in comparison["warnings"]:
        print(f"WARNING: {warning}", file=sys.stderr)
    print_comparison(comparison)


def run_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell all runs apart. Raises EchoError where a folder comes twice."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise EchoError("the same run is given twice; give each run once")
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def require_same_questions(names: Sequence[str], runs: Sequence[Run], sheets: Sequence[Sheet]) -> None:
    """Raise EchoError, naming what differs, where a run was not asked just what the first was."""
    first = {(one.case, one.question): one for one in sheets[0].predictions}
    for name, run, sheet in zip(names[1:], runs[1:], sheets[1:], strict=True):
        these = f"{names[0]} and {name} cannot be compared: "
        for name_of in ("dataset_fingerprint", "split"):
            ours, theirs = runs[0].provenance.get(name_of), run.provenance.get(name_of)
            if ours != theirs:
                raise EchoError(f"{these}their {name_of} differs ({ours} and {theirs}); evaluate both on one dataset")
        other = {(one.case, one.question): one for one in sheet.predictions}
        missing, more = sorted(first.keys() - other.keys()), sorted(other.keys() - first.keys())
        if missing or more:
            example = (missing or more)[0]
            raise EchoError(
                f"{these}{len(missing)} questions are in the first alone and {len(more)} in the second alone "
                f"(question {example[1]} of case {example[0]}); finish both runs with evaluation.run"
            )
        for key, one in first.items():
            asked = ("dataset", "product", "image", "condition", "kind", "question_text", "options", "answer")
            differing = [part for part in asked if getattr(one, part) != getattr(other[key], part)]
            if differing:
                raise EchoError(
                    f"{these}the {differing[0]} of question {key[1]} of case {key[0]} differs; "
                    "evaluate both on one dataset"
                )


def compare(names: Sequence[str], runs: Sequence[Run], sheets: Sequence[Sheet]) -> dict[str, Any]:
    """comparison.json's content. All runs are resampled together: the same parts in the same resample."""
    weights, once = sheets[0].weights(), sheets[0].once()
    values = [{key: metrics.number(value[0]) for key, value in metrics.figures(one, once).items()} for one in sheets]
    spreads = [metrics.figures(sheet, weights) for sheet in sheets]
    counts = [metrics.counts(run.predictions) for run in runs]
    tests = [mcnemar_tests(sheets[0], sheet) for sheet in sheets[1:]]
    for family in ([TOGETHER], list(KINDS)):
        found = [test[row] for test in tests for row in family if row in test]
        for test, adjusted in zip(found, statistics.holm([test["p"] for test in found]), strict=True):
            test["p_holm"] = adjusted
    cases = len({one.case for one in runs[0].predictions})
    differences = []
    for place in range(1, len(runs)):
        rows = {}
        for key, base in values[0].items():
            tuned = values[place][key]
            low, high = map(metrics.number, statistics.percentile_interval(spreads[place][key] - spreads[0][key]))
            rows[key] = {
                "difference": None if tuned is None or base is None else tuned - base,
                "interval": metrics.pair(low, high),
            }
        sentence = verdict(names[place], names[0], rows["Average"], counts[0]["questions"], cases)
        differences.append({"run": names[place], "figures": rows, "mcnemar": tests[place - 1], "verdict": sentence})
    return {
        "baseline": names[0],
        "questions": counts[0]["questions"],
        "images": counts[0]["images"],
        "cases": cases,
        "warnings": [f"{name}: {text}" for name, run in zip(names, runs, strict=True) for text in run.warnings],
        "runs": [
            {
                "name": name,
                "figures": {
                    key: {
                        "value": value,
                        "interval": metrics.pair(*map(metrics.number, statistics.percentile_interval(spread[key]))),
                    }
                    for key, value in figures.items()
                },
                "counts": count,
                "provenance": run.provenance,
            }
            for name, run, figures, spread, count in zip(names, runs, values, spreads, counts, strict=True)
        ],
        "differences": differences,
        "bootstrap": {"unit": "part", "resamples": statistics.RESAMPLES, "seed": statistics.SEED,
                      "level": statistics.LEVEL},
    }  # fmt: skip


def mcnemar_tests(base: Sheet, other: Sheet) -> dict[str, dict[str, Any]]:
    """{All questions and each kind: questions that one run alone answered correctly, and the exact p-value}."""
    tests = {}
    for row in (TOGETHER, *KINDS):
        of_kind = base.kinds >= 0 if row == TOGETHER else base.kinds == KINDS.index(row)
        if of_kind.any():
            lost = int((base.correct & ~other.correct & of_kind).sum())
            won = int((other.correct & ~base.correct & of_kind).sum())
            tests[row] = {"only_baseline": lost, "only_run": won, "p": statistics.mcnemar(lost, won)}
    return tests


def verdict(name: str, baseline: str, average: Mapping[str, Any], questions: int, cases: int) -> str:
    """One plain sentence about the strict averages of two runs."""
    difference, (low, high) = average["difference"], average["interval"]
    where = f"on {questions} questions of {cases} cases"
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


def page(comparison: Mapping[str, Any], runs: Sequence[Run], sheets: Sequence[Sheet]) -> str:
    """compare.html's text."""
    described = [run["provenance"] for run in comparison["runs"]]
    keys = list(dict.fromkeys(key for one in described for key in one))
    differing = [key for key in keys if any(one.get(key) != described[0].get(key) for one in described)]
    root = pages.image_root(runs[-1].provenance)
    changed = {}
    for title, gained in (("Now right", True), ("Now wrong", False)):
        correct = sheets[-1].correct if gained else sheets[0].correct
        wrong = sheets[0].correct if gained else sheets[-1].correct
        found = [place for place in range(len(correct)) if correct[place] and not wrong[place]]
        chosen = [found[index * len(found) // 12] for index in range(12)] if len(found) > 12 else found
        changed[title] = (
            len(found),
            [
                {
                    "before": sheets[0].predictions[place],
                    "after": sheets[-1].predictions[place],
                    "gained": gained,
                    "thumbnail": pages.thumbnail(root, sheets[0].predictions[place].image),
                }
                for place in chosen
            ],
        )
    return pages.render(
        "compare.html.jinja",
        comparison=comparison,
        curves=[metrics.roc_points(sheet) for sheet in sheets],
        detection_figures=pages.DETECTION_FIGURES,
        together=TOGETHER,
        reach=_reach(comparison["differences"]),
        changed=changed,
        same={key: described[0][key] for key in keys if key not in differing},
        differing={key: [one.get(key) for one in described] for key in differing},
    )


def _reach(differences: Sequence[Mapping[str, Any]]) -> int:
    """Points to each side of zero that the drawing of the differences needs."""
    bounds = [
        abs(bound) * (100 if key in DETECTION_FIGURES else 1)
        for difference in differences
        for key, one in difference["figures"].items()
        for bound in one["interval"] or ()
    ]
    return next((reach for reach in (10, 25, 50) if max(bounds, default=0) <= reach), 100)


def print_comparison(comparison: Mapping[str, Any]) -> None:
    """The table of all runs, the differences to the baseline, and a sentence for each run, on stdout."""
    runs, keys = comparison["runs"], list(comparison["runs"][0]["figures"])
    rows = [("strict", *(cell for run in runs for cell in (run["name"], "95 % interval")))]
    for key in keys:
        found = [run["figures"][key] for run in runs]
        if any(one["value"] is not None for one in found):
            cells = (cell for one in found for cell in (show(key, one["value"]), interval(key, one["interval"])))
            rows.append((key, *cells))
    rows.append(("unparsed + failed", *(cell for run in runs for cell in (_unread(run["counts"]), ""))))
    print(text_table(rows))
    for difference in comparison["differences"]:
        rows = [(f"{difference['run']} - {comparison['baseline']}", "difference", "95 % interval", "won", "lost", "p")]
        for key in keys:
            one, test = difference["figures"][key], difference["mcnemar"].get(TOGETHER if key == "Average" else key)
            if one["difference"] is not None:
                counts = (
                    (str(test["only_run"]), str(test["only_baseline"]), p_text(test["p_holm"])) if test else ("",) * 3
                )
                shown = signed(one["difference"], 3 if key in DETECTION_FIGURES else 1)
                rows.append((key, shown, interval(key, one["interval"]), *counts))
        print("\n" + text_table(rows))
    print("\nAUROC, recall and specificity from 0 to 1, the rest in percent; won, lost: questions that one of the two")
    print("alone answered correctly; p: exact McNemar test on them, Holm-corrected\n")
    for difference in comparison["differences"]:
        print(difference["verdict"])


def p_text(value: float) -> str:
    """`0.013`, or `< 0.001`."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _unread(counts: Mapping[str, Any]) -> str:
    return str(counts["unparsed"] + counts["failed"])


def log_to_wandb(comparison: Mapping[str, Any]) -> None:
    """Log the figures of all runs as one W&B table, and the differences as summary values."""
    import wandb

    with wandb.init(project=os.environ.get("WANDB_PROJECT", "echo-ft"), job_type="compare") as run:
        table = wandb.Table(columns=["run", "figure", "value", "low", "high"])
        for one in comparison["runs"]:
            for key, figure in one["figures"].items():
                table.add_data(one["name"], key, figure["value"], *(figure["interval"] or (None, None)))
        run.log({"comparison": table})
        for difference in comparison["differences"]:
            for key, figure in difference["figures"].items():
                run.summary[f"{difference['run']}/{key}/difference"] = figure["difference"]


if __name__ == "__main__":
    configs.run_main(main)
