"""Scores for the experts before the decision: what they said in a run, beside what the truth would have them say.

What is said is read strictly, as the decision is: an answer that is none of those that the role can give is wrong and
counted (`unread`), never guessed. Intervals are those of the run's own figures, over the same parts (`metrics.share`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from echo_ft.data.knowledge import sentences
from echo_ft.errors import EchoError
from echo_ft.experts.roles import one_line, parse_best
from echo_ft.experts.targets import defect_mask, gold_upstream
from echo_ft.images import masks
from echo_ft.images.decode import READERS
from echo_ft.metrics import calibration, intervals
from echo_ft.metrics.figures import figure_interval
from echo_ft.metrics.prediction_table import PredictionTable
from echo_ft.records import Case, Entry, Reference, Trace

BEST, CONDITION, PLACE, TOUCHED, CONCLUSION = "best_reference", "condition", "place", "place_touched", "conclusion"
"""What is judged: the extractor's choice, the guide's condition, the reasoner's place and conclusion."""

RECALL = "condition_recall"
"""The guide's condition once more, as the mean over the conditions that the parts have."""

_PLACES = re.compile(rf"\b({'|'.join(sorted([*masks.PLACES, masks.SPREAD], key=len, reverse=True))})\b")


@dataclass(frozen=True)
class Verdict:
    """Whether one thing that an expert said is right."""

    figure: str
    case: str
    right: bool
    read: bool
    """False where it said nothing that could be right or wrong; then it counts as wrong."""
    chance: float | None = None
    """How often a blind choice would be right, where there is one."""


def expert_figures(
    table: PredictionTable, cases: Sequence[Case], traces: Iterable[Trace], root: Path
) -> dict[str, Any]:
    """{`figures`: by name, from 0 to 1, `conditions`: the guide's by condition, `unreadable`: why cases are left out}.

    `cases` are of the dataset that the run was on, `traces` those of the run; a case that failed has none. A figure is
    left out where no expert was asked for it.
    """
    said: dict[str, dict[tuple[str, str], Trace]] = {}
    for trace in traces:
        said.setdefault(trace.case, {})[trace.role, trace.branch] = trace
    decided = {(one.case, one.question): one.parsed for one in table.predictions}
    images = {one.case: image for one, image in zip(table.predictions, table.image_of, strict=True)}
    asked = [case for case in cases if case.id in images and case.id in said]
    verdicts = [verdict for case in asked for verdict in judge_words(case, said[case.id], decided)]
    looked = _looked(asked, said, root)
    verdicts += [verdict for found in looked if not isinstance(found, EchoError) for verdict in found]
    weights = table.weights()
    scores = {}
    for name in (BEST, CONDITION, PLACE, TOUCHED, CONCLUSION):
        own = [verdict for verdict in verdicts if verdict.figure == name]
        if own:
            scores[name] = _figure(table, weights, images, own)
    conditions = {case.id: f"{case.dataset}/{case.product}/{case.truth.condition}" for case in asked}
    by_condition: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.figure == CONDITION:
            by_condition.setdefault(conditions[verdict.case], []).append(verdict)
    if by_condition:
        scores[RECALL] = {**scores[CONDITION], **_mean(table, images, list(by_condition.values()))}
    return {
        "figures": scores,
        "conditions": {
            name: {"texts": len(own), "recall": float(np.mean([verdict.right for verdict in own]))}
            for name, own in sorted(by_condition.items())
        },
        "unreadable": [str(found) for found in looked if isinstance(found, EchoError)],
    }


def _looked(
    cases: Sequence[Case], said: Mapping[str, Mapping[tuple[str, str], Trace]], root: Path
) -> list[list[Verdict] | EchoError]:
    """`judge_by_images` of each case, or why it cannot be."""

    def look(case: Case) -> list[Verdict] | EchoError:
        try:
            return judge_by_images(case, said[case.id], root)
        except EchoError as error:
            return error

    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(look, cases)
        return list(tqdm(found, "reading for the experts' scores", len(cases), leave=False, disable=None))


def _figure(
    table: PredictionTable, weights: np.ndarray, images: Mapping[str, int], verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    """The share that is right, its interval, chance where there is one for all, and what it rests on."""
    places = np.array([images[verdict.case] for verdict in verdicts])
    right = np.array([verdict.right for verdict in verdicts])
    value, interval = calibration.agreement_share(table, weights, places, right)
    return {
        "value": value,
        "interval": interval,
        "chance": _chance(verdicts),
        "texts": len(verdicts),
        "cases": len({verdict.case for verdict in verdicts}),
        "unread": sum(not verdict.read for verdict in verdicts),
    }


def _chance(verdicts: Sequence[Verdict]) -> float | None:
    """How often blind choices would be right, where there are any."""
    chances = [verdict.chance for verdict in verdicts if verdict.chance is not None]
    return float(np.mean(chances)) if chances else None


def _mean(table: PredictionTable, images: Mapping[str, int], groups: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    """The unweighted mean of the groups' shares, its interval, and its chance.

    Parts are resampled within their group, so that none is ever without a part and left out of the mean; each group
    takes a degree of freedom. What a resample of n parts leaves out of their spread, a factor of sqrt(1 - 1 / n), is
    much where a condition has few, and is put back group by group. A condition of one part has no spread to draw from:
    then there is no interval.
    """
    units: dict[tuple[int, int], list[bool]] = {}
    for number, own in enumerate(groups):
        for verdict in own:
            units.setdefault((number, int(table.parts[images[verdict.case]])), []).append(verdict.right)
    group = np.array([number for number, _ in units])
    asked, right = np.array([len(one) for one in units.values()]), np.array([sum(one) for one in units.values()])
    weights = intervals.resample(group.tolist())
    sizes = np.bincount(group)
    shares, spreads = [], []
    for number, own in enumerate(groups):
        own_units = group == number
        drawn = weights[:, own_units]
        shares.append(float(np.mean([verdict.right for verdict in own])))
        deviations = (drawn @ right[own_units]) / (drawn @ asked[own_units]) - shares[-1]
        spreads.append(shares[-1] + deviations / np.sqrt(1 - 1 / max(sizes[number], 2)))
    free = len(units) - len(groups) + 1
    spread = np.clip(np.mean(spreads, axis=0), 0, 1)
    return {
        "value": float(np.mean(shares)),
        "interval": figure_interval(spread, free) if sizes.min() > 1 else None,
        "chance": float(np.mean([chance for own in groups if (chance := _chance(own)) is not None])),
    }


def judge_words(
    case: Case, said: Mapping[tuple[str, str], Trace], decided: Mapping[tuple[str, str], str | None]
) -> list[Verdict]:
    """What can be judged by the records: the guide's condition, and each conclusion beside the decision made on it.

    `said` are the case's traces by role and branch, `decided` the letters by case and question. A case whose condition
    has no entry is no question to the guide that it could answer.
    """
    verdicts = []
    guide = said.get(("knowledge_guide", "guide"))
    if guide is not None and any(entry.condition == case.truth.condition for entry in case.seen.knowledge):
        named = named_condition(guide.text, case.seen.knowledge)
        right, chance = named == case.truth.condition, 1 / len(case.seen.knowledge)
        verdicts.append(Verdict(CONDITION, case.id, right, named is not None, chance))
    for question in case.seen.questions:
        reasoning = said.get(("reasoning_expert", question.id))
        if reasoning is not None and (case.id, question.id) in decided:
            letter = concluded(reasoning.text, question.options)
            agrees = letter is not None and letter == decided[case.id, question.id]
            verdicts.append(Verdict(CONCLUSION, case.id, agrees, letter is not None))
    return verdicts


def judge_by_images(case: Case, said: Mapping[tuple[str, str], Trace], root: Path) -> list[Verdict]:
    """What takes the photographs and the mask: the extractor's choice among several candidates, the reasoner's places.

    The best candidate is that of `targets.gold_upstream` among those that the extractor was shown. Raises EchoError
    where an image or the mask cannot be read.
    """
    verdicts = []
    choice = said.get(("reference_extractor", "best"))
    if choice is not None and len(choice.images) > 2:
        *candidates, _ = choice.images
        shown = tuple(Reference(case.id, image, 0.0, rank) for rank, image in enumerate(candidates, start=1))
        best = gold_upstream(replace(case, seen=replace(case.seen, references=shown)), root).best
        named = parse_best(choice.text, len(candidates))
        verdicts.append(Verdict(BEST, case.id, named == best, named is not None, 1 / len(candidates)))
    texts = [trace.text for (role, _), trace in said.items() if role == "reasoning_expert"]
    if texts:
        mask = defect_mask(case, root)
        region = None if mask is None else masks.measure(mask)
        if region is not None:
            for place in map(named_place, texts):
                verdicts.append(Verdict(PLACE, case.id, place == region.place, place is not None))
                touched = place == region.place or place in region.cells
                verdicts.append(Verdict(TOUCHED, case.id, touched, place is not None))
    return verdicts


def named_condition(text: str, knowledge: Sequence[Entry]) -> str | None:
    """The condition that the knowledge guide named, `scratch` of `scratch: look for this. ...`, or None.

    Only the form of `roles.guide_completion` counts: one of the product's conditions, then a colon.
    """
    said = one_line(text).casefold()
    found = [entry.condition for entry in knowledge if said.startswith(one_line(entry.condition).casefold() + ":")]
    return max(found, key=len, default=None)


def named_place(text: str) -> str | None:
    """The one place, of geometry's, that the reasoning expert observed something at; None for none or several."""
    found = set(_PLACES.findall(_parts(text)[0]))
    return found.pop() if len(found) == 1 else None


def concluded(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the one option that the reasoning expert's conclusion names in the option's own words, or None.

    A conclusion that begins with an option's words and a stop means that one (`yes, there is a defect: no bolt`); words
    that are part of a longer option's which is named (`left` of `top left`) do not count.
    """
    conclusion = _parts(text)[1]
    words = {letter: one_line(option).casefold().rstrip(".") for letter, option in options.items()}

    def among(pattern: str) -> list[str]:
        return [letter for letter, own in words.items() if re.search(pattern.format(re.escape(own)), conclusion)]

    named = among(r"^{}(?=[,.;:!?]|$)") or among(r"(?<!\w){}(?!\w)")
    longest = [one for one in named if not any(words[one] in words[other] for other in named if other != one)]
    return longest[0] if len(longest) == 1 else None


def _parts(text: str) -> tuple[str, str]:
    """What a reasoning observes and what it concludes, in lower case.

    The conclusion is what follows the last `Conclude:`; without one, the last sentence, and the whole text observes.
    """
    folded = one_line(text)
    before, mark, after = folded.casefold().rpartition("conclude:")
    if mark:
        return before, after.strip()
    return folded.casefold(), (sentences(folded) or ("",))[-1].casefold()
