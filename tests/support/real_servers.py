"""Start real servers on the loopback interface, as a user would: `transformers serve`, and vLLM with a bundle."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pytest

VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other programs may keep a core busy
    "TORCHDYNAMO_DISABLE": "1",  # otherwise the first request compiles for minutes
    "VLLM_NO_USAGE_STATS": "1",
}
"""What vLLM needs on a CPU."""

LONGEST_START = 3600.0
"""Seconds after which a server that does not answer is given up. A busy machine takes many minutes."""


def free_port() -> int:
    """Return a port that no program uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def address(port: int) -> str:
    """Return the address of a server's API."""
    return f"http://127.0.0.1:{port}/v1"


@contextmanager
def running(
    command: Sequence[object], log: int | IO[bytes], folder: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server with its output in `log`, and end it with all its processes."""
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # a test may have ended it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def transformers_serve(port: int, *model: object) -> Iterator[subprocess.Popen[bytes]]:
    """Run `transformers serve`. Without a model, it loads the models that requests name."""
    command = [Path(sys.executable).with_name("transformers"), "serve", *model, "--device", "cpu"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", port]
    with running(command, subprocess.DEVNULL, Path.cwd(), {}) as process:
        yield process


def vllm_command(bundle: Path) -> str:
    """Return the command for vLLM in the README.md of a bundle."""
    readme = (bundle / "README.md").read_text(encoding="utf-8")
    start = readme.index("vllm serve")
    return readme[start : readme.index("\n```", start)]


@contextmanager
def vllm_serve(python: Path, bundle: Path, log: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run the bundle's own command on a CPU with the vLLM in the environment of `python`, and wait for its answer."""
    options = f"--dtype float32 --enforce-eager --host 127.0.0.1 --port {port}"
    environment = {**VLLM_ENVIRONMENT, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = ""  # its packages have other versions
    command = ["/bin/sh", "-c", f"exec {vllm_command(bundle)} {options}"]
    with log.open("wb") as file, running(command, file, bundle, environment) as process:
        ends = time.monotonic() + LONGEST_START
        while not _is_healthy(port):
            if process.poll() is not None or time.monotonic() > ends:
                pytest.fail(f"vLLM did not start:\n{log.read_text(encoding='utf-8', errors='replace')[-6000:]}")
            time.sleep(1)
        yield process


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
