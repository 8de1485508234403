"""The cases of a run for a review by people: what each expert saw and answered, next to the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from echo_ft.data.dataset import Dataset, load_dataset
from echo_ft.data.splits import conditions_of
from echo_ft.errors import EchoError
from echo_ft.experts.option_order import most_probable
from echo_ft.files import read_complete_rows, read_jsonl
from echo_ft.images.boxes import Box
from echo_ft.inference.run_folder import TRACES
from echo_ft.metrics.experts import concluded_letter
from echo_ft.metrics.grounding.scores import named_boxes
from echo_ft.metrics.loading import Run
from echo_ft.metrics.prediction_table import is_correct, p_defect
from echo_ft.records import ROLES, UNLABELLED, Inspection, Prediction, Trace

TAGS = ("wrong", "disagreement", "unparsed", "failed")
"""Tags for cases that may be worth a review. `disagreement`: the reasoning expert's conclusion contradicts the
decision, or the text names an option that is not the most probable one."""


@dataclass(frozen=True)
class ReviewQuestion:
    """A question of a case, with the outputs of the experts that answered it."""

    prediction: Prediction
    reasoning: str
    tags: tuple[str, ...]
    """The TAGS that apply to the question."""

    @property
    def right(self) -> bool:
        """Whether the answer is correct."""
        return is_correct(self.prediction)


@dataclass(frozen=True)
class ReviewCase:
    """An inspected image with the run's answers about it."""

    inspection: Inspection
    """The image and its truth, as stored in the dataset."""
    conditions: tuple[str, ...]
    """The conditions of the product in the whole dataset."""
    references: tuple[str, ...]
    """The normal images that the decision maker saw."""
    extractor: str
    """The output of the reference extractor; empty if it was not consulted. The same holds for the guide."""
    guide: str
    p_defect: float | None
    predicted: tuple[Box, ...]
    """The boxes in the run's answer to Defect Grounding, in thousandths of the image's width and height."""
    questions: tuple[ReviewQuestion, ...]

    @property
    def tags(self) -> tuple[str, ...]:
        """The TAGS that apply to at least one question."""
        found = {tag for question in self.questions for tag in question.tags}
        return tuple(tag for tag in TAGS if tag in found)


def run_dataset(run: Run) -> Dataset:
    """Load the dataset of a run. Raises EchoError if it is missing or was rebuilt after the run."""
    if "dataset" not in run.provenance:
        raise EchoError(f"{run.folder} is not a run folder; give one written by python -m evaluation.run")
    dataset = load_dataset(Path(str(run.provenance["dataset"])))
    if dataset.fingerprint != run.provenance.get("dataset_fingerprint"):
        raise EchoError(f"{dataset.folder} has been rebuilt since the run {run.folder}; restore the run's dataset")
    return dataset


def review_cases(run: Run, dataset: Dataset) -> list[ReviewCase]:
    """Return the cases of a run in the order of its predictions. Raises EchoError if the dataset lacks a case."""
    inspections = {one.id: one for one in read_jsonl(dataset.folder / "inspections.jsonl", Inspection)}
    traces: dict[str, dict[tuple[str, str], Trace]] = {}
    for read in read_complete_rows(run.folder / TRACES, Trace):
        trace = replace(read, context="", prompt="")  # prompts take most of a trace's memory
        traces.setdefault(trace.case, {})[trace.role, trace.branch] = trace
    # A case may have only a question about boxes.
    predictions: dict[str, list[Prediction]] = {one.case: [] for one in (*run.predictions, *run.grounding)}
    for prediction in run.predictions:
        predictions[prediction.case].append(prediction)
    boxes = {one.case: named_boxes(one) or () for one in run.grounding}
    missing = [case for case in predictions if case not in inspections]
    if missing:
        raise EchoError(f"{dataset.folder} has no image {missing[0]} of {run.folder}; restore the run's dataset")
    conditions = conditions_of([*inspections.values()])
    return [
        _review_case(
            inspections[case],
            tuple(conditions[inspections[case].dataset, inspections[case].product]),
            rows,
            traces.get(case, {}),
            boxes.get(case, ()),
        )
        for case, rows in predictions.items()
    ]


def _review_case(
    inspection: Inspection,
    conditions: tuple[str, ...],
    rows: Sequence[Prediction],
    traces: dict[tuple[str, str], Trace],
    boxes: tuple[Box, ...],
) -> ReviewCase:
    def said(role: str, *branches: str) -> str:
        return "\n".join(traces[role, branch].text for branch in branches if (role, branch) in traces)

    extractor, guide, reasoner, decider = ROLES
    # Only some question types may show the reference. The last image is the query.
    shown = max((trace.images[:-1] for (role, _), trace in traces.items() if role == decider), key=len, default=())
    scores = [score for row in rows if (score := p_defect(row)) is not None]
    questions = [(row, said(reasoner, row.question)) for row in rows]
    return ReviewCase(
        inspection,
        conditions,
        shown,
        said(extractor, "best", "normal"),
        said(guide, "guide"),
        sum(scores) / len(scores) if scores else None,
        boxes,
        tuple(ReviewQuestion(row, reasoning, _tags(row, reasoning)) for row, reasoning in questions),
    )


def _tags(row: Prediction, reasoning: str) -> tuple[str, ...]:
    concluded = concluded_letter(reasoning, row.options) if reasoning else None
    probable = most_probable(row.probabilities) if row.probabilities else None
    others = {letter for letter in (concluded, probable) if letter is not None} - {row.parsed}
    applies = {
        "wrong": row.condition != UNLABELLED and not is_correct(row),
        "disagreement": row.parsed is not None and bool(others),
        "unparsed": row.parsed is None and row.error is None,
        "failed": row.error is not None,
    }
    return tuple(tag for tag in TAGS if applies[tag])
