"""TRL's stock trainer, this project and its ideal loop, each in a process of its own.

`python -m benchmarks.training.contender NAME FOLDER CASES QUESTIONS STEPS WORKERS all|kept`
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from benchmarks.training.measured import Steps, main, work
from benchmarks.training.workload import MODEL, ROWS_A_STEP, SIDE, TARGETS, Workload, conversations, exchanges
from echo_ft.layout import Layout
from echo_ft.model import load_model, load_processor
from echo_ft.trainer import PrefixSharingTrainer
from echo_ft.training import Collator, EchoConfig, by_case, packed_inputs, prepare_model
from echo_ft.vision import FeatureStore


def lora() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules=r".*language_model.*\.(" + "|".join(TARGETS) + ")")


def arguments(folder: Path, batch: int, workload: Workload) -> SFTConfig:
    """What both trainers are run with."""
    return SFTConfig(
        output_dir=str(folder / "out"), per_device_train_batch_size=batch, max_steps=workload.steps, use_cpu=True,
        bf16=False, gradient_checkpointing=False, learning_rate=1e-4, lr_scheduler_type="constant", logging_steps=1,
        save_strategy="no", report_to="none", seed=0, train_sampling_strategy="sequential", max_length=None,
        disable_tqdm=True, dataloader_num_workers=workload.workers,
        dataloader_persistent_workers=workload.workers > 0,
    )  # fmt: skip


def trl_stock(folder: Path, workload: Workload, kept: bool) -> Steps:
    """TRL's own SFTTrainer and collator: a row of images and text for each question."""
    processor = load_processor(MODEL, None, SIDE * SIDE, SIDE * SIDE)
    rows = datasets.Dataset.from_list(conversations(exchanges(folder, workload), folder))
    rows = rows.cast_column("images", datasets.List(datasets.Image()))
    steps = Steps()
    trainer = SFTTrainer(
        model=load_model(MODEL, None, "float32", attn_implementation="sdpa"),
        args=arguments(folder, ROWS_A_STEP, workload),
        train_dataset=rows,
        processing_class=processor,
        peft_config=lora(),
        callbacks=[steps],
    )
    trainer.train()
    return steps


def ours(folder: Path, workload: Workload, kept: bool) -> Steps:
    """This project's trainer; `kept` keeps the frozen tower's features across epochs."""
    layout = Layout(load_processor(MODEL, None, SIDE * SIDE, SIDE * SIDE))
    store = FeatureStore(folder / "features", "benchmark", 2**30) if kept else None
    collator = Collator(layout, folder, store)
    rows = datasets.Dataset.from_list([asdict(exchange) for exchange in exchanges(folder, workload)])
    args = arguments(folder, workload.cases_a_step, workload)
    args.remove_unused_columns = False
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    steps = Steps()
    trainer = PrefixSharingTrainer(
        model=load_model(MODEL, None, "float32", attn_implementation="sdpa"),
        args=args,
        data_collator=collator,
        train_dataset=by_case(rows),
        processing_class=layout.processor,
        peft_config=lora(),
        config=EchoConfig("decision_maker", str(folder), SIDE * SIDE, SIDE * SIDE),
        card=None,  # nothing is saved
        store=store,
        callbacks=[steps],
    )
    trainer.train()
    return steps


def ideal(folder: Path, workload: Workload, kept: bool) -> Steps:
    """Forward and backward of batches made before, and nothing else."""
    layout = Layout(load_processor(MODEL, None, SIDE * SIDE, SIDE * SIDE))
    model = get_peft_model(load_model(MODEL, None, "float32", attn_implementation="sdpa"), lora()).train()
    made = exchanges(folder, workload)
    store = FeatureStore(folder / "features", "benchmark", 2**30) if kept else None
    prepare_model(model.get_base_model(), store)
    collator = Collator(layout, folder, store)

    size = workload.cases_a_step
    firsts = range(0, workload.cases, size)

    def batch_of(first: int) -> dict[str, Any]:
        return collator.batch([layout.load_row(exchange, folder) for exchange in made[first : first + size]])

    if kept:
        with torch.no_grad():
            for first in firsts:
                model(**packed_inputs(batch_of(first)), keep=torch.tensor([0]))
    batches = [batch_of(first) for first in firsts]
    steps = Steps()
    for step in range(workload.steps):
        batch = batches[step % len(batches)]
        labels = batch["labels"]
        keep = (labels[0, 1:] != -100).nonzero()[:, 0]
        logits = model(**packed_inputs(batch), keep=keep, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0], labels[0, keep + 1])
        loss.backward()
        model.zero_grad()
        steps.ends.append(time.perf_counter())
        steps.losses.append(loss.item())
    steps.work = work(batches[0])
    return steps


if __name__ == "__main__":
    main({"trl": trl_stock, "echo-ft": ours, "ideal": ideal}, *sys.argv[1:])
