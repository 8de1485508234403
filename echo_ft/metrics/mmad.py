"""MMAD's answer file, answer parser and accuracy table (arXiv 2410.09453), including their faults.

`official_table` reproduces the output of MMAD's scorer to the last digit, so scores can be compared with published
ones. Its faults are kept and documented here. `echo_ft.metrics.strict` computes the strict scores.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo_ft.errors import EchoError
from echo_ft.experts.roles import parse_letter
from echo_ft.files import write_text
from echo_ft.inputs import read_json_file
from echo_ft.metrics.metric_values import AVERAGE, ScoreTable
from echo_ft.records import GOOD, LETTERS, QUESTION_TYPES, Prediction, Rejection

MERGED_TYPES = {"Object Structure": "Object Analysis", "Object Details": "Object Analysis"}
"""Column of each type that shares its column with another: MMAD's nine types become seven columns."""


@dataclass(frozen=True)
class Answer:
    """A row of the file that MMAD's scorer reads. `gpt_answer` may be any text."""

    image: str
    question_type: str
    correct_answer: str
    gpt_answer: str | None
    question: str = ""
    options: dict[str, str] = field(default_factory=dict)


def parse_answer(text: str, options: dict[str, str]) -> str:
    """Return the option letter that MMAD's parser reads from an answer. It always finds one, even in unrelated text.

    It takes the last capital A to E that stands alone as a word, including the article "A". Without one, it takes the
    option whose text difflib considers closest, however distant that is.
    """
    letters = re.findall(r"\b([A-E])\b", text)
    if letters:
        return letters[-1]
    nearest = difflib.get_close_matches(text, list(options.values()), n=1, cutoff=0.0)
    return next((letter for letter, option in options.items() if nearest and option == nearest[0]), text)


def official_table(answers: Sequence[Answer]) -> ScoreTable:
    """Return the table in percent that MMAD's scorer prints for these answers. It keeps these faults on purpose:

    - The scorer removes rows without an option letter from the list that it iterates over, so it skips the next row.
    - Removed and skipped rows do not count in the denominators, which rewards refusing to answer.
    - A question type that a dataset does not have scores 0 there and enters the means.
    - A class (normal or defective) without an Anomaly Detection question also scores 0.
    - An image counts as normal if `good` occurs anywhere in its path.
    """
    if not answers:
        return {AVERAGE: {**_all_columns({}), AVERAGE: None}}
    datasets = list(dict.fromkeys(answer.image.split("/")[0] for answer in answers))
    columns = [kind for kind in QUESTION_TYPES if any(_column(answer) == kind for answer in answers)]
    correct: dict[tuple[str, str], int] = {}
    total: dict[tuple[str, str], int] = {}
    for answer in _counted_answers(answers):
        dataset, kind = answer.image.split("/")[0], _column(answer)
        if kind == "Anomaly Detection":
            kind = "normal" if "good" in answer.image else "defective"
        total[dataset, kind] = total.get((dataset, kind), 0) + 1
        correct[dataset, kind] = correct.get((dataset, kind), 0) + (answer.gpt_answer == answer.correct_answer)

    def accuracy(dataset: str, kind: str) -> float:
        if kind == "Anomaly Detection":
            return (accuracy(dataset, "normal") + accuracy(dataset, "defective")) / 2
        return 100 * correct[dataset, kind] / total[dataset, kind] if (dataset, kind) in total else 0.0

    table: ScoreTable = {}
    for dataset in datasets:
        row = {kind: accuracy(dataset, kind) for kind in columns}
        table[dataset] = {**_all_columns(row), AVERAGE: sum(row.values()) / len(row)}
    means = {kind: sum(accuracy(dataset, kind) for dataset in datasets) / len(datasets) for kind in columns}
    table[AVERAGE] = {**_all_columns(means), AVERAGE: sum(means.values()) / len(means)}
    return table


def _counted_answers(answers: Sequence[Answer]) -> list[Answer]:
    """Drop each answer without a letter together with the next answer."""
    kept, index = [], 0
    while index < len(answers):
        answer = answers[index]
        has_letters = answer.correct_answer in tuple(LETTERS) and answer.gpt_answer in tuple(LETTERS)
        if has_letters:
            kept.append(answer)
        index += 1 if has_letters else 2
    return kept


def _column(answer: Answer) -> str:
    return MERGED_TYPES.get(answer.question_type, answer.question_type)


def _all_columns(row: dict[str, float]) -> dict[str, float | None]:
    return {kind: row.get(kind) for kind in QUESTION_TYPES}


def read_answers(path: Path) -> list[Answer]:
    """Read an answer file in MMAD's format, a JSON list of objects.

    Raises EchoError if the file is missing or not such a list. Also raises EchoError, with the row's number counted
    from 1, if a row has a different format or an unknown question type.
    """
    if not path.is_file():
        raise EchoError(f"there is no answer file {path}; give the path of a JSON file in MMAD's format")
    try:
        rows = read_json_file(path)
    except (OSError, ValueError) as error:
        raise EchoError(f"{path} is not JSON ({error}); MMAD's format is a JSON list of objects") from error
    if not isinstance(rows, list) or not rows:
        raise EchoError(f"{path} contains no list of answers; MMAD's format is a JSON list of objects")
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
            raise EchoError(f"{where}: {key!r} is {row[key]!r}; it must be a string")
    kind = row["question_type"]
    if kind not in QUESTION_TYPES and kind not in MERGED_TYPES:
        types = [*QUESTION_TYPES, *MERGED_TYPES]
        near = difflib.get_close_matches(kind, types, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the types are {', '.join(types)}"
        raise EchoError(f"{where}: question_type {kind!r} is not one of MMAD's types; {hint}")
    if len(row["image"].split("/")) < 3:
        raise EchoError(f"{where}: image {row['image']!r} is not a path in MMAD's format; use dataset/product/.../file")
    question = row.get("question", "")
    fields = question if isinstance(question, dict) else {"text": question}
    text, options = fields.get("text", ""), fields.get("options") or {}
    if not isinstance(options, dict) or not all(isinstance(one, str) for one in (text, *options.values())):
        raise EchoError(f"{where}: 'question' must be a string, or an object with text and options")
    return Answer(row["image"], kind, row["correct_answer"], row["gpt_answer"], text, options)


def to_predictions(answers: Sequence[Answer]) -> tuple[list[Prediction], list[Rejection]]:
    """Convert answers to predictions for the strict scores, and reject rows whose correct answer is not an option.

    An image is normal if one of its folders is named exactly `good`. `roles.parse_letter` parses the answers. The
    question's identifier does not depend on the order of the rows, so that files can be compared.
    """
    predictions, rejections = [], []
    asked: Counter[tuple[str, str]] = Counter()
    for number, answer in enumerate(answers, start=1):
        options = answer.options or dict.fromkeys(LETTERS, "")
        if answer.correct_answer not in options:
            rejections.append(
                Rejection(
                    f"row {number}, {answer.image}",
                    f"correct_answer {answer.correct_answer!r} is not one of the options",
                )
            )
            continue
        choices = (f"{letter}: {text}" for letter, text in answer.options.items())
        question = " ".join([f"{answer.question_type}:", answer.question, *choices])
        asked[answer.image, question] += 1
        parts = answer.image.split("/")
        condition = GOOD if GOOD in parts[:-1] else parts[-2]
        predictions.append(
            Prediction(
                case=answer.image,
                question=f"{question} #{asked[answer.image, question]}",
                dataset=parts[0],
                product=parts[1],
                group=answer.image,
                image=answer.image,
                condition=condition,
                kind=_column(answer),
                question_text=answer.question,
                options=options,
                answer=answer.correct_answer,
                text=answer.gpt_answer or "",
                parsed=parse_letter(answer.gpt_answer or "", options),
            )
        )
    return predictions, rejections


def from_predictions(predictions: Sequence[Prediction]) -> list[Answer]:
    """Convert predictions to the answers that MMAD's own scripts would have written, with the letters of their parser.

    Questions whose type is not one of MMAD's are left out.

    MMAD's scorer derives dataset and condition only from the path. Paths that do not start with the dataset, and paths
    of normal images without `good`, therefore get the prefix `dataset/product/condition/`. With it, the scorer counts
    all normal images as normal. It does not count all defective images as defective, because it looks for `good`
    anywhere in the path, for example in a product `goodyear`. Such paths are kept, and `counted_as_normal` lists them.
    A question that failed before the model answered has an empty answer.
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
        if prediction.kind in QUESTION_TYPES
    ]


def counted_as_normal(predictions: Sequence[Prediction]) -> list[str]:
    """List the paths of defective images that contain `good`, so that the official table counts them as normal."""
    paths = {_mmad_path(one) for one in predictions if one.kind == QUESTION_TYPES[0] and one.condition != GOOD}
    return sorted(path for path in paths if "good" in path)


def _mmad_path(prediction: Prediction) -> str:
    image, normal = prediction.image, prediction.condition == GOOD
    if image.startswith(prediction.dataset + "/") and ("good" in image or not normal):
        return image
    return f"{prediction.dataset}/{prediction.product}/{prediction.condition}/{image}"


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Write answers in the format that MMAD's scorer reads."""
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
