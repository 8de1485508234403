"""Show a question's options in other orders, for training and to measure how an option's position affects the answers.

Over all cyclic orders of a question, each letter is correct equally often. A model that considers only the content of
the options therefore chooses each letter equally often (Zheng et al., "Large Language Models Are Not Robust Multiple
Choice Selectors", arXiv 2309.03882).
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from echo_ft.experts.roles import DECIDE_INSTRUCTION
from echo_ft.records import LETTERS, Branch, Prediction, Question

_DECISION = re.compile(
    rf"(Question: [^\n]*\n)((?:[{LETTERS}]\. [^\n]*\n)+)((?:Reasoning: [^\n]*\n)?{re.escape(DECIDE_INSTRUCTION)})"
)
"""A decision as `roles.render` makes it, in three groups: before the options, the options, and after them."""

_NAMES_OTHERS = re.compile(
    rf"(?i:\b(?:all|any|both|either|neither|none|some) of (?:the|these)\b)|\b[{LETTERS}] (?:and|or) [{LETTERS}]\b"
)
"""Part of an option that refers to other options, such as `none of the above`. It must keep its position."""


@dataclass(frozen=True)
class PermutedPrediction(Prediction):
    """A prediction with rotated options. All fields use the original letters, except `text`."""

    shift: int = 0
    """Number of positions that each option was moved; 0 is the order of the question itself."""


def rotate_options(question: Question, shift: int) -> Question:
    """Move each option down by `shift` places, wrapping at the end, and append the shift to the question's id."""
    if shift == 0:
        return question
    texts = [question.options[original_letter(letter, question.options, shift)] for letter in question.options]
    return replace(question, id=f"{question.id}+{shift}", options=dict(zip(question.options, texts, strict=True)))


def shuffle_options(branch: Branch, seed: str) -> Branch:
    """Return a decision with shuffled options, and with the letter that the correct option then has as its completion.

    The order is drawn with `seed`. Two options are not shuffled, because MMAD and the datasets that are built here
    already ask yes or no in both orders. Options of which one refers to others, such as `none of the above`, are not
    shuffled either. A branch that is not a decision, or whose completion is not a letter, is returned unchanged.
    """
    parts = _DECISION.fullmatch(branch.prompt)
    options = parts.group(2).splitlines() if parts else []
    letters = [option[0] for option in options]
    if parts is None or len(options) < 3 or branch.completion not in letters:
        return branch
    if any(_NAMES_OTHERS.search(option[3:]) for option in options):
        return branch
    order = random.Random(f"options/{seed}/{branch.id}").sample(range(len(options)), len(options))
    lines = "".join(f"{letter}{options[source][1:]}\n" for letter, source in zip(letters, order, strict=True))
    right = letters[order.index(letters.index(branch.completion))]
    return Branch(branch.id, f"{parts.group(1)}{lines}{parts.group(3)}", right)


def original_letter(letter: str, options: Mapping[str, str], shift: int) -> str:
    """Return the original letter of the option shown as `letter` in `rotate_options(question, shift)`."""
    letters = list(options)
    return letters[(letters.index(letter) - shift) % len(letters)]


def mean_distribution(distributions: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    """Return the mean of distributions over the same options, or None if one of them is missing."""
    known = [one for one in distributions if one is not None]
    if not known or len(known) < len(distributions):
        return None
    return {letter: sum(one[letter] for one in known) / len(known) for letter in known[0]}


@dataclass(frozen=True)
class LetterBias:
    """How often one letter was chosen and correct, over all questions with the same number of options."""

    options: int
    letter: str
    chosen: float
    """Fraction of all answers that were this letter. Unparsed answers count as answers."""
    right: float
    """Fraction of all answers for which this letter was correct."""
    recall: float | None
    """Fraction of the questions with this correct letter that were answered with it; None if there are none."""
    answers: int


def position_bias(rows: Iterable[PermutedPrediction]) -> list[LetterBias]:
    """Return how often each letter was chosen and was correct, per number of options. Failed cases are left out."""
    chosen: defaultdict[tuple[str, ...], Counter[str | None]] = defaultdict(Counter)
    right: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    both: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row.error is not None:
            continue
        letters = tuple(row.options)
        # The inverse rotation gives the letters that the model saw.
        answer = original_letter(row.answer, row.options, -row.shift)
        predicted = None if row.parsed is None else original_letter(row.parsed, row.options, -row.shift)
        chosen[letters][predicted] += 1
        right[letters][answer] += 1
        both[letters][answer] += predicted == answer
    biases = []
    for letters in sorted(chosen, key=lambda letters: (len(letters), letters)):
        total = chosen[letters].total()
        for letter in letters:
            count = right[letters][letter]
            recall = both[letters][letter] / count if count else None
            biases.append(
                LetterBias(len(letters), letter, chosen[letters][letter] / total, count / total, recall, total)
            )
    return biases


def answer_consistency(rows: Iterable[PermutedPrediction]) -> tuple[float, int] | None:
    """Return the fraction of questions with the same answer in every order, and the number of questions.

    A question with an unparsed answer is not consistent. Failed cases are left out. Returns None if there are no
    questions.
    """
    answers: defaultdict[tuple[str, str], set[str | None]] = defaultdict(set)
    for row in rows:
        if row.error is None:
            answers[row.case, row.question].add(row.parsed)
    if not answers:
        return None
    consistent = sum(len(found) == 1 and None not in found for found in answers.values())
    return consistent / len(answers), len(answers)


def most_probable(probabilities: Mapping[str, float] | None) -> str | None:
    """Return the first option with the highest probability, or None if there are no probabilities."""
    return max(probabilities, key=probabilities.__getitem__) if probabilities else None
