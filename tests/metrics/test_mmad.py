"""The official table is MMAD's, faults included; its file format is read with the row's number in every error."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_ft.errors import EchoError
from echo_ft.metrics.mmad import (
    Answer,
    from_predictions,
    official_table,
    parse_answer,
    read_answers,
    taken_for_normal,
    to_predictions,
    write_answers,
)
from echo_ft.records import QUESTION_TYPES, Prediction
from evaluation import score

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


def mmad(path: Path) -> dict[str, dict[str, float]]:
    """MMAD's scorer written anew from the description of its code: counters, and a list that loses rows on the way."""
    rows = json.loads(path.read_text())
    folds = {"Object Structure": "Object Analysis", "Object Details": "Object Analysis"}
    datasets, kinds = [], []
    for row in rows:
        dataset, kind = row["image"].split("/")[0], folds.get(row["question_type"], row["question_type"])
        datasets += [dataset] * (dataset not in datasets)
        kinds += [kind] * (kind not in kinds)
    asked = {dataset: {kind: {"total": 0, "correct": 0} for kind in kinds} for dataset in datasets}
    seen = {dataset: {side: {"total": 0, "correct": 0} for side in ("normal", "abnormal")} for dataset in datasets}
    for row in rows:
        said, true = row["gpt_answer"], row["correct_answer"]
        if said not in ["A", "B", "C", "D", "E"] or true not in ["A", "B", "C", "D", "E"]:
            rows.remove(row)
            continue
        dataset, kind = row["image"].split("/")[0], folds.get(row["question_type"], row["question_type"])
        counters = [asked[dataset][kind]]
        if kind == "Anomaly Detection":
            counters.append(seen[dataset]["normal" if "good" in row["image"] else "abnormal"])
        for counter in counters:
            counter["total"] += 1
            counter["correct"] += said == true

    def percent(counter: dict[str, int]) -> float:
        return 100 * counter["correct"] / counter["total"] if counter["total"] != 0 else 0

    table: dict[str, dict[str, float]] = {}
    for dataset in datasets:
        table[dataset] = {kind: percent(asked[dataset][kind]) for kind in kinds}
        if "Anomaly Detection" in kinds:
            sides = seen[dataset]
            table[dataset]["Anomaly Detection"] = (percent(sides["normal"]) + percent(sides["abnormal"])) / 2
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
def test_official_is_to_the_digit_what_mmads_scorer_makes_of_any_answers_file(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.json"
        path.write_text(json.dumps(rows))
        table, expected = official_table(read_answers(path)), mmad(path)
    assert list(table) == list(expected)
    for name, row in expected.items():
        assert {column: value for column, value in table[name].items() if value is not None} == pytest.approx(row)


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["clean", "unparsed"])
def test_the_scorer_written_anew_gives_the_table_of_mmads_own(name: str) -> None:
    """So that the property above is one of MMAD's scorer, not of what this file takes it for."""
    if not DATA.is_dir():
        pytest.skip(f"no folder {DATA}; set ECHO_FT_DATA")
    with open(DATA / f"answers_{name}_accuracy.csv", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    expected = {row[0]: dict(zip(header[1:], map(float, row[1:]), strict=True)) for row in rows}
    found = mmad(DATA / f"answers_{name}.json")
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
        "c", "q", "tiles", "p", image, image, condition, QUESTION_TYPES[0], "Defect?", {"A": "Yes.", "B": "No."}, "B", text, "B",
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


DETECTION, ANALYSIS = "Anomaly Detection", "Defect Analysis"


def both_tables(folder: Path, rows: list[Answer]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The official and the strict table that `evaluation.score` writes of these answers, and the whole report."""
    write_answers(folder / "answers.json", rows)
    score.main(["--answers", str(folder / "answers.json"), "--output", str(folder / "out")])
    report = json.loads((folder / "out" / "report.json").read_text())
    return report["tables"]["official"], report["tables"]["strict"], report


def test_trap_1_strict_counts_the_answer_after_an_unread_one(tmp_path: Path) -> None:
    """Right, unread, wrong, wrong, right, wrong: 2 of 6. Official loses the second and third: 2 of 4."""
    rows = [answer(f"D/p/bad/{index}.png", said=said) for index, said in enumerate(["A", "", "B", "B", "A", "B"])]
    official, strict, _ = both_tables(tmp_path, rows)
    assert official["D"][ANALYSIS] == 50.0
    assert strict["D"][ANALYSIS] == pytest.approx(100 * 2 / 6)


def test_trap_2_refusing_does_not_pay_in_strict(tmp_path: Path) -> None:
    """One right of four, three refused, each before a row that official loses with it: 1 of 7, and 1 of 1."""
    rows = [answer("D/p/bad/0.png"), *(answer(f"D/p/bad/{i}.png", said="" if i % 2 else "B") for i in range(1, 7))]
    official, strict, report = both_tables(tmp_path, rows)
    assert official["D"][ANALYSIS] == 100.0
    assert strict["D"][ANALYSIS] == pytest.approx(100 / 7)
    assert report["counts"]["unparsed"] == 3


def test_trap_3_a_type_without_a_question_is_left_out_of_strict_means(tmp_path: Path) -> None:
    """D has two types, 100 and 0; E has one, 100. Official: (50 + 50) / 2. Strict: (50 + 100) / 2."""
    rows = [answer(), answer(kind="Object Details", said="B"), answer("E/p/bad/0.png")]
    official, strict, _ = both_tables(tmp_path, rows)
    assert (official["E"]["Object Analysis"], strict["E"]["Object Analysis"]) == (0.0, None)
    assert (official["Average"]["Average"], strict["Average"]["Average"]) == (50.0, 75.0)
    assert (official["Average"]["Object Analysis"], strict["Average"]["Object Analysis"]) == (0.0, 0.0)


def test_trap_4_strict_takes_an_image_for_normal_by_its_folder_alone(tmp_path: Path) -> None:
    """Normal 1 of 1 right; defective 1 of 3: (100 + 33.3) / 2. Official takes all but the last for normal: 2 of 3."""
    rows = [
        answer("D/p/good/0.png", DETECTION, said="B", true="B"),
        answer("D/goodyear/bad/0.png", DETECTION, said="A", true="A"),
        answer("D/p/bad/good.png", DETECTION, said="B", true="A"),
        answer("D/p/bad/1.png", DETECTION, said="B", true="A"),
    ]
    official, strict, report = both_tables(tmp_path, rows)
    assert official["D"][DETECTION] == pytest.approx((100 * 2 / 3 + 0) / 2)
    assert strict["D"][DETECTION] == pytest.approx((100 + 100 / 3) / 2)
    assert (report["counts"]["normal"], report["counts"]["defective"]) == (1, 3)


def test_trap_5_strict_guesses_no_letter(tmp_path: Path) -> None:
    """Of five answers two name the option: the letter, and the letter with its own text. Guessing gets all five."""
    said = ["A", "A. Yes.", "A crack runs across the part", "yes, surely", "It is either B or A"]
    rows = [
        Answer(f"D/p/bad/{index}.png", ANALYSIS, "A", text, "Defect?", {"A": "Yes.", "B": "No."})
        for index, text in enumerate(said)
    ]
    _, strict, report = both_tables(tmp_path, rows)
    assert strict["D"][ANALYSIS] == 40.0 and report["counts"]["unparsed"] == 3
    assert [parse_answer(row.gpt_answer or "", row.options) for row in rows] == ["A"] * 5


def test_trap_6_a_report_tells_one_version_of_a_file_from_the_next(tmp_path: Path) -> None:
    fingerprints = []
    for name, image in (("before", "DS-MVTec/pill/image/good/000.png"), ("after", "DS-MVTec/pill/image/good/022.png")):
        (tmp_path / name).mkdir()
        report = both_tables(tmp_path / name, [answer(image)])[2]
        fingerprints.append(report["provenance"]["answers_fingerprint"])
    assert fingerprints[0] != fingerprints[1] and all(len(one) == 16 for one in fingerprints)


def test_trap_7_scoring_needs_no_window_and_loads_nothing_that_draws_one(tmp_path: Path) -> None:
    write_answers(tmp_path / "answers.json", [answer("D/p/bad/0.png", DETECTION), answer("D/p/good/0.png", DETECTION)])
    program = (
        "import sys; from evaluation import score; score.main(sys.argv[1:]); "
        "drawn = {'matplotlib', 'tkinter', 'seaborn'} & sys.modules.keys(); assert not drawn, drawn"
    )
    arguments = ["--answers", str(tmp_path / "answers.json"), "--output", str(tmp_path / "out")]
    environment = {key: value for key, value in os.environ.items() if key != "DISPLAY"}
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.real_data
def test_score_of_mmads_answers_keeps_official_and_strict_apart(tmp_path: Path) -> None:
    if not DATA.is_dir():
        pytest.skip(f"no folder {DATA}; set ECHO_FT_DATA")
    score.main(["--answers", str(DATA / "answers_unparsed.json"), "--output", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tables"]["official"]["Average"]["Average"] == pytest.approx(67.26792029125555, abs=1e-9)
    assert report["counts"]["unparsed"] == 26
    assert report["tables"]["strict"]["Average"]["Average"] < 67
    rows = json.loads((DATA / "answers_unparsed.json").read_text())
    loco = [row for row in rows if row["image"].startswith("MVTec-LOCO/") and row["question_type"] == QUESTION_TYPES[4]]
    right = sum(row["gpt_answer"] == row["correct_answer"] for row in loco)
    assert report["tables"]["strict"]["MVTec-LOCO"][QUESTION_TYPES[4]] == pytest.approx(100 * right / len(loco))
