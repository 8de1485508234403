"""What each role should say about a case, from its truth: the rows that the four adapters are trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from echo_ft import geometry, roles
from echo_ft.images import image_size
from echo_ft.knowledge import brief, readable
from echo_ft.questions import TEXTS
from echo_ft.records import GOOD, Case, EchoError, Exchange, Question, Upstream

LOOK = (256, 256)
"""(width, height) at which query and reference are compared."""

FIT = 64
"""Cells a side over which candidates are compared: coarse, as two parts never lie exactly alike."""

CONCLUSIONS = {
    "Defect Classification": "the type of the defect is",
    "Defect Localization": "the place of the defect is",
    "Defect Description": "the appearance of the defect is",
    "Defect Analysis": "the effect of the defect is",
    "Object Classification": "the product is",
}
"""How the last sentence of a reasoning begins, by kind; it ends with the right option's own words."""


def training_exchanges(
    case: Case,
    role: str,
    root: Path,
    routing: str,
    upstream: Upstream | None = None,
    gold: Upstream | None = None,
) -> list[Exchange]:
    """The exchanges that `role` is trained on for a case: `roles.render`'s own, with completions from the truth.

    `upstream` is what the earlier roles said; by default the gold. `gold` is `gold_upstream(case, root)`, where the
    caller has it already: it reads the images, and is the same for all roles. A branch whose completion the truth does
    not give is left out, and an exchange without branches too. Raises EchoError for an unknown role or routing, and
    where the mask or an image cannot be read.
    """
    if routing not in roles.ROUTINGS:
        raise EchoError(f"routing cannot be {routing!r}; choose from {', '.join(roles.ROUTINGS)}")
    gold = gold or gold_upstream(case, root)
    completions = _completions(case, role, gold)
    exchanges = []
    for exchange in roles.render(role, case.id, case.seen, upstream or gold, roles.ROUTINGS[routing]):
        branches = tuple(
            dataclasses.replace(branch, completion=completions[branch.id])
            for branch in exchange.branches
            if completions.get(branch.id)
        )
        if branches:
            exchanges.append(dataclasses.replace(exchange, branches=branches))
    return exchanges


def gold_upstream(case: Case, root: Path) -> Upstream:
    """What the first three roles should say about a case; empty where its truth does not tell.

    The best reference is the candidate that differs least from the query outside the defect, in mean absolute grey;
    of equals, the first.
    """
    mask = _mask(case, root)
    query = _look(root / case.seen.query)
    references = [_look(root / reference.image) for reference in case.seen.references]
    best = _best(query, references, mask) if references else 0
    known = {entry.condition: entry.description for entry in case.seen.knowledge}
    condition = case.truth.condition
    observation = _observe(condition, mask, query.fine, references[best].fine if references else None)
    reasons = {question.id: _reason(case, question, observation) for question in case.seen.questions}
    return Upstream(
        best=best,
        normal=brief(known[GOOD]) if GOOD in known else "",
        guide=roles.guide_completion(condition, brief(known[condition])) if condition in known else "",
        reasons={identifier: reason for identifier, reason in reasons.items() if reason},
    )


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


class Look(NamedTuple):
    """An image in grey at the size LOOK, and the means of its FIT x FIT blocks."""

    fine: geometry.Grey
    coarse: geometry.Grey


def _look(path: Path) -> Look:
    return _load(path, path.stat().st_mtime_ns if path.is_file() else 0)


@lru_cache(maxsize=256)  # the four roles of a case look at the same images
def _load(path: Path, modified: int) -> Look:
    fine = geometry.load_grey(path, LOOK)
    return Look(fine, fine.reshape(FIT, LOOK[1] // FIT, FIT, LOOK[0] // FIT).mean(axis=(1, 3)))


def _mask(case: Case, root: Path) -> geometry.Mask | None:
    if case.truth.condition == GOOD:
        return None
    return geometry.load_mask(case.truth, root, image_size(root / case.seen.query))


def _best(query: Look, references: Sequence[Look], mask: geometry.Mask | None) -> int:
    small = None if mask is None else geometry.resize_mask(mask, (FIT, FIT))
    return int(np.argmin([geometry.misfit(query.coarse, reference.coarse, small) for reference in references]))


def _observe(condition: str, mask: geometry.Mask | None, query: geometry.Grey, reference: geometry.Grey | None) -> str:
    """What is to be seen: the mark that the mask shows, or that there is one, or that there is none."""
    if condition == GOOD:
        beside = "the part looks like the reference" if reference is not None else "the part is as a normal one"
        return f"Observe: no mark stands out. Compare: {beside}."
    beside = "the reference" if reference is not None else "a normal part"
    region = None if mask is None else geometry.measure(mask)
    if mask is None or region is None:
        return f"Observe: the part is not as it should be. Compare: {beside} does not look like this."
    tone = geometry.tone(geometry.contrast(query, geometry.resize_mask(mask, LOOK), reference))
    mark = f"a {tone} {region.size} {region.shape} mark"
    if region.shape == "scattered":
        mark = f"several {tone} {region.size} marks"
    return f"Observe: {mark} {geometry.at(region.place)}. Compare: {beside} looks different there."


def _reason(case: Case, question: Question, observation: str) -> str | None:
    right = _right(case, question)
    normal = case.truth.condition == GOOD
    if right is None or (normal and question.kind.startswith("Defect")):
        return None
    answer = right.strip().rstrip(".")
    if question.text == TEXTS["Anomaly Detection"]:
        if answer.casefold() != ("no" if normal else "yes"):
            return None  # answer and condition contradict each other
        found = "no, there is no defect" if normal else f"yes, there is a defect: {readable(case.truth.condition)}"
    else:
        found = f"{CONCLUSIONS.get(question.kind, 'the answer is')}: {answer}"
    return f"{observation} Conclude: {found}" + ("" if found.endswith(("!", "?")) else ".")
