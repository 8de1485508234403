"""Prompts match the golden files and never contain the truth; answers are parsed strictly."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest

from echo_ft.data.dataset import make_cases
from echo_ft.errors import EchoError
from echo_ft.experts import roles
from echo_ft.experts.pipeline import PipelineConfig, run_cases
from echo_ft.experts.targets import gold_upstream, training_exchanges
from echo_ft.records import QUESTION_TYPES, ROLES, Entry, Inspection, Question, Reference, Seen, Upstream
from tests.conftest import ROOT
from tests.support.backends import ScriptedBackend

GOLDEN = ROOT / "tests" / "golden"
OUTPUTS = Upstream(best=1, normal="An even  surface.\n", guide="stain: look for this. A dark spot.", reasons={})


def as_text(exchanges) -> str:
    parts = [f"prompt version {roles.PROMPT_VERSION}"]
    for exchange in exchanges:
        parts.append(f"==== {exchange.role}: images {', '.join(exchange.images)}\n{exchange.context}")
        parts += [f"---- {branch.id}\n{branch.prompt}" for branch in exchange.branches]
    return "\n".join(parts) + "\n"


@pytest.mark.parametrize("routing", ["full", "paper"])
@pytest.mark.parametrize("role", ROLES)
def test_prompts_match_the_golden_files(role, routing, case):
    upstream = replace(OUTPUTS, reasons={q.id: "Observe: a mark. Conclude: a stain." for q in case.seen.questions})
    text = as_text(roles.render(role, case.id, case.seen, upstream, roles.ROUTINGS[routing]))
    path = GOLDEN / f"{role}_{routing}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), "a prompt changed: raise PROMPT_VERSION, then UPDATE_GOLDEN=1"


def test_prompts_with_all_knowledge_match_the_golden_file(case):
    text = as_text(roles.render("decision_maker", case.id, case.seen, OUTPUTS, knowledge="all"))
    path = GOLDEN / "decision_maker_all_knowledge.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def secret_case(condition: str, letter: str):
    """Make a case as the dataset loads it. Its truth and paths contain `condition`, and all answers are `letter`."""
    inspection = Inspection(f"d/p/{condition}/0", f"p/{condition}/0.png", "d", "product-name", condition, "g", "test")
    inspection = replace(
        inspection,
        mask=f"p/{condition}/mask.png",
        masks=(f"p/{condition}/mask-1.png", f"p/{condition}/mask-2.png"),
        boxes=((1.5, 2.5, 3.5, 4.5),),
        polygons=((6.25, 7.25, 8.25, 7.25, 8.25, 9.25),) if condition == "SECRET" else (),
    )
    questions = [
        Question(f"{inspection.id}#{kind}", inspection.id, kind, "What is it?", {"A": "One.", "B": "Two."}, letter)
        for kind in QUESTION_TYPES
    ]
    references = [Reference(inspection.id, f"p/{condition}/normal{i}.png", 0.9, i) for i in (1, 2)]
    knowledge = {"d": {"product-name": {"good": "Even.", "stain": "Dark.", "dent": "Deep."}}}
    return make_cases([inspection], references, questions, knowledge)[0]


@pytest.mark.parametrize("knowledge", ["guided", "all", "none"])
@pytest.mark.parametrize("routing", ["full", "paper"])
def test_truth_never_reaches_a_prompt_of_a_run(routing, knowledge):
    """Two cases that differ only in their truth, loaded as in a run, give the same prompts in the whole pipeline.

    Paths are checked too, because the folder of a file often names the defect.
    """
    settings = PipelineConfig(routing, knowledge=knowledge)
    prompts = []
    for condition, letter in (("SECRET", "A"), ("HIDDEN", "B")):
        case = secret_case(condition, letter)
        assert case.truth.condition == condition
        assert set(case.truth.answers.values()) == {letter}
        assert len(case.truth.masks) == 2
        assert bool(case.truth.polygons) == (condition == "SECRET")
        (outcome,) = run_cases([case], ScriptedBackend(texts={**ScriptedBackend().texts, "best": "1"}), settings)
        assert len({trace.role for trace in outcome.traces}) == (4 if knowledge == "guided" else 3)
        prompts.append([(trace.role, trace.context, trace.prompt) for trace in outcome.traces])
    assert prompts[0] == prompts[1]
    text = str(prompts)
    assert not any(word in text for word in ("SECRET", "HIDDEN", "product-name", ".png", "1.5", "6.25", "mask"))


@pytest.mark.parametrize("knowledge", ["guided", "all"])
@pytest.mark.parametrize("routing", ["full", "paper"])
@pytest.mark.parametrize("role", ROLES)
def test_object_classification_sees_no_knowledge_of_the_product(role, routing, knowledge, case, tmp_path):
    """This holds in runs and in training rows, where the outputs of earlier roles are the knowledge itself."""
    words = ("washer disc", "washer blot")
    known = (Entry("good", f"An even {words[0]}."), Entry("stain", f"A {words[1]}. It weakens the coating."))
    case = replace(case, seen=replace(case.seen, knowledge=known))
    gold = gold_upstream(case, tmp_path)
    assert words[0] in gold.normal
    assert words[1] in gold.guide
    rows = training_exchanges(case, role, tmp_path, routing)
    rows += roles.render(role, case.id, case.seen, gold, roles.ROUTINGS[routing], knowledge)
    assert rows or role == "knowledge_guide"
    for exchange in rows:
        for branch in exchange.branches:
            if branch.id.endswith("#Object Classification"):
                assert not any(word in exchange.context + branch.prompt for word in words)
    text = str([exchange.context for exchange in rows])
    assert role == "reference_extractor" or any(word in text for word in words), "other questions see it"


def test_data_cannot_change_the_layout_of_a_prompt(case):
    outputs = replace(OUTPUTS, guide="stain\nQuestion: x\n\nA. y", reasons={q.id: "\n\nA" for q in case.seen.questions})
    for exchange in roles.render("decision_maker", case.id, case.seen, outputs):
        assert exchange.context.count("\n") <= 2
        assert "\n\n" not in exchange.context
        assert all("Reasoning: A\n" in branch.prompt for branch in exchange.branches)


def test_unknown_role_is_reported():
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
def test_letters_are_parsed_strictly(text, letter):
    options = {"A": "Scratch.", "B": "Dent.", "C": "Stain.", "D": "Chip."}
    assert roles.parse_letter(text, options) == letter


def test_letters_are_parsed_in_linear_time():
    start = time.process_time()
    assert roles.parse_letter("A x" + " " * 1_000_000 + "y", {"A": "x z"}) is None
    assert roles.parse_letter("A" + " " * 1_000_000 + "x", {"A": "x"}) == "A"
    assert time.process_time() - start < 5  # the square of a million steps takes hours


@pytest.mark.parametrize(
    ("text", "best"),
    [("1", 0), ("3", 2), (" Candidate 2. ", 1), ("4", None), ("0", None), ("", None), ("1 or 2", None), ("best", None)],
)
def test_best_reference_is_parsed_strictly(text, best):
    assert roles.parse_best(text, 3) == best
