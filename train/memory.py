"""What a recipe takes, before any download: `python -m train.memory --config recipes/qwen2_vl_7b/decision_maker.yaml`.

Finds every LoRA target in the true architecture, counts parameters exactly, and estimates the memory of each topology
at the recipe's largest batch (echo_ft/memory.py says how, and what is left out). Needs neither weights nor a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from echo_ft import config as configs
from echo_ft.records import EchoError

_ROWS = {
    "reference_extractor": (4, 384, 96),
    "knowledge_guide": (2, 1024, 128),
    "reasoning_expert": (2, 1536, 640),
    "decision_maker": (2, 1536, 16),
}
"""(images, text tokens, label tokens) of a large exchange: three candidates, eight entries of knowledge, five
questions."""
_EXCHANGES = {"reasoning_expert": 2, "decision_maker": 2}
"""Of a case, where it is not one: in full routing, Object Classification goes without knowledge, in its own prefix."""


@dataclass(frozen=True)
class MemoryConfig:
    """What the table is for; the rest is the recipe."""

    gpus: int = field(default=4, metadata={"help": "GPUs of the topologies that have several."})
    images: int | None = field(default=None, metadata={"help": "Images of the largest exchange; default by role."})
    exchanges: int | None = field(
        default=None, metadata={"help": "Exchanges of a case; default by role, in full routing (paper routing has 4)."}
    )
    text_tokens: int | None = field(
        default=None, metadata={"help": "Text tokens of the longest exchange, all branches; default by role."}
    )
    label_tokens: int | None = field(
        default=None, metadata={"help": "Those of them that are trained on; default by role."}
    )


def main(argv: list[str]) -> None:
    """Parse, count, print."""
    from trl import ModelConfig, SFTConfig, get_peft_config

    from echo_ft.architectures import meta_model
    from echo_ft.memory import (
        Batch,
        activations,
        adapt,
        aligned,
        count_parameters,
        frozen_bytes,
        gib,
        memory_table,
        topologies,
    )
    from echo_ft.training import EchoConfig, check_options

    # transformers refuses bf16 on a machine without a GPU unless it is told that the CPU is meant.
    own, config, sft, base = configs.parse(
        [MemoryConfig, EchoConfig, SFTConfig, ModelConfig], [*argv, "--use_cpu", "true"]
    )
    check_options(sft, base)
    images, text_tokens, label_tokens = _ROWS[config.role]
    exchanges = _EXCHANGES.get(config.role, 1) if own.exchanges is None else own.exchanges
    batch = Batch(
        rows=sft.per_device_train_batch_size * exchanges,
        images=images if own.images is None else own.images,
        max_pixels=config.max_pixels,
        text_tokens=text_tokens if own.text_tokens is None else own.text_tokens,
        label_tokens=label_tokens if own.label_tokens is None else own.label_tokens,
    )
    if own.gpus < 1:
        raise EchoError(f"gpus {own.gpus}: give the number of GPUs, 1 or more")

    model = adapt(meta_model(base.model_name_or_path, base.model_revision), get_peft_config(base))
    counts = count_parameters(model)
    total, trainable = sum(count.total for count in counts), sum(count.trainable for count in counts)
    bits = 4 if base.load_in_4bit else 8 if base.load_in_8bit else None
    frozen = frozen_bytes(model, 4 if base.dtype == "float32" else 2, bits, base.use_bnb_nested_quant)
    acts = activations(model, batch, 2 if sft.bf16 or sft.fp16 else 4)
    estimates = topologies(frozen, total - trainable, trainable, own.gpus, adapter_width=2 if bits else 4)

    print(f"{base.model_name_or_path}, {config.role}")
    rows = [["parameters", "total", "trainable"]]
    rows += [[count.part, f"{count.total:,}", f"{count.trainable:,}"] for count in counts]
    print(aligned([*rows, ["all", f"{total:,}", f"{trainable:,} ({trainable / total:.2%})"]]), end="\n\n")
    print(
        f"largest batch of a GPU, exchanges: {batch.rows} x ({batch.images} images of {batch.max_pixels} pixels, "
        f"{batch.text_tokens} text tokens, {batch.label_tokens} of them trained on)"
    )
    print(
        f"activations, GiB: {gib(acts.inputs + acts.layer)} with gradient checkpointing, {gib(acts.kept)} without; "
        f"logits: {gib(acts.logits)} (fused LM head, one tile at a time)",
        end="\n\n",
    )
    print(memory_table(estimates, acts, sft.gradient_checkpointing), end="\n\n")
    print("* the recipe's. An estimate with AdamW and sdpa attention; leave a tenth to a fifth of a GPU free for")
    print("the CUDA context (about 1 GiB), fragmentation and workspaces. host: main memory of all processes together.")


if __name__ == "__main__":
    configs.run_main(main)
