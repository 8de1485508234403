"""One training process of the kill loop. `preload` imports what it needs, once for all processes."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence


def train(arguments: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    """Run train/sft.py in this process, as a launcher would start it. Its output is appended to the file `log`."""
    from echo_ft.config import run_main
    from train import sft

    os.environ.update(environment)
    tempfile.tempdir = None  # the parent process may have cached its own temporary folder here
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = ["train/sft.py", *arguments]
    run_main(sft.main)
