"""Write the training rows of each role case by case, and balance normal and defective cases."""

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
from data_prep.upstream import UpstreamRun, predicted_upstream
from echo_ft.experts.targets import CACHED_IMAGES, gold_upstream, load_compared, training_exchanges
from echo_ft.files import to_json
from echo_ft.records import GOOD, ROLES, Case, Exchange, Inspection
from echo_ft.terminal import progress

SideCounts = dict[str, dict[str, int]]
"""Number of `cases` (with repeats) and `rows` on the `normal` and `defective` sides of a file of training rows.

Balancing works on cases. A defective case has more questions, and more rows if their routes differ.
"""

MAX_REPEATS = 4
"""Maximum number of times that balancing uses a case. With more, a model memorises the image instead of the defect."""


class RowBuffer:
    """The rows of one role in a temporary file, until the order in which to write them is known."""

    def __init__(self, file: IO[bytes]) -> None:
        """Keep the rows in `file`, which must be empty and open for reading and writing."""
        self.cases: list[Inspection] = []
        """The cases in the order in which their rows were added."""
        self._file, self._ends, self._counts = file, array("q", [0]), array("q")

    def add(self, case: Inspection, rows: Sequence[Exchange]) -> None:
        """Add the rows of one case."""
        lines = "".join(to_json(row) + "\n" for row in rows).encode()
        self._file.write(lines)
        self.cases.append(case)
        self._ends.append(self._ends[-1] + len(lines))
        self._counts.append(len(rows))

    def write(self, order: Sequence[Inspection], path: Path) -> SideCounts:
        """Write the rows of these cases to `path`, and return their number per side."""
        positions = {case.id: position for position, case in enumerate(self.cases)}
        sides = {side: {"cases": 0, "rows": 0} for side in ("normal", "defective")}
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            for case in order:
                position = positions[case.id]
                start, end = self._ends[position : position + 2]
                self._file.seek(start)
                file.write(self._file.read(end - start))
                side = sides["normal" if case.condition == GOOD else "defective"]
                side["cases"] += 1
                side["rows"] += self._counts[position]
        return sides


def write_training_rows(
    draft: DatasetDraft, root: Path, config: BuildConfig, runs: Sequence[UpstreamRun] = ()
) -> tuple[dict[str, SideCounts], list[Inspection]]:
    """Write the train and validation rows of each role. `balance_cases` orders and repeats those of the train split.

    Outputs of earlier roles come from `runs`; without runs, they are gold. Only cases that have rows for a role are
    balanced for it, so a role that is consulted only about defects has nothing to balance.

    Returns the counts for each file in sft, keyed by `<role>/<split>`, and the inspections that balancing left out of
    every file. Raises EchoError if a run does not match the dataset (see `predicted_upstream`).
    """
    counts = {}
    with_rows, used = dict[str, Inspection](), set[str]()
    with ExitStack() as stack:
        buffers = {
            (role, split): RowBuffer(stack.enter_context(TemporaryFile(dir=draft.folder)))
            for role in ROLES
            for split in TRAINING_SPLITS
        }
        # Writing one role after the other would read every image four times.
        for inspection, case in progress(prefetch_images(draft.training_cases(), root), "writing rows", "cases"):
            upstream = predicted_upstream(case, runs, config.routing) if runs else None
            gold = gold_upstream(case, root, upstream)
            for role in ROLES:
                rows = training_exchanges(case, role, root, config.routing, upstream, gold)
                if rows:
                    buffers[role, str(inspection.split)].add(inspection, rows)
        for (role, split), buffer in buffers.items():
            balance = split == "train" and config.balance
            order = balance_cases(buffer.cases, config.seed) if balance else buffer.cases
            counts[f"{role}/{split}"] = buffer.write(order, draft.folder / "sft" / role / f"{split}.jsonl")
            with_rows |= {case.id: case for case in buffer.cases}
            used |= {case.id for case in order}
    return counts, [case for name, case in with_rows.items() if name not in used]


def prefetch_images(cases: Iterable[tuple[Inspection, Case]], root: Path) -> Iterator[tuple[Inspection, Case]]:
    """Yield the cases in order. Threads load the images of a chunk of cases before the chunk's first case is yielded.

    No image is loaded while rows are written, because loading and writing would compete for the interpreter lock.
    """

    def load(images: Sequence[str]) -> None:
        for image in images:
            load_compared(root, image)

    threads = min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        for chunk, images in _chunks(cases):
            list(pool.map(load, [images[thread::threads] for thread in range(threads)]))
            yield from chunk


def _chunks(cases: Iterable[tuple[Inspection, Case]]) -> Iterator[tuple[list[tuple[Inspection, Case]], list[str]]]:
    """Yield chunks of cases and their images. A chunk has at most CACHED_IMAGES images but at least one case."""
    chunk: list[tuple[Inspection, Case]] = []
    images: dict[str, None] = {}
    for inspection, case in cases:
        own = dict.fromkeys((case.seen.query, *(reference.image for reference in case.seen.references)))
        if chunk and len(images | own) > CACHED_IMAGES:
            yield chunk, list(images)
            chunk, images = [], {}
        chunk.append((inspection, case))
        images |= own
    if chunk:
        yield chunk, list(images)


def balance_cases(cases: Sequence[Inspection], seed: int) -> list[Inspection]:
    """Return as many normal as defective cases per product, in a seeded random order in which no case follows itself.

    Cases on the rarer side are repeated up to MAX_REPEATS times, and none of them is left out. If that is not enough,
    the other side is subsampled. Balancing is per product, because a product with more defects than others would itself
    predict the answer. A product with cases of only one side is not changed.
    """
    rng = random.Random(f"{seed}/balance")
    sides: dict[tuple[str, str], tuple[list[Inspection], list[Inspection]]] = defaultdict(lambda: ([], []))
    for case in cases:
        sides[case.dataset, case.product][case.condition == GOOD].append(case)
    chosen: list[Inspection] = []
    for defective, normal in sides.values():
        rare, common = sorted((defective, normal), key=len)
        if not rare:
            chosen += common
            continue
        size = min(len(common), len(rare) * MAX_REPEATS)
        repeats, rest = divmod(size, len(rare))
        chosen += rare * repeats + rng.sample(rare, rest) + rng.sample(common, size)
    rng.shuffle(chosen)
    return _separate_repeats(chosen, rng)


def _separate_repeats(cases: Sequence[Inspection], rng: random.Random) -> list[Inspection]:
    """Return the cases in order, but move any case that follows itself to a position where it has no equal neighbour.

    Training reads neighbouring rows of one case as a single case. Such a position always exists. The other side has at
    least as many cases as a case has repeats, and these cases do not repeat.
    """
    order: list[Inspection] = []
    displaced: list[Inspection] = []
    for case in cases:
        (displaced if order and order[-1].id == case.id else order).append(case)
    for case in displaced:
        free = [i for i in range(len(order) + 1) if all(near.id != case.id for near in order[max(0, i - 1) : i + 1])]
        order.insert(rng.choice(free), case)
    return order
