"""The RobustMAD benchmark ranks models, and finds how much degraded images cost and how much a reference helps."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks.evaluation import robustmad
from tests.support.robustmad import answers_file, questions_file


def write_answers(folder: Path, name: str, wrong: dict[str, int], degraded: bool = False) -> None:
    """Write questions and a model's answers; the first `wrong` answers in each named category are wrong."""
    suffix = "_low" if degraded else ""
    questions = questions_file(images=10, degraded=degraded)
    rows = answers_file(questions)
    for category, count in wrong.items():
        for row in [row for row in rows if row["robustness_category"].startswith(category)][:count]:
            row |= dict.fromkeys(("raw_response", "mslm_answer"), "B" if row["answer"] == "A" else "A")
    rows[-1]["raw_response"] = "It is hard to say."
    (folder / f"RobustMAD_MCQ{suffix}.json").write_text(json.dumps(questions))
    (folder / f"answers_{name}{suffix}.json").write_text(json.dumps(rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for degraded in (False, True):
        write_answers(tmp_path, "small_model", {"Anomaly Understanding and Localization (Stand": 10}, degraded)
        write_answers(tmp_path, "large_model", {"General": 8} if degraded else {}, degraded)
    return tmp_path


def test_tables_and_picture_show_the_differences(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["robustmad", str(folder), "--picture", str(folder / "picture.svg")])
    robustmad.main()
    printed = capsys.readouterr().out
    scores, costs, reference, neighbours = printed.split(":\n")[1:]
    large, small = (line.split(" | ") for line in scores.splitlines() if "_model |" in line)
    assert (large[0], small[0]) == ("| large_model", "| small_model"), "the better model comes first"
    assert small[2].startswith("50.0 (")
    assert large[-1] == "2 |", "the last answer of each file names no letter"
    large, small = (line.split(" | ") for line in costs.splitlines() if "_model |" in line)
    assert large[1].startswith("-40.0 (-")
    assert large[5].startswith("-10.0 (-"), "a quarter of one category"
    assert small[1].startswith("+0.0 (")
    assert large[6].startswith("-10.0 (-") and large[7].startswith("-10.0 (-"), "four of ten images of either kind"
    assert "| small_model | +50.0 (+" in reference
    assert "| large_model - small_model | +0.0 (" in neighbours
    assert "| +50.0 (+" in neighbours
    drawn = ET.parse(folder / "picture.svg").getroot()
    circles = [one for one in drawn.iter() if one.tag.endswith("circle")]
    assert len(circles) == 2 * 2 * 4 + 2, "a dot per model, condition and category, and two in the legend"


def test_models_with_other_questions_are_refused(folder: Path) -> None:
    path = folder / "answers_small_model.json"
    path.write_text(json.dumps(json.loads(path.read_text())[1:]))
    with pytest.raises(SystemExit, match="did not answer the same questions"):
        robustmad.load_models(folder)
    with pytest.raises(SystemExit, match=r"has no file answers_<model>\.json"):
        robustmad.load_models(folder / "nowhere")
