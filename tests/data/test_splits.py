"""Splits keep groups whole and conditions in proportion, depend only on the seed, and can hold names out."""

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


def make_tiles(groups: dict[str, int], size: int = 6, split: str | None = None, prefix: str = "") -> list[Inspection]:
    """Make `groups[condition]` groups of `size` images of one product."""
    return [
        Inspection(f"{name}/{index}", f"{name}/{index}.png", "line", "tile", condition, name, split)
        for condition, count in groups.items()
        for name in (f"{prefix}{condition}-{number}" for number in range(count))
        for index in range(size)
    ]


def share(inspections: list[Inspection], split: str, condition: str) -> float:
    of_condition = [i for i in inspections if i.condition == condition]
    return sum(i.split == split for i in of_condition) / len(of_condition)


def test_groups_stay_whole_and_every_image_gets_a_split():
    done = assign_splits(make_tiles({"good": 40, "crack": 20, "fray": 5}), seed=0, fractions=SHARES)
    assert divided_parts(done) == []
    assert {i.split for i in done} == {"train", "validation", "test"}


def test_every_condition_gets_its_share_in_every_split():
    done = assign_splits(make_tiles({"good": 100, "crack": 50}), seed=3, fractions=SHARES)
    for condition in ("good", "crack"):
        for split, wanted in zip(("train", "validation", "test"), SHARES, strict=True):
            assert share(done, split, condition) == pytest.approx(wanted, abs=0.03)


@pytest.mark.parametrize(
    ("groups", "wanted"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (2, 0, 1)), (6, (3, 1, 2)), (10, (6, 1, 3))]
)
def test_rare_condition_goes_to_train_then_test_then_validation(groups, wanted):
    done = assign_splits(make_tiles({"good": 30, "fray": groups}), seed=1, fractions=SHARES)
    counts = Counter(i.split for i in done if i.condition == "fray")
    assert tuple(counts[split] // 6 for split in ("train", "validation", "test")) == wanted


def test_groups_of_several_conditions_stay_whole():
    mixed = [
        Inspection(f"{g}/{c}", f"{g}/{c}.png", "line", "tile", c, str(g)) for g in range(30) for c in ("good", "crack")
    ]
    assert divided_parts(assign_splits(mixed, seed=0, fractions=SHARES)) == []


def test_splits_do_not_depend_on_the_order_of_the_source():
    inspections = make_tiles({"good": 25, "crack": 12})
    shuffled = random.Random(5).sample(inspections, len(inspections))
    first = {i.id: i.split for i in assign_splits(inspections, 0, SHARES)}
    assert first == {i.id: i.split for i in assign_splits(shuffled, 0, SHARES)}


def test_splits_depend_on_the_seed():
    inspections = make_tiles({"good": 25, "crack": 12})
    assert assign_splits(inspections, 0, SHARES) == assign_splits(inspections, 0, SHARES)
    assert assign_splits(inspections, 0, SHARES) != assign_splits(inspections, 1, SHARES)


def test_splits_are_those_of_the_published_results():
    done = assign_splits(make_tiles({"good": 10, "crack": 5}, size=1), 0, SHARES)
    assert [i.group for i in done if i.split == "validation"] == ["good-4"]
    assert [i.group for i in done if i.split == "test"] == ["good-2", "good-3", "good-9", "crack-3", "crack-4"]


def test_same_group_name_in_two_products_means_two_parts():
    inspections = [Inspection(f"{p}/{g}", f"{p}/{g}.png", "line", p, "good", str(g)) for p in "abc" for g in range(20)]
    counts = defaultdict(Counter)
    for inspection in assign_splits(inspections, 0, SHARES):
        counts[inspection.product][inspection.split] += 1
    assert all(counts[product] == {"train": 12, "validation": 2, "test": 6} for product in "abc")


def test_image_without_a_split_follows_its_group():
    given = Inspection("a", "a.png", "line", "tile", "good", "g1", "test")
    follower = Inspection("b", "b.png", "line", "tile", "good", "g1")
    done, _, _ = make_splits([given, follower, *make_tiles({"good": 10, "crack": 10}, size=1)], "given", 0, SHARES)
    assert [i.split for i in done[:2]] == ["test", "test"]


def test_validation_is_taken_from_a_train_split_with_defects():
    train = make_tiles({"good": 20, "crack": 20}, split="train", prefix="x")
    test = make_tiles({"good": 5, "crack": 5}, split="test", prefix="y")
    done, description, _ = make_splits([*train, *test], "given", 0, SHARES)
    assert [i.split for i in done if i.group.startswith("y")] == ["test"] * len(test)
    counts = Counter(i.split for i in done if i.group.startswith("x"))
    assert counts["validation"] / len(train) == pytest.approx(1 / 7, abs=0.05)
    assert divided_parts(done) == []
    assert "validation" in description


def test_train_split_of_only_normal_images_stays_whole():
    done, description, _ = make_splits(
        [*make_tiles({"good": 20}, split="train"), *make_tiles({"crack": 5}, split="test")], "given", 0, SHARES
    )
    assert {i.split for i in done} == {"train", "test"}
    assert description == "given by the source"


def test_group_that_the_source_divides_keeps_its_splits():
    train = make_tiles({"good": 20, "crack": 20}, split="train")
    leak = Inspection("leak", "leak.png", "line", "tile", "crack", "crack-0", "test")
    done, _, _ = make_splits([*train, leak], "given", 0, SHARES)
    assert {i.split for i in done if i.group == "crack-0"} == {"train", "test"}
    assert divided_parts(done) == [("line", "tile", "crack-0")]


def test_seeded_ignores_the_splits_of_the_source():
    train, test = (
        make_tiles({"good": 30}, split="train", prefix="x"),
        make_tiles({"good": 30, "crack": 30}, split="test"),
    )
    done, _, _ = make_splits([*train, *test], "seeded", 0, SHARES)
    assert share(done, "train", "crack") == pytest.approx(0.6, abs=0.05)
    assert divided_parts(done) == []


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.2, 0.2), (1.2, -0.1, -0.1)])
def test_fractions_must_be_three_shares_of_one(fractions):
    with pytest.raises(EchoError, match=r"three numbers that add up to 1"):
        assign_splits(make_tiles({"good": 3}), 0, fractions)


# holding names out for the test split


def make_products(conditions: dict[str, dict[str, int]], size: int = 2, dataset: str = "line") -> list[Inspection]:
    """Make `conditions[product][condition]` groups of `size` images."""
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


def three_datasets() -> list[Inspection]:
    return [i for name in ("first", "second", "third") for i in make_products(SEVERAL_PRODUCTS, dataset=name)]


@pytest.mark.parametrize("how", sorted(HELD_OUT_FIELDS))
@pytest.mark.parametrize("seed", range(4))
def test_held_out_names_are_only_in_test_and_parts_stay_whole(how, seed):
    inspections = three_datasets()
    done, description, held = make_splits(inspections, how, seed, SHARES)
    assert [i.id for i in done] == [i.id for i in inspections]
    assert divided_parts(done) == []
    shown = {
        split: {
            kind
            for i in done
            if i.split == split
            for kind in (defects_of(i.condition) if how == "by_condition" else [getattr(i, HELD_OUT_FIELDS[how])])
        }
        for split in ("train", "validation", "test", REFERENCE_SPLIT)
    }
    assert held
    assert set(held) & (shown["train"] | shown["validation"]) == set()
    assert set(held) <= shown["test"]
    assert all(name in description for name in held)
    assert shown["train"]
    assert shown["validation"] <= shown["train"]
    if how != "by_condition":
        assert shown["test"] == shown[REFERENCE_SPLIT] == set(held)
        assert all(i.condition == "good" for i in done if i.split == REFERENCE_SPLIT)
        assert share([i for i in done if getattr(i, HELD_OUT_FIELDS[how]) in held], "test", "crack") == 1
    assert share([i for i in done if i.split == "test"], "test", "good") == 1, "a test needs normal images too"


@pytest.mark.parametrize("how", sorted(HELD_OUT_FIELDS))
def test_drawn_names_depend_on_the_seed_and_not_on_the_order(how):
    inspections = three_datasets()
    shuffled = random.Random(5).sample(inspections, len(inspections))
    first, _, held = make_splits(inspections, how, 0, SHARES)
    again, _, same = make_splits(shuffled, how, 0, SHARES)
    assert held == same
    assert {i.id: i.split for i in first} == {i.id: i.split for i in again}
    assert len({tuple(make_splits(inspections, how, seed, SHARES)[2]) for seed in range(12)}) > 1


def test_requested_names_are_held_out_and_the_others_trained_on():
    inspections = make_products(SEVERAL_PRODUCTS)
    done, description, held = make_splits(inspections, "by_product", 0, SHARES, ["rod", "cap"])
    assert held == ["cap", "rod"]
    assert "cap, rod" in description
    assert "drawn" not in description
    assert {i.product for i in done if i.split == "train"} == {"nut", "ring", "tube"}
    assert {i.split for i in done if i.product == "nut"} == {"train", "validation"}


def test_a_share_of_the_names_is_drawn_but_at_least_one():
    products = {f"p{n}": {"good": 4, "dent": 4} for n in range(10)}
    assert len(make_splits(make_products(products), "by_product", 0, (0.6, 0.1, 0.3))[2]) == 3
    assert len(make_splits(make_products(products), "by_product", 0, (0.9, 0.1, 0.0))[2]) == 1
    assert len(make_splits(make_products(products), "by_product", 0, (0.05, 0.0, 0.95))[2]) == 9


def test_by_condition_holds_out_every_image_with_the_defect():
    conditions = {
        "cap": {"good": 20, "bent": 5, "melt": 5, "bent+melt": 4, "combined": 3},
        "nut": {"good": 9, "melt": 6, "combined": 3},
    }
    done, _, _ = make_splits(make_products(conditions), "by_condition", 0, SHARES, ["bent"])
    splits = defaultdict(set)
    for i in done:
        splits[i.product, i.condition].add(i.split)
    assert splits["cap", "bent"] == splits["cap", "bent+melt"] == {"test"}
    assert splits["cap", "combined"] == {"test"}, "it may show the held-out defect"
    assert "train" in splits["nut", "combined"], "this product has no held-out defect"
    assert splits["cap", "melt"] | splits["nut", "melt"] == {"train", "validation"}
    assert splits["cap", "good"] == {"train", "validation", "test"}


def test_by_condition_holds_out_whole_parts():
    """One image of the part shows a held-out defect; its other images show none or a different one."""
    parts = make_products({"tile": {"good": 12, "crack": 8, "fray": 4}})
    moved = [
        dataclasses.replace(i, group="tile-fray-0") if i.group in ("tile-good-0", "tile-crack-0") else i for i in parts
    ]
    done, _, _ = make_splits(moved, "by_condition", 0, SHARES, ["fray"])
    assert divided_parts(done) == []
    assert {i.split for i in done if i.group == "tile-fray-0"} == {"test"}
    assert {i.condition for i in done if i.split == "test"} == {"good", "crack", "fray"}


def test_training_images_of_a_held_out_product_become_references():
    found = make_products({"cap": {"good": 6, "dent": 3}, "nut": {"good": 6, "dent": 3}}, size=1)
    given = [
        dataclasses.replace(i, split="test" if i.condition != "good" or i.group.endswith(("4", "5")) else "train")
        for i in found
    ]
    done, _, _ = make_splits(given, "by_product", 0, SHARES, ["nut"])
    before, after = {i.id: i.split for i in given}, {i.id: i.split for i in done if i.product == "nut"}
    assert all(split == ("test" if before[name] == "test" else REFERENCE_SPLIT) for name, split in after.items())
    assert Counter(i.split for i in done if i.product == "cap" and i.condition == "dent")["train"] > 0


def test_defect_names_are_joined_and_separated():
    assert join_defects(["melt", "bent", "melt"]) == "bent+melt"
    assert defects_of("bent+melt") == {"bent", "melt"}
    assert not defects_of("good")
    assert not defects_of("combined")
    assert held_out_conditions({"good", "bent", "bent+melt", "combined"}, ["melt"]) == {"bent+melt", "combined"}
    assert held_out_conditions({"good", "bent", "combined"}, ["melt"]) == set()


@pytest.mark.parametrize(
    ("how", "held", "fractions", "message"),
    [
        ("by_product", ["cpa"], SHARES, "no product is named 'cpa'; did you mean 'cap'"),
        ("by_condition", ["rust"], SHARES, "choose from crack, dent"),
        ("by_condition", ["good"], SHARES, "no condition is named 'good'"),
        ("by_dataset", [], SHARES, "of 1 (line) none would be left"),
        ("by_product", ["cap", "nut"], SHARES, "none would be left to train on"),
        ("seeded", ["cap"], SHARES, "held_out requires split by_product, by_condition, by_dataset, not seeded"),
        ("given", ["cap"], SHARES, "not given"),
        ("by_product", [], (0.0, 0.5, 0.5), "nothing to train on"),
        ("by_product", [], (0.5, 0.5), "three numbers that add up to 1"),
    ],
)
def test_impossible_splits_are_rejected_with_the_reason(how, held, fractions, message):
    inspections = make_products({"cap": {"good": 4, "dent": 2}, "nut": {"good": 4, "crack": 2}})
    with pytest.raises(EchoError, match=re.escape(message)):
        make_splits(inspections, how, 0, fractions, held)


def test_a_held_out_name_may_be_written_in_either_unicode_form():
    images = make_tiles({"good": 4, "Überhöhung": 3, "Riss": 3})
    expected = make_splits(images, "by_condition", 0, SHARES, ["Überhöhung"])
    assert make_splits(images, "by_condition", 0, SHARES, ["U\u0308berho\u0308hung"]) == expected
