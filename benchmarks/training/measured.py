"""What is measured of a contender, in a process of its own; needs transformers alone, for other tools' environments.

Prints one line of JSON: seconds of each step, losses, the work of a step, peak memory (of the process, or of its GPU),
device, precision and versions.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from benchmarks.training.workload import Workload

PACKAGES = ("torch", "transformers", "peft", "trl", "llamafactory", "ms-swift")


class Steps(TrainerCallback):
    """When each step ended, its loss, and the work of the first step's batch."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.work: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Called by the Trainer."""
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_train_end(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Called by the Trainer: the first batch again, as this contender's own loader makes it."""
        self.work = work(next(iter(train_dataloader)))


def work(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Patches encoded, tokens that are not padding, and labels of a batch, and its `load` if it tells it."""
    mask = batch.get("attention_mask")
    told = {"load": batch["load"]} if "load" in batch else {}
    return {
        **told,
        "patches": len(batch["pixel_values"]),
        "tokens": batch["input_ids"].numel() if mask is None else int(mask.sum()),
        "labels": int((batch["labels"] != -100).sum()),
    }


def versions() -> dict[str, str]:
    """Those of PACKAGES that this environment has."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main(
    contenders: Mapping[str, Callable[[Path, Workload, bool], Steps]], name: str, folder: str, workload: str, kept: str
) -> None:
    """Run one contender on the workload, which is JSON, and print what was measured."""
    set_seed(0)
    measured = contenders[name](Path(folder), Workload(**json.loads(workload)), kept == "kept")
    gpu = torch.cuda.is_available()
    found = {
        "seconds": [later - earlier for earlier, later in zip(measured.ends, measured.ends[1:], strict=False)],
        "losses": measured.losses,
        "peak_mib": (
            torch.cuda.max_memory_allocated() / 2**20 if gpu
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        ),
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "precision": "bfloat16" if gpu else "float32",  # every contender's
        "versions": versions(),
        **measured.work,
    }  # fmt: skip
    print(json.dumps(found), flush=True)
