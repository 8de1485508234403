"""Under FSDP2 on two processes, gradients equal those of one process, even if one of the two has no image.

torchrun starts this script with a folder for drawn images as its argument. accelerate (1.15) supports FSDP only on
GPUs. The script therefore calls PyTorch's fully_shard on the blocks that recipes/accelerate/fsdp2.yaml names and on the
whole model. It does not test how accelerate prepares a model.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard

from echo_ft.model.loading import load_model, load_processor
from echo_ft.model.preparation import packed_inputs, prepare_model
from echo_ft.model.rows import IGNORED, RowBuilder
from echo_ft.records import Branch, Exchange
from echo_ft.training.collator import Collator
from tests.conftest import ECHO_TINY, draw


def main(folder: Path) -> None:
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
    collator = Collator(row_builder, root, always_encode=True)
    batches = [collator.batch([row_builder.load_row(exchange, root)]) for exchange in exchanges]

    torch.manual_seed(0)
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj", "attn.qkv"])
    model = get_peft_model(load_model(str(ECHO_TINY), None, "float32"), lora)
    prepare_model(model.get_base_model())

    def loss(batch):
        keep = (batch["labels"][0, 1:] != IGNORED).nonzero()[:, 0]
        logits = model(**packed_inputs(batch), keep=keep, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[0], batch["labels"][0, keep + 1], reduction="sum")

    sum(loss(batch) for batch in batches).backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    core = model.get_base_model().model
    for layer in (*core.visual.blocks, *core.language_model.layers):
        fully_shard(layer)
    fully_shard(model)
    loss(batches[dist.get_rank()]).backward()
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert any(gradient.any() for name, gradient in expected.items() if "attn.qkv" in name)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            total = weight.grad.full_tensor() * dist.get_world_size()  # FSDP averages over the processes
            assert (total - expected[name]).abs().max() <= 1e-5 * scale, name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
