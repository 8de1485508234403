"""The pipeline runs the experts in order, applies switches and routing, and confines each failure to its case."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import BackendError, PipelineConfig, run_cases, run_cases_async, run_or_fail
from echo_ft.records import Exchange, Generation
from tests.conftest import make_case
from tests.support.backends import ScriptedBackend


def test_each_expert_sees_the_outputs_of_the_earlier_ones(case):
    backend = ScriptedBackend()
    (outcome,) = run_cases([case], backend, PipelineConfig())
    assert backend.roles() == ["reference_extractor", "knowledge_guide", "reasoning_expert", "decision_maker"]
    second = case.seen.references[1].image
    assert all(exchange.images == (second, case.seen.query) for exchange in backend.shown[1:])
    assert "Normal: NORMAL" in backend.of("reasoning_expert")[0].context
    assert "Guide: GUIDE" in backend.of("decision_maker")[0].context
    assert all("Reasoning: REASON" in b.prompt for e in backend.of("decision_maker") for b in e.branches)
    assert [p.parsed for p in outcome.predictions] == ["B"] * 7
    assert len(outcome.traces) == 2 + 1 + 7 + 7


def test_probabilities_are_over_the_questions_own_options(case):
    (outcome,) = run_cases([case], ScriptedBackend(), PipelineConfig())
    by_type = {prediction.kind: prediction.probabilities for prediction in outcome.predictions}
    assert by_type["Anomaly Detection"] == pytest.approx({"A": 0.25, "B": 0.75})
    assert by_type["Defect Classification"] == pytest.approx({"A": 0.125, "B": 0.375, "C": 0.25, "D": 0.25})


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
    backend = ScriptedBackend()
    run_cases([case], backend, settings)
    assert backend.roles() == expected
    text = "".join(exchange.context + "".join(b.prompt for b in exchange.branches) for exchange in backend.shown)
    assert ("GUIDE" in text) == (settings.knowledge == "guided")
    assert ("Reasoning:" in text) == (settings.reasoning == "on")
    assert ("- stain:" in "".join(e.context for e in backend.of("decision_maker"))) == (settings.knowledge == "all")
    if settings.reference == "none":
        assert all(exchange.images == (case.seen.query,) for exchange in backend.shown)


def test_paper_routing_shows_each_question_type_what_echo_does(case):
    backend = ScriptedBackend()
    run_cases([case], backend, PipelineConfig("paper"))
    seen = {b.id.split("#")[1]: (e, b) for e in backend.of("decision_maker") for b in e.branches}
    expected = {"Anomaly Detection": (2, 0, 0), "Defect Classification": (2, 1, 0), "Defect Localization": (1, 0, 0)}
    expected |= {"Defect Description": (2, 1, 1), "Defect Analysis": (2, 0, 1), "Object Classification": (2, 0, 0)}
    for kind, (images, knowledge, reasoning) in expected.items():
        exchange, branch = seen[kind]
        assert (len(exchange.images), "Guide:" in exchange.context, "Reasoning:" in branch.prompt) == (
            images,
            bool(knowledge),
            bool(reasoning),
        )


def test_unusable_reference_choice_falls_back_to_the_first_rank(case):
    swapped = replace(case, seen=replace(case.seen, references=case.seen.references[::-1]))
    backend = ScriptedBackend(texts={**ScriptedBackend().texts, "best": "none of them"})
    run_cases([swapped], backend, PipelineConfig())
    first = next(reference.image for reference in swapped.seen.references if reference.rank == 1)
    assert backend.of("decision_maker")[0].images[0] == first


@pytest.mark.parametrize("text", ["", "I do not know", "E"])
def test_unparsed_answer_is_none_and_its_text_is_kept(case, text):
    (outcome,) = run_cases([case], ScriptedBackend(texts={**ScriptedBackend().texts, "decide": text}), PipelineConfig())
    assert all(p.parsed is None and p.text == text and p.error is None for p in outcome.predictions)


def test_broken_case_fails_with_all_its_questions_and_no_others(tmp_path):
    cases = [make_case(tmp_path, f"line/part/{index}") for index in range(3)]
    outcomes = run_or_fail(cases, ScriptedBackend(broken=cases[1].seen.query), PipelineConfig())
    assert [[p.error is None for p in outcome.predictions] for outcome in outcomes] == [
        [True] * 7,
        [False] * 7,
        [True] * 7,
    ]
    assert "is broken" in outcomes[1].predictions[0].error
    assert outcomes[1].predictions[0].parsed is None
    assert outcomes[0] == run_cases(cases[:1], ScriptedBackend(), PipelineConfig())[0]


def test_nothing_of_a_failed_batch_is_alive_when_its_cases_run_again(tmp_path):
    """After an attempt that ran out of memory, its tensors would leave the other cases no memory."""
    cases, failed, alive = [make_case(tmp_path, f"line/part/{index}") for index in range(3)], [], []

    class Tensor:
        """Stands for the tensors of a forward pass."""

    def out_of_memory(role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        gc.collect()
        alive.append(sum(one() is not None for one in failed))
        tensor = Tensor()
        failed.append(weakref.ref(tensor))
        try:
            raise MemoryError
        except MemoryError as error:
            raise EchoError("a single case does not fit into memory") from error

    outcomes = run_or_fail(cases, out_of_memory, PipelineConfig())
    assert alive == [0, 0, 0, 0]
    assert {one.error for outcome in outcomes for one in outcome.predictions} == {
        "a single case does not fit into memory"
    }


def test_probabilities_decide_with_answer_logits(case):
    (outcome,) = run_cases(
        [case], ScriptedBackend(texts={**ScriptedBackend().texts, "decide": "I think"}), PipelineConfig(answer="logits")
    )
    assert all((p.parsed, p.text) == ("B", "B") for p in outcome.predictions), "B is the most probable letter"
    assert {t.text for t in outcome.traces if t.role == "decision_maker"} == {"I think"}
    (by_text,) = run_cases([case], ScriptedBackend(), PipelineConfig())
    assert [p.probabilities for p in outcome.predictions] == [p.probabilities for p in by_text.predictions]


def test_answer_logits_without_probabilities_gives_no_answer(case):
    def without_letters(role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        return [[Generation(one.text, {}) for one in generations] for generations in ScriptedBackend()(role, exchanges)]

    (outcome,) = run_cases([case], without_letters, PipelineConfig(answer="logits"))
    assert all((p.parsed, p.text, p.probabilities) == (None, "", None) for p in outcome.predictions)
    assert all(p.parsed == "B" for p in run_cases([case], without_letters, PipelineConfig())[0].predictions)


@dataclass
class SlowBackend:
    """An asynchronous backend that answers in a different order from the one in which it was asked."""

    backend: ScriptedBackend = field(default_factory=ScriptedBackend)
    running: int = 0
    most_running: int = 0

    async def __call__(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        for _ in range(3 if exchanges and exchanges[0].case.endswith("0") else 1):
            await asyncio.sleep(0)
        self.running -= 1
        return self.backend(role, exchanges)


@pytest.mark.parametrize("concurrency", [1, 3, 20])
def test_concurrent_cases_give_the_outcomes_of_sequential_ones(tmp_path, concurrency):
    cases = [make_case(tmp_path, f"line/part/{index}") for index in range(6)]
    found, slow_backend = {}, SlowBackend(ScriptedBackend(broken=cases[1].seen.query))
    asyncio.run(
        run_cases_async(
            cases, slow_backend, PipelineConfig(), concurrency, lambda case, outcome: found.update({case.id: outcome})
        )
    )
    expected = run_or_fail(cases, ScriptedBackend(broken=cases[1].seen.query), PipelineConfig())
    assert [found[case.id] for case in cases] == expected
    assert slow_backend.most_running == min(concurrency, len(cases))


def test_failing_backend_stops_the_run_and_marks_no_case(tmp_path):
    cases = [make_case(tmp_path, f"line/part/{index}") for index in range(3)]

    def unavailable(role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        if any(exchange.case == cases[2].id for exchange in exchanges):
            raise BackendError("the server is away")
        return ScriptedBackend()(role, exchanges)

    async def unavailable_async(role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        return unavailable(role, exchanges)

    written = []
    with pytest.raises(BackendError, match="away"):
        run_or_fail(cases, unavailable, PipelineConfig())
    with pytest.raises(BackendError, match="away"):
        asyncio.run(
            run_cases_async(cases, unavailable_async, PipelineConfig(), 1, lambda case, _: written.append(case.id))
        )
    assert written == [case.id for case in cases[:2]]


def test_unknown_routing_is_reported():
    with pytest.raises(EchoError, match=r"papers.*full, paper"):
        PipelineConfig("papers").routes()
