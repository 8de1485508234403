"""Training one role: its options, its cases as batches, and what a model needs to take them (trainer.py trains)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any

from trl import ModelConfig, SFTConfig

from echo_ft.errors import EchoError
from echo_ft.model import attention
from echo_ft.records import ROLES


@dataclass(frozen=True)
class EchoConfig:
    """What train/sft.py needs beside TRL's SFTConfig and ModelConfig."""

    role: str = field(metadata={"help": "The expert to train.", "choices": list(ROLES)})
    dataset: str = field(metadata={"help": "A dataset folder, made by `python -m data_prep.build`."})
    min_pixels: int = field(metadata={"help": "Fewest pixels of an image, after resizing."})
    max_pixels: int = field(metadata={"help": "Most pixels of an image, after resizing: the pixel budget."})
    max_tokens: int = field(
        default=32768,
        metadata={"help": "A row of more tokens is rejected by name before step 1; nothing is ever cut."},
    )
    vision_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the vision tower's trainable weights; default learning_rate. With use_peft: "
            "false, 0 freezes the tower."
        },
    )
    merger_learning_rate: float | None = field(default=None, metadata={"help": "The same for the merger's."})
    features: str | None = field(
        default=None,
        metadata={
            "help": "A folder that keeps what the frozen vision tower makes of each image, for later epochs, roles and "
            "runs; under /dev/shm it is memory."
        },
    )
    features_gib: float = field(default=20.0, metadata={"help": "At most so many GiB are written there."})
    corrupted_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training cases whose query is degraded; the seed draws which, in what kind and how "
            "severely (echo_ft/corruptions.py)."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check everything, plan and print what training would take; needs no GPU and no weights."},
    )


# Options of TRL's SFTConfig that shape how TRL itself makes rows from text. Rows are made by echo_ft.model.rows here.
_WITHOUT_EFFECT = (
    "packing", "eval_packing", "padding_free", "completion_only_loss", "assistant_only_loss", "chat_template_path",
    "dataset_kwargs", "dataset_text_field", "dataset_num_proc", "eos_token", "pad_token", "pad_to_multiple_of",
    "shuffle_dataset", "truncation_mode", "model_init_kwargs", "remove_unused_columns",
)  # fmt: skip


def check_options(sft: SFTConfig, model: ModelConfig) -> None:
    """Refuse options that would do nothing or break a promise, and fix the ones that rows of our own need."""
    # Not a second SFTConfig: making one sets up the processes anew.
    defaults = {one.name: one.default for one in fields(SFTConfig)} | {"pad_to_multiple_of": None}
    for name in _WITHOUT_EFFECT:
        if getattr(sft, name) != defaults[name]:
            raise EchoError(
                f"{name} has no effect here: rows are made by echo_ft.model.rows; take it out of the config"
            )
    if sft.max_length not in (None, defaults["max_length"]):
        raise EchoError(
            f"max_length {sft.max_length} would cut rows, which is never done; set max_length: null, and max_tokens to "
            "reject long rows by name"
        )
    if model.attn_implementation not in (None, *attention.IMPLEMENTATIONS):
        raise EchoError(
            f"attn_implementation {model.attn_implementation} does not keep the branches of a row apart; choose from "
            + ", ".join(attention.IMPLEMENTATIONS)
        )
    if sft.n_gpu > 1:
        raise EchoError(
            "one process sees several GPUs; start one process a GPU (accelerate launch --config_file "
            "recipes/accelerate/ddp.yaml ...), or show it a single one with CUDA_VISIBLE_DEVICES=0"
        )
    if sft.label_smoothing_factor:
        raise EchoError("label_smoothing_factor is not supported: the loss is TRL's own; take it out of the config")
    if sft.train_sampling_strategy not in ("random", "sequential"):
        raise EchoError(
            f"train_sampling_strategy {sft.train_sampling_strategy} saves padding, of which there is none here; choose "
            "random, which gives the processes of a step as many tokens each, or sequential"
        )
    checkpointing: Any = sft.gradient_checkpointing_kwargs or {}
    if checkpointing.get("use_reentrant"):
        raise EchoError(
            "gradient_checkpointing_kwargs: use_reentrant lets no one ask for gradients before step 1, as is done "
            "here; take it out (ZeRO-3 sets it by itself)"
        )
    if sft.trust_remote_code:
        raise EchoError("trust_remote_code is never used; Qwen2-VL is part of transformers")
    if model.model_name_or_path is None:
        raise EchoError("model_name_or_path is missing: a model's folder or a hub name, e.g. Qwen/Qwen2-VL-2B-Instruct")
    quantized = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(model, name)), None)
    if quantized and find_spec("bitsandbytes") is None:
        raise EchoError(f"{quantized} needs bitsandbytes; pip install 'echo-ft[quantization]'")
    if quantized and not model.use_peft:
        raise EchoError(
            f"{quantized} with use_peft: false: a quantized base cannot be tuned itself; take one of them out"
        )
    if model.use_peft and not model.lora_target_modules:
        raise EchoError(
            "lora_target_modules is missing; the language model's are [q_proj, k_proj, v_proj, o_proj, ...]"
        )
    sft.max_length = None
    sft.remove_unused_columns = False
    sft.dataset_kwargs = {"skip_prepare_dataset": True}
