"""Run the four experts in order: extract the reference, guide, reason, decide.

The pipeline is independent of the model. It calls `generate(role, exchanges)`, which an `Engine`, a `Server` or any
other backend provides.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from echo_ft.errors import EchoError
from echo_ft.experts import roles
from echo_ft.experts.option_order import (
    PermutedPrediction,
    mean_distribution,
    most_probable,
    original_letter,
    rotate_options,
)
from echo_ft.experts.roles import ROUTINGS, Route
from echo_ft.images.boxes import format_boxes, parse_boxes
from echo_ft.records import GROUNDING, LETTERS, Case, Exchange, Generation, Prediction, Question, Seen, Trace, Upstream

Generate = Callable[[str, Sequence[Exchange]], Sequence[Sequence[Generation]]]
AsyncGenerate = Callable[[str, Sequence[Exchange]], Awaitable[Sequence[Sequence[Generation]]]]


class BackendError(EchoError):
    """The backend does not work. The run stops without marking any case as failed."""


@dataclass(frozen=True)
class PipelineConfig:
    """How a run consults the experts for each question type, and how it decides. Switches turn off single experts."""

    routing: str = "full"
    reference: str = "retrieved"
    """`retrieved`, `random` (chosen when the cases are loaded) or `none`."""
    knowledge: str = "guided"
    """`guided`, `all` or `none`."""
    reasoning: str = "on"
    answer: str = "generate"
    """How to decide: `generate` parses the text strictly, `logits` takes the most probable option, and `averaged` takes
    the most probable option on average over the option orders. Boxes are always parsed from text."""
    option_order: str = "given"
    """`given`, or `cyclic` to ask the decision maker in every cyclic order of the options."""

    def routes(self) -> dict[str, Route]:
        """Apply the switches to the routing. Raises EchoError for an unknown routing."""
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
    """Everything that a run produces for one case."""

    predictions: list[Prediction]
    traces: list[Trace]
    permuted: list[PermutedPrediction] = field(default_factory=list)
    """With `option_order="cyclic"`, one prediction for each order of each question, including the given order."""


def run_cases(cases: Sequence[Case], generate: Generate, config: PipelineConfig) -> list[Outcome]:
    """Run the experts over a batch of cases, role by role, so that a backend can batch."""
    runs = [run_case(case, config) for case in cases]
    requests = [next(run) for run in runs]
    outcomes: list[Outcome] = []
    while requests:
        generations = iter(generate(requests[0][0], [exchange for _, exchanges in requests for exchange in exchanges]))
        following = []
        for run, (_, exchanges) in zip(runs, requests, strict=True):
            try:
                following.append(run.send(list(islice(generations, len(exchanges)))))
            except StopIteration as end:
                outcomes.append(end.value)
        requests = following
    return outcomes


def run_or_fail(cases: Sequence[Case], generate: Generate, config: PipelineConfig) -> list[Outcome]:
    """Run cases as `run_cases` does, but fail only the cases whose images are broken.

    The predictions of a failed case carry the error. Raises BackendError if the backend itself fails.
    """
    try:
        return run_cases(cases, generate, config)
    except BackendError:
        raise
    except EchoError as error:
        reason = str(error)
    # Outside the handler, whose traceback would keep the tensors of the failed attempt alive.
    if len(cases) > 1:
        return [outcome for case in cases for outcome in run_or_fail([case], generate, config)]
    return [_failed(cases[0], reason)]


async def run_cases_async(
    cases: Iterable[Case],
    generate: AsyncGenerate,
    config: PipelineConfig,
    concurrency: int,
    write: Callable[[Case, Outcome], None],
) -> None:
    """Run the experts on an asynchronous backend, with `concurrency` independent cases in flight.

    Each outcome is passed to `write` as soon as it is complete. Broken cases fail as in `run_or_fail`. Raises
    BackendError if the backend itself fails.
    """
    remaining = iter(cases)

    async def work() -> None:
        for case in remaining:
            write(case, await _run_case_async(case, generate, config))

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:  # if one worker raised, stop the others before the backend is closed
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _run_case_async(case: Case, generate: AsyncGenerate, config: PipelineConfig) -> Outcome:
    run = run_case(case, config)
    try:
        role, exchanges = next(run)
        while True:
            role, exchanges = run.send(await generate(role, exchanges))
    except StopIteration as end:
        return end.value
    except BackendError:
        raise
    except EchoError as error:
        return _failed(case, str(error))


def run_case(
    case: Case, config: PipelineConfig, traces: list[Trace] | None = None
) -> Generator[tuple[str, list[Exchange]], Sequence[Sequence[Generation]], Outcome]:
    """Run the experts on one case. The caller drives the generator and owns the backend.

    Yields each role with its exchanges (possibly none), receives their generations, and returns the outcome. To show
    the roles' outputs before the end, pass an empty list as `traces`; each role's traces are appended to it.
    """
    routes = config.routes()
    upstream = Upstream()
    traces = [] if traces is None else traces
    generated: dict[str, Generation] = {}
    boxed = {question.id for question in case.seen.questions if question.kind == GROUNDING}
    for role in roles.ROLES:
        seen = case.seen
        if role == "decision_maker" and config.option_order == "cyclic":
            seen, upstream = _in_every_order(seen, upstream)
        exchanges = roles.render(role, case.id, seen, upstream, routes, config.knowledge)
        generated = {}
        for exchange, generations in zip(exchanges, (yield role, exchanges), strict=True):
            for branch, generation in zip(exchange.branches, generations, strict=True):
                generated[branch.id] = generation
                context = exchange.images, exchange.context
                # If probabilities decide, the generated letter is not used and may be limited to one token on purpose.
                used = role != "decision_maker" or config.answer == "generate" or branch.id in boxed
                cut = generation.cut and used
                traces.append(Trace(exchange.case, role, branch.id, *context, branch.prompt, generation.text, cut))
        upstream = update_upstream(role, case, upstream, {name: one.text for name, one in generated.items()})
    # The last role is the decision maker, so its generations are the answers.
    outcome = Outcome([], traces)
    for question in case.seen.questions:
        if question.id in boxed:
            outcome.predictions.append(_predict_boxes(case, question, generated[question.id]))
            continue
        shifts = range(len(question.options) if config.option_order == "cyclic" else 1)
        orders = [
            _predict(case, question, generated[rotate_options(question, shift).id], config, shift) for shift in shifts
        ]
        outcome.predictions.append(_averaged(case, question, orders) if config.answer == "averaged" else orders[0])
        if config.option_order == "cyclic":
            outcome.permuted.extend(PermutedPrediction(**vars(one), shift=shift) for shift, one in enumerate(orders))
    return outcome


def _in_every_order(seen: Seen, upstream: Upstream) -> tuple[Seen, Upstream]:
    """Repeat each question in all cyclic orders. All share the same reasoning, which was generated without options."""
    orders = [
        (rotate_options(question, shift), upstream.reasons.get(question.id, ""))
        for question in seen.questions
        for shift in range(max(len(question.options), 1))  # a question without options has one order
    ]
    reasons = {question.id: reason for question, reason in orders}
    return replace(seen, questions=tuple(question for question, _ in orders)), replace(upstream, reasons=reasons)


def update_upstream(role: str, case: Case, upstream: Upstream, texts: Mapping[str, str]) -> Upstream:
    """Add the output of `role` (branch id to generated text) to the outputs of the earlier roles."""
    if role == "reference_extractor" and texts:
        references = case.seen.references
        best = roles.parse_best(texts["best"], len(references))
        if best is None:  # The text names no candidate, so use the best-ranked one. The trace keeps the text.
            best = min(range(len(references)), key=lambda index: references[index].rank)
        return replace(upstream, best=best, normal=texts["normal"])
    if role == "knowledge_guide" and texts:
        return replace(upstream, guide=texts["guide"])
    if role == "reasoning_expert":
        return replace(upstream, reasons=dict(texts))
    return upstream


def _predict(case: Case, question: Question, generation: Generation, config: PipelineConfig, shift: int) -> Prediction:
    """Return the decision with options rotated by `shift`, in the question's original letters."""
    shown = rotate_options(question, shift).options
    probabilities = _over_options(generation.letters, shown)
    if probabilities is not None:
        own = {original_letter(letter, shown, shift): value for letter, value in probabilities.items()}
        probabilities = {letter: own[letter] for letter in probabilities}
    if config.answer != "generate":
        # A server returns only the most probable tokens, so a missing letter is less probable than those returned.
        returned = {
            original_letter(letter, shown, shift): generation.letters[letter]
            for letter in shown
            if letter in generation.letters
        }
        letter = most_probable({letter: returned[letter] for letter in shown if letter in returned})
        return _prediction(case, question, letter or "", parsed=letter, probabilities=probabilities)
    parsed = roles.parse_letter(generation.text, shown)
    if parsed is not None:
        parsed = original_letter(parsed, shown, shift)
    return _prediction(case, question, generation.text, parsed=parsed, probabilities=probabilities)


def _predict_boxes(case: Case, question: Question, generation: Generation) -> Prediction:
    """Return the boxes in the text. Text that was cut off may lack boxes, so it counts as unparsed."""
    found = None if generation.cut else parse_boxes(generation.text)
    return _prediction(case, question, generation.text, parsed=None if found is None else format_boxes(found))


def _averaged(case: Case, question: Question, orders: Sequence[Prediction]) -> Prediction:
    probabilities = mean_distribution([one.probabilities for one in orders])
    letter = most_probable(probabilities)
    return _prediction(case, question, letter or "", parsed=letter, probabilities=probabilities)


def _failed(case: Case, reason: str) -> Outcome:
    return Outcome([_prediction(case, question, "", error=reason) for question in case.seen.questions], [])


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
    """Return the softmax of the letters' log-probabilities, or None if the backend returned too few letters."""
    present = [letter for letter in LETTERS if letter in options]
    if not all(letter in letters for letter in present):
        return None
    highest = max(letters[letter] for letter in present)
    weights = {letter: math.exp(letters[letter] - highest) for letter in present}
    total = sum(weights.values())
    return {letter: weight / total for letter, weight in weights.items()}
