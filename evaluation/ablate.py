"""Ablations in one command: `python -m evaluation.ablate --config FILE`. One YAML, one table.

The file has the options of evaluation.run, which all cells share, and `cells`: each a name and the options in which it
differs. All are compared with the cell `baseline`. Each has its run in a folder of its own under `output`, as
evaluation.run leaves it; cells of equal settings share one. What one cell has computed no other computes again: the
model and the features of images stay in memory from cell to cell, and what a role said stays in `output/utterances`,
for every cell in which the same role is asked the same. Stopped at any moment, the same command goes on; a cell that is
added later finds what the others left. `accelerate launch -m evaluation.ablate ...` shares the cases of every cell
among processes.

Writes ablation.json, ablation.md and ablation.html to `output`, and prints the table.
"""

from __future__ import annotations

import gc
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_ft import config as configs
from echo_ft.errors import EchoError
from echo_ft.files import write_text
from echo_ft.inference.generation_cache import GenerationCache
from echo_ft.inference.run_folder import is_finished
from echo_ft.provenance import fingerprint_bytes
from echo_ft.records import ROLES
from echo_ft.terminal import LOGGER
from evaluation import ablation_table
from evaluation.config import RunConfig, answer_tokens, answering
from evaluation.run import Prepared, carry_out, join_processes, load_weights, make_engine, prepare_run, provenance

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from echo_ft.inference.engine import Engine, ImageFeatureCache
    from echo_ft.model.adapters import Adapter


UTTERANCES = "utterances"
"""The folder under `output` with what the roles said. It can be deleted at any time: it is computed again."""

SECONDS = "seconds.json"
"""{run's folder: seconds that this command spent on it until it was finished}, under `output`."""

ASKING = ("split", "routing", "reference", "references", "knowledge", "reasoning", "answer", "option_order", "adapters")
"""What a run's provenance tells that decides what a role is asked, or is said of each role apart."""


@dataclass(frozen=True)
class AblationConfig:
    """Options of `python -m evaluation.ablate` beside those of evaluation.run; `output` is the ablation's folder."""

    baseline: str = field(metadata={"help": "The cell that all others are compared with."})
    cells: dict[str, Any] = field(
        metadata={"help": "Each cell's name and the options in which it differs; in the file."}
    )
    features_gib: float = field(
        default=1.0, metadata={"help": "GiB beside the model for the features of images that are kept between cells."}
    )


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    name: str
    differs: dict[str, Any]
    """The options in which it differs from what all share."""
    config: RunConfig
    """All of its options; `output` is its run's folder."""


def main(argv: list[str]) -> None:
    """Check every cell, run what is not done yet, and make the table."""
    shared, ablation = configs.parse([RunConfig, AblationConfig], argv)
    cells = read_cells(shared, ablation)
    runs = in_order(cells)
    output = Path(shared.output)
    output.mkdir(parents=True, exist_ok=True)
    state = join_processes()
    engines, seconds = Engines(ablation.features_gib), read_seconds(output)
    for place, config in enumerate(runs, start=1):
        if state.is_main_process:
            names = ", ".join(cell.name for cell in cells if cell.config.output == config.output)
            print(f"\n{place} of {len(runs)}: {names} -> {config.output}", flush=True)
        clock, nothing_to_ask = time.monotonic(), is_finished(Path(config.output))
        try:
            run_cell(prepare_run(config), state, engines, output / UTTERANCES)
        finally:
            if state.is_main_process and not nothing_to_ask:
                name = Path(config.output).name
                seconds[name] = seconds.get(name, 0.0) + time.monotonic() - clock
                write_text(output / SECONDS, json.dumps(seconds, indent=1) + "\n")
    if state.is_main_process:
        rows = [(cell.name, cell.differs, Path(cell.config.output)) for cell in cells]
        table = ablation_table.tabulate(rows, ablation.baseline, seconds)
        ablation_table.write(output, table)
        for warning in table["warnings"]:
            LOGGER.warning(warning)
        print(f"\n{ablation_table.text(table)}\n\nwrote ablation.json, ablation.md, ablation.html to {output}")
    state.destroy_process_group()


def read_cells(shared: RunConfig, ablation: AblationConfig) -> list[Cell]:
    """The cells, each with all its options and the folder of its run, which is that of a cell with equal ones.

    Raises EchoError for a cell with an option that a run does not have.
    """
    cells, folders = [], dict[str, str]()
    for name, given in ((str(name), given) for name, given in ablation.cells.items()):
        changes = {} if given is None else given
        if not isinstance(changes, dict):
            raise EchoError(f"cell {name}: {changes!r} is no mapping; write the options in which it differs, as {{}}")
        if "output" in changes:
            raise EchoError(f"cell {name}: its output is a folder under {shared.output}; take that line out")
        (config,) = configs.build([RunConfig], {**asdict(shared), **changes}, f"cell {name}")
        beside = {"dataset": config.dataset, "adapters": config.adapters, "server": config.server}
        settings = {**answering(config), **beside}
        fingerprint = fingerprint_bytes(json.dumps(settings, sort_keys=True).encode())[:8]
        folder = folders.setdefault(fingerprint, _folder(Path(shared.output), name, fingerprint))
        differs = {option: getattr(config, option) for option in changes}
        cells.append(Cell(name, differs, replace(config, output=folder)))
    if ablation.baseline not in (cell.name for cell in cells):
        names = ", ".join(cell.name for cell in cells)
        raise EchoError(f"baseline is {ablation.baseline!r}, which is no cell; choose from {names}")
    return cells


def _folder(output: Path, name: str, fingerprint: str) -> str:
    """The folder of a run: the one that is there, whatever name its cell had then, or one named after the cell."""
    found = sorted(output.glob(f"*-{fingerprint}"))
    return str(found[0] if found else output / f"{re.sub(r'[^a-zA-Z0-9.]+', '_', name).strip('_')}-{fingerprint}")


def in_order(cells: Sequence[Cell]) -> list[RunConfig]:
    """The distinct runs of the cells, those of one model together, the first cell's first.

    Raises EchoError, naming the cell, for one that cannot be run: before any is.
    """
    distinct: dict[str, Cell] = {}
    for cell in cells:
        distinct.setdefault(cell.config.output, cell)
    models: dict[str, list[RunConfig]] = {}
    for cell in distinct.values():
        try:
            adapters = prepare_run(cell.config).adapters  # what it reads is read again at its turn, not kept until then
        except EchoError as error:
            raise EchoError(f"cell {cell.name}: {error}") from error
        models.setdefault(_model(cell.config, adapters), []).append(cell.config)
    return [config for runs in models.values() for config in runs]


def _model(config: RunConfig, adapters: Mapping[str, Adapter]) -> str:
    """What two runs must have in common to share a model in memory, and features of images."""
    names = ("model_name_or_path", "model_revision", "dtype", "attn_implementation", "min_pixels", "max_pixels")
    fingerprints = {role: adapter.fingerprint for role, adapter in adapters.items()}
    return json.dumps([*(getattr(config, name) for name in names), fingerprints])


def run_cell(prepared: Prepared, state: PartialState, engines: Engines, folder: Path) -> None:
    """Run what is not done yet of one cell, asking only what no cell has asked before."""

    config = prepared.config
    described = provenance(config, prepared.dataset, prepared.adapters)
    shared = {name: value for name, value in described.items() if name not in ASKING}
    speakers = {
        role: {
            **shared,
            "server": config.server,
            "adapter": prepared.adapters[role].fingerprint if role in prepared.adapters else None,
            "answer_tokens": answer_tokens(config) if role == "decision_maker" else None,
        }
        for role in ROLES
    }
    carry_out(prepared, state, engines, GenerationCache(folder, speakers, state.process_index))


class Engines:
    """Makes a run's engine on the model of the run before, with the features of its images, where it is the same."""

    def __init__(self, features_gib: float) -> None:
        self.features_gib = features_gib
        self._loaded: tuple[str, Any, ImageFeatureCache] | None = None

    def __call__(self, prepared: Prepared, device: torch.device) -> Engine:
        """The engine of a run whose model goes onto a GPU if `device` is one."""
        import torch

        from echo_ft.inference.engine import ImageFeatureCache

        wanted = _model(prepared.config, prepared.adapters)
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = None  # two models may not fit beside each other
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            self._loaded = wanted, load_weights(prepared, device), ImageFeatureCache(int(self.features_gib * 2**30))
        _, model, features = self._loaded
        return make_engine(prepared, model, features=features)


def read_seconds(output: Path) -> dict[str, float]:
    """What earlier commands spent on each run."""
    path = output / SECONDS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


if __name__ == "__main__":
    configs.run_main(main, "the same command goes on where it stopped")
