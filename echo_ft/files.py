"""Records as JSON lines, files that a reader finds complete or not at all, and folder locks."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import tempfile
import types
import typing
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

from echo_ft.errors import EchoError

Record = TypeVar("Record")


def _fields(record: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(record):
        return vars(record)  # `dataclasses.asdict` copies all that is in it, which takes longer than the JSON
    raise TypeError(f"a record holds a {type(record).__name__}, which JSON has not")


_ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False, default=_fields)


def to_json(record: Any) -> str:
    """One line of JSON for a record; keys in the order of its fields."""
    return _ENCODER.encode(record)


def from_dict(cls: type[Record], row: Mapping[str, Any]) -> Record:
    """A record from parsed JSON; nested records and tuples are restored.

    Raises TypeError where a field is missing or unknown.
    """
    hints, nested = _hints(cls)  # type: ignore[arg-type]
    if not row.keys() <= hints.keys():
        raise TypeError(f"{cls.__name__} has no field {min(row.keys() - hints.keys())!r}")
    if nested:
        row = {**row, **{name: _restore(hints[name], row[name]) for name in nested if name in row}}
    return cls(**row)


@functools.cache  # resolving annotations takes longer than building the record
def _hints(cls: type) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The type of each field, and the fields that JSON does not give back as they were."""
    hints = typing.get_type_hints(cls)
    return hints, tuple(name for name, hint in hints.items() if not _is_plain(hint))


def _is_plain(hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin in (types.UnionType, typing.Union):
        return all(map(_is_plain, typing.get_args(hint)))
    return origin is not tuple and not dataclasses.is_dataclass(origin)


def _restore(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _restore(next(arg for arg in args if arg is not type(None)), value)
    if origin is tuple:
        inner = args[0] if len(args) == 2 and args[1] is Ellipsis else None
        return tuple(_restore(inner or args[index], item) for index, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value)
    return value


def read_jsonl(path: Path, cls: type[Record], without: str = "") -> Iterator[Record]:
    """The records of a JSON-lines file, but for lines that hold the text `without`, which are not even parsed.

    Raises EchoError with file and line where a row is not such a record.
    """
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if without and without in line:
                continue
            try:
                yield from_dict(cls, json.loads(line))
            except (json.JSONDecodeError, TypeError, AttributeError) as error:
                raise EchoError(
                    f"{path}:{number} is not a {cls.__name__} row ({error}); make the file again"
                ) from error


@contextmanager
def atomic_file(path: Path, unique: bool = False) -> Iterator[Path]:
    """A path to write to, which replaces `path` if the block succeeds: readers find a complete file or none.

    Set `unique` if several processes may write the same file at once.
    """
    middle = f".{uuid.uuid4().hex}" if unique else ""  # a process number would repeat on another machine
    partial = path.with_name(f"{path.name}{middle}.partial")
    yield partial
    os.replace(partial, path)


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """An empty folder to fill, which replaces `output` if the block succeeds and is removed if it fails.

    Raises EchoError if the parent of `output` cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise EchoError(f"{output.parent} cannot be written ({error.strerror}); choose another output") from error
    folder, old = partial / output.name, partial / "replaced"
    try:
        folder.mkdir()  # with the user's permissions, which the folder made by mkdtemp lacks
        yield folder
        if output.exists():
            output.rename(old)
        folder.rename(output)
    finally:
        if old.exists() and not output.exists():  # interrupted between the two renames
            old.rename(output)
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, records: Iterable[Any]) -> int:
    """Write records as JSON lines, atomically; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    # Lone surrogates, as in the name of a rejected file, become the escapes that JSON has for them.
    with atomic_file(path) as partial, open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
        for record in records:
            file.write(to_json(record) + "\n")
            count += 1
    return count


LOCK = ".lock"
"""Locked while a process writes to the folder; the file itself stays, empty."""


def lock(folder: Path, option: str = "--output") -> TextIO:
    """A folder's lock until it is closed; the kernel takes it back when the process ends, however it ends.

    Raises EchoError, naming the `option` that chooses another folder, while another process holds it.
    """
    import fcntl  # Windows has none, and can still score the runs of other machines

    file = _append(folder / LOCK)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise EchoError(
            f"another process writes to {folder}; wait until it ends, or choose another {option}"
        ) from error
    except OSError as error:  # some network file systems have no locks; a run on them is still worth having
        warnings.warn(f"{folder} cannot be locked ({error}): start no second run there meanwhile", stacklevel=3)
    return file


def _append(path: Path) -> TextIO:
    return open(path, "a", encoding="utf-8")


def whole_rows(path: Path, cls: type[Record]) -> Iterator[Record]:
    """The rows of a file whose last line may be half written."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield from_dict(cls, json.loads(line))
            except (ValueError, TypeError):
                continue
