"""Splits into train, validation and test: seeded, stratified by condition, and by group.

A group is all photographs of one physical part. It stays whole, as the nearest neighbour of a photograph is usually
the same part photographed again: a split by photograph measures memory.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Sequence

from echo_ft.records import GOOD, EchoError, Inspection

SPLITS = ("train", "validation", "test")

Key = tuple[str, str, str]


def make_splits(
    inspections: Sequence[Inspection], how: str, seed: int, fractions: Sequence[float]
) -> tuple[list[Inspection], str]:
    """Every inspection with a split, in the order given, and how that came about in words.

    `how` is `given` (the source's splits stand; inspections without one are assigned) or `seeded` (all are assigned
    anew). Where the source gives train and test alone, and the train split can train the roles (it has defects),
    validation is carved out of train by group.
    """
    shares = "/".join(f"{fraction:g}" for fraction in fractions)
    seeded = f"by group and condition, {shares} train/validation/test, seed {seed}"
    if how == "seeded":
        return assign_splits([dataclasses.replace(i, split=None) for i in inspections], seed, fractions), seeded
    given = {inspection.split for inspection in inspections} - {None}
    done = assign_splits(inspections, seed, fractions)
    if not given:
        return done, seeded
    words = "given by the source"
    if len(done) > sum(inspection.split is not None for inspection in inspections):
        words += f", those without one {seeded}"
    train, validation, _ = fractions
    if "validation" not in {i.split for i in done} and trainable(done) and validation > 0:
        share = validation / (train + validation)
        # A group that the source divided between splits keeps what it was given.
        fixed = {part(i) for i in done if i.split != "train"}
        free = [i if part(i) in fixed else dataclasses.replace(i, split=None) for i in done]
        carved = assign_splits(free, seed, (1 - share, share, 0.0))
        return carved, f"{words}; validation is {share:.0%} of its train split, by group and condition, seed {seed}"
    return done, words


def trainable(inspections: Sequence[Inspection]) -> bool:
    """Whether the train split holds a defect; normals alone can serve as references but not train the roles."""
    return any(inspection.split == "train" and inspection.condition != GOOD for inspection in inspections)


def assign_splits(inspections: Sequence[Inspection], seed: int, fractions: Sequence[float]) -> list[Inspection]:
    """Give a split to each inspection that has none; those that have one keep it, and their group follows them.

    `fractions` are the shares of train, validation and test. Each group goes, as a whole, to the split that lacks most
    of the group's rarest condition, in proportion to the split's share (Webster's method, with photographs for seats):
    of three groups two go to train and one to test. The result depends on the seed, not on the order given.

    Raises EchoError where the fractions are not three shares of a whole.
    """
    check_fractions(fractions)
    groups: dict[Key, list[Inspection]] = defaultdict(list)
    for inspection in inspections:
        groups[part(inspection)].append(inspection)
    total = Counter(_stratum(inspection) for inspection in inspections)
    filled: Counter[tuple[str, Key]] = Counter()
    where: dict[Key, str] = {}
    waiting: dict[Key, list[Key]] = defaultdict(list)
    for name in sorted(groups):
        given = Counter(i.split for i in groups[name] if i.split is not None)
        if given:
            where[name] = min(given, key=lambda split: (-given[split], SPLITS.index(split)))
            filled.update((i.split or where[name], _stratum(i)) for i in groups[name])
        else:
            rarest = min((_stratum(i) for i in groups[name]), key=lambda stratum: (total[stratum], stratum))
            waiting[rarest].append(name)
    open_splits = [(split, fraction) for split, fraction in zip(SPLITS, fractions, strict=True) if fraction > 0]
    for stratum in sorted(waiting, key=lambda stratum: (total[stratum], stratum)):
        names = waiting[stratum]
        random.Random(f"{seed}/{'/'.join(stratum)}").shuffle(names)
        for name in names:
            half = sum(_stratum(i) == stratum for i in groups[name]) / 2
            split, _ = min(open_splits, key=lambda pair: ((filled[pair[0], stratum] + half) / pair[1], -pair[1]))
            where[name] = split
            filled.update((split, _stratum(i)) for i in groups[name])
    return [i if i.split is not None else dataclasses.replace(i, split=where[part(i)]) for i in inspections]


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise EchoError where the fractions are not three shares of a whole."""
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise EchoError(
            f"fractions {list(fractions)} are not three shares of 1; write train, validation, test: 0.6 0.1 0.3"
        )


def divided_parts(inspections: Sequence[Inspection]) -> list[Key]:
    """Parts whose photographs are in more than one split, as only a source's own splits can have it."""
    splits: dict[Key, set[str | None]] = defaultdict(set)
    for inspection in inspections:
        splits[part(inspection)].add(inspection.split)
    return sorted(name for name, found in splits.items() if len(found) > 1)


def part(inspection: Inspection) -> Key:
    """What the photographs of one physical part share."""
    return inspection.dataset, inspection.product, inspection.group


def _stratum(inspection: Inspection) -> Key:
    return inspection.dataset, inspection.product, inspection.condition
