"""What the evaluation's benchmarks compare is the same work with the same answers."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.evaluation import overhead, speed
from echo_ft.experts.pipeline import PipelineConfig, run_cases
from echo_ft.files import read_jsonl
from echo_ft.inference.engine import Engine
from echo_ft.inference.run_folder import PREDICTIONS, RUN_DESCRIPTION
from echo_ft.records import Prediction
from tests.conftest import make_case

WORDS = 5


@pytest.fixture
def cases(tmp_path):
    return [make_case(tmp_path, f"line/part/{index}", seed=index) for index in range(2)]


def test_one_question_at_a_time_and_the_engine_answer_alike(model, row_builder, cases, tmp_path):
    engine = Engine(model, row_builder, tmp_path, WORDS)
    found = speed.answers(run_cases(cases, engine.generate, PipelineConfig()))
    plain = speed.Plain(model, row_builder.processor, tmp_path, WORDS)
    alone = speed.alone(cases[:1])
    assert len(alone) == 7 and all(len(case.seen.questions) == 1 for case in alone)
    expected = speed.answers([run_cases([case], plain.generate, PipelineConfig())[0] for case in alone])
    assert len(expected) == 7 and speed.require_the_same(expected, found) < 1e-5
    question, (_, probabilities) = next(iter(expected.items()))
    with pytest.raises(SystemExit, match=f"{question}: 'Z' here"):
        speed.require_the_same({question: ("Z", probabilities)}, found)


def test_the_ideal_computes_what_the_engine_computes(model, row_builder, cases, tmp_path):
    said = []

    def generate(role, exchanges):
        with speed.recorded(model) as first:
            said.append(engine.generate(role, exchanges))
        with speed.recorded(model) as second:
            assert speed.again(model, first) > 0
        assert [name for name, _ in second] == [name for name, _ in first if name != "cache"]
        heads = [[args[0] for name, (args, _) in events if name == "head"] for events in (no_cache(first), second)]
        assert len(heads[0]) == len(heads[1]) > 0
        assert all(torch.equal(one, other) for one, other in zip(*heads, strict=True))
        return said[-1]

    def no_cache(events):
        return [event for event in events if event[0] != "cache"]

    engine = Engine(model, row_builder, tmp_path, WORDS)
    run_cases(cases, generate, PipelineConfig())
    assert len(said) == 4 and "forward" not in vars(model.model), "nothing is recorded any more"


def test_a_table_is_of_medians_and_counts_against_one_question_at_a_time():
    rates = {
        "question by question": [1.0, 2.0, 9.0],
        "case by case": [4.0],
        "engine": [20.0, 24.0, 10.0],
        "ideal": [25.0],
    }
    rows = [line.split(" | ") for line in speed.table(rates).splitlines()[2:]]
    assert rows[0][1] == "2.00 (1.00 to 9.00)"
    assert [row[2] for row in rows] == ["1.0", "2.0", "10.0", "12.5"] and rows[2][3] == "0.80 |"


@pytest.mark.parametrize("later", [False, True])
def test_the_overhead_is_of_whole_runs(tmp_path, later):
    cases = overhead.make_cases(20, 5)
    seconds, early, late = overhead.measure(tmp_path / "run", cases, 8, later)
    assert json.loads((tmp_path / "run" / RUN_DESCRIPTION).read_text())["complete"]
    assert len(list(read_jsonl(tmp_path / "run" / PREDICTIONS, Prediction))) == 100
    assert seconds > 0 and 0 < early <= 2 * late
