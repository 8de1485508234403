"""Compare runs on the same questions: `python -m evaluation.compare BASELINE_DIR RUN_DIR ...`.

Several runs of one kind, such as of several seeds, stand together as their mean and its spread:

    python -m evaluation.compare BASELINE_DIR tuned=SEED_0_DIR,SEED_1_DIR,SEED_2_DIR

Writes comparison.json and compare.html and prints each kind's figures and their paired differences to the first one,
with intervals, and ends with one sentence for each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo_ft import config as configs
from echo_ft.config import named_first
from echo_ft.errors import EchoError
from echo_ft.files import write_text
from echo_ft.metrics import detection
from echo_ft.metrics.comparison import TOGETHER, Group, compare
from echo_ft.metrics.loading import Run, load_run
from echo_ft.metrics.prediction_table import PredictionTable, make_prediction_table
from echo_ft.metrics.report import SAME_MODEL
from echo_ft.terminal import LOGGER
from evaluation import pages
from evaluation.pages import DETECTION_FIGURES, interval_text, p_text, show, signed, text_table

PROTOCOL = ("answer", "option_order", "max_new_tokens", "min_pixels", "max_pixels", "prompt_version")
"""How the questions are put and the answers read: the same for all runs of a comparison, unless it is what is compared.
Model, adapters, routing, the experts' switches and corruption may differ: they are what comparisons are about."""


@dataclass(frozen=True)
class CompareConfig:
    """Options of `python -m evaluation.compare`."""

    runs: list[str] = field(
        metadata={
            "help": "Folders of two or more runs, the baseline first; may stand first, without --runs. Runs of one "
            "kind are joined by commas, with a name before them if wanted: tuned=SEED_0_DIR,SEED_1_DIR."
        }
    )
    compared: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Which part of the protocol may differ, because it is what is compared.",
            "choices": list(PROTOCOL),
        },
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
    groups = read_groups(config.runs, config.compared)
    comparison = compare(groups)
    output = Path(config.output) if config.output else groups[-1].runs[-1].folder.resolve().parent / "compare"
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(comparison, indent=1, ensure_ascii=False)
    write_text(output / "comparison.json", text + "\n")
    write_text(output / "compare.html", page(comparison, groups))
    print(f"wrote comparison.json, compare.html to {output}\n")
    for warning in comparison["warnings"]:
        LOGGER.warning(warning)
    print_comparison(comparison)
    if config.report_to == "wandb":
        log_to_wandb(comparison)


def read_groups(words: Sequence[str], compared: Sequence[str] = ()) -> list[Group]:
    """The runs of `[NAME=]DIR[,DIR...]` words. Raises EchoError where they cannot be compared or put together.

    They may differ in the parts of the protocol that are `compared`.
    """
    labels, folders = zip(*map(_split, words), strict=True)
    names = run_names([folder for some in folders for folder in some])
    runs = [load_run(folder) for some in folders for folder in some]
    tables = [make_prediction_table(run.predictions) for run in runs]
    require_same_questions(names, runs, tables)
    require_one_protocol(names, runs, compared)
    groups, start = [], 0
    for label, some in zip(labels, folders, strict=True):
        chosen = slice(start, start := start + len(some))
        groups.append(Group(label or ", ".join(names[chosen]), names[chosen], runs[chosen], tables[chosen]))
        require_one_kind(groups[-1])
    if len({group.name for group in groups}) < len(groups):
        raise EchoError(f"two of {', '.join(group.name for group in groups)} have one name; give each its own")
    return groups


def _split(word: str) -> tuple[str, list[Path]]:
    """Name, empty where none is given, and folders; the path of one that is there may hold `=` and `,`."""
    label, sign, rest = word.partition("=")
    if not sign or "/" in label or Path(word).is_dir():
        label, rest = "", word
    return label, [Path(rest)] if Path(rest).is_dir() else [Path(folder) for folder in rest.split(",")]


def require_one_kind(group: Group) -> None:
    """Raise EchoError, naming what differs, where runs of a group differ in more than their adapters' training.

    The same roles have an adapter in all of them.
    """
    for key in (*SAME_MODEL, "answer"):
        for name, run in zip(group.members[1:], group.runs[1:], strict=True):
            ours, theirs = group.runs[0].provenance.get(key), run.provenance.get(key)
            if key == "adapters":
                ours, theirs = (", ".join(sorted(adapters or {})) or "none" for adapters in (ours, theirs))
            if ours != theirs:
                raise EchoError(
                    f"{group.members[0]} and {name} are not of one kind: their {key} differs ({ours} and {theirs}); "
                    "give them as two runs, with a space between"
                )


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


def require_same_questions(names: Sequence[str], runs: Sequence[Run], tables: Sequence[PredictionTable]) -> None:
    """Raise EchoError, naming what differs, where a run was not asked just what the first was."""
    first = {(one.case, one.question): one for one in tables[0].predictions}
    for name, run, table in zip(names[1:], runs[1:], tables[1:], strict=True):
        these = f"{names[0]} and {name} cannot be compared: "
        for name_of in ("dataset_fingerprint", "split"):
            ours, theirs = runs[0].provenance.get(name_of), run.provenance.get(name_of)
            if ours != theirs:
                raise EchoError(f"{these}their {name_of} differs ({ours} and {theirs}); evaluate both on one dataset")
        other = {(one.case, one.question): one for one in table.predictions}
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


def require_one_protocol(names: Sequence[str], runs: Sequence[Run], compared: Sequence[str]) -> None:
    """Raise EchoError, naming what differs, where a run asked or read otherwise than the first.

    What an older version did not write into a run is not known, and not refused.
    """
    first = runs[0].provenance
    for name, run in zip(names[1:], runs[1:], strict=True):
        for key in PROTOCOL:
            differs = key in first and key in run.provenance and first[key] != run.provenance[key]
            if differs and key not in compared:
                raise EchoError(
                    f"{names[0]} and {name} cannot be compared: their {key} differs ({first[key]} and "
                    f"{run.provenance[key]}); run both alike, or add --compared {key} if that is what you compare"
                )


def page(comparison: Mapping[str, Any], groups: Sequence[Group]) -> str:
    """compare.html's text. What changed is shown from the first run of the baseline to the last run."""
    described = [run["provenance"] for run in comparison["runs"]]
    keys = list(dict.fromkeys(key for one in described for key in one))
    differing = [key for key in keys if any(one.get(key) != described[0].get(key) for one in described)]
    before, after = groups[0].tables[0], groups[-1].tables[-1]
    root = pages.image_root(groups[-1].runs[-1].provenance)
    changed = {}
    for title, gained in (("Now right", True), ("Now wrong", False)):
        correct, wrong = (after.correct, before.correct) if gained else (before.correct, after.correct)
        found = [place for place in range(len(correct)) if correct[place] and not wrong[place]]
        chosen = [found[index * len(found) // 12] for index in range(12)] if len(found) > 12 else found
        changed[title] = (
            len(found),
            [
                {
                    "before": before.predictions[place],
                    "after": after.predictions[place],
                    "gained": gained,
                    "thumbnail": pages.thumbnail_uri(root, before.predictions[place].image),
                }
                for place in chosen
            ],
        )
    return pages.render(
        "compare.html.jinja",
        comparison=comparison,
        curves=[
            (name, area, detection.roc_points(table), place)
            for place, (group, run) in enumerate(zip(groups, comparison["runs"], strict=True))
            for name, area, table in zip(group.members, run["figures"]["AUROC"]["values"], group.tables, strict=True)
        ],
        changed_runs=(groups[0].members[0], groups[-1].members[-1]),
        detection_figures=pages.DETECTION_FIGURES,
        together=TOGETHER,
        reach=_reach(comparison["differences"]),
        changed=changed,
        same={key: described[0].get(key) for key in keys if key not in differing},
        differing={key: [one.get(key) for one in described] for key in differing},
    )


def _reach(differences: Sequence[Mapping[str, Any]]) -> int:
    """Points to each side of zero that the drawing of the differences needs."""
    return pages.reach(
        abs(bound) * (100 if key in DETECTION_FIGURES else 1)
        for difference in differences
        for key, one in difference["figures"].items()
        for bound in one["interval"] or ()
    )


def print_comparison(comparison: Mapping[str, Any]) -> None:
    """The table of all runs, the differences to the baseline, and a sentence for each run, on stdout."""
    runs, keys = comparison["runs"], list(comparison["runs"][0]["figures"])
    rows = [("strict", *(cell for run in runs for cell in _cells(run, run["title"], "sd of runs", "95 % interval")))]
    for key in keys:
        if any(run["figures"][key]["value"] is not None for run in runs):
            row = [key]
            for run in runs:
                one = run["figures"][key]
                value, deviation = (show(key, number) for number in (one["value"], one["standard_deviation"]))
                row += _cells(run, value, deviation, interval_text(key, one["interval"]))
            rows.append(tuple(row))
    rows.append(("unparsed + failed", *(cell for run in runs for cell in _cells(run, _unread(run["counts"]), "", ""))))
    print(text_table(rows))
    for difference in comparison["differences"]:
        rows = [(f"{difference['run']} - {comparison['baseline']}", "difference", "95 % interval", "won", "lost", "p")]
        for key in keys:
            one, test = difference["figures"][key], difference["mcnemar"].get(TOGETHER if key == "Average" else key)
            if one["difference"] is not None:
                counts = (
                    (str(test["only_run"]), str(test["only_baseline"]), p_text(test["p_holm"])) if test else ("",) * 3
                )
                moved = signed(one["difference"], 3 if key in DETECTION_FIGURES else 1)
                rows.append((key, moved, interval_text(key, one["interval"]), *counts))
        print("\n" + text_table(rows))
    print("\nAUROC, recall and specificity from 0 to 1, the rest in percent; won, lost: questions that one of the two")
    print("alone answered correctly; p: exact McNemar test on them, Holm-corrected\n")
    for difference in comparison["differences"]:
        print(difference["verdict"])


def _unread(counts: Mapping[str, Any]) -> str:
    return str(counts["unparsed"] + counts["failed"])


def _cells(run: Mapping[str, Any], value: str, deviation: str, between: str) -> list[str]:
    """A run's columns: the spread only where there are several."""
    return [value, deviation, between] if len(run["members"]) > 1 else [value, between]


def log_to_wandb(comparison: Mapping[str, Any]) -> None:
    """Log the figures of all runs as one W&B table, and the differences as summary values."""
    import wandb

    with wandb.init(project=os.environ.get("WANDB_PROJECT", "echo-ft"), job_type="compare") as run:
        columns: list[str | int] = ["run", "figure", "value", "low", "high", "runs", "standard_deviation"]
        table = wandb.Table(columns=columns)
        for one in comparison["runs"]:
            for key, figure in one["figures"].items():
                spread = figure["runs"], figure["standard_deviation"]
                table.add_data(one["name"], key, figure["value"], *(figure["interval"] or (None, None)), *spread)
        run.log({"comparison": table})
        for difference in comparison["differences"]:
            for key, figure in difference["figures"].items():
                run.summary[f"{difference['run']}/{key}/difference"] = figure["difference"]


if __name__ == "__main__":
    configs.run_main(main)
