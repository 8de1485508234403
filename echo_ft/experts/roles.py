"""The four roles of Echo (arXiv 2501.15795): render their prompts and parse their outputs.

`render` makes all prompts, for training and inference. It receives `Seen` and the outputs of the earlier roles, but
never the truth. In training rows, these outputs are gold, which means derived from the truth. Images come first, then
the context that all branches of a case share, and then the branch (`Exchange`), so shared parts are computed only once.

If you change the text of a prompt, increase `PROMPT_VERSION`. The golden files in tests/golden pin both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from echo_ft.errors import EchoError
from echo_ft.records import (
    ANSWERABLE,
    GOOD,
    GROUNDING,
    LETTERS,
    QUESTION_TYPES,
    ROBUSTMAD_TYPES,
    ROLES,
    UNANSWERABLE,
    Branch,
    Exchange,
    Question,
    Seen,
    Upstream,
)

PROMPT_VERSION = "2"


@dataclass(frozen=True)
class Route:
    """Which experts support the decision maker for one question type."""

    reference: bool = True
    knowledge: bool = True
    reasoning: bool = True


ROUTINGS: Mapping[str, Mapping[str, Route]] = {
    # A product's knowledge states its name, which is the answer to Object Classification. The knowledge may also
    # contain the answer to Object Analysis, the description of a normal part. In training rows, it always does, word
    # for word.
    "full": {kind: Route(knowledge=kind != "Object Classification") for kind in (*QUESTION_TYPES, GROUNDING)}
    | {
        # Knowledge would reveal whether the question names another product.
        UNANSWERABLE: Route(knowledge=False),
        ANSWERABLE: Route(knowledge=False),
        ROBUSTMAD_TYPES["general"]: Route(reference=False, knowledge=False),
        ROBUSTMAD_TYPES["standalone"]: Route(reference=False),
        ROBUSTMAD_TYPES["pairwise"]: Route(),
        ROBUSTMAD_TYPES["unanswerable"]: Route(reference=False, knowledge=False),
    },
    # The routes of Echo's published code. Echo does not have the two Object types and Defect Grounding. Here, they get
    # only the reference, as Anomaly Detection does.
    "paper": {
        "Anomaly Detection": Route(True, False, False),
        "Defect Classification": Route(True, True, False),
        "Defect Localization": Route(False, False, False),
        "Defect Description": Route(True, True, True),
        "Defect Analysis": Route(True, False, True),
        "Object Classification": Route(True, False, False),
        "Object Analysis": Route(True, False, False),
        GROUNDING: Route(True, False, False),
        UNANSWERABLE: Route(True, False, False),
        ANSWERABLE: Route(True, False, False),
        # RobustMAD shows the reference only for questions about two images.
        **{kind: Route(kind == ROBUSTMAD_TYPES["pairwise"], False, False) for kind in ROBUSTMAD_TYPES.values()},
    },
}

BEST_PROMPT = "Which candidate is the best baseline for the last image? Answer with its number."
NORMAL_PROMPT = "What does a normal part look like here?"
GUIDE_PROMPT = "Which of these conditions matters here, and what should be looked for?"
REASON_INSTRUCTION = "Observe, compare with what is normal, then conclude, in a few short sentences."
DECIDE_INSTRUCTION = "Answer with the letter of the correct option only."
GROUND_INSTRUCTION = (
    "Answer only with a box (x0,y0),(x1,y1) for each defect, in thousandths of the width and height of the last image, "
    "or with the word none."
)


def group_by_route(
    questions: tuple[Question, ...], routes: Mapping[str, Route]
) -> list[tuple[Route, tuple[Question, ...]]]:
    """Group questions by route, in order of first appearance. The questions in a group share images and context."""
    grouped: dict[Route, list[Question]] = {}
    for question in questions:
        grouped.setdefault(routes[question.kind], []).append(question)
    return [(route, tuple(members)) for route, members in grouped.items()]


def render(
    role: str,
    case: str,
    seen: Seen,
    upstream: Upstream = Upstream(),
    routes: Mapping[str, Route] = ROUTINGS["full"],
    knowledge: str = "guided",
) -> list[Exchange]:
    """Return the exchanges of `role` about a case. Their completions are None.

    Questions that share a route share an exchange. The first two roles do not see questions and get at most one
    exchange. `knowledge` is `guided` (the knowledge guide's output), `all` (every entry of the product) or `none`.
    Returns an empty list if no question needs this role. Raises EchoError for an unknown role.
    """
    if role == "reference_extractor":
        return _reference_extractor(case, seen, routes)
    if role == "knowledge_guide":
        return _knowledge_guide(case, seen, upstream, routes, knowledge)
    if role in ("reasoning_expert", "decision_maker"):
        return _per_question(role, case, seen, upstream, routes, knowledge)
    raise EchoError(f"no role is named {role!r}; the roles are {', '.join(ROLES)}")


def _reference_extractor(case: str, seen: Seen, routes: Mapping[str, Route]) -> list[Exchange]:
    if not seen.references or not any(routes[question.kind].reference for question in seen.questions):
        return []
    count = len(seen.references)
    candidates = f"The first {count} images are candidates 1 to {count}, normal parts."
    if count == 1:
        candidates = "The first image is candidate 1, a normal part."
    context = f"{candidates} The last image is the part under inspection.\n"
    images = (*(reference.image for reference in seen.references), seen.query)
    branches = (Branch("best", BEST_PROMPT), Branch("normal", NORMAL_PROMPT))
    return [Exchange("reference_extractor", case, images, context, branches, PROMPT_VERSION)]


def _knowledge_guide(
    case: str, seen: Seen, upstream: Upstream, routes: Mapping[str, Route], knowledge: str
) -> list[Exchange]:
    needed = any(routes[question.kind].knowledge for question in seen.questions)
    if knowledge != "guided" or not seen.knowledge or not needed:
        return []
    images, context = _images_and_context(seen, upstream, any(route.reference for route in routes.values()))
    context += f"Known conditions of this part:\n{knowledge_lines(seen)}"
    return [Exchange("knowledge_guide", case, images, context, (Branch("guide", GUIDE_PROMPT),), PROMPT_VERSION)]


def _per_question(
    role: str, case: str, seen: Seen, upstream: Upstream, routes: Mapping[str, Route], knowledge: str
) -> list[Exchange]:
    exchanges = []
    for route, questions in group_by_route(seen.questions, routes):
        if role == "reasoning_expert" and not route.reasoning:
            continue
        images, context = _images_and_context(seen, upstream, route.reference)
        if role == "reasoning_expert" and route.reference and route.knowledge and upstream.normal:
            context += f"Normal: {one_line(upstream.normal)}\n"
        if route.knowledge and knowledge == "all" and seen.knowledge:
            context += f"Known conditions of this part:\n{knowledge_lines(seen)}"
        elif route.knowledge and knowledge == "guided" and upstream.guide:
            context += f"Guide: {one_line(upstream.guide)}\n"
        prompt = _reasoning if role == "reasoning_expert" else _decision
        branches = tuple(Branch(question.id, prompt(question, upstream, route)) for question in questions)
        exchanges.append(Exchange(role, case, images, context, branches, PROMPT_VERSION))
    return exchanges


def _images_and_context(seen: Seen, upstream: Upstream, reference: bool) -> tuple[tuple[str, ...], str]:
    if reference and seen.references:
        best = seen.references[upstream.best].image
        return (best, seen.query), "The first image is a normal part. The second image is the part under inspection.\n"
    return (seen.query,), "The image is the part under inspection.\n"


def _reasoning(question: Question, upstream: Upstream, route: Route) -> str:
    return f"Question: {one_line(question.text)}\n{REASON_INSTRUCTION}"


def _decision(question: Question, upstream: Upstream, route: Route) -> str:
    options = "".join(f"{letter}. {one_line(text)}\n" for letter, text in question.options.items())
    reason = upstream.reasons.get(question.id, "") if route.reasoning else ""
    reasoning = f"Reasoning: {one_line(reason)}\n" if reason else ""
    instruction = GROUND_INSTRUCTION if question.kind == GROUNDING else DECIDE_INSTRUCTION
    return f"Question: {one_line(question.text)}\n{options}{reasoning}{instruction}"


def knowledge_lines(seen: Seen) -> str:
    """Return the product's knowledge, one line per entry."""
    return "".join(f"- {one_line(entry.condition)}: {one_line(entry.description)}\n" for entry in seen.knowledge)


@lru_cache(maxsize=1024)  # the same strings occur in many prompts
def one_line(text: str) -> str:
    """Collapse whitespace, so that data cannot change the layout of a prompt."""
    return " ".join(text.split())


def best_completion(best: int) -> str:
    """Return the reference extractor's completion for candidate `best`, counted from 0."""
    return str(best + 1)


def guide_completion(condition: str, hint: str, description: str) -> str:
    """Return the knowledge guide's completion for an entry. For a defect, it includes a `hint` to look for it."""
    if condition == GOOD:
        return f"{GOOD}: {one_line(description)}"
    return f"{condition}: {hint} {one_line(description)}"


def parse_best(text: str, count: int) -> int | None:
    """Return the candidate that the text names, counting from 0, or None if it names none of the `count` candidates."""
    # At most nine digits are allowed, because `int` refuses numbers of thousands of digits. Without strip(), matching
    # trailing spaces takes quadratic time.
    match = re.fullmatch(r"(?:candidate\s*)?(\d{1,9})\s*\.?", text.strip(), flags=re.IGNORECASE)
    number = int(match.group(1)) if match else 0
    return number - 1 if 1 <= number <= count else None


def parse_letter(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that a decision names, or None if the text cannot be parsed. The letter is never guessed.

    The text may consist of the letter with the usual punctuation (`B`, `B.`, `(B)`, `B:`), or the letter followed by
    exactly the text of that option (`B. Crack.`).
    """
    match = re.fullmatch(rf"\(?([{LETTERS}])\)?[.:]?(\s.*)?", text.strip(), flags=re.DOTALL)
    if not match or match.group(1) not in options:
        return None
    rest = match.group(2)
    return match.group(1) if not rest or one_line(rest) == one_line(options[match.group(1)]) else None
