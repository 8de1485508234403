"""The four experts in order, on a backend that needs no model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import BackendError, PipelineConfig, run_cases, run_cases_async, run_or_fail
from echo_ft.records import Exchange, Generation
from tests.conftest import make_case
from tests.support.backends import ScriptedBackend


def test_each_expert_hears_the_earlier_ones(case):
    parrot = ScriptedBackend()
    (outcome,) = run_cases([case], parrot, PipelineConfig())
    assert parrot.roles() == ["reference_extractor", "knowledge_guide", "reasoning_expert", "decision_maker"]
    second = case.seen.references[1].image
    assert all(exchange.images == (second, case.seen.query) for exchange in parrot.shown[1:])
    assert "Normal: NORMAL" in parrot.of("reasoning_expert")[0].context
    assert "Guide: GUIDE" in parrot.of("decision_maker")[0].context
    assert all("Reasoning: REASON" in b.prompt for e in parrot.of("decision_maker") for b in e.branches)
    assert [p.parsed for p in outcome.predictions] == ["B"] * 7
    assert len(outcome.traces) == 2 + 1 + 7 + 7


def test_probabilities_are_over_the_questions_own_options(case):
    (outcome,) = run_cases([case], ScriptedBackend(), PipelineConfig())
    by_kind = {prediction.kind: prediction.probabilities for prediction in outcome.predictions}
    assert by_kind["Anomaly Detection"] == pytest.approx({"A": 0.25, "B": 0.75})
    assert by_kind["Defect Classification"] == pytest.approx({"A": 0.125, "B": 0.375, "C": 0.25, "D": 0.25})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (PipelineConfig(reference="none"), ["knowledge_guide", "reasoning_expert", "decision_maker"]),
        (PipelineConfig(knowledge="none"), ["reference_extractor", "reasoning_expert", "decision_maker"]),
        (PipelineConfig(knowledge="all"), ["reference_extractor", "reasoning_expert", "decision_maker"]),
        (PipelineConfig(reasoning="off"), ["reference_extractor", "knowledge_guide", "decision_maker"]),
        (PipelineConfig(reference="none", knowledge="none", reasoning="off"), ["decision_maker"]),
    ],
)
def test_a_switch_turns_its_expert_off_everywhere(case, settings, expected):
    parrot = ScriptedBackend()
    run_cases([case], parrot, settings)
    assert parrot.roles() == expected
    text = "".join(exchange.context + "".join(b.prompt for b in exchange.branches) for exchange in parrot.shown)
    assert ("GUIDE" in text) == (settings.knowledge == "guided")
    assert ("Reasoning:" in text) == (settings.reasoning == "on")
    assert ("- stain:" in "".join(e.context for e in parrot.of("decision_maker"))) == (settings.knowledge == "all")
    if settings.reference == "none":
        assert all(exchange.images == (case.seen.query,) for exchange in parrot.shown)


def test_paper_routing_shows_each_kind_what_the_method_does(case):
    parrot = ScriptedBackend()
    run_cases([case], parrot, PipelineConfig("paper"))
    seen = {b.id.split("#")[1]: (e, b) for e in parrot.of("decision_maker") for b in e.branches}
    table = {"Anomaly Detection": (2, 0, 0), "Defect Classification": (2, 1, 0), "Defect Localization": (1, 0, 0)}
    table |= {"Defect Description": (2, 1, 1), "Defect Analysis": (2, 0, 1), "Object Classification": (2, 0, 0)}
    for kind, (images, knowledge, reasoning) in table.items():
        exchange, branch = seen[kind]
        assert (len(exchange.images), "Guide:" in exchange.context, "Reasoning:" in branch.prompt) == (
            images,
            bool(knowledge),
            bool(reasoning),
        )


def test_an_unusable_choice_of_reference_leaves_the_retrievals_first(case):
    swapped = replace(case, seen=replace(case.seen, references=case.seen.references[::-1]))
    parrot = ScriptedBackend(says={**ScriptedBackend().says, "best": "none of them"})
    run_cases([swapped], parrot, PipelineConfig())
    first = next(reference.image for reference in swapped.seen.references if reference.rank == 1)
    assert parrot.of("decision_maker")[0].images[0] == first


@pytest.mark.parametrize("text", ["", "I do not know", "E"])
def test_an_answer_that_is_no_option_is_none_and_kept(case, text):
    (outcome,) = run_cases([case], ScriptedBackend(says={**ScriptedBackend().says, "decide": text}), PipelineConfig())
    assert all(p.parsed is None and p.text == text and p.error is None for p in outcome.predictions)


def test_a_broken_case_fails_alone_with_every_question(tmp_path):
    cases = [make_case(tmp_path, f"line/part/{index}") for index in range(3)]
    outcomes = run_or_fail(cases, ScriptedBackend(broken=cases[1].seen.query), PipelineConfig())
    assert [[p.error is None for p in outcome.predictions] for outcome in outcomes] == [
        [True] * 7,
        [False] * 7,
        [True] * 7,
    ]
    assert "is broken" in outcomes[1].predictions[0].error and outcomes[1].predictions[0].parsed is None
    assert outcomes[0] == run_cases(cases[:1], ScriptedBackend(), PipelineConfig())[0]


def test_probabilities_decide_where_they_are_asked_to(case):
    (outcome,) = run_cases(
        [case], ScriptedBackend(says={**ScriptedBackend().says, "decide": "I think"}), PipelineConfig(answer="logits")
    )
    assert all((p.parsed, p.text) == ("B", "B") for p in outcome.predictions), "B has the highest of the letters"
    assert {t.text for t in outcome.traces if t.role == "decision_maker"} == {"I think"}
    (by_text,) = run_cases([case], ScriptedBackend(), PipelineConfig())
    assert [p.probabilities for p in outcome.predictions] == [p.probabilities for p in by_text.predictions]


def test_without_probabilities_nothing_is_decided_by_them(case):
    def silent(role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        return [[Generation(one.text, {}) for one in said] for said in ScriptedBackend()(role, exchanges)]

    (outcome,) = run_cases([case], silent, PipelineConfig(answer="logits"))
    assert all((p.parsed, p.text, p.probabilities) == (None, "", None) for p in outcome.predictions)
    assert all(p.parsed == "B" for p in run_cases([case], silent, PipelineConfig())[0].predictions)


@dataclass
class Slow:
    """A parrot that is awaited, and whose replies come in another order than they were asked for."""

    parrot: ScriptedBackend = field(default_factory=ScriptedBackend)
    under_way: int = 0
    most: int = 0

    async def __call__(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        for _ in range(3 if exchanges and exchanges[0].case.endswith("0") else 1):
            await asyncio.sleep(0)
        self.under_way -= 1
        return self.parrot(role, exchanges)


@pytest.mark.parametrize("at_once", [1, 3, 20])
def test_cases_under_way_at_once_come_out_as_one_after_another(tmp_path, at_once):
    cases = [make_case(tmp_path, f"line/part/{index}") for index in range(6)]
    found, slow = {}, Slow(ScriptedBackend(broken=cases[1].seen.query))
    asyncio.run(
        run_cases_async(cases, slow, PipelineConfig(), at_once, lambda case, outcome: found.update({case.id: outcome}))
    )
    expected = run_or_fail(cases, ScriptedBackend(broken=cases[1].seen.query), PipelineConfig())
    assert [found[case.id] for case in cases] == expected
    assert slow.most == min(at_once, len(cases))


def test_a_backend_that_fails_stops_the_run_and_marks_no_case(tmp_path):
    cases = [make_case(tmp_path, f"line/part/{index}") for index in range(3)]

    def gone(role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        if any(exchange.case == cases[2].id for exchange in exchanges):
            raise BackendError("the server is away")
        return ScriptedBackend()(role, exchanges)

    async def gone_later(role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        return gone(role, exchanges)

    written = []
    with pytest.raises(BackendError, match="away"):
        run_or_fail(cases, gone, PipelineConfig())
    with pytest.raises(BackendError, match="away"):
        asyncio.run(run_cases_async(cases, gone_later, PipelineConfig(), 1, lambda case, _: written.append(case.id)))
    assert written == [case.id for case in cases[:2]]


def test_an_unknown_routing_is_named():
    with pytest.raises(EchoError, match=r"papers.*full, paper"):
        PipelineConfig("papers").routes()
