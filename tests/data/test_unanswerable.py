"""Unanswerable questions never fit their image, their answerable twins always do, and the form reveals neither."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from data_prep.build import build
from echo_ft.data.unanswerable import NO_SUCH_DEFECT, write_unanswerable_questions
from echo_ft.errors import EchoError
from echo_ft.experts.roles import ROUTINGS
from echo_ft.records import ANSWERABLE, GOOD, ROBUSTMAD_TYPES, UNANSWERABLE, Exchange, Inspection, Question
from tests.support.drawn_manifest import draw_manifest, make_config, read_rows, write_part_knowledge

CONDITIONS = {
    "disc_1": [GOOD, "crack", "dent", "rust", "combined", "crack+dent"],
    "disc_2": [GOOD, "scar"],
    "bolt": [GOOD, "bend", "burr"],
}
"""`disc_1` and `disc_2` may look alike."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Image.new("L", (90, 60), 128).save(tmp_path / "image.png")
    return tmp_path


def inspection(condition: str, name: object, marked: bool = True) -> Inspection:
    boxes = ((70.0, 45.0, 80.0, 50.0),) if marked and condition != GOOD else ()
    return Inspection(f"{name}.png", "image.png", "drawn", "disc_1", condition, str(name), boxes=boxes)


def ask(condition: str, root: Path, count: int = 40, marked: bool = True) -> list[list[Question]]:
    asked = (inspection(condition, name, marked) for name in range(count))
    return [write_unanswerable_questions(one, CONDITIONS, root, 1.0, 0) for one in asked]


def right(question: Question) -> str:
    assert question.answer is not None
    return question.options[question.answer]


@pytest.mark.parametrize("condition", [GOOD, "crack", "crack+dent"])
def test_right_options_follow_from_the_image_and_wrong_ones_contradict_it(condition: str, root: Path) -> None:
    defects = set(condition.split("+")) - {GOOD}
    forms, letters = set(), set()
    for questions in ask(condition, root):
        for question in questions:
            assert 2 <= len(question.options) == len(set(question.options.values())) <= 4
            letters.add(question.answer)
            refusals = [
                text for text in question.options.values() if text.startswith(("The image shows no", "The object"))
            ]
            assert len(refusals) == 1, "either kind has one option that refuses"
            assert (right(question) == refusals[0]) == (question.kind == UNANSWERABLE)
            if "condition of the" in question.text:
                forms.add((question.kind, "product"))
                assert ("bolt" in question.text) == (question.kind == UNANSWERABLE), "disc 2 may look like disc 1"
                stated = {text for text in question.options.values() if "this defect" in text} - {right(question)}
                assert not any(defect in text for text in stated for defect in defects)
            else:
                forms.add((question.kind, "defect"))
                named = question.text.partition(": ")[2].partition(".")[0]
                assert (named == condition) == (question.kind == ANSWERABLE)
                assert question.kind == ANSWERABLE or not defects & set(named.split("+"))
                assert question.kind == UNANSWERABLE or right(question) == "bottom right"
    expected = {(UNANSWERABLE, "product"), (ANSWERABLE, "product"), (UNANSWERABLE, "defect")}
    assert forms == expected | ({(ANSWERABLE, "defect")} if defects else set())
    assert letters == {"A", "B", "C", "D"}


def test_defects_that_nobody_names_or_marks_are_not_asked_for(root: Path) -> None:
    for questions in ask("combined", root):
        assert all("condition of the" in question.text for question in questions), "any defect may be among them"
    unmarked = [question for questions in ask("rust", root, marked=False) for question in questions]
    places = [question for question in unmarked if "Where is it" in question.text]
    assert {right(question) for question in places} == {NO_SUCH_DEFECT}


def test_a_share_of_the_images_is_asked_and_the_same_ones_each_time(root: Path) -> None:
    images = [inspection(GOOD, name) for name in range(1000)]

    def asked(share: float) -> list[list[Question]]:
        return [write_unanswerable_questions(one, CONDITIONS, root, share, 0) for one in images]

    tenth = asked(0.1)
    assert 70 < sum(map(bool, tenth)) < 130
    assert tenth == asked(0.1)
    assert all(few == many for few, many in zip(tenth, asked(0.5), strict=True) if few), (
        "more images join the same ones"
    )
    assert not any(asked(0.0))
    alone = write_unanswerable_questions(images[0], {"disc_1": [GOOD]}, root, 1.0, 0)
    assert alone == [], "there is nothing that the image surely does not show"


def test_all_question_types_with_options_have_a_route() -> None:
    for routes in ROUTINGS.values():
        assert {UNANSWERABLE, ANSWERABLE, *ROBUSTMAD_TYPES.values()} <= set(routes)
        assert [routes[kind].reference for kind in ROBUSTMAD_TYPES.values()] == [False, False, True, False]
        assert not routes[UNANSWERABLE].knowledge, "the knowledge names the product"


def test_a_build_adds_them_by_choice_and_changes_no_other_question(tmp_path: Path) -> None:
    raw = draw_manifest(tmp_path / "raw", ("cap", "ring"), normals=6, defects=3)
    knowledge, built = write_part_knowledge(tmp_path), {}
    for share in (0.0, 1.0):
        output = tmp_path / str(share)
        manifest = build(make_config(raw, output, unanswerable=share, split="seeded", knowledge=knowledge))
        built[share] = read_rows(output, "questions.jsonl", Question)
    assert [one for one in built[1.0] if one.kind not in (UNANSWERABLE, ANSWERABLE)] == built[0.0]
    assert manifest["counts"]["questions"][UNANSWERABLE] > 10
    inspections = {one.id: one for one in read_rows(tmp_path / "1.0", "inspections.jsonl", Inspection)}
    for question in built[1.0]:
        if question.kind == UNANSWERABLE and "condition of the" in question.text:
            assert inspections[question.inspection].product not in question.text
    rows = read_rows(tmp_path / "1.0", "sft/decision_maker/train.jsonl", Exchange)
    answers = {one.id: one.answer for one in built[1.0]}
    trained = [branch for row in rows for branch in row.branches if branch.id.endswith("#unanswerable")]
    assert trained
    assert all(branch.completion == answers[branch.id] for branch in trained)
    with pytest.raises(EchoError, match=r"unanswerable is 10; give a fraction of the images from 0 to 1, such as 0\.1"):
        build(make_config(raw, tmp_path / "ten", unanswerable=10, split="seeded", knowledge=knowledge))
    assert json.loads((tmp_path / "0.0" / "manifest.json").read_text())["config"]["unanswerable"] == 0
