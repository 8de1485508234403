"""Splits of a build hide held-out data from training and do not depend on the name of a manifest or folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.build import build
from data_prep.config import BuildConfig
from data_prep.prepare import assign_configured_splits
from echo_ft.data.dataset import load_cases, load_dataset
from echo_ft.data.splits import REFERENCE_SPLIT, SPLITS, UNLABELLED_SPLIT, make_splits
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl
from echo_ft.records import ROLES, UNLABELLED, Inspection, Rejection
from tests.support.drawn_manifest import draw_manifest, make_config

PRODUCTS = ("cap", "ring", "washer")


@pytest.fixture(scope="module")
def parts_file(tmp_path_factory) -> Path:
    return draw_manifest(tmp_path_factory.mktemp("raw"), PRODUCTS, normals=8, defects=4)


def built(parts_file: Path, output: Path, **changes) -> tuple[dict, list[Inspection], str]:
    """The manifest, the inspections, and everything that training reads, as text."""
    text = {"good": "An even ramp.", "dent": "A black square. It causes leaks.", "stain": "A blot. It causes rust."}
    knowledge = parts_file.with_name("knowledge.yaml")
    knowledge.write_text(json.dumps({"parts": dict.fromkeys(PRODUCTS, text)}))
    manifest = build(make_config(parts_file, output, knowledge=knowledge, **changes))
    rows = [(output / "sft" / role / f"{name}.jsonl").read_text() for role in ROLES for name in ("train", "validation")]
    assert all(rows[::2]), "every role has training rows"
    return manifest, list(read_jsonl(output / "inspections.jsonl", Inspection)), "".join(rows)


def test_training_reads_nothing_about_a_held_out_condition(parts_file, tmp_path):
    manifest, inspections, read = built(parts_file, tmp_path / "out", split="by_condition", held_out=["dent"])
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


def test_training_reads_nothing_about_a_held_out_product(parts_file, tmp_path):
    manifest, inspections, read = built(parts_file, tmp_path / "out", split="by_product", held_out=["ring"])
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


def test_the_seed_always_holds_out_the_same_and_the_build_reports_it(parts_file, tmp_path):
    first, _, _ = built(parts_file, tmp_path / "out", split="by_product")
    assert len(first["held_out"]) == 1
    assert first["held_out"][0] in first["splits"]
    assert first["config"]["held_out"] == []
    again, _, _ = built(parts_file, tmp_path / "again", split="by_product")
    assert again["fingerprint"] == first["fingerprint"]


def test_a_dataset_column_lets_one_manifest_hold_several_datasets(parts_file, tmp_path):
    rows = [json.loads(line) for line in parts_file.read_text().splitlines()]
    for row in rows:
        row["dataset"] = "new line" if row["product"] == "ring" else "old line"
    several = parts_file.with_name("several.jsonl")
    several.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = build(make_config(several, tmp_path / "out", split="by_dataset", held_out=["new line"]))
    assert manifest["counts"]["products"]["test"].keys() == {"ring"}
    with pytest.raises(EchoError, match="no dataset is named 'old lin'; did you mean 'old line'"):
        build(make_config(several, tmp_path / "other", split="by_dataset", held_out=["old lin"]))


def parts_of(dataset: str, count: int = 12, product: str = "cap") -> list[Inspection]:
    """`count` normal parts and `count` with a dent."""
    names = [f"{product}/{condition}-{number}" for condition in ("good", "dent") for number in range(count)]
    return [Inspection(n, f"{n}.png", dataset, product, n.split("/")[1].split("-")[0], n) for n in names]


def splits_of(
    inspections: list[Inspection], source: str, name: str, from_manifest: bool = True, **changes
) -> dict[str, str]:
    """Image to split, in a manifest or a folder of that name."""
    place = {"annotations": Path(f"/line/{name}.csv")} if from_manifest else {"root": Path(f"/line/{name}")}
    given = BuildConfig(source=source, output=Path("out"), **place, **changes)
    done, _, _ = assign_configured_splits(inspections, Path(f"/line/{name}"), given)
    assert [i.dataset for i in done] == [i.dataset for i in inspections]
    return {i.id: str(i.split) for i in done}


@pytest.mark.parametrize(("source", "from_manifest"), [("manifest", True), ("manifest", False), ("folder", False)])
@pytest.mark.parametrize("how", ["given", "seeded", "by_product", "by_condition"])
def test_the_name_of_a_manifest_or_folder_does_not_change_splits(source, from_manifest, how):
    def splits(name: str) -> dict[str, str]:
        parts = parts_of(name) + [
            replace(i, condition=i.condition.replace("dent", "rust")) for i in parts_of(name, 9, "nut")
        ]
        return splits_of(parts, source, name, from_manifest, split=how)

    assert splits("parts") == splits("parts_v2") == splits("pi\u00e8ces") == splits("anything")
    assert len(set(splits("parts").values())) >= 3


@pytest.mark.parametrize("from_manifest", [True, False])
def test_a_name_that_is_decomposed_on_disk_does_not_change_splits(from_manifest):
    """macOS writes `è` as `e` and a mark, while the records have the composed name."""
    composed, on_disk = "pi\u00e8ces", "pie\u0300ces"
    place = {"annotations": Path(f"/line/{on_disk}.csv")} if from_manifest else {"root": Path(f"/line/{on_disk}")}
    config = BuildConfig(source="manifest", output=Path("out"), **place)
    done, _, _ = assign_configured_splits(parts_of(composed), Path(f"/line/{on_disk}"), config)
    assert {i.id: i.split for i in done} == splits_of(parts_of("parts"), "manifest", "parts")


def test_names_that_datasets_define_themselves_do_change_splits():
    """Published results use splits that were drawn with these names."""
    tiles = parts_of("magnetic_tile")
    published, _, _ = make_splits(tiles, "seeded", 0, (0.6, 0.1, 0.3))
    assert splits_of(tiles, "magnetic_tile", "magnetic_tile", from_manifest=False) == {i.id: i.split for i in published}
    assert splits_of(tiles, "manifest", "magnetic_tile") != {i.id: i.split for i in published}
    column = [*parts_of("line 1"), *parts_of("line 2")]
    both = [
        (i.dataset, d.split) for i, d in zip(column, make_splits(column, "seeded", 0, (0.6, 0.1, 0.3))[0], strict=True)
    ]
    given = BuildConfig(source="manifest", output=Path("out"), annotations=Path("parts.csv"), split="seeded")
    assert [(i.dataset, i.split) for i in assign_configured_splits(column, Path(), given)[0]] == both


def test_a_renamed_manifest_keeps_splits_but_renames_the_dataset(parts_file, tmp_path):
    _, first, _ = built(parts_file, tmp_path / "out")
    renamed = parts_file.rename(parts_file.with_name("parts_v2.jsonl"))
    try:
        build(make_config(renamed, tmp_path / "renamed"))
    finally:
        renamed.rename(parts_file)
    again = list(read_jsonl(tmp_path / "renamed" / "inspections.jsonl", Inspection))
    assert [(i.image, i.split) for i in again] == [(i.image, i.split) for i in first]
    assert {i.dataset for i in again} == {"parts_v2"} and {i.dataset for i in first} == {"parts"}


@pytest.mark.parametrize("how", ["given", "seeded", "by_product", "by_condition"])
def test_a_correction_moves_no_other_image(how):
    """Images that a model was trained on must not become test images because the label of another image was wrong."""
    parts = [*parts_of("parts"), *parts_of("parts", 9, "nut")]
    parts += [replace(i, id=f"{i.id}-rust", group=f"{i.id}-rust", condition="rust") for i in parts[12:24]]
    config = BuildConfig(source="manifest", output=Path("out"), annotations=Path("parts.csv"), split=how)
    before, summary, held = assign_configured_splits(parts, Path(), config)
    splits = {i.id: i.split for i in before}
    assert len({*splits.values()}) >= 3
    for one in [i for i in before if i.condition not in held][::3]:
        condition = {"good": "dent", "dent": "good", "rust": "scratch"}[one.condition]
        condition = "scratch" if condition in held else condition
        corrected = [replace(i, condition=condition) if i.id == one.id else i for i in parts]
        after, text, names = assign_configured_splits(corrected, Path(), config, {one.id: one.condition})
        moved = {i.id: i.split for i in after if i.split != splits[i.id]}
        assert moved == ({one.id: "test"} if one.split == REFERENCE_SPLIT and condition != "good" else {})
        assert (text, names) == (summary, held)


def test_a_correction_to_a_held_out_defect_hides_its_part_from_training():
    parts = [replace(i, group=i.id.replace("good-1", "good-0")) for i in parts_of("parts")]
    parts += [replace(i, id=f"{i.id}-rust", group=f"{i.id}-rust", condition="rust") for i in parts[12:]]
    config = BuildConfig(
        source="manifest", output=Path("out"), annotations=Path("parts.csv"), split="by_condition", held_out=["rust"]
    )
    before = {i.id: i for i in assign_configured_splits(parts, Path(), config)[0]}
    group = next(i.group for i in before.values() if i.split == "train" and i.condition == "dent")
    one = next(i for i in before.values() if i.group == group)
    corrected = [replace(i, condition="rust") if i.id == one.id else i for i in parts]
    after = assign_configured_splits(corrected, Path(), config, {one.id: one.condition})[0]
    assert [(i.id, i.split) for i in after if i.split != before[i.id].split] == [(one.id, "test")]


@pytest.mark.parametrize("how", ["seeded", "by_product", "by_condition"])
def test_images_that_corrections_label_join_the_others_without_moving_them(how):
    parts = [*parts_of("parts"), *parts_of("parts", 9, "nut")]
    parts += [replace(i, id=f"{i.id}-rust", group=f"{i.id}-rust", condition="rust") for i in parts[12:24]]
    late = {i.id: UNLABELLED for i in parts[::4]}
    source = [replace(i, condition=late.get(i.id, i.condition)) for i in parts]
    config = BuildConfig(source="manifest", output=Path("out"), annotations=Path("parts.csv"), split=how)
    before, _, held = assign_configured_splits(source, Path(), config)
    after, _, names = assign_configured_splits(parts, Path(), config, late)
    assert names == held
    assert {i.split for i in before if i.id in late} == {UNLABELLED_SPLIT}
    assert [(i.id, i.split) for i in after if i.id not in late] == [(i.id, i.split) for i in before if i.id not in late]
    assert {"train", "test"} <= {i.split for i in after if i.id in late} <= {*SPLITS, REFERENCE_SPLIT}
    if how == "by_condition":
        assert {i.split for i in after if i.condition in held} == {"test"}
    everything = dict.fromkeys((i.id for i in parts), UNLABELLED)
    assert assign_configured_splits(parts, Path(), config, everything) == assign_configured_splits(
        parts, Path(), config
    )


def test_copied_splits_give_the_same_dataset_with_later_images(parts_file, tmp_path):
    """inspections.jsonl also has the splits of references and unlabelled images, which are not in SPLITS."""
    rows = [json.loads(line) for line in parts_file.read_text().splitlines()]
    for row in rows[:2]:  # two exposures of one part
        row |= {"condition": "", "group": "unknown"}
    listed = parts_file.with_name("copied.jsonl")
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = make_config(listed, tmp_path / "first", split="by_product", held_out=["ring"])
    counts = build(first)["counts"]
    before = {one.image: one.split for one in read_jsonl(first.output / "inspections.jsonl", Inspection)}
    assert {*before.values()} == {*SPLITS, REFERENCE_SPLIT, UNLABELLED_SPLIT}
    listed.write_text("".join(json.dumps(row | {"split": before[row["image"]]}) + "\n" for row in rows))
    again = build(make_config(listed, tmp_path / "again"))
    assert again["rejected"] == 0 and again["counts"] == counts
    for name in ("inspections.jsonl", "references.jsonl", "questions.jsonl", "sft/decision_maker/train.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (first.output / name).read_bytes()
    rows[0]["condition"] = "good"  # somebody has labelled it
    listed.write_text("".join(json.dumps(row | {"split": before[row["image"]]}) + "\n" for row in rows))
    build(make_config(listed, tmp_path / "labelled"))
    after = {one.image: one.split for one in read_jsonl(tmp_path / "labelled" / "inspections.jsonl", Inspection)}
    assert after.pop(rows[0]["image"]) in SPLITS
    assert after.items() <= before.items()
    rows[2] |= {"condition": "dent", "split": REFERENCE_SPLIT}
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(make_config(listed, tmp_path / "defective"))
    (rejected,) = read_jsonl(tmp_path / "defective" / "rejected.jsonl", Rejection)
    assert "its split is reference, but it shows dent; write test, or remove the split" in rejected.reason
