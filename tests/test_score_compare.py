"""`evaluation.score` and `evaluation.compare` through their command lines: reports, verdicts, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from echo_ft.dataset import FORMAT
from echo_ft.records import GOOD, KINDS, EchoError, Prediction, write_jsonl
from evaluation import compare, score

DATA = Path(os.environ.get("ECHO_FT_DATA", "../shared/data")) / "mmad"


def predictions(skill: float, seed: int = 0, images: int = 40) -> list[Prediction]:
    """One run's answers, right with probability `skill`, two questions an image; the questions do not depend on it."""
    luck = random.Random(seed)
    rows = []
    for image in range(images):
        condition = GOOD if image % 2 else "crack"
        for kind in KINDS[:2]:
            options = {"A": "Yes.", "B": "No."} if kind == KINDS[0] else {"A": "Bend.", "B": "Hole.", "C": "Crack."}
            answer = "A" if condition != GOOD else "B"
            parsed = answer if luck.random() < skill else {"A": "B", "B": "A"}[answer]
            probabilities = {letter: 0.7 if letter == parsed else 0.3 / (len(options) - 1) for letter in options}
            rows.append(
                Prediction(
                    f"tile-{image}", f"tile-{image}/{kind}", "tiles",
                    f"product {image % 3}", f"part {image}",
                    f"{image}.png", condition, kind, "<b>Is there a defect?</b>",
                    options, answer, parsed, parsed, probabilities,
                )
            )  # fmt: skip
    return rows


def make_run(folder: Path, rows: list[Prediction], **changes: Any) -> Path:
    write_jsonl(folder / "predictions.jsonl", rows)
    run = {
        "dataset": "nowhere",
        "dataset_fingerprint": "f00d",
        "split": "test",
        "base_model": "echo-tiny",
        "adapters": {},
    }
    run |= {"complete": True, "cases": len({row.case for row in rows}), **changes}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def run_command(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def require_self_contained(page: str) -> None:
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|@import|url\(|<script""", page)
    assert "<b>Is there a defect?" not in page, "texts of a run are escaped"


def test_score_of_a_run_writes_the_report_and_prints_the_table(tmp_path: Path) -> None:
    rows = predictions(0.8)
    rows[0] = dataclasses.replace(rows[0], text="I cannot tell", parsed=None)
    rows[2] = dataclasses.replace(rows[2], text="", parsed=None, probabilities=None, error="broken image")
    folder = make_run(tmp_path / "base", rows)
    done = run_command("evaluation.score", folder)
    assert done.returncode == 0, done.stderr
    assert "80 questions about 40 images (20 normal, 20 defective); 1 answers unparsed (1.2 %), 1 failed" in done.stdout
    assert re.search(r"Average +\d+\.\d +\d+\.\d to \d+\.\d ", done.stdout)
    report = json.loads((folder / "report.json").read_text())
    for table in report["tables"].values():
        assert set(table) == {"tiles", "Average"}
        assert list(table["tiles"]) == [*KINDS, "Average"]
    right = sum(row.parsed == row.answer for row in rows if row.kind == KINDS[1])
    assert report["tables"]["strict"]["tiles"][KINDS[1]] == pytest.approx(100 * right / 40)
    assert report["tables"]["strict"]["tiles"][KINDS[2]] is None
    assert report["detection"]["All"]["scored"] == 39
    assert set(report["products"]) == {"tiles/product 0", "tiles/product 1", "tiles/product 2"}
    assert report["provenance"]["dataset_fingerprint"] == "f00d"
    assert re.fullmatch("[0-9a-f]{16}", report["provenance"]["predictions_fingerprint"])
    require_self_contained((folder / "report.html").read_text())
    again = json.loads((folder / "answers.json").read_text())
    assert len(again) == 80 and again[2]["gpt_answer"] == ""


def test_answers_of_a_run_scored_as_a_file_give_the_same_official_table(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "base", predictions(0.6))
    score.main([str(folder)])
    score.main(["--answers", str(folder / "answers.json"), "--output", str(tmp_path / "again")])
    ours, theirs = (json.loads((where / "report.json").read_text()) for where in (folder, tmp_path / "again"))
    assert ours["tables"] == theirs["tables"]
    assert not (tmp_path / "again" / "answers.json").exists()


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
    loco = [row for row in rows if row["image"].startswith("MVTec-LOCO/") and row["question_type"] == KINDS[4]]
    right = sum(row["gpt_answer"] == row["correct_answer"] for row in loco)
    assert report["tables"]["strict"]["MVTec-LOCO"][KINDS[4]] == pytest.approx(100 * right / len(loco))


def test_an_incomplete_run_is_scored_with_a_loud_warning_and_its_cut_line_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "half", predictions(0.8, images=10), complete=False, cases=40)
    with open(folder / "predictions.jsonl", "a") as file:
        file.write('{"case": "tile-1')
    score.main([str(folder)])
    warned = capsys.readouterr().err
    assert "THE RUN IS NOT COMPLETE: 10 of 40 cases" in warned
    assert "cut off where the run stopped" in warned
    assert "THE RUN IS NOT COMPLETE" in (folder / "report.html").read_text()
    assert json.loads((folder / "report.json").read_text())["counts"]["rejected"] == 1


def test_a_run_that_says_it_is_complete_and_lacks_cases_or_questions_is_not_believed(tmp_path: Path) -> None:
    rows = predictions(0.8, images=10)
    assert score.load_run(make_run(tmp_path / "whole", rows, questions=20)).warnings == []
    lost = score.load_run(make_run(tmp_path / "cases", rows, cases=12, questions=24))
    assert "THE RUN IS NOT COMPLETE: 10 of 12 cases" in lost.warnings[0]
    lost = score.load_run(make_run(tmp_path / "questions", rows[:-1], questions=20))
    assert "THE RUN IS NOT COMPLETE: 19 of 20 questions" in lost.warnings[0]


def test_what_the_run_warned_of_stands_in_the_report_and_in_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_run(tmp_path / "base", predictions(0.5))
    tuned = make_run(
        tmp_path / "tuned",
        predictions(0.9),
        adapters={"decision_maker": {"fingerprint": "beef"}},
        warnings=["3 OF 40 PHOTOGRAPHS WERE TRAINED ON"],
        continued_with=[{"warnings": ["3 OF 40 PHOTOGRAPHS WERE TRAINED ON", "another"]}, {"commit": "two"}],
    )
    score.main([str(tuned)])
    assert capsys.readouterr().err.count("3 OF 40 PHOTOGRAPHS WERE TRAINED ON") == 1
    report = json.loads((tuned / "report.json").read_text())
    assert report["warnings"] == ["3 OF 40 PHOTOGRAPHS WERE TRAINED ON", "another"]
    compare.main([str(base), str(tuned)])
    assert "tuned: 3 OF 40 PHOTOGRAPHS WERE TRAINED ON" in capsys.readouterr().err
    comparison = json.loads((tmp_path / "compare" / "comparison.json").read_text())
    for provenance in (report["provenance"], comparison["runs"][1]["provenance"]):
        assert provenance["adapters"]["decision_maker"]["fingerprint"] == "beef"


def test_a_text_with_separators_that_only_unicode_calls_line_ends_is_one_row(tmp_path: Path) -> None:
    rows = predictions(0.8, images=4)
    rows[0] = dataclasses.replace(rows[0], text="A\u2028 or\u2029 B\x85 or\x0b C\x1c", parsed=None)
    folder = make_run(tmp_path / "base", rows)
    assert score.load_run(folder).predictions == rows
    assert "\u2028" in (folder / "predictions.jsonl").read_text(encoding="utf-8"), "rows are written as they are"


def test_defective_images_that_the_official_table_takes_for_normal_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [dataclasses.replace(row, image=f"goodyear/{row.image}") for row in predictions(0.8)]
    score.main([str(make_run(tmp_path / "base", rows))])
    assert "20 defective images have `good` in their path" in capsys.readouterr().err


def test_a_page_shows_the_images_where_the_dataset_is_reachable(tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    (dataset / "manifest.json").write_text(json.dumps({"format": FORMAT, "root": ".", "fingerprint": "f00d"}))
    Image.new("RGB", (32, 32), "red").save(dataset / "0.png")
    (dataset / "1.png").write_text("no image")
    folder = make_run(tmp_path / "base", predictions(0.8, images=2), dataset=str(dataset))
    score.main([str(folder)])
    assert (folder / "report.html").read_text().count("<img ") == 1


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
def test_a_folder_that_is_no_run_is_refused_in_one_sentence(
    tmp_path: Path, prepare: Callable[[Path], Any], message: str
) -> None:
    prepare(tmp_path / "run")
    with pytest.raises(EchoError, match=message):
        score.main([str(tmp_path / "run")])


def test_a_mistake_on_the_command_line_is_one_line_and_exit_status_2(tmp_path: Path) -> None:
    done = run_command("evaluation.score", "--answer", "x.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown option --answer; did you mean 'answers'?\n"
    with pytest.raises(EchoError, match="give the folder of a run, or --answers"):
        score.main([])
    with pytest.raises(EchoError, match="--answers needs --output"):
        score.main(["--answers", "x.json"])
    with pytest.raises(EchoError, match="two or more runs"):
        compare.main([str(tmp_path)])


def test_compare_ends_with_the_verdict_and_writes_beside_the_last_run(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", predictions(0.4, seed=1))
    tuned = make_run(tmp_path / "tuned", random.Random(0).sample(predictions(0.95, seed=2), 80))
    done = run_command("evaluation.compare", base, tuned)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    interval = r"\(95 % interval ([\d.]+) to ([\d.]+)\)"
    found = re.fullmatch(rf"tuned is better than base by [\d.]+ points {interval} on 80 questions of 40 cases", last)
    assert found, last
    comparison = json.loads((tmp_path / "compare" / "comparison.json").read_text())
    averages = [run["figures"]["Average"]["value"] for run in comparison["runs"]]
    difference = comparison["differences"][0]["figures"]["Average"]
    assert difference["difference"] == pytest.approx(averages[1] - averages[0])
    assert 0 < difference["interval"][0] < difference["difference"] < difference["interval"][1]
    assert comparison["differences"][0]["mcnemar"]["All questions"]["p_holm"] < 0.001
    require_self_contained((tmp_path / "compare" / "compare.html").read_text())


def test_compare_figures_are_those_of_score(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, predictions(0.7, seed)) for seed, name in enumerate(["a", "b", "c"])]
    compare.main([*map(str, folders), "--output", str(tmp_path / "out")])
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [one["run"] for one in comparison["differences"]] == ["b", "c"]
    for folder, run in zip(folders, comparison["runs"], strict=True):
        score.main([str(folder)])
        report = json.loads((folder / "report.json").read_text())
        assert run["figures"]["Average"]["value"] == report["tables"]["strict"]["Average"]["Average"]
        assert run["figures"]["Average"]["interval"] == report["intervals"]["strict"]["Average"]["Average"]
        assert run["figures"]["AUROC"]["interval"] == report["detection"]["All"]["intervals"]["auroc"]


def test_a_run_is_not_better_than_its_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make_run(tmp_path / name, predictions(0.7)) for name in ("one", "two")]
    compare.main([*map(str, folders)])
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .startswith("two and one cannot be told apart: the difference is +0.0 points (95 % interval +0.0 to +0.0)")
    )


def test_the_verdict_names_the_worse_run_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make_run(tmp_path / name, predictions(skill)) for name, skill in (("good", 1.0), ("bad", 0.2))]
    compare.main([*map(str, folders)])
    assert "bad is worse than good by " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (predictions(0.5), {"dataset_fingerprint": "beef"}, "dataset_fingerprint differs.*f00d and beef"),
        (predictions(0.5), {"split": "validation"}, "split differs.*test and validation"),
        (predictions(0.5)[:-1], {}, "1 questions are in the first alone and 0 in the second"),
        ([dataclasses.replace(row, answer="B") for row in predictions(0.5)], {}, "the answer of question .* differs"),
    ],
)
def test_runs_that_were_asked_something_else_are_not_compared(
    tmp_path: Path, rows: list[Prediction], changes: dict[str, Any], message: str
) -> None:
    base, other = make_run(tmp_path / "base", predictions(0.5)), make_run(tmp_path / "other", rows, **changes)
    with pytest.raises(EchoError, match=f"base and other cannot be compared: .*{message}"):
        compare.main([str(base), str(other)])


def test_runs_of_one_name_are_told_apart_and_one_run_is_not_compared_with_itself(tmp_path: Path) -> None:
    assert compare.run_names([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    with pytest.raises(EchoError, match="given twice"):
        compare.run_names([tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_compare_logs_its_table_to_an_offline_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [make_run(tmp_path / name, predictions(skill)) for name, skill in (("base", 0.4), ("tuned", 0.9))]
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    compare.main([*map(str, folders), "--report_to", "wandb"])
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
