"""Measure each pretraining stage, on held-out products of the world and on the demo's products.

The heads detect a defect at the tower, at the comparing layer and at the text. The whole model detects it with the
letter of its answer. The tower sees only the query. All others are measured with a normal reference of the same
product, with one of another product, and with none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from echo_ft.drawn.parts import DEMO_DEFECTS, DEMO_PRODUCTS, demo_part, render_part
from echo_ft.files import atomic_folder
from echo_ft.metrics.detection import auroc
from train.tiny import heads as on
from train.tiny.attention import BRINGING, COMPARING
from train.tiny.inputs import collate_rows, part_labels, query_tokens, text_states, trained_logits
from train.tiny.lessons import INSTRUCTION, Lesson, LessonRow, draw_text_row, image_lessons
from train.tiny.pool import IMAGES_PER_PRODUCT, LABELS, Pool, draw_pool, open_pool, patch_shares
from train.tiny.pretrain import LETTER, REFERENCES
from train.tiny.stages import Student, letter_mask

BATCH = 16
QUERIES = (1, 2)
"""Places of the measured images among those of a product: a normal one and the first drawn with a defect."""
DETECTION = Lesson(f"Question: Is there any defect in the object?\nA. Yes.\nB. No.\n{INSTRUCTION}", "A", "detection")
CONTEXTS = ("", "The first image is a normal part. The second image is the part under inspection.\n")


def draw_demo_pool(folder: Path, products: int, first: int) -> None:
    """Draw a pool of the demo's products and defects, which pretraining never shows. Only `defect` is labelled."""
    names = list(DEMO_PRODUCTS)
    images, shares, labels = [], [], []
    for number in range(products):
        rng, product = np.random.default_rng((first + number, 12)), names[number % len(names)]
        conditions = ("good", "good", *rng.choice(DEMO_DEFECTS[product], size=2).tolist())
        for condition in conditions:
            drawn = render_part(demo_part(product, condition, int(rng.integers(2**31))), int(rng.integers(2**31)))
            images.append(drawn.image)
            shares.append(patch_shares(drawn.mask))
            labels.append((-1, -1, -1 if condition == "good" else 0, -1, -1))
    with atomic_folder(folder) as partial:
        np.save(partial / "images.npy", np.stack(images))
        np.save(partial / "shares.npy", np.stack(shares))
        np.save(partial / "labels.npy", np.array(labels, LABELS))


def held_out_pools(folder: Path, products: int) -> dict[str, Pool]:
    """Return the pools of `known` and `new` products in a folder. Draw them first if they are missing.

    `known` products are from the world but were not seen in pretraining; `new` products are those of the demo.
    """
    for name, draw in (("known", draw_pool), ("new", draw_demo_pool)):
        if not (folder / name).is_dir():
            draw(folder / name, products, 0)
    return {name: open_pool(folder / name) for name in ("known", "new")}


def measure_stage(stage: str, student: Student, pools: dict[str, Pool]) -> dict[str, float]:
    """Measure what the model has learned in a stage. Returns {name: figure from 0 to 1}."""
    with torch.no_grad():
        if stage == "read":
            return {"letters in text": measure_text(student)}
        figures: dict[str, float] = {}
        for name, pool in pools.items():
            figures |= {f"{name}: {what}": value for what, value in measure_detection(stage, student, pool).items()}
        if stage == "answer":
            figures["letters in text"] = measure_text(student)
            figures |= {f"{LETTER}{skill}": hits for skill, hits in measure_letters(student, pools["known"]).items()}
        return figures


def measure_text(student: Student, rows: int = 64) -> float:
    """Return the fraction of correct letters in held-out rows of text."""
    batch = collate_rows([draw_text_row(seed) for seed in range(rows)], student.tokenizer)
    first = 0 if student.language.layers[COMPARING].self_attn.o_proj.weight.any() else BRINGING + 1
    states = text_states(student.language, batch, None, first, len(student.language.layers))[-1]
    logits, labels = trained_logits(student.model, batch, states)
    letters = letter_mask(student.tokenizer, batch)
    return float((logits.argmax(-1) == labels)[letters].float().mean())


def measure_detection(stage: str, student: Student, pool: Pool) -> dict[str, float]:
    """Return the AUROC of detection on two QUERIES of each product, keyed by location in the model.

    The second has a defect unless it was drawn without a visible one.
    """
    queries = [IMAGES_PER_PRODUCT * product + query for product in range(pool.products) for query in QUERIES]
    defective = pool.labels["defect"][queries] >= 0
    figures = {}
    for references in REFERENCES if stage != "look" else ("none",):
        scores: dict[str, list[Any]] = {}
        for batch in _detection_batches(pool, references):
            for place, values in _detection_scores(stage, student, batch).items():
                scores.setdefault(place, []).append(values)
        for place, values in scores.items():
            if place == "tower" and references != "none":
                continue  # the tower sees only the query, so references do not matter
            value = auroc(np.ones((1, len(defective))), torch.cat(values).double().numpy(), defective)
            figures[f"{place}, {references} reference" if place != "tower" else place] = float(value[0])
    return figures


def _detection_batches(pool: Pool, references: str) -> Iterator[list[LessonRow]]:
    shift = 4 if references == "other" else 0  # the three products of the demo alternate
    rows = []
    for product in range(pool.products):
        other = IMAGES_PER_PRODUCT * ((product + shift) % pool.products)
        for query in QUERIES:
            shown = [pool.images[IMAGES_PER_PRODUCT * product + query]]
            if references != "none":
                shown.insert(0, pool.images[other])
            rows.append(LessonRow(tuple(shown), CONTEXTS[len(shown) - 1], (DETECTION,)))
    for start in range(0, len(rows), BATCH):
        yield rows[start : start + BATCH]


def _detection_scores(stage: str, student: Student, rows: Sequence[LessonRow]) -> dict[str, Any]:
    """Return the scores (B,) of rows with one lesson, keyed by the locations that the stage has trained."""
    heads, language, count = student.heads, student.language, len(rows[0].images)
    images = np.stack([image for row in rows for image in row.images])
    _, tokens = student.look(torch.from_numpy(images).float())
    queries = tokens[count - 1 :: count]
    scores = {"tower": heads.token(on.normal(queries))[..., 0].flatten(1).amax(1)}
    if stage == "look":
        return scores
    batch = collate_rows(list(rows), student.tokenizer)
    last = {"compare": COMPARING, "bring": BRINGING}.get(stage, len(language.layers) - 1)
    states = text_states(language, batch, tokens, 0, last + 1)
    row = torch.arange(len(rows))
    compared = states[COMPARING + 1][query_tokens(batch)]
    scores["comparing layer"] = heads.compared(on.normal(compared))[..., 0].amax(1)
    end = (batch["labels"][:, 1:] != -100).int().argmax(1)  # index of the token that predicts the letter
    if last >= BRINGING:
        scores["text"] = heads.text(on.normal(states[BRINGING + 1][row, end]))[:, 0]
    if stage == "answer":
        logits = student.model.lm_head(language.norm(states[-1][row, end]))
        yes, no = student.tokenizer.convert_tokens_to_ids(["A", "B"])
        scores["letter"] = logits[:, yes] - logits[:, no]
    return scores


def measure_letters(student: Student, pool: Pool) -> dict[str, float]:
    """Return the fraction of correct letters per skill, on held-out products with a reference of the same product."""
    hits: dict[str, list[bool]] = {}
    for start in range(0, pool.products, BATCH):
        rows, skills = [], []
        for product in range(start, min(pool.products, start + BATCH)):
            rng, query = np.random.default_rng((product, 13)), IMAGES_PER_PRODUCT * product + (2 if product % 3 else 1)
            context, lessons = image_lessons(rng, part_labels(pool, query, pool.shares[query]), normals=1)
            lessons = tuple(lesson for lesson in lessons if lesson.is_letter)
            if lessons:
                rows.append(
                    LessonRow((pool.images[query - query % IMAGES_PER_PRODUCT], pool.images[query]), context, lessons)
                )
                skills += [lesson.skill for lesson in lessons]
        if not rows:
            continue
        batch = collate_rows(rows, student.tokenizer)
        images = np.stack([image for row in rows for image in row.images])
        tokens = student.look(torch.from_numpy(images).float())[1]
        states = text_states(student.language, batch, tokens, 0, len(student.language.layers))[-1]
        logits, expected = trained_logits(student.model, batch, states)
        letters = letter_mask(student.tokenizer, batch)
        for skill, right in zip(skills, (logits.argmax(-1) == expected)[letters].tolist(), strict=True):
            hits.setdefault(skill, []).append(right)
    return {skill: float(np.mean(right)) for skill, right in sorted(hits.items())}
