"""Measure the engine for each value of adapt_from: `python -m benchmarks.evaluation.late_adapters [--cases 16]`.

The workload is that of benchmarks/evaluation/speed.py: the full pipeline on drawn parts of 448 x 448 pixels, with three
references and five questions per case. All four roles have LoRA adapters of all language layers with small random
weights, the same for every value of adapt_from. The values take turns. Their answers must equal those of plain
transformers, which runs one question at a time and switches the adapter on only where it acts.

Rates are per second of CPU time, on one thread, so they do not depend on what else the machine does. The value also
changes the output and its length. With `--max_new_tokens 1`, the work is equal.

The vision tower of echo-tiny does most of its work, so what adapters do after it hardly shows. At real layer widths,
with random float32 weights:

    python -m benchmarks.evaluation.late_adapters --widths 2b --layers 2 --cases 1 --plain_cases 0 --max_new_tokens 1

With `--references 1`, all roles see the same images. With `--stored`, the image features stay in memory from one run to
the next, as those of an ablation do.

`--count` runs nothing and counts the engine's operations at full model size, on the meta device, as if every generated
text were one sentence.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import DynamicCache

from benchmarks.evaluation.speed import (
    MAX_NEW_TOKENS,
    MODEL,
    SIDE,
    answers,
    draw_cases,
    require_same_answers,
)
from benchmarks.training.__main__ import WIDTHS, random_model, with_spread
from benchmarks.training.workload import SENTENCE, TARGETS
from echo_ft.data.dataset import load_dataset
from echo_ft.experts.pipeline import PipelineConfig, run_cases
from echo_ft.experts.roles import render
from echo_ft.inference.engine import Engine
from echo_ft.model.adapters import attach_adapters, make_card, write_card
from echo_ft.model.architectures import meta_model
from echo_ft.model.loading import load_model, load_processor
from echo_ft.model.rows import ADAPT_FROM, RowBuilder
from echo_ft.model.vision import ImageFeatureCache
from echo_ft.records import LETTERS, ROLES, Branch, Case, Exchange, Generation, Upstream
from echo_ft.training.costs.flops import WorkCounts, image_work, repeated_work, text_work, unit_costs

SCALE = 0.02
"""Standard deviation of the adapters' output weights: enough to change the output, too little to make it nonsense."""


def with_shared_weights(model: Any) -> Any:
    """Return a copy of `model` with the same weights in memory, so that PEFT can change its layers."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def write_adapters(folder: Path, data: Path, row_builder: RowBuilder, start: str, base: Any) -> dict[str, Path]:
    """Write a random adapter of the model `base` per role that acts from `start` on; returns their folders."""
    lora = LoraConfig(r=8, target_modules=r".*language_model.*\.(" + "|".join(TARGETS) + ")", task_type="CAUSAL_LM")
    for seed, role in enumerate(ROLES):
        torch.manual_seed(seed)
        tuned = get_peft_model(with_shared_weights(base), lora)
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=SCALE)
        tuned.save_pretrained(str(folder / role))
        tokens = row_builder.generation_prompt if start == "answer" else ()
        card = make_card(
            role,
            base.name_or_path,
            None,
            SIDE**2,
            SIDE**2,
            load_dataset(data),
            adapt_from=start,
            invocation_tokens=tokens,
        )
        write_card(folder / role, card)
    return {role: folder / role for role in ROLES}


@dataclass(frozen=True)
class PlainLate:
    """Plain transformers: one question at a time, without padding. The adapter is off before it acts."""

    model: Any
    """The model with the adapters of all roles."""
    row_builder: RowBuilder
    root: Path
    start: str
    max_new_tokens: int

    def generate(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        """Generate for every branch of every exchange, one after another."""
        self.model.set_adapter(role)
        return [[self.generate_one(exchange, branch) for branch in exchange.branches] for exchange in exchanges]

    @torch.inference_mode()
    def generate_one(self, exchange: Exchange, branch: Branch) -> Generation:
        """Generate the output for one prompt."""
        row = self.row_builder.load_row(replace(exchange, branches=(branch,)), self.root)
        ids, positions = torch.from_numpy(row.input_ids)[None], torch.from_numpy(row.positions)[:, None]
        images = [Image.open(self.root / image).convert("RGB") for image in exchange.images]
        whole = {
            "input_ids": ids,
            "position_ids": positions,
            "mm_token_type_ids": (ids == self.row_builder.image_token_id).int(),
        }
        pixels = self.row_builder.image_processor(images=images, return_tensors="pt")
        cache = DynamicCache(config=self.model.config.get_text_config())
        own = len(self.row_builder.generation_prompt)
        first = {"prefix": 0, "branch": row.prefix_length, "answer": ids.shape[1] - own}[self.start]
        step: dict[str, Any] = whole | dict(pixels)
        if first:
            before = {name: tensor[..., :first] for name, tensor in whole.items()}
            with self.model.disable_adapter():
                self.model(**before, **pixels, past_key_values=cache, use_cache=True, logits_to_keep=1)
            step = {name: tensor[..., first:] for name, tensor in whole.items()}
        found: list[int] = []
        letters: dict[str, float] = {}
        tokenizer, position = self.row_builder.tokenizer, positions.max()
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        while len(found) < self.max_new_tokens:
            logits = self.model(**step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].float()
            scores = torch.log_softmax(logits, dim=-1)
            letters = letters or {one: float(scores[tokenizer.convert_tokens_to_ids(one)]) for one in LETTERS}
            token = int(logits.argmax())
            if token in ends:
                break
            found.append(token)
            step = {"input_ids": torch.tensor([[token]]), "position_ids": (position + len(found)).expand(3, 1, 1)}
        return Generation(tokenizer.decode(found, skip_special_tokens=True).strip(), letters)


def measure(options: argparse.Namespace, folder: Path) -> tuple[dict[str, list[float]], float]:
    """Measure the values of adapt_from in turn; returns their rates and the largest difference of a probability."""
    root, drawn = draw_cases(folder / "data", options.cases)
    cases = [with_references(case, options.references) for case in drawn]
    name = random_model(WIDTHS[options.widths], folder / "model", options.layers) if options.widths else MODEL
    row_builder = RowBuilder(load_processor(name, None, SIDE * SIDE, SIDE * SIDE))
    base, models = load_model(name, None, "float32"), {}
    for start in ADAPT_FROM:
        adapters = write_adapters(folder / start, folder / "data", row_builder, start, base)
        models[start] = attach_adapters(with_shared_weights(base), adapters)
    features = ImageFeatureCache(2**30 if options.stored else 0)
    rates: dict[str, list[float]] = {start: [] for start in ADAPT_FROM}
    largest = 0.0
    for number in range(options.runs + 1):
        for start, model in models.items():
            engine = Engine(model, row_builder, root, options.max_new_tokens, features=features)
            began = time.process_time()
            found = answers(
                [
                    outcome
                    for first in range(0, len(cases), options.batch_size)
                    for outcome in run_cases(
                        cases[first : first + options.batch_size], engine.generate, PipelineConfig()
                    )
                ]
            )
            if number:  # the first pass of a process is slower and not counted
                rates[start].append(len(found) / (time.process_time() - began))
                print(
                    f"run {number}: {start}: {rates[start][-1]:.2f} questions per CPU second",
                    file=sys.stderr,
                    flush=True,
                )
                continue
            plain = PlainLate(model, row_builder, root, start, options.max_new_tokens)
            outcomes = [run_cases([case], plain.generate, PipelineConfig())[0] for case in cases[: options.plain_cases]]
            largest = max(largest, require_same_answers(answers(outcomes), found))
    return rates, largest


@dataclass(frozen=True)
class EngineWork:
    """Operations of the engine for some cases, by part."""

    images: float
    looks: float
    """Tokens up to the last image, where adapters act after the prefix."""
    repeats: float
    """The same tokens again for every further exchange, where adapters act everywhere."""
    rest: float
    """Other prompt tokens, and generated ones."""


def with_references(case: Case, most: int) -> Case:
    """Return a case with at most this number of references."""
    return replace(case, seen=replace(case.seen, references=case.seen.references[:most]))


def spoken_exchanges(case: Case) -> list[Exchange]:
    """The exchanges of all roles about a case, as if each role said one sentence, or one letter if it chooses."""
    reasons = {question.id: SENTENCE for question in case.seen.questions}
    upstream = Upstream(best=0, normal=SENTENCE, guide=SENTENCE, reasons=reasons)

    def spoken(exchange: Exchange, branch: Branch) -> Branch:
        chooses = exchange.role == "decision_maker" or branch.id == "best"
        return replace(branch, completion="A" if chooses else SENTENCE)

    exchanges = [one for role in ROLES for one in render(role, case.id, case.seen, upstream)]
    return [replace(one, branches=tuple(spoken(one, branch) for branch in one.branches)) for one in exchanges]


def count_operations(name: str, root: Path, cases: Sequence[Case]) -> EngineWork:
    """Count the operations for `cases`. `name` is a published model or a folder with a config.json."""
    model = meta_model(name)
    processor = load_processor(MODEL, None, SIDE**2, SIDE**2)
    vision, reader = model.config.vision_config, processor.image_processor
    reader.patch_size, reader.merge_size = vision.patch_size, vision.spatial_merge_size
    row_builder, costs = RowBuilder(processor), unit_costs(model.requires_grad_(False))

    def forward(work: WorkCounts) -> float:
        plain = replace(work, base_tokens=work.tokens, base_pairs=work.pairs, labels=0)
        return costs.flops(plain) + costs.label / 2 * work.labels  # half of it is the backward pass

    images, repeated, text = WorkCounts(), WorkCounts(), WorkCounts()
    looks = 0.0
    for case in cases:
        rows = [row_builder.load_row(exchange, root) for exchange in spoken_exchanges(case)]
        grids = {name: grid for row in rows for name, grid in zip(row.exchange.images, row.grids.tolist(), strict=True)}
        images += image_work(grids.values())
        text += text_work(rows)
        for seen, count in Counter(row.exchange.images for row in rows).items():
            look = next(row_builder.look_length(row) for row in rows if row.exchange.images == seen)
            repeated += repeated_work(look, count - 1)
            looks -= forward(repeated_work(look, 1))
    repeats = -forward(repeated)
    return EngineWork(costs.flops(images), looks, repeats, forward(text) - looks - repeats)


def _rounded(value: float) -> str:
    """Return three digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,g}" if value < 1000 else f"{float(f'{value:.3g}'):,.0f}"


def count_table(counts: Mapping[str, EngineWork]) -> str:
    """One line per model: GFLOP by part, and how many times fewer without the repeats."""
    lines = [
        "| model | images | to the last image | the same again | other tokens | times fewer | with stored features |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, work in counts.items():
        parts = " | ".join(_rounded(part / 1e9) for part in (work.images, work.looks, work.repeats, work.rest))
        text = work.looks + work.rest
        computed, stored = ((late + work.repeats) / late for late in (work.images + text, text))
        lines.append(f"| {name} | {parts} | {computed:.2f} | {stored:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=16, help="Cases per run.")
    parser.add_argument("--plain_cases", type=int, default=4, help="How many of them to run with plain transformers.")
    parser.add_argument("--batch_size", type=int, default=16, help="Cases per batch, as in recipes/tiny/run.yaml.")
    parser.add_argument("--runs", type=int, default=3, help="Runs per value of adapt_from.")
    parser.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="Maximum tokens per output.")
    parser.add_argument("--references", type=int, default=3, help="References per case, at most 3.")
    parser.add_argument("--stored", action="store_true", help="Keep image features from one run to the next.")
    parser.add_argument("--widths", choices=list(WIDTHS), help="Random weights at this model's widths, not echo-tiny.")
    parser.add_argument(
        "--layers", type=int, help="Number of layers in the language model and the vision tower, with --widths."
    )
    parser.add_argument("--count", action="store_true", help="Count the operations at full size instead.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.layers is not None and not options.widths:
        parser.error(f"--layers {options.layers} needs random weights; add --widths")
    if not 0 <= options.plain_cases <= options.cases:
        parser.error("--plain_cases must be between 0 and --cases")
    with tempfile.TemporaryDirectory() as name:
        if options.count:
            root, cases = draw_cases(Path(name) / "data", options.cases)
            models = {"echo-tiny": MODEL, **{f"Qwen2-VL {size.upper()}": model for size, model in WIDTHS.items()}}
            counts = {
                f"{size}, references: {most}": count_operations(
                    model, root, [with_references(case, most) for case in cases]
                )
                for most in (3, 1)
                for size, model in models.items()
            }
            print(count_table(counts))
            return
        rates, largest = measure(options, Path(name))
    print(table(rates))
    if options.plain_cases:
        print(f"\nPlain transformers gives the same answers. Option probabilities differ by at most {largest:.1e}.")


def table(rates: Mapping[str, Sequence[float]]) -> str:
    """Return one line per value of adapt_from. Ratios compare medians; their spread compares runs that took turns."""
    prefix = statistics.median(rates["prefix"])
    lines = ["| adapt_from | questions per CPU second | times as fast as prefix |", "|---|---|---|"]
    for start, values in rates.items():
        ratios = [own / first for own, first in zip(values, rates["prefix"], strict=True)]
        median = statistics.median(values)
        lines.append(f"| {start} | {with_spread(median, values)} | {with_spread(median / prefix, ratios)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
