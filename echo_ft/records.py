"""The records that the parts of echo-ft exchange, and how they travel as JSON lines.

Everything a person may want to inspect between two steps is one of these. The truth about a photograph
(condition, mask, answers) is kept in `Truth`, apart from `Seen`, so that a function which renders a prompt
cannot reach it: it is never handed over.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

GOOD = "good"
"""The condition of a part without a defect."""

LETTERS = "ABCDE"
"""Option letters that MMAD admits."""

KINDS = (
    "Anomaly Detection",
    "Defect Classification",
    "Defect Localization",
    "Defect Description",
    "Defect Analysis",
    "Object Classification",
    "Object Analysis",
)
"""MMAD's seven kinds of question, in the order of its tables."""

ROLES = ("reference_extractor", "knowledge_guide", "reasoning_expert", "decision_maker")
"""The four experts, in the order in which they speak."""

Knowledge = Mapping[str, Mapping[str, Mapping[str, str]]]
"""{dataset: {product: {condition: description}}}: the schema of MMAD's domain_knowledge.json."""


class EchoError(Exception):
    """An error whose message a user can act on: what is wrong, where, and the remedy. Shown without a traceback."""


@dataclass(frozen=True)
class Inspection:
    """One photograph of one part. Paths are relative to the dataset's image root, with forward slashes."""

    id: str
    image: str
    dataset: str
    product: str
    condition: str
    group: str
    """Photographs of the same physical part share one; splits and references respect it."""
    split: str | None = None
    mask: str | None = None
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """Defects as (x0, y0, x1, y1) in pixels of the image, where the source has boxes instead of a mask."""
    reference: str | None = None
    """A normal image that the source itself names for this one; it stands as given."""
    masks: tuple[str, ...] = ()
    """Several files that count as one mask, where the source has no single one."""
    polygons: tuple[tuple[float, ...], ...] = ()
    """Outlines of defects as (x0, y0, x1, y1, ...) in pixels of the image, beside boxes or instead of them."""
    synthetic: str | None = None
    """The method of `echo_ft.anomalies` that made the defect, where no camera saw it: for training alone."""


@dataclass(frozen=True)
class Reference:
    """A normal image for an inspection, from retrieval or as the random control; rank counts from 1."""

    inspection: str
    image: str
    similarity: float
    rank: int
    method: str = "retrieved"
    """`retrieved`, `random` or `given`."""


@dataclass(frozen=True)
class Question:
    """A multiple-choice question about an inspection. `answer` is None in what the experts see."""

    id: str
    inspection: str
    kind: str
    text: str
    options: dict[str, str]
    answer: str | None = None


@dataclass(frozen=True)
class Rejection:
    """An image or row that could not be used, and why."""

    item: str
    reason: str
    dropped: str | None = None
    """`mask` or `reference`, where that alone could not be used and the photograph is; None where the item is out."""


@dataclass(frozen=True)
class Entry:
    """What is known about one condition of a product."""

    condition: str
    description: str


@dataclass(frozen=True)
class Seen:
    """All that the experts may see of a case."""

    query: str
    references: tuple[Reference, ...]
    knowledge: tuple[Entry, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Truth:
    """What is known about a case and must never reach a prompt of a run."""

    condition: str
    mask: str | None
    boxes: tuple[tuple[float, float, float, float], ...]
    answers: dict[str, str]
    """Question id to letter."""
    masks: tuple[str, ...] = ()
    polygons: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Case:
    """An inspection made ready: what the experts may see, and the truth apart from it."""

    id: str
    dataset: str
    product: str
    group: str
    """Cases of one physical part share one; intervals resample groups."""
    seen: Seen
    truth: Truth


@dataclass(frozen=True)
class Branch:
    """One thing that is asked of a role after the shared context, and what it should say (None at inference)."""

    id: str
    prompt: str
    completion: str | None = None


@dataclass(frozen=True)
class Exchange:
    """What one role is shown and asked about a case: images first, then what all branches share, then each branch."""

    role: str
    case: str
    images: tuple[str, ...]
    context: str
    branches: tuple[Branch, ...]
    prompt_version: str


@dataclass(frozen=True)
class Prediction:
    """The decision about one question, with the truth and the breakdown keys that a scorer needs beside it."""

    case: str
    question: str
    dataset: str
    product: str
    group: str
    image: str
    condition: str
    kind: str
    question_text: str
    options: dict[str, str]
    answer: str
    text: str
    parsed: str | None
    """The option letter, or None where the text is not one: counted as wrong, never guessed."""
    probabilities: dict[str, float] | None = None
    """P(letter) at the answer position, normalised over the question's options."""
    error: str | None = None


@dataclass(frozen=True)
class Trace:
    """What one role saw and said in a run; `branch` is the question's id for roles that answer questions."""

    case: str
    role: str
    branch: str
    images: tuple[str, ...]
    context: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Upstream:
    """What the earlier roles said about a case: predicted in a run, gold or predicted in training data."""

    best: int = 0
    """Index into `Seen.references` of the baseline that the reference extractor chose."""
    normal: str = ""
    guide: str = ""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Question id to the reasoning expert's words."""


Record = TypeVar("Record")


def _fields(record: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(record):
        return vars(record)  # `dataclasses.asdict` copies all that is in it, which takes longer than the JSON
    raise TypeError(f"a record holds a {type(record).__name__}, which JSON has not")


_ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False, default=_fields)


def to_json(record: Any) -> str:
    """One line of JSON for a record; keys in the order of its fields."""
    return _ENCODER.encode(record)


def from_dict(cls: type[Record], row: Mapping[str, Any]) -> Record:
    """A record from parsed JSON; nested records and tuples are restored.

    Raises TypeError where a field is missing or unknown.
    """
    hints, nested = _hints(cls)  # type: ignore[arg-type]
    if not row.keys() <= hints.keys():
        raise TypeError(f"{cls.__name__} has no field {min(row.keys() - hints.keys())!r}")
    if nested:
        row = {**row, **{name: _restore(hints[name], row[name]) for name in nested if name in row}}
    return cls(**row)


@functools.cache  # resolving annotations takes longer than building the record
def _hints(cls: type) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The type of each field, and the fields that JSON does not give back as they were."""
    hints = typing.get_type_hints(cls)
    return hints, tuple(name for name, hint in hints.items() if not _is_plain(hint))


def _is_plain(hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin in (types.UnionType, typing.Union):
        return all(map(_is_plain, typing.get_args(hint)))
    return origin is not tuple and not dataclasses.is_dataclass(origin)


def _restore(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _restore(next(arg for arg in args if arg is not type(None)), value)
    if origin is tuple:
        inner = args[0] if len(args) == 2 and args[1] is Ellipsis else None
        return tuple(_restore(inner or args[index], item) for index, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value)
    return value


def read_jsonl(path: Path, cls: type[Record], without: str = "") -> Iterator[Record]:
    """The records of a JSON-lines file, but for lines that hold the text `without`, which are not even parsed.

    Raises EchoError with file and line where a row is not such a record.
    """
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if without and without in line:
                continue
            try:
                yield from_dict(cls, json.loads(line))
            except (json.JSONDecodeError, TypeError, AttributeError) as error:
                raise EchoError(
                    f"{path}:{number} is not a {cls.__name__} row ({error}); make the file again"
                ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file that a reader finds whole or not at all, however the writer ends."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_jsonl(path: Path, records: Iterable[Any]) -> int:
    """Write records as JSON lines, atomically; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    count = 0
    # Lone surrogates, as in a rejected file's name, become the escapes that JSON has for them.
    with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
        for record in records:
            file.write(to_json(record) + "\n")
            count += 1
    os.replace(partial, path)
    return count
