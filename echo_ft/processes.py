"""The processes that `accelerate launch` or `torchrun` started, on CPUs or GPUs."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


LONGEST_WAIT = timedelta(days=30)
"""How long processes wait for the slowest one. The share of one process may take longer than torch's ten minutes."""


def join_processes() -> PartialState:
    """This process among all that were launched together; on the CPU if there is no GPU or accelerate says so."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)
