"""Measure questions/s of the full pipeline: `python -m benchmarks.evaluation.speed [--cases 16] [--plain_cases 4]`.

The benchmark runs echo-tiny on drawn parts of 448 x 448 pixels, with three references and five questions per case. The
methods take turns and must give the same greedy answers:

- `question by question` calls `generate` from transformers and runs all experts again for every question.
- `case by case` also calls `generate`, but runs the experts before the decision only once per case.
- `engine` is a complete run of this project.
- `ideal` repeats the engine's forward passes on tensors built in advance.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from transformers import DynamicCache

from echo_ft.data.dataset import load_cases, load_dataset
from echo_ft.experts.pipeline import Outcome, PipelineConfig, run_cases
from echo_ft.inference.engine import Engine
from echo_ft.inference.run_folder import RunFolder
from echo_ft.model.adapters import attach_adapters
from echo_ft.model.loading import load_model, load_processor
from echo_ft.model.rows import RowBuilder
from echo_ft.records import LETTERS, ROLES, Branch, Case, Exchange, Generation

METHODS = ("question by question", "case by case", "engine", "ideal")
SIDE = 448
"""Height and width of an image in pixels."""

QUESTIONS = 5
"""Questions per case."""

MODEL = "recipes/tiny/echo-tiny"
MAX_NEW_TOKENS = 64
"""Maximum number of tokens per output, as in recipes/tiny/run.yaml."""


def draw_cases(folder: Path, count: int) -> tuple[Path, list[Case]]:
    """Build a dataset of demo parts in `folder`; returns the image root and `count` cases with five questions each."""
    command = [sys.executable, "-m", "data_prep.build", "--config", "recipes/tiny/data.yaml", "--output", str(folder)]
    command += ["--parts", str(max(8, 2 * count)), "--fractions", "0.4", "0.1", "0.5"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    dataset = load_dataset(folder)
    for path in dataset.root.glob("images/**/*.png"):
        Image.open(path).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)
    cases = [case for case in load_cases(dataset, "test") if len(case.seen.questions) == QUESTIONS]
    # Spread the cases over all products, so that some of them share references.
    return dataset.root, [cases[index * len(cases) // count] for index in range(count)]


@dataclass(frozen=True)
class Plain:
    """Plain transformers: one `generate` call per question."""

    model: Any
    processor: Any
    root: Path
    max_new_tokens: int

    def generate(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        """Generate for every branch of every exchange, one after another."""
        if exchanges and hasattr(self.model, "peft_config"):
            self.model.set_adapter(role)
        return [[self.generate_one(exchange, branch) for branch in exchange.branches] for exchange in exchanges]

    @torch.inference_mode()
    def generate_one(self, exchange: Exchange, branch: Branch) -> Generation:
        """Generate the output for one prompt."""
        content = [{"type": "image"}] * len(exchange.images)
        content.append({"type": "text", "text": exchange.context + branch.prompt})
        chat = [{"role": "user", "content": content}]
        prompt = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        images = [Image.open(self.root / image).convert("RGB") for image in exchange.images]
        inputs = self.processor(text=[prompt], images=images, return_tensors="pt")
        out = self.model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokenizer = self.processor.tokenizer
        text = tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        logprobs = torch.log_softmax(out.logits[0][0].float(), dim=-1)
        letters = {letter: float(logprobs[tokenizer.convert_tokens_to_ids(letter)]) for letter in LETTERS}
        return Generation(text.strip(), letters)


def split_by_question(cases: Sequence[Case]) -> list[Case]:
    """Return one case per question, as in the method's published code, which handles questions one by one."""
    return [
        replace(case, seen=replace(case.seen, questions=(question,)))
        for case in cases
        for question in case.seen.questions
    ]


Event = tuple[str, Any]


@contextmanager
def recorded(base: Any) -> Iterator[list[Event]]:
    """Record the forward passes of the model in this block, and each selection of cache entries between two passes."""
    events: list[Event] = []
    select_indices = DynamicCache.batch_select_indices

    def recording(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            empty_cache = name == "language" and kwargs["past_key_values"].get_seq_length() == 0
            events.append(("prefix" if empty_cache else name, (args, kwargs)))
            return function(*args, **kwargs)

        return call

    def select(cache: DynamicCache, indices: torch.Tensor) -> None:
        select_indices(cache, indices)
        layers: list[Any] = cache.layers  # transformers annotates several layer types, but this model has only one
        events.append(("cache", [(layer.keys, layer.values) for layer in layers]))

    with (
        patch.object(DynamicCache, "batch_select_indices", select),
        patch.object(base.model, "get_image_features", recording("vision", base.model.get_image_features)),
        patch.object(base.model, "forward", recording("language", base.model.forward)),
        patch.object(base.lm_head, "forward", recording("head", base.lm_head.forward)),
    ):
        yield events


@torch.inference_mode()
def replay(base: Any, events: Sequence[Event]) -> float:
    """Repeat the recorded forward passes; returns their duration in seconds."""
    cache = DynamicCache(config=base.config.get_text_config())
    began = time.perf_counter()
    for name, recorded in events:
        if name == "cache":
            layers: list[Any] = cache.layers
            for layer, (keys, values) in zip(layers, recorded, strict=True):
                layer.keys, layer.values = keys, values
            continue
        args, kwargs = recorded
        if name == "vision":
            base.model.get_image_features(*args, **kwargs)
        elif name == "head":
            base.lm_head(*args, **kwargs)
        else:
            if name == "prefix":
                cache = DynamicCache(config=base.config.get_text_config())
            base.model(*args, **{**kwargs, "past_key_values": cache})
    return time.perf_counter() - began


@dataclass
class Ideal:
    """Run the engine, then repeat its forward passes on the recorded tensors. Only the repetition is timed."""

    engine: Engine
    seconds: float = 0.0

    def generate(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        """Return the engine's outputs, timing the forward passes that produce them."""
        with recorded(self.engine.base) as events:
            outputs = self.engine.generate(role, exchanges)
        # The first of these passes allocates memory and is slower.
        self.seconds += min(replay(self.engine.base, events) for _ in range(2))
        return outputs


def answers(outcomes: Sequence[Outcome]) -> dict[str, tuple[str, Mapping[str, float] | None]]:
    """Return the decision for each question id: its text and option probabilities."""
    return {one.question: (one.text, one.probabilities) for outcome in outcomes for one in outcome.predictions}


def require_same_answers(
    found: Mapping[str, tuple[str, Mapping[str, float] | None]],
    expected: Mapping[str, tuple[str, Mapping[str, float] | None]],
) -> float:
    """Return the largest difference between two probabilities of an option. Exits if two answers differ."""
    largest = 0.0
    for question, (text, probabilities) in found.items():
        expected_text, expected_probabilities = expected[question]
        if text != expected_text:
            raise SystemExit(f"{question}: found {text!r}, expected {expected_text!r}")
        if probabilities and expected_probabilities:
            largest = max(largest, *(abs(p - expected_probabilities[letter]) for letter, p in probabilities.items()))
    return largest


def measure(options: argparse.Namespace, folder: Path) -> tuple[dict[str, list[float]], float]:
    """Measure the methods in turn; returns questions/s per method and the largest difference of a probability."""
    root, cases = draw_cases(folder / "data", options.cases)
    row_builder = RowBuilder(load_processor(MODEL, None, SIDE * SIDE, SIDE * SIDE))
    model = load_model(MODEL, None, "float32").eval()
    if options.adapters:
        model = attach_adapters(model, {role: options.adapters / role for role in ROLES}).eval()
    plain, plain_cases = Plain(model, row_builder.processor, root, MAX_NEW_TOKENS), cases[: options.plain_cases]

    def engine() -> Engine:
        return Engine(model, row_builder, root, MAX_NEW_TOKENS)

    def whole_run(number: int) -> list[Outcome]:
        """Repeat the loop of evaluation/run.py."""
        outcomes = []
        with RunFolder(folder / f"run_{number}", {}, cases) as run:
            run_engine = engine()
            for batch in run.batches(options.batch_size):
                for case, outcome in zip(batch, run_cases(batch, run_engine.generate, PipelineConfig()), strict=True):
                    run.write(case, outcome)
                    outcomes.append(outcome)
            run.finish()
        return outcomes

    run_cases(cases[:1], engine().generate, PipelineConfig())  # the first pass of a process is slower
    rates: dict[str, list[float]] = {method: [] for method in METHODS}
    largest = 0.0
    for number in range(options.runs):
        began = time.perf_counter()
        found = answers(whole_run(number))
        rates["engine"].append(len(found) / (time.perf_counter() - began))
        ideal = Ideal(engine())
        for start in range(0, len(cases), options.batch_size):
            run_cases(cases[start : start + options.batch_size], ideal.generate, PipelineConfig())
        rates["ideal"].append(len(found) / ideal.seconds)
        for method, inputs in zip(METHODS[:2], (split_by_question(plain_cases), plain_cases), strict=True):
            began = time.perf_counter()
            outcomes = [run_cases([case], plain.generate, PipelineConfig())[0] for case in inputs]
            expected = answers(outcomes)
            rates[method].append(len(expected) / (time.perf_counter() - began))
            largest = max(largest, require_same_answers(expected, found))
        latest = ", ".join(f"{method} {values[-1]:.2f}" for method, values in rates.items())
        print(f"run {number + 1}, questions/s: {latest}", file=sys.stderr, flush=True)
    return rates, largest


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=16, help="Cases for the engine and the ideal.")
    parser.add_argument("--plain_cases", type=int, default=4, help="How many of them to run with plain transformers.")
    parser.add_argument("--batch_size", type=int, default=16, help="Cases per batch, as in recipes/tiny/run.yaml.")
    parser.add_argument("--runs", type=int, default=3, help="Runs per method.")
    parser.add_argument("--adapters", type=Path, help="A folder with one adapter per role; none for the base model.")
    options = parser.parse_args()
    if not 1 <= options.plain_cases <= options.cases:
        parser.error("--plain_cases must be between 1 and --cases")
    with tempfile.TemporaryDirectory() as name:
        rates, largest = measure(options, Path(name))
    print(table(rates))
    print(f"\nAll methods give the same answers. Option probabilities differ by at most {largest:.1e}.")


def table(rates: Mapping[str, Sequence[float]]) -> str:
    """Return one line per method: medians over runs (lowest to highest)."""
    medians = {method: statistics.median(values) for method, values in rates.items()}
    lines = ["| method | questions/s | relative to question by question | fraction of ideal |", "|---|---|---|---|"]
    for method, values in rates.items():
        fraction = f"{medians[method] / medians['ideal']:.2f}" if method == "engine" else ""
        lines.append(
            f"| {method} | {medians[method]:.2f} ({min(values):.2f} to {max(values):.2f}) "
            f"| {medians[method] / medians['question by question']:.1f} | {fraction} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
