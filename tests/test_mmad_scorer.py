"""The official table is MMAD's, faults included; its file format is read with the row's number in every error."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_ft.mmad_scorer import (
    Answer,
    from_predictions,
    official_table,
    parse_answer,
    read_answers,
    taken_for_normal,
    to_predictions,
    write_answers,
)
from echo_ft.records import KINDS, LETTERS, EchoError, Prediction

DATA = Path(os.environ.get("ECHO_FT_DATA", "../shared/data")) / "mmad"


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["clean", "unparsed"])
def test_official_equals_the_table_of_mmads_own_scorer(name: str) -> None:
    if not DATA.is_dir():
        pytest.skip(f"no folder {DATA}; set ECHO_FT_DATA")
    table = official_table(read_answers(DATA / f"answers_{name}.json"))
    with open(DATA / f"answers_{name}_accuracy.csv", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert set(table) == {row[0] for row in rows}
    assert set(table["Average"]) == set(header[1:])
    for row in rows:
        for column, value in zip(header[1:], row[1:], strict=True):
            assert table[row[0]][column] == pytest.approx(float(value), abs=1e-9)


def answer(image: str = "D/p/bad/0.png", kind: str = "Defect Analysis", said: str = "A", true: str = "A") -> Answer:
    return Answer(image, kind, true, said)


def test_official_skips_the_answer_after_an_unread_one_and_drops_both_from_the_denominator() -> None:
    rows = [answer(said="A"), answer(said="?"), answer(said="B"), answer(said="A")]
    assert official_table(rows)["D"]["Defect Analysis"] == 100.0


def test_official_gives_zero_to_a_kind_that_a_dataset_lacks_and_none_to_one_that_all_lack() -> None:
    rows = [answer(), answer(kind="Object Details"), answer("E/p/bad/0.png")]
    table = official_table(rows)
    assert table["E"]["Object Analysis"] == 0.0
    assert table["E"]["Average"] == 50.0
    assert table["Average"]["Average"] == 75.0
    assert table["D"]["Defect Localization"] is None


def test_official_takes_good_anywhere_in_a_path_for_normal_and_a_missing_side_for_zero() -> None:
    detection = "Anomaly Detection"
    assert official_table([answer("D/goods/bad/0.png", detection)])["D"][detection] == 50.0
    rows = [answer("D/goods/bad/0.png", detection), answer("D/p/bad/0.png", detection, "B")]
    assert official_table(rows)["D"][detection] == 50.0


def literal(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[int]]:
    """Correct and total by dataset and kind, by removing from the list that is walked through, as MMAD does."""
    rows, found = list(rows), {}
    for row in rows:
        if row["said"] not in LETTERS or row["said"] == "" or row["true"] not in LETTERS:
            rows.remove(row)
            continue
        cell = found.setdefault((row["dataset"], row["kind"]), [0, 0])
        cell[0] += row["said"] == row["true"]
        cell[1] += 1
    return found


row_strategy = st.fixed_dictionaries(
    {
        "dataset": st.sampled_from(["D", "E"]),
        "kind": st.sampled_from(KINDS[1:]),
        "said": st.sampled_from(["A", "B", "", "Yes"]),
        "true": st.sampled_from(["A", "B", "Z"]),
    }
)


@given(st.lists(row_strategy, min_size=1, max_size=12))
def test_official_walks_any_file_as_the_list_that_loses_rows_does(rows: list[dict[str, Any]]) -> None:
    table = official_table([answer(f"{r['dataset']}/p/bad/0.png", r["kind"], r["said"], r["true"]) for r in rows])
    found = literal(rows)
    for dataset in {row["dataset"] for row in rows}:
        for kind in {row["kind"] for row in rows}:
            correct, total = found.get((dataset, kind), (0, 0))
            assert table[dataset][kind] == pytest.approx(100 * correct / total if total else 0.0)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("The answer is (C).", "C"),
        ("B, or else A", "A"),
        ("A crack is what I see", "A"),
        ("it looks like a stain", "D"),
        ("", "D"),
    ],
)
def test_mmads_parser_takes_the_last_lone_capital_and_else_the_nearest_option(text: str, letter: str) -> None:
    assert parse_answer(text, {"A": "Crack.", "B": "Hole.", "C": "Bend.", "D": "Stain."}) == letter


def test_answers_survive_writing_and_reading(tmp_path: Path) -> None:
    rows = [Answer("D/p/good/0.png", "Object Details", "A", "B", "What?", {"A": "Yes.", "B": "No."})]
    write_answers(tmp_path / "answers.json", rows)
    assert read_answers(tmp_path / "answers.json") == rows


GOOD_ROW = {"image": "D/p/b/0.png", "question_type": "Anomaly Detection", "correct_answer": "A", "gpt_answer": "A"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "row 2: not an object"),
        ({**GOOD_ROW, "question_type": "Anomaly Detecton"}, "row 2.*did you mean 'Anomaly Detection'"),
        ({**GOOD_ROW, "image": "0.png"}, "row 2.*dataset/product"),
        ({**GOOD_ROW, "gpt_answer": 3}, "row 2.*'gpt_answer' is 3"),
        ({**GOOD_ROW, "question": {"text": "?", "options": {"A": 1}}}, "row 2.*'question'"),
        ({key: value for key, value in GOOD_ROW.items() if key != "correct_answer"}, "row 2: no 'correct_answer'"),
    ],
)
def test_a_row_that_is_not_mmads_is_named_by_its_number(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "answers.json"
    path.write_text(json.dumps([GOOD_ROW, row]))
    with pytest.raises(EchoError, match=message):
        read_answers(path)


@pytest.mark.parametrize(("content", "message"), [("{", "not JSON"), ("{}", "no list"), ("[]", "no list")])
def test_a_file_that_is_not_mmads_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "answers.json"
    path.write_text(content)
    with pytest.raises(EchoError, match=message):
        read_answers(path)
    with pytest.raises(EchoError, match="there is no answers file"):
        read_answers(tmp_path / "missing.json")


def test_strict_takes_normal_from_a_path_component_that_is_exactly_good() -> None:
    rows = [answer("D/goods/bad/0.png"), answer("D/p/test/good/0.png"), answer("D/p/bad/good.png")]
    predictions, rejections = to_predictions(rows)
    assert [one.condition for one in predictions] == ["bad", "good", "bad"]
    assert rejections == []


def test_a_row_without_a_true_option_is_rejected_with_its_number() -> None:
    predictions, rejections = to_predictions([answer(), answer(true="Z")])
    assert len(predictions) == 1
    assert rejections[0].item.startswith("row 2") and "'Z'" in rejections[0].reason


def prediction(image: str, condition: str, text: str = "B", error: str | None = None) -> Prediction:
    return Prediction(
        "c", "q", "tiles", "p", image, image, condition, KINDS[0], "Defect?", {"A": "Yes.", "B": "No."}, "B", text, "B",
        None, error,
    )  # fmt: skip


def test_answers_of_a_run_carry_dataset_and_condition_in_their_path() -> None:
    rows = [prediction("tiles/p/crack/0.png", "crack"), prediction("x/0.png", "crack"), prediction("x/1.png", "good")]
    images = [one.image for one in from_predictions(rows)]
    assert images == ["tiles/p/crack/0.png", "tiles/p/crack/x/0.png", "tiles/p/good/x/1.png"]


def test_a_defective_image_with_good_anywhere_in_its_path_stays_official_normal_and_is_named() -> None:
    """MMAD's scorer looks for `good` in the whole path; the official table must give what it gives."""
    rows = [
        prediction("tiles/goodyear/crack/0.png", "crack"),
        prediction("goodyear/1.png", "crack", "A"),
        prediction("tiles/p/crack/2.png", "crack"),
        prediction("x/3.png", "good"),
    ]
    answers = from_predictions(rows)
    assert [one.image for one in answers][:2] == ["tiles/goodyear/crack/0.png", "tiles/p/crack/goodyear/1.png"]
    assert taken_for_normal(rows) == ["tiles/goodyear/crack/0.png", "tiles/p/crack/goodyear/1.png"]
    # Normal to it: 0, 1 and 3, of which 1 is wrong; defective: 2 alone.
    assert official_table(answers)["tiles"]["Anomaly Detection"] == pytest.approx((100 * 2 / 3 + 100) / 2)


def test_answers_of_a_run_are_what_mmads_parser_reads_and_empty_where_the_run_failed() -> None:
    rows = [prediction("x/0.png", "good", "A. No idea"), prediction("x/1.png", "good", "", error="broken image")]
    assert [one.gpt_answer for one in from_predictions(rows)] == ["A", ""]
