"""Logs of the evaluation commands in Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_ft.data.dataset import Dataset
from echo_ft.errors import EchoError
from echo_ft.html import thumbnail
from echo_ft.images.decode import decode, size_and_orientation
from echo_ft.images.masks import load_mask, resize_mask
from echo_ft.metrics.comparison import RunGroup
from echo_ft.metrics.loading import Run
from echo_ft.model.adapters import ADAPTER_FILES, read_card
from echo_ft.provenance import fingerprint_files
from echo_ft.terminal import LOGGER
from echo_ft.tracking import (
    Picture,
    adapter_artifact,
    dataset_artifact,
    evaluation_artifact,
    experiment_name,
    log_run,
    make_table,
    numbers_by_path,
    use_artifact,
)
from evaluation.review import ReviewCase, review_cases, run_dataset

if TYPE_CHECKING:
    import wandb

NOT_LOGGED = ("bootstrap", "provenance")
"""Keys of report.json that hold no figures of the run. W&B receives its provenance as the config."""

TABLE_CASES = 300
"""Number of cases in the table of an evaluation. If there are more cases, it shows evenly spaced ones."""

TABLE_SIDE = 512
"""Longer side of an image in the table, in pixels."""

COLUMNS = (
    "case", "product", "condition", "query", "reference", "kind", "question", "reference_extractor", "knowledge_guide",
    "reasoning_expert", "decision_maker", "P", "P(defect)", "answer", "truth", "right", "tags",
)  # fmt: skip
"""Columns of the table, which has one row per question. `P` is the probability of the true option."""


def log_evaluation(report: Mapping[str, Any], run: Run, output: Path, options: Any) -> None:
    """Log the figures of report.json and a table of the cases, with the dataset and the adapters as inputs.

    `output` is the folder of the report, and `options` is the dataclass of the command's options. Anything that is
    missing or has changed since the run is named in a warning and left out.
    """
    folder = run.folder if run.folder.is_dir() else output  # there is no run folder for an answer file
    name, group = folder.resolve().name, experiment_name(folder)
    config = {**run.provenance, "score": asdict(options)}
    with log_run("evaluate", name, group, config) as tracked:
        results = {key: part for key, part in report.items() if key not in NOT_LOGGED}
        logged: dict[str, Any] = numbers_by_path(results)
        try:
            dataset = run_dataset(run)
        except EchoError as error:
            LOGGER.warning("W&B gets no dataset and no table of cases: %s", error)
        else:
            use_artifact(tracked, dataset_artifact(dataset.folder, dataset.manifest))
            logged["cases"] = make_table(COLUMNS, table_rows(chosen_cases(review_cases(run, dataset)), dataset))
        use_adapters(tracked, run.provenance)
        tracked.log(logged)
        tracked.log_artifact(evaluation_artifact(folder, output))


def chosen_cases(cases: Sequence[ReviewCase]) -> Sequence[ReviewCase]:
    """Return the cases for the table, at most TABLE_CASES."""
    if len(cases) <= TABLE_CASES:
        return cases
    LOGGER.info("the W&B table shows %d of %d cases, evenly spaced", TABLE_CASES, len(cases))
    return [cases[index * len(cases) // TABLE_CASES] for index in range(TABLE_CASES)]


def use_adapters(tracked: wandb.Run, provenance: Mapping[str, Any]) -> None:
    """Record the adapters of a run as inputs, except those that are missing or have changed since the run."""
    folder = Path(str(provenance.get("adapters_folder")))
    for role, described in (provenance.get("adapters") or {}).items():
        path = folder / role
        try:
            card = asdict(read_card(path))
            if fingerprint_files([path / name for name in ADAPTER_FILES], path) != described.get("fingerprint"):
                raise EchoError(f"{path} has different weights than in the run")
        except (EchoError, OSError) as error:
            LOGGER.warning("W&B does not get the %s adapter: %s", role, error)
            continue
        use_artifact(tracked, adapter_artifact(path, card))


def table_rows(cases: Sequence[ReviewCase], dataset: Dataset) -> Iterator[tuple[Any, ...]]:
    """Yield a row of COLUMNS per question."""
    references: dict[str, Picture | None] = {}
    for case in cases:
        inspection = case.inspection
        query = _picture(dataset, inspection.image, case)
        reference = next(iter(case.references), None)
        if reference is not None and reference not in references:
            references[reference] = _picture(dataset, reference)
        for question in case.questions:
            row = question.prediction
            yield (
                inspection.id, inspection.product, inspection.condition,
                query, references.get(reference or ""), row.kind, row.question_text,
                case.extractor, case.guide, question.reasoning, row.error or row.text,
                (row.probabilities or {}).get(row.answer), case.p_defect,
                _option(row.options, row.parsed), _option(row.options, row.answer), question.right,
                " ".join(question.tags),
            )  # fmt: skip


def _option(options: Mapping[str, str], letter: str | None) -> str | None:
    return f"{letter}. {options[letter]}" if letter is not None and letter in options else letter


def _picture(dataset: Dataset, image: str, case: ReviewCase | None = None) -> Picture | None:
    """Return an image for the table, with the mask of the `case` if it is the query; None if it cannot be read."""
    try:
        whole = decode(dataset.root / image)
        view = size_and_orientation(dataset.root / image)
        mask = load_mask(case.inspection, dataset.root, *view) if case else None
    except (EchoError, OSError, ValueError):
        return None
    small = thumbnail(whole, TABLE_SIDE)
    if case is None:
        return Picture(small)
    small_mask = None if mask is None else resize_mask(mask, small.size)
    return Picture(small, small_mask, case.inspection.condition, case.predicted)


def log_comparison(comparison: Mapping[str, Any], groups: Sequence[RunGroup], output: Path, options: Any) -> None:
    """Log the scores of all runs as one table, and the differences as summary values, with the runs as inputs."""
    with log_run("compare", output.resolve().name, experiment_name(output), asdict(options)) as tracked:
        for group in groups:
            for run in group.runs:
                use_artifact(tracked, evaluation_artifact(run.folder))
        columns = ["run", "figure", "value", "low", "high", "runs", "standard_deviation"]
        rows = [
            [
                one["name"], key, score["value"], *(score["interval"] or (None, None)),
                score["runs"], score["standard_deviation"],
            ]
            for one in comparison["runs"]
            for key, score in one["figures"].items()
        ]  # fmt: skip
        tracked.log({"comparison": make_table(columns, rows)})
        for difference in comparison["differences"]:
            for key, score in difference["figures"].items():
                tracked.summary[f"{difference['run']}/{key}/difference"] = score["difference"]
