"""The source `robustmad` finds the images of its questions in the user's own folders of MVTec AD and VisA."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from data_prep.sources import SourceConfig, robustmad
from echo_ft.errors import EchoError
from echo_ft.records import ROBUSTMAD_TYPES, Inspection
from tests.conftest import ROOT
from tests.support.folder_layouts import draw, split_items
from tests.support.robustmad import questions_file

DATA = Path(os.environ.get("ECHO_FT_DATA", ROOT.parent / "shared" / "data")) / "robustmad"


def lay_out(root: Path, content: dict[str, Any]) -> SourceConfig:
    """Draw the images and references of a question file, and two training images per product."""
    for image in content["images"]:
        draw(root / image["image_path"])
        draw(root / image["reference_image_path"])
        for number in range(2):
            draw(root / image["dataset"] / image["category"] / "train" / "good" / f"{number:03}.png")
    (root / "questions.json").write_text(json.dumps(content))
    return SourceConfig(root, root / "questions.json")


def test_images_come_with_their_questions_reference_and_mask(tmp_path: Path) -> None:
    config = lay_out(tmp_path, questions_file(images=2))
    draw(tmp_path / "MVTec-AD/cable/ground_truth/scratch/000_mask.png", 255)
    inspections, questions, rejections = split_items(robustmad.read(config))
    assert rejections == []
    asked = [one for one in inspections if one.split == "test"]
    assert [(one.image, one.condition, one.mask) for one in asked] == [
        ("MVTec-AD/bottle/test/scratch/000.png", "scratch", None),
        ("MVTec-AD/bottle/test/good/001.png", "good", None),
        ("MVTec-AD/cable/test/scratch/000.png", "scratch", "MVTec-AD/cable/ground_truth/scratch/000_mask.png"),
        ("MVTec-AD/cable/test/good/001.png", "good", None),
    ]
    assert {one.reference for one in asked if one.product == "cable"} == {"MVTec-AD/cable/test/good/100.png"}
    assert [one.kind for one in questions] == [*ROBUSTMAD_TYPES.values()] * 4
    assert [one.id.rpartition("#")[2] for one in questions[:9:8]] == ["general-1", "domain-9"]
    normals = [one.image for one in inspections if one.split == "train"]
    assert normals == [f"MVTec-AD/{product}/train/good/{n:03}.png" for product in ("bottle", "cable") for n in range(2)]


def test_degraded_images_keep_the_id_and_the_mask_of_the_clean_one(tmp_path: Path) -> None:
    content = questions_file(images=2, degraded=True)
    config = lay_out(tmp_path, content)
    draw(tmp_path / "MVTec-AD/cable/ground_truth/scratch/000_mask.png", 255)
    (tmp_path / "MVTec-AD/cable/test/good/light/001_light.png").unlink()
    inspections, questions, rejections = split_items(robustmad.read(config))
    found = {one.id: one for one in inspections if one.split == "test"}
    blurred = found["MVTec-AD/cable/test/scratch/000.png"]
    assert blurred.image == "MVTec-AD/cable/test/scratch/blur/000_blur.png"
    assert blurred.mask == "MVTec-AD/cable/ground_truth/scratch/000_mask.png"
    assert {one.inspection for one in questions} == found.keys()
    (rejection,) = rejections
    assert rejection.item == "MVTec-AD/cable/test/good/light/001_light.png"
    assert "generate_LoQ_images.py" in rejection.reason


def test_the_clean_photo_of_a_degraded_query_is_no_training_image(tmp_path: Path) -> None:
    """It would be the nearest reference of the query, so clean and degraded runs would not see the same references."""
    folder = "VisA/cable/Data/Images/Normal"
    for name in ("000", "001", "100", "blur/000_blur"):
        draw(tmp_path / f"{folder}/{name}.JPG")
    pools = {}
    for kind, name in (("clean", "000"), ("degraded", "blur/000_blur")):
        content = questions_file(images=2)
        image = content["images"][-1] | {
            "dataset": "VisA",
            "image_path": f"VisA/cable/test/good/{name}.JPG",
            "reference_image_path": "VisA/cable/test/good/100.JPG",
        }
        (tmp_path / f"{kind}.json").write_text(json.dumps({"images": [image]}))
        inspections, _, rejections = split_items(robustmad.read(SourceConfig(tmp_path, tmp_path / f"{kind}.json")))
        assert rejections == []
        assert [one.image for one in inspections if one.split == "test"] == [f"{folder}/{name}.JPG"]
        pools[kind] = [one.image for one in inspections if one.split == "train"]
    assert pools["clean"] == pools["degraded"] == [f"{folder}/001.JPG", f"{folder}/100.JPG"]


def test_visa_is_read_in_its_published_layout_too(tmp_path: Path) -> None:
    content = questions_file(images=2)
    for image in content["images"]:
        condition = "good" if image["specie_name"] == "good" else "bad"
        name = f"VisA/{image['category']}/test"
        image |= {
            "dataset": "VisA",
            "specie_name": condition,
            "image_path": f"{name}/{condition}/{image['image_id'].replace('.png', '.JPG')}",
            "reference_image_path": f"{name}/good/100.JPG",
        }
    (tmp_path / "questions.json").write_text(json.dumps(content))
    for product in ("bottle", "cable"):
        for name in ("Normal/001", "Normal/100", "Normal/200", "Anomaly/000"):
            draw(tmp_path / f"VisA/{product}/Data/Images/{name}.JPG")
        draw(tmp_path / f"VisA/{product}/Data/Masks/Anomaly/000.png", 255)
    inspections, _, rejections = split_items(robustmad.read(SourceConfig(tmp_path, tmp_path / "questions.json")))
    assert rejections == []
    cables = [(one.id, one.image, one.mask, one.reference) for one in inspections if one.product == "cable"]
    images, reference = "VisA/cable/Data/Images", "VisA/cable/Data/Images/Normal/100.JPG"
    mask = "VisA/cable/Data/Masks/Anomaly/000.png"
    assert cables == [
        ("VisA/cable/test/bad/000.JPG", f"{images}/Anomaly/000.JPG", mask, reference),
        ("VisA/cable/test/good/001.JPG", f"{images}/Normal/001.JPG", None, reference),
        (f"{images}/Normal/100.JPG", f"{images}/Normal/100.JPG", None, None),
        (f"{images}/Normal/200.JPG", f"{images}/Normal/200.JPG", None, None),
    ]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    content = questions_file(images=2)
    content["images"][0]["questions"][0]["answer"] = "F"
    content["images"][1]["difficulty"] = "hard"
    config = lay_out(tmp_path, content)
    (tmp_path / "MVTec-AD/cable/test/scratch/000.png").unlink()
    (tmp_path / "MVTec-AD/bottle/test/good/100.png").unlink()
    for path in (tmp_path / "MVTec-AD/cable/train/good").iterdir():
        path.unlink()
    inspections, questions, rejections = split_items(robustmad.read(config))
    assert {(one.item, one.dropped): one.reason for one in rejections}.keys() == {
        ("MVTec-AD/bottle/test/scratch/000.png, question 1", None),
        ("questions.json, image 2", None),
        ("MVTec-AD/bottle/test/good/100.png", "reference"),
        ("MVTec-AD/cable/test/scratch/000.png", None),
        ("MVTec-AD/cable/train/good", None),
    }
    assert len(questions) == 3 + 4
    assert [one.image for one in inspections if one.split == "test"] == [
        "MVTec-AD/bottle/test/scratch/000.png",
        "MVTec-AD/cable/test/good/001.png",
    ]


def test_a_root_without_any_of_the_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "questions.json").write_text(json.dumps(questions_file()))
    config = SourceConfig(tmp_path, tmp_path / "questions.json")
    with pytest.raises(EchoError, match=r"none of the 12 images .* get MVTec AD and VisA, and set --root .* MVTec-AD"):
        split_items(robustmad.read(config))
    with pytest.raises(EchoError, match=r"set annotations to RobustMAD_MCQ\.json"):
        split_items(robustmad.read(SourceConfig(tmp_path)))


@pytest.mark.real_data
@pytest.mark.parametrize("suffix", ["", "_low"], ids=["clean", "degraded"])
def test_every_question_of_the_real_file_is_read(tmp_path: Path, suffix: str) -> None:
    path = DATA / f"RobustMAD_MCQ{suffix}.json"
    if not path.is_file():
        pytest.skip(f"no {path}; set ECHO_FT_DATA to the data folder")
    for image in json.loads(path.read_text())["images"]:
        for name in (image["image_path"], image["reference_image_path"]):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        normal = tmp_path / image["dataset"] / image["category"] / "train" / "good" / "0.png"
        normal.parent.mkdir(parents=True, exist_ok=True)
        normal.touch()
    inspections, questions, rejections = split_items(robustmad.read(SourceConfig(tmp_path, path)))
    assert rejections == []
    asked: list[Inspection] = [one for one in inspections if one.split == "test"]
    assert (len(asked), len(questions)) == (410, 4510)
    assert all(one.reference for one in asked)
    counts = [sum(one.kind == kind for one in questions) for kind in ROBUSTMAD_TYPES.values()]
    assert counts == [1640, 820, 820, 1230]
