"""Pretrain echo-tiny from nothing on drawn parts: `python -m train.tiny.pretrain --output DIR [--minutes 50]`.

echo-tiny is a Qwen2-VL of a few million parameters with Qwen2-VL's own classes, special tokens and chat template. It
first learns to look (train.tiny_looking), then from rows that ask several things about the same photographs
(train.tiny.lessons), laid out so that the photographs are computed once a row; the loss is on completions, and in rows
of text on prompts too.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo_ft.config import parse, run_main
from echo_ft.drawn.parts import PRETRAINING_DEFECTS, PRETRAINING_KINDS
from echo_ft.errors import EchoError
from train.tiny.lessons import Lesson, Row, binding_row, caption_row, row, text_row
from train.tiny.model import (
    CLOSING,
    answer_logits,
    build_model,
    build_processor,
    build_tokenizer,
    collate,
    lay_out,
    patches,
    save,
)
from train.tiny.vision_pretraining import pretrain_vision

FIRST_TRAINED = 10**7
"""Rows below this number are never trained on."""
REPORT_EVERY = 50
"""Steps between two lines of progress."""
STAGES = (functools.partial(binding_row, behind=1.0), functools.partial(binding_row, behind=0.3), text_row, row)
"""Which letter stands before words just read; before words read earlier; all of text; everything."""
SEEING = 2
"""The stage from which every other batch is of captions; before letters are learned, they would keep them from it."""
CAPTIONS = 3
"""How many times as many rows a batch of captions has."""
LOOKING = 0.4
"""Share of the time in which the vision tower alone learns, before everything."""
TOWER = 0.3
"""The tower's learning rate after that, as a share of the others'."""
LEARNED = 0.85
"""Share of letters, a mean over about twenty steps, from which the next stage begins."""
CAPTION = re.compile(
    r"At the (?P<place>.+) there is a (?P<extent>\w+) (?P<mark>.+)\. It is a defect, a (?P<defect>.+)\."
)
OPTION = re.compile(r"^[A-D]\. ", re.MULTILINE)
CARD = """# echo-tiny

A Qwen2-VL of {millions} M parameters and {tokens} tokens, with Qwen2-VL's own classes, special tokens and chat
template. It exists so that every step of this project runs anywhere in minutes, and is no model for real inspections.

- **Made by** `python -m train.tiny.pretrain --output recipes/tiny/echo-tiny {option}` (seed {seed}): {looks} steps of
  looking, then {steps} steps of {batch} rows, in {minutes} minutes on a CPU with {threads} threads, float32, ended on
  {date}. Stored as bfloat16, it loads as float32. With `--minutes` the number of steps depends on the machine;
  `--looks {looks} --steps {steps}` repeats them.
- **Data**: photographs drawn by `echo_ft/drawing.py` of {kinds}, with {defects}. It has never seen the demo's products
  or defects; their names occur in rows of words put together at random. Lessons: `train/tiny/lessons.py`.
- **Photographs** of 36 image tokens (168 x 168 pixels and the like) are what it knows best.

Measured on held-out rows, greedy; a letter is right where the answer is that letter and nothing else:

| what | count | right, % | by chance, % |
|---|---|---|---|
{table}
Limits: it knows drawn surfaces, about 850 words and short answers, and little of real photographs; words outside its
lessons it can copy at best.
"""


@dataclass(frozen=True)
class PretrainConfig:
    """Options of the pretraining."""

    output: str = field(metadata={"help": "folder to write the model to"})
    minutes: float = field(default=50.0, metadata={"help": "how long to train; ignored where --steps is given"})
    steps: int = field(default=0, metadata={"help": "how many steps on lessons to train instead"})
    looks: int = field(default=0, metadata={"help": "how many steps of looking, where --steps is given"})
    batch: int = field(default=8, metadata={"help": "rows a step"})
    lr: float = field(default=1.5e-3, metadata={"help": "peak learning rate"})
    seed: int = field(default=0, metadata={"help": "seed of weights and lessons"})
    held_out: int = field(default=256, metadata={"help": "rows kept for the final measurement"})


def lesson_batches(config: PretrainConfig, tokenizer: Any, stage: Any) -> Iterator[dict[str, Any]]:
    """Endless batches, of the shared `stage` and from SEEING on of captions by turns, drawn by a process of its own."""
    from torch.utils.data import DataLoader, IterableDataset

    class Lessons(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for step in itertools.count():
                first = FIRST_TRAINED + config.seed * 10**9 + step * config.batch * CAPTIONS
                make, rows = STAGES[stage.value], config.batch
                if step % 2 and stage.value >= SEEING:
                    make, rows = caption_row, CAPTIONS * config.batch
                yield collate([make(first + index) for index in range(rows)], tokenizer)

    return iter(DataLoader(Lessons(), batch_size=None, num_workers=1, prefetch_factor=4))


def pretrain(model: Any, tokenizer: Any, config: PretrainConfig) -> int:
    """AdamW with warm-up and cosine decay over --steps or --minutes; returns the number of steps.

    Letters are learned on text, stage by stage, and seeing on captions: beside photographs, which letter stands before
    an answer is not found in the time of the whole.
    """
    import torch
    from torch.nn.functional import cross_entropy

    groups = []
    for part, rate in ((model.model.language_model, config.lr), (model.model.visual, TOWER * config.lr)):
        matrices = [p for p in part.parameters() if p.ndim >= 2]
        vectors = [p for p in part.parameters() if p.ndim < 2]
        groups.append({"params": matrices, "weight_decay": 0.05, "rate": rate})
        groups.append({"params": vectors, "weight_decay": 0.0, "rate": rate})
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))
    letters = torch.tensor(tokenizer.convert_tokens_to_ids(list("ABCD")))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    stage = torch.multiprocessing.Value("b", 0)
    model.train()
    start, known, losses_of, hits, asked = time.monotonic(), 0.0, [0.0, 0.0], 0, 0
    for step, batch in enumerate(lesson_batches(config, tokenizer, stage), start=1):
        minutes = (time.monotonic() - start) / 60
        done = (step - 1) / config.steps if config.steps else minutes / ((1 - LOOKING) * config.minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1.0, step / 100) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))
        logits, labels = answer_logits(model, batch)
        losses, chosen = cross_entropy(logits, labels, reduction="none"), answers(batch, letters, end)
        # A letter is one token among many, and the hardest to learn.
        loss = losses[~chosen].mean() + (2 * losses[chosen].mean() if chosen.any() else 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses_of[step % 2] += loss.item()
        right = (logits.argmax(-1) == labels)[chosen]
        hits, asked = hits + int(right.sum()), asked + len(right)
        if len(right):
            known = 0.95 * known + 0.05 * right.float().mean().item()
        if known > LEARNED and stage.value + 1 < len(STAGES):
            stage.value, known = stage.value + 1, 0.0
        if step % REPORT_EVERY == 0:
            captions, lessons = (2 * total / REPORT_EVERY for total in losses_of)
            figures = f"loss {lessons:.3f}  letters {hits / max(asked, 1):.3f}  captions {captions:.3f}"
            print(f"step {step:5d}  {minutes:5.1f} min  stage {stage.value + 1}  {figures}", flush=True)
            losses_of, hits, asked = [0.0, 0.0], 0, 0
    return step - 1


def answers(batch: dict[str, Any], letters: Any, end: int) -> Any:
    """(N,) bool: which of a batch's N trained tokens are a letter that is all of a completion."""
    import torch

    labels = batch["labels"][:, 1:]
    following = torch.cat([batch["ids"][:, 2:], batch["ids"][:, :1]], dim=1)
    return (torch.isin(labels, letters) & (following == end))[labels != -100]


def measure(model: Any, tokenizer: Any, rows: list[Row]) -> dict[str, tuple[int, float, float]]:
    """Held-out figures: {what: (count, percent right, percent by chance)}.

    Letters are right where the likeliest of all tokens is the letter. Captions are said freely from the photographs,
    and their parts counted one by one; chance is then not defined, and given as 0.
    """
    counts: dict[str, list[float]] = {}

    def count(what: str, right: bool, chance: float = 0.0) -> None:
        total = counts.setdefault(what, [0, 0, 0])
        total[0] += 1
        total[1] += right
        total[2] += chance

    model.eval()
    for r in rows:
        for lesson in r.branches:
            compared = lesson.skill == "caption" and len(r.photos) > 1
            if not lesson.letter and not compared:
                continue
            said = say(model, tokenizer, r, lesson, 2 if lesson.letter else 40)
            if lesson.letter:
                count(f"letter, {lesson.skill}", said == lesson.completion, 1 / len(OPTION.findall(lesson.prompt)))
            elif found := CAPTION.fullmatch(lesson.completion):
                match = CAPTION.fullmatch(said)
                count("caption, a defect is seen", match is not None)
                for part in ("place", "extent", "mark", "defect"):
                    count(f"caption, {part}", match is not None and match[part] == found[part])
            elif lesson.completion.startswith("Nothing"):
                count("caption, no defect is seen where there is none", said == lesson.completion)
    model.train()
    return {what: (int(n), 100 * right / n, 100 * chance / n) for what, (n, right, chance) in sorted(counts.items())}


def say(model: Any, tokenizer: Any, r: Row, lesson: Lesson, most: int) -> str:
    """What the model says to one lesson of a row, greedily, at most `most` tokens."""
    import torch

    asked = dataclasses.replace(r, branches=(lesson._replace(completion=""),))
    closing = len(tokenizer(CLOSING)["input_ids"])
    ids = torch.from_numpy(lay_out(asked, tokenizer).ids[:-closing])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if r.photos:
        image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        inputs["mm_token_type_ids"] = (ids == image).int()
        inputs["pixel_values"], inputs["image_grid_thw"] = patches([torch.from_numpy(photo) for photo in r.photos])
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=most)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()


def main(argv: list[str]) -> None:
    (config,) = parse([PretrainConfig], argv)
    folder = Path(config.output)
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise EchoError(f"{folder} holds other files than a model; choose an empty --output")
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer([row(index) for index in range(512)])
    processor, model = build_processor(tokenizer), build_model(tokenizer)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"echo-tiny: {millions:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    start = time.monotonic()
    looks = 0
    if config.looks or not config.steps:
        looks = pretrain_vision(model, FIRST_TRAINED + config.seed * 10**9, LOOKING * config.minutes, config.looks)
        save(model, processor, folder)
    steps = pretrain(model, tokenizer, config)
    minutes = (time.monotonic() - start) / 60
    save(model, processor, folder)
    print(f"measuring on {config.held_out} held-out rows", flush=True)
    figures = measure(model, tokenizer, [row(1000 + index) for index in range(config.held_out)])
    table = "".join(
        f"| {what} | {n} | {right:.1f} | {f'{chance:.1f}' if chance else ''} |\n"
        for what, (n, right, chance) in figures.items()
    )
    print(table, end="")
    card = CARD.format(
        millions=f"{millions:.2f}", tokens=len(tokenizer), steps=steps, minutes=f"{minutes:.0f}", batch=config.batch,
        seed=config.seed, looks=looks, threads=torch.get_num_threads(), date=time.strftime("%Y-%m-%d"), table=table,
        kinds=", ".join(PRETRAINING_KINDS), defects=", ".join(PRETRAINING_DEFECTS),
        option=f"--looks {config.looks} --steps {config.steps}" if config.steps else f"--minutes {config.minutes:g}",
    )  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"wrote {folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_main(main)
