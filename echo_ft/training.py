"""Training one role: its options, its cases as batches, and what a model needs to take them (trainer.py trains)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from torch.utils.data import Sampler
from trl import ModelConfig, SFTConfig

from echo_ft import attention
from echo_ft.corruptions import Corruption, View, draw_corruption, views
from echo_ft.dataset import Dataset
from echo_ft.flops import image_load, text_load
from echo_ft.layout import Layout, Row, blank, pack, pixels
from echo_ft.model import part_of
from echo_ft.planning import Plan, case_starts, plan
from echo_ft.records import ROLES, EchoError, Exchange, from_dict, read_jsonl, write_jsonl
from echo_ft.vision import FeatureStore, Images, project_patches, share_images


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
        for rejection in planned.rejected[:3]:
            print(f"  rejected: {rejection.item}: {rejection.reason}", flush=True)
    if not planned.rows:
        if planned.rejected:
            raise EchoError(f"{path} has no usable row: {planned.rejected[0].reason}")
        remedy = "give that split a larger share in the dataset's `fractions`, or add photographs if it has too few"
        raise EchoError(f"{path} is empty; {remedy}" + (', or set eval_strategy: "no"' if split != "train" else ""))
    exchanges = datasets.Dataset.from_json(str(path)).select([row.index for row in planned.rows])
    tokens = [sum(row.text.tokens for row in case) for case in planned.cases()]
    cases = by_case(exchanges).add_column(sft.length_column_name, tokens)
    if split == "train" and config.corrupted_share:
        drawn = [draw_corruption(case[0].case, config.corrupted_share, sft.seed) for case in planned.cases()]
        if sft.process_index == 0:
            degraded = sum(one is not None for one in drawn)
            print(f"{config.role}, {split}: {degraded} of {len(drawn)} cases have a degraded query", flush=True)
        cases = cases.add_column("corruption", [None if one is None else asdict(one) for one in drawn])
    return cases, planned


def by_case(exchanges: datasets.Dataset) -> datasets.Dataset:
    """One row a case, its neighbouring `exchanges` as a list: a step goes through whole cases, whose images return.

    TRL (1.16) takes no other kind of dataset than this; the rows stay in Arrow.
    """
    table = exchanges.with_format("arrow")[:]
    asked = (branches[0]["id"].as_py() for branches in table["branches"])
    starts = case_starts(zip(table["case"].to_pylist(), asked, strict=True))
    rows = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), table.to_struct_array().combine_chunks())
    return datasets.Dataset(pa.table({"exchanges": rows}))


class BalancedSampler(Sampler[int]):
    """Cases in random order, those of each step such that its processes get about as many tokens.

    Which cases a step has, the seed and the epoch alone decide, and they are those of torch's RandomSampler under
    accelerate: a run on several processes learns what a run on one does. Of a step, cases of like length are in one
    micro-batch, and within it the longest goes to the process that has least so far. (transformers' own
    batch_rebalance counts padding, and starts an epoch anew with the wrong cases where a run is gone on with: 5.23.)
    """

    def __init__(self, tokens: Sequence[int], batch: int, processes: int, accumulated: int, seed: int) -> None:
        """`tokens` of each case; `batch` cases are one micro-batch of one process."""
        self.tokens = tokens
        self.batch = batch
        self.processes = processes
        self.accumulated = accumulated
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def set_epoch(self, epoch: int) -> None:
        """Epochs differ in their order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.tokens), generator=generator).tolist()
        micro = self.batch * self.processes
        step = micro * self.accumulated
        for start in range(0, len(order), step):
            cases = order[start : start + step]
            if len(cases) < step:  # accelerate fills it up from the beginning
                yield from cases
                continue
            cases.sort(key=lambda case: -self.tokens[case])
            totals = [0] * self.processes
            for first in range(0, step, micro):
                shares: list[list[int]] = [[] for _ in range(self.processes)]
                for case in cases[first : first + micro]:
                    free = (rank for rank, share in enumerate(shares) if len(share) < self.batch)
                    rank = min(free, key=lambda rank: (sum(self.tokens[one] for one in shares[rank]), totals[rank]))
                    shares[rank].append(case)
                for rank, share in enumerate(shares):
                    totals[rank] += sum(self.tokens[case] for case in share)
                    yield from share


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
        exchanges, corruptions = [], []
        for case in cases:
            exchanges += [from_dict(Exchange, example) for example in case["exchanges"]]
            how = case.get("corruption")
            corruptions += [None if how is None else from_dict(Corruption, how)] * len(case["exchanges"])
        batch = self.batch([self.layout.load_row(exchange, self.root) for exchange in exchanges], corruptions)
        batch["done"] = [len(cases), sum(len(exchange.branches) for exchange in exchanges)]
        return batch

    def batch(self, rows: Sequence[Row], corruptions: Sequence[Corruption | None] = ()) -> dict[str, Any]:
        """Rows packed into one, with the pixels of each different image whose features are not kept.

        `corruptions` are those of the rows' queries, none by default. Beside `layout.pack`: pixel_values (P, C),
        image_grid_thw (images, 3), and `image_order`, `image_views` and `image_features` as in vision.Images.
        """
        pairs = zip(rows, corruptions or [None] * len(rows), strict=True)
        places = [view for row, corruption in pairs for view in views(row.exchange, self.root, corruption)]
        kept = {view: self.store.load(view) if self.store else None for view in dict.fromkeys(places)}
        new: list[View | None] = [view for view, features in kept.items() if features is None]
        known = {view: features for view, features in kept.items() if features is not None}
        image = pixels(self.layout, [view.load() for view in new if view is not None])
        if self.always_look and not new:
            new, image = [None], blank(self.layout)
        number = {view: index for index, view in enumerate((*new, *known))}
        return {
            **pack(rows),
            **image,
            "load": astuple(text_load(rows) + image_load(image["image_grid_thw"].tolist())),
            "image_order": [number[view] for view in places],
            "image_views": new,
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
    if batch["image_order"] or batch["image_views"]:
        inputs |= {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
        inputs["images"] = Images(batch["image_order"], batch["image_views"], batch["image_features"])
    return inputs


def prepare_model(model: Any, store: FeatureStore | None = None) -> None:
    """Let a Qwen2-VL take `packed_inputs`, and `keep`: the positions (N,) whose logits are wanted.

    Raises EchoError where `store` should keep features of a tower that is trained.
    """
    project_patches(model)
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
