"""JSON lines, atomic files and folders, and a single way to walk through users' folders."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import json
import os
import re
import shutil
import tempfile
import traceback
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

from echo_ft.errors import EchoError
from echo_ft.inputs import Record, from_dict, lines, open_input, open_text
from echo_ft.processes import PARTIAL, held, left_over_folders
from echo_ft.strict_yaml import read_json
from echo_ft.terminal import LOGGER

SYSTEM_NAMES = frozenset(
    {
        "$recycle.bin", "#recycle", "@eadir", "__macosx", "desktop.ini", "ehthumbs.db", "icon\r", "lost+found",
        "system volume information", "thumbs.db",
    }
)  # fmt: skip
"""Lower-case names that systems and network storage add. Names that start with a dot are skipped anyway."""


def _fields(record: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(record):
        return vars(record)  # `dataclasses.asdict` makes a deep copy, which takes longer than the encoding
    raise TypeError(f"a record contains a {type(record).__name__}, which JSON cannot represent")


_ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False, default=_fields)


def to_json(record: Any) -> str:
    """Encode a record as one line of JSON, with keys in field order and `escape_surrogates` applied to strings.

    Raises TypeError if the record contains a value that JSON cannot represent.
    """
    line = _ENCODER.encode(record)
    return line if line.isascii() else _SURROGATE.sub(lambda found: rf"\\u{ord(found[0]):04x}", line)


_SURROGATE = re.compile("[\ud800-\udfff]")


def escape_surrogates(text: str) -> str:
    """Write unpaired surrogates as text, such as `\\udcfc`. A file name has them for bytes that are not UTF-8."""
    return _SURROGATE.sub(lambda found: ascii(found[0])[1:-1], text)


def read_jsonl(path: Path, cls: type[Record], exclude: str = "") -> Iterator[Record]:
    """Yield the records of a JSON-lines file. Lines that contain the string `exclude` are skipped without parsing.

    Raises EchoError with the file and line number if the file cannot be read, or if a row is not a valid record of type
    `cls`.
    """
    number = 0
    try:
        with open_text(path) as file:
            for number, line in enumerate(lines(file), start=1):
                if exclude and exclude in line:
                    continue
                try:
                    record = from_dict(cls, read_json(line, unique_keys=False))
                except (ValueError, TypeError) as error:
                    reason = f"is not a {cls.__name__} row ({error})"
                    raise EchoError(f"{path}:{number} {reason}; rebuild the file") from error
                yield record
    except FileNotFoundError as error:
        raise EchoError(f"there is no file {path}; rebuild the folder that it belongs to") from error
    except (OSError, ValueError) as error:
        raise EchoError(f"{path} cannot be read after line {number} ({error}); rebuild the file") from error


RESUME_REMEDY = "free some space and rerun the same command to resume"
"""What to do about a full disk if the command can resume."""


@contextmanager
def explain_full_disk(folder: Path, remedy: str, error_class: type[EchoError] = EchoError) -> Iterator[None]:
    """Raise an `error_class` that names `folder` and `remedy` if a disk or quota fills up within the block."""
    try:
        yield
    except Exception as error:
        # safetensors (0.8) raises its own SafetensorError, and torch.save (2.15) a RuntimeError; neither has a code.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        texts = _FULL_DISK + (_TORCH_FULL_DISK if _was_saving(error) else ())
        if not full and not any(text in str(error) for text in texts):
            raise
        raise error_class(f"no space left in {folder}; {remedy}") from error


_FULL_DISK = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
"""Messages of errors without a code that mean that a disk is full."""

_TORCH_FULL_DISK = ("iostream error", "unexpected pos")
"""Messages of torch if a disk fills up while it saves. Loading a broken file may produce the same messages."""


def _was_saving(error: Exception) -> bool:
    """Return whether the error came from a saving function or from something that it called."""
    names = (frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.lstrip("_").startswith("save") for name in names)


@contextmanager
def atomic_file(path: Path, unique: bool = False) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` if the block succeeds and is removed if it fails.

    Readers never see a partial file, even after a power failure. Set `unique` if several processes may write the same
    file at once, as in a cache.
    """
    if unique:
        # A process id could repeat on another machine.
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
        partial.touch(exist_ok=False)
    else:
        partial = path.with_name(f"{path.name}{PARTIAL}")
        if partial.exists():
            LOGGER.warning("replacing %s, which a killed command left", partial)
    with held(partial) if unique else nullcontext():
        try:
            yield partial
            flush(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    if not unique:  # a cache may lose a file in a power failure
        flush(path.parent)


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `output` if the block succeeds and is removed if it fails.

    At any moment, `output` is the old folder or the complete new one, even if the process is killed. This needs a file
    system that can swap two folders. On other file systems, the next call restores the old folder. Anything that killed
    commands left next to `output` is removed. If `output` is a link, the folder that it points to is replaced. Raises
    EchoError if the parent folder of `output` is not writable.
    """
    if output.is_symlink():
        output = output.resolve()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(output)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise EchoError(f"{output.parent} cannot be written ({error.strerror}); choose another output") from error
    folder, old = partial / output.name, partial / _replaced(output)
    with held(partial):
        try:
            folder.mkdir()  # this folder has the user's default permissions, unlike the one from mkdtemp
            yield folder
            flush_tree(folder)
            if not output.exists():
                folder.rename(output)
            elif not _swap(folder, output):
                output.rename(old)
                folder.rename(output)
            flush(output.parent)
        finally:
            if old.exists() and not output.exists():  # a swap was interrupted between its two renames
                old.rename(output)
            shutil.rmtree(partial, ignore_errors=True)


def _replaced(output: Path) -> str:
    """Return the name of the old folder while the new one takes its place, where folders cannot be swapped."""
    return f"{output.name}.replaced"


def _swap(first: Path, second: Path) -> bool:
    """Swap the names of two folders in one step. Returns False if the system does not support this."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # this system is not Linux
        return False
    here, exchange = -100, 2  # Linux's AT_FDCWD and RENAME_EXCHANGE
    if swap(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _remove_left_over(output: Path) -> None:
    """Remove what `atomic_folder(output)` left behind in killed processes, and restore `output` if it is missing."""
    for path in left_over_folders(output.parent, f".{output.name}."):
        old = path / _replaced(output)
        if {one.name for one in path.iterdir()} <= {output.name, old.name}:
            if old.exists() and not output.exists():
                old.rename(output)
                LOGGER.warning("restored %s, which a killed command had moved away", output)
            LOGGER.warning("removing %s, which a killed command left", path)
            shutil.rmtree(path)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk, so that they survive a power failure."""
    if os.name == "nt":  # Windows flushes neither folders nor files that are open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flush everything below a folder to disk, so that it survives a power failure. Links are not followed."""
    paths = [Path(parent, name) for parent, _, names in os.walk(folder) for name in (*names, "")]
    with ThreadPoolExecutor(_FLUSHING_THREADS) as pool:  # let the disk write all files at once
        list(pool.map(flush, [path for path in paths if path.is_dir() or (path.is_file() and not path.is_symlink())]))


_FLUSHING_THREADS = 8


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, records: Iterable[Any]) -> int:
    """Write records as JSON lines, atomically, and return their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with atomic_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for record in records:
            file.write(to_json(record) + "\n")
            count += 1
    return count


def open_append(path: Path) -> TextIO:
    """Open a text file for appending."""
    return open(path, "a", encoding="utf-8")


def read_complete_rows(path: Path, cls: type[Record]) -> Iterator[Record]:
    """Yield the valid rows of a JSON-lines file and skip incomplete lines, such as a truncated last one."""
    if not path.is_file():
        return
    with open_input(path) as file:
        for line in file:
            try:
                record = from_dict(cls, read_json(line.decode(), unique_keys=False))
            except (ValueError, TypeError):
                continue
            yield record


def list_folder(folder: Path) -> list[Path]:
    """Return the entries directly in a folder, sorted by name, without hidden and system files.

    Raises EchoError if the folder cannot be read.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise EchoError(
            f"the folder {folder} cannot be read ({error.strerror or error}); check its permissions, or move it away"
        ) from error
    return [path for path in paths if not path.name.startswith(".") and path.name.casefold() not in SYSTEM_NAMES]


def leads_outside(path: Path, root: Path) -> bool:
    """Return whether a path below `root` leads out of it through a link."""
    return not path.resolve().is_relative_to(root.resolve())


def walk(folder: Path, root: Path | None = None) -> tuple[list[Path], list[Path]]:
    """Return the regular files at any depth in `folder`, and the linked folders that lead out of `root`, both sorted.

    Pipes, devices, hidden files and system files are left out. Every folder is read only once, so links may form
    circles. A linked folder is read only if it is inside `root` (by default `folder`) and no path without links leads
    to it.
    """
    root, seen = root or folder, set()
    files, outside, folders, links = [], [], [folder], list[Path]()
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        if leads_outside(current, root):
            outside.append(current)
        elif current.resolve() not in seen:
            seen.add(current.resolve())
            for path in list_folder(current):
                if path.is_dir():
                    (links if path.is_symlink() else folders).append(path)
                elif path.is_file():
                    files.append(path)
    return sorted(files), sorted(outside)
