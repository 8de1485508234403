"""Score a run, or a file of answers in MMAD's format.

    python -m evaluation.score RUN_DIR
    python -m evaluation.score --answers FILE --output DIR

Writes report.json, report.html and answers.json (what MMAD's own scorer reads) and prints the strict table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from echo_ft import config as configs
from echo_ft import metrics, statistics
from echo_ft.mmad_scorer import (
    Answer,
    from_predictions,
    official_table,
    read_answers,
    taken_for_normal,
    to_predictions,
    write_answers,
)
from echo_ft.provenance import commit, fingerprint_bytes
from echo_ft.records import KINDS, EchoError, Prediction, Rejection, from_dict, write_whole
from echo_ft.runs import CONTINUED
from evaluation import pages
from evaluation.pages import DETECTION_LABELS, interval, percent, share, text_table

FEW = 5
"""Fewer images than this on a side and the bootstrap has too little to draw from: said in a warning."""


@dataclass(frozen=True)
class ScoreConfig:
    """Options of `python -m evaluation.score`."""

    run: str | None = field(
        default=None, metadata={"help": "Folder that `python -m evaluation.run` wrote; may stand first, without --run."}
    )
    answers: str | None = field(default=None, metadata={"help": "Instead of a run: answers in MMAD's format."})
    output: str | None = field(default=None, metadata={"help": "Where the report goes; a run's own folder if absent."})


@dataclass(frozen=True)
class Run:
    """A run's folder, or a file of answers, read."""

    folder: Path
    """The folder or the file."""
    predictions: list[Prediction]
    provenance: dict[str, Any]
    """run.json, with the fingerprint of predictions.jsonl; or the answers file and its fingerprint."""
    warnings: list[str]
    rejections: list[Rejection]


def main(argv: list[str]) -> None:
    """Read, score, write, print."""
    (config,) = configs.parse([ScoreConfig], named_first(argv, "--run"))
    if (config.run is None) == (config.answers is None):
        raise EchoError("give the folder of a run, or --answers FILE with --output DIR, and not both")
    if config.run is not None:
        run = load_run(Path(config.run))
        output = Path(config.output or config.run)
        name, answers = run.folder.resolve().name, from_predictions(run.predictions)
    else:
        if config.output is None:
            raise EchoError("--answers needs --output DIR: the folder that the report goes to")
        output = Path(config.output)
        run, answers = load_answers(Path(config.answers))
        name = run.folder.name
    report, page = build_report(name, run, answers)
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


def load_run(folder: Path) -> Run:
    """The run in `folder`. Raises EchoError where there is none or it has no prediction."""
    meta, rows = folder / "run.json", folder / "predictions.jsonl"
    if not folder.is_dir():
        raise EchoError(f"there is no folder {folder}; make a run with python -m evaluation.run --output {folder}")
    for path in (meta, rows):
        if not path.is_file():
            raise EchoError(f"{folder} is not a run (it has no {path.name}); make one with python -m evaluation.run")
    try:
        provenance = json.loads(meta.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EchoError(f"{meta} is not JSON ({error}); start the same evaluation.run command again") from error
    if not isinstance(provenance, dict):
        raise EchoError(f"{meta} is not a run's description; start the same evaluation.run command again")
    content = rows.read_bytes()
    predictions, rejections = _predictions(rows, content, complete=provenance.get("complete") is True)
    if not predictions:
        raise EchoError(f"{rows} is empty; start the same evaluation.run command again, it goes on where it stopped")
    warnings = [*_missing(provenance, predictions), *_warned(provenance)]
    provenance["predictions_fingerprint"] = fingerprint_bytes(content)
    return Run(folder, predictions, provenance, warnings, rejections)


def _missing(provenance: Mapping[str, Any], predictions: Sequence[Prediction]) -> list[str]:
    """A warning where the rows are not all that the run should have, whatever run.json says of being complete."""
    counts = {"cases": len({one.case for one in predictions}), "questions": len(predictions)}
    differing = [
        (count, provenance[name], name) for name, count in counts.items() if provenance.get(name, count) != count
    ]
    done, expected, what = differing[0] if differing else (counts["cases"], provenance.get("cases", "unknown"), "cases")
    if provenance.get("complete") is True and not differing:
        return []
    return [
        f"THE RUN IS NOT COMPLETE: {done} of {expected} {what}; the figures are of these alone; start the same "
        "evaluation.run command again, it goes on where it stopped"
    ]


def _warned(provenance: Mapping[str, Any]) -> list[str]:
    """What the run itself warned of, by any of the processes that wrote it."""
    notes = [provenance, *provenance.get(CONTINUED, [])]
    return list(dict.fromkeys(str(warning) for note in notes for warning in note.get("warnings", [])))


def _predictions(path: Path, content: bytes, complete: bool) -> tuple[list[Prediction], list[Rejection]]:
    predictions: list[Prediction] = []
    # splitlines would also part a text at U+2028, U+2029 and U+0085, which JSON leaves as they are.
    lines = content.decode("utf-8", errors="replace").removesuffix("\n").split("\n") if content else []
    for number, line in enumerate(lines, start=1):
        try:
            predictions.append(from_dict(Prediction, json.loads(line)))
        except (ValueError, TypeError, AttributeError) as error:
            if not complete and number == len(lines):  # stopped in the middle of a line
                return predictions, [Rejection(f"{path.name}:{number}", "cut off where the run stopped")]
            raise EchoError(
                f"{path}:{number} is not a prediction ({error}); take the line out and start evaluation.run again"
            ) from error
    return predictions, []


def load_answers(path: Path) -> tuple[Run, list[Answer]]:
    """A file in MMAD's format, as a run and as it stands. Raises EchoError where no row of it can be scored."""
    answers = read_answers(path)
    predictions, rejections = to_predictions(answers)
    if not predictions:
        raise EchoError(f"{path}: no row can be scored ({rejections[0].item}: {rejections[0].reason}); check the file")
    provenance = {"answers": str(path), "answers_fingerprint": fingerprint_bytes(path.read_bytes())}
    return Run(path, predictions, provenance, [], rejections), answers


def build_report(name: str, run: Run, answers: Sequence[Answer]) -> tuple[dict[str, Any], str]:
    """report.json's content and report.html's text; `answers` are what the official table is made of."""
    sheet = metrics.sheet(run.predictions)
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
        "warnings": [*run.warnings, *cautions(run, sheet, detection)],
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
        roc=metrics.roc_points(sheet),
        samples=pages.samples(run.predictions, run.provenance),
    )
    return report, page


def cautions(run: Run, sheet: metrics.Sheet, detection: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader of the figures must know: rows left out, sides that are missing or small."""
    found = []
    if run.rejections:
        first = run.rejections[0]
        found.append(f"{len(run.rejections)} rows could not be scored and are left out ({first.item}: {first.reason})")
    sides = [f"{row} ({side} alone)" for row, side in metrics.one_sided(sheet).items()]
    if sides:
        found.append(f"Anomaly Detection rests on one side alone: {', '.join(sides)}")
    few = [
        f"{row} has {figures[side]} {side} image{'' if figures[side] == 1 else 's'}"
        for row, figures in detection.items()
        for side in ("normal", "defective")
        if row != metrics.ALL and 0 < figures[side] < FEW
    ]
    if few:
        found.append(f"intervals of Anomaly Detection are too narrow where images are few: {', '.join(few)}")
    taken = taken_for_normal(run.predictions)
    if taken:
        found.append(
            f"{len(taken)} defective images have `good` in their path ({taken[0]}), so the official figure counts them "
            "as normal, as MMAD's scorer would; the strict figures do not"
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


def summary(counts: Mapping[str, Any]) -> str:
    """One line: how many questions, images, unparsed and failed answers."""
    return (
        f"{counts['questions']} questions about {counts['images']} images ({counts['normal']} normal, "
        f"{counts['defective']} defective); {counts['unparsed']} answers unparsed "
        f"({100 * counts['unparsed_share']:.1f} %), {counts['failed']} failed"
    )


if __name__ == "__main__":
    configs.run_main(main)
