"""The folder of an evaluation run: written as predictions come, stopped at any moment, gone on with, never mixed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from echo_ft.pipeline import Outcome
from echo_ft.records import Case, EchoError, Prediction, Trace, from_dict, to_json, write_jsonl, write_whole

PREDICTIONS, TRACES, RUN = "predictions.jsonl", "traces.jsonl", "run.json"
LOCK = ".lock"
"""Locked while a process writes to the folder; the file itself stays, empty."""

CONTINUED = "continued_with"
"""Where run.json keeps what was noted by processes that went on with the run under other circumstances."""

Record = TypeVar("Record", Prediction, Trace)


class RunFolder:
    """Appends outcomes; a case counts as done when all its predictions are on disk.

    Started again, a run asks the cases that failed once more: their images may have been put right. One process writes
    to a folder at a time: close it, or use it in a `with` block, to let another one have it.
    """

    def __init__(
        self,
        folder: Path,
        provenance: Mapping[str, Any],
        cases: Sequence[Case],
        noted: Mapping[str, Any] | None = None,
    ) -> None:
        """Start the run, or go on with the one that is there.

        `provenance` is all that must not differ between the two, `noted` what run.json tells beside it: it may differ,
        and what a process that writes answers notes otherwise than the first is kept in `continued_with`. Raises
        EchoError where the provenance differs, another process is at work in the folder, or it holds something else.
        """
        self.folder = folder
        self.provenance = dict(provenance)
        self.cases = cases
        self.questions = sum(len(case.seen.questions) for case in cases)
        self._now = self._noted = json.loads(json.dumps(dict(noted or {})))
        self._continued: list[dict[str, Any]] = []
        ours = {RUN + ".partial", LOCK}
        if not (folder / RUN).is_file() and folder.is_dir() and any(p.name not in ours for p in folder.iterdir()):
            raise EchoError(f"{folder} is not empty and holds no run; choose another --output")
        folder.mkdir(parents=True, exist_ok=True)
        self._files: list[TextIO] = [_lock(folder)]
        try:
            if (folder / RUN).is_file():
                self._go_on(_description(folder / RUN))
            self.finish(complete=False)
            self.done = self._recover()
            self.finish(complete=len(self.done) == len(cases))
            self._predictions = _append(folder / PREDICTIONS)
            self._traces = _append(folder / TRACES)
            self._files += [self._predictions, self._traces]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        for file in reversed(self._files):
            file.close()

    def write(self, case: Case, outcome: Outcome) -> None:
        """Put one case on disk: what was seen and said first, the predictions, which make it count, last."""
        changed = {key: value for key, value in self._now.items() if self._noted.get(key) != value}
        if changed and changed not in self._continued:
            self._continued.append(changed)
            self.finish(complete=False)
        for file, records in ((self._traces, outcome.traces), (self._predictions, outcome.predictions)):
            file.write("".join(to_json(record) + "\n" for record in records))
            file.flush()
        self.done.add(case.id)

    def finish(self, complete: bool) -> None:
        """Write run.json."""
        run = {**self._required(), **self._noted}
        if self._continued:
            run[CONTINUED] = self._continued
        write_whole(self.folder / RUN, json.dumps({**run, "complete": complete}, indent=2) + "\n")

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
        self._noted = {key: value for key, value in earlier.items() if key not in {*required, "complete", CONTINUED}}
        self._continued = list(earlier.get(CONTINUED, []))

    def _recover(self) -> set[str]:
        """Ids of the finished cases; whatever belongs to a half-written one is taken out of both files."""
        kept = {case.id: {question.id for question in case.seen.questions} for case in self.cases}
        found: dict[str, dict[str, Prediction]] = {}
        for prediction in _whole_rows(self.folder / PREDICTIONS, Prediction):
            if prediction.error is None:
                found.setdefault(prediction.case, {})[prediction.question] = prediction
        done = {case for case, predictions in found.items() if case in kept and set(predictions) == kept[case]}
        write_jsonl(self.folder / PREDICTIONS, (row for case in found if case in done for row in found[case].values()))
        traces = {(t.case, t.role, t.branch): t for t in _whole_rows(self.folder / TRACES, Trace) if t.case in done}
        write_jsonl(self.folder / TRACES, traces.values())
        return done


def _lock(folder: Path) -> TextIO:
    """The folder's lock, which the kernel takes back when the process ends, however it ends."""
    import fcntl  # Windows has none, and can still score the runs of other machines

    file = _append(folder / LOCK)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise EchoError(
            f"another process writes to {folder}; wait until it ends, or choose another --output"
        ) from error
    except OSError as error:  # some network file systems have no locks; a run on them is still worth having
        warnings.warn(f"{folder} cannot be locked ({error}): start no second run there meanwhile", stacklevel=3)
    return file


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


def _append(path: Path) -> TextIO:
    return open(path, "a", encoding="utf-8")


def _whole_rows(path: Path, cls: type[Record]) -> Iterator[Record]:
    """The rows of a file whose last line may be half written."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield from_dict(cls, json.loads(line))
            except (ValueError, TypeError):
                continue
