"""`data_prep.synthesize` adds synthetic defects that only training ever sees."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data_prep.build import build
from data_prep.collect import usable_images
from data_prep.config import BuildConfig
from data_prep.prepare import SYNTHETIC_ELSEWHERE, assign_configured_splits
from data_prep.sources.synthetic import MIN_PARTS
from data_prep.synthesize import SynthesizeConfig, manifest_row, synthesize
from echo_ft.data.dataset import load_cases, load_dataset
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl
from echo_ft.images.synthetic_defects import DEFECT_METHODS
from echo_ft.model.adapters import make_card
from echo_ft.records import GOOD, ROLES, Exchange, Inspection, Question, Rejection
from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS, ROOT
from tests.support.surfaces import disc


def draw_discs(root: Path, splits: bool, normals: int = 12) -> Path:
    """Draw normal discs, two exposures each, and one dented disc, and return the path of their manifest.

    With `splits`, the manifest assigns splits, and the dented disc is in the test split.
    """
    rows = []
    for number in range(normals):
        for exposure in (1, 2):
            name = f"disc/{number}-{exposure}.png"
            (root / "disc").mkdir(parents=True, exist_ok=True)
            Image.fromarray(disc(100, 130, number) // exposure).save(root / name)
            row = {"image": name, "product": "disc", "condition": GOOD, "group": f"part-{number}"}
            split = "train" if number < 8 else "validation" if number == 8 else "test"
            rows.append(row | ({"split": split} if splits else {}))
    dented = disc(100, 130, 99)
    dented[40:55, 50:70] = 5
    Image.fromarray(dented).save(root / "disc/dented.png")
    rows.append({"image": "disc/dented.png", "product": "disc", "condition": "dent"})
    rows[-1] |= {"boxes": [[50, 40, 70, 55]], **({"split": "test"} if splits else {})}
    (root / "parts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "parts:\n  disc:\n    good: An even disc.\n    dent: A dark hollow. It leaks.\n    scar: A cut. It tears.\n"
    (root / "known.yaml").write_text(text)
    return root / "parts.jsonl"


def run_command(module: str, *arguments: object, fails: bool = False) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", f"data_prep.{module}", *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def make_config(manifest: Path, output: Path, **changes) -> BuildConfig:
    values = {"source": "manifest", "annotations": manifest, "output": output, "descriptor": "skimage", "k": 1}
    return BuildConfig(**{**values, **changes})


def manifest_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "parts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def synthesized(tmp_path_factory) -> tuple[Path, Path, str]:
    """The source folder, the output folder of the command, and its terminal output."""
    root = tmp_path_factory.mktemp("line")
    manifest = draw_discs(root / "raw", splits=True)
    (root / "data.yaml").write_text(f"source: manifest\nannotations: {manifest}\ndescriptor: skimage\noutput: data/x\n")
    printed = run_command(
        "synthesize", "--config", root / "data.yaml", "--knowledge", root / "raw/known.yaml",
        "--output", root / "made", "--per_normal", 2, "--seed", 3,
    )  # fmt: skip
    return root / "raw", root / "made", printed


def test_command_lists_all_images_and_alters_only_training_normals(synthesized):
    raw, folder, printed = synthesized
    rows = manifest_rows(folder)
    source = [json.loads(line) for line in (raw / "parts.jsonl").read_text().splitlines()]
    real, synthetic = ([row for row in rows if bool(row.get("synthetic")) == side] for side in (False, True))
    assert [row["image"] for row in real] == [row["image"] for row in source]
    failed = [row for row in read_jsonl(folder / "rejected.jsonl", Rejection) if "no defect by" in row.reason]
    assert len(synthetic) + len(failed) == 32 and len(synthetic) > 26
    assert real[-1]["boxes"] == [[50, 40, 70, 55]]
    normals = {row["image"]: row for row in source}
    for row in synthetic:
        normal = normals[row["image"].removeprefix("synthetic/").rsplit("/", 1)[0]]
        assert row["split"] == normal["split"] == "train" and row["group"] == normal["group"]
        assert row["condition"] == DEFECT_METHODS[row["synthetic"]].condition
        image, mask = (np.asarray(Image.open(folder / row[key])) for key in ("image", "mask"))
        original = np.asarray(Image.open(raw / normal["image"]))
        changed = (image != original).any(axis=-1)
        assert set(np.unique(mask)) == {0, 255} and not changed[mask == 0].any() and changed.any()
    assert {row["synthetic"] for row in synthetic} == set(DEFECT_METHODS)
    assert f"{len(synthetic)} synthetic images: " in printed
    assert "--source manifest" in printed
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["list"] == "parts.jsonl"
    assert manifest["config"]["per_normal"] == 2
    assert manifest["config"]["seed"] == 3
    assert manifest["commit"]
    assert manifest["versions"]["scikit-image"]
    counts = manifest["counts"]
    assert (counts["images"], counts["normals"]) == (25, 16)
    assert sum(counts["synthetic"].values()) == len(synthetic)
    assert manifest["rejected"] == len(failed)


def test_images_are_linked_and_the_source_stays_unchanged(synthesized):
    raw, folder, _ = synthesized
    assert os.path.samefile(raw / "disc/0-1.png", folder / "disc/0-1.png")
    assert {path.name for path in raw.iterdir()} == {"disc", "parts.jsonl", "known.yaml"}
    assert not list((raw / "disc").glob("*mask*"))


def test_knowledge_gains_synthetic_conditions_and_keeps_user_text(synthesized):
    knowledge = yaml.safe_load((synthesized[1] / "knowledge.yaml").read_text())["parts"]["disc"]
    assert knowledge["good"] == "An even disc." and knowledge["scar"] == "A cut. It tears."
    assert set(knowledge) == {"good", "dent", *(method.condition for method in DEFECT_METHODS.values())}


def test_files_depend_on_the_seed(tmp_path):
    manifest = draw_discs(tmp_path / "raw", splits=False, normals=2)
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        synthesize(make_config(manifest, tmp_path / name, seed=seed), SynthesizeConfig())
    files = {
        name: {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("one", "same", "other")
    }
    assert files["one"] == files["same"] != files["other"]


def test_build_trains_on_synthetic_defects_and_tests_on_real_images(synthesized, tmp_path):
    raw, folder, _ = synthesized
    printed = run_command(
        "build", "--source", "manifest", "--annotations", folder / "parts.jsonl", "--knowledge",
        folder / "knowledge.yaml", "--output", tmp_path / "data", "--descriptor", "skimage", "--k", 2,
    )  # fmt: skip
    dataset = load_dataset(tmp_path / "data")
    inspections = list(read_jsonl(tmp_path / "data/inspections.jsonl", Inspection))
    marked = [one for one in inspections if one.synthetic]
    assert {one.split for one in marked} == {"train"} and len(marked) == sum(
        "synthetic" in row for row in manifest_rows(folder)
    )
    assert dataset.manifest["counts"]["synthetic"] == {
        method: sum(one.synthetic == method for one in marked) for method in sorted(DEFECT_METHODS)
    }
    card = make_card("decision_maker", str(ECHO_TINY), None, MIN_PIXELS, MAX_PIXELS, dataset)
    assert card.synthetic == dataset.manifest["counts"]["synthetic"]
    assert f"{len(marked)} training images have synthetic defects (" in printed
    by_id = {one.id: one for one in inspections}
    sides = dataset.manifest["counts"]["sft_sides"]
    assert all(sides[f"{role}/train"]["defective"]["cases"] > 0 for role in ROLES)
    rows = read_jsonl(tmp_path / "data/sft/decision_maker/train.jsonl", Exchange)
    assert {by_id[row.case].synthetic for row in rows if by_id[row.case].condition != GOOD} == set(DEFECT_METHODS)
    # References show normal images of other parts, never the image that the defect was added to.
    for case in load_cases(dataset, "train"):
        assert all(by_id[one.image].synthetic is None for one in case.seen.references)
        assert all(by_id[one.image].group != by_id[case.id].group for one in case.seen.references)
    # The test questions are the same as without synthetic defects: no option or knowledge entry mentions such a defect.
    invented = {method.condition for method in DEFECT_METHODS.values()} - {"scar"}  # the user described scars
    tested = load_cases(dataset, "test")
    assert {case.truth.condition for case in tested} == {GOOD, "dent"}
    for case in tested:
        assert not invented & {entry.condition for entry in case.seen.knowledge}
        assert not invented & {option for question in case.seen.questions for option in question.options.values()}
    trained = load_cases(dataset, "train")
    assert invented <= {entry.condition for case in trained for entry in case.seen.knowledge}
    build(make_config(raw / "parts.jsonl", tmp_path / "plain", knowledge=raw / "known.yaml", k=2))
    plain = load_cases(load_dataset(tmp_path / "plain"), "test")
    assert {case.id: (case.seen, case.truth) for case in tested} == {case.id: (case.seen, case.truth) for case in plain}
    assert "scar" in {entry.condition for case in tested for entry in case.seen.knowledge}, "no image shows it"


def test_synthetic_defects_follow_their_part_or_are_left_out(tmp_path):
    manifest = draw_discs(tmp_path / "raw", splits=False)
    manifest = manifest.rename(manifest.with_name("gasket.jsonl"))
    synthesize(make_config(manifest, tmp_path / "made"), SynthesizeConfig(["cutpaste"]))
    built = build(make_config(tmp_path / "made/gasket.jsonl", tmp_path / "data", fractions=[0.5, 0.2, 0.3]))
    plain = build(make_config(manifest, tmp_path / "plain", fractions=[0.5, 0.2, 0.3]))
    found = {name: list(read_jsonl(tmp_path / name / "inspections.jsonl", Inspection)) for name in ("data", "plain")}
    splits = {name: {one.image: one.split for one in rows if not one.synthetic} for name, rows in found.items()}
    assert splits["data"] == splits["plain"], "synthetic images change no split"
    tested = {
        name: [one for one in read_jsonl(tmp_path / name / "questions.jsonl", Question) if one.inspection in exam]
        for name, exam in ((name, {one.id for one in rows if one.split == "test"}) for name, rows in found.items())
    }
    assert tested["data"] == tested["plain"] != [], "and no test question"
    by_group = {one.group: one.split for one in found["plain"]}
    marked = [one for one in found["data"] if one.synthetic]
    assert marked
    assert all(one.split == "train" == by_group[one.group] for one in marked)
    left = [row for row in read_jsonl(tmp_path / "data/rejected.jsonl", Rejection) if row.reason == SYNTHETIC_ELSEWHERE]
    assert len(left) + len(marked) == 24 and left
    assert built["rejected"] == len(left) + plain["rejected"]


def test_unlabelled_images_stay_in_the_manifest(tmp_path):
    manifest = draw_discs(tmp_path / "raw", splits=False, normals=4)
    for name in ("new", "newer"):
        Image.fromarray(disc(100, 130, len(name))).save(tmp_path / f"raw/disc/{name}.png")
    with open(manifest, "a") as file:
        for name in ("new", "newer"):
            file.write(json.dumps({"image": f"disc/{name}.png", "product": "disc", "condition": ""}) + "\n")
    synthesize(make_config(manifest, tmp_path / "made"), SynthesizeConfig(["cutpaste"]))
    usable = usable_images(make_config(tmp_path / "made/parts.jsonl", tmp_path / "data"), tmp_path / "made")
    assert [one.image for one in usable.inspections if not one.condition] == ["disc/new.png", "disc/newer.png"]


def test_synthetic_defects_belong_to_parts_with_decomposed_names(tmp_path):
    """macOS writes `ü` as `u` and a mark. Without a group, the path of an image is its part."""
    manifest = draw_discs(tmp_path / "raw", splits=False, normals=4)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows:
        row.pop("group", None)
        name = row["image"].replace("disc/", "disc/gru\u0308n-")
        (tmp_path / "raw" / row["image"]).rename(tmp_path / "raw" / name)
        row["image"] = name
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    synthesize(make_config(manifest, tmp_path / "made"), SynthesizeConfig(["cutpaste"]))
    usable = usable_images(make_config(tmp_path / "made/parts.jsonl", tmp_path / "data"), tmp_path / "made")
    own = {one.image: one.group for one in usable.inspections}
    made = [one for one in usable.inspections if one.synthetic]
    assert len(made) > 4
    for one in made:
        assert one.group == own[one.image.removeprefix("synthetic/").rsplit("/", 1)[0]]


@pytest.mark.parametrize("frame", [0, 1])
def test_the_frame_of_a_build_does_not_hide_synthetic_images(tmp_path, frame):
    """The printed command takes the same config, with its frame, but synthetic images have only one frame."""
    manifest = draw_discs(tmp_path / "raw", splits=False, normals=4)
    for row in map(json.loads, manifest.read_text().splitlines()):
        with Image.open(tmp_path / "raw" / row["image"]) as image:
            image.load()
        layers = [Image.new(image.mode, image.size), image][:: 1 if frame else -1]
        layers[0].save(tmp_path / "raw" / row["image"], save_all=True, append_images=layers[1:], default_image=False)
    config = make_config(manifest, tmp_path / "made", frame=frame)
    counts = synthesize(config, SynthesizeConfig(["cutpaste"]))["counts"]
    again = make_config(tmp_path / "made/parts.jsonl", tmp_path / "data", frame=frame, root=tmp_path / "made")
    usable = usable_images(again, tmp_path / "made")
    assert usable.rejections == []
    made = [one for one in usable.inspections if one.synthetic]
    assert len(made) == counts["synthetic"]["cutpaste"] > 4
    assert len(usable.inspections) == len(made) + counts["images"]
    own = {one.image: one.group for one in usable.inspections}
    for one in made:
        assert one.group == own[one.image.removeprefix("synthetic/").rsplit("/", 1)[0]]


def test_boxes_on_an_image_that_viewers_turn_become_a_mask(tmp_path):
    manifest = draw_discs(tmp_path / "raw", splits=False, normals=4)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(tmp_path / "raw/disc/dented.png") as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "raw/disc/dented.png", exif=exif)
    names = [row["image"] for row in rows]
    images = [{"id": place, "file_name": name, "width": 130, "height": 100} for place, name in enumerate(names, 1)]
    marks = [{"id": 1, "image_id": len(rows), "category_id": 1, "bbox": [50, 40, 20, 15]}]
    coco = {"images": images, "annotations": marks, "categories": [{"id": 1, "name": "dent"}]}
    (tmp_path / "raw/parts.json").write_text(json.dumps(coco))
    synthesize(make_config(tmp_path / "raw/parts.json", tmp_path / "made"), SynthesizeConfig(["cutpaste"]))
    usable = usable_images(make_config(tmp_path / "made/parts.jsonl", tmp_path / "data"), tmp_path / "made")
    (dented,) = (one for one in usable.inspections if one.condition == "dent")
    assert dented.mask and not dented.boxes
    mask = np.asarray(Image.open(tmp_path / "made" / dented.mask)) > 0
    assert mask[40:55, 50:70].all() and mask.sum() == 15 * 20


def test_a_source_without_a_validation_split_is_told_how_to_get_one(tmp_path):
    """As in MVTec AD, train has only normal images. Its synthetic defects cannot validate."""
    manifest = draw_discs(tmp_path / "raw", splits=True)
    manifest.write_text(manifest.read_text().replace('"validation"', '"train"'))
    synthesize(make_config(manifest, tmp_path / "made"), SynthesizeConfig(["cutpaste"]))
    config = make_config(tmp_path / "made/parts.jsonl", tmp_path / "data")
    (found,) = (text for text in build(config)["warnings"] if "the validation split has no case" in text)
    assert "synthetic defects never count" in found
    assert "set split to seeded" in found and "--eval_strategy no" in found
    seeded = make_config(tmp_path / "made/parts.jsonl", tmp_path / "seeded", split="seeded")
    assert not [text for text in build(seeded)["warnings"] if "the validation split has no case" in text]


def test_dataset_with_its_own_name_gets_the_splits_of_its_source(tmp_path):
    source = BuildConfig("synthetic", tmp_path / "made", parts=MIN_PARTS, split="seeded")
    synthesize(source, SynthesizeConfig(["cutpaste"]))
    (tmp_path / "drawn").mkdir()
    splits = []
    for config in (source, make_config(tmp_path / "made/parts.jsonl", tmp_path / "data", split="seeded")):
        usable = usable_images(config, tmp_path / "drawn")
        root, inspections = usable.root, usable.inspections
        done, _, _ = assign_configured_splits(inspections, root, config)
        splits.append({one.image: one.split for one in done if one.synthetic is None})
    assert splits[0] == splits[1]
    assert set(splits[0].values()) == {"train", "test"}


def test_held_out_condition_is_not_trained_on_as_synthetic_defect(tmp_path):
    manifest = draw_discs(tmp_path / "raw", splits=False)
    scarred = disc(100, 130, 98)
    scarred[45:48, 40:80] = 5
    Image.fromarray(scarred).save(tmp_path / "raw/disc/scarred.png")
    with open(manifest, "a") as file:
        file.write(json.dumps({"image": "disc/scarred.png", "product": "disc", "condition": "scar"}) + "\n")
    synthesize(make_config(manifest, tmp_path / "made"), SynthesizeConfig(["scar", "cutpaste"]))
    build(make_config(tmp_path / "made/parts.jsonl", tmp_path / "data", split="by_condition", held_out=["scar"]))
    found = list(read_jsonl(tmp_path / "data/inspections.jsonl", Inspection))
    assert {one.condition for one in found if one.split == "train"} == {GOOD, "dent", "misplaced patch"}
    assert [one.image for one in found if one.condition == "scar"] == ["disc/scarred.png"]
    rejected = list(read_jsonl(tmp_path / "data/rejected.jsonl", Rejection))
    scars = [row["image"] for row in manifest_rows(tmp_path / "made") if row.get("synthetic") == "scar"]
    assert scars and set(scars) <= {row.item for row in rejected if row.reason == SYNTHETIC_ELSEWHERE}
    assert not re.search(r"\bscar\b", (tmp_path / "data/sft/decision_maker/train.jsonl").read_text())


def test_undecodable_image_is_rejected_and_the_others_are_used(tmp_path):
    manifest = draw_discs(tmp_path / "raw", splits=True, normals=2)
    broken = tmp_path / "raw/disc/1-1.png"
    chunks = [b"\x00\x00\x00\x40\x00\x00\x00\x40\x08\x02\x00\x00\x00", zlib.compress(bytes(99)), b""]
    named = [kind + chunk for kind, chunk in zip((b"IHDR", b"IDAT", b"IEND"), chunks, strict=True)]
    whole = b"".join((len(one) - 4).to_bytes(4, "big") + one + zlib.crc32(one).to_bytes(4, "big") for one in named)
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + whole)  # valid checksums, missing pixels
    synthesize(make_config(manifest, tmp_path / "made"), SynthesizeConfig(["cutpaste"]))
    rejected = {row.item: row.reason for row in read_jsonl(tmp_path / "made/rejected.jsonl", Rejection)}
    assert "the image is broken" in rejected["disc/1-1.png"]
    assert any(row.get("synthetic") for row in manifest_rows(tmp_path / "made"))


def test_a_name_with_a_comma_stays_one_defect_in_the_written_manifest(tmp_path):
    Image.new("L", (32, 24)).save(tmp_path / "a.png")
    one = Inspection("a.png", "a.png", "parts", "disc", "Crack, long+dent", "a.png")
    (tmp_path / "parts.jsonl").write_text(json.dumps(manifest_row(one)))
    found = usable_images(make_config(tmp_path / "parts.jsonl", tmp_path / "out"), tmp_path).inspections
    assert [i.condition for i in found] == ["Crack, long+dent"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"condition": "good", "synthetic": "cutpaste"}, "its defect is synthetic, but its condition is 'good'"),
        ({"syntetic": "cutpaste"}, "did you mean 'synthetic'"),
        ({"synthetic": "yes"}, "synthetic is 'yes', not one of cutpaste, scar, perlin, poisson; leave it empty"),
    ],
)
def test_contradictory_manifest_is_rejected(tmp_path, change, message):
    manifest = draw_discs(tmp_path / "raw", splits=True)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[0] |= change
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        build(make_config(manifest, tmp_path / "data"))
        found = " ".join(row.reason for row in read_jsonl(tmp_path / "data/rejected.jsonl", Rejection))
    except EchoError as error:
        found = str(error)
    assert message in found


def test_impossible_requests_fail_with_one_sentence(tmp_path, synthesized):
    manifest = draw_discs(tmp_path / "raw", splits=True)
    output = ("--output", tmp_path / "out", "--source", "manifest", "--annotations", manifest)
    assert "'paint' (choose from" in run_command("synthesize", *output, "--methods", "paint", fails=True)
    assert "per_normal is 0" in run_command("synthesize", *output, "--per_normal", 0, fails=True)
    with pytest.raises(EchoError, match="is not empty; choose another output"):
        synthesize(make_config(manifest, synthesized[1]), SynthesizeConfig())
    with pytest.raises(EchoError, match="the output needs the folder synthetic; rename it"):
        synthesize(make_config(synthesized[1] / "parts.jsonl", tmp_path / "again"), SynthesizeConfig())
    with pytest.raises(
        EchoError, match=r"the manifest would be called rejected\.jsonl, like the list of rejections; rename"
    ):
        copied = manifest.with_name("rejected.jsonl")
        copied.write_text(manifest.read_text())
        synthesize(make_config(copied, tmp_path / "out"), SynthesizeConfig())
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps(row | {"split": "test"}) + "\n" for row in rows))
    with pytest.raises(EchoError, match="no normal image outside validation and test"):
        synthesize(make_config(manifest, tmp_path / "out"), SynthesizeConfig())
    Image.new("RGB", (40, 40), "black").save(tmp_path / "raw/even.png")
    manifest.write_text(json.dumps({"image": "even.png", "product": "disc", "condition": "good"}) + "\n")
    with pytest.raises(EchoError, match="no defect could be made on any of 1 normal images"):
        synthesize(make_config(manifest, tmp_path / "out"), SynthesizeConfig(["cutpaste"]))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
