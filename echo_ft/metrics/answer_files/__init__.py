"""Answers that other programs wrote: files in MMAD's format, in RobustMAD's, and JSON lines in our own format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from echo_ft.metrics.mmad import Answer
from echo_ft.records import Prediction, Rejection


@dataclass(frozen=True)
class GivenAnswers:
    """The content of an answer file."""

    predictions: list[Prediction]
    rejections: list[Rejection] = field(default_factory=list)
    official: Sequence[Answer] = ()
    """The input of MMAD's official table."""
    letters: Mapping[str, str] = field(default_factory=dict)
    """The letter that RobustMAD's authors read from each answer, by question."""
    warnings: list[str] = field(default_factory=list)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Further facts about the answers, for run.json."""
