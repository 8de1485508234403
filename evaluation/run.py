"""Run the four experts over a dataset: `python -m evaluation.run --config FILE [--adapters DIR] [--output DIR]`.

Writes predictions.jsonl, traces.jsonl and run.json as it goes; started again with the same options it goes on. Several
processes or GPUs share the cases: `accelerate launch -m evaluation.run ...`; each writes a shard in the run's folder.
Without `adapters` the untuned base model runs the same pipeline with the same prompts: the baseline. With `--server`
the models are not loaded here: a server that speaks OpenAI's chat protocol is asked.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from echo_ft import config as configs
from echo_ft.data.dataset import DIGESTS, Dataset, load_cases, load_dataset, require_unchanged
from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import Generate, Outcome, run_cases_async, run_or_fail
from echo_ft.experts.roles import PROMPT_VERSION
from echo_ft.inference.run_folder import Processes, RunFolder, failure_reasons
from echo_ft.inference.server import Server
from echo_ft.model.adapters import Adapter, attach_adapters, find_adapters, tuned_base
from echo_ft.model.loading import base_fingerprint, load_model, load_processor
from echo_ft.model.rows import RowBuilder
from echo_ft.model.training_overlap import BASE_MODEL, describe_training_data
from echo_ft.processes import join_processes
from echo_ft.provenance import (
    ANSWERING_MODULES,
    ANSWERING_PACKAGES,
    SUPPORTING_MODULES,
    code_fingerprint,
    commit,
    source_files,
    versions,
)
from echo_ft.records import Case
from echo_ft.terminal import LOGGER
from evaluation.config import (
    RunConfig,
    answer_tokens,
    answering,
    check_config,
    corruption,
    pipeline_settings,
    server_model,
)

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from echo_ft.inference.engine import Engine
    from echo_ft.inference.generation_cache import GenerationCache
    from echo_ft.model.rows import RowBuilder


@dataclass(frozen=True)
class Prepared:
    """A run with all that it reads, checked."""

    config: RunConfig
    dataset: Dataset
    adapters: dict[str, Adapter]
    cases: list[Case]
    row_builder: RowBuilder
    noted: dict[str, Any]
    """What run.json tells beside what must be the same for the run to go on; the `warnings` among it."""

    @property
    def adapter_paths(self) -> dict[str, Path]:
        """The adapters' folders, by role."""
        return {role: adapter.path for role, adapter in self.adapters.items()}


def main(argv: list[str]) -> None:
    """Check everything that must agree, then run what is not done yet."""
    (config,) = configs.parse([RunConfig], argv)
    prepared = prepare_run(config)
    state = join_processes()
    if state.is_main_process:
        for warning in prepared.noted["warnings"]:
            LOGGER.warning(warning)
    carry_out(prepared, state)
    if state.is_main_process:
        failed = failure_reasons(Path(config.output))
        told = [f"done: {config.output}", f"score it with `python -m evaluation.score {config.output}`"]
        if failed:
            told.insert(1, f"{len(failed)} predictions failed (the first: {failed[0]}), the same command asks again")
        print("; ".join(told))
    state.destroy_process_group()


def inputs(config: RunConfig) -> tuple[Dataset, dict[str, Adapter]]:
    """The dataset and the adapters of a run. Raises EchoError for options that cannot be run with them."""

    check_config(config)
    dataset = load_dataset(Path(config.dataset))
    if config.references is not None and not 1 <= config.references <= dataset.manifest["config"]["k"]:
        raise EchoError(
            f"references is {config.references}, and {config.dataset} was built with k "
            f"{dataset.manifest['config']['k']}; choose a number from 1 to that, or build it with a larger --k"
        )
    if config.adapters is None:
        return dataset, {}
    base = config.model_name_or_path
    weights = None if config.server else base_fingerprint(base, config.model_revision)  # a server's need not be here
    return dataset, find_adapters(Path(config.adapters), base, weights, config.min_pixels, config.max_pixels)


def prepare_run(config: RunConfig) -> Prepared:
    """Everything that a run reads. Raises EchoError where it does not agree."""

    dataset, adapters = inputs(config)
    cases = load_cases(dataset, config.split, config.reference, config.references)
    if not cases:
        raise EchoError(f"{config.dataset} has no case in the split {config.split}; see its manifest.json")
    images = list(dict.fromkeys(case.seen.query for case in cases))
    whole = tuned_base(config.model_name_or_path, config.min_pixels, config.max_pixels)
    tuned = adapters | ({BASE_MODEL: whole} if whole else {})
    training, warnings = describe_training_data(tuned, dataset, config.split, images)
    trained_for = {one.card.routing for one in tuned.values()} - {config.routing}
    if trained_for:
        trained = ", ".join(sorted(trained_for))
        remedy = f"; add --routing {trained}" if len(trained_for) == 1 else ""
        warnings.append(
            f"adapters or weights trained on routing {trained} run under {config.routing}: some prompts are unlike "
            f"those they were trained on{remedy}"
        )
    if not (dataset.folder / DIGESTS).is_file():
        warnings.append(
            f"{config.dataset} was built by an older version: nobody can tell whether its images are still those that "
            "it was built from; build it again"
        )
    noted = {
        "adapters_folder": config.adapters,
        "server": config.server,
        "trained_on": training,
        "warnings": warnings,
        "other_versions": {name: version for name, version in versions().items() if name not in ANSWERING_PACKAGES},
        "commit": commit(),
    }
    row_builder = load_row_builder(
        config.model_name_or_path, config.model_revision, config.min_pixels, config.max_pixels
    )
    return Prepared(config, dataset, adapters, cases, row_builder, noted)


@cache
def load_row_builder(model_name_or_path: str, revision: str | None, min_pixels: int, max_pixels: int) -> RowBuilder:
    """The layout of prompts with the model's processor; runs of one model share it."""

    return RowBuilder(load_processor(model_name_or_path, revision, min_pixels, max_pixels))


def carry_out(
    prepared: Prepared,
    state: PartialState,
    engine_of: Callable[[Prepared, torch.device], Engine] | None = None,
    generations: GenerationCache | None = None,
) -> None:
    """Run what is not done yet of one run, in each of its processes.

    An ablation gives `engine_of`, which may return one that has been in use, and the `utterances` that it keeps.
    """

    config, cases = prepared.config, prepared.cases
    processes = Processes(state.process_index, state.num_processes, waiting(state))
    described = provenance(config, prepared.dataset, prepared.adapters)
    with RunFolder(Path(config.output), described, cases, prepared.noted, processes) as folder:
        # A server makes its own batches.
        batches = folder.batches(config.batch_size if config.server is None else 1)
        if processes.first:
            done = len(folder.done)
            print(f"{len(cases)} cases of {config.split}, {done} done before, {len(cases) - done} to go", flush=True)
        if batches:
            seen = [case.seen for batch in batches for case in batch]
            shown = [image for one in seen for image in (one.query, *(each.image for each in one.references))]
            require_unchanged(prepared.dataset, shown)
            count = sum(len(batch) for batch in batches)
            part = f", process 1 of {processes.count}" if processes.count > 1 else ""
            with tqdm(total=count, unit="case", desc=f"four experts{part}", disable=not processes.first) as progress:

                def write(case: Case, outcome: Outcome) -> None:
                    folder.write(case, outcome)
                    progress.update()

                if config.server is None:
                    engine = (engine_of or load_engine)(prepared, state.device)
                    run_here(
                        config, batches, generations.wrap(engine.generate) if generations else engine.generate, write
                    )
                else:
                    asyncio.run(ask_server(prepared, [case for (case,) in batches], generations, write))
        folder.finish()


def waiting(state: PartialState) -> Callable[[], None]:
    """What holds a process until all others have come as far."""

    def wait() -> None:
        try:
            state.wait_for_everyone()
        except RuntimeError as error:  # torch's, of a connection that is gone
            raise EchoError(
                "another process of this run stopped, for the reason that it gives; the same command goes on"
            ) from error

    return wait


def provenance(config: RunConfig, dataset: Dataset, adapters: dict[str, Adapter]) -> dict[str, Any]:
    """All that must be the same for a run to go on."""

    # The weights of a server need not be here.
    weights = None if config.server else base_fingerprint(config.model_name_or_path, config.model_revision)
    every = config.references == dataset.manifest["config"]["k"]
    return {
        **answering(replace(config, references=None) if every else config),
        "dataset": config.dataset,
        "dataset_fingerprint": dataset.fingerprint,
        "annotations_fingerprint": dataset.manifest.get("annotations_fingerprint"),
        "images_fingerprint": dataset.manifest.get("images_fingerprint"),
        "base_model": config.model_name_or_path,
        "base_fingerprint": weights,
        "adapters": {role: {"fingerprint": one.fingerprint, **asdict(one.card)} for role, one in adapters.items()},
        "prompt_version": PROMPT_VERSION,
        "versions": {name: version for name, version in versions().items() if name in ANSWERING_PACKAGES},
        # What makes the answers, not what scores them: a stopped run goes on after a change to the latter.
        "code": code_fingerprint(
            *source_files(*ANSWERING_MODULES, without=SUPPORTING_MODULES),
            Path(__file__).resolve(),
            Path(inspect.getfile(RunConfig)).resolve(),
        ),
    }


Write = Callable[[Case, Outcome], None]


def run_here(config: RunConfig, batches: Iterable[Sequence[Case]], generate: Generate, write: Write) -> None:
    """Run the batches of cases through the model in this process."""
    for batch in batches:
        for case, outcome in zip(batch, run_or_fail(batch, generate, pipeline_settings(config)), strict=True):
            write(case, outcome)


def load_engine(prepared: Prepared, device: torch.device) -> Engine:
    """An engine of its own for a run, its model on a GPU if `device` is one."""
    return make_engine(prepared, load_weights(prepared, device))


def load_weights(prepared: Prepared, device: torch.device) -> Any:
    """The base model with the run's adapters."""

    config = prepared.config
    model = load_model(
        config.model_name_or_path,
        config.model_revision,
        config.dtype,
        attn_implementation=config.attn_implementation,
        device_map=str(device) if device.type == "cuda" else None,
    )
    return attach_adapters(model, prepared.adapter_paths)


def make_engine(prepared: Prepared, model: Any, **options: Any) -> Engine:
    """The engine of a run on a model that is loaded; `options` are further ones of Engine's."""
    from echo_ft.inference.engine import Engine

    config = prepared.config
    return Engine(
        model,
        prepared.row_builder,
        prepared.dataset.root,
        config.max_new_tokens,
        answer_tokens=answer_tokens(config),
        corruption=corruption(config),
        max_batch_tokens=config.max_batch_tokens,
        **options,
    )


async def ask_server(
    prepared: Prepared, cases: Sequence[Case], generations: GenerationCache | None, write: Write
) -> None:
    """Run the cases through the models of a server, many requests at once."""

    config = prepared.config
    assert config.server is not None
    async with Server(
        config.server,
        server_model(config),
        prepared.row_builder,
        prepared.dataset.root,
        config.max_new_tokens,
        answer_tokens(config),
        config.batch_size,
        config.server_timeout,
        config.server_patience,
        corruption(config),
    ) as server:
        if not await server.check():
            told = f"{config.server} does not tell the probabilities of tokens"
            if config.answer != "generate":
                raise EchoError(f"{told}; set answer to generate, or serve the model with vLLM")
            LOGGER.warning(f"{told}: the run will have no P(option)")
        generate = generations.wrap_async(server.generate) if generations else server.generate
        await run_cases_async(cases, generate, pipeline_settings(config), config.batch_size, write)


if __name__ == "__main__":
    configs.run_main(main, "the same command goes on where it stopped")
