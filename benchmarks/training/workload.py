"""The same cases, model and LoRA for every contender."""

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
    """Cases of two images and some questions each, and how they are trained on."""

    cases: int
    questions: int
    steps: int
    workers: int = 0
    """Processes that make batches beside the training."""
    model: str = MODEL
    rows: int = 10
    """Questions of a step, whatever the number of them a case has."""
    side: int = 448
    """Of a photograph, in pixels."""

    @property
    def cases_a_step(self) -> int:
        return self.rows // self.questions

    @property
    def pixels(self) -> int:
        """The pixel budget: every photograph has as many."""
        return self.side**2

    @property
    def steps_an_epoch(self) -> int:
        return self.cases // self.cases_a_step


def exchanges(folder: Path, workload: Workload) -> list[Exchange]:
    """Cases over images drawn into `folder`: each has a reference and a query of its own."""
    made = []
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
        made.append(Exchange("decision_maker", f"case {case}", tuple(names), CONTEXT, branches, PROMPT_VERSION))
    return made


def rows_for(
    made: Sequence[Exchange], folder: Path, form: Callable[..., Iterator[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The same questions in another trainer's form (`conversations` or `chats`), one row each."""
    return [row for exchange in made for row in form(exchange, [str(folder / name) for name in exchange.images])]
