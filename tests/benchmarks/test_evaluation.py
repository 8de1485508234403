"""The evaluation benchmarks compare methods that do the same work and give the same answers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from benchmarks.evaluation import certificates, late_adapters, overhead, small_cnn, speed
from data_prep.build import build
from echo_ft.data.dataset import load_dataset
from echo_ft.experts.pipeline import PipelineConfig, run_cases
from echo_ft.files import read_jsonl
from echo_ft.images.decode import load_image
from echo_ft.inference.engine import Engine
from echo_ft.inference.run_folder import PREDICTIONS, RUN_DESCRIPTION
from echo_ft.model.adapters import attach_adapters
from echo_ft.model.loading import load_model
from echo_ft.records import ROLES, Prediction
from tests.conftest import ECHO_TINY, ROOT, make_case, make_dataset, random_adapters
from tests.support.drawn_manifest import draw_manifest, edit_rows, make_config
from tests.support.models import small_config

MAX_NEW_TOKENS = 5


@pytest.fixture
def cases(tmp_path):
    return [make_case(tmp_path, f"line/part/{index}", seed=index) for index in range(2)]


def test_plain_transformers_and_the_engine_give_the_same_answers(model, row_builder, cases, tmp_path):
    engine = Engine(model, row_builder, tmp_path, MAX_NEW_TOKENS)
    found = speed.answers(run_cases(cases, engine.generate, PipelineConfig()))
    plain = speed.Plain(model, row_builder.processor, tmp_path, MAX_NEW_TOKENS)
    single = speed.split_by_question(cases[:1])
    assert [len(case.seen.questions) for case in single] == [1] * 7
    expected = speed.answers([run_cases([case], plain.generate, PipelineConfig())[0] for case in single])
    assert len(expected) == 7
    assert speed.require_same_answers(expected, found) < 1e-5
    question, (_, probabilities) = next(iter(expected.items()))
    with pytest.raises(SystemExit, match=f"{question}: found 'Z'"):
        speed.require_same_answers({question: ("Z", probabilities)}, found)


@pytest.mark.parametrize("start", ["prefix", "branch", "answer"])
def test_plain_transformers_and_the_engine_switch_adapters_on_at_the_same_token(row_builder, cases, tmp_path, start):
    folder = random_adapters(
        tmp_path / "adapters", make_dataset(tmp_path / "data", 1, 1, 1), adapt_from=dict.fromkeys(ROLES, start)
    )
    model = attach_adapters(load_model(str(ECHO_TINY), dtype="float32"), {role: folder / role for role in ROLES})
    few = [replace(cases[0], seen=replace(cases[0].seen, questions=cases[0].seen.questions[:2]))]
    engine = Engine(model, row_builder, tmp_path, MAX_NEW_TOKENS)
    found = speed.answers(run_cases(few, engine.generate, PipelineConfig()))
    plain = late_adapters.PlainLate(model, row_builder, tmp_path, start, MAX_NEW_TOKENS)
    expected = speed.answers(run_cases(few, plain.generate, PipelineConfig()))
    assert speed.require_same_answers(expected, found) < 1e-5
    other = {"prefix": "branch", "branch": "answer", "answer": "prefix"}[start]
    elsewhere = late_adapters.PlainLate(model, row_builder, tmp_path, other, MAX_NEW_TOKENS)
    differs = speed.answers(run_cases(few, elsewhere.generate, PipelineConfig()))
    assert differs != expected, "where the adapter acts matters"


def test_rates_of_late_adapters_are_relative_to_prefix():
    rates = {"prefix": [1.0, 2.0, 3.0], "branch": [2.0, 6.0, 3.0]}
    assert late_adapters.table(rates).splitlines()[3] == "| branch | 3.00 (2.00 to 6.00) | 1.50 (1.00 to 3.00) |"


@pytest.mark.slow
def test_late_adapters_are_measured_at_other_widths(tmp_path, monkeypatch, capsys):
    config = small_config()
    config.text_config.vocab_size = 4096
    config.save_pretrained(tmp_path / "config")
    monkeypatch.setitem(late_adapters.WIDTHS, "2b", str(tmp_path / "config"))
    for module in (late_adapters, speed):
        monkeypatch.setattr(module, "SIDE", 56)
    options = "--widths 2b --layers 2 --cases 1 --plain_cases 1 --runs 1 --max_new_tokens 1 --references 1 --stored"
    monkeypatch.setattr(sys, "argv", ["late_adapters", *options.split()])
    monkeypatch.chdir(ROOT)
    late_adapters.main()
    printed = capsys.readouterr().out
    assert [row.split(" | ")[0] for row in printed.splitlines()[-5:-2]] == ["| prefix", "| branch", "| answer"]
    assert "Plain transformers gives the same answers." in printed


def test_looks_are_counted_once_for_all_roles_that_share_them(cases, tmp_path):
    """Without references, all exchanges of a case show the same image."""
    alone = [late_adapters.with_references(cases[0], 0)]
    exchanges = late_adapters.spoken_exchanges(alone[0])
    assert len(exchanges) > 2
    work = late_adapters.count_operations(str(ECHO_TINY), tmp_path, alone)
    assert work.repeats == pytest.approx((len(exchanges) - 1) * work.looks)
    assert min(work.images, work.looks, work.rest) > 0
    more = late_adapters.count_operations(str(ECHO_TINY), tmp_path, cases[:1])
    assert more.looks > 2 * work.looks, "the extractor sees more images than the others"
    row = late_adapters.count_table({"tiny": work}).splitlines()[2].split(" | ")
    assert float(row[-1].strip(" |")) == pytest.approx(1 + work.repeats / (work.looks + work.rest), abs=0.006)


def test_the_ideal_repeats_the_computation_of_the_engine(model, row_builder, cases, tmp_path):
    outputs = []

    def generate(role, exchanges):
        with speed.recorded(model) as first:
            outputs.append(engine.generate(role, exchanges))
        with speed.recorded(model) as second:
            assert speed.replay(model, first) > 0
        assert [name for name, _ in second] == [name for name, _ in first if name != "cache"]
        heads = [[args[0] for name, (args, _) in events if name == "head"] for events in (no_cache(first), second)]
        assert len(heads[0]) == len(heads[1]) > 0
        assert all(torch.equal(one, other) for one, other in zip(*heads, strict=True))
        return outputs[-1]

    def no_cache(events):
        return [event for event in events if event[0] != "cache"]

    engine = Engine(model, row_builder, tmp_path, MAX_NEW_TOKENS)
    run_cases(cases, generate, PipelineConfig())
    assert len(outputs) == 4
    assert "forward" not in vars(model.model), "recording has ended"


def test_the_table_shows_medians_relative_to_question_by_question():
    rates = {
        "question by question": [1.0, 2.0, 9.0],
        "case by case": [4.0],
        "engine": [20.0, 24.0, 10.0],
        "ideal": [25.0],
    }
    rows = [line.split(" | ") for line in speed.table(rates).splitlines()[2:]]
    assert rows[0][1] == "2.00 (1.00 to 9.00)"
    assert [row[2] for row in rows] == ["1.0", "2.0", "10.0", "12.5"]
    assert rows[2][3] == "0.80 |"


@pytest.mark.parametrize("server", [False, True])
def test_the_overhead_covers_whole_runs(tmp_path, server):
    cases = overhead.make_cases(20, 5)
    seconds, early, late = overhead.measure(tmp_path / "run", cases, 8, server)
    assert json.loads((tmp_path / "run" / RUN_DESCRIPTION).read_text())["complete"]
    assert len(list(read_jsonl(tmp_path / "run" / PREDICTIONS, Prediction))) == 100
    assert seconds > 0
    assert 0 < early <= 2 * late


def test_the_true_shares_of_a_factory_agree_with_its_parts():
    assert certificates.flagged_share(1.0, (1, 1)) == pytest.approx(norm.sf(1.0))
    threshold = certificates.threshold_with(0.05, (1, 6))
    drawn = certificates.part_scores(np.random.default_rng(0), 1, 200_000, (1, 6))
    assert (drawn >= threshold).mean() == pytest.approx(0.05, abs=0.0015)


def test_wrong_verdicts_are_rare_and_the_simulation_sees_them():
    (near,) = certificates.simulate(certificates.Factory(150, (1, 6), chosen=False), [(1.02, 0.1)], 1000)
    assert 0.015 < near.wrongly_passed == near.passed <= 0.05
    good, bad = certificates.simulate(certificates.Factory(150, (1, 1), chosen=True), [(0.3, 0.3), (2.0, 2.0)], 100)
    assert good.passed > 0.7
    assert good.wrongly_passed <= 0.05
    assert bad.passed == 0


def test_a_small_network_sees_the_pixels_of_the_recipes(tmp_path):
    build(make_config(draw_manifest(tmp_path / "images", ("cap",), normals=6, defects=3), tmp_path / "data"))
    sample = small_cnn.load_samples(load_dataset(tmp_path / "data"), "train")[0]
    image = load_image(tmp_path / "images" / sample.case.seen.query)
    assert sample.pixels.shape == (3, 112, 140)
    resized = np.asarray(image.resize((140, 112), Image.Resampling.BICUBIC)) / 255
    deviation = np.array(OPENAI_CLIP_STD)[:, None, None]
    found = sample.pixels.numpy() * deviation + np.array(OPENAI_CLIP_MEAN)[:, None, None]
    assert np.abs(found - resized.transpose(2, 0, 1)).max() < 0.01
    assert sample.marks.shape == (28, 35)


def test_a_small_network_finds_a_plain_defect_and_repeats_with_its_seed(tmp_path, monkeypatch, capsys):
    build(make_config(draw_manifest(tmp_path / "images", ("cap",), normals=16, defects=8), tmp_path / "data"))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["small_cnn", str(tmp_path / "data"), "--seeds", "1", "--epochs", "8"])
    small_cnn.main()
    table = capsys.readouterr().out.splitlines()
    value = table[2].split(" | ")[2].split()[0]
    assert float(value) > 0.9
    assert table[-1] == f"Test AUROC: mean {value}, from {value} to {value}"
    dataset = load_dataset(tmp_path / "data")
    samples, validation = (small_cnn.load_samples(dataset, split) for split in ("train", "validation"))
    networks = [small_cnn.train(samples, validation, 1, seed)[0] for seed in (1, 1, 2)]
    first, same, other = (small_cnn.score(network, validation) for network in networks)
    assert (first == same).all()
    assert (first != other).any()


def test_a_small_network_needs_masks(tmp_path, monkeypatch):
    manifest = draw_manifest(tmp_path / "images", ("cap",), normals=6, defects=3)
    edit_rows(manifest, lambda row: row.pop("mask", None))
    build(make_config(manifest, tmp_path / "data"))
    monkeypatch.setattr(sys, "argv", ["small_cnn", str(tmp_path / "data")])
    with pytest.raises(SystemExit, match="needs good and defective images in each split, and masks"):
        small_cnn.main()
