"""What training will go through, known from texts and image headers before step 1; no image is decoded for it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_ft.errors import EchoError
from echo_ft.images.decode import image_size
from echo_ft.model.rows import RowBuilder, mark_trained
from echo_ft.records import Exchange, Rejection
from echo_ft.training.flops import Load, costs, image_load, row_load
from echo_ft.training.memory import Batch, report

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig


ROWS_PER_TOKENIZER_CALL = 256
"""Rows whose texts are tokenized together."""


@dataclass(frozen=True)
class PlannedRow:
    """One usable exchange."""

    index: int
    """In its file."""
    case: str
    asked: str
    """Id of its first branch."""
    prefix: int
    """Tokens that all its branches share."""
    branches: int
    text: Load
    images: dict[str, tuple[int, int, int]]
    """Grid in patches of each different image."""


@dataclass(frozen=True)
class Plan:
    """The usable rows, and what cannot be used and why."""

    rows: list[PlannedRow] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)

    @property
    def text(self) -> Load:
        """Of all rows."""
        return sum((row.text for row in self.rows), Load())

    def summary(self) -> str:
        """One line for the terminal."""
        branches = sum(row.branches for row in self.rows)
        return (
            f"{len(self.rows)} rows, {branches} branches, {self.text.tokens} tokens, {self.text.labels} of them "
            f"trained on; {len(self.rejected)} rows rejected"
        )

    def cases(self) -> list[list[PlannedRow]]:
        """Rows by case, as training.by_case puts them together."""
        starts = case_starts((row.case, row.asked) for row in self.rows)
        return [self.rows[start:end] for start, end in pairwise(starts)]

    def largest(self, count: int) -> list[int]:
        """Numbers of the `count` cases that make the largest batch: the most tokens, and no image twice if possible.

        A case that balancing repeats comes once before any comes again: its images would be encoded once for all.
        """
        cases = self.cases()
        order = sorted(range(len(cases)), key=lambda number: -sum(row.text.tokens for row in cases[number]))
        first = {cases[number][0].case: number for number in reversed(order)}
        again = [number for number in order if first[cases[number][0].case] != number]
        return [*reversed(first.values()), *again][:count]


def case_starts(rows: Iterable[tuple[str, str]]) -> list[int]:
    """Where in neighbouring rows (case, id of the first branch) a case begins, and at last how many rows there are.

    Balancing repeats cases: one that asks what it asked first begins again.
    """
    starts: list[int] = []
    begun, count = None, 0
    for row in rows:
        if begun is None or begun[0] != row[0] or begun == row:
            starts.append(count)
            begun = row
        count += 1
    return [*starts, count]


def plan(row_builder: RowBuilder, exchanges: Iterable[Exchange], root: Path, max_tokens: int) -> Plan:
    """Lengths of all rows; those that cannot be used are named, never cut."""
    planned = Plan()
    rows = iter(exchanges)
    index = -1
    while chunk := list(islice(rows, ROWS_PER_TOKENIZER_CALL)):
        row_builder.pretokenize(chunk)
        for exchange in chunk:
            index += 1
            name = f"{exchange.role} {exchange.case}"
            try:
                row = row_builder.lengths(exchange, [image_size(root / image) for image in exchange.images])
            except EchoError as error:
                planned.rejected.append(Rejection(name, str(error)))
                continue
            if row.tokens > max_tokens:
                reason = f"{row.tokens} tokens, more than max_tokens {max_tokens}; lower max_pixels or raise max_tokens"
                planned.rejected.append(Rejection(name, reason))
                continue
            planned.rows.append(
                PlannedRow(
                    index,
                    exchange.case,
                    exchange.branches[0].id,
                    row.prefix,
                    len(row.branches),
                    row_load(row.prefix, row.branches, row.labels),
                    dict(zip(exchange.images, row.grids, strict=True)),
                )
            )
    return planned


def dry_run(
    planned: Plan, first: Exchange, row_builder: RowBuilder, root: Path, model: Any, sft: SFTConfig, base: ModelConfig
) -> str:
    """What training `model` (adapted, on the meta device) on `planned` would take, as text for a terminal.

    `first` is the exchange that is shown as the model will see it.
    """
    cases = planned.cases()
    batch = sft.per_device_train_batch_size
    step = batch * sft.world_size * sft.gradient_accumulation_steps
    # As transformers' Trainer counts: every process gets as many batches, and a rest of accumulation is a step.
    batches = math.ceil(math.ceil(len(cases) / batch) / sft.world_size)
    steps = math.ceil(batches / sft.gradient_accumulation_steps)
    total = sft.max_steps if sft.max_steps > 0 else math.ceil(sft.num_train_epochs * steps)
    text = planned.text
    alone = sum(row.prefix * (row.branches - 1) for row in planned.rows)
    images = image_load(grid for case in cases for grid in images_of(case).values())
    operations = costs(model).of(text + images)
    rows = [row for number in planned.largest(batch) for row in cases[number]]
    patch, merge = row_builder.image_processor.patch_size, row_builder.merge
    grids = [grid for row in planned.rows for grid in row.images.values()]
    largest = Batch(
        rows=len(rows),
        images=max(len(row.images) for row in rows),
        max_pixels=max((math.prod(grid) for grid in grids), default=0) * patch**2,
        text_tokens=max(
            row.text.tokens - sum(math.prod(grid) for grid in row.images.values()) // merge**2 for row in rows
        ),
        label_tokens=max(row.text.labels for row in rows),
    )
    marked = mark_trained(row_builder.load_row(first, root), row_builder)
    return "\n".join(
        [
            f"{len(cases)} cases, {step} a step ({batch} x {sft.world_size} processes x "
            f"{sft.gradient_accumulation_steps} accumulated): {steps} steps an epoch, {total} in all",
            f"an epoch: {text.tokens:,} tokens, {text.labels:,} of them trained on ({text.labels / text.tokens:.1%}), "
            f"no padding; asked one by one they would be {text.tokens + alone:,} ({1 + alone / text.tokens:.1f} x)",
            f"an epoch: {operations / 1e12:,.2f} TFLOP forward and backward, each case's images encoded once; "
            f"{operations / len(cases) / 1e9:,.1f} GFLOP a case",
            "",
            report(model, largest, sft, base, gpus=max(2, sft.world_size)),
            "",
            f"one row, {first.role} {first.case}, with the trained tokens in [[...]]:",
            marked,
        ]
    )


def images_of(case: Iterable[PlannedRow]) -> dict[str, tuple[int, int, int]]:
    """Grid of each different image of a case."""
    return {name: grid for row in case for name, grid in row.images.items()}
