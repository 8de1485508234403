"""Measure what a run costs besides its backend: `python -m benchmarks.evaluation.overhead [--cases 10000]`.

A backend that answers immediately replaces the model. Its outputs are as long as those of a real expert. The benchmark
covers the prompts of the four experts, the parsing of their outputs, the records and the files. It reports processor
time per question, and memory after a tenth of the cases and at the end. It then reopens the run, as a resumed run does.
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
"""Two of these together make an output of the reasoning expert."""

OUTPUTS = {
    "reasoning_expert": 2 * SENTENCE,
    "knowledge_guide": SENTENCE,
    "decision_maker": "B",
    "reference_extractor": "2",
}
LETTER_LOGPROBS = {"A": -1.9, "B": -0.4, "C": -2.5, "D": -3.25, "E": -8.0}


def generate(role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
    """Answer immediately, as the backend of a run."""
    return [[Generation(OUTPUTS[role], LETTER_LOGPROBS) for _ in exchange.branches] for exchange in exchanges]


async def generate_async(role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
    """Answer like `generate`, but as a server: other cases may run during the wait."""
    await asyncio.sleep(0)
    return generate(role, exchanges)


def make_cases(count: int, questions: int) -> list[Case]:
    """Make cases of one product, with three references, five conditions and `questions` questions of four options."""
    knowledge = tuple(Entry(condition, SENTENCE) for condition in ("good", "stain", "scratch", "dent", "hole"))
    options = {letter: f"The part shows the condition number {letter}." for letter in "ABCD"}
    question_types = (QUESTION_TYPES * questions)[:questions]
    cases = []
    for index in range(count):
        name = f"bench/part/{index:06d}"
        case_questions = tuple(
            Question(f"{name}#{number}", name, kind, f"What about the {kind.lower()}?", options)
            for number, kind in enumerate(question_types)
        )
        references = tuple(Reference(name, f"train/{index}_{rank}.png", 0.9, rank) for rank in (1, 2, 3))
        seen = Seen(f"test/{index}.png", references, knowledge, case_questions)
        truth = Truth("stain", None, (), {question.id: "B" for question in case_questions})
        cases.append(Case(name, "bench", "part", name, seen, truth))
    return cases


def memory_mib() -> float:
    """Return the memory of this process in MiB."""
    return psutil.Process().memory_info().rss / 2**20


def measure(folder: Path, cases: Sequence[Case], batch_size: int, server: bool) -> tuple[float, float, float]:
    """Return the processor time of a run in seconds, and the MiB in use after a tenth of its cases and at its end."""
    sizes: list[float] = []
    began = time.process_time()
    with RunFolder(folder, {}, cases) as run:

        def write(case: Case, outcome: Outcome) -> None:
            run.write(case, outcome)
            if len(run.done) in (max(1, len(cases) // 10), len(cases)):
                sizes.append(memory_mib())

        if server:
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
    parser.add_argument("--cases", type=int, default=10_000, help="Cases in the run.")
    parser.add_argument("--questions", type=int, default=5, help="Questions per case.")
    parser.add_argument("--batch_size", type=int, default=16, help="Cases per batch.")
    options = parser.parse_args()
    cases = make_cases(options.cases, options.questions)
    questions = options.cases * options.questions
    print("| backend | ms per question | MiB after a tenth | MiB at the end |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for backend, server in (("local", False), ("server", True)):
            seconds, early, late = measure(Path(name) / backend, cases, options.batch_size, server)
            print(f"| {backend} | {1000 * seconds / questions:.3f} | {early:.0f} | {late:.0f} |", flush=True)
        began = time.process_time()
        with RunFolder(Path(name) / "local", {}, cases) as run:
            done = len(run.done)
    seconds = time.process_time() - began
    per_question = 1000 * seconds / questions
    print(f"\nReopened with {done} finished cases: {per_question:.3f} ms per question, {memory_mib():.0f} MiB.")


if __name__ == "__main__":
    main()
