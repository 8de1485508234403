"""Compare training speed with other trainers: `python -m benchmarks.training [--runs 3] [--steps 16]`.

All implementations train the same model on the same cases in the same order, ten questions per step. Each runs in its
own process, and they alternate. The first steps of each process are not counted. Ratios compare medians over runs.
LLaMA-Factory and ms-swift are included if you pass the Python interpreters of their environments.

On a GPU, at real model size:

    python -m benchmarks.training --gpu --model Qwen/Qwen2-VL-2B-Instruct --rows 20

This uses random weights, which affects neither speed nor memory use. The text is tokenized by echo-tiny's tokenizer,
which needs no download. The operations are the same for all implementations. Only necessary work counts, and each
distinct image and token counts once. The MFU divides this useful work by the peak of the GPU.

At real layer widths, on a CPU:

    python -m benchmarks.training --widths 2b --layers 2

This compares only TRL's trainer and this project's, in float32. The implementations alternate after every step, and
each step counts as one run. `trl-labels` is TRL with logits only at the labels, as on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.turns import take_turns
from benchmarks.training.workload import MODEL, Workload
from echo_ft.training.costs.flops import device_peak_flops

CONTENDERS = (
    ("trl", "computed"), ("llamafactory", "computed"), ("ms-swift", "computed"),
    ("echo-ft", "computed"), ("echo-ft", "stored"), ("ideal", "computed"), ("ideal", "stored"),
)  # fmt: skip
AT_TRUE_WIDTHS = (("trl", "computed"), ("trl-labels", "computed"), ("echo-ft", "computed"), ("echo-ft", "stored"))
"""The implementations compared with --widths."""
OTHER_TRAINERS = ("trl", "trl-labels", "llamafactory", "ms-swift")
WIDTHS = {"2b": "Qwen/Qwen2-VL-2B-Instruct", "7b": "Qwen/Qwen2-VL-7B-Instruct"}
FEW_STEPS = {"cases": 2, "rows": 5, "steps": 8}
"""Defaults with --widths, where a step takes a minute."""
WARM_UP_STEPS = 3
"""First steps of a process that are not counted. With stored features, the first epoch is not counted either."""


def measure(command: Sequence[str], name: str, features: str, folder: Path, workload: Workload) -> dict[str, Any]:
    """Run one implementation once: questions/s at steady state, first losses, work per step and peak memory.

    If it fails, this exits with the end of its output.
    """
    count = workload.steps + (workload.steps_per_epoch if features == "stored" else WARM_UP_STEPS)
    described = json.dumps(asdict(replace(workload, steps=count)))
    caches = {"HF_HOME": str(folder / "hf"), "MODELSCOPE_CACHE": str(folder / "modelscope"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, name, str(folder), described, features],
        capture_output=True, text=True, check=False, env=os.environ | caches,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    found["rate"] = workload.rows / statistics.median(found["seconds"][-workload.steps :])
    return found


def measure_in_turns(folder: Path, workload: Workload) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Measure AT_TRUE_WIDTHS step by step in turns. The first epoch is not counted, so that features can be stored."""
    steps = workload.steps_per_epoch + workload.steps
    described = json.dumps(asdict(replace(workload, steps=steps, turns=True)))
    commands = {
        (name, features): [
            sys.executable,
            "-m",
            "benchmarks.training.contender",
            name,
            str(folder),
            described,
            features,
        ]
        for name, features in AT_TRUE_WIDTHS
    }
    return take_turns(commands, steps, workload.steps, workload.rows, folder)


def random_model(name: str, folder: Path, layers: int | None = None) -> str:
    """Save a Qwen2-VL of that size with random bfloat16 weights and echo-tiny's tokenizer; returns its folder.

    `name` is the name of a published model or a folder with a config.json. `layers` is the number of layers of the
    language model and of the vision tower; default: those of the model.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from echo_ft.model.architectures import model_config

    config, tiny = model_config(name), AutoConfig.from_pretrained(MODEL, trust_remote_code=False)
    for token in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, token, getattr(tiny, token))
    if layers is not None:
        config.text_config.num_hidden_layers = config.vision_config.depth = layers
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    torch.manual_seed(0)
    # On the CPU, because this process would keep memory of the GPU while others are measured there.
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(MODEL, trust_remote_code=False)
    for reader in (processor.image_processor, processor.video_processor):
        reader.patch_size, reader.merge_size = config.vision_config.patch_size, config.vision_config.spatial_merge_size
    processor.save_pretrained(folder)
    return str(folder)


def table(results: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]], rows: int) -> str:
    """Return one line per implementation: medians over its runs of `rows` questions per step; then device and versions.

    Ratios compare medians. The lowest and highest ratios compare runs that took turns with each other.
    """
    rates = {contender: statistics.median(found["rate"] for found in runs) for contender, runs in results.items()}
    best = max((contender for contender in rates if contender[0] in OTHER_TRAINERS), key=rates.__getitem__)
    digits = 1 if min(rates.values()) >= 1 else 3
    lines = [
        "| implementation | features | questions/s | relative to the best other trainer | first losses "
        "| patches, tokens, labels per step | peak MiB | useful TFLOP/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, features), runs in results.items():
        rate = rates[name, features]
        each = [found["rate"] for found in runs]
        ratios = [own / found["rate"] for own, found in zip(each, results[best], strict=True)]
        losses = ", ".join(f"{loss:.4f}" for loss in runs[0]["losses"][:2])
        memory = statistics.median(found["peak_mib"] for found in runs)
        useful = rate / rows * results["echo-ft", features][0]["operations"]
        peak_flops = device_peak_flops(runs[0]["device"])
        mfu = f" (MFU {useful / peak_flops:.3f})" if peak_flops else ""
        lines.append(
            f"| {name} | {features} | {with_spread(rate, each, digits)} "
            f"| {with_spread(rate / rates[best], ratios)} | {losses} "
            f"| {runs[0]['patches']}, {runs[0]['tokens']}, {runs[0]['labels']} | {memory:.0f} "
            f"| {useful / 1e12:.3g}{mfu} |"
        )
    first = results["echo-ft", "computed"][0]
    lines.append(f"\n{first['device']}, {first['precision']}")
    for (name, _), runs in results.items():
        if name in OTHER_TRAINERS:
            found = ", ".join(f"{package} {number}" for package, number in runs[0]["versions"].items())
            lines.append(f"\n{name}: {found}")
    return "\n".join(lines)


def with_spread(value: float, runs: Sequence[float], digits: int = 2) -> str:
    """Format `value`, with the lowest and highest value of its runs if there are several."""
    spread = f" ({min(runs):.{digits}f} to {max(runs):.{digits}f})" if len(runs) > 1 else ""
    return f"{value:.{digits}f}{spread}"


def parse_options() -> argparse.Namespace:
    """Parse and check the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="Runs per implementation.")
    parser.add_argument("--steps", type=int, default=16, help="Steps that count in each run.")
    parser.add_argument("--cases", type=int, default=20, help="Cases per epoch.")
    parser.add_argument("--questions", type=int, default=5, help="Questions per case.")
    parser.add_argument("--rows", type=int, default=10, help="Questions per step.")
    parser.add_argument("--side", type=int, default=448, help="Height and width of an image in pixels.")
    parser.add_argument("--model", default=MODEL, help="echo-tiny, or the model config for random weights.")
    parser.add_argument("--widths", choices=list(WIDTHS), help="Compare with TRL on a CPU at this model's widths.")
    parser.add_argument(
        "--layers",
        type=int,
        help="Number of layers in the language model and the vision tower when weights are random.",
    )
    parser.add_argument("--gpu", action="store_true", help="Train on a GPU in bfloat16.")
    parser.add_argument("--workers", type=int, default=0, help="Loader processes for every implementation.")
    parser.add_argument(
        "--llamafactory", metavar="PYTHON", help="Python interpreter of an environment with LLaMA-Factory."
    )
    parser.add_argument("--ms_swift", metavar="PYTHON", help="Python interpreter of an environment with ms-swift.")
    options = parser.parse_args()
    if options.widths:
        if options.gpu or options.model != MODEL or options.llamafactory or options.ms_swift:
            parser.error("--widths compares only TRL and this project on a CPU; use --model with the other options")
        parser.set_defaults(**FEW_STEPS)
        options = parser.parse_args()
        options.model = WIDTHS[options.widths]
    if options.layers is not None and options.model == MODEL:
        parser.error(f"--layers {options.layers} needs random weights; add --widths or --model")
    if options.rows % options.questions:
        parser.error(f"--questions {options.questions} does not divide the {options.rows} questions per step")
    if options.cases % (options.rows // options.questions):
        per_step = options.rows // options.questions
        parser.error(f"--cases {options.cases} is not a multiple of {per_step}, the number of cases per step")
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch finds no GPU; leave the option out, or make torch.cuda.is_available() true")
    return options


def main() -> None:
    """Measure all implementations in turn and print one table."""
    options = parse_options()
    # The Trainer would split the batch of one process over several GPUs.
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if options.gpu else ""
    )
    with tempfile.TemporaryDirectory() as folder:
        random = options.model != MODEL
        model = random_model(options.model, Path(folder) / "model", options.layers) if random else MODEL
        workload = Workload(
            options.cases, options.questions, options.steps, options.workers, model, options.rows, options.side
        )
        if options.widths:
            results = measure_in_turns(Path(folder), workload)
        else:
            results = measure_runs(Path(folder), workload, options)
    print(table(results, options.rows))


def measure_runs(
    folder: Path, workload: Workload, options: argparse.Namespace
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Measure CONTENDERS run by run in turns."""
    own_module, other_module = "benchmarks.training.contender", "benchmarks.training.other_trainers"
    commands = {name: [sys.executable, "-m", own_module] for name in ("trl", "echo-ft", "ideal")}
    for name, python in (("llamafactory", options.llamafactory), ("ms-swift", options.ms_swift)):
        if python:
            commands[name] = [python, "-m", other_module]
    results: dict[tuple[str, str], list[dict[str, Any]]] = {
        (name, features): [] for name, features in CONTENDERS if name in commands
    }
    for run in range(options.runs):
        for name, features in results:
            found = measure(commands[name], name, features, folder, workload)
            results[name, features].append(found)
            print(f"run {run + 1}: {name}, {features}: {found['rate']:.1f} questions/s", file=sys.stderr, flush=True)
    return results


if __name__ == "__main__":
    main()
