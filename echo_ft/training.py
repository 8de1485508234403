"""Training one role: rows that share their prefix, under TRL's SFTTrainer and PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, SFTConfig, SFTTrainer

from echo_ft.dataset import Dataset
from echo_ft.layout import IGNORED, PADDING, Layout, Row, attention_mask, load_image, pad, pixels
from echo_ft.model import GROUPS, AdapterCard, part_of, read_card, skip_frozen_tower, write_card
from echo_ft.records import ROLES, EchoError, Exchange, Rejection, from_dict, read_jsonl, write_jsonl


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
        default=None, metadata={"help": "Learning rate of the vision tower's trainable weights; default learning_rate."}
    )
    merger_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the merger's trainable weights; default learning_rate."}
    )


# Options of TRL's SFTConfig that shape how TRL itself makes rows from text. Rows are made by echo_ft.layout here.
_WITHOUT_EFFECT = (
    "packing", "eval_packing", "padding_free", "completion_only_loss", "assistant_only_loss", "chat_template_path",
    "dataset_kwargs", "dataset_text_field", "dataset_num_proc", "eos_token", "pad_token", "pad_to_multiple_of",
    "shuffle_dataset", "truncation_mode", "model_init_kwargs", "remove_unused_columns",
)  # fmt: skip


def check_options(sft: SFTConfig, model: ModelConfig) -> None:
    """Refuse options that would do nothing or break a promise, and fix the ones that rows of our own need."""
    default = SFTConfig(output_dir=sft.output_dir, use_cpu=sft.use_cpu, bf16=sft.bf16, fp16=sft.fp16)
    for name in _WITHOUT_EFFECT:
        if getattr(sft, name) != getattr(default, name):
            raise EchoError(f"{name} has no effect here: rows are made by echo_ft.layout; take it out of the config")
    if sft.max_length not in (None, default.max_length):
        raise EchoError(
            f"max_length {sft.max_length} would cut rows, which is never done; set max_length: null, and max_tokens to "
            "reject long rows by name"
        )
    if model.attn_implementation not in (None, "sdpa"):
        raise EchoError(
            f"attn_implementation {model.attn_implementation} does not keep the branches of a row apart; set it to sdpa"
        )
    if sft.n_gpu > 1:
        raise EchoError(
            "one process sees several GPUs; start one process a GPU (accelerate launch --config_file "
            "recipes/accelerate/ddp.yaml ...), or show it a single one with CUDA_VISIBLE_DEVICES=0"
        )
    if sft.trust_remote_code:
        raise EchoError("trust_remote_code is never used; Qwen2-VL is part of transformers")
    if model.model_name_or_path is None:
        raise EchoError("model_name_or_path is missing: a model's folder or a hub name, e.g. Qwen/Qwen2-VL-2B-Instruct")
    if not model.use_peft:
        raise EchoError("use_peft must be true: this script trains LoRA adapters, one a role")
    if not model.lora_target_modules:
        raise EchoError(
            "lora_target_modules is missing; the language model's are [q_proj, k_proj, v_proj, o_proj, ...]"
        )
    sft.max_length = None
    sft.remove_unused_columns = False
    sft.dataset_kwargs = {"skip_prepare_dataset": True}


@dataclass(frozen=True)
class Plan:
    """What training will go through, known from texts and image headers before step 1."""

    kept: list[int]
    """Indices of the usable rows."""
    tokens: int
    branches: int
    trained_tokens: int
    rejected: list[Rejection]


def plan(layout: Layout, exchanges: Iterable[Exchange], root: Path, max_tokens: int) -> Plan:
    """Lengths of all rows without decoding an image; rows that cannot be used are named, never cut."""
    kept, rejected = [], []
    tokens = branches = trained = 0
    for index, exchange in enumerate(exchanges):
        name = f"{exchange.role} {exchange.case}"
        try:
            row = layout.load_row(exchange, root)
        except EchoError as error:
            rejected.append(Rejection(name, str(error)))
            continue
        if len(row.input_ids) > max_tokens:
            reason = (
                f"{len(row.input_ids)} tokens, more than max_tokens {max_tokens}; lower max_pixels or raise max_tokens"
            )
            rejected.append(Rejection(name, reason))
            continue
        kept.append(index)
        tokens += len(row.input_ids)
        branches += len(exchange.branches)
        trained += int((row.labels != IGNORED).sum())
    return Plan(kept, tokens, branches, trained, rejected)


def load_rows(layout: Layout, dataset: Dataset, config: EchoConfig, sft: SFTConfig, split: str) -> datasets.Dataset:
    """The usable rows of one split, planned; the others are written to rejected_<split>.jsonl in the output folder.

    Raises EchoError where none is usable.
    """
    path = dataset.folder / "sft" / config.role / f"{split}.jsonl"
    if not path.is_file():
        raise EchoError(f"there is no {path}; build the dataset again with data_prep.build")
    planned = plan(layout, read_jsonl(path, Exchange), dataset.root, config.max_tokens)
    if sft.process_index == 0:
        write_jsonl(Path(str(sft.output_dir)) / f"rejected_{split}.jsonl", planned.rejected)
        print(
            f"{config.role}, {split}: {len(planned.kept)} rows, {planned.branches} branches, {planned.tokens} "
            f"tokens, {planned.trained_tokens} of them trained on; {len(planned.rejected)} rows rejected",
            flush=True,
        )
    if not planned.kept:
        if planned.rejected:
            raise EchoError(f"{path} has no usable row: {planned.rejected[0].reason}")
        remedy = "give that split a larger share in the dataset's `fractions`"
        raise EchoError(f"{path} is empty; {remedy}" + (', or set eval_strategy: "no"' if split != "train" else ""))
    return datasets.Dataset.from_json(str(path)).select(planned.kept)


def find_checkpoint(sft: SFTConfig, card: AdapterCard) -> str | None:
    """The checkpoint to go on from: `resume_from_checkpoint` is a folder, or `true` for the newest in output_dir.

    With `true`, a run without a checkpoint starts from the beginning. Raises EchoError where the folder is missing, and
    where its adapter is of another role, dataset, base model, prompt version or pixel budget than `card`.
    """
    wanted = sft.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        return None
    if wanted.lower() == "true":
        wanted = get_last_checkpoint(str(sft.output_dir)) if Path(str(sft.output_dir)).is_dir() else None
        if wanted is None:
            return None
    if not Path(wanted).is_dir():
        raise EchoError(f"there is no checkpoint {wanted}; give its folder, or true for the newest in output_dir")
    found = read_card(Path(wanted))
    for name in ("role", "dataset_fingerprint", "base_fingerprint", "prompt_version", "min_pixels", "max_pixels"):
        if getattr(found, name) != getattr(card, name):
            raise EchoError(
                f"{wanted} was trained with {name} {getattr(found, name)}, not {getattr(card, name)}; go on with the "
                "same config, or choose another output_dir to start anew"
            )
    return str(wanted)


class Collator:
    """Makes a batch from rows of sft/<role>/*.jsonl; images are read here, in the loader's workers."""

    def __init__(self, layout: Layout, root: Path) -> None:
        self.layout = layout
        self.root = root

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        exchanges = [from_dict(Exchange, example) for example in examples]
        rows = [self.layout.load_row(exchange, self.root) for exchange in exchanges]
        return self.batch(rows)

    def batch(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The model's inputs for rows; the trainer makes the attention mask from `segments`, on its own device."""
        images = [load_image(self.root / image) for row in rows for image in row.exchange.images]
        return {**pad(rows, self.layout.pad_token_id), **pixels(self.layout, images)}


class PrefixSharingTrainer(SFTTrainer):
    """SFTTrainer on prefix-sharing rows, with learning rates for vision tower and merger, and the adapter's card."""

    def __init__(self, *args: Any, config: EchoConfig, card: AdapterCard, **kwargs: Any) -> None:
        self.config = config
        self.card = card
        super().__init__(*args, **kwargs)
        self.add_callback(GradientCheck())
        skip_frozen_tower(self.accelerator.unwrap_model(self.model))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss with the branches' attention mask."""
        segments = inputs["segments"]
        inputs = {key: value for key, value in inputs.items() if key != "segments"}
        inputs["attention_mask"] = attention_mask(segments)
        seen = self._total_train_tokens
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            # TRL counts the ones of a (B, L) mask; this one has (B, 1, L, L).
            tokens = self.accelerator.gather_for_metrics((segments != PADDING).sum()).sum().item()
            self._total_train_tokens = seen + tokens
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the vision tower's and the merger's own learning rates."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = {"vision tower": self.config.vision_learning_rate, "merger": self.config.merger_learning_rate}
        if all(rate is None for rate in rates.values()):
            return optimizer
        part = {
            parameter: part_of(name) for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters()
        }
        groups = list(optimizer.param_groups)
        optimizer.param_groups.clear()
        for group in groups:
            for name in GROUPS:
                members = [parameter for parameter in group["params"] if part[parameter] == name]
                rate = rates.get(name)
                if members:
                    optimizer.add_param_group({**group, "params": members, "lr": group["lr"] if rate is None else rate})
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        write_card(Path(output_dir or str(self.args.output_dir)), self.card)


class GradientCheck(TrainerCallback):
    """Before the first optimizer step: every trainable part has a gradient, finite and not zero, or the run ends."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer. DeepSpeed has already stepped by then and keeps gradients elsewhere: not checked."""
        if state.global_step > 0 or args.deepspeed_plugin is not None:
            return
        alive: dict[str, bool] = {}
        for name, parameter in kwargs["model"].named_parameters():
            if not parameter.requires_grad:
                continue
            part = part_of(name)
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                raise EchoError(
                    f"the first gradient of {name} is not finite; lower learning_rate or use bf16, not fp16"
                )
            alive[part] = alive.get(part, False) or (parameter.grad is not None and bool(parameter.grad.any()))
        dead = [part for part, has_gradient in alive.items() if not has_gradient]
        if dead:
            raise EchoError(
                f"lora_target_modules names the {' and the '.join(dead)}, but no gradient came there in the first "
                "step; set gradient_checkpointing: false or take those modules out"
            )
