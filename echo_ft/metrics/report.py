"""Reports of `evaluation.score`: the content of report.json, including warnings for its readers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from echo_ft.data.dataset import load_cases, load_dataset, read_digests, require_unchanged
from echo_ft.errors import EchoError
from echo_ft.experts.option_order import PermutedPrediction, answer_consistency, position_bias
from echo_ft.files import read_complete_rows
from echo_ft.images.masks import mask_files
from echo_ft.inference.run_folder import PERMUTATIONS, TRACES, cut_warning
from echo_ft.metrics import detection, experts, strict
from echo_ft.metrics.answer_files.robustmad import robustmad_report
from echo_ft.metrics.calibration import TEMPERATURE_BOUNDS, fit_calibration
from echo_ft.metrics.grounding.scores import score_boxes
from echo_ft.metrics.intervals import BOOTSTRAP
from echo_ft.metrics.loading import Run, describe_protocol, rejection_warnings, unchanged_dataset
from echo_ft.metrics.metric_values import MIN_PARTS
from echo_ft.metrics.mmad import Answer, counted_as_normal, official_table
from echo_ft.metrics.prediction_table import PredictionTable, make_prediction_table
from echo_ft.provenance import commit, same_weights
from echo_ft.records import QUESTION_TYPES, Prediction, Trace

SAME_MODEL_KEYS = (
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
"""Provenance keys that P(defect) depends on. They must be equal in a run and in the run that calibrates it."""


def calibrate_run(run: Run, validation: Run, false_alarms: float) -> dict[str, Any]:
    """Calibrate a run on a validation run: `fit_calibration`, warnings, and provenance of the validation run.

    Raises EchoError if `false_alarms` is not between 0 and 1, if the validation run used a different model or different
    options, or if both runs contain the same parts or copies of the same images.
    """
    if not 0 < false_alarms < 1:
        raise EchoError(f"--false_alarms is {false_alarms:g}; give a fraction of the normal images between 0 and 1")
    cannot = f"{validation.folder} cannot calibrate {run.folder}: "
    for key in (*SAME_MODEL_KEYS, "answer"):
        ours, theirs = run.provenance.get(key), validation.provenance.get(key)
        if key == "base_fingerprint" and same_weights(ours, theirs):
            continue
        # `generate` and `logits` read P(defect) from the same tokens. `averaged` averages over the option orders.
        if ours != theirs and (key != "answer" or "averaged" in (ours, theirs)):
            values = "" if isinstance(ours, dict) else f" ({ours} and {theirs})"
            raise EchoError(f"{cannot}their {key} differs{values}; run the validation split with the same options")
    shared = {_part(one) for one in run.predictions} & {_part(one) for one in validation.predictions}
    if shared:
        raise EchoError(
            f"{cannot}{len(shared)} parts are in both, such as {'/'.join(min(shared))}; "
            "give a run made with --split validation"
        )
    unknown = _require_other_images(run, validation, cannot)
    calibration = fit_calibration(
        make_prediction_table(run.predictions), make_prediction_table(validation.predictions), false_alarms
    )
    kept = ("dataset", "dataset_fingerprint", "split", "predictions_fingerprint")
    origin = {"run": str(validation.folder), **{key: validation.provenance.get(key) for key in kept}}
    return {
        **calibration,
        "warnings": [*(f"{validation.folder}: {text}" for text in validation.warnings), *unknown],
        "provenance": origin,
    }


def _part(prediction: Prediction) -> tuple[str, str, str]:
    return prediction.dataset, prediction.product, prediction.group


def _require_other_images(run: Run, validation: Run, cannot: str) -> list[str]:
    """Raise EchoError if an image is in both runs. Return a warning if this is not known.

    Parts do not show it: a dataset of a manifest has the name of its file, so the names of equal parts may differ.
    """
    ours, theirs = _image_contents(run), _image_contents(validation)
    if ours is None or theirs is None:
        if run.provenance.get("dataset_fingerprint") == validation.provenance.get("dataset_fingerprint"):
            return []  # within one dataset, the names of parts can be compared
        return [
            f"the images of {run.folder} and {validation.folder} could not be compared, because a dataset is missing, "
            "was rebuilt or has no digests; calibration and gate hold only if no part is in both"
        ]
    shared = sorted(ours.keys() & theirs.keys(), key=lambda digest: ours[digest])
    if shared:
        raise EchoError(
            f"{cannot}{len(shared)} images have the same content in both, such as {ours[shared[0]]} and "
            f"{theirs[shared[0]]}; give a run on other images, or leave out the copies and rebuild the dataset"
        )
    return []


def _image_contents(run: Run) -> dict[str, str] | None:
    """Return {SHA-256: path} of a run's images; None if its dataset is missing, was rebuilt or has no digests."""
    dataset = unchanged_dataset(run.provenance.get("dataset"), run.provenance.get("dataset_fingerprint"))
    try:
        digests = read_digests(dataset) if dataset else None
    except EchoError:
        return None
    images = {one.image for one in run.predictions}
    return None if digests is None else {digests[image]: image for image in sorted(images & digests.keys())}


def build_report(
    name: str,
    run: Run,
    answers: Sequence[Answer],
    calibration: Mapping[str, Any],
    letters: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the content of report.json.

    `answers` are the input of the official table. `calibration` is the result of `calibrate_run`, or empty. `letters`
    are the letters that RobustMAD's authors read, by question.
    """
    table = make_prediction_table(run.predictions)
    robust = robustmad_report(table, letters or {})
    generated = run.provenance.get("answer") in (None, "generate")
    by_product: dict[str, list[Prediction]] = {product: [] for product in table.group_images("product")[0]}
    for prediction in run.predictions:
        by_product[f"{prediction.dataset}/{prediction.product}"].append(prediction)
    product_table = strict.strict_table(table, "product")
    product_intervals = strict.strict_intervals(table, "product")
    other_products = strict.other_type_products(table)
    return {
        "name": name,
        "protocol": describe_protocol(run),
        "warnings": [*run.warnings, *report_warnings(run, table), *calibration_warnings(calibration)],
        "counts": {**strict.answer_counts(run.predictions), "rejected": len(run.rejections)},
        "tables": {
            "official": official_table(answers),
            "strict": strict.strict_table(table),
            **({"robustmad": robust.pop("official"), "robustmad_strict": robust.pop("strict")} if robust else {}),
        },
        "robustmad": robust,
        "intervals": {"strict": strict.strict_intervals(table)},
        "one_sided": strict.single_class_rows(table),
        "kinds": {
            kind: strict.answer_counts([one for one in run.predictions if one.kind == kind]) for kind in QUESTION_TYPES
        },
        "other_types": strict.other_type_report(table),
        "products": {
            product: {
                "strict": product_table[product],
                "intervals": product_intervals[product],
                "other_types": other_products[product],
                **strict.answer_counts(rows),
            }
            for product, rows in by_product.items()
        },
        "detection": detection.score_detection(table),
        "alarms": detection.score_alarms(table),
        "boxes": score_boxes(run.grounding),
        "calibration": calibration,
        # If probabilities decide, there is no text to compare them with.
        "two_ways": strict.text_vs_logits(run.predictions) if generated else {},
        "option_order": option_order_report(run),
        "experts": expert_report(run, table),
        "bootstrap": BOOTSTRAP,
        "provenance": {**run.provenance, "scored_by_commit": commit()},
        "rejected": [asdict(rejection) for rejection in run.rejections],
    }


def option_order_report(run: Run) -> dict[str, Any]:
    """Report how the order of options affected the answers; empty if the run used one order.

    An interrupted run may have permutations of a case without predictions. They are ignored.
    """
    answered = {(one.case, one.question) for one in run.predictions}
    permuted = read_complete_rows(run.folder / PERMUTATIONS, PermutedPrediction)
    rows = [one for one in permuted if (one.case, one.question) in answered]
    consistent = answer_consistency(rows)
    if consistent is None:
        return {}
    share, questions = consistent
    return {"consistent": share, "questions": questions, "letters": [asdict(one) for one in position_bias(rows)]}


def expert_report(run: Run, table: PredictionTable) -> dict[str, Any]:
    """Score the experts before the decision (`experts.score_experts`), or state why that is impossible (`unavailable`).

    The scores require the dataset and its images, unchanged since the build. The result is empty for an answer file.
    """
    if "dataset" not in run.provenance:
        return {}
    if not (run.folder / TRACES).is_file():
        return {"unavailable": f"the run has no {TRACES}"}
    try:
        dataset = load_dataset(Path(str(run.provenance["dataset"])))
        if dataset.fingerprint != run.provenance.get("dataset_fingerprint"):
            raise EchoError(f"{dataset.folder} has been rebuilt since the run; restore the run's dataset")
        cases = load_cases(dataset, str(run.provenance.get("split")))
        # Drop the prompts, which take most of the memory of a trace.
        traces = [replace(one, context="", prompt="") for one in _read_traces(run)]
        used = {image for trace in traces for image in trace.images}
        require_unchanged(dataset, [*sorted(used), *(name for case in cases for name in mask_files(case.truth))])
    except (EchoError, OSError) as error:
        return {"unavailable": str(error)}
    return experts.score_experts(table, cases, traces, dataset.root)


def _read_traces(run: Run) -> Iterator[Trace]:
    """Yield the traces of a run. Raises EchoError if an answered case has none."""
    path, cases = run.folder / TRACES, set[str]()
    for trace in read_complete_rows(path, Trace):  # a killed run may leave an incomplete last line
        cases.add(trace.case)
        yield trace
    lost = sorted({one.case for one in run.predictions if one.error is None} - cases)
    if lost:
        raise EchoError(
            f"{path} has no row for {len(lost)} cases (first: {lost[0]}); restore the file, or start a run in another "
            "--output"
        )


def report_warnings(run: Run, table: PredictionTable) -> list[str]:
    """Warn about rejected rows, truncated outputs, missing or small classes, and misleading paths."""
    warnings = rejection_warnings(run)
    cut = cut_warning(run.provenance)
    warnings += [cut] if cut else []
    warnings += small_class_warnings(table)
    misleading = counted_as_normal(run.predictions)
    if misleading:
        warnings.append(
            f"{len(misleading)} defective images have `good` in their path ({misleading[0]}), so the official scores "
            "count them as normal, as MMAD's scorer does; the strict scores do not"
        )
    return warnings


def small_class_warnings(table: PredictionTable) -> list[str]:
    """Warn if Anomaly Detection lacks a class, normal or defective, or has only a few parts of it."""
    warnings = []
    single = [f"{row} ({name} only)" for row, name in strict.single_class_rows(table).items()]
    if single:
        warnings.append(f"Anomaly Detection covers only one class: {', '.join(single)}")
    few = [
        f"the dataset {row} has {count} {name} part{'' if count == 1 else 's'}"
        for row, members in detection.detection_subsets(table).items()
        for name, of_class in (("normal", ~table.defective), ("defective", table.defective))
        if row != detection.ALL_IMAGES
        and 0 < (count := len(np.unique(table.part_index[members & of_class]))) < MIN_PARTS
    ]
    if few:
        warnings.append(
            f"Anomaly Detection has no interval if a class has fewer than {MIN_PARTS} parts: {', '.join(few)}"
        )
    return warnings


def calibration_warnings(calibration: Mapping[str, Any]) -> list[str]:
    """Warn about a temperature at its bounds and a missing threshold, after the warnings of the validation run."""
    if not calibration:
        return []
    warnings = list(calibration["warnings"])
    lowest, highest = TEMPERATURE_BOUNDS
    if calibration["temperature"] == highest:
        warnings.append(
            "P(defect) does not increase with defects on the validation split, so it is close to 0.5 for every image "
            "after calibration"
        )
    if calibration["temperature"] == lowest:
        warnings.append(
            "P(defect) separates the classes of the validation split perfectly, so the temperature is at its lower "
            "bound; add validation images to estimate it"
        )
    if "false_alarms" not in calibration["thresholds"]:
        stated, normal = calibration["stated_false_alarms"], calibration["validation"]["normal"]
        warnings.append(
            f"{normal} normal validation images are too few to guarantee a false-alarm share of {stated:g}; use "
            f"at least {math.ceil(1 / stated - 1e-9) - 1}, or raise --false_alarms"
        )
    return warnings
