"""The four experts in order: extract the reference, guide, reason, decide.

The pipeline knows no model: it is given `speak(role, exchanges)`, which an `Engine` or any other backend provides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from echo_ft import roles
from echo_ft.records import LETTERS, Case, EchoError, Exchange, Prediction, Question, Trace, Upstream
from echo_ft.roles import ROUTINGS, Route


class Said(Protocol):
    """What a backend returns for one branch: the text, and the letters' log-probabilities as the first token."""

    @property
    def text(self) -> str: ...

    @property
    def letters(self) -> Mapping[str, float]: ...


Speak = Callable[[str, Sequence[Exchange]], Sequence[Sequence[Said]]]


@dataclass(frozen=True)
class Settings:
    """Which experts speak: a routing by kind of question, and switches that turn one off everywhere."""

    routing: str = "full"
    reference: str = "retrieved"
    """`retrieved`, `random` (chosen when the cases are loaded) or `none`."""
    knowledge: str = "guided"
    """`guided`, `all` or `none`."""
    reasoning: str = "on"

    def routes(self) -> dict[str, Route]:
        """The routing with the switches applied. Raises EchoError for an unknown routing."""
        if self.routing not in ROUTINGS:
            raise EchoError(f"no routing is named {self.routing!r}; choose from {', '.join(ROUTINGS)}")
        return {
            kind: Route(
                route.reference and self.reference != "none",
                route.knowledge and self.knowledge != "none",
                route.reasoning and self.reasoning == "on",
            )
            for kind, route in ROUTINGS[self.routing].items()
        }


@dataclass(frozen=True)
class Outcome:
    """All that a run says about one case."""

    predictions: list[Prediction]
    traces: list[Trace]


def run_cases(cases: Sequence[Case], speak: Speak, settings: Settings) -> list[Outcome]:
    """Run the experts over a batch of cases, role by role, so that a backend can batch."""
    routes = settings.routes()
    traces: list[list[Trace]] = [[] for _ in cases]
    upstreams = [Upstream() for _ in cases]
    decided: list[dict[str, Said]] = [{} for _ in cases]

    for role in roles.ROLES:
        exchanges: list[Exchange] = []
        owners: list[int] = []
        for index, case in enumerate(cases):
            made = roles.render(role, case.id, case.seen, upstreams[index], routes, settings.knowledge)
            exchanges += made
            owners += [index] * len(made)
        said: list[dict[str, Said]] = [{} for _ in cases]
        for owner, exchange, utterances in zip(owners, exchanges, speak(role, exchanges), strict=True):
            for branch, utterance in zip(exchange.branches, utterances, strict=True):
                said[owner][branch.id] = utterance
                traces[owner].append(
                    Trace(
                        exchange.case, role, branch.id, exchange.images, exchange.context, branch.prompt, utterance.text
                    )
                )
        for index, case in enumerate(cases):
            upstreams[index] = _listen(
                role, case, upstreams[index], {name: one.text for name, one in said[index].items()}
            )
            if role == "decision_maker":
                decided[index] = said[index]
    return [
        Outcome([_predict(case, question, said[question.id]) for question in case.seen.questions], trace)
        for case, said, trace in zip(cases, decided, traces, strict=True)
    ]


def run_or_fail(cases: Sequence[Case], speak: Speak, settings: Settings) -> list[Outcome]:
    """`run_cases`, but a case that cannot be shown (a broken image) fails alone: its predictions carry the error."""
    try:
        return run_cases(cases, speak, settings)
    except EchoError as error:
        if len(cases) > 1:
            return [outcome for case in cases for outcome in run_or_fail([case], speak, settings)]
        case = cases[0]
        return [Outcome([_prediction(case, question, "", error=str(error)) for question in case.seen.questions], [])]


def _listen(role: str, case: Case, upstream: Upstream, said: Mapping[str, str]) -> Upstream:
    if role == "reference_extractor" and said:
        references = case.seen.references
        best = roles.parse_best(said["best"], len(references))
        if best is None:  # it named no candidate: the retrieval's own first choice stands, and the trace shows the text
            best = min(range(len(references)), key=lambda index: references[index].rank)
        return replace(upstream, best=best, normal=said["normal"])
    if role == "knowledge_guide" and said:
        return replace(upstream, guide=said["guide"])
    if role == "reasoning_expert":
        return replace(upstream, reasons=dict(said))
    return upstream


def _predict(case: Case, question: Question, said: Said) -> Prediction:
    return _prediction(
        case,
        question,
        said.text,
        parsed=roles.parse_letter(said.text, question.options),
        probabilities=_over_options(said.letters, question.options),
    )


def _prediction(
    case: Case,
    question: Question,
    text: str,
    parsed: str | None = None,
    probabilities: dict[str, float] | None = None,
    error: str | None = None,
) -> Prediction:
    return Prediction(
        case=case.id,
        question=question.id,
        dataset=case.dataset,
        product=case.product,
        group=case.group,
        image=case.seen.query,
        condition=case.truth.condition,
        kind=question.kind,
        question_text=question.text,
        options=question.options,
        answer=case.truth.answers[question.id],
        text=text,
        parsed=parsed,
        probabilities=probabilities,
        error=error,
    )


def _over_options(letters: Mapping[str, float], options: Mapping[str, str]) -> dict[str, float] | None:
    """Softmax of the letters' log-probabilities over the question's own options; None where a backend gives none."""
    present = [letter for letter in LETTERS if letter in options]
    if not all(letter in letters for letter in present):
        return None
    highest = max(letters[letter] for letter in present)
    weights = {letter: math.exp(letters[letter] - highest) for letter in present}
    total = sum(weights.values())
    return {letter: weight / total for letter, weight in weights.items()}
