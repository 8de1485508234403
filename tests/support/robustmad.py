"""Small files in RobustMAD's format: questions about drawn products, and a model's answers to them."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from echo_ft.metrics.answer_files.robustmad import CATEGORIES

PRODUCTS = {"bottle": "general", "cable": "domain"}
"""The products in the file, and their difficulty."""

OPTIONS = {"A": "Object is normal, no major defects", "B": "Scratch on the rim", "C": "Dent", "D": "Hole", "E": "Chip"}


def questions_file(images: int = 6, degraded: bool = False) -> dict[str, Any]:
    """Four questions, one per category, about each of `images` images of each product; every second one is good."""
    rows: list[dict[str, Any]] = []
    for product, difficulty in PRODUCTS.items():
        for number in range(images):
            condition = "good" if number % 2 else "scratch"
            folder = f"MVTec-AD/{product}/test/{condition}"
            kind = ("blur", "light")[number % 2]
            path = f"{folder}/{kind}/{number:03}_{kind}.png" if degraded else f"{folder}/{number:03}.png"
            first = 1 + 4 * len(rows)
            questions = [
                {
                    "question_id": first + place,
                    "robustness_category": category,
                    "question_type": "MCQ",
                    "question": f"What about {place}?",
                    "options": OPTIONS,
                    "answer": "ABCDE"[(number + place) % 5],
                }
                for place, category in enumerate(CATEGORIES)
            ]
            rows.append(
                {
                    "dataset": "MVTec-AD",
                    "category": product,
                    "image_id": PurePosixPath(path).name,
                    "image_path": path,
                    "specie_name": condition,
                    "anomaly": int(condition != "good"),
                    "difficulty": difficulty,
                    "reference_image_path": f"MVTec-AD/{product}/test/good/100.png",
                    "questions": questions,
                }
            )
    return {"images": rows}


def answers_file(questions: dict[str, Any]) -> list[dict[str, Any]]:
    """Answer every question of a file correctly, with its letter."""
    return [
        {
            "image_path": image["image_path"],
            "difficulty": image["difficulty"],
            "robustness_category": question["robustness_category"],
            "question_id": question["question_id"],
            "question": question["question"],
            "answer": question["answer"],
            "mslm_answer": question["answer"],
            "raw_response": question["answer"],
        }
        for image in questions["images"]
        for question in image["questions"]
    ]
