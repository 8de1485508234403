"""A command that gets a signal exits with a one-line message and a shell's status, even after several signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from echo_ft import processes
from tests.conftest import ROOT

COMMAND = """
import sys, time
from echo_ft.config import run_main

def main(argv):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
        time.sleep(float(argv[0]))

run_main(main, "run it again")
time.sleep(60)
"""


def start(cleaning: float, **environment: str) -> subprocess.Popen[str]:
    """Start a command that waits, and then needs `cleaning` seconds to clean up."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(cleaning)],
        cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def start_in_group(monkeypatch: pytest.MonkeyPatch, work: str, cleaning: float = 0) -> subprocess.Popen[str]:
    """Start a process of a group that does `work`, and that may take one second to end."""
    short = "import echo_ft.processes as p; p.LONGEST_END_SECONDS = 1; run_main(main"
    command = COMMAND.replace("run_main(main", short, 1)
    monkeypatch.setattr(sys.modules[__name__], "COMMAND", command.replace("time.sleep(60)", work, 1))
    return start(cleaning, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGINT, 130, "stopped by Ctrl-C"), (signal.SIGTERM, 143, "stopped by SIGTERM")],
)
@pytest.mark.parametrize("times", [1, 2, 20])
def test_signals_end_in_one_sentence(number, status, said, times):
    process = start(cleaning=0.2)
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.005)
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("cleaned up\n", f"{said}; run it again\n")
    assert process.returncode in (status, -number), "a shell shows both as the same status"


def test_a_signal_while_an_error_is_reported_ends_in_one_sentence(monkeypatch):
    """A launcher sends SIGTERM to all processes as soon as one fails, just when the others report that they lost it."""
    signalled = "__str__=lambda error: os.kill(os.getpid(), signal.SIGTERM) or 'the error'"
    work = f"import os, signal; raise type('Signalled', (Exception,), dict({signalled}))()"
    monkeypatch.setattr(sys.modules[__name__], "COMMAND", COMMAND.replace("time.sleep(60)", work, 1))
    process = start(0)
    _, err = process.communicate(timeout=60)
    assert (err, process.returncode) == ("stopped by SIGTERM; run it again\n", 143)


def test_a_later_ctrl_c_ends_a_command_that_does_not():
    process = start(cleaning=60)
    process.send_signal(signal.SIGINT)
    time.sleep(processes.SAME_SIGNAL_SECONDS + 0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (err, process.returncode) == ("stopped by Ctrl-C; run it again\n", 130)


def test_a_process_of_a_group_ends_although_its_clean_up_does_not(monkeypatch):
    process = start_in_group(monkeypatch, "time.sleep(60)", cleaning=60)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGALRM


@pytest.mark.skipif(sys.platform != "linux", reason="uses the mutex of Linux")
def test_a_process_of_a_group_ends_although_it_runs_no_python_code(monkeypatch):
    """Nothing interrupts the wait for a locked mutex. torch's rendezvous waits like this for a lost process."""
    lock = "mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock"
    process = start_in_group(monkeypatch, f"import ctypes; {lock}; lock(mutex); lock(mutex)")
    time.sleep(1)  # it prints "ready" just before
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGALRM


def test_a_signal_to_a_worker_does_not_end_its_parent(monkeypatch):
    fork = "import os, signal; worker = os.fork() or time.sleep(60)"
    end = "os.kill(worker, signal.SIGTERM); os.waitpid(worker, 0); time.sleep(2); sys.exit(5)"
    process = start_in_group(monkeypatch, f"{fork}; time.sleep(0.5); {end}")
    process.communicate(timeout=30)
    assert process.returncode == 5


@pytest.mark.parametrize("command", ["data_prep.build", "evaluation.score", "train.show"])
def test_ctrl_c_during_imports_ends_in_one_sentence(tmp_path, command):
    (tmp_path / "yaml.py").write_text("import time; print('ready', flush=True); time.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", command], cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (err, process.returncode) == ("stopped by Ctrl-C; rerun the command to start again\n", 130)


def test_only_the_first_process_of_a_machine_speaks_of_ctrl_c_and_each_of_an_end_by_its_launcher():
    for number, said in (
        (signal.SIGINT, ""),
        (signal.SIGTERM, "process 1 of 2 was stopped by SIGTERM, which launchers"),
    ):
        process = start(0, LOCAL_RANK="1", RANK="1", WORLD_SIZE="2")
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert err.startswith(said) and err.count("\n") == bool(said)
        assert process.returncode == 128 + number


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
def test_a_process_beside_a_stopped_one_ends_with_a_sentence(monkeypatch):
    short = COMMAND.replace("run_main(main", "import echo_ft.processes as p; p.WATCH_SECONDS = 0.2; run_main(main", 1)
    monkeypatch.setattr(sys.modules[__name__], "COMMAND", short)
    ranks = [start(0, RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2") for rank in range(2)]
    time.sleep(1.2)
    assert [rank.poll() for rank in ranks] == [None, None]
    ranks[1].send_signal(signal.SIGSTOP)
    try:
        _, err = ranks[0].communicate(timeout=60)
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    reason = f"process {ranks[1].pid} of the same launcher is stopped; kill that process"
    assert err == f"process 0 of 2 exits because {reason}; run it again\n"
    assert ranks[0].returncode == 2


def test_an_error_of_a_lost_process_is_told_as_one(monkeypatch):
    error = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
    assert not processes.lost_process(error), "a server may also close a connection"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.lost_process(error)
    assert not processes.lost_process(RuntimeError("shapes differ"))


@pytest.mark.slow  # importing accelerate takes ten seconds
def test_the_launcher_keeps_the_status_of_its_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; print('one sentence', file=sys.stderr); sys.exit(int(sys.argv[1]))\n")
    for status in (0, 3):
        done = subprocess.run(
            [sys.executable, "-m", "train.launch", "--config_file", "recipes/accelerate/cpu.yaml", script, str(status)],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        assert re.findall(".*sentence|.*Traceback.*", done.stderr) == ["one sentence"]


@pytest.mark.slow  # importing accelerate takes ten seconds
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_launcher_passes_a_signal_to_its_process(tmp_path, number):
    script = tmp_path / "script.py"
    script.write_text(COMMAND)
    launcher = subprocess.Popen(
        [sys.executable, "-m", "train.launch", "--config_file", "recipes/accelerate/cpu.yaml", script, "0.2"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert launcher.stdout is not None
    while launcher.stdout.readline() != "ready\n":  # accelerate prints too
        assert launcher.poll() is None
    launcher.send_signal(number)
    out, err = launcher.communicate(timeout=60)
    assert (out, launcher.returncode) == ("cleaned up\n", 128 + number)
    assert re.findall(".*run it again.*|.*Traceback.*", err) == [
        f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}; run it again"
    ]


def test_the_launcher_ends_at_a_ctrl_c_during_its_imports(tmp_path):
    """With a stand-in for accelerate, whose import takes a minute."""
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "__init__.py").write_text("import time; print('ready', flush=True); time.sleep(60)")
    launcher = subprocess.Popen(
        [sys.executable, "-m", "train.launch", "script.py"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert launcher.stdout is not None and launcher.stdout.readline() == "ready\n"
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=30)
    assert launcher.returncode in (130, -signal.SIGINT)
