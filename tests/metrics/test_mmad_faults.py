"""The strict table avoids the faults of MMAD's scorer, which the official table keeps."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from echo_ft.metrics.mmad import Answer, parse_answer, write_answers
from echo_ft.records import QUESTION_TYPES
from evaluation import score
from tests.support.predictions import make_answer

DATA = Path(os.environ.get("ECHO_FT_DATA", "../shared/data")) / "mmad"
DETECTION, ANALYSIS = "Anomaly Detection", "Defect Analysis"


def both_tables(folder: Path, rows: list[Answer]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The official table, the strict table and the whole report that `evaluation.score` writes for these answers."""
    write_answers(folder / "answers.json", rows)
    score.main(["--answers", str(folder / "answers.json"), "--output", str(folder / "out")])
    report = json.loads((folder / "out" / "report.json").read_text())
    return report["tables"]["official"], report["tables"]["strict"], report


def test_several_answers_to_one_question_are_told(tmp_path: Path) -> None:
    rows = [dataclasses.replace(make_answer("D/p/bad/0.png", given=given), question="Which?") for given in "AB"]
    _, _, report = both_tables(tmp_path, rows)
    assert report["warnings"] == ["1 questions have several answers, which all count (first: D/p/bad/0.png)"]


def test_fault_1_strict_counts_the_answer_after_an_unparsed_one(tmp_path: Path) -> None:
    """Right, unparsed, wrong, wrong, right, wrong: 2 of 6. Official drops the second and third: 2 of 4."""
    rows = [
        make_answer(f"D/p/bad/{index}.png", given=given) for index, given in enumerate(["A", "", "B", "B", "A", "B"])
    ]
    official, strict, _ = both_tables(tmp_path, rows)
    assert official["D"][ANALYSIS] == 50.0
    assert strict["D"][ANALYSIS] == pytest.approx(100 * 2 / 6)


def test_fault_2_strict_does_not_reward_refusing(tmp_path: Path) -> None:
    """One right, three wrong, three refused: 1 of 7. Official drops each refusal and the next row: 1 of 1."""
    rows = [
        make_answer("D/p/bad/0.png"),
        *(make_answer(f"D/p/bad/{i}.png", given="" if i % 2 else "B") for i in range(1, 7)),
    ]
    official, strict, report = both_tables(tmp_path, rows)
    assert official["D"][ANALYSIS] == 100.0
    assert strict["D"][ANALYSIS] == pytest.approx(100 / 7)
    assert report["counts"]["unparsed"] == 3


def test_fault_3_strict_means_leave_out_missing_question_types(tmp_path: Path) -> None:
    """D has two types with 100 and 0; E has one with 100. Official: (50 + 50) / 2. Strict: (50 + 100) / 2."""
    rows = [make_answer(), make_answer(kind="Object Details", given="B"), make_answer("E/p/bad/0.png")]
    official, strict, _ = both_tables(tmp_path, rows)
    assert (official["E"]["Object Analysis"], strict["E"]["Object Analysis"]) == (0.0, None)
    assert (official["Average"]["Average"], strict["Average"]["Average"]) == (50.0, 75.0)
    assert (official["Average"]["Object Analysis"], strict["Average"]["Object Analysis"]) == (0.0, 0.0)


def test_fault_4_strict_images_are_normal_only_by_folder_name(tmp_path: Path) -> None:
    """Normal 1 of 1, defective 1 of 3: (100 + 33.3) / 2. Official counts all but the last as normal: 2 of 3."""
    rows = [
        make_answer("D/p/good/0.png", DETECTION, given="B", true="B"),
        make_answer("D/goodyear/bad/0.png", DETECTION, given="A", true="A"),
        make_answer("D/p/bad/good.png", DETECTION, given="B", true="A"),
        make_answer("D/p/bad/1.png", DETECTION, given="B", true="A"),
    ]
    official, strict, report = both_tables(tmp_path, rows)
    assert official["D"][DETECTION] == pytest.approx((100 * 2 / 3 + 0) / 2)
    assert strict["D"][DETECTION] == pytest.approx((100 + 100 / 3) / 2)
    assert (report["counts"]["normal"], report["counts"]["defective"]) == (1, 3)


def test_fault_5_strict_never_guesses_a_letter(tmp_path: Path) -> None:
    """Two of five answers name the option: by its letter, and by letter and text. Guessing would count all five."""
    texts = ["A", "A. Yes.", "A crack runs across the part", "yes, surely", "It is either B or A"]
    rows = [
        Answer(f"D/p/bad/{index}.png", ANALYSIS, "A", text, "Defect?", {"A": "Yes.", "B": "No."})
        for index, text in enumerate(texts)
    ]
    _, strict, report = both_tables(tmp_path, rows)
    assert strict["D"][ANALYSIS] == 40.0
    assert report["counts"]["unparsed"] == 3
    assert [parse_answer(row.gpt_answer or "", row.options) for row in rows] == ["A"] * 5


def test_fault_6_reports_distinguish_versions_of_an_answer_file(tmp_path: Path) -> None:
    fingerprints = []
    for name, image in (("before", "DS-MVTec/pill/image/good/000.png"), ("after", "DS-MVTec/pill/image/good/022.png")):
        (tmp_path / name).mkdir()
        report = both_tables(tmp_path / name, [make_answer(image)])[2]
        fingerprints.append(report["provenance"]["answers_fingerprint"])
    assert fingerprints[0] != fingerprints[1]
    assert all(len(one) == 16 for one in fingerprints)


def test_fault_7_scoring_needs_no_display(tmp_path: Path) -> None:
    write_answers(
        tmp_path / "answers.json", [make_answer("D/p/bad/0.png", DETECTION), make_answer("D/p/good/0.png", DETECTION)]
    )
    program = (
        "import sys; from evaluation import score; score.main(sys.argv[1:]); "
        "loaded = {'matplotlib', 'tkinter', 'seaborn'} & sys.modules.keys(); assert not loaded, loaded"
    )
    arguments = ["--answers", str(tmp_path / "answers.json"), "--output", str(tmp_path / "out")]
    environment = {key: value for key, value in os.environ.items() if key != "DISPLAY"}
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.real_data
def test_report_on_mmads_answers_has_both_tables(tmp_path: Path) -> None:
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
