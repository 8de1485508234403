"""A build finds broken files, balances training cases, and hides held-out data from everything that training reads."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.build import build, main
from data_prep.config import BuildConfig
from data_prep.faults import image_fault
from data_prep.prepare import RANDOM_REFERENCE_MARK, assign_configured_splits, group_by_inspection
from data_prep.sources import SOURCE_NAMES
from data_prep.training_rows import MAX_REPEATS, balance_cases, prefetch_images
from echo_ft.data.dataset import load_cases, load_dataset
from echo_ft.data.knowledge import near_duplicate_names
from echo_ft.data.splits import REFERENCE_SPLIT, make_splits
from echo_ft.errors import EchoError
from echo_ft.experts.targets import COMPARED_SIZE, load_compared
from echo_ft.files import read_jsonl, write_jsonl
from echo_ft.images import masks
from echo_ft.records import ROLES, Case, Inspection, Reference, Rejection, Seen, Truth
from tests.support.drawn_manifest import arguments, config, draw_manifest, edit_rows, rows, run


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
def test_a_truncated_file_is_found_in_every_format(tmp_path, suffix):
    path = tmp_path / f"part.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (80, 90), dtype=np.uint8)
    Image.fromarray(noise).convert("RGB").save(path)
    assert image_fault(path) is None
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert "broken" in str(image_fault(path))


def small_case(name: str, product: str, condition: str) -> Inspection:
    return Inspection(name, name, "line", product, condition, name)


def test_balancing_repeats_the_rarer_side_and_leaves_no_image_out():
    found = [small_case(f"a{i}", "a", "good") for i in range(10)] + [small_case(f"d{i}", "a", "dent") for i in range(4)]
    found += [small_case(f"b{i}", "b", "good" if i < 2 else "dent") for i in range(5)]
    chosen = balance_cases(found, seed=0)
    sides = Counter((case.product, case.condition == "good") for case in chosen)
    assert sides == {("a", True): 10, ("a", False): 10, ("b", True): 3, ("b", False): 3}
    assert {case.id for case in chosen} == {case.id for case in found}
    assert max(Counter(case.id for case in chosen).values()) == 3
    assert chosen == balance_cases(found, seed=0) != balance_cases(found, seed=1)


def test_balancing_repeats_no_case_too_often():
    found = [small_case(f"a{i}", "a", "good") for i in range(100)] + [small_case("d", "a", "dent")]
    counts = Counter(case.condition for case in balance_cases(found, seed=0))
    assert counts == {"good": MAX_REPEATS, "dent": MAX_REPEATS}


@pytest.mark.parametrize(("normals", "dents"), [(1, 9), (2, 2), (2, 9), (40, 3), (9, 30), (100, 1)])
def test_a_repeated_case_never_follows_itself(normals, dents):
    """Training would read adjacent rows of one case as one case of double size."""
    found = [small_case(f"a{i}", "a", "good") for i in range(normals)]
    found += [small_case(f"d{i}", "a", "dent") for i in range(dents)]
    for seed in range(40):
        chosen = balance_cases(found, seed)
        assert all(one.id != next_.id for one, next_ in pairwise(chosen))
        size = min(max(normals, dents), MAX_REPEATS * min(normals, dents))
        assert Counter(case.condition for case in chosen) == {"good": size, "dent": size}


def test_records_out_of_the_order_of_inspections_are_an_error():
    inspections = [small_case(name, "cap", "good") for name in "abc"]
    records = [Reference(name, "n.png", 1.0, rank) for name in "ac" for rank in (1, 2)]
    assert list(group_by_inspection(inspections, records)) == [records[:2], [], records[2:]]
    for wrong in (records[::-1], [*records, Reference("d", "n.png", 1.0, 1)], [*records, records[0]]):
        with pytest.raises(ValueError, match="are not in the order of the inspections"):
            list(group_by_inspection(inspections, wrong))


def test_names_that_differ_only_in_spelling_are_reported():
    found = [small_case("a", "cap", "rust"), small_case("b", "Cap", "Rust"), small_case("c", "nut", "rust_")]
    found += [small_case("d", "nut", "rust 2"), small_case("e", "cap 2", "bent+rust")]
    assert near_duplicate_names(found) == [
        "products of line that differ only in spelling: Cap, cap; if they are the same, spell them alike",
        "conditions of line that differ only in spelling: Rust, rust, rust_; if they are the same, spell them alike",
    ]


@pytest.mark.parametrize("method", ["retrieved", "given", "random"])
def test_training_skips_exactly_the_random_references(tmp_path, method):
    """The text that marks them may even occur in the names of parts and images."""
    reference = Reference(f"part {RANDOM_REFERENCE_MARK}", f"{RANDOM_REFERENCE_MARK}.png", 1.0, 1, method)
    write_jsonl(tmp_path / "references.jsonl", [reference])
    found = list(read_jsonl(tmp_path / "references.jsonl", Reference, exclude=RANDOM_REFERENCE_MARK))
    assert found == ([] if method == "random" else [reference])


@pytest.mark.parametrize("k", [1, 3, 12, 100])
def test_every_image_is_loaded_once_and_before_its_case(tmp_path, monkeypatch, k):
    read: list[str] = []
    blank = np.zeros((COMPARED_SIZE[1], COMPARED_SIZE[0]), np.float32)
    monkeypatch.setattr(masks, "load_grey", lambda path, size: read.append(path.name) or blank)
    names = {str(case): [f"{case}-{place}.png" for place in range(k + 1)] for case in range(60)}
    cases = []
    for name, (query, *others) in names.items():
        seen = Seen(query, tuple(Reference(name, other, 1.0, rank) for rank, other in enumerate(others, 1)), (), ())
        truth = Truth("good", None, (), {})
        cases.append((small_case(name, "a", "good"), Case(name, "line", "a", name, seen, truth)))
    for inspection, _ in prefetch_images(iter(cases), tmp_path):
        assert set(names[inspection.id]) <= set(read)
        for name in names[inspection.id]:
            load_compared(tmp_path, name)
    assert sorted(read) == sorted(name for shown in names.values() for name in shown)


def test_balancing_keeps_a_product_with_one_side_unchanged():
    found = [small_case(f"a{i}", "a", "good") for i in range(5)]
    assert sorted(case.id for case in balance_cases(found, seed=0)) == [f"a{i}" for i in range(5)]


PRODUCTS = ("cap", "ring", "washer")


@pytest.fixture(scope="module")
def listed(tmp_path_factory) -> Path:
    return draw_manifest(tmp_path_factory.mktemp("raw"), PRODUCTS, normals=8, defects=4)


def built(listed: Path, output: Path, **changes) -> tuple[dict, list[Inspection], str]:
    """The manifest, the inspections, and everything that training reads, as text."""
    text = {"good": "An even ramp.", "dent": "A black square. It causes leaks.", "stain": "A blot. It causes rust."}
    knowledge = listed.with_name("knowledge.yaml")
    knowledge.write_text(json.dumps({"parts": dict.fromkeys(PRODUCTS, text)}))
    manifest = build(config(listed, output, knowledge=knowledge, **changes))
    rows = [(output / "sft" / role / f"{name}.jsonl").read_text() for role in ROLES for name in ("train", "validation")]
    assert all(rows[::2]), "every role has training rows"
    return manifest, list(read_jsonl(output / "inspections.jsonl", Inspection)), "".join(rows)


def test_training_reads_nothing_about_a_held_out_condition(listed, tmp_path):
    manifest, inspections, read = built(listed, tmp_path / "out", split="by_condition", held_out=["dent"])
    assert manifest["held_out"] == ["dent"]
    assert "only test has dent" in manifest["splits"]
    assert manifest["config"]["split"] == "by_condition"
    assert {i.split for i in inspections if i.condition == "dent"} == {"test"}
    assert "dent" not in read.casefold()
    assert "leaks" not in read
    assert "stain" in read
    assert "rust" in read
    cases = load_cases(load_dataset(tmp_path / "out"), "test")
    assert {case.truth.condition for case in cases} == {"good", "dent"}
    options = [option for case in cases for question in case.seen.questions for option in question.options.values()]
    assert {"dent", "stain"} <= set(options), "the test split offers all conditions"
    assert all({"dent", "stain"} <= {entry.condition for entry in case.seen.knowledge} for case in cases)


def test_training_reads_nothing_about_a_held_out_product(listed, tmp_path):
    manifest, inspections, read = built(listed, tmp_path / "out", split="by_product", held_out=["ring"])
    assert manifest["held_out"] == ["ring"]
    assert "ring" not in read.casefold()
    assert manifest["counts"]["products"]["test"] == {"ring": 20}
    normals = {i.image for i in inspections if i.split == REFERENCE_SPLIT}
    assert {i.product for i in inspections if i.split == REFERENCE_SPLIT} == {"ring"}
    assert len(normals) == 2 * 6
    cases = load_cases(load_dataset(tmp_path / "out"), "test")
    assert {reference.image for case in cases for reference in case.seen.references} <= normals
    assert all(case.seen.references for case in cases)
    assert not normals & {case.seen.query for case in cases}
    pool = manifest["counts"]["reference_pool"]
    assert pool > 12
    summary = f"{pool} normal images serve as references: {pool - 12} from the train split and 12 held out"
    assert f"{summary} for the test split (ring)" in (tmp_path / "out" / "preview.html").read_text()


def test_the_seed_always_holds_out_the_same_and_the_build_reports_it(listed, tmp_path):
    first, _, _ = built(listed, tmp_path / "out", split="by_product")
    assert len(first["held_out"]) == 1
    assert first["held_out"][0] in first["splits"]
    assert first["config"]["held_out"] == []
    again, _, _ = built(listed, tmp_path / "again", split="by_product")
    assert again["fingerprint"] == first["fingerprint"]


def test_a_dataset_column_lets_one_manifest_hold_several_datasets(listed, tmp_path):
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    for row in rows:
        row["dataset"] = "new line" if row["product"] == "ring" else "old line"
    several = listed.with_name("several.jsonl")
    several.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = build(config(several, tmp_path / "out", split="by_dataset", held_out=["new line"]))
    assert manifest["counts"]["products"]["test"].keys() == {"ring"}
    with pytest.raises(EchoError, match="no dataset is named 'old lin'; did you mean 'old line'"):
        build(config(several, tmp_path / "other", split="by_dataset", held_out=["old lin"]))


def write_knowledge(folder: Path, **datasets: dict) -> Path:
    (folder / "knowledge.yaml").write_text(json.dumps(datasets))
    return folder / "knowledge.yaml"


def test_only_a_misspelt_condition_of_the_knowledge_is_a_warning(small_list, tmp_path, capsys):
    """A condition without an image is no mistake."""
    text = {"good": "An even ramp.", "dnet": "A black square.", "stain": "A blot.", "burr": "A sharp edge."}
    given = {"source": "manifest", "annotations": small_list, "descriptor": "skimage", "output": tmp_path / "out"}
    main(arguments(**given, knowledge=write_knowledge(tmp_path, parts={"cap": text})))
    told = "knowledge: no image of cap shows condition 'dnet'; did you mean 'dent'?"
    assert f"warning: {told}" in capsys.readouterr().err
    warnings = json.loads((tmp_path / "out" / "manifest.json").read_text())["warnings"]
    assert [warning for warning in warnings if "knowledge" in warning] == [told]
    assert told.replace("'", "&#39;") in (tmp_path / "out" / "preview.html").read_text()
    text["dent"] = text.pop("dnet")
    manifest = build(config(small_list, tmp_path / "right", knowledge=write_knowledge(tmp_path, parts={"cap": text})))
    assert not any("knowledge" in warning for warning in manifest["warnings"])


@pytest.mark.parametrize(
    ("known", "ending"),
    [
        ({"my_parts": {"cap": {"good": "Even."}}}, "only by name): parts/cap; the file has my_parts"),
        ({"parts": {"cpa": {"good": "Even."}}}, "only by name): parts/cap; for parts, the file has cpa"),
        (
            {"parts": {"cap": {"good": "Even."}}},
            "(described only by name): parts/cap/dent, parts/cap/stain",
        ),
        (None, "only by name): parts/cap"),
    ],
)
def test_a_warning_about_missing_knowledge_names_the_existing_keys(small_list, tmp_path, known, ending):
    path = write_knowledge(tmp_path, **known) if known else None
    manifest = build(config(small_list, tmp_path / "out", knowledge=path))
    (warning,) = [warning for warning in manifest["warnings"] if "without knowledge" in warning]
    assert warning.endswith(ending)


@pytest.mark.parametrize(
    ("box", "used"),
    [([0.1, 0.1, 0.3, 0.3], False), ([0, 0, 0.99, 0.99], False), ([4, 4, 4.5, 12], True), ([4, 4, 5, 5], True)],
)
def test_boxes_in_fractions_of_the_image_are_refused(small_list, tmp_path, box, used):
    """Numbers from 0 to 1 cannot mark more than a pixel, but a scratch may be narrower than a pixel."""

    def mark(row: dict) -> None:
        if row["image"] == "cap/dent-0-1.png":
            row.update(boxes=[box], mask=None)

    edit_rows(small_list, mark)
    build(config(small_list, tmp_path / "out"))
    reasons = {r.item: r.reason for r in rows(tmp_path / "out", "rejected.jsonl", Rejection)}
    assert set(reasons) == (set() if used else {"cap/dent-0-1.png"})
    for reason in reasons.values():
        assert "smaller than a pixel" in reason
        assert "[[x0, y0, x1, y1], ...]" in reason


@pytest.mark.parametrize(
    ("change", "settings", "remedy"),
    [
        (lambda row: row.update(condition="good", mask=None), {"split": "seeded"}, "add images of defects"),
        (lambda row: row.update(condition="good", mask=None), {}, "add images of defects"),
        (lambda row: row.update(split="train" if row["condition"] == "good" else "test"), {}, "set split to seeded"),
        (
            lambda row: row.update(group=row["group"] if row["condition"] == "good" else "one part"),
            {"split": "seeded", "fractions": [0.3, 0.0, 0.7]},
            "give train a larger share in fractions",
        ),
    ],
)
def test_a_warning_about_a_train_split_without_defects_names_a_remedy(small_list, tmp_path, change, settings, remedy):
    edit_rows(small_list, change)
    manifest = build(config(small_list, tmp_path / "out", **settings))
    (warning,) = [warning for warning in manifest["warnings"] if "the training rows are empty" in warning]
    assert warning.endswith(f"to train on this data, {remedy}")


@pytest.mark.parametrize(("kept", "side"), [("good", "normal"), ("dent", "defective")])
def test_a_validation_split_with_one_side_is_a_warning(small_list, tmp_path, kept, side):
    held = ("good-0", "dent-0")

    def split(row: dict) -> None:
        validated = row["group"] in held and row["condition"] == kept
        row.update(split="validation" if validated else "test" if row["group"] in held else "train")

    edit_rows(small_list, split)
    warnings = build(config(small_list, tmp_path / "out"))["warnings"]
    assert any(warning.startswith(f"the validation split has only {side} cases") for warning in warnings)
    edit_rows(small_list, lambda row: row.update(split="validation" if row["group"] in held else "train"))
    warnings = build(config(small_list, tmp_path / "both"))["warnings"]
    assert not any("split has only" in warning for warning in warnings)
    assert "the test split has no case" in warnings


def test_help_names_the_sources_and_the_config_file():
    done = run("--help")
    text = " ".join(done.stdout.split())
    assert done.returncode == 0
    assert "--config FILE" in text
    assert "Same as --balance false" in text
    assert ", ".join(SOURCE_NAMES) in text
    assert {"manifest", "mmad", "synthetic"} <= set(SOURCE_NAMES)


def parts_of(dataset: str, count: int = 12, product: str = "cap") -> list[Inspection]:
    """`count` normal parts and `count` with a dent."""
    names = [f"{product}/{condition}-{number}" for condition in ("good", "dent") for number in range(count)]
    return [Inspection(n, f"{n}.png", dataset, product, n.split("/")[1].split("-")[0], n) for n in names]


def splits_of(inspections: list[Inspection], source: str, name: str, listed: bool = True, **changes) -> dict[str, str]:
    """Image to split, in a manifest or a folder of that name."""
    place = {"annotations": Path(f"/line/{name}.csv")} if listed else {"root": Path(f"/line/{name}")}
    given = BuildConfig(source=source, output=Path("out"), **place, **changes)
    done, _, _ = assign_configured_splits(inspections, Path(f"/line/{name}"), given)
    assert [i.dataset for i in done] == [i.dataset for i in inspections]
    return {i.id: str(i.split) for i in done}


@pytest.mark.parametrize(("source", "listed"), [("manifest", True), ("manifest", False), ("folder", False)])
@pytest.mark.parametrize("how", ["given", "seeded", "by_product", "by_condition"])
def test_the_name_of_a_manifest_or_folder_does_not_change_splits(source, listed, how):
    def splits(name: str) -> dict[str, str]:
        parts = parts_of(name) + [
            replace(i, condition=i.condition.replace("dent", "rust")) for i in parts_of(name, 9, "nut")
        ]
        return splits_of(parts, source, name, listed, split=how)

    assert splits("parts") == splits("parts_v2") == splits("anything")
    assert len(set(splits("parts").values())) >= 3


def test_names_that_datasets_define_themselves_do_change_splits():
    """Published results use splits that were drawn with these names."""
    tiles = parts_of("magnetic_tile")
    published, _, _ = make_splits(tiles, "seeded", 0, (0.6, 0.1, 0.3))
    assert splits_of(tiles, "magnetic_tile", "magnetic_tile", listed=False) == {i.id: i.split for i in published}
    assert splits_of(tiles, "manifest", "magnetic_tile") != {i.id: i.split for i in published}
    column = [*parts_of("line 1"), *parts_of("line 2")]
    both = [
        (i.dataset, d.split) for i, d in zip(column, make_splits(column, "seeded", 0, (0.6, 0.1, 0.3))[0], strict=True)
    ]
    given = BuildConfig(source="manifest", output=Path("out"), annotations=Path("parts.csv"), split="seeded")
    assert [(i.dataset, i.split) for i in assign_configured_splits(column, Path(), given)[0]] == both


def test_a_renamed_manifest_gives_the_same_splits_and_another_dataset_name(listed, tmp_path):
    _, first, _ = built(listed, tmp_path / "out")
    renamed = listed.rename(listed.with_name("parts_v2.jsonl"))
    try:
        build(config(renamed, tmp_path / "renamed"))
    finally:
        renamed.rename(listed)
    again = list(read_jsonl(tmp_path / "renamed" / "inspections.jsonl", Inspection))
    assert [(i.image, i.split) for i in again] == [(i.image, i.split) for i in first]
    assert {i.dataset for i in again} == {"parts_v2"} and {i.dataset for i in first} == {"parts"}
