"""Measure implementations step by step in turns, so that a slow minute of the machine slows all of them.

Every implementation is a process that stops after each step until its next turn. All models are in memory at the same
time.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.training.measurement import TURN


def take_turns(
    commands: Mapping[tuple[str, str], Sequence[str]], steps: int, counted: int, rows: int, folder: Path
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Run the implementations for `steps` steps, one step each in turn; returns one measurement per counted step.

    Only the last `counted` steps are measured. `rate` is in questions/s, with `rows` questions per step. If one fails,
    this exits with the end of its output.
    """
    results = {}
    with ExitStack() as stack:
        running = {}
        for number, (contender, command) in enumerate(commands.items()):
            log = stack.enter_context(open(folder / f"{number}.log", "w+", encoding="utf-8"))
            running[contender] = stack.enter_context(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8"
                )
            )
            _wait(running[contender], log.name)  # it loads and takes its first step while no other runs
        for _ in range(steps - 1):
            for number, process in enumerate(running.values()):
                _go(process)
                _wait(process, str(folder / f"{number}.log"))
        for contender, process in running.items():
            _go(process)
            *_, last = process.stdout or [""]
            found = json.loads(last)
            results[contender] = [found | {"rate": rows / seconds} for seconds in found["seconds"][-counted:]]
    return results


def _go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def _wait(process: subprocess.Popen[str], log: str) -> None:
    """Return when the implementation has finished a step."""
    for line in process.stdout or ():
        if line == f"{TURN}\n":
            return
    raise SystemExit(f"an implementation stopped early:\n{Path(log).read_text(encoding='utf-8')[-3000:]}")
