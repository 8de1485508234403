"""Questions a second, side by side: `python -m benchmarks.training [--runs 3] [--steps 16] [--questions 5]`.

Every contender trains the same model on the same cases in the same order, ten questions a step, in a process of its
own, in turns. The first steps of each process are left out; ratios are of medians over runs. LLaMA-Factory and ms-swift
take part where the Python of an environment that has them is given.

On a GPU, at the true sizes:

    python -m benchmarks.training --gpu --model Qwen/Qwen2-VL-2B-Instruct --rows 20

Weights are random then, which changes neither speed nor memory, and the text is in echo-tiny's tokens, whose tokenizer
needs no download. Operations are counted on what has to be computed, each different image and token once, for all
contenders alike: useful work over the GPU's peak is the MFU.
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

from benchmarks.training.workload import MODEL, Workload
from echo_ft.training.flops import peak

CONTENDERS = (
    ("trl", "all"), ("llamafactory", "all"), ("ms-swift", "all"),
    ("echo-ft", "all"), ("echo-ft", "kept"), ("ideal", "all"), ("ideal", "kept"),
)  # fmt: skip
NEIGHBOURS = ("trl", "llamafactory", "ms-swift")
WARM = 3
"""Steps of a process that are not counted, and with kept features its first epoch."""


def measure(command: Sequence[str], name: str, kept: str, folder: Path, workload: Workload) -> dict[str, Any]:
    """One run of one contender: questions/s at steady state, first losses, work of a step and peak memory."""
    count = workload.steps + (workload.steps_an_epoch if kept == "kept" else WARM)
    described = json.dumps(asdict(replace(workload, steps=count)))
    caches = {"HF_HOME": str(folder / "hf"), "MODELSCOPE_CACHE": str(folder / "modelscope"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, name, str(folder), described, kept],
        capture_output=True, text=True, check=False, env=os.environ | caches,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    found["rate"] = workload.rows / statistics.median(found["seconds"][-workload.steps :])
    return found


def random_model(name: str, folder: Path) -> str:
    """A Qwen2-VL of that size with random weights in bfloat16 and echo-tiny's tokenizer; returns its folder.

    `name` is a published model's, or a folder with a config.json.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from echo_ft.model.architectures import model_config

    config, tiny = model_config(name), AutoConfig.from_pretrained(MODEL)
    for token in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, token, getattr(tiny, token))
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(MODEL).save_pretrained(folder)
    return str(folder)


def table(results: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]], rows: int) -> str:
    """One line a contender of `rows` questions a step, medians over its runs; device, precision and versions."""
    rates = {contender: statistics.median(found["rate"] for found in runs) for contender, runs in results.items()}
    best = max(rate for (name, _), rate in rates.items() if name in NEIGHBOURS)
    lines = [
        "| contender | features | questions/s | against the best neighbour | first losses "
        "| patches, tokens, labels a step | peak MiB | useful TFLOP/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, kept), runs in results.items():
        rate, low, high = rates[name, kept], min(found["rate"] for found in runs), max(found["rate"] for found in runs)
        losses = ", ".join(f"{loss:.4f}" for loss in runs[0]["losses"][:2])
        memory = statistics.median(found["peak_mib"] for found in runs)
        useful = rate / rows * results["echo-ft", kept][0]["operations"]
        most = peak(runs[0]["device"])
        share = f" (MFU {useful / most:.3f})" if most else ""
        lines.append(
            f"| {name} | {'kept' if kept == 'kept' else 'computed'} | {rate:.1f} ({low:.1f} to {high:.1f}) "
            f"| {rate / best:.2f} | {losses} "
            f"| {runs[0]['patches']}, {runs[0]['tokens']}, {runs[0]['labels']} | {memory:.0f} "
            f"| {useful / 1e12:.3g}{share} |"
        )
    first = results["echo-ft", "all"][0]
    lines.append(f"\n{first['device']}, {first['precision']}")
    for (name, _), runs in results.items():
        if name in NEIGHBOURS:
            found = ", ".join(f"{package} {number}" for package, number in runs[0]["versions"].items())
            lines.append(f"\n{name}: {found}")
    return "\n".join(lines)


def main() -> None:
    """Measure all in turns and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--questions", type=int, default=5, help="of a case")
    parser.add_argument("--rows", type=int, default=10, help="questions of a step")
    parser.add_argument("--side", type=int, default=448, help="of a photograph, in pixels")
    parser.add_argument("--model", default=MODEL, help="echo-tiny, or a config for random weights: see above")
    parser.add_argument("--gpu", action="store_true", help="train on a GPU, in bfloat16")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches, for every contender")
    parser.add_argument("--llamafactory", metavar="PYTHON", help="the Python of an environment with LLaMA-Factory")
    parser.add_argument("--ms_swift", metavar="PYTHON", help="the Python of an environment with ms-swift")
    options = parser.parse_args()
    if options.rows % options.questions:
        parser.error(f"--questions {options.questions} does not divide the {options.rows} questions of a step")
    if options.cases % (options.rows // options.questions):
        parser.error(f"--cases {options.cases} is not a multiple of the {options.rows // options.questions} of a step")
    if not options.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        parser.error("--gpu: torch finds no GPU here; leave it out, or see to torch.cuda.is_available()")
    own, neighbour = "benchmarks.training.contender", "benchmarks.training.neighbours"
    commands = {name: [sys.executable, "-m", own] for name in ("trl", "echo-ft", "ideal")}
    for name, python in (("llamafactory", options.llamafactory), ("ms-swift", options.ms_swift)):
        if python:
            commands[name] = [python, "-m", neighbour]
    results: dict[tuple[str, str], list[dict[str, Any]]] = {
        (name, kept): [] for name, kept in CONTENDERS if name in commands
    }
    with tempfile.TemporaryDirectory() as folder:
        model = options.model if options.model == MODEL else random_model(options.model, Path(folder) / "model")
        workload = Workload(
            options.cases, options.questions, options.steps, options.workers, model, options.rows, options.side
        )
        for run in range(options.runs):
            for name, kept in results:
                found = measure(commands[name], name, kept, Path(folder), workload)
                results[name, kept].append(found)
                print(f"run {run + 1}: {name}, {kept}: {found['rate']:.1f} questions/s", file=sys.stderr, flush=True)
    print(table(results, options.rows))


if __name__ == "__main__":
    main()
