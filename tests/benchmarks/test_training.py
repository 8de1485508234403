"""The training benchmark gives every trainer the same rows and counts their work correctly.

The environments of the other trainers are not needed.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from benchmarks.training import __main__ as benchmark
from benchmarks.training.measurement import work
from benchmarks.training.other_trainers import copy_with_budget, write_rows
from benchmarks.training.workload import Workload, make_exchanges
from echo_ft.model.loading import load_processor
from echo_ft.model.rows import IGNORED, RowBuilder
from tests.conftest import ROOT

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
        assert made["image_grid_thw"].tolist() == ours.grids.tolist() == [[1, 32, 32]] * 2
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


def test_trainer_and_ideal_loop_agree_on_random_weights(tmp_path):
    """The GPU benchmark does the same at the true sizes."""
    from benchmarks.training.contender import echo_ft_trainer, ideal
    from tests.support.models import small_config

    config = small_config()
    config.text_config.vocab_size = 4096  # the size of echo-tiny's vocabulary
    config.save_pretrained(tmp_path / "config")
    model = benchmark.random_model(str(tmp_path / "config"), tmp_path / "model")
    workload = Workload(4, 5, 2, model=model, side=56)
    trained = echo_ft_trainer(tmp_path, workload, stored=False)
    loop = ideal(tmp_path, workload, stored=False)
    assert trained.losses[0] == pytest.approx(loop.losses[0], rel=1e-4)
    assert trained.work == loop.work
    assert trained.work["operations"] > 0
