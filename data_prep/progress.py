"""Progress bars, and a summary of rejections for error messages."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

from tqdm import tqdm

from echo_ft.records import Rejection

T = TypeVar("T")


def progress(items: Iterable[T], description: str, unit: str) -> Iterable[T]:
    """The items, with a progress bar on stderr: live on a terminal, every ten seconds in a log."""
    live = sys.stderr.isatty()
    return tqdm(items, desc=description, unit=f" {unit}", mininterval=0.1 if live else 10, leave=live)


def first_rejection(rejections: Sequence[Rejection]) -> str:
    """How many items were rejected, and why the first one was; empty without a rejection."""
    if not rejections:
        return ""
    return f"; {len(rejections)} rejected (first: {rejections[0].item}: {rejections[0].reason})"
