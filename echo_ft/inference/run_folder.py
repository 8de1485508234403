"""The folder of an evaluation run: written as predictions come, stopped at any moment, gone on with, never mixed.

One process writes into the run's own files. Several write a shard each, and the first of them brings the shards
together when all are done, or when the run is started again, by however many processes.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

from echo_ft.errors import EchoError
from echo_ft.experts.option_order import PermutedPrediction
from echo_ft.experts.pipeline import Outcome
from echo_ft.files import LOCK_FILE, lock_folder, open_append, read_complete_rows, to_json, write_jsonl, write_text
from echo_ft.records import Case, Prediction, Trace

PREDICTIONS, TRACES, RUN_DESCRIPTION = "predictions.jsonl", "traces.jsonl", "run.json"
PERMUTATIONS = "permutations.jsonl"
"""Where options are permuted: the decisions in each order. predictions.jsonl has one a question all the same."""

SHARDS = "shards"
"""Holds a folder for each of several processes while they write, named after its number."""

CONTINUED_WITH = "continued_with"
"""Where run.json keeps what was noted by processes that went on with the run under other circumstances."""

RunRecord = TypeVar("RunRecord", Prediction, Trace, PermutedPrediction)


@dataclass(frozen=True)
class Processes:
    """Which one this is of the processes that share a run, and how it waits for the others."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None

    @property
    def first(self) -> bool:
        """Whether this is the one that describes the run and brings the shards together."""
        return self.index == 0


class RunFolder:
    """Appends outcomes; a case counts as done when all its predictions are on disk.

    Started again, a run asks the cases that failed once more: their images may have been put right. One run writes to a
    folder at a time: close it, or use it in a `with` block, to let another one have it.
    """

    def __init__(
        self,
        folder: Path,
        provenance: Mapping[str, Any],
        cases: Sequence[Case],
        noted: Mapping[str, Any] | None = None,
        processes: Processes | None = None,
    ) -> None:
        """Start the run, or go on with the one that is there.

        Each of several `processes` does so, and is held here until the first has looked at what is there.
        `provenance` is all that must not differ between the two, `noted` what run.json tells beside it: it may differ,
        and what a process that writes answers notes otherwise than the first is kept in `continued_with`. Raises
        EchoError where the provenance differs, another run is at work in the folder, or it holds something else.
        """
        self.folder = folder
        self.processes = processes or Processes()
        self.provenance = dict(provenance)
        self.cases = cases
        self.questions = sum(len(case.seen.questions) for case in cases)
        self._now = self._noted = json.loads(json.dumps(dict(noted or {})))
        self._continued: list[dict[str, Any]] = []
        self._locks: list[TextIO] = []
        self._files: dict[str, TextIO] = {}
        try:
            self.done = self._open() if self.processes.first else set()
            self.processes.wait()
            if not self.processes.first:  # from here on, others may be writing: what they do is no matter of this one
                self.done = self._answered([folder], failed=False)
            self._own = folder if self.processes.count == 1 else folder / SHARDS / str(self.processes.index)
            if self._own != folder:
                self._own.mkdir(parents=True, exist_ok=True)
                self._locks.append(lock_folder(self._own))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        for file in (*self._files.values(), *reversed(self._locks)):
            file.close()

    def batches(self, size: int) -> list[Sequence[Case]]:
        """This process's share of what is not done yet.

        All cases in their order make batches of `size`, and one of which anything is missing is run as a whole: the
        last bits of an answer depend on what it is computed beside, and so neither on when the run was stopped nor on
        the number of processes.
        """
        batches = [self.cases[start : start + size] for start in range(0, len(self.cases), size)]
        missing = [batch for batch in batches if any(case.id not in self.done for case in batch)]
        return missing[self.processes.index :: self.processes.count]

    def write(self, case: Case, outcome: Outcome) -> None:
        """Put one case on disk: what was seen and said first, the predictions, which make it count, last.

        A case that is done already stays as it is.
        """
        if case.id in self.done:
            return
        if self.processes.first:
            self._note()
        self._put(TRACES, outcome.traces)
        self._put(PERMUTATIONS, outcome.permuted)
        self._put(PREDICTIONS, outcome.predictions)
        self.done.add(case.id)

    def _put(self, name: str, records: Sequence[RunRecord]) -> None:
        if records and name not in self._files:
            self._files[name] = open_append(self._own / name)
        if records:
            self._files[name].write("".join(to_json(record) + "\n" for record in records))
            self._files[name].flush()

    def finish(self) -> None:
        """Bring together what all processes wrote, and say in run.json whether it is all. Each of them calls this."""
        if self.processes.count > 1:
            for file in (*self._files.values(), self._locks.pop()):  # its shard's
                file.close()
            self.processes.wait()
            if self.processes.first:
                self.done = self._gather(failed=True)
        if self.processes.first:
            self._describe(complete=len(self.done) == len(self.cases))

    def _open(self) -> set[str]:
        """Make the folder this run's, and its files those of the cases that are done, whose ids it returns."""
        ours = {RUN_DESCRIPTION + ".partial", LOCK_FILE}
        described = self.folder / RUN_DESCRIPTION
        if not described.is_file() and self.folder.is_dir() and any(p.name not in ours for p in self.folder.iterdir()):
            raise EchoError(f"{self.folder} is not empty and holds no run; choose another --output")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._locks.append(lock_folder(self.folder))
        if described.is_file():
            self._go_on(_description(described))
        self._describe(complete=False)
        done = self._gather(failed=False)
        self._describe(complete=len(done) == len(self.cases))
        if self.processes.count > 1 and len(done) < len(self.cases):
            self._note()  # it speaks for the others too
        return done

    def _note(self) -> None:
        """Keep in run.json what this process notes otherwise than the one that started the run."""
        changed = {key: value for key, value in self._now.items() if self._noted.get(key) != value}
        if changed and changed not in self._continued:
            self._continued.append(changed)
            self._describe(complete=False)

    def _describe(self, complete: bool) -> None:
        run = {**self._required(), **self._noted}
        if self._continued:
            run[CONTINUED_WITH] = self._continued
        write_text(self.folder / RUN_DESCRIPTION, json.dumps({**run, "complete": complete}, indent=2) + "\n")

    def _required(self) -> dict[str, Any]:
        return {**self.provenance, "cases": len(self.cases), "questions": self.questions}

    def _go_on(self, earlier: Mapping[str, Any]) -> None:
        """Check that `earlier` describes this run, and keep what it notes."""
        required = self._required()
        difference = _difference("", {key: earlier.get(key) for key in required}, json.loads(json.dumps(required)))
        if difference:
            name, before, now = difference
            raise EchoError(
                f"{self.folder} holds a run whose {name} is {before!r}, not {now!r}; "
                "choose another --output, or delete that folder to run it again"
            )
        self._noted = {
            key: value for key, value in earlier.items() if key not in {*required, "complete", CONTINUED_WITH}
        }
        self._continued = list(earlier.get(CONTINUED_WITH, []))

    def _gather(self, failed: bool) -> set[str]:
        """Take the shards into the run's own files, and whatever belongs to a half-written case out of them.

        Returns the ids of the cases that are done; see `_answered`. Stopped in the middle, it loses nothing: the shards
        go last.
        """
        shards = self.folder / SHARDS
        folders = [self.folder, *sorted(shards.glob("*/"))]
        for shard in folders[1:]:  # a process that outlived the first of its run may still write there
            lock_folder(shard).close()
        done = self._answered(folders, failed)
        predictions = (
            row for row in _rows(folders, PREDICTIONS, Prediction) if row.case in done and (failed or row.error is None)
        )
        write_jsonl(self.folder / PREDICTIONS, _distinct(predictions, lambda row: (row.case, row.question)))
        traces = (row for row in _rows(folders, TRACES, Trace) if row.case in done)
        write_jsonl(self.folder / TRACES, _distinct(traces, lambda row: (row.case, row.role, row.branch)))
        if any((folder / PERMUTATIONS).is_file() for folder in folders):
            orders = (row for row in _rows(folders, PERMUTATIONS, PermutedPrediction) if row.case in done)
            write_jsonl(self.folder / PERMUTATIONS, _distinct(orders, lambda row: (row.case, row.question, row.shift)))
        if shards.is_dir():
            shutil.rmtree(shards)
        return done

    def _answered(self, folders: Iterable[Path], failed: bool) -> set[str]:
        """Ids of the cases whose questions are all answered; those that failed are among them where `failed` is set."""
        asked = {case.id: {question.id for question in case.seen.questions} for case in self.cases}
        answered: defaultdict[str, set[str]] = defaultdict(set)
        for row in _rows(folders, PREDICTIONS, Prediction):
            if failed or row.error is None:
                answered[row.case].add(row.question)
        return {case for case, questions in answered.items() if asked.get(case) == questions}


def failure_reasons(folder: Path) -> list[str]:
    """Why predictions of a run failed, one reason for each that did."""
    return [row.error for row in read_complete_rows(folder / PREDICTIONS, Prediction) if row.error is not None]


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder has nothing left to ask: it is complete, and no prediction of it failed."""
    described = folder / RUN_DESCRIPTION
    return described.is_file() and _description(described).get("complete") is True and not failure_reasons(folder)


def _rows(folders: Iterable[Path], name: str, cls: type[RunRecord]) -> Iterator[RunRecord]:
    for folder in folders:
        yield from read_complete_rows(folder / name, cls)


def _distinct(rows: Iterable[RunRecord], key: Callable[[RunRecord], Hashable]) -> Iterator[RunRecord]:
    """The first of the rows with each key."""
    seen = set()
    for row in rows:
        if key(row) not in seen:
            seen.add(key(row))
            yield row


def _description(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EchoError(f"{path} is not JSON ({error}); choose another --output, or delete that folder") from error
    if not isinstance(found, dict):
        raise EchoError(f"{path} is not a run's description; choose another --output, or delete that folder")
    return found


def _difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any] | None:
    """The dotted name of the first value that differs, and both values; a whole part that one side lacks is None."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in before if key not in now)]:
            found = _difference(f"{name}.{key}" if name else key, before.get(key), now.get(key))
            if found:
                return found
        return None
    if before == now:
        return None
    before, now = (f"{len(one)} values" if isinstance(one, dict) else one for one in (before, now))
    return name, before, now
