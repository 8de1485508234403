"""From what a source yields to the records of a dataset: checked, split, with references, knowledge and questions."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from data_prep.config import BuildConfig
from data_prep.progress import progress
from data_prep.sources import place_name
from echo_ft.data.dataset import less_held_out, less_synthetic, make_cases
from echo_ft.data.knowledge import describe_products, knowledge_warnings, load_knowledge
from echo_ft.data.questions import write_all_questions
from echo_ft.data.splits import HOLDS_OUT, LEFT_OUT, leave_out, make_splits, queries, reference_pool, with_synthetic
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl, write_jsonl
from echo_ft.records import GOOD, Case, Inspection, Knowledge, Question, Reference, Rejection
from echo_ft.retrieval.references import find_references, references_in_left_out_fold

_R = TypeVar("_R", Reference, Question)

SYNTHETIC_ELSEWHERE = (
    "its defect is synthetic, and it is of a kind that is held out, or the photographs of its part are not all in the "
    "train split: validation and test ask about photographs alone"
)

REFERENCE_LEFT_OUT = "the named reference is of the fold that is left out, so no training row may show it"

CONTROL_MARK = '"method": "random"'
"""What marks half the lines of references.jsonl: those that no training row shows."""

TRAINING_SPLITS = ("train", "validation")
"""The splits that have rows for the roles."""


@dataclass(frozen=True)
class WriteSummary:
    """Records that are in a file: how many of each kind, and the ids of the inspections that have any."""

    kinds: Counter[str]
    inspections: set[str]


@dataclass(frozen=True)
class DatasetDraft:
    """The records of a dataset. References and questions are in its folder already: of a million photographs there are
    too many to hold.
    """

    folder: Path
    inspections: list[Inspection]
    references: WriteSummary
    questions: WriteSummary
    knowledge: Knowledge
    rejections: list[Rejection]
    split_words: str
    held_out: list[str]
    unknown_products: list[str]
    knowledge_doubts: list[str]
    """Where the knowledge and the photographs do not fit together, a sentence each."""
    training_knowledge: Knowledge
    """The knowledge less the conditions that training must not see."""

    def asked(self, split: str) -> list[Inspection]:
        """The photographs of one split that have questions."""
        return [one for one in self.inspections if one.split == split and one.id in self.questions.inspections]

    def training_cases(self) -> Iterator[tuple[Inspection, Case]]:
        """The photographs of TRAINING with questions, each with its case as `echo_ft.data.dataset.load_cases` gives it."""
        shown = read_jsonl(self.folder / "references.jsonl", Reference, without=CONTROL_MARK)
        references = by_inspection(self.inspections, shown)
        questions = by_inspection(self.inspections, read_jsonl(self.folder / "questions.jsonl", Question))
        for inspection, beside, asked in zip(self.inspections, references, questions, strict=True):
            if inspection.split in TRAINING_SPLITS:
                for case in make_cases([inspection], beside, asked, self.training_knowledge):
                    yield inspection, case


def by_inspection(inspections: Iterable[Inspection], records: Iterable[_R]) -> Iterator[list[_R]]:
    """The records of each inspection, which come in the order of the inspections.

    Raises ValueError at the end where they do not, or where one belongs to no inspection.
    """
    groups = groupby(records, key=lambda record: record.inspection)
    waiting = next(groups, None)
    for inspection in inspections:
        if waiting is None or waiting[0] != inspection.id:
            yield []
            continue
        yield list(waiting[1])
        waiting = next(groups, None)
    if waiting is not None:
        raise ValueError(f"records of {waiting[0]} are not in the order of the inspections")


def write_records(path: Path, records: Iterable[_R], kind: Callable[[_R], str]) -> WriteSummary:
    """Write records of inspections as they are made."""
    written = WriteSummary(Counter(), set())

    def counted() -> Iterator[_R]:
        for record in records:
            written.kinds[kind(record)] += 1
            written.inspections.add(record.inspection)
            yield record

    write_jsonl(path, counted())
    return written


def prepare(
    inspections: list[Inspection],
    questions: list[Question],
    rejections: list[Rejection],
    root: Path,
    folder: Path,
    config: BuildConfig,
) -> DatasetDraft:
    """Splits, references, knowledge and questions for usable photographs, in files of the dataset in `folder`."""

    if not config.named_references:
        inspections = [dataclasses.replace(inspection, reference=None) for inspection in inspections]
    inspections, split_words, held_out = assign_splits_of_config(inspections, root, config)
    unplaced = [Rejection(i.image, SYNTHETIC_ELSEWHERE) for i in inspections if i.split is None]
    inspections = [inspection for inspection in inspections if inspection.split is not None]
    inspections, references, unusable = find_all_references(inspections, root, config)
    known = load_knowledge(config.knowledge) if config.knowledge else {}
    knowledge, unknown = describe_products(inspections, known)
    training_knowledge = less_held_out(knowledge, held_out) if config.split == "by_condition" else knowledge
    asked = queries(inspections)
    if not asked:
        raise EchoError(
            "the train split holds normal photographs only and there is no other split, so nothing can be asked; "
            "add photographs of defects"
        )
    left = {inspection.id for inspection in inspections}
    kept = [question for question in questions if question.inspection in left]
    lost = [Rejection(q.id, "its photograph cannot be used") for q in questions if q.inspection not in left]
    write_jsonl(folder / "inspections.jsonl", inspections)
    tested = less_synthetic(knowledge, inspections)
    written = progress(
        write_all_questions(asked, kept, tested, training_knowledge, root, config.seed), "asking", "questions"
    )
    return DatasetDraft(
        folder,
        inspections,
        write_records(folder / "references.jsonl", references, lambda reference: reference.method),
        write_records(folder / "questions.jsonl", written, lambda question: question.kind),
        knowledge,
        [*rejections, *unplaced, *unusable, *lost],
        split_words,
        held_out,
        unknown,
        knowledge_warnings(inspections, known),
        training_knowledge,
    )


def assign_splits_of_config(
    inspections: Sequence[Inspection], root: Path, config: BuildConfig
) -> tuple[list[Inspection], str, list[str]]:
    """The splits that the config asks for, the same for every name of the list or folder that names the dataset.

    Otherwise renaming parts.csv to parts_v2.csv would deal anew, and train on what was the test. By dataset the names
    are what is split by, so they count. Synthetic defects change no split: they have none where theirs is not train.
    """
    name = place_name(config.source, root, config.annotations) if config.split != "by_dataset" else None
    named = [dataclasses.replace(i, dataset="") if i.dataset == name else i for i in inspections]
    real = [inspection for inspection in named if inspection.synthetic is None]
    dealt, words, held_out = make_splits(real, config.split, config.seed, config.fractions, config.held_out)
    done = with_synthetic(named, dealt, held_out if config.split == "by_condition" else ())
    if config.folds is not None and config.fold is not None:
        done = leave_out(done, config.folds, config.fold, config.seed)
        words += f"; fold {config.fold} of {config.folds} (0 to {config.folds - 1}) of train is {LEFT_OUT}"
    return [dataclasses.replace(i, split=d.split) for i, d in zip(inspections, done, strict=True)], words, held_out


def remedy(inspections: Sequence[Inspection], config: BuildConfig, defects: bool) -> str:
    """What brings photographs of defects, or normal ones, into a train split that has none of them."""
    if not any((inspection.condition != GOOD) == defects for inspection in inspections):
        return "add photographs of defects" if defects else f"add normal photographs, with condition {GOOD!r}"
    if config.split == "given":
        return "set split to seeded"
    if config.split in HOLDS_OUT:
        return "hold out less, or set split to seeded"
    return "give train a larger share in fractions"


def find_all_references(
    inspections: list[Inspection], root: Path, config: BuildConfig
) -> tuple[list[Inspection], Iterator[Reference], list[Rejection]]:
    """The photographs that the descriptor could read, and the references of those that are asked about, in one order.

    Where a fold is left out, what is trained on shows nothing of it, not even as a reference that the source names;
    what is left out, and the other splits, have the references that they have without folds. What could not be used is
    rejected.
    """

    hidden = references_in_left_out_fold(inspections, root)
    dropped = [Rejection(image, REFERENCE_LEFT_OUT, "reference") for image in hidden.values()]
    asked = [dataclasses.replace(i, reference=None) if i.id in hidden else i for i in queries(inspections)]
    pool = reference_pool(inspections)
    if not pool and any(inspection.reference is None for inspection in asked):
        raise EchoError(
            "the train split holds no normal photograph, so there is nothing to compare with; "
            + remedy(inspections, config, defects=False)
        )
    searches = [(asked, pool)]
    if config.folds is not None:
        taught, others = ([i for i in asked if (i.split == "train") == side] for side in (True, False))
        searches = [(taught, [normal for normal in pool if normal.split != LEFT_OUT]), (others, pool)]
    found: list[Iterator[Reference]] = []
    unreadable: dict[str, Rejection] = {}
    for searching, normals in searches:
        references, rejected = find_references(
            searching, normals, root, config.descriptor, config.k, config.scope, config.seed, config.cache, config.index
        )
        found.append(references)
        unreadable |= {rejection.item: rejection for rejection in rejected}
    left = [inspection for inspection in inspections if inspection.image not in unreadable]
    each = zip(*(by_inspection(left, references) for references in found), strict=True)
    beside = (row for groups in each for group in groups for row in group)
    return left, beside, [*dropped, *unreadable.values()]
