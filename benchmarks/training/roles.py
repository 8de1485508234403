"""Compare methods to train all four roles: `python -m benchmarks.training.roles`.

A case has two images and five questions. The reference extractor and the knowledge guide answer once per case, the
others once per question. For each value of adapt_from, four runs train one role each, with this project's trainer and
computed image features. With `role: all`, one run trains all roles. With `--trl`, TRL's stock trainer also trains each
role. The methods take turns, role by role, each in its own process.

A step's time is the CPU time of its process, on one thread, so it depends little on what else the machine does. That of
four runs is the sum of the roles' medians, and their first loss the sum of the roles' losses in the first step. The
peak is the highest of their processes.

At real layer widths, with random float32 weights, and without the separate runs of late adapters:

    python -m benchmarks.training.roles --widths 2b --layers 2 --together --cases_per_step 1 --steps 2

`--count` trains nothing and counts the operations of a step at full model size, on the meta device.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import get_peft_model

from benchmarks.training.__main__ import WIDTHS, measure, random_model, with_spread
from benchmarks.training.contender import lora
from benchmarks.training.workload import MODEL, Workload, make_cases
from echo_ft.model.architectures import meta_model
from echo_ft.model.loading import load_processor
from echo_ft.model.rows import ADAPT_FROM, RowBuilder
from echo_ft.records import ROLES
from echo_ft.training.config import ALL_ROLES
from echo_ft.training.costs.flops import WorkCounts, image_work, repeated_work, text_work, unit_costs

TOGETHER = {f"{start}, role: all": start for start in ADAPT_FROM if start != "prefix"}
"""Ways that train all roles in one run, and their adapt_from."""


@dataclass(frozen=True)
class Training:
    """What training all roles took with one method."""

    seconds: float
    """CPU time of a step of each role, together."""
    peak_mib: float
    operations: float
    """Operations of a step of each role, together: forward and backward, each distinct image and token once. 0 for
    TRL, which does not count them."""
    first_loss: float
    """Losses of all roles in the first step, together. They are equal if the methods train the same tokens."""


def measure_roles(
    folder: Path, workload: Workload, trl: bool = False, separate: Sequence[str] = ADAPT_FROM
) -> dict[str, Training]:
    """Train the roles one after another, with the methods in turn, and then together.

    `separate` has the values of adapt_from with which each role is trained in its own run.
    """
    command = [sys.executable, "-m", "benchmarks.training.contender"]
    ways = [("trl", "trl", "prefix")] if trl else []
    ways += [(start, "echo-ft", start) for start in separate]
    runs = [(way, name, role, start) for role in ROLES for way, name, start in ways]
    runs += [(way, "echo-ft", ALL_ROLES, start) for way, start in TOGETHER.items()]
    found: dict[str, Training] = {}
    for way, name, role, start in runs:
        run = measure(command, name, "computed", folder, replace(workload, role=role, adapt_from=start))
        seconds = statistics.median(run["cpu_seconds"][-workload.steps :])
        before = found.get(way, Training(0.0, 0.0, 0.0, 0.0))
        found[way] = Training(
            before.seconds + seconds,
            max(before.peak_mib, run["peak_mib"]),
            before.operations + run.get("operations", 0.0),
            before.first_loss + run["losses"][0],
        )
        print(f"{role}, {way}: {seconds:.3f} s, {run['peak_mib']:.0f} MiB", file=sys.stderr, flush=True)
    return found


def table(results: Mapping[str, Sequence[Training]]) -> str:
    """One line per method. Ratios compare medians; their spread compares runs that took turns."""
    medians = {start: statistics.median(run.seconds for run in runs) for start, runs in results.items()}
    lines = [
        "| method | CPU s per step of all roles | times as fast as prefix | first loss | TFLOP | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for start, runs in results.items():
        ratios = [first.seconds / own.seconds for first, own in zip(results["prefix"], runs, strict=True)]
        operations = runs[0].operations
        lines.append(
            f"| {start} | {with_spread(medians[start], [run.seconds for run in runs])} "
            f"| {with_spread(medians['prefix'] / medians[start], ratios)} "
            f"| {runs[0].first_loss:.3f} | {f'{operations / 1e12:.3f}' if operations else ''} "
            f"| {max(run.peak_mib for run in runs):.0f} |"
        )
    return "\n".join(lines)


def count_operations(name: str, workload: Workload, folder: Path) -> dict[str, tuple[float, float]]:
    """Count the operations in a step of all roles for each method, with computed and with stored image features.

    `name` is the name of a published model or a folder with a config.json.
    """
    model = meta_model(name)
    processor = load_processor(MODEL, None, workload.pixels, workload.pixels)
    vision, reader = model.config.vision_config, processor.image_processor
    reader.patch_size, reader.merge_size = vision.patch_size, vision.spatial_merge_size
    row_builder = RowBuilder(processor)
    core: Any = get_peft_model(model, lora()).get_base_model()
    costs = unit_costs(core)
    cases = [
        [row_builder.load_row(exchange, folder) for exchange in case]
        for case in make_cases(folder, replace(workload, role=ALL_ROLES))
    ]
    rows = [row for case in cases for row in case]
    found = {}
    for way, start in {**{start: start for start in ADAPT_FROM}, **TOGETHER}.items():
        text = text_work(rows, [row_builder.adapted_tokens(row, start) for row in rows])
        seen = rows
        if way in TOGETHER:  # all rows of a case see the same images
            seen = [case[0] for case in cases]
            text += sum((repeated_work(row_builder.look_length(row), len(ROLES) - 1) for row in seen), WorkCounts())
        images = image_work(grid for row in seen for grid in row.grids.tolist())
        found[way] = costs.flops(text + images), costs.flops(text)
    return found


def count_table(counts: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """One line per model and method: TFLOP, and how many times fewer than those of prefix."""
    lines = [
        "| model | adapt_from | TFLOP, features computed | times fewer | TFLOP, features stored | times fewer |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in counts.items():
        for start, each in found.items():
            cells = (f"{own / 1e12:.3g} | {first / own:.2f}" for own, first in zip(each, found["prefix"], strict=True))
            lines.append(f"| {name} | {start} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure or count, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1, help="Runs per combination of role and method.")
    parser.add_argument("--steps", type=int, default=10, help="Steps that count in each run.")
    parser.add_argument("--cases_per_step", type=int, default=2, help="Cases per step.")
    parser.add_argument("--widths", choices=list(WIDTHS), help="Random weights at this model's widths, not echo-tiny.")
    parser.add_argument(
        "--layers", type=int, help="Number of layers in the language model and the vision tower, with --widths."
    )
    parser.add_argument("--trl", action="store_true", help="Also train each role with TRL's stock trainer.")
    parser.add_argument("--together", action="store_true", help="Use branch and answer only with `role: all`.")
    parser.add_argument("--count", action="store_true", help="Count the operations at full size instead.")
    options = parser.parse_args()
    if options.layers is not None and not options.widths:
        parser.error(f"--layers {options.layers} needs random weights; add --widths")
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    questions, cases = 5, 10 * options.cases_per_step
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.count:
            counted = Workload(options.cases_per_step, questions, 1, rows=questions * options.cases_per_step)
            models = {"echo-tiny": MODEL, **{f"Qwen2-VL {size.upper()}": model for size, model in WIDTHS.items()}}
            counts = {name: count_operations(model, counted, folder) for name, model in models.items()}
            print(count_table(counts))
            return
        model = random_model(WIDTHS[options.widths], folder / "model", options.layers) if options.widths else MODEL
        workload = Workload(cases, questions, options.steps, model=model, rows=questions * options.cases_per_step)
        results: dict[str, list[Training]] = {}
        separate = ADAPT_FROM[:1] if options.together else ADAPT_FROM
        for _ in range(options.runs):
            for way, found in measure_roles(folder, workload, options.trl, separate).items():
                results.setdefault(way, []).append(found)
    print(table(results))


if __name__ == "__main__":
    main()
