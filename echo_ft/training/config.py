"""Options of train/sft.py that TRL does not have, and a check of those that it has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig, get_quantization_config

from echo_ft.records import ROLES


@dataclass(frozen=True)
class EchoConfig:
    """Options of train/sft.py in addition to TRL's SFTConfig and ModelConfig."""

    role: str = field(metadata={"help": "The role to train.", "choices": list(ROLES)})
    dataset: str = field(metadata={"help": "Dataset folder, made by `python -m data_prep.build`."})
    min_pixels: int = field(metadata={"help": "Minimum number of pixels of a resized image."})
    max_pixels: int = field(metadata={"help": "Maximum number of pixels of a resized image (the pixel budget)."})
    max_tokens: int = field(
        default=32768,
        metadata={"help": "Rows with more tokens are rejected by name before step 1. Rows are never truncated."},
    )
    vision_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the vision tower's trainable weights; default: learning_rate. With use_peft: "
            "false, 0 freezes the tower."
        },
    )
    merger_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the merger's trainable weights; default: learning_rate. With use_peft: false, 0 "
            "freezes the merger."
        },
    )
    features: str | None = field(
        default=None,
        metadata={
            "help": "Folder that stores the output of the frozen vision tower for each image. Later epochs, roles and "
            "runs reuse it. A folder under /dev/shm is in memory."
        },
    )
    features_gib: float = field(default=20.0, metadata={"help": "Size limit of the features folder in GiB."})
    corrupted_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training cases with a corrupted query, from 0 to 1. The seed selects the cases, the "
            "type of corruption and its severity (echo_ft/images/corruptions.py)."
        },
    )
    mask_loss: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the mask loss beside the loss of the completions, from 0 (off) to 1. Light heads learn "
            "from masks, boxes or polygons which image tokens of the query show the defect."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check everything and print a plan with a memory estimate. Needs no GPU and no weights."},
    )


def quantization_config(model: ModelConfig) -> Any:
    """The bitsandbytes config that TRL's options describe, or None. The vision tower is not quantized.

    Otherwise the features of small defects would pass through 4 bits, and runs would use the adapter with a tower of
    full precision. Keeping the 7B's tower (0.67 billion parameters) costs 0.9 GiB.
    """
    config = get_quantization_config(model)
    if config is not None:
        config.llm_int8_skip_modules = ["model.visual", "lm_head"]
    return config
