"""The fuzzers find errors that no parser may raise, and find none in this project; the kill loop notices a fault."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.reliability.__main__ import Loop, kill_loop, wait
from benchmarks.reliability.fuzz import Found, execute, fuzz, fuzz_bytes, report
from benchmarks.reliability.parsers import PARSERS, Parser, prepare_folder
from echo_ft.errors import EchoError
from echo_ft.experts.roles import parse_best
from echo_ft.metrics.answer_files.robustmad import parse_cut_letter


@pytest.mark.parametrize("name", PARSERS)
def test_no_parser_raises_anything_but_its_refusal(name, tmp_path):
    found = fuzz(PARSERS[name], 60, prepare_folder(tmp_path))
    assert found.executions >= 60
    assert not found.finds


@pytest.mark.parametrize("name", PARSERS)
def test_every_example_is_valid(name, tmp_path):
    found = Found()
    for example in PARSERS[name].examples:
        execute(PARSERS[name], example, prepare_folder(tmp_path), found)
    assert (found.refused, found.finds) == (0, {})


def test_fuzzer_keeps_the_shortest_input_of_each_find(tmp_path, capsys, monkeypatch):
    def read(content: bytes, folder) -> None:
        if len(content) < 3:
            raise EchoError("too short")
        if b"a" in content:
            raise KeyError(content)
        if b"h" in content:
            try:
                time.sleep(9)
            except Exception as error:  # as the library does around other packages
                raise EchoError("unreadable") from error

    monkeypatch.setattr("benchmarks.reliability.fuzz.SECONDS", 0.2)
    found = Found()
    for content in (b"", b"bcd", b"bcda", b"bca", b"hhh"):
        execute(Parser(read, ()), content, tmp_path, found)
    assert (found.executions, found.refused, len(found.finds)) == (5, 1, 2)
    report("mine", found, tmp_path / "finds")
    assert "mine: 5 executions, 1 refused, 2 findings" in capsys.readouterr().out
    stored = {path.read_bytes() for path in (tmp_path / "finds").iterdir() if not path.suffix}
    assert stored == {b"bca", b"hhh"}
    assert "KeyError" in next(
        path.read_text() for path in (tmp_path / "finds").glob("*.txt") if "bca" in path.read_text()
    )


def test_numbers_of_an_answer_may_be_long_and_are_parsed_in_linear_time():
    start = time.process_time()
    assert parse_best("9" * 100_000, 3) is None
    assert parse_best("2" + " " * 1_000_000 + "x", 3) is None
    assert parse_best(" " * 1_000_000 + "candidate" + " " * 1_000_000 + "2", 3) == 1
    assert parse_cut_letter("A x" + " " * 1_000_000 + "y", {"A": "x z"}) is None
    assert time.process_time() - start < 5  # the square of a million steps takes hours


def test_atheris_leaves_no_corpus_behind(tmp_path, monkeypatch):
    """With a stand-in for atheris, and for `os._exit`, which skips Python's clean-up."""
    runs = []
    fake = SimpleNamespace(
        instrument_imports=lambda include: nullcontext(),
        Setup=lambda arguments, run: runs.append(run),
        Fuzz=lambda: runs[0](b"A"),
    )
    monkeypatch.setitem(sys.modules, "atheris", fake)
    monkeypatch.setattr(os, "_exit", sys.exit)
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    with pytest.raises(SystemExit, match="0"):
        fuzz_bytes("letters", 1, folder, 0, tmp_path / "finds")
    assert not folder.exists()


def test_atheris_refuses_an_unknown_parser(tmp_path, monkeypatch):
    fake = SimpleNamespace(instrument_imports=lambda include: nullcontext())
    monkeypatch.setitem(sys.modules, "atheris", fake)
    with pytest.raises(SystemExit, match=r"--parser leters is unknown; choose from .*letters"):
        fuzz_bytes("leters", 1, tmp_path, 0, tmp_path / "finds")


class Stub:
    """A process of a training, as multiprocessing shows it, that runs a shell command."""

    def __init__(self, command: str) -> None:
        self.process = subprocess.Popen(["sh", "-c", f"exec {command}"])
        self.pid, self.kill = self.process.pid, self.process.kill

    @property
    def exitcode(self) -> int | None:
        return self.process.poll()

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, seconds: float | None = None) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)


class StubLoop(Loop):
    """Trainings that are shell commands and have always logged `loss`."""

    def __init__(self, folder: Path, *commands: str) -> None:
        super().__init__(folder, folder, folder, len(commands), 1, random.Random(0))
        self.commands, self.loss, self.started = commands, 1.0, []

    def start(self, output: Path) -> list[Stub]:
        output.mkdir()
        history = [{"step": 1, "loss": self.loss}]
        (output / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        (output / "adapter_model.safetensors").write_bytes(b"")
        self.started = [Stub(command) for command in self.commands]
        return self.started


def test_a_kill_is_no_fault(tmp_path):
    loop = StubLoop(tmp_path, "sleep 60", "sleep 60")
    assert not loop.run(tmp_path / "x", 0.1)
    assert (loop.tally.kills, loop.tally.faults) == (1, [])


def test_a_process_that_fails_beside_a_blocked_one_is_a_fault(tmp_path, capsys):
    loop = StubLoop(tmp_path, "sh -c 'exit 3'", "sleep 60")
    assert loop.run(tmp_path / "x", 2)
    assert (loop.tally.kills, loop.tally.faults) == (0, ["x: status [3, None]"])
    assert not any(process.is_alive() for process in loop.started)


@pytest.mark.parametrize(("loss", "faults"), [(1.0, []), (1.1, ["training-0: a loss differs by 0.1"])])
def test_the_kill_loop_notices_another_loss(tmp_path, capsys, monkeypatch, loss, faults):
    loop = StubLoop(tmp_path, "true")
    undisturbed = loop.undisturbed
    monkeypatch.setattr(loop, "undisturbed", lambda: (undisturbed(), setattr(loop, "loss", loss))[0])
    tally = kill_loop(loop, minutes=0, kills=0)
    assert (tally.trainings, tally.faults) == (2, faults)


def test_a_traceback_in_a_log_is_a_fault(tmp_path, capsys):
    loop = StubLoop(tmp_path, "true")
    loop.undisturbed()
    (tmp_path / "training-1.1.log").write_text("Traceback (most recent call last):\nValueError: mine\n")
    assert loop.run(tmp_path / "training-2", 60)
    assert loop.run(tmp_path / "training-1", 60)
    assert loop.tally.faults == ["training-1: a process ended with a traceback"]
    assert "ValueError: mine" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/schedstat").is_file(), reason="only Linux says how long a process waited")
def test_time_without_a_core_does_not_count():
    core = str(min(os.sched_getaffinity(0)))
    processes = [Stub(f"taskset -c {core} sh -c 'while :; do :; done'") for _ in range(4)]
    try:
        started = time.monotonic()
        passed = wait(processes, 1)
        assert 1 <= passed < (time.monotonic() - started) / 2
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_sleep_counts():
    process = Stub("sleep 60")
    assert wait([process], 0.2) >= 0.2
    process.kill()
    process.join()


def test_a_hanging_training_is_ended_before_the_loop_is(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.reliability.__main__.LONGEST_RUN", 0.1)
    loop = StubLoop(tmp_path, "sleep 60")
    with pytest.raises(SystemExit, match="the undisturbed training hangs"):
        loop.undisturbed()
    assert not loop.started[0].is_alive()
