"""Predictions with known answers, made without a model."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import numpy as np
from scipy.special import expit

from echo_ft.images.boxes import Box, format_boxes
from echo_ft.metrics.mmad import Answer
from echo_ft.records import GOOD, GROUNDING, QUESTION_TYPES, Prediction

DETECTION, CLASSIFICATION = QUESTION_TYPES[0], QUESTION_TYPES[1]


def make_prediction(
    image: int,
    kind: str,
    correct: bool,
    condition: str = "crack",
    dataset: str = "D",
    product: str = "p",
    group: str = "",
) -> Prediction:
    """Answer a question with the options Yes (A) and No (B); by default, each image shows a separate part."""
    options = {"A": "Yes.", "B": "No."}
    answer = "B" if condition == GOOD else "A"
    parsed = answer if correct else {"A": "B", "B": "A"}[answer]
    return Prediction(
        case=f"{dataset}-{image}",
        question=f"{dataset}-{image}/{kind}",
        dataset=dataset,
        product=product,
        group=group or f"{image}.png",
        image=f"{image}.png",
        condition=condition,
        kind=kind,
        question_text="?",
        options=options,
        answer=answer,
        text=parsed,
        parsed=parsed,
        probabilities={letter: 0.8 if letter == parsed else 0.2 for letter in options},
    )


def mixed_predictions(seed: int = 0, images: int = 40) -> list[Prediction]:
    """Answer several questions per image, about normal and defective images of two products in each of two datasets."""
    draw = random.Random(seed)
    rows = []
    for image in range(images):
        shown = {
            "condition": GOOD if image % 2 else "crack",
            "dataset": "DE"[image % 3 == 0],
            "product": "pq"[image % 5 == 0],
        }
        for kind in QUESTION_TYPES if image % 4 == 0 else QUESTION_TYPES[:3]:
            rows.append(make_prediction(image, kind, draw.random() < 0.7, **shown))
    return rows


def uncertain_predictions(count: int, seed: int, sharpness: float = 4.0) -> list[Prediction]:
    """Answer only Anomaly Detection questions. P(defect) is calibrated at a sharpness of 1 and overconfident above."""
    draw = np.random.default_rng(seed)
    rows = []
    for image in range(count):
        log_odds = draw.normal() * 2
        condition = "crack" if draw.random() < expit(log_odds) else GOOD
        score = float(expit(sharpness * log_odds))
        correct = (score > 0.5) == (condition != GOOD)
        row = make_prediction(image + 10_000 * seed, DETECTION, correct, condition)
        rows.append(dataclasses.replace(row, probabilities={"A": score, "B": 1 - score}))
    return rows


def make_answer(
    image: str = "D/p/bad/0.png", kind: str = "Defect Analysis", given: str = "A", true: str = "A"
) -> Answer:
    """Answer a question about one image in MMAD's format."""
    return Answer(image, kind, true, given)


def box_prediction(
    image: int, true: Sequence[Box], named: Sequence[Box] | None, part: str = "", dataset: str = "D"
) -> Prediction:
    """Answer a question about boxes; None stands for an unparsed answer. An image without true boxes is good."""
    text = "I see it." if named is None else format_boxes(named)
    return Prediction(
        case=f"{dataset}-{image}",
        question=f"{dataset}-{image}/boxes",
        dataset=dataset,
        product="p",
        group=part or f"{image}.png",
        image=f"{image}.png",
        condition="crack" if true else GOOD,
        kind=GROUNDING,
        question_text="Where?",
        options={},
        answer=format_boxes(true),
        text=text,
        parsed=None if named is None else text,
    )
