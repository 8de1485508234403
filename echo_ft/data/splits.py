"""Split a dataset into train, validation and test, stratified by condition or with something held out for the test.

Holding out answers a question: does the model work on products, defects or datasets that training never saw?

A group is all images of one physical part. Groups stay whole, because the nearest neighbour of an image is usually
another image of the same part. A split by image would therefore measure memorisation.
"""

from __future__ import annotations

import dataclasses
import difflib
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache

from echo_ft.errors import EchoError
from echo_ft.records import GOOD, UNLABELLED, Inspection

SPLITS = ("train", "validation", "test")

REFERENCE_SPLIT = "reference"
"""The split of normal images that only serve as references. They have no questions or training rows."""

LEFT_OUT = "left_out"
"""The split of the fold that is left out of the training rows."""

UNLABELLED_SPLIT = "unlabelled"
"""The split of images whose condition is not known. They can be run, but neither trained on nor scored."""

HELD_OUT_FIELDS = {"by_product": "product", "by_condition": "condition", "by_dataset": "dataset"}
"""Modes of `make_splits` that hold something out for the test, and the field that each mode uses."""

DEFECT_SEPARATOR = "+"
"""Joins the names of several defects in one image: `bent+melt`."""

MIXED_CONDITIONS = frozenset({"combined"})
"""Conditions of several unnamed defects, as in MVTec AD. They may show any defect of the product."""

PartKey = tuple[str, str, str]


def make_splits(
    inspections: Sequence[Inspection],
    how: str,
    seed: int,
    fractions: Sequence[float],
    held_out: Sequence[str] = (),
) -> tuple[list[Inspection], str, list[str]]:
    """Return the inspections with splits, in the given order, along with a description and the held-out names.

    `how` is one of these modes:

    - `given`: keep the source's splits and assign the inspections without one. If the source gives only train and test,
      and train has defects (so it can train the roles), take validation from train by group.
    - `seeded`: reassign every inspection, by group and condition.
    - `by_product`, `by_dataset`: the test split has products or datasets that training lacks. Some of their normal
      images become `REFERENCE_SPLIT`: those that the source assigns to training or, if it gives no splits, the fraction
      for training.
    - `by_condition`: the test split has different defects from training, its fraction of the normal images, and all
      other images of the same parts.

    `held_out` names what to hold out. By default, the names are drawn with `seed`: the test fraction of them, but at
    least one. Raises EchoError for unknown names and if nothing would be left to train on.
    """
    if how in HELD_OUT_FIELDS:
        check_fractions(fractions)
        if fractions[0] == 0:
            raise EchoError(f"fractions {list(fractions)} leave nothing to train on; give train a fraction above 0")
        hold_out = _by_condition if how == "by_condition" else _by_field
        return hold_out(inspections, how, seed, fractions, held_out)
    if held_out:
        modes = ", ".join(HELD_OUT_FIELDS)
        raise EchoError(f"held_out requires split {modes}, not {how}; remove it or change split")
    shares = "/".join(f"{fraction:g}" for fraction in fractions)
    seeded = f"by group and condition, {shares} train/validation/test, seed {seed}"
    if how == "seeded":
        return assign_splits(_without_splits(inspections), seed, fractions), seeded, []
    given = {inspection.split for inspection in inspections} - {None}
    done = assign_splits(inspections, seed, fractions)
    if not given:
        return done, seeded, []
    description = "given by the source"
    if len(done) > sum(inspection.split is not None for inspection in inspections):
        description += f", the others {seeded}"
    train, validation, _ = fractions
    if "validation" not in {i.split for i in done} and has_training_defects(done) and validation > 0:
        share = validation / (train + validation)
        # A group that the source divided between splits keeps its splits.
        fixed = {part_key(i) for i in done if i.split != "train"}
        free = [i if part_key(i) in fixed else dataclasses.replace(i, split=None) for i in done]
        carved = assign_splits(free, seed, (1 - share, share, 0.0))
        return carved, f"{description}; validation is {share:.0%} of train, by group and condition, seed {seed}", []
    return done, description, []


def _by_field(
    inspections: Sequence[Inspection], how: str, seed: int, fractions: Sequence[float], wanted: Sequence[str]
) -> tuple[list[Inspection], str, list[str]]:
    field = HELD_OUT_FIELDS[how]
    names = {getattr(inspection, field) for inspection in inspections}
    held = _choose(names, wanted, field, seed, fractions[2])
    out = {part_key(i) for i in inspections if getattr(i, field) in held}
    kept = assign_splits(
        _without_splits(i for i in inspections if part_key(i) not in out), seed, _training_shares(fractions)
    )
    others = assign_splits([i for i in inspections if part_key(i) in out], seed, fractions)
    tested = {part_key(i) for i in others if i.split == "test" or i.condition != GOOD}
    where = {part_key(i): i.split for i in kept}
    where |= dict.fromkeys(out, REFERENCE_SPLIT) | dict.fromkeys(tested, "test")
    done = [dataclasses.replace(i, split=where[part_key(i)]) for i in inspections]
    return done, _describe(how, held, wanted, seed, fractions), held


def _by_condition(
    inspections: Sequence[Inspection], how: str, seed: int, fractions: Sequence[float], wanted: Sequence[str]
) -> tuple[list[Inspection], str, list[str]]:
    conditions: dict[tuple[str, str], set[str]] = defaultdict(set)
    for inspection in inspections:
        conditions[inspection.dataset, inspection.product].add(inspection.condition)
    names = {defect for found in conditions.values() for condition in found for defect in defects_of(condition)}
    held = _choose(names, wanted, HELD_OUT_FIELDS[how], seed, fractions[2])
    away = {product: held_out_conditions(found, held) for product, found in conditions.items()}
    test = {part_key(i) for i in inspections if i.condition in away[i.dataset, i.product]}
    defective = {part_key(i) for i in inspections if i.condition != GOOD} - test
    trained = assign_splits(
        _without_splits(i for i in inspections if part_key(i) in defective), seed, _training_shares(fractions)
    )
    where = {part_key(i): i.split for i in trained} | dict.fromkeys(test, "test")
    fixed = [dataclasses.replace(i, split=where.get(part_key(i))) for i in inspections]
    return assign_splits(fixed, seed, fractions), _describe(how, held, wanted, seed, fractions), held


def _choose(names: Collection[str], wanted: Sequence[str], field: str, seed: int, share: float) -> list[str]:
    """Return the sorted names to hold out: those in `wanted`, or a fraction of all names drawn with `seed`."""
    ordered = sorted(names)
    wanted = [unicodedata.normalize("NFC", name) for name in wanted]  # text.nfc would add a module to runs
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, ordered, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(ordered)}"
            raise EchoError(f"held_out: no {field} is named {name!r}; {hint}")
    if len(ordered) < 2 or len(set(wanted)) == len(ordered):
        raise EchoError(
            f"split by_{field} holds out some {field}s and trains on the others, but of {len(ordered)} "
            f"({', '.join(ordered) or 'none'}) none would be left to train on; hold out fewer or use another split"
        )
    if wanted:
        return sorted(set(wanted))
    count = min(len(ordered) - 1, max(1, round(share * len(ordered))))
    return sorted(random.Random(f"{seed}/held out/{field}").sample(ordered, count))


def _describe(how: str, held: Sequence[str], wanted: Sequence[str], seed: int, fractions: Sequence[float]) -> str:
    drawn = "" if wanted else f" (drawn, seed {seed})"
    train, validation, test = fractions
    if how == "by_condition":
        rest = f"the other defects {train:g}/{validation:g} train/validation, normals {train:g}/{validation:g}/{test:g}"
    else:
        rest = f"the others {train:g}/{validation:g} train/validation"
    field, names = HELD_OUT_FIELDS[how], ", ".join(held)
    return f"by {field}: only test has {names}{drawn}; {rest}, by group and condition, seed {seed}"


def _training_shares(fractions: Sequence[float]) -> tuple[float, float, float]:
    """Return the fractions rescaled so that nothing goes to test."""
    train, validation, _ = fractions
    return train / (train + validation), validation / (train + validation), 0.0


def _without_splits(inspections: Iterable[Inspection]) -> list[Inspection]:
    return [dataclasses.replace(inspection, split=None) for inspection in inspections]


@lru_cache  # this is called for every image, with every condition and product
def readable_name(name: str) -> str:
    """Write out a condition or product name: `broken_large` as `broken large`, and `good` as `free of defects`."""
    return "free of defects" if name == GOOD else " ".join(name.replace("_", " ").replace("-", " ").split())


def join_defects(defects: Iterable[str]) -> str:
    """Return the condition of an image with these defects: their distinct names, sorted and joined by `+`."""
    return DEFECT_SEPARATOR.join(sorted(set(defects)))


def defects_of(condition: str) -> frozenset[str]:
    """Return the defects that a condition names: none for `good` and for `MIXED_CONDITIONS`."""
    return frozenset(condition.split(DEFECT_SEPARATOR)) - {GOOD} - MIXED_CONDITIONS


def held_out_conditions(conditions: Collection[str], held_out: Collection[str]) -> set[str]:
    """Return the conditions of a product that show, or may show, a defect that is held out."""
    named = {condition for condition in conditions if defects_of(condition) & set(held_out)}
    return named | (MIXED_CONDITIONS & set(conditions) if named else set())


def has_training_defects(inspections: Sequence[Inspection]) -> bool:
    """Return whether the train split has a defect. Normal images can only serve as references."""
    return any(inspection.split == "train" and inspection.condition != GOOD for inspection in inspections)


def assign_splits(inspections: Sequence[Inspection], seed: int, fractions: Sequence[float]) -> list[Inspection]:
    """Assign a split to each inspection without one. Existing splits stay. All images of a group get one split.

    `fractions` are those of train, validation and test. Each group goes as a whole to the split that, relative to its
    fraction, has the fewest images of the group's rarest condition. This is Webster's method with images as seats: of
    three groups, two go to train and one to test. The result depends on the seed but not on the order of the
    inspections.

    Raises EchoError if the fractions are not three numbers that add up to 1.
    """
    check_fractions(fractions)
    groups: dict[PartKey, list[Inspection]] = defaultdict(list)
    for inspection in inspections:
        groups[part_key(inspection)].append(inspection)
    total = Counter(stratum_of(inspection) for inspection in inspections)
    filled: Counter[tuple[str, PartKey]] = Counter()
    where: dict[PartKey, str] = {}
    waiting: dict[PartKey, list[PartKey]] = defaultdict(list)
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
    return [i if i.split is not None else dataclasses.replace(i, split=where[part_key(i)]) for i in inspections]


def leave_out_fold(inspections: Sequence[Inspection], folds: int, fold: int, seed: int) -> list[Inspection]:
    """Move one fold of the train split, `fold` from 0 to folds - 1, to the split `LEFT_OUT`.

    Groups are assigned to folds by condition, starting with the rarest one. The folds depend on `seed` but not on the
    order of the inspections. Raises EchoError if there is no such fold or if the other folds have no defect.
    """
    if not 0 <= fold < folds or folds < 2:
        raise EchoError(f"there is no fold {fold} of {folds}; give at least 2 folds, and a fold from 0 to folds - 1")
    groups: dict[PartKey, list[Inspection]] = defaultdict(list)
    for inspection in inspections:
        if inspection.split == "train":
            groups[part_key(inspection)].append(inspection)
    total = Counter(stratum_of(inspection) for members in groups.values() for inspection in members)
    rarest = {
        name: min((stratum_of(i) for i in members), key=lambda stratum: (total[stratum], stratum))
        for name, members in groups.items()
    }
    names = sorted(groups)
    random.Random(f"{seed}/folds").shuffle(names)
    filled: Counter[tuple[int, PartKey]] = Counter()
    sizes = [0] * folds
    where: dict[PartKey, int] = {}
    for name in sorted(names, key=lambda name: (total[rarest[name]], rarest[name])):
        where[name] = min(range(folds), key=lambda number: (filled[number, rarest[name]], sizes[number]))
        filled.update((where[name], stratum_of(i)) for i in groups[name])
        sizes[where[name]] += len(groups[name])
    done = [
        dataclasses.replace(i, split=LEFT_OUT) if i.split == "train" and where[part_key(i)] == fold else i
        for i in inspections
    ]
    if not has_training_defects(done):
        raise EchoError(f"with fold {fold} of {folds} left out, no defects remain to train on; add images of defects")
    return done


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise EchoError if the fractions are not three numbers that add up to 1."""
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise EchoError(
            f"fractions {list(fractions)} are not three numbers that add up to 1; write them for train, validation and "
            f"test, such as 0.6 0.1 0.3"
        )


def divided_parts(inspections: Sequence[Inspection]) -> list[PartKey]:
    """Return the parts with images in more than one split. Only splits given by a source can contain such parts.

    Unlabelled images do not count.
    """
    splits: dict[PartKey, set[str | None]] = defaultdict(set)
    for inspection in inspections:
        if inspection.split != UNLABELLED_SPLIT:
            splits[part_key(inspection)].add(inspection.split)
    return sorted(name for name, found in splits.items() if len(found) > 1)


def part_key(inspection: Inspection) -> PartKey:
    """Return the key that all images of one physical part share: (dataset, product, group)."""
    return inspection.dataset, inspection.product, inspection.group


def stratum_of(inspection: Inspection) -> PartKey:
    """Return (dataset, product, condition). Splits preserve the proportions of these strata."""
    return inspection.dataset, inspection.product, inspection.condition


def assign_synthetic(
    inspections: Sequence[Inspection], real: Sequence[Inspection], held_out: Collection[str]
) -> list[Inspection]:
    """Merge the `real` inspections, which have splits, with the synthetic ones. Keep the order of `inspections`.

    A synthetic defect goes to train if all images of its part are there and its condition is not held out. Otherwise
    it gets no split.
    """
    assigned = iter(real)
    splits: dict[tuple[str, str, str], set[str | None]] = defaultdict(set)
    for inspection in real:
        splits[part_key(inspection)].add(inspection.split)
    away = {product: held_out_conditions(found, held_out) for product, found in conditions_of(inspections).items()}

    def trained(made: Inspection) -> bool:
        return splits[part_key(made)] == {"train"} and made.condition not in away[made.dataset, made.product]

    return [
        dataclasses.replace(i, split="train" if trained(i) else None) if i.synthetic else next(assigned)
        for i in inspections
    ]


def queries(inspections: Sequence[Inspection]) -> list[Inspection]:
    """Return the images that get questions: all except `REFERENCE_SPLIT` and a train split that has only normal images.

    A train split without defects, as in MVTec AD and MMAD, cannot train the roles. It serves as the reference pool.
    """
    unasked = {REFERENCE_SPLIT} if has_training_defects(inspections) else {REFERENCE_SPLIT, "train"}
    return [inspection for inspection in inspections if inspection.split not in unasked]


def reference_pool(inspections: Sequence[Inspection]) -> list[Inspection]:
    """Return the normal images that can be references: those of train, of any fold, and of `REFERENCE_SPLIT`."""
    return [i for i in inspections if i.split in ("train", LEFT_OUT, REFERENCE_SPLIT) and i.condition == GOOD]


def conditions_of(inspections: Sequence[Inspection]) -> dict[tuple[str, str], list[str]]:
    """Return the conditions in each product's images, keyed by (dataset, product): `good` first, the rest by name."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for inspection in inspections:
        found[inspection.dataset, inspection.product] |= {inspection.condition} - {UNLABELLED}
    return {place: sorted(names, key=lambda name: (name != GOOD, name)) for place, names in sorted(found.items())}
