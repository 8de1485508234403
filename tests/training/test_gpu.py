"""GPU kernels, bfloat16 and the topologies that accelerate supports only on GPUs give the losses of a plain run."""

from __future__ import annotations

import copy
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from trl.trainer.utils import add_fused_lm_head

from benchmarks.training.__main__ import WIDTHS, random_model
from echo_ft.model.attention import attend, make_block_mask, make_spans
from echo_ft.model.preparation import packed_inputs, prepare_model
from echo_ft.model.rows import IGNORED
from echo_ft.records import Branch, Exchange
from echo_ft.training.collator import Collator
from tests.conftest import ROOT, draw, make_dataset
from tests.support.training import SAME_TRAINING, history, launch, losses, tiny_options

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
GPU = {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": "0"}
SHORT = [*SAME_TRAINING, "--save_strategy", "no", "--per_device_train_batch_size", 2, "--use_cpu", "false"]
ONE_GPU = ["--config_file", "recipes/accelerate/one_gpu.yaml"]
FAST_KERNELS = {f"aten::_scaled_dot_product_{kernel}_attention" for kernel in ("flash", "efficient", "cudnn")}
HEADS = [pytest.param((12, 2), id="2B"), pytest.param((28, 4), id="7B")]
"""Query heads and key heads. Both models have heads of 128 channels."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def plain(dataset, tmp_path_factory):
    """A run of three steps in float32."""
    output = tmp_path_factory.mktemp("plain") / "reasoning_expert"
    launch(*tiny_options("reasoning_expert", dataset, output, *SHORT), **GPU)
    return output


def packed_batch(row_builder, folder, device="cuda"):
    """Two exchanges with one and two images, and four branches each; returns the batch and the labels' positions."""
    names = tuple(draw(folder / f"{index}.png", (60 + 20 * index, 90), index) for index in range(3))
    branches = tuple(Branch(str(index), f"Question {index}: is it so?\n", "AB"[index % 2]) for index in range(4))
    exchanges = [Exchange("decision_maker", str(index), names[: 1 + index], "", branches, "1") for index in range(2)]
    batch = Collator(row_builder, folder).batch([row_builder.load_row(exchange, folder) for exchange in exchanges])
    batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    return batch, (batch["labels"][0, 1:] != IGNORED).nonzero()[:, 0]


def packed_attention(heads, prefix, branches, device="cuda", dtype=torch.bfloat16):
    """Query, key and value of a row with one exchange, its segments (1, T), and the module that `attend` expects."""
    torch.manual_seed(prefix)
    lengths = [prefix, *branches]
    segments = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))[None]
    tokens, (queries, keys) = sum(lengths), heads
    states = [
        torch.randn(1, count, tokens, 128, device=device, dtype=dtype, requires_grad=True)
        for count in (queries, keys, keys)
    ]
    module = SimpleNamespace(num_key_value_groups=queries // keys, is_causal=True, training=True)
    return states, segments, module


@pytest.mark.parametrize("heads", HEADS)
def test_prefixes_and_branches_use_fast_kernels(heads):
    """The math kernel would hold all scores of a prefix: 7 GiB for the 7B's heads and 8,192 tokens in float32."""
    states, segments, module = packed_attention(heads, 2600, [40] * 5)
    spans = make_spans(segments, [(2600, segments.shape[1])])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        attend(module, *states, None, spans)[0].sum().backward()
    used = {event.key for event in profiled.key_averages() if event.key.startswith("aten::_scaled_dot_product_")}
    forward = {name for name in used if not name.endswith("_backward")}
    assert forward and forward <= FAST_KERNELS
    assert forward & {"aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_cudnn_attention"}
    scores = heads[0] * 2600**2 * 2
    assert torch.cuda.max_memory_allocated() - before < scores


@pytest.mark.parametrize("heads", HEADS)
def test_flex_attention_of_rows_of_all_lengths_is_compiled_a_few_times(heads):
    """Gradients equal those of sdpa, and new lengths do not compile the kernel again."""
    torch._dynamo.reset()
    counters.clear()
    compiled = []
    for index, prefix in enumerate((300, 517, 780, 1033, 1201, 640, 1999)):
        branches = [20 + index, 31, 44]
        states, segments, module = packed_attention(heads, prefix, branches)
        lengths = [(prefix, segments.shape[1])]
        found = []
        for spans in (make_spans(segments, lengths), make_block_mask(segments, lengths)):
            output = attend(module, *states, None, spans)[0]
            weights = torch.linspace(-1, 1, output.numel(), device="cuda", dtype=output.dtype).view_as(output)
            found.append([output, *torch.autograd.grad((output * weights).sum(), states)])
        for plain, flex in zip(*found, strict=True):
            assert (plain - flex).abs().max() <= 0.02 * plain.abs().max()
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[-1] == compiled[2] <= 3


def test_the_fused_head_at_kept_positions_gives_the_loss_of_all_logits(row_builder, model, tmp_path):
    """TRL scores the labels with a Triton kernel. `keep` has selected their positions already."""
    batch, keep = packed_batch(row_builder, tmp_path)
    labels = batch["labels"][:, keep + 1]
    prepared = copy.deepcopy(model).cuda().bfloat16()
    add_fused_lm_head(prepared, outputs=("log_probs", "entropy", "is_top1"))
    prepare_model(prepared)
    inputs = packed_inputs(batch) | {"keep": keep, "use_cache": False}

    def gradients(loss):
        prepared.zero_grad()
        loss.backward()
        return {name: p.grad.float() for name, p in prepared.named_parameters() if p.grad is not None}

    logits = prepared(**inputs).logits[0].float()
    plain_loss = torch.nn.functional.cross_entropy(logits, labels[0])
    plain = gradients(plain_loss)
    fused_loss = -prepared(**inputs, shift_labels=labels, fused_lm_head=True).log_probs.mean()
    fused = gradients(fused_loss)
    assert fused_loss.item() == pytest.approx(plain_loss.item(), rel=1e-2)
    scale = max(gradient.abs().max() for gradient in plain.values())
    for name, gradient in plain.items():
        assert (gradient - fused[name]).abs().max() <= 0.05 * scale, name


def test_bfloat16_gives_finite_losses_near_those_of_float32(plain, dataset, tmp_path):
    options = [*SHORT, "--bf16", "true", "--dtype", "bfloat16"]
    arguments = tiny_options("reasoning_expert", dataset, tmp_path / "out", *options)
    launch(*arguments, launcher=ONE_GPU, **GPU)
    assert losses(tmp_path / "out") == pytest.approx(losses(plain), rel=0.05)
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_a_resumed_run_gives_the_losses_of_an_uninterrupted_run(dataset, tmp_path):
    options = [*SHORT, "--save_strategy", "steps", "--save_steps", 1]
    launch(*tiny_options("reasoning_expert", dataset, tmp_path / "whole", *options), **GPU)
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    resume = [*options, "--resume_from_checkpoint", "true"]
    launch(*tiny_options("reasoning_expert", dataset, tmp_path / "resumed", *resume), **GPU)
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


def estimated_gib(report: str) -> float:
    """The estimate for one GPU with the recipe's checkpointing, from the table that `--dry_run` prints."""
    head, one_gpu = (re.search(rf"^{start}  .*$", report, re.MULTILINE)[0] for start in ("GiB per GPU", "one GPU"))
    columns = [column.strip() for column in re.split(r"  +", head)]
    (marked,) = [index for index, column in enumerate(columns) if column.endswith("*")]
    return float(re.split(r"  +", one_gpu)[marked])


def test_the_2b_recipe_takes_the_memory_that_it_estimates(dataset, tmp_path):
    """The decision maker at MMAD's full pixel budget, with random weights and echo-tiny's tokenizer."""
    base = random_model(WIDTHS["2b"], tmp_path / "model")
    recipe = ["--config", ROOT / "recipes" / "qwen2_vl_2b" / "decision_maker.yaml"]
    options = [*recipe, "--model_name_or_path", base, "--dataset", dataset, "--output_dir", tmp_path / "out"]
    options += ["--min_pixels", 1_003_520, "--max_pixels", 1_003_520, "--eval_strategy", "no", "--save_strategy", "no"]
    estimate = estimated_gib(launch(*options, "--dry_run"))
    told = launch(*options, "--max_steps", 2, "--logging_steps", 1, launcher=ONE_GPU, **GPU)
    peak = float(re.search(r"the largest batch .* takes ([\d.]+) GiB", told)[1])
    assert peak == pytest.approx(estimate, rel=0.1, abs=0.6)  # the estimate may count the CUDA context
    found = history(tmp_path / "out")
    assert len(found) == 2 and all(map(math.isfinite, found))


def test_flex_attention_gives_the_gradients_of_sdpa(row_builder, model, tmp_path):
    batch, keep = packed_batch(row_builder, tmp_path)
    found = {}
    for implementation in ("sdpa", "flex_attention"):
        prepared = copy.deepcopy(model).cuda()
        prepare_model(prepared)
        logits = prepared(**packed_inputs(batch, implementation), keep=keep, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0], batch["labels"][0, keep + 1]).backward()
        found[implementation] = {name: p.grad for name, p in prepared.named_parameters() if p.grad is not None}
    scale = max(gradient.abs().max() for gradient in found["sdpa"].values())
    for name, gradient in found["sdpa"].items():
        assert (gradient - found["flex_attention"][name]).abs().max() <= 1e-3 * scale, name


@pytest.mark.parametrize(
    "options",
    [["--attn_implementation", "flex_attention"], ["--use_liger_kernel", "true"], ["--gradient_checkpointing", "true"]],
    ids=lambda options: options[0].removeprefix("--"),
)
def test_other_kernels_give_the_losses_of_the_plain_run(plain, dataset, tmp_path, options):
    if "--use_liger_kernel" in options:
        pytest.importorskip("liger_kernel")
    launch(*tiny_options("reasoning_expert", dataset, tmp_path / "out", *SHORT, *options), **GPU)
    assert losses(tmp_path / "out") == pytest.approx(losses(plain), rel=1e-2)


@pytest.mark.parametrize("recipe", ["one_gpu", "zero2", "zero3", "fsdp2"])
def test_a_topology_on_one_gpu_gives_the_losses_of_the_plain_run(plain, dataset, tmp_path, recipe):
    start = ["--config_file", f"recipes/accelerate/{recipe}.yaml", "--num_processes", 1, "--mixed_precision", "no"]
    launch(*tiny_options("reasoning_expert", dataset, tmp_path / "out", *SHORT), launcher=start, **GPU)
    assert losses(tmp_path / "out") == pytest.approx(losses(plain), rel=1e-2)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
