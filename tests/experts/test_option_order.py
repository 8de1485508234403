"""Every cyclic order of the options is asked, mapped back to the original letters, and used to measure letter bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from echo_ft.experts import roles
from echo_ft.experts.option_order import (
    PermutedPrediction,
    answer_consistency,
    mean_distribution,
    original_letter,
    position_bias,
    rotate_options,
    shuffle_options,
)
from echo_ft.experts.pipeline import PipelineConfig, run_cases
from echo_ft.inference.run_folder import PERMUTATIONS, PREDICTIONS, RunFolder
from echo_ft.records import GROUNDING, Branch, Exchange, Generation, Question, Seen, Truth, Upstream
from tests.conftest import make_case
from tests.support.backends import ScriptedBackend

CYCLIC = PipelineConfig(option_order="cyclic")
AVERAGED = PipelineConfig(option_order="cyclic", answer="averaged")
QUESTION = Question("q", "i", "Defect Classification", "Which?", {"A": "one", "B": "two", "C": "three"})


def test_rotation_moves_every_option_and_the_last_to_the_front():
    assert rotate_options(QUESTION, 0) is QUESTION
    assert rotate_options(QUESTION, 1) == replace(QUESTION, id="q+1", options={"A": "three", "B": "one", "C": "two"})
    assert rotate_options(QUESTION, 2).options == {"A": "two", "B": "three", "C": "one"}


def decision(options, reason="", kind="Defect Classification"):
    """A decision with the completion B, as in a training row."""
    question = replace(QUESTION, kind=kind, options=options)
    seen = Seen("query.png", (), (), (question,))
    (exchange,) = roles.render("decision_maker", "c", seen, Upstream(reasons={"q": reason}))
    return replace(exchange.branches[0], completion="B")


def shown_options(prompt):
    """The options of a prompt by letter."""
    return {line[0]: line[3:] for line in prompt.splitlines() if line[1:3] == ". "}


@pytest.mark.parametrize("reason", ["", "Observe: a mark. A. is not an option. Conclude: two."])
@pytest.mark.parametrize("letters", ["ABC", "ABCDE", "BCE"])
def test_shuffled_options_keep_the_right_one(letters, reason):
    branch = decision({letter: f"B. text {letter}" for letter in letters}, reason)
    orders = set()
    for epoch in range(40):
        shuffled = shuffle_options(branch, f"0/{epoch}")
        assert shuffled == shuffle_options(branch, f"0/{epoch}")
        before, after = shown_options(branch.prompt), shown_options(shuffled.prompt)
        assert list(after) == list(letters)
        assert sorted(after.values()) == sorted(before.values())
        assert after[shuffled.completion] == before["B"]
        unchanged = [line for line in shuffled.prompt.splitlines() if line[1:3] != ". "]
        assert unchanged == [line for line in branch.prompt.splitlines() if line[1:3] != ". "]
        orders.add(tuple(after.values()))
    assert len(orders) > 4


@pytest.mark.parametrize(
    "branch",
    [
        decision({"A": "Yes.", "B": "No."}),
        decision({}, kind=GROUNDING),
        decision({"A": "Crack.", "B": "Dent.", "C": "None of the above."}),
        decision({"A": "Crack.", "B": "Dent.", "C": "Both A and B."}),
        replace(decision(QUESTION.options), completion=None),
        Branch("q", "Question: Which?\nA. one\nB. two\nC. three\nObserve, then conclude.", "B"),
    ],
)
def test_other_branches_are_not_shuffled(branch):
    assert all(shuffle_options(branch, f"0/{epoch}") is branch for epoch in range(20))


@pytest.mark.parametrize("letters", ["AB", "ABC", "ABCDE", "BD"])
def test_shown_letter_maps_back_to_its_original_option(letters):
    question = replace(QUESTION, options={letter: f"text {letter}" for letter in letters})
    for shift in range(len(letters)):
        shown = rotate_options(question, shift).options
        assert list(shown) == list(letters)
        assert sorted(shown.values()) == sorted(question.options.values())
        assert all(question.options[original_letter(one, question.options, shift)] == shown[one] for one in letters)


@dataclass(frozen=True)
class ContentBackend:
    """Chooses the option with a text in `right_texts`. The log-odds of the first option are higher by `bias`."""

    right_texts: tuple[str, ...]
    bias: float = 0.0

    def __call__(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        if role != "decision_maker":
            return ScriptedBackend()(role, exchanges)
        return [[self.decide(branch.prompt) for branch in exchange.branches] for exchange in exchanges]

    def decide(self, prompt: str) -> Generation:
        options = {line[0]: line[3:] for line in prompt.splitlines() if line[1:3] == ". "}
        scores = {one: (text in self.right_texts) + (self.bias if one == "A" else 0.0) for one, text in options.items()}
        return Generation(max(scores, key=scores.__getitem__), scores)


RIGHT_TEXTS = ("Yes.", "Stain.", "Center.", "A dark spot.", "It weakens the coating.", "Washer.", "An even surface.")


def test_model_that_reads_the_options_answers_alike_in_every_order(case):
    (outcome,) = run_cases([case], ContentBackend(RIGHT_TEXTS), CYCLIC)
    counts = [len(question.options) for question in case.seen.questions]
    assert [row.shift for row in outcome.permuted] == [shift for count in counts for shift in range(count)]
    assert all(row.parsed == row.answer for row in outcome.permuted), "in the original letters"
    assert {row.text for row in outcome.permuted if row.kind == "Defect Classification"} == set("ABCD"), (
        "the text has the letters as shown"
    )
    for row in outcome.permuted:
        assert row.probabilities == pytest.approx(
            next(p.probabilities for p in outcome.predictions if p.question == row.question)
        )
    assert answer_consistency(outcome.permuted) == (1.0, 7)
    for one in position_bias(outcome.permuted):
        assert one.chosen == one.right == 1 / one.options
        assert one.recall == 1


def test_model_that_always_answers_the_first_letter_is_detected(case):
    (outcome,) = run_cases([case], ScriptedBackend({**ScriptedBackend().texts, "decide": "A"}), CYCLIC)
    biases = position_bias(outcome.permuted)
    # Five questions have two options, one has three and one has four. Each is asked once per option.
    expected = [
        (len(letters), one, answers) for letters, answers in (("AB", 10), ("ABC", 3), ("ABCD", 4)) for one in letters
    ]
    assert [(p.options, p.letter, p.answers) for p in biases] == expected
    assert [(p.chosen, p.right, p.recall) for p in biases if p.options == 4] == [(1, 0.25, 1), *[(0, 0.25, 0)] * 3]
    assert answer_consistency(outcome.permuted) == (0.0, 7)


def test_bias_uses_shown_letters_and_counts_unparsed_answers():
    def row(shift, parsed, answer="A", error=None):
        options = {"A": "Yes.", "B": "No."}
        about = (
            "case",
            f"question {answer}",
            "line",
            "washer",
            "group",
            "image",
            "good",
            "Anomaly Detection",
            "Is there?",
        )
        return PermutedPrediction(*about, options, answer, "", parsed, error=error, shift=shift)

    # Shown answer (true letter): A (A); after rotation, B (B); unparsed; after rotation, A (B).
    rows = [row(0, "A"), row(1, "A"), row(0, None), row(1, "B"), row(0, "B", error="broken")]
    a, b = position_bias(rows)
    assert (a.chosen, a.right, a.recall, a.answers) == (0.5, 0.5, 0.5, 4)
    assert (b.chosen, b.right, b.recall, b.answers) == (0.25, 0.5, 0.5, 4)
    assert answer_consistency(rows) == (0.0, 1)
    assert answer_consistency(rows[:2]) == (1.0, 1)
    assert answer_consistency([row(0, None), row(1, None)]) == (0.0, 1)
    assert position_bias([]) == []
    assert answer_consistency([]) is None


def test_each_order_is_shown_once_with_the_same_reasoning(case):
    backend = ScriptedBackend()
    run_cases([case], backend, CYCLIC)
    assert [len(exchange.branches) for exchange in backend.of("reasoning_expert")] == [6, 1]
    branches = [branch for exchange in backend.of("decision_maker") for branch in exchange.branches]
    assert len({branch.id for branch in branches}) == len({branch.prompt for branch in branches}) == len(branches) == 17
    assert all("Reasoning: REASON" in branch.prompt for branch in branches)


@pytest.mark.parametrize("answer", ["generate", "logits"])
def test_given_order_decides_as_without_the_other_orders(case, answer):
    (outcome,) = run_cases(
        [case], ContentBackend(RIGHT_TEXTS, 0.5), PipelineConfig(answer=answer, option_order="cyclic")
    )
    (given,) = run_cases([case], ContentBackend(RIGHT_TEXTS, 0.5), PipelineConfig(answer=answer))
    assert outcome.predictions == given.predictions
    assert given.permuted == []
    firsts = [{**vars(row), "shift": None} for row in outcome.permuted if row.shift == 0]
    assert firsts == [{**vars(row), "shift": None} for row in given.predictions]


def test_mean_over_all_orders_removes_the_letter_bias(case):
    biased = ContentBackend(RIGHT_TEXTS, bias=3)  # the first option always wins
    (given,) = run_cases([case], biased, PipelineConfig(answer="logits"))
    assert {row.parsed for row in given.predictions} == {"A"}
    (outcome,) = run_cases([case], biased, AVERAGED)
    assert all(row.parsed == row.text == row.answer for row in outcome.predictions)
    by_type = {row.kind: row.probabilities for row in outcome.predictions}
    first, last = (
        1 / (1 + math.exp(-4)),
        1 / (1 + math.exp(2)),
    )  # P(right) if it is A, and if it is not
    assert by_type["Anomaly Detection"] == pytest.approx({"A": (first + last) / 2, "B": 1 - (first + last) / 2})
    assert all(sum(found.values()) == pytest.approx(1) for found in by_type.values())


def test_without_probabilities_there_is_no_mean_and_no_answer(case):
    def without_letters(role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        return [[Generation(one.text, {}) for one in generations] for generations in ScriptedBackend()(role, exchanges)]

    (outcome,) = run_cases([case], without_letters, AVERAGED)
    assert all((row.parsed, row.text, row.probabilities) == (None, "", None) for row in outcome.predictions)
    assert mean_distribution([{"A": 1.0}, None]) is None
    assert mean_distribution([]) is None


def test_resumed_run_writes_every_order_once(tmp_path):
    cases = [make_case(tmp_path / "images", f"line/part/{index}") for index in range(3)]

    def run(folder, stop_after=9):
        with RunFolder(folder, {}, cases) as opened:
            for (case,) in opened.batches(1)[:stop_after]:
                opened.write(case, run_cases([case], ContentBackend(RIGHT_TEXTS), CYCLIC)[0])
            opened.finish()
        return {name: (folder / name).read_bytes().splitlines() for name in (PERMUTATIONS, PREDICTIONS)}

    whole = run(tmp_path / "whole")
    assert len(whole[PERMUTATIONS]) == 3 * 17
    assert len(whole[PREDICTIONS]) == 3 * 7
    run(tmp_path / "cut", stop_after=2)
    path = tmp_path / "cut" / PREDICTIONS  # the run was killed between the two files
    path.write_bytes(path.read_bytes()[:-900])
    assert run(tmp_path / "cut") == whole


def test_orders_shown_do_not_depend_on_the_truth(case):
    """The truth never reaches a prompt, whatever the order of the options."""
    other = replace(case, truth=Truth("good", None, (), dict.fromkeys(case.truth.answers, "A")))
    backends = ScriptedBackend(), ScriptedBackend()
    for one, backend in zip((case, other), backends, strict=True):
        run_cases([one], backend, CYCLIC)
    assert backends[0].shown == backends[1].shown
