"""Run and compare many variants from one YAML file: `python -m evaluation.ablate --config FILE`.

The file contains the options of evaluation.run, which all cells share, and `cells`. Each cell has a name and sets only
the options that differ; it is compared with the cell `baseline`. A name with options in braces, such as
`{corruption} {severity}`, stands for one cell for each combination of their values, which are lists. Every cell has an
ordinary run folder under `output`; cells with equal options share one.

Cells share results. The model and the image features stay in memory from one cell to the next. `output/utterances`
caches what the roles generate, so cells with the same prompts share it. Cells added later use the same cache. Rerun the
same command to resume an interrupted ablation. To split the cases of every cell across several processes, launch it
with `python -m train.launch -m evaluation.ablate ...`.

Writes ablation.json, ablation.md and ablation.html to `output`, and prints the table.
"""

from __future__ import annotations

import gc
import itertools
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_ft import config as configs
from echo_ft.errors import EchoError
from echo_ft.files import write_json
from echo_ft.inference.generation_cache import GenerationCache
from echo_ft.inference.run_folder import failure_reasons, is_finished
from echo_ft.inputs import read_json_object
from echo_ft.processes import join_processes
from echo_ft.provenance import fingerprint_bytes
from echo_ft.records import ROLES
from echo_ft.terminal import LOGGER
from evaluation import ablation_table
from evaluation.config import RunConfig, answer_options, answer_tokens
from evaluation.run import PreparedRun, load_run_model, make_engine, prepare_run, provenance, run_remaining

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from echo_ft.inference.engine import Engine
    from echo_ft.model.adapters import Adapter
    from echo_ft.model.vision import ImageFeatureCache

CACHE_FOLDER = "utterances"
"""Folder under `output` with the cached generations. If you delete it, they are computed again."""

SECONDS = "seconds.json"
"""File under `output`: {name of a run folder: seconds that this command spent on the run before it finished}."""

_IN_BRACES = re.compile(r"\{(\w+)\}")

PROMPT_KEYS = (
    "split", "routing", "reference", "references", "knowledge", "reasoning", "answer", "option_order", "adapters",
)  # fmt: skip
"""Provenance keys that a role's cache key omits, because they only choose its prompts or are already in it per role."""


@dataclass(frozen=True)
class AblationConfig:
    """Options of `python -m evaluation.ablate` in addition to those of evaluation.run. `output` holds all runs."""

    baseline: str = field(metadata={"help": "Cell that all others are compared with."})
    cells: dict[str, Any] = field(
        metadata={"help": "Name of each cell and the options in which it differs. Set them in the YAML file."}
    )
    features_gib: float = field(
        default=1.0, metadata={"help": "GiB of memory for image features kept between cells, in addition to the model."}
    )


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    name: str
    differs: dict[str, Any]
    """The cell's options that differ from the shared ones."""
    config: RunConfig
    """All options of the cell; `output` is its run folder."""


def main(argv: list[str]) -> int:
    """Check all cells, run the unfinished ones, and write the table. Returns the exit status."""
    shared, ablation = configs.parse([RunConfig, AblationConfig], argv)
    if ablation.features_gib < 0:
        raise EchoError(f"features_gib is {ablation.features_gib:g}; set it to 0 or more")
    cells = read_cells(shared, ablation)
    runs = order_runs(cells)
    output = Path(shared.output)
    output.mkdir(parents=True, exist_ok=True)
    state = join_processes()
    engines, seconds = EngineFactory(ablation.features_gib), read_seconds(output)
    for place, config in enumerate(runs, start=1):
        if state.is_main_process:
            names = ", ".join(cell.name for cell in cells if cell.config.output == config.output)
            print(f"\n{place} of {len(runs)}: {names} -> {config.output}", flush=True)
        start, was_finished = time.monotonic(), is_finished(Path(config.output))
        try:
            run_cell(prepare_run(config), state, engines, output / CACHE_FOLDER)
        finally:
            if state.is_main_process and not was_finished:
                name = Path(config.output).name
                seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start
                write_json(output / SECONDS, seconds)
    failed: list[str] = []
    if state.is_main_process:
        failed = [reason for config in runs for reason in failure_reasons(Path(config.output))]
        rows = [(cell.name, cell.differs, Path(cell.config.output)) for cell in cells]
        table = ablation_table.build_table(rows, ablation.baseline, seconds)
        ablation_table.write(output, table)
        for warning in table["warnings"]:
            LOGGER.warning(warning)
        print(f"\n{ablation_table.text(table)}\n\nwrote ablation.json, ablation.md, ablation.html to {output}")
        if failed:
            LOGGER.warning(
                f"{len(failed)} predictions failed (first: {failed[0]}); rerun the same command to retry them"
            )
    state.destroy_process_group()
    return configs.PARTLY_DONE if failed else 0


def read_cells(shared: RunConfig, ablation: AblationConfig) -> list[Cell]:
    """Return the cells, each with all its options and its run folder. Cells with equal options share a folder.

    Raises EchoError for an unknown option, an invalid value, and a baseline that is not a cell.
    """
    cells, folders = [], dict[str, str]()
    for name, changes in expand_cells(ablation.cells):
        if "output" in changes:
            raise EchoError(f"cell {name}: its output is always a folder under {shared.output}; remove output")
        (config,) = configs.build([RunConfig], {**asdict(shared), **changes}, f"cell {name}")
        sources = {"dataset": config.dataset, "adapters": config.adapters, "server": config.server}
        options = {**answer_options(config), **sources}
        fingerprint = fingerprint_bytes(json.dumps(options, sort_keys=True).encode())[:8]
        folder = folders.setdefault(fingerprint, _folder(Path(shared.output), name, fingerprint))
        differs = {option: getattr(config, option) for option in changes}
        cells.append(Cell(name, differs, replace(config, output=folder)))
    if ablation.baseline not in (cell.name for cell in cells):
        names = ", ".join(cell.name for cell in cells)
        raise EchoError(f"baseline is {ablation.baseline!r}, which is not a cell; choose from {names}")
    return cells


def expand_cells(cells: Mapping[Any, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the changed options of each cell, with one cell for each combination of options in braces.

    Raises EchoError for changes that are not a mapping, for an option in braces without a list of values, and for two
    cells of one name.
    """
    names = set[str]()
    for pattern, changes in ((str(name), {} if given is None else given) for name, given in cells.items()):
        if not isinstance(changes, dict):
            raise EchoError(
                f"cell {pattern}: {changes!r} is not a mapping; list the options in which it differs, or write {{}}"
            )
        options = dict.fromkeys(_IN_BRACES.findall(pattern))
        for option in options:
            if not isinstance(changes.get(option), list):
                raise EchoError(f"cell {pattern}: give a list of values for {option}, or remove {{{option}}}")
        for values in itertools.product(*(changes[option] for option in options)):
            chosen, name = dict(zip(options, values, strict=True)), pattern
            for option, value in chosen.items():
                name = name.replace(f"{{{option}}}", str(value))
            if name in names:
                raise EchoError(f"cell {pattern}: there is already a cell {name}; rename one of them")
            names.add(name)
            yield name, {**changes, **chosen}


def _folder(output: Path, name: str, fingerprint: str) -> str:
    """Return the existing folder of a run, even if its cell has been renamed, or a new one named after the cell."""
    found = sorted(output.glob(f"*-{fingerprint}"))
    return str(found[0] if found else output / f"{re.sub(r'[^a-zA-Z0-9.]+', '_', name).strip('_')}-{fingerprint}")


def order_runs(cells: Sequence[Cell]) -> list[RunConfig]:
    """Return the distinct runs of the cells, grouped by model, starting with the run of the first cell.

    Raises EchoError with the name of the cell if one of the runs cannot start.
    """
    distinct: dict[str, Cell] = {}
    for cell in cells:
        distinct.setdefault(cell.config.output, cell)
    models: dict[str, list[RunConfig]] = {}
    for cell in distinct.values():
        try:
            adapters = prepare_run(
                cell.config
            ).adapters  # load the inputs again later, so that memory holds only those of one run
        except EchoError as error:
            raise EchoError(f"cell {cell.name}: {error}") from error
        models.setdefault(_model_key(cell.config, adapters), []).append(cell.config)
    return [config for runs in models.values() for config in runs]


def _model_key(config: RunConfig, adapters: Mapping[str, Adapter]) -> str:
    """Return a key that is equal for runs that can share a model in memory and its image features."""
    names = ("model_name_or_path", "model_revision", "dtype", "attn_implementation", "min_pixels", "max_pixels")
    fingerprints = {role: adapter.fingerprint for role, adapter in adapters.items()}
    return json.dumps([*(getattr(config, name) for name in names), fingerprints])


def run_cell(prepared: PreparedRun, state: PartialState, engines: EngineFactory, cache_folder: Path) -> None:
    """Run the unfinished cases of one cell, generating only what no cell has cached."""
    config = prepared.config
    required = provenance(config, prepared.dataset, prepared.adapters)
    shared = {name: value for name, value in required.items() if name not in PROMPT_KEYS}
    identities = {
        role: {
            **shared,
            "server": config.server,
            "adapter": prepared.adapters[role].fingerprint if role in prepared.adapters else None,
            "answer_tokens": answer_tokens(config, prepared.cases) if role == "decision_maker" else None,
        }
        for role in ROLES
    }
    run_remaining(prepared, state, engines, GenerationCache(cache_folder, identities, state.process_index))


class EngineFactory:
    """Makes the engine of each run, and keeps the model and its image features if the next run has the same model."""

    def __init__(self, features_gib: float) -> None:
        self.features_gib = features_gib
        self._loaded: tuple[str, Any, ImageFeatureCache] | None = None

    def __call__(self, prepared: PreparedRun, device: torch.device) -> Engine:
        """Return the engine of a run, with its model on a GPU if `device` is one."""
        import torch

        from echo_ft.model.vision import ImageFeatureCache

        key = _model_key(prepared.config, prepared.adapters)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # drop the model first, because two models may not fit into memory
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            self._loaded = key, load_run_model(prepared, device), ImageFeatureCache(int(self.features_gib * 2**30))
        _, model, features = self._loaded
        return make_engine(prepared, model, features=features)


def read_seconds(output: Path) -> dict[str, float]:
    """Return the seconds that earlier commands spent on each run."""
    path = output / SECONDS
    return read_json_object(path) if path.is_file() else {}


if __name__ == "__main__":
    configs.run_main(main, "rerun the same command to resume")
