"""Measure one implementation in its own process. Runs in other trainers' environments, as it needs only transformers.

Prints one line of JSON: seconds and CPU seconds per step, losses, the work of a step, peak memory (of the process or of
its GPU), device, precision and versions.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from benchmarks.training.workload import Workload

TURN = "a step is done; waiting for the next turn"
"""Line that an implementation prints after every step if the compared implementations alternate. It then reads a line
before it continues."""

PACKAGES = ("torch", "transformers", "peft", "trl", "llamafactory", "ms-swift")


class Steps(TrainerCallback):
    """Records the end time and loss of each step, and the work of the first batch."""

    def __init__(self, turns: bool = False) -> None:
        """With `turns`, wait for the next turn after every step."""
        self.turns = turns
        self.ends: list[float] = []
        self.starts: list[float] = []
        """When the step after each of `ends` began: immediately, or with the next turn."""
        self.cpu: list[float] = []
        """The process's CPU time at each of `ends`. Waiting for a turn takes no CPU time."""
        self.losses: list[float] = []
        self.work: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer. The Trainer builds the batches of a step after the end of the previous step."""
        self.end_step()

    def end_step(self) -> None:
        """Record the end of a step; if the compared implementations alternate, wait for this one's next turn."""
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())
        if self.turns:
            print(TURN, flush=True)
            if not sys.stdin.readline():
                raise SystemExit("the benchmark has ended")
        self.starts.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """The duration of every step except the first."""
        return [end - start for start, end in zip(self.starts, self.ends[1:], strict=False)]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Called by the Trainer."""
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_train_end(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Called by the Trainer. Builds the first batch again with the implementation's own loader."""
        self.work = work(next(iter(train_dataloader)))


def work(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Count the encoded patches, non-padding tokens and labels of a batch, and return its `work_counts`, if any."""
    mask = batch.get("attention_mask")
    work_counts = {"work_counts": batch["work_counts"]} if "work_counts" in batch else {}
    return {
        **work_counts,
        "patches": len(batch["pixel_values"]),
        "tokens": batch["input_ids"].numel() if mask is None else int(mask.sum()),
        "labels": int((batch["labels"] != -100).sum()),
    }


def versions() -> dict[str, str]:
    """Return the versions of the PACKAGES in this environment."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main(
    contenders: Mapping[str, Callable[[Path, Workload, bool], Steps]],
    name: str,
    folder: str,
    workload: str,
    features: str,
) -> None:
    """Run one implementation on `workload`, given as JSON, and print its measurements.

    `features` is `stored` if the implementation reuses image features across epochs, otherwise `computed`.
    """
    set_seed(0)
    measured = contenders[name](Path(folder), Workload(**json.loads(workload)), features == "stored")
    gpu = torch.cuda.is_available()
    found = {
        "seconds": measured.seconds,
        "cpu_seconds": [end - start for start, end in pairwise(measured.cpu)],
        "losses": measured.losses,
        "peak_mib": (
            torch.cuda.max_memory_allocated() / 2**20 if gpu
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        ),
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "precision": "bfloat16" if gpu else "float32",  # all implementations use the same precision
        "versions": versions(),
        **measured.work,
    }  # fmt: skip
    print(json.dumps(found), flush=True)
