"""Start train/sft.py on echo-tiny, and read the losses that it logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.conftest import ECHO_TINY, ROOT

BIN = Path(sys.executable).parent
SAME_TRAINING = [
    "--max_steps", "3", "--logging_steps", "1", "--learning_rate", "1e-2", "--warmup_steps", "0",
    "--eval_strategy", "no", "--lora_dropout", "0", "--per_device_eval_batch_size", "2", "--optim", "adamw_torch",
]  # fmt: skip
"""Options for runs of three steps that must end with the same losses."""

BEST_OF_SIX = [
    *SAME_TRAINING, "--max_steps", "6", "--learning_rate", "1", "--warmup_steps", "2",
    "--lora_target_modules", "q_proj", "v_proj", "--load_best_model_at_end", "true",
    "--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1",
]  # fmt: skip
"""Options for runs of six steps whose learning rate ruins the model after the first, which is therefore the best."""


def logged_state(output: Path) -> dict[str, Any]:
    """What the Trainer recorded about a run."""
    state: dict[str, Any] = json.loads((output / "trainer_state.json").read_text())
    return state


def launch(
    *arguments: object,
    ranks: int = 1,
    fails: bool = False,
    launcher: Sequence[object] = (),
    script: Sequence[str] = ("train/sft.py",),
    **environment: str,
) -> str:
    """Run train/sft.py, or another `script`, with `accelerate launch` and the flags in `launcher`. Returns its output.

    Several ranks start with torchrun, because `accelerate launch --cpu --num_processes 2` starts one process
    (accelerate 1.15).
    """
    start = ["torchrun", f"--nproc_per_node={ranks}"] if ranks > 1 else ["accelerate", "launch", "--quiet", *launcher]
    done = subprocess.run(
        [str(BIN / str(start[0])), *map(str, start[1:]), *script, *map(str, arguments)],
        cwd=ROOT,
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def launch_deepspeed(recipe: str, *arguments: object) -> str:
    """Run train/sft.py on two CPU processes with a recipe of recipes/accelerate. Returns its output."""
    # accelerate (1.15) uses DeepSpeed on a CPU only if a backend is named; with ACCELERATE_USE_CPU it would use DDP.
    launcher = ["--config_file", f"recipes/accelerate/{recipe}.yaml", "--num_processes", 2, "--mixed_precision", "no"]
    environment = {"ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}
    return launch(*arguments, "--ddp_backend", "gloo", launcher=launcher, **environment)


BFLOAT16 = ["--dtype", "bfloat16", "--bf16", "true"]


def launch_bfloat16(recipe: str, *arguments: object) -> str:
    """Run train/sft.py in bfloat16 on two CPU processes with a recipe of recipes/accelerate. Returns its output."""
    environment = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false" if "zero" in recipe else "true"}
    backend = ["--ddp_backend", "gloo"] if "zero" in recipe else []
    launcher = ["--config_file", f"recipes/accelerate/{recipe}.yaml", "--num_processes", 2]
    script = ["-m", "tests.support.gpu_only_on_cpu"]
    return launch(*arguments, *BFLOAT16, *backend, launcher=launcher, script=script, **environment)


def tiny_options(role: str, dataset: Path, output: Path, *more: object) -> list[object]:
    """Options of train/sft.py for the tiny recipe of `role`."""
    recipe = ROOT / "recipes" / "tiny" / f"{role}.yaml"
    fixed = ["--dataset", dataset, "--output_dir", output, "--model_name_or_path", ECHO_TINY, "--report_to", "none"]
    return ["--config", recipe, *fixed, *more]


def history(output: Path, name: str = "loss") -> list[float]:
    """The loss of each step, or another value that the Trainer logs with it."""
    logged = logged_state(output)["log_history"]
    return [entry[name] for entry in logged if "loss" in entry]


def assert_equal_but_rounding(found: Sequence[float], expected: Sequence[float], tolerance: float) -> None:
    """Check that the values of all steps differ by less than `tolerance` of the expected ones, and not to one side.

    Errors of rounding have both signs, so their mean is much smaller than the largest. A mistake, such as a wrong
    divisor, shifts all steps to one side.
    """
    assert len(found) == len(expected), f"{len(found)} steps instead of {len(expected)}"
    errors = [value / wanted - 1 for value, wanted in zip(found, expected, strict=True)]
    assert max(map(abs, errors)) <= tolerance, errors
    assert abs(sum(errors)) / len(errors) <= tolerance / 5, f"the errors lie to one side: {errors}"


def losses(output: Path) -> list[float]:
    """The losses of three steps."""
    found = history(output)
    assert len(found) == 3
    return found


def run_in_process(*arguments: object) -> None:
    """Run train/sft.py in this process."""
    from train.sft import main

    main([str(argument) for argument in arguments])
