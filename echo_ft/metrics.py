"""Strict figures of a run, with intervals: what a system got right of all that it was asked.

An answer that is no option letter, or that never came, counts as wrong and is counted. Anomaly Detection is the mean
of the accuracy on normal and on defective images; a kind that a dataset does not have is left out of its means.
Intervals come from resampling physical parts, with all their photographs and questions (`echo_ft.statistics`),
stratified by dataset and by what a part shows, so that no resample lacks a side (`sheets.Sheet.weights`).

Shapes: R resamples, N images, Q questions, D rows of a table, K = 7 kinds of question. Weights (R, N) are how often
each image was drawn; one row of ones gives the figures themselves, so both come from the same code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from echo_ft import statistics
from echo_ft.mmad_scorer import AVERAGE, Table
from echo_ft.pipeline import most_probable
from echo_ft.records import GOOD, KINDS, EchoError, Prediction
from echo_ft.sheets import Sheet, image_key, make_sheet

ALL = "All"
"""The row of all images together in `detection`."""

FEW = 5
"""Parts that a figure rests on at least to have an interval."""

_DETECTION = KINDS.index("Anomaly Detection")


def strict_array(sheet: Sheet, weights: np.ndarray, by: str = "dataset") -> np.ndarray:
    """(R, D + 1, K + 1): the strict table in percent for each resample; the last row and column are the averages.

    The average of a row is the mean of the kinds it has, the last row the unweighted mean of the rows that have a
    figure. nan where there is no question.
    """
    names, row_of = sheet.rows(by)
    shape = (len(names), 2, len(KINDS))
    cells = np.ravel_multi_index((row_of[sheet.image_of], sheet.defective[sheet.image_of] * 1, sheet.kinds), shape)
    used, column = np.unique(cells, return_inverse=True)
    sums = np.zeros((2, len(weights), int(np.prod(shape))))
    for which, amount in enumerate((np.ones(len(cells)), sheet.correct.astype(float))):
        per_image = np.zeros((len(sheet.images), len(used)))
        np.add.at(per_image, (sheet.image_of, column), amount)
        sums[which][:, used] = weights @ per_image
    asked, correct = sums.reshape(2, len(weights), *shape)
    table = np.full((len(weights), len(names) + 1, len(KINDS) + 1), np.nan)
    table[:, :-1, :-1] = statistics.ratio(correct.sum(axis=2), asked.sum(axis=2))
    sides = statistics.ratio(correct[..., _DETECTION], asked[..., _DETECTION])
    table[:, :-1, _DETECTION] = statistics.mean_of_present(sides, axis=2)
    table[:, :-1, -1] = statistics.mean_of_present(table[:, :-1, :-1], axis=2)
    table[:, -1] = statistics.mean_of_present(table[:, :-1], axis=1)
    return 100 * table


def strict_units(sheet: Sheet, by: str = "dataset") -> np.ndarray:
    """(D + 1, K + 1): how many parts each figure of `strict_array` rests on: of its two sides the smaller one's, and
    of a mean of rows the smallest one's, as each counts the same.
    """
    names, row_of = sheet.rows(by)
    asked = np.zeros((sheet.parts.max() + 1, len(names), 2, len(KINDS)), dtype=bool)
    image = sheet.image_of
    asked[sheet.parts[image], row_of[image], sheet.defective[image] * 1, sheet.kinds] = True
    sides = asked[..., _DETECTION].sum(axis=0)
    units = np.zeros((len(names) + 1, len(KINDS) + 1), dtype=int)
    units[:-1, :-1] = asked.any(axis=2).sum(axis=0)
    units[:-1, _DETECTION] = np.where(sides.min(axis=1) > 0, sides.min(axis=1), sides.max(axis=1))
    units[:-1, -1] = asked.any(axis=(2, 3)).sum(axis=0)
    asked_of = np.where(units[:-1] > 0, units[:-1], np.iinfo(int).max).min(axis=0)
    units[-1] = np.where(units[:-1].any(axis=0), asked_of, 0)
    return units


def strict_table(sheet: Sheet, by: str = "dataset") -> Table:
    """{row: {column: percent}}; None where there is no question."""
    return _as_table(sheet, strict_array(sheet, sheet.once(), by)[0], by)


def strict_intervals(sheet: Sheet, by: str = "dataset") -> dict[str, dict[str, list[float] | None]]:
    """{row: {column: [low, high]}}: 95 % intervals in percent of every figure in `strict_table`; see `interval`."""
    units = strict_units(sheet, by)
    sides = np.array([_sides(kind) for kind in (*KINDS, AVERAGE)])
    resampled = strict_array(sheet, sheet.weights(by), by)
    spread = statistics.percentile_interval(resampled, units, (0.0, 100.0), sides=sides)
    low, high = np.where(units < FEW, np.nan, spread)
    lows, highs = _as_table(sheet, low, by), _as_table(sheet, high, by)
    return {row: {column: pair(lows[row][column], highs[row][column]) for column in lows[row]} for row in lows}


def _as_table(sheet: Sheet, array: np.ndarray, by: str) -> Table:
    rows, columns = [*sheet.rows(by)[0], AVERAGE], [*KINDS, AVERAGE]
    return {
        row: {column: number(array[place, index]) for index, column in enumerate(columns)}
        for place, row in enumerate(rows)
    }


def one_sided(sheet: Sheet, by: str = "dataset") -> dict[str, str]:
    """Rows whose Anomaly Detection figure rests on one side alone, and which one: `normal` or `defective`."""
    names, row_of = sheet.rows(by)
    asked = sheet.image_of[sheet.kinds == _DETECTION]
    found = {}
    for place, name in enumerate(names):
        sides = set(sheet.defective[asked[row_of[asked] == place]].tolist())
        if len(sides) == 1:
            found[name] = "defective" if sides.pop() else "normal"
    return found


def detection_arrays(sheet: Sheet, weights: np.ndarray, members: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Image-level detection from the Anomaly Detection questions of `members` (N,) bool, each figure (R,) from 0 to 1.

    `auroc` is over the images with a P(defect); `recall` (share of defective images called so), `specificity` (of
    normal ones) and `balanced_accuracy` (their mean) are over all decisions, an unread one wrong.
    """
    members = np.ones(len(sheet.images), dtype=bool) if members is None else members
    asked, correct = np.zeros(len(sheet.images)), np.zeros(len(sheet.images))
    of_kind = sheet.kinds == _DETECTION
    np.add.at(asked, sheet.image_of[of_kind], 1.0)
    np.add.at(correct, sheet.image_of[of_kind], sheet.correct[of_kind].astype(float))

    def accuracy(side: np.ndarray) -> np.ndarray:
        chosen = members & side
        return statistics.ratio(weights[:, chosen] @ correct[chosen], weights[:, chosen] @ asked[chosen])

    recall, specificity = accuracy(sheet.defective), accuracy(~sheet.defective)
    scored = members & ~np.isnan(sheet.defect_scores)
    return {
        "auroc": statistics.auroc(weights[:, scored], sheet.defect_scores[scored], sheet.defective[scored]),
        "recall": recall,
        "specificity": specificity,
        "balanced_accuracy": (recall + specificity) / 2,
    }


def detection_units(sheet: Sheet, members: np.ndarray) -> dict[str, int]:
    """How many parts each figure of `detection_arrays` rests on; of its two sides the smaller one's."""
    return {
        "auroc": sheet.smaller_side(members & ~np.isnan(sheet.defect_scores)),
        "recall": sheet.smaller_side(members & sheet.defective),
        "specificity": sheet.smaller_side(members & ~sheet.defective),
        "balanced_accuracy": sheet.smaller_side(members),
    }


def detection(sheet: Sheet) -> dict[str, dict[str, Any]]:
    """{row: figures, their intervals and counts} for all images together and for each dataset, from 0 to 1."""
    weights = sheet.weights()
    table = {}
    for name, members in detection_rows(sheet).items():
        figures = {key: number(value[0]) for key, value in detection_arrays(sheet, sheet.once(), members).items()}
        spread, units = detection_arrays(sheet, weights, members), detection_units(sheet, members)
        table[name] = {
            "images": int(members.sum()),
            "normal": int((members & ~sheet.defective).sum()),
            "defective": int((members & sheet.defective).sum()),
            "scored": int((members & ~np.isnan(sheet.defect_scores)).sum()),
            **figures,
            "average_precision": average_precision(sheet, members),
            "intervals": {key: interval(value, units[key], key) for key, value in spread.items()},
        }
    return table


def detection_rows(sheet: Sheet) -> dict[str, np.ndarray]:
    """{row: (N,) bool}: the images with a question of Anomaly Detection, all together and each dataset's, if any."""
    names, row_of = sheet.rows("dataset")
    asked = _asked_for_defects(sheet)
    rows = {ALL: asked, **{name: asked & (row_of == place) for place, name in enumerate(names)}}
    return {name: members for name, members in rows.items() if members.any()}


def _asked_for_defects(sheet: Sheet) -> np.ndarray:
    """(N,) bool: the images with a question of Anomaly Detection."""
    asked = np.zeros(len(sheet.images), dtype=bool)
    asked[sheet.image_of[sheet.kinds == _DETECTION]] = True
    return asked


def average_precision(sheet: Sheet, members: np.ndarray) -> float | None:
    """scikit-learn's average precision of P(defect) over `members` (N,) bool; None where a side is missing."""
    scored = members & ~np.isnan(sheet.defect_scores)
    truth = sheet.defective[scored]
    if not 0 < truth.sum() < len(truth):
        return None
    from sklearn.metrics import average_precision_score  # takes seconds to import

    return float(average_precision_score(truth, sheet.defect_scores[scored]))


def roc_points(sheet: Sheet) -> list[tuple[float, float]]:
    """(false positive rate, true positive rate) along the threshold on P(defect); empty where a side is missing."""
    scored = ~np.isnan(sheet.defect_scores)
    truth = sheet.defective[scored]
    if not 0 < truth.sum() < len(truth):
        return []
    from sklearn.metrics import roc_curve

    false_positive, true_positive, _ = roc_curve(truth, sheet.defect_scores[scored])
    return list(zip(false_positive.tolist(), true_positive.tolist(), strict=True))


def calibration(sheet: Sheet, validation: Sheet, false_alarms: float) -> dict[str, Any]:
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
    from scipy.special import expit

    fitted_logits, fitted_truth = _scored(validation)
    logits, truth = _scored(sheet)
    counts = [{"normal": int((~one).sum()), "defective": int(one.sum())} for one in (fitted_truth, truth)]
    if not all(counts[0].values()):
        raise EchoError(
            f"the validation run has P(defect) of {counts[0]['normal']} normal and {counts[0]['defective']} defective "
            "images; calibrate on a run with both, by a model or a server that tells probabilities"
        )
    if not len(truth):
        raise EchoError("the run has P(defect) of no image; make it with a model or a server that tells probabilities")
    temperature = statistics.temperature(fitted_logits, fitted_truth)
    fitted, scores = expit(fitted_logits / temperature), expit(logits / temperature)
    thresholds = {
        "false_alarms": statistics.false_alarm_threshold(fitted[~fitted_truth], false_alarms),
        "f1": statistics.best_f1_threshold(fitted, fitted_truth),
        "best": statistics.best_f1_threshold(scores, truth) if truth.any() else None,
    }
    used = ~np.isnan(sheet.defect_scores)
    weights, units = sheet.weights()[:, used], detection_units(sheet, used)
    units = {"recall": units["recall"], "false_alarms": units["specificity"], "f1": units["balanced_accuracy"]}
    found = {}
    for name, threshold in thresholds.items():
        if threshold is not None:
            on_validation, on_test = (
                {
                    key: number(value[0])
                    for key, value in statistics.rates(np.ones((1, len(side))), called, side).items()
                }
                for called, side in ((fitted >= threshold, fitted_truth), (scores >= threshold, truth))
            )
            spread = statistics.rates(weights, scores >= threshold, truth) if name != "best" else {}
            found[name] = {
                "threshold": threshold,
                "validation": on_validation,
                "test": on_test,
                "intervals": {key: interval(value, units[key]) for key, value in spread.items()},
            }
    ways = {"before": logits, "after": logits / temperature}
    bins = {way: statistics.reliability(expit(one), truth) for way, one in ways.items()}
    return {
        "validation": counts[0],
        "test": counts[1],
        "temperature": temperature,
        "expected_calibration_error": {way: statistics.expected_calibration_error(one) for way, one in bins.items()},
        "log_loss": {way: statistics.log_loss(one, truth) for way, one in ways.items()},
        "reliability": bins,
        "stated_false_alarms": false_alarms,
        "thresholds": found,
    }


def _scored(sheet: Sheet) -> tuple[np.ndarray, np.ndarray]:
    """Log odds of P(defect), those of certainty kept finite, and the truth, of the images that have one."""
    from scipy.special import logit

    scored, tiny = ~np.isnan(sheet.defect_scores), np.finfo(float).eps
    return logit(np.clip(sheet.defect_scores[scored], tiny, 1 - tiny)), sheet.defective[scored]


def two_ways(predictions: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    """{kind or `Average`: figures}: the decisions read from the text beside those of the options' probabilities.

    Over the questions that have both; empty where none has. `agreement` (0 to 1, with its interval) is the share of
    `questions` whose text names the most probable option; a text that names none agrees with none. `text` and `logits`
    are the strict figures in percent of either way, the row `Average` being that of the strict table.
    """
    both = [one for one in predictions if one.error is None and one.probabilities]
    if not both:
        return {}
    text = make_sheet(both)
    logits = make_sheet([replace(one, parsed=most_probable(one.probabilities)) for one in both])
    pairs = zip(text.predictions, logits.predictions, strict=True)
    agrees = np.array([one.parsed == other.parsed for one, other in pairs])
    tables = [strict_table(way)[AVERAGE] for way in (text, logits)]
    weights = text.weights()
    found = {}
    for place, kind in enumerate([*KINDS, AVERAGE]):
        chosen = np.ones(len(both), dtype=bool) if kind == AVERAGE else text.kinds == place
        if not chosen.any():
            continue
        agreement, spread = share(text, weights, text.image_of[chosen], agrees[chosen])
        found[kind] = {
            "questions": int(chosen.sum()),
            "agreement": agreement,
            "interval": spread,
            "text": tables[0][kind],
            "logits": tables[1][kind],
        }
    return found


def share(sheet: Sheet, weights: np.ndarray, images: np.ndarray, holds: np.ndarray) -> tuple[float, list[float] | None]:
    """The share of things that hold (M,) bool, each about one of the sheet's images (M,), and its 95 % interval."""
    asked, held = np.zeros(len(sheet.images)), np.zeros(len(sheet.images))
    np.add.at(asked, images, 1.0)
    np.add.at(held, images, holds.astype(float))
    parts = len(np.unique(sheet.parts[images]))
    return float(holds.mean()), interval(statistics.ratio(weights @ held, weights @ asked), parts)


def counts(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Questions, images, and how many answers were no option letter (`unparsed`) or never came (`failed`)."""
    images = {image_key(prediction) for prediction in predictions}
    failed = sum(prediction.error is not None for prediction in predictions)
    unparsed = sum(prediction.error is None and prediction.parsed is None for prediction in predictions)
    return {
        "questions": len(predictions),
        "images": len(images),
        "normal": sum(condition == GOOD for _, _, condition, _ in images),
        "defective": sum(condition != GOOD for _, _, condition, _ in images),
        "unparsed": unparsed,
        "unparsed_share": unparsed / len(predictions) if predictions else 0.0,
        "failed": failed,
    }


def number(value: float) -> float | None:
    """A JSON number, None for nan."""
    return None if np.isnan(value) else float(value)


def pair(low: float | None, high: float | None) -> list[float] | None:
    """An interval, None where the figure has none."""
    return None if low is None or high is None else [low, high]


def interval(values: np.ndarray, units: int, figure: str = "", difference: bool = False) -> list[float] | None:
    """The interval of a figure (R,) that rests on so many units, or of a difference of two.

    `figure` is its name where it is one of `figures` or of `detection`; any other is a share from 0 to 1. None where it
    never exists, and where it rests on fewer than FEW units: so few have too little to draw from.
    """
    if units < FEW:
        return None
    top = 100.0 if figure in (*KINDS, AVERAGE) else 1.0
    bounds = (-top if difference else 0.0, top)
    return pair(*map(number, statistics.percentile_interval(values, units, bounds, sides=_sides(figure))))


def _sides(figure: str) -> int:
    """Of how many shares, of normal and of defective images, a figure is the mean."""
    return 2 if figure in (KINDS[_DETECTION], "balanced_accuracy") else 1


def figures(sheet: Sheet, weights: np.ndarray) -> dict[str, np.ndarray]:
    """What two runs are compared by, each (R,): the `Average` row in percent, and all images' detection from 0 to 1."""
    return _ordered(strict_array(sheet, weights)[:, -1].T, detection_arrays(sheet, weights))


def figure_units(sheet: Sheet) -> dict[str, int]:
    """How many parts each of `figures` rests on."""
    return _ordered(strict_units(sheet)[-1].tolist(), detection_units(sheet, _asked_for_defects(sheet)))


def _ordered(row: Iterable[Any], found: Mapping[str, Any]) -> dict[str, Any]:
    table = dict(zip([*KINDS, AVERAGE], row, strict=True))
    chosen = {"AUROC": found["auroc"], "recall": found["recall"], "specificity": found["specificity"]}
    return {AVERAGE: table.pop(AVERAGE), "Anomaly Detection": table.pop("Anomaly Detection"), **chosen, **table}
