"""Kill a training at random times and resume it: `python -m benchmarks.reliability --minutes 60`.

The command builds a small dataset and trains a few layers of echo-tiny on it undisturbed, on one process and on two.
Then it trains again and again. After a random time, it kills a random process with SIGKILL, ends the others as torchrun
does, and resumes. Each completed training must match the undisturbed one: losses and weights in every bit on one
process, and losses to within 1e-6 on two. The table shows memory, open files and temporary files at the first and the
last kills, for you to judge whether they grow.

The processes are forked from one that has already imported everything, so that a kill costs only seconds. They run
train/sft.py as a launcher would. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil

from benchmarks.reliability.rank import train
from echo_ft.files import write_json
from echo_ft.inputs import read_json_object

BASE = Path("recipes/tiny/echo-tiny")
CASES_PER_STEP = 2
PIXELS = 56 * 56
"""Pixels of an image, which then takes four tokens."""
TOLERANCE = {1: 0.0, 2: 1e-6}
"""Largest allowed difference of a loss, by the number of processes."""
LONGEST_END = 60
"""Seconds within which a process must end after another one has died."""
LONGEST_RUN = 600
"""Seconds after which a training counts as hanging, as `wait` counts them."""


@dataclass
class Tally:
    """The results of the kill loop for one number of processes."""

    kills: int = 0
    steps_before: list[int] = field(default_factory=list)
    """The number of steps that had been saved at each kill."""
    trainings: int = 0
    """Number of completed trainings."""
    faults: list[str] = field(default_factory=list)
    largest_difference: float = 0.0
    slowest_end: float = 0.0
    """Seconds that a process needed to end after another one had died."""
    megabytes: list[float] = field(default_factory=list)
    """Memory of the largest process at each kill."""
    handles: list[int] = field(default_factory=list)
    """Largest number of open files of a process at each kill."""
    temporary: list[int] = field(default_factory=list)
    """Temporary files after each kill."""


class Loop:
    """Trainings of a model on a fixed number of processes, in a folder."""

    def __init__(self, folder: Path, model: Path, dataset: Path, ranks: int, steps: int, draw: random.Random) -> None:
        self.folder, self.model, self.dataset = folder, model, dataset
        self.ranks, self.steps, self.draw = ranks, steps, draw
        self.tally, self.temporary = Tally(), folder / "tmp"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["benchmarks.reliability.preload"])

    def start(self, output: Path) -> list[ForkServerProcess]:
        """Start or resume a training in `output`."""
        options: dict[str, Any] = {
            "config": "recipes/tiny/decision_maker.yaml", "dataset": self.dataset, "output_dir": output,
            "model_name_or_path": self.model, "min_pixels": PIXELS, "max_pixels": PIXELS, "max_steps": self.steps,
            "per_device_train_batch_size": CASES_PER_STEP // self.ranks, "lora_dropout": 0.1,
            "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2,
            "eval_strategy": "no", "warmup_steps": 2, "disable_tqdm": "true", "resume_from_checkpoint": "true",
        }  # fmt: skip
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        self.temporary.mkdir(exist_ok=True)
        shared = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(self.temporary)}
        if self.ranks > 1:
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(self.ranks)}
        processes = []
        for rank in range(self.ranks):
            environment = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if self.ranks > 1 else {})
            log = str(output.with_suffix(f".{rank}.log"))
            processes.append(self.context.Process(target=train, args=(arguments, environment, log)))
            processes[-1].start()
        return processes

    def undisturbed(self) -> float:
        """Train twice without a kill, and return the seconds that the second training took, as `wait` counts them.

        The first one also waits for the imports.
        """
        for name in ("undisturbed", "again"):
            output = self.folder / name
            processes = self.start(output)
            duration = wait(processes, LONGEST_RUN)
            statuses = [process.exitcode for process in processes]
            if any(status != 0 for status in statuses):
                _kill(processes)  # at its exit, multiprocessing would wait for a hanging process
                what = f"hangs after {LONGEST_RUN} s" if None in statuses else f"failed with status {statuses}"
                raise SystemExit(f"the undisturbed training {what}:\n{_end_of(output.with_suffix('.0.log'))}")
        self.compare(output)
        return duration

    def run(self, output: Path, seconds: float) -> bool:
        """Train until the end or until a kill after `seconds`, as `wait` counts them.

        Returns whether the training is complete.
        """
        processes = self.start(output)
        wait(processes, seconds)
        alive = [process for process in processes if process.is_alive()]
        if any(process.exitcode for process in processes if process not in alive):
            self.fault(output, f"status {[process.exitcode for process in processes]}")  # None means that it still runs
            _kill(alive)
            return True
        if not alive:
            self.compare(output)
            return True
        self._measure(alive)
        victim = self.draw.choice(alive)
        victim.kill()
        victim.join()
        self.tally.kills += 1
        self.tally.steps_before.append(max((_step(path) for path in output.glob("checkpoint-*/whole")), default=0))
        self._end(output, [process for process in alive if process is not victim])
        self.tally.temporary.append(sum(len(files) for _, _, files in os.walk(self.temporary)))
        return False

    def _end(self, output: Path, others: Sequence[ForkServerProcess]) -> None:
        started = time.monotonic()
        for process in others:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGTERM)  # torchrun sends this signal too
            process.join(LONGEST_END)
            if process.is_alive():
                self.fault(output, f"a process still runs {LONGEST_END} s after another one was killed")
                process.kill()
                process.join()
            self.tally.slowest_end = max(self.tally.slowest_end, time.monotonic() - started)

    def _measure(self, alive: Sequence[ForkServerProcess]) -> None:
        try:
            seen = [psutil.Process(process.pid) for process in alive]
            self.tally.megabytes.append(max(one.memory_info().rss for one in seen) / 2**20)
            self.tally.handles.append(max(one.num_fds() for one in seen))
        except psutil.NoSuchProcess:  # the process has just ended
            return

    def compare(self, output: Path) -> None:
        """Compare a completed training with the undisturbed one, and search its logs for a traceback."""
        self.tally.trainings += 1
        expected, found = _losses(self.folder / "undisturbed"), _losses(output)
        if expected.keys() != found.keys():
            self.fault(output, f"it logged the steps {sorted(found)}")
            return
        difference = max(abs(expected[step] - found[step]) for step in expected)
        self.tally.largest_difference = max(self.tally.largest_difference, difference)
        if difference > TOLERANCE[self.ranks]:
            self.fault(output, f"a loss differs by {difference:.2g}")
        if self.ranks == 1:
            first, second = (path / "adapter_model.safetensors" for path in (self.folder / "undisturbed", output))
            if first.read_bytes() != second.read_bytes():
                self.fault(output, "its weights differ")
        if any("Traceback (most recent call last)" in log.read_text(errors="replace") for log in _logs(output)):
            self.fault(output, "a process ended with a traceback")

    def fault(self, output: Path, what: str) -> None:
        """Record a fault, and print the end of each process's log."""
        self.tally.faults.append(f"{output.name}: {what}")
        print(f"{output.name}: {what}", *map(_end_of, _logs(output)), sep="\n", file=sys.stderr, flush=True)


def wait(processes: Sequence[ForkServerProcess], seconds: float) -> float:
    """Wait until all processes have ended or `seconds` have passed, and return the seconds that have passed.

    Time in which a process is ready to run but gets no core does not count. Of several processes, the one that waited
    longest decides. On a busy machine, this is most of the time, and a slow training would look like one that hangs.
    """
    started, unserved, passed = time.monotonic(), 0.0, 0.0
    while passed < seconds and any(process.is_alive() for process in processes):
        time.sleep(0.02)
        for process in processes:
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended, or the system is not Linux
                _, nanoseconds, _ = Path(f"/proc/{process.pid}/schedstat").read_text(encoding="ascii").split()
                unserved = max(unserved, int(nanoseconds) / 1e9)
        passed = time.monotonic() - started - unserved
    return passed


def _kill(processes: Sequence[ForkServerProcess]) -> None:
    for process in processes:
        process.kill()
        process.join()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _step(marker: Path) -> int:
    return int(marker.parent.name.removeprefix("checkpoint-"))


def _losses(output: Path) -> dict[int, float]:
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def _logs(output: Path) -> list[Path]:
    return sorted(output.parent.glob(f"{output.name}.*.log"))


def _end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-1500:] if log.is_file() else ""


def kill_loop(loop: Loop, minutes: float, kills: int) -> Tally:
    """Kill and resume trainings until the time or the number of kills is reached, and finish the last one."""
    duration = loop.undisturbed()
    print(f"{loop.ranks} processes: {loop.steps} steps in {duration:.1f} s without a kill", flush=True)
    deadline, number = time.monotonic() + 60 * minutes, 0
    output = loop.folder / "training-0"
    while time.monotonic() < deadline and loop.tally.kills < kills:
        if loop.run(output, loop.draw.uniform(0, duration)):
            shutil.rmtree(output, ignore_errors=True)
            number += 1
            output = loop.folder / f"training-{number}"
    if not loop.run(output, LONGEST_RUN):
        loop.fault(output, f"it is not complete after {LONGEST_RUN} s")
    return loop.tally


def growth(values: Sequence[float]) -> str:
    """Return the medians of the first and the last fifth of the values."""
    part = max(1, len(values) // 5)
    return f"{statistics.median(values[:part]):.0f} to {statistics.median(values[-part:]):.0f}" if values else "none"


def table(tallies: dict[int, Tally]) -> str:
    """Return one line per number of processes."""
    lines = [
        "| processes | kills | in the middle of a training | trainings completed | largest difference of a loss "
        "| slowest end of the other process, s | memory, MiB | open files | temporary files | faults |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks, tally in tallies.items():
        inside = sum(step > 0 for step in tally.steps_before)
        figures = (growth(tally.megabytes), growth(tally.handles), growth(tally.temporary), len(tally.faults))
        lines.append(
            f"| {ranks} | {tally.kills} | {inside} | {tally.trainings} | {tally.largest_difference:.2g} "
            f"| {tally.slowest_end:.1f} | {' | '.join(map(str, figures))} |"
        )
    return "\n".join(lines)


def build_model(folder: Path) -> Path:
    """Copy echo-tiny with only two layers and one vision block, so that a step takes a third of the time."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(BASE, folder)
    config = read_json_object(BASE / "config.json")
    config["vision_config"]["depth"] = 1
    config["text_config"] |= {"num_hidden_layers": 2, "layer_types": config["text_config"]["layer_types"][:2]}
    write_json(folder / "config.json", config)
    weights = load_file(BASE / "model.safetensors")
    left_out = re.compile(r"\.(layers\.[2-9]|blocks\.[1-9])\.")
    kept = {name: weight for name, weight in weights.items() if not left_out.search(name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def build_dataset(folder: Path) -> Path:
    """Build a small dataset of drawn parts for the trainings. Its 10 training cases make 5 steps."""
    options = {"config": "recipes/tiny/data.yaml", "parts": "8", "split": "by_product", "output": str(folder)}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    command = ["data_prep.build", *arguments, "--held_out", "flange", "connector"]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the dataset could not be built:\n{done.stderr}")
    return folder


def main() -> None:
    """Run the kill loop on each number of processes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="Total minutes.")
    parser.add_argument("--kills", type=int, default=1000, help="Maximum number of kills per process count.")
    parser.add_argument("--ranks", type=int, nargs="+", choices=[1, 2], default=[1, 2], help="Process counts to test.")
    parser.add_argument("--steps", type=int, default=6, help="Steps per training.")
    parser.add_argument("--seed", type=int, default=0, help="Seed for choosing which processes to kill and when.")
    parser.add_argument("--dataset", type=Path, help="Dataset to train on; by default, the command builds one.")
    options = parser.parse_args()
    tallies = {}
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(Path(folder) / "model")
        dataset = (options.dataset or build_dataset(Path(folder) / "data")).resolve()
        for ranks in options.ranks:
            work = Path(folder) / f"ranks-{ranks}"
            work.mkdir()
            loop = Loop(work, model, dataset, ranks, options.steps, random.Random(options.seed))
            tallies[ranks] = kill_loop(loop, options.minutes / len(options.ranks), options.kills)
    print(table(tallies))
    sys.exit(1 if any(tally.faults for tally in tallies.values()) else 0)


if __name__ == "__main__":
    main()
