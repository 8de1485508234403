"""The folder of an evaluation run. A run can be interrupted at any time and resumed, and a folder never mixes two runs.

A single process writes directly to the run's files. Several processes write one shard each. The first process merges
the shards when all are done, or when the run is resumed with any number of processes.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

from echo_ft.errors import EchoError
from echo_ft.experts.option_order import PermutedPrediction
from echo_ft.experts.pipeline import Outcome
from echo_ft.files import (
    RESUME_REMEDY,
    explain_full_disk,
    open_append,
    read_complete_rows,
    to_json,
    write_json,
    write_jsonl,
)
from echo_ft.inputs import read_json_object, restore
from echo_ft.processes import LOCK_FILE, PARTIAL, lock_folder
from echo_ft.provenance import row_digests
from echo_ft.records import Case, Prediction, Trace
from echo_ft.terminal import LOGGER

PREDICTIONS, TRACES, RUN_DESCRIPTION = "predictions.jsonl", "traces.jsonl", "run.json"
PERMUTATIONS = "permutations.jsonl"
"""The decisions for each option order, if options are permuted. predictions.jsonl still has one row per question."""

SHARDS = "shards"
"""Folder with one subfolder per process, named by its index, while several processes write."""

CONTINUED_WITH = "continued_with"
"""Key in run.json for the notes of processes that later resumed the run with different settings."""

CUT = "cut"
"""Key in run.json for the number of outputs from each role that max_new_tokens cut off."""

ROW_DIGESTS = "digests"
"""Key in run.json of a complete run for the SHA-256 of the rows in each of its other files, in any order."""

RunRecord = TypeVar("RunRecord", Prediction, Trace, PermutedPrediction)


@dataclass(frozen=True)
class Processes:
    """The position of this process among those that share a run, and the barrier between them."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None

    @property
    def first(self) -> bool:
        """Whether this process writes run.json and merges the shards."""
        return self.index == 0


class RunFolder:
    """Appends the outcomes of a run to its folder. A case is done when all its predictions are on disk.

    A resumed run repeats failed cases, because their images may have been repaired. Only one run can write to a folder
    at a time. Close it, or use it in a `with` block, to release the folder.
    """

    def __init__(
        self,
        folder: Path,
        provenance: Mapping[str, Any],
        cases: Sequence[Case],
        notes: Mapping[str, Any] | None = None,
        processes: Processes | None = None,
    ) -> None:
        """Start a run, or resume the one in `folder`.

        All `processes` of a run call this, and wait here until the first one has read the folder. `provenance` must be
        equal when a run is resumed. `notes` are also written to run.json but may differ; if the notes of a process that
        writes answers differ from the first process's, `continued_with` receives them.

        Raises EchoError if the provenance differs, another process is writing to the folder, the folder has foreign
        content, or the disk is full.
        """
        self.folder = folder
        self.processes = processes or Processes()
        self.provenance = dict(provenance)
        self.cases = cases
        self.questions = sum(len(case.seen.questions) for case in cases)
        self._own_notes = self._notes = json.loads(json.dumps(dict(notes or {})))
        self._continued: list[dict[str, Any]] = []
        self._locks: list[TextIO] = []
        self._files: dict[str, TextIO] = {}
        try:
            with explain_full_disk(folder, RESUME_REMEDY):
                self.done = self._open() if self.processes.first else set()
                self.processes.wait()
                if not self.processes.first:  # other processes may already be writing to their own shards
                    self.done = self._find_done([folder], include_failed=False)
                self._shard = folder if self.processes.count == 1 else folder / SHARDS / str(self.processes.index)
                if self._shard != folder:
                    self._shard.mkdir(parents=True, exist_ok=True)
                    self._locks.append(lock_folder(self._shard))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files and release the folder."""
        for file in (*self._files.values(), *reversed(self._locks)):
            with suppress(OSError):  # closing repeats a failed write, whose error has been raised already
                file.close()

    def batches(self, size: int) -> list[Sequence[Case]]:
        """Return the unfinished batches that this process should run.

        Cases are batched in dataset order, `size` at a time, and a batch with any missing case is rerun as a whole. The
        lowest bits of an answer depend on the rest of its batch. With fixed batches, results depend neither on where
        the run was interrupted nor on the number of processes.
        """
        batches = [self.cases[start : start + size] for start in range(0, len(self.cases), size)]
        missing = [batch for batch in batches if any(case.id not in self.done for case in batch)]
        return missing[self.processes.index :: self.processes.count]

    def write(self, case: Case, outcome: Outcome) -> None:
        """Write the outcome of one case. The predictions come last, because they mark the case as done.

        A case that is already done is left unchanged. Raises EchoError if the disk is full.
        """
        if case.id in self.done:
            return
        with explain_full_disk(self.folder, RESUME_REMEDY):
            if self.processes.first:
                self._record_notes()
            self._append(TRACES, outcome.traces)
            self._append(PERMUTATIONS, outcome.permuted)
            self._append(PREDICTIONS, outcome.predictions)
        self.done.add(case.id)

    def _append(self, name: str, records: Sequence[RunRecord]) -> None:
        if records and name not in self._files:
            self._files[name] = open_append(self._shard / name)
        if records:
            self._files[name].write("".join(to_json(record) + "\n" for record in records))
            self._files[name].flush()

    def finish(self) -> None:
        """Merge the shards, and record in run.json whether the run is complete. All processes call this.

        Raises EchoError if the disk is full.
        """
        if self.processes.count > 1:
            for file in (*self._files.values(), self._locks.pop()):  # the handles of this process's shard
                file.close()
            self.processes.wait()
        if self.processes.first:
            with explain_full_disk(self.folder, RESUME_REMEDY):
                if self.processes.count > 1:
                    self.done = self._merge_shards(include_failed=True)
                self._write_description(complete=len(self.done) == len(self.cases))

    def _open(self) -> set[str]:
        """Claim the folder, reduce its files to the finished cases, and return their ids."""
        own_files = {RUN_DESCRIPTION + PARTIAL, LOCK_FILE}
        description = self.folder / RUN_DESCRIPTION
        names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if not description.is_file() and names - own_files:
            raise EchoError(f"{self.folder} is not empty and holds no run; choose another --output")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._locks.append(lock_folder(self.folder))
        if description.is_file():
            earlier = _read_description(description)
            fault = changed_file(self.folder, earlier)
            if fault:
                LOGGER.warning("%s since the run ended; the run keeps every whole case in it", fault)
            self._resume(earlier)
        self._write_description(complete=False)
        done = self._merge_shards(include_failed=False)
        self._write_description(complete=len(done) == len(self.cases))
        if self.processes.count > 1 and len(done) < len(self.cases):
            self._record_notes()  # the first process does this for all processes
        return done

    def _record_notes(self) -> None:
        """Add this process's notes to run.json if they differ from those of the process that started the run."""
        changed = {key: value for key, value in self._own_notes.items() if self._notes.get(key) != value}
        if changed and changed not in self._continued:
            self._continued.append(changed)
            self._write_description(complete=False)

    def _write_description(self, complete: bool) -> None:
        run = {**self._required(), **self._notes}
        if self._continued:
            run[CONTINUED_WITH] = self._continued
        if complete:
            traces = read_complete_rows(self.folder / TRACES, Trace)
            run[CUT] = dict(Counter(trace.role for trace in traces if trace.cut))
            run[ROW_DIGESTS] = row_digests(self.folder, (PREDICTIONS, TRACES, PERMUTATIONS))
        write_json(self.folder / RUN_DESCRIPTION, {**run, "complete": complete})

    def _required(self) -> dict[str, Any]:
        return {**self.provenance, "cases": len(self.cases), "questions": self.questions}

    def _resume(self, earlier: Mapping[str, Any]) -> None:
        """Check that `earlier` has the same provenance, and take over its notes."""
        required = self._required()
        before: dict[str, Any] = {key: earlier.get(key) for key in required}
        if isinstance(before.get("versions"), dict):  # older runs recorded fewer packages
            before["versions"] = {**required["versions"], **before["versions"]}
        difference = _difference("", before, json.loads(json.dumps(required)))
        if difference:
            name, earlier_value, now = difference
            raise EchoError(
                f"{self.folder} holds a run in which {name} is {earlier_value!r}, not {now!r}; "
                "choose another --output, or delete that folder to start over"
            )
        self._notes = {
            key: value
            for key, value in earlier.items()
            if key not in {*required, CUT, ROW_DIGESTS, "complete", CONTINUED_WITH}
        }
        self._continued = list(earlier.get(CONTINUED_WITH, []))

    def _merge_shards(self, include_failed: bool) -> set[str]:
        """Merge the shards into the run's files, and remove the rows of incomplete cases.

        Returns the ids of the cases that are done, as `_find_done` does. An interruption loses nothing, because the
        shards are deleted last.
        """
        shards = self.folder / SHARDS
        folders = [self.folder, *sorted(shards.glob("*/"))]
        for shard in folders[1:]:  # a process that has outlived the first one may still be writing there
            lock_folder(shard).close()
        done = self._find_done(folders, include_failed)
        predictions = (
            row
            for row in _rows(folders, PREDICTIONS, Prediction)
            if row.case in done and (include_failed or row.error is None)
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

    def _find_done(self, folders: Iterable[Path], include_failed: bool) -> set[str]:
        """Return the ids of cases with a prediction for every question; failed ones count only if `include_failed`."""
        expected = {case.id: {question.id for question in case.seen.questions} for case in self.cases}
        answered: defaultdict[str, set[str]] = defaultdict(set)
        for row in _rows(folders, PREDICTIONS, Prediction):
            if include_failed or row.error is None:
                answered[row.case].add(row.question)
        return {case for case, questions in answered.items() if expected.get(case) == questions}


def changed_file(folder: Path, run: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a file that has changed since the run ended, such as `PATH has changed`, or None.

    `run` is the content of run.json. Missing files are not reported, because not every command needs all.
    """
    try:
        digests = restore(dict[str, str], run.get(ROW_DIGESTS, {}))
    except TypeError as error:
        return f"{folder / RUN_DESCRIPTION} has no usable {ROW_DIGESTS} ({error}), so it has changed"
    found = row_digests(folder, digests)
    changed = next((name for name, digest in found.items() if digest != digests[name]), None)
    return f"{folder / changed} has changed" if changed else None


def read_cut_warning(folder: Path) -> str | None:
    """Return `cut_warning` for the run in a folder."""
    return cut_warning(_read_description(folder / RUN_DESCRIPTION))


def cut_warning(run: Mapping[str, Any]) -> str | None:
    """Return a sentence about the outputs that max_new_tokens cut off, or None; `run` is the content of run.json."""
    counts = ", ".join(f"{count} from the {role}" for role, count in run.get(CUT, {}).items())
    if not counts:
        return None
    return (
        f"max_new_tokens {run.get('max_new_tokens')} cut off outputs: {counts}; run again with a larger "
        "--max_new_tokens and another --output to get the full text"
    )


def failure_reasons(folder: Path) -> list[str]:
    """Return the error of each failed prediction of a run."""
    return [row.error for row in read_complete_rows(folder / PREDICTIONS, Prediction) if row.error is not None]


def is_finished(folder: Path) -> bool:
    """Return whether the run in a folder is complete and has no failed predictions.

    Raises EchoError if its run.json is invalid.
    """
    path = folder / RUN_DESCRIPTION
    return path.is_file() and _read_description(path).get("complete") is True and not failure_reasons(folder)


def _rows(folders: Iterable[Path], name: str, cls: type[RunRecord]) -> Iterator[RunRecord]:
    for folder in folders:
        yield from read_complete_rows(folder / name, cls)


def _distinct(rows: Iterable[RunRecord], key: Callable[[RunRecord], Hashable]) -> Iterator[RunRecord]:
    """Yield the first row for each key."""
    seen = set()
    for row in rows:
        if key(row) not in seen:
            seen.add(key(row))
            yield row


def _read_description(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise EchoError(f"{path} is not JSON ({error}); choose another --output, or delete that folder") from error


def _difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any] | None:
    """Return the dotted name of the first value that differs, and both values; None stands for a missing one."""
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
