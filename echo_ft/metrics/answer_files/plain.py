"""Answers as JSON lines, one question and its answer per line: the format for models that ran elsewhere.

    {"image": "caps/001.png", "kind": "Anomaly Detection", "question": "Is there any defect?",
     "options": {"A": "Yes.", "B": "No."}, "answer": "B", "text": "B", "probabilities": {"A": 0.2, "B": 0.8},
     "dataset": "line 3", "product": "cap", "part": "cap-001", "condition": "good"}

The first six keys are required. `answer` is the correct letter. `text` is what the model wrote, or null if it gave no
answer. `kind` is a question type of MMAD, or any other name. Images of the same `part` are resampled together; without
`part`, each image counts as a separate part.

A question of the type GROUNDING has no options, and `answer` is the text of its true boxes:

    {"image": "caps/002.png", "kind": "Defect Grounding", "question": "Where are the defects?",
     "answer": "<|box_start|>(120,80),(310,205)<|box_end|>", "text": "(118,84),(300,199)"}
"""

from __future__ import annotations

import difflib
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from echo_ft.data.text import without_stop
from echo_ft.errors import EchoError
from echo_ft.experts.roles import parse_letter
from echo_ft.images.boxes import NO_BOXES, format_boxes, parse_boxes
from echo_ft.inputs import read_text, stays_inside
from echo_ft.metrics.answer_files import GivenAnswers
from echo_ft.metrics.mmad import MERGED_TYPES, from_predictions
from echo_ft.metrics.prediction_table import misspelt_type
from echo_ft.records import GOOD, GROUNDING, LETTERS, QUESTION_TYPES, UNKNOWN_CONDITION, Prediction
from echo_ft.strict_yaml import read_json

REQUIRED = ("image", "kind", "question", "options", "answer", "text")
OPTIONAL = ("probabilities", "dataset", "product", "part", "condition")

UNNAMED = "all"
"""The dataset or product if a line names none. It must not depend on the file, so that models can be compared."""

STATED = {"yes": "defective", "no": GOOD}
"""The condition that the correct answer implies, if an Anomaly Detection question asks for a defect."""

DEFECT_WORDS = frozenset(
    {
        "abnormal", "abnormalities", "abnormality", "anomalies", "anomalous", "anomaly", "blemish", "blemishes",
        "damage", "damaged", "defect", "defective", "defects", "fault", "faults", "faulty", "flaw", "flawed", "flaws",
    }
)  # fmt: skip
ENGLISH_WORDS = frozenset({"any", "it", "that", "the", "there", "this", "you"})
TURNING_WORDS = frozenset(
    {
        "absent", "acceptable", "accepted", "clean", "clear", "fine", "flawless", "free", "good", "healthy", "intact",
        "lack", "lacking", "lacks", "never", "no", "non", "none", "normal", "not", "ok", "okay", "or", "pass",
        "passed", "passes", "perfect", "rule", "t", "undamaged", "without",
    }
)  # fmt: skip
"""Words that may swap the meanings of yes and no. `t` is the end of a word such as `isn't`."""


def read_plain_answers(path: Path) -> GivenAnswers:
    """Return the answers in a file of JSON lines.

    Raises EchoError with the line if one has a different form or contradicts an earlier one. Also raises EchoError if
    the condition of an image with an Anomaly Detection question is not known.
    """
    rows: list[tuple[str, Prediction]] = []
    try:
        # splitlines would also split at U+2028, U+2029 and U+0085, which JSON does not escape.
        lines = read_text(path, encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise EchoError(f"{path} cannot be read ({error}); save it as text in UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append((f"{path}:{number}", _prediction(line, f"{path}:{number}")))
    if not rows:
        raise EchoError(f"{path} is empty; write one JSON object with an answer per line")
    _require_consistent(rows)
    predictions = _with_conditions(rows)
    return GivenAnswers(predictions, official=from_predictions(predictions))


def _prediction(line: str, where: str) -> Prediction:
    """Return the prediction of one line, with an empty condition if the line names none."""
    row = _checked_row(line, where)
    kind = MERGED_TYPES.get(row["kind"], row["kind"])
    meant = misspelt_type(kind)
    if meant:
        raise EchoError(f"{where}: the kind is {kind!r}; did you mean {meant!r}?")
    options, text = row.get("options") or {}, row["text"]
    return Prediction(
        case=row["image"],
        question=f"{kind}: {row['question']}",
        dataset=row.get("dataset", UNNAMED),
        product=row.get("product", UNNAMED),
        group=row.get("part", row["image"]),
        image=row["image"],
        condition=row.get("condition", ""),
        kind=kind,
        question_text=row["question"],
        options=options,
        answer=_parsed_boxes(row["answer"]) or "" if kind == GROUNDING else row["answer"],
        text=text or "",
        parsed=None if text is None else _parsed_boxes(text) if kind == GROUNDING else parse_letter(text, options),
        probabilities=_normalised(row["probabilities"], options, where) if row.get("probabilities") else None,
        error="no answer" if text is None else None,
    )


def _parsed_boxes(text: str) -> str | None:
    """Return the boxes that `text` names, in the form that a run writes, or None if the text cannot be parsed."""
    boxes = parse_boxes(text)
    return None if boxes is None else format_boxes(boxes)


def _checked_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = read_json(line)
    except ValueError as error:
        raise EchoError(f"{where} is not JSON ({error}); write one JSON object per line") from error
    if not isinstance(row, dict):
        raise EchoError(f"{where} is not an object; write one JSON object with an answer per line")
    for key in row:
        if key not in (*REQUIRED, *OPTIONAL):
            near = difflib.get_close_matches(key, (*REQUIRED, *OPTIONAL), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join((*REQUIRED, *OPTIONAL))}"
            raise EchoError(f"{where} has a key {key!r}; {hint}")
    grounding = row.get("kind") == GROUNDING
    for key in REQUIRED:
        if key not in row and not (grounding and key == "options"):
            raise EchoError(f"{where} has no {key!r}; each line needs {', '.join(REQUIRED)}")
    for key in ("image", "kind", "question", "answer", "dataset", "product", "part", "condition"):
        if key in row and (not isinstance(row[key], str) or not row[key].strip()):
            raise EchoError(f"{where}: {key!r} is {row[key]!r}; it must be a non-empty string")
    if not stays_inside(row["image"]):
        raise EchoError(f"{where}: the image {row['image']} leads out of its folder; write a path relative to a folder")
    if row["text"] is not None and not isinstance(row["text"], str):
        raise EchoError(f"{where}: 'text' is {row['text']!r}; it must be a string, or null if there is no answer")
    if grounding:
        _require_boxes(row, where)
        return row
    options = row["options"]
    if not isinstance(options, dict) or not options or not all(isinstance(text, str) for text in options.values()):
        raise EchoError(f'{where}: \'options\' must map letters to strings, as in {{"A": "Yes.", "B": "No."}}')
    if not set(options) <= set(LETTERS):
        raise EchoError(
            f"{where}: the options are {', '.join(options)}; use letters from {LETTERS[0]} to {LETTERS[-1]}"
        )
    if row["answer"] not in options:
        raise EchoError(f"{where}: the answer {row['answer']!r} is not one of the options {', '.join(options)}")
    return row


def _require_boxes(row: Mapping[str, Any], where: str) -> None:
    """Raise EchoError if a line about boxes has options or probabilities, or if its correct answer has no boxes."""
    for key in ("options", "probabilities"):
        if row.get(key):
            raise EchoError(f"{where}: questions of the kind {GROUNDING!r} have no {key}; remove the key")
    if parse_boxes(row["answer"]) is None:
        raise EchoError(
            f"{where}: the answer {row['answer']!r} names no boxes; write them in thousandths of the image as "
            f"{format_boxes([(120, 80, 310, 205)])}, or {NO_BOXES!r} for a good image"
        )


def _normalised(given: Any, options: Mapping[str, str], where: str) -> dict[str, float]:
    """Return P(letter) of every option, with a sum of 1. A letter that is absent has the probability 0."""
    if not isinstance(given, dict) or not set(given) <= set(options):
        raise EchoError(f"{where}: 'probabilities' must map option letters ({', '.join(options)}) to numbers")
    for letter, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise EchoError(f"{where}: P({letter}) is {value!r}; it must be a number from 0 to 1")
    total = math.fsum(given.values())
    if not 0 < total <= 1.01:
        raise EchoError(f"{where}: the probabilities add up to {total:g}; they must add up to 1")
    return {letter: given.get(letter, 0.0) / total for letter in options}


def _require_consistent(rows: list[tuple[str, Prediction]]) -> None:
    """Raise EchoError if two lines differ in the dataset, product, part or stated condition of an image."""
    first: dict[tuple[str, str], tuple[str, str]] = {}
    names = {"dataset": "dataset", "product": "product", "group": "part", "condition": "condition"}
    for where, row in rows:
        for field, name in names.items():
            value = getattr(row, field)
            before, place = first.setdefault((row.image, field), (value, where)) if value else (value, where)
            if before != value:
                raise EchoError(
                    f"{where}: the {name} of {row.image} is {value!r}, but {before!r} in {place}; correct one of them"
                )


def _with_conditions(rows: list[tuple[str, Prediction]]) -> list[Prediction]:
    """Return the predictions with the condition of their image.

    A condition that a line states comes first. Next comes the one that the true boxes imply, or the correct answer to
    a question that asks for a defect. Otherwise, it is `good` if the image is in a folder of that name, or else
    unknown. Raises EchoError if an Anomaly Detection question leaves the condition open.
    """
    named: dict[str, str] = {row.image: row.condition for _, row in rows if row.condition}
    stated: dict[str, dict[str, str]] = defaultdict(dict)
    open_rows: list[tuple[str, Prediction]] = []
    for where, row in rows:
        if row.kind == QUESTION_TYPES[0]:
            answer = without_stop(row.options[row.answer])
            if answer in STATED and _asks_for_defect(row.question_text):
                stated[row.image][STATED[answer]] = where
            else:
                open_rows.append((where, row))
        elif row.kind == GROUNDING:
            stated[row.image]["defective" if parse_boxes(row.answer) else GOOD] = where
    for where, row in open_rows:
        if row.image not in named and row.image not in stated:
            raise EchoError(
                f"{where}: the answer {row.options[row.answer]!r} to {row.question_text!r} does not say whether "
                f"{row.image} has a defect; add the key 'condition', which is 'good' or the name of the defect"
            )
    for image, found in stated.items():
        truths = {*found, *({named[image]} if image in named else ())}
        if len({truth == GOOD for truth in truths}) > 1:
            raise EchoError(
                f"{', '.join(sorted(found.values()))}: the correct answers and the condition contradict each other on "
                f"whether {image} is good; correct one of them"
            )
    return [replace(row, condition=_condition(row.image, named, stated)) for _, row in rows]


def _asks_for_defect(question: str) -> bool:
    """Return whether `yes` surely means a defect: an English question for a defect, without a TURNING_WORD."""
    words = set(re.findall(r"\w+", question.casefold()))
    return bool(words & DEFECT_WORDS and words & ENGLISH_WORDS) and not words & TURNING_WORDS


def _condition(image: str, named: Mapping[str, str], stated: Mapping[str, Mapping[str, str]]) -> str:
    if image in named or image in stated:
        return named.get(image) or next(iter(stated[image]))
    return GOOD if GOOD in image.split("/")[:-1] else UNKNOWN_CONDITION
