"""The engine says what asking one question at a time would say."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.evaluation import speed
from benchmarks.evaluation.speed import Plain
from data_prep.build import main as build_main
from echo_ft.data.dataset import load_cases, load_dataset
from echo_ft.experts.pipeline import PipelineConfig, run_cases
from echo_ft.files import read_jsonl
from echo_ft.inference.engine import Engine, ImageFeatureCache
from echo_ft.model.adapters import attach_adapters
from echo_ft.model.loading import load_model, load_processor
from echo_ft.records import ROLES, Prediction
from evaluation.run import main as run_main
from tests.conftest import ROOT, make_case
from tests.support.exchanges import exchanges_of

TILES = Path(os.environ.get("ECHO_FT_DATA", "../shared/data")) / "magnetic_tile"


@pytest.fixture
def exchanges(tmp_path):
    cases = [
        make_case(tmp_path),
        make_case(tmp_path, "line/part/2", ((40, 40), (80, 56), (56, 110)), seed=9),
    ]
    return [exchange for case in cases for exchange in exchanges_of(case)]


def test_every_answer_is_that_of_one_question_at_a_time(model, row_builder, exchanges, tmp_path):
    engine = Engine(model, row_builder, tmp_path, max_new_tokens=12)
    said = engine.generate("decision_maker", exchanges)
    one_at_a_time = Plain(model, row_builder.processor, tmp_path, max_new_tokens=12)
    for exchange, generations in zip(exchanges, said, strict=True):
        for branch, utterance in zip(exchange.branches, generations, strict=True):
            expected = one_at_a_time.ask(exchange, branch)
            assert utterance.text == expected.text
            for letter, value in utterance.letters.items():
                assert math.exp(value) == pytest.approx(math.exp(expected.letters[letter]), abs=1e-5)


def texts(said):
    return [[utterance.text for utterance in generations] for generations in said]


def test_one_answer_token_is_the_first_and_takes_no_step_of_decoding(
    model, row_builder, exchanges, tmp_path, monkeypatch
):
    steps = []
    step = Engine._step
    monkeypatch.setattr(Engine, "_step", lambda self, *inputs: steps.append(1) or step(self, *inputs))
    first = Engine(model, row_builder, tmp_path, max_new_tokens=6, answer_tokens=1)
    answers, steps_of_answers = first.generate("decision_maker", exchanges), len(steps)
    words = first.generate("reasoning_expert", exchanges)
    full = Engine(model, row_builder, tmp_path, max_new_tokens=6).generate("decision_maker", exchanges)
    assert steps_of_answers == 1 < len(steps) - 1
    for short, long in zip(answers, full, strict=True):
        for one, other in zip(short, long, strict=True):
            assert one.letters == pytest.approx(other.letters, abs=1e-6)
            assert other.text.startswith(one.text) and one.text.count(" ") == 0
    assert texts(words) == texts(full) != texts(answers), "what the others say is not cut"


def test_batch_order_and_kept_features_change_nothing(model, row_builder, exchanges, tmp_path, monkeypatch):
    engine = Engine(model, row_builder, tmp_path, max_new_tokens=8)
    together = engine.generate("decision_maker", exchanges)
    again = engine.generate("decision_maker", exchanges)
    one_by_one = [engine.generate("decision_maker", [exchange])[0] for exchange in reversed(exchanges)][::-1]
    monkeypatch.setattr("echo_ft.inference.engine.RECENT_IMAGES", 1)
    small = Engine(model, row_builder, tmp_path, max_new_tokens=8).generate("decision_maker", exchanges)
    for other in (again, one_by_one, small):
        assert texts(other) == texts(together)


@pytest.mark.parametrize("budget", [1, 900, 2500, 10**6])
def test_a_budget_of_tokens_parts_a_batch_and_changes_no_answer(model, row_builder, tmp_path, monkeypatch, budget):
    """Cases of unlike images and numbers of questions: every part is within the budget, or one exchange alone."""
    cases = [
        make_case(tmp_path, f"line/part/{i}", ((60 + 20 * i, 50), (56, 90), (64, 64)), seed=5 * i) for i in range(5)
    ]
    cases[1] = replace(cases[1], seen=replace(cases[1].seen, questions=cases[1].seen.questions[:1]))
    exchanges = [exchange for case in cases for exchange in exchanges_of(case)]
    words = 6
    whole = Engine(model, row_builder, tmp_path, max_new_tokens=words).generate("reasoning_expert", exchanges)
    parts, go_on = [], Engine._decode

    def watched(self, rows, owners, cache, visible, starts, limit):
        said = go_on(self, rows, owners, cache, visible, starts, limit)
        parts.append((rows, len(owners), visible.shape[1]))
        return said

    monkeypatch.setattr(Engine, "_decode", watched)
    engine = Engine(model, row_builder, tmp_path, max_new_tokens=words, max_batch_tokens=budget)
    said = engine.generate("reasoning_expert", exchanges)
    assert texts(said) == texts(whole)
    for one, other in zip(said, whole, strict=True):
        for utterance, expected in zip(one, other, strict=True):
            assert utterance.letters == pytest.approx(expected.letters, abs=1e-5)
    assert [row.exchange for rows, *_ in parts for row in rows] == exchanges
    for rows, branches, prefix in parts:
        longest = max(
            int((row.segments == number).sum()) for row in rows for number in range(1, row.segments.max() + 1)
        )
        assert len(rows) == 1 or branches * (prefix + longest + words) <= budget
    assert (len(parts) == len(exchanges)) if budget == 1 else (len(parts) == 1) == (budget == 10**6)


def test_an_image_is_encoded_once_however_often_it_is_shown(model, row_builder, exchanges, tmp_path, monkeypatch):
    seen = []
    original = model.model.get_image_features
    monkeypatch.setattr(
        model.model,
        "get_image_features",
        lambda pixels, grid, **options: seen.append(len(grid)) or original(pixels, grid, **options),
    )
    engine = Engine(model, row_builder, tmp_path, max_new_tokens=1)
    engine.generate("decision_maker", exchanges)
    engine.generate("reasoning_expert", exchanges)
    assert sum(seen) == len({image for exchange in exchanges for image in exchange.images})


def test_of_shared_features_the_first_that_fit_are_found_by_every_later_engine(
    model, row_builder, exchanges, tmp_path, monkeypatch
):
    """Scans of the same images, one after another, in a store that has room for half of them."""
    monkeypatch.setattr("echo_ft.inference.engine.RECENT_IMAGES", 1)
    looked, open_view = [], Engine._load
    monkeypatch.setattr(Engine, "_load", lambda self, view: looked.append(view) or open_view(self, view))
    count = len({image for exchange in exchanges for image in exchange.images})
    every = ImageFeatureCache(2**30)
    expected = Engine(model, row_builder, tmp_path, max_new_tokens=4, features=every).generate(
        "decision_maker", exchanges
    )
    assert len(looked) == count
    half = ImageFeatureCache(every.size // 2)
    for features, most in ((every, 0), (half, count), (half, count - 2), (half, count - 2)):
        looked.clear()
        engine = Engine(model, row_builder, tmp_path, max_new_tokens=4, features=features)
        said = [engine.generate("decision_maker", [exchange])[0] for exchange in exchanges]
        assert texts(said) == texts(expected) and len(set(looked)) <= most
        assert features.size <= features.most


def test_an_exchange_without_references_can_be_asked(model, row_builder, case, tmp_path):
    engine = Engine(model, row_builder, tmp_path, max_new_tokens=2)
    bare = replace(exchanges_of(case)[-1], images=(case.seen.query,))
    assert len(engine.generate("decision_maker", [bare])[0]) == len(bare.branches)
    assert engine.generate("decision_maker", []) == []


def require_every_answer(folder, recipe, *build):
    """Every question of a recipe's test split, by its run and by one `generate` after another, all four experts each.

    The adapters are the recipe's own, a few steps trained; every question goes through all the experts.
    """
    data, adapters = folder / "data", folder / "adapters"
    settings = yaml.safe_load((ROOT / recipe / "run.yaml").read_text())
    full = ["--routing", "full"]
    build_main(["--config", f"{recipe}/data.yaml", "--output", str(data), *full, *build])
    few = ["--max_steps", "3", "--warmup_steps", "0", "--learning_rate", "2e-4", "--eval_strategy", "no"]
    for role in ROLES:
        trained = [sys.executable, "train/sft.py", "--config", f"{recipe}/{role}.yaml", "--dataset", str(data), *few]
        subprocess.run([*trained, "--output_dir", str(adapters / role)], check=True)
    asked = ["--config", f"{recipe}/run.yaml", "--dataset", str(data), "--adapters", str(adapters), *full]
    run_main([*asked, "--output", str(folder / "run")])
    found = {one.question: one for one in read_jsonl(folder / "run" / "predictions.jsonl", Prediction)}

    dataset, base = load_dataset(data), settings["model_name_or_path"]
    processor = load_processor(base, None, settings["min_pixels"], settings["max_pixels"])
    model = attach_adapters(load_model(base, dtype="float32"), {role: adapters / role for role in ROLES}).eval()
    one_at_a_time = Plain(model, processor, dataset.root, settings["max_new_tokens"])
    said = {}

    def generate(role, exchanges):
        """Every prompt alone; the questions of a case have those of the first two roles in common, asked once."""
        for exchange in exchanges:
            for branch in exchange.branches:
                prompt = role, exchange.images, exchange.context, branch.prompt
                if prompt not in said:
                    (said[prompt],) = one_at_a_time.generate(role, [replace(exchange, branches=(branch,))])[0]
        return [[said[role, one.images, one.context, branch.prompt] for branch in one.branches] for one in exchanges]

    questions = speed.alone(load_cases(dataset, "test"))
    assert len(questions) == len(found)
    letters, greatest = 0, 0.0
    for case in questions:
        (expected,) = run_cases([case], generate, PipelineConfig())[0].predictions
        other = found[expected.question]
        letters += other.parsed == expected.parsed
        differences = [abs(other.probabilities[letter] - value) for letter, value in expected.probabilities.items()]
        greatest = max(greatest, *differences)
    print(f"{recipe}: {letters} of {len(questions)} letters equal, probabilities differ by at most {greatest:.1e}")
    assert letters == len(questions) and greatest < 1e-5


@pytest.mark.slow
def test_every_answer_of_the_demo_is_that_of_one_question_at_a_time(tmp_path):
    require_every_answer(tmp_path, "recipes/tiny")


@pytest.mark.slow
@pytest.mark.real_data
def test_every_answer_about_magnetic_tiles_is_that_of_one_question_at_a_time(tmp_path):
    if not TILES.is_dir():
        pytest.skip(f"no folder {TILES}; set ECHO_FT_DATA")
    require_every_answer(tmp_path, "recipes/magnetic_tile", "--root", str(TILES))
