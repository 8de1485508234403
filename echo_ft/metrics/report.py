"""What `evaluation.score` reports about a run: the content of report.json, and the warnings a reader needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from echo_ft.data.dataset import load_cases, load_dataset, require_unchanged
from echo_ft.errors import EchoError
from echo_ft.experts.option_order import Permuted, consistency, position_bias
from echo_ft.files import whole_rows
from echo_ft.images.masks import mask_files
from echo_ft.inference.run_folder import PERMUTATIONS, TRACES
from echo_ft.metrics import detection, experts, intervals, strict
from echo_ft.metrics.calibration import fitted_calibration, text_vs_logits
from echo_ft.metrics.figures import MIN_PARTS
from echo_ft.metrics.intervals import BOOTSTRAP
from echo_ft.metrics.loading import Run, load_run
from echo_ft.metrics.mmad import Answer, official_table, taken_for_normal
from echo_ft.metrics.prediction_table import PredictionTable, make_prediction_table
from echo_ft.provenance import commit
from echo_ft.records import QUESTION_TYPES, Prediction, Trace

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
    found = fitted_calibration(
        make_prediction_table(run.predictions), make_prediction_table(validation.predictions), false_alarms
    )
    kept = ("dataset", "dataset_fingerprint", "split", "predictions_fingerprint")
    origin = {"run": str(folder), **{key: validation.provenance.get(key) for key in kept}}
    return {**found, "warnings": [f"{folder}: {text}" for text in validation.warnings], "provenance": origin}


def _part(prediction: Prediction) -> tuple[str, str, str]:
    return prediction.dataset, prediction.product, prediction.group


def build_report(name: str, run: Run, answers: Sequence[Answer], calibration: Mapping[str, Any]) -> dict[str, Any]:
    """report.json's content.

    `answers` are what the official table is made of; `calibration` is what `calibrate` returns, or empty.
    """
    table = make_prediction_table(run.predictions)
    by_product: dict[str, list[Prediction]] = {product: [] for product in table.rows("product")[0]}
    for prediction in run.predictions:
        by_product[f"{prediction.dataset}/{prediction.product}"].append(prediction)
    product_table, product_intervals = (
        strict.strict_table(table, "product"),
        strict.strict_intervals(table, "product"),
    )
    found_detection = detection.detection(table)
    return {
        "name": name,
        "warnings": [*run.warnings, *report_warnings(run, table), *calibration_warnings(calibration)],
        "counts": {**strict.counts(run.predictions), "rejected": len(run.rejections)},
        "tables": {"official": official_table(answers), "strict": strict.strict_table(table)},
        "intervals": {"strict": strict.strict_intervals(table)},
        "one_sided": strict.one_sided(table),
        "kinds": {kind: strict.counts([one for one in run.predictions if one.kind == kind]) for kind in QUESTION_TYPES},
        "products": {
            product: {
                "strict": product_table[product],
                "intervals": product_intervals[product],
                **strict.counts(rows),
            }
            for product, rows in by_product.items()
        },
        "detection": found_detection,
        "calibration": calibration,
        # Where probabilities decided, no text was asked for that could agree with them.
        "two_ways": (text_vs_logits(run.predictions) if run.provenance.get("answer") in (None, "generate") else {}),
        "option_order": option_order(run),
        "experts": expert_scores(run, table),
        "bootstrap": BOOTSTRAP,
        "provenance": {**run.provenance, "scored_by_commit": commit()},
        "rejected": [asdict(rejection) for rejection in run.rejections],
    }


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


def expert_scores(run: Run, table: PredictionTable) -> dict[str, Any]:
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
    return experts.expert_figures(table, cases, traces, dataset.root)


def report_warnings(run: Run, table: PredictionTable) -> list[str]:
    """What a reader of the figures must know: rows left out, sides that are missing or small."""
    found = []
    if run.rejections:
        first = run.rejections[0]
        found.append(f"{len(run.rejections)} rows could not be scored and are left out ({first.item}: {first.reason})")
    found += small_side_warnings(table)
    taken = taken_for_normal(run.predictions)
    if taken:
        found.append(
            f"{len(taken)} defective images have `good` in their path ({taken[0]}), so the official figure counts them "
            "as normal, as MMAD's scorer would; the strict figures do not"
        )
    return found


def small_side_warnings(table: PredictionTable) -> list[str]:
    """Where Anomaly Detection lacks a side, or has few parts of one."""
    found = []
    sides = [f"{row} ({side} alone)" for row, side in strict.one_sided(table).items()]
    if sides:
        found.append(f"Anomaly Detection rests on one side alone: {', '.join(sides)}")
    few = [
        f"the dataset {row} has {count} {side} part{'' if count == 1 else 's'}"
        for row, members in detection.detection_rows(table).items()
        for side, shown in (("normal", ~table.defective), ("defective", table.defective))
        if row != detection.ALL_IMAGES and 0 < (count := len(np.unique(table.parts[members & shown]))) < MIN_PARTS
    ]
    if few:
        found.append(f"Anomaly Detection has no interval where a side has fewer than {MIN_PARTS}: {', '.join(few)}")
    return found


def calibration_warnings(calibration: Mapping[str, Any]) -> list[str]:
    """What a reader of the calibrated figures must know."""
    if not calibration:
        return []
    found = list(calibration["warnings"])
    separating, meaningless = intervals.TEMPERATURES
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
