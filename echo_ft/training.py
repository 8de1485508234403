"""Training one role: rows that share their prefix, under TRL's SFTTrainer and PEFT."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import rotate_checkpoints
from trl import ModelConfig, SFTConfig, SFTTrainer

from echo_ft import attention
from echo_ft.checkpoints import WHOLE
from echo_ft.dataset import Dataset
from echo_ft.flops import Load, costs, image_load, peak, text_load
from echo_ft.images import load_image
from echo_ft.layout import IGNORED, Layout, Row, blank, pack, pixels
from echo_ft.model import ADAPTER_CARD, GROUPS, AdapterCard, load_model, part_of, write_card
from echo_ft.planning import Plan, case_starts, plan
from echo_ft.records import ROLES, EchoError, Exchange, from_dict, read_jsonl, write_jsonl
from echo_ft.vision import BLANK, FeatureStore, Images, share_images


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
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check everything, plan and print what training would take; needs no GPU and no weights."},
    )


# Options of TRL's SFTConfig that shape how TRL itself makes rows from text. Rows are made by echo_ft.layout here.
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
            raise EchoError(f"{name} has no effect here: rows are made by echo_ft.layout; take it out of the config")
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
    if sft.train_sampling_strategy == "group_by_length":
        raise EchoError(
            "train_sampling_strategy group_by_length saves padding, of which there is none here; choose random, "
            "sequential, or batch_rebalance, which gives every process the same number of tokens"
        )
    if sft.trust_remote_code:
        raise EchoError("trust_remote_code is never used; Qwen2-VL is part of transformers")
    if model.model_name_or_path is None:
        raise EchoError("model_name_or_path is missing: a model's folder or a hub name, e.g. Qwen/Qwen2-VL-2B-Instruct")
    if model.use_peft and not model.lora_target_modules:
        raise EchoError(
            "lora_target_modules is missing; the language model's are [q_proj, k_proj, v_proj, o_proj, ...]"
        )
    sft.max_length = None
    sft.remove_unused_columns = False
    sft.dataset_kwargs = {"skip_prepare_dataset": True}


def load_cases(
    layout: Layout, dataset: Dataset, config: EchoConfig, sft: SFTConfig, split: str
) -> tuple[datasets.Dataset, Plan]:
    """The usable cases of one split, and their plan; what is not usable is in rejected_<split>.jsonl in the output.

    Raises EchoError where none is usable.
    """
    path = dataset.folder / "sft" / config.role / f"{split}.jsonl"
    if not path.is_file():
        raise EchoError(f"there is no {path}; build the dataset again with data_prep.build")
    planned = plan(layout, read_jsonl(path, Exchange), dataset.root, config.max_tokens)
    if sft.process_index == 0:
        if not config.dry_run:
            write_jsonl(Path(str(sft.output_dir)) / f"rejected_{split}.jsonl", planned.rejected)
        print(f"{config.role}, {split}: {planned.words()}", flush=True)
    if not planned.rows:
        if planned.rejected:
            raise EchoError(f"{path} has no usable row: {planned.rejected[0].reason}")
        remedy = "give that split a larger share in the dataset's `fractions`"
        raise EchoError(f"{path} is empty; {remedy}" + (', or set eval_strategy: "no"' if split != "train" else ""))
    exchanges = datasets.Dataset.from_json(str(path)).select([row.index for row in planned.rows])
    tokens = [sum(row.text.tokens for row in case) for case in planned.cases()]
    return by_case(exchanges).add_column(sft.length_column_name, tokens), planned


def by_case(exchanges: datasets.Dataset) -> datasets.Dataset:
    """One row a case, its neighbouring `exchanges` as a list: a step goes through whole cases, whose images return.

    TRL (1.16) takes no other kind of dataset than this; the rows stay in Arrow.
    """
    table = exchanges.with_format("arrow")[:]
    asked = (branches[0]["id"].as_py() for branches in table["branches"])
    starts = case_starts(zip(table["case"].to_pylist(), asked, strict=True))
    rows = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), table.to_struct_array().combine_chunks())
    return datasets.Dataset(pa.table({"exchanges": rows}))


class Collator:
    """Makes a batch from cases of sft/<role>/*.jsonl; images are read here, in the loader's workers."""

    def __init__(
        self, layout: Layout, root: Path, store: FeatureStore | None = None, always_look: bool = False
    ) -> None:
        """With `always_look`, a batch without a new image brings a blank one that belongs to no place.

        Where the tower's weights or gradients are shared among processes, one that does not enter it leaves the others
        waiting for ever.
        """
        self.layout = layout
        self.root = root
        self.store = store
        self.always_look = always_look

    def __call__(self, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        exchanges = [from_dict(Exchange, example) for case in cases for example in case["exchanges"]]
        batch = self.batch([self.layout.load_row(exchange, self.root) for exchange in exchanges])
        batch["done"] = [len(cases), sum(len(exchange.branches) for exchange in exchanges)]
        return batch

    def batch(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Rows packed into one, with the pixels of each different image whose features are not kept.

        Beside `layout.pack`: pixel_values (P, C), image_grid_thw (images, 3), and `image_order`, `image_paths` and
        `image_features` as in vision.Images.
        """
        places = [str(self.root / image) for row in rows for image in row.exchange.images]
        kept = {path: self.store.load(Path(path)) if self.store else None for path in dict.fromkeys(places)}
        new = [path for path, features in kept.items() if features is None]
        known = {path: features for path, features in kept.items() if features is not None}
        image = pixels(self.layout, [load_image(Path(path)) for path in new])
        if self.always_look and not new:
            new, image = [BLANK], blank(self.layout)
        number = {path: index for index, path in enumerate((*new, *known))}
        return {
            **pack(rows),
            **image,
            "load": astuple(text_load(rows) + image_load(image["image_grid_thw"].tolist())),
            "image_order": [number[path] for path in places],
            "image_paths": new,
            "image_features": list(known.values()),
        }


def packed_inputs(batch: Mapping[str, Any], implementation: str = "sdpa") -> dict[str, Any]:
    """What the model takes of a collated batch, by keyword: everything but the labels.

    `spans` is read by attention.attend, `images` by vision.share_images; `implementation` is one of
    attention.IMPLEMENTATIONS.
    """
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    masks = attention.block_mask if implementation == "flex_attention" else attention.spans
    inputs["spans"] = masks(batch["segments"], batch["lengths"])
    if batch["image_order"] or batch["image_paths"]:
        inputs |= {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
        inputs["images"] = Images(batch["image_order"], batch["image_paths"], batch["image_features"])
    return inputs


def prepare_model(model: Any, store: FeatureStore | None = None) -> None:
    """Let a Qwen2-VL take `packed_inputs`, and `keep`: the positions (N,) whose logits are wanted.

    Raises EchoError where `store` should keep features of a tower that is trained.
    """
    share_images(model, store)
    model.set_attn_implementation({"text_config": attention.NAME})

    def select(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs.get("keep") is not None:
            output.last_hidden_state = output.last_hidden_state[:, kwargs["keep"]]
        return output

    model.model.register_forward_hook(select, with_kwargs=True)


def freeze(model: Any, config: EchoConfig) -> Any:
    """`model` for full tuning: all of it trained, but the parts whose learning rate is 0."""
    rates = {"vision tower": config.vision_learning_rate, "merger": config.merger_learning_rate}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rates.get(part_of(name)) != 0)
    return model


class PrefixSharingTrainer(SFTTrainer):
    """SFTTrainer on packed prefix-sharing rows, with learning rates for tower and merger, and the adapter's card.

    A batch is `per_device_train_batch_size` cases. Logged with the loss, over all processes and since the log before:
    cases/s, questions/s, tokens/s, operations/s, and on a GPU of flops.PEAKS the share of its peak that they are (MFU).
    """

    def __init__(
        self,
        *args: Any,
        config: EchoConfig,
        card: AdapterCard,
        largest: Sequence[int] = (0,),
        store: FeatureStore | None = None,
        implementation: str = "sdpa",
        **kwargs: Any,
    ) -> None:
        """`largest` are the cases that would make the largest batch of a device.

        `implementation` is one of attention.IMPLEMENTATIONS.
        """
        self.config = config
        self.card = card
        super().__init__(*args, **kwargs)
        self.add_callback(Probe(self, largest))
        self.implementation = implementation
        if implementation == "flex_attention" and self.args.device.type == "cpu":
            raise EchoError("attn_implementation flex_attention has no backward pass on a CPU (torch 2.15); set sdpa")
        tuned = self.accelerator.unwrap_model(self.model)
        core = tuned.get_base_model() if isinstance(tuned, PeftModel) else tuned
        prepare_model(core, store)
        self._costs = costs(core)
        self._peak = None
        if self.args.device.type == "cuda" and (self.args.bf16 or self.args.fp16):
            device = torch.cuda.get_device_name(self.args.device)
            self._peak = peak(device)
            if self._peak:
                words = f"MFU is of {self._peak / 1e12:g} TFLOP/s a GPU: {device}, dense bfloat16"
                self.accelerator.print(words)
        self._done = np.zeros(4)
        self._since = time.monotonic()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss of a packed row, with logits only where there is a label."""
        labels = inputs["labels"]
        # TRL (1.16) makes logits of all positions on a CPU, and of the labelled ones on a GPU alone.
        keep = (labels[0, 1:] != IGNORED).nonzero()[:, 0]
        packed = packed_inputs(inputs, self.implementation) | {"keep": keep, "shift_labels": labels[:, keep + 1]}
        seen = self._total_train_tokens
        loss = super().compute_loss(model, packed, return_outputs, num_items_in_batch)
        if model.training:
            operations = self._costs.of(Load(*inputs["load"]))
            done = torch.tensor(
                [*inputs["done"], labels.numel(), operations], device=labels.device, dtype=torch.float64
            )
            totals = self.accelerator.gather(done[None]).sum(dim=0).cpu().numpy()
            self._done += totals
            self._total_train_tokens = seen + int(totals[2])  # TRL counts the tokens of rows of its own
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def probe(self, cases: Sequence[int]) -> None:
        """Forward and backward of a batch of `cases`; nothing of it stays, neither gradients nor random numbers.

        Raises EchoError where it does not fit into memory, or a trained part gets no gradient. Not where weights are
        shared out among ranks (ZeRO-3, FSDP): there, gradients exist only piece by piece.
        """
        if is_deepspeed_zero3_enabled() or self.is_fsdp_enabled:
            return
        model = self.accelerator.unwrap_model(self.model)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        seen = self._total_train_tokens
        dataset: Any = self.train_dataset
        inputs = self.data_collator([dataset[index] for index in cases])
        words = (
            f"the largest batch ({len(cases)} cases, {inputs['input_ids'].numel()} tokens, "
            f"{len(inputs['image_grid_thw'])} images)"
        )
        try:
            with torch.random.fork_rng(), self.compute_loss_context_manager():
                inputs = self._prepare_inputs(inputs)
                model.train()
                loss = self.compute_loss(model, inputs)
                # Not loss.backward(): DDP and DeepSpeed would take these gradients for those of step 1.
                found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise EchoError(
                f"{words} does not fit into memory; {smaller(self.args, self.config.max_pixels)}"
            ) from error
        check_gradients(dict(zip(trained, found, strict=True)))
        if torch.cuda.is_available():
            words += f" takes {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            torch.cuda.empty_cache()
        self.accelerator.print(f"{words}, forward and backward: fits")
        self._total_train_tokens = seen
        self._metrics["train"].clear()
        self._done[:], self._since = 0, time.monotonic()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's evaluation, whose time is not counted as training."""
        start = time.monotonic()
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self._since += time.monotonic() - start
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, with what was gone through since the last one."""
        if "loss" in logs:
            now = time.monotonic()
            rates = self._done / (now - self._since)
            for name, rate in zip(("cases", "questions", "tokens"), rates.tolist(), strict=False):
                logs[f"{name}_per_second"] = round(rate, 2)
            logs["tflops_per_second"] = round(rates[3] / 1e12, 4)
            if self._peak:
                logs["mfu"] = round(rates[3] / (self._peak * self.args.world_size), 4)
            self._done[:], self._since = 0, now
        super().log(logs, start_time)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the vision tower's and the merger's own learning rates."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = {"vision tower": self.config.vision_learning_rate, "merger": self.config.merger_learning_rate}
        if all(rate is None for rate in rates.values()):
            return optimizer
        part = {
            parameter: part_of(name)
            for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters()
            if parameter.requires_grad
        }
        for name, rate in rates.items():
            if rate and name not in part.values():
                modules = "attn.qkv, attn.proj" if name == "vision tower" else "merger.mlp.0"
                raise EchoError(
                    f"{name.split()[0]}_learning_rate is {rate}, but nothing of the {name} is trained; name its "
                    f"modules in lora_target_modules ({modules}, ...) or take the rate out"
                )
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
        # Under DeepSpeed and FSDP every process comes here.
        folder = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            # The card comes last: without one, nobody takes an adapter that was being written for a finished one.
            (folder / ADAPTER_CARD).unlink(missing_ok=True)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_card(folder, self.card)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # transformers (5.23) saves a whole Qwen2-VL under the names of older versions, and here looks for today's,
        # finds none and goes on with the weights it has. from_pretrained knows both.
        tuned = self.accelerator.unwrap_model(self.model)
        if isinstance(tuned, PeftModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            tuned.load_state_dict(load_model(resume_from_checkpoint, dtype="auto").state_dict())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's checkpoint, marked as whole after every process has written its part.

        transformers (5.23) writes into the final folder, and deletes older ones before the new one can be relied on.
        """
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / WHOLE).unlink(missing_ok=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (folder / WHOLE).touch()
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)


class Probe(TrainerCallback):
    """Before step 1: the largest batch forward and backward, once, so that a run does not end there hours later."""

    def __init__(self, trainer: PrefixSharingTrainer, cases: Sequence[int]) -> None:
        self.trainer = trainer
        self.cases = cases

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self.trainer.probe(self.cases)


def check_gradients(named: Mapping[str, torch.Tensor | None]) -> None:
    """Raise EchoError unless all gradients, by parameter, are finite, and each trained part has one that is not zero.

    LoRA's second matrix starts at zero, so the first one's gradient is zero too at step 1: a part counts, not a matrix.
    """
    alive: dict[str, bool] = {}
    for name, gradient in named.items():
        if gradient is not None and not torch.isfinite(gradient).all():
            raise EchoError(
                f"the first gradient of {name} is not finite; use bf16, not fp16, or full precision, and no use_dora "
                "where the weights have rows of zeros"
            )
        part = part_of(name)
        alive[part] = alive.get(part, False) or (gradient is not None and bool(gradient.any()))
    dead = [part for part, has_gradient in alive.items() if not has_gradient]
    if dead:
        raise EchoError(
            f"lora_target_modules names the {' and the '.join(dead)}, but no gradient comes there; set "
            "gradient_checkpointing: false or take those modules out"
        )


def smaller(args: TrainingArguments, max_pixels: int) -> str:
    """The option that makes the largest batch smaller at the least cost, and to what it should be set."""
    batch = args.per_device_train_batch_size
    if not args.gradient_checkpointing:
        return "set gradient_checkpointing: true"
    if batch > 1:
        more = args.gradient_accumulation_steps * math.ceil(batch / (batch // 2))
        return f"set per_device_train_batch_size: {batch // 2} and gradient_accumulation_steps: {more}"
    return f"set max_pixels: {max_pixels // 2}, here and in the run, or take recipes/accelerate/zero3.yaml"
