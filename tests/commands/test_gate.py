"""`evaluation.score --gate` prints a verdict, writes it to the report, and exits with its status."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

from echo_ft.errors import EchoError
from echo_ft.gate.certificate import PASS
from echo_ft.inference.decision import PASSED, load_calibration, with_threshold
from echo_ft.records import GOOD, Prediction
from evaluation import score
from tests.support.runs import make_run, predictions, require_self_contained, run_command


def sure(images: int, name: str = "part", alarms: int = 0) -> list[Prediction]:
    """Answer Anomaly Detection with an extreme P(defect); the first `alarms` good parts are flagged."""
    rows = []
    for place, row in enumerate(predictions(1.0, images=images)[::2]):
        bad = row.condition != GOOD or place < 2 * alarms
        names = {"case": f"{name} {place}", "image": f"{name}-{place}.png", "group": f"{name} {place}"}
        probabilities = {"A": 0.9, "B": 0.1} if bad else {"A": 0.1, "B": 0.9}
        rows.append(dataclasses.replace(row, **names, parsed="A" if bad else "B", probabilities=probabilities))
    return rows


def judge(folder: Path, *options: str) -> tuple[int, dict[str, object]]:
    with pytest.raises(SystemExit) as stopped:
        score.main([str(folder), *options])
    return int(str(stopped.value.code)), json.loads((folder / "report.json").read_text())["gate"]


def test_a_gate_exits_with_its_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", sure(200))
    status, gate = judge(folder, "--gate", "false_alarms<=0.05, escapes<=0.05")
    assert (status, gate["verdict"]) == (0, "pass")
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == gate["sentence"]
    (row,) = [line.split("  ") for line in printed.splitlines() if line.startswith("good parts that are flagged")]
    assert [cell.strip() for cell in row if cell][1:] == ["5", "0.0", "0.00 to 4.44", "0 of 66", "pass"]
    status, gate = judge(folder, "--gate", "escapes<=0.01")
    assert (status, gate["verdict"]) == (3, "not enough parts")
    assert list(gate["findings"]) == ["escapes"]
    assert "there is no limit for false alarms: 0 of 66 judged good parts are flagged" in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    require_self_contained(page)
    assert f'<p class="verdict">{gate["sentence"]}.</p>' in page
    assert "233 more judged defective parts would pass if none of them is missed." in page
    score.main([str(folder)])
    assert json.loads((folder / "report.json").read_text())["gate"] == {}
    assert "<h2>Gate</h2>" not in (folder / "report.html").read_text()


def test_the_command_line_states_a_failure_with_status_1(tmp_path: Path) -> None:
    done = run_command(
        "evaluation.score",
        make_run(tmp_path / "run", sure(120, alarms=30)),
        "--gate",
        "false_alarms<=0.2, escapes<=0.2",
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1].startswith("fail: more than 20% of good parts are flagged, with 95% confidence")


def test_the_threshold_comes_from_the_calibration_run_and_serves_the_inspector(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", sure(120))
    validation = make_run(tmp_path / "validation", sure(20, "other"), split="validation")
    status, gate = judge(folder, "--gate", "false_alarms<=0.05", "--calibration", str(validation))
    assert (status, gate["verdict"]) == (0, "pass")
    assert gate["split"]["choosing"] == {"good": 10, "defective": 10}
    assert gate["split"]["judged"] == {"good": 60, "defective": 60}
    found = load_calibration(folder / "report.json")
    assert gate["threshold"] == pytest.approx(0.5)
    assert found.temperature == json.loads((folder / "report.json").read_text())["calibration"]["temperature"]
    assert found.score(0.49) < found.threshold < found.score(0.51)
    assert (found.flags(0.49), found.flags(0.51)) == (False, True)
    with pytest.raises(EchoError, match="cannot calibrate"):
        score.main([str(folder), "--gate", "false_alarms<=0.05", "--calibration", str(folder)])


def test_the_inspector_uses_the_threshold_of_a_gate_without_a_calibration(tmp_path: Path) -> None:
    _, gate = judge(make_run(tmp_path / "run", sure(60)), "--gate", "escapes<=0.3")
    found = load_calibration(tmp_path / "run" / "report.json")
    assert (found.temperature, found.threshold) == (1.0, pytest.approx(gate["threshold"]))
    # A gate that flags nothing has a threshold above every P(defect).
    report = {"calibration": {}, "gate": {"threshold": 1.0000000000000002, "verdict": "pass", "sentence": "pass"}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    nothing = load_calibration(tmp_path / "report.json")
    assert nothing.score(1.0) < nothing.threshold
    assert not nothing.flags(1.0)


def test_a_report_that_loses_a_calibration_and_a_gate_says_how_to_keep_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run", sure(120))
    validation = make_run(tmp_path / "the validation", sure(20, "other"), split="validation")
    options = ["--calibration", str(validation), "--false_alarms", "0.2", "--gate", "false_alarms<=0.05, escapes<=0.1"]
    judge(folder, *options)
    judge(folder, *options)
    assert "no longer" not in capsys.readouterr().err
    score.main([str(folder)])
    warned = capsys.readouterr().err
    assert f"{folder}/report.json no longer has a calibration and a gate, so exports and inspections" in warned
    assert shlex.split(warned.partition("score again with ")[2]) == options
    score.main([str(folder)])
    assert "no longer" not in capsys.readouterr().err
    judge(folder, "--gate", "escapes<=0.1")
    score.main([str(folder), "--calibration", str(validation)])
    warned = capsys.readouterr().err
    assert "no longer has a gate, so" in warned
    assert shlex.split(warned.partition("score again with ")[2].splitlines()[0]) == ["--gate", "escapes<=0.1"]


@pytest.mark.parametrize(("limits", "warns"), [("escapes<=0.3", False), ("escapes<=0.01", True)])
def test_the_threshold_of_a_gate_that_did_not_pass_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limits: str, warns: bool
) -> None:
    _, gate = judge(make_run(tmp_path / "run", sure(60)), "--gate", limits)
    caplog.clear()
    load_calibration(tmp_path / "run" / "report.json")
    expected = f"gives the threshold of a gate that did not pass ({gate['sentence']})"
    assert [expected in one.message for one in caplog.records] == [True] * warns
    assert (gate["verdict"] == PASSED == PASS) is not warns


def test_a_low_temperature_does_not_change_what_a_gate_flags(tmp_path: Path) -> None:
    gate = {"threshold": 0.635, "verdict": "pass", "sentence": "pass"}
    report = {"calibration": {"temperature": 0.01, "thresholds": {}}, "gate": gate}
    (tmp_path / "report.json").write_text(json.dumps(report))
    found = load_calibration(tmp_path / "report.json")
    assert [found.flags(value) for value in (0.58, 0.62, 0.634, 0.635, 0.64, 1.0)] == [False] * 3 + [True] * 3
    other = with_threshold(found, 0.2)
    assert (other.flags(0.4), other.flags(0.6)) == (False, True), "--threshold replaces the gate's threshold"


def test_answers_in_mmads_format_are_judged_without_a_threshold(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", sure(120))
    score.main([str(folder)])
    output = tmp_path / "again"
    with pytest.raises(SystemExit) as stopped:
        score.main(["--answers", str(folder / "answers.json"), "--output", str(output), "--gate", "escapes<=0.05"])
    gate = json.loads((output / "report.json").read_text())["gate"]
    assert (stopped.value.code, gate["decided_by"], gate["threshold"]) == (0, "answers", None)
    assert gate["findings"]["escapes"]["parts"] == 60


def test_a_limit_that_cannot_be_read_stops_the_command_before_it_writes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", sure(20))
    with pytest.raises(EchoError, match="there is no limit for 'false_alarm'; did you mean 'false_alarms'"):
        score.main([str(folder), "--gate", "false_alarm<=0.05"])
    assert not (folder / "report.json").exists()
