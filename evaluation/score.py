"""Score a run, or a file of answers in MMAD's format.

    python -m evaluation.score RUN_DIR
    python -m evaluation.score RUN_DIR --calibration VALIDATION_RUN_DIR [--false_alarms 0.05]
    python -m evaluation.score --answers FILE --output DIR

Writes report.json, report.html and answers.json (what MMAD's own scorer reads) and prints the strict table. With a run
of the same model over a validation split (`evaluation.run --split validation --output VALIDATION_RUN_DIR`) P(defect) is
calibrated, and thresholds are chosen, there, and both are judged on this run.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from echo_ft import config as configs
from echo_ft import experts, metrics, statistics
from echo_ft.dataset import cases as load_cases
from echo_ft.dataset import load_dataset, require_unchanged
from echo_ft.geometry import mask_files
from echo_ft.mmad_scorer import (
    Answer,
    from_predictions,
    official_table,
    taken_for_normal,
    write_answers,
)
from echo_ft.positions import Permuted, consistency, position_bias
from echo_ft.provenance import commit
from echo_ft.records import KINDS, EchoError, Prediction, Trace, write_whole
from echo_ft.runs import PERMUTATIONS, TRACES, whole_rows
from echo_ft.sheets import Sheet, make_sheet
from evaluation import pages
from evaluation.pages import DETECTION_LABELS, EXPERT_LABELS, hundredfold, interval, percent, share, text_table
from evaluation.reading import Run, load_answers, load_run

SAME_MODEL = (
    "base_model",
    "base_fingerprint",
    "model_revision",
    "adapters",
    "dtype",
    "server_model",
    "prompt_version",
    "min_pixels",
    "max_pixels",
    "max_new_tokens",
    "routing",
    "reference",
    "references",
    "knowledge",
    "reasoning",
    "corruption",
    "severity",
)
"""What makes P(defect), and so must not differ between a run and the one that calibrates it."""


@dataclass(frozen=True)
class ScoreConfig:
    """Options of `python -m evaluation.score`."""

    run: str | None = field(
        default=None, metadata={"help": "Folder that `python -m evaluation.run` wrote; may stand first, without --run."}
    )
    answers: str | None = field(default=None, metadata={"help": "Instead of a run: answers in MMAD's format."})
    output: str | None = field(default=None, metadata={"help": "Where the report goes; a run's own folder if absent."})
    calibration: str | None = field(
        default=None,
        metadata={
            "help": "A run of the same model over a validation split: P(defect) and thresholds are fitted there."
        },
    )
    false_alarms: float = field(
        default=0.05,
        metadata={"help": "With calibration: share of normal images that may be called defective at the threshold."},
    )


def main(argv: list[str]) -> None:
    """Read, score, write, print."""
    (config,) = configs.parse([ScoreConfig], named_first(argv, "--run"))
    if (config.run is None) == (config.answers is None):
        raise EchoError("give the folder of a run, or --answers FILE with --output DIR, and not both")
    if config.run is not None:
        run = load_run(Path(config.run))
        output = Path(config.output or config.run)
        name, answers = run.folder.resolve().name, from_predictions(run.predictions)
    elif config.calibration is not None:
        raise EchoError("answers in MMAD's format hold no probabilities; give --calibration with the folder of a run")
    else:
        if config.output is None:
            raise EchoError("--answers needs --output DIR: the folder that the report goes to")
        output = Path(config.output)
        run, answers = load_answers(Path(config.answers))
        name = run.folder.name
    calibration = {} if config.calibration is None else calibrate(run, Path(config.calibration), config.false_alarms)
    report, page = build_report(name, run, answers, calibration)
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_whole(output / "report.html", page)
    if config.run is not None:
        write_answers(output / "answers.json", answers)
    print_report(report)
    for warning in report["warnings"]:
        print(f"WARNING: {warning}", file=sys.stderr)
    print(f"\nwrote report.json, report.html{', answers.json' if config.run is not None else ''} to {output}")


def named_first(argv: Sequence[str], flag: str) -> list[str]:
    """Words before the first option, given to `flag`: `RUN_DIR --output X` is `--run RUN_DIR --output X`."""
    count = next((place for place, word in enumerate(argv) if word.startswith("-")), len(argv))
    return [flag, *argv] if count else list(argv)


def calibrate(run: Run, folder: Path, false_alarms: float) -> dict[str, Any]:
    """`metrics.calibration` by the validation run in `folder`, with its name and fingerprint.

    Raises EchoError where that run is of another model or of parts that this one was scored on too.
    """
    if not 0 < false_alarms < 1:
        raise EchoError(f"false_alarms is {false_alarms:g}; it is a share of the normal images, between 0 and 1")
    validation = load_run(folder)
    cannot = f"{folder} cannot calibrate {run.folder}: "
    for key in (*SAME_MODEL, "answer"):
        ours, theirs = run.provenance.get(key), validation.provenance.get(key)
        # Whether the text or the options decide, P(defect) comes of the same letters; averaged, of all the orders.
        if ours != theirs and (key != "answer" or "averaged" in (ours, theirs)):
            values = "" if isinstance(ours, dict) else f" ({ours} and {theirs})"
            raise EchoError(f"{cannot}their {key} differs{values}; run the validation split with the same options")
    shared = {_part(one) for one in run.predictions} & {_part(one) for one in validation.predictions}
    if shared:
        raise EchoError(
            f"{cannot}{len(shared)} parts are in both, such as {'/'.join(min(shared))}; "
            "give a run over --split validation"
        )
    found = metrics.calibration(make_sheet(run.predictions), make_sheet(validation.predictions), false_alarms)
    kept = ("dataset", "dataset_fingerprint", "split", "predictions_fingerprint")
    origin = {"run": str(folder), **{key: validation.provenance.get(key) for key in kept}}
    return {**found, "warnings": [f"{folder}: {text}" for text in validation.warnings], "provenance": origin}


def _part(prediction: Prediction) -> tuple[str, str, str]:
    return prediction.dataset, prediction.product, prediction.group


def build_report(
    name: str, run: Run, answers: Sequence[Answer], calibration: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """report.json's content and report.html's text.

    `answers` are what the official table is made of; `calibration` is what `calibrate` returns, or empty.
    """
    sheet = make_sheet(run.predictions)
    by_product: dict[str, list[Prediction]] = {product: [] for product in sheet.rows("product")[0]}
    for prediction in run.predictions:
        by_product[f"{prediction.dataset}/{prediction.product}"].append(prediction)
    product_table, product_intervals = (
        metrics.strict_table(sheet, "product"),
        metrics.strict_intervals(sheet, "product"),
    )
    detection = metrics.detection(sheet)
    report = {
        "name": name,
        "warnings": [*run.warnings, *cautions(run, sheet), *doubts(calibration)],
        "counts": {**metrics.counts(run.predictions), "rejected": len(run.rejections)},
        "tables": {"official": official_table(answers), "strict": metrics.strict_table(sheet)},
        "intervals": {"strict": metrics.strict_intervals(sheet)},
        "one_sided": metrics.one_sided(sheet),
        "kinds": {kind: metrics.counts([one for one in run.predictions if one.kind == kind]) for kind in KINDS},
        "products": {
            product: {
                "strict": product_table[product],
                "intervals": product_intervals[product],
                **metrics.counts(rows),
            }
            for product, rows in by_product.items()
        },
        "detection": detection,
        "calibration": calibration,
        # Where probabilities decided, no text was asked for that could agree with them.
        "two_ways": (metrics.two_ways(run.predictions) if run.provenance.get("answer") in (None, "generate") else {}),
        "option_order": option_order(run),
        "experts": expert_scores(run, sheet),
        "bootstrap": {
            "unit": "part",
            "resamples": statistics.RESAMPLES,
            "seed": statistics.SEED,
            "level": statistics.LEVEL,
        },
        "provenance": {**run.provenance, "scored_by_commit": commit()},
        "rejected": [asdict(rejection) for rejection in run.rejections],
    }
    page = pages.render(
        "report.html.jinja",
        report=report,
        kinds=KINDS,
        detection_labels=pages.DETECTION_LABELS,
        expert_labels=pages.EXPERT_LABELS,
        threshold_labels=pages.THRESHOLD_LABELS,
        roc=metrics.roc_points(sheet),
        samples=pages.samples(run.predictions, run.provenance),
    )
    return report, page


def option_order(run: Run) -> dict[str, Any]:
    """What the place of an option did to the answers; empty where a run asked in one order only.

    Of the cases whose predictions are written: a run that was stopped may have permutations of one more.
    """
    asked = {(one.case, one.question) for one in run.predictions}
    rows = [one for one in whole_rows(run.folder / PERMUTATIONS, Permuted) if (one.case, one.question) in asked]
    alike = consistency(rows)
    if alike is None:
        return {}
    return {"consistent": alike[0], "questions": alike[1], "letters": [asdict(one) for one in position_bias(rows)]}


def expert_scores(run: Run, sheet: Sheet) -> dict[str, Any]:
    """What the experts before the decision were worth (`experts.figures`), or why that cannot be told (`unavailable`).

    It takes the dataset's truth and images, as they were when it was built. Empty for a file of answers.
    """
    if "dataset" not in run.provenance:
        return {}
    if not (run.folder / TRACES).is_file():
        return {"unavailable": f"the run has no {TRACES}"}
    try:
        dataset = load_dataset(Path(str(run.provenance["dataset"])))
        if dataset.fingerprint != run.provenance.get("dataset_fingerprint"):
            raise EchoError(f"{dataset.folder} is another dataset than the run's; it was built again since")
        cases = load_cases(dataset, str(run.provenance.get("split")))
        # Without the prompts, which are most of what a trace takes.
        traces = [replace(one, context="", prompt="") for one in whole_rows(run.folder / TRACES, Trace)]
        used = {image for trace in traces for image in trace.images}
        require_unchanged(dataset, [*sorted(used), *(name for case in cases for name in mask_files(case.truth))])
    except (EchoError, OSError) as error:
        return {"unavailable": str(error)}
    return experts.figures(sheet, cases, traces, dataset.root)


def cautions(run: Run, sheet: Sheet) -> list[str]:
    """What a reader of the figures must know: rows left out, sides that are missing or small."""
    found = []
    if run.rejections:
        first = run.rejections[0]
        found.append(f"{len(run.rejections)} rows could not be scored and are left out ({first.item}: {first.reason})")
    found += thin_sides(sheet)
    taken = taken_for_normal(run.predictions)
    if taken:
        found.append(
            f"{len(taken)} defective images have `good` in their path ({taken[0]}), so the official figure counts them "
            "as normal, as MMAD's scorer would; the strict figures do not"
        )
    return found


def thin_sides(sheet: Sheet) -> list[str]:
    """Where Anomaly Detection lacks a side, or has few parts of one."""
    found = []
    sides = [f"{row} ({side} alone)" for row, side in metrics.one_sided(sheet).items()]
    if sides:
        found.append(f"Anomaly Detection rests on one side alone: {', '.join(sides)}")
    few = [
        f"the dataset {row} has {count} {side} part{'' if count == 1 else 's'}"
        for row, members in metrics.detection_rows(sheet).items()
        for side, shown in (("normal", ~sheet.defective), ("defective", sheet.defective))
        if row != metrics.ALL and 0 < (count := len(np.unique(sheet.parts[members & shown]))) < metrics.FEW
    ]
    if few:
        found.append(f"Anomaly Detection has no interval where a side has fewer than {metrics.FEW}: {', '.join(few)}")
    return found


def doubts(calibration: Mapping[str, Any]) -> list[str]:
    """What a reader of the calibrated figures must know."""
    if not calibration:
        return []
    found = list(calibration["warnings"])
    separating, meaningless = statistics.TEMPERATURES
    if calibration["temperature"] == meaningless:
        found.append(
            "P(defect) does not grow with defects on the validation split: calibrated it is near 0.5 for every image"
        )
    if calibration["temperature"] == separating:
        found.append(
            "P(defect) separates the validation split without a mistake, so its temperature is the lowest tried; more "
            "validation images would tell how sure it may be"
        )
    if "false_alarms" not in calibration["thresholds"]:
        stated, normal = calibration["stated_false_alarms"], calibration["validation"]["normal"]
        found.append(
            f"no threshold can promise a share of false alarms of {stated:g} from {normal} normal validation images; "
            f"that takes {math.ceil(1 / stated - 1e-9) - 1}, or a higher --false_alarms"
        )
    return found


def print_report(report: Mapping[str, Any]) -> None:
    """The strict table with intervals and counts, on stdout."""
    counts, tables, spread = report["counts"], report["tables"], report["intervals"]["strict"]
    print(f"{report['name']}: {summary(counts)}\n")
    rows: list[tuple[str, ...]] = [
        ("percent", "strict", "95 % interval", "official", "questions", "unparsed", "failed")
    ]
    for kind in (*KINDS, "Average"):
        of_kind = counts if kind == "Average" else report["kinds"][kind]
        if of_kind["questions"]:
            strict, official = tables["strict"]["Average"][kind], tables["official"]["Average"][kind]
            figures = percent(strict), interval(kind, spread["Average"][kind]), percent(official)
            rows.append((kind, *figures, *(str(of_kind[key]) for key in ("questions", "unparsed", "failed"))))
    print(text_table(rows))
    datasets = [name for name in tables["strict"] if name != "Average"]
    if len(datasets) > 1:
        rows = [("average by dataset", "strict", "95 % interval", "official")]
        for name in datasets:
            strict, official = tables["strict"][name]["Average"], tables["official"][name]["Average"]
            rows.append((name, percent(strict), interval("Average", spread[name]["Average"]), percent(official)))
        print("\n" + text_table(rows))
    if "All" in report["detection"]:
        found = report["detection"]["All"]
        rows = [("detection, from 0 to 1", "figure", "95 % interval")]
        known = [(key, label) for key, label in DETECTION_LABELS.items() if found[key] is not None]
        rows += [(label, share(found[key]), interval("AUROC", found["intervals"][key])) for key, label in known]
        rows.append(("average precision", share(found["average_precision"]), ""))
        print(f"\n{text_table(rows)}\nP(defect) is known of {found['scored']} of {found['images']} images")
    if report["calibration"]:
        print_calibration(report["calibration"])
    if report["two_ways"]:
        found = report["two_ways"]["Average"]
        agreement, spread = 100 * found["agreement"], found["interval"] and [100 * bound for bound in found["interval"]]
        print(
            f"the text names the most probable option in {percent(agreement)} % of {found['questions']} questions "
            f"({interval('Average', spread)}); by that option the average is {percent(found['logits'])}, by the text "
            f"{percent(found['text'])}"
        )
    if report["option_order"]:
        print_option_order(report["option_order"])
    if report["experts"]:
        print_experts(report["experts"])


def print_experts(found: Mapping[str, Any]) -> None:
    """What the experts before the decision were worth, on stdout."""
    if "unavailable" in found:
        print(f"\nthe experts before the decision cannot be scored: {found['unavailable']}")
        return
    rows = [("experts before the decision", "%", "95 % interval", "by chance", "texts", "unread")]
    for name, label in EXPERT_LABELS.items():
        if name in found["figures"]:
            one = found["figures"][name]
            spread = interval("Average", one["interval"] and [100 * bound for bound in one["interval"]])
            value, chance = hundredfold(one["value"]), hundredfold(one["chance"])
            rows.append((label, value, spread, chance, str(one["texts"]), str(one["unread"])))
    print("\n" + text_table(rows))
    if found["unreadable"]:
        print(f"{len(found['unreadable'])} cases are left out where it takes images ({found['unreadable'][0]})")


def print_option_order(found: Mapping[str, Any]) -> None:
    """How often the answer kept its option, and how often each letter was chosen, on stdout."""
    print(
        f"\nin every order of its options the same one is chosen in {percent(100 * found['consistent'])} % of "
        f"{found['questions']} questions\n"
    )
    rows = [("letter, of so many options", "chosen, %", "right, %", "found where right, %")]
    for one in found["letters"]:
        recall = None if one["recall"] is None else 100 * one["recall"]
        shares = percent(100 * one["chosen"]), percent(100 * one["right"]), percent(recall)
        rows.append((f"{one['letter']} of {one['options']}", *shares))
    print(text_table(rows))


def print_calibration(found: Mapping[str, Any]) -> None:
    """Temperature, calibration error and the thresholds' figures, on stdout."""
    fitted, error, loss = found["validation"], found["expected_calibration_error"], found["log_loss"]
    print(
        f"\nP(defect) calibrated on {fitted['normal']} normal and {fitted['defective']} defective images of "
        f"{found['provenance']['run']}: temperature {found['temperature']:.3g}; expected calibration error "
        f"{share(error['before'])} before, {share(error['after'])} after; log loss {share(loss['before'])} "
        f"before, {share(loss['after'])} after\n"
    )
    rows: list[tuple[str, ...]] = [
        ("threshold on P(defect)", "at", "figure", "validation", "this run", "95 % interval")
    ]
    for name, one in found["thresholds"].items():
        label, at = pages.THRESHOLD_LABELS[name].format(found["stated_false_alarms"]), share(one["threshold"])
        for key, value in one["test"].items():
            shown = share(one["validation"][key]), share(value), interval("AUROC", one["intervals"].get(key))
            rows.append((label, at, "F1" if key == "f1" else key.replace("_", " "), *shown))
            label = at = ""
    print(text_table(rows))


def summary(counts: Mapping[str, Any]) -> str:
    """One line: how many questions, images, unparsed and failed answers."""
    return (
        f"{counts['questions']} questions about {counts['images']} images ({counts['normal']} normal, "
        f"{counts['defective']} defective); {counts['unparsed']} answers unparsed "
        f"({100 * counts['unparsed_share']:.1f} %), {counts['failed']} failed"
    )


if __name__ == "__main__":
    configs.run_main(main)
