"""Splits: by group, by condition, by seed."""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter, defaultdict

import pytest

from echo_ft.data.splits import (
    HELD_OUT_FIELDS,
    REFERENCE_SPLIT,
    assign_splits,
    defects_of,
    divided_parts,
    held_out_conditions,
    join_defects,
    make_splits,
)
from echo_ft.errors import EchoError
from echo_ft.records import Inspection

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


def test_the_draw_is_the_one_that_published_figures_rest_on():
    done = assign_splits(tiles({"good": 10, "crack": 5}, size=1), 0, SHARES)
    assert [i.group for i in done if i.split == "validation"] == ["good-4"]
    assert [i.group for i in done if i.split == "test"] == ["good-2", "good-3", "good-9", "crack-3", "crack-4"]


def test_equal_group_names_of_two_products_are_two_parts():
    inspections = [Inspection(f"{p}/{g}", f"{p}/{g}.png", "line", p, "good", str(g)) for p in "abc" for g in range(20)]
    counts = defaultdict(Counter)
    for inspection in assign_splits(inspections, 0, SHARES):
        counts[inspection.product][inspection.split] += 1
    assert all(counts[product] == {"train": 12, "validation": 2, "test": 6} for product in "abc")


def test_given_splits_stand_and_a_photograph_without_one_follows_its_group():
    given = Inspection("a", "a.png", "line", "tile", "good", "g1", "test")
    follower = Inspection("b", "b.png", "line", "tile", "good", "g1")
    done, _, _ = make_splits([given, follower, *tiles({"good": 10, "crack": 10}, size=1)], "given", 0, SHARES)
    assert [i.split for i in done[:2]] == ["test", "test"]


def test_validation_is_carved_out_of_a_train_split_that_has_defects():
    train = tiles({"good": 20, "crack": 20}, split="train", prefix="x")
    test = tiles({"good": 5, "crack": 5}, split="test", prefix="y")
    done, words, _ = make_splits([*train, *test], "given", 0, SHARES)
    assert [i.split for i in done if i.group.startswith("y")] == ["test"] * len(test)
    counts = Counter(i.split for i in done if i.group.startswith("x"))
    assert counts["validation"] / len(train) == pytest.approx(1 / 7, abs=0.05)
    assert divided_parts(done) == [] and "validation" in words


def test_a_train_split_of_normals_alone_is_left_whole():
    done, words, _ = make_splits(
        [*tiles({"good": 20}, split="train"), *tiles({"crack": 5}, split="test")], "given", 0, SHARES
    )
    assert {i.split for i in done} == {"train", "test"} and words == "given by the source"


def test_a_group_that_the_source_divides_keeps_what_it_was_given():
    train = tiles({"good": 20, "crack": 20}, split="train")
    leak = Inspection("leak", "leak.png", "line", "tile", "crack", "crack-0", "test")
    done, _, _ = make_splits([*train, leak], "given", 0, SHARES)
    assert {i.split for i in done if i.group == "crack-0"} == {"train", "test"}
    assert divided_parts(done) == [("line", "tile", "crack-0")]


def test_seeded_splits_what_the_source_had_split():
    train, test = tiles({"good": 30}, split="train", prefix="x"), tiles({"good": 30, "crack": 30}, split="test")
    done, _, _ = make_splits([*train, *test], "seeded", 0, SHARES)
    assert share(done, "train", "crack") == pytest.approx(0.6, abs=0.05)
    assert divided_parts(done) == []


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.2, 0.2), (1.2, -0.1, -0.1)])
def test_fractions_that_are_no_shares_of_a_whole_are_refused(fractions):
    with pytest.raises(EchoError, match=r"three shares of 1"):
        assign_splits(tiles({"good": 3}), 0, fractions)


# what the test split keeps for itself


def line(conditions: dict[str, dict[str, int]], size: int = 2, dataset: str = "line") -> list[Inspection]:
    """`conditions[product][condition]` groups of `size` photographs."""
    return [
        Inspection(f"{dataset}/{name}/{index}", f"{dataset}/{name}/{index}.png", dataset, product, condition, name)
        for product, found in conditions.items()
        for condition, count in found.items()
        for name in (f"{product}-{condition}-{number}" for number in range(count))
        for index in range(size)
    ]


SEVERAL_PRODUCTS = {
    name: {"good": 20, "crack": 6, "dent": 6, "stain": 6, "crack+dent": 3}
    for name in ("cap", "nut", "ring", "rod", "tube")
}


def several_datasets() -> list[Inspection]:
    return [i for name in ("first", "second", "third") for i in line(SEVERAL_PRODUCTS, dataset=name)]


@pytest.mark.parametrize("how", sorted(HELD_OUT_FIELDS))
@pytest.mark.parametrize("seed", range(4))
def test_what_is_held_out_is_in_the_test_split_alone_and_parts_stay_whole(how, seed):
    inspections = several_datasets()
    done, words, held = make_splits(inspections, how, seed, SHARES)
    assert [i.id for i in done] == [i.id for i in inspections] and divided_parts(done) == []
    shown = {
        split: {
            kind
            for i in done
            if i.split == split
            for kind in (defects_of(i.condition) if how == "by_condition" else [getattr(i, HELD_OUT_FIELDS[how])])
        }
        for split in ("train", "validation", "test", REFERENCE_SPLIT)
    }
    assert held and set(held) & (shown["train"] | shown["validation"]) == set()
    assert set(held) <= shown["test"] and all(name in words for name in held)
    assert shown["train"] and shown["validation"] <= shown["train"]
    if how != "by_condition":
        assert shown["test"] == shown[REFERENCE_SPLIT] == set(held)
        assert all(i.condition == "good" for i in done if i.split == REFERENCE_SPLIT)
        assert share([i for i in done if getattr(i, HELD_OUT_FIELDS[how]) in held], "test", "crack") == 1
    assert share([i for i in done if i.split == "test"], "test", "good") == 1, "normals are there to be told apart"


@pytest.mark.parametrize("how", sorted(HELD_OUT_FIELDS))
def test_what_is_drawn_depends_on_the_seed_and_not_on_the_order(how):
    inspections = several_datasets()
    shuffled = random.Random(5).sample(inspections, len(inspections))
    first, _, held = make_splits(inspections, how, 0, SHARES)
    again, _, same = make_splits(shuffled, how, 0, SHARES)
    assert held == same and {i.id: i.split for i in first} == {i.id: i.split for i in again}
    assert len({tuple(make_splits(inspections, how, seed, SHARES)[2]) for seed in range(12)}) > 1


def test_held_out_names_are_taken_and_the_others_trained_on():
    inspections = line(SEVERAL_PRODUCTS)
    done, words, held = make_splits(inspections, "by_product", 0, SHARES, ["rod", "cap"])
    assert held == ["cap", "rod"] and "cap, rod" in words and "drawn" not in words
    assert {i.product for i in done if i.split == "train"} == {"nut", "ring", "tube"}
    assert {i.split for i in done if i.product == "nut"} == {"train", "validation"}


def test_a_share_of_the_names_is_drawn_and_at_least_one():
    products = {f"p{n}": {"good": 4, "dent": 4} for n in range(10)}
    assert len(make_splits(line(products), "by_product", 0, (0.6, 0.1, 0.3))[2]) == 3
    assert len(make_splits(line(products), "by_product", 0, (0.9, 0.1, 0.0))[2]) == 1
    assert len(make_splits(line(products), "by_product", 0, (0.05, 0.0, 0.95))[2]) == 9


def test_by_condition_holds_out_every_photograph_that_shows_the_kind():
    conditions = {
        "cap": {"good": 20, "bent": 5, "melt": 5, "bent+melt": 4, "combined": 3},
        "nut": {"good": 9, "melt": 6, "combined": 3},
    }
    done, _, _ = make_splits(line(conditions), "by_condition", 0, SHARES, ["bent"])
    splits = defaultdict(set)
    for i in done:
        splits[i.product, i.condition].add(i.split)
    assert splits["cap", "bent"] == splits["cap", "bent+melt"] == {"test"}
    assert splits["cap", "combined"] == {"test"}, "it may show what is held out"
    assert "train" in splits["nut", "combined"], "this product's cannot"
    assert splits["cap", "melt"] | splits["nut", "melt"] == {"train", "validation"}
    assert splits["cap", "good"] == {"train", "validation", "test"}


def test_by_condition_takes_a_whole_part_along():
    """A part with a held-out defect in one photograph and none, or another defect, in the others."""
    parts = line({"tile": {"good": 12, "crack": 8, "fray": 4}})
    moved = [
        dataclasses.replace(i, group="tile-fray-0") if i.group in ("tile-good-0", "tile-crack-0") else i for i in parts
    ]
    done, _, _ = make_splits(moved, "by_condition", 0, SHARES, ["fray"])
    assert divided_parts(done) == []
    assert {i.split for i in done if i.group == "tile-fray-0"} == {"test"}
    assert {i.condition for i in done if i.split == "test"} == {"good", "crack", "fray"}


def test_what_a_source_gives_for_training_serves_a_held_out_product_as_reference_and_its_test_stays():
    found = line({"cap": {"good": 6, "dent": 3}, "nut": {"good": 6, "dent": 3}}, size=1)
    given = [
        dataclasses.replace(i, split="test" if i.condition != "good" or i.group.endswith(("4", "5")) else "train")
        for i in found
    ]
    done, _, _ = make_splits(given, "by_product", 0, SHARES, ["nut"])
    before, after = {i.id: i.split for i in given}, {i.id: i.split for i in done if i.product == "nut"}
    assert all(split == ("test" if before[name] == "test" else REFERENCE_SPLIT) for name, split in after.items())
    assert Counter(i.split for i in done if i.product == "cap" and i.condition == "dent")["train"] > 0


def test_kinds_of_defect_are_joined_and_told_apart():
    assert join_defects(["melt", "bent", "melt"]) == "bent+melt"
    assert defects_of("bent+melt") == {"bent", "melt"} and not defects_of("good") and not defects_of("combined")
    assert held_out_conditions({"good", "bent", "bent+melt", "combined"}, ["melt"]) == {"bent+melt", "combined"}
    assert held_out_conditions({"good", "bent", "combined"}, ["melt"]) == set()


@pytest.mark.parametrize(
    ("how", "held", "fractions", "words"),
    [
        ("by_product", ["cpa"], SHARES, "no product is named 'cpa'; did you mean 'cap'"),
        ("by_condition", ["rust"], SHARES, "choose from crack, dent"),
        ("by_condition", ["good"], SHARES, "no condition is named 'good'"),
        ("by_dataset", [], SHARES, "of 1 (line) none would be left"),
        ("by_product", ["cap", "nut"], SHARES, "none would be left to train on"),
        ("seeded", ["cap"], SHARES, "held_out requires split by_product, by_condition, by_dataset, not seeded"),
        ("given", ["cap"], SHARES, "not given"),
        ("by_product", [], (0.0, 0.5, 0.5), "nothing to train on"),
        ("by_product", [], (0.5, 0.5), "three shares of 1"),
    ],
)
def test_a_split_that_cannot_be_made_gets_one_clear_sentence(how, held, fractions, words):
    inspections = line({"cap": {"good": 4, "dent": 2}, "nut": {"good": 4, "crack": 2}})
    with pytest.raises(EchoError, match=re.escape(words)):
        make_splits(inspections, how, 0, fractions, held)
