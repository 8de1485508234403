"""The cases, model and LoRA settings that all contenders share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from echo_ft.experts.roles import DECIDE_INSTRUCTION, PROMPT_VERSION
from echo_ft.records import Branch, Exchange

MODEL = "recipes/tiny/echo-tiny"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTEXT = "The first image shows a normal part, the second the part under inspection.\n"


@dataclass(frozen=True)
class Workload:
    """Cases with two images and `questions` questions each, and how to train on them."""

    cases: int
    questions: int
    steps: int
    workers: int = 0
    """Loader processes that build batches during training."""
    model: str = MODEL
    rows: int = 10
    """Questions per step, independent of the number of questions per case."""
    side: int = 448
    """Height and width of an image in pixels."""
    turns: bool = False
    """Whether TRL and this project wait for their next turn after every step."""

    @property
    def cases_per_step(self) -> int:
        return self.rows // self.questions

    @property
    def pixels(self) -> int:
        """The pixel budget: the number of pixels of every image."""
        return self.side**2

    @property
    def steps_per_epoch(self) -> int:
        return self.cases // self.cases_per_step


def make_exchanges(folder: Path, workload: Workload) -> list[Exchange]:
    """Draw images into `folder`; returns one exchange per case, each with its own reference and query image."""
    found = []
    for case in range(workload.cases):
        answers = np.random.default_rng((case, 0))
        names = []
        for number, kind in enumerate(("reference", "query"), start=1):
            name = f"{kind}_{case}.png"
            if not (folder / name).is_file():
                rng = np.random.default_rng((case, number))
                Image.fromarray(rng.integers(0, 255, (workload.side, workload.side, 3), dtype=np.uint8)).save(
                    folder / name
                )
            names.append(name)
        branches = tuple(
            Branch(
                str(index),
                f"Question: Is there mark number {index} in the object?\nA. Yes.\nB. No.\n{DECIDE_INSTRUCTION}",
                "AB"[int(answers.integers(2))],
            )
            for index in range(workload.questions)
        )
        found.append(Exchange("decision_maker", f"case {case}", tuple(names), CONTEXT, branches, PROMPT_VERSION))
    return found


def rows_for(
    exchanges: Sequence[Exchange], folder: Path, convert: Callable[..., Iterator[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The same questions as rows for another trainer, one per question.

    `convert` is `prompt_completion_rows` or `message_rows` of echo_ft.data.export_rows.
    """
    return [
        row for exchange in exchanges for row in convert(exchange, [str(folder / name) for name in exchange.images])
    ]
