"""A run that is killed, resumed or shared by several processes ends with the bytes of an uninterrupted run."""

from __future__ import annotations

import json
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

from echo_ft.inference.run_folder import PREDICTIONS, RUN_DESCRIPTION, SHARDS, TRACES
from echo_ft.processes import LOCK_FILE
from evaluation.run import main as run_main
from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS, ROOT, make_dataset

CASES = 9
"""Number of test cases. With batches of two, the last batch has one."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), train=1, validation=1, test=CASES)


@pytest.fixture(scope="module")
def uninterrupted(dataset, tmp_path_factory):
    """The folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_main(options(dataset, output))
    return output


def options(dataset: Path, output: Path) -> list[str]:
    values = {"dataset": dataset, "output": output, "model_name_or_path": ECHO_TINY, "dtype": "float32"}
    values |= {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "max_new_tokens": 6, "batch_size": 2}
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def start(dataset: Path, output: Path, processes: int = 1) -> subprocess.Popen[bytes]:
    """Start the command. It uses torchrun because `accelerate launch --cpu` always starts one process (1.15)."""
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
    """Run the command to its end."""
    assert start(dataset, output, processes).wait(300) == 0, log(output).read_text()


def lines(path: Path) -> list[bytes]:
    return sorted(path.read_bytes().splitlines())


def require_equal_runs(output: Path, expected: Path) -> None:
    for name in (PREDICTIONS, TRACES, RUN_DESCRIPTION):
        paths = str(output).encode(), str(expected).encode()
        assert [line.replace(*paths) for line in lines(output / name)] == lines(expected / name), name
    assert {path.name for path in output.iterdir()} == {PREDICTIONS, TRACES, RUN_DESCRIPTION, LOCK_FILE}


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, "the process has ended"
        assert time.monotonic() < deadline, "the process hangs"
        time.sleep(0.005)


def has_lines(path: Path, count: int) -> bool:
    return path.is_file() and path.read_bytes().count(b"\n") >= count


def test_two_processes_resume_a_killed_run(dataset, uninterrupted, tmp_path):
    process = start(dataset, tmp_path / "run")
    try:
        wait_until(lambda: has_lines(tmp_path / "run" / PREDICTIONS, 1), process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    count = len(lines(tmp_path / "run" / PREDICTIONS))
    assert count < len(lines(uninterrupted / PREDICTIONS)), "the run was killed too late"
    complete(dataset, tmp_path / "run", processes=2)
    require_equal_runs(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_another_number_of_processes_resumes_after_one_is_killed(dataset, uninterrupted, tmp_path, killed, after):
    launcher = start(dataset, tmp_path / "run", processes=2)
    wait_until(lambda: has_lines(tmp_path / "run" / SHARDS / str(killed) / PREDICTIONS, 1), launcher)
    (rank,) = (one for one in psutil.Process(launcher.pid).children() if one.environ()["RANK"] == str(killed))
    rank.kill()
    assert launcher.wait(100) != 0, "the launcher stops the other process"
    complete(dataset, tmp_path / "run", processes=after)
    require_equal_runs(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_like_an_uninterrupted_run(tmp_path):
    """Kill runs at random times within the duration of an uninterrupted run.

    If a run completes before it is killed, the next kill applies to a new run.
    """
    dataset = make_dataset(tmp_path / "data", train=1, validation=1, test=40)
    started_at = time.monotonic()
    complete(dataset, tmp_path / "uninterrupted")
    duration = time.monotonic() - started_at
    questions = len(lines(tmp_path / "uninterrupted" / PREDICTIONS))
    draw, kills, kills_with_answers, completed = random.Random(0), 0, 0, 0
    while kills < 20:
        output = tmp_path / f"run_{completed}"
        process = start(dataset, output)
        try:
            status = process.wait(draw.uniform(0, duration))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            kills_with_answers += has_lines(output / PREDICTIONS, 1) and not has_lines(output / PREDICTIONS, questions)
        else:
            assert status == 0, log(output).read_text()
            require_equal_runs(output, tmp_path / "uninterrupted")
            completed += 1
    complete(dataset, output)
    require_equal_runs(output, tmp_path / "uninterrupted")
    print(f"{kills} kills, {kills_with_answers} of them in runs with answers; {completed + 1} runs completed")
    assert kills_with_answers > 3, "too few kills happened between the first and the last answer"


@pytest.mark.parametrize(("dtype", "warned"), [("float32", False), ("bfloat16", True)])
def test_resuming_with_other_batches_warns_in_16_bits(dataset, tmp_path, capsys, dtype, warned):
    output = tmp_path / "run"
    arguments = [*options(dataset, output), "--dtype", dtype]
    run_main(arguments)
    predictions = (output / PREDICTIONS).read_text(encoding="utf-8").splitlines(keepends=True)
    (output / PREDICTIONS).write_text("".join(predictions[:-1]), encoding="utf-8")
    assert json.loads((output / RUN_DESCRIPTION).read_text())["batch_size"] == 2
    capsys.readouterr()
    run_main([*arguments, "--batch_size", "3"])
    message = "warning: the run resumes with batch_size 3 instead of 2; in bfloat16, other batches may change"
    assert (message in capsys.readouterr().err) == warned
