"""Pretrain echo-tiny from scratch on drawn parts: `python -m train.tiny.pretrain --output DIR [--minutes 50]`.

echo-tiny is a Qwen2-VL with a few million parameters and Qwen2-VL's own classes, special tokens and chat template. Its
vision tower is pretrained first (train.tiny.vision_pretraining). The model is then trained on rows with several
questions about the same images (train.tiny.lessons), which encode the images once per row. The loss covers completions,
and in rows of text also prompts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo_ft.config import parse, run_main
from echo_ft.drawn.parts import PRETRAINING_DEFECTS, PRETRAINING_KINDS
from echo_ft.errors import EchoError
from train.tiny.inputs import TURN_END, collate_rows, encode_row, image_patches, trained_logits
from train.tiny.lessons import Lesson, LessonRow, draw_binding_row, draw_caption_row, draw_row, draw_text_row
from train.tiny.model import build_model, build_processor, build_tokenizer, save_model
from train.tiny.vision_pretraining import pretrain_vision

FIRST_TRAINING_ROW = 10**7
"""Rows with a smaller number are never trained on."""
LOG_EVERY = 50
"""Number of steps between two lines of progress."""
STAGES = (
    functools.partial(draw_binding_row, after_share=1.0),
    functools.partial(draw_binding_row, after_share=0.3),
    draw_text_row,
    draw_row,
)
"""Bind letters to words just read, then to words read earlier; then all rows of text, then all rows."""
FIRST_CAPTION_STAGE = 2
"""From this stage on, every other batch has captions. Earlier captions would keep the model from learning letters."""
CAPTION_BATCH_FACTOR = 3
"""A batch of captions has this many times more rows than other batches."""
VISION_SHARE = 0.4
"""Share of the time for vision pretraining, before all stages."""
TOWER_RATE_SHARE = 0.3
"""Learning rate of the vision tower after its pretraining, as a share of the language model's."""
STAGE_ACCURACY = 0.85
"""Letter accuracy, averaged over about twenty steps, at which the next stage begins."""
CAPTION_PATTERN = re.compile(
    r"At the (?P<place>.+) there is a (?P<extent>\w+) (?P<mark>.+)\. It is a defect, a (?P<defect>.+)\."
)
OPTION_PATTERN = re.compile(r"^[A-D]\. ", re.MULTILINE)
CARD = """# echo-tiny

A small Qwen2-VL with {millions} M parameters and {tokens} tokens. It uses Qwen2-VL's own classes, special tokens and
chat template. With it, every step of this project runs anywhere in minutes. It is not a model for real inspections.

- **Training**: `python -m train.tiny.pretrain --output recipes/tiny/echo-tiny {option}` (seed {seed}). {vision_steps}
  steps of vision pretraining and {steps} steps of {batch} rows took {minutes} minutes. They ran on a CPU with {threads}
  threads in float32 and ended on {date}. The weights are stored as bfloat16 and load as float32. With `--minutes`, the
  number of steps depends on the machine. `--looks {vision_steps} --steps {steps}` repeats this run.
- **Data**: images drawn by `echo_ft/drawn/parts.py`. The parts are {kinds}.
  The defects are {defects}. The model has never seen the products or defects of the demo.
  Their names occur only in rows of randomly combined words. The lessons are in `train/tiny/lessons.py`.
- **Images**: it works best with 36 image tokens (168 x 168 pixels and similar sizes).

Measured on held-out rows with greedy decoding. A letter is correct if the answer is that letter and nothing else.

| what | count | correct, % | chance, % |
|---|---|---|---|
{table}
Limits: it knows drawn surfaces, about 850 words and short answers, and little about real images. It can at best
copy words that its lessons did not contain.
"""
"""The model card. recipes/tiny/echo-tiny/README.md has the same wording, except for its training in two parts."""


@dataclass(frozen=True)
class PretrainConfig:
    """Options of `python -m train.tiny.pretrain`."""

    output: str = field(metadata={"help": "Folder to write the model to."})
    minutes: float = field(default=50.0, metadata={"help": "Training time in minutes; ignored with --steps."})
    steps: int = field(default=0, metadata={"help": "Number of steps on lessons, instead of --minutes."})
    looks: int = field(default=0, metadata={"help": "Number of vision pretraining steps, with --steps."})
    batch: int = field(default=8, metadata={"help": "Rows per step."})
    lr: float = field(default=1.5e-3, metadata={"help": "Peak learning rate."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and lessons."})
    held_out: int = field(default=256, metadata={"help": "Number of held-out rows for the final measurement."})


def lesson_batches(config: PretrainConfig, tokenizer: Any, stage: Any) -> Iterator[dict[str, Any]]:
    """Endless batches, drawn in a separate process.

    `stage` is a value shared with that process. From FIRST_CAPTION_STAGE on, every other batch has captions.
    """
    from torch.utils.data import DataLoader, IterableDataset

    class Lessons(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for step in itertools.count():
                first = FIRST_TRAINING_ROW + config.seed * 10**9 + step * config.batch * CAPTION_BATCH_FACTOR
                draw, rows = STAGES[stage.value], config.batch
                if step % 2 and stage.value >= FIRST_CAPTION_STAGE:
                    draw, rows = draw_caption_row, CAPTION_BATCH_FACTOR * config.batch
                yield collate_rows([draw(first + index) for index in range(rows)], tokenizer)

    return iter(DataLoader(Lessons(), batch_size=None, num_workers=1, prefetch_factor=4))


def build_optimizer(model: Any, lr: float) -> Any:
    """AdamW, with a lower learning rate for the vision tower and weight decay only for matrices."""
    import torch

    groups = []
    for part, rate in ((model.model.language_model, lr), (model.model.visual, TOWER_RATE_SHARE * lr)):
        matrices = [p for p in part.parameters() if p.ndim >= 2]
        vectors = [p for p in part.parameters() if p.ndim < 2]
        groups.append({"params": matrices, "weight_decay": 0.05, "rate": rate})
        groups.append({"params": vectors, "weight_decay": 0.0, "rate": rate})
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def pretrain(model: Any, tokenizer: Any, config: PretrainConfig) -> int:
    """Train with warm-up and cosine decay over --steps or --minutes. Returns the number of steps.

    The model learns letters on text, stage by stage, and vision on captions. With images from the start, the time would
    not suffice to learn which letter belongs to an answer.
    """
    import torch
    from torch.nn.functional import cross_entropy

    optimizer = build_optimizer(model, config.lr)
    letters = torch.tensor(tokenizer.convert_tokens_to_ids(list("ABCD")))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    stage = torch.multiprocessing.Value("b", 0)
    model.train()
    start, accuracy, loss_sums, hits, predicted = time.monotonic(), 0.0, [0.0, 0.0], 0, 0
    for step, batch in enumerate(lesson_batches(config, tokenizer, stage), start=1):
        minutes = (time.monotonic() - start) / 60
        done = (step - 1) / config.steps if config.steps else minutes / ((1 - VISION_SHARE) * config.minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1.0, step / 100) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))
        logits, labels = trained_logits(model, batch)
        losses, is_letter = cross_entropy(logits, labels, reduction="none"), letter_mask(batch, letters, end)
        # A letter is only one of many tokens, and the hardest to learn.
        loss = losses[~is_letter].mean() + (2 * losses[is_letter].mean() if is_letter.any() else 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss_sums[step % 2] += loss.item()
        correct = (logits.argmax(-1) == labels)[is_letter]
        hits, predicted = hits + int(correct.sum()), predicted + len(correct)
        if len(correct):
            accuracy = 0.95 * accuracy + 0.05 * correct.float().mean().item()
        if accuracy > STAGE_ACCURACY and stage.value + 1 < len(STAGES):
            stage.value, accuracy = stage.value + 1, 0.0
        if step % LOG_EVERY == 0:
            captions, lessons = (2 * total / LOG_EVERY for total in loss_sums)
            summary = f"loss {lessons:.3f}  letters {hits / max(predicted, 1):.3f}  captions {captions:.3f}"
            print(f"step {step:5d}  {minutes:5.1f} min  stage {stage.value + 1}  {summary}", flush=True)
            loss_sums, hits, predicted = [0.0, 0.0], 0, 0
    return step - 1


def letter_mask(batch: dict[str, Any], letters: Any, end: int) -> Any:
    """(N,) bool: which of the N trained tokens of a batch are a letter that is the whole completion."""
    import torch

    labels = batch["labels"][:, 1:]
    following = torch.cat([batch["ids"][:, 2:], batch["ids"][:, :1]], dim=1)
    return (torch.isin(labels, letters) & (following == end))[labels != -100]


def measure(model: Any, tokenizer: Any, rows: list[LessonRow]) -> dict[str, tuple[int, float, float]]:
    """Results on held-out rows: {what: (count, percent correct, percent by chance)}.

    A letter is correct if it is the most probable of all tokens. Captions are generated from the images, and their
    parts are counted separately. Chance is not defined for captions, and is 0.
    """
    counts: dict[str, list[float]] = {}

    def count(what: str, correct: bool, chance: float = 0.0) -> None:
        total = counts.setdefault(what, [0, 0, 0])
        total[0] += 1
        total[1] += correct
        total[2] += chance

    model.eval()
    for row in rows:
        for lesson in row.branches:
            is_comparison = lesson.skill == "caption" and len(row.images) > 1
            if not lesson.is_letter and not is_comparison:
                continue
            text = generate(model, tokenizer, row, lesson, 2 if lesson.is_letter else 40)
            if lesson.is_letter:
                chance = 1 / len(OPTION_PATTERN.findall(lesson.prompt))
                count(f"letter, {lesson.skill}", text == lesson.completion, chance)
            elif expected := CAPTION_PATTERN.fullmatch(lesson.completion):
                match = CAPTION_PATTERN.fullmatch(text)
                count("caption, defect reported", match is not None)
                for part in ("place", "extent", "mark", "defect"):
                    count(f"caption, {part}", match is not None and match[part] == expected[part])
            elif lesson.completion.startswith("Nothing"):
                count("caption, no defect reported", text == lesson.completion)
    model.train()
    return {
        what: (int(n), 100 * correct / n, 100 * chance / n) for what, (n, correct, chance) in sorted(counts.items())
    }


def generate(model: Any, tokenizer: Any, row: LessonRow, lesson: Lesson, max_new_tokens: int) -> str:
    """The greedy completion of one lesson of a row, at most `max_new_tokens` tokens long."""
    import torch

    prompt = dataclasses.replace(row, branches=(lesson._replace(completion=""),))
    turn_end = len(tokenizer(TURN_END)["input_ids"])
    ids = torch.from_numpy(encode_row(prompt, tokenizer).ids[:-turn_end])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if row.images:
        image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        inputs["mm_token_type_ids"] = (ids == image_token).int()
        images = [torch.from_numpy(image) for image in row.images]
        inputs["pixel_values"], inputs["image_grid_thw"] = image_patches(images)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def enumerate_names(names: Sequence[str]) -> str:
    """Names as they are listed in a sentence."""
    return f"{', '.join(names[:-1])} and {names[-1]}"


def main(argv: list[str]) -> None:
    """Pretrain the model, measure it on held-out rows, and write its model card."""
    (config,) = parse([PretrainConfig], argv)
    folder = Path(config.output)
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise EchoError(f"{folder} holds files other than a model; choose an empty folder for --output")
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer([draw_row(index) for index in range(512)])
    processor, model = build_processor(tokenizer), build_model(tokenizer)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"echo-tiny: {millions:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    start = time.monotonic()
    vision_steps = 0
    if config.looks or not config.steps:
        first = FIRST_TRAINING_ROW + config.seed * 10**9
        vision_steps = pretrain_vision(model, first, VISION_SHARE * config.minutes, config.looks)
        save_model(model, processor, folder)
    steps = pretrain(model, tokenizer, config)
    minutes = (time.monotonic() - start) / 60
    save_model(model, processor, folder)
    print(f"measuring on {config.held_out} held-out rows", flush=True)
    results = measure(model, tokenizer, [draw_row(1000 + index) for index in range(config.held_out)])
    table = "".join(
        f"| {what} | {n} | {correct:.1f} | {f'{chance:.1f}' if chance else ''} |\n"
        for what, (n, correct, chance) in results.items()
    )
    print(table, end="")
    card = CARD.format(
        millions=f"{millions:.2f}", tokens=len(tokenizer), steps=steps, minutes=f"{minutes:.0f}", batch=config.batch,
        seed=config.seed, vision_steps=vision_steps, threads=torch.get_num_threads(), date=time.strftime("%Y-%m-%d"),
        kinds=enumerate_names([*PRETRAINING_KINDS]), defects=enumerate_names([*PRETRAINING_DEFECTS]), table=table,
        option=f"--looks {config.looks} --steps {config.steps}" if config.steps else f"--minutes {config.minutes:g}",
    )  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"wrote {folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_main(main)
