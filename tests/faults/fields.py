"""Rows of the table that put a value of another type, or an impossible one, into each field of a record or an option.

One valid input per kind of file is changed in one place. The message must name the file, the line and the field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.faults.inputs import Arguments, Fault, answers, asked, audited, dataset, run
from tests.support.folder_layouts import write_json

MISSING = object()
"""Removes the field."""

NO_TEXT = (None, 3, True, ["a"], {"a": "b"})
NO_OPTIONAL_TEXT = NO_TEXT[1:]
NO_NUMBER = (None, "x", True, [1], {"a": 1})
NO_PATH = ("../a.png", "/a.png", "images/../../a.png", "..", "a\0.png")


def without(row: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The row with a different value in one field, or without that field."""
    return {key: old for key, old in row.items() if key != name} | ({} if value is MISSING else {name: value})


def named(value: Any) -> str:
    return "missing" if value is MISSING else repr(value)[:20]


def changed_line(name: str, field: str, value: Any) -> Callable[[Path], object]:
    """Change a field in the first record of one of a dataset's files."""

    def change(folder: Path) -> None:
        path = folder / name
        row = json.loads(path.read_text().splitlines()[0])
        path.write_text(json.dumps(without(row, field, value)) + "\n")

    return change


def table(fields: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, Any]]:
    for field, values in fields.items():
        for value in values:
            yield field, value


# Records of a dataset

INSPECTION = {
    **dict.fromkeys(("id", "dataset", "product", "condition", "group"), (*NO_TEXT, MISSING)),
    "image": (*NO_TEXT, MISSING, *NO_PATH),
    "split": NO_OPTIONAL_TEXT,
    "synthetic": NO_OPTIONAL_TEXT,
    "mask": (*NO_OPTIONAL_TEXT, *NO_PATH),
    "reference": (*NO_OPTIONAL_TEXT, *NO_PATH),
    "masks": (3, "m.png", [3], [None], {"a": 1}, ["../m.png"]),
    "boxes": (3, "x", {}, [3], [[1, 2, 3]], [[1, 2, 3, 4, 5]], [[1, 2, 3, "4"]], [[1, 2, 3, None]], [[1, 2, 3, True]]),
    "polygons": (3, "x", {}, [3], [["1", 2]], [[None]], [[[1, 2]]]),
}


def inspections() -> Iterator[Fault]:
    for field, value in table(INSPECTION):
        says = rf"inspections\.jsonl:1 is not a Inspection row \(.*{field}"
        yield Fault(
            f"inspection {field} {named(value)}", audited(changed_line("inspections.jsonl", field, value)), says
        )


REFERENCE = {
    "inspection": (*NO_TEXT, MISSING),
    "image": (*NO_TEXT, MISSING, "../a.png", "/a.png"),
    "similarity": (*NO_NUMBER, float("nan"), MISSING),
    "rank": (*NO_NUMBER, 1.5, MISSING),
    "method": NO_TEXT,
}
QUESTION = {
    "id": (*NO_TEXT, MISSING),
    "inspection": (*NO_TEXT, MISSING),
    "kind": (*NO_TEXT, MISSING),
    "text": (3, True, ["a"], {}, MISSING),
    "options": (None, 3, "A", ["A", "B"], {"A": None, "B": "x"}, {"A": ["x"], "B": "x"}, MISSING),
    "answer": (3, True, ["A"], {"A": 1}),
}


def run_on(change: Callable[[Path], object]) -> Callable[[Path], Arguments]:
    """evaluation.run on a dataset with one question and one reference."""
    make = asked({})

    def changed(root: Path) -> Arguments:
        arguments = make(root)
        folder = root / "data"
        row = {"inspection": "1", "image": "images/a.png", "similarity": 0.5, "rank": 1, "method": "retrieved"}
        (folder / "references.jsonl").write_text(json.dumps(row) + "\n")
        change(folder)
        return arguments

    return changed


def questions() -> Iterator[Fault]:
    for kind, name, fields in (("Reference", "references", REFERENCE), ("Question", "questions", QUESTION)):
        for field, value in table(fields):
            says = rf"{name}\.jsonl:1 is not a {kind} row \(.*{field}"
            make = run_on(changed_line(f"{name}.jsonl", field, value))
            yield Fault(f"{kind.lower()} {field} {named(value)}", make, says)


# Manifests of datasets

MANIFEST: dict[str, Sequence[Any]] = {
    "format": (None, 3, "echo-ft dataset 9", ["echo-ft dataset 1"], MISSING),
    "root": (None, 3, True, ["."], {}, "a\0b", MISSING),
    "fingerprint": (3, True, [], {}, "", MISSING),
    "config": (None, 3, "x", [], MISSING),
    "audits": (3, [3], {"a": 3}),
    "counts": (3, [3]),
    "held_out": (3, [3]),
    "k": ("x", [1], None),
    "photographs": (3, {"train": "x"}),
}


def manifests() -> Iterator[Fault]:
    def make(field: str, value: Any) -> Callable[[Path], Arguments]:
        def made(root: Path) -> Arguments:
            folder = dataset(root)
            path = folder / "manifest.json"
            content = json.loads(path.read_text())
            inside = {"k": "config", "photographs": "counts"}.get(field)
            changed = without(content.get(inside, {}) if inside else content, field, value)
            write_json(path, {**content, inside: changed} if inside else changed)
            return ["data_prep.audit", str(folder)]

        return made

    for field, value in table(MANIFEST):
        says = rf"manifest\.json has (no usable |the |been changed by hand \(){field}"
        yield Fault(f"manifest {field} {named(value)}", make(field, value), says)


# Runs and answers

RUN: dict[str, Sequence[Any]] = {
    "warnings": (None, 3, [3]),
    "adapters": (3, [3], {"a": 3}),
    "leaks": (3, {"a": 3}),
    "trained_on": (3, [3], [{"dataset": "x"}]),
    "continued_with": (None, 3, [3]),
    "cut": (None, 3, {"a": "x"}),
    "cases": ("x", None),
    "dataset": (3, ["x"]),
    "references": ("x", [1]),
}


def descriptions() -> Iterator[Fault]:
    for field, value in table(RUN):
        content = {"adapters": {"decision_maker": {field: value}}} if field == "leaks" else {field: value}
        make = run(run_json=json.dumps({"complete": True, **content}).encode())
        yield Fault(f"run {field} {value}", make, rf"run\.json has been changed by hand \({field}")


PREDICTION = {
    **dict.fromkeys(
        ("case", "question", "dataset", "product", "group", "condition", "kind", "question_text", "answer", "text"),
        (None, 3, True, ["a"], MISSING),
    ),
    "image": (None, 3, ["a"], MISSING, "../a.png", "/a.png"),
    "options": (None, 3, "A", ["A"], {"A": 1}, {"A": None}, MISSING),
    "parsed": (3, True, ["A"], MISSING),
    "probabilities": (
        3,
        "x",
        [0.5],
        {"A": "x"},
        {"A": None},
        {"A": [1]},
        {"A": float("inf")},
        {"A": True},
        {"A": -1, "B": 2},
        {"A": 1, "B": 1},
        {"A": 0},
        {"Z": 1},
    ),
    "error": (3, True, ["a"]),
}


def predictions() -> Iterator[Fault]:
    for field, value in table(PREDICTION):

        def change(rows: list[dict[str, Any]], field: str = field, value: Any = value) -> None:
            rows[1] = without(rows[1], field, value)

        says = rf"predictions\.jsonl:2 is not a prediction \(.*{field}"
        yield Fault(f"prediction {field} {named(value)}", run(change), says)


ANSWER = {
    "image": "DS/p/test/bad/000.png", "question_type": "Anomaly Detection", "question": "?",
    "options": {"A": "Yes", "B": "No"}, "correct_answer": "A", "gpt_answer": "A",
}  # fmt: skip
LINE = {
    "image": "a.png", "kind": "Anomaly Detection", "question": "?", "options": {"A": "Yes", "B": "No"}, "answer": "A",
    "text": "A", "condition": "dent", "probabilities": {"A": 0.7, "B": 0.3},
}  # fmt: skip
ANSWER_FIELDS: dict[str, Sequence[Any]] = {
    "image": (*NO_TEXT, MISSING),
    "question_type": (*NO_TEXT, MISSING),
    "correct_answer": (None, 3, True, ["A"], "Z", MISSING),
    "gpt_answer": (3, ["A"], MISSING),
}
LINE_FIELDS: dict[str, Sequence[Any]] = {
    "image": (*NO_TEXT, MISSING),
    "kind": (*NO_TEXT, MISSING),
    "question": (3, ["a"], {}, MISSING),
    "options": (None, 3, "A", ["A"], {}, {"A": 1, "B": 2}, MISSING),
    "answer": (None, 3, ["A"], "Z", MISSING),
    "text": (3, ["A"], MISSING),
    "probabilities": (3, "x", [0.5], {"A": "x"}, {"A": None}, {"A": float("nan")}, {"A": -1, "B": 2}),
}


def given_answers() -> Iterator[Fault]:
    for kind, row, fields in (("answers", ANSWER, ANSWER_FIELDS), ("answer lines", LINE, LINE_FIELDS)):
        for field, value in table(fields):
            content = json.dumps(without(row, field, value))
            make = answers(f"[{content}]" if kind == "answers" else content + "\n")
            yield Fault(
                f"{kind} {field} {named(value)}", make, rf"answers\.json(:1|, row 1|: no row).*({field}|P\(A\) is)"
            )


FIELDS = [*inspections(), *questions(), *manifests(), *descriptions(), *predictions(), *given_answers()]
"""Every row of this file."""
