"""Collect the usable records of a source without a build."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from data_prep.collect import check_records
from data_prep.sources import Item
from data_prep.truth import merge_records
from echo_ft.records import Inspection, Question, Rejection


def collect(items: Iterable[Item], root: Path) -> tuple[list[Inspection], list[Question], list[Rejection]]:
    """Return the usable inspections and questions of a source, and the rejections of everything else."""
    usable = check_records(merge_records(items), root)
    return usable.inspections, usable.questions, usable.rejections
