"""Questions a second of the four experts: `python -m benchmarks.evaluation.speed [--cases 16] [--plain_cases 4]`.

Drawn parts of 448 x 448 pixels, three references and five questions each, on echo-tiny. In turns: this project's engine
with all that a run does, transformers alone with one `generate` a question, and the engine's own forward passes, with
the same tensors, which are there already. The greedy answers of all must be the same.
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

SIDE = 448
QUESTIONS = 5
MODEL = "recipes/tiny/echo-tiny"
MOST_WORDS = 64
"""Tokens that an expert may say: recipes/tiny/run.yaml."""


def draw_cases(folder: Path, count: int) -> tuple[Path, list[Case]]:
    """Build a dataset of the demo's parts in `folder`; returns the images' root and cases of five questions."""
    built = [sys.executable, "-m", "data_prep.build", "--config", "recipes/tiny/data.yaml", "--output", str(folder)]
    built += ["--parts", str(max(8, 2 * count)), "--fractions", "0.4", "0.1", "0.5"]
    subprocess.run(built, check=True, stdout=subprocess.DEVNULL)
    dataset = load_dataset(folder)
    for path in dataset.root.glob("images/**/*.png"):
        Image.open(path).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)
    cases = [case for case in load_cases(dataset, "test") if len(case.seen.questions) == QUESTIONS]
    # From all products alike, and so with references that some of them share.
    return dataset.root, [cases[index * len(cases) // count] for index in range(count)]


@dataclass(frozen=True)
class Plain:
    """Transformers alone: one question, one `generate`."""

    model: Any
    processor: Any
    root: Path
    max_new_tokens: int

    def generate(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        """Every branch of every exchange, one after another."""
        if exchanges and hasattr(self.model, "peft_config"):
            self.model.set_adapter(role)
        return [[self.ask(exchange, branch) for branch in exchange.branches] for exchange in exchanges]

    @torch.inference_mode()
    def ask(self, exchange: Exchange, branch: Branch) -> Generation:
        """What the model says to one prompt."""
        content = [{"type": "image"}] * len(exchange.images)
        content.append({"type": "text", "text": exchange.context + branch.prompt})
        chat = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        images = [Image.open(self.root / image).convert("RGB") for image in exchange.images]
        inputs = self.processor(text=[text], images=images, return_tensors="pt")
        out = self.model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokenizer = self.processor.tokenizer
        said = tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        scores = torch.log_softmax(out.logits[0][0].float(), dim=-1)
        return Generation(said.strip(), {one: float(scores[tokenizer.convert_tokens_to_ids(one)]) for one in LETTERS})


def alone(cases: Sequence[Case]) -> list[Case]:
    """Cases of one question each: the shape of the method's published code, which goes from question to question."""
    return [
        replace(case, seen=replace(case.seen, questions=(question,)))
        for case in cases
        for question in case.seen.questions
    ]


Event = tuple[str, Any]


@contextmanager
def recorded(base: Any) -> Iterator[list[Event]]:
    """The forward passes of the model made in this block, and what the cache was made into between two of them."""
    events: list[Event] = []
    keep = DynamicCache.batch_select_indices

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            fresh = name == "language" and kwargs["past_key_values"].get_seq_length() == 0
            events.append(("prefix" if fresh else name, (args, kwargs)))
            return function(*args, **kwargs)

        return call

    def select(cache: DynamicCache, indices: torch.Tensor) -> None:
        keep(cache, indices)
        layers: list[Any] = cache.layers  # of the annotated kinds this model has one
        events.append(("cache", [(layer.keys, layer.values) for layer in layers]))

    with (
        patch.object(DynamicCache, "batch_select_indices", select),
        patch.object(base.model, "get_image_features", noting("vision", base.model.get_image_features)),
        patch.object(base.model, "forward", noting("language", base.model.forward)),
        patch.object(base.lm_head, "forward", noting("head", base.lm_head.forward)),
    ):
        yield events


@torch.inference_mode()
def again(base: Any, events: Sequence[Event]) -> float:
    """Seconds that the recorded forward passes take."""
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
    """An engine whose forward passes are run again on their own tensors; only these are timed."""

    engine: Engine
    seconds: float = 0.0

    def generate(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        """What the engine says."""
        with recorded(self.engine.base) as events:
            said = self.engine.generate(role, exchanges)
        self.seconds += min(again(self.engine.base, events) for _ in range(2))  # the first time, memory is new
        return said


def answers(outcomes: Sequence[Outcome]) -> dict[str, tuple[str, Mapping[str, float] | None]]:
    """Question id to what was decided."""
    return {one.question: (one.text, one.probabilities) for outcome in outcomes for one in outcome.predictions}


def require_the_same(
    found: Mapping[str, tuple[str, Mapping[str, float] | None]],
    expected: Mapping[str, tuple[str, Mapping[str, float] | None]],
) -> float:
    """The largest difference between two probabilities of an option. Exits where two answers differ."""
    largest = 0.0
    for question, (text, probabilities) in found.items():
        other, theirs = expected[question]
        if text != other:
            raise SystemExit(f"{question}: {text!r} here, {other!r} there")
        if probabilities and theirs:
            largest = max(largest, *(abs(probabilities[letter] - theirs[letter]) for letter in probabilities))
    return largest


def main() -> None:
    """Measure in turns and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=16, help="of the engine and its ideal")
    parser.add_argument("--plain_cases", type=int, default=4, help="of these, that are asked one question at a time")
    parser.add_argument("--batch_size", type=int, default=16, help="cases together: recipes/tiny/run.yaml")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--adapters", type=Path, help="a folder with an adapter a role; absent: the base model")
    options = parser.parse_args()
    if not 1 <= options.plain_cases <= options.cases:
        parser.error("--plain_cases takes 1 to --cases")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root, cases = draw_cases(folder / "data", options.cases)
        row_builder = RowBuilder(load_processor(MODEL, None, SIDE * SIDE, SIDE * SIDE))
        model = load_model(MODEL, None, "float32").eval()
        if options.adapters:
            model = attach_adapters(model, {role: options.adapters / role for role in ROLES}).eval()
        plain, some = Plain(model, row_builder.processor, root, MOST_WORDS), cases[: options.plain_cases]

        def engine() -> Engine:
            return Engine(model, row_builder, root, MOST_WORDS)

        def whole_run(number: int) -> list[Outcome]:
            """The loop of evaluation/run.py."""
            said = []
            with RunFolder(folder / f"run_{number}", {}, cases) as run:
                asking = engine()
                for batch in run.batches(options.batch_size):
                    for case, outcome in zip(batch, run_cases(batch, asking.generate, PipelineConfig()), strict=True):
                        run.write(case, outcome)
                        said.append(outcome)
                run.finish()
            return said

        run_cases(cases[:1], engine().generate, PipelineConfig())  # the first pass of a process is slower
        rates: dict[str, list[float]] = {way: [] for way in ("question by question", "case by case", "engine", "ideal")}
        largest = 0.0
        for number in range(options.runs):
            began = time.perf_counter()
            found = answers(whole_run(number))
            rates["engine"].append(len(found) / (time.perf_counter() - began))
            ideal = Ideal(engine())
            for start in range(0, len(cases), options.batch_size):
                run_cases(cases[start : start + options.batch_size], ideal.generate, PipelineConfig())
            rates["ideal"].append(len(found) / ideal.seconds)
            for way, asked in (("question by question", alone(some)), ("case by case", some)):
                began = time.perf_counter()
                expected = answers(
                    [outcome for case in asked for outcome in run_cases([case], plain.generate, PipelineConfig())]
                )
                rates[way].append(len(expected) / (time.perf_counter() - began))
                largest = max(largest, require_the_same(expected, found))
            told = ", ".join(f"{way} {found[-1]:.2f}" for way, found in rates.items())
            print(f"run {number + 1}, questions/s: {told}", file=sys.stderr, flush=True)
    print(table(rates))
    print(f"\nThe same answers; the largest difference between two probabilities of an option is {largest:.1e}.")


def table(rates: Mapping[str, Sequence[float]]) -> str:
    """One line a way, medians over runs (lowest to highest)."""
    middle = {way: statistics.median(found) for way, found in rates.items()}
    lines = ["| way | questions/s | against question by question | of its ideal |", "|---|---|---|---|"]
    for way, found in rates.items():
        share = f"{middle[way] / middle['ideal']:.2f}" if way == "engine" else ""
        lines.append(
            f"| {way} | {middle[way]:.2f} ({min(found):.2f} to {max(found):.2f}) "
            f"| {middle[way] / middle['question by question']:.1f} | {share} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
