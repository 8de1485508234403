"""The memory estimates match the peaks counted on tensors without content, operation by operation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig

import benchmarks.memory
from benchmarks.memory import LiveBytes, run_peak, training_peak
from echo_ft import config as configs
from echo_ft.inference.memory import RunShape, estimate_run
from echo_ft.model import architectures
from echo_ft.training.costs.memory import estimate_training, trainable_meta_model
from tests.conftest import ROOT
from train.memory import MemoryConfig, largest_batch, read_run, run_shapes

GIB = 2**30


def training(recipe: str, *flags: str) -> tuple[int, int]:
    """The peak of a recipe on one GPU and its estimate, both without the CUDA context."""
    from trl import ModelConfig, SFTConfig

    from echo_ft.training.config import EchoConfig

    argv = ["--config", str(ROOT / "recipes" / recipe), "--use_cpu", "true", *flags]
    config, sft, base = configs.parse([EchoConfig, SFTConfig, ModelConfig], argv)
    model, batch = trainable_meta_model(config, base), largest_batch(MemoryConfig(), config, sft)
    estimate = estimate_training(model, batch, sft, base, gpus=1)
    one_gpu = estimate.topologies[0]
    expected = estimate.total(one_gpu, sft.gradient_checkpointing) - one_gpu.context
    return training_peak(model, batch, sft, getattr(torch, str(base.dtype))), expected


@pytest.fixture
def two_layers(monkeypatch) -> None:
    """The published models at their real widths, with two layers each in the language model and the vision tower."""
    whole = architectures.model_config

    def shallow(*arguments: Any) -> Any:
        config = whole(*arguments)
        config.text_config.num_hidden_layers, config.vision_config.depth = 2, 2
        config.text_config.layer_types = config.text_config.layer_types[:2]
        return config

    monkeypatch.setattr(architectures, "model_config", shallow)


def test_a_run_is_measured_with_the_adapter_that_the_recipe_trains(two_layers, monkeypatch, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    text = (ROOT / "recipes" / "qwen2_vl_2b" / "decision_maker.yaml").read_text()
    recipe.write_text(text + "rank_pattern: {down_proj: 4}\n")
    measured = []
    monkeypatch.setattr("benchmarks.memory.run_peak", lambda model, lora, shape, dtype: measured.append(lora) or 0)
    run = str(ROOT / "recipes" / "qwen2_vl_2b" / "run.yaml")
    monkeypatch.setattr("sys.argv", ["benchmarks.memory", "--recipe", str(recipe), "--run", run])
    benchmarks.memory.main()
    assert [lora.rank_pattern for lora in measured] == [{"down_proj": 4}] * 4


def test_the_peak_is_that_of_the_tensors_alive_at_once():
    with LiveBytes() as live:
        first = torch.zeros(1000, device="meta")
        second = first + 1
        del second
        third = first * 2
        view = third[:500]
    assert (live.now, live.peak) == (8000, 8000)
    del first, third
    assert live.now == 4000  # the view holds its whole storage
    del view
    assert (live.now, live.peak) == (0, 8000)


FULL = ("--use_peft", "false", "--vision_learning_rate", "0", "--merger_learning_rate", "0", "--dtype", "float32")


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("qwen2_vl_7b/decision_maker.yaml", ()),
        ("qwen2_vl_2b/reference_extractor.yaml", ("--lora_dropout", "0")),
        ("qwen2_vl_2b/knowledge_guide.yaml", ("--lora_target_modules", "q_proj", "v_proj")),
        ("qwen2_vl_2b/knowledge_guide.yaml", ("--gradient_checkpointing", "false")),
        ("qwen2_vl_2b/knowledge_guide.yaml", FULL),
    ],
    ids=["7B", "no dropout", "two targets", "no checkpointing", "full tuning in float32"],
)
def test_training_takes_what_is_estimated_to_a_twentieth(two_layers, recipe, flags):
    peak, expected = training(recipe, *flags)
    assert peak == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "most"), [("qwen2_vl_7b/decision_maker.yaml", 20.5), ("qwen2_vl_2b/reasoning_expert.yaml", 9.0)]
)
def test_training_at_the_true_size_takes_what_is_estimated(recipe, most):
    peak, expected = training(recipe)
    assert peak == pytest.approx(expected, rel=0.05)
    assert peak <= most * GIB


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = {"2b": "Qwen/Qwen2-VL-2B-Instruct", "7b": "Qwen/Qwen2-VL-7B-Instruct"}


def running(size: str, shape: RunShape, tuned: bool = True) -> tuple[int, int]:
    """The peak of a run and its estimate, both without the CUDA context."""
    model = architectures.meta_model(NAMES[size])
    lora = LoraConfig(r=8, target_modules=TARGETS) if tuned else None
    adapter = 0
    if lora is not None:
        adapted = architectures.add_adapter(architectures.meta_model(NAMES[size]), lora)
        adapter = adapted.get_nb_trainable_parameters()[0]
    estimate = estimate_run(model, adapter, shape, width=2)
    return run_peak(model, lora, shape, torch.bfloat16), estimate.total - estimate.context


@pytest.mark.parametrize("tuned", [True, False], ids=["tuned", "base"])
@pytest.mark.parametrize(
    "shape",
    [
        RunShape(16, 2, 1_003_520, 512, 1, 100, 2, max_batch_tokens=32_768),
        RunShape(2, 2, 1_003_520, 400, 16, 100, 2, max_batch_tokens=None),
    ],
    ids=["prefill", "decode"],
)
def test_a_run_takes_what_is_estimated_to_a_twentieth(two_layers, shape, tuned):
    peak, expected = running("7b", shape, tuned)
    assert peak == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "most"), [("2b", 12), ("7b", 20)])
def test_a_run_of_the_recipes_fits_with_adapters(size, most):
    shapes = run_shapes(read_run(str(ROOT / "recipes" / f"qwen2_vl_{size}" / "run.yaml")))
    for full in shapes.values():
        # The size of the cache at the end of decoding decides. Two steps on longer branches fill it much faster.
        shape = replace(full, branch_tokens=full.branch_tokens + full.max_new_tokens - 2, max_new_tokens=2)
        peak, expected = running(size, shape)
        assert peak == pytest.approx(expected, rel=0.05)
        assert peak <= most * GIB
