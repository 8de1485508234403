"""`evaluation.score --answers` scores answers from other programs, and `evaluation.compare` compares them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from echo_ft.errors import EchoError
from evaluation import compare, score
from tests.support.robustmad import answers_file, questions_file
from tests.support.runs import make_run, predictions, require_self_contained


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def score_robustmad(folder: Path, name: str, wrong: int, degraded: bool = False) -> Path:
    """Score answers to RobustMAD; those to the first `wrong` unanswerable questions are wrong."""
    questions = questions_file(images=10, degraded=degraded)
    rows = answers_file(questions)
    for row in [row for row in rows if row["robustness_category"].startswith("Unanswerable")][:wrong]:
        row |= dict.fromkeys(("raw_response", "mslm_answer"), "B" if row["answer"] == "A" else "A")
    asked = write(folder / f"questions_{name}.json", questions)
    answers = write(folder / f"answers_{name}.json", rows)
    score.main(["--answers", str(answers), "--questions", str(asked), "--output", str(folder / name)])
    return folder / name


def line(image: int, text: str, **more: Any) -> str:
    answer = {"image": f"{image}.png", "kind": "Anomaly Detection", "question": "Any defect?", "text": text}
    return json.dumps({**answer, "options": {"A": "Yes.", "B": "No."}, "answer": "AB"[image % 2], **more}) + "\n"


def test_robustmad_is_scored_and_what_degradation_costs_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean, degraded = score_robustmad(tmp_path, "clean", 0), score_robustmad(tmp_path, "low", 12, degraded=True)
    report = json.loads((degraded / "report.json").read_text())
    assert report["tables"]["robustmad"]["unanswerable"] == pytest.approx({"Average": 40, "general": 0, "domain": 80})
    assert report["tables"]["robustmad_strict"]["general"] == {"Average": 100.0, "general": 100.0, "domain": 100.0}
    assert report["tables"]["official"] == {"Average": dict.fromkeys(report["tables"]["strict"]["Average"])}
    assert re.search(r"unanswerable +40\.0 +0\.0 +80\.0 +40\.0 ", capsys.readouterr().out)
    page = (degraded / "report.html").read_text()
    require_self_contained(page.partition("<script")[0])
    assert "<h2>RobustMAD</h2>" in page
    compare.main([str(clean), str(degraded)])
    (difference,) = json.loads((tmp_path / "compare" / "comparison.json").read_text())["differences"]
    unanswerable = difference["figures"]["RobustMAD Unanswerable"]
    assert unanswerable["difference"] == pytest.approx(-60)
    assert unanswerable["interval"][1] < -30
    assert difference["figures"]["RobustMAD General"]["difference"] == 0
    assert "low is worse than clean by 15.0 points" in capsys.readouterr().out


def test_plain_answers_of_two_models_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, wrong in (("weak", 25), ("strong", 4)):
        rows = [
            line(image, "BA"[image % 2] if image < wrong else "AB"[image % 2], part=str(image)) for image in range(60)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
        score.main(["--answers", str(tmp_path / f"{name}.jsonl"), "--output", str(tmp_path / name)])
    report = json.loads((tmp_path / "strong" / "report.json").read_text())
    assert report["tables"]["strict"]["all"]["Anomaly Detection"] == pytest.approx(100 * 56 / 60)
    assert report["tables"]["official"].keys() == report["tables"]["strict"].keys()
    capsys.readouterr()
    compare.main([str(tmp_path / "weak"), str(tmp_path / "strong")])
    assert "strong is better than weak by 35.0 points" in capsys.readouterr().out


def test_boxes_made_elsewhere_are_scored_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = {"kind": "Defect Grounding", "question": "Where?", "options": {}}
    for name, shift in (("weak", 100), ("strong", 0)):
        named = f"({100 + shift}, 100), ({300 + shift}, 300)"
        rows = [line(image, "AB"[image % 2]) for image in range(40)]
        for image in range(40):  # even ones have a defect; the writing of the true boxes does not matter
            asked = {"text": "none" if image % 2 else named, "answer": "none" if image % 2 else "(100,100),(300,300)"}
            if name == "strong" and not image % 2:
                asked["answer"] = "<|box_start|>(100,100),(300,300)<|box_end|>"
            rows.append(line(image, **{**boxes, **asked}))
        rows.append(line(40, "A"))
        rows.append(line(40, **{**boxes, "text": "top left", "answer": "(0,0),(9,9)"}))
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
        score.main(["--answers", str(tmp_path / f"{name}.jsonl"), "--output", str(tmp_path / name)])
    weak, strong = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("weak", "strong"))
    assert weak["boxes"]["figures"]["mean_iou"]["value"] == pytest.approx(20 / 3 / 21)
    assert strong["boxes"]["figures"]["found_0.5"]["value"] == pytest.approx(20 / 21)
    assert strong["boxes"]["figures"]["none_on_good"]["value"] == 1
    assert strong["boxes"]["unparsed"] == 1
    assert strong["counts"]["questions"] == 41, "questions about boxes enter no other table"
    assert strong["tables"] == weak["tables"]
    capsys.readouterr()
    compare.main([str(tmp_path / "weak"), str(tmp_path / "strong")])
    assert re.search(r"mean IoU, % +\+63\.5", capsys.readouterr().out)


def test_answers_that_name_other_parts_are_not_compared(tmp_path: Path) -> None:
    for name, named in (("plain", {}), ("grouped", {"part": "1"})):
        (tmp_path / f"{name}.jsonl").write_text("".join(line(image, "A", **named) for image in range(10)))
        score.main(["--answers", str(tmp_path / f"{name}.jsonl"), "--output", str(tmp_path / name)])
    with pytest.raises(
        EchoError, match=r"the part of question .* of case 0\.png differs; write the same into both files"
    ):
        compare.main([str(tmp_path / "plain"), str(tmp_path / "grouped")])


def test_answers_in_another_order_are_compared_and_missing_ones_are_to_be_added(tmp_path: Path) -> None:
    rows = [
        {
            "image": f"parts/cap/{'good' if number % 2 else 'dent'}/{number // 4}.png",
            "question": {"text": "Any defect?", "options": {"A": "Yes.", "B": "No."}},
            "question_type": "Anomaly Detection",
            "correct_answer": "AB"[number % 2],
            "gpt_answer": "A",
        }
        for number in range(40)
    ]
    for name, some in (("first", rows), ("second", rows[::-1]), ("short", rows[1:])):
        score.main(["--answers", str(write(tmp_path / f"{name}.json", some)), "--output", str(tmp_path / name)])
    compare.main([str(tmp_path / "first"), str(tmp_path / "second")])
    with pytest.raises(EchoError, match=r"1 questions are only in the first run .*add the missing answers to the file"):
        compare.main([str(tmp_path / "first"), str(tmp_path / "short")])


def test_a_comparison_states_the_rows_that_could_not_be_scored(tmp_path: Path) -> None:
    rows = [
        {
            "image": f"parts/cap/{'good' if number % 2 else 'dent'}/{number}.png",
            "question": {"text": "Any defect?", "options": {"A": "Yes.", "B": "No."}},
            "question_type": "Anomaly Detection",
            "correct_answer": "AB"[number % 2] if number < 15 else "C",
            "gpt_answer": "A",
        }
        for number in range(20)
    ]
    for name in ("first", "second"):
        answers = write(tmp_path / f"{name}.json", rows)
        score.main(["--answers", str(answers), "--output", str(tmp_path / name)])
    compare.main([str(tmp_path / "first"), str(tmp_path / "second")])
    warnings = json.loads((tmp_path / "compare" / "comparison.json").read_text())["warnings"]
    assert [one.partition(" (")[0] for one in warnings] == [
        f"{name}: 5 rows could not be scored and are left out" for name in ("first", "second")
    ]


def test_answers_do_not_overwrite_a_run_and_are_scored_from_their_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", predictions(0.5))
    answers = tmp_path / "answers.jsonl"
    answers.write_text(line(0, "A"))
    with pytest.raises(EchoError, match=r"run holds a run, which the answers would overwrite; choose another --output"):
        score.main(["--answers", str(answers), "--output", str(run)])
    with pytest.raises(EchoError, match="run holds the questions of its run; remove --questions"):
        score.main([str(run), "--questions", str(answers)])
    for _ in range(2):
        score.main(["--answers", str(answers), "--output", str(tmp_path / "given")])
    with pytest.raises(EchoError, match=r"score that file again: .*--answers .*answers\.jsonl --output .*given"):
        score.main([str(tmp_path / "given")])
