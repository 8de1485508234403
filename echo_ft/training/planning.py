"""Plan a training: rows, tokens, steps and operations, from text and image headers. No image is decoded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_ft.errors import EchoError
from echo_ft.images.decode import image_size
from echo_ft.model.activations import BatchShape
from echo_ft.model.rows import RowBuilder, mark_trained
from echo_ft.records import MAX_NEW_TOKENS, Exchange, Rejection
from echo_ft.training.costs.flops import WorkCounts, image_work, repeated_work, row_work, unit_costs
from echo_ft.training.costs.memory import memory_report

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig


ROWS_PER_TOKENIZER_CALL = 256
"""Number of rows whose text is tokenized together."""


@dataclass(frozen=True)
class PlannedRow:
    """One usable exchange."""

    index: int
    """Row number in the file."""
    case: str
    first_id: str
    """Id of its first branch."""
    prefix: int
    """Number of tokens that all its branches share."""
    branches: int
    text: WorkCounts
    images: dict[str, tuple[int, int, int]]
    """Grid (t, h, w) in patches of each distinct image."""
    seen: tuple[str, ...] = ()
    """Its images in order."""
    look: int = 0
    """Number of tokens that rows with the same images share."""


@dataclass(frozen=True)
class Plan:
    """The usable rows, and the rejected ones with their reasons."""

    rows: list[PlannedRow] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)
    """Tokens of each completion that a run would cut off at its default max_new_tokens."""
    starts: Sequence[int] | None = None
    """Index of the first row of each case, followed by the number of rows; None means those of `case_starts`."""

    @property
    def text(self) -> WorkCounts:
        """The language model's work for all rows."""
        return sum((case_work(case) for case in self.cases()), WorkCounts())

    def summary(self) -> str:
        """Return one line for the terminal."""
        branches = sum(row.branches for row in self.rows)
        return (
            f"{len(self.rows)} rows, {branches} branches, {self.text.tokens} tokens, {self.text.labels} of them "
            f"trained; {len(self.rejected)} rows rejected"
        )

    def long_completions(self) -> str | None:
        """Return a warning about completions that a run would cut off, or None."""
        if not self.too_long:
            return None
        return (
            f"{len(self.too_long)} completions are longer than the {MAX_NEW_TOKENS} tokens that a run generates by "
            f"default, and the longest has {max(self.too_long)}; raise max_new_tokens to {max(self.too_long)} in the "
            "run, or shorten the text"
        )

    def cases(self) -> list[list[PlannedRow]]:
        """Return the rows grouped by case, just as in cases.group_by_case."""
        starts = self.starts or case_starts((row.case, row.first_id) for row in self.rows)
        return [self.rows[start:end] for start, end in pairwise(starts)]

    def largest_batch(self, size: int) -> list[int]:
        """Return the indices of the `size` cases with the most tokens, preferring cases with different images.

        A case that balancing has repeated is used again only after all others, because a batch encodes its images only
        once.
        """
        cases = self.cases()
        order = sorted(range(len(cases)), key=lambda number: -case_work(cases[number]).tokens)
        first: dict[str, int] = {}
        for number in order:
            first.setdefault(cases[number][0].case, number)
        repeated = [number for number in order if first[cases[number][0].case] != number]
        return [*first.values(), *repeated][:size]


def case_work(rows: Sequence[PlannedRow]) -> WorkCounts:
    """The language model's work for the rows of one case, which share looks."""
    looks = Counter((row.seen, row.look) for row in rows)
    saved = (repeated_work(look, count - 1) for (_, look), count in looks.items())
    return sum(chain((row.text for row in rows), saved), WorkCounts())


def join_plans(plans: Sequence[Plan]) -> tuple[Plan, list[int]]:
    """Join the plans of several roles case by case; also returns the position of each row among the rows of all plans.

    If balancing repeats a case in several plans, its repeats are joined in order. Cases have the order of the longest
    plan. The cases that it lacks follow.
    """
    found: list[dict[tuple[str, int], list[int]]] = []
    first = 0
    for planned in plans:
        repeats, own = Counter[str](), {}
        for case in planned.cases():
            name = case[0].case
            own[name, repeats[name]] = list(range(first, first + len(case)))
            repeats[name] += 1
            first += len(case)
        found.append(own)
    keys = dict.fromkeys(key for own in sorted(found, key=len, reverse=True) for key in own)
    cases = [[row for own in found for row in own.get(key, ())] for key in keys]
    order = list(chain.from_iterable(cases))
    rows = [row for planned in plans for row in planned.rows]
    joined = Plan(
        [rows[index] for index in order],
        [rejection for planned in plans for rejection in planned.rejected],
        [length for planned in plans for length in planned.too_long],
        [*accumulate(map(len, cases), initial=0)],
    )
    return joined, order


def case_starts(rows: Iterable[tuple[str, str]]) -> list[int]:
    """Index of the first row of each case, followed by the number of rows. `rows` are (case, id of the first branch).

    Balancing repeats cases. A row starts a repeat if it has the same case and first id as the first row of the current
    case.
    """
    starts: list[int] = []
    current, count = None, 0
    for row in rows:
        if current is None or current[0] != row[0] or current == row:
            starts.append(count)
            current = row
        count += 1
    return [*starts, count]


def plan(
    row_builder: RowBuilder, exchanges: Iterable[Exchange], root: Path, max_tokens: int, adapt_from: str = "prefix"
) -> Plan:
    """Plan all rows of `exchanges`, for an adapter that acts from `adapt_from` on (rows.ADAPT_FROM).

    Unusable rows are rejected and listed, never truncated.
    """
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
            adapted = {"prefix": None, "branch": row.branches, "answer": row.answers}[adapt_from]
            planned.too_long.extend(length for length in row.completions if length > MAX_NEW_TOKENS)
            planned.rows.append(
                PlannedRow(
                    index,
                    exchange.case,
                    exchange.branches[0].id,
                    row.prefix,
                    len(row.branches),
                    row_work(row.prefix, row.branches, row.labels, adapted),
                    dict(zip(exchange.images, row.grids, strict=True)),
                    exchange.images,
                    0 if adapt_from == "prefix" else row.look,
                )
            )
    return planned


def dry_run_report(
    planned: Plan,
    first: Exchange,
    row_builder: RowBuilder,
    root: Path,
    model: Any,
    sft: SFTConfig,
    base: ModelConfig,
    adapt_from: str = "prefix",
) -> str:
    """Report the cost of training `model` (adapted, on the meta device) on `planned`, as text for a terminal.

    `first` is the exchange that is printed as the model will see it.
    """
    cases = planned.cases()
    batch = sft.per_device_train_batch_size
    step = batch * sft.world_size * sft.gradient_accumulation_steps
    # transformers' Trainer gives every process the same number of batches, and counts an incomplete accumulation.
    batches = len(cases) / (batch * sft.world_size)
    batches = math.floor(batches) if sft.dataloader_drop_last else math.ceil(batches)
    steps = math.ceil(batches / sft.gradient_accumulation_steps)
    total = sft.max_steps if sft.max_steps > 0 else math.ceil(sft.num_train_epochs * steps)
    text = planned.text
    unshared = sum(row.text.tokens + row.prefix * (row.branches - 1) for row in planned.rows)
    images = image_work(grid for case in cases for grid in image_grids(case).values())
    operations = unit_costs(model).flops(text + images)
    rows = [row for number in planned.largest_batch(batch) for row in cases[number]]
    shape = _batch_shape(rows, planned, row_builder)
    marked = mark_trained(row_builder.load_row(first, root), row_builder)
    return "\n".join(
        [
            f"{len(cases)} cases, {step} per step ({batch} x {sft.world_size} processes x "
            f"{sft.gradient_accumulation_steps} accumulated): {steps} steps per epoch, {total} in total",
            f"per epoch: {text.tokens:,} tokens, {text.labels:,} of them trained ({text.labels / text.tokens:.1%}), no "
            f"padding; one question per row would need {unshared:,} tokens ({unshared / text.tokens:.1f} x)",
            f"per epoch: {operations / 1e12:,.2f} TFLOP forward and backward, with each image encoded once per case; "
            f"{operations / len(cases) / 1e9:,.1f} GFLOP per case",
            "",
            memory_report(model, shape, sft, base, max(2, sft.world_size), adapt_from),
            "",
            f"one row, {first.role} {first.case}, with the trained tokens in [[...]]:",
            marked,
        ]
    )


def _batch_shape(rows: list[PlannedRow], planned: Plan, row_builder: RowBuilder) -> BatchShape:
    """Return an upper bound on the batch of `rows`: the maximum over its rows, for pixels over all images."""
    patch, merge = row_builder.image_processor.patch_size, row_builder.merge
    grids = [grid for row in planned.rows for grid in row.images.values()]
    return BatchShape(
        rows=len(rows),
        images=max(len(row.images) for row in rows),
        max_pixels=max((math.prod(grid) for grid in grids), default=0) * patch**2,
        text_tokens=max(
            row.text.tokens - sum(math.prod(grid) for grid in row.images.values()) // merge**2 for row in rows
        ),
        label_tokens=max(row.text.labels for row in rows),
        distinct_images=len({name for row in rows for name in row.images}),
    )


def image_grids(case: Iterable[PlannedRow]) -> dict[str, tuple[int, int, int]]:
    """Return the grid (t, h, w) in patches of each distinct image of a case."""
    return {name: grid for row in case for name, grid in row.images.items()}
