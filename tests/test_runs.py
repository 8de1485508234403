"""A run's folder: stopped anywhere, gone on with, nothing lost, doubled or mixed."""

from __future__ import annotations

import json

import pytest

from echo_ft.pipeline import Settings, run_cases, run_or_fail
from echo_ft.records import EchoError, Prediction, Trace, read_jsonl
from echo_ft.runs import PREDICTIONS, RUN, TRACES, RunFolder
from tests.conftest import make_case
from tests.test_pipeline import Parrot

PROVENANCE = {"prompt_version": "1", "max_pixels": 100, "adapters": {}}


@pytest.fixture
def cases(tmp_path):
    return [make_case(tmp_path / "images", f"line/part/{index}") for index in range(4)]


def run(folder, cases, provenance=PROVENANCE, stop_after=99):
    opened = RunFolder(folder, provenance, cases)
    for case in [case for case in cases if case.id not in opened.done][:stop_after]:
        opened.write(case, run_cases([case], Parrot(), Settings())[0])
    opened.finish(complete=len(opened.done) == len(cases))
    return opened


def content(folder):
    return {name: (folder / name).read_bytes() for name in (PREDICTIONS, TRACES, RUN)}


@pytest.mark.parametrize("cut", [1, 37, 400, 2500])
def test_a_run_that_was_cut_anywhere_ends_like_an_uninterrupted_one(tmp_path, cases, cut):
    run(tmp_path / "whole", cases)
    run(tmp_path / "cut", cases, stop_after=2)
    for name in (PREDICTIONS, TRACES):  # as a kill in the middle of a write would leave it
        path = tmp_path / "cut" / name
        path.write_bytes(path.read_bytes()[:-cut])
    assert json.loads((tmp_path / "cut" / RUN).read_text())["complete"] is False
    run(tmp_path / "cut", cases)
    for name, expected in content(tmp_path / "whole").items():
        assert sorted(content(tmp_path / "cut")[name].splitlines()) == sorted(expected.splitlines())


def test_a_finished_run_is_left_as_it_is(tmp_path, cases):
    run(tmp_path / "run", cases)
    before = content(tmp_path / "run")
    assert len(run(tmp_path / "run", cases).done) == 4
    assert content(tmp_path / "run") == before
    assert len(list(read_jsonl(tmp_path / "run" / PREDICTIONS, Prediction))) == 28
    assert len(list(read_jsonl(tmp_path / "run" / TRACES, Trace))) == 4 * 17


def test_another_run_in_the_same_folder_is_refused_by_the_name_of_what_differs(tmp_path, cases):
    run(tmp_path / "run", cases, stop_after=1)
    with pytest.raises(EchoError, match="max_pixels is 100, not 200"):
        run(tmp_path / "run", cases, {**PROVENANCE, "max_pixels": 200})
    with pytest.raises(EchoError, match="cases is 4, not 3"):
        run(tmp_path / "run", cases[:3])


def test_a_folder_that_holds_something_else_is_not_touched(tmp_path, cases):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(EchoError, match="holds no run"):
        run(tmp_path / "mine", cases)


def test_a_case_that_failed_is_asked_again_when_its_image_is_back(tmp_path, cases):
    opened = RunFolder(tmp_path / "run", PROVENANCE, cases)
    broken = Parrot(broken=cases[1].seen.query)
    for case, outcome in zip(cases, run_or_fail(cases, broken, Settings()), strict=True):
        opened.write(case, outcome)
    assert cases[1].id not in run(tmp_path / "run", cases, stop_after=0).done
    run(tmp_path / "run", cases)
    rows = list(read_jsonl(tmp_path / "run" / PREDICTIONS, Prediction))
    assert len(rows) == 28 and all(row.error is None for row in rows)


def test_a_kill_before_run_json_was_written_does_not_block_the_folder(tmp_path, cases):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json.partial").write_text("{")
    assert len(run(tmp_path / "run", cases).done) == 4
