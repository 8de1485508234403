"""Write questions that do not fit the image, and questions in the same form that fit.

An `Unanswerable` question names another product, or a defect that is not in the image. The correct option states this.
A model that always chooses this option would seem reliable, and training on these questions alone would teach it to.
The same image therefore also gets an `Answerable` question in the same form, in which that kind of option is wrong.
Both are scored separately from MMAD's question types. RobustMAD (arXiv 2607.16243) asks unanswerable questions without
such twins.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from echo_ft.data.questions import MAX_OPTIONS, defect_place, slug
from echo_ft.data.splits import MIXED_CONDITIONS, defects_of, readable_name
from echo_ft.images import masks
from echo_ft.records import ANSWERABLE, GOOD, LETTERS, UNANSWERABLE, Inspection, Question

PRODUCT_TEXT = "What is the condition of the {}?"
NO_PRODUCT = "The image shows no {}."
NO_DEFECT_STATED = "It has no defect."
DEFECT_STATED = "It has this defect: {}."
PLACE_TEXT = "There is a defect in the object: {}. Where is it?"
NO_SUCH_DEFECT = "The object has no such defect."


def write_unanswerable_questions(
    inspection: Inspection, conditions: Mapping[str, Sequence[str]], root: Path, share: float, seed: int
) -> list[Question]:
    """Return an unanswerable question about `inspection` and its answerable twin, or nothing.

    `share`, from 0 to 1, is the fraction of images that get these questions. `conditions` are those of each product in
    the inspection's dataset. The question names another product or an absent defect; if both are possible, the seed
    decides. A question about the location of an absent defect has no twin if the image has no marked defect. Raises
    EchoError if the mask cannot be used.
    """
    draw = random.Random(f"{seed}/{inspection.id}#{slug(UNANSWERABLE)}")
    if draw.random() >= share:
        return []
    products = [name for name in conditions if _other_product(name, inspection.product)]
    absent = [name for name in conditions.get(inspection.product, ()) if _is_absent(name, inspection.condition)]
    forms = [form for form, possible in (("product", products), ("defect", absent)) if possible]
    if not forms:
        return []
    if draw.choice(forms) == "product":
        other = draw.choice(sorted(products))
        return [
            _about_product(inspection, other, conditions[other], draw),
            _about_product(inspection, inspection.product, conditions.get(inspection.product, ()), draw),
        ]
    place = defect_place(inspection, root)
    found = [_about_place(inspection, draw.choice(sorted(absent)), None, list(masks.PLACES), draw)]
    if place is not None:
        right, free = place
        found.append(_about_place(inspection, inspection.condition, right, free, draw))
    return found


def _other_product(name: str, own: str) -> bool:
    """Return whether an image of the product `own` certainly does not show `name`: `pcb1` may look like `pcb2`."""
    first, second = (re.sub(r"[\W_\d]+$", "", product).casefold() for product in (name, own))
    return first != second


def _is_absent(condition: str, own: str) -> bool:
    """Return whether an image with the condition `own` certainly does not show the defects of `condition`."""
    named = condition != GOOD and condition not in MIXED_CONDITIONS
    return named and own not in MIXED_CONDITIONS and not defects_of(condition) & defects_of(own)


def _about_product(inspection: Inspection, product: str, conditions: Sequence[str], draw: random.Random) -> Question:
    """Ask for the condition of a product. The question fits the image if the inspection is of that product."""
    fits, own = product == inspection.product, inspection.condition
    refusal = NO_PRODUCT.format(readable_name(product))
    right = (NO_DEFECT_STATED if own == GOOD else DEFECT_STATED.format(readable_name(own))) if fits else refusal
    named = [name for name in conditions if name != GOOD and (not fits or _is_absent(name, own))]
    others = sorted({DEFECT_STATED.format(readable_name(name)) for name in named} - {right})
    always = [text for text in (NO_DEFECT_STATED, refusal) if text != right]
    wrong = [*always, *draw.sample(others, min(MAX_OPTIONS - 1 - len(always), len(others)))]
    return _question(inspection, fits, PRODUCT_TEXT.format(readable_name(product)), right, wrong, draw)


def _about_place(
    inspection: Inspection, condition: str, place: str | None, free: Sequence[str], draw: random.Random
) -> Question:
    """Ask where a defect is. `place`, never one of `free`, is its location, or None if the image does not show it."""
    wrong = draw.sample(sorted(free), min(MAX_OPTIONS - 1 - (place is not None), len(free)))
    wrong += [] if place is None else [NO_SUCH_DEFECT]
    text = PLACE_TEXT.format(readable_name(condition))
    return _question(inspection, place is not None, text, place or NO_SUCH_DEFECT, wrong, draw)


def _question(
    inspection: Inspection, fits: bool, text: str, right: str, wrong: Sequence[str], draw: random.Random
) -> Question:
    kind = ANSWERABLE if fits else UNANSWERABLE
    options = [right, *wrong]
    draw.shuffle(options)
    lettered = dict(zip(LETTERS, options, strict=False))
    answer = LETTERS[options.index(right)]
    return Question(f"{inspection.id}#{slug(kind)}", inspection.id, kind, text, lettered, answer)
