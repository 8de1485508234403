"""Sources: one file a dataset layout, each with `read(config)` that yields records in a stable order.

A source yields an `Inspection`, then the `Question`s it has for it, or a `Rejection` where a photograph or row cannot
be used. Paths in records are relative to `SourceConfig.root`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from echo_ft.records import Inspection, Question, Rejection

Item = Inspection | Question | Rejection


@dataclass(frozen=True)
class SourceConfig:
    """What a source may need to know."""

    root: Path
    """Folder that the image paths are relative to; `synthetic` draws into it."""
    annotations: Path | None = None
    """The file that lists the photographs: mmad.json, or a manifest's CSV or JSONL."""
    seed: int = 0
    parts: int = 0
    """How many parts of each product `synthetic` draws."""


Items = Iterator[Item]
