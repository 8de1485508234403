"""The training loop of a pretraining stage. A stopped stage can resume and then produces the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from echo_ft.files import atomic_file
from echo_ft.terminal import LOGGER

CHECKPOINT_SECONDS = 60.0
"""Time between two checkpoints."""
LOG_SECONDS = 30.0
"""Time between two lines of progress."""
WARMUP_STEPS = 50
MAX_GRADIENT_NORM = 1.0

StepLosses = Callable[[np.random.Generator, float], dict[str, torch.Tensor]]
"""Draws a batch and returns its weighted losses. All randomness comes from the step's generator.

The second argument is the fraction of the stage's steps that are done.
"""


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a stage: linear warm-up, a constant phase, then linear decay to zero."""

    steps: int
    decay_share: float = 0.4

    def factor(self, step: int) -> float:
        """Return the learning rate at `step` as a fraction of its peak."""
        rest = 1 - step / self.steps
        return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, rest / self.decay_share)


def train_stage(
    name: str,
    seed: tuple[int, ...],
    folder: Path,
    trained: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    losses: StepLosses,
    schedule: Schedule,
) -> float:
    """Train a stage, or the rest of it, and save `trained` as `NAME.pt` in `folder`. Returns the minutes that it took.

    A finished stage is only loaded. Each parameter group's initial learning rate is its peak.
    """
    finished, partial, minutes, first = folder / f"{name}.pt", folder / f"{name}.partial.pt", 0.0, 0
    if finished.is_file():
        saved = load(finished)
        trained.load_state_dict(saved["weights"])
        return float(saved["minutes"])
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    if partial.is_file():
        saved = load(partial)
        trained.load_state_dict(saved["weights"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first, minutes = saved["step"], saved["minutes"]
        LOGGER.info("%s: resumes at step %d of %d", name, first, schedule.steps)
    started = saved_at = logged_at = time.monotonic()
    sums: dict[str, float] = {}
    since = first

    def spent() -> float:
        return minutes + (time.monotonic() - started) / 60

    groups = [group for optimizer in optimizers for group in optimizer.param_groups]  # loading created new groups
    weights = [weight for group in groups for weight in group["params"]]
    for step in range(first, schedule.steps):
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * schedule.factor(step)
        parts = losses(np.random.default_rng((*seed, step)), step / schedule.steps)
        torch.stack(list(parts.values())).sum().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for part, loss in parts.items():
            sums[part] = sums.get(part, 0.0) + loss.item()
        now = time.monotonic()
        if now - logged_at > LOG_SECONDS:
            logged_at = now
            means = "  ".join(f"{part} {total / (step + 1 - since):.3f}" for part, total in sums.items())
            LOGGER.info("%s: step %d of %d  %.1f min  %s", name, step + 1, schedule.steps, spent(), means)
            sums, since = {}, step + 1
        if now - saved_at > CHECKPOINT_SECONDS:
            saved_at = now
            state = [optimizer.state_dict() for optimizer in optimizers]
            save({"weights": trained.state_dict(), "optimizers": state, "step": step + 1, "minutes": spent()}, partial)
    minutes = spent()
    save({"weights": trained.state_dict(), "minutes": minutes}, finished)
    partial.unlink(missing_ok=True)
    return minutes


def save(value: dict[str, Any], path: Path) -> None:
    """Save atomically, so that the file is always either complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as new:
        torch.save(value, new)


def load(path: Path) -> dict[str, Any]:
    """Load a file that `save` wrote."""
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def adamw(weights: Sequence[torch.nn.Parameter], lr: float, decay: float = 0.05) -> torch.optim.AdamW:
    """Return AdamW with weight decay only for matrices."""
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": decay},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
