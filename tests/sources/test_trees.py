"""Folder trees that people have are read if their meaning is clear; otherwise, a one-line message says what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data_prep.build import build
from data_prep.config import BuildConfig
from data_prep.sources import SourceConfig, folder, mvtec_ad
from echo_ft.errors import EchoError
from tests.support.folder_layouts import draw, draw_mask, split_items


def make(root: Path, *places: str) -> Path:
    """Draw an image at each path, or a mask if one of its folders is named like a folder of masks."""
    for place in places:
        is_mask = {"ground_truth", "masks", "mask"} & set(place.casefold().split("/"))
        (draw_mask if is_mask else draw)(root / f"{place}.png")
    return root


def read(root: Path, split: str = "seeded"):
    inspections, _, rejections = split_items(folder.read(SourceConfig(root, split=split)))
    found = {i.image.removesuffix(".png"): (i.product, i.condition, i.split, i.mask) for i in inspections}
    return found, {r.item: r.reason for r in rejections}


@pytest.mark.parametrize("split", ["given", "seeded"])
def test_names_of_the_layout_may_have_any_case(tmp_path, split):
    make(tmp_path, "nut/Train/Good/0", "nut/TEST/dent/0", "nut/Ground_Truth/Dent/0_mask", "nut/Val/good/1")
    found, rejections = read(tmp_path, split)
    assert rejections == {}
    assert found == {
        "nut/Train/Good/0": ("nut", "good", "train", None),
        "nut/Val/good/1": ("nut", "good", "validation", None),
        "nut/TEST/dent/0": ("nut", "dent", "test", "nut/Ground_Truth/Dent/0_mask.png"),
    }


def test_mask_folder_of_the_same_case_comes_first(tmp_path):
    make(tmp_path, "nut/train/good/0", "nut/test/Dent/0", "nut/ground_truth/DENT/1", "nut/ground_truth/Dent/0")
    found, rejections = read(tmp_path)
    assert found["nut/test/Dent/0"] == ("nut", "Dent", "test", "nut/ground_truth/Dent/0.png")
    assert list(rejections) == ["nut/ground_truth/DENT"]


@pytest.mark.parametrize("masks", ["ground_truth", "masks", "Mask"])
@pytest.mark.parametrize("images", ["", "images/", "Images/"])
@pytest.mark.parametrize("product", ["", "nut/"])
def test_flat_folders_are_read_if_the_build_makes_the_splits(tmp_path, product, images, masks):
    """This is the layout of anomalib's `Folder`."""
    root = tmp_path / "line"
    conditions = f"{product}{images}"
    make(root, *(f"{conditions}{place}" for place in ("good/0", "good/1", "dent/0", "scratch/0")))
    make(root, f"{product}{masks}/dent/0", f"{product}{masks}/scratch/0_mask")
    (root / "license.txt").write_text("free")
    found, rejections = read(root)
    assert rejections == {}
    name = product.strip("/") or "line"
    assert found == {
        f"{conditions}good/0": (name, "good", None, None),
        f"{conditions}good/1": (name, "good", None, None),
        f"{conditions}dent/0": (name, "dent", None, f"{product}{masks}/dent/0.png"),
        f"{conditions}scratch/0": (name, "scratch", None, f"{product}{masks}/scratch/0_mask.png"),
    }


def test_flat_product_may_have_a_declared_word_for_good(tmp_path):
    make(tmp_path, "nut/OK/0", "nut/dent/0")
    inspections, _, rejections = split_items(folder.read(SourceConfig(tmp_path, good=("ok",), split="seeded")))
    assert [(i.image, i.condition) for i in inspections] == [("nut/OK/0.png", "good"), ("nut/dent/0.png", "dent")]
    assert rejections == []


@pytest.mark.parametrize(
    "name", ["gt", "GT", "Ground-Truth", "groundtruth", "label", "labels", "annotations", "mask_dent", "seg", "masks"]
)
@pytest.mark.parametrize("product", ["", "nut/"])
def test_masks_in_a_folder_of_another_name_are_no_defect(tmp_path, name, product):
    root = make(tmp_path / "line", *(f"{product}{place}" for place in ("good/0", "dent/0", "ground_truth/dent/0")))
    draw(root / product / name / "0.png")
    draw(root / product / name / "good" / "0.png"), draw(root / product / name / "dent" / "0.png")
    found, rejections = read(root)
    if name.casefold() not in ("groundtruth", "ground-truth"):
        assert found[f"{product}dent/0"][3] == f"{product}ground_truth/dent/0.png"
    assert set(found) == {f"{product}good/0", f"{product}dent/0"}
    assert "seems to hold masks or labels; rename it to ground_truth" in rejections[f"{product}{name}"]


@pytest.mark.parametrize("name", ["label_torn", "segregation", "solder_mask", "gtx"])
def test_defects_may_have_names_that_begin_like_those_of_masks(tmp_path, name):
    found, rejections = read(make(tmp_path, "nut/good/0", f"nut/{name}/0"))
    assert (found[f"nut/{name}/0"][1], rejections) == (name, {})


def test_labels_may_be_a_product_but_not_next_to_their_images(tmp_path):
    found, rejections = read(make(tmp_path / "line", "label/good/0", "label/torn/0", "nut/good/0"))
    assert (set(found), rejections) == ({"label/good/0", "label/torn/0", "nut/good/0"}, {})
    with pytest.raises(EchoError, match="the folder of one product"):
        read(make(tmp_path / "nut", "train/good/0", "test/dent/0", "gt/good/0", "gt/dent/0"))


@pytest.mark.parametrize("mask", ["0_mask", "0-Mask", "0_GT", "0_label"])
@pytest.mark.parametrize("place", ["nut/dent", "nut/test/dent"])
def test_a_mask_next_to_its_image_is_no_image(tmp_path, place, mask):
    make(tmp_path, "nut/train/good/0" if "test" in place else "nut/good/0", f"{place}/0", f"{place}/1_mask")
    draw(tmp_path / place / f"{mask}.bmp")
    found, rejections = read(tmp_path)
    assert {one for one in found if one.startswith(place)} == {f"{place}/0", f"{place}/1_mask"}
    assert list(rejections) == [f"{place}/{mask}.bmp"]
    assert "seems to be the mask of 0.png next to it; move it to ground_truth" in rejections[f"{place}/{mask}.bmp"]


def test_undeclared_word_for_good_next_to_products_is_named(tmp_path):
    make(tmp_path, "nut/train/good/0", "nut/test/dent/0", "cap/OK/0", "cap/NG/0", "lid/images/i.O./0", "spare/0")
    _, rejections = read(tmp_path)
    assert rejections["cap"] == "folder ignored (files: 2): if OK holds its parts without a defect, pass --good OK"
    assert "pass --good i.O." in rejections["lid"]
    assert "a product folder contains one of" in rejections["spare"]
    assert rejections["cap"] + " and set split to seeded" == read(tmp_path, "given")[1]["cap"]


def test_flat_folders_name_the_place_that_images_must_be_in(tmp_path):
    make(tmp_path, "nut/images/good/0", "nut/images/1", "nut/2", "nut/spare/3", "cap/good/0", "cap/1")
    _, rejections = read(tmp_path)
    assert rejections == {
        "nut/images/1.png": "the image is not in nut/images/<condition>",
        "nut/2.png": "the image is not in nut/images/<condition>",
        "nut/spare": "folder ignored (files: 1): the folders of conditions are in nut/images",
        "cap/1.png": "the image is not in cap/<condition>",
    }
    _, rejections = read(make(tmp_path / "line", "good/0", "1"))
    assert rejections == {"1.png": "the image is not in <condition>"}


def test_flat_folders_report_what_they_ignore(tmp_path):
    make(tmp_path, "nut/good/0", "nut/dent/0", "nut/dent/cam1/1", "nut/2", "nut/masks/dent/7", "nut/OK/3", "spare/0")
    found, rejections = read(tmp_path)
    assert set(found) == {"nut/good/0", "nut/dent/0"}
    assert set(rejections) == {
        "nut/dent/cam1",
        "nut/2.png",
        "nut/masks/dent",
        "nut/masks/dent/0_mask.png",
        "nut/OK",
        "spare",
    }
    assert "must be spelled 'good'" in rejections["nut/OK"]


def test_flat_folder_next_to_products_with_splits_is_read_or_named(tmp_path):
    make(tmp_path, "nut/train/good/0", "nut/test/dent/0", "cap/good/0", "cap/dent/0")
    assert set(read(tmp_path)[0]) == {"nut/train/good/0", "nut/test/dent/0", "cap/good/0", "cap/dent/0"}
    found, rejections = read(tmp_path, "given")
    assert set(found) == {"nut/train/good/0", "nut/test/dent/0"}
    assert rejections == {
        "cap": "folder ignored (files: 2): it has no train or test folder; set split to seeded to use it"
    }


def test_build_of_a_flat_tree_makes_its_splits(tmp_path):
    root = make(tmp_path / "line", *(f"{condition}/{n}" for condition in ("good", "dent") for n in range(10)))
    make(root, *(f"masks/dent/{n}" for n in range(10)))
    made = build(BuildConfig("folder", tmp_path / "out", root, descriptor="skimage", split="seeded"))
    assert made["rejected"] == 0
    assert made["counts"]["photographs"] == {"test": 6, "train": 12, "validation": 2}


REFUSED = {
    "flat without splits": (
        ["good/0", "dent/0"],
        "given",
        r"ROOT has folders of conditions \(dent, good\) but no train or test folder: set split to seeded, or list the "
        r"images in a CSV file \(source manifest\)",
    ),
    "flat products without splits": (
        ["nut/good/0", "nut/dent/0"],
        "given",
        r"ROOT/nut has folders of conditions \(dent, good\) but no train or test folder: set split",
    ),
    "one folder deeper": (
        ["metal/nut/train/good/0", "metal/nut/test/dent/0", "metal/bolt/train/good/0"],
        "given",
        r"its products \(bolt, nut\) lie one folder deeper: set root to ROOT/metal$",
    ),
    "flat, one folder deeper": (
        ["metal/nut/good/0", "metal/nut/dent/0"],
        "seeded",
        r"its products \(nut\) lie one folder deeper: set root to ROOT/metal$",
    ),
    "in two folders, one deeper": (
        ["metal/nut/train/good/0", "wood/plank/Train/good/0"],
        "seeded",
        r"its products lie one folder deeper: build a dataset from each of ROOT/metal, ROOT/wood$",
    ),
    "one product": (["train/good/0", "test/dent/0"], "seeded", "the folder of one product: set it to PARENT$"),
    "images without conditions": (
        ["images/0", "masks/0"],
        "seeded",
        "the images in ROOT/images have no condition: move them to good and one folder per defect, or list",
    ),
    "images of a product without conditions": (["nut/images/0"], "seeded", "the images in ROOT/nut/images have no"),
    "no good folder": (
        ["dent/0", "scratch/0", "1"],
        "seeded",
        "it holds the folders dent, scratch and 1 images: check",
    ),
    "another word for good": (
        ["nut/OK/0", "nut/NG/0"],
        "seeded",
        r"ROOT/nut has no folder good: if OK holds its parts without a defect, pass --good OK$",
    ),
    "two words for good without splits": (
        ["no defect/0", "NG/0"],
        "given",
        r"ROOT has no folder good: if no defect holds .*, pass --good 'no defect' and set split to seeded$",
    ),
    "nothing": ([], "seeded", "it holds nothing: check root, or list the images in a CSV file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_trees_get_one_sentence_with_what_was_found_and_what_to_do(tmp_path, case):
    places, split, message = REFUSED[case]
    root = make(tmp_path / "line", *places)
    root.mkdir(exist_ok=True)
    wanted = message.replace("ROOT", re.escape(str(root))).replace("PARENT", re.escape(str(tmp_path)))
    with pytest.raises(EchoError, match=wanted) as caught:
        read(root, split)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("there is no folder <product>/train/<condition> or <product>/test/<condition>")


def test_published_datasets_have_no_flat_products(tmp_path):
    make(tmp_path, "nut/good/0", "nut/dent/0")
    with pytest.raises(EchoError, match="it holds the folders nut: check root"):
        list(mvtec_ad.read(SourceConfig(tmp_path, split="seeded")))
