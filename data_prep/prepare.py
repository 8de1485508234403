"""From what a source yields to the records of a dataset: checked, split, with references, knowledge and questions."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from data_prep.images import boxes_fault, image_fault, mask_fault
from data_prep.settings import BuildConfig
from data_prep.sources import Item, Place, place_name
from echo_ft.dataset import Descriptions, make_cases
from echo_ft.records import GOOD, Case, EchoError, Entry, Inspection, Knowledge, Question, Reference, Rejection
from echo_ft.splits import HOLDS_OUT, REFERENCE, make_splits, trainable, withheld

T = TypeVar("T")

MAX_REPEATS = 4
"""How often balancing repeats a case at most: beyond that a model learns the photograph, not the defect."""


@dataclass(frozen=True)
class Material:
    """The records of a dataset, before they are written."""

    inspections: list[Inspection]
    references: list[Reference]
    questions: list[Question]
    knowledge: Descriptions
    rejections: list[Rejection]
    split_words: str
    held_out: list[str]
    unknown_products: list[str]
    knowledge_doubts: list[str]
    """Where the knowledge and the photographs do not fit together, a sentence each."""
    training_knowledge: Descriptions
    """The knowledge less the conditions that training must not see."""

    def cases(self, split: str) -> list[Case]:
        """The cases of one split, as `echo_ft.dataset.cases` gives them but for what training must not see."""
        inspections = [inspection for inspection in self.inspections if inspection.split == split]
        knowledge = self.knowledge if split == "test" else self.training_knowledge
        return make_cases(inspections, self.references, self.questions, knowledge)


def progress(items: Iterable[T], words: str, unit: str) -> Iterable[T]:
    """The items, with progress on stderr: live on a terminal, now and then in a log."""
    live = sys.stderr.isatty()
    return tqdm(items, desc=words, unit=f" {unit}", mininterval=0.1 if live else 10, leave=live)


def collect(items: Iterable[Item], root: Path) -> tuple[list[Inspection], list[Question], list[Rejection]]:
    """What a source yields, without the photographs that cannot be used; those and their reasons apart.

    A mask that contradicts its photograph rejects the photograph too, unless the source has questions of its own for
    it: a benchmark's questions stand without a mask.
    """
    read = list(items)
    questions = [item for item in read if isinstance(item, Question)]
    rejections = [item for item in read if isinstance(item, Rejection)]
    asked = {question.inspection for question in questions}
    places = {item.inspection: f" ({item.place})" for item in read if isinstance(item, Place)}
    fault_of = cache(image_fault)
    inspections: dict[str, Inspection] = {}
    for item in progress([i for i in read if isinstance(i, Inspection)], "checking", "photographs"):
        inspection = item
        fault = fault_of(root / inspection.image) or boxes_fault(inspection, root)
        if inspection.id in inspections:
            fault = "the source lists it twice"
        place = places.get(inspection.id, "")
        if fault:
            rejections.append(Rejection(inspection.image, fault + place))
            continue
        mask = mask_fault(inspection, root)
        if mask:
            stands = mask.photograph_stands or inspection.id in asked
            words = "; the photograph is used without it" if stands else ""
            rejections.append(Rejection(inspection.image, mask.reason + words + place, "mask" if stands else None))
            if not stands:
                continue
            boxes = () if inspection.polygons else inspection.boxes  # boxes beside polygons are half of what is marked
            inspection = dataclasses.replace(inspection, mask=None, masks=(), polygons=(), boxes=boxes)
        fault = fault_of(root / inspection.reference) if inspection.reference else None
        if fault:
            reason = f"{fault}; {inspection.image} gets a retrieved reference instead{place}"
            rejections.append(Rejection(str(inspection.reference), reason, "reference"))
            inspection = dataclasses.replace(inspection, reference=None)
        inspections[inspection.id] = inspection
    kept = []
    for question in questions:
        if question.inspection in inspections:
            kept.append(question)
        else:
            rejections.append(Rejection(question.id, "its photograph cannot be used"))
    return list(inspections.values()), kept, rejections


def prepare(
    inspections: list[Inspection],
    questions: list[Question],
    rejections: list[Rejection],
    root: Path,
    config: BuildConfig,
) -> Material:
    """Splits, references, knowledge and questions for usable photographs."""
    from echo_ft.knowledge import load_knowledge

    if not config.named_references:
        inspections = [dataclasses.replace(inspection, reference=None) for inspection in inspections]
    inspections, split_words, held_out = divide(inspections, root, config)
    inspections, references, unreadable = refer(inspections, root, config)
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
    return Material(
        inspections,
        references,
        ask(asked, kept, knowledge, training_knowledge, root, config.seed),
        knowledge,
        [*rejections, *unreadable, *lost],
        split_words,
        held_out,
        unknown,
        doubts(inspections, known),
        training_knowledge,
    )


def divide(
    inspections: Sequence[Inspection], root: Path, config: BuildConfig
) -> tuple[list[Inspection], str, list[str]]:
    """`make_splits` as the config has it, the same for every name of the list or folder that names the dataset.

    Otherwise renaming parts.csv to parts_v2.csv would deal anew, and train on what was the test. By dataset the names
    are what is split by, so they count.
    """
    name = place_name(config.source, root, config.annotations) if config.split != "by_dataset" else None
    named = [dataclasses.replace(i, dataset="") if i.dataset == name else i for i in inspections]
    done, words, held_out = make_splits(named, config.split, config.seed, config.fractions, config.held_out)
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


def queries(inspections: Sequence[Inspection]) -> list[Inspection]:
    """The photographs that questions are asked about: all, but for `REFERENCE` and a train split of normals alone.

    Such a split (MVTec-AD's and MMAD's) cannot train the roles and serves as the pool of references.
    """
    unasked = {REFERENCE} if trainable(inspections) else {REFERENCE, "train"}
    return [inspection for inspection in inspections if inspection.split not in unasked]


def reference_pool(inspections: Sequence[Inspection]) -> list[Inspection]:
    """The normals from which references are taken: those of the train split, and `REFERENCE`."""
    return [i for i in inspections if i.split in ("train", REFERENCE) and i.condition == GOOD]


def refer(
    inspections: list[Inspection], root: Path, config: BuildConfig
) -> tuple[list[Inspection], list[Reference], list[Rejection]]:
    """The photographs that the descriptor could read, and the references of those that are asked about."""
    from echo_ft.retrieval import find_references

    asked, pool = queries(inspections), reference_pool(inspections)
    if not pool and any(inspection.reference is None for inspection in asked):
        raise EchoError(
            "the train split holds no normal photograph, so there is nothing to compare with; "
            + remedy(inspections, config, defects=False)
        )
    references, unreadable = find_references(
        asked, pool, root, config.descriptor, config.k, config.scope, config.seed, config.cache
    )
    broken = {rejection.item for rejection in unreadable}
    return [inspection for inspection in inspections if inspection.image not in broken], references, unreadable


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
    """Where the knowledge and the photographs do not fit together, a sentence each."""
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
    return found


def some(names: Collection[str], most: int = 3) -> str:
    """The first of the names, and how many more there are."""
    return ", ".join([*names][:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def less_held_out(knowledge: Descriptions, held_out: Sequence[str]) -> Descriptions:
    """The knowledge without the entries of conditions that are held out.

    In training they would be options and entries that are never right, and the tuned model would avoid them in a test.
    """
    left: Descriptions = {}
    for dataset, products in knowledge.items():
        for product, entries in products.items():
            away = withheld(entries, held_out)
            seen = {condition: text for condition, text in entries.items() if condition not in away}
            left.setdefault(dataset, {})[product] = seen
    return left


def ask(
    inspections: Sequence[Inspection],
    own: Sequence[Question],
    knowledge: Descriptions,
    training_knowledge: Descriptions,
    root: Path,
    seed: int,
) -> list[Question]:
    """The source's own questions where it has them for a photograph, written ones otherwise.

    Those of the test split are written from `knowledge` and name all products, the others from `training_knowledge`
    and the products of their own splits.
    """
    from echo_ft.questions import write_questions

    given: dict[str, list[Question]] = defaultdict(list)
    for question in own:
        given[question.inspection].append(question)
    conditions = conditions_of(inspections)
    products = sorted({inspection.product for inspection in inspections})
    trained = sorted({inspection.product for inspection in inspections if inspection.split != "test"})
    questions: list[Question] = []
    for inspection in progress(inspections, "asking", "photographs"):
        if inspection.id in given:
            questions += given[inspection.id]
            continue
        test = inspection.split == "test"
        known = knowledge if test else training_knowledge
        texts = known[inspection.dataset][inspection.product]
        shown = [name for name in conditions[inspection.dataset, inspection.product] if name in texts]
        entries = tuple(Entry(*item) for item in texts.items())
        questions += write_questions(inspection, entries, shown, products if test else trained, root, seed)
    return questions


def balanced(cases: Sequence[Case], seed: int) -> list[Case]:
    """As many normal as defective cases in each product, in a seeded random order in which none follows itself.

    The rarer side is repeated (no photograph is left out), up to `MAX_REPEATS` times; beyond that the other side is
    sampled down. Per product, as a product with more defects than others would itself become the answer. A product
    that lacks one side stays as it is.
    """
    rng = random.Random(f"{seed}/balance")
    sides: dict[tuple[str, str], tuple[list[Case], list[Case]]] = defaultdict(lambda: ([], []))
    for case in cases:
        sides[case.dataset, case.product][case.truth.condition == GOOD].append(case)
    chosen: list[Case] = []
    for defective, normal in sides.values():
        few, many = sorted((defective, normal), key=len)
        if not few:
            chosen += many
            continue
        size = min(len(many), len(few) * MAX_REPEATS)
        whole, rest = divmod(size, len(few))
        chosen += few * whole + rng.sample(few, rest) + rng.sample(many, size)
    rng.shuffle(chosen)
    return _apart(chosen, rng)


def _apart(cases: Sequence[Case], rng: random.Random) -> list[Case]:
    """The cases in their order, but those that follow themselves, which go where they do not.

    Training reads neighbouring rows of one case as one. There is always such a place: a repeated case has at least as
    many different ones of the other side, each there once, as it has repeats.
    """
    order: list[Case] = []
    again: list[Case] = []
    for case in cases:
        (again if order and order[-1].id == case.id else order).append(case)
    for case in again:
        free = [i for i in range(len(order) + 1) if all(near.id != case.id for near in order[max(0, i - 1) : i + 1])]
        order.insert(rng.choice(free), case)
    return order
