from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

from tqdm import tqdm

from echo_ft.records import Rejection

T = TypeVar("T")


def progress(items: Iterable[T], words: str, unit: str) -> Iterable[T]:
    """The items, with progress on stderr: live on a terminal, now and then in a log."""
    live = sys.stderr.isatty()
    return tqdm(items, desc=words, unit=f" {unit}", mininterval=0.1 if live else 10, leave=live)


def first_rejection(rejections: Sequence[Rejection]) -> str:
    """How many photographs and rows were rejected, and why the first one was."""
    if not rejections:
        return ""
    return f"; {len(rejections)} rejected, the first: {rejections[0].item}: {rejections[0].reason}"
