"""`grounding: true` adds questions about boxes to a dataset, and its runs, reports and pages show the boxes."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.build import build
from echo_ft.errors import EchoError
from echo_ft.images.boxes import format_boxes, parse_boxes, target_boxes, to_thousandths
from echo_ft.images.decode import image_size
from echo_ft.records import GOOD, GROUNDING, Exchange, Inspection, Prediction, Question
from evaluation import compare, score
from tests.support.drawn_manifest import draw_manifest, edit_rows, make_config, read_rows, write_part_knowledge
from tests.support.predictions import box_prediction
from tests.support.runs import make_run, predictions


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
    assert not any("grounding" in warning for warning in read_warnings(built))


def test_defects_without_marks_are_reported(raw: Path, tmp_path: Path) -> None:
    manifest = Path(shutil.copytree(raw.parent, tmp_path / "raw")) / raw.name
    edit_rows(manifest, lambda row: row.pop("mask", None) if row["condition"] == "dent" else None)
    build(make_config(manifest, tmp_path / "out", grounding=True, split="seeded"))
    (warning,) = [one for one in read_warnings(tmp_path / "out") if "grounding" in one]
    assert warning.startswith(
        "6 of 12 defective images have no mask, polygon or box, so they get no grounding question"
    )
    assert "cap/dent-0-1.png" in warning
    asked = {
        one.inspection for one in read_rows(tmp_path / "out", "questions.jsonl", Question) if one.kind == GROUNDING
    }
    assert not any("dent" in name for name in asked)
    assert any("stain" in name for name in asked)


def read_warnings(folder: Path) -> list[str]:
    return list(json.loads((folder / "manifest.json").read_text())["warnings"])


def test_decision_makers_train_on_boxes_of_normal_and_defective_parts(built: Path) -> None:
    rows = read_rows(built, "sft/decision_maker/train.jsonl", Exchange)
    targets = [branch.completion for row in rows for branch in row.branches if branch.id.endswith("#defect-grounding")]
    assert "none" in targets
    assert any(target != "none" for target in targets)
    assert all(parse_boxes(str(target)) is not None for target in targets)


def test_the_preview_draws_the_boxes_and_shows_the_answers(built: Path) -> None:
    page = (built / "preview.html").read_text()
    cards = page.split('<li class="case"')[1:]
    questions = {one.inspection: one for one in read_rows(built, "questions.jsonl", Question) if one.kind == GROUNDING}
    assert cards
    for card in cards:
        name = re.search('data-case="([^"]*)"', card)[1]  # type: ignore[index]
        boxes = parse_boxes(str(questions[name].answer))
        width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', card).groups())  # type: ignore[union-attr]
        drawn = [
            tuple(map(float, found))
            for found in re.findall('<rect class="box" x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"', card)
        ]
        expected = [(x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height) for x0, y0, x1, y1 in boxes or ()]
        assert len(drawn) == len(expected)
        for one, other in zip(drawn, expected, strict=True):
            assert one == pytest.approx([value / 1000 for value in other], abs=0.051)
        said = re.search(r"Defect Grounding</small>.*?right\">(.*?)</span>", card, re.DOTALL)[1].split()  # type: ignore[index]
        assert said == ([f"({x0},{y0}),({x1},{y1})" for x0, y0, x1, y1 in boxes or ()] or ["none"])
        assert ("boxes dashed" in card) == bool(boxes)


def box_rows(shift: int) -> list[Prediction]:
    """Answers about boxes in the images of `predictions`, displaced by `shift` thousandths."""
    rows = []
    for row in predictions(0.8)[::2]:
        true = () if row.condition == GOOD else ((100, 100, 300, 300),)
        named = () if row.condition == GOOD else ((100 + shift, 100, 300 + shift, 300),)
        asked = {name: getattr(row, name) for name in ("case", "dataset", "product", "group", "image", "condition")}
        rows.append(replace(box_prediction(0, true, named), question=f"{row.case}/boxes", **asked))
    return rows


def test_reports_and_comparisons_show_boxes_and_leave_all_other_scores_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = make_run(tmp_path / "plain", predictions(0.8))
    base = make_run(tmp_path / "base", [*box_rows(100), *predictions(0.8)])
    tuned = make_run(tmp_path / "tuned", [*predictions(0.8), *box_rows(0)])
    reports = []
    for folder in (plain, base):
        score.main([str(folder)])
        reports.append(json.loads((folder / "report.json").read_text()))
    printed = capsys.readouterr().out
    assert re.search(r"mean IoU, % +33\.3", printed)
    assert "20 true boxes and 20 predicted ones in 40 images; 0 unparsed answers, 0 failed" in printed
    without, with_boxes = reports
    assert without["boxes"] == {}
    assert with_boxes["boxes"]["figures"]["found_0.3"]["value"] == 1
    assert with_boxes["boxes"]["figures"]["found_0.5"]["value"] == 0
    changed = {key for key in without if without[key] != with_boxes[key]}
    assert changed == {"name", "boxes", "provenance"}
    assert (plain / "answers.json").read_bytes() == (base / "answers.json").read_bytes()
    compare.main([str(base), str(tuned), "--output", str(tmp_path / "out")])
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    (difference,) = comparison["boxes"]["differences"]
    assert difference["figures"]["mean_iou"]["difference"] == pytest.approx(2 / 3)
    assert comparison["differences"][0]["figures"]["Average"]["difference"] == 0
    pages = [base / "report.html", plain / "report.html", tmp_path / "out" / "compare.html"]
    reported, unasked, compared = (re.sub(r"\s+", " ", page.read_text()) for page in pages)
    assert "<h2>Boxes</h2>" not in unasked
    assert '<th scope="row">mean IoU, %</th><td>33.3</td>' in reported
    assert '<th scope="row">boxes per good image</th><td>0.00</td>' in reported
    assert re.search(r'<th scope="row">mean IoU, %</th> <td>33\.3.*?<td>100\.0.*?<td>\+66\.7', compared)
    assert re.search(r"mean IoU, % +\+66\.7", capsys.readouterr().out)


def test_runs_with_other_boxes_in_their_questions_are_not_compared(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", [*predictions(0.8), *box_rows(0)])
    fewer = make_run(tmp_path / "fewer", [*predictions(0.8), *box_rows(0)[1:]])
    moved = [replace(row, answer="<|box_start|>(1,2),(3,4)<|box_end|>") for row in box_rows(0)]
    other = make_run(tmp_path / "other", [*predictions(0.8), *moved])
    with pytest.raises(EchoError, match="1 questions are only in the first run"):
        compare.main([str(base), str(fewer)])
    with pytest.raises(EchoError, match="the answer of question tile-0/boxes"):
        compare.main([str(base), str(other)])
