"""`grounding: true` adds questions about boxes to a dataset, and its runs, reports and pages show the boxes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.build import build
from echo_ft.images.boxes import format_boxes, parse_boxes, target_boxes, to_thousandths
from echo_ft.images.decode import image_size
from echo_ft.records import GOOD, GROUNDING, Exchange, Inspection, Question
from tests.support.drawn_manifest import draw_manifest, make_config, read_rows, write_part_knowledge


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return draw_manifest(tmp_path_factory.mktemp("raw"), ("cap",), normals=6, defects=3)


@pytest.fixture(scope="module")
def built(raw, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("datasets") / "boxes"
    build(make_config(raw, output, grounding=True, split="seeded", knowledge=write_part_knowledge(output.parent)))
    return output


def test_a_build_adds_one_question_per_image_and_changes_no_other(raw: Path, built: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    build(make_config(raw, plain, split="seeded", knowledge=write_part_knowledge(tmp_path)))
    without, questions = (read_rows(folder, "questions.jsonl", Question) for folder in (plain, built))
    assert [one for one in questions if one.kind != GROUNDING] == without
    inspections = {one.id: one for one in read_rows(built, "inspections.jsonl", Inspection)}
    about_boxes = {one.inspection: one for one in questions if one.kind == GROUNDING}
    assert about_boxes.keys() == {one.inspection for one in without}
    for name, question in about_boxes.items():
        one, size = inspections[name], image_size(raw.parent / inspections[name].image)
        boxes = [] if one.condition == GOOD else target_boxes(one, raw.parent, size)
        assert len(boxes) == (one.condition != GOOD)
        assert question.answer == format_boxes([to_thousandths(box, size) for box in boxes])
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["counts"]["questions"][GROUNDING] == len(about_boxes)
    assert manifest["config"]["grounding"] is True


def test_decision_makers_train_on_boxes_of_normal_and_defective_parts(built: Path) -> None:
    rows = read_rows(built, "sft/decision_maker/train.jsonl", Exchange)
    targets = [branch.completion for row in rows for branch in row.branches if branch.id.endswith("#defect-grounding")]
    assert "none" in targets
    assert any(target != "none" for target in targets)
    assert all(parse_boxes(str(target)) is not None for target in targets)
