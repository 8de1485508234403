"""Option order: every cyclic permutation asked, told in the question's own letters, and what a place did to answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from echo_ft.experts.option_order import (
    PermutedPrediction,
    answer_consistency,
    mean_distribution,
    original_letter,
    position_bias,
    rotate_options,
)
from echo_ft.experts.pipeline import PipelineConfig, run_cases
from echo_ft.inference.run_folder import PERMUTATIONS, PREDICTIONS, RunFolder
from echo_ft.records import Exchange, Generation, Question, Truth
from tests.conftest import make_case
from tests.support.backends import ScriptedBackend

CYCLIC = PipelineConfig(option_order="cyclic")
AVERAGED = PipelineConfig(option_order="cyclic", answer="averaged")
QUESTION = Question("q", "i", "Defect Classification", "Which?", {"A": "one", "B": "two", "C": "three"})


def test_a_shift_moves_every_option_on_and_the_last_to_the_front():
    assert rotate_options(QUESTION, 0) is QUESTION
    assert rotate_options(QUESTION, 1) == replace(QUESTION, id="q+1", options={"A": "three", "B": "one", "C": "two"})
    assert rotate_options(QUESTION, 2).options == {"A": "two", "B": "three", "C": "one"}


@pytest.mark.parametrize("letters", ["AB", "ABC", "ABCDE", "BD"])
def test_a_letter_leads_back_to_the_option_that_stood_there(letters):
    question = replace(QUESTION, options={letter: f"text {letter}" for letter in letters})
    for shift in range(len(letters)):
        shown = rotate_options(question, shift).options
        assert list(shown) == list(letters) and sorted(shown.values()) == sorted(question.options.values())
        assert all(question.options[original_letter(one, question.options, shift)] == shown[one] for one in letters)


@dataclass(frozen=True)
class Knowing:
    """Decides for the option whose text ends its line in `knows`; the first place gets `bias` more, in log-odds."""

    knows: tuple[str, ...]
    bias: float = 0.0

    def __call__(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        if role != "decision_maker":
            return ScriptedBackend()(role, exchanges)
        return [[self.decide(branch.prompt) for branch in exchange.branches] for exchange in exchanges]

    def decide(self, prompt: str) -> Generation:
        options = {line[0]: line[3:] for line in prompt.splitlines() if line[1:3] == ". "}
        scores = {one: (text in self.knows) + (self.bias if one == "A" else 0.0) for one, text in options.items()}
        return Generation(max(scores, key=scores.__getitem__), scores)


RIGHT = ("Yes.", "Stain.", "Center.", "A dark spot.", "It weakens the coating.", "Washer.", "An even surface.")


def test_one_that_reads_the_options_is_the_same_in_every_order(case):
    (outcome,) = run_cases([case], Knowing(RIGHT), CYCLIC)
    counts = [len(question.options) for question in case.seen.questions]
    assert [row.shift for row in outcome.permuted] == [shift for count in counts for shift in range(count)]
    assert all(row.parsed == row.answer for row in outcome.permuted), "in the question's own letters"
    assert {row.text for row in outcome.permuted if row.kind == "Defect Classification"} == set("ABCD"), (
        "as it was said"
    )
    for row in outcome.permuted:
        assert row.probabilities == pytest.approx(
            next(p.probabilities for p in outcome.predictions if p.question == row.question)
        )
    assert answer_consistency(outcome.permuted) == (1.0, 7)
    for place in position_bias(outcome.permuted):
        assert place.chosen == place.right == 1 / place.options and place.recall == 1


def test_one_that_always_says_the_first_is_found_out(case):
    (outcome,) = run_cases([case], ScriptedBackend({**ScriptedBackend().says, "decide": "A"}), CYCLIC)
    places = position_bias(outcome.permuted)
    # Five questions of two options, one of three, one of four; each is asked as many times as it has options.
    expected = [
        (len(letters), one, answers) for letters, answers in (("AB", 10), ("ABC", 3), ("ABCD", 4)) for one in letters
    ]
    assert [(p.options, p.letter, p.answers) for p in places] == expected
    assert [(p.chosen, p.right, p.recall) for p in places if p.options == 4] == [(1, 0.25, 1), *[(0, 0.25, 0)] * 3]
    assert answer_consistency(outcome.permuted) == (0.0, 7)


def test_bias_is_of_the_letters_shown_and_counts_what_is_no_letter():
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

    # Shown: A for A; then, the other way round, B (own A) for B (own A); nothing; and A (own B) for B (own A).
    rows = [row(0, "A"), row(1, "A"), row(0, None), row(1, "B"), row(0, "B", error="broken")]
    a, b = position_bias(rows)
    assert (a.chosen, a.right, a.recall, a.answers) == (0.5, 0.5, 0.5, 4)
    assert (b.chosen, b.right, b.recall, b.answers) == (0.25, 0.5, 0.5, 4)
    assert answer_consistency(rows) == (0.0, 1) and answer_consistency(rows[:2]) == (1.0, 1)
    assert answer_consistency([row(0, None), row(1, None)]) == (0.0, 1)
    assert position_bias([]) == [] and answer_consistency([]) is None


def test_each_order_is_shown_once_beside_the_same_reasons(case):
    parrot = ScriptedBackend()
    run_cases([case], parrot, CYCLIC)
    assert [len(exchange.branches) for exchange in parrot.of("reasoning_expert")] == [6, 1]
    branches = [branch for exchange in parrot.of("decision_maker") for branch in exchange.branches]
    assert len({branch.id for branch in branches}) == len({branch.prompt for branch in branches}) == len(branches) == 17
    assert all("Reasoning: REASON" in branch.prompt for branch in branches)


@pytest.mark.parametrize("answer", ["generate", "logits"])
def test_the_given_order_decides_as_it_does_alone(case, answer):
    (outcome,) = run_cases([case], Knowing(RIGHT, 0.5), PipelineConfig(answer=answer, option_order="cyclic"))
    (given,) = run_cases([case], Knowing(RIGHT, 0.5), PipelineConfig(answer=answer))
    assert outcome.predictions == given.predictions and given.permuted == []
    firsts = [{**vars(row), "shift": None} for row in outcome.permuted if row.shift == 0]
    assert firsts == [{**vars(row), "shift": None} for row in given.predictions]


def test_the_mean_over_all_orders_takes_the_bias_of_a_place_away(case):
    biased = Knowing(RIGHT, bias=3)  # so that the first place wins, whatever stands there
    (given,) = run_cases([case], biased, PipelineConfig(answer="logits"))
    assert {row.parsed for row in given.predictions} == {"A"}
    (outcome,) = run_cases([case], biased, AVERAGED)
    assert all(row.parsed == row.text == row.answer for row in outcome.predictions)
    by_kind = {row.kind: row.probabilities for row in outcome.predictions}
    first, last = 1 / (1 + math.exp(-4)), 1 / (1 + math.exp(2))  # the right option in the first place, and in the other
    assert by_kind["Anomaly Detection"] == pytest.approx({"A": (first + last) / 2, "B": 1 - (first + last) / 2})
    assert all(sum(found.values()) == pytest.approx(1) for found in by_kind.values())


def test_without_probabilities_there_is_no_mean(case):
    def silent(role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        return [[Generation(one.text, {}) for one in said] for said in ScriptedBackend()(role, exchanges)]

    (outcome,) = run_cases([case], silent, AVERAGED)
    assert all((row.parsed, row.text, row.probabilities) == (None, "", None) for row in outcome.predictions)
    assert mean_distribution([{"A": 1.0}, None]) is None and mean_distribution([]) is None


def test_orders_are_on_disk_once_wherever_the_run_was_stopped(tmp_path):
    cases = [make_case(tmp_path / "images", f"line/part/{index}") for index in range(3)]

    def run(folder, stop_after=9):
        with RunFolder(folder, {}, cases) as opened:
            for (case,) in opened.batches(1)[:stop_after]:
                opened.write(case, run_cases([case], Knowing(RIGHT), CYCLIC)[0])
            opened.finish()
        return {name: (folder / name).read_bytes().splitlines() for name in (PERMUTATIONS, PREDICTIONS)}

    whole = run(tmp_path / "whole")
    assert len(whole[PERMUTATIONS]) == 3 * 17 and len(whole[PREDICTIONS]) == 3 * 7
    run(tmp_path / "cut", stop_after=2)
    path = tmp_path / "cut" / PREDICTIONS  # killed between the two files
    path.write_bytes(path.read_bytes()[:-900])
    assert run(tmp_path / "cut") == whole


def test_a_truth_that_moves_is_no_other_question(case):
    """The truth stays apart: what is shown in another order does not depend on it."""
    other = replace(case, truth=Truth("good", None, (), dict.fromkeys(case.truth.answers, "A")))
    parrots = ScriptedBackend(), ScriptedBackend()
    for one, parrot in zip((case, other), parrots, strict=True):
        run_cases([one], parrot, CYCLIC)
    assert parrots[0].shown == parrots[1].shown
