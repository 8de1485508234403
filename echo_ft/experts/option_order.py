"""The order of options: a question under every cyclic permutation of them, and what a letter's place did to answers.

Over all cyclic permutations of a question each letter is right equally often, so that a model which looks at the
options alone chooses each equally often too (Zheng et al., "Large Language Models Are Not Robust Multiple Choice
Selectors", arXiv 2309.03882).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from echo_ft.records import Prediction, Question


@dataclass(frozen=True)
class Permuted(Prediction):
    """A decision with the options in another order; all its letters but those in `text` are of the question's own."""

    shift: int = 0
    """How many places each option had moved on; 0: none, which is the question as it is given."""


def cyclic_permutations(question: Question, shift: int) -> Question:
    """The question with each option `shift` places further on, the last ones first; its id tells the shift."""
    if shift == 0:
        return question
    texts = [question.options[own_letter(letter, question.options, shift)] for letter in question.options]
    return replace(question, id=f"{question.id}+{shift}", options=dict(zip(question.options, texts, strict=True)))


def own_letter(letter: str, options: Mapping[str, str], shift: int) -> str:
    """The question's own letter of the option that stands at `letter` in `permuted(question, shift)`."""
    letters = list(options)
    return letters[(letters.index(letter) - shift) % len(letters)]


def average(distributions: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    """The mean of distributions over the same options; None where one of them is not known."""
    known = [one for one in distributions if one is not None]
    if not known or len(known) < len(distributions):
        return None
    return {letter: sum(one[letter] for one in known) / len(known) for letter in known[0]}


@dataclass(frozen=True)
class LetterBias:
    """One letter in the orders that were shown, over all questions with as many options."""

    options: int
    letter: str
    chosen: float
    """Share of the answers that were this letter; those that are no letter are among the answers."""
    right: float
    """Share of the answers that should have been this letter."""
    recall: float | None
    """Of the answers that should have been this letter, the share that were; None where there are none."""
    answers: int


def position_bias(rows: Iterable[Permuted]) -> list[LetterBias]:
    """How often each letter was chosen and was right, for each number of options, failed cases left out."""
    chosen: defaultdict[tuple[str, ...], Counter[str | None]] = defaultdict(Counter)
    right: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    both: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row.error is not None:
            continue
        letters = tuple(row.options)
        # Back to what was shown: the other way round.
        answer = own_letter(row.answer, row.options, -row.shift)
        said = None if row.parsed is None else own_letter(row.parsed, row.options, -row.shift)
        chosen[letters][said] += 1
        right[letters][answer] += 1
        both[letters][answer] += said == answer
    places = []
    for letters in sorted(chosen, key=lambda letters: (len(letters), letters)):
        total = chosen[letters].total()
        for letter in letters:
            asked = right[letters][letter]
            recall = both[letters][letter] / asked if asked else None
            places.append(
                LetterBias(len(letters), letter, chosen[letters][letter] / total, asked / total, recall, total)
            )
    return places


def consistency(rows: Iterable[Permuted]) -> tuple[float, int] | None:
    """The share of questions whose answer is the same option in every order, and how many questions there are.

    Answers that are no letter are the same as no other. None without a question; failed cases are left out.
    """
    answers: defaultdict[tuple[str, str], set[str | None]] = defaultdict(set)
    for row in rows:
        if row.error is None:
            answers[row.case, row.question].add(row.parsed)
    if not answers:
        return None
    alike = sum(len(found) == 1 and None not in found for found in answers.values())
    return alike / len(answers), len(answers)


def most_probable(probabilities: Mapping[str, float] | None) -> str | None:
    """The option with the highest probability, the first of equal ones; None where there are no probabilities."""
    return max(probabilities, key=probabilities.__getitem__) if probabilities else None
