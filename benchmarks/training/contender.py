"""Run TRL's stock trainer, this project's trainer or its ideal loop, each in its own process.

`python -m benchmarks.training.contender NAME FOLDER WORKLOAD computed|stored`

Training uses float32 on a CPU and bfloat16 on a GPU.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from benchmarks.training.measurement import Steps, main, work
from benchmarks.training.workload import TARGETS, Workload, make_cases, make_exchanges, rows_for
from echo_ft.data.export_rows import prompt_completion_rows
from echo_ft.experts.roles import PROMPT_VERSION
from echo_ft.model.adapter_layers import add_adapters
from echo_ft.model.adapters import AdapterCard
from echo_ft.model.loading import load_model, load_processor
from echo_ft.model.preparation import packed_inputs, prepare_model
from echo_ft.model.rows import RowBuilder
from echo_ft.model.vision import TowerFeatureStore
from echo_ft.records import ROLES
from echo_ft.training.all_roles import AllRolesTrainer
from echo_ft.training.cases import EXCHANGE_SCHEMA, group_by_case
from echo_ft.training.collator import Collator
from echo_ft.training.config import ALL_ROLES, EchoConfig
from echo_ft.training.costs.flops import WorkCounts, unit_costs
from echo_ft.training.trainer import PrefixSharingTrainer

GPU = torch.cuda.is_available()


def base(workload: Workload) -> Any:
    return load_model(workload.model, None, "bfloat16" if GPU else "float32", attn_implementation="sdpa")


def processor_of(workload: Workload) -> Any:
    return load_processor(workload.model, None, workload.pixels, workload.pixels)


def lora() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules=r".*language_model.*\.(" + "|".join(TARGETS) + ")")


def card(folder: Path, workload: Workload) -> AdapterCard:
    """Return the card of an adapter that is never saved."""
    return AdapterCard(
        role="decision_maker", base_model=workload.model, base_revision="main", base_fingerprint="",
        prompt_version=PROMPT_VERSION, min_pixels=workload.pixels, max_pixels=workload.pixels, dataset=str(folder),
        dataset_fingerprint="", routing="full", versions={}, commit="",
    )  # fmt: skip


def arguments(folder: Path, batch: int, workload: Workload) -> SFTConfig:
    """Return the arguments of both trainers."""
    return SFTConfig(
        output_dir=str(folder / "out"), per_device_train_batch_size=batch, max_steps=workload.steps,
        use_cpu=not GPU, bf16=GPU, gradient_checkpointing=False, learning_rate=1e-4, lr_scheduler_type="constant",
        logging_steps=1, save_strategy="no", report_to="none", seed=0,
        train_sampling_strategy="sequential", max_length=None, disable_tqdm=True,
        dataloader_num_workers=workload.workers, dataloader_persistent_workers=workload.workers > 0,
    )  # fmt: skip


def trl_stock(folder: Path, workload: Workload, stored: bool) -> Steps:
    """Run TRL's own SFTTrainer and collator, with one row of images and text per prompt."""
    processor = processor_of(workload)
    rows = datasets.Dataset.from_list(rows_for(make_exchanges(folder, workload), folder, prompt_completion_rows))
    per_step = len(rows) // workload.steps_per_epoch
    rows = rows.cast_column("images", datasets.List(datasets.Image()))
    steps = Steps(workload.turns)
    trainer = SFTTrainer(
        model=base(workload),
        args=arguments(folder, per_step, workload),
        train_dataset=rows,
        processing_class=processor,
        peft_config=lora(),
        callbacks=[steps],
    )
    trainer.train()
    return steps


def trl_at_labels(folder: Path, workload: Workload, stored: bool) -> Steps:
    """Run TRL's trainer with logits only at the labels, as it computes them on a GPU.

    On a CPU, TRL (1.16) computes the logits of every token. At real widths, this takes longer than computing two
    layers.
    """
    from trl.trainer import utils

    utils._use_triton = lambda device: True  # add_fused_lm_head calls this only to decide whether it selects the labels
    return trl_stock(folder, workload, stored)


def echo_ft_trainer(folder: Path, workload: Workload, stored: bool) -> Steps:
    """Run this project's trainer. `stored` reuses the features of the frozen vision tower across epochs."""
    row_builder = RowBuilder(processor_of(workload))
    store = TowerFeatureStore(folder / "features", "benchmark", 2**30) if stored else None
    together = workload.role == ALL_ROLES
    collator = Collator(row_builder, folder, store, adapt_from=workload.adapt_from, by_role=together)
    cases = make_cases(folder, workload)
    rows = pa.Table.from_pylist([asdict(exchange) for case in cases for exchange in case], EXCHANGE_SCHEMA)
    args = arguments(folder, workload.cases_per_step, workload)
    args.remove_unused_columns = False
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    steps = Steps(workload.turns)
    options: dict[str, Any] = {
        "args": args,
        "data_collator": collator,
        "train_dataset": group_by_case(rows, range(0, len(rows) + 1, len(cases[0]))),
        "processing_class": row_builder.processor,
        "config": EchoConfig(
            workload.role, str(folder), workload.pixels, workload.pixels, adapt_from=workload.adapt_from
        ),
        "store": store,
        "callbacks": [steps],
    }
    own = card(folder, workload)
    if together:
        model = add_adapters(base(workload), lora(), ROLES, seed=0)
        trainer: PrefixSharingTrainer = AllRolesTrainer(model=model, cards=dict.fromkeys(ROLES, own), **options)
    else:
        trainer = PrefixSharingTrainer(model=base(workload), peft_config=lora(), card=own, **options)
    trainer.train()
    trained: Any = trainer.model
    add_operations(steps, trained.get_base_model())
    return steps


def add_operations(steps: Steps, core: Any) -> None:
    """Replace the load of the first batch with its operations, counting each distinct image and token once."""
    steps.work["operations"] = unit_costs(core).flops(WorkCounts(*steps.work.pop("work_counts")))


def ideal(folder: Path, workload: Workload, stored: bool) -> Steps:
    """Run only the forward and backward passes, on batches built in advance."""
    row_builder = RowBuilder(processor_of(workload))
    model = get_peft_model(base(workload).to("cuda" if GPU else "cpu"), lora()).train()
    cases = make_exchanges(folder, workload)
    store = TowerFeatureStore(folder / "features", "benchmark", 2**30) if stored else None
    prepare_model(model.get_base_model(), store)
    collator = Collator(row_builder, folder, store)

    size = workload.cases_per_step
    starts = range(0, workload.cases, size)

    def batch_of(start: int) -> dict[str, Any]:
        batch = collator.batch([row_builder.load_row(exchange, folder) for exchange in cases[start : start + size]])
        return send_to_device(batch, model.device)

    if stored:
        with torch.no_grad():
            for start in starts:
                model(**packed_inputs(batch_of(start)), keep=torch.tensor([0], device=model.device))
    batches = [batch_of(start) for start in starts]
    steps = Steps()
    for step in range(workload.steps):
        batch = batches[step % len(batches)]
        labels = batch["labels"]
        keep = (labels[0, 1:] != -100).nonzero()[:, 0]
        with torch.autocast("cuda", torch.bfloat16, enabled=GPU):
            logits = model(**packed_inputs(batch), keep=keep, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[0], labels[0, keep + 1])
        loss.backward()
        model.zero_grad()
        steps.losses.append(loss.item())  # reading the loss waits for the GPU
        steps.end_step()
    steps.work = work(batches[0])
    add_operations(steps, model.get_base_model())
    return steps


if __name__ == "__main__":
    main({"trl": trl_stock, "trl-labels": trl_at_labels, "echo-ft": echo_ft_trainer, "ideal": ideal}, *sys.argv[1:])
