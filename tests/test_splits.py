"""Splits: by group, by condition, by seed."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest

from echo_ft.records import EchoError, Inspection
from echo_ft.splits import assign_splits, divided_parts, make_splits

SHARES = (0.6, 0.1, 0.3)


def tiles(groups: dict[str, int], size: int = 6, split: str | None = None, prefix: str = "") -> list[Inspection]:
    """`groups[condition]` groups of `size` photographs of one product."""
    return [
        Inspection(f"{name}/{index}", f"{name}/{index}.png", "line", "tile", condition, name, split)
        for condition, count in groups.items()
        for name in (f"{prefix}{condition}-{number}" for number in range(count))
        for index in range(size)
    ]


def share(inspections: list[Inspection], split: str, condition: str) -> float:
    of_condition = [i for i in inspections if i.condition == condition]
    return sum(i.split == split for i in of_condition) / len(of_condition)


def test_groups_stay_whole_and_every_photograph_gets_a_split():
    done = assign_splits(tiles({"good": 40, "crack": 20, "fray": 5}), seed=0, fractions=SHARES)
    assert divided_parts(done) == []
    assert {i.split for i in done} == {"train", "validation", "test"}


def test_each_condition_has_its_share_in_each_split():
    done = assign_splits(tiles({"good": 100, "crack": 50}), seed=3, fractions=SHARES)
    for condition in ("good", "crack"):
        for split, wanted in zip(("train", "validation", "test"), SHARES, strict=True):
            assert share(done, split, condition) == pytest.approx(wanted, abs=0.03)


@pytest.mark.parametrize(
    ("groups", "wanted"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (2, 0, 1)), (6, (3, 1, 2)), (10, (6, 1, 3))]
)
def test_a_rare_condition_reaches_train_then_test_then_validation(groups, wanted):
    done = assign_splits(tiles({"good": 30, "fray": groups}), seed=1, fractions=SHARES)
    counts = Counter(i.split for i in done if i.condition == "fray")
    assert tuple(counts[split] // 6 for split in ("train", "validation", "test")) == wanted


def test_groups_of_several_conditions_stay_whole():
    mixed = [
        Inspection(f"{g}/{c}", f"{g}/{c}.png", "line", "tile", c, str(g)) for g in range(30) for c in ("good", "crack")
    ]
    assert divided_parts(assign_splits(mixed, seed=0, fractions=SHARES)) == []


def test_the_order_of_the_source_does_not_matter():
    inspections = tiles({"good": 25, "crack": 12})
    shuffled = random.Random(5).sample(inspections, len(inspections))
    first = {i.id: i.split for i in assign_splits(inspections, 0, SHARES)}
    assert first == {i.id: i.split for i in assign_splits(shuffled, 0, SHARES)}


def test_the_seed_decides():
    inspections = tiles({"good": 25, "crack": 12})
    assert assign_splits(inspections, 0, SHARES) == assign_splits(inspections, 0, SHARES)
    assert assign_splits(inspections, 0, SHARES) != assign_splits(inspections, 1, SHARES)


def test_equal_group_names_of_two_products_are_two_parts():
    inspections = [Inspection(f"{p}/{g}", f"{p}/{g}.png", "line", p, "good", str(g)) for p in "abc" for g in range(20)]
    counts = defaultdict(Counter)
    for inspection in assign_splits(inspections, 0, SHARES):
        counts[inspection.product][inspection.split] += 1
    assert all(counts[product] == {"train": 12, "validation": 2, "test": 6} for product in "abc")


def test_given_splits_stand_and_a_photograph_without_one_follows_its_group():
    given = Inspection("a", "a.png", "line", "tile", "good", "g1", "test")
    follower = Inspection("b", "b.png", "line", "tile", "good", "g1")
    done, _ = make_splits([given, follower, *tiles({"good": 10, "crack": 10}, size=1)], "given", 0, SHARES)
    assert [i.split for i in done[:2]] == ["test", "test"]


def test_validation_is_carved_out_of_a_train_split_that_has_defects():
    train = tiles({"good": 20, "crack": 20}, split="train", prefix="x")
    test = tiles({"good": 5, "crack": 5}, split="test", prefix="y")
    done, words = make_splits([*train, *test], "given", 0, SHARES)
    assert [i.split for i in done if i.group.startswith("y")] == ["test"] * len(test)
    counts = Counter(i.split for i in done if i.group.startswith("x"))
    assert counts["validation"] / len(train) == pytest.approx(1 / 7, abs=0.05)
    assert divided_parts(done) == [] and "validation" in words


def test_a_train_split_of_normals_alone_is_left_whole():
    done, words = make_splits(
        [*tiles({"good": 20}, split="train"), *tiles({"crack": 5}, split="test")], "given", 0, SHARES
    )
    assert {i.split for i in done} == {"train", "test"} and words == "given by the source"


def test_a_group_that_the_source_divides_keeps_what_it_was_given():
    train = tiles({"good": 20, "crack": 20}, split="train")
    leak = Inspection("leak", "leak.png", "line", "tile", "crack", "crack-0", "test")
    done, _ = make_splits([*train, leak], "given", 0, SHARES)
    assert {i.split for i in done if i.group == "crack-0"} == {"train", "test"}
    assert divided_parts(done) == [("line", "tile", "crack-0")]


def test_seeded_splits_what_the_source_had_split():
    train, test = tiles({"good": 30}, split="train", prefix="x"), tiles({"good": 30, "crack": 30}, split="test")
    done, _ = make_splits([*train, *test], "seeded", 0, SHARES)
    assert share(done, "train", "crack") == pytest.approx(0.6, abs=0.05)
    assert divided_parts(done) == []


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.2, 0.2), (1.2, -0.1, -0.1)])
def test_fractions_that_are_no_shares_of_a_whole_are_refused(fractions):
    with pytest.raises(EchoError, match=r"three shares of 1"):
        assign_splits(tiles({"good": 3}), 0, fractions)
