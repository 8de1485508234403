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
from dataclasses import dataclass, field
from pathlib import Path

from echo_ft import config as configs
from echo_ft.config import named_first
from echo_ft.errors import EchoError
from echo_ft.files import write_text
from echo_ft.metrics.loading import load_answers, load_run
from echo_ft.metrics.mmad import from_predictions, write_answers
from echo_ft.metrics.report import build_report, calibrate
from echo_ft.terminal import LOGGER
from evaluation.pages import report_page
from evaluation.terminal import print_report


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
    report = build_report(name, run, answers, calibration)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_text(output / "report.html", report_page(report, run))
    if config.run is not None:
        write_answers(output / "answers.json", answers)
    print_report(report)
    for warning in report["warnings"]:
        LOGGER.warning(warning)
    print(f"\nwrote report.json, report.html{', answers.json' if config.run is not None else ''} to {output}")


if __name__ == "__main__":
    configs.run_main(main)
