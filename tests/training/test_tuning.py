"""train/sft.py trains LoRA variants, adapters of quantized models, and all weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from echo_ft.errors import EchoError
from echo_ft.model.preparation import check_output_layer
from echo_ft.training.trainer import PrefixSharingTrainer
from tests.conftest import ECHO_TINY, make_dataset
from tests.support.training import SAME_TRAINING, losses, run_in_process, tiny_options

LANGUAGE = ["--lora_target_modules", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHORT = [*SAME_TRAINING, "--save_strategy", "no", "--per_device_train_batch_size", 2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def plain(dataset, tmp_path_factory):
    """LoRA on the language model after three steps."""
    output = tmp_path_factory.mktemp("plain") / "reference_extractor"
    run_in_process(*tiny_options("reference_extractor", dataset, output, *SHORT, *LANGUAGE))
    return output


def test_dora_trains_magnitudes_and_starts_with_the_loss_of_the_base(plain, dataset, tmp_path):
    # DoRA divides by the norm of each row, and echo-tiny's q_proj and k_proj have rows of zeros, so they are left out.
    dora = [*SHORT, "--use_dora", "true", "--lora_target_modules", "v_proj", "o_proj", "gate_proj"]
    run_in_process(*tiny_options("reference_extractor", dataset, tmp_path, *dora))
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"]
    assert any("magnitude" in name for name in weights)
    assert losses(tmp_path)[0] == pytest.approx(losses(plain)[0], rel=1e-5)
    assert losses(tmp_path)[2] < losses(tmp_path)[0]


def test_rank_stabilised_lora_scales_by_the_root_of_the_rank(plain, dataset, tmp_path):
    """The scale is alpha / sqrt(r) (arXiv 2312.03732), so with alpha / sqrt(r) as alpha the run equals plain LoRA."""
    config = json.loads((plain / "adapter_config.json").read_text())
    r, alpha = config["r"], config["lora_alpha"]
    assert int(r**0.5) ** 2 == r
    assert alpha % r**0.5 == 0
    same = ["--use_rslora", "true", "--lora_alpha", int(alpha // r**0.5)]
    run_in_process(*tiny_options("reference_extractor", dataset, tmp_path, *SHORT, *LANGUAGE, *same))
    assert losses(tmp_path) == pytest.approx(losses(plain), rel=1e-5)


def test_an_adapter_under_zero_2_is_saved_without_copying_the_base(plain, dataset, tmp_path, monkeypatch):
    save = PrefixSharingTrainer.save_model
    saved = []

    def as_under_zero_2(self, *arguments, **options):
        self.is_deepspeed_enabled = True  # there is no engine, so the Trainer's own code would fail
        save(self, *arguments, **options)
        saved.append(self.is_deepspeed_enabled)
        self.is_deepspeed_enabled = False

    monkeypatch.setattr(PrefixSharingTrainer, "save_model", as_under_zero_2)
    run_in_process(*tiny_options("reference_extractor", dataset, tmp_path, *SHORT, *LANGUAGE))
    assert saved == [True]
    expected = load_file(plain / "adapter_model.safetensors")
    for name, weight in load_file(tmp_path / "adapter_model.safetensors").items():
        assert torch.equal(weight, expected.pop(name)), name
    assert not expected


def full_tuning_options(dataset, output, *more):
    options = ["--use_peft", "false", "--learning_rate", "1e-4", "--vision_learning_rate", 0]
    return tiny_options("reference_extractor", dataset, output, *SHORT, *options, *more)


@pytest.fixture(scope="module")
def full(dataset, tmp_path_factory):
    """All weights after three steps, with a checkpoint of each step."""
    output = tmp_path_factory.mktemp("full") / "reference_extractor"
    run_in_process(*full_tuning_options(dataset, output, "--save_strategy", "steps", "--save_steps", 1))
    return output


def test_full_tuning_gives_a_full_model_with_the_frozen_part_unchanged(full):
    from echo_ft.model.adapters import find_adapters
    from echo_ft.model.loading import base_fingerprint, load_model

    tuned, base = load_model(str(full)).state_dict(), load_model(str(ECHO_TINY)).state_dict()
    assert tuned.keys() == base.keys()
    assert not (full / "adapter_config.json").exists()
    for name, weight in base.items():
        frozen = ".visual." in name and ".merger." not in name
        if frozen or "merger" in name or "_proj.weight" in name:
            assert torch.equal(weight, tuned[name]) == frozen, name
    assert losses(full)[2] < losses(full)[0]
    assert json.loads((full / "echo_ft.json").read_text())["role"] == "reference_extractor"
    with pytest.raises(EchoError, match=r"is a full model, not an adapter; pass it as model_name_or_path"):
        find_adapters(full.parent, str(ECHO_TINY), base_fingerprint(str(ECHO_TINY)), 784, 28224)


def test_resumed_full_tuning_gives_the_weights_of_an_uninterrupted_run(full, dataset, tmp_path):
    resumed = ["--resume_from_checkpoint", full / "checkpoint-1"]
    run_in_process(*full_tuning_options(dataset, tmp_path / "resumed", *resumed))
    expected = load_file(full / "model.safetensors")
    for name, weight in load_file(tmp_path / "resumed" / "model.safetensors").items():
        assert torch.equal(weight, expected[name]), name


def test_full_tuning_loads_and_saves_its_best_checkpoint(dataset, tmp_path):
    best = ["--save_strategy", "steps", "--save_steps", 1, "--eval_strategy", "steps", "--eval_steps", 1]
    # The learning rate ruins the model at once, so the first checkpoint is the best.
    best += ["--load_best_model_at_end", "true", "--learning_rate", 1, "--lr_scheduler_type", "linear"]
    run_in_process(*full_tuning_options(dataset, tmp_path, *best, "--warmup_steps", 2))
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    best_weights = load_file(Path(state["best_model_checkpoint"]) / "model.safetensors")
    last = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert not state["best_model_checkpoint"].endswith("-3")
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weight, best_weights[name]) for name, weight in saved.items())
    assert not all(torch.equal(weight, last[name]) for name, weight in saved.items())


def test_full_tuning_in_16_bits_is_refused(dataset, tmp_path):
    with pytest.raises(EchoError, match="16-bit weights loses small updates to rounding; set dtype: float32"):
        run_in_process(*full_tuning_options(dataset, tmp_path, "--dtype", "bfloat16"))


def test_full_tuning_stores_features_only_of_a_frozen_tower(dataset, tmp_path):
    features = ["--features", tmp_path / "features"]
    with pytest.raises(EchoError, match="features cannot be stored because the vision tower is trained"):
        run_in_process(*full_tuning_options(dataset, tmp_path / "merger", *features))
    run_in_process(*full_tuning_options(dataset, tmp_path / "stored", *features, "--merger_learning_rate", 0))
    run_in_process(*full_tuning_options(dataset, tmp_path / "computed", "--merger_learning_rate", 0))
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "computed"), rel=1e-5)


def test_flex_attention_is_refused_on_a_cpu(dataset, tmp_path):
    with pytest.raises(EchoError, match="flex_attention has no backward pass on a CPU"):
        run_in_process(
            *tiny_options("reference_extractor", dataset, tmp_path, *SHORT, "--attn_implementation", "flex_attention")
        )


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_quantized_base_starts_near_the_loss_of_the_plain_one(plain, dataset, tmp_path, bits):
    quantized = [f"--load_in_{bits}bit", "true", "--bnb_4bit_quant_type", "nf4", "--learning_rate", "1e-3"]
    run_in_process(*tiny_options("reference_extractor", dataset, tmp_path, *SHORT, *LANGUAGE, *quantized))
    assert losses(tmp_path)[0] == pytest.approx(losses(plain)[0], rel=0.2)
    assert losses(tmp_path)[2] < losses(tmp_path)[0]
    assert {weight.dtype for weight in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("separate", [False, True])
def test_a_separate_output_layer_is_not_trained_under_fsdp(separate):
    config = AutoConfig.from_pretrained(ECHO_TINY)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = not separate
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
        model.tie_weights()
    if separate:
        with pytest.raises(EchoError, match=r"under FSDP gives wrong gradients .* \(TRL 1\.16\); use recipes"):
            check_output_layer(model)
        model.requires_grad_(False)  # as under LoRA
    check_output_layer(model)
