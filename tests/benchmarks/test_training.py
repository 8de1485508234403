"""The training benchmark gives every trainer the same rows and counts their work correctly.

These tests do not need the environments of the other trainers.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from benchmarks.training import __main__ as benchmark
from benchmarks.training import roles
from benchmarks.training.measurement import TURN, Steps, work
from benchmarks.training.other_trainers import copy_with_budget, write_rows
from benchmarks.training.turns import take_turns
from benchmarks.training.workload import Workload, make_exchanges
from echo_ft.model.loading import load_processor
from echo_ft.model.rows import IGNORED, RowBuilder
from echo_ft.records import ROLES
from tests.conftest import ROOT
from tests.support.models import small_config

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize("questions", [1, 5])
def test_rows_for_other_trainers_have_the_same_tokens_and_questions(tmp_path, monkeypatch, questions):
    monkeypatch.chdir(ROOT)
    workload = Workload(2, questions, 1)
    rows = [json.loads(line) for line in write_rows(tmp_path, workload).read_text().splitlines()]
    theirs = AutoProcessor.from_pretrained(copy_with_budget(tmp_path, workload))
    row_builder = RowBuilder(load_processor(workload.model, None, workload.pixels, workload.pixels))
    single_questions = [
        dataclasses.replace(exchange, branches=(branch,))
        for exchange in make_exchanges(tmp_path, workload)
        for branch in exchange.branches
    ]
    assert len(rows) == len(single_questions) == 2 * questions
    for row, exchange in zip(rows, single_questions, strict=True):
        question, answer = (message["content"] for message in row["messages"])
        # The template that LLaMA-Factory and ms-swift call qwen2_vl.
        text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        text += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompt, whole = (part.replace("<image>", IMAGE) for part in (text, f"{text}{answer}<|im_end|>\n"))
        made = theirs(text=[whole], images=[Image.open(path) for path in row["images"]], return_tensors="np")
        ours = row_builder.load_row(exchange, tmp_path)
        assert made["image_grid_thw"].tolist() == ours.grids.tolist() == [[1, 64, 64]] * 2
        assert made["input_ids"][0].tolist() == ours.input_ids.tolist()
        assert theirs.tokenizer.decode(ours.labels[ours.labels != IGNORED]) == whole.removeprefix(prompt)


@pytest.mark.parametrize("questions", [1, 2, 5])
def test_a_step_has_a_fixed_number_of_questions(questions):
    workload = Workload(20, questions, 1)
    assert workload.cases_per_step * questions == workload.rows
    assert workload.steps_per_epoch * workload.rows == 20 * questions


def test_the_work_of_a_batch_excludes_padding():
    batch = {
        "input_ids": torch.zeros(2, 4),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
        "labels": torch.tensor([[-100, 7, 8, -100], [-100, 7, -100, -100]]),
        "pixel_values": torch.zeros(6, 3),
    }
    assert work(batch) == {"patches": 6, "tokens": 5, "labels": 3}
    del batch["attention_mask"]
    assert work(batch)["tokens"] == 8


@pytest.mark.parametrize(
    ("options", "named"), [(["--questions", "3"], "3"), (["--cases", "7", "--questions", "1"], "7")]
)
def test_a_workload_without_whole_steps_is_refused(monkeypatch, capsys, options, named):
    monkeypatch.setattr(sys, "argv", ["benchmarks.training", *options])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert f"{options[0]} {named}" in capsys.readouterr().err


def test_a_missing_gpu_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks.training", "--gpu"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "--gpu: torch finds no GPU" in capsys.readouterr().err


def test_the_table_is_relative_to_the_fastest_other_trainer():
    run = {"losses": [1.0, 0.5], "patches": 1, "tokens": 2, "labels": 3, "peak_mib": 4.0, "versions": {"torch": "2"}}
    run |= {"operations": 1e12, "device": "NVIDIA H200", "precision": "bfloat16"}
    rates = {
        ("trl", "computed"): 5.0,
        ("ms-swift", "computed"): 8.0,
        ("echo-ft", "computed"): 40.0,
        ("ideal", "computed"): 50.0,
    }
    text = benchmark.table({name: [run | {"rate": rate}] for name, rate in rates.items()}, rows=10)
    ratios = {line.split(" | ")[0].strip("| "): line.split(" | ")[3] for line in text.splitlines()[2:6]}
    assert ratios == {"trl": "0.62", "ms-swift": "1.00", "echo-ft": "5.00", "ideal": "6.25"}
    # A step of ten questions takes 1e12 operations. At 40 questions/s, that is 4e12 of the GPU's 989e12 per second.
    assert "| 4 (MFU 0.004) |" in text
    assert "\n\nNVIDIA H200, bfloat16\n" in text


def test_ratios_are_given_with_the_spread_of_runs_in_turn():
    run = {"losses": [1.0, 0.5], "patches": 1, "tokens": 2, "labels": 3, "peak_mib": 4.0, "versions": {"torch": "2"}}
    run |= {"operations": 1e12, "device": "CPU", "precision": "float32"}
    rates = {("trl", "computed"): [0.1, 0.2, 0.1], ("echo-ft", "computed"): [0.5, 0.8, 0.4]}
    text = benchmark.table({name: [run | {"rate": rate} for rate in each] for name, each in rates.items()}, rows=5)
    cells = text.splitlines()[3].split(" | ")
    assert cells[2:4] == ["0.500 (0.400 to 0.800)", "5.00 (4.00 to 5.00)"]


COUNTING = """
import json, sys
log, name, turn, steps = sys.argv[1:]
with open(log, "a") as file:
    for step in range(int(steps)):
        print("other output")
        print(name, file=file, flush=True)
        print(turn, flush=True)
        sys.stdin.readline()
print(json.dumps({"seconds": [1.0] + [0.5] * (int(steps) - 2), "name": name}))
"""


def test_contenders_take_turns_after_every_step(tmp_path):
    log = tmp_path / "log"
    commands = {(name, "computed"): [sys.executable, "-c", COUNTING, str(log), name, TURN, "4"] for name in "ab"}
    found = take_turns(commands, steps=4, counted=2, rows=5, folder=tmp_path)
    assert log.read_text().split() == ["a", "b"] * 4
    assert {key: [run["name"] for run in runs] for key, runs in found.items()} == {
        ("a", "computed"): ["a", "a"],
        ("b", "computed"): ["b", "b"],
    }
    assert [run["rate"] for run in found["a", "computed"]] == [10.0, 10.0]


def test_a_contender_that_fails_ends_the_benchmark_with_its_output(tmp_path):
    commands = {("a", "computed"): [sys.executable, "-c", "raise ValueError('no such model')"]}
    with pytest.raises(SystemExit, match="no such model"):
        take_turns(commands, steps=2, counted=1, rows=5, folder=tmp_path)


def test_waiting_for_a_turn_is_not_part_of_a_step(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    times = iter([1.0, 10.0, 12.0, 20.0])
    monkeypatch.setattr("benchmarks.training.measurement.time.perf_counter", lambda: next(times))
    steps = Steps(turns=True)
    steps.end_step()
    steps.end_step()
    assert steps.seconds == [2.0]
    monkeypatch.setattr("benchmarks.training.measurement.time.perf_counter", lambda: 0.0)
    with pytest.raises(SystemExit):
        steps.end_step()  # nobody answers any more


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--widths", "2b", "--gpu"], "--widths compares only TRL and this project on a CPU"),
        (["--layers", "2"], "--layers 2 needs random weights"),
    ],
)
def test_options_that_do_not_go_together_are_refused(monkeypatch, capsys, options, named):
    monkeypatch.setattr(sys, "argv", ["benchmarks.training", *options])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert named in capsys.readouterr().err


def test_true_widths_have_fewer_steps_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks.training", "--widths", "2b", "--layers", "2", "--steps", "3"])
    options = benchmark.parse_options()
    assert (options.model, options.layers) == ("Qwen/Qwen2-VL-2B-Instruct", 2)
    assert (options.cases, options.rows, options.steps) == (2, 5, 3)


def small_random_model(folder, layers=None):
    """A small Qwen2-VL with random weights and echo-tiny's vocabulary."""
    config = small_config()
    config.text_config.vocab_size = 4096
    config.save_pretrained(folder / "config")
    return benchmark.random_model(str(folder / "config"), folder / "model", layers)


def test_the_benchmark_leaves_the_gpu_to_the_trainers_and_shows_them_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    allocated = torch.cuda.memory_reserved()
    model = small_random_model(tmp_path)
    assert torch.cuda.memory_reserved() == allocated
    seen = []
    monkeypatch.setattr(benchmark, "random_model", lambda *_: model)
    monkeypatch.setattr(benchmark, "measure_runs", lambda *_: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setattr(benchmark, "table", lambda *_: "")
    monkeypatch.setattr(sys, "argv", ["benchmarks.training", "--gpu", "--model", str(tmp_path / "config")])
    for given in ("2,3", "1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        benchmark.main()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    benchmark.main()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert seen == ["2", "1", "0"]


def test_a_model_of_fewer_layers_keeps_its_widths(tmp_path):
    config = AutoConfig.from_pretrained(small_random_model(tmp_path, layers=2))
    assert (config.text_config.num_hidden_layers, config.vision_config.depth) == (2, 2)
    assert (config.text_config.hidden_size, config.vision_config.embed_dim) == (192, 128)


def test_trl_at_the_labels_gives_the_losses_of_stock_trl(tmp_path, monkeypatch):
    from trl.trainer import utils

    from benchmarks.training.contender import trl_at_labels, trl_stock

    monkeypatch.setattr(utils, "_use_triton", utils._use_triton)  # restored at the end
    scored = []
    apply = utils._ChunkedLogProbFunction.apply

    def recorded(hidden, *arguments):
        scored.append(len(hidden))
        return apply(hidden, *arguments)

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", recorded)
    workload = Workload(1, 2, 2, model=small_random_model(tmp_path), rows=2, side=56)
    stock = trl_stock(tmp_path, workload, stored=False)
    at_labels = trl_at_labels(tmp_path, workload, stored=False)
    assert at_labels.losses == pytest.approx(stock.losses, rel=1e-4)
    assert at_labels.work == stock.work
    # Stock TRL scores every position except the last in its two rows; the other trainer scores only the labels.
    assert scored == [stock.work["tokens"] - 2] * 2 + [stock.work["labels"]] * 2


@pytest.mark.slow
def test_the_comparison_at_other_widths_prints_one_table(tmp_path, monkeypatch, capsys):
    small_random_model(tmp_path)
    monkeypatch.setitem(benchmark.WIDTHS, "2b", str(tmp_path / "config"))
    options = ["--widths", "2b", "--layers", "2", "--side", "112", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["benchmarks.training", *options])
    monkeypatch.chdir(ROOT)
    benchmark.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip("| ") for row in rows] == ["trl", "trl-labels", "echo-ft", "echo-ft"]
    assert len({row[4].split(",")[0] for row in rows}) == 1  # the first loss
    patches, tokens, labels = zip(*(map(int, row[5].split(", ")) for row in rows), strict=True)
    assert patches == (640, 640, 128, 0)
    assert tokens[0] == tokens[1] > 2 * tokens[2]
    assert tokens[2] == tokens[3]
    assert len(set(labels)) == 1


def test_runs_of_a_role_train_the_same_tokens_wherever_the_adapter_acts(tmp_path):
    from benchmarks.training.contender import echo_ft_trainer, trl_stock

    base = Workload(2, 5, 1, model=small_random_model(tmp_path), side=56)
    for role, labels in (("knowledge_guide", 2), ("decision_maker", 10)):
        found = {
            start: echo_ft_trainer(tmp_path, dataclasses.replace(base, role=role, adapt_from=start), stored=False)
            for start in ("prefix", "branch", "answer")
        }
        # A new adapter changes nothing, so the first loss does not depend on where it acts.
        assert len({round(steps.losses[0], 4) for steps in found.values()}) == 1
        work = {start: steps.work.pop("operations") for start, steps in found.items()}
        assert work["prefix"] > work["branch"] > work["answer"]
        assert found["prefix"].work == found["branch"].work == found["answer"].work
        assert found["prefix"].work["labels"] % labels == 0
        stock = trl_stock(tmp_path, dataclasses.replace(base, role=role), stored=False)
        assert stock.losses[0] == pytest.approx(found["prefix"].losses[0], abs=1e-3)
        assert stock.work["labels"] == found["prefix"].work["labels"]
        assert len(make_exchanges(tmp_path, dataclasses.replace(base, role=role))[0].branches) == labels // 2


def test_the_steps_of_all_roles_are_added_and_compared_turn_by_turn(tmp_path, monkeypatch):
    steps = {"prefix": [9.0, 4.0, 2.0, 3.0], "branch": [9.0, 1.0, 1.0, 2.0], "answer": [9.0, 3.0, 3.0, 3.0]}

    def measured(command, name, features, folder, workload):
        found = {"cpu_seconds": steps[workload.adapt_from], "peak_mib": len(workload.role), "losses": [0.5, 9.0]}
        return found if name == "trl" else {**found, "operations": 2e11}

    monkeypatch.setattr(roles, "measure", measured)
    found = roles.measure_roles(tmp_path, Workload(2, 5, 3), trl=True)
    assert found["branch"] == roles.Training(4 * 1.0, len("reference_extractor"), 8e11, 2.0)
    assert found["branch, role: all"] == roles.Training(1.0, len("all"), 2e11, 0.5)
    slow = roles.Training(20.0, 1.0, 8e11, 2.0)
    runs = {"prefix": [found["prefix"], slow], "branch": [found["branch"]] * 2, "trl": [found["trl"]] * 2}
    branch, trl = roles.table(runs).splitlines()[3:]
    assert branch == "| branch | 4.00 (4.00 to 4.00) | 4.00 (3.00 to 5.00) | 2.000 | 0.800 | 19 |"
    assert trl.endswith("| 2.000 |  | 19 |")
    few = roles.measure_roles(tmp_path, Workload(2, 5, 3), separate=["prefix"])
    assert list(few) == ["prefix", *roles.TOGETHER]


def test_counted_operations_are_those_that_the_trainer_reports(tmp_path):
    from benchmarks.training.contender import echo_ft_trainer

    model = small_random_model(tmp_path)
    workload = Workload(1, 2, 1, model=model, rows=2, side=56)
    counted = roles.count_operations(model, workload, tmp_path)
    late = dataclasses.replace(workload, adapt_from="branch")
    together, *alone = (
        echo_ft_trainer(tmp_path, dataclasses.replace(late, role=role), stored=False).work["operations"]
        for role in ("all", *ROLES)
    )
    assert counted["branch"][0] == pytest.approx(sum(alone))
    assert counted["branch, role: all"][0] == pytest.approx(together)
    assert counted["prefix"][1] > counted["branch"][1] > counted["answer"][1]
    computed, stored = counted["branch"]
    row = roles.count_table({"small": counted}).splitlines()[3].split(" | ")
    assert float(row[3]) == pytest.approx(counted["prefix"][0] / computed, abs=0.005)
    assert float(row[5].strip(" |")) == pytest.approx(counted["prefix"][1] / stored, abs=0.005)


def test_trainer_and_ideal_loop_agree_on_random_weights(tmp_path):
    """The GPU benchmark does the same at real model size."""
    from benchmarks.training.contender import echo_ft_trainer, ideal

    workload = Workload(4, 5, 2, model=small_random_model(tmp_path), side=56)
    trained = echo_ft_trainer(tmp_path, workload, stored=False)
    loop = ideal(tmp_path, workload, stored=False)
    assert trained.losses[0] == pytest.approx(loop.losses[0], rel=1e-4)
    assert trained.work == loop.work
    assert trained.work["operations"] > 0
