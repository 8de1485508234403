"""Options of train/sft.py that TRL does not have, and a check of those that it has."""

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
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check everything and print a plan with a memory estimate. Needs no GPU and no weights."},
    )


# Options of SFTConfig that control how TRL turns text into rows. Here, echo_ft.model.rows makes the rows.
_WITHOUT_EFFECT = (
    "packing", "eval_packing", "padding_free", "completion_only_loss", "assistant_only_loss", "chat_template_path",
    "dataset_kwargs", "dataset_text_field", "dataset_num_proc", "eos_token", "pad_token", "pad_to_multiple_of",
    "shuffle_dataset", "truncation_mode", "model_init_kwargs", "remove_unused_columns",
)  # fmt: skip


def check_options(sft: SFTConfig, model: ModelConfig) -> None:
    """Set the options of `sft` that packed rows need.

    Raises EchoError for an option that has no effect here, that training does not support, or that is missing.
    """
    _check_row_options(sft)
    _check_trainer_options(sft)
    _check_model_options(model)
    sft.max_length = None
    sft.remove_unused_columns = False
    sft.dataset_kwargs = {"skip_prepare_dataset": True}


def _check_row_options(sft: SFTConfig) -> None:
    # Do not create a second SFTConfig for its defaults: that would initialise the process group again.
    defaults = {option.name: option.default for option in fields(SFTConfig)} | {"pad_to_multiple_of": None}
    for name in _WITHOUT_EFFECT:
        if getattr(sft, name) != defaults[name]:
            raise EchoError(
                f"{name} has no effect here, because echo_ft.model.rows makes the rows; remove it from the config"
            )
    if sft.max_length not in (None, defaults["max_length"]):
        raise EchoError(
            f"max_length {sft.max_length} would truncate rows, and rows are never truncated; set max_length: null, and "
            "use max_tokens to reject long rows by name"
        )


def _check_trainer_options(sft: SFTConfig) -> None:
    if sft.n_gpu > 1:
        raise EchoError(
            "one process sees several GPUs; start one process per GPU (accelerate launch --config_file "
            "recipes/accelerate/ddp.yaml ...), or select one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if sft.label_smoothing_factor:
        raise EchoError("label_smoothing_factor is not supported by TRL's loss; remove it from the config")
    if sft.train_sampling_strategy not in ("random", "sequential"):
        raise EchoError(
            f"train_sampling_strategy {sft.train_sampling_strategy} reduces padding, but packed rows have none; choose "
            "random, which balances the tokens of the processes in each step, or sequential"
        )
    checkpointing: Any = sft.gradient_checkpointing_kwargs or {}
    if checkpointing.get("use_reentrant"):
        raise EchoError(
            "use_reentrant: true is incompatible with the gradient check before step 1; remove it from "
            "gradient_checkpointing_kwargs (TRL sets it under ZeRO-3)"
        )
    if sft.trust_remote_code:
        raise EchoError("trust_remote_code is never used; Qwen2-VL is part of transformers, so remove the option")


def _check_model_options(model: ModelConfig) -> None:
    if model.attn_implementation not in (None, *attention.IMPLEMENTATIONS):
        raise EchoError(
            f"attn_implementation {model.attn_implementation} does not keep the branches of a row apart; choose from "
            + ", ".join(attention.IMPLEMENTATIONS)
        )
    if model.model_name_or_path is None:
        raise EchoError(
            "model_name_or_path is missing; give a model folder or a hub name, e.g. Qwen/Qwen2-VL-2B-Instruct"
        )
    quantized = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(model, name)), None)
    if quantized and find_spec("bitsandbytes") is None:
        raise EchoError(f"{quantized} needs bitsandbytes; install it with pip install 'echo-ft[quantization]'")
    if quantized and not model.use_peft:
        raise EchoError(
            f"{quantized} is set with use_peft: false, but the weights of a quantized model cannot be trained; remove "
            "one of the two options"
        )
    if model.use_peft and not model.lora_target_modules:
        raise EchoError(
            "lora_target_modules is missing; those of the language model are [q_proj, k_proj, v_proj, o_proj, ...]"
        )
