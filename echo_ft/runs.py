"""The folder of an evaluation run: written as predictions come, stopped at any moment, gone on with, never mixed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from echo_ft.pipeline import Outcome
from echo_ft.records import Case, EchoError, Prediction, Trace, from_dict, to_json, write_jsonl

PREDICTIONS, TRACES, RUN = "predictions.jsonl", "traces.jsonl", "run.json"

Record = TypeVar("Record", Prediction, Trace)


class RunFolder:
    """Appends outcomes; a case counts as done when all its predictions are on disk.

    Started again, a run asks the cases that failed once more: their images may have been put right.
    """

    def __init__(self, folder: Path, provenance: Mapping[str, Any], cases: Sequence[Case]) -> None:
        """Start the run, or go on with the one that is there.

        `provenance` is all that must not differ between the two. Raises EchoError where it does, or where the folder
        holds something else.
        """
        self.folder = folder
        self.provenance = dict(provenance)
        self.cases = cases
        if (folder / RUN).is_file():
            self._require_same(json.loads((folder / RUN).read_text(encoding="utf-8")))
        elif folder.is_dir() and any(path.name != RUN + ".partial" for path in folder.iterdir()):
            raise EchoError(f"{folder} is not empty and holds no run; choose another --output")
        folder.mkdir(parents=True, exist_ok=True)
        self.finish(complete=False)
        self.done = self._recover()
        self.finish(complete=len(self.done) == len(cases))
        self._predictions = _append(folder / PREDICTIONS)
        self._traces = _append(folder / TRACES)

    def write(self, case: Case, outcome: Outcome) -> None:
        """Put one case on disk: what was seen and said first, the predictions, which make it count, last."""
        for file, records in ((self._traces, outcome.traces), (self._predictions, outcome.predictions)):
            file.write("".join(to_json(record) + "\n" for record in records))
            file.flush()
        self.done.add(case.id)

    def finish(self, complete: bool) -> None:
        """Write run.json."""
        partial = self.folder / (RUN + ".partial")
        run = {**self.provenance, "cases": len(self.cases), "complete": complete}
        partial.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.folder / RUN)

    def _require_same(self, earlier: Mapping[str, Any]) -> None:
        for key, value in {**self.provenance, "cases": len(self.cases)}.items():
            if earlier.get(key) != json.loads(json.dumps(value)):
                raise EchoError(
                    f"{self.folder} holds a run whose {key} is {earlier.get(key)!r}, not {value!r}; "
                    "choose another --output, or delete that folder to run it again"
                )

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
