"""Measure how often the 95% intervals contain the true value: `python -m benchmarks.evaluation.coverage`.

The benchmark simulates answers with a known accuracy, correlated within images and within parts. An answer is correct
if a normal latent variable lies below the bound that gives this accuracy. The latent variable is the sum of a part
effect, an image effect and a question effect. The intervals come from the functions that reports use. The first table
covers plain accuracy. The last two cover figures of whole runs: the strict table, P(defect) and the difference between
two runs on the same parts. The last one pools many datasets that have few parts each.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from echo_ft.metrics import comparison, intervals
from echo_ft.metrics.metric_values import metric_interval
from echo_ft.metrics.prediction_table import PredictionTable, make_prediction_table
from echo_ft.records import GOOD, QUESTION_TYPES, Prediction

QUESTIONS = 5
"""Questions per image."""

PART_VARIANCE, IMAGE_VARIANCE = 0.2, 0.3
"""Fractions of the latent variance. The first is the correlation between images of a part, and the sum is that between
questions about an image."""


@dataclass(frozen=True)
class Setting:
    """A test set and the true accuracy of the system."""

    images: int
    images_per_part: int
    accuracy: float
    datasets: int = 1
    """Datasets of equal size that the test set pools."""


SETTINGS = [
    Setting(images, images_per_part, accuracy)
    for images in (60, 200, 800)
    for images_per_part in (1, 3)
    for accuracy in (0.5, 0.8, 0.95)
]

POOLED = [
    Setting(datasets * parts_per_class * 2, 1, 0.8, datasets)
    for datasets in (15, 38)
    for parts_per_class in (2, 3, 5, 10)
]
"""MMAD has 38 products."""

FIGURES = ("Average", "Anomaly Detection", "recall", "AUROC", "Average, difference")
"""The figures of reports, and the difference between two runs."""


@dataclass(frozen=True)
class Coverage:
    """Fractions of runs whose interval contains the true value, lies above it, or lies below it."""

    contained: float
    above: float
    below: float


def coverage(bounds: np.ndarray, truth: float) -> Coverage:
    """Return the coverage of intervals (2, runs)."""
    low, high = bounds
    above, below = float((low > truth + 1e-9).mean()), float((high < truth - 1e-9).mean())
    return Coverage(1 - above - below, above, below)


def latents(random: np.random.Generator, runs: int, parts: int, images_per_part: int) -> np.ndarray:
    """Draw standard normal values (runs, parts, images per part, QUESTIONS), correlated within images and parts."""
    part = random.standard_normal((runs, parts, 1, 1))
    image = random.standard_normal((runs, parts, images_per_part, 1))
    question = random.standard_normal((runs, parts, images_per_part, QUESTIONS))
    question_variance = 1 - PART_VARIANCE - IMAGE_VARIANCE
    return np.sqrt(PART_VARIANCE) * part + np.sqrt(IMAGE_VARIANCE) * image + np.sqrt(question_variance) * question


def accuracy_coverage(setting: Setting, runs: int, seed: int = 0) -> dict[str, Coverage]:
    """Return the coverage for the accuracy over all questions, by our interval and by the plain percentile interval."""
    parts = setting.images // setting.images_per_part
    drawn = latents(np.random.default_rng(seed), runs, parts, setting.images_per_part)
    accuracies = (drawn < norm.ppf(setting.accuracy)).mean(axis=(2, 3))  # all parts have the same number of questions
    values = intervals.resample([0] * parts) @ accuracies.T / parts
    tail = 100 * (1 - intervals.CONFIDENCE_LEVEL) / 2
    return {
        "interval": coverage(intervals.percentile_interval(values, parts), setting.accuracy),
        "plain percentile": coverage(np.percentile(values, [tail, 100 - tail], axis=0), setting.accuracy),
    }


def single_question_coverage(parts: int, accuracy: float, runs: int, seed: int = 0) -> Coverage:
    """Return the coverage with one question per part, as for one question type, where often all answers are correct."""
    correct = np.random.default_rng(seed).random((runs, parts)) < accuracy
    values = intervals.resample([0] * parts) @ correct.T / parts
    return coverage(intervals.percentile_interval(values, parts), accuracy)


def report_coverage(setting: Setting, runs: int, seed: int = 0) -> dict[str, Coverage]:
    """Return the coverage for the figures of a report and for the difference from a second, equally good run.

    Figures without an interval, because a dataset or a class has too few parts, are left out.
    """
    found: dict[str, list[list[float] | None]] = {}
    for one, other in _pairs(setting, runs, seed):
        part_counts, weights = comparison.compared_part_counts(one), one.weights()
        first, second = comparison.compared_metrics(one, weights), comparison.compared_metrics(other, weights)
        for name in FIGURES[:-1]:
            found.setdefault(name, []).append(metric_interval(first[name], part_counts[name], name))
        difference = metric_interval(
            second["Average"] - first["Average"], part_counts["Average"], "Average", difference=True
        )
        found.setdefault(FIGURES[-1], []).append(difference)
    # Scores of both classes are normal with variance 1. Their means are the bound and minus the bound.
    area = norm.cdf(np.sqrt(2) * norm.ppf(setting.accuracy))
    truths = {"AUROC": area, "recall": setting.accuracy, "Average, difference": 0.0}
    return {
        name: coverage(np.array(bounds, dtype=float).T, truths.get(name, 100 * setting.accuracy))
        for name, bounds in found.items()
        if None not in bounds
    }


def _pairs(setting: Setting, runs: int, seed: int) -> Iterator[tuple[PredictionTable, PredictionTable]]:
    random = np.random.default_rng(seed)
    parts = setting.images // setting.images_per_part
    for _ in range(runs):
        shared, *both = (latents(random, 1, parts, setting.images_per_part)[0] for _ in range(3))
        first, second = (
            make_prediction_table(
                _answers(norm.ppf(setting.accuracy) - np.sqrt(0.5) * (shared + own), parts // setting.datasets)
            )
            for own in both
        )
        yield first, second


def _answers(margins: np.ndarray, parts_per_dataset: int) -> list[Prediction]:
    """Make the predictions of a run. An answer is correct if its margin is positive. Every other part is defective."""
    rows = []
    for (part, image, question), confidence in np.ndenumerate(norm.cdf(margins)):
        defective = part % 2 == 0
        name = f"{part}-{image}"
        correct, wrong = "AB" if defective else "BA"
        parsed = correct if confidence > 0.5 else wrong
        rows.append(
            Prediction(
                name, f"{name}/{question}", f"drawn {part // parts_per_dataset}", "part", str(part), f"{name}.png",
                "crack" if defective else GOOD, QUESTION_TYPES[question], "?", {"A": "Yes.", "B": "No."},
                correct, parsed, parsed, {correct: float(confidence), wrong: 1 - float(confidence)},
            )
        )  # fmt: skip
    return rows


def format_coverage(one: Coverage) -> str:
    """Format as `94.8 (2.9, 2.3)`: percent of runs; in brackets, with an interval above and below the true value."""
    return f"{100 * one.contained:.1f} ({100 * one.above:.1f}, {100 * one.below:.1f})"


def main() -> None:
    """Print the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4000, help="Simulated runs per row of the first two tables.")
    parser.add_argument("--reports", type=int, default=1000, help="Simulated runs per row of the last two tables.")
    options = parser.parse_args()
    print(f"{QUESTIONS} questions per image; intervals that contain the true value, % (above it, below it)\n")
    print(f"Accuracy, {options.runs} runs:\n")
    print("| images | parts | accuracy | plain percentile | interval |\n|---|---|---|---|---|")
    for setting in SETTINGS:
        found = accuracy_coverage(setting, options.runs)
        cells = (setting.images, setting.images // setting.images_per_part, setting.accuracy)
        shown = [*cells, format_coverage(found["plain percentile"]), format_coverage(found["interval"])]
        print("| " + " | ".join(map(str, shown)) + " |", flush=True)
    print(f"\nOne question per part, {options.runs} runs:\n\n| parts | accuracy | interval |\n|---|---|---|")
    for parts in (12, 15, 30, 60):
        for accuracy in (0.8, 0.9, 0.95):
            single = single_question_coverage(parts, accuracy, options.runs)
            print(f"| {parts} | {accuracy} | {format_coverage(single)} |", flush=True)
    print(f"\nReports, {options.reports} runs:\n")
    _print_reports([one for one in SETTINGS if one.images == 200 and one.images_per_part == 3], options.reports)
    print(f"\nReports on many datasets, {options.reports} runs:\n")
    _print_reports(POOLED, options.reports)


def _print_reports(settings: Sequence[Setting], runs: int) -> None:
    for index, setting in enumerate(settings):
        found = report_coverage(setting, runs)
        if index == 0:
            print(f"| images | parts | datasets | accuracy | {' | '.join(FIGURES)} |\n|{'---|' * (len(FIGURES) + 4)}")
        cells = (setting.images, setting.images // setting.images_per_part, setting.datasets, setting.accuracy)
        shown = [format_coverage(found[name]) if name in found else "" for name in FIGURES]
        print("| " + " | ".join(map(str, [*cells, *shown])) + " |", flush=True)


if __name__ == "__main__":
    main()
