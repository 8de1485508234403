"""Turn a source's records into a dataset's records: splits, references, knowledge and questions."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from data_prep.collect import Readings, UsableImages
from data_prep.config import BuildConfig
from data_prep.sources import inferred_dataset_name
from data_prep.sources._rows import with_record_names
from echo_ft.data.dataset import make_cases, without_held_out, without_synthetic
from echo_ft.data.dataset_questions import write_dataset_questions
from echo_ft.data.knowledge import consequence_warnings, describe_products, knowledge_warnings, load_knowledge
from echo_ft.data.splits import (
    HELD_OUT_FIELDS,
    LEFT_OUT,
    REFERENCE_SPLIT,
    UNLABELLED_SPLIT,
    assign_synthetic,
    conditions_of,
    held_out_conditions,
    leave_out_fold,
    make_splits,
    part_key,
    queries,
    reference_pool,
)
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl, to_json, write_jsonl
from echo_ft.records import GOOD, UNLABELLED, Case, Inspection, Knowledge, Question, Reference, Rejection
from echo_ft.retrieval.references import find_references, references_in_left_out_fold
from echo_ft.terminal import progress

_R = TypeVar("_R", Reference, Question)

SYNTHETIC_ELSEWHERE = (
    "its defect is synthetic, and either its defect type is held out or the images of its part are not all in the "
    "train split; validation and test contain real images only"
)

REFERENCE_LEFT_OUT = "the named reference belongs to the left-out fold, so no training row may show it"

RANDOM_REFERENCE_MARK = to_json({"method": "random"}).strip("{}")
"""Text, as the encoder writes it, that identifies lines of references.jsonl that no training row shows.

Half of the lines are like this. JSON escapes quotation marks inside strings, so no other line contains this text. If
such a line were read anyway, it would only cost time, because `make_cases` selects references by method.
"""

TRAINING_SPLITS = ("train", "validation")
"""The splits that have training rows."""


@dataclass(frozen=True)
class WriteSummary:
    """A summary of the records, each belonging to an inspection, that were written to a file."""

    counts: Counter[str]
    """Number of records per question type or reference method."""
    inspections: set[str]
    """Ids of the inspections that have a record."""


@dataclass(frozen=True)
class DatasetDraft:
    """The records of a dataset before its rows are written.

    References and questions are already on disk, because those of a million images do not fit into memory.
    """

    folder: Path
    inspections: list[Inspection]
    references: WriteSummary
    questions: WriteSummary
    knowledge: Knowledge
    rejections: list[Rejection]
    split_summary: str
    held_out: list[str]
    unknown_products: list[str]
    """Products without knowledge, as `dataset/product`."""
    knowledge_warnings: list[str]
    """One sentence for each mismatch between the knowledge and the images."""
    training_knowledge: Knowledge
    """The knowledge without the conditions that training must not see."""
    merged_count: int
    """Number of images whose truth was combined from several places in the source."""
    unannotated: list[str]
    """Images that are `good` only because their annotation file has no mark and no label for them."""
    readings: Readings
    """How the usable images of the source are read, including any that the dataset leaves out."""

    def queries(self, split: str) -> list[Inspection]:
        """Return the inspections of one split that have questions."""
        return [one for one in self.inspections if one.split == split and one.id in self.questions.inspections]

    def training_cases(self) -> Iterator[tuple[Inspection, Case]]:
        """Yield each inspection of TRAINING_SPLITS with questions, and its case as `load_cases` would return it."""
        path = self.folder / "references.jsonl"
        references = group_by_inspection(self.inspections, read_jsonl(path, Reference, exclude=RANDOM_REFERENCE_MARK))
        questions = group_by_inspection(self.inspections, read_jsonl(self.folder / "questions.jsonl", Question))
        for inspection, own_references, own_questions in zip(self.inspections, references, questions, strict=True):
            if inspection.split in TRAINING_SPLITS:
                for case in make_cases([inspection], own_references, own_questions, self.training_knowledge):
                    yield inspection, case


def group_by_inspection(inspections: Iterable[Inspection], records: Iterable[_R]) -> Iterator[list[_R]]:
    """Yield the records of each inspection. Records must come in the order of the inspections.

    Raises ValueError at the end if they do not, or if a record belongs to no inspection.
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


def write_records(path: Path, records: Iterable[_R], category: Callable[[_R], str]) -> WriteSummary:
    """Write records while they are generated, and count them by `category`."""
    summary = WriteSummary(Counter(), set())

    def counted() -> Iterator[_R]:
        for record in records:
            summary.counts[category(record)] += 1
            summary.inspections.add(record.inspection)
            yield record

    write_jsonl(path, counted())
    return summary


def draft_dataset(usable: UsableImages, folder: Path, config: BuildConfig) -> DatasetDraft:
    """Assign splits and references, describe products and write questions. The records go into files in `folder`.

    Raises EchoError if a split, reference or knowledge option cannot be satisfied, or if there is nothing to ask.
    """
    inspections, root = usable.inspections, usable.root
    if not config.named_references:
        inspections = [dataclasses.replace(inspection, reference=None) for inspection in inspections]
    inspections, split_summary, held_out = assign_configured_splits(inspections, root, config, usable.source_conditions)
    unassigned = [Rejection(i.image, SYNTHETIC_ELSEWHERE) for i in inspections if i.split is None]
    inspections = [inspection for inspection in inspections if inspection.split is not None]
    inspections, references, unusable = find_all_references(inspections, root, config)
    shown = {inspection.condition for inspection in inspections}
    known = load_knowledge(config.knowledge) if config.knowledge else {}
    known = with_record_names(known, shown, tuple(config.good or ()))
    knowledge, unknown = describe_products(inspections, known)
    training_knowledge = without_held_out(knowledge, held_out) if config.split == "by_condition" else knowledge
    asked_about = queries(inspections)
    if not asked_about:
        raise EchoError(
            "the train split has only normal images and there is no other split, so there is nothing to ask; "
            "add images of defects"
        )
    remaining = {inspection.id for inspection in inspections}
    own_questions = [question for question in usable.questions if question.inspection in remaining]
    given = {question.inspection for question in own_questions}
    self_asked = [inspection for inspection in asked_about if inspection.id not in given]
    lost = [Rejection(q.id, "its image cannot be used") for q in usable.questions if q.inspection not in remaining]
    write_jsonl(folder / "inspections.jsonl", inspections)
    test_knowledge = without_synthetic(knowledge, inspections)
    written = progress(
        write_dataset_questions(
            asked_about,
            own_questions,
            test_knowledge,
            training_knowledge,
            root,
            config.seed,
            config.grounding,
            config.unanswerable,
        ),
        "writing questions",
        "questions",
    )
    return DatasetDraft(
        folder,
        inspections,
        write_records(folder / "references.jsonl", references, lambda reference: reference.method),
        write_records(folder / "questions.jsonl", written, lambda question: question.kind),
        knowledge,
        [*usable.rejections, *unassigned, *unusable, *lost],
        split_summary,
        held_out,
        unknown,
        knowledge_warnings(inspections, known) + consequence_warnings(self_asked, knowledge),
        training_knowledge,
        usable.merged_count,
        [image for image in usable.unannotated if image in remaining],
        usable.readings,
    )


def assign_configured_splits(
    inspections: Sequence[Inspection],
    root: Path,
    config: BuildConfig,
    source_conditions: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[Inspection], str, list[str]]:
    """Assign the splits that the config asks for. Return the inspections, a summary, and the held-out names.

    A dataset name that comes from the annotations file or the root folder has no influence. If it had, renaming
    parts.csv to parts_v2.csv would re-split the data and train on former test images. With by_dataset, these names
    define the split and therefore matter. Synthetic defects do not change any split. A synthetic image that training
    may not use gets no split. Unlabelled images form a separate split and do not change any other split. Neither do
    corrections (see `split_by_source`); `source_conditions` holds the conditions before them, keyed by id.
    """
    everything = inspections
    inspections = [one for one in everything if one.condition != UNLABELLED]
    name = None
    if config.split != "by_dataset":
        name = inferred_dataset_name(config.source, root, config.annotations)
    anonymous = [dataclasses.replace(i, dataset="") if i.dataset == name else i for i in inspections]
    real = [inspection for inspection in anonymous if inspection.synthetic is None]
    fixed = {i.id: i for i in real if (i.split, i.condition, config.split) == (REFERENCE_SPLIT, GOOD, "given")}
    free = [dataclasses.replace(i, split=_free_split(i)) for i in real if i.id not in fixed]
    found, summary, held_out = split_by_source(free, source_conditions, config)
    others = iter(found)
    assigned = [fixed.get(one.id) or next(others) for one in real]
    done = assign_synthetic(anonymous, assigned, held_out if config.split == "by_condition" else ())
    if config.folds is not None and config.fold is not None:
        done = leave_out_fold(as_stratified(done, source_conditions), config.folds, config.fold, config.seed)
        summary += f"; fold {config.fold} of {config.folds} (0 to {config.folds - 1}) of train is {LEFT_OUT}"
    splits = iter([one.split for one in done])
    where = [UNLABELLED_SPLIT if one.condition == UNLABELLED else next(splits) for one in everything]
    return [dataclasses.replace(i, split=s) for i, s in zip(everything, where, strict=True)], summary, held_out


def _free_split(inspection: Inspection) -> str | None:
    """Return a split that `make_splits` knows, where a source names the split of references."""
    if inspection.split != REFERENCE_SPLIT:
        return inspection.split
    return "train" if inspection.condition == GOOD else "test"


def split_by_source(
    real: Sequence[Inspection], source_conditions: Mapping[str, str], config: BuildConfig
) -> tuple[list[Inspection], str, list[str]]:
    """Return what `make_splits` returns, with the splits that the images had before corrections.

    Only two kinds of images move: those that the source leaves without a condition join the others, and a part that now
    shows a defect moves to the test split if the defect is held out, or if the part would only serve as a reference. If
    the conditions in the source allow no such split, no dataset has been built from them, so the corrected ones count.
    """
    how, seed, fractions = config.split, config.seed, config.fractions
    if not source_conditions:
        return make_splits(real, how, seed, fractions, config.held_out)
    labelled = [i for i in real if source_conditions.get(i.id) != UNLABELLED]
    stratified = as_stratified(labelled, source_conditions)
    try:
        kept, summary, held_out = make_splits(stratified, how, seed, fractions, config.held_out)
    except EchoError:
        kept = []
    if not kept:
        return make_splits(real, how, seed, fractions, config.held_out)
    where = {part_key(i): i.split for i in sorted(kept, key=lambda one: one.id)}
    splits = {i.id: i.split for i in kept}
    if len(labelled) < len(real):
        joined, _, _ = make_splits(as_stratified(real, source_conditions), how, seed, fractions, held_out)
        splits = {i.id: where.get(part_key(i), i.split) for i in joined} | splits
    away: set[tuple[str, str, str]] = set()
    if how == "by_condition":
        names = {product: held_out_conditions(found, held_out) for product, found in conditions_of(real).items()}
        away = {part_key(i) for i in real if i.condition in names[i.dataset, i.product]}
    away |= {part_key(i) for i in real if splits[i.id] == REFERENCE_SPLIT and i.condition != GOOD}
    done = [dataclasses.replace(i, split="test" if part_key(i) in away else splits[i.id]) for i in real]
    return done, summary, held_out


def as_stratified(inspections: Iterable[Inspection], source_conditions: Mapping[str, str]) -> list[Inspection]:
    """Return the inspections with the conditions that splits preserve: those of the source, or the first ones given."""
    before = {name: condition for name, condition in source_conditions.items() if condition != UNLABELLED}
    return [dataclasses.replace(i, condition=before[i.id]) if i.id in before else i for i in inspections]


def train_split_remedy(inspections: Sequence[Inspection], config: BuildConfig, defects: bool) -> str:
    """Say how to get images of defects, or normal images, into a train split that has none."""
    labelled = [inspection for inspection in inspections if inspection.condition != UNLABELLED]
    if not labelled:
        return f"the images have no condition; enter the name of each defect, or {GOOD!r}"
    if not any((inspection.condition != GOOD) == defects for inspection in labelled):
        return "add images of defects" if defects else f"add normal images, with condition {GOOD!r}"
    if config.split == "given":
        return "set split to seeded"
    if config.split in HELD_OUT_FIELDS:
        return "hold out less, or set split to seeded"
    return "give train a larger fraction in fractions"


def find_all_references(
    inspections: list[Inspection], root: Path, config: BuildConfig
) -> tuple[list[Inspection], Iterator[Reference], list[Rejection]]:
    """Return the readable inspections, the references of all queries in the queries' order, and rejections.

    If a fold is left out, training shows none of its images, not even as a reference that the source names. The
    left-out fold and the other splits keep the references that they would have without folds.

    Raises EchoError if the train split has no normal image and the source does not name all references.
    """
    hidden = references_in_left_out_fold(inspections, root)
    dropped = [Rejection(image, REFERENCE_LEFT_OUT, "reference") for image in hidden.values()]
    asked_about = [dataclasses.replace(i, reference=None) if i.id in hidden else i for i in queries(inspections)]
    pool = reference_pool(inspections)
    if not pool and any(inspection.reference is None for inspection in asked_about):
        raise EchoError(
            "the train split has no normal image, so there is nothing to compare with; "
            + train_split_remedy(inspections, config, defects=False)
        )
    searches = [(asked_about, pool)]
    if config.folds is not None:
        training, others = ([i for i in asked_about if (i.split == "train") == train] for train in (True, False))
        searches = [(training, [normal for normal in pool if normal.split != LEFT_OUT]), (others, pool)]
    found: list[Iterator[Reference]] = []
    unreadable: dict[str, Rejection] = {}
    for search_queries, normals in searches:
        references, rejected = find_references(
            search_queries,
            normals,
            root,
            config.descriptor,
            config.k,
            config.scope,
            config.seed,
            config.cache,
            config.index,
        )
        found.append(references)
        unreadable |= {rejection.item: rejection for rejection in rejected}
    readable = [inspection for inspection in inspections if inspection.image not in unreadable]
    grouped = zip(*(group_by_inspection(readable, references) for references in found), strict=True)
    in_order = (reference for groups in grouped for group in groups for reference in group)
    return readable, in_order, [*dropped, *unreadable.values()]
