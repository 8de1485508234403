"""Test RobustMAD's conclusions about models with intervals: `python -m benchmarks.evaluation.robustmad FOLDER`.

FOLDER holds `RobustMAD_MCQ.json`, `RobustMAD_MCQ_low.json` and the authors' answer files for both,
`answers_<model>.json` and `answers_<model>_low.json`. The tables show the strict score of each model, how much it loses
on degraded images, and how much it gains from a reference. They also show which of two models with neighbouring scores
is better. The images are resampled, each with its eleven questions, and all models share the resamples.

`--picture FILE` also draws the scores as SVG.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echo_ft.metrics.answer_files.robustmad import DEGRADATIONS, load_robustmad
from echo_ft.metrics.loading import load_answers
from echo_ft.metrics.metric_values import metric_interval
from echo_ft.metrics.prediction_table import PredictionTable, make_prediction_table
from echo_ft.metrics.strict import answer_counts, other_type_array
from echo_ft.records import ROBUSTMAD_TYPES

QUESTIONS, DEGRADED = "RobustMAD_MCQ.json", "_low"

ROWS = (*ROBUSTMAD_TYPES, "mean")
"""The categories and their unweighted mean."""

FIRST, ROW_HEIGHT, PANEL, GAP = 190, 34, 190, 26
"""Left edge of the first panel, height of a model's row, width of a panel and the gap between panels, in pixels."""

INK, SOFT, GRID, CLEAN, LOW = "#1d2329", "#59636e", "#e2dfd8", "#1d5fd1", "#b4540a"


Scores = tuple[np.ndarray, np.ndarray]
"""The scores of a model, (1, 5), and their resamples, (R, 5), in percent and in the order of ROWS."""


@dataclass(frozen=True)
class Estimate:
    """A score or a difference in percent, and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Model:
    """The answers of one model to the clean and the degraded images."""

    name: str
    clean: PredictionTable
    degraded: PredictionTable
    unclear: int
    """Number of answers without a clear letter in both files. The authors' parser guesses one."""


def load_models(folder: Path) -> list[Model]:
    """Load the answers of all models in the folder. All tables have the same questions in the same order."""
    models = []
    for path in sorted(folder.glob("answers_*.json")):
        if path.stem.endswith(DEGRADED):
            continue
        tables = []
        for suffix in ("", DEGRADED):
            answers = path.with_stem(path.stem + suffix)
            run, _ = load_answers(answers, folder / QUESTIONS.replace(".json", f"{suffix}.json"))
            tables.append(make_prediction_table(run.predictions))
        unclear = sum(answer_counts(table.predictions)["unparsed"] for table in tables)
        models.append(Model(path.stem.removeprefix("answers_"), tables[0], tables[1], unclear))
    if not models:
        raise SystemExit(f"{folder} has no file answers_<model>.json; give the folder with RobustMAD's answers")
    names = [[one.question for one in table.predictions] for model in models for table in (model.clean, model.degraded)]
    if any(own != names[0] for own in names):
        raise SystemExit(f"the models in {folder} did not answer the same questions; give complete answer files")
    return models


def scores(table: PredictionTable, weights: np.ndarray) -> np.ndarray:
    """Return the strict scores in percent in each resample, (R, 5), in the order of ROWS."""
    columns = [table.other_types.index(kind) for kind in ROBUSTMAD_TYPES.values()]
    return other_type_array(table, weights)[:, [*columns, -1]]


def estimate(value: np.ndarray, resampled: np.ndarray, parts: int, difference: bool = True) -> Estimate:
    """Return an estimate from its value (1,) and its resamples (R,)."""
    low, high = metric_interval(resampled, parts, difference=difference, percent=True) or (float("nan"),) * 2
    return Estimate(float(value[0]), low, high)


def estimates(first: Scores, second: Scores, parts: int) -> list[Estimate]:
    """Return second - first for each of ROWS."""
    value, resampled = second[0] - first[0], second[1] - first[1]
    return [estimate(value[:, place], resampled[:, place], parts) for place in range(len(ROWS))]


def text(one: Estimate, signed: bool = False) -> str:
    """Format as `77.8 (75.6 to 79.8)`, or with signs."""
    form = "{:+.1f} ({:+.1f} to {:+.1f})" if signed else "{:.1f} ({:.1f} to {:.1f})"
    return form.format(one.value, one.low, one.high)


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table in Markdown."""
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    print("".join(f"| {' | '.join(row)} |\n" for row in rows))


def degraded_images(folder: Path, table: PredictionTable, degradation: str) -> np.ndarray:
    """Return which images of the table, (N,) bool, have this degradation in the file of degraded images."""
    asked, _ = load_robustmad(folder / QUESTIONS.replace(".json", f"{DEGRADED}.json"))
    names = {image.id for image in asked if image.degradation == degradation}
    return np.array([image in names for *_, image in table.images])


def main() -> None:
    """Print the tables in Markdown, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Folder with RobustMAD's question and answer files.")
    parser.add_argument("--picture", type=Path, help="SVG file to draw the scores into.")
    options = parser.parse_args()
    models = load_models(options.folder)
    table = models[0].clean
    parts, weights, ones = len(table.images), table.weights(), table.unit_weights()
    clean = {model.name: (scores(model.clean, ones), scores(model.clean, weights)) for model in models}
    low = {model.name: (scores(model.degraded, ones), scores(model.degraded, weights)) for model in models}
    models.sort(key=lambda model: -float(clean[model.name][0][0, -1]))
    shown = {
        (name, degraded): [
            estimate(values[:, place], resampled[:, place], parts, difference=False) for place in range(len(ROWS))
        ]
        for degraded, found in ((False, clean), (True, low))
        for name, (values, resampled) in found.items()
    }
    print(f"Strict scores on clean images, in percent ({parts} images):\n")
    rows = [(model.name, *map(text, shown[model.name, False]), str(model.unclear)) for model in models]
    print_table(("model", *ROWS, "unclear answers"), rows)
    print("Loss on degraded images, in points:\n")
    rows = [
        (
            model.name,
            *costs(clean[model.name], low[model.name], parts),
            *costs_by_degradation(options.folder, model, weights),
        )
        for model in models
    ]
    print_table(("model", *ROWS, *(f"mean, {name}" for name in DEGRADATIONS.values())), rows)
    print("Gain from a reference: pairwise - standalone, on clean images, in points:\n")
    rows = [(model.name, text(reference_gain(*clean[model.name], parts), True)) for model in models]
    print_table(("model", "difference"), rows)
    print("Neighbours in the order of the mean, clean images, in points:\n")
    pairs = [(better.name, worse.name) for better, worse in itertools.pairwise(models)]
    rows = [(f"{better} - {worse}", *costs(clean[worse], clean[better], parts)) for better, worse in pairs]
    print_table(("difference", *ROWS), rows)
    if options.picture:
        options.picture.write_text(picture([model.name for model in models], shown), encoding="utf-8")


def costs(before: Scores, after: Scores, parts: int) -> list[str]:
    """Return the differences after - before as text, in the order of ROWS."""
    return [text(one, True) for one in estimates(before, after, parts)]


def costs_by_degradation(folder: Path, model: Model, weights: np.ndarray) -> list[str]:
    """Return, as text, the loss from each degradation on average over the categories, for the images that have it."""
    found = []
    for degradation in DEGRADATIONS:
        member = degraded_images(folder, model.clean, degradation)
        chosen = (np.ones((1, len(member))) * member, weights * member)
        before, after = (
            (scores(table, chosen[0]), scores(table, chosen[1])) for table in (model.clean, model.degraded)
        )
        found.append(costs(before, after, int(member.sum()))[-1])
    return found


def reference_gain(values: np.ndarray, resampled: np.ndarray, parts: int) -> Estimate:
    """Return the score of the questions with a reference minus that of the questions about a single image."""
    single, pair = ROWS.index("standalone"), ROWS.index("pairwise")
    return estimate(values[:, pair] - values[:, single], resampled[:, pair] - resampled[:, single], parts)


def picture(names: list[str], shown: dict[tuple[str, bool], list[Estimate]]) -> str:
    """Draw the scores of each category as SVG: one panel per category, one row per model, clean above degraded."""
    start = 25 * int(min(one.low for found in shown.values() for one in found) // 25)
    width, height = FIRST + len(ROBUSTMAD_TYPES) * (PANEL + GAP), 76 + ROW_HEIGHT * len(names)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + 34}" role="img" '
        'font-family="system-ui, DejaVu Sans, sans-serif" font-size="12.5">',
        "<title>Strict scores of models on RobustMAD, clean and degraded images, with 95% intervals</title>",
        f'<rect width="{width}" height="{height + 34}" fill="#ffffff"/>',
    ]
    for row, name in enumerate(names):
        lines.append(f'<text x="{FIRST - 14}" y="{74 + ROW_HEIGHT * row}" text-anchor="end" fill="{INK}">{name}</text>')
    for panel, category in enumerate(ROBUSTMAD_TYPES):
        left = FIRST + panel * (PANEL + GAP)
        lines.append(f'<text x="{left}" y="26" fill="{INK}" font-weight="600">{category}, %</text>')
        for tick in range(start, 101, 25):
            x = left + PANEL * (tick - start) / (100 - start)
            lines.append(f'<path d="M{x} 44V{height - 20}" stroke="{GRID}"/>')
            lines.append(
                f'<text x="{x}" y="{height - 4}" text-anchor="middle" fill="{SOFT}" font-size="10.5">{tick}</text>'
            )
        for row, name in enumerate(names):
            for degraded, colour, offset in ((False, CLEAN, -6), (True, LOW, 6)):
                one, y = shown[name, degraded][panel], 70 + ROW_HEIGHT * row + offset
                low, x, high = (
                    left + PANEL * (value - start) / (100 - start) for value in (one.low, one.value, one.high)
                )
                lines.append(f'<path d="M{low:.1f} {y}H{high:.1f}" stroke="{colour}" stroke-width="5" opacity=".35"/>')
                lines.append(f'<circle cx="{x:.1f}" cy="{y}" r="3.6" fill="{colour}"/>')
    for colour, label, x in (
        (CLEAN, "clean images", FIRST),
        (LOW, "motion blur or low light (bars: 95% intervals)", FIRST + 130),
    ):
        lines.append(f'<circle cx="{x}" cy="{height + 16}" r="4" fill="{colour}"/>')
        lines.append(f'<text x="{x + 10}" y="{height + 20}" fill="{INK}">{label}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
