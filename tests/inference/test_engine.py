"""The engine gives the same answers as generating one question at a time."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from benchmarks.evaluation.speed import Plain, split_by_question
from data_prep.build import main as build_main
from echo_ft.data.dataset import load_cases, load_dataset
from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import PipelineConfig, run_cases
from echo_ft.files import read_jsonl
from echo_ft.inference.engine import Engine
from echo_ft.model.adapters import attach_adapters, load_to_answer
from echo_ft.model.batches import float32_logits
from echo_ft.model.loading import load_model, load_processor
from echo_ft.model.vision import ImageEncoder, ImageFeatureCache
from echo_ft.records import ROLES, Branch, Prediction
from evaluation.run import main as run_main
from tests.conftest import ECHO_TINY, ROOT, ROUNDING, make_case, make_dataset, random_adapters
from tests.support.exchanges import exchanges_of

TILES = Path(os.environ.get("ECHO_FT_DATA", "../shared/data")) / "magnetic_tile"


@pytest.fixture
def exchanges(tmp_path):
    cases = [
        make_case(tmp_path),
        make_case(tmp_path, "line/part/2", ((40, 40), (80, 56), (56, 110)), seed=9),
    ]
    return [exchange for case in cases for exchange in exchanges_of(case)]


def test_answers_equal_those_of_one_question_at_a_time(model, row_builder, exchanges, tmp_path):
    engine = Engine(model, row_builder, tmp_path, max_new_tokens=12)
    answers = engine.generate("decision_maker", exchanges)
    one_at_a_time = Plain(model, row_builder.processor, tmp_path, max_new_tokens=12)
    for exchange, generations in zip(exchanges, answers, strict=True):
        for branch, generation in zip(exchange.branches, generations, strict=True):
            expected = one_at_a_time.generate_one(exchange, branch)
            assert generation.text == expected.text
            for letter, value in generation.letters.items():
                assert math.exp(value) == pytest.approx(math.exp(expected.letters[letter]), abs=ROUNDING)


def texts(answers):
    return [[generation.text for generation in generations] for generations in answers]


def test_a_single_answer_token_needs_no_decoding_step(model, row_builder, exchanges, tmp_path, monkeypatch):
    steps = []
    step = Engine._step
    monkeypatch.setattr(Engine, "_step", lambda self, *inputs: steps.append(1) or step(self, *inputs))
    first = Engine(model, row_builder, tmp_path, max_new_tokens=6, answer_tokens=1)
    answers = first.generate("decision_maker", exchanges)
    answer_steps = len(steps)
    reasons = first.generate("reasoning_expert", exchanges)
    full = Engine(model, row_builder, tmp_path, max_new_tokens=6).generate("decision_maker", exchanges)
    assert answer_steps == 1 < len(steps) - 1
    for short, long in zip(answers, full, strict=True):
        for one, other in zip(short, long, strict=True):
            assert one.letters == pytest.approx(other.letters, abs=1e-6)
            assert other.text.startswith(one.text)
            assert one.text.count(" ") == 0
    assert texts(reasons) == texts(full) != texts(answers), "outputs of other roles are not truncated"


def test_images_are_encoded_without_the_convolution_and_answers_stay_equal(
    row_builder, exchanges, tmp_path, monkeypatch
):
    """In bfloat16, the patch embedding can be over ten times slower as a convolution than as a matrix product."""
    with monkeypatch.context() as patch:
        patch.setattr("echo_ft.inference.engine.project_patches", lambda model: None)
        convolved = Engine(load_model(str(ECHO_TINY), dtype="float32"), row_builder, tmp_path, max_new_tokens=8)
    expected = convolved.generate("decision_maker", exchanges)

    def fail(*_):
        raise AssertionError("the convolution ran")

    engine = Engine(load_model(str(ECHO_TINY), dtype="float32"), row_builder, tmp_path, max_new_tokens=8)
    monkeypatch.setattr(torch.nn.Conv3d, "_conv_forward", fail)
    found = engine.generate("decision_maker", exchanges)
    assert texts(found) == texts(expected)
    for one, other in zip(found, expected, strict=True):
        for generation, before in zip(one, other, strict=True):
            assert generation.letters == pytest.approx(before.letters, abs=ROUNDING)


def test_a_text_that_ends_at_the_token_limit_is_marked(model, row_builder, exchanges, tmp_path):
    sentence = Branch("sentence", "Describe the difference.")
    exchanges = [replace(one, branches=(*one.branches, sentence)) for one in exchanges]
    whole = Engine(model, row_builder, tmp_path, max_new_tokens=200).generate("reasoning_expert", exchanges)
    short = Engine(model, row_builder, tmp_path, max_new_tokens=4).generate("reasoning_expert", exchanges)
    pairs = [pair for pair in zip(chain(*whole), chain(*short), strict=True) if not pair[0].cut]
    assert {one.cut for _, one in pairs} == {True, False}
    for before, one in pairs:
        assert one.cut == (one.text != before.text)


def test_batches_order_and_cached_features_do_not_change_answers(model, row_builder, exchanges, tmp_path, monkeypatch):
    engine = Engine(model, row_builder, tmp_path, max_new_tokens=8)
    together = engine.generate("decision_maker", exchanges)
    again = engine.generate("decision_maker", exchanges)
    one_by_one = [engine.generate("decision_maker", [exchange])[0] for exchange in reversed(exchanges)][::-1]
    monkeypatch.setattr("echo_ft.model.vision.RECENT_IMAGES", 1)
    small = Engine(model, row_builder, tmp_path, max_new_tokens=8).generate("decision_maker", exchanges)
    for other in (again, one_by_one, small):
        assert texts(other) == texts(together)


@pytest.mark.parametrize("budget", [1, 900, 2500, 10**6])
def test_a_token_budget_splits_batches_and_changes_no_answer(model, row_builder, tmp_path, monkeypatch, budget):
    """Every batch stays within the budget or has a single exchange; cases differ in images and number of questions."""
    cases = [
        make_case(tmp_path, f"line/part/{i}", ((60 + 20 * i, 50), (56, 90), (64, 64)), seed=5 * i) for i in range(5)
    ]
    cases[1] = replace(cases[1], seen=replace(cases[1].seen, questions=cases[1].seen.questions[:1]))
    exchanges = [exchange for case in cases for exchange in exchanges_of(case)]
    limit = 6
    whole = Engine(model, row_builder, tmp_path, max_new_tokens=limit).generate("reasoning_expert", exchanges)
    batches, decode = [], Engine._decode

    def recorded(self, rows, owners, cache, visible, starts, limit):
        batches.append((rows, len(owners), visible.shape[1]))
        return decode(self, rows, owners, cache, visible, starts, limit)

    monkeypatch.setattr(Engine, "_decode", recorded)
    engine = Engine(model, row_builder, tmp_path, max_new_tokens=limit, max_batch_tokens=budget)
    split = engine.generate("reasoning_expert", exchanges)
    assert texts(split) == texts(whole)
    for one, other in zip(split, whole, strict=True):
        for generation, expected in zip(one, other, strict=True):
            assert generation.letters == pytest.approx(expected.letters, abs=ROUNDING)
    assert [row.exchange for rows, *_ in batches for row in rows] == exchanges
    for rows, branches, prefix in batches:
        longest = max(
            int((row.segments == number).sum()) for row in rows for number in range(1, row.segments.max() + 1)
        )
        assert len(rows) == 1 or branches * (prefix + longest + limit) <= budget
    if budget == 1:
        assert len(batches) == len(exchanges)
    else:
        assert (len(batches) == 1) == (budget == 10**6)


def test_an_image_is_encoded_only_once(model, row_builder, exchanges, tmp_path, monkeypatch):
    encoded = []
    original = model.model.get_image_features
    monkeypatch.setattr(
        model.model,
        "get_image_features",
        lambda pixels, grid, **options: encoded.append(len(grid)) or original(pixels, grid, **options),
    )
    engine = Engine(model, row_builder, tmp_path, max_new_tokens=1)
    engine.generate("decision_maker", exchanges)
    engine.generate("reasoning_expert", exchanges)
    assert sum(encoded) == len({image for exchange in exchanges for image in exchange.images})


def test_later_engines_find_the_first_features_that_fit(model, row_builder, exchanges, tmp_path, monkeypatch):
    """Two engines visit the same images one after another; the second engine's cache holds only half of them."""
    monkeypatch.setattr("echo_ft.model.vision.RECENT_IMAGES", 1)
    loaded, load = [], ImageEncoder._load
    monkeypatch.setattr(ImageEncoder, "_load", lambda self, view: loaded.append(view) or load(self, view))
    count = len({image for exchange in exchanges for image in exchange.images})
    full = ImageFeatureCache(2**30)
    expected = Engine(model, row_builder, tmp_path, max_new_tokens=4, features=full).generate(
        "decision_maker", exchanges
    )
    assert len(loaded) == count
    half = ImageFeatureCache(full.used_bytes // 2)
    for features, max_loaded in ((full, 0), (half, count), (half, count - 2), (half, count - 2)):
        loaded.clear()
        engine = Engine(model, row_builder, tmp_path, max_new_tokens=4, features=features)
        answers = [engine.generate("decision_maker", [exchange])[0] for exchange in exchanges]
        assert texts(answers) == texts(expected)
        assert len(set(loaded)) <= max_loaded
        assert features.used_bytes <= features.max_bytes


def test_an_exchange_without_references_is_answered(model, row_builder, case, tmp_path):
    engine = Engine(model, row_builder, tmp_path, max_new_tokens=2)
    no_references = replace(exchanges_of(case)[-1], images=(case.seen.query,))
    assert len(engine.generate("decision_maker", [no_references])[0]) == len(no_references.branches)
    assert engine.generate("decision_maker", []) == []


def require_equal_answers(folder, recipe, *build, tolerance=1e-5):
    """Compare a run on a recipe's test split with one `generate` call per question and expert.

    The adapters are the recipe's, trained for a few steps. Every question consults all experts.
    """
    data, adapters = folder / "data", folder / "adapters"
    recipe_config = yaml.safe_load((ROOT / recipe / "run.yaml").read_text())
    routing = ["--routing", "full"]
    build_main(["--config", f"{recipe}/data.yaml", "--output", str(data), *routing, *build])
    few_steps = ["--max_steps", "3", "--warmup_steps", "0", "--learning_rate", "2e-4", "--eval_strategy", "no"]
    for role in ROLES:
        command = [
            sys.executable,
            "train/sft.py",
            "--config",
            f"{recipe}/{role}.yaml",
            "--dataset",
            str(data),
            *few_steps,
        ]
        subprocess.run([*command, "--output_dir", str(adapters / role)], check=True)
    options = ["--config", f"{recipe}/run.yaml", "--dataset", str(data), "--adapters", str(adapters), *routing]
    run_main([*options, "--output", str(folder / "run")])
    predictions = {one.question: one for one in read_jsonl(folder / "run" / "predictions.jsonl", Prediction)}

    dataset, base = load_dataset(data), recipe_config["model_name_or_path"]
    processor = load_processor(base, None, recipe_config["min_pixels"], recipe_config["max_pixels"])
    model = attach_adapters(load_model(base, dtype="float32"), {role: adapters / role for role in ROLES}).eval()
    one_at_a_time = Plain(model, processor, dataset.root, recipe_config["max_new_tokens"])
    generations = {}

    def generate(role, exchanges):
        """Generate separately for each prompt, but only once for a prompt that several questions of a case share."""
        for exchange in exchanges:
            for branch in exchange.branches:
                prompt = role, exchange.images, exchange.context, branch.prompt
                if prompt not in generations:
                    (generations[prompt],) = one_at_a_time.generate(role, [replace(exchange, branches=(branch,))])[0]
        return [
            [generations[role, one.images, one.context, branch.prompt] for branch in one.branches] for one in exchanges
        ]

    questions = split_by_question(load_cases(dataset, "test"))
    assert len(questions) == len(predictions)
    equal, largest = 0, 0.0
    for case in questions:
        (expected,) = run_cases([case], generate, PipelineConfig())[0].predictions
        found = predictions[expected.question]
        equal += found.parsed == expected.parsed
        differences = [abs(found.probabilities[letter] - value) for letter, value in expected.probabilities.items()]
        largest = max(largest, *differences)
    print(f"{recipe}: {equal} of {len(questions)} letters are equal, probabilities differ by at most {largest:.1e}")
    assert equal == len(questions)
    assert largest < tolerance


@pytest.mark.slow
def test_demo_answers_equal_those_of_one_question_at_a_time(tmp_path):
    require_equal_answers(tmp_path, "recipes/tiny")


@pytest.mark.slow
@pytest.mark.real_data
def test_magnetic_tile_answers_equal_those_of_one_question_at_a_time(tmp_path):
    if not TILES.is_dir():
        pytest.skip(f"no folder {TILES}; set ECHO_FT_DATA")
    # Rounding decides a few answers: plain float32 differs from plain float64 there by as much as from the engine.
    require_equal_answers(tmp_path, "recipes/magnetic_tile", "--root", str(TILES), tolerance=5e-4)


def test_float32_logits_do_not_tie_as_bfloat16_does():
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 40_000, bias=False).to(torch.bfloat16)
    hidden = 6 * torch.randn(32, 64).to(torch.bfloat16)
    expected = hidden.double() @ head.weight.double().t()
    logits = float32_logits(head, hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    letters = logits[:, :5].sort().values
    assert (letters.diff() > 0).all()
    rounded = head(hidden)[:, :200].sort().values
    assert (rounded.diff() == 0).any(), "in bfloat16 there would be ties"


def test_float32_logits_are_those_of_the_active_adapters_own_output_layer():
    torch.manual_seed(0)
    lora = {"r": 2, "target_modules": ["q_proj"]}
    base = load_model(str(ECHO_TINY), None, "bfloat16")
    model = get_peft_model(base, LoraConfig(**lora), adapter_name="plain", autocast_adapter_dtype=False)
    model.add_adapter("own", LoraConfig(**lora, modules_to_save=["lm_head"]), autocast_adapter_dtype=False)
    head = base.lm_head
    own = head.modules_to_save["own"]
    own.weight.data.mul_(2)
    hidden = 3 * torch.randn(32, own.in_features).to(torch.bfloat16)
    for name, layer in (("plain", head.original_module), ("own", own), ("plain", head.original_module)):
        model.set_adapter(name)
        expected = hidden.double() @ layer.weight.double().t()
        torch.testing.assert_close(float32_logits(head, hidden).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("limit", [1, 400, 900])
def test_prefixes_prefill_in_groups_give_the_same_answers(model, row_builder, exchanges, tmp_path, monkeypatch, limit):
    engine = Engine(model, row_builder, tmp_path, max_new_tokens=8)
    together = engine.generate("decision_maker", exchanges)
    groups = []
    prefill = Engine._prefill
    monkeypatch.setattr("echo_ft.inference.engine.PREFILL_TOKENS", limit)
    monkeypatch.setattr(
        Engine, "_prefill", lambda self, rows, some: groups.append(len(rows)) or prefill(self, rows, some)
    )
    grouped = engine.generate("decision_maker", exchanges)
    assert len(groups) > 1
    assert texts(grouped) == texts(together)
    for one, other in zip(grouped, together, strict=True):
        for generation, expected in zip(one, other, strict=True):
            assert generation.letters == pytest.approx(expected.letters, abs=ROUNDING)


def test_out_of_memory_halves_the_budget_and_continues(model, row_builder, exchanges, tmp_path, monkeypatch, capsys):
    engine = Engine(model, row_builder, tmp_path, max_new_tokens=8)
    expected = engine.generate("decision_maker", exchanges)
    prefill = Engine._prefill

    def small_memory(self, rows, features):
        if len(rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(self, rows, features)

    monkeypatch.setattr(Engine, "_prefill", small_memory)
    assert texts(engine.generate("decision_maker", exchanges)) == texts(expected)
    assert engine.max_batch_tokens is not None
    assert "warning: out of memory: max_batch_tokens is now" in capsys.readouterr().err

    monkeypatch.setattr(Engine, "_prefill", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(EchoError, match="does not fit into memory; lower max_pixels"):
        engine.generate("decision_maker", exchanges)


def test_no_cache_of_a_failed_attempt_is_alive_in_the_next(model, row_builder, exchanges, tmp_path, monkeypatch):
    """On a GPU, the cache of the whole batch would fill the memory that its halves need."""
    failed, alive = [], []

    def out_of_memory(self, rows, owners, cache, *_):
        gc.collect()
        alive.append(sum(one() is not None for one in failed))
        failed.append(weakref.ref(cache))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Engine, "_decode", out_of_memory)
    with pytest.raises(EchoError, match="does not fit into memory"):
        Engine(model, row_builder, tmp_path, max_new_tokens=8).generate("decision_maker", exchanges)
    assert len(alive) >= 3, "the batch was halved at least twice"
    assert set(alive) == {0}


def test_a_role_that_trains_the_merger_has_its_own_image_features(row_builder, exchanges, tmp_path):
    """`lora_modules_to_save: [merger]` trains the merger itself, without LoRA weights in it."""
    torch.manual_seed(0)
    tuned = load_model(str(ECHO_TINY), dtype="float32")
    first, second = (LoraConfig(target_modules=["q_proj"], modules_to_save=["merger"]) for _ in range(2))
    tuned = get_peft_model(tuned, first, ROLES[0])
    tuned.add_adapter(ROLES[3], second)
    for name, weight in tuned.named_parameters():
        if "merger.modules_to_save" in name:
            weight.data.add_(0.05 * torch.randn_like(weight))
    alone = Engine(tuned, row_builder, tmp_path, max_new_tokens=2).generate(ROLES[3], exchanges[:1])
    engine = Engine(tuned, row_builder, tmp_path, max_new_tokens=2)
    other = engine.generate(ROLES[0], exchanges[:1])
    assert engine.generate(ROLES[3], exchanges[:1]) == alone
    assert other != alone


def test_threads_do_not_answer_with_the_adapter_of_another_role(row_builder, exchanges, tmp_path, monkeypatch):
    """A model has one active adapter, and a web service may inspect in several threads at once."""
    adapters = random_adapters(tmp_path / "adapters", make_dataset(tmp_path / "data", train=1, validation=1, test=1))
    tuned = attach_adapters(load_model(str(ECHO_TINY), dtype="float32"), {role: adapters / role for role in ROLES})
    engines = {role: Engine(tuned, row_builder, tmp_path, max_new_tokens=2) for role in (ROLES[2], ROLES[3])}
    alone = {role: engine.generate(role, exchanges[:1]) for role, engine in engines.items()}
    assert alone[ROLES[2]] != alone[ROLES[3]]
    encode = ImageEncoder.encode

    def encode_slowly(*arguments):
        time.sleep(0.2)  # the other thread starts here
        return encode(*arguments)

    monkeypatch.setattr(ImageEncoder, "encode", encode_slowly)
    with ThreadPoolExecutor(2) as threads:
        together = {role: threads.submit(engine.generate, role, exchanges[:1]) for role, engine in engines.items()}
        assert {role: answers.result() for role, answers in together.items()} == alone


def test_adapters_take_the_dtype_of_the_base_model(tmp_path):
    dataset = make_dataset(tmp_path / "data", train=1, validation=1, test=1)
    adapters = random_adapters(tmp_path / "adapters", dataset)
    for dtype in ("float32", "bfloat16"):
        base = load_model(str(ECHO_TINY), dtype=dtype)
        model = attach_adapters(base, {role: adapters / role for role in ROLES})
        found = {value.dtype for name, value in model.named_parameters() if "lora_" in name}
        assert found == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("whole", "tower", "kept"),
    [("float32", "float32", "float32"), ("bfloat16", None, "bfloat16"), ("float32", None, "bfloat16")],
)
def test_in_16_bits_the_tower_keeps_float32_if_its_config_names_it(
    row_builder, exchanges, tmp_path, whole, tower, kept
):
    """The published configs name no dtype for the tower."""
    folder = Path(shutil.copytree(ECHO_TINY, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["dtype"], config["vision_config"]["dtype"] = whole, tower
    (folder / "config.json").write_text(json.dumps(config))
    dataset = make_dataset(tmp_path / "data", train=1, validation=1, test=1)
    adapters = random_adapters(tmp_path / "adapters", dataset)
    model = load_to_answer(str(folder), None, "bfloat16", {role: adapters / role for role in ROLES})
    parts = {True: set(), False: set()}
    for name, weight in model.named_parameters():
        parts[".visual." in name].add(str(weight.dtype).removeprefix("torch."))
    assert parts == {True: {kept}, False: {"bfloat16"}}
    for answers in Engine(model, row_builder, tmp_path, 4).generate("decision_maker", exchanges):
        assert all(math.isfinite(value) for one in answers for value in one.letters.values())
