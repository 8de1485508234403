"""What a build does to photographs and cases one by one: finds broken files, balances what is trained on."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from data_prep.images import image_fault
from data_prep.prepare import MAX_REPEATS, balanced
from echo_ft.records import Case, Seen, Truth


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
def test_a_truncated_file_is_found_in_every_format(tmp_path, suffix):
    path = tmp_path / f"part.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (80, 90), dtype=np.uint8)
    Image.fromarray(noise).convert("RGB").save(path)
    assert image_fault(path) is None
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert "broken" in str(image_fault(path))


def small_case(name: str, product: str, condition: str) -> Case:
    return Case(name, "line", product, name, Seen(name, (), (), ()), Truth(condition, None, (), {}))


def test_balancing_repeats_the_rarer_side_of_each_product_and_leaves_none_out():
    found = [small_case(f"a{i}", "a", "good") for i in range(10)] + [small_case(f"d{i}", "a", "dent") for i in range(4)]
    found += [small_case(f"b{i}", "b", "good" if i < 2 else "dent") for i in range(5)]
    chosen = balanced(found, seed=0)
    sides = Counter((case.product, case.truth.condition == "good") for case in chosen)
    assert sides == {("a", True): 10, ("a", False): 10, ("b", True): 3, ("b", False): 3}
    assert {case.id for case in chosen} == {case.id for case in found}
    assert max(Counter(case.id for case in chosen).values()) == 3
    assert chosen == balanced(found, seed=0) != balanced(found, seed=1)


def test_balancing_repeats_no_case_too_often():
    found = [small_case(f"a{i}", "a", "good") for i in range(100)] + [small_case("d", "a", "dent")]
    counts = Counter(case.truth.condition for case in balanced(found, seed=0))
    assert counts == {"good": MAX_REPEATS, "dent": MAX_REPEATS}


@pytest.mark.parametrize(("normals", "dents"), [(1, 9), (2, 2), (2, 9), (40, 3), (9, 30), (100, 1)])
def test_a_repeated_case_never_follows_itself(normals, dents):
    """Rows of one case that touch would be read as one case of double size."""
    found = [small_case(f"a{i}", "a", "good") for i in range(normals)]
    found += [small_case(f"d{i}", "a", "dent") for i in range(dents)]
    for seed in range(40):
        chosen = balanced(found, seed)
        assert all(one.id != next_.id for one, next_ in pairwise(chosen))
        size = min(max(normals, dents), MAX_REPEATS * min(normals, dents))
        assert Counter(case.truth.condition for case in chosen) == {"good": size, "dent": size}


def test_balancing_leaves_a_product_of_one_side_alone():
    found = [small_case(f"a{i}", "a", "good") for i in range(5)]
    assert sorted(case.id for case in balanced(found, seed=0)) == [f"a{i}" for i in range(5)]
