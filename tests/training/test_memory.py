"""The recipes for the published models fit their architectures, and the memory estimates match what autograd saves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from echo_ft import config as configs
from echo_ft.errors import EchoError
from echo_ft.images.views import View
from echo_ft.model.activations import BatchShape, estimate_activations
from echo_ft.model.architectures import add_adapter, count_parameters, frozen_bytes, meta_model, model_config
from echo_ft.model.loading import check_lora_targets
from echo_ft.model.preparation import keep_adapter_input_dtype, packed_inputs, prepare_model
from echo_ft.records import ROLES
from echo_ft.training.config import TrainingConfig
from echo_ft.training.costs.memory import (
    estimate_topologies,
    estimate_training,
    hold_step_memory,
    peak_bytes,
    trainable_meta_model,
)
from tests.conftest import ROOT
from tests.support.models import small_config

RECIPES = ROOT / "recipes"
FOLDERS = ("qwen2_vl_2b", "qwen2_vl_7b")
TOPOLOGIES = ("one_gpu", "ddp", "zero2", "zero3", "zero3_offload", "fsdp2")
LANGUAGE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
MERGER = ["merger.mlp.0", "merger.mlp.2"]
NAME_2B = "Qwen/Qwen2-VL-2B-Instruct"
NAME_7B = "Qwen/Qwen2-VL-7B-Instruct"


@pytest.fixture(scope="module")
def meta_2b():
    """The architecture of the 2B model. Tests must not change it."""
    return meta_model(NAME_2B)


def parse_recipe(path, *flags):
    from trl import ModelConfig, SFTConfig

    from echo_ft.training.config import EchoConfig

    argv = ["--config", str(path), "--use_cpu", "true", *flags]
    return configs.parse([EchoConfig, SFTConfig, ModelConfig], argv)


# The published architectures


@pytest.mark.parametrize(("name", "parameters"), [(NAME_2B, 2_208_985_600), (NAME_7B, 8_291_375_616)])
def test_architectures_have_the_published_number_of_parameters(name, parameters):
    assert sum(weight.numel() for weight in meta_model(name).parameters()) == parameters


def test_a_local_folder_takes_precedence(tmp_path):
    small_config().save_pretrained(tmp_path)
    assert model_config(str(tmp_path)).text_config.hidden_size == 192


def test_an_unknown_model_is_refused_with_the_known_names(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EchoError, match="Qwen/Qwen2-VL-2B-Instruct"):
        model_config("nobody/nothing")
    with pytest.raises(EchoError, match="no model folder"):
        model_config("./missing")
    with pytest.raises(EchoError, match=r"has no usable config\.json"):
        model_config(str(tmp_path))


def test_a_model_other_than_qwen2_vl_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(EchoError, match="is a llama model"):
        model_config(str(tmp_path))


# LoRA targets and counts


@pytest.mark.parametrize("folder", FOLDERS)
def test_trainable_parameters_match_the_formula(folder):
    _, _, base = parse_recipe(RECIPES / folder / "decision_maker.yaml")
    model = meta_model(base.model_name_or_path)
    shapes = [m.weight.shape for name, m in model.named_modules() if name.split(".")[-1] in base.lora_target_modules]
    expected = sum(base.lora_r * (rows + columns) for rows, columns in shapes)
    config = LoraConfig(r=base.lora_r, target_modules=base.lora_target_modules)
    adapted = add_adapter(model, config)
    counts = {count.part: count for count in count_parameters(adapted)}
    assert len(shapes) == 28 * 7
    assert {part: count.trainable for part, count in counts.items()} == {
        "language model": expected,
        "vision tower": 0,
        "merger": 0,
    }
    totals = sum(count.total for count in counts.values()), sum(count.trainable for count in counts.values())
    assert totals == tuple(reversed(adapted.get_nb_trainable_parameters()))


def test_vision_and_merger_targets_match_only_linear_layers(meta_2b):
    check_lora_targets(meta_2b, VISION + MERGER)
    with pytest.raises(EchoError, match=r"proj also matches model\.visual\.patch_embed\.proj, a Conv3d"):
        check_lora_targets(meta_2b, [*LANGUAGE, "proj"])


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("q_porj", "q_proj"), ("attn.qvk", "attn.qkv"), ("merger.mlp0", "merger.mlp.0")]
)
def test_an_unknown_target_is_refused_with_the_nearest_name(meta_2b, wrong, nearest):
    with pytest.raises(EchoError, match=f"no module {wrong}; did you mean {nearest}"):
        check_lora_targets(meta_2b, [*LANGUAGE, wrong])


def test_a_single_target_is_matched_like_a_list_of_one():
    adapted = add_adapter(meta_model(NAME_2B), LoraConfig(r=8, target_modules="q_proj"))
    assert adapted.get_nb_trainable_parameters()[0] == 28 * 8 * (1536 + 1536)


def bytes_saved_by_autograd(model, rows=2, images=2, side=16, text=100):
    """Bytes that autograd keeps after a bfloat16 forward pass, without weights, and the shape of the batch."""
    image_ids = ([7] + [5] * (side**2 // 4) + [8]) * images
    length, branch = len(image_ids) + text, text // 4
    segments = [0] * len(image_ids) + [1 + index // branch for index in range(text)]
    batch = {
        "input_ids": torch.tensor([(image_ids + [20] * text) * rows]),
        "position_ids": torch.arange(rows * length).expand(3, 1, -1) % length,
        "segments": torch.tensor([segments * rows]),
        "lengths": [(len(image_ids), length)] * rows,
        "pixel_values": torch.randn(rows * images * side**2, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, side, side]] * (rows * images)),
        "image_order": list(range(rows * images)),
        "image_views": [View(Path(), str(index)) for index in range(rows * images)],
        "image_features": [],
    }
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        core = model.get_base_model() if hasattr(model, "peft_config") else model
        output = core.model(**packed_inputs(batch), use_cache=False)
    assert output.last_hidden_state.requires_grad
    shape = BatchShape(
        rows, images, (14 * side) ** 2, text_tokens=text + 2 * images, label_tokens=0, distinct_images=rows * images
    )
    return sum(storage.nbytes() for storage in saved.values()), shape


def small_model(targets):
    base = AutoModelForImageTextToText.from_config(small_config(), dtype=torch.bfloat16, attn_implementation="sdpa")
    model = get_peft_model(base, LoraConfig(r=8, target_modules=targets)).train()
    prepare_model(model.get_base_model())
    keep_adapter_input_dtype(model)
    return model


@pytest.mark.parametrize("targets", [LANGUAGE, LANGUAGE + VISION + MERGER], ids=["language", "all"])
def test_activations_are_within_a_tenth_of_what_autograd_saves(targets):
    model = small_model(targets)
    measured, batch = bytes_saved_by_autograd(model)
    assert estimate_activations(model, batch, width=2).full == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("frozen", [".visual.", "nothing"])
def test_full_tuning_is_within_a_tenth_of_what_autograd_saves(frozen):
    model = AutoModelForImageTextToText.from_config(small_config(), dtype=torch.bfloat16, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    prepare_model(model.train())
    measured, batch = bytes_saved_by_autograd(model)
    assert estimate_activations(model, batch, width=2).full == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("targets", [LANGUAGE, LANGUAGE + VISION + MERGER], ids=["language", "all"])
def test_checkpointed_inputs_are_within_a_fifth_of_autograd(targets):
    model = small_model(targets)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    measured, batch = bytes_saved_by_autograd(model)
    assert estimate_activations(model, batch, width=2).inputs == pytest.approx(measured, rel=0.2)


def test_larger_batches_take_more_memory_and_checkpointing_takes_less(meta_2b):
    adapted = add_adapter(meta_model(NAME_2B), LoraConfig(r=8, target_modules=LANGUAGE))
    base = estimate_activations(adapted, BatchShape(1, 2, 501_760, 512, 16, 2), 2)
    for larger in (
        BatchShape(2, 2, 501_760, 512, 16, 4),
        BatchShape(1, 3, 501_760, 512, 16, 3),
        BatchShape(1, 2, 1_003_520, 512, 16, 2),
    ):
        more = estimate_activations(adapted, larger, 2)
        assert more.total(True) > base.total(True)
        assert more.total(False) > base.total(False)
    assert base.total(True) < base.total(False) / 4


def test_topologies_shard_what_their_papers_describe():
    one, ddp, zero2, zero3, offload, cpu = estimate_topologies(16_000, 8_000, 1_000, gpus=4, adapter_width=4)
    assert (one.weights, one.gradients, one.optimizer) == (20_000, 4_000, 8_000)
    assert ddp.states == one.states + 4_000  # the buckets
    assert (zero2.weights, zero2.gradients, zero2.optimizer) == (18_000, 500, 3_000)
    assert (zero3.weights, zero3.gradients, zero3.optimizer) == (4_500, 500, 3_000)
    assert (offload.weights, offload.optimizer) == (0, 0)
    assert offload.host == 18_000 + 16_000
    assert cpu.states - cpu.context == one.states - one.context


def test_pixels_of_all_micro_batches_count_in_the_dtype_of_the_model():
    totals = {}
    for steps, dtype in ((8, "bfloat16"), (16, "bfloat16"), (8, "float32")):
        recipe = RECIPES / "qwen2_vl_7b" / "decision_maker.yaml"
        config, sft, base = parse_recipe(recipe, "--gradient_accumulation_steps", str(steps), "--dtype", dtype)
        batch = BatchShape(2, 2, 1_003_520, 1536, 16, distinct_images=2)
        totals[steps, dtype] = estimate_training(trainable_meta_model(config, base), batch, sft, base, 1).pixels
    image = 5120 * 1176 * 2  # patches, values of a patch, bytes
    assert totals == {(8, "bfloat16"): 9 * 2 * image, (16, "bfloat16"): 17 * 2 * image, (8, "float32"): 9 * 4 * image}


def test_four_bits_do_not_apply_to_embeddings_and_vision_tower():
    model = add_adapter(meta_model(NAME_2B), LoraConfig(r=8, target_modules=LANGUAGE))
    frozen = [weight.numel() for weight in model.parameters() if not weight.requires_grad]
    assert frozen_bytes(model, 2) == 2 * sum(frozen) == 2 * 2_208_985_600
    embeddings = 2 * 151_936 * 1536
    tower = sum(weight.numel() for name, weight in model.named_parameters() if ".visual." in name)
    four = frozen_bytes(model, 2, bits=4)
    assert embeddings < frozen_bytes(model, 2, bits=4, nested=True) < four < frozen_bytes(model, 2, bits=8)
    assert four == pytest.approx(embeddings + 2 * tower + 0.5625 * (sum(frozen) - embeddings / 2 - tower), rel=0.01)


@pytest.mark.parametrize(
    ("optim", "width"),
    [("adamw_torch_fused", 4), ("adamw_torch", 4), ("adamw_bnb_8bit", 1), ("paged_adamw_8bit", 0), ("sgd", 0)],
)
def test_the_largest_batch_is_checked_with_adams_states_and_the_pixels_of_a_step(tmp_path, optim, width):
    weight, pixels = torch.nn.Parameter(torch.ones(1000)), torch.ones(500, dtype=torch.bfloat16)
    settings = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    args = TrainingConfig(**settings, gradient_accumulation_steps=8, optim=optim)
    optimizer = torch.optim.AdamW([weight])
    held = hold_step_memory(args, optimizer, [weight], pixels)
    assert sum(tensor.nbytes for tensor in held) == 8 * pixels.nbytes + 2 * 1000 * width
    assert peak_bytes(torch.device("cpu"), held) - peak_bytes(torch.device("cpu"), []) == 8 * 1000 + 2 * 1000 * width
    weight.sum().backward()
    optimizer.step()  # as in a resumed run
    assert sum(tensor.nbytes for tensor in hold_step_memory(args, optimizer, [weight], pixels)) == 8 * pixels.nbytes


@pytest.mark.parametrize("batch", [2, 3, 5, 6, 7, 9])
def test_the_remedy_for_a_large_batch_keeps_the_cases_of_a_step(tmp_path, batch):
    from echo_ft.training.costs.largest_batch import _less_memory

    settings = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    settings |= {"gradient_checkpointing": True, "gradient_accumulation_steps": 4}
    remedy = _less_memory(TrainingConfig(**settings, per_device_train_batch_size=batch), 1000)
    smaller, accumulated = map(int, re.findall(r"\d+", remedy))
    assert smaller < batch and smaller * accumulated == 4 * batch


# The recipes


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_recipe_passes_its_checks_and_finds_its_targets(folder):
    from echo_ft.training.checks import check_options

    model, budgets = None, set()
    for role in ROLES:
        config, sft, base = parse_recipe(RECIPES / folder / f"{role}.yaml")
        check_options(sft, base)
        model = model or meta_model(base.model_name_or_path, base.model_revision)
        check_lora_targets(model, base.lora_target_modules)
        assert config.role == role == Path(sft.output_dir).name
        assert sft.max_length is None
        budgets.add((base.model_name_or_path, config.min_pixels, config.max_pixels))
    from evaluation.config import RunConfig

    (run,) = configs.parse([RunConfig], ["--config", str(RECIPES / folder / "run.yaml")])
    assert budgets == {(run.model_name_or_path, run.min_pixels, run.max_pixels)}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_accelerate_and_the_trainer_accept_each_topology(name, monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    path = RECIPES / "accelerate" / f"{name}.yaml"
    cluster = load_config_from_file(str(path))
    assert cluster.mixed_precision == "bf16"
    assert "gpu_ids" not in path.read_text()  # it would override the user's CUDA_VISIBLE_DEVICES
    assert cluster.num_processes == (1 if name == "one_gpu" else 4)
    # accelerate reports unknown keys at the top level, but not inside deepspeed_config or fsdp_config.
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(cluster.deepspeed_config) | set(cluster.fsdp_config) <= options
    for layer in cluster.fsdp_config.get("fsdp_transformer_layer_cls_to_wrap", "").split(","):
        assert not layer or hasattr(modeling_qwen2_vl, layer)
    if not cluster.deepspeed_config:
        return
    plugin = DeepSpeedPlugin(
        **{key: value for key, value in cluster.deepspeed_config.items() if key != "zero3_init_flag"}
    )
    for role in ROLES:
        _, sft, _ = parse_recipe(RECIPES / "qwen2_vl_7b" / f"{role}.yaml")
        plan = HfTrainerDeepSpeedConfig(yaml.safe_load(yaml.safe_dump(dict(plugin.deepspeed_config))))
        plan.trainer_config_process(sft)
        assert plan.mismatches == []
        assert plan.get_value("gradient_accumulation_steps") == sft.gradient_accumulation_steps
    assert plan.is_zero3() == name.startswith("zero3")
    assert plan.is_offload() == (name == "zero3_offload")


# The command


def test_the_command_prints_counts_and_one_line_per_topology(capsys):
    from train.memory import main

    main(["--config", str(RECIPES / "qwen2_vl_2b" / "reference_extractor.yaml"), "--gpus", "8", "--images", "3"])
    printed = capsys.readouterr().out
    assert "9,232,384 (0.42%)" in printed
    assert "2 x (3 images of 1003520 pixels" in printed
    for topology in ("one GPU", "DDP x8", "ZeRO-2 x8", "ZeRO-3 x8", "ZeRO-3 offload x8", "CPU"):
        assert f"\n{topology} " in printed


def test_the_command_estimates_a_run_and_the_features_of_an_ablation(capsys, tmp_path):
    from train.memory import main

    recipe, totals = RECIPES / "qwen2_vl_2b" / "decision_maker.yaml", {}
    for name in ("run", "ablation"):
        main(["--config", str(recipe), "--run", str(RECIPES / "qwen2_vl_2b" / f"{name}.yaml")])
        line = next(one for one in capsys.readouterr().out.splitlines() if one.startswith("knowledge_guide "))
        totals[name] = float(line.split()[-1])
    assert totals["run"] < 12
    assert totals["ablation"] == pytest.approx(totals["run"] + 16, abs=0.15)
    main(["--config", str(recipe), "--adapt_from", "branch", "--run", str(RECIPES / "qwen2_vl_2b" / "run.yaml")])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    header = next(row for row in rows if "kept" in row and "total" in row)
    found = {row[0]: dict(zip(header[::-1], row[::-1], strict=False)) for row in rows if row and row[0] in ROLES}
    # 32,768 tokens at most, with a key and a value in 28 layers and 2 heads of 128 numbers
    assert found["decision_maker"]["kept"] == f"{32_768 * 2 * 28 * 2 * 128 * 2 / 2**30:.1f}"
    late = found["knowledge_guide"]
    assert float(late["total"]) == pytest.approx(totals["run"] + float(late["kept"]), abs=0.11)
    assert float(late["kept"]) > 0.4
    with pytest.raises(EchoError, match="give a recipe and a run with the same model"):
        main(["--config", str(recipe), "--run", str(RECIPES / "qwen2_vl_7b" / "run.yaml")])
    with pytest.raises(EchoError, match="has no max_pixels; give the YAML file for a run"):
        main(["--config", str(recipe), "--run", str(RECIPES / "accelerate" / "ddp.yaml")])


def test_auto_is_the_dtype_that_the_models_config_names(capsys, tmp_path):
    from train.memory import main

    config = model_config("Qwen/Qwen2-VL-2B-Instruct").to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))  # as after full fine-tuning
    run = tmp_path / "run.yaml"
    rows = (RECIPES / "qwen2_vl_2b" / "run.yaml").read_text().splitlines()
    kept = [row for row in rows if not row.startswith(("dtype", "model_name_or_path"))]
    printed = []
    for dtype in ("float32", "auto", "bfloat16"):
        run.write_text("\n".join([*kept, f"dtype: {dtype}", f"model_name_or_path: {tmp_path}"]))
        recipe = ["--config", str(RECIPES / "qwen2_vl_2b" / "decision_maker.yaml"), "--run", str(run)]
        main([*recipe, "--model_name_or_path", str(tmp_path), "--dtype", dtype])
        printed.append([line for line in capsys.readouterr().out.splitlines() if not line.startswith("activations")])
    assert printed[0] == printed[1] != printed[2]


@pytest.mark.parametrize(
    "line",
    [
        "option_order: cyclic",
        "cells: {all: {option_order: cyclic}}",
        '"cells": {"{option_order}": {option_order: [given, cyclic]}}',
    ],
)
def test_a_run_in_every_order_of_the_options_has_more_branches(tmp_path, line):
    from train.memory import read_run, run_shapes

    text = (RECIPES / "tiny" / "run.yaml").read_text()
    run = tmp_path / "run.yaml"
    run.write_text(text + f"\n{line}\n")
    given, cyclic = (run_shapes(read_run(str(path))) for path in (RECIPES / "tiny" / "run.yaml", run))
    more = cyclic.pop("decision_maker"), given.pop("decision_maker")
    assert more[0] == replace(more[1], branches=4 * more[1].branches)
    assert cyclic == given


@pytest.mark.faults
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("max_pixels: many", 'max_pixels: "many" is not a whole number'),
        ("max_pixels: 0", "max_pixels is 0; set it to 1 or more"),
        ("batch_size: -1", "batch_size is -1; set it to 1 or more"),
        ("max_batch_tokens: [1]", "max_batch_tokens: .* is not a whole number"),
        ("features_gib: .nan", "features_gib: NaN is not a number"),
        ("features_gib: -1", "features_gib is -1; set it to 0 or more"),
    ],
)
def test_a_run_with_an_unusable_option_is_refused_by_name(tmp_path, line, says):
    from train.memory import read_run

    run = tmp_path / "run.yaml"
    rows = (RECIPES / "tiny" / "run.yaml").read_text().splitlines()
    kept = [row for row in rows if not line.startswith(row.split(":")[0])]
    run.write_text("\n".join([*kept, line]))
    with pytest.raises(EchoError, match=f"{run}: {says}"):
        read_run(str(run))


def test_the_command_counts_the_four_adapters_of_a_run_once(capsys, monkeypatch):
    from train import memory

    adapters: list[int] = []
    monkeypatch.setattr(memory, "_run_report", lambda *options: adapters.append(options[3]) or "")
    run = ["--run", str(RECIPES / "qwen2_vl_2b" / "run.yaml")]
    memory.main(["--config", str(RECIPES / "qwen2_vl_2b" / "all_roles.yaml"), *run])
    printed = capsys.readouterr().out
    trained = re.search(r"^all .* ([\d,]+) \(", printed, re.MULTILINE)
    assert trained and adapters == [int(trained[1].replace(",", "")) / 4]
    assert "run.yaml, with four adapters like the recipe's" in printed
    memory.main(["--config", str(RECIPES / "qwen2_vl_2b" / "decision_maker.yaml"), *run, "--use_peft", "false"])
    assert adapters[1] == 0
    assert "run.yaml, with no adapters" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpus", "images", "exchanges", "text_tokens", "label_tokens"])
def test_the_command_refuses_sizes_below_one(name):
    from train.memory import main

    recipe = str(RECIPES / "qwen2_vl_2b" / "decision_maker.yaml")
    with pytest.raises(EchoError, match=f"{name} is -1; set it to 1 or more"):
        main(["--config", recipe, f"--{name}", "-1"])


def test_the_command_reports_a_wrong_target_in_one_sentence():
    recipe = RECIPES / "qwen2_vl_2b" / "decision_maker.yaml"
    command = [
        sys.executable,
        "-m",
        "train.memory",
        "--config",
        str(recipe),
        "--lora_target_modules",
        "q_proj",
        "k_poj",
    ]
    done = subprocess.run(command, cwd=RECIPES.parent, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: lora_target_modules: the model has no module k_poj; did you mean k_proj?"
    )
    assert "Traceback" not in done.stderr


def test_the_slurm_example_starts_one_launcher_per_machine(tmp_path):
    from accelerate.commands.launch import launch_command_parser

    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'first\\nsecond\\n'\n")
    (tmp_path / "srun").write_text(
        '#!/bin/sh\n[ "$1" = --cpus-per-task=32 ] || exit 1\nshift\n'
        'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n'
    )
    (tmp_path / "python").write_text('#!/bin/sh\nshift 2\nprintf "%s\\n" "$@" "--end--"\n')
    for name in ("scontrol", "srun", "python"):
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    slurm |= {"SLURM_CPUS_PER_TASK": "32", "SLURM_JOB_ID": "40007"}
    recipe = "recipes/qwen2_vl_7b/decision_maker.yaml"
    done = subprocess.run(
        ["bash", "recipes/accelerate/slurm.sh", recipe, "--seed", "1"],
        cwd=RECIPES.parent,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", **slurm},
        capture_output=True,
        text=True,
        check=True,
    )
    machines = [block.split("\n")[:-1] for block in done.stdout.split("--end--\n")[:-1]]
    for rank, arguments in enumerate(machines):
        found = launch_command_parser().parse_args(arguments)
        assert (found.num_machines, found.machine_rank, found.num_processes) == (2, rank, 8)
        assert (found.main_process_ip, found.main_process_port) == ("first", 20007)
        assert found.config_file == "recipes/accelerate/ddp.yaml"
        assert found.training_script == "train/sft.py"
        assert found.training_script_args == ["--config", recipe, "--resume_from_checkpoint", "true", "--seed", "1"]
    assert len(machines) == 2
