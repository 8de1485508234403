"""Estimate the memory of a recipe: `python -m train.memory --config recipes/qwen2_vl_7b/decision_maker.yaml`.

This command finds every LoRA target in the real architecture, counts the parameters exactly and estimates the memory of
each topology at the recipe's largest batch. echo_ft/training/memory.py describes the method and what it leaves out. No
weights are downloaded, and no GPU is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from echo_ft import config as configs
from echo_ft.errors import EchoError
from echo_ft.model.activations import BatchShape
from echo_ft.training.memory import memory_report, trainable_meta_model

if TYPE_CHECKING:
    from trl import SFTConfig

    from echo_ft.training.config import EchoConfig

_EXCHANGE_SIZES = {
    "reference_extractor": (4, 384, 96),
    "knowledge_guide": (2, 1024, 128),
    "reasoning_expert": (2, 1536, 640),
    "decision_maker": (2, 1536, 16),
}
"""(images, text tokens, label tokens) of a large exchange: three candidates, eight knowledge entries and five
questions."""
_EXCHANGES_PER_CASE = {"reasoning_expert": 2, "decision_maker": 2}
"""Exchanges per case of the roles with more than one. In full routing, Object Classification gets no knowledge and has
its own prefix."""


@dataclass(frozen=True)
class MemoryConfig:
    """Options of `python -m train.memory` in addition to the recipe."""

    gpus: int = field(default=4, metadata={"help": "Number of GPUs in topologies with several GPUs."})
    images: int | None = field(
        default=None, metadata={"help": "Images of the largest exchange; default: depends on the role."}
    )
    exchanges: int | None = field(
        default=None,
        metadata={"help": "Exchanges per case; default: that of the role in full routing (paper routing has 4)."},
    )
    text_tokens: int | None = field(
        default=None,
        metadata={"help": "Text tokens of the longest exchange with all branches; default: depends on the role."},
    )
    label_tokens: int | None = field(
        default=None, metadata={"help": "Trained tokens among the text tokens; default: depends on the role."}
    )


def main(argv: list[str]) -> None:
    """Parse the options, then print the parameter counts and the memory estimate."""
    from trl import ModelConfig, SFTConfig

    from echo_ft.training.checks import check_options
    from echo_ft.training.config import EchoConfig

    # Without a GPU, transformers rejects bf16 unless the CPU is requested explicitly.
    own, config, sft, base = configs.parse(
        [MemoryConfig, EchoConfig, SFTConfig, ModelConfig], [*argv, "--use_cpu", "true"]
    )
    check_options(sft, base, config)
    if own.gpus < 1:
        raise EchoError(f"gpus is {own.gpus}; give a number of GPUs of at least 1")
    model = trainable_meta_model(config, base)
    print(f"{base.model_name_or_path}, {config.role}")
    print(memory_report(model, largest_batch(own, config, sft), sft, base, own.gpus))


def largest_batch(own: MemoryConfig, config: EchoConfig, sft: SFTConfig) -> BatchShape:
    """The largest batch of a recipe on one GPU, with exchanges of the sizes in `own` or those of the role."""
    images, text_tokens, label_tokens = _EXCHANGE_SIZES[config.role]
    images = images if own.images is None else own.images
    exchanges = _EXCHANGES_PER_CASE.get(config.role, 1) if own.exchanges is None else own.exchanges
    return BatchShape(
        rows=sft.per_device_train_batch_size * exchanges,
        images=images,
        max_pixels=config.max_pixels,
        text_tokens=text_tokens if own.text_tokens is None else own.text_tokens,
        label_tokens=label_tokens if own.label_tokens is None else own.label_tokens,
        distinct_images=sft.per_device_train_batch_size * images,
    )


if __name__ == "__main__":
    configs.run_main(main)
