from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


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
