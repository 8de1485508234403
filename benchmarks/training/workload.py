"""The cases, model and LoRA settings that all implementations share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from echo_ft.experts.roles import DECIDE_INSTRUCTION, PROMPT_VERSION
from echo_ft.records import ROLES, Branch, Exchange

MODEL = "recipes/tiny/echo-tiny"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTEXT = "The first image shows a normal part, the second the part under inspection.\n"
PROMPTS = {
    "reference_extractor": "Which candidate is the best baseline, and what does it look like?",
    "knowledge_guide": "Which entry matters for this image, and what should one look for?",
    "reasoning_expert": "Question: Is there mark number {index} in the object?\nObserve, compare and conclude.",
    "decision_maker": "Question: Is there mark number {index} in the object?\nA. Yes.\nB. No.\n" + DECIDE_INSTRUCTION,
}
PER_QUESTION = ("reasoning_expert", "decision_maker")
SENTENCE = "The part is round and its surface is even, without a mark, a scratch or a hole that the normal part lacks."


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
    role: str = "decision_maker"
    """One of ROLES, or `all` for this project's trainer."""
    adapt_from: str = "prefix"
    """Where the adapter of this project's trainer begins to act."""

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
    """Draw images into `folder`; returns one exchange per case, each with its own reference and query image.

    The reference extractor and the knowledge guide get one prompt per case, the other roles one per question.
    """
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
            Branch(str(index), PROMPTS[workload.role].format(index=index), _completion(workload.role, answers))
            for index in range(workload.questions if workload.role in PER_QUESTION else 1)
        )
        found.append(Exchange(workload.role, f"case {case}", tuple(names), CONTEXT, branches, PROMPT_VERSION))
    return found


def make_cases(folder: Path, workload: Workload) -> list[tuple[Exchange, ...]]:
    """The exchanges of each case: that of the workload's role, or with `all` those of all roles."""
    roles = ROLES if workload.role == "all" else (workload.role,)
    return list(zip(*(make_exchanges(folder, replace(workload, role=role)) for role in roles), strict=True))


def _completion(role: str, rng: np.random.Generator) -> str:
    return "AB"[int(rng.integers(2))] if role == "decision_maker" else SENTENCE


def rows_for(
    exchanges: Sequence[Exchange], folder: Path, convert: Callable[..., Iterator[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Return the same questions as rows for another trainer, one per question.

    `convert` is `prompt_completion_rows` or `message_rows` of echo_ft.data.export_rows.
    """
    return [
        row for exchange in exchanges for row in convert(exchange, [str(folder / name) for name in exchange.images])
    ]
