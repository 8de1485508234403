"""Run commands of this project and measure how much memory they use."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

from tests.conftest import ROOT


def run_measured(*command: object) -> tuple[str, float]:
    """Run a command, which must succeed; returns its output and the peak memory of all its processes in GiB.

    Memory is the proportional set size, which divides the size of a shared page among the processes that share it. It
    is sampled five times a second.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    peak = 0
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "output", "w+", encoding="utf-8") as output:
        process = psutil.Popen(
            [str(part) for part in command], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                peak = max(peak, _memory_in_use(process))
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        output.seek(0)
        text = output.read()
    assert process.returncode == 0, text
    return text, peak / 2**30


def _memory_in_use(process: psutil.Popen) -> int:
    """Bytes of a process and all its descendants."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            try:
                total += one.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
                continue
    except psutil.NoSuchProcess:
        pass
    return total
