"""Questions about boxes have the right prompts, training rows and answers, and do not affect other questions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from echo_ft.data.dataset_questions import write_dataset_questions
from echo_ft.data.export_rows import prompt_completion_rows
from echo_ft.data.questions import write_box_question
from echo_ft.errors import EchoError
from echo_ft.experts import roles
from echo_ft.experts.pipeline import PipelineConfig, run_cases, run_or_fail
from echo_ft.experts.targets import training_exchanges
from echo_ft.images.boxes import parse_boxes
from echo_ft.model.rows import IGNORED
from echo_ft.records import GOOD, GROUNDING, Branch, Case, Exchange, Generation, Inspection, Question, Upstream
from tests.conftest import ROOT
from tests.support.backends import ScriptedBackend

BOXES = "<|box_start|>(10,20),(300,400)<|box_end|>"
OUTPUTS = Upstream(best=1, normal="An even surface.", guide="stain: look for this.", reasons={})


def with_boxes(case: Case, answer: str = BOXES, condition: str = "stain") -> Case:
    """Return the case with a question about boxes after its other questions."""
    question = Question(f"{case.id}#boxes", case.id, GROUNDING, "Where are the defects?", {})
    truth = replace(case.truth, answers={**case.truth.answers, question.id: answer}, condition=condition)
    return replace(case, seen=replace(case.seen, questions=(*case.seen.questions, question)), truth=truth)


class BoxBackend(ScriptedBackend):
    """Answers every question about boxes with `says`."""

    says = "(10,20),(300,400)"
    cut = False

    def __call__(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        found = super().__call__(role, exchanges)
        return [
            [
                replace(generation, text=self.says, cut=self.cut)
                if role == "decision_maker" and branch.id.endswith("#boxes")
                else generation
                for branch, generation in zip(exchange.branches, generations, strict=True)
            ]
            for exchange, generations in zip(exchanges, found, strict=True)
        ]


@pytest.mark.parametrize("routing", ["full", "paper"])
def test_the_prompt_matches_the_golden_file_and_changes_no_other(routing: str, case: Case) -> None:
    asked = with_boxes(case)
    upstream = replace(OUTPUTS, reasons={f"{case.id}#boxes": "Observe: a mark. Conclude: yes."})
    exchanges = roles.render("decision_maker", case.id, asked.seen, upstream, roles.ROUTINGS[routing])
    (exchange,) = [one for one in exchanges if any(branch.id.endswith("#boxes") for branch in one.branches)]
    (branch,) = [one for one in exchange.branches if one.id.endswith("#boxes")]
    text = (
        f"prompt version {exchange.prompt_version}\n{', '.join(exchange.images)}\n{exchange.context}{branch.prompt}\n"
    )
    path = ROOT / "tests" / "golden" / f"decision_maker_grounding_{routing}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), "a prompt changed: raise PROMPT_VERSION, then UPDATE_GOLDEN=1"
    others = [
        replace(one, branches=tuple(branch for branch in one.branches if not branch.id.endswith("#boxes")))
        for one in exchanges
    ]
    plain = roles.render("decision_maker", case.id, case.seen, upstream, roles.ROUTINGS[routing])
    assert [one for one in others if one.branches] == plain


def test_the_answer_is_read_strictly_and_the_other_answers_stay_the_same(case: Case) -> None:
    asked = with_boxes(case)
    backend = BoxBackend()
    (outcome,) = run_cases([asked], backend, PipelineConfig())
    (plain,) = run_cases([case], ScriptedBackend(), PipelineConfig())
    *others, boxes = outcome.predictions
    assert others == plain.predictions
    assert (boxes.kind, boxes.options, boxes.probabilities) == (GROUNDING, {}, None)
    assert (boxes.text, boxes.parsed, boxes.answer) == ("(10,20),(300,400)", BOXES, BOXES)
    for text, parsed in (("none", "none"), ("It is at (10,20),(300,400)", None), ("B", None), ("", None)):
        backend.says = text
        (outcome,) = run_cases([asked], backend, PipelineConfig())
        assert (outcome.predictions[-1].text, outcome.predictions[-1].parsed) == (text, parsed)


def test_a_cut_answer_is_unparsed_because_boxes_may_be_missing(case: Case) -> None:
    backend = BoxBackend()
    backend.cut = True
    for answer in ("generate", "logits"):
        (outcome,) = run_cases([with_boxes(case)], backend, PipelineConfig(answer=answer))
        assert outcome.predictions[-1].parsed is None
        assert [trace.branch for trace in outcome.traces if trace.cut] == [f"{case.id}#boxes"]


@pytest.mark.parametrize(
    "config", [PipelineConfig(answer="logits"), PipelineConfig(answer="averaged", option_order="cyclic")]
)
def test_probabilities_and_option_orders_leave_boxes_alone(config: PipelineConfig, case: Case) -> None:
    backend = BoxBackend()
    (outcome,) = run_cases([with_boxes(case)], backend, config)
    assert outcome.predictions[-1].parsed == BOXES
    assert len(outcome.predictions) == 8
    assert GROUNDING not in {one.kind for one in outcome.permuted}
    asked = [branch.id for exchange in backend.of("decision_maker") for branch in exchange.branches]
    assert [name for name in asked if "#boxes" in name] == [f"{case.id}#boxes"]


def test_a_case_that_fails_has_a_failed_answer_about_boxes(case: Case) -> None:
    (outcome,) = run_or_fail([with_boxes(case)], BoxBackend(broken=case.seen.query), PipelineConfig())
    assert (outcome.predictions[-1].parsed, outcome.predictions[-1].kind) == (None, GROUNDING)
    assert "is broken" in str(outcome.predictions[-1].error)


def box_branches(case: Case, role: str, root: Path, routing: str = "full") -> list[Branch]:
    rows = training_exchanges(case, role, root, routing)
    return [branch for row in rows for branch in row.branches if branch.id.endswith("#boxes")]


def test_training_rows_hold_the_boxes_and_reasoning_that_concludes_a_defect(case: Case, tmp_path: Path) -> None:
    (decision,) = box_branches(with_boxes(case), "decision_maker", tmp_path)
    assert decision.completion == BOXES
    assert "Reasoning: Observe: " in decision.prompt
    (reasoning,) = box_branches(with_boxes(case), "reasoning_expert", tmp_path)
    assert str(reasoning.completion).rstrip(".").endswith("defect: stain")
    assert not box_branches(with_boxes(case), "reasoning_expert", tmp_path, "paper")
    normal = with_boxes(case, "none", GOOD)
    (decision,) = box_branches(normal, "decision_maker", tmp_path)
    assert decision.completion == "none"
    (reasoning,) = box_branches(normal, "reasoning_expert", tmp_path)
    assert str(reasoning.completion).rstrip(".").endswith("no defect")


@pytest.mark.parametrize(("answer", "condition"), [("none", "stain"), (BOXES, GOOD), ("", "stain")])
@pytest.mark.parametrize("role", ["decision_maker", "reasoning_expert"])
def test_boxes_that_contradict_the_condition_are_not_trained_on(
    role: str, answer: str, condition: str, case: Case, tmp_path: Path
) -> None:
    assert not box_branches(with_boxes(case, answer, condition), role, tmp_path)


def test_rows_train_on_qwen2_vls_tokens_and_refuse_them_anywhere_else(case, row_builder, tmp_path: Path) -> None:
    rows = training_exchanges(with_boxes(case), "decision_maker", tmp_path, "full")
    (exchange,) = [row for row in rows if any(branch.id.endswith("#boxes") for branch in row.branches)]
    row = row_builder.load_row(exchange, tmp_path)
    trained = row_builder.tokenizer.decode(row.labels[row.labels != IGNORED])
    assert f"{BOXES}<|im_end|>" in trained
    start = row_builder.tokenizer.convert_tokens_to_ids("<|box_start|>")
    assert (row.labels == start).sum() == (row.input_ids == start).sum() == 1, "one token, only in the completion"
    tokens = row_builder.tokenizer(BOXES)["input_ids"]
    assert len(tokens) < 24, "five boxes fit into MAX_NEW_TOKENS"
    assert parse_boxes(row_builder.tokenizer.decode(tokens, skip_special_tokens=True)) == parse_boxes(BOXES)
    exported = [one["completion"][0]["content"] for one in prompt_completion_rows(exchange, ["a", "b"])]
    assert BOXES in exported
    branch = exchange.branches[-1]
    for changed in (
        replace(branch, prompt=branch.prompt + "<|box_start|>"),
        replace(branch, completion=BOXES + "<|im_end|>"),
        replace(branch, completion="<|im_<|box_start|>end|>"),
    ):
        for use in (lambda one: row_builder.load_row(one, tmp_path), lambda one: [*prompt_completion_rows(one, [])]):
            with pytest.raises(EchoError, match="control token"):
                use(replace(exchange, branches=(changed,)))


def test_a_question_about_boxes_is_asked_if_the_answer_is_known(tmp_path: Path) -> None:
    Image.new("L", (200, 100)).save(tmp_path / "a.png")
    mask = Image.new("L", (200, 100))
    mask.save(tmp_path / "empty.png")
    mask.paste(255, (20, 10, 41, 30))
    mask.save(tmp_path / "mask.png")
    crack = Inspection("a.png", "a.png", "d", "p", "crack", "g")
    question = write_box_question(replace(crack, mask="mask.png"), tmp_path)
    assert question is not None
    assert (question.id, question.kind, question.options) == ("a.png#defect-grounding", GROUNDING, {})
    assert question.answer == "<|box_start|>(100,100),(205,300)<|box_end|>"
    assert write_box_question(crack, tmp_path) is None
    assert write_box_question(replace(crack, mask="empty.png"), tmp_path) is None
    good = write_box_question(replace(crack, condition=GOOD, mask="missing.png"), tmp_path)
    assert good is not None
    assert (good.answer, good.text) == ("none", question.text)


def test_a_source_with_its_own_questions_gets_the_question_about_boxes_after_them(tmp_path: Path) -> None:
    good = Inspection("a.png", "a.png", "d", "p", GOOD, "g", "test")
    own = Question("own", "a.png", "Object Analysis", "What is it?", {"A": "A disc.", "B": "A bolt."}, "A")
    written = [*write_dataset_questions([good], [own], {}, {}, tmp_path, 0, grounding=True)]
    assert written[0] == own
    assert [question.kind for question in written] == ["Object Analysis", GROUNDING]
    assert [*write_dataset_questions([good], [own], {}, {}, tmp_path, 0)] == [own]
