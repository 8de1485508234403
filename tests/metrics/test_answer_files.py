"""Answers from other programs are scored both strictly and as by RobustMAD's authors, and bad lines are refused by "
"name."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from echo_ft.errors import EchoError
from echo_ft.metrics.answer_files.robustmad import clean_path, guess_letter, parse_cut_letter, robustmad_report
from echo_ft.metrics.loading import load_answers
from echo_ft.metrics.prediction_table import make_prediction_table
from echo_ft.records import GOOD, QUESTION_TYPES, UNKNOWN_CONDITION
from tests.support.robustmad import answers_file, questions_file

DATA = Path(os.environ.get("ECHO_FT_DATA", "../shared/data")) / "robustmad"

LINE = {
    "image": "caps/001.png",
    "kind": "Anomaly Detection",
    "question": "Is there any defect?",
    "options": {"A": "Yes.", "B": "No."},
    "answer": "A",
    "text": "A",
}
BOXES = {"kind": "Defect Grounding", "options": {}, "answer": "(100,100),(300,300)"}
"""Changes that make LINE an answer about boxes."""


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_lines(path: Path, *changes: dict[str, Any]) -> Path:
    lines = (json.dumps({**LINE, **change}, ensure_ascii=False) + "\n" for change in changes)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.real_data
@pytest.mark.parametrize("suffix", ["", "_low"], ids=["clean", "degraded"])
def test_tables_equal_those_of_the_authors_for_all_models(suffix: str) -> None:
    if not DATA.is_dir():
        pytest.skip(f"no folder {DATA}; set ECHO_FT_DATA")
    files = sorted(path for path in DATA.glob("answers_*.json") if path.stem.endswith("_low") == bool(suffix))
    assert len(files) == 7
    for path in files:
        run, given = load_answers(path, DATA / f"RobustMAD_MCQ{suffix}.json")
        assert len(run.predictions) == 4510, path
        assert not run.warnings and not run.rejections, path
        report = robustmad_report(make_prediction_table(run.predictions), given.letters)
        expected = authors_table(DATA / path.name.replace("answers_", "accuracy_").replace(".json", ".csv"))
        assert report["official"].keys() == expected.keys()
        for row, columns in expected.items():
            assert report["official"][row] == pytest.approx(columns, abs=1e-9), (path, row)
        if "gemini" not in path.name:  # its letters come from another parser of the authors, which takes the last one
            assert [guess_letter(one.text) for one in run.predictions] == [*given.letters.values()], path
        guessed = sum(row["answers"] for row in report["guessed"].values())
        assert guessed == sum(one.parsed is None for one in run.predictions), path


def authors_table(path: Path) -> dict[str, dict[str, float]]:
    """The table in one of the authors' own files of scores, in percent."""
    table: dict[str, dict[str, float]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["object_specie_pair"].startswith("Average"):
                column = row["difficulty"] or "Average"
                table.setdefault(row["robustness_category"], {})[column] = 100 * float(row["average_per_category"])
    return table


def test_authors_letters_score_officially_and_clear_letters_strictly(tmp_path: Path) -> None:
    questions = questions_file()
    rows = answers_file(questions)
    general = [row for row in rows if row["robustness_category"] == "General Object Understanding"]
    general[0] |= {"raw_response": "The object appears to be a type", "mslm_answer": "A"}  # guessed, and right
    general[1] |= {"raw_response": "It is a capsule.", "mslm_answer": "A"}  # guessed, and wrong
    general[2] |= {"raw_response": "C: De", "mslm_answer": "C"}  # cut, but clear
    general[3] |= {"raw_response": "E", "mslm_answer": "E"}  # wrong
    general[4] |= {"raw_response": "Error: Model call failed", "mslm_answer": "Error: Model call failed"}
    run, given = load_answers(write(tmp_path / "answers.json", rows), write(tmp_path / "questions.json", questions))
    report = robustmad_report(make_prediction_table(run.predictions), given.letters)
    assert list(report["official"]) == ["general", "standalone", "pairwise", "unanswerable"]
    assert report["official"]["general"] == pytest.approx({"Average": 75, "general": 50, "domain": 100})
    assert report["strict"]["general"] == pytest.approx({"Average": 200 / 3, "general": 100 / 3, "domain": 100})
    assert report["guessed"]["general"] == {"answers": 2, "right": 1}
    assert report["strict"]["pairwise"] == {"Average": 100.0, "general": 100.0, "domain": 100.0}
    low, high = report["intervals"]["general"]["Average"]
    assert 30 < low < 200 / 3 < high < 95
    failed = [one for one in run.predictions if one.error]
    assert [one.error for one in failed] == ["Error: Model call failed"]


def test_answers_without_the_authors_letters_are_read_by_their_parser(tmp_path: Path) -> None:
    questions = questions_file()
    rows = answers_file(questions)
    for row in rows:
        del row["mslm_answer"]
    rows[0]["raw_response"] = "it is a capsule"
    run, given = load_answers(write(tmp_path / "answers.json", rows), write(tmp_path / "questions.json", questions))
    report = robustmad_report(make_prediction_table(run.predictions), given.letters)
    assert report["official"]["general"]["Average"] == 100, "the article is an answer to the authors' parser"
    assert report["strict"]["general"]["Average"] == pytest.approx(100 * 11 / 12)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("C: Rubber", "C"), ("It is a nut", "A"), ("nether", "E"), ("Zoom", ""), ("", ""),
        ("The answer is d, not B", "D"),
    ],
)  # fmt: skip
def test_the_authors_parser_takes_the_first_lone_letter_or_any(text: str, letter: str) -> None:
    assert guess_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("B: Scratch on the rim", "B"), ("B: Scratch on", "B"), ("B. Sc", "B"), ("B: Dent", None),
        ("B: Scratch on the rim of it", None), ("F: Dent", None), ("the answer is B", None), ("", None),
    ],
)  # fmt: skip
def test_a_cut_option_is_clear_only_after_its_own_letter(text: str, letter: str | None) -> None:
    assert parse_cut_letter(text, {"A": "Dent", "B": "Scratch on the rim"}) == letter


def test_degraded_images_are_those_of_the_clean_ones(tmp_path: Path) -> None:
    found = {}
    for degraded in (False, True):
        questions = questions_file(degraded=degraded)
        run, _ = load_answers(
            write(tmp_path / "answers.json", answers_file(questions)), write(tmp_path / "questions.json", questions)
        )
        found[degraded] = [(one.case, one.question, one.image) for one in run.predictions]
        assert run.provenance["corruption"] == ("low light, motion blur" if degraded else None)
    assert found[False] == found[True]
    assert clean_path("VisA/candle/test/good/light/0306_light.JPG") == ("VisA/candle/test/good/0306.JPG", "light")
    assert clean_path("line/cap/test/light/0306.png") == ("line/cap/test/light/0306.png", None), "a defect named light"


def test_answers_to_other_questions_are_refused(tmp_path: Path) -> None:
    questions = questions_file()
    rows = answers_file(questions)
    path, asked = write(tmp_path / "answers.json", rows), write(tmp_path / "questions.json", questions)
    with pytest.raises(EchoError, match=r"answers\.json holds answers to RobustMAD.*add --questions"):
        load_answers(path)
    degraded = write(tmp_path / "low.json", questions_file(degraded=True))
    with pytest.raises(
        EchoError, match=r"row 1: .*low\.json has no question 1 about MVTec-AD/bottle.*give the questions"
    ):
        load_answers(path, degraded)
    listed = [rows[0] | {"image_path": ["a.png"]}, *rows[1:]]
    with pytest.raises(EchoError, match=r"row 1: .* has no question 1 about \['a\.png'\]"):
        load_answers(write(path, listed), asked)
    rows[2]["answer"] = "E"
    with pytest.raises(EchoError, match=r"row 3: the correct answer is 'E', but .*says 'C'"):
        load_answers(write(path, rows), asked)
    del rows[2]
    run, _ = load_answers(write(path, rows), asked)
    assert run.warnings == ["1 of 48 questions of questions.json have no answer"]
    for content in ([], {"images": []}, {"a": 1}):
        with pytest.raises(EchoError, match="lists no images"):
            load_answers(path, write(asked, content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"robustness_category": "Riddles"}, "category 'Riddles' is not one of"),
        ({"options": {"F": "?"}}, "letters A to E"),
        ({"robustness_category": ["General"]}, "is not one of RobustMAD's"),
        ({"answer": "F"}, "not one of the options"),
        ({"answer": ["A"]}, "not one of the options"),
        ({"question": ""}, "no text"),
        ({"question_id": None}, "not a number"),
    ],
)
def test_a_malformed_question_is_rejected_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    questions = questions_file()
    rows = answers_file(questions)[1:]
    questions["images"][0]["questions"][0] |= change
    run, _ = load_answers(write(tmp_path / "answers.json", rows), write(tmp_path / "questions.json", questions))
    (rejection,) = run.rejections
    assert rejection.item == "MVTec-AD/bottle/test/scratch/000.png, question 1"
    assert message in rejection.reason


def test_an_image_that_leads_out_of_the_root_is_rejected(tmp_path: Path) -> None:
    questions = questions_file()
    questions["images"][0]["reference_image_path"] = "MVTec-AD/../../secret.png"
    rows = answers_file({"images": questions["images"][1:]})
    run, _ = load_answers(write(tmp_path / "answers.json", rows), write(tmp_path / "questions.json", questions))
    (rejection,) = run.rejections
    assert "leads out of the root" in rejection.reason


def test_plain_lines_are_read_with_probabilities_parts_and_conditions(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "answers.jsonl",
        {"probabilities": {"A": 0.9, "B": 0.1}, "product": "cap", "part": "7", "condition": "dent"},
        {"image": "caps/good/002.png", "kind": "Object Structure", "question": "Which part?", "text": "(B)"},
        {"image": "caps/003.png", "answer": "B", "text": "I think\u2028B"},
        {"image": "caps/004.png", "kind": "Riddle", "text": None},
    )
    run, given = load_answers(path)
    first, second, third, fourth = run.predictions
    assert (first.product, first.group, first.condition) == ("cap", "7", "dent")
    assert first.probabilities == pytest.approx({"A": 0.9, "B": 0.1})
    assert (second.kind, second.parsed, second.condition) == ("Object Analysis", "B", GOOD)
    assert (third.parsed, third.condition) == (None, GOOD), "the right answer says that it is good"
    assert (fourth.error, fourth.condition) == ("no answer", UNKNOWN_CONDITION)
    assert [one.question_type for one in given.official] == [QUESTION_TYPES[0], "Object Analysis", QUESTION_TYPES[0]]


def test_a_letter_without_a_probability_has_the_probability_zero(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "answers.jsonl",
        {"probabilities": {"B": 0.8}},
        {"image": "caps/002.png", "answer": "B", "probabilities": {"B": 1.0}},
    )
    table = make_prediction_table(load_answers(path)[0].predictions)
    assert table.defect_scores.tolist() == [0, 0], "a certain answer is neither left out nor unknown"


def test_the_stated_condition_decides_if_yes_means_a_good_part(tmp_path: Path) -> None:
    normal = {"question": "Is this part normal?", "probabilities": {"A": 0.8, "B": 0.2}}
    path = write_lines(
        tmp_path / "answers.jsonl",
        {**normal, "condition": "good"},
        {**normal, "image": "caps/002.png", "answer": "B", "condition": "dent"},
        {**normal, "image": "caps/003.png", "answer": "B"},
        {"image": "caps/003.png"},
    )
    predictions = load_answers(path)[0].predictions
    assert [one.condition for one in predictions] == [GOOD, "dent", "defective", "defective"]
    assert make_prediction_table(predictions).defect_scores[:2].tolist() == pytest.approx([0.2, 0.2])


def test_options_of_an_answer_about_boxes_may_be_null(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "answers.jsonl", {}, {**BOXES, "options": None, "text": "none"})
    (boxes,) = load_answers(path)[0].grounding
    assert boxes.options == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"anwser": "A"}], r"answers\.jsonl:1 has a key 'anwser'; did you mean 'answer'\?"),
        ([{}, {"image": "b.png", "answer": "C"}], r":2: the answer 'C' is not one of the options A, B"),
        ([{"kind": "Anomaly detecton"}], r":1: the kind is 'Anomaly detecton'; did you mean 'Anomaly Detection'"),
        ([{"kind": "Defect Grounding", "answer": "none"}], "have no options; remove the key"),
        ([{**BOXES, "probabilities": {"A": 1}}], "have no probabilities; remove the key"),
        ([{**BOXES, "answer": "(0,0),(0,9)"}], r":1: the answer '\(0,0\),\(0,9\)' names no boxes; write them in thous"),
        ([{}, {**BOXES, "answer": "none"}], "contradict each other on whether caps/001.png is good"),
        ([BOXES], "holds only answers to Defect Grounding; add the model's answers to questions with options"),
        ([{"options": ["Yes.", "No."]}], "must map letters to strings"),
        ([{"options": {"1": "Yes."}}], "use letters from A to E"),
        ([{"image": " "}], "'image' is ' '; it must be a non-empty string"),
        ([{"image": "/disk/a.png"}], "image /disk/a.png leads out of its folder; write a path relative to a folder"),
        ([{"image": "caps/../../a.png"}], "leads out of its folder"),
        ([{"text": 3}], "null if there is no answer"),
        ([{"probabilities": {"A": 90, "B": 10}}], r"P\(A\) is 90; it must be a number from 0 to 1"),
        ([{"probabilities": {"A": 0.9, "B": 0.9}}], "add up to 1.8; they must add up to 1"),
        ([{"probabilities": {"A": float("nan")}}], "must be a number from 0 to 1"),
        ([{"probabilities": {"C": 0.5}}], r"option letters \(A, B\)"),
        (
            [{"options": {"A": "A dent.", "B": "Fine."}}],
            r"does not say whether caps/001\.png has a defect.*'condition'",
        ),
        ([{"question": "Is this part normal?"}], r"answer 'Yes\.' to 'Is this part normal\?' does not say whether"),
        ([{"question": "Is the part free of defects?"}], "does not say whether"),
        ([{"question": "Is this part flawless?"}], "does not say whether"),
        ([{"question": "Ist das Teil ohne Defekt?"}], "does not say whether"),
        ([{"part": "1"}, {"part": "2", "kind": "Riddle"}], r":2: the part of .* is '2', but '1' in .*:1"),
        ([{"condition": "good"}], "contradict each other on whether caps/001.png is good"),
        (
            [{}, {"answer": "B", "question": "Do you see a flaw?"}],
            "contradict each other on whether caps/001.png is good",
        ),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, changes: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(EchoError, match=message):
        load_answers(write_lines(tmp_path / "answers.jsonl", *changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"[1]\n", "is not an object"),
        (b'{"image": "a.png"}\n', "has no 'kind'"),
        (b'{"image": \n', r":1 is not JSON"),
        (b"\xff\xfe{", "save it as text in UTF-8"),
    ],
)
def test_files_that_are_not_json_lines_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(EchoError, match=message):
        load_answers(path)


def test_json_lines_are_known_by_their_content_and_need_no_questions(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "answers.txt", {}, {"image": "b.png"})
    assert len(load_answers(path)[0].predictions) == 2
    with pytest.raises(EchoError, match="remove --questions"):
        load_answers(path, write(tmp_path / "questions.json", questions_file()))
