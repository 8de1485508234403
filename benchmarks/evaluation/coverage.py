"""How often the 95 % intervals hold the truth: `python -m benchmarks.evaluation.coverage`.

Answers of a known accuracy are drawn, images and questions hanging together, and the interval of each run is made by
the functions that make it in a report. Answers are right where a normal latent lies below a bound that the accuracy
sets; the latent is the sum of one of the part, one of the image and one of the question. First a plain accuracy, then
the figures of whole runs: the strict table, P(defect) and the difference of two runs on the same parts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from echo_ft.metrics import comparison
from echo_ft.metrics import intervals as statistics
from echo_ft.metrics.figures import figure_interval
from echo_ft.metrics.prediction_table import PredictionTable, make_prediction_table
from echo_ft.records import GOOD, QUESTION_TYPES, Prediction

QUESTIONS = 5
"""Questions about an image."""

OF_PART, OF_IMAGE = 0.2, 0.3
"""Shares of the latent's variance: questions of an image correlate by the sum, images of a part by the first."""


@dataclass(frozen=True)
class Setting:
    """A test set, and how good the system is."""

    images: int
    images_a_part: int
    accuracy: float


SETTINGS = [
    Setting(images, images_a_part, accuracy)
    for images in (60, 200, 800)
    for images_a_part in (1, 3)
    for accuracy in (0.5, 0.8, 0.95)
]


@dataclass(frozen=True)
class Coverage:
    """Shares of runs whose interval holds the truth, lies above it and lies below it."""

    held: float
    above: float
    below: float


def coverage(intervals: np.ndarray, truth: float) -> Coverage:
    """Of intervals (2, runs)."""
    low, high = intervals
    above, below = float((low > truth + 1e-9).mean()), float((high < truth - 1e-9).mean())
    return Coverage(1 - above - below, above, below)


def latents(random: np.random.Generator, runs: int, parts: int, images_a_part: int) -> np.ndarray:
    """(runs, parts, images a part, QUESTIONS): standard normal, correlated within images and within parts."""
    part = random.standard_normal((runs, parts, 1, 1))
    image = random.standard_normal((runs, parts, images_a_part, 1))
    question = random.standard_normal((runs, parts, images_a_part, QUESTIONS))
    return np.sqrt(OF_PART) * part + np.sqrt(OF_IMAGE) * image + np.sqrt(1 - OF_PART - OF_IMAGE) * question


def of_accuracy(setting: Setting, runs: int, seed: int = 0) -> dict[str, Coverage]:
    """Of the accuracy over all questions: the interval as it is, and the plain percentile one for comparison."""
    parts = setting.images // setting.images_a_part
    drawn = latents(np.random.default_rng(seed), runs, parts, setting.images_a_part)
    accuracies = (drawn < norm.ppf(setting.accuracy)).mean(axis=(2, 3))  # every part has as many questions
    values = statistics.resample([0] * parts) @ accuracies.T / parts
    tail = 100 * (1 - statistics.LEVEL) / 2
    return {
        "interval": coverage(statistics.percentile_interval(values, parts), setting.accuracy),
        "plain percentile": coverage(np.percentile(values, [tail, 100 - tail], axis=0), setting.accuracy),
    }


def of_single_questions(parts: int, accuracy: float, runs: int, seed: int = 0) -> Coverage:
    """Of a share with one question a part, as a row of one kind has it: often all of them are right."""
    right = np.random.default_rng(seed).random((runs, parts)) < accuracy
    values = statistics.resample([0] * parts) @ right.T / parts
    return coverage(statistics.percentile_interval(values, parts), accuracy)


def of_reports(setting: Setting, runs: int, seed: int = 0) -> dict[str, Coverage]:
    """Of the figures in a report, and of the difference to a second run that is as good, through `echo_ft.metrics.comparison`."""
    found: dict[str, list[list[float] | None]] = {}
    for one, other in _pairs(setting, runs, seed):
        units, weights = comparison.compared_units(one), one.weights()
        spread, second = comparison.compared_figures(one, weights), comparison.compared_figures(other, weights)
        for name in ("Average", "Anomaly Detection", "recall", "AUROC"):
            found.setdefault(name, []).append(figure_interval(spread[name], units[name], name))
        difference = figure_interval(
            second["Average"] - spread["Average"], units["Average"], "Average", difference=True
        )
        found.setdefault("Average, difference", []).append(difference)
    # Scores of either side are normal with variance 1, their means at the bound and at minus the bound.
    area = norm.cdf(np.sqrt(2) * norm.ppf(setting.accuracy))
    truths = {"AUROC": area, "recall": setting.accuracy, "Average, difference": 0.0}
    return {
        name: coverage(np.array(intervals, dtype=float).T, truths.get(name, 100 * setting.accuracy))
        for name, intervals in found.items()
    }


def _pairs(setting: Setting, runs: int, seed: int) -> Iterator[tuple[PredictionTable, PredictionTable]]:
    random = np.random.default_rng(seed)
    parts = setting.images // setting.images_a_part
    for _ in range(runs):
        shared, *both = (latents(random, 1, parts, setting.images_a_part)[0] for _ in range(3))
        first, second = (
            make_prediction_table(_answers(norm.ppf(setting.accuracy) - np.sqrt(0.5) * (shared + own))) for own in both
        )
        yield first, second


def _answers(margins: np.ndarray) -> list[Prediction]:
    """One run; an answer is right where its margin is above 0. Every other part is defective."""
    rows = []
    for (part, image, question), sure in np.ndenumerate(norm.cdf(margins)):
        defective = part % 2 == 0
        name = f"{part}-{image}"
        right, wrong = "AB" if defective else "BA"
        parsed = right if sure > 0.5 else wrong
        rows.append(
            Prediction(
                name, f"{name}/{question}", "drawn", "part", str(part), f"{name}.png",
                "crack" if defective else GOOD, QUESTION_TYPES[question], "?", {"A": "Yes.", "B": "No."},
                right, parsed, parsed, {right: float(sure), wrong: 1 - float(sure)},
            )
        )  # fmt: skip
    return rows


def show(one: Coverage) -> str:
    """`94.8 (2.9, 2.3)`: in percent, and in brackets the runs whose interval lies above and below the truth."""
    return f"{100 * one.held:.1f} ({100 * one.above:.1f}, {100 * one.below:.1f})"


def main() -> None:
    """Print the tables in markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4000, help="simulated runs in each row of the first table")
    parser.add_argument("--reports", type=int, default=1000, help="and of the second")
    options = parser.parse_args()
    print(f"{QUESTIONS} questions an image; runs whose interval holds the truth, % (lies above it, below it)\n")
    print(f"Accuracy, {options.runs} runs:\n")
    print("| images | parts | accuracy | plain percentile | interval |\n|---|---|---|---|---|")
    for setting in SETTINGS:
        found = of_accuracy(setting, options.runs)
        cells = (setting.images, setting.images // setting.images_a_part, setting.accuracy)
        shown = [*cells, show(found["plain percentile"]), show(found["interval"])]
        print("| " + " | ".join(map(str, shown)) + " |", flush=True)
    print(f"\nOne question a part, {options.runs} runs:\n\n| parts | accuracy | interval |\n|---|---|---|")
    for parts in (12, 15, 30, 60):
        for accuracy in (0.8, 0.9, 0.95):
            print(f"| {parts} | {accuracy} | {show(of_single_questions(parts, accuracy, options.runs))} |", flush=True)
    print(f"\nReports, {options.reports} runs:\n")
    for place, setting in enumerate(one for one in SETTINGS if one.images == 200 and one.images_a_part == 3):
        found = of_reports(setting, options.reports)
        if place == 0:
            print(f"| images | parts | accuracy | {' | '.join(found)} |\n|{'---|' * (len(found) + 3)}")
        cells = (setting.images, setting.images // setting.images_a_part, setting.accuracy)
        print("| " + " | ".join(map(str, [*cells, *map(show, found.values())])) + " |", flush=True)


if __name__ == "__main__":
    main()
