"""From what a source yields to the records of a dataset: checked, split, with references, knowledge and questions."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from data_prep.raw import progress
from data_prep.settings import BuildConfig
from data_prep.sources import place_name
from echo_ft.dataset import Descriptions, less_held_out, less_synthetic, make_cases
from echo_ft.records import (
    GOOD,
    Case,
    EchoError,
    Entry,
    Inspection,
    Knowledge,
    Question,
    Reference,
    Rejection,
    read_jsonl,
    write_jsonl,
)
from echo_ft.splits import HOLDS_OUT, LEFT_OUT, REFERENCE, leave_out, make_splits, part, trainable, withheld

R = TypeVar("R", Reference, Question)

SYNTHETIC_ELSEWHERE = (
    "its defect is synthetic, and it is of a kind that is held out, or the photographs of its part are not all in the "
    "train split: validation and test ask about photographs alone"
)

REFERENCE_LEFT_OUT = "the named reference is of the fold that is left out, so no training row may show it"

CONTROL = '"method": "random"'
"""What marks half the lines of references.jsonl: those that no training row shows."""

TRAINING = ("train", "validation")
"""The splits that have rows for the roles."""


@dataclass(frozen=True)
class Written:
    """Records that are in a file: how many of each kind, and the ids of the inspections that have any."""

    kinds: Counter[str]
    inspections: set[str]


@dataclass(frozen=True)
class Material:
    """The records of a dataset. References and questions are in its folder already: of a million photographs there are
    too many to hold.
    """

    folder: Path
    inspections: list[Inspection]
    references: Written
    questions: Written
    knowledge: Descriptions
    rejections: list[Rejection]
    split_words: str
    held_out: list[str]
    unknown_products: list[str]
    knowledge_doubts: list[str]
    """Where the knowledge and the photographs do not fit together, a sentence each."""
    training_knowledge: Descriptions
    """The knowledge less the conditions that training must not see."""

    def asked(self, split: str) -> list[Inspection]:
        """The photographs of one split that have questions."""
        return [one for one in self.inspections if one.split == split and one.id in self.questions.inspections]

    def training_cases(self) -> Iterator[tuple[Inspection, Case]]:
        """The photographs of TRAINING with questions, each with its case as `echo_ft.dataset.cases` gives it."""
        shown = read_jsonl(self.folder / "references.jsonl", Reference, without=CONTROL)
        references = by_inspection(self.inspections, shown)
        questions = by_inspection(self.inspections, read_jsonl(self.folder / "questions.jsonl", Question))
        for inspection, beside, asked in zip(self.inspections, references, questions, strict=True):
            if inspection.split in TRAINING:
                for case in make_cases([inspection], beside, asked, self.training_knowledge):
                    yield inspection, case


def by_inspection(inspections: Iterable[Inspection], records: Iterable[R]) -> Iterator[list[R]]:
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


def write_records(path: Path, records: Iterable[R], kind: Callable[[R], str]) -> Written:
    """Write records of inspections as they are made."""
    written = Written(Counter(), set())

    def counted() -> Iterator[R]:
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
) -> Material:
    """Splits, references, knowledge and questions for usable photographs, in files of the dataset in `folder`."""
    from echo_ft.knowledge import load_knowledge

    if not config.named_references:
        inspections = [dataclasses.replace(inspection, reference=None) for inspection in inspections]
    inspections, split_words, held_out = divide(inspections, root, config)
    unplaced = [Rejection(i.image, SYNTHETIC_ELSEWHERE) for i in inspections if i.split is None]
    inspections = [inspection for inspection in inspections if inspection.split is not None]
    inspections, references, unusable = refer(inspections, root, config)
    known = load_knowledge(config.knowledge) if config.knowledge else {}
    knowledge, unknown = describe(inspections, known)
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
    written = ask(asked, kept, tested, training_knowledge, root, config.seed)
    return Material(
        folder,
        inspections,
        write_records(folder / "references.jsonl", references, lambda reference: reference.method),
        write_records(folder / "questions.jsonl", written, lambda question: question.kind),
        knowledge,
        [*rejections, *unplaced, *unusable, *lost],
        split_words,
        held_out,
        unknown,
        doubts(inspections, known),
        training_knowledge,
    )


def divide(
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


def with_synthetic(
    inspections: Sequence[Inspection], real: Sequence[Inspection], held_out: Collection[str]
) -> list[Inspection]:
    """The inspections in their order: the `real` ones as dealt, and the synthetic with the train split or with none.

    A synthetic defect is trained on where all photographs of its part are, unless its condition is held out.
    """
    dealt = iter(real)
    splits: dict[tuple[str, str, str], set[str | None]] = defaultdict(set)
    for inspection in real:
        splits[part(inspection)].add(inspection.split)
    away = {place: withheld(conditions, held_out) for place, conditions in conditions_of(inspections).items()}

    def trained(made: Inspection) -> bool:
        return splits[part(made)] == {"train"} and made.condition not in away[made.dataset, made.product]

    return [
        dataclasses.replace(i, split="train" if trained(i) else None) if i.synthetic else next(dealt)
        for i in inspections
    ]


def remedy(inspections: Sequence[Inspection], config: BuildConfig, defects: bool) -> str:
    """What brings photographs of defects, or normal ones, into a train split that has none of them."""
    if not any((inspection.condition != GOOD) == defects for inspection in inspections):
        return "add photographs of defects" if defects else f"add normal photographs, with condition {GOOD!r}"
    if config.split == "given":
        return "set split to seeded"
    if config.split in HOLDS_OUT:
        return "hold out less, or set split to seeded"
    return "give train a larger share in fractions"


def queries(inspections: Sequence[Inspection]) -> list[Inspection]:
    """The photographs that questions are asked about: all, but for `REFERENCE` and a train split of normals alone.

    Such a split (MVTec-AD's and MMAD's) cannot train the roles and serves as the pool of references.
    """
    unasked = {REFERENCE} if trainable(inspections) else {REFERENCE, "train"}
    return [inspection for inspection in inspections if inspection.split not in unasked]


def reference_pool(inspections: Sequence[Inspection]) -> list[Inspection]:
    """The normals from which references are taken: those of the train split, folds left out or not, and `REFERENCE`."""
    return [i for i in inspections if i.split in ("train", LEFT_OUT, REFERENCE) and i.condition == GOOD]


def refer(
    inspections: list[Inspection], root: Path, config: BuildConfig
) -> tuple[list[Inspection], Iterator[Reference], list[Rejection]]:
    """The photographs that the descriptor could read, and the references of those that are asked about, in one order.

    Where a fold is left out, what is trained on shows nothing of it, not even as a reference that the source names;
    what is left out, and the other splits, have the references that they have without folds. What could not be used is
    rejected.
    """
    from echo_ft.retrieval import find_references

    hidden = named_of_fold(inspections, root)
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


def named_of_fold(inspections: Sequence[Inspection], root: Path) -> dict[str, str]:
    """The references that the source names for photographs of the train split and that are `LEFT_OUT`, by inspection.

    It is the content of the files that counts.
    """
    from echo_ft.embedding import hash_files

    left = [inspection.image for inspection in inspections if inspection.split == LEFT_OUT]
    named = {i.id: i.reference for i in inspections if i.split == "train" and i.reference is not None}
    if not left or not named:
        return {}
    hashes, _ = hash_files([*{*left, *named.values()}], root)
    away = {hashes[image] for image in left if image in hashes}
    return {name: reference for name, reference in named.items() if hashes.get(reference) in away}


def conditions_of(inspections: Sequence[Inspection]) -> dict[tuple[str, str], list[str]]:
    """The conditions that each product's photographs show, by (dataset, product), in one order for all."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for inspection in inspections:
        found[inspection.dataset, inspection.product].add(inspection.condition)
    return {place: sorted(names, key=lambda name: (name != GOOD, name)) for place, names in sorted(found.items())}


def describe(inspections: Sequence[Inspection], known: Knowledge) -> tuple[Descriptions, list[str]]:
    """The knowledge entries of every product, and the products that nothing is known about.

    For those the names of the conditions stand in.
    """
    from echo_ft.knowledge import entries_for

    descriptions: Descriptions = {}
    unknown = []
    for (dataset, product), conditions in conditions_of(inspections).items():
        entries, found = entries_for(known, dataset, product, conditions)
        descriptions.setdefault(dataset, {})[product] = {entry.condition: entry.description for entry in entries}
        if not found:
            unknown.append(f"{dataset}/{product}")
    return descriptions, unknown


def doubts(inspections: Sequence[Inspection], known: Knowledge) -> list[str]:
    """Where names, the knowledge and the photographs do not fit together, a sentence each."""
    from echo_ft.knowledge import misspelt, products_of

    found: list[str] = []
    bare: list[str] = []
    unknown: dict[str, list[str]] = defaultdict(list)
    for (dataset, product), conditions in conditions_of(inspections).items():
        products = products_of(known, dataset)
        entries = products.get(product, {})
        if not entries:
            held = f"of {dataset} the file holds {some(products)}" if products else f"the file holds {some(known)}"
            unknown[f"; {held}" if known else ""].append(f"{dataset}/{product}")
            continue
        meant = misspelt(entries, conditions)
        found += [
            f"knowledge: condition {name!r} of {product} occurs in no photograph; did you mean {near!r}?"
            for name, near in meant.items()
        ]
        named = {*entries, *meant.values()}
        bare += [f"{dataset}/{product}/{condition}" for condition in conditions if condition not in named]
    if bare:
        found.append(f"no knowledge of conditions, so their names stand in: {some(bare)}")
    for held, places in unknown.items():
        found.append(f"no knowledge, so the names of the conditions stand in: {some(places)}{held}")
    return found + two_spellings(inspections)


def two_spellings(inspections: Sequence[Inspection]) -> list[str]:
    """Products, and conditions, of a dataset whose names differ in case and marks alone, a sentence for each name."""
    found: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for (dataset, product), conditions in conditions_of(inspections).items():
        for what, name in (("products", product), *(("conditions", condition) for condition in conditions)):
            found[dataset, what, " ".join(re.findall(r"[^\W_]+", name.casefold()))].add(name)
    return [
        f"{what} of {dataset} that differ in their spelling alone: {', '.join(sorted(names))}; "
        "if they are one, spell them alike"
        for (dataset, what, _), names in found.items()
        if len(names) > 1
    ]


def some(names: Collection[str], most: int = 3) -> str:
    """The first of the names, and how many more there are."""
    return ", ".join([*names][:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def ask(
    inspections: Sequence[Inspection],
    own: Sequence[Question],
    knowledge: Descriptions,
    training_knowledge: Descriptions,
    root: Path,
    seed: int,
) -> Iterator[Question]:
    """The source's own questions where it has them for a photograph, written ones otherwise.

    Those of the test split are written from `knowledge` and name all products, the others from `training_knowledge`
    and the products of their own splits.
    """
    from echo_ft.questions import write_questions

    given: dict[str, list[Question]] = defaultdict(list)
    for question in own:
        given[question.inspection].append(question)
    photographed = queries([inspection for inspection in inspections if inspection.synthetic is None])
    tested = conditions_of(photographed)  # a test asks the same with and without synthetic defects in the training
    conditions = conditions_of(inspections)
    products = sorted({inspection.product for inspection in photographed})
    trained = sorted({inspection.product for inspection in inspections if inspection.split != "test"})
    for inspection in progress(inspections, "asking", "photographs"):
        if inspection.id in given:
            yield from given[inspection.id]
            continue
        test = inspection.split == "test"
        known = knowledge if test else training_knowledge
        texts = known[inspection.dataset][inspection.product]
        shown = (tested if test else conditions)[inspection.dataset, inspection.product]
        shown = [name for name in shown if name in texts]
        entries = tuple(Entry(*item) for item in texts.items())
        yield from write_questions(inspection, entries, shown, products if test else trained, root, seed)
