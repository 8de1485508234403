"""Under FSDP2 on two processes, gradients and adapter equal those on one process, and the base model is never gathered.

One of the two processes has no image.

torchrun starts this script with a folder for drawn images and a value of adapt_from as its arguments. accelerate (1.15)
supports FSDP only on GPUs. The script therefore calls PyTorch's fully_shard on the blocks that
recipes/accelerate/fsdp2.yaml names and on the whole model. It does not test how accelerate prepares a model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from echo_ft.model.adapters import gather_adapter
from echo_ft.model.loading import load_model, load_processor
from echo_ft.model.preparation import packed_inputs, prepare_model
from echo_ft.model.rows import IGNORED, RowBuilder
from echo_ft.records import Branch, Exchange
from echo_ft.training.collator import Collator
from tests.conftest import ECHO_TINY, draw


class GatheredSizes(TorchDispatchMode):
    """Records the size of each tensor that is gathered from all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation.namespace == "_c10d_functional" and "all_gather" in operation.name():
            self.sizes.append(result.numel())
        return result


def check_adapter(model: Any, whole: bytes) -> None:
    """Check that `gather_adapter` gives the first process the adapter file `whole`, and gathers nothing else."""
    with GatheredSizes() as gathered:
        weights = gather_adapter(model, "cpu")
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert len(gathered.sizes) == len(trained)
    # A shard is padded if the rows of a weight cannot be divided equally among the processes.
    padded = [-(-weight.shape[0] // 2) * 2 * weight[0].numel() for weight in trained]
    assert sorted(gathered.sizes) == sorted(padded)
    if dist.get_rank() == 0:
        assert save(get_peft_model_state_dict(model, weights)) == whole
    else:
        assert weights == {}


def main(folder: Path, adapt_from: str) -> None:
    dist.init_process_group("gloo")
    root = folder / str(dist.get_rank())
    root.mkdir()
    row_builder = RowBuilder(load_processor(str(ECHO_TINY), None, 784, 28 * 28 * 16))
    names = tuple(draw(root / f"{index}.png", (60 + 20 * index, 90), index) for index in range(2))
    branches = tuple(Branch(str(index), f"Question {index}: is it so?\n", "AB"[index % 2]) for index in range(3))
    # One process has one question and no image; the other has three questions and two images.
    exchanges = [
        Exchange("decision_maker", "a", (), "", branches[:1], "1"),
        Exchange("decision_maker", "b", names, "", branches, "1"),
    ]
    collator = Collator(row_builder, root, always_encode=True, adapt_from=adapt_from)
    batches = [collator.batch([row_builder.load_row(exchange, root)]) for exchange in exchanges]

    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", *(["attn.qkv"] if adapt_from == "prefix" else [])]
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules=targets)
    model = get_peft_model(load_model(str(ECHO_TINY), None, "float32"), lora)
    prepare_model(model.get_base_model())

    def loss(batch):
        keep = (batch["labels"][0, 1:] != IGNORED).nonzero()[:, 0]
        logits = model(**packed_inputs(batch), keep=keep, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[0], batch["labels"][0, keep + 1], reduction="sum")

    sum(loss(batch) for batch in batches).backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    whole = save(get_peft_model_state_dict(model))
    core = model.get_base_model().model
    for layer in (*core.visual.blocks, *core.language_model.layers):
        fully_shard(layer)
    fully_shard(model)
    check_adapter(model, whole)
    loss(batches[dist.get_rank()]).backward()
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert any(gradient.any() for name, gradient in expected.items() if targets[-1] in name)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            total = weight.grad.full_tensor() * dist.get_world_size()  # FSDP averages over the processes
            assert (total - expected[name]).abs().max() <= 1e-5 * scale, name


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
