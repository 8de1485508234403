"""Recognize the format and encoding of a list of images: comma- or tab-separated values, or JSON lines."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from pathlib import Path

from echo_ft.errors import EchoError
from echo_ft.inputs import InputError, lines, open_input, open_text

SPREADSHEETS = frozenset({".xlsx", ".xlsm", ".xlsb", ".xls", ".ods", ".numbers"})

BINARY_STARTS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
"""First bytes of spreadsheets, whatever their names: ZIP (Excel since 2007, LibreOffice) and OLE (older Excel)."""

SEPARATOR_LINE = re.compile(r'"?sep=(.)"?[,;\t]*', re.IGNORECASE)
"""The line that Excel writes or reads before the header. Programs that save the file again may quote or pad it."""


@dataclass(frozen=True)
class ListFormat:
    """How to read a list of images."""

    encoding: str
    separator: str | None
    """Character between the columns, or None for JSON lines."""
    skipped: int = 0
    """Number of lines before the header."""


def list_format(path: Path) -> ListFormat:
    """Return the format of a list, based on its suffix if that is .csv, .tsv or .jsonl, otherwise on its first line.

    Raises EchoError for a spreadsheet, and for a file that is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    with open_input(path) as file:
        start = file.read(4)
    suffix = path.suffix.lower()
    if suffix in SPREADSHEETS or start in BINARY_STARTS:
        raise EchoError(
            f"{path} is a spreadsheet, not a text file; export it as CSV (in Excel: File > Save As > CSV UTF-8) "
            "and set annotations to that file"
        )
    utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if utf16 else "utf-8-sig"
    try:
        with open_text(path, encoding) as file:
            first = next(lines(file), "").rstrip("\n")
    except (UnicodeError, InputError) as error:
        raise not_text(path, error) from error
    if "\0" in first:
        raise not_text(path, "its first line has null characters")
    if suffix in (".jsonl", ".ndjson") or (suffix != ".csv" and first.lstrip().startswith("{")):
        return ListFormat(encoding, None)
    stated = SEPARATOR_LINE.fullmatch(first)
    if stated:
        return ListFormat(encoding, stated[1], skipped=1)
    tabs = suffix in (".tsv", ".tab") or (suffix != ".csv" and "\t" in first)
    return ListFormat(encoding, "\t" if tabs else ",")


def not_text(path: Path, reason: object) -> EchoError:
    """Return the error for a list that cannot be decoded."""
    return EchoError(f"{path} is not a UTF-8 text file ({reason}); save it as UTF-8, a table as CSV UTF-8")
