"""The group of processes that `accelerate launch` or `torchrun` started."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


LONGEST_WAIT = timedelta(days=30)
"""How long processes wait for the slowest one. One process may work longer than torch's default of ten minutes."""


def join_processes() -> PartialState:
    """Join the process group and return this process's state.

    The group uses the CPU if there is no GPU or if ACCELERATE_USE_CPU is set.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)
