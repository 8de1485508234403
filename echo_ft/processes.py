"""Processes: the group that `accelerate launch` or `torchrun` started, locks, and what killed processes left."""

from __future__ import annotations

import functools
import glob
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from echo_ft.errors import EchoError
from echo_ft.terminal import LOGGER

if TYPE_CHECKING:
    from accelerate import PartialState


LONGEST_WAIT = timedelta(days=30)
"""How long processes wait for the slowest one. One process may work longer than torch's default of ten minutes."""


def join_processes() -> PartialState:
    """Join the process group and return this process's state.

    The group uses the CPU if there is no GPU or if ACCELERATE_USE_CPU is set.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)


LOCK_FILE = ".lock"
"""The empty file that a process locks while it writes to the folder. It is never deleted."""


def lock_folder(folder: Path, option: str = "--output") -> TextIO:
    """Lock a folder and return the open lock file. Closing the file releases the lock.

    The kernel also releases it when the process ends for any reason. Raises EchoError if another process holds the
    lock; the message names `option`, which chooses another folder.
    """
    import fcntl  # missing on Windows, which can still score runs from other machines

    file = open(folder / LOCK_FILE, "a", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise EchoError(
            f"another process is writing to {folder}; wait until it ends or choose another {option}"
        ) from error
    except OSError as error:  # some network file systems do not support locks, and runs on them are still useful
        warnings.warn(f"{folder} cannot be locked ({error}); do not start a second run there", stacklevel=3)
    return file


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Lock a temporary file or folder while it is in use; yields whether the lock was free.

    A lock that a living process holds, or that the system does not support, is not free.
    """
    try:
        import fcntl

        descriptor = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


PARTIAL = ".partial"
"""Suffix of a file that is being written."""

_YOUNG_SECONDS = 60
"""An empty file or folder of less than this age may belong to a process that is about to lock it."""


def left_over_folders(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield each folder that `tempfile` made with this prefix and that no living process holds."""
    for path in sorted(parent.glob(f"{glob.escape(prefix)}*")):
        if re.fullmatch(r"[a-z0-9_]{8}", path.name.removeprefix(prefix)) and path.is_dir() and not path.is_symlink():
            with held(path) as free:
                if free and (any(path.iterdir()) or _is_old(path)):
                    yield path


def remove_left_over_files(folder: Path) -> None:
    """Remove the files of `atomic_file(..., unique=True)` in a folder that killed processes left."""
    for path in sorted(folder.glob(f"*{PARTIAL}")):
        if re.search(rf"\.[0-9a-f]{{32}}{re.escape(PARTIAL)}$", path.name) and path.is_file():
            with held(path) as free:
                if free and (path.stat().st_size or _is_old(path)):
                    LOGGER.warning("removing %s, which a killed command left", path)
                    path.unlink(missing_ok=True)


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > _YOUNG_SECONDS


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """Yield a folder for temporary files, which is removed at the end, with those that killed processes left."""
    _remove_left_over_scratch(prefix)
    with tempfile.TemporaryDirectory(prefix=prefix) as name, held(Path(name)):
        yield Path(name)


@functools.cache
def _remove_left_over_scratch(prefix: str) -> None:
    """Remove this user's folders of `scratch_folder` that killed processes left, once per process."""
    for path in left_over_folders(Path(tempfile.gettempdir()), prefix):
        if hasattr(os, "getuid") and path.stat().st_uid == os.getuid():
            LOGGER.warning("removing %s, which a killed command left", path)
            shutil.rmtree(path, ignore_errors=True)
