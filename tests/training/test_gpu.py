"""GPU kernels, bfloat16, and topologies that accelerate supports only on GPUs give the losses of a plain run."""

from __future__ import annotations

import copy

import pytest
import torch

from echo_ft.model.preparation import packed_inputs, prepare_model
from echo_ft.model.rows import IGNORED
from echo_ft.records import Branch, Exchange
from echo_ft.training.collator import Collator
from tests.conftest import draw, make_dataset
from tests.support.training import SAME_TRAINING, launch, losses, tiny_options

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
GPU = {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": "0"}
SHORT = [*SAME_TRAINING, "--save_strategy", "no", "--per_device_train_batch_size", 2, "--use_cpu", "false"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def plain(dataset, tmp_path_factory):
    """A run of three steps in float32."""
    output = tmp_path_factory.mktemp("plain") / "reasoning_expert"
    launch(*tiny_options("reasoning_expert", dataset, output, *SHORT), **GPU)
    return output


def test_flex_attention_gives_the_gradients_of_sdpa(row_builder, model, tmp_path):
    names = tuple(draw(tmp_path / f"{index}.png", (60 + 20 * index, 90), index) for index in range(3))
    branches = tuple(Branch(str(index), f"Question {index}: is it so?\n", "AB"[index % 2]) for index in range(4))
    exchanges = [Exchange("decision_maker", str(index), names[: 1 + index], "", branches, "1") for index in range(2)]
    batch = Collator(row_builder, tmp_path).batch([row_builder.load_row(exchange, tmp_path) for exchange in exchanges])
    batch = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    keep = (batch["labels"][0, 1:] != IGNORED).nonzero()[:, 0]
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
