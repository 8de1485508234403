"""Score a run, or an answer file from another program.

    python -m evaluation.score RUN_DIR
    python -m evaluation.score RUN_DIR --calibration VALIDATION_RUN_DIR [--false_alarms 0.05]
    python -m evaluation.score RUN_DIR --gate "false_alarms<=0.01, escapes<=0.02"
    python -m evaluation.score --answers FILE --output DIR [--questions FILE]

Writes report.json, report.html and answers.json, the format of MMAD's own scorer, and prints the strict table.
`--answers` takes a file in MMAD's format, JSON lines (`echo_ft.metrics.answer_files.plain`), or answers to RobustMAD,
which need its question file. DIR then also holds the answers as a run, which `evaluation.compare` reads.
`--calibration` takes a run with the same model on a validation split (`evaluation.run --split validation --output
VALIDATION_RUN_DIR`). Temperature and thresholds of P(defect) are fitted on that run and evaluated on the scored run.

`--gate` judges the run against limits. The exit status is 0 if it passes, 1 if it fails, and 3 if there are not enough
parts to decide with 95% confidence.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo_ft import config as configs
from echo_ft.config import named_first
from echo_ft.errors import EchoError
from echo_ft.files import write_json, write_text
from echo_ft.gate.certificate import FAIL, PASS, UNDECIDED
from echo_ft.gate.judgement import judge_run
from echo_ft.gate.limits import parse_limits
from echo_ft.inputs import read_json_object
from echo_ft.metrics.answer_files import GivenAnswers
from echo_ft.metrics.loading import Run, load_answers, load_run, write_as_run
from echo_ft.metrics.mmad import from_predictions, write_answers
from echo_ft.metrics.report import build_report, calibrate_run
from echo_ft.terminal import LOGGER
from echo_ft.tracking import REPORT_TO
from evaluation.case_images import IMAGE_CHOICES, IMAGES_HELP, ImageStore
from evaluation.pages import report_page
from evaluation.terminal import print_report
from evaluation.wandb_log import log_evaluation

GATE_STATUS = {PASS: 0, FAIL: 1, UNDECIDED: 3}
"""Exit status of each verdict of `--gate`. Errors have the status 2."""


@dataclass(frozen=True)
class ScoreConfig:
    """Options of `python -m evaluation.score`."""

    run: str | None = field(
        default=None, metadata={"help": "Run folder, written by evaluation.run. The flag --run may be omitted."}
    )
    answers: str | None = field(
        default=None,
        metadata={
            "help": "Answer file from another program, instead of a run: MMAD's format, JSON lines, or RobustMAD's."
        },
    )
    questions: str | None = field(
        default=None, metadata={"help": "RobustMAD's question file, for scoring answers to its questions."}
    )
    output: str | None = field(default=None, metadata={"help": "Folder for the report. Default: the run folder."})
    calibration: str | None = field(
        default=None,
        metadata={
            "help": "Run with the same model on a validation split, to fit temperature and thresholds of P(defect)."
        },
    )
    false_alarms: float = field(
        default=0.05,
        metadata={"help": "Largest fraction of normal images that may be flagged at the calibrated threshold."},
    )
    images: str = field(default="auto", metadata={"help": IMAGES_HELP, "choices": list(IMAGE_CHOICES)})
    report_to: str = field(default="none", metadata=REPORT_TO)
    gate: str | None = field(
        default=None,
        metadata={
            "help": 'Limits to judge the run against, such as "false_alarms<=0.01, escapes<=0.02": shares of the good '
            "parts that are flagged, and of the defective parts that are not."
        },
    )


def main(argv: list[str]) -> None:
    """Score a run or an answer file, write the report, and print it."""
    (config,) = configs.parse([ScoreConfig], named_first(argv, "--run"))
    limits = None if config.gate is None else parse_limits(config.gate)
    if (config.run is None) == (config.answers is None):
        raise EchoError("give either a run folder, or --answers FILE with --output DIR")
    if config.run is not None:
        run, given = _load_run(Path(config.run), config.questions)
        output, name = Path(config.output or config.run), run.folder.resolve().name
    elif config.calibration is not None:
        raise EchoError("an answer file does not say which model wrote it; use --calibration with a run folder")
    else:
        output = _answers_folder(config.output)
        run, given = load_answers(Path(str(config.answers)), Path(config.questions) if config.questions else None)
        name = run.folder.name
    validation = None if config.calibration is None else load_run(Path(config.calibration))
    calibration = {} if validation is None else calibrate_run(run, validation, config.false_alarms)
    gate = {} if limits is None else judge_run(run, limits, validation)
    report = {**build_report(name, run, given.official, calibration, given.letters), "gate": gate}
    output.mkdir(parents=True, exist_ok=True)
    lost = lost_threshold(output / "report.json", report)
    write_json(output / "report.json", report)
    images = ImageStore(output / "report.html", config.images)
    write_text(output / "report.html", report_page(report, run, images))
    written = ["report.json", "report.html"]
    if config.run is not None:
        write_answers(output / "answers.json", given.official)
        written.append("answers.json")
    else:
        write_as_run(output, run)
        written += ["predictions.jsonl", "run.json"]
    print_report(report)
    for warning in [*report["warnings"], *lost]:
        LOGGER.warning(warning)
    if config.report_to == "wandb":
        log_evaluation(report, run, output, config)
    print(f"\nwrote {', '.join(written)} to {output}")
    if gate:
        print(f"\n{gate['sentence']}")
        sys.exit(GATE_STATUS[gate["verdict"]])


def lost_threshold(path: Path, report: Mapping[str, Any]) -> list[str]:
    """Return a warning if the report at `path` has a calibration or a gate that the new `report` lacks.

    An export or an inspection with the new report would otherwise flag from 0.5 without a word.
    """
    try:
        before, options = read_json_object(path), []
        calibration, gate = before.get("calibration"), before.get("gate")
        if calibration:
            validation = shlex.quote(calibration["provenance"]["run"])
            options.append(f"--calibration {validation} --false_alarms {calibration['stated_false_alarms']:g}")
        if gate:
            options.append(f'--gate "{", ".join(f"{name}<={limit:g}" for name, limit in gate["limits"].items())}"')
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # there is none, or it was changed by hand
        return []
    lost = [name for name in ("calibration", "gate") if before.get(name) and not report[name]]
    if not lost:
        return []
    return [
        f"{path} no longer has a {' and a '.join(lost)}, so exports and inspections with it do not use the earlier "
        f"threshold; to keep it, score again with {' '.join(options)}"
    ]


def _load_run(folder: Path, questions: str | None) -> tuple[Run, GivenAnswers]:
    run = load_run(folder)
    if "answers" in run.provenance:
        raise EchoError(
            f"{folder} holds answers that were scored from a file; score that file again: python -m evaluation.score "
            f"--answers {run.provenance['answers']} --output {folder}"
        )
    if questions is not None:
        raise EchoError(f"{folder} holds the questions of its run; remove --questions")
    return run, GivenAnswers(run.predictions, official=from_predictions(run.predictions))


def _answers_folder(output: str | None) -> Path:
    """Return the folder for a report on an answer file. It must not hold a run, which would be overwritten."""
    if output is None:
        raise EchoError("--answers needs a folder for the report; add --output DIR")
    folder = Path(output)
    if (folder / "run.json").is_file() and "answers" not in load_run(folder).provenance:
        raise EchoError(f"{folder} holds a run, which the answers would overwrite; choose another --output")
    return folder


if __name__ == "__main__":
    configs.run_main(main)
