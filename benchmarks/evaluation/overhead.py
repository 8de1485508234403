"""What a run costs beside its backend: `python -m benchmarks.evaluation.overhead [--cases 10000] [--questions 5]`.

A backend that answers at once, with words as long as an expert's, stands in for the model. Measured are the four
experts' prompts, the reading of what they say, the records and their files: processor time a question, and the memory
that the process takes after a tenth of the cases and at the end. Then the run is opened again, as one that was stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from echo_ft.experts.pipeline import Outcome, PipelineConfig, run_cases_async, run_or_fail
from echo_ft.inference.run_folder import RunFolder
from echo_ft.records import QUESTION_TYPES, Case, Entry, Exchange, Generation, Question, Reference, Seen, Truth

SENTENCE = "Observe: a dark spot near the edge. Compare: the normal part is even there. Conclude: it is a stain. "
"""What the reasoning expert may say: two of these."""


SAYS = {
    "reasoning_expert": 2 * SENTENCE,
    "knowledge_guide": SENTENCE,
    "decision_maker": "B",
    "reference_extractor": "2",
}
LETTERS = {"A": -1.9, "B": -0.4, "C": -2.5, "D": -3.25, "E": -8.0}


def generate(role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
    """A backend that needs no time."""
    return [[Generation(SAYS[role], LETTERS) for _ in exchange.branches] for exchange in exchanges]


async def generate_async(role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
    """The same as a server, which lets other cases go on meanwhile."""
    await asyncio.sleep(0)
    return generate(role, exchanges)


def make_cases(count: int, questions: int) -> list[Case]:
    """Cases of one product, with three references, five conditions and questions of four options each."""
    knowledge = tuple(Entry(condition, SENTENCE) for condition in ("good", "stain", "scratch", "dent", "hole"))
    options = {letter: f"The part shows the condition number {letter}." for letter in "ABCD"}
    kinds = (QUESTION_TYPES * questions)[:questions]
    made = []
    for index in range(count):
        name = f"bench/part/{index:06d}"
        asked = tuple(
            Question(f"{name}#{number}", name, kind, f"What about the {kind.lower()}?", options)
            for number, kind in enumerate(kinds)
        )
        references = tuple(Reference(name, f"train/{index}_{rank}.png", 0.9, rank) for rank in (1, 2, 3))
        seen = Seen(f"test/{index}.png", references, knowledge, asked)
        truth = Truth("stain", None, (), {question.id: "B" for question in asked})
        made.append(Case(name, "bench", "part", name, seen, truth))
    return made


def mebibytes() -> float:
    """Memory that this process takes now."""
    return psutil.Process().memory_info().rss / 2**20


def measure(folder: Path, cases: Sequence[Case], batch_size: int, later: bool) -> tuple[float, float, float]:
    """Seconds of processor time of a whole run, and MiB after a tenth of it and at its end."""
    sizes: list[float] = []
    began = time.process_time()
    with RunFolder(folder, {}, cases) as run:

        def write(case: Case, outcome: Outcome) -> None:
            run.write(case, outcome)
            if len(run.done) in (max(1, len(cases) // 10), len(cases)):
                sizes.append(mebibytes())

        if later:
            asyncio.run(run_cases_async(cases, generate_async, PipelineConfig(), batch_size, write))
        else:
            for batch in run.batches(batch_size):
                for case, outcome in zip(batch, run_or_fail(batch, generate, PipelineConfig()), strict=True):
                    write(case, outcome)
        run.finish()
    return time.process_time() - began, sizes[0], sizes[-1]


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=16)
    options = parser.parse_args()
    cases = make_cases(options.cases, options.questions)
    asked = options.cases * options.questions
    print("| backend | ms a question | MiB after a tenth | MiB at the end |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for what, later in (("here", False), ("a server", True)):
            seconds, early, late = measure(Path(name) / what, cases, options.batch_size, later)
            print(f"| {what} | {1000 * seconds / asked:.3f} | {early:.0f} | {late:.0f} |", flush=True)
        began = time.process_time()
        with RunFolder(Path(name) / "here", {}, cases) as run:
            done = len(run.done)
    seconds = time.process_time() - began
    print(f"\nOpened again: {done} cases done, {1000 * seconds / asked:.3f} ms a question, {mebibytes():.0f} MiB.")


if __name__ == "__main__":
    main()
