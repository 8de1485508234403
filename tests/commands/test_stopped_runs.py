"""Runs of several processes, and runs that are killed, through the real command line: the bytes of one left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from echo_ft.files import LOCK
from echo_ft.inference.run_folder import PREDICTIONS, RUN_DESCRIPTION, SHARDS, TRACES
from evaluation.run import main as run_main
from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS, ROOT, make_dataset

CASES = 9
"""Of two a batch: the last one is alone."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), train=1, validation=1, test=CASES)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A run that nobody stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run_main(options(dataset, output))
    return output


def options(dataset: Path, output: Path) -> list[str]:
    values = {"dataset": dataset, "output": output, "model_name_or_path": ECHO_TINY, "dtype": "float32"}
    values |= {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "max_new_tokens": 6, "batch_size": 2}
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def start(dataset: Path, output: Path, processes: int = 1) -> subprocess.Popen[bytes]:
    """The command of a user. (`accelerate launch --cpu` starts one process, whatever it is told: accelerate 1.15.)"""
    launcher = [sys.executable]
    if processes > 1:
        launcher = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", str(processes)]
    with open(log(output), "ab") as printed:
        return subprocess.Popen(
            [*launcher, "-m", "evaluation.run", *options(dataset, output)],
            cwd=ROOT,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=printed,
            stderr=printed,
            start_new_session=True,
        )


def log(output: Path) -> Path:
    return output.with_suffix(".log")


def complete(dataset: Path, output: Path, processes: int = 1) -> None:
    """The command once more, to its end."""
    assert start(dataset, output, processes).wait(300) == 0, log(output).read_text()


def lines(path: Path) -> list[bytes]:
    return sorted(path.read_bytes().splitlines())


def require_the_same_run(output: Path, whole: Path) -> None:
    for name in (PREDICTIONS, TRACES, RUN_DESCRIPTION):
        path = str(output).encode(), str(whole).encode()
        assert [line.replace(*path) for line in lines(output / name)] == lines(whole / name), name
    assert {path.name for path in output.iterdir()} == {PREDICTIONS, TRACES, RUN_DESCRIPTION, LOCK}


def until(reached: Callable[[], bool], started: subprocess.Popen[bytes], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert started.poll() is None and time.monotonic() < deadline, "it ended, or hangs"
        time.sleep(0.005)


def written(path: Path, count: int) -> bool:
    return path.is_file() and path.read_bytes().count(b"\n") >= count


def test_a_killed_run_is_gone_on_with_by_two_processes(dataset, whole, tmp_path):
    started = start(dataset, tmp_path / "run")
    try:
        until(lambda: written(tmp_path / "run" / PREDICTIONS, 1), started)
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    assert len(lines(tmp_path / "run" / PREDICTIONS)) < len(lines(whole / PREDICTIONS)), "it was killed in the middle"
    complete(dataset, tmp_path / "run", processes=2)
    require_the_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_one_of_two_processes_is_killed_and_another_number_goes_on(dataset, whole, tmp_path, killed, after):
    started = start(dataset, tmp_path / "run", processes=2)
    until(lambda: written(tmp_path / "run" / SHARDS / str(killed) / PREDICTIONS, 1), started)
    (rank,) = (one for one in psutil.Process(started.pid).children() if one.environ()["RANK"] == str(killed))
    rank.kill()
    assert started.wait(100) != 0, "the launcher ends the other one"
    complete(dataset, tmp_path / "run", processes=after)
    require_the_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_runs_killed_at_twenty_random_moments_end_as_one_left_alone(tmp_path):
    """Moments between the start of a process and the end that it has when left alone; where a run is complete before
    it is killed, the next moment is of another run."""
    dataset = make_dataset(tmp_path / "data", train=1, validation=1, test=40)
    clock = time.monotonic()
    complete(dataset, tmp_path / "whole")
    takes, questions = time.monotonic() - clock, len(lines(tmp_path / "whole" / PREDICTIONS))
    draw, kills, in_the_middle, ended = random.Random(0), 0, 0, 0
    while kills < 20:
        output = tmp_path / f"run_{ended}"
        started = start(dataset, output)
        try:
            status = started.wait(draw.uniform(0, takes))
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
            kills += 1
            in_the_middle += written(output / PREDICTIONS, 1) and not written(output / PREDICTIONS, questions)
        else:
            assert status == 0, log(output).read_text()
            require_the_same_run(output, tmp_path / "whole")
            ended += 1
    complete(dataset, output)
    require_the_same_run(output, tmp_path / "whole")
    print(f"{kills} kills, {in_the_middle} of them in runs with answers, {ended + 1} runs complete")
    assert in_the_middle > 3, "or the test would show little"
