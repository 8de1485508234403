"""A built dataset folder, and the cases in it."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_ft.records import Case, EchoError, Entry, Inspection, Question, Reference, Seen, Truth, read_jsonl
from echo_ft.retrieval import candidate_order

FORMAT = "echo-ft dataset 1"
"""`format` in manifest.json; another one means that the folder was built by another version."""

Descriptions = dict[str, dict[str, dict[str, str]]]
"""{dataset: {product: {condition: description}}}, as in knowledge.json."""

REFERENCES = ("retrieved", "random", "none")


@dataclass(frozen=True)
class Dataset:
    """A dataset folder as `python -m data_prep.build` writes it. Images are relative to `root`."""

    folder: Path
    root: Path
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """What tells this dataset's records from another's: 16 hex digits over its records and images."""
        return str(self.manifest["fingerprint"])


def load_dataset(folder: Path) -> Dataset:
    """The dataset in `folder`.

    Raises EchoError where there is none, where another version built it, and where its images have moved away.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        what = (
            f"{folder} is not a dataset (it has no manifest.json)"
            if folder.is_dir()
            else f"there is no dataset {folder}"
        )
        raise EchoError(f"{what}; build it with python -m data_prep.build --config FILE")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EchoError(f"{path} is not JSON ({error}); build the dataset again") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise EchoError(f"{path} has the format {found!r}, not {FORMAT!r}; build the dataset again with this version")
    root = (folder / manifest["root"]).resolve()
    if not root.is_dir():
        raise EchoError(f"the images of {folder} are no longer in {root}; put them back or build the dataset again")
    return Dataset(folder, root, manifest)


def cases(dataset: Dataset, split: str, reference: str = "retrieved") -> list[Case]:
    """The cases of one split, in the dataset's order: the photographs that have questions.

    `reference` chooses the normals beside each: `retrieved` (where the source names a reference, that one alone),
    `random` (the control) or `none`; they come in the order of `candidate_order`, each with its rank. Raises EchoError
    for another word.
    """
    folder = dataset.folder
    inspections = list(read_jsonl(folder / "inspections.jsonl", Inspection))
    references = list(read_jsonl(folder / "references.jsonl", Reference))
    questions = list(read_jsonl(folder / "questions.jsonl", Question))
    knowledge = json.loads((folder / "knowledge.json").read_text(encoding="utf-8"))
    return make_cases([i for i in inspections if i.split == split], references, questions, knowledge, reference)


def make_cases(
    inspections: list[Inspection],
    references: list[Reference],
    questions: list[Question],
    knowledge: Descriptions,
    reference: str = "retrieved",
) -> list[Case]:
    """Cases from records; an inspection without a question is not a case. See `cases`."""
    if reference not in REFERENCES:
        raise EchoError(f"reference cannot be {reference!r}; choose from {', '.join(REFERENCES)}")
    found: dict[tuple[str, str], list[Reference]] = defaultdict(list)
    for row in references:
        found[row.inspection, row.method].append(row)
    asked: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        asked[question.inspection].append(question)
    made = []
    for inspection in inspections:
        own = asked.get(inspection.id)
        if not own:
            continue
        beside = found.get((inspection.id, reference), [])
        if reference == "retrieved":
            beside = found.get((inspection.id, "given"), beside)
        candidates = candidate_order(inspection.id, beside)
        entries = knowledge.get(inspection.dataset, {}).get(inspection.product, {})
        seen = Seen(
            query=inspection.image,
            references=candidates,
            knowledge=tuple(Entry(condition, description) for condition, description in entries.items()),
            questions=tuple(dataclasses.replace(question, answer=None) for question in own),
        )
        answers = {question.id: question.answer for question in own if question.answer is not None}
        truth = Truth(
            inspection.condition,
            inspection.mask,
            inspection.boxes,
            answers,
            masks=inspection.masks,
            polygons=inspection.polygons,
        )
        made.append(Case(inspection.id, inspection.dataset, inspection.product, inspection.group, seen, truth))
    return made
