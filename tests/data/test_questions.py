"""The answers to questions follow from condition, mask and knowledge, and masks are read in every format."""

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


def make_inspection(condition: str, name: str = "a", mask: str | None = None, boxes: object = ()) -> Inspection:
    return Inspection(f"{name}.png", "image.png", "drawn", "steel_disc", condition, name, mask=mask, boxes=tuple(boxes))  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Image.new("L", (90, 60), 128).save(tmp_path / "image.png")
    mask = np.zeros((60, 90), dtype=np.uint8)
    mask[45:50, 70:80] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def questions_by_type(inspection: Inspection, root: Path, seed: int = 0) -> dict[str, Question]:
    written = write_questions(inspection, KNOWLEDGE, CONDITIONS, PRODUCTS, root, seed)
    return {question.kind: question for question in written}


def right(question: Question) -> str:
    assert question.answer is not None
    return question.options[question.answer]


def test_defect_gets_five_question_types_with_true_answers(root: Path) -> None:
    questions = questions_by_type(make_inspection("crack", mask="mask.png"), root)
    assert list(questions) == list(QUESTION_TYPES[:5])
    assert {kind: right(question) for kind, question in questions.items()} == {
        "Anomaly Detection": "Yes.",
        "Defect Classification": "crack",
        "Defect Localization": "bottom right",
        "Defect Description": "A thin dark line.",
        "Defect Analysis": "The disc breaks under load.",
    }
    assert questions["Anomaly Detection"].text == "Is there any defect in the object?"
    for kind in QUESTION_TYPES[1:5]:
        assert questions[kind].text.startswith("There is a defect in the object. ")
    assert questions["Defect Localization"].id == "a.png#defect-localization"
    assert set(questions["Defect Classification"].options.values()) == {"crack", "dent", "rust", "paint run"}


def test_questions_about_a_normal_part_concern_the_object(root: Path) -> None:
    questions = questions_by_type(make_inspection("good", mask="mask.png"), root)
    assert list(questions) == ["Anomaly Detection", "Object Classification", "Object Analysis"]
    assert right(questions["Anomaly Detection"]) == "No."
    assert right(questions["Object Classification"]) == "steel disc"
    assert set(questions["Object Classification"].options.values()) == {"steel disc", "bolt", "nut"}
    assert right(questions["Object Analysis"]) == "An even grey disc."
    assert set(questions["Object Analysis"].options.values()) <= {
        "An even grey disc.",
        "A thin dark line.",
        "A round shallow hollow.",
        "Brown spots.",
    }


def test_question_type_without_a_known_answer_is_left_out(root: Path) -> None:
    assert "Defect Localization" not in questions_by_type(make_inspection("crack"), root)
    assert "Defect Analysis" not in questions_by_type(make_inspection("rust"), root)
    unknown = questions_by_type(make_inspection("paint_run"), root)  # only its name is known
    assert list(unknown) == ["Anomaly Detection", "Defect Classification"]
    names = (Entry("good", "free of defects"), Entry("crack", "crack"), Entry("dent", "dent"))
    for condition in ("good", "crack"):
        plain = write_questions(make_inspection(condition), names, ["good", "crack", "dent"], ["steel_disc"], root, 0)
        kinds = [question.kind for question in plain]
        assert kinds == (["Anomaly Detection"] + (["Defect Classification"] if condition == "crack" else []))
    only = write_questions(make_inspection("crack"), KNOWLEDGE[:2], ["good", "crack"], ["steel_disc"], root, 0)
    assert [question.kind for question in only] == ["Anomaly Detection"]


def test_second_defect_in_an_image_is_no_wrong_option(root: Path) -> None:
    conditions = ["good", "crack", "dent", "rust", "crack+dent", "combined"]
    knowledge = (*KNOWLEDGE, Entry("crack+dent", "A line in a hollow. The disc breaks."), Entry("combined", "Several."))
    for condition in ("crack+dent", "crack"):
        questions = write_questions(make_inspection(condition), knowledge, conditions, PRODUCTS, root, 0)
        named = next(question for question in questions if question.kind == "Defect Classification")
        assert right(named) == condition.replace("+", " + ") or right(named) == condition
        others = {text for letter, text in named.options.items() if letter != named.answer}
        assert others == ({"rust"} if condition == "crack+dent" else {"dent", "rust", right(named) + "+dent"})
        described = next(question for question in questions if question.kind == "Defect Description")
        assert ("A thin dark line." in described.options.values()) == (condition == "crack")
    mixed = write_questions(make_inspection("combined"), knowledge, conditions, PRODUCTS, root, 0)
    assert [question.kind for question in mixed] == ["Anomaly Detection"], "it may show any defect of the product"


def test_empty_mask_gives_no_place(root: Path) -> None:
    Image.new("L", (90, 60)).save(root / "empty.png")
    assert "Defect Localization" not in questions_by_type(make_inspection("crack", mask="empty.png"), root)


def test_boxes_give_the_same_place_as_a_mask(root: Path) -> None:
    questions = questions_by_type(make_inspection("crack", boxes=[(2, 3, 20, 15)]), root)
    assert right(questions["Defect Localization"]) == "top left"


def test_questions_have_two_to_four_distinct_options(root: Path) -> None:
    twins = (*KNOWLEDGE, Entry("Crack ", "a thin dark line"), Entry("second", "Brown spots."))
    for condition, seed in itertools.product(("good", "crack", "dent"), range(20)):
        for question in write_questions(
            make_inspection(condition, mask="mask.png"), twins, CONDITIONS, [*PRODUCTS, "Steel disc"], root, seed
        ):
            plain = [text.casefold().strip().rstrip(".") for text in question.options.values()]
            assert len(plain) == len(set(plain))
            assert 2 <= len(plain) <= 4
            assert question.answer in question.options
            assert list(question.options) == list("ABCD")[: len(plain)]


def test_wrong_places_contain_none_of_the_defect(root: Path) -> None:
    mask = np.zeros((60, 90), dtype=np.uint8)
    mask[28:32, 5:85] = 255  # a line across the whole middle row
    Image.fromarray(mask).save(root / "line.png")
    for seed in range(20):
        question = questions_by_type(make_inspection("crack", mask="line.png"), root, seed)["Defect Localization"]
        assert right(question) == "center"
        assert not {"left", "right"} & set(question.options.values())


def test_options_depend_only_on_seed_and_id(root: Path) -> None:
    first = questions_by_type(make_inspection("crack", mask="mask.png"), root)
    assert first == questions_by_type(make_inspection("crack", mask="mask.png"), root)
    turned = write_questions(
        make_inspection("crack", mask="mask.png"), KNOWLEDGE[::-1], CONDITIONS[::-1], PRODUCTS[::-1], root, 0
    )
    assert list(first.values()) == turned
    assert any(
        questions_by_type(make_inspection("crack", mask="mask.png"), root, seed)["Defect Classification"].options
        != first["Defect Classification"].options
        for seed in range(1, 4)
    )


def test_answer_letters_are_balanced_over_a_dataset(root: Path) -> None:
    letters: dict[str, Counter[str]] = {}
    for number in range(400):
        for condition in ("crack", "good"):
            for kind, question in questions_by_type(
                make_inspection(condition, name=f"{condition}{number}"), root
            ).items():
                letters.setdefault(f"{kind} {len(question.options)}", Counter())[str(question.answer)] += 1
    for kind, counts in letters.items():
        fair = counts.total() / int(kind[-1])
        assert all(abs(count - fair) < 5 * fair**0.5 for count in counts.values()), (kind, counts)


@pytest.mark.parametrize("place", PLACES)
def test_region_is_in_the_cell_of_its_pixels(place: str) -> None:
    row, column = divmod(PLACES.index(place), 3)
    mask = np.zeros((120, 90), dtype=np.bool_)
    mask[row * 40 + 15 : row * 40 + 25, column * 30 + 10 : column * 30 + 20] = True
    region = measure(mask)
    assert region is not None
    assert region.place == place
    assert region.cells == (place,)
    assert region.count == 1
    assert region.extent == pytest.approx(100 / (120 * 90))


def test_shape_size_and_spread_are_measured() -> None:
    ys, xs = np.mgrid[:200, :200]
    disc = (ys - 60) ** 2 + (xs - 60) ** 2 < 12**2
    line = (abs(ys - 100) < 3) & (abs(xs - 100) < 40)
    angle = (abs(ys - 130) < 3) & (xs > 70) & (xs < 130) | (abs(xs - 130) < 3) & (ys > 70) & (ys < 130)
    spots = ((ys % 50) < 6) & ((xs % 50) < 6)
    regions = [region for mask in (disc, line, angle, spots) if (region := measure(mask))]
    assert [region.shape for region in regions] == ["round", "elongated", "irregular", "scattered"]
    assert [region.place for region in regions[1::2]] == ["center", SPREAD]
    assert [region.size for region in regions] == ["small"] * 4
    assert regions[3].count == 16
    everything = measure(np.ones((30, 30), dtype=np.bool_))
    assert everything is not None
    assert everything.place == SPREAD
    assert everything.size == "huge"
    assert measure(np.zeros((30, 30), dtype=np.bool_)) is None


def test_distant_pieces_are_in_the_cell_with_most_pixels() -> None:
    mask = np.zeros((90, 90), dtype=np.bool_)
    mask[5:15, 5:15] = True
    mask[70:85, 70:85] = True
    region = measure(mask)
    assert region is not None
    assert region.place == "bottom right"
    assert set(region.cells) == {"top left", "bottom right"}


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "I;16"])
def test_masks_of_every_image_mode_are_read(tmp_path: Path, mode: str) -> None:
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
    mask = load_mask(make_inspection("crack", mask="mask.png"), tmp_path, (30, 20))
    assert mask is not None
    np.testing.assert_array_equal(mask, values > 0)


@pytest.mark.parametrize("quality", [60, 75, 95])
def test_jpeg_mask_marks_the_drawn_region(tmp_path: Path, quality: int) -> None:
    ys, xs = np.mgrid[:256, :256]
    disc = (ys - 100) ** 2 + (xs - 60) ** 2 < 15**2
    Image.fromarray(disc.astype(np.uint8) * 255).save(tmp_path / "mask.jpg", quality=quality)
    mask = load_mask(make_inspection("crack", mask="mask.jpg"), tmp_path, (256, 256))
    assert mask is not None
    assert (mask ^ disc).sum() < 0.03 * disc.sum()
    assert masks.measure(mask) == masks.measure(disc)


@pytest.mark.parametrize("size", [(60, 40), (40, 40), (20, 30)])
def test_mask_of_another_size_is_rejected(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.fromarray(np.full((20, 30), 255, dtype=np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(EchoError, match=rf"mask mask.png has 30 x 20 pixels but its image has {size[0]} x {size[1]}"):
        load_mask(make_inspection("crack", mask="mask.png"), tmp_path, size)


def test_broken_mask_and_box_outside_the_image_are_rejected(tmp_path: Path, root: Path) -> None:
    (root / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(EchoError, match=r"mask broken\.png cannot be read"):
        questions_by_type(make_inspection("crack", mask="broken.png"), root)
    with pytest.raises(EchoError, match=r"mask gone\.png cannot be read"):
        questions_by_type(make_inspection("crack", mask="gone.png"), root)
    with pytest.raises(EchoError, match=r"box \[100, 5, 120, 9\] lies outside the 90 x 60"):
        questions_by_type(make_inspection("crack", boxes=[(100, 5, 120, 9)]), root)


@pytest.mark.parametrize("seed", range(5))
def test_polygon_is_filled_as_in_scikit_image_except_its_outline(seed: int) -> None:
    rng = np.random.default_rng(seed)
    angles = (np.arange(7) + rng.uniform(0, 0.6, 7)) * 2 * np.pi / 7  # no spike thinner than a pixel
    corners = np.stack([100 + 70 * np.cos(angles), 80 + 60 * np.sin(angles)], axis=1)
    filled = masks.fill_polygons([corners.ravel().tolist()], (200, 160))
    reference = polygon2mask((160, 200), corners[:, ::-1])
    # Coordinates denote pixel corners in one implementation and centres in the other, and ours includes the outline.
    assert distance_transform_edt(~reference)[filled].max() <= 2
    assert distance_transform_edt(~filled)[reference].max() <= 1


def test_thin_polygon_marks_pixels_and_one_outside_is_rejected(root: Path) -> None:
    assert masks.fill_polygons([(3, 3, 9, 3, 6, 3.2)], (20, 20)).any()
    with pytest.raises(EchoError, match="polygon at 95, 5 lies outside the 90 x 60"):
        questions_by_type(replace(make_inspection("crack"), polygons=((95, 5, 99, 5, 99, 9),)), root)


def test_polygons_and_boxes_add_up_but_a_mask_file_replaces_them(root: Path) -> None:
    square, box = (4.0, 6.0, 11.0, 6.0, 11.0, 9.0, 4.0, 9.0), (50.0, 40.0, 60.0, 50.0)
    both = replace(make_inspection("crack", boxes=[box]), polygons=(square,))
    wanted = np.zeros((60, 90), dtype=np.bool_)
    wanted[6:10, 4:12] = wanted[40:50, 50:60] = True
    np.testing.assert_array_equal(load_mask(both, root, (90, 60)), wanted)
    file = load_mask(make_inspection("crack", mask="mask.png"), root, (90, 60))
    np.testing.assert_array_equal(load_mask(replace(both, mask="mask.png"), root, (90, 60)), file)
    assert load_mask(make_inspection("crack"), root, (90, 60)) is None


def test_several_mask_files_form_their_union(root: Path) -> None:
    rng = np.random.default_rng(0)
    drawn = rng.uniform(size=(3, 60, 90)) < 0.1
    for number, values in enumerate(drawn):
        Image.fromarray(values.astype(np.uint8) * (255 - number)).save(root / f"{number}.png")
    several = replace(make_inspection("crack"), masks=("0.png", "1.png", "2.png"))
    np.testing.assert_array_equal(load_mask(several, root, (90, 60)), drawn.any(axis=0))
    (root / "1.png").unlink()
    with pytest.raises(EchoError, match=r"mask 1\.png cannot be read"):
        load_mask(several, root, (90, 60))


@pytest.mark.parametrize("field", ["masks", "polygons"])
def test_several_masks_and_polygons_give_the_same_place_as_a_mask(root: Path, field: str) -> None:
    where = {"masks": ("mask.png", "mask.png"), "polygons": ((70.0, 45.0, 79.0, 45.0, 79.0, 49.0, 70.0, 49.0),)}
    questions = questions_by_type(replace(make_inspection("crack"), **{field: where[field]}), root)  # type: ignore[arg-type]
    assert questions == questions_by_type(make_inspection("crack", mask="mask.png"), root)


def test_contrast_of_a_mark_does_not_depend_on_exposure() -> None:
    rng = np.random.default_rng(0)
    texture = rng.uniform(0.3, 0.5, (40, 40)).astype(np.float32)
    mask = np.zeros((40, 40), dtype=np.bool_)
    mask[10:14, 10:20] = True
    for change, tone in ((-0.2, "dark"), (0.2, "bright"), (0.0, "faint")):
        query = texture + np.float32(change) * mask + np.float32(0.3)
        value = masks.contrast(query, mask, texture)
        assert value == pytest.approx(change, abs=0.02)
        assert masks.tone(value) == tone
    assert masks.contrast(texture, np.ones_like(mask), texture) == 0.0


def test_enlarged_mask_covers_what_the_enlarged_image_shows() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((168, 120)) < 0.3
    for size in ((256, 256), (300, 64), (120, 168)):
        grey = Image.fromarray(mask.astype(np.float32)).resize((size[0], max(168, size[1])), Image.Resampling.BOX)
        found = masks.resize_mask(mask, (size[0], max(168, size[1])))
        assert (found == (np.asarray(grey) > 0.5)).all()
    assert masks.resize_mask(mask, (300, 64)).any(axis=0).sum() > 280


def test_small_defect_survives_resizing() -> None:
    mask = np.zeros((1000, 1000), dtype=np.bool_)
    mask[503, 707] = True
    small = masks.resize_mask(mask, (64, 64))
    assert small.sum() == 1
    assert small[503 * 64 // 1000, 707 * 64 // 1000]
