from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import distance_transform_edt
from skimage.draw import polygon2mask

from echo_ft.data.questions import write_questions
from echo_ft.errors import EchoError
from echo_ft.images import masks
from echo_ft.images.masks import PLACES, SPREAD, load_mask, measure
from echo_ft.records import QUESTION_TYPES, Entry, Inspection, Question

KNOWLEDGE = (
    Entry("good", "An even grey disc. It has six holes."),
    Entry("crack", "A thin dark line. The disc breaks under load."),
    Entry("dent", "A round shallow hollow. It rattles in its seat."),
    Entry("rust", "Brown spots."),
)
CONDITIONS = ["good", "crack", "dent", "rust", "paint_run"]
PRODUCTS = ["steel_disc", "bolt", "nut"]


def inspect(condition: str, name: str = "a", mask: str | None = None, boxes: object = ()) -> Inspection:
    return Inspection(f"{name}.png", "image.png", "drawn", "steel_disc", condition, name, mask=mask, boxes=tuple(boxes))  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Image.new("L", (90, 60), 128).save(tmp_path / "image.png")
    mask = np.zeros((60, 90), dtype=np.uint8)
    mask[45:50, 70:80] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def write(inspection: Inspection, root: Path, seed: int = 0) -> dict[str, Question]:
    questions = write_questions(inspection, KNOWLEDGE, CONDITIONS, PRODUCTS, root, seed)
    return {question.kind: question for question in questions}


def right(question: Question) -> str:
    assert question.answer is not None
    return question.options[question.answer]


def test_a_defect_is_asked_about_in_five_kinds_with_true_answers(root: Path) -> None:
    asked = write(inspect("crack", mask="mask.png"), root)
    assert list(asked) == list(QUESTION_TYPES[:5])
    assert {kind: right(question) for kind, question in asked.items()} == {
        "Anomaly Detection": "Yes.",
        "Defect Classification": "crack",
        "Defect Localization": "bottom right",
        "Defect Description": "A thin dark line.",
        "Defect Analysis": "The disc breaks under load.",
    }
    assert asked["Anomaly Detection"].text == "Is there any defect in the object?"
    for kind in QUESTION_TYPES[1:5]:
        assert asked[kind].text.startswith("There is a defect in the object. ")
    assert asked["Defect Localization"].id == "a.png#defect-localization"
    assert set(asked["Defect Classification"].options.values()) == {"crack", "dent", "rust", "paint run"}


def test_a_normal_part_is_asked_about_the_object(root: Path) -> None:
    asked = write(inspect("good", mask="mask.png"), root)
    assert list(asked) == ["Anomaly Detection", "Object Classification", "Object Analysis"]
    assert right(asked["Anomaly Detection"]) == "No."
    assert right(asked["Object Classification"]) == "steel disc"
    assert set(asked["Object Classification"].options.values()) == {"steel disc", "bolt", "nut"}
    assert right(asked["Object Analysis"]) == "An even grey disc."
    assert set(asked["Object Analysis"].options.values()) <= {
        "An even grey disc.",
        "A thin dark line.",
        "A round shallow hollow.",
        "Brown spots.",
    }


def test_a_kind_without_an_honest_answer_is_left_out(root: Path) -> None:
    assert "Defect Localization" not in write(inspect("crack"), root)
    assert "Defect Analysis" not in write(inspect("rust"), root)
    unknown = write(inspect("paint_run"), root)  # nothing but its name is known
    assert list(unknown) == ["Anomaly Detection", "Defect Classification"]
    names = (Entry("good", "free of defects"), Entry("crack", "crack"), Entry("dent", "dent"))
    for condition in ("good", "crack"):
        plain = write_questions(inspect(condition), names, ["good", "crack", "dent"], ["steel_disc"], root, 0)
        kinds = [question.kind for question in plain]
        assert kinds == (["Anomaly Detection"] + (["Defect Classification"] if condition == "crack" else []))
    only = write_questions(inspect("crack"), KNOWLEDGE[:2], ["good", "crack"], ["steel_disc"], root, 0)
    assert [question.kind for question in only] == ["Anomaly Detection"]


def test_what_a_photograph_of_several_defects_shows_too_is_no_wrong_option(root: Path) -> None:
    conditions = ["good", "crack", "dent", "rust", "crack+dent", "combined"]
    knowledge = (*KNOWLEDGE, Entry("crack+dent", "A line in a hollow. The disc breaks."), Entry("combined", "Several."))
    for condition in ("crack+dent", "crack"):
        asked = write_questions(inspect(condition), knowledge, conditions, PRODUCTS, root, 0)
        named = next(question for question in asked if question.kind == "Defect Classification")
        assert right(named) == condition.replace("+", " + ") or right(named) == condition
        others = {text for letter, text in named.options.items() if letter != named.answer}
        assert others == ({"rust"} if condition == "crack+dent" else {"dent", "rust", right(named) + "+dent"})
        described = next(question for question in asked if question.kind == "Defect Description")
        assert ("A thin dark line." in described.options.values()) == (condition == "crack")
    mixed = write_questions(inspect("combined"), knowledge, conditions, PRODUCTS, root, 0)
    assert [question.kind for question in mixed] == ["Anomaly Detection"], "any of the product's defects may be there"


def test_an_empty_mask_gives_no_place(root: Path) -> None:
    Image.new("L", (90, 60)).save(root / "empty.png")
    assert "Defect Localization" not in write(inspect("crack", mask="empty.png"), root)


def test_boxes_tell_the_place_as_a_mask_does(root: Path) -> None:
    asked = write(inspect("crack", boxes=[(2, 3, 20, 15)]), root)
    assert right(asked["Defect Localization"]) == "top left"


def test_no_two_options_are_alike_and_there_are_two_to_four(root: Path) -> None:
    twins = (*KNOWLEDGE, Entry("Crack ", "a thin dark line"), Entry("second", "Brown spots."))
    for condition, seed in itertools.product(("good", "crack", "dent"), range(20)):
        for question in write_questions(
            inspect(condition, mask="mask.png"), twins, CONDITIONS, [*PRODUCTS, "Steel disc"], root, seed
        ):
            plain = [text.casefold().strip().rstrip(".") for text in question.options.values()]
            assert len(plain) == len(set(plain)) and 2 <= len(plain) <= 4
            assert question.answer in question.options
            assert list(question.options) == list("ABCD")[: len(plain)]


def test_wrong_places_hold_none_of_the_defect(root: Path) -> None:
    mask = np.zeros((60, 90), dtype=np.uint8)
    mask[28:32, 5:85] = 255  # a line through the whole middle row
    Image.fromarray(mask).save(root / "line.png")
    for seed in range(20):
        question = write(inspect("crack", mask="line.png"), root, seed)["Defect Localization"]
        assert right(question) == "center"
        assert not {"left", "right"} & set(question.options.values())


def test_the_seed_and_the_id_alone_decide_the_options(root: Path) -> None:
    first = write(inspect("crack", mask="mask.png"), root)
    assert first == write(inspect("crack", mask="mask.png"), root)
    turned = write_questions(
        inspect("crack", mask="mask.png"), KNOWLEDGE[::-1], CONDITIONS[::-1], PRODUCTS[::-1], root, 0
    )
    assert list(first.values()) == turned
    assert any(
        write(inspect("crack", mask="mask.png"), root, seed)["Defect Classification"].options
        != first["Defect Classification"].options
        for seed in range(1, 4)
    )


def test_answers_are_balanced_over_a_dataset(root: Path) -> None:
    letters: dict[str, Counter[str]] = {}
    for number in range(400):
        for condition in ("crack", "good"):
            for kind, question in write(inspect(condition, name=f"{condition}{number}"), root).items():
                letters.setdefault(f"{kind} {len(question.options)}", Counter())[str(question.answer)] += 1
    for kind, counts in letters.items():
        fair = counts.total() / int(kind[-1])
        assert all(abs(count - fair) < 5 * fair**0.5 for count in counts.values()), (kind, counts)


@pytest.mark.parametrize("place", PLACES)
def test_a_region_is_where_its_pixels_are(place: str) -> None:
    row, column = divmod(PLACES.index(place), 3)
    mask = np.zeros((120, 90), dtype=np.bool_)
    mask[row * 40 + 15 : row * 40 + 25, column * 30 + 10 : column * 30 + 20] = True
    region = measure(mask)
    assert region is not None
    assert region.place == place and region.cells == (place,) and region.count == 1
    assert region.extent == pytest.approx(100 / (120 * 90))


def test_shape_size_and_spread_are_told() -> None:
    ys, xs = np.mgrid[:200, :200]
    disc = (ys - 60) ** 2 + (xs - 60) ** 2 < 12**2
    line = (abs(ys - 100) < 3) & (abs(xs - 100) < 40)
    angle = (abs(ys - 130) < 3) & (xs > 70) & (xs < 130) | (abs(xs - 130) < 3) & (ys > 70) & (ys < 130)
    spots = ((ys % 50) < 6) & ((xs % 50) < 6)
    told = [region for mask in (disc, line, angle, spots) if (region := measure(mask))]
    assert [region.shape for region in told] == ["round", "elongated", "irregular", "scattered"]
    assert [region.place for region in told[1::2]] == ["center", SPREAD]
    assert [region.size for region in told] == ["small"] * 4
    assert told[3].count == 16
    everything = measure(np.ones((30, 30), dtype=np.bool_))
    assert everything is not None and everything.place == SPREAD and everything.size == "huge"
    assert measure(np.zeros((30, 30), dtype=np.bool_)) is None


def test_pieces_far_apart_are_where_most_of_them_is() -> None:
    mask = np.zeros((90, 90), dtype=np.bool_)
    mask[5:15, 5:15] = True
    mask[70:85, 70:85] = True
    region = measure(mask)
    assert region is not None and region.place == "bottom right" and set(region.cells) == {"top left", "bottom right"}


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "I;16"])
def test_every_kind_of_mask_image_is_read(tmp_path: Path, mode: str) -> None:
    values = np.zeros((20, 30), dtype=np.uint8)
    values[4:8, 10:20] = 1 if mode in ("L", "P", "I;16") else 255
    plain = Image.fromarray(values)
    if mode == "P":
        plain.putpalette([0, 0, 0, 255, 0, 0])
    elif mode == "I;16":
        plain = Image.fromarray(values.astype(np.uint16))
    elif mode in ("RGB", "RGBA"):
        plain = Image.merge("RGB", (plain, Image.new("L", plain.size), Image.new("L", plain.size))).convert(mode)
    else:
        plain = plain.convert(mode)
    plain.save(tmp_path / "mask.png")
    mask = load_mask(inspect("crack", mask="mask.png"), tmp_path, (30, 20))
    assert mask is not None
    np.testing.assert_array_equal(mask, values > 0)


@pytest.mark.parametrize("quality", [60, 75, 95])
def test_a_mask_that_was_saved_as_jpeg_marks_what_was_drawn(tmp_path: Path, quality: int) -> None:
    ys, xs = np.mgrid[:256, :256]
    disc = (ys - 100) ** 2 + (xs - 60) ** 2 < 15**2
    Image.fromarray(disc.astype(np.uint8) * 255).save(tmp_path / "mask.jpg", quality=quality)
    mask = load_mask(inspect("crack", mask="mask.jpg"), tmp_path, (256, 256))
    assert mask is not None and (mask ^ disc).sum() < 0.03 * disc.sum()
    assert masks.measure(mask) == masks.measure(disc)


@pytest.mark.parametrize("size", [(60, 40), (40, 40), (20, 30)])
def test_a_mask_of_another_size_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.fromarray(np.full((20, 30), 255, dtype=np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(EchoError, match=rf"mask mask.png has 30 x 20 pixels but its image has {size[0]} x {size[1]}"):
        load_mask(inspect("crack", mask="mask.png"), tmp_path, size)


def test_a_broken_mask_and_a_box_outside_are_refused(tmp_path: Path, root: Path) -> None:
    (root / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(EchoError, match=r"mask broken\.png cannot be read"):
        write(inspect("crack", mask="broken.png"), root)
    with pytest.raises(EchoError, match=r"mask gone\.png cannot be read"):
        write(inspect("crack", mask="gone.png"), root)
    with pytest.raises(EchoError, match=r"box \[100, 5, 120, 9\] lies outside the 90 x 60"):
        write(inspect("crack", boxes=[(100, 5, 120, 9)]), root)


@pytest.mark.parametrize("seed", range(5))
def test_a_polygon_is_filled_as_scikit_image_fills_it_but_for_its_outline(seed: int) -> None:
    rng = np.random.default_rng(seed)
    angles = (np.arange(7) + rng.uniform(0, 0.6, 7)) * 2 * np.pi / 7  # no spike thinner than a pixel
    corners = np.stack([100 + 70 * np.cos(angles), 80 + 60 * np.sin(angles)], axis=1)
    filled = masks.fill_polygons([corners.ravel().tolist()], (200, 160))
    reference = polygon2mask((160, 200), corners[:, ::-1])
    # A pixel's corner is its coordinate in one and its centre in the other, and the outline itself counts here.
    assert distance_transform_edt(~reference)[filled].max() <= 2
    assert distance_transform_edt(~filled)[reference].max() <= 1


def test_a_thin_polygon_marks_something_and_one_outside_is_refused(root: Path) -> None:
    assert masks.fill_polygons([(3, 3, 9, 3, 6, 3.2)], (20, 20)).any()
    with pytest.raises(EchoError, match="polygon at 95, 5 lies outside the 90 x 60"):
        write(replace(inspect("crack"), polygons=((95, 5, 99, 5, 99, 9),)), root)


def test_polygons_and_boxes_count_together_and_a_mask_file_before_them(root: Path) -> None:
    square, box = (4.0, 6.0, 11.0, 6.0, 11.0, 9.0, 4.0, 9.0), (50.0, 40.0, 60.0, 50.0)
    both = replace(inspect("crack", boxes=[box]), polygons=(square,))
    wanted = np.zeros((60, 90), dtype=np.bool_)
    wanted[6:10, 4:12] = wanted[40:50, 50:60] = True
    np.testing.assert_array_equal(load_mask(both, root, (90, 60)), wanted)
    file = load_mask(inspect("crack", mask="mask.png"), root, (90, 60))
    np.testing.assert_array_equal(load_mask(replace(both, mask="mask.png"), root, (90, 60)), file)
    assert load_mask(inspect("crack"), root, (90, 60)) is None


def test_several_mask_files_are_their_union(root: Path) -> None:
    rng = np.random.default_rng(0)
    drawn = rng.uniform(size=(3, 60, 90)) < 0.1
    for number, values in enumerate(drawn):
        Image.fromarray(values.astype(np.uint8) * (255 - number)).save(root / f"{number}.png")
    several = replace(inspect("crack"), masks=("0.png", "1.png", "2.png"))
    np.testing.assert_array_equal(load_mask(several, root, (90, 60)), drawn.any(axis=0))
    (root / "1.png").unlink()
    with pytest.raises(EchoError, match=r"mask 1\.png cannot be read"):
        load_mask(several, root, (90, 60))


@pytest.mark.parametrize("way", ["masks", "polygons"])
def test_masks_and_polygons_tell_the_place_as_a_mask_does(root: Path, way: str) -> None:
    where = {"masks": ("mask.png", "mask.png"), "polygons": ((70.0, 45.0, 79.0, 45.0, 79.0, 49.0, 70.0, 49.0),)}
    asked = write(replace(inspect("crack"), **{way: where[way]}), root)  # type: ignore[arg-type]
    assert asked == write(inspect("crack", mask="mask.png"), root)


def test_contrast_is_the_marks_own_in_spite_of_exposure() -> None:
    rng = np.random.default_rng(0)
    texture = rng.uniform(0.3, 0.5, (40, 40)).astype(np.float32)
    mask = np.zeros((40, 40), dtype=np.bool_)
    mask[10:14, 10:20] = True
    for change, word in ((-0.2, "dark"), (0.2, "bright"), (0.0, "faint")):
        query = texture + np.float32(change) * mask + np.float32(0.3)
        value = masks.contrast(query, mask, texture)
        assert value == pytest.approx(change, abs=0.02)
        assert masks.tone(value) == word
    assert masks.contrast(texture, np.ones_like(mask), texture) == 0.0


def test_a_small_defect_survives_resizing() -> None:
    mask = np.zeros((1000, 1000), dtype=np.bool_)
    mask[503, 707] = True
    small = masks.resize_mask(mask, (64, 64))
    assert small.sum() == 1 and small[503 * 64 // 1000, 707 * 64 // 1000]
