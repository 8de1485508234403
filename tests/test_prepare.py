"""What a build does to photographs and cases one by one: finds broken files, balances what is trained on, and keeps
what is held out from all that training reads."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.build import build
from data_prep.images import image_fault
from data_prep.prepare import MAX_REPEATS, balanced
from echo_ft.dataset import cases, load_dataset
from echo_ft.records import ROLES, Case, EchoError, Inspection, Seen, Truth, read_jsonl
from echo_ft.splits import REFERENCE
from tests.test_build import config, draw_manifest


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


PRODUCTS = ("cap", "ring", "washer")


@pytest.fixture(scope="module")
def listed(tmp_path_factory) -> Path:
    return draw_manifest(tmp_path_factory.mktemp("raw"), PRODUCTS, normals=8, defects=4)


def built(listed: Path, output: Path, **changes) -> tuple[dict, list[Inspection], str]:
    """The manifest, the inspections, and all that training reads, as text."""
    text = {"good": "An even ramp.", "dent": "A black square. It causes leaks.", "stain": "A blot. It causes rust."}
    knowledge = listed.with_name("knowledge.yaml")
    knowledge.write_text(json.dumps({"parts": dict.fromkeys(PRODUCTS, text)}))
    manifest = build(config(listed, output, knowledge=knowledge, **changes))
    rows = [(output / "sft" / role / f"{name}.jsonl").read_text() for role in ROLES for name in ("train", "validation")]
    assert all(rows[::2]), "every role has training rows"
    return manifest, list(read_jsonl(output / "inspections.jsonl", Inspection)), "".join(rows)


def test_training_reads_nothing_of_a_condition_that_is_held_out(listed, tmp_path):
    manifest, inspections, read = built(listed, tmp_path / "out", split="by_condition", held_out=["dent"])
    assert manifest["held_out"] == ["dent"] and "test alone has dent" in manifest["splits"]
    assert manifest["config"]["split"] == "by_condition"
    assert {i.split for i in inspections if i.condition == "dent"} == {"test"}
    assert "dent" not in read.casefold() and "leaks" not in read and "stain" in read and "rust" in read
    asked = cases(load_dataset(tmp_path / "out"), "test")
    assert {case.truth.condition for case in asked} == {"good", "dent"}
    options = [option for case in asked for question in case.seen.questions for option in question.options.values()]
    assert {"dent", "stain"} <= set(options), "a test offers all conditions"
    assert all({"dent", "stain"} <= {entry.condition for entry in case.seen.knowledge} for case in asked)


def test_training_reads_nothing_of_a_product_that_is_held_out_and_its_normals_serve_as_references(listed, tmp_path):
    manifest, inspections, read = built(listed, tmp_path / "out", split="by_product", held_out=["ring"])
    assert manifest["held_out"] == ["ring"] and "ring" not in read.casefold()
    assert manifest["counts"]["products"]["test"] == {"ring": 20}
    normals = {i.image for i in inspections if i.split == REFERENCE}
    assert {i.product for i in inspections if i.split == REFERENCE} == {"ring"} and len(normals) == 2 * 6
    asked = cases(load_dataset(tmp_path / "out"), "test")
    assert {reference.image for case in asked for reference in case.seen.references} <= normals
    assert all(case.seen.references for case in asked) and not normals & {case.seen.query for case in asked}
    pool = manifest["counts"]["reference_pool"]
    words = f"{pool} normal photographs serve as references: {pool - 12} of the train split, 12 of what is held out"
    assert pool - 12 > 0 and f"{words} for the test (ring)" in (tmp_path / "out" / "preview.html").read_text()


def test_what_the_seed_holds_out_is_told_and_the_same_each_time(listed, tmp_path):
    first, _, _ = built(listed, tmp_path / "out", split="by_product")
    assert len(first["held_out"]) == 1 and first["held_out"][0] in first["splits"]
    assert first["config"]["held_out"] == []
    again, _, _ = built(listed, tmp_path / "again", split="by_product")
    assert again["fingerprint"] == first["fingerprint"]


def test_a_dataset_column_lets_one_list_hold_several_datasets(listed, tmp_path):
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    for row in rows:
        row["dataset"] = "new line" if row["product"] == "ring" else "old line"
    several = listed.with_name("several.jsonl")
    several.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = build(config(several, tmp_path / "out", split="by_dataset", held_out=["new line"]))
    assert manifest["counts"]["products"]["test"].keys() == {"ring"}
    with pytest.raises(EchoError, match="no dataset is named 'old lin'; did you mean 'old line'"):
        build(config(several, tmp_path / "other", split="by_dataset", held_out=["old lin"]))
