"""Pretrain echo-tiny from scratch on drawn parts: `python -m train.tiny.pretrain --output DIR`.

echo-tiny is a Qwen2-VL with three million parameters and Qwen2-VL's own classes, special tokens and chat template. It
learns in five stages (train.tiny.stages). A stopped stage resumes from its last checkpoint, and finished stages are
kept in `--work`. The first two stages do not depend on each other, so `--stages` can run them in parallel.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from echo_ft.config import parse, run_main
from echo_ft.errors import EchoError
from echo_ft.files import write_json, write_text
from echo_ft.inputs import read_json_object
from echo_ft.terminal import LOGGER
from train.tiny.lessons import LessonRow, draw_text_row, image_lessons, random_labels
from train.tiny.pool import DEFECT_NAMES, KIND_NAMES, draw_pool, open_pool

STEPS = {"read": 3000, "look": 3200, "compare": 1300, "bring": 450, "answer": 2500}
"""Steps of each stage."""
BEFORE = {
    "read": (),
    "look": (),
    "compare": ("look", "read"),
    "bring": ("compare", "read"),
    "answer": ("bring", "read"),
}
"""The stages whose weights a stage starts from. If several of them trained the same weights, the last one in the list
takes precedence."""
DATA = """- **Data**: {images:,} images drawn by `echo_ft/drawn`. The kinds of parts are {kinds}. The defects are
{defects}. The model has never seen the products or defects of the demo. Their names occur only in random combinations
of words, some of them beside images. The lessons are in `train/tiny/lessons.py`."""
"""A paragraph of the model card."""
REFERENCES = ("own", "other", "none")
"""A normal reference of the same product, one of another product, or no reference."""
LETTER = "known: letter by skill, "
"""Prefix of the names of figures about letters."""
CARD = """# echo-tiny

A small Qwen2-VL with {millions} M parameters. It uses Qwen2-VL's own classes, special tokens and chat template. With
it, every step of this project runs anywhere in minutes. It is not a model for real inspections.

- **Training**: `python -m train.tiny.pretrain --output recipes/tiny/echo-tiny` (seed {seed}). The stages took {minutes}
  minutes together on a CPU (`--threads {threads}`) and ended on {date}. The weights are stored as bfloat16 and load as
  float32.
{data}
- **Images**: it works best with 36 image tokens (168 x 168 pixels and similar sizes).

| stage | steps | minutes |
|---|---|---|
{stages}

AUROC of a defect after each stage, on {products} held-out products of the kinds above (known), and on as many images of
the demo's products (new). The tower sees the inspected image alone. The comparing layer and the text also see a normal
reference of the same product (own), of another product (other) or none. The letter is the model's answer.

| stage | read at | known: own | other | none | new: own | other | none |
|---|---|---|---|---|---|---|---|
{detection}

A letter is right if it is the most probable of all tokens. In rows of text, {text}% are right. On known products with
their own reference: {letters}.

Limits: it knows drawn surfaces, a few hundred words and short answers, and little about real images. It can at best
copy words that its lessons did not contain.
"""
MINIMA = {"products": 8, "held_out": 5, "threads": 1, "seed": 0}
"""The smallest value of each option. A batch has images of eight products, and the reference of another product comes
from the product four places later."""
FIRST_TRAINING_PRODUCT = 10**6
"""Products with smaller numbers are never trained on."""


@dataclass(frozen=True)
class PretrainConfig:
    """Options of `python -m train.tiny.pretrain`."""

    output: str = field(metadata={"help": "Folder to write the model to."})
    work: str = field(
        default="runs/echo-tiny", metadata={"help": "Folder for drawn images, finished stages and checkpoints."}
    )
    stages: list[str] = field(
        default_factory=lambda: list(STEPS), metadata={"help": f"Stages to train: {', '.join(STEPS)}."}
    )
    products: int = field(default=10_000, metadata={"help": "Drawn products, with four images each (0.3 MB)."})
    steps_share: float = field(default=1.0, metadata={"help": "Fraction of each stage's steps to run."})
    held_out: int = field(
        default=150, metadata={"help": "Number of known products, and of new ones, on which the stages are measured."}
    )
    threads: int = field(
        default=1,
        metadata={"help": "Threads of one stage. On two cores, two processes with one thread each are faster."},
    )
    seed: int = field(default=0, metadata={"help": "Seed for weights, images and lessons."})


def main(argv: list[str]) -> None:
    """Draw the images, train and measure each unfinished stage, and write the model and its card."""
    (config,) = parse([PretrainConfig], argv)
    output, work = Path(config.output), Path(config.work)
    if output.exists() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise EchoError(f"{output} holds files other than a model; choose an empty folder for --output")
    if unknown := set(config.stages) - set(STEPS):
        raise EchoError(f"--stages: there is no stage {sorted(unknown)[0]!r}; choose from {', '.join(STEPS)}")
    for name, least in MINIMA.items():
        if getattr(config, name) < least:
            raise EchoError(f"--{name} is {getattr(config, name)}; set it to {least} or more")
    work.mkdir(parents=True, exist_ok=True)
    check_work(config, work)
    import torch

    torch.set_num_threads(config.threads)
    for stage in config.stages:
        if not (work / f"{stage}.json").is_file():
            train(stage, config, work)
    missing = [stage for stage in STEPS if not (work / f"{stage}.json").is_file()]
    if missing:
        print(f"stages left: {', '.join(missing)}")
        return
    write_model(build_student(config.seed, work, ("answer",)), work, config, output)


def check_work(config: PretrainConfig, work: Path) -> None:
    """Record the options in a new work folder. Raises EchoError if its stages were trained with other options."""
    options = {name: getattr(config, name) for name in ("seed", "products", "steps_share", "held_out")}
    file = work / "options.json"
    if not file.is_file():
        write_json(file, options)
        return
    for name, value in read_json_object(file).items():
        if options.get(name) != value:
            raise EchoError(
                f"{work} has stages of --{name} {value}, not {options.get(name)}; use the same or another --work"
            )


def check_tokens(vocabulary: Mapping[str, int], work: Path) -> None:
    """Record the tokens in a new work folder. Raises EchoError if its stages were trained with other tokens.

    The tokens depend on the words in lessons and prompts, so editing these can change the tokens between stages.
    """
    file = work / "tokens.json"
    if not file.is_file():
        write_json(file, dict(vocabulary))
    elif read_json_object(file) != vocabulary:
        raise EchoError(f"{work} has stages with the tokens of other lessons or prompts; use another --work")


def build_student(seed: int, work: Path, stages: Sequence[str]) -> Any:
    """Build a model with its heads and load the weights of finished stages. Raises EchoError if one is missing."""
    import torch

    from train.tiny.heads import Heads
    from train.tiny.loop import load
    from train.tiny.model import build_model, build_tokenizer
    from train.tiny.stages import Student

    torch.manual_seed(seed)
    rows = [draw_text_row(index) for index in range(150)]
    for index in range(350):
        rng = np.random.default_rng((index, 10))
        context, lessons = image_lessons(rng, random_labels(rng), normals=index % 3)
        rows.append(LessonRow((), context, lessons))
    tokenizer = build_tokenizer(rows)
    check_tokens(tokenizer.get_vocab(), work)
    model = build_model(tokenizer)
    text, vision = model.config.text_config, model.config.vision_config
    student = Student(model, Heads(vision.embed_dim, text.hidden_size), tokenizer)
    for stage in stages:
        file = work / f"{stage}.pt"
        if not file.is_file():
            raise EchoError(f"{file} is missing; train the stage {stage} first")
        weights = load(file)["weights"]
        student.modules(*{name.split(".")[0] for name in weights}).load_state_dict(weights)
    return student


def train(stage: str, config: PretrainConfig, work: Path) -> None:
    """Train one stage and measure it."""
    import torch

    from train.tiny.loop import Schedule, train_stage
    from train.tiny.measure import held_out_pools, measure_stage
    from train.tiny.stages import STAGES

    pool = training_pool(config, work) if stage != "read" else None
    student = build_student(config.seed, work, BEFORE[stage])
    number = list(STEPS).index(stage)
    torch.manual_seed(config.seed + number)
    parts = STAGES[stage](student, pool)
    schedule = Schedule(max(1, round(config.steps_share * STEPS[stage])))
    minutes = train_stage(stage, (config.seed, number), work, parts.trained, parts.optimizers, parts.losses, schedule)
    figures = measure_stage(stage, student, held_out_pools(work, config.held_out))
    result = {"minutes": minutes, "steps": schedule.steps, "figures": figures}
    write_json(work / f"{stage}.json", result)
    LOGGER.info("%s: %.1f minutes", stage, minutes)
    for what, value in figures.items():
        LOGGER.info("  %s %.3f", what, value)


def training_pool(config: PretrainConfig, work: Path) -> Any:
    """Return the pool to train on. Draw it first if it is missing."""
    folder = work / "pool"
    if not folder.is_dir():
        LOGGER.info("drawing %d images", 4 * config.products)
        draw_pool(folder, config.products, FIRST_TRAINING_PRODUCT + 10**7 * config.seed)
    return open_pool(folder)


def write_model(student: Any, work: Path, config: PretrainConfig, output: Path) -> None:
    """Write the model, its processor and its card."""
    from train.tiny.model import build_processor, save_model

    save_model(student.model, build_processor(student.tokenizer), output)
    results = {stage: read_json_object(work / f"{stage}.json") for stage in STEPS}
    millions = sum(weight.numel() for weight in student.model.parameters()) / 1e6
    write_text(output / "README.md", model_card(results, millions, config))
    LOGGER.info("wrote %s: %.1f MB", output, sum(file.stat().st_size for file in output.iterdir()) / 1e6)


def model_card(results: Mapping[str, Any], millions: float, config: PretrainConfig) -> str:
    """Return the model card for the results of each stage: its steps, minutes and figures."""
    stages = [f"| {name} | {stage['steps']} | {stage['minutes']:.0f} |" for name, stage in results.items()]
    final = results["answer"]["figures"]
    names = {"kinds": enumerate_names(KIND_NAMES), "defects": enumerate_names(DEFECT_NAMES)}
    data = textwrap.fill(DATA.format(images=4 * config.products, **names), 120, subsequent_indent="  ")
    letters = {what.removeprefix(LETTER): value for what, value in final.items() if what.startswith(LETTER)}
    return CARD.format(
        millions=f"{millions:.2f}", seed=config.seed, threads=config.threads, date=time.strftime("%Y-%m-%d"),
        minutes=f"{sum(stage['minutes'] for stage in results.values()):.0f}", data=data,
        products=config.held_out,
        stages="\n".join(stages), detection="\n".join(detection_rows(results)),
        text=f"{100 * final['letters in text']:.0f}",
        letters=enumerate_names([f"{skill} {100 * value:.0f}%" for skill, value in letters.items()]),
    )  # fmt: skip


def detection_rows(results: Mapping[str, Any]) -> list[str]:
    """Return the table rows of the detection AUROC: each location in the model after each stage that measures it."""
    rows = []
    for name, stage in results.items():
        places = [what.removeprefix("known: ") for what in stage["figures"] if what.startswith("known: ")]
        for place in dict.fromkeys(place.split(",")[0] for place in places):
            if place == LETTER.removeprefix("known: ").removesuffix(", "):
                continue
            cells = []
            for products in ("known", "new"):
                for reference in REFERENCES:
                    value = stage["figures"].get(f"{products}: {place}, {reference} reference")
                    if place == "tower" and reference == "none":
                        value = stage["figures"][f"{products}: tower"]
                    cells.append("" if value is None else f"{value:.3f}")
            rows.append(f"| {name} | {place} | {' | '.join(cells)} |")
    return rows


def enumerate_names(names: Sequence[str]) -> str:
    """Join names for a sentence, with commas and `and`."""
    return f"{', '.join(names[:-1])} and {names[-1]}"


if __name__ == "__main__":
    run_main(main)
