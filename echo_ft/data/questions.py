"""Write multiple-choice questions about an image from its condition, mask and knowledge.

The question types and their wording come from MMAD. A type is left out if its correct answer is not known. As in MMAD,
questions about a defective part ask about the defect and questions about a normal part ask about the object.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from echo_ft.data.knowledge import appearance, effect, has_description
from echo_ft.data.splits import MIXED_CONDITIONS, defects_of, readable_name
from echo_ft.data.text import without_stop
from echo_ft.images import boxes, masks
from echo_ft.images.decode import size_and_orientation
from echo_ft.records import GOOD, GROUNDING, LETTERS, Entry, Inspection, Question

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
"""The text of each question type. All but the last use MMAD's most frequent wording."""

GROUNDING_TEXT = "Where are the defects in the object, if there are any?"

MAX_OPTIONS = 4
"""Largest number of options per question."""


def write_questions(
    inspection: Inspection,
    knowledge: tuple[Entry, ...],
    conditions: Sequence[str],
    products: Sequence[str],
    root: Path,
    seed: int,
) -> list[Question]:
    """Return the questions about `inspection` whose answer is known, in the order of MMAD's tables.

    `knowledge` holds the product's entries (`entries_for`), `conditions` the conditions in its images, and `products`
    those of the whole dataset. Wrong options are other conditions of the product, their descriptions, locations that
    the defect does not touch, and other products. A question has two to four distinct options. Their order depends only
    on `seed` and the question's id. Raises EchoError if the mask cannot be used.
    """
    choices: dict[str, tuple[str, list[str]]] = {}
    """Maps a question type to the correct option and the wrong options."""
    known = {entry.condition: entry.description for entry in knowledge if has_description(entry)}
    if inspection.condition == GOOD:
        choices["Anomaly Detection"] = "No.", ["Yes."]
        others = [readable_name(product) for product in products if product != inspection.product]
        choices["Object Classification"] = readable_name(inspection.product), others
        if GOOD in known:
            wrong = [appearance(text) for condition, text in known.items() if condition != GOOD]
            choices["Object Analysis"] = appearance(known[GOOD]), wrong
    else:
        choices["Anomaly Detection"] = "Yes.", ["No."]
        choices.update(_defect_choices(inspection, known, conditions, root))
    questions = (_make_question(inspection, kind, *choices[kind], seed) for kind in QUESTION_TEXTS if kind in choices)
    return [question for question in questions if question is not None]


def _defect_choices(
    inspection: Inspection, known: dict[str, str], conditions: Sequence[str], root: Path
) -> dict[str, tuple[str, list[str]]]:
    own = inspection.condition
    choices = {}
    named = {**dict.fromkeys(conditions), **known}
    # Another defect in the same image is not a wrong option. If the defects are not named, no option is certainly
    # wrong.
    others = [c for c in named if c != GOOD and own not in MIXED_CONDITIONS and not defects_of(c) <= defects_of(own)]
    choices["Defect Classification"] = readable_name(own), [readable_name(condition) for condition in others]
    place = defect_place(inspection, root)
    if place is not None:
        choices["Defect Localization"] = place
    if own in known:
        texts = [known[condition] for condition in others if condition in known]
        choices["Defect Description"] = appearance(known[own]), [appearance(text) for text in texts]
        consequence = effect(known[own])
        if consequence:
            choices["Defect Analysis"] = consequence, [found for text in texts if (found := effect(text))]
    return choices


def defect_place(inspection: Inspection, root: Path) -> tuple[str, list[str]] | None:
    """Return the location of the defect and the locations that contain none of it, or None if the defect is not marked.

    Raises EchoError if the mask cannot be used.
    """
    region = _region(inspection, root)
    if region is None:
        return None
    # A cell that contains part of the defect would be a partly correct option.
    free = [place for place in masks.PLACES if place not in region.cells]
    if region.place == masks.SPREAD:
        return region.place, free or [place for place in masks.PLACES if place != "center"]
    return region.place, [*free, masks.SPREAD]


def _region(inspection: Inspection, root: Path) -> masks.Region | None:
    if not masks.is_marked(inspection):
        return None
    mask = masks.load_mask(inspection, root, *size_and_orientation(root / inspection.image))
    return None if mask is None else masks.measure(mask)


def _make_question(inspection: Inspection, kind: str, right: str, wrong: Sequence[str], seed: int) -> Question | None:
    identifier = f"{inspection.id}#{slug(kind)}"
    draw = random.Random(f"{seed}/{identifier}")
    own = without_stop(right)
    distinct = {plain: text for text in wrong if (plain := without_stop(text)) != own}
    # Sort first, so that the order in which a source lists conditions does not matter.
    options = [right, *draw.sample(sorted(distinct.values()), min(MAX_OPTIONS - 1, len(distinct)))]
    if len(options) < 2:
        return None
    draw.shuffle(options)
    lettered = dict(zip(LETTERS, options, strict=False))
    answer = LETTERS[options.index(right)]
    return Question(identifier, inspection.id, kind, QUESTION_TEXTS[kind], lettered, answer)


def write_box_question(inspection: Inspection, root: Path) -> Question | None:
    """Return the question about the boxes of an image's defects, or None if a defect is not marked.

    The answer lists the boxes from `boxes.target_boxes` in thousandths, or is `none` for a normal part. Raises
    EchoError if the mask cannot be used.
    """
    found: tuple[boxes.Box, ...] = ()
    if inspection.condition != GOOD:
        size, orientation = size_and_orientation(root / inspection.image)
        found = tuple(
            boxes.to_thousandths(box, size) for box in boxes.target_boxes(inspection, root, size, orientation)
        )
        if not found:
            return None
    identifier = f"{inspection.id}#{slug(GROUNDING)}"
    return Question(identifier, inspection.id, GROUNDING, GROUNDING_TEXT, {}, boxes.format_boxes(found))


def open_questions(
    identifier: str, conditions: Sequence[str], grounding: bool = False, answer: str | None = None
) -> tuple[Question, ...]:
    """Return the questions about an image whose condition is not known. `answer` is None, or empty in a dataset.

    `conditions` are those of its product. The first question always asks whether there is a defect (A: yes, B: no). If
    the product has two to `MAX_OPTIONS` known defects, a second question asks which one it is. With `grounding`, the
    last question asks for the boxes of the defects.
    """
    kinds = {"Anomaly Detection": ["Yes.", "No."]}
    defects = [readable_name(condition) for condition in conditions if condition != GOOD]
    if 2 <= len(defects) <= MAX_OPTIONS:
        kinds["Defect Classification"] = defects
    if grounding:
        kinds[GROUNDING] = []
    texts = {**QUESTION_TEXTS, GROUNDING: GROUNDING_TEXT}
    return tuple(
        Question(f"{identifier}#{slug(kind)}", identifier, kind, texts[kind], lettered, answer)
        for kind, options in kinds.items()
        for lettered in [dict(zip(LETTERS, options, strict=False))]
    )


def slug(kind: str) -> str:
    """Return a question type as it appears in question ids, such as `defect-localization`."""
    return kind.lower().replace(" ", "-")
