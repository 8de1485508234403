"""The only module that opens outside files: images, lists, annotations, configs, datasets, runs and cards.

Only regular files are opened, because a pipe or a device could block a command forever. Sizes and lengths are bounded,
and text must be valid UTF-8. `strict_yaml` parses the text, `from_dict` checks the types of the parsed values, and
`images.decode` decodes the images.

Errors are OSError or ValueError, and their message gives only the reason. Callers add the name of the file and the
remedy.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import os
import re
import stat
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeVar
from urllib.parse import urlsplit

from echo_ft.records import RelativePath
from echo_ft.strict_yaml import read_json, read_yaml

MAX_BYTES = 2**30
"""Size of the largest file that is read as a whole. MMAD's mmad.json is 4% as large."""

MAX_YAML_BYTES = 2**24
"""Size of the largest YAML file. PyYAML takes about ten seconds per MB, and 200 times the file's size in memory."""

MAX_LINE = 2**24
"""Length of the longest line, in characters."""


Record = TypeVar("Record")


class InputError(ValueError):
    """Raised with the reason why a file cannot be used."""


def open_input(path: Path | str) -> io.BufferedReader:
    """Open a regular file for reading bytes. Raises OSError, and InputError for any other kind of file."""
    # Without O_NONBLOCK, opening a pipe waits for its writer. Windows has neither such pipes nor this flag.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise InputError("it is a folder" if stat.S_ISDIR(mode) else "it is a pipe or a device, not a file")
    return open(descriptor, "rb")


def open_text(path: Path | str, encoding: str = "utf-8", newline: str | None = None) -> TextIO:
    """Open a regular file for reading text. Raises InputError and OSError; reading raises UnicodeDecodeError."""
    return io.TextIOWrapper(open_input(path), encoding=encoding, newline=newline)


def lines(file: TextIO) -> Iterator[str]:
    """Yield the lines of a text file. Raises InputError for a line of more than MAX_LINE characters."""
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise InputError(f"it has a line of more than {MAX_LINE:,} characters")
        yield line


def read_bytes(path: Path | str, limit: int = MAX_BYTES) -> bytes:
    """Read a regular file. Raises OSError, and InputError if the file has more than `limit` bytes."""
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise InputError(f"it has {size:,} bytes, more than {limit:,}")
        return file.read()


def read_text(path: Path | str, encoding: str = "utf-8", limit: int = MAX_BYTES) -> str:
    """Read a text file with `\\n` for every line end. Raises InputError, UnicodeDecodeError and OSError."""
    with io.TextIOWrapper(io.BytesIO(read_bytes(path, limit)), encoding=encoding) as file:
        return file.read()


def read_json_file(path: Path | str, unique_keys: bool = True) -> Any:
    """Read a JSON file as `read_json` does. A byte order mark is skipped. Raises ValueError and OSError."""
    return read_json(read_text(path, "utf-8-sig"), unique_keys)


def read_json_object(path: Path | str) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises ValueError, OSError, and InputError for any other content."""
    content = read_json_file(path)
    if not isinstance(content, dict):
        raise InputError(f"it holds a {type(content).__name__}, not an object")
    return content


def read_yaml_file(path: Path | str) -> Any:
    """Read a YAML file as `read_yaml` does. Raises yaml.YAMLError, ValueError and OSError."""
    return read_yaml(read_text(path, limit=MAX_YAML_BYTES))


FRAME = re.compile(r"(.+)#frame=([0-9]{1,6})", re.DOTALL)
"""Matches the path of one frame of an image file, such as `stack.tif#frame=2`. The first frame has the index 0."""

MAX_FRAME = 999_999
"""Largest frame index that FRAME matches."""


def with_frame(image: str, frame: int | None) -> str:
    """Return the path of a frame of an image file. A path that names a frame already stays as it is."""
    return image if frame is None or FRAME.fullmatch(image) else f"{image}#frame={frame}"


def split_frame(path: Path) -> tuple[Path, int | None]:
    """Return the file that holds an image, and the index of the frame if the path names one."""
    found = FRAME.fullmatch(path.name)
    return (path.with_name(found[1]), int(found[2])) if found else (path, None)


def image_file(path: Path) -> Path:
    """Return the file that holds an image, whose path may name a frame."""
    return split_frame(path)[0]


def is_web_address(text: str) -> bool:
    """Return whether a text is an http or https address with a host, a possible port and no space."""
    try:
        parts = urlsplit(text)
        possible = parts.port != 0  # any other impossible port is a ValueError
        (parts.hostname or "").encode("idna")  # so is a label that is empty or too long
    except ValueError:
        return False
    return (
        possible and parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"[\s\0-\x1f]", text)
    )


def stays_inside(name: str) -> bool:
    """Return whether a record's path, relative to a root, stays inside that root. Links are not followed."""
    return bool(name) and "\0" not in name and not name.startswith("/") and ".." not in name.split("/")


def from_dict(cls: type[Record], row: Any) -> Record:
    """Build a record from parsed JSON, including nested records and tuples.

    Raises TypeError if a field is missing, unknown or of the wrong type. The message names the field.
    """
    if not isinstance(row, Mapping):
        raise TypeError(f"it is {_shown(row)}, not an object")
    converters = _converters(cls)  # type: ignore[arg-type]
    if not row.keys() <= converters.keys():
        raise TypeError(f"{cls.__name__} has no field {min(map(str, row.keys() - converters.keys()))!r}")
    values, name = {}, ""
    try:
        for name, value in row.items():
            values[name] = converters[name](value)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    return cls(**values)


@functools.cache  # resolving annotations takes longer than building the record
def _converters(cls: type) -> dict[str, Callable[[Any], Any]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: _converter(hint) for name, hint in hints.items()}


def _converter(hint: Any) -> Callable[[Any], Any]:
    """Return a function that checks a value of parsed JSON against a type, and restores tuples and records.

    The function raises TypeError for a value of the wrong type. Types that no record uses are not checked.
    """
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint == RelativePath:
        return _inside
    if origin in (types.UnionType, typing.Union):
        (convert,) = (_converter(arg) for arg in args if arg is not type(None))
        return lambda value: None if value is None else convert(value)
    if origin is tuple:
        return _tuple_converter(args)
    if origin in (dict, Mapping):
        return _mapping_converter(_converter(args[1]))
    if dataclasses.is_dataclass(hint):
        return functools.partial(from_dict, typing.cast(type, hint))
    if hint in _JSON_TYPES:
        accepted, name = _JSON_TYPES[hint]

        def check(value: Any) -> Any:
            if value.__class__ not in accepted or (value.__class__ is float and not math.isfinite(value)):
                raise TypeError(f"{_shown(value)} is not {name}")
            return value

        return check
    return lambda value: value


_JSON_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    str: ((str,), "a text"),
    int: ((int,), "a whole number"),
    float: ((float, int), "a number"),
    bool: ((bool,), "true or false"),
}
"""The classes that represent a type in parsed JSON, and the type's name in messages."""


def _inside(value: Any) -> Any:
    if not isinstance(value, str) or not stays_inside(value):
        raise TypeError(f"{_shown(value)} is not a path in the root of the images")
    return value


def restore(hint: Any, value: Any) -> Any:
    """Check a value of parsed JSON against a type, as `from_dict` does. Raises TypeError."""
    return _converter(hint)(value)


def check_fields(content: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Raise TypeError, which names the field, if a field of `content` differs from its type in `types`.

    Fields may be missing, and fields without a type are not checked.
    """
    for name in types.keys() & content.keys():
        try:
            restore(types[name], content[name])
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from error


def _tuple_converter(args: tuple[Any, ...]) -> Callable[[Any], Any]:
    items = [_converter(arg) for arg in args if arg is not Ellipsis]
    length = None if Ellipsis in args else len(items)

    def convert(value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
            raise TypeError(f"{_shown(value)} is not a list{'' if length is None else f' of {length}'}")
        if length is None:
            return tuple(map(items[0], value))
        return tuple(item(one) for item, one in zip(items, value, strict=True))

    return convert


def _mapping_converter(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise TypeError(f"{_shown(value)} is not an object")
        return {key: convert(one) for key, one in value.items()}

    return check


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 40 else f"{text[:40]}..."
