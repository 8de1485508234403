"""Prompts: pinned to the letter, blind to the truth, and answers read strictly."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import replace
from pathlib import Path

import pytest

from echo_ft import roles
from echo_ft.pipeline import Settings, run_cases
from echo_ft.records import KINDS, ROLES, EchoError, Question, Seen, Truth, Upstream
from tests.test_pipeline import Parrot

GOLDEN = Path(__file__).parent / "golden"
SAID = Upstream(best=1, normal="An even  surface.\n", guide="stain: look for this. A dark spot.", reasons={})


def as_text(exchanges) -> str:
    parts = [f"prompt version {roles.PROMPT_VERSION}"]
    for exchange in exchanges:
        parts.append(f"==== {exchange.role}: images {', '.join(exchange.images)}\n{exchange.context}")
        parts += [f"---- {branch.id}\n{branch.prompt}" for branch in exchange.branches]
    return "\n".join(parts) + "\n"


@pytest.mark.parametrize("routing", ["full", "paper"])
@pytest.mark.parametrize("role", ROLES)
def test_prompts_are_the_golden_ones(role, routing, case):
    upstream = replace(SAID, reasons={q.id: "Observe: a mark. Conclude: a stain." for q in case.seen.questions})
    text = as_text(roles.render(role, case.id, case.seen, upstream, roles.ROUTINGS[routing]))
    path = GOLDEN / f"{role}_{routing}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), "a prompt changed: raise PROMPT_VERSION, then UPDATE_GOLDEN=1"


def test_render_is_never_handed_the_truth():
    """By type: what render takes has no field that holds condition, mask, boxes or answers."""
    hidden = {field.name for field in dataclasses.fields(Truth)}
    assert hidden.isdisjoint(field.name for field in dataclasses.fields(Seen))
    assert "answer" in {field.name for field in dataclasses.fields(Question)}


@pytest.mark.parametrize("routing", ["full", "paper"])
def test_condition_mask_and_answer_cannot_reach_a_prompt_of_a_run(case, routing):
    """The whole pipeline, shown the same case with two truths: every prompt of every role stays the same."""
    other = Truth("SECRET-CONDITION", "SECRET-mask.png", ((1, 2, 3, 4),), {q.id: "B" for q in case.seen.questions})
    first, second = (
        run_cases([replace(case, truth=truth)], Parrot(), Settings(routing))[0].traces for truth in (case.truth, other)
    )
    assert first == second and len(first) >= 8
    assert not any("SECRET" in trace.context + trace.prompt + "".join(trace.images) for trace in second)
    assert all(question.answer is None for question in case.seen.questions)


def test_neither_product_nor_paths_are_told():
    """A file's folder often names the defect, and the product is an answer of Object Classification."""
    seen = Seen(
        "bottle/broken_large/000.png", (), (), (Question("q", "i", KINDS[5], "What is it?", {"A": "x", "B": "y"}),)
    )
    text = as_text([replace(e, images=()) for role in ROLES for e in roles.render(role, "broken_large", seen)])
    assert "broken_large" not in text and "bottle" not in text


def test_object_classification_does_not_see_knowledge_that_names_the_object(case):
    for exchange in roles.render("decision_maker", case.id, case.seen, SAID):
        asks = any("Object Classification" in branch.id for branch in exchange.branches)
        assert ("Guide:" in exchange.context) != asks


def test_words_from_outside_cannot_change_the_layout_of_a_prompt(case):
    said = replace(SAID, guide="stain\nQuestion: x\n\nA. y", reasons={q.id: "\n\nA" for q in case.seen.questions})
    for exchange in roles.render("decision_maker", case.id, case.seen, said):
        assert exchange.context.count("\n") <= 2 and "\n\n" not in exchange.context
        assert all("Reasoning: A\n" in branch.prompt for branch in exchange.branches)


def test_an_unknown_role_is_named():
    with pytest.raises(EchoError, match=r"decision_maker"):
        roles.render("decider", "case", Seen("", (), (), ()))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"), (" B ", "B"), ("B.", "B"), ("(C)", "C"), ("D:", "D"), ("C. Stain.", "C"), ("C: Stain.", "C"),
        ("", None), ("E", None), ("F", None), ("a", None), ("A defect", None), ("A. Stain.", None), ("AB", None),
        ("A B", None), ("The answer is A", None), ("I think it is a scratch", None), ("Scratch.", None), ("1", None),
    ],
)  # fmt: skip
def test_letters_are_read_strictly(text, letter):
    options = {"A": "Scratch.", "B": "Dent.", "C": "Stain.", "D": "Chip."}
    assert roles.parse_letter(text, options) == letter


@pytest.mark.parametrize(
    ("text", "best"),
    [("1", 0), ("3", 2), (" Candidate 2. ", 1), ("4", None), ("0", None), ("", None), ("1 or 2", None), ("best", None)],
)
def test_the_best_reference_is_read_strictly(text, best):
    assert roles.parse_best(text, 3) == best
