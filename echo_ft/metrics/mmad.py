"""MMAD's own answers file, answer parser and accuracy table (arXiv 2410.09453), faults included.

`official_table` gives to the digit what MMAD's scorer prints, so that figures can be laid beside published ones. What
it does wrong is kept and named here; `echo_ft.metrics.strict` holds the strict figures.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo_ft.errors import EchoError
from echo_ft.experts.roles import parse_letter
from echo_ft.files import write_text
from echo_ft.metrics.figures import AVERAGE, Table
from echo_ft.records import GOOD, LETTERS, QUESTION_TYPES, Prediction, Rejection

FOLDED = {"Object Structure": "Object Analysis", "Object Details": "Object Analysis"}
"""MMAD's nine types become seven columns."""


@dataclass(frozen=True)
class Answer:
    """A row of the file that MMAD's scorer reads; `gpt_answer` is whatever a system wrote there."""

    image: str
    question_type: str
    correct_answer: str
    gpt_answer: str | None
    question: str = ""
    options: dict[str, str] = field(default_factory=dict)


def parse_answer(text: str, options: dict[str, str]) -> str:
    """The option letter that MMAD's parser makes of an answer: always one, however little the answer says.

    The last capital A to E that stands alone (the article "A" too); failing that the option whose text is nearest by
    difflib, with no lower limit on how near.
    """
    letters = re.findall(r"\b([A-E])\b", text)
    if letters:
        return letters[-1]
    nearest = difflib.get_close_matches(text, list(options.values()), n=1, cutoff=0.0)
    return next((letter for letter, option in options.items() if nearest and option == nearest[0]), text)


def official_table(answers: Sequence[Answer]) -> Table:
    """What MMAD's scorer prints for these answers, in percent. Its faults, kept on purpose:

    - it removes a row without an option letter from the list that it walks through, so the row after it is skipped;
    - removed and skipped rows leave the denominators: refusing to answer pays;
    - a kind that a dataset has no question of scores 0 there and enters the means;
    - a side (normal, defective) without an Anomaly Detection question scores 0 too;
    - an image is normal where `good` occurs anywhere in its path.
    """
    datasets = list(dict.fromkeys(answer.image.split("/")[0] for answer in answers))
    columns = [kind for kind in QUESTION_TYPES if any(_kind(answer) == kind for answer in answers)]
    correct: dict[tuple[str, str], int] = {}
    total: dict[tuple[str, str], int] = {}
    for answer in _walked(answers):
        dataset, kind = answer.image.split("/")[0], _kind(answer)
        if kind == "Anomaly Detection":
            kind = "normal" if "good" in answer.image else "defective"
        total[dataset, kind] = total.get((dataset, kind), 0) + 1
        correct[dataset, kind] = correct.get((dataset, kind), 0) + (answer.gpt_answer == answer.correct_answer)

    def accuracy(dataset: str, kind: str) -> float:
        if kind == "Anomaly Detection":
            return (accuracy(dataset, "normal") + accuracy(dataset, "defective")) / 2
        return 100 * correct[dataset, kind] / total[dataset, kind] if (dataset, kind) in total else 0.0

    table: Table = {}
    for dataset in datasets:
        row = {kind: accuracy(dataset, kind) for kind in columns}
        table[dataset] = {**_all_columns(row), AVERAGE: sum(row.values()) / len(row)}
    means = {kind: sum(accuracy(dataset, kind) for dataset in datasets) / len(datasets) for kind in columns}
    table[AVERAGE] = {**_all_columns(means), AVERAGE: sum(means.values()) / len(means)}
    return table


def _walked(answers: Sequence[Answer]) -> list[Answer]:
    """The answers that are left when each one without a letter takes the one after it along."""
    kept, index = [], 0
    while index < len(answers):
        answer = answers[index]
        readable = answer.correct_answer in tuple(LETTERS) and answer.gpt_answer in tuple(LETTERS)
        if readable:
            kept.append(answer)
        index += 1 if readable else 2
    return kept


def _kind(answer: Answer) -> str:
    return FOLDED.get(answer.question_type, answer.question_type)


def _all_columns(row: dict[str, float]) -> dict[str, float | None]:
    return {kind: row.get(kind) for kind in QUESTION_TYPES}


def read_answers(path: Path) -> list[Answer]:
    """The rows of an answers file in MMAD's format: a JSON list of objects.

    Raises EchoError with the row's number, counted from 1, where one is not of that format or of no known type.
    """
    if not path.is_file():
        raise EchoError(f"there is no answers file {path}; give the path of a JSON file in MMAD's format")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EchoError(f"{path} is not JSON ({error}); MMAD's format is a JSON list of objects") from error
    if not isinstance(rows, list) or not rows:
        raise EchoError(f"{path} holds no list of answers; MMAD's format is a JSON list of objects")
    return [_answer(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]


def _answer(row: Any, where: str) -> Answer:
    if not isinstance(row, dict):
        raise EchoError(f"{where}: not an object; MMAD's format is a JSON list of objects")
    for key in ("image", "question_type", "correct_answer", "gpt_answer"):
        if key not in row:
            raise EchoError(
                f"{where}: no {key!r}; MMAD's rows have image, question_type, correct_answer and gpt_answer"
            )
        if not isinstance(row[key], str) and not (key == "gpt_answer" and row[key] is None):
            raise EchoError(f"{where}: {key!r} is {row[key]!r}; write a string")
    kind = row["question_type"]
    if kind not in QUESTION_TYPES and kind not in FOLDED:
        near = difflib.get_close_matches(kind, [*QUESTION_TYPES, *FOLDED], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the types are {', '.join([*QUESTION_TYPES, *FOLDED])}"
        raise EchoError(f"{where}: question_type {kind!r} is none of MMAD's; {hint}")
    if len(row["image"].split("/")) < 3:
        raise EchoError(f"{where}: image {row['image']!r} is no MMAD path; write dataset/product/.../file")
    question = row.get("question", "")
    asked = question if isinstance(question, dict) else {"text": question}
    text, options = asked.get("text", ""), asked.get("options") or {}
    if not isinstance(options, dict) or not all(isinstance(one, str) for one in (text, *options.values())):
        raise EchoError(f"{where}: 'question' is neither text nor an object with text and options")
    return Answer(row["image"], kind, row["correct_answer"], row["gpt_answer"], text, options)


def to_predictions(answers: Sequence[Answer]) -> tuple[list[Prediction], list[Rejection]]:
    """Answers as predictions for the strict figures, and the rows whose correct answer is no option.

    Normal is an image with a path component that is exactly `good`; the answer is read by `roles.parse_letter`.
    """
    predictions, rejections = [], []
    for number, answer in enumerate(answers, start=1):
        options = answer.options or dict.fromkeys(LETTERS, "")
        if answer.correct_answer not in options:
            rejections.append(
                Rejection(
                    f"row {number}, {answer.image}", f"correct_answer {answer.correct_answer!r} is none of the options"
                )
            )
            continue
        parts = answer.image.split("/")
        condition = GOOD if GOOD in parts[:-1] else parts[-2]
        predictions.append(
            Prediction(
                case=answer.image,
                question=f"row {number}",
                dataset=parts[0],
                product=parts[1],
                group=answer.image,
                image=answer.image,
                condition=condition,
                kind=_kind(answer),
                question_text=answer.question,
                options=options,
                answer=answer.correct_answer,
                text=answer.gpt_answer or "",
                parsed=parse_letter(answer.gpt_answer or "", options),
            )
        )
    return predictions, rejections


def from_predictions(predictions: Sequence[Prediction]) -> list[Answer]:
    """What MMAD's own scripts would have written for these predictions: their parser's letters, and its faults.

    MMAD's scorer learns dataset and condition from the path alone, so an image that is not under its dataset's name,
    or a normal one without `good` in its path, gets a path `dataset/product/condition/...` in front. That makes every
    normal image normal to it, but not every defective one defective: its test is whether `good` occurs anywhere in the
    path, a product `goodyear` included, and such a path is left as it is; `taken_for_normal` tells which. A question
    that failed before the model answered has an empty answer.
    """
    return [
        Answer(
            image=_mmad_path(prediction),
            question_type=prediction.kind,
            correct_answer=prediction.answer,
            gpt_answer="" if prediction.error else parse_answer(prediction.text, prediction.options),
            question=prediction.question_text,
            options=prediction.options,
        )
        for prediction in predictions
    ]


def taken_for_normal(predictions: Sequence[Prediction]) -> list[str]:
    """Paths of the defective images that the official table counts as normal, as `good` occurs somewhere in them."""
    paths = {_mmad_path(one) for one in predictions if one.kind == QUESTION_TYPES[0] and one.condition != GOOD}
    return sorted(path for path in paths if "good" in path)


def _mmad_path(prediction: Prediction) -> str:
    image, normal = prediction.image, prediction.condition == GOOD
    if image.startswith(prediction.dataset + "/") and ("good" in image or not normal):
        return image
    return f"{prediction.dataset}/{prediction.product}/{prediction.condition}/{image}"


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Write answers as MMAD's scorer reads them."""
    rows = [
        {
            "image": answer.image,
            "question": {"type": "text", "text": answer.question, "options": answer.options},
            "question_type": answer.question_type,
            "correct_answer": answer.correct_answer,
            "gpt_answer": answer.gpt_answer,
        }
        for answer in answers
    ]
    write_text(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
