"""`evaluation.score` writes reports, calibrates, warns, and rejects bad input in one line."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from echo_ft.data.dataset import DATASET_FORMAT
from echo_ft.errors import EchoError
from echo_ft.experts.option_order import PermutedPrediction
from echo_ft.files import write_jsonl
from echo_ft.records import GOOD, QUESTION_TYPES, Prediction
from evaluation import compare, score
from tests.support.runs import make_run, predictions, require_self_contained, run_command


def test_score_writes_the_report_and_prints_the_table(tmp_path: Path) -> None:
    rows = predictions(0.8)
    rows[0] = dataclasses.replace(rows[0], text="I cannot tell", parsed=None)
    rows[2] = dataclasses.replace(rows[2], text="", parsed=None, probabilities=None, error="broken image")
    folder = make_run(tmp_path / "base", rows)
    done = run_command("evaluation.score", folder)
    assert done.returncode == 0, done.stderr
    assert "80 questions about 40 images (20 normal, 20 defective); 1 unparsed answers (1.2%), 1 failed" in done.stdout
    assert re.search(r"Average +\d+\.\d +\d+\.\d to \d+\.\d ", done.stdout)
    report = json.loads((folder / "report.json").read_text())
    for table in report["tables"].values():
        assert set(table) == {"tiles", "Average"}
        assert list(table["tiles"]) == [*QUESTION_TYPES, "Average"]
    right = sum(row.parsed == row.answer for row in rows if row.kind == QUESTION_TYPES[1])
    assert report["tables"]["strict"]["tiles"][QUESTION_TYPES[1]] == pytest.approx(100 * right / 40)
    assert report["tables"]["strict"]["tiles"][QUESTION_TYPES[2]] is None
    assert report["detection"]["All"]["scored"] == 39
    assert set(report["products"]) == {"tiles/<b>product 0", "tiles/<b>product 1", "tiles/<b>product 2"}
    assert report["provenance"]["dataset_fingerprint"] == "f00d"
    assert re.fullmatch("[0-9a-f]{16}", report["provenance"]["predictions_fingerprint"])
    page = (folder / "report.html").read_text()
    require_self_contained(page)
    assert all(f"&lt;b&gt;{name}" in page for name in ("product 0", "crack", "echo-tiny"))
    answers = json.loads((folder / "answers.json").read_text())
    assert len(answers) == 80
    assert answers[2]["gpt_answer"] == ""


def test_report_shows_false_alarms_and_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [dataclasses.replace(row, group=f"part {int(row.group.split()[1]) // 4}") for row in predictions(0.8)]
    folder = make_run(tmp_path / "base", rows)
    score.main([str(folder)])
    found = json.loads((folder / "report.json").read_text())["alarms"]
    assert set(found) == {"All", "tiles"}
    images, parts = found["All"]["p_defect"]["images"], found["All"]["p_defect"]["parts"]
    assert (images["good"], images["defective"]) == (20, 20)
    assert parts["escapes"] < images["escapes"], "a part with several images is found more often"
    low, high = images["intervals"]["false_alarms"]
    shown = f"{100 * images['false_alarms']:.1f} +{100 * low:.1f} to {100 * high:.1f} +20 images"
    assert re.search(rf"images, by P\(defect\) from 0.5 +{shown}", capsys.readouterr().out)
    page = (folder / "report.html").read_text()
    assert "A false alarm is a good image or part that is flagged" in page
    assert f"<td>{100 * parts['escapes']:.1f}</td>" in page


def test_report_compares_text_and_probabilities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = predictions(1.0)  # text and probabilities agree and are correct
    swapped = {"A": 0.2, "B": 0.8} if rows[0].answer == "A" else {"A": 0.8, "B": 0.2}
    rows[0] = dataclasses.replace(rows[0], probabilities=swapped)  # a defective image, correct only by the text
    rows[1] = dataclasses.replace(rows[1], text="I cannot tell", parsed=None)  # correct only by the probabilities
    rows[3] = dataclasses.replace(rows[3], probabilities=None)  # the server returned none, so it is not compared
    rows[5] = dataclasses.replace(rows[5], text="", parsed=None, probabilities=None, error="broken image")
    folder = make_run(tmp_path / "base", rows)
    score.main([str(folder)])
    found = json.loads((folder / "report.json").read_text())["two_ways"]
    assert set(found) == {*QUESTION_TYPES[:2], "Average"}
    questions = {name: figures["questions"] for name, figures in found.items()}
    assert questions == {QUESTION_TYPES[0]: 40, QUESTION_TYPES[1]: 38, "Average": 78}
    assert found[QUESTION_TYPES[0]]["agreement"] == pytest.approx(39 / 40)
    assert found[QUESTION_TYPES[1]]["agreement"] == pytest.approx(37 / 38)
    assert found["Average"]["agreement"] == pytest.approx(76 / 78)
    low, high = found["Average"]["interval"]
    assert 0.8 < low < 76 / 78 < high <= 1
    assert (found[QUESTION_TYPES[0]]["text"], found[QUESTION_TYPES[0]]["logits"]) == pytest.approx((100, 97.5))
    assert (found[QUESTION_TYPES[1]]["text"], found[QUESTION_TYPES[1]]["logits"]) == pytest.approx((100 * 37 / 38, 100))
    printed = capsys.readouterr().out
    assert "the text gives the most probable option for 97.4% of 78 questions (" in printed
    assert "strict average by text 98.7, by probability 98.8" in printed
    assert "Text and probabilities" in (folder / "report.html").read_text()


def test_report_shows_the_bias_towards_a_letter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row for row in predictions(1.0) if len(row.options) == 2]
    folder = make_run(tmp_path / "cyclic", predictions(1.0))
    permuted = []
    for row in rows:
        for shift in range(2):
            # Always answer the first letter: option A in the given order, option B if the options are swapped.
            chosen = "AB"[shift]
            changes = {"text": "A", "parsed": chosen, "shift": shift}
            permuted.append(PermutedPrediction(**{**dataclasses.asdict(row), **changes}))
    write_jsonl(folder / "permutations.jsonl", permuted)
    score.main([str(folder)])
    found = json.loads((folder / "report.json").read_text())["option_order"]
    assert (found["consistent"], found["questions"]) == (0, len(rows))
    first, second = found["letters"]
    assert (first["letter"], first["chosen"], first["right"]) == ("A", 1, 0.5)
    assert (second["letter"], second["chosen"], second["recall"]) == ("B", 0, 0)
    assert f"in every order for 0.0% of {len(rows)} questions" in capsys.readouterr().out
    assert "Option order" in (folder / "report.html").read_text()


def test_permutations_without_predictions_are_ignored(tmp_path: Path) -> None:
    """A run writes permutations before predictions, and the last line may be incomplete."""
    complete = predictions(1.0)
    permuted = [
        PermutedPrediction(**{**dataclasses.asdict(row), "shift": shift}) for row in complete[::2] for shift in range(2)
    ]
    found = {}
    for name, orders in (("some", permuted[:20]), ("more", permuted[:24])):
        folder = make_run(tmp_path / name, complete[:20], complete=False)
        write_jsonl(folder / "permutations.jsonl", orders)
        if name == "more":
            with open(folder / "permutations.jsonl", "a", encoding="utf-8") as file:
                file.write('{"case": "tile-')
        score.main([str(folder)])
        found[name] = json.loads((folder / "report.json").read_text())["option_order"]
    assert found["some"]["questions"] == 10
    assert found["more"] == found["some"]


def test_agreement_needs_generated_answers_and_probabilities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = [dataclasses.replace(row, probabilities=None) for row in predictions(0.8)]
    for folder in (
        make_run(tmp_path / "logits", predictions(0.8), answer="logits"),
        make_run(tmp_path / "averaged", predictions(0.8), answer="averaged"),
        make_run(tmp_path / "server", without, answer="generate"),
    ):
        score.main([str(folder)])
        assert json.loads((folder / "report.json").read_text())["two_ways"] == {}
        assert "Text and probabilities" not in (folder / "report.html").read_text()
    assert "most probable" not in capsys.readouterr().out


def uncertain(split: str, images: int, seed: int) -> list[Prediction]:
    """Answer Anomaly Detection questions about parts that belong to one split, with an informative P(defect)."""
    draw = random.Random(seed)
    rows = []
    for row in predictions(1.0, images=images)[::2]:
        score = min(max(draw.gauss(0.6 if row.condition != GOOD else 0.4, 0.15), 0.01), 0.99)
        parsed = "A" if score > 0.5 else "B"
        names = {"case": f"{split} {row.case}", "group": f"{split} {row.group}", "image": f"{split} {row.image}"}
        rows.append(dataclasses.replace(row, **names, parsed=parsed, probabilities={"A": score, "B": 1 - score}))
    return rows


def test_p_defect_is_calibrated_on_a_validation_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "test", uncertain("test", 80, 0))
    validation = make_run(tmp_path / "validation", uncertain("validation", 60, 1), split="validation", warnings=["odd"])
    done = run_command("evaluation.score", folder, "--calibration", validation, "--false_alarms", "0.1")
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "report.json").read_text())["calibration"]
    assert found["provenance"]["run"] == str(validation)
    assert found["provenance"]["split"] == "validation"
    assert found["validation"] == {"normal": 30, "defective": 30}
    assert found["test"] == {"normal": 40, "defective": 40}
    assert found["temperature"] < 1, "these probabilities are underconfident"
    alarms = found["thresholds"]["false_alarms"]
    assert alarms["validation"]["false_alarms"] <= 0.1
    assert f"temperature {found['temperature']:.3g}; expected calibration error " in done.stdout
    low, high = alarms["intervals"]["recall"]
    shown = rf"recall +0\.\d+ +{alarms['test']['recall']:.3f} +{low:.3f} to {high:.3f}"
    assert re.search(
        rf"false alarm rate at most 0\.1, set on validation +{alarms['threshold']:.3f} +{shown}", done.stdout
    )
    assert "odd" in done.stderr
    page = (folder / "report.html").read_text()
    require_self_contained(page)
    assert "Calibration of P(defect)" in page
    assert page.count('<svg class="curve"') == 2
    score.main([str(folder)])
    assert "Calibration of P(defect)" not in (folder / "report.html").read_text()


def test_threshold_for_too_few_normal_images_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "test", uncertain("test", 20, 0))
    validation = make_run(tmp_path / "validation", uncertain("validation", 20, 1), split="validation")
    score.main([str(folder), "--calibration", str(validation)])
    warning = "10 normal validation images are too few to guarantee a false-alarm share of 0.05"
    assert warning in capsys.readouterr().err
    assert set(json.loads((folder / "report.json").read_text())["calibration"]["thresholds"]) == {"f1", "best"}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "validation",
            {"base_model": "another"},
            "their base_model differs .<b>echo-tiny and another.; run the validation",
        ),
        ("validation", {"adapters": {"decision_maker": {"fingerprint": "beef"}}}, "their adapters differs; run"),
        ("validation", {"answer": "averaged"}, "their answer differs .None and averaged."),
        ("validation", {"corruption": "blur", "severity": 3}, "their corruption differs .None and blur."),
        ("validation", {"severity": 3}, "their severity differs .None and 3."),
        (
            "test",
            {},
            "40 parts are in both, such as tiles/<b>product 0/test part 0; give a run made with --split validation",
        ),
    ],
)
def test_run_with_another_model_or_the_same_parts_does_not_calibrate(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    folder = make_run(tmp_path / "test", uncertain("test", 40, 0))
    other = make_run(tmp_path / "other", uncertain(name, 40, 1), split=name, **changes)
    with pytest.raises(EchoError, match=f"other cannot calibrate .*test: {message}"):
        score.main([str(folder), "--calibration", str(other)])


def test_run_decided_by_text_calibrates_one_decided_by_probabilities(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "test", uncertain("test", 40, 0), answer="logits")
    other = make_run(tmp_path / "other", uncertain("validation", 40, 1), split="validation", answer="generate")
    score.main([str(folder), "--calibration", str(other)])
    assert json.loads((folder / "report.json").read_text())["calibration"]["temperature"] > 0


def test_invalid_calibration_options_are_refused(tmp_path: Path) -> None:
    folder, other = (make_run(tmp_path / name, uncertain(name, 40, 1)) for name in ("test", "validation"))
    with pytest.raises(EchoError, match="--false_alarms is 5; give a fraction"):
        score.main([str(folder), "--calibration", str(other), "--false_alarms", "5"])
    with pytest.raises(EchoError, match="use --calibration with a run folder"):
        score.main(["--answers", "x.json", "--output", str(tmp_path / "out"), "--calibration", str(other)])


def test_answers_of_a_run_scored_as_a_file_give_the_same_tables(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "base", predictions(0.6))
    score.main([str(folder)])
    score.main(["--answers", str(folder / "answers.json"), "--output", str(tmp_path / "again")])
    ours, theirs = (json.loads((where / "report.json").read_text()) for where in (folder, tmp_path / "again"))
    assert ours["tables"] == theirs["tables"]
    assert not (tmp_path / "again" / "answers.json").exists()


def test_incomplete_run_is_scored_with_a_warning_and_a_rejected_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "half", predictions(0.8, images=10), complete=False, cases=40)
    with open(folder / "predictions.jsonl", "a") as file:
        file.write('{"case": "tile-1')
    score.main([str(folder)])
    warnings = capsys.readouterr().err
    assert "THE RUN IS NOT COMPLETE: 10 of 40 cases" in warnings
    assert "cut off when the run stopped" in warnings
    assert "THE RUN IS NOT COMPLETE" in (folder / "report.html").read_text()
    assert json.loads((folder / "report.json").read_text())["counts"]["rejected"] == 1


def test_missing_cases_are_reported_even_if_the_run_claims_completeness(tmp_path: Path) -> None:
    rows = predictions(0.8, images=10)
    assert score.load_run(make_run(tmp_path / "whole", rows, questions=20)).warnings == []
    lost = score.load_run(make_run(tmp_path / "cases", rows, cases=12, questions=24))
    assert "THE RUN IS NOT COMPLETE: 10 of 12 cases" in lost.warnings[0]
    lost = score.load_run(make_run(tmp_path / "questions", rows[:-1], questions=20))
    assert "THE RUN IS NOT COMPLETE: 19 of 20 questions" in lost.warnings[0]


def test_a_report_warns_about_texts_that_were_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", predictions(0.5), cut={"reasoning_expert": 3}, max_new_tokens=128)
    score.main([str(run)])
    sentence = (
        "max_new_tokens 128 cut off outputs: 3 from the reasoning_expert; run again with a larger --max_new_tokens"
    )
    assert sentence in capsys.readouterr().err
    assert sentence in json.loads((run / "report.json").read_text())["warnings"][0]


def test_warnings_of_a_run_appear_in_report_and_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_run(tmp_path / "base", predictions(0.5))
    tuned = make_run(
        tmp_path / "tuned",
        predictions(0.9),
        adapters={"decision_maker": {"fingerprint": "beef"}},
        warnings=["3 OF 40 IMAGES WERE TRAINED ON"],
        continued_with=[{"warnings": ["3 OF 40 IMAGES WERE TRAINED ON", "another"]}, {"commit": "two"}],
    )
    score.main([str(tuned)])
    assert capsys.readouterr().err.count("3 OF 40 IMAGES WERE TRAINED ON") == 1
    report = json.loads((tuned / "report.json").read_text())
    assert report["warnings"] == ["3 OF 40 IMAGES WERE TRAINED ON", "another"]
    compare.main([str(base), str(tuned)])
    assert "tuned: 3 OF 40 IMAGES WERE TRAINED ON" in capsys.readouterr().err
    comparison = json.loads((tmp_path / "compare" / "comparison.json").read_text())
    for provenance in (report["provenance"], comparison["runs"][1]["provenance"]):
        assert provenance["adapters"]["decision_maker"]["fingerprint"] == "beef"


def test_unicode_line_separators_in_a_text_do_not_split_its_row(tmp_path: Path) -> None:
    rows = predictions(0.8, images=4)
    rows[0] = dataclasses.replace(rows[0], text="A\u2028 or\u2029 B\x85 or\x0b C\x1c", parsed=None)
    folder = make_run(tmp_path / "base", rows)
    assert score.load_run(folder).predictions == rows
    assert "\u2028" in (folder / "predictions.jsonl").read_text(encoding="utf-8"), (
        "the separators are written unescaped"
    )


def test_defective_images_that_count_as_officially_normal_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [dataclasses.replace(row, image=f"goodyear/{row.image}") for row in predictions(0.8)]
    score.main([str(make_run(tmp_path / "base", rows))])
    assert "20 defective images have `good` in their path" in capsys.readouterr().err


def test_page_shows_the_images_if_the_dataset_is_reachable(tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    manifest = {"format": DATASET_FORMAT, "root": ".", "fingerprint": "f00d", "config": {}}
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    Image.new("RGB", (32, 32), "red").save(dataset / "0.png")
    (dataset / "1.png").write_text("no image")
    folder = make_run(tmp_path / "base", predictions(0.8, images=2), dataset=str(dataset))
    score.main([str(folder)])
    embedded = re.findall(
        r'<script type="image/jpeg" id="image-(\d)">(.*)</script>', (folder / "report.html").read_text()
    )
    assert [(number, content[:4]) for number, content in embedded] == [("0", "/9j/"), ("1", "")]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "there is no folder"),
        (lambda folder: folder.mkdir(), r"is not a run \(it has no run.json\)"),
        (lambda folder: make_run(folder, []), "predictions.jsonl is empty"),
        (lambda folder: (make_run(folder, predictions(1)) / "run.json").write_text("{"), "run.json is not JSON"),
        (lambda folder: (make_run(folder, []) / "predictions.jsonl").write_text("{}\n"), "jsonl:1 is not a prediction"),
    ],
)
def test_folder_that_is_not_a_run_is_refused_with_the_reason(
    tmp_path: Path, prepare: Callable[[Path], Any], message: str
) -> None:
    prepare(tmp_path / "run")
    with pytest.raises(EchoError, match=message):
        score.main([str(tmp_path / "run")])


def test_command_line_error_is_one_line_with_exit_status_2(tmp_path: Path) -> None:
    done = run_command("evaluation.score", "--answer", "x.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown option --answer; did you mean 'answers'?\n"
    with pytest.raises(EchoError, match="give either a run folder, or --answers"):
        score.main([])
    with pytest.raises(EchoError, match=r"--answers needs a folder .* --output DIR"):
        score.main(["--answers", "x.json"])
    with pytest.raises(EchoError, match="two or more runs"):
        compare.main([str(tmp_path)])
