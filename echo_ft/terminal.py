"""Terminal output of the library, through `logging` so that other programs can redirect it."""

from __future__ import annotations

import io
import logging
import sys
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from tqdm import tqdm

LOGGER = logging.getLogger("echo_ft")
"""The logger of the library. Progress has the level INFO, below warnings and errors.

Progress is not shown until a program enables it, as `log_to_terminal` does.
"""


class TerminalHandler(logging.Handler):
    """A log handler that writes progress to stdout, and warnings and errors with their level to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record to the current `sys.stdout` or `sys.stderr`, which may have been replaced since start-up."""
        severe = record.levelno >= logging.WARNING
        stream = sys.stderr if severe else sys.stdout
        prefix = f"{record.levelname.lower()}: " if severe else ""
        stream.write(f"{prefix}{printable(record.getMessage())}\n")
        stream.flush()


def printable(text: str) -> str:
    """Escape control and format characters, which a terminal would obey or cannot show.

    Line breaks and tabs stay. Names of files and products may contain anything.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in "\n\t" or not _is_control(char) else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    # JSON escapes the characters below DEL itself, and knows no escapes of two digits.
    return ascii(char)[1:-1] if char < "\x7f" else rf"\u{ord(char):04x}"


class PrintableStream:
    """A text stream that passes everything through `printable` and otherwise behaves like the stream that it wraps."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text to the stream. Returns the length of what was written."""
        return self._stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _is_control(char: str) -> bool:
    # Zero-width joiners and spaces (Cf) are part of names in some scripts; directional overrides reorder a line and are
    # escaped.
    return unicodedata.category(char) in ("Cc", "Cs") or "\u202a" <= char <= "\u202e" or "\u2066" <= char <= "\u2069"


def log_to_terminal() -> None:
    """Show the library's log records in the terminal. Every command calls this. Repeated calls have no effect.

    stdout and stderr then escape unpaired surrogates, which occur in file names that are not UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not any(isinstance(handler, TerminalHandler) for handler in LOGGER.handlers):
        LOGGER.addHandler(TerminalHandler())
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False


QUIET_SECONDS = 10
"""Seconds between two lines of progress in a log, and before the first one."""


def progress(
    items: Iterable[Any] | None, description: str, unit: str, total: int | None = None, disable: bool = False
) -> tqdm[Any]:
    """Show progress on stderr: a bar on a terminal, or a line every QUIET_SECONDS in a log.

    Iterate over the result to get the `items`, or call its `update(count)` if they are None. `total` is the number of
    items if they have no length, and `unit` is their name in the plural. `disable` hides it all.
    """
    if sys.stderr.isatty():
        return tqdm(items, description, total, unit=f" {unit}", disable=disable)
    line = "{desc}: {n_fmt} of {total_fmt}{unit}, {elapsed} elapsed, {remaining} left"
    options: dict[str, Any] = {"bar_format": line, "mininterval": QUIET_SECONDS, "delay": QUIET_SECONDS, "leave": False}
    return _ProgressLines(items, description, total, unit=f" {unit}", disable=disable, **options)


class _ProgressLines(tqdm):
    """Progress in a log. tqdm itself would write one long line with carriage returns."""

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        """Return a function that writes each status on its own line."""

        def write(status: str) -> None:
            file.write(f"{status}\n")
            file.flush()

        return write

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write the status. tqdm clears a bar with an empty `msg`, which a log must ignore."""
        return msg != "" and bool(super().display(msg, pos))


def format_gib(count: int) -> str:
    """Format `count` bytes as GiB with one decimal, or as `<0.1` if a positive number would round to zero."""
    return "<0.1" if 0 < count < 0.05 * 2**30 else f"{count / 2**30:.1f}"


def align_columns(rows: list[list[str]]) -> str:
    """Format rows as text columns. The first column is left-aligned, and the rest are right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        [row[0].ljust(widths[0]), *(cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)
