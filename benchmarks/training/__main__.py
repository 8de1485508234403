"""Questions a second, side by side: `python -m benchmarks.training [--runs 3] [--steps 16] [--questions 5]`.

Every contender trains the same model on the same cases in the same order, in a process of its own, in turns. The first
steps of each process are left out; ratios are of medians over runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.training.workload import CASES_A_STEP

CONTENDERS = (("trl", "all"), ("echo-ft", "all"), ("echo-ft", "kept"), ("ideal", "all"), ("ideal", "kept"))
WARM = 3
"""Steps of a process that are not counted, and with kept features its first epoch."""


def measure(name: str, kept: str, folder: Path, cases: int, questions: int, steps: int) -> dict[str, Any]:
    """One run of one contender: questions/s at steady state, first losses, work of a step and peak memory."""
    count = steps + (cases // CASES_A_STEP if kept == "kept" else WARM)
    command = [sys.executable, "-m", "benchmarks.training.contender", name, str(folder)]
    done = subprocess.run(
        [*command, str(cases), str(questions), str(count), kept], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    found["rate"] = CASES_A_STEP * questions / statistics.median(found["seconds"][-steps:])
    return found


def main() -> None:
    """Measure all in turns and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--questions", type=int, default=5)
    options = parser.parse_args()
    results: dict[tuple[str, str], list[dict[str, Any]]] = {contender: [] for contender in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        for run in range(options.runs):
            for name, kept in CONTENDERS:
                found = measure(name, kept, Path(folder), options.cases, options.questions, options.steps)
                results[name, kept].append(found)
                print(f"run {run + 1}: {name}, {kept}: {found['rate']:.1f} questions/s", file=sys.stderr, flush=True)
    base = statistics.median(found["rate"] for found in results["trl", "all"])
    print("| contender | features | questions/s | against TRL | first losses | patches, tokens a step | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for (name, kept), runs in results.items():
        rate = statistics.median(found["rate"] for found in runs)
        low, high = min(found["rate"] for found in runs), max(found["rate"] for found in runs)
        losses = ", ".join(f"{loss:.4f}" for loss in runs[0]["losses"][:2])
        peak = statistics.median(found["peak_mib"] for found in runs)
        print(
            f"| {name} | {'kept' if kept == 'kept' else 'computed'} | {rate:.1f} ({low:.1f} to {high:.1f}) "
            f"| {rate / base:.2f} | {losses} | {runs[0]['patches']}, {runs[0]['tokens']} | {peak:.0f} |"
        )


if __name__ == "__main__":
    main()
