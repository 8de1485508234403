"""Answers that were made elsewhere: files in MMAD's format, RobustMAD's, and JSON lines of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from echo_ft.metrics.mmad import Answer
from echo_ft.records import Prediction, Rejection


@dataclass(frozen=True)
class GivenAnswers:
    """The content of a file of answers."""

    predictions: list[Prediction]
    rejections: list[Rejection] = field(default_factory=list)
    official: Sequence[Answer] = ()
    """The input of MMAD's official table."""
    letters: Mapping[str, str] = field(default_factory=dict)
    """The letter that RobustMAD's authors read in each answer, by question."""
    warnings: list[str] = field(default_factory=list)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What run.json says about the answers, besides the file itself."""
