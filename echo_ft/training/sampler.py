"""The training sampler, which balances random cases over processes, and a callback that passes on the epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback


class BalancedSampler(Sampler[int]):
    """Random order of cases in which all processes get about the same number of tokens in each step.

    The cases of a step depend only on seed and epoch, and match torch's RandomSampler under accelerate. A run on
    several processes therefore takes the same steps as a run on one. Within a step, cases of similar length form a
    micro-batch. In a micro-batch, the longest case goes to the process with the fewest tokens so far. (transformers
    5.23's batch_rebalance counts padding tokens and restarts an epoch with the wrong cases on resume.)
    """

    def __init__(self, tokens: Sequence[int], batch: int, processes: int, accumulation: int, seed: int) -> None:
        """`tokens` has one entry per case, which is 0 for the copies of `pad_cases`. They go into the last step.

        `batch` is the number of cases per process and micro-batch, and `accumulation` that of micro-batches per step.
        """
        self.tokens = tokens
        self.batch = batch
        self.processes = processes
        self.accumulation = accumulation
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; every epoch has its own order of cases."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        copies = [case for case, tokens in enumerate(self.tokens) if not tokens]
        order = torch.randperm(len(self.tokens) - len(copies), generator=generator).tolist() + copies
        micro_batch = self.batch * self.processes
        step = micro_batch * self.accumulation
        for start in range(0, len(order), step):
            cases = order[start : start + step]
            whole = len(cases) // micro_batch * micro_batch
            cases, rest = cases[:whole], cases[whole:]
            cases.sort(key=lambda case: -self.tokens[case])
            totals = [0] * self.processes
            for first in range(0, whole, micro_batch):
                shares: list[list[int]] = [[] for _ in range(self.processes)]
                for case in cases[first : first + micro_batch]:
                    free = (rank for rank, share in enumerate(shares) if len(share) < self.batch)
                    rank = min(free, key=lambda rank: (sum(self.tokens[other] for other in shares[rank]), totals[rank]))
                    shares[rank].append(case)
                for rank, share in enumerate(shares):
                    totals[rank] += sum(self.tokens[case] for case in share)
                    yield from share
            yield from rest  # accelerate drops them, because only dataloader_drop_last leaves the cases unpadded


class DrawnEpoch(TrainerCallback):
    """Sets the epoch of the trainer's collator and balanced sampler.

    When accelerate (1.15) skips batches, it does not pass the epoch on to the sampler.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        epoch = int(state.epoch or 0)
        self.trainer.data_collator.set_epoch(epoch)
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(epoch)
