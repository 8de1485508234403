"""Judge a run against the limits of a gate: its parts, the threshold, the verdict and the sentence that states it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from echo_ft.errors import EchoError
from echo_ft.gate.certificate import (
    CONFIDENCE,
    ESCAPES,
    FAIL,
    FALSE_ALARMS,
    PASS,
    UNDECIDED,
    Finding,
    choose_threshold,
    judge,
    overall,
)
from echo_ft.metrics.detection import FLAGGED_FROM, Units, answer_scores, detection_images, detection_units
from echo_ft.metrics.loading import Run
from echo_ft.metrics.prediction_table import PredictionTable, make_prediction_table
from echo_ft.provenance import fingerprint_bytes

CHOOSING = 3
"""One in this many parts of a run is used to choose the threshold. In simulations, more runs pass with a third than a
half."""

BY_ANSWERS = "all parts are judged, because the run has no P(defect) and its answers need no threshold"

WORDS = {FALSE_ALARMS: ("good", "flagged"), ESCAPES: ("defective", "missed")}
"""The class of the parts, and what happens to a part in an error."""


def judge_run(run: Run, limits: Mapping[str, float], validation: Run | None = None) -> dict[str, Any]:
    """Return `gate` of report.json: limits, threshold, the parts on both sides, findings, verdict and sentences.

    A threshold of P(defect) is chosen on the parts of `validation`, or else on one in CHOOSING parts of the run. It is
    judged on all other parts of the run. A run without any P(defect) is judged by its answers, on all of its parts.

    If a class has no part to choose the threshold on, no part is judged. Raises EchoError if the run is incomplete, has
    failed predictions, rows that cannot be scored, images that were trained on, or no Anomaly Detection question.
    """
    require_new_parts(run)
    table = make_prediction_table(run.predictions)
    members = detection_images(table)
    if not members.any():
        raise EchoError(f"{run.folder} has no Anomaly Detection question, which --gate needs; ask it in the dataset")
    scored = not np.isnan(table.defect_scores[members]).all()
    units = detection_units(table, table.defect_scores if scored else answer_scores(table), members, "parts")
    choosing, threshold, how = None, FLAGGED_FROM, BY_ANSWERS
    if scored:
        choosing, units, how = _sides(run, table, units, validation)
        threshold = choose_threshold(choosing, limits) if _can_choose(choosing) else math.inf
        if threshold == math.inf:  # without a threshold, no part can be judged
            units = _select(units, np.zeros(len(units.image), dtype=bool))
    findings = judge(units, threshold, limits)
    verdict = overall(findings)
    reached = bool((table.defect_scores[members] >= threshold).any())
    return {
        "limits": dict(limits),
        "confidence": CONFIDENCE,
        "decided_by": "P(defect)" if scored else "answers",
        "threshold": threshold if scored and math.isfinite(threshold) else None,
        "split": {"how": how, "choosing": choosing and _counts(choosing), "judged": _counts(units)},
        "findings": {name: dataclasses.asdict(finding) for name, finding in findings.items()},
        "verdict": verdict,
        "sentence": _sentence(verdict, findings, threshold if scored else None, reached),
        "more_parts": [*_no_threshold(choosing), *_more_parts(verdict, findings, scored and validation is None)],
        "notes": [*_without_limit(units, threshold, limits), *_notes(table, members), *_unknown_training(run)],
    }


def require_new_parts(run: Run) -> None:
    """Raise EchoError if the run says nothing about new parts: it lacks answers, or its images were trained on.

    A missing answer in a file of another program counts against its model instead, because nothing repeats that.
    """
    if not run.complete:
        raise EchoError(f"{run.folder} is not complete, so --gate cannot judge it; resume it with evaluation.run")
    failed = [one.error for one in run.predictions if one.error is not None]
    if failed and "answers" not in run.provenance:
        raise EchoError(
            f"{len(failed)} predictions of {run.folder} failed (first: {failed[0]}), so --gate cannot judge it; rerun "
            "the same evaluation.run command to retry them"
        )
    if run.rejections:
        raise EchoError(
            f"{len(run.rejections)} rows of {run.folder} cannot be scored (first: {run.rejections[0].item}, "
            f"{run.rejections[0].reason}), so --gate cannot judge it; correct them"
        )
    for source in run.provenance.get("trained_on", []):
        count = source.get("photographs_trained_on")
        if count:
            raise EchoError(
                f"{count} of {source['of_photographs']} images of {run.folder} were trained on, so --gate cannot judge "
                "it; run the test split, or a dataset of other parts"
            )


def _sides(run: Run, table: PredictionTable, units: Units, validation: Run | None) -> tuple[Units, Units, str]:
    """Return the parts that choose the threshold, the parts that are judged, and how they were divided."""
    if validation is not None:
        require_new_parts(validation)
        other = make_prediction_table(validation.predictions)
        choosing = detection_units(other, other.defect_scores, detection_images(other), "parts")
        return choosing, units, f"the threshold is chosen on {validation.folder} and judged on all parts of this run"
    chosen = choosing_parts([table.parts[image] for image in units.image], units.defective)
    how = f"one in {CHOOSING} parts chooses the threshold, and the others are judged"
    return _select(units, chosen), _select(units, ~chosen), how


def _can_choose(units: Units) -> bool:
    return all(_counts(units).values()) and bool(np.isfinite(units.scores).any())


def _no_threshold(choosing: Units | None) -> list[str]:
    """Return a sentence that says why no threshold could be chosen, if so."""
    if choosing is None or _can_choose(choosing):
        return []
    counts = _counts(choosing)
    return [
        "no part is judged, because a threshold needs good and defective parts with a P(defect); "
        f"it could be chosen only from {counts['good']} good and {counts['defective']} defective parts"
    ]


def choosing_parts(parts: list[tuple[str, str, str]], defective: np.ndarray) -> np.ndarray:
    """Return (M,) bool: one in CHOOSING of the good parts and of the defective parts (dataset, product, group).

    The parts of a class are sorted by dataset, product and a hash of the group, and every third one is chosen. Each
    product therefore contributes its share, the order of names has no influence, and the same parts are always divided
    the same way.
    """
    chosen = np.zeros(len(parts), dtype=bool)
    order = sorted(
        range(len(parts)), key=lambda place: (*parts[place][:2], fingerprint_bytes(parts[place][2].encode()))
    )
    for of_class in (False, True):
        chosen[[place for place in order if defective[place] == of_class][::CHOOSING]] = True
    return chosen


def _select(units: Units, chosen: np.ndarray) -> Units:
    return Units(units.image[chosen], units.defective[chosen], units.scores[chosen])


def _counts(units: Units) -> dict[str, int]:
    return {"good": int((~units.defective).sum()), "defective": int(units.defective.sum())}


def _sentence(verdict: str, findings: Mapping[str, Finding], threshold: float | None, reached: bool) -> str:
    """State the verdict with its confidence, or say what is missing. `reached` says if the threshold flags an image."""
    if threshold == math.inf:
        return f"{verdict}: no threshold can be chosen"
    where = "by its answers" if threshold is None else f"flagging from P(defect) {threshold:.6g}"
    where += "" if threshold is None or reached else ", which no image reaches"
    shown = {PASS: findings, FAIL: {name: one for name, one in findings.items() if one.verdict == FAIL}}.get(verdict)
    if shown is None:
        open_ones = [name for name, one in findings.items() if one.verdict == UNDECIDED]
        parts = " and ".join(f"{findings[name].parts} {WORDS[name][0]} parts" for name in open_ones)
        return f"{verdict}: {parts} are too few to decide with {CONFIDENCE:.0%} confidence, {where}"
    sign = "at most" if verdict == PASS else "more than"
    claims = " and ".join(
        f"{sign} {100 * one.limit:g}% of {WORDS[name][0]} parts are {WORDS[name][1]}" for name, one in shown.items()
    )
    return f"{verdict}: {claims}, with {CONFIDENCE:.0%} confidence, {where}"


def _more_parts(verdict: str, findings: Mapping[str, Finding], divided: bool) -> list[str]:
    """Return a sentence for each undecided share that says how many further parts would settle it."""
    if verdict != UNDECIDED:
        return []
    sentences = []
    for name, one in findings.items():
        if one.verdict == UNDECIDED:
            of_class, error = WORDS[name]
            text = f"{one.more_without_error} more judged {of_class} parts would pass if none of them is {error}"
            if one.errors and one.more_at_this_rate is not None:
                text += f"; {one.more_at_this_rate} more would decide if {error} as often as so far"
            sentences.append(text)
    if divided:
        sentences.append(
            f"one in {CHOOSING} parts chooses the threshold, so add half as many again, or choose it on another run "
            "with --calibration"
        )
    return sentences


def _without_limit(units: Units, threshold: float, limits: Mapping[str, float]) -> list[str]:
    """State the share that has no limit, because a gate for false alarms alone passes a run that flags nothing."""
    seen = judge(units, threshold, dict.fromkeys(WORDS, 0.5))
    return [
        f"there is no limit for {name.replace('_', ' ')}: {seen[name].errors} of {seen[name].parts} judged "
        f"{of_class} parts are {error}"
        for name, (of_class, error) in WORDS.items()
        if name not in limits
    ]


def _notes(table: PredictionTable, members: np.ndarray) -> list[str]:
    """State what the certificate assumes about the parts."""
    images, parts = int(members.sum()), len(np.unique(table.part_index[members]))
    if parts < images:
        return [f"{images} images show {parts} parts; a part is flagged if any of its images is"]
    return [
        f"each of the {images} images counts as a separate part; if several show one part, name it in the column "
        "group and rebuild the dataset, because images of one part are not independent"
    ]


def _unknown_training(run: Run) -> list[str]:
    """Return a sentence that the model may have been trained on these images, if that could not be checked."""
    untold = run.provenance.get("adapters") and "trained_on" not in run.provenance  # an older version wrote run.json
    if "dataset" not in run.provenance or untold:
        return ["it is not known how the model was trained; the verdict holds only if it saw none of these parts"]
    unknown = [one["dataset"] for one in run.provenance.get("trained_on", []) if one["photographs_trained_on"] is None]
    if not unknown:
        return []
    return [
        f"the training data {', '.join(unknown)} could not be compared with these images; the verdict holds only if "
        "none of these parts is in it"
    ]
