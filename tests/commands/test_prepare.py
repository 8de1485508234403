"""A build finds broken files, balances training cases, and warns of doubtful names, splits and knowledge."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.build import build, main
from data_prep.faults import check_image
from data_prep.knowledge import main as check_knowledge
from data_prep.prepare import RANDOM_REFERENCE_MARK, group_by_inspection
from data_prep.sources import SOURCE_NAMES
from data_prep.training_rows import MAX_REPEATS, balance_cases, prefetch_images
from echo_ft.data.knowledge import near_duplicate_names
from echo_ft.errors import EchoError
from echo_ft.experts.targets import COMPARED_SIZE, load_compared
from echo_ft.files import read_jsonl, write_jsonl
from echo_ft.images import masks
from echo_ft.records import Case, Inspection, Reference, Rejection, Seen, Truth
from tests.support.drawn_manifest import edit_rows, flags, make_config, read_rows, run_build


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
def test_a_truncated_file_is_found_in_every_format(tmp_path, suffix):
    path = tmp_path / f"part.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (80, 90), dtype=np.uint8)
    Image.fromarray(noise).convert("RGB").save(path)
    assert check_image(path).fault is None
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert "broken" in str(check_image(path).fault)


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
    """Training would read adjacent rows of the same case as a single case of double size."""
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
        "products of line that differ only in spelling: Cap, cap; if they mean the same thing, use one spelling",
        "conditions of line that differ only in spelling: Rust, rust, rust_; if they mean the same thing, use one "
        "spelling",
    ]


@pytest.mark.parametrize("method", ["retrieved", "given", "random"])
def test_training_skips_exactly_the_random_references(tmp_path, method):
    """Even names of parts and images that contain the text of the mark do not matter."""
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


def write_knowledge(folder: Path, **datasets: dict) -> Path:
    (folder / "knowledge.yaml").write_text(json.dumps(datasets))
    return folder / "knowledge.yaml"


def test_only_a_misspelt_condition_of_the_knowledge_is_a_warning(small_manifest, tmp_path, capsys):
    """A condition without an image is not a mistake."""
    text = {"good": "An even ramp.", "dnet": "A black square.", "stain": "A blot.", "burr": "A sharp edge."}
    given = {"source": "manifest", "annotations": small_manifest, "descriptor": "skimage", "output": tmp_path / "out"}
    main(flags(**given, knowledge=write_knowledge(tmp_path, parts={"cap": text})))
    warning = "knowledge: no image of cap shows condition 'dnet'; did you mean 'dent'?"
    assert f"warning: {warning}" in capsys.readouterr().err
    warnings = json.loads((tmp_path / "out" / "manifest.json").read_text())["warnings"]
    assert [warning for warning in warnings if "knowledge" in warning] == [warning]
    assert warning.replace("'", "&#39;") in (tmp_path / "out" / "preview.html").read_text()
    text["dent"] = text.pop("dnet")
    manifest = build(
        make_config(small_manifest, tmp_path / "right", knowledge=write_knowledge(tmp_path, parts={"cap": text}))
    )
    assert not any("knowledge" in warning for warning in manifest["warnings"])


def test_knowledge_names_its_conditions_as_the_manifest_does(small_manifest, tmp_path, capsys):
    """Otherwise, `OK` and `stain+dent` would be wrong options for a `dent+stain`."""
    rows = small_manifest.read_text().replace('"good"', '"OK"').replace('"stain"', '"stain;dent"')
    small_manifest.write_text(rows)
    text = {
        "OK": "An even ramp. It holds.",
        "stain;dent": "A blot and a hole. It leaks.",
        "scar+burr": "A cut. It cuts.",
    }
    path = write_knowledge(tmp_path, parts={"cap": {**text, "dent": "A hole. It leaks."}})
    manifest = build(make_config(small_manifest, tmp_path / "out", knowledge=path, good=["OK"]))
    assert not any("knowledge" in warning for warning in manifest["warnings"])
    known = json.loads((tmp_path / "out" / "knowledge.json").read_text())["parts"]["cap"]
    assert [*known] == ["good", "burr+scar", "dent", "dent+stain"]
    assert known["good"] == text["OK"] and known["dent+stain"] == text["stain;dent"]
    check_knowledge(["--dataset", str(tmp_path / "out"), "--check", str(path)])
    assert capsys.readouterr().out == "3 of 3 conditions are described; nothing to correct\n"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"dent+stain": "A blot.", "stain + dent": "A hole."},
            "describes 'dent[+]stain' twice, once as 'stain [+] dent'",
        ),
        ({"good": "Even.", "no defect": "Even."}, "has 'no defect', which seems to mean.* name it 'good'"),
    ],
)
def test_ambiguous_conditions_of_the_knowledge_are_an_error(small_manifest, tmp_path, entries, message):
    path = write_knowledge(tmp_path, parts={"cap": entries})
    with pytest.raises(EchoError, match=message):
        build(make_config(small_manifest, tmp_path / "out", knowledge=path))


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
def test_a_warning_about_missing_knowledge_names_the_existing_keys(small_manifest, tmp_path, known, ending):
    path = write_knowledge(tmp_path, **known) if known else None
    manifest = build(make_config(small_manifest, tmp_path / "out", knowledge=path))
    (warning,) = [warning for warning in manifest["warnings"] if "without knowledge" in warning]
    assert warning.endswith(ending)


@pytest.mark.parametrize(
    ("box", "used"),
    [([0.1, 0.1, 0.3, 0.3], False), ([0, 0, 0.99, 0.99], False), ([4, 4, 4.5, 12], True), ([4, 4, 5, 5], True)],
)
def test_boxes_in_fractions_of_the_image_are_refused(small_manifest, tmp_path, box, used):
    """A box within 0 to 1 cannot mark more than a pixel, but a scratch may be narrower than a pixel."""

    def mark(row: dict) -> None:
        if row["image"] == "cap/dent-0-1.png":
            row.update(boxes=[box], mask=None)

    edit_rows(small_manifest, mark)
    build(make_config(small_manifest, tmp_path / "out"))
    reasons = {r.item: r.reason for r in read_rows(tmp_path / "out", "rejected.jsonl", Rejection)}
    assert set(reasons) == (set() if used else {"cap/dent-0-1.png"})
    for reason in reasons.values():
        assert "smaller than a pixel" in reason
        assert "(x0, y0, x1, y1)" in reason


@pytest.mark.parametrize(
    ("change", "settings", "remedy"),
    [
        (lambda row: row.update(condition="good", mask=None), {"split": "seeded"}, "add images of defects"),
        (lambda row: row.update(condition="good", mask=None), {}, "add images of defects"),
        (lambda row: row.update(split="train" if row["condition"] == "good" else "test"), {}, "set split to seeded"),
        (
            lambda row: row.update(group=row["group"] if row["condition"] == "good" else "one part"),
            {"split": "seeded", "fractions": [0.3, 0.0, 0.7]},
            "give train a larger fraction in fractions",
        ),
    ],
)
def test_a_warning_about_a_train_split_without_defects_names_a_remedy(
    small_manifest, tmp_path, change, settings, remedy
):
    edit_rows(small_manifest, change)
    manifest = build(make_config(small_manifest, tmp_path / "out", **settings))
    (warning,) = [warning for warning in manifest["warnings"] if "the training rows are empty" in warning]
    assert warning.endswith(f"to train on this data, {remedy}")


@pytest.mark.parametrize("split", ["given", "seeded"])
def test_too_few_images_for_a_validation_split_need_a_larger_fraction(small_manifest, tmp_path, split):
    """This manifest has no splits, so a split by seed changes nothing."""
    config = make_config(small_manifest, tmp_path / "out", split=split, fractions=[0.6, 0.01, 0.39])
    (found,) = (text for text in build(config)["warnings"] if "the validation split has no case" in text)
    assert "add images, give validation a larger fraction in fractions, " in found
    assert ("set split to seeded if the source gives" in found) == (split == "given")


@pytest.mark.parametrize(("kept", "side"), [("good", "normal"), ("dent", "defective")])
def test_a_validation_split_with_one_side_is_a_warning(small_manifest, tmp_path, kept, side):
    held = ("good-0", "dent-0")

    def split(row: dict) -> None:
        validated = row["group"] in held and row["condition"] == kept
        row.update(split="validation" if validated else "test" if row["group"] in held else "train")

    edit_rows(small_manifest, split)
    warnings = build(make_config(small_manifest, tmp_path / "out"))["warnings"]
    assert any(warning.startswith(f"the validation split has only {side} cases") for warning in warnings)
    edit_rows(small_manifest, lambda row: row.update(split="validation" if row["group"] in held else "train"))
    warnings = build(make_config(small_manifest, tmp_path / "both"))["warnings"]
    assert not any("split has only" in warning for warning in warnings)
    assert "the test split has no case" in warnings


def test_help_names_the_sources_and_the_config_file():
    done = run_build("--help")
    text = " ".join(done.stdout.split())
    assert done.returncode == 0
    assert "--config FILE" in text
    assert "Same as --balance false" in text
    assert ", ".join(SOURCE_NAMES) in text
    assert {"manifest", "mmad", "synthetic"} <= set(SOURCE_NAMES)
