"""The build: what a dataset folder holds and promises, and what happens to input that cannot be used."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.build import build, main
from data_prep.output import rejected_words
from data_prep.prepare import balanced
from data_prep.settings import BuildConfig
from echo_ft.dataset import cases, load_dataset
from echo_ft.records import ROLES, EchoError, Exchange, Inspection, Question, Reference, Rejection, read_jsonl, to_json
from echo_ft.targets import training_exchanges

REPOSITORY = Path(__file__).resolve().parents[1]
JSONL = ["inspections.jsonl", "references.jsonl", "questions.jsonl", "rejected.jsonl"]
SFT = [f"sft/{role}/{split}.jsonl" for role in ROLES for split in ("train", "validation")]


def draw_part(path: Path, seed: int, defect: bool = False, shade: float = 1.0) -> None:
    """A noisy 48 x 40 part, darker by `shade`, with a black square and its mask `<stem>_mask.png` where defective."""
    rng = np.random.default_rng(seed)
    pixels = (np.linspace(60, 200, 48)[None, :] * shade + rng.normal(0, 12, (40, 48))).clip(0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    if defect:
        mask = np.zeros((40, 48), np.uint8)
        y, x = rng.integers(4, 28, 2)
        mask[y : y + 8, x : x + 8] = 255
        pixels[mask > 0] = 5
        Image.fromarray(mask).save(path.with_name(f"{path.stem}_mask.png"))
    Image.fromarray(pixels).save(path)


def draw_manifest(root: Path, products: tuple[str, ...], normals: int, defects: int) -> Path:
    """Parts, two exposures each, with two kinds of defect, listed in parts.jsonl; returns the list's path."""
    rows = []
    for product in products:
        for condition, count in (("good", normals), ("dent", defects), ("stain", defects)):
            for number in range(count):
                for exposure in (1, 2):
                    name = f"{product}/{condition}-{number}-{exposure}.png"
                    bad = condition != "good"
                    draw_part(root / name, len(rows) // 2 + 1000 * exposure, bad, 1 / exposure)
                    row = {"image": name, "product": product, "condition": condition}
                    row |= {"group": f"{condition}-{number}"}
                    rows.append(row | ({"mask": name.replace(".png", "_mask.png")} if bad else {}))
    path = root / "parts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(listed: Path, output: Path, **changes) -> BuildConfig:
    values = {"source": "manifest", "annotations": listed, "output": output, "descriptor": "skimage", "k": 2}
    return BuildConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return draw_manifest(tmp_path_factory.mktemp("raw"), ("cap", "ring"), normals=12, defects=4)


@pytest.fixture
def small(tmp_path) -> Path:
    """A list of 24 photographs of one product, for a test to change."""
    return draw_manifest(tmp_path / "raw", ("cap",), normals=6, defects=3)


@pytest.fixture(scope="module")
def built(raw, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("datasets") / "parts"
    build(config(raw, output))
    return output


def rows(folder: Path, name: str, cls: type) -> list:
    return list(read_jsonl(folder / name, cls))


def described(folder: Path) -> Path:
    """Knowledge of both products, so that every kind of question is asked."""
    text = {"good": "An even ramp.", "dent": "A black square. It causes leaks.", "stain": "A blot. It causes rust."}
    (folder / "knowledge.yaml").write_text(json.dumps({"parts": {"cap": text, "ring": text}}))
    return folder / "knowledge.yaml"


def edit_rows(source: Path, change) -> None:
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    for line in lines:
        change(line)
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "data_prep.build", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)


def test_the_command_writes_the_whole_dataset_folder(raw, tmp_path):
    (tmp_path / "data.yaml").write_text(f"source: manifest\nannotations: {raw}\ndescriptor: skimage\nk: 1\n")
    done = run("--config", tmp_path / "data.yaml", "--output", tmp_path / "out", "--k", 2)
    assert done.returncode == 0, done.stderr
    for name in [*JSONL, *SFT, "manifest.json", "knowledge.json", "preview.html"]:
        assert (tmp_path / "out" / name).is_file(), name
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["config"]["k"] == 2
    assert sum(manifest["counts"]["photographs"].values()) == 80
    assert "80 photographs" in done.stdout and "0 rejected" in done.stdout
    assert [path.name for path in tmp_path.iterdir()].count("out") == 1 and len(list(tmp_path.iterdir())) == 2


def test_the_same_inputs_give_the_same_bytes(raw, built, tmp_path):
    build(config(raw, tmp_path / "again"))
    for name in [*JSONL, *SFT, "knowledge.json"]:
        assert (built / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert load_dataset(built).fingerprint == load_dataset(tmp_path / "again").fingerprint


def test_training_rows_are_those_of_each_case_in_the_balanced_order(built):
    """However they are kept until their order is known."""
    dataset = load_dataset(built)
    inspections = {i.id: i for i in rows(built, "inspections.jsonl", Inspection)}
    for role in ROLES:
        for split in ("train", "validation"):
            made = {case.id: training_exchanges(case, role, dataset.root, "full") for case in cases(dataset, split)}
            order = [inspections[name] for name, found in made.items() if found]
            order = balanced(order, seed=0) if split == "train" else order
            lines = [json.dumps(dataclasses.asdict(row), ensure_ascii=False) for case in order for row in made[case.id]]
            text = (built / "sft" / role / f"{split}.jsonl").read_text()
            assert lines and text == "".join(f"{line}\n" for line in lines)


def test_references_are_train_normals_of_another_part_and_the_same_product(built):
    by_image = {i.image: i for i in rows(built, "inspections.jsonl", Inspection)}
    by_id = {i.id: i for i in by_image.values()}
    references = rows(built, "references.jsonl", Reference)
    assert Counter(r.method for r in references) == {"retrieved": 160, "random": 160}
    for reference in references:
        query, normal = by_id[reference.inspection], by_image[reference.image]
        assert (normal.split, normal.condition, normal.product) == ("train", "good", query.product)
        assert normal.group != query.group


def test_training_rows_have_every_role_and_are_half_normal(built):
    condition = {i.id: i.condition for i in rows(built, "inspections.jsonl", Inspection)}
    for role in ROLES:
        found = rows(built, f"sft/{role}/train.jsonl", Exchange)
        normal = len({i for i, row in enumerate(found) if condition[row.case] == "good"})
        assert found and {row.role for row in found} == {role}
        assert all(branch.completion for row in found for branch in row.branches)
        if role == "reference_extractor":  # one row a case; the others have one for each route
            assert normal * 2 == len(found)


def test_the_manifest_counts_each_roles_rows_by_side_and_warns_of_a_side_that_is_missing(raw, built, tmp_path):
    """The paper's routing consults two roles for defects only."""
    paper = build(config(raw, tmp_path / "paper", routing="paper", knowledge=described(tmp_path)))
    full = json.loads((built / "manifest.json").read_text())
    for manifest, folder in ((paper, tmp_path / "paper"), (full, built)):
        condition = {i.id: i.condition for i in rows(folder, "inspections.jsonl", Inspection)}
        for role in ROLES:
            for split in ("train", "validation"):
                found = rows(folder, f"sft/{role}/{split}.jsonl", Exchange)
                normal = [row for row in found if condition[row.case] == "good"]
                sides = manifest["counts"]["sft_sides"][f"{role}/{split}"]
                assert (sides["normal"]["rows"], sides["defective"]["rows"]) == (len(normal), len(found) - len(normal))
                balanced = sides["normal"]["cases"] == sides["defective"]["cases"]
                assert balanced or split == "validation" or (manifest is paper and role in ROLES[1:3])
                assert manifest["counts"]["sft_rows"][f"{role}/{split}"] == len(found)
    assert not any("no balance" in warning for warning in full["warnings"])
    warned = [warning for warning in paper["warnings"] if "no balance" in warning]
    assert [warning.split()[0] for warning in warned] == ["knowledge_guide", "reasoning_expert"]
    for warning in warned:
        sides = paper["counts"]["sft_sides"][f"{warning.split()[0]}/train"]
        assert sides["normal"] == {"cases": 0, "rows": 0}
        assert f"{sides['defective']['rows']} training rows" in warning


@pytest.mark.parametrize("routing", ["full", "paper"])
def test_rows_of_a_repeated_case_are_apart_in_every_role(small, tmp_path, routing):
    """Also in a role that has no rows for the normal cases that stand between the repeats elsewhere."""
    edit_rows(small, lambda row: row.update(split="test" if row["group"] in ("dent-0", "stain-0") else "train"))
    edit_rows(small, lambda row: row.update(split="test") if row["group"] in ("dent-1", "stain-1", "stain-2") else None)
    settings = {"routing": routing, "fractions": [0.7, 0.0, 0.3], "knowledge": described(tmp_path)}
    build(config(small, tmp_path / "out", **settings))
    for role in ROLES:
        found = rows(tmp_path / "out", f"sft/{role}/train.jsonl", Exchange)
        assert found
        for _, group in groupby(found, key=lambda row: row.case):
            branches = [branch.id for row in group for branch in row.branches]
            assert len(branches) == len(set(branches)), "neighbouring rows of a case are that case once"
        one_sided = routing == "paper" and role in ("knowledge_guide", "reasoning_expert")
        assert one_sided == (max(Counter(map(to_json, found)).values()) == 1), "repeated is what balance needs"


def test_photographs_of_uneven_depths_are_reported(small, tmp_path):
    def deepen(name: str, top: int) -> None:
        path = small.parent / name
        values = (np.asarray(Image.open(path)).astype(int) * top // 255).astype(np.uint16)
        Image.fromarray(values).save(path)

    for number in range(6):
        deepen(f"cap/good-{number}-1.png", 4095)
    manifest = build(config(small, tmp_path / "even"))
    assert not any("depths" in warning for warning in manifest["warnings"])
    deepen("cap/dent-0-1.png", 65535)
    manifest = build(config(small, tmp_path / "uneven"))
    (warning,) = [warning for warning in manifest["warnings"] if "depths" in warning]
    assert "parts/cap" in warning and "6 from 12 bits, 1 from 16 bits" in warning


def test_training_and_validation_rows_show_only_their_own_split(built):
    inspections = rows(built, "inspections.jsonl", Inspection)
    for split in ("train", "validation"):
        allowed = {i.id for i in inspections if i.split == split}
        test = {i.image for i in inspections if i.split == "test"}
        for role in ROLES:
            for row in rows(built, f"sft/{role}/{split}.jsonl", Exchange):
                assert row.case in allowed and not test & set(row.images)


def test_records_of_earlier_versions_load(built, tmp_path):
    shutil.copytree(built, tmp_path / "old")
    path = tmp_path / "old" / "inspections.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    new = {"masks", "polygons"}
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k not in new}) + "\n" for line in lines))
    assert all(new <= line.keys() for line in lines)
    for split in ("train", "test"):
        assert cases(load_dataset(tmp_path / "old"), split) == cases(load_dataset(built), split)


def test_cases_keep_the_truth_apart_from_what_the_experts_see(built):
    dataset = load_dataset(built)
    for case in cases(dataset, "test"):
        assert all(question.answer is None for question in case.seen.questions)
        assert set(case.truth.answers) == {question.id for question in case.seen.questions}
        assert (case.truth.mask is None) == (case.truth.condition == "good")
        assert {"good", "dent", "stain"} == {entry.condition for entry in case.seen.knowledge}


def test_cases_take_references_by_method(built):
    dataset = load_dataset(built)
    assert all(len(case.seen.references) == 2 for case in cases(dataset, "test"))
    assert {r.method for case in cases(dataset, "test", "random") for r in case.seen.references} == {"random"}
    assert not any(case.seen.references for case in cases(dataset, "test", "none"))
    with pytest.raises(EchoError, match="choose from retrieved, random, none"):
        cases(dataset, "test", "nearest")


def test_a_reference_that_the_source_names_stands_unless_the_config_says_otherwise(small, tmp_path):
    edit_rows(small, lambda row: row.update(reference="cap/good-0-1.png") if "cap/dent-0" in row["image"] else None)
    build(config(small, tmp_path / "named"))
    build(config(small, tmp_path / "free", named_references=False))
    for folder, method in (("named", "given"), ("free", "retrieved")):
        dataset = load_dataset(tmp_path / folder)
        found = [c for split in ("train", "validation", "test") for c in cases(dataset, split) if "cap/dent-0" in c.id]
        assert found and {r.method for case in found for r in case.seen.references} == {method}


def test_knowledge_in_the_dataset_is_that_of_its_products(raw, tmp_path):
    text = {"good": "An even ramp.", "dent": "A black square. It can cause leaks.", "burr": "A sharp edge."}
    (tmp_path / "knowledge.yaml").write_text(json.dumps({"parts": {"cap": text, "lid": text}}))
    manifest = build(config(raw, tmp_path / "out", knowledge=tmp_path / "knowledge.yaml"))
    knowledge = json.loads((tmp_path / "out" / "knowledge.json").read_text())
    assert set(knowledge["parts"]) == {"cap", "ring"}
    assert knowledge["parts"]["cap"] == {**text, "stain": "stain"}
    assert manifest["products_without_knowledge"] == ["parts/ring"]
    assert any("parts/ring" in warning for warning in manifest["warnings"])


def test_broken_photographs_and_contradicting_masks_are_rejected_by_name(small, tmp_path):
    root = small.parent
    (root / "cap/good-0-1.png").write_bytes(b"not an image")
    whole = (root / "cap/good-1-1.png").read_bytes()
    (root / "cap/good-1-1.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (20, 20), 255).save(root / "cap/dent-0-1_mask.png")
    Image.new("L", (48, 40), 0).save(root / "cap/dent-1-1_mask.png")
    (root / "cap/dent-2-1_mask.png").write_bytes(b"")
    Image.new("L", (48, 40), 255).save(root / "mark.png")
    edit_rows(small, lambda r: r.update(mask="mark.png") if r["image"] == "cap/good-2-1.png" else None)
    manifest = build(config(small, tmp_path / "out"))
    rejections = rows(tmp_path / "out", "rejected.jsonl", Rejection)
    reasons = {r.item: r.reason for r in rejections}
    lines = {row["image"]: n for n, row in enumerate(map(json.loads, small.read_text().splitlines()), start=1)}
    assert all(reason.endswith(f" (parts.jsonl:{lines[image]})") for image, reason in reasons.items())
    assert manifest["rejected"] == 5 and manifest["dropped"] == {"mask": 1} and len(reasons) == 6
    assert [r.item for r in rejections if r.dropped] == ["cap/dent-1-1.png"]
    told = "5 rejected; 1 mask dropped, the photographs are used (see rejected.jsonl)"
    assert rejected_words(manifest) == told and f"{told}." in (tmp_path / "out" / "preview.html").read_text()
    assert "broken" in reasons["cap/good-0-1.png"] and "broken" in reasons["cap/good-1-1.png"]
    assert "20 x 20 pixels, the photograph 48 x 40" in reasons["cap/dent-0-1.png"]
    assert "marks nothing" in reasons["cap/dent-1-1.png"] and "used without it" in reasons["cap/dent-1-1.png"]
    assert "dent-2-1_mask.png" in reasons["cap/dent-2-1.png"]
    assert "labelled good" in reasons["cap/good-2-1.png"]
    kept = {i.image: i for i in rows(tmp_path / "out", "inspections.jsonl", Inspection)}
    assert len(kept) == 19 and kept["cap/dent-1-1.png"].mask is None
    used = {r.image for r in rows(tmp_path / "out", "references.jsonl", Reference)}
    assert used <= set(kept)


def test_boxes_stand_in_for_a_mask_and_must_lie_in_the_photograph(small, tmp_path):

    def box(row: dict) -> None:
        if row.pop("mask", None):
            row["boxes"] = [[40, 30, 60, 38]] if row["image"] == "cap/dent-0-1.png" else [[4, 4, 12, 12]]

    edit_rows(small, box)
    build(config(small, tmp_path / "out"))
    (rejection,) = rows(tmp_path / "out", "rejected.jsonl", Rejection)
    assert rejection.item == "cap/dent-0-1.png" and "48 x 40" in rejection.reason
    places = {q.options[q.answer] for q in rows(tmp_path / "out", "questions.jsonl", Question) if "Where" in q.text}
    assert places == {"top left"}


def mmad_tree(root: Path) -> Path:
    listed = {}
    question = {"Question": "Is there any defect in the object?", "type": "Anomaly Detection", "annotation": True}
    for number in range(4):
        draw_part(root / f"MVTec-AD/bottle/train/good/{number:03d}.png", number)
    for number, condition in enumerate(["good", "crack", "crack"]):
        key = f"DS-MVTec/bottle/image/{condition}/{number:03d}.png"
        draw_part(root / key, 50 + number)
        options = {"A": "Yes.", "B": "No."}
        answer = "B" if condition == "good" else "A"
        listed[key] = {
            "image_path": f"image/{condition}/{number:03d}.png",
            "mask_path": None,
            "conversation": [{**question, "Options": options, "Answer": answer}],
            "random_templates": ["MVTec-AD/bottle/train/good/003.png"],
        }
    (root / "mmad.json").write_text(json.dumps(listed))
    return root / "mmad.json"


def test_mmad_builds_with_its_own_questions_and_says_that_it_cannot_train(tmp_path):
    manifest = build(config(mmad_tree(tmp_path / "raw"), tmp_path / "out", source="mmad"))
    dataset = load_dataset(tmp_path / "out")
    found = cases(dataset, "test")
    assert len(found) == 3 and manifest["counts"]["questions"] == {"Anomaly Detection": 3}
    assert {r.image for case in found for r in case.seen.references} == {"MVTec-AD/bottle/train/good/003.png"}
    assert not cases(dataset, "train")
    assert any("split to seeded" in warning for warning in manifest["warnings"])
    assert (tmp_path / "out/sft/decision_maker/train.jsonl").read_text() == ""


def test_a_benchmarks_question_stands_without_its_mask(tmp_path):
    annotations = mmad_tree(tmp_path / "raw")
    listed = json.loads(annotations.read_text())
    key = "DS-MVTec/bottle/image/crack/001.png"
    listed[key]["mask_path"] = "rbg_mask/crack/001.png"
    annotations.write_text(json.dumps(listed))
    mask = tmp_path / "raw/DS-MVTec/bottle/rbg_mask/crack/001.png"
    mask.parent.mkdir(parents=True)
    Image.new("L", (9, 9), 255).save(mask)
    manifest = build(config(annotations, tmp_path / "out", source="mmad"))
    assert (manifest["rejected"], manifest["dropped"]) == (0, {"mask": 1})
    assert len(cases(load_dataset(tmp_path / "out"), "test")) == 3


def test_copies_of_test_photographs_in_training_are_reported(small, tmp_path):
    root = small.parent
    shutil.copy(root / "cap/dent-0-1.png", root / "cap/dent-1-1.png")
    given = {"dent-0": "test", "dent-1": "train"}
    edit_rows(small, lambda row: row.update(split=given.get(row["group"], "train")))
    edit_rows(small, lambda row: row.pop("mask", None))
    manifest = build(config(small, tmp_path / "out"))
    assert any("are copies" in warning and "cap/dent-0-1.png" in warning for warning in manifest["warnings"])


def test_an_interrupted_build_leaves_the_old_dataset_and_nothing_else(small, tmp_path, monkeypatch):
    build(config(small, tmp_path / "out"))
    before = (tmp_path / "out" / "manifest.json").read_bytes()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_prep.preview.write_preview", stop)
    with pytest.raises(KeyboardInterrupt):
        build(config(small, tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):
        build(config(small, tmp_path / "new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_only_a_dataset_of_the_same_config_is_replaced(small, tmp_path):
    output = tmp_path / "out"
    output.mkdir()  # an empty folder may be used
    build(config(small, output))
    build(config(small, output))
    with pytest.raises(EchoError, match=r"another config \(it differs in seed\).*--overwrite"):
        build(config(small, output, seed=1))
    first = load_dataset(output).fingerprint
    assert build(config(small, output, seed=1, overwrite=True))["fingerprint"] != first
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(EchoError, match=r"thesis\.txt"):
        build(config(small, output, seed=1))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    with pytest.raises(EchoError, match="not a dataset"):
        build(config(small, tmp_path / "photos", overwrite=True))
    assert (output / "thesis.txt").is_file() and (tmp_path / "photos" / "a.png").is_file()


def arguments(**values: object) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", *str(value).split())]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "manifets"}, "did you mean 'manifest'"),
        ({"source": "folder", "root": "nowhere"}, "root: there is no folder nowhere"),
        ({"source": "folder"}, "needs root"),
        ({"annotations": "nowhere.csv"}, "there is no file nowhere.csv"),
        ({"knowledge": "nowhere.yaml"}, "there is no file nowhere.yaml"),
        ({"fractions": "0.5 0.2 0.2"}, "three shares of 1"),
        ({"split": "random"}, "split"),
        ({"output": "pyproject.toml/data"}, "pyproject.toml cannot be written"),
        ({"k": "0"}, "k is 0"),
        ({"sede": "1"}, "did you mean 'seed'"),
    ],
)
def test_a_wrong_option_gets_one_clear_sentence(raw, tmp_path, changes, words):
    options = {"source": "manifest", "output": tmp_path / "out", "descriptor": "skimage"}
    if changes.get("source") != "folder":
        options["annotations"] = raw
    with pytest.raises(EchoError, match=re.escape(words)) as caught:
        main(arguments(**{**options, **changes}))
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (lambda row: False, "no usable photograph"),
        (lambda row: row["condition"] != "good", "no normal photograph.* with; add normal photographs, with condition"),
        (lambda row: row["condition"] == "good" and row.update(split="train") is None, "; add photographs of defects$"),
        (lambda row: not row.update(split="train" if row["condition"] != "good" else "test"), "; set split to seeded$"),
        (
            lambda row: row["condition"] != "good" or not row.update(condition="ok"),
            r"no normal photograph.*; \d+ rejected, the first: .* 'ok' is written 'good'",
        ),
    ],
)
def test_a_dataset_that_nothing_can_be_made_of_is_an_error_that_says_what_would_help(raw, tmp_path, keep, words):
    lines = [row for row in map(json.loads, raw.read_text().splitlines()) if keep(row)]
    source = raw.with_name(f"{tmp_path.name}.jsonl")
    source.write_text("".join(json.dumps(row) + "\n" for row in lines))
    with pytest.raises(EchoError, match=words):
        build(config(source, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_user_mistake_ends_without_a_traceback(tmp_path):
    (tmp_path / "mmad.json").write_text(json.dumps({"VisA/candle/test/bad/000.JPG": {}}))
    done = run(*arguments(source="mmad", annotations=tmp_path / "mmad.json", output=tmp_path / "out"))
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: all 1 photographs") and "Traceback" not in done.stderr
    assert "VisA/candle/test/bad/000.JPG" in error and str(tmp_path) in error


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "there is no dataset"), ("", "not JSON"), ('{"format": "other"}', "format"), ('{"root": 1}', "format")],
)
def test_a_folder_that_is_no_dataset_is_refused_with_the_remedy(tmp_path, content, words):
    folder = tmp_path / "data"
    if content is not None:
        folder.mkdir()
        (folder / "manifest.json").write_text(content)
    with pytest.raises(EchoError, match=f"{words}.*build"):
        load_dataset(folder)


def test_a_dataset_whose_images_moved_says_where_they_were(small, tmp_path):
    build(config(small, tmp_path / "out"))
    small.parent.rename(tmp_path / "moved")
    with pytest.raises(EchoError, match=r"no longer in .*raw"):
        load_dataset(tmp_path / "out")


def test_the_preview_needs_nothing_but_itself(built):
    page = (built / "preview.html").read_text()
    assert page.count("<article>") == 48
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "url(" not in page and "@import" not in page
    assert all(role in page for role in ROLES)
    assert "normal photographs of the train split serve as references." in page
