"""Derive the completions of each role from the truth of a case, for the rows that the four adapters are trained on."""

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
from echo_ft.data.splits import readable_name
from echo_ft.data.text import SENTENCE_ENDS
from echo_ft.errors import EchoError
from echo_ft.experts import roles
from echo_ft.images import masks
from echo_ft.images.boxes import NO_BOXES
from echo_ft.images.decode import size_and_orientation
from echo_ft.records import GOOD, GROUNDING, Branch, Case, Exchange, Question, Upstream

COMPARED_SIZE = (256, 256)
"""(width, height) at which a query and its references are compared."""

CACHED_IMAGES = 256
"""Number of most recently used images that stay in memory at COMPARED_SIZE."""

COARSE_GRID = 64
"""Cells per side of the comparison grid for candidates. It is coarse because parts are never placed exactly alike."""

# Phrasings of about equal length. The id of the case or question selects one of them. Each contains the location, size,
# shape, tone, condition and option verbatim, so that metrics can parse them.

HINTS = ("look for this.", "check the part for this.", "this matters here.")
MARKS = ("a {tone} {size} {shape} mark", "a {size} {tone} {shape} mark")
SCATTERED_MARKS = ("several {tone} {size} marks", "several {size} {tone} marks")
OBSERVATIONS = ("{mark} {where}", "{where} {mark}")
COMPARISONS = (
    "{reference} looks different there",
    "{reference} does not show this",
    "there {reference} looks different",
)
UNMARKED_OBSERVATIONS = ("the part is not as it should be", "something on the part is not as it should be")
UNMARKED_COMPARISONS = ("{reference} does not look like this", "{reference} looks different")
NORMAL_OBSERVATIONS = ("no mark stands out", "nothing stands out", "there is no mark on the part")
NORMAL_COMPARISONS = ("the part looks like {reference}", "the part is as {reference} is")
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
"""Subject of the conclusion, by question type. The last sentence ends with the text of the correct option."""


def training_exchanges(
    case: Case,
    role: str,
    root: Path,
    routing: str,
    upstream: Upstream | None = None,
    gold: Upstream | None = None,
) -> list[Exchange]:
    """Return the exchanges that `role` is trained on for a case: the result of `roles.render`, with completions.

    `upstream` holds the outputs of the earlier roles, which are gold by default. Pass `gold`, the result of
    `gold_upstream(case, root, upstream)`, to share it between roles, because computing it reads the images. Branches
    without a known completion are left out, as are exchanges without branches. Raises EchoError for an unknown role or
    routing, or if the mask or an image cannot be read.
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
            context = exchange.images, exchange.context
            exchanges.append(Exchange(role, case.id, *context, branches, exchange.prompt_version))
    return exchanges


def gold_upstream(case: Case, root: Path, upstream: Upstream | None = None) -> Upstream:
    """Return the gold outputs of the first three roles for a case. Outputs without a known truth are empty.

    The best reference is the first candidate with the smallest mean absolute grey difference from the query outside the
    defect. The tone of a defect is relative to the reference shown with it: the one that `upstream` chose if given,
    otherwise the best one. The ids of the case and its questions select the phrasing.

    Raises EchoError if the mask or an image cannot be read.
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
    hint = "" if case.truth.condition == GOOD else _phrase_rng(case.id).choice(HINTS)
    return roles.guide_completion(case.truth.condition, hint, brief(description))


def _phrase_rng(identifier: str) -> random.Random:
    return random.Random(f"phrases/{identifier}")


def _completions(case: Case, role: str, gold: Upstream) -> dict[str, str]:
    if role == "reference_extractor":
        return {"best": roles.best_completion(gold.best), "normal": gold.normal}
    if role == "knowledge_guide":
        return {"guide": gold.guide}
    if role == "reasoning_expert":
        return dict(gold.reasons)
    return {
        question.id: case.truth.answers[question.id]
        for question in case.seen.questions
        if _right_answer(case, question)
    }


def _right_answer(case: Case, question: Question) -> str | None:
    """Return the text of the correct option or of the boxes.

    Returns None if the truth names none of the question's options, or if the boxes are unknown or contradict the
    condition.
    """
    answer = case.truth.answers.get(question.id, "")
    if question.kind != GROUNDING:
        return question.options.get(answer)
    agrees = (answer == NO_BOXES) == (case.truth.condition == GOOD)
    return answer if answer and agrees else None


class ComparedImage(NamedTuple):
    """A grey image (height, width) at COMPARED_SIZE, and its block means (COARSE_GRID, COARSE_GRID)."""

    fine: masks.Grey
    coarse: masks.Grey


def load_compared(root: Path, image: str) -> ComparedImage:
    """Load an image for comparison. Raises EchoError if it cannot be read."""
    path = os.path.join(root, image)  # this is faster than Path, and each row needs many images, most of them cached
    try:
        modified = os.stat(path).st_mtime_ns
    except OSError:
        modified = 0  # `load_compared` reports the reason
    return _load(path, modified)


@lru_cache(maxsize=CACHED_IMAGES)  # cases of a product share references, and the read-ahead threads fill this cache
def _load(path: str, modified: int) -> ComparedImage:
    fine = masks.load_grey(Path(path), COMPARED_SIZE)
    width, height = COMPARED_SIZE
    blocks = fine.reshape(COARSE_GRID, height // COARSE_GRID, COARSE_GRID, width // COARSE_GRID)
    return ComparedImage(fine, blocks.mean(axis=(1, 3)))


def defect_mask(case: Case, root: Path) -> masks.Mask | None:
    """Return the mask (height, width) of a case's defect, or None for a normal part or an unknown location.

    Raises EchoError if the mask cannot be read.
    """
    if case.truth.condition == GOOD:
        return None
    return masks.load_mask(case.truth, root, *size_and_orientation(root / case.seen.query))


def _best(query: ComparedImage, references: Sequence[ComparedImage], mask: masks.Mask | None) -> int:
    small = None if mask is None else masks.resize_mask(mask, (COARSE_GRID, COARSE_GRID))
    return int(np.argmin([masks.misfit(query.coarse, reference.coarse, small) for reference in references]))


def _mark(mask: masks.Mask | None, query: masks.Grey, reference: masks.Grey | None) -> tuple[masks.Region, str] | None:
    """Return the marked region and its tone relative to the reference, or None if nothing is marked."""
    region = None if mask is None else masks.measure(mask)
    if mask is None or region is None:
        return None
    return region, masks.tone(masks.contrast(query, masks.resize_mask(mask, COMPARED_SIZE), reference))


def _observe(case: Case, mark: tuple[masks.Region, str] | None, draw: random.Random) -> str:
    """Describe what is visible: a mark and its location, a defect at an unknown location, or no mark."""
    reference = "the reference" if case.seen.references else "a normal part"
    if case.truth.condition == GOOD:
        observation, comparison = draw.choice(NORMAL_OBSERVATIONS), draw.choice(NORMAL_COMPARISONS)
    elif mark is None:
        observation, comparison = draw.choice(UNMARKED_OBSERVATIONS), draw.choice(UNMARKED_COMPARISONS)
    else:
        region, tone = mark
        forms = SCATTERED_MARKS if region.shape == "scattered" else MARKS
        phrase = draw.choice(forms).format(tone=tone, size=region.size, shape=region.shape)
        observation = draw.choice(OBSERVATIONS).format(mark=phrase, where=masks.location_phrase(region.place))
        comparison = draw.choice(COMPARISONS)
    return f"Observe: {observation}. Compare: {comparison.format(reference=reference)}."


def _reason(case: Case, question: Question, mark: tuple[masks.Region, str] | None) -> str | None:
    right = _right_answer(case, question)
    normal = case.truth.condition == GOOD
    if right is None or (normal and question.kind.startswith("Defect") and question.kind != GROUNDING):
        return None
    answer = right.strip().rstrip(".")
    draw = _phrase_rng(question.id)
    if question.kind == GROUNDING or question.text == QUESTION_TEXTS["Anomaly Detection"]:
        if question.kind != GROUNDING and answer.casefold() != ("no" if normal else "yes"):
            return None  # the answer contradicts the condition
        # Reasoning about boxes concludes whether there is a defect, and names its location in words.
        conclusion = draw.choice(NO_DEFECT_CONCLUSIONS if normal else DEFECT_CONCLUSIONS).format(
            name=readable_name(case.truth.condition)
        )
    else:
        subject = SUBJECTS.get(question.kind, "the answer")
        conclusion = draw.choice(CONCLUSIONS).format(subject=subject, answer=answer)
    stop = "" if conclusion.endswith(tuple(SENTENCE_ENDS)) else "."
    return f"{_observe(case, mark, draw)} Conclude: {conclusion}{stop}"
