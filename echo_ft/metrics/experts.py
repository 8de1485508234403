"""Scores of the experts before the decision: their outputs in a run, compared with what the truth implies.

Outputs are parsed strictly, like decisions. Text that is not a possible answer of the role is wrong and counts as
unparsed; nothing is guessed. Intervals resample the same parts as the run's other intervals
(`metric_values.share_with_interval`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from echo_ft.data.text import SENTENCE_ENDS, sentences, without_stop
from echo_ft.errors import EchoError
from echo_ft.experts.roles import one_line, parse_best
from echo_ft.experts.targets import defect_mask, gold_upstream
from echo_ft.images import masks
from echo_ft.images.decode import READER_THREADS
from echo_ft.metrics import intervals
from echo_ft.metrics.metric_values import metric_interval, share_with_interval
from echo_ft.metrics.prediction_table import PredictionTable
from echo_ft.records import Case, Entry, Reference, Trace
from echo_ft.terminal import progress

BEST_REFERENCE = "best_reference"
"""Metric of the reference extractor: its choice among several candidates."""

NAMED_CONDITION = "condition"
"""Metric of the knowledge guide: the condition that it names."""

DEFECT_LOCATION, LOCATION_TOUCHED = "place", "place_touched"
"""Metrics of the reasoning expert: the location of the defect, and any location that contains some of it."""

CONCLUSION = "conclusion"
"""Metric of the reasoning expert: whether its conclusion agrees with the decision that follows."""

CONDITION_RECALL = "condition_recall"
"""Metric of the knowledge guide: NAMED_CONDITION as an unweighted mean over the true conditions."""

_LOCATIONS = re.compile(rf"\b({'|'.join(sorted([*masks.PLACES, masks.SPREAD], key=len, reverse=True))})\b")


@dataclass(frozen=True)
class Judgement:
    """Whether one output of an expert is correct."""

    metric: str
    case: str
    correct: bool
    parsed: bool
    """False if the text is not a possible answer of the role; it then counts as wrong."""
    chance: float | None = None
    """Probability that a random choice is correct, if the number of choices is known."""


def score_experts(table: PredictionTable, cases: Sequence[Case], traces: Iterable[Trace], root: Path) -> dict[str, Any]:
    """Score the experts before the decision.

    `cases` come from the run's dataset and `traces` from the run; `root` is the folder of the images. A failed case has
    no traces. The result is {`figures`: {metric: values from 0 to 1}, `conditions`: {condition: recall of the guide},
    `unreadable`: reasons why cases are left out}. Metrics of experts that did not run are left out.
    """
    outputs: dict[str, dict[tuple[str, str], Trace]] = {}
    for trace in traces:
        outputs.setdefault(trace.case, {})[trace.role, trace.branch] = trace
    decisions = {(one.case, one.question): one.parsed for one in table.predictions}
    images = {one.case: image for one, image in zip(table.predictions, table.image_index, strict=True)}
    scored = [case for case in cases if case.id in images and case.id in outputs]
    judgements = [judgement for case in scored for judgement in judge_texts(case, outputs[case.id], decisions)]
    by_images = _judge_all_by_images(scored, outputs, root)
    judgements += [judgement for found in by_images if not isinstance(found, EchoError) for judgement in found]
    weights = table.weights()
    scores = {}
    for name in (BEST_REFERENCE, NAMED_CONDITION, DEFECT_LOCATION, LOCATION_TOUCHED, CONCLUSION):
        own = [judgement for judgement in judgements if judgement.metric == name]
        if own:
            scores[name] = _score(table, weights, images, own)
    conditions = {case.id: f"{case.dataset}/{case.product}/{case.truth.condition}" for case in scored}
    by_condition: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        if judgement.metric == NAMED_CONDITION:
            by_condition.setdefault(conditions[judgement.case], []).append(judgement)
    if by_condition:
        scores[CONDITION_RECALL] = {
            **scores[NAMED_CONDITION],
            **mean_over_groups(table, images, list(by_condition.values())),
        }
    return {
        "figures": scores,
        "conditions": {
            name: {"texts": len(own), "recall": float(np.mean([judgement.correct for judgement in own]))}
            for name, own in sorted(by_condition.items())
        },
        "unreadable": [str(found) for found in by_images if isinstance(found, EchoError)],
    }


def _judge_all_by_images(
    cases: Sequence[Case], outputs: Mapping[str, Mapping[tuple[str, str], Trace]], root: Path
) -> list[list[Judgement] | EchoError]:
    """Run `judge_by_images` on each case, or return the error that it raises."""

    def judge(case: Case) -> list[Judgement] | EchoError:
        try:
            return judge_by_images(case, outputs[case.id], root)
        except EchoError as error:
            return error

    with ThreadPoolExecutor(READER_THREADS) as pool:
        found = pool.map(judge, cases)
        return list(progress(found, "scoring the experts", "cases", len(cases)))


def _score(
    table: PredictionTable, weights: np.ndarray, images: Mapping[str, int], judgements: Sequence[Judgement]
) -> dict[str, Any]:
    """Return the share of correct outputs with its interval, its chance level, and the counts behind it."""
    index = np.array([images[judgement.case] for judgement in judgements])
    correct = np.array([judgement.correct for judgement in judgements])
    value, interval = share_with_interval(table, weights, index, correct)
    return {
        "value": value,
        "interval": interval,
        "chance": _chance(judgements),
        "texts": len(judgements),
        "cases": len({judgement.case for judgement in judgements}),
        "unread": sum(not judgement.parsed for judgement in judgements),
    }


def _chance(judgements: Sequence[Judgement]) -> float | None:
    """Average the chance levels that are known."""
    chances = [judgement.chance for judgement in judgements if judgement.chance is not None]
    return float(np.mean(chances)) if chances else None


def mean_over_groups(
    table: PredictionTable, images: Mapping[str, int], groups: Sequence[Sequence[Judgement]]
) -> dict[str, Any]:
    """Return the unweighted mean of the groups' shares of correct outputs, its interval, and its chance level.

    Parts are resampled within their group, so no resample leaves a group empty. Each group takes one degree of freedom.
    Resamples of n parts underestimate the standard deviation by a factor of sqrt(1 - 1 / n), which matters for groups
    of few parts and is corrected per group, in place of the correction in `intervals.percentile_interval`. A group of
    one part shows no variation, so there is no interval if any group has only one.
    """
    units: dict[tuple[int, int], list[bool]] = {}
    for number, own in enumerate(groups):
        for judgement in own:
            unit = number, int(table.part_index[images[judgement.case]])
            units.setdefault(unit, []).append(judgement.correct)
    group = np.array([number for number, _ in units])
    total, correct = np.array([len(one) for one in units.values()]), np.array([sum(one) for one in units.values()])
    weights = intervals.resample(group.tolist())
    sizes = np.bincount(group)
    degrees_of_freedom = len(units) - len(groups) + 1
    corrected_later = 1 - 1 / max(degrees_of_freedom, 2)
    shares, resampled_shares = [], []
    for number, own in enumerate(groups):
        own_units = group == number
        drawn = weights[:, own_units]
        shares.append(float(np.mean([judgement.correct for judgement in own])))
        deviations = (drawn @ correct[own_units]) / (drawn @ total[own_units]) - shares[-1]
        resampled_shares.append(shares[-1] + deviations * np.sqrt(corrected_later / (1 - 1 / max(sizes[number], 2))))
    resampled = np.clip(np.mean(resampled_shares, axis=0), 0, 1)
    return {
        "value": float(np.mean(shares)),
        "interval": metric_interval(resampled, degrees_of_freedom) if sizes.min() > 1 else None,
        "chance": float(np.mean([chance for own in groups if (chance := _chance(own)) is not None])),
    }


def judge_texts(
    case: Case, outputs: Mapping[tuple[str, str], Trace], decisions: Mapping[tuple[str, str], str | None]
) -> list[Judgement]:
    """Judge outputs without images: the condition that the guide names, and whether conclusions agree with decisions.

    `outputs` are the case's traces by role and branch, and `decisions` are the letters by case and question. If a
    case's condition has no knowledge entry, the guide is not judged on it, because it could not name the condition.
    """
    judgements = []
    guide = outputs.get(("knowledge_guide", "guide"))
    if guide is not None and any(entry.condition == case.truth.condition for entry in case.seen.knowledge):
        named = named_condition(guide.text, case.seen.knowledge)
        correct, chance = named == case.truth.condition, 1 / len(case.seen.knowledge)
        judgements.append(Judgement(NAMED_CONDITION, case.id, correct, named is not None, chance))
    for question in case.seen.questions:
        reasoning = outputs.get(("reasoning_expert", question.id))
        if reasoning is not None and question.options and (case.id, question.id) in decisions:
            letter = concluded_letter(reasoning.text, question.options)
            agrees = letter is not None and letter == decisions[case.id, question.id]
            judgements.append(Judgement(CONCLUSION, case.id, agrees, letter is not None))
    return judgements


def judge_by_images(case: Case, outputs: Mapping[tuple[str, str], Trace], root: Path) -> list[Judgement]:
    """Judge outputs that require images or the mask: the chosen reference, and the locations that the reasoning names.

    The best candidate is the one that `targets.gold_upstream` chooses among those that the extractor saw. Raises
    EchoError if an image or the mask cannot be read.
    """
    judgements = []
    choice = outputs.get(("reference_extractor", "best"))
    if choice is not None and len(choice.images) > 2:
        *candidates, _ = choice.images
        shown = tuple(Reference(case.id, image, 0.0, rank) for rank, image in enumerate(candidates, start=1))
        best = gold_upstream(replace(case, seen=replace(case.seen, references=shown)), root).best
        named = parse_best(choice.text, len(candidates))
        judgements.append(Judgement(BEST_REFERENCE, case.id, named == best, named is not None, 1 / len(candidates)))
    texts = [trace.text for (role, _), trace in outputs.items() if role == "reasoning_expert"]
    if texts:
        mask = defect_mask(case, root)
        region = None if mask is None else masks.measure(mask)
        if region is not None:
            for location in map(named_location, texts):
                judgements.append(Judgement(DEFECT_LOCATION, case.id, location == region.place, location is not None))
                touched = location == region.place or location in region.cells
                judgements.append(Judgement(LOCATION_TOUCHED, case.id, touched, location is not None))
    return judgements


def named_condition(text: str, knowledge: Sequence[Entry]) -> str | None:
    """Return the condition that the knowledge guide names, such as `scratch` in `scratch: look for this. ...`.

    Only the form that `roles.guide_completion` writes counts: one of the product's conditions, then a colon. Return
    None for any other text.
    """
    line = one_line(text).casefold()
    found = [entry.condition for entry in knowledge if line.startswith(one_line(entry.condition).casefold() + ":")]
    return max(found, key=len, default=None)


def named_location(text: str) -> str | None:
    """Return the location in the reasoning expert's observation; None if it names none or several."""
    found = set(_LOCATIONS.findall(_split_reasoning(text)[0]))
    return found.pop() if len(found) == 1 else None


def concluded_letter(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of the option that the reasoning expert's conclusion quotes; None if it quotes none or several.

    A conclusion that starts with an option's text and a punctuation mark means that option (`yes, there is a defect: no
    bolt`). An option inside a longer quoted option (`left` in `top left`) does not count.
    """
    conclusion = _split_reasoning(text)[1]
    folded = {letter: without_stop(option) for letter, option in options.items()}

    def matches(pattern: str) -> list[str]:
        return [letter for letter, own in folded.items() if re.search(pattern.format(re.escape(own)), conclusion)]

    named = matches(rf"^{{}}(?=[,;:，；：、{SENTENCE_ENDS}]|$)") or matches(r"(?<!\w){}(?!\w)")
    longest = [one for one in named if not any(folded[one] in folded[other] for other in named if other != one)]
    return longest[0] if len(longest) == 1 else None


def _split_reasoning(text: str) -> tuple[str, str]:
    """Split reasoning text into its observation and conclusion, both in lower case.

    The conclusion follows the last `Conclude:`. Without one, the last sentence is the conclusion, and the whole text is
    the observation.
    """
    line = one_line(text)
    before, mark, after = line.casefold().rpartition("conclude:")
    if mark:
        return before, after.strip()
    return line.casefold(), (sentences(line) or ("",))[-1].casefold()
