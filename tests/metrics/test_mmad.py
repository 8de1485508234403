"""The official table reproduces MMAD's scorer with its faults, and answer files are read and written in its format."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_ft.errors import EchoError
from echo_ft.metrics.mmad import (
    Answer,
    counted_as_normal,
    from_predictions,
    official_table,
    parse_answer,
    read_answers,
    to_predictions,
    write_answers,
)
from echo_ft.records import QUESTION_TYPES, Prediction
from tests.support.predictions import make_answer

DATA = Path(os.environ.get("ECHO_FT_DATA", "../shared/data")) / "mmad"


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["clean", "unparsed"])
def test_official_table_equals_that_of_mmads_scorer(name: str) -> None:
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


def test_official_drops_unparsed_answers_and_the_answers_after_them() -> None:
    rows = [make_answer(given="A"), make_answer(given="?"), make_answer(given="B"), make_answer(given="A")]
    assert official_table(rows)["D"]["Defect Analysis"] == 100.0


def test_official_scores_a_type_zero_if_only_some_datasets_have_it() -> None:
    rows = [make_answer(), make_answer(kind="Object Details"), make_answer("E/p/bad/0.png")]
    table = official_table(rows)
    assert table["E"]["Object Analysis"] == 0.0
    assert table["E"]["Average"] == 50.0
    assert table["Average"]["Average"] == 75.0
    assert table["D"]["Defect Localization"] is None


def test_official_looks_for_good_in_paths_and_scores_missing_classes_0() -> None:
    detection = "Anomaly Detection"
    assert official_table([make_answer("D/goods/bad/0.png", detection)])["D"][detection] == 50.0
    rows = [make_answer("D/goods/bad/0.png", detection), make_answer("D/p/bad/0.png", detection, "B")]
    assert official_table(rows)["D"][detection] == 50.0


def reimplemented_scorer(path: Path) -> dict[str, dict[str, float]]:
    """Reimplement MMAD's scorer from a description of its code, with a list that shrinks while it is iterated over."""
    rows = json.loads(path.read_text())
    folds = {"Object Structure": "Object Analysis", "Object Details": "Object Analysis"}
    datasets, kinds = [], []
    for row in rows:
        dataset, kind = row["image"].split("/")[0], folds.get(row["question_type"], row["question_type"])
        datasets += [dataset] * (dataset not in datasets)
        kinds += [kind] * (kind not in kinds)
    counters_by_type = {dataset: {kind: {"total": 0, "correct": 0} for kind in kinds} for dataset in datasets}
    by_class = {dataset: {name: {"total": 0, "correct": 0} for name in ("normal", "abnormal")} for dataset in datasets}
    for row in rows:
        given, true = row["gpt_answer"], row["correct_answer"]
        if given not in ["A", "B", "C", "D", "E"] or true not in ["A", "B", "C", "D", "E"]:
            rows.remove(row)
            continue
        dataset, kind = row["image"].split("/")[0], folds.get(row["question_type"], row["question_type"])
        counters = [counters_by_type[dataset][kind]]
        if kind == "Anomaly Detection":
            counters.append(by_class[dataset]["normal" if "good" in row["image"] else "abnormal"])
        for counter in counters:
            counter["total"] += 1
            counter["correct"] += given == true

    def percent(counter: dict[str, int]) -> float:
        return 100 * counter["correct"] / counter["total"] if counter["total"] != 0 else 0

    table: dict[str, dict[str, float]] = {}
    for dataset in datasets:
        table[dataset] = {kind: percent(counters_by_type[dataset][kind]) for kind in kinds}
        if "Anomaly Detection" in kinds:
            both = by_class[dataset]
            table[dataset]["Anomaly Detection"] = (percent(both["normal"]) + percent(both["abnormal"])) / 2
        table[dataset]["Average"] = sum(table[dataset].values()) / len(kinds)
    table["Average"] = {
        column: sum(table[dataset][column] for dataset in datasets) / len(datasets) for column in [*kinds, "Average"]
    }
    return table


PATHS = ("p/bad/0.png", "p/good/0.png", "goodyear/bad/0.png", "p/bad/good.png", "p/no_goods/1.png")

row_strategy = st.fixed_dictionaries(
    {
        "image": st.builds("{}/{}".format, st.sampled_from(["D", "E", "F"]), st.sampled_from(PATHS)),
        "question_type": st.sampled_from([QUESTION_TYPES[0], *QUESTION_TYPES, "Object Structure", "Object Details"]),
        "correct_answer": st.sampled_from([*"ABCDEABAB", "Z", ""]),
        "gpt_answer": st.sampled_from([*"ABCDEABAB", "", "Yes", "AB", "a", " A", "A.", None]),
    }
)


@settings(max_examples=400, deadline=None)
@given(st.lists(row_strategy, min_size=1, max_size=30))
def test_official_equals_the_reimplemented_scorer_on_any_answers(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.json"
        path.write_text(json.dumps(rows))
        table, expected = official_table(read_answers(path)), reimplemented_scorer(path)
    assert list(table) == list(expected)
    for name, row in expected.items():
        assert {column: value for column, value in table[name].items() if value is not None} == pytest.approx(row)


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["clean", "unparsed"])
def test_reimplemented_scorer_gives_the_table_of_mmads_scorer(name: str) -> None:
    """The test above therefore says something about MMAD's scorer, not only about the reimplementation."""
    if not DATA.is_dir():
        pytest.skip(f"no folder {DATA}; set ECHO_FT_DATA")
    with open(DATA / f"answers_{name}_accuracy.csv", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    expected = {row[0]: dict(zip(header[1:], map(float, row[1:]), strict=True)) for row in rows}
    found = reimplemented_scorer(DATA / f"answers_{name}.json")
    assert set(found) == set(expected)
    for row, figures in expected.items():
        assert found[row] == pytest.approx(figures, abs=1e-9)


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
def test_mmads_parser_reads_the_last_capital_or_the_closest_option(text: str, letter: str) -> None:
    assert parse_answer(text, {"A": "Crack.", "B": "Hole.", "C": "Bend.", "D": "Stain."}) == letter


def test_written_answers_are_read_back_unchanged(tmp_path: Path) -> None:
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
def test_malformed_row_is_reported_by_its_number(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "answers.json"
    path.write_text(json.dumps([GOOD_ROW, row]))
    with pytest.raises(EchoError, match=message):
        read_answers(path)


@pytest.mark.parametrize(("content", "message"), [("{", "not JSON"), ("{}", "no list"), ("[]", "no list")])
def test_file_in_another_format_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "answers.json"
    path.write_text(content)
    with pytest.raises(EchoError, match=message):
        read_answers(path)
    with pytest.raises(EchoError, match="there is no answer file"):
        read_answers(tmp_path / "missing.json")


def test_strict_images_are_normal_if_a_folder_is_named_exactly_good() -> None:
    rows = [make_answer("D/goods/bad/0.png"), make_answer("D/p/test/good/0.png"), make_answer("D/p/bad/good.png")]
    predictions, rejections = to_predictions(rows)
    assert [one.condition for one in predictions] == ["bad", "good", "bad"]
    assert rejections == []


def test_row_without_a_valid_true_option_is_rejected_by_number() -> None:
    predictions, rejections = to_predictions([make_answer(), make_answer(true="Z")])
    assert len(predictions) == 1
    assert rejections[0].item.startswith("row 2")
    assert "'Z'" in rejections[0].reason


def detection_prediction(image: str, condition: str, text: str = "B", error: str | None = None) -> Prediction:
    """Answer an Anomaly Detection question about an image of the dataset `tiles`."""
    return Prediction(
        case="c",
        question="q",
        dataset="tiles",
        product="p",
        group=image,
        image=image,
        condition=condition,
        kind=QUESTION_TYPES[0],
        question_text="Defect?",
        options={"A": "Yes.", "B": "No."},
        answer="B",
        text=text,
        parsed="B",
        error=error,
    )


def test_paths_of_written_answers_contain_dataset_and_condition() -> None:
    rows = [
        detection_prediction("tiles/p/crack/0.png", "crack"),
        detection_prediction("x/0.png", "crack"),
        detection_prediction("x/1.png", "good"),
    ]
    images = [one.image for one in from_predictions(rows)]
    assert images == ["tiles/p/crack/0.png", "tiles/p/crack/x/0.png", "tiles/p/good/x/1.png"]


def test_defective_images_with_good_in_their_path_are_listed() -> None:
    """MMAD's scorer looks for `good` in the whole path, and the official table must reproduce that."""
    rows = [
        detection_prediction("tiles/goodyear/crack/0.png", "crack"),
        detection_prediction("goodyear/1.png", "crack", "A"),
        detection_prediction("tiles/p/crack/2.png", "crack"),
        detection_prediction("x/3.png", "good"),
    ]
    answers = from_predictions(rows)
    assert [one.image for one in answers][:2] == ["tiles/goodyear/crack/0.png", "tiles/p/crack/goodyear/1.png"]
    assert counted_as_normal(rows) == ["tiles/goodyear/crack/0.png", "tiles/p/crack/goodyear/1.png"]
    # It counts 0, 1 and 3 as normal, and 1 is wrong. It counts only 2 as defective.
    assert official_table(answers)["tiles"]["Anomaly Detection"] == pytest.approx((100 * 2 / 3 + 100) / 2)


def test_written_answers_are_letters_and_empty_if_the_run_failed() -> None:
    rows = [
        detection_prediction("x/0.png", "good", "A. No idea"),
        detection_prediction("x/1.png", "good", "", error="broken image"),
    ]
    assert [one.gpt_answer for one in from_predictions(rows)] == ["A", ""]
