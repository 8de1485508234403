"""Run train/sft.py on CPU processes with what accelerate and transformers start only on GPUs: FSDP2, and ZeRO in bf16.

accelerate (1.15) enables FSDP only for its kinds of accelerators, and transformers (5.23) rejects bf16 on a CPU unless
use_cpu is set, which would turn DeepSpeed off. The topologies themselves run on a CPU.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import accelerate.state
import transformers.training_args
from accelerate.utils import DistributedType

import echo_ft.training.config


def allow_cpu() -> None:
    """Make accelerate treat CPU processes like those on a supported accelerator, and bf16 as supported."""
    kinds: Any = {kind.name: kind for kind in DistributedType}
    accelerate.state.DistributedType = SimpleNamespace(**{**kinds, "MULTI_HPU": DistributedType.MULTI_CPU})
    for module in (transformers.training_args, echo_ft.training.config):
        module.is_torch_bf16_gpu_available = lambda: True


if __name__ == "__main__":
    from train.sft import main

    allow_cpu()
    main(sys.argv[1:])
