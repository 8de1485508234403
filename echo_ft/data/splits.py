"""Splits into train, validation and test: seeded, stratified by condition, by group; or such that the test split
answers a question: does it hold for products, defects or datasets that training never saw?

A group is all photographs of one physical part. It stays whole, as the nearest neighbour of a photograph is usually
the same part photographed again: a split by photograph measures memory.
"""

from __future__ import annotations

import dataclasses
import difflib
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache

from echo_ft.errors import EchoError
from echo_ft.records import GOOD, Inspection

SPLITS = ("train", "validation", "test")

REFERENCE = "reference"
"""The split of normal photographs that serve as references and are neither trained on nor asked about."""

LEFT_OUT = "left_out"
"""The split of what one of several folds of the train split leaves out of the training rows."""

HOLDS_OUT = {"by_product": "product", "by_condition": "condition", "by_dataset": "dataset"}
"""Modes of `make_splits` that keep something for the test split alone, and what."""

SEVERAL = "+"
"""Joins the names of the defects where a photograph shows several: `bent+melt`."""

MIXED = frozenset({"combined"})
"""Conditions of several defects that are not named, as MVTec AD has it: they may show any of the product's."""

Key = tuple[str, str, str]


def make_splits(
    inspections: Sequence[Inspection],
    how: str,
    seed: int,
    fractions: Sequence[float],
    held_out: Sequence[str] = (),
) -> tuple[list[Inspection], str, list[str]]:
    """Every inspection with a split, in the order given; how that came about in words; and what was held out.

    `how` is one of

    - `given`: the source's splits stand, and inspections without one are assigned. Where the source gives train and
      test alone, and the train split can train the roles (it has defects), validation is carved out of train by group.
    - `seeded`: all are assigned anew by group and condition.
    - `by_product`, `by_dataset`: the test split shows other products or datasets than training. Normals of theirs
      that the source gives to training, or the share of train where it gives no splits, become `REFERENCE`.
    - `by_condition`: the test split shows other kinds of defect than training, beside its share of normals and what
      else the same parts show.

    `held_out` names what the test split keeps for itself; without it `seed` draws the share of test, at least one.
    Raises EchoError for names that are not there and where nothing would be left to train on.
    """
    if how in HOLDS_OUT:
        check_fractions(fractions)
        if fractions[0] == 0:
            raise EchoError(f"fractions {list(fractions)} leave nothing to train on; give train a share")
        hold = _by_condition if how == "by_condition" else _by_place
        return hold(inspections, how, seed, fractions, held_out)
    if held_out:
        raise EchoError(f"held_out goes with split {', '.join(HOLDS_OUT)}, not with {how}; take it out or set split")
    shares = "/".join(f"{fraction:g}" for fraction in fractions)
    seeded = f"by group and condition, {shares} train/validation/test, seed {seed}"
    if how == "seeded":
        return assign_splits(_free(inspections), seed, fractions), seeded, []
    given = {inspection.split for inspection in inspections} - {None}
    done = assign_splits(inspections, seed, fractions)
    if not given:
        return done, seeded, []
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
        return carved, f"{words}; validation is {share:.0%} of its train split, by group and condition, seed {seed}", []
    return done, words, []


def _by_place(
    inspections: Sequence[Inspection], how: str, seed: int, fractions: Sequence[float], wanted: Sequence[str]
) -> tuple[list[Inspection], str, list[str]]:
    what = HOLDS_OUT[how]
    names = {getattr(inspection, what) for inspection in inspections}
    held = _choose(names, wanted, what, seed, fractions[2])
    out = {part(i) for i in inspections if getattr(i, what) in held}
    kept = assign_splits(_free(i for i in inspections if part(i) not in out), seed, _training(fractions))
    others = assign_splits([i for i in inspections if part(i) in out], seed, fractions)
    asked = {part(i) for i in others if i.split == "test" or i.condition != GOOD}
    where = {part(i): i.split for i in kept} | dict.fromkeys(out, REFERENCE) | dict.fromkeys(asked, "test")
    done = [dataclasses.replace(i, split=where[part(i)]) for i in inspections]
    return done, _words(how, held, wanted, seed, fractions), held


def _by_condition(
    inspections: Sequence[Inspection], how: str, seed: int, fractions: Sequence[float], wanted: Sequence[str]
) -> tuple[list[Inspection], str, list[str]]:
    conditions: dict[tuple[str, str], set[str]] = defaultdict(set)
    for inspection in inspections:
        conditions[inspection.dataset, inspection.product].add(inspection.condition)
    names = {kind for found in conditions.values() for condition in found for kind in kinds_of(condition)}
    held = _choose(names, wanted, HOLDS_OUT[how], seed, fractions[2])
    away = {place: withheld(found, held) for place, found in conditions.items()}
    test = {part(i) for i in inspections if i.condition in away[i.dataset, i.product]}
    defective = {part(i) for i in inspections if i.condition != GOOD} - test
    seen = assign_splits(_free(i for i in inspections if part(i) in defective), seed, _training(fractions))
    where = {part(i): i.split for i in seen} | dict.fromkeys(test, "test")
    fixed = [dataclasses.replace(i, split=where.get(part(i))) for i in inspections]
    return assign_splits(fixed, seed, fractions), _words(how, held, wanted, seed, fractions), held


def _choose(names: Collection[str], wanted: Sequence[str], what: str, seed: int, share: float) -> list[str]:
    """The names to hold out, sorted: those wanted, or a share of all that the seed draws."""
    ordered = sorted(names)
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, ordered, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(ordered)}"
            raise EchoError(f"held_out: no {what} is named {name!r}; {hint}")
    if len(ordered) < 2 or len(set(wanted)) == len(ordered):
        raise EchoError(
            f"split by_{what} keeps some {what}s for the test and needs others to train on; of {len(ordered)} "
            f"({', '.join(ordered) or 'none'}) nothing would be left: hold out fewer, or use another split"
        )
    if wanted:
        return sorted(set(wanted))
    count = min(len(ordered) - 1, max(1, round(share * len(ordered))))
    return sorted(random.Random(f"{seed}/held out/{what}").sample(ordered, count))


def _words(how: str, held: Sequence[str], wanted: Sequence[str], seed: int, fractions: Sequence[float]) -> str:
    drawn = "" if wanted else f" (drawn, seed {seed})"
    train, validation, test = fractions
    if how == "by_condition":
        rest = f"the other defects {train:g}/{validation:g} train/validation, normals {train:g}/{validation:g}/{test:g}"
    else:
        rest = f"the others {train:g}/{validation:g} train/validation"
    return f"by {HOLDS_OUT[how]}: test alone has {', '.join(held)}{drawn}; {rest}, by group and condition, seed {seed}"


def _training(fractions: Sequence[float]) -> tuple[float, float, float]:
    """The shares of train and validation where nothing goes to test."""
    train, validation, _ = fractions
    return train / (train + validation), validation / (train + validation), 0.0


def _free(inspections: Iterable[Inspection]) -> list[Inspection]:
    return [dataclasses.replace(inspection, split=None) for inspection in inspections]


@lru_cache  # asked for each photograph, of every condition and product
def readable(name: str) -> str:
    """The name of a condition or product as words: `broken_large` is `broken large`, `good` is `free of defects`."""
    return "free of defects" if name == GOOD else " ".join(name.replace("_", " ").replace("-", " ").split())


def join_kinds(kinds: Iterable[str]) -> str:
    """The condition of a photograph that shows these kinds of defect: each once, sorted, joined by `SEVERAL`."""
    return SEVERAL.join(sorted(set(kinds)))


def kinds_of(condition: str) -> frozenset[str]:
    """The kinds of defect that a condition names: none for `good` and for `MIXED` ones."""
    return frozenset(condition.split(SEVERAL)) - {GOOD} - MIXED


def withheld(conditions: Collection[str], held_out: Collection[str]) -> set[str]:
    """Those of a product's conditions that show, or may show, a kind of defect that is held out."""
    named = {condition for condition in conditions if kinds_of(condition) & set(held_out)}
    return named | (MIXED & set(conditions) if named else set())


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
    total = Counter(stratum_of(inspection) for inspection in inspections)
    filled: Counter[tuple[str, Key]] = Counter()
    where: dict[Key, str] = {}
    waiting: dict[Key, list[Key]] = defaultdict(list)
    for name in sorted(groups):
        given = Counter(i.split for i in groups[name] if i.split is not None)
        if given:
            where[name] = min(given, key=lambda split: (-given[split], SPLITS.index(split)))
            filled.update((i.split or where[name], stratum_of(i)) for i in groups[name])
        else:
            rarest = min((stratum_of(i) for i in groups[name]), key=lambda stratum: (total[stratum], stratum))
            waiting[rarest].append(name)
    open_splits = [(split, fraction) for split, fraction in zip(SPLITS, fractions, strict=True) if fraction > 0]
    for stratum in sorted(waiting, key=lambda stratum: (total[stratum], stratum)):
        names = waiting[stratum]
        random.Random(f"{seed}/{'/'.join(stratum)}").shuffle(names)
        for name in names:
            half = sum(stratum_of(i) == stratum for i in groups[name]) / 2
            split, _ = min(open_splits, key=lambda pair: ((filled[pair[0], stratum] + half) / pair[1], -pair[1]))
            where[name] = split
            filled.update((split, stratum_of(i)) for i in groups[name])
    return [i if i.split is not None else dataclasses.replace(i, split=where[part(i)]) for i in inspections]


def leave_out(inspections: Sequence[Inspection], folds: int, fold: int, seed: int) -> list[Inspection]:
    """The inspections, the train split's share of `fold` (0 to folds - 1) turned into `LEFT_OUT`.

    The train split is dealt into folds by group and condition, the rarest condition first; `seed` draws, and the order
    given does not matter. Raises EchoError where there is no such fold, and where the others hold no defect.
    """
    if not 0 <= fold < folds or folds < 2:
        raise EchoError(f"there is no fold {fold} of {folds}; give at least 2 folds, and a fold from 0 to folds - 1")
    groups: dict[Key, list[Inspection]] = defaultdict(list)
    for inspection in inspections:
        if inspection.split == "train":
            groups[part(inspection)].append(inspection)
    total = Counter(stratum_of(inspection) for members in groups.values() for inspection in members)
    rarest = {
        name: min((stratum_of(i) for i in members), key=lambda stratum: (total[stratum], stratum))
        for name, members in groups.items()
    }
    names = sorted(groups)
    random.Random(f"{seed}/folds").shuffle(names)
    filled: Counter[tuple[int, Key]] = Counter()
    sizes = [0] * folds
    where: dict[Key, int] = {}
    for name in sorted(names, key=lambda name: (total[rarest[name]], rarest[name])):
        where[name] = min(range(folds), key=lambda number: (filled[number, rarest[name]], sizes[number]))
        filled.update((where[name], stratum_of(i)) for i in groups[name])
        sizes[where[name]] += len(groups[name])
    done = [
        dataclasses.replace(i, split=LEFT_OUT) if i.split == "train" and where[part(i)] == fold else i
        for i in inspections
    ]
    if not trainable(done):
        raise EchoError(f"without fold {fold} of {folds} there is no defect to train on; add photographs of defects")
    return done


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


def stratum_of(inspection: Inspection) -> Key:
    """(dataset, product, condition): what splits keep in proportion."""
    return inspection.dataset, inspection.product, inspection.condition


def with_synthetic(
    inspections: Sequence[Inspection], real: Sequence[Inspection], held_out: Collection[str]
) -> list[Inspection]:
    """The inspections in their order: the `real` ones as dealt, and the synthetic with the train split or with none.

    A synthetic defect is trained on where all photographs of its part are, unless its condition is held out.
    """
    dealt = iter(real)
    splits: dict[tuple[str, str, str], set[str | None]] = defaultdict(set)
    for inspection in real:
        splits[part(inspection)].add(inspection.split)
    away = {place: withheld(conditions, held_out) for place, conditions in conditions_of(inspections).items()}

    def trained(made: Inspection) -> bool:
        return splits[part(made)] == {"train"} and made.condition not in away[made.dataset, made.product]

    return [
        dataclasses.replace(i, split="train" if trained(i) else None) if i.synthetic else next(dealt)
        for i in inspections
    ]


def queries(inspections: Sequence[Inspection]) -> list[Inspection]:
    """The photographs that questions are asked about: all, but for `REFERENCE` and a train split of normals alone.

    Such a split (MVTec-AD's and MMAD's) cannot train the roles and serves as the pool of references.
    """
    unasked = {REFERENCE} if trainable(inspections) else {REFERENCE, "train"}
    return [inspection for inspection in inspections if inspection.split not in unasked]


def reference_pool(inspections: Sequence[Inspection]) -> list[Inspection]:
    """The normals from which references are taken: those of the train split, folds left out or not, and `REFERENCE`."""
    return [i for i in inspections if i.split in ("train", LEFT_OUT, REFERENCE) and i.condition == GOOD]


def conditions_of(inspections: Sequence[Inspection]) -> dict[tuple[str, str], list[str]]:
    """The conditions that each product's photographs show, by (dataset, product), in one order for all."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for inspection in inspections:
        found[inspection.dataset, inspection.product].add(inspection.condition)
    return {place: sorted(names, key=lambda name: (name != GOOD, name)) for place, names in sorted(found.items())}
