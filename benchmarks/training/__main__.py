"""Questions a second, side by side: `python -m benchmarks.training [--runs 3] [--steps 16] [--questions 5]`.

Every contender trains the same model on the same cases in the same order, ten questions a step, in a process of its
own, in turns. The first steps of each process are left out; ratios are of medians over runs. LLaMA-Factory and ms-swift
take part where the Python of an environment that has them is given.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.training.workload import ROWS_A_STEP, Workload

CONTENDERS = (
    ("trl", "all"), ("llamafactory", "all"), ("ms-swift", "all"),
    ("echo-ft", "all"), ("echo-ft", "kept"), ("ideal", "all"), ("ideal", "kept"),
)  # fmt: skip
NEIGHBOURS = ("trl", "llamafactory", "ms-swift")
WARM = 3
"""Steps of a process that are not counted, and with kept features its first epoch."""


def measure(command: Sequence[str], name: str, kept: str, folder: Path, workload: Workload) -> dict[str, Any]:
    """One run of one contender: questions/s at steady state, first losses, work of a step and peak memory."""
    count = workload.steps + (workload.steps_an_epoch if kept == "kept" else WARM)
    numbers = (str(number) for number in (workload.cases, workload.questions, count, workload.workers))
    caches = {"HF_HOME": str(folder / "hf"), "MODELSCOPE_CACHE": str(folder / "modelscope"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, name, str(folder), *numbers, kept],
        capture_output=True, text=True, check=False, env=os.environ | caches | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    found["rate"] = ROWS_A_STEP / statistics.median(found["seconds"][-workload.steps :])
    return found


def table(results: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> str:
    """One line a contender, medians over its runs, and the versions of what was measured."""
    rates = {contender: statistics.median(found["rate"] for found in runs) for contender, runs in results.items()}
    best = max(rate for (name, _), rate in rates.items() if name in NEIGHBOURS)
    lines = [
        "| contender | features | questions/s | against the best neighbour | first losses "
        "| patches, tokens, labels a step | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, kept), runs in results.items():
        rate, low, high = rates[name, kept], min(found["rate"] for found in runs), max(found["rate"] for found in runs)
        losses = ", ".join(f"{loss:.4f}" for loss in runs[0]["losses"][:2])
        peak = statistics.median(found["peak_mib"] for found in runs)
        lines.append(
            f"| {name} | {'kept' if kept == 'kept' else 'computed'} | {rate:.1f} ({low:.1f} to {high:.1f}) "
            f"| {rate / best:.2f} | {losses} "
            f"| {runs[0]['patches']}, {runs[0]['tokens']}, {runs[0]['labels']} | {peak:.0f} |"
        )
    for (name, _), runs in results.items():
        if name in NEIGHBOURS:
            found = ", ".join(f"{package} {number}" for package, number in runs[0]["versions"].items())
            lines.append(f"\n{name}: {found}")
    return "\n".join(lines)


def main() -> None:
    """Measure all in turns and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--questions", type=int, default=5, help="of a case; a step has ten, whatever this is")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches, for every contender")
    parser.add_argument("--llamafactory", metavar="PYTHON", help="the Python of an environment with LLaMA-Factory")
    parser.add_argument("--ms_swift", metavar="PYTHON", help="the Python of an environment with ms-swift")
    options = parser.parse_args()
    workload = Workload(options.cases, options.questions, options.steps, options.workers)
    if ROWS_A_STEP % options.questions:
        parser.error(f"--questions {options.questions} does not divide the {ROWS_A_STEP} questions of a step")
    if options.cases % workload.cases_a_step:
        parser.error(f"--cases {options.cases} is not a multiple of the {workload.cases_a_step} cases of a step")
    own, neighbour = "benchmarks.training.contender", "benchmarks.training.neighbours"
    commands = {name: [sys.executable, "-m", own] for name in ("trl", "echo-ft", "ideal")}
    for name, python in (("llamafactory", options.llamafactory), ("ms-swift", options.ms_swift)):
        if python:
            commands[name] = [python, "-m", neighbour]
    results: dict[tuple[str, str], list[dict[str, Any]]] = {
        (name, kept): [] for name, kept in CONTENDERS if name in commands
    }
    with tempfile.TemporaryDirectory() as folder:
        for run in range(options.runs):
            for name, kept in results:
                found = measure(commands[name], name, kept, Path(folder), workload)
                results[name, kept].append(found)
                print(f"run {run + 1}: {name}, {kept}: {found['rate']:.1f} questions/s", file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
