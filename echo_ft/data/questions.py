"""Multiple-choice questions about a photograph, from its condition, mask and knowledge, in MMAD's kinds and words.

A kind whose right answer is not known for a photograph is left out. As in MMAD, a defective part is asked about its
defect, a normal one about the object.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from echo_ft.data.knowledge import appearance, described, effect
from echo_ft.data.splits import MIXED, conditions_of, kinds_of, queries, readable
from echo_ft.images import masks
from echo_ft.images.decode import image_size
from echo_ft.records import GOOD, LETTERS, Entry, Inspection, Knowledge, Question

DEFECT_PREAMBLE = "There is a defect in the object. "

QUESTION_TEXTS = {
    "Anomaly Detection": "Is there any defect in the object?",
    "Defect Classification": DEFECT_PREAMBLE + "What is the type of the defect?",
    "Defect Localization": DEFECT_PREAMBLE + "Where is the defect?",
    "Defect Description": DEFECT_PREAMBLE + "What is the appearance of the defect?",
    "Defect Analysis": DEFECT_PREAMBLE + "What is the effect of the defect?",
    "Object Classification": "What kind of product is in the image?",
    "Object Analysis": "Which description fits the object in the image?",
}
"""The question of each kind; all but the last are MMAD's most frequent wording."""

MAX_OPTIONS = 4
"""Options of a question, at most."""


def write_questions(
    inspection: Inspection,
    knowledge: tuple[Entry, ...],
    conditions: Sequence[str],
    products: Sequence[str],
    root: Path,
    seed: int,
) -> list[Question]:
    """The questions that can be asked honestly about `inspection`, with their answers, in the order of MMAD's tables.

    `knowledge` is the product's own (`entries_for`), `conditions` are those of its photographs, `products` those of
    the whole dataset. Wrong options are the product's other conditions, their descriptions, places without any of the
    defect, and the other products: from two to four options, no two alike, in an order that `seed` and the question's
    id alone decide. Raises EchoError where the mask cannot be used.
    """
    choices: dict[str, tuple[str, list[str]]] = {}
    """Kind to the right option and the wrong ones."""
    known = {entry.condition: entry.description for entry in knowledge if described(entry)}
    if inspection.condition == GOOD:
        choices["Anomaly Detection"] = "No.", ["Yes."]
        others = [readable(product) for product in products if product != inspection.product]
        choices["Object Classification"] = readable(inspection.product), others
        if GOOD in known:
            wrong = [appearance(text) for condition, text in known.items() if condition != GOOD]
            choices["Object Analysis"] = appearance(known[GOOD]), wrong
    else:
        choices["Anomaly Detection"] = "Yes.", ["No."]
        choices.update(_defect_choices(inspection, known, conditions, root))
    written = (_write(inspection, kind, *choices[kind], seed) for kind in QUESTION_TEXTS if kind in choices)
    return [question for question in written if question is not None]


def _defect_choices(
    inspection: Inspection, known: dict[str, str], conditions: Sequence[str], root: Path
) -> dict[str, tuple[str, list[str]]]:
    own = inspection.condition
    choices = {}
    named = {**dict.fromkeys(conditions), **known}
    # What a photograph of several defects shows too is no wrong option; where they are not named, none is one for sure.
    others = [c for c in named if c != GOOD and own not in MIXED and not kinds_of(c) <= kinds_of(own)]
    choices["Defect Classification"] = readable(own), [readable(condition) for condition in others]
    region = _region(inspection, root)
    if region is not None:
        # A cell that holds some of the defect would be half right.
        free = [place for place in masks.PLACES if place not in region.cells]
        if region.place == masks.SPREAD:
            free = free or [place for place in masks.PLACES if place != "center"]
        else:
            free.append(masks.SPREAD)
        choices["Defect Localization"] = region.place, free
    if own in known:
        texts = [known[condition] for condition in others if condition in known]
        choices["Defect Description"] = appearance(known[own]), [appearance(text) for text in texts]
        consequence = effect(known[own])
        if consequence:
            choices["Defect Analysis"] = consequence, [found for text in texts if (found := effect(text))]
    return choices


def _region(inspection: Inspection, root: Path) -> masks.Region | None:
    if not masks.is_marked(inspection):
        return None
    size = image_size(root / inspection.image)
    mask = masks.load_mask(inspection, root, size)
    return None if mask is None else masks.measure(mask)


def _write(inspection: Inspection, kind: str, right: str, wrong: Sequence[str], seed: int) -> Question | None:
    identifier = f"{inspection.id}#{slug(kind)}"
    draw = random.Random(f"{seed}/{identifier}")
    own = _plain(right)
    distinct = {plain: text for text in wrong if (plain := _plain(text)) != own}
    # Sorted first: the order in which a source lists conditions must not matter.
    options = [right, *draw.sample(sorted(distinct.values()), min(MAX_OPTIONS - 1, len(distinct)))]
    if len(options) < 2:
        return None
    draw.shuffle(options)
    lettered = dict(zip(LETTERS, options, strict=False))
    answer = LETTERS[options.index(right)]
    return Question(identifier, inspection.id, kind, QUESTION_TEXTS[kind], lettered, answer)


def slug(kind: str) -> str:
    """`Defect Localization` as it stands in a question's id: `defect-localization`."""
    return kind.lower().replace(" ", "-")


@lru_cache  # the options of a product are its own for every photograph
def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def write_all_questions(
    inspections: Sequence[Inspection],
    own: Sequence[Question],
    knowledge: Knowledge,
    training_knowledge: Knowledge,
    root: Path,
    seed: int,
) -> Iterator[Question]:
    """The source's own questions where it has them for a photograph, written ones otherwise.

    Those of the test split are written from `knowledge` and name all products, the others from `training_knowledge`
    and the products of their own splits.
    """
    given: dict[str, list[Question]] = defaultdict(list)
    for question in own:
        given[question.inspection].append(question)
    photographed = queries([inspection for inspection in inspections if inspection.synthetic is None])
    tested = conditions_of(photographed)  # a test asks the same with and without synthetic defects in the training
    conditions = conditions_of(inspections)
    products = sorted({inspection.product for inspection in photographed})
    trained = sorted({inspection.product for inspection in inspections if inspection.split != "test"})
    for inspection in inspections:
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
