"""The demo of `make demo`, or the same at a small size: each adapter trains for a few steps. The bundle also has merged
models."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from data_prep.build import main as build
from echo_ft.records import ROLES
from evaluation.run import main as run
from evaluation.score import main as score
from tests.conftest import ECHO_TINY, ROOT
from tests.support.training import run_in_process, tiny_options
from train.export import main as export

BASE = os.path.relpath(ECHO_TINY, ROOT)
"""The base model as the demo's recipes name it, relative to the project's folder."""

FEW_STEPS = [
    "--model_name_or_path", BASE, "--max_steps", 20, "--per_device_train_batch_size", 2, "--warmup_steps", 0,
    "--eval_strategy", "no", "--disable_tqdm", "true",
]  # fmt: skip


@dataclass(frozen=True)
class SmallDemo:
    """The folders of the demo."""

    dataset: Path
    run: Path
    """The run of the tuned pipeline on the test split, by the local engine."""
    bundle: Path

    def run_again(self, output: Path, *options: object) -> None:
        """Run the adapters of the bundle with the demo's options and others."""
        run_demo(self.dataset, self.bundle / "adapters", output, *options)


def run_demo(dataset: Path, adapters: Path, output: Path, *options: object) -> None:
    """Run adapters on the test split with the demo's recipe."""
    given = ["--dataset", dataset, "--adapters", adapters, "--output", output, "--model_name_or_path", BASE, *options]
    assert run(["--config", "recipes/tiny/run.yaml", *map(str, given)]) == 0


def make_small_demo(folder: Path) -> SmallDemo:
    """Make the demo in `folder`, by the steps of `make demo`. The working directory is the project's folder."""
    dataset, adapters = folder / "data", folder / "adapters"
    demo = SmallDemo(dataset, folder / "tuned", folder / "bundle")
    assert build(["--config", "recipes/tiny/data.yaml", "--parts", "12", "--output", str(dataset)]) == 0
    for role in ROLES:
        run_in_process(*tiny_options(role, dataset, adapters / role, *FEW_STEPS))
    run_demo(dataset, adapters, demo.run)
    score([str(demo.run)])
    export_merged(adapters, demo)
    return demo


def take_demo(made: Path, folder: Path) -> SmallDemo:
    """Return the demo that `make demo` left in `made`, such as `runs/demo`, with a bundle in `folder`."""
    dataset = json.loads((made / "tuned" / "run.json").read_text(encoding="utf-8"))["dataset"]
    demo = SmallDemo(Path(dataset), made / "tuned", folder / "bundle")
    export_merged(made / "adapters", demo)
    return demo


def export_merged(adapters: Path, demo: SmallDemo) -> None:
    """Write the bundle of a demo, with the merged models of all roles."""
    parts = ["--adapters", adapters, "--report", demo.run / "report.json", "--output", demo.bundle]
    export([*map(str, parts), "--merge", *ROLES])
