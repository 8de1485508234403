"""Process handling: the process group, locks, leftovers of killed processes, and a clean exit after a signal."""

from __future__ import annotations

import functools
import glob
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from echo_ft.errors import EchoError
from echo_ft.terminal import LOGGER

if TYPE_CHECKING:
    from accelerate import PartialState


LONGEST_WAIT = timedelta(days=30)
"""How long processes wait for the slowest one. A process may take longer than torch's default of ten minutes."""


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

    The kernel also releases the lock when the process ends for any reason. Raises EchoError if another process holds
    the lock; the message names `option`, which chooses another folder.
    """
    import fcntl  # Windows lacks this module, but can score runs from other machines

    file = open(folder / LOCK_FILE, "a", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise EchoError(
            f"another process is writing to {folder}; wait until it finishes or choose another {option}"
        ) from error
    except OSError as error:  # some network file systems do not support locks, and runs on them are still useful
        warnings.warn(f"{folder} cannot be locked ({error}); do not start a second run there", stacklevel=3)
    return file


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Lock a temporary file or folder while it is in use. Yields whether the lock was free.

    A lock is not free if a living process holds it or if the system does not support it.
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
"""An empty file or folder younger than this may belong to a process that is about to lock it."""


def left_over_folders(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield each folder that `tempfile` made with this prefix and that no living process holds."""
    for path in sorted(parent.glob(f"{glob.escape(prefix)}*")):
        if re.fullmatch(r"[a-z0-9_]{8}", path.name.removeprefix(prefix)) and path.is_dir() and not path.is_symlink():
            with held(path) as free:
                if free and _is_left_over(path):
                    yield path


def remove_left_over_files(folder: Path) -> None:
    """Remove files of `atomic_file(..., unique=True)` that killed processes left behind in a folder."""
    for path in sorted(folder.glob(f"*{PARTIAL}")):
        if re.search(rf"\.[0-9a-f]{{32}}{re.escape(PARTIAL)}$", path.name) and path.is_file():
            with held(path) as free:
                if free and _is_left_over(path):
                    LOGGER.warning("removing %s, which a killed command left", path)
                    path.unlink(missing_ok=True)


def _is_left_over(path: Path) -> bool:
    """Return whether a file or folder that nobody holds has content or is old."""
    try:
        filled = any(path.iterdir()) if path.is_dir() else path.stat().st_size > 0
        return filled or time.time() - path.stat().st_mtime > _YOUNG_SECONDS
    except FileNotFoundError:  # another process has just removed it
        return False


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """Yield a temporary folder that is removed at the end. First remove those that killed processes left behind."""
    _remove_left_over_scratch(prefix)
    with tempfile.TemporaryDirectory(prefix=prefix) as name, held(Path(name)):
        yield Path(name)


@functools.cache
def _remove_left_over_scratch(prefix: str) -> None:
    """Remove this user's folders of `scratch_folder` that killed processes left behind, once per process."""
    for path in left_over_folders(Path(tempfile.gettempdir()), prefix):
        if hasattr(os, "getuid") and path.stat().st_uid == os.getuid():
            LOGGER.warning("removing %s, which a killed command left", path)
            shutil.rmtree(path, ignore_errors=True)


SAME_SIGNAL_SECONDS = 2.0
"""Time after a signal in which further signals are ignored, because torchrun forwards a Ctrl-C that processes already
got."""


LONGEST_END_SECONDS = 45
"""Time that a process of a group may take to end after a signal."""


class TerminatedError(BaseException):
    """Raised by SIGTERM, as KeyboardInterrupt is by Ctrl-C, so that files and folders are cleaned up."""


class Ending:
    """Ends a command after a signal, with a one-line message and the exit status that shells use."""

    def __init__(self, resume_hint: str) -> None:
        self.resume_hint = resume_hint
        self.signals: list[tuple[int, float]] = []
        """The signals received so far, and when they arrived."""
        self._said = False
        self._owner = os.getpid()

    @property
    def status(self) -> int:
        """130 for Ctrl-C and 143 for SIGTERM."""
        return 128 + (self.signals[0][0] if self.signals else signal.SIGINT)

    def note(self, number: int, frame: Any) -> None:
        """Handle a signal. The first one unwinds the command, and a later one ends it immediately."""
        if os.getpid() != self._owner:  # a forked worker must not handle the signals of its parent
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.signals.append((number, time.monotonic()))
        if len(self.signals) == 1:
            raise KeyboardInterrupt if number == signal.SIGINT else TerminatedError
        if self.signals[-1][1] - self.signals[0][1] > SAME_SIGNAL_SECONDS:
            self.say()
            os._exit(self.status)

    def stop(self) -> NoReturn:
        """Report that the command was stopped, and exit."""
        self.say()
        sys.exit(self.status)

    def say(self) -> None:
        """Report once that the command was stopped."""
        if self._said:
            return
        self._said = True
        if self.status == 128 + signal.SIGINT:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # one message is enough for all processes of a launcher
                sys.stderr.write(f"stopped by Ctrl-C; {self.resume_hint}\n")
        elif _world_size() > 1:
            sys.stderr.write(
                f"{_own_name()} was stopped by SIGTERM, which launchers send when another process exits; see that "
                f"process's error message; {self.resume_hint}\n"
            )
        else:
            sys.stderr.write(f"stopped by SIGTERM; {self.resume_hint}\n")
        sys.stderr.flush()


@contextmanager
def handled_signals(resume_hint: str) -> Iterator[Ending]:
    """Handle Ctrl-C and SIGTERM within the block, and afterwards until the process ends if either arrived."""
    ending = Ending(resume_hint)
    defaults: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    # Commands that a shell starts in the background ignore Ctrl-C.
    handled = [number for number, usual in defaults.items() if signal.getsignal(number) in (usual, _end_imports)]
    for number in handled:
        signal.signal(number, ending.note)
    limited = _world_size() > 1 and hasattr(signal, "alarm")
    if limited:
        _limit_end(handled)
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        threading.Thread(target=_watch_siblings, args=(resume_hint,), daemon=True).start()
    try:
        yield ending
    finally:
        if not ending.signals:  # otherwise, a further Ctrl-C must not interrupt Python's own clean-up
            for number in handled:
                signal.signal(number, defaults[number])
            if limited:
                signal.set_wakeup_fd(-1)


def _limit_end(numbers: Collection[int]) -> None:
    """Let the kernel end this process LONGEST_END_SECONDS after it gets a signal with one of these numbers.

    torch may wait for a lost process without running Python code, so a signal handler would never run. But Python still
    writes the number of the signal to a socket, and a thread can read it.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # signals of a worker do not count

    def wait() -> None:
        while reader.recv(1)[0] not in numbers:  # torch's data loader handles SIGCHLD
            pass
        signal.alarm(LONGEST_END_SECONDS)

    threading.Thread(target=wait, daemon=True).start()


def end_imports_on_ctrl_c() -> None:
    """Let Ctrl-C end a command with a one-line message while `python -m` imports its modules.

    The packages of commands call this before any other import. Later, `handled_signals` takes over. There is no effect
    in other programs that import the packages.
    """
    # Python sets this value while it looks for the command's module (https://docs.python.org/3/using/cmdline.html).
    if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_imports)


def _end_imports(number: int, _: Any) -> NoReturn:
    Ending("rerun the command to start again").say()
    os._exit(128 + number)  # nothing needs a clean-up yet, and a module might not let an exception pass


def lost_process(error: Exception) -> bool:
    """Return whether an error says that another process of the group has ended or cannot be reached."""
    if _world_size() == 1:
        return False
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return type(error).__name__ in _DISTRIBUTED_ERRORS or any(text in str(error) for text in lost)


_DISTRIBUTED_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")
"""Names of the errors that torch's process group raises. Gloo (torch 2.15) raises a plain RuntimeError."""

WATCH_SECONDS = 5.0
"""Seconds between two checks of the other processes on this machine."""

STOPPED_LOOKS = 4
"""A process counts as stopped after this many checks in a row. Launchers then need up to 30 seconds to kill it."""


def _watch_siblings(resume_hint: str) -> None:
    """End this process if another process of its launcher is stopped (SIGSTOP), because it would wait forever."""
    looks: dict[int, int] = {}
    last = time.monotonic()
    while True:
        time.sleep(WATCH_SECONDS)
        now = time.monotonic()
        continued = now - last > 2 * WATCH_SECONDS  # this process was stopped too, or the machine slept
        last = now
        looks = {} if continued else {pid: looks.get(pid, 0) + 1 for pid in stopped_siblings()}
        for pid, count in looks.items():
            if count >= STOPPED_LOOKS:
                sys.stderr.write(
                    f"{_own_name()} exits because process {pid} of the same launcher is stopped; kill that process; "
                    f"{resume_hint}\n"
                )
                sys.stderr.flush()
                os._exit(2)  # the main thread may be waiting inside torch, where no exception reaches it


def stopped_siblings(proc: Path = Path("/proc")) -> set[int]:
    """Return the ids of stopped processes with the same parent as this one, or none on systems without /proc."""
    found = set()
    for path in proc.glob("[0-9]*/stat"):
        try:
            state, parent = path.read_bytes().rpartition(b")")[2].split()[:2]
        except (OSError, ValueError):  # the process has just ended
            continue
        if state == b"T" and int(parent) == os.getppid():
            found.add(int(path.parent.name))
    return found


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _own_name() -> str:
    return f"process {os.environ.get('RANK', '0')} of {_world_size()}"
