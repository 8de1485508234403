"""The four experts in order: extract the reference, guide, reason, decide.

The pipeline knows no model: it is given `generate(role, exchanges)`, which an `Engine`, a `Server` or any other backend
provides.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from echo_ft.errors import EchoError
from echo_ft.experts import roles
from echo_ft.experts.option_order import Permuted, average, cyclic_permutations, most_probable, own_letter
from echo_ft.experts.roles import ROUTINGS, Route
from echo_ft.records import LETTERS, Case, Exchange, Generation, Prediction, Question, Seen, Trace, Upstream

Generate = Callable[[str, Sequence[Exchange]], Sequence[Sequence[Generation]]]
AsyncGenerate = Callable[[str, Sequence[Exchange]], Awaitable[Sequence[Sequence[Generation]]]]


class BackendError(EchoError):
    """The backend itself does not work: the run stops, and no case is marked as failed."""


@dataclass(frozen=True)
class PipelineConfig:
    """Which experts are consulted: a routing by kind of question, switches that turn one off everywhere, and what decides."""

    routing: str = "full"
    reference: str = "retrieved"
    """`retrieved`, `random` (chosen when the cases are loaded) or `none`."""
    knowledge: str = "guided"
    """`guided`, `all` or `none`."""
    reasoning: str = "on"
    answer: str = "generate"
    """What decides: `generate`, the text, read strictly, `logits`, the most probable option at its place, or
    `averaged`, the most probable one on the mean over the orders of the options."""
    option_order: str = "given"
    """`given`, or `cyclic`: the decision maker is asked in every cyclic permutation of the options."""

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
    permuted: list[Permuted] = field(default_factory=list)
    """Where options are permuted, a decision for each order of each question, the given one among them."""


def run_cases(cases: Sequence[Case], generate: Generate, settings: PipelineConfig) -> list[Outcome]:
    """Run the experts over a batch of cases, role by role, so that a backend can batch."""
    interviews = [run_case(case, settings) for case in cases]
    asked = [next(one) for one in interviews]
    outcomes: list[Outcome] = []
    while asked:
        said = iter(generate(asked[0][0], [exchange for _, exchanges in asked for exchange in exchanges]))
        following = []
        for one, (_, exchanges) in zip(interviews, asked, strict=True):
            try:
                following.append(one.send(list(islice(said, len(exchanges)))))
            except StopIteration as end:
                outcomes.append(end.value)
        asked = following
    return outcomes


def run_or_fail(cases: Sequence[Case], generate: Generate, settings: PipelineConfig) -> list[Outcome]:
    """`run_cases`, but a case that cannot be shown (a broken image) fails alone: its predictions carry the error."""
    try:
        return run_cases(cases, generate, settings)
    except BackendError:
        raise
    except EchoError as error:
        if len(cases) > 1:
            return [outcome for case in cases for outcome in run_or_fail([case], generate, settings)]
        return [_failed(cases[0], error)]


async def run_cases_async(
    cases: Iterable[Case],
    generate: AsyncGenerate,
    settings: PipelineConfig,
    at_once: int,
    write: Callable[[Case, Outcome], None],
) -> None:
    """Run the experts on a backend that is awaited: `at_once` cases under way, none of which waits for another.

    `write` gets each outcome as soon as it is there. A case that cannot be shown fails alone, as in `run_or_fail`.
    """
    remaining = iter(cases)

    async def work() -> None:
        for case in remaining:
            write(case, await _run_alone(case, generate, settings))

    workers = [asyncio.create_task(work()) for _ in range(at_once)]
    try:
        await asyncio.gather(*workers)
    finally:  # where one raised, the others end before the backend is closed
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _run_alone(case: Case, generate: AsyncGenerate, settings: PipelineConfig) -> Outcome:
    one = run_case(case, settings)
    try:
        role, exchanges = next(one)
        while True:
            role, exchanges = one.send(await generate(role, exchanges))
    except StopIteration as end:
        return end.value
    except BackendError:
        raise
    except EchoError as error:
        return _failed(case, error)


def run_case(
    case: Case, settings: PipelineConfig
) -> Generator[tuple[str, list[Exchange]], Sequence[Sequence[Generation]], Outcome]:
    """One case's way through the experts, for whoever drives a backend.

    Yields each role with what it is asked (which may be nothing), is sent what it said, and returns the outcome.
    """
    routes = settings.routes()
    upstream = Upstream()
    traces: list[Trace] = []
    said: dict[str, Generation] = {}
    for role in roles.ROLES:
        seen = case.seen
        if role == "decision_maker" and settings.option_order == "cyclic":
            seen, upstream = _in_every_order(seen, upstream)
        exchanges = roles.render(role, case.id, seen, upstream, routes, settings.knowledge)
        said = {}
        for exchange, generations in zip(exchanges, (yield role, exchanges), strict=True):
            for branch, utterance in zip(exchange.branches, generations, strict=True):
                said[branch.id] = utterance
                traces.append(
                    Trace(
                        exchange.case, role, branch.id, exchange.images, exchange.context, branch.prompt, utterance.text
                    )
                )
        upstream = update_upstream(role, case, upstream, {name: one.text for name, one in said.items()})
    # The last role decides: what was said last are the answers.
    outcome = Outcome([], traces)
    for question in case.seen.questions:
        shifts = range(len(question.options) if settings.option_order == "cyclic" else 1)
        orders = [
            _predict(case, question, said[cyclic_permutations(question, shift).id], settings, shift) for shift in shifts
        ]
        outcome.predictions.append(_averaged(case, question, orders) if settings.answer == "averaged" else orders[0])
        if settings.option_order == "cyclic":
            outcome.permuted.extend(Permuted(**vars(one), shift=shift) for shift, one in enumerate(orders))
    return outcome


def _in_every_order(seen: Seen, upstream: Upstream) -> tuple[Seen, Upstream]:
    """Each question in all cyclic permutations of its options, with the same reasons, which were given without them."""
    orders = [
        (cyclic_permutations(question, shift), upstream.reasons.get(question.id, ""))
        for question in seen.questions
        for shift in range(len(question.options))
    ]
    reasons = {question.id: reason for question, reason in orders}
    return replace(seen, questions=tuple(question for question, _ in orders)), replace(upstream, reasons=reasons)


def update_upstream(role: str, case: Case, upstream: Upstream, said: Mapping[str, str]) -> Upstream:
    """What is known after `role` has said `said` (branch to text) about a case, beside what the earlier ones said."""
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


def _predict(case: Case, question: Question, said: Generation, settings: PipelineConfig, shift: int) -> Prediction:
    """What was decided with the options `shift` places further on, in the question's own letters."""
    shown = cyclic_permutations(question, shift).options
    probabilities = _over_options(said.letters, shown)
    if probabilities is not None:
        own = {own_letter(letter, shown, shift): value for letter, value in probabilities.items()}
        probabilities = {letter: own[letter] for letter in probabilities}
    if settings.answer != "generate":
        # A server tells the most probable tokens: a letter that is not among them is less probable than those that are.
        heard = {own_letter(letter, shown, shift): said.letters[letter] for letter in shown if letter in said.letters}
        letter = most_probable({letter: heard[letter] for letter in shown if letter in heard})
        return _prediction(case, question, letter or "", parsed=letter, probabilities=probabilities)
    parsed = roles.parse_letter(said.text, shown)
    if parsed is not None:
        parsed = own_letter(parsed, shown, shift)
    return _prediction(case, question, said.text, parsed=parsed, probabilities=probabilities)


def _averaged(case: Case, question: Question, orders: Sequence[Prediction]) -> Prediction:
    probabilities = average([one.probabilities for one in orders])
    letter = most_probable(probabilities)
    return _prediction(case, question, letter or "", parsed=letter, probabilities=probabilities)


def _failed(case: Case, error: EchoError) -> Outcome:
    return Outcome([_prediction(case, question, "", error=str(error)) for question in case.seen.questions], [])


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
