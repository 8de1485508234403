from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import expit, logit

from echo_ft.errors import EchoError
from echo_ft.experts.option_order import most_probable
from echo_ft.metrics import intervals
from echo_ft.metrics.detection import detection_units
from echo_ft.metrics.figures import AVERAGE, figure_interval, number
from echo_ft.metrics.prediction_table import PredictionTable, make_prediction_table
from echo_ft.metrics.strict import strict_table
from echo_ft.records import QUESTION_TYPES, Prediction


def fitted_calibration(table: PredictionTable, validation: PredictionTable, false_alarms: float) -> dict[str, Any]:
    """P(defect) of a run (`test`), with a temperature and thresholds fitted on another, of a validation split.

    `expected_calibration_error`, `log_loss` and the bins of a `reliability` diagram are those of the test run, before
    and after `temperature` (`statistics.temperature`). A threshold is one of the calibrated P(defect); what reaches it
    is called defective. `thresholds` gives recall, share of false alarms and F1 on both runs, with intervals on the
    test run, of three of them: `false_alarms` holds that share on normal images (`statistics.false_alarm_threshold`)
    and is absent where the validation run has too few; `f1` has the highest F1 on the validation run; `best` has the
    highest on the test run itself, which nobody can know beforehand, and so no intervals.

    Intervals are of the test run's images, temperature and threshold being given. Raises EchoError where the validation
    run has no P(defect) of normal or of defective images, or the test run none at all.
    """

    fitted_logits, fitted_truth = _scored(validation)
    logits, truth = _scored(table)
    counts = [{"normal": int((~one).sum()), "defective": int(one.sum())} for one in (fitted_truth, truth)]
    if not all(counts[0].values()):
        raise EchoError(
            f"the validation run has P(defect) of {counts[0]['normal']} normal and {counts[0]['defective']} defective "
            "images; calibrate on a run with both, by a model or a server that tells probabilities"
        )
    if not len(truth):
        raise EchoError("the run has P(defect) of no image; make it with a model or a server that tells probabilities")
    temperature = intervals.temperature(fitted_logits, fitted_truth)
    fitted, scores = expit(fitted_logits / temperature), expit(logits / temperature)
    thresholds = {
        "false_alarms": intervals.false_alarm_threshold(fitted[~fitted_truth], false_alarms),
        "f1": intervals.best_f1_threshold(fitted, fitted_truth),
        "best": intervals.best_f1_threshold(scores, truth) if truth.any() else None,
    }
    used = ~np.isnan(table.defect_scores)
    weights, units = table.weights()[:, used], detection_units(table, used)
    units = {"recall": units["recall"], "false_alarms": units["specificity"], "f1": units["balanced_accuracy"]}
    found = {}
    for name, threshold in thresholds.items():
        if threshold is not None:
            on_validation, on_test = (
                {key: number(value[0]) for key, value in intervals.rates(np.ones((1, len(side))), called, side).items()}
                for called, side in ((fitted >= threshold, fitted_truth), (scores >= threshold, truth))
            )
            spread = intervals.rates(weights, scores >= threshold, truth) if name != "best" else {}
            found[name] = {
                "threshold": threshold,
                "validation": on_validation,
                "test": on_test,
                "intervals": {key: figure_interval(value, units[key]) for key, value in spread.items()},
            }
    ways = {"before": logits, "after": logits / temperature}
    bins = {way: intervals.reliability(expit(one), truth) for way, one in ways.items()}
    return {
        "validation": counts[0],
        "test": counts[1],
        "temperature": temperature,
        "expected_calibration_error": {way: intervals.expected_calibration_error(one) for way, one in bins.items()},
        "log_loss": {way: intervals.log_loss(one, truth) for way, one in ways.items()},
        "reliability": bins,
        "stated_false_alarms": false_alarms,
        "thresholds": found,
    }


def _scored(table: PredictionTable) -> tuple[np.ndarray, np.ndarray]:
    """Log odds of P(defect), those of certainty kept finite, and the truth, of the images that have one."""

    scored, tiny = ~np.isnan(table.defect_scores), np.finfo(float).eps
    return logit(np.clip(table.defect_scores[scored], tiny, 1 - tiny)), table.defective[scored]


def text_vs_logits(predictions: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    """{kind or `Average`: figures}: the decisions read from the text beside those of the options' probabilities.

    Over the questions that have both; empty where none has. `agreement` (0 to 1, with its interval) is the share of
    `questions` whose text names the most probable option; a text that names none agrees with none. `text` and `logits`
    are the strict figures in percent of either way, the row `Average` being that of the strict table.
    """
    both = [one for one in predictions if one.error is None and one.probabilities]
    if not both:
        return {}
    text = make_prediction_table(both)
    logits = make_prediction_table([replace(one, parsed=most_probable(one.probabilities)) for one in both])
    pairs = zip(text.predictions, logits.predictions, strict=True)
    agrees = np.array([one.parsed == other.parsed for one, other in pairs])
    tables = [strict_table(way)[AVERAGE] for way in (text, logits)]
    weights = text.weights()
    found = {}
    for place, kind in enumerate([*QUESTION_TYPES, AVERAGE]):
        chosen = np.ones(len(both), dtype=bool) if kind == AVERAGE else text.kinds == place
        if not chosen.any():
            continue
        agreement, spread = agreement_share(text, weights, text.image_of[chosen], agrees[chosen])
        found[kind] = {
            "questions": int(chosen.sum()),
            "agreement": agreement,
            "interval": spread,
            "text": tables[0][kind],
            "logits": tables[1][kind],
        }
    return found


def agreement_share(
    table: PredictionTable, weights: np.ndarray, images: np.ndarray, holds: np.ndarray
) -> tuple[float, list[float] | None]:
    """The share of things that hold (M,) bool, each about one of the sheet's images (M,), and its 95 % interval."""
    asked, held = np.zeros(len(table.images)), np.zeros(len(table.images))
    np.add.at(asked, images, 1.0)
    np.add.at(held, images, holds.astype(float))
    parts = len(np.unique(table.parts[images]))
    return float(holds.mean()), figure_interval(intervals.ratio(weights @ held, weights @ asked), parts)
