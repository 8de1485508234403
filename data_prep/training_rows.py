"""The rows that the roles are trained on: written case by case, normal and defective parts in balance."""

from __future__ import annotations

import os
import random
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from data_prep.config import BuildConfig
from data_prep.prepare import TRAINING_SPLITS, DatasetDraft
from data_prep.progress import progress
from data_prep.upstream import UpstreamRun, predicted
from echo_ft.experts.targets import AT_HAND, gold_upstream, load_compared, training_exchanges
from echo_ft.files import to_json
from echo_ft.records import GOOD, ROLES, Case, Exchange, Inspection

Sides = dict[str, dict[str, int]]
"""How many `cases` (repeats counted) and `rows` a file of training rows has of `normal` and of `defective` parts.

Balance is a matter of cases: a defective one is asked more, and has more rows where routes differ.
"""


class RowBuffer:
    """The rows of one role, kept in a temporary file until the order is known in which they are written."""

    def __init__(self, file: IO[bytes]) -> None:
        """Keep them in `file`, which is empty and open to write and read."""
        self.cases: list[Inspection] = []
        """The cases in the order in which their rows came."""
        self._file, self._ends, self._counts = file, array("q", [0]), array("q")

    def add(self, case: Inspection, rows: Sequence[Exchange]) -> None:
        """Keep the rows of one case."""
        lines = "".join(to_json(row) + "\n" for row in rows).encode()
        self._file.write(lines)
        self.cases.append(case)
        self._ends.append(self._ends[-1] + len(lines))
        self._counts.append(len(rows))

    def write(self, order: Sequence[Inspection], path: Path) -> Sides:
        """Write the rows of these cases to `path`; returns what is there."""
        number = {case.id: place for place, case in enumerate(self.cases)}
        sides = {side: {"cases": 0, "rows": 0} for side in ("normal", "defective")}
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            for case in order:
                place = number[case.id]
                start, end = self._ends[place : place + 2]
                self._file.seek(start)
                file.write(self._file.read(end - start))
                side = sides["normal" if case.condition == GOOD else "defective"]
                side["cases"] += 1
                side["rows"] += self._counts[place]
        return sides


def write_sft(
    material: DatasetDraft, root: Path, config: BuildConfig, runs: Sequence[UpstreamRun] = ()
) -> tuple[dict[str, Sides], list[Inspection]]:
    """Write each role's training and validation rows; see `balanced` for the order and number of the former.

    What earlier roles said is taken from `runs`, where there are any, and is what they should say otherwise.
    Balanced are the cases that the role has rows for: a role that is consulted for defects only has nothing to balance.
    Returns what each file under sft holds, by `<role>/<split>`, and the photographs that balance leaves out of all.
    """
    sides = {}
    rowed, trained = dict[str, Inspection](), set[str]()
    with ExitStack() as stack:
        spools = {
            (role, split): RowBuffer(stack.enter_context(TemporaryFile(dir=material.folder)))
            for role in ROLES
            for split in TRAINING_SPLITS
        }
        # One role at a time would read each photograph four times.
        for inspection, case in progress(read_ahead(material.training_cases(), root), "writing", "cases"):
            said = predicted(case, runs, config.routing) if runs else None
            gold = gold_upstream(case, root, said)
            for role in ROLES:
                rows = training_exchanges(case, role, root, config.routing, said, gold)
                if rows:
                    spools[role, str(inspection.split)].add(inspection, rows)
        for (role, split), spool in spools.items():
            order = balanced(spool.cases, config.seed) if split == "train" and config.balance else spool.cases
            sides[f"{role}/{split}"] = spool.write(order, material.folder / "sft" / role / f"{split}.jsonl")
            rowed |= {case.id: case for case in spool.cases}
            trained |= {case.id for case in order}
    return sides, [case for name, case in rowed.items() if name not in trained]


def read_ahead(cases: Iterable[tuple[Inspection, Case]], root: Path) -> Iterator[tuple[Inspection, Case]]:
    """The cases as they come, their images read in threads before it is their turn.

    Nothing is read while cases are written: that would wait for the interpreter's lock, and make the writing wait.
    """

    def read(images: Sequence[str]) -> None:
        for image in images:
            load_compared(root, image)

    threads = min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        for chunk, images in _chunks(cases):
            list(pool.map(read, [images[thread::threads] for thread in range(threads)]))
            yield from chunk


def _chunks(cases: Iterable[tuple[Inspection, Case]]) -> Iterator[tuple[list[tuple[Inspection, Case]], list[str]]]:
    """The cases in chunks, each with its images: as many cases as have up to AT_HAND, but one at least."""
    chunk: list[tuple[Inspection, Case]] = []
    images: dict[str, None] = {}
    for inspection, case in cases:
        own = dict.fromkeys((case.seen.query, *(reference.image for reference in case.seen.references)))
        if chunk and len(images | own) > AT_HAND:
            yield chunk, list(images)
            chunk, images = [], {}
        chunk.append((inspection, case))
        images |= own
    if chunk:
        yield chunk, list(images)


MAX_REPEATS = 4
"""How often balancing repeats a case at most: beyond that a model learns the photograph, not the defect."""


def balanced(cases: Sequence[Inspection], seed: int) -> list[Inspection]:
    """As many normal as defective cases in each product, in a seeded random order in which none follows itself.

    The rarer side is repeated (no photograph is left out), up to `MAX_REPEATS` times; beyond that the other side is
    sampled down. Per product, as a product with more defects than others would itself become the answer. A product
    that lacks one side stays as it is.
    """
    rng = random.Random(f"{seed}/balance")
    sides: dict[tuple[str, str], tuple[list[Inspection], list[Inspection]]] = defaultdict(lambda: ([], []))
    for case in cases:
        sides[case.dataset, case.product][case.condition == GOOD].append(case)
    chosen: list[Inspection] = []
    for defective, normal in sides.values():
        few, many = sorted((defective, normal), key=len)
        if not few:
            chosen += many
            continue
        size = min(len(many), len(few) * MAX_REPEATS)
        whole, rest = divmod(size, len(few))
        chosen += few * whole + rng.sample(few, rest) + rng.sample(many, size)
    rng.shuffle(chosen)
    return _apart(chosen, rng)


def _apart(cases: Sequence[Inspection], rng: random.Random) -> list[Inspection]:
    """The cases in their order, but those that follow themselves, which go where they do not.

    Training reads neighbouring rows of one case as one. There is always such a place: a repeated case has at least as
    many different ones of the other side, each there once, as it has repeats.
    """
    order: list[Inspection] = []
    again: list[Inspection] = []
    for case in cases:
        (again if order and order[-1].id == case.id else order).append(case)
    for case in again:
        free = [i for i in range(len(order) + 1) if all(near.id != case.id for near in order[max(0, i - 1) : i + 1])]
        order.insert(rng.choice(free), case)
    return order
