"""A build writes a complete dataset folder and keeps its promises about splits, rows and warnings."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.build import build
from data_prep.training_rows import balance_cases
from data_prep.warnings import build_warnings
from echo_ft.data.dataset import MANIFEST, load_cases, load_dataset
from echo_ft.errors import EchoError
from echo_ft.experts.targets import training_exchanges
from echo_ft.files import to_json
from echo_ft.records import ROLES, Exchange, Inspection, Reference
from tests.support.drawn_manifest import (
    draw_manifest,
    draw_part,
    edit_rows,
    make_config,
    read_rows,
    run_build,
    write_part_knowledge,
)

JSONL = ["inspections.jsonl", "references.jsonl", "questions.jsonl", "rejected.jsonl"]
SFT = [f"sft/{role}/{split}.jsonl" for role in ROLES for split in ("train", "validation")]


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return draw_manifest(tmp_path_factory.mktemp("raw"), ("cap", "ring"), normals=12, defects=4)


@pytest.fixture(scope="module")
def built(raw, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("datasets") / "parts"
    build(make_config(raw, output))
    return output


def test_the_command_writes_the_whole_dataset_folder(raw, tmp_path):
    (tmp_path / "data.yaml").write_text(f"source: manifest\nannotations: {raw}\ndescriptor: skimage\nk: 1\n")
    done = run_build("--config", tmp_path / "data.yaml", "--output", tmp_path / "out", "--k", 2)
    assert done.returncode == 0, done.stderr
    for name in [*JSONL, *SFT, "manifest.json", "knowledge.json", "preview.html"]:
        assert (tmp_path / "out" / name).is_file(), name
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["config"]["k"] == 2
    assert sum(manifest["counts"]["photographs"].values()) == 80
    assert "80 images" in done.stdout
    assert "0 rejected" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.yaml", "out"]


def test_the_same_inputs_give_the_same_bytes(raw, built, tmp_path):
    build(make_config(raw, tmp_path / "again"))
    for name in [*JSONL, *SFT, "knowledge.json"]:
        assert (built / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert load_dataset(built).fingerprint == load_dataset(tmp_path / "again").fingerprint


def test_the_number_of_threads_changes_no_byte(raw, tmp_path):
    source = ["--source", "manifest", "--annotations", raw, "--descriptor", "skimage"]
    for threads in (1, 2):
        done = run_build(*source, "--output", tmp_path / str(threads), threads=threads)
        assert done.returncode == 0, done.stderr
    one, two = (load_dataset(tmp_path / str(threads)).fingerprint for threads in (1, 2))
    assert one == two


def test_training_rows_are_those_of_each_case_in_balanced_order(built):
    """The buffers that hold the rows until their order is known do not change them."""
    dataset = load_dataset(built)
    inspections = {i.id: i for i in read_rows(built, "inspections.jsonl", Inspection)}
    for role in ROLES:
        for split in ("train", "validation"):
            made = {
                case.id: training_exchanges(case, role, dataset.root, "full") for case in load_cases(dataset, split)
            }
            order = [inspections[name] for name, found in made.items() if found]
            order = balance_cases(order, seed=0) if split == "train" else order
            lines = [json.dumps(dataclasses.asdict(row), ensure_ascii=False) for case in order for row in made[case.id]]
            text = (built / "sft" / role / f"{split}.jsonl").read_text()
            assert lines
            assert text == "".join(f"{line}\n" for line in lines)


def test_references_are_train_normals_of_the_product_but_another_part(built):
    by_image = {i.image: i for i in read_rows(built, "inspections.jsonl", Inspection)}
    by_id = {i.id: i for i in by_image.values()}
    references = read_rows(built, "references.jsonl", Reference)
    assert Counter(r.method for r in references) == {"retrieved": 160, "random": 160}
    for reference in references:
        query, normal = by_id[reference.inspection], by_image[reference.image]
        assert (normal.split, normal.condition, normal.product) == ("train", "good", query.product)
        assert normal.group != query.group


def test_training_rows_have_every_role_and_are_half_normal(built):
    condition = {i.id: i.condition for i in read_rows(built, "inspections.jsonl", Inspection)}
    for role in ROLES:
        found = read_rows(built, f"sft/{role}/train.jsonl", Exchange)
        normal = len({i for i, row in enumerate(found) if condition[row.case] == "good"})
        assert {row.role for row in found} == {role}
        assert all(branch.completion for row in found for branch in row.branches)
        if role == "reference_extractor":  # has one row per case; the other roles have one per route
            assert normal * 2 == len(found)


def test_manifest_counts_rows_by_side_and_warns_of_missing_sides(raw, built, tmp_path):
    """The paper's routing consults two of the roles only about defects."""
    paper = build(make_config(raw, tmp_path / "paper", routing="paper", knowledge=write_part_knowledge(tmp_path)))
    full = json.loads((built / "manifest.json").read_text())
    for manifest, folder in ((paper, tmp_path / "paper"), (full, built)):
        condition = {i.id: i.condition for i in read_rows(folder, "inspections.jsonl", Inspection)}
        for role in ROLES:
            for split in ("train", "validation"):
                found = read_rows(folder, f"sft/{role}/{split}.jsonl", Exchange)
                normal = [row for row in found if condition[row.case] == "good"]
                sides = manifest["counts"]["sft_sides"][f"{role}/{split}"]
                assert (sides["normal"]["rows"], sides["defective"]["rows"]) == (len(normal), len(found) - len(normal))
                balanced = sides["normal"]["cases"] == sides["defective"]["cases"]
                assert balanced or split == "validation" or (manifest is paper and role in ROLES[1:3])
                assert manifest["counts"]["sft_rows"][f"{role}/{split}"] == len(found)
    assert not any("cannot be balanced" in warning for warning in full["warnings"])
    warned = [warning for warning in paper["warnings"] if "cannot be balanced" in warning]
    assert [warning.split()[0] for warning in warned] == ["knowledge_guide", "reasoning_expert"]
    for warning in warned:
        sides = paper["counts"]["sft_sides"][f"{warning.split()[0]}/train"]
        assert sides["normal"] == {"cases": 0, "rows": 0}
        assert f"{sides['defective']['rows']} training rows" in warning


@pytest.mark.parametrize("routing", ["full", "paper"])
def test_rows_of_a_repeated_case_are_never_adjacent_in_any_role(small_manifest, tmp_path, routing):
    """This includes roles without rows for the normal cases that separate the repeats elsewhere."""
    edit_rows(
        small_manifest, lambda row: row.update(split="test" if row["group"] in ("dent-0", "stain-0") else "train")
    )
    edit_rows(
        small_manifest,
        lambda row: row.update(split="test") if row["group"] in ("dent-1", "stain-1", "stain-2") else None,
    )
    settings = {"routing": routing, "fractions": [0.7, 0.0, 0.3], "knowledge": write_part_knowledge(tmp_path)}
    build(make_config(small_manifest, tmp_path / "out", **settings))
    for role in ROLES:
        found = read_rows(tmp_path / "out", f"sft/{role}/train.jsonl", Exchange)
        assert found
        for _, group in groupby(found, key=lambda row: row.case):
            branches = [branch.id for row in group for branch in row.branches]
            assert len(branches) == len(set(branches)), "adjacent rows of a case have distinct branches"
        one_sided = routing == "paper" and role in ("knowledge_guide", "reasoning_expert")
        assert one_sided == (max(Counter(map(to_json, found)).values()) == 1), "only balancing repeats rows"


def test_images_that_balancing_leaves_out_are_counted_and_named(tmp_path):
    """For each product, training uses at most four times as many images of one side as of the other."""
    parts_file = draw_manifest(tmp_path / "raw", ("cap",), normals=20, defects=1)
    edit_rows(parts_file, lambda row: row.update(split="test" if row["condition"] == "stain" else "train"))
    manifest = build(make_config(parts_file, tmp_path / "balanced", split="given"))
    (warning,) = [one for one in manifest["warnings"] if "are in no row" in one]
    conditions = {i.id: i.condition for i in read_rows(tmp_path / "balanced", "inspections.jsonl", Inspection)}
    shown = {row.case for row in read_rows(tmp_path / "balanced", "sft/decision_maker/train.jsonl", Exchange)}
    dents = sum(condition == "dent" for name, condition in conditions.items() if name in shown)
    goods = sum(condition == "good" for name, condition in conditions.items() if name in shown)
    assert goods == 4 * dents > 0
    cases = manifest["counts"]["cases"]["train"]
    left = cases["good"] - goods
    assert manifest["counts"]["balanced_away"] == left > 0
    assert f"{left} training images are in no row (parts/cap: {left} of {cases['good']} normal)" in warning
    manifest = build(make_config(parts_file, tmp_path / "all", split="given", balance=False))
    assert manifest["counts"]["balanced_away"] == 0
    assert not any("in no row" in one for one in manifest["warnings"])


def test_a_file_name_that_is_not_utf_8_is_rejected(tmp_path):
    for place, count in (("train/good", 6), ("test/good", 2), ("test/dent", 4)):
        for number in range(count):
            draw_part(tmp_path / "line" / "cap" / place / f"{number}.png", number, place == "test/dent")
    for path in (tmp_path / "line" / "cap" / "test" / "dent").glob("*_mask.png"):
        path.unlink()
    first = tmp_path / "line" / "cap" / "test" / "dent" / "0.png"
    first.rename(os.fsdecode(os.fsencode(first.with_name("gr")) + b"\xfcn.png"))
    made = make_config(
        tmp_path, tmp_path / "out", source="folder", annotations=None, root=tmp_path / "line", split="seeded"
    )
    manifest = build(made)
    assert manifest["rejected"] == 1
    (rejected,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8").splitlines())
    assert rejected["item"] == r"cap/test/dent/gr\udcfcn.png"
    assert "is not UTF-8; rename the file" in rejected["reason"]


def test_images_of_uneven_bit_depths_are_reported(small_manifest, tmp_path):
    def deepen(name: str, top: int) -> None:
        path = small_manifest.parent / name
        values = (np.asarray(Image.open(path)).astype(int) * top // 255).astype(np.uint16)
        Image.fromarray(values).save(path)

    for number in range(6):
        deepen(f"cap/good-{number}-1.png", 4095)
    manifest = build(make_config(small_manifest, tmp_path / "even"))
    assert not any("depths" in warning for warning in manifest["warnings"])
    deepen("cap/dent-0-1.png", 65535)
    manifest = build(make_config(small_manifest, tmp_path / "uneven"))
    (warning,) = [warning for warning in manifest["warnings"] if "depths" in warning]
    assert "parts/cap" in warning
    assert "6 from 12 bits, 1 from 16 bits" in warning


def test_images_and_masks_that_are_not_read_as_a_viewer_shows_them_are_counted(small_manifest, tmp_path, monkeypatch):
    def warnings_without_images(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", lambda path: pytest.fail(f"{path} is opened again"))
            return build_warnings(*arguments)

    monkeypatch.setattr("data_prep.manifest.build_warnings", warnings_without_images)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    root = small_manifest.parent
    for name in ("cap/good-0-1.png", "cap/good-1-1.png", "cap/good-2-1.png", "cap/dent-2-1.png"):
        with Image.open(root / name) as image:
            image.save(root / name, exif=rotated)
    with Image.open(root / "cap/dent-0-1_mask.png") as mask:
        mask.resize((48, 40)).save(root / "cap/dent-0-1_mask.jpg", quality=95)
    edit_rows(
        small_manifest,
        lambda row: row.update(mask="cap/dent-0-1_mask.jpg") if row["image"] == "cap/dent-0-1.png" else None,
    )
    manifest = build(make_config(small_manifest, tmp_path / "out"))
    assert manifest["dropped"] == {}, "the size of the mask tells that it was drawn on the image as stored"
    (turned,) = [one for one in manifest["warnings"] if "EXIF" in one]
    assert turned == (
        "4 images have an EXIF orientation and are turned upright by it, as viewers show them: cap/good-0-1.png, "
        "cap/good-1-1.png, cap/good-2-1.png and 1 more"
    )
    (lossy,) = [one for one in manifest["warnings"] if "lossy" in one]
    assert lossy.startswith("the masks of 1 images are in a lossy format, so only pixels brighter than half")
    assert "cap/dent-0-1.png; save masks as PNG" in lossy


def test_training_and_validation_rows_show_only_their_own_split(built):
    inspections = read_rows(built, "inspections.jsonl", Inspection)
    for split in ("train", "validation"):
        allowed = {i.id for i in inspections if i.split == split}
        test = {i.image for i in inspections if i.split == "test"}
        for role in ROLES:
            for row in read_rows(built, f"sft/{role}/{split}.jsonl", Exchange):
                assert row.case in allowed
                assert not test & set(row.images)


def test_records_of_earlier_versions_load(built, tmp_path):
    shutil.copytree(built, tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / MANIFEST).read_text())
    del manifest["files"], manifest["manifest_fingerprint"]
    (tmp_path / "old" / MANIFEST).write_text(json.dumps(manifest))
    path = tmp_path / "old" / "inspections.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    new = {"masks", "polygons"}
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k not in new}) + "\n" for line in lines))
    assert all(new <= line.keys() for line in lines)
    for split in ("train", "test"):
        assert load_cases(load_dataset(tmp_path / "old"), split) == load_cases(load_dataset(built), split)


def test_cases_separate_the_truth_from_what_experts_see(built):
    dataset = load_dataset(built)
    for case in load_cases(dataset, "test"):
        assert all(question.answer is None for question in case.seen.questions)
        assert set(case.truth.answers) == {question.id for question in case.seen.questions}
        assert (case.truth.mask is None) == (case.truth.condition == "good")
        assert {"good", "dent", "stain"} == {entry.condition for entry in case.seen.knowledge}


def test_cases_take_references_by_method(built):
    dataset = load_dataset(built)
    assert all(len(case.seen.references) == 2 for case in load_cases(dataset, "test"))
    assert {r.method for case in load_cases(dataset, "test", "random") for r in case.seen.references} == {"random"}
    assert not any(case.seen.references for case in load_cases(dataset, "test", "none"))
    with pytest.raises(EchoError, match="choose from retrieved, random, none"):
        load_cases(dataset, "test", "nearest")


def test_named_references_are_used_unless_the_config_disables_them(small_manifest, tmp_path):
    edit_rows(
        small_manifest, lambda row: row.update(reference="cap/good-0-1.png") if "cap/dent-0" in row["image"] else None
    )
    build(make_config(small_manifest, tmp_path / "named"))
    build(make_config(small_manifest, tmp_path / "free", named_references=False))
    for folder, method in (("named", "given"), ("free", "retrieved")):
        dataset = load_dataset(tmp_path / folder)
        found = [
            c for split in ("train", "validation", "test") for c in load_cases(dataset, split) if "cap/dent-0" in c.id
        ]
        assert found and {r.method for case in found for r in case.seen.references} == {method}


def test_dataset_keeps_the_knowledge_of_its_own_products_only(raw, tmp_path):
    text = {"good": "An even ramp.", "dent": "A black square. It can cause leaks.", "burr": "A sharp edge."}
    (tmp_path / "knowledge.yaml").write_text(json.dumps({"parts": {"cap": text, "lid": text}}))
    manifest = build(make_config(raw, tmp_path / "out", knowledge=tmp_path / "knowledge.yaml"))
    knowledge = json.loads((tmp_path / "out" / "knowledge.json").read_text())
    assert set(knowledge["parts"]) == {"cap", "ring"}
    assert knowledge["parts"]["cap"] == {**text, "stain": "stain"}
    assert manifest["products_without_knowledge"] == ["parts/ring"]
    assert any("parts/ring" in warning for warning in manifest["warnings"])


def draw_mmad(root: Path) -> Path:
    """Draw a tiny copy of MMAD with one question per image; returns the path of its mmad.json."""
    entries = {}
    question = {"Question": "Is there any defect in the object?", "type": "Anomaly Detection", "annotation": True}
    for number in range(4):
        draw_part(root / f"MVTec-AD/bottle/train/good/{number:03d}.png", number)
    for number, condition in enumerate(["good", "crack", "crack"]):
        key = f"DS-MVTec/bottle/image/{condition}/{number:03d}.png"
        draw_part(root / key, 50 + number)
        options = {"A": "Yes.", "B": "No."}
        answer = "B" if condition == "good" else "A"
        entries[key] = {
            "image_path": f"image/{condition}/{number:03d}.png",
            "mask_path": None,
            "conversation": [{**question, "Options": options, "Answer": answer}],
            "random_templates": ["MVTec-AD/bottle/train/good/003.png"],
        }
    (root / "mmad.json").write_text(json.dumps(entries))
    return root / "mmad.json"


def test_mmad_keeps_its_own_questions_and_warns_that_it_cannot_train(tmp_path):
    manifest = build(make_config(draw_mmad(tmp_path / "raw"), tmp_path / "out", source="mmad"))
    dataset = load_dataset(tmp_path / "out")
    found = load_cases(dataset, "test")
    assert len(found) == 3
    assert manifest["counts"]["questions"] == {"Anomaly Detection": 3}
    assert {r.image for case in found for r in case.seen.references} == {"MVTec-AD/bottle/train/good/003.png"}
    assert not load_cases(dataset, "train")
    assert any("split to seeded" in warning for warning in manifest["warnings"])
    assert (tmp_path / "out/sft/decision_maker/train.jsonl").read_text() == ""


def test_a_benchmark_question_is_kept_without_its_mask(tmp_path):
    annotations = draw_mmad(tmp_path / "raw")
    entries = json.loads(annotations.read_text())
    key = "DS-MVTec/bottle/image/crack/001.png"
    entries[key]["mask_path"] = "rbg_mask/crack/001.png"
    annotations.write_text(json.dumps(entries))
    mask = tmp_path / "raw/DS-MVTec/bottle/rbg_mask/crack/001.png"
    mask.parent.mkdir(parents=True)
    Image.new("L", (9, 9), 255).save(mask)
    manifest = build(make_config(annotations, tmp_path / "out", source="mmad"))
    assert (manifest["rejected"], manifest["dropped"]) == (0, {"mask": 1})
    assert len(load_cases(load_dataset(tmp_path / "out"), "test")) == 3


def test_copies_of_test_images_in_training_are_reported(small_manifest, tmp_path):
    root = small_manifest.parent
    shutil.copy(root / "cap/dent-0-1.png", root / "cap/dent-1-1.png")
    given = {"dent-0": "test", "dent-1": "train"}
    edit_rows(small_manifest, lambda row: row.update(split=given.get(row["group"], "train")))
    edit_rows(small_manifest, lambda row: row.pop("mask", None))
    manifest = build(make_config(small_manifest, tmp_path / "out"))
    assert any("are copies of images" in warning and "cap/dent-0-1.png" in warning for warning in manifest["warnings"])


def test_the_preview_page_is_self_contained(built):
    page = (built / "preview.html").read_text()
    assert page.count("<article>") == 48
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "url(" not in page
    assert "@import" not in page
    assert all(role in page for role in ROLES)
    assert "normal images of the train split serve as references." in page
