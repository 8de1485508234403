"""What each role should say about a case, from its truth: the rows that the four adapters are trained on."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from echo_ft.data.knowledge import brief
from echo_ft.data.questions import QUESTION_TEXTS
from echo_ft.data.splits import readable
from echo_ft.errors import EchoError
from echo_ft.experts import roles
from echo_ft.images import masks
from echo_ft.images.decode import image_size
from echo_ft.records import GOOD, Branch, Case, Exchange, Question, Upstream

COMPARED_SIZE = (256, 256)
"""(width, height) at which query and reference are compared."""

AT_HAND = 256
"""Images that are kept as they are compared, those used last."""

FIT = 64
"""Cells a side over which candidates are compared: coarse, as two parts never lie exactly alike."""

# Ways to say the same, about equally long; the id of the case, or of the question, picks one. In each of them place,
# size, shape, tone, condition and option stand in their own words, so that they can be read back.

HINTS = ("look for this.", "check the part for this.", "this matters here.")
MARKS = ("a {tone} {size} {shape} mark", "a {size} {tone} {shape} mark")
SCATTERED = ("several {tone} {size} marks", "several {size} {tone} marks")
OBSERVATIONS = ("{mark} {where}", "{where} {mark}")
COMPARISONS = ("{beside} looks different there", "{beside} does not show this", "there {beside} looks different")
UNMARKED = ("the part is not as it should be", "something on the part is not as it should be")
UNMARKED_COMPARISONS = ("{beside} does not look like this", "{beside} looks different")
HARMLESS = ("no mark stands out", "nothing stands out", "there is no mark on the part")
HARMLESS_COMPARISONS = ("the part looks like {beside}", "the part is as {beside} is")
DEFECT_CONCLUSIONS = ("yes, there is a defect: {name}", "yes, the part has a defect: {name}")
NO_DEFECT_CONCLUSIONS = ("no, there is no defect", "no, the part has no defect")
CONCLUSIONS = ("{subject} is: {answer}", "so {subject} is: {answer}")

SUBJECTS = {
    "Defect Classification": "the type of the defect",
    "Defect Localization": "the place of the defect",
    "Defect Description": "the appearance of the defect",
    "Defect Analysis": "the effect of the defect",
    "Object Classification": "the product",
}
"""What a reasoning concludes about, by kind; its last sentence ends with the right option's own words."""


def training_exchanges(
    case: Case,
    role: str,
    root: Path,
    routing: str,
    upstream: Upstream | None = None,
    gold: Upstream | None = None,
) -> list[Exchange]:
    """The exchanges that `role` is trained on for a case: `roles.render`'s own, with completions from the truth.

    `upstream` is what the earlier roles said; by default the gold. `gold` is `gold_upstream(case, root, upstream)`,
    where the caller has it already: it reads the images, and is the same for all roles. A branch whose completion the
    truth does not give is left out, and an exchange without branches too. Raises EchoError for an unknown role or
    routing, and where the mask or an image cannot be read.
    """
    if routing not in roles.ROUTINGS:
        raise EchoError(f"routing cannot be {routing!r}; choose from {', '.join(roles.ROUTINGS)}")
    gold = gold or gold_upstream(case, root, upstream)
    completions = _completions(case, role, gold)
    exchanges = []
    for exchange in roles.render(role, case.id, case.seen, upstream or gold, roles.ROUTINGS[routing]):
        branches = tuple(
            Branch(branch.id, branch.prompt, completions[branch.id])
            for branch in exchange.branches
            if completions.get(branch.id)
        )
        if branches:
            shown = exchange.images, exchange.context
            exchanges.append(Exchange(role, case.id, *shown, branches, exchange.prompt_version))
    return exchanges


def gold_upstream(case: Case, root: Path, upstream: Upstream | None = None) -> Upstream:
    """What the first three roles should say about a case; empty where its truth does not tell.

    The best reference is the candidate that differs least from the query outside the defect, in mean absolute grey;
    of equals, the first. A defect's tone is told beside the reference that is shown with it: the one that the earlier
    roles chose, where they said `upstream`, and the best by default. Which of several ways to say it is taken, the ids
    of the case and its questions decide.
    """
    mask = defect_mask(case, root)
    query = load_compared(root, case.seen.query)
    references = [load_compared(root, reference.image) for reference in case.seen.references]
    best = _best(query, references, mask) if references else 0
    known = {entry.condition: entry.description for entry in case.seen.knowledge}
    condition = case.truth.condition
    shown = upstream.best if upstream else best
    mark = _mark(mask, query.fine, references[shown].fine if references else None)
    reasons = {question.id: _reason(case, question, mark) for question in case.seen.questions}
    return Upstream(
        best=best,
        normal=brief(known[GOOD]) if GOOD in known else "",
        guide=_guide(case, known[condition]) if condition in known else "",
        reasons={identifier: reason for identifier, reason in reasons.items() if reason},
    )


def _guide(case: Case, description: str) -> str:
    hint = "" if case.truth.condition == GOOD else _draw(case.id).choice(HINTS)
    return roles.guide_completion(case.truth.condition, hint, brief(description))


def _draw(identifier: str) -> random.Random:
    return random.Random(f"phrases/{identifier}")


def _completions(case: Case, role: str, gold: Upstream) -> dict[str, str]:
    if role == "reference_extractor":
        return {"best": roles.best_completion(gold.best), "normal": gold.normal}
    if role == "knowledge_guide":
        return {"guide": gold.guide}
    if role == "reasoning_expert":
        return dict(gold.reasons)
    return {question.id: case.truth.answers[question.id] for question in case.seen.questions if _right(case, question)}


def _right(case: Case, question: Question) -> str | None:
    """The text of the right option, or None where the truth names none of the question's options."""
    return question.options.get(case.truth.answers.get(question.id, ""))


class ComparedImage(NamedTuple):
    """An image in grey at the size LOOK, and the means of its FIT x FIT blocks."""

    fine: masks.Grey
    coarse: masks.Grey


def load_compared(root: Path, image: str) -> ComparedImage:
    """The image as references are compared to it. Raises EchoError where it cannot be read."""
    path = os.path.join(root, image)  # text: a row looks at many images, nearly all of them at hand
    try:
        modified = os.stat(path).st_mtime_ns
    except OSError:
        modified = 0  # reading it says why
    return _load(path, modified)


@lru_cache(maxsize=AT_HAND)  # cases of a product share references, and what reads ahead leaves its images here
def _load(path: str, modified: int) -> ComparedImage:
    fine = masks.load_grey(Path(path), COMPARED_SIZE)
    return ComparedImage(
        fine, fine.reshape(FIT, COMPARED_SIZE[1] // FIT, FIT, COMPARED_SIZE[0] // FIT).mean(axis=(1, 3))
    )


def defect_mask(case: Case, root: Path) -> masks.Mask | None:
    """The mask (height, width) of a case's defect; None for a normal part and where nothing says where it is.

    Raises EchoError where the mask cannot be read.
    """
    if case.truth.condition == GOOD:
        return None
    return masks.load_mask(case.truth, root, image_size(root / case.seen.query))


def _best(query: ComparedImage, references: Sequence[ComparedImage], mask: masks.Mask | None) -> int:
    small = None if mask is None else masks.resize_mask(mask, (FIT, FIT))
    return int(np.argmin([masks.misfit(query.coarse, reference.coarse, small) for reference in references]))


def _mark(mask: masks.Mask | None, query: masks.Grey, reference: masks.Grey | None) -> tuple[masks.Region, str] | None:
    """What the mask marks and its tone beside the reference; None where it marks nothing."""
    region = None if mask is None else masks.measure(mask)
    if mask is None or region is None:
        return None
    return region, masks.tone(masks.contrast(query, masks.resize_mask(mask, COMPARED_SIZE), reference))


def _observe(case: Case, mark: tuple[masks.Region, str] | None, draw: random.Random) -> str:
    """What is to be seen: the mark and where it is, or that there is one somewhere, or that there is none."""
    beside = "the reference" if case.seen.references else "a normal part"
    if case.truth.condition == GOOD:
        observation, comparison = draw.choice(HARMLESS), draw.choice(HARMLESS_COMPARISONS)
    elif mark is None:
        observation, comparison = draw.choice(UNMARKED), draw.choice(UNMARKED_COMPARISONS)
    else:
        region, tone = mark
        forms = SCATTERED if region.shape == "scattered" else MARKS
        words = draw.choice(forms).format(tone=tone, size=region.size, shape=region.shape)
        observation = draw.choice(OBSERVATIONS).format(mark=words, where=masks.at(region.place))
        comparison = draw.choice(COMPARISONS)
    return f"Observe: {observation}. Compare: {comparison.format(beside=beside)}."


def _reason(case: Case, question: Question, mark: tuple[masks.Region, str] | None) -> str | None:
    right = _right(case, question)
    normal = case.truth.condition == GOOD
    if right is None or (normal and question.kind.startswith("Defect")):
        return None
    answer = right.strip().rstrip(".")
    draw = _draw(question.id)
    if question.text == QUESTION_TEXTS["Anomaly Detection"]:
        if answer.casefold() != ("no" if normal else "yes"):
            return None  # answer and condition contradict each other
        found = draw.choice(NO_DEFECT_CONCLUSIONS if normal else DEFECT_CONCLUSIONS).format(
            name=readable(case.truth.condition)
        )
    else:
        subject = SUBJECTS.get(question.kind, "the answer")
        found = draw.choice(CONCLUSIONS).format(subject=subject, answer=answer)
    stop = "" if found.endswith(("!", "?")) else "."
    return f"{_observe(case, mark, draw)} Conclude: {found}{stop}"
