"""RobustMAD (TMLR 2026, arXiv 2607.16243): its questions, files with answers to them, and its authors' tables.

Each of 410 images of MVTec AD and VisA has eleven questions with five options, in four categories. A second file asks
the same questions about the same images with motion blur or in low light. The authors score the share of correct
answers per category, and again for the `general` and the `domain` difficulty.

The id of a question holds its difficulty, as in `MVTec-AD/bottle/test/good/014.png#general-5`. A degraded image has the
id of the clean one, so that answers to both files can be compared in pairs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from echo_ft.errors import EchoError
from echo_ft.experts.roles import one_line, parse_letter
from echo_ft.inputs import read_bytes, read_json_file, stays_inside
from echo_ft.metrics.answer_files import GivenAnswers
from echo_ft.metrics.metric_values import AVERAGE, share_with_interval
from echo_ft.metrics.prediction_table import PredictionTable
from echo_ft.provenance import fingerprint_bytes
from echo_ft.records import LETTERS, ROBUSTMAD_TYPES, Prediction, Question, Rejection

CATEGORIES = {
    "General Object Understanding": "general",
    "Anomaly Understanding and Localization (Stand-alone)": "standalone",
    "Anomaly Understanding and Localization (Pair-wise comparison)": "pairwise",
    "Unanswerable or Misleading Query Detection": "unanswerable",
}
"""Row of the authors' tables for each category in their files."""

DIFFICULTIES = ("general", "domain")

DEGRADATIONS = {"blur": "motion blur", "light": "low light"}
"""Folders of degraded images. `014.png` becomes `blur/014_blur.png` or `light/014_light.png`."""

FAILED = "Error: "
"""Start of the text that the authors' scripts store if the model gave no answer."""


@dataclass(frozen=True)
class AskedImage:
    """An image and its questions. Paths are relative to the folder that holds `MVTec-AD` and `VisA`."""

    id: str
    """The path of the clean image."""
    image: str
    dataset: str
    product: str
    condition: str
    reference: str | None
    """A normal image of the same product."""
    degradation: str | None
    """A key of DEGRADATIONS, or None for a clean image."""
    questions: tuple[Question, ...]


def load_robustmad(path: Path) -> tuple[list[AskedImage], list[Rejection]]:
    """Read `RobustMAD_MCQ.json` or `RobustMAD_MCQ_low.json`: its usable images, and a rejection for everything else.

    Raises EchoError if the file is missing, is not JSON, or lists no images.
    """
    if not path.is_file():
        raise EchoError(f"there is no file {path}; give the path of RobustMAD_MCQ.json or RobustMAD_MCQ_low.json")
    try:
        content = read_json_file(path)
    except (OSError, ValueError) as error:
        raise EchoError(f"{path} is not JSON ({error}); download RobustMAD_MCQ.json again") from error
    rows = content.get("images") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise EchoError(f"{path} lists no images; give the path of RobustMAD_MCQ.json or RobustMAD_MCQ_low.json")
    images, rejections = [], []
    for number, row in enumerate(rows, start=1):
        try:
            image, rejected = _asked_image(row)
        except ValueError as error:
            rejections.append(Rejection(f"{path.name}, image {number}", str(error)))
            continue
        images.append(image)
        rejections += rejected
    return images, rejections


def _asked_image(row: Any) -> tuple[AskedImage, list[Rejection]]:
    """Return an image with its usable questions, and the rejected ones. Raises ValueError if there is no image."""
    if not isinstance(row, dict):
        raise ValueError("it is not an object")
    for key in ("image_path", "dataset", "category", "specie_name"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"{key!r} is {row.get(key)!r}; it must be a string")
    image, difficulty, reference = row["image_path"], row.get("difficulty"), row.get("reference_image_path")
    if not image.startswith(f"{row['dataset']}/{row['category']}/"):
        raise ValueError(f"the path {image} does not start with {row['dataset']}/{row['category']}/")
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"the difficulty of {image} is {difficulty!r}; it must be {' or '.join(DIFFICULTIES)}")
    if reference is not None and not isinstance(reference, str):
        raise ValueError(f"the reference of {image} is {reference!r}; it must be a path")
    if not all(stays_inside(name) for name in (image, reference or image)):
        raise ValueError(f"the path of {image} or of its reference leads out of the root")
    identifier, degradation = clean_path(image)
    questions, rejections = [], []
    asked = row.get("questions")
    for place, item in enumerate(asked if isinstance(asked, list) else [], start=1):
        try:
            questions.append(_question(item, identifier, difficulty))
        except ValueError as error:
            rejections.append(Rejection(f"{image}, question {place}", str(error)))
    names = row["dataset"], row["category"], row["specie_name"]
    return AskedImage(identifier, image, *names, reference, degradation, tuple(questions)), rejections


def _question(item: Any, inspection: str, difficulty: str) -> Question:
    if not isinstance(item, dict):
        raise ValueError("the question is not an object")
    number, category, options = item.get("question_id"), item.get("robustness_category"), item.get("options")
    if not isinstance(number, int):
        raise ValueError(f"the question_id {number!r} is not a number")
    if not isinstance(category, str) or category not in CATEGORIES:
        raise ValueError(f"the category {category!r} is not one of RobustMAD's: {', '.join(CATEGORIES)}")
    if not isinstance(options, dict) or not options or not set(options) <= set(LETTERS):
        raise ValueError(f"the options are not a mapping from letters {LETTERS[0]} to {LETTERS[-1]} to strings")
    if not isinstance(item.get("answer"), str) or item["answer"] not in options:
        raise ValueError(f"the answer {item.get('answer')!r} is not one of the options {', '.join(options)}")
    if not isinstance(item.get("question"), str) or not item["question"].strip():
        raise ValueError("the question has no text")
    kind, texts = ROBUSTMAD_TYPES[CATEGORIES[category]], {letter: str(text) for letter, text in options.items()}
    return Question(f"{inspection}#{difficulty}-{number}", inspection, kind, item["question"], texts, item["answer"])


def clean_path(image: str) -> tuple[str, str | None]:
    """Return the path of the clean image and the degradation, or None if the image is clean already."""
    path = PurePosixPath(image)
    degradation = path.parent.name
    if degradation not in DEGRADATIONS or not path.stem.endswith(f"_{degradation}"):
        return image, None
    return str(path.parent.parent / f"{path.stem.removesuffix(f'_{degradation}')}{path.suffix}"), degradation


def read_robustmad_answers(path: Path, rows: Sequence[Any], questions: Path | None) -> GivenAnswers:
    """Return the answers of a file that RobustMAD's authors publish, with the options that `questions` lists.

    Raises EchoError if there is no question file, or if an answer is not about one of its questions.
    """
    if questions is None:
        raise EchoError(
            f"{path} holds answers to RobustMAD without their options; add --questions RobustMAD_MCQ.json, or "
            "RobustMAD_MCQ_low.json for degraded images"
        )
    images, rejections = load_robustmad(questions)
    asked = {(image.image, _number(question)): (image, question) for image in images for question in image.questions}
    predictions, letters = [], {}
    for place, row in enumerate(rows, start=1):
        where = f"{path}, row {place}"
        key = (str(row.get("image_path")), str(row.get("question_id"))) if isinstance(row, dict) else None
        if key not in asked:
            raise EchoError(
                f"{where}: {questions} has no question {key[1] if key else '?'} about {key[0] if key else '?'}; give "
                "the questions that were answered"
            )
        image, question = asked[key]
        if row.get("answer", question.answer) != question.answer:
            raise EchoError(
                f"{where}: the correct answer is {row['answer']!r}, but {questions} says {question.answer!r}; give the "
                "questions that were answered"
            )
        text = row.get("raw_response") or ""
        if not isinstance(text, str):
            raise EchoError(f"{where}: 'raw_response' is {text!r}; it must be a string")
        predictions.append(_prediction(image, question, text))
        if isinstance(row.get("mslm_answer"), str):
            letters[question.id] = row["mslm_answer"]
    missing = len(asked) - len({prediction.question for prediction in predictions})
    warnings = [f"{missing} of {len(asked)} questions of {questions.name} have no answer"] if missing else []
    degradations = sorted({DEGRADATIONS[image.degradation] for image in images if image.degradation})
    provenance = {
        "questions_file": str(questions),
        "questions_fingerprint": fingerprint_bytes(read_bytes(questions)),
        "corruption": ", ".join(degradations) or None,
    }
    return GivenAnswers(predictions, rejections, letters=letters, warnings=warnings, provenance=provenance)


def _number(question: Question) -> str:
    return question.id.rpartition("-")[2]


def _prediction(image: AskedImage, question: Question, text: str) -> Prediction:
    failed = text.startswith(FAILED)
    return Prediction(
        case=image.id,
        question=question.id,
        dataset=image.dataset,
        product=image.product,
        group=image.id,
        image=image.id,
        condition=image.condition,
        kind=question.kind,
        question_text=question.text,
        options=question.options,
        answer=str(question.answer),
        text="" if failed else text,
        parsed=None if failed else parse_cut_letter(text, question.options),
        error=text if failed else None,
    )


def parse_cut_letter(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that an answer names, as `parse_letter` does, or None.

    The authors cut off most models after ten tokens, so the option's text after its letter may also be cut off.
    """
    letter = parse_letter(text, options)
    match = re.fullmatch(rf"\(?([{LETTERS}])\)?[.:]?\s(.+)", text.strip(), flags=re.DOTALL)
    if letter is None and match and one_line(options.get(match[1], "")).startswith(one_line(match[2])):
        return match[1]
    return letter


def guess_letter(text: str) -> str:
    """Return the letter that the authors' parser reads: the first lone letter, otherwise the first letter from A to E.

    Case does not matter, so the article in `a capsule` is the answer A. Empty if the text has no such letter.
    """
    found = re.search(r"\b([A-E])\b", text.upper()) or re.search(r"([A-E])", text.upper())
    return found[1] if found else ""


def robustmad_report(table: PredictionTable, letters: Mapping[str, str]) -> dict[str, Any]:
    """Score RobustMAD's questions as its authors do (`official`) and strictly (`strict`, with `intervals`).

    Tables are {category: {`Average` or difficulty: percent}}; cells without a question are None. `letters` are the
    letters that the authors read, by question; their parser reads the other answers. For each category, `guessed`
    counts the letters that the authors' parser reads but the strict one does not, and how many are correct. The result
    is empty if the table has no RobustMAD question.
    """
    if not any(kind in table.other_types for kind in ROBUSTMAD_TYPES.values()):
        return {}
    read = [letters.get(one.question) or guess_letter(one.text) for one in table.predictions]
    pairs = list(zip(read, table.predictions, strict=True))
    right = np.array([letter == one.answer for letter, one in pairs])
    guesses = np.array([letter in one.options and one.parsed is None for letter, one in pairs])
    weights = table.weights()
    report: dict[str, Any] = {"official": {}, "strict": {}, "intervals": {}, "guessed": {}}
    for row, cells in _cells(table):
        strict_scores = {
            column: share_with_interval(table, weights, table.image_index[chosen], table.correct[chosen])
            for column, chosen in cells.items()
            if chosen.any()
        }
        report["official"][row] = {column: _percent(right[chosen]) for column, chosen in cells.items()}
        report["strict"][row] = {column: _percent(table.correct[chosen]) for column, chosen in cells.items()}
        report["intervals"][row] = {
            column: interval and [100 * bound for bound in interval] for column, (_, interval) in strict_scores.items()
        }
        own = guesses & cells[AVERAGE]
        report["guessed"][row] = {"answers": int(own.sum()), "right": int((own & right).sum())}
    return report


def _cells(table: PredictionTable) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield each row of the authors' tables with the questions behind its columns, (Q,) bool."""
    difficulty = np.array([one.question.rpartition("#")[2].partition("-")[0] for one in table.predictions])
    for row, kind in ROBUSTMAD_TYPES.items():
        own = np.array([one.kind == kind for one in table.predictions])
        yield row, {AVERAGE: own, **{name: own & (difficulty == name) for name in DIFFICULTIES}}


def _percent(right: np.ndarray) -> float | None:
    return float(100 * right.sum() / len(right)) if len(right) else None
