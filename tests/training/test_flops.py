"""The operation counts agree with PyTorch's own counter."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from echo_ft.model.preparation import packed_inputs, prepare_model
from echo_ft.records import Branch, Exchange
from echo_ft.training.collator import Collator
from echo_ft.training.costs import flops
from tests.conftest import draw

LANGUAGE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


def rows_of(row_builder, root):
    """Rows of two exchanges: one image and three branches, two images and two branches."""
    names = [draw(root / f"{index}.png", (84, 56 + 28 * index), index) for index in range(3)]
    branches = [Branch(str(index), f"Question {index}: {'is it so? ' * index}", "A") for index in range(5)]
    exchanges = [
        Exchange("decision_maker", "a", tuple(names[:1]), "Look.\n", tuple(branches[:3]), "1"),
        Exchange("decision_maker", "b", tuple(names[1:]), "", tuple(branches[3:]), "1"),
    ]
    return [row_builder.load_row(exchange, root) for exchange in exchanges]


def count_operations(model, row_builder, root, rows) -> dict[str, int]:
    """Forward and backward operations by kind (`linear`, `attention`), as PyTorch counts them."""
    batch = Collator(row_builder, root).batch(rows)
    labels = batch["labels"]
    keep = (labels[0, 1:] != -100).nonzero()[:, 0]
    with FlopCounterMode(display=False) as counter:
        logits = model(**packed_inputs(batch), keep=keep, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0], labels[0, keep + 1]).backward()
    found = {"linear": 0, "attention": 0}
    for operation, count in counter.get_flop_counts()["Global"].items():
        found["attention" if "attention" in str(operation) or "bmm" in str(operation) else "linear"] += count
    return found


@pytest.mark.parametrize("targets", [LANGUAGE, LANGUAGE + VISION], ids=["language", "tower too"])
def test_linear_layers_cost_what_pytorch_counts(row_builder, model, tmp_path, targets):
    rows = rows_of(row_builder, tmp_path)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=targets)).train()
    prepare_model(adapted.get_base_model())
    expected = count_operations(adapted, row_builder, tmp_path, rows)["linear"]
    work = flops.text_work(rows) + flops.image_work(grid for row in rows for grid in row.grids)
    without_attention = flops.WorkCounts(work.tokens, 0, work.labels, work.patches, 0)
    # The estimate includes the input gradients of the first layer, which autograd does not compute.
    assert flops.unit_costs(adapted).flops(without_attention) == pytest.approx(expected, rel=0.05)


def test_pairs_equal_the_entries_of_the_attention_mask(row_builder, tmp_path):
    from echo_ft.model.batches import make_attention_mask

    for row in rows_of(row_builder, tmp_path):
        mask = make_attention_mask(torch.from_numpy(row.segments)[None])
        work = flops.text_work([row])
        assert work.pairs == int(mask.sum())
        assert work.tokens == len(row.input_ids)
        assert work.labels == int((row.labels != -100).sum())


def test_patches_attend_only_within_their_image():
    work = flops.image_work(np.array([[1, 4, 6], [1, 2, 2]]))
    assert (work.patches, work.patch_pairs) == (28, 24**2 + 4**2)


def test_only_a_known_gpu_has_a_peak():
    assert flops.device_peak_flops("NVIDIA H200") == 989e12
    assert flops.device_peak_flops("NVIDIA H100 PCIe") < flops.device_peak_flops("NVIDIA H100 80GB HBM3")
    assert flops.device_peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert flops.device_peak_flops("NVIDIA L40") == flops.device_peak_flops("NVIDIA L40S") / 2 == 181e12
    assert flops.device_peak_flops("NVIDIA H100 NVL") == flops.device_peak_flops("NVIDIA H200 NVL") == 835e12
    assert flops.device_peak_flops("NVIDIA GH200 480GB") == flops.device_peak_flops("NVIDIA H200")
    assert flops.device_peak_flops("NVIDIA RTX A1000") is None
    assert flops.device_peak_flops("a toaster") is None


def test_attention_costs_what_pytorch_counts_for_the_rectangles(row_builder, model, tmp_path):
    rows = rows_of(row_builder, tmp_path)
    prepared = copy.deepcopy(model)
    prepare_model(prepared)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        prepared(**packed_inputs(Collator(row_builder, tmp_path).batch(rows)), use_cache=False)
    found = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "attention" in str(name))
    sizes = [(row.prefix_length, len(row.input_ids)) for row in rows]
    rectangles = sum(prefix**2 + (length - prefix) * length for prefix, length in sizes)
    images = flops.image_work(grid for row in rows for grid in row.grids)
    costs = flops.unit_costs(prepared.requires_grad_(False))
    # `pair` covers forward and backward, and forward is a third of it. A frozen tower has no backward pass.
    assert costs.pair / 3 * rectangles + costs.patch_pair * images.patch_pairs == pytest.approx(found, rel=1e-6)
