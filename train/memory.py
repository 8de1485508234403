"""What a recipe takes, before any download: `python -m train.memory --config recipes/qwen2_vl_7b/decision_maker.yaml`.

Finds every LoRA target in the true architecture, counts parameters exactly, and estimates the memory of each topology
at the recipe's largest batch (echo_ft/memory.py says how, and what is left out). Needs neither weights nor a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from echo_ft import config as configs
from echo_ft.errors import EchoError
from echo_ft.model.architectures import meta_model
from echo_ft.training.memory import Batch, adapt, report

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

    from echo_ft.model.preparation import freeze_parts
    from echo_ft.training.config import EchoConfig, check_options

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
    model = meta_model(base.model_name_or_path, base.model_revision)
    model = (
        adapt(model, get_peft_config(base))
        if base.use_peft
        else freeze_parts(model, config.vision_learning_rate, config.merger_learning_rate)
    )
    print(f"{base.model_name_or_path}, {config.role}")
    print(report(model, batch, sft, base, own.gpus))


if __name__ == "__main__":
    configs.run_main(main)
