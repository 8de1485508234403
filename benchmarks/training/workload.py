"""The same cases, model and LoRA for every contender: two images at 448 x 448, ten questions a step, 2 cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from echo_ft.records import Branch, Exchange
from echo_ft.roles import DECIDE_INSTRUCTION, PROMPT_VERSION

SIDE = 448
MODEL = "recipes/tiny/echo-tiny"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS_A_STEP = 10
"""Questions of a step, whatever the number of them a case has."""
CONTEXT = "The first image shows a normal part, the second the part under inspection.\n"


@dataclass(frozen=True)
class Workload:
    """How many cases there are, how many questions each, and how many processes make batches beside the training."""

    cases: int
    questions: int
    steps: int
    workers: int = 0

    @property
    def cases_a_step(self) -> int:
        return ROWS_A_STEP // self.questions

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
                Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / name)
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


def conversations(made: Sequence[Exchange], folder: Path) -> list[dict[str, Any]]:
    """The same questions, one row each, as TRL takes them."""
    return [
        {
            "images": [str(folder / name) for name in exchange.images],
            "prompt": [{"role": "user", "content": exchange.context + branch.prompt}],
            "completion": [{"role": "assistant", "content": branch.completion}],
        }
        for exchange in made
        for branch in exchange.branches
    ]


def chats(made: Sequence[Exchange], folder: Path) -> list[dict[str, Any]]:
    """The same rows as LLaMA-Factory and ms-swift take them: `<image>` stands where an image goes."""
    rows = conversations(made, folder)
    for row in rows:
        (asked,), answered = row.pop("prompt"), row.pop("completion")
        places = "<image>" * len(row["images"])
        row["messages"] = [{**asked, "content": places + asked["content"]}, *answered]
    return rows
