"""Run the four experts over a dataset: `python -m evaluation.run --config FILE [--adapters DIR] [--output DIR]`.

The run folder receives predictions.jsonl, traces.jsonl and run.json, updated after every case. Rerun the same command
to resume an interrupted run. To split the cases across several processes or GPUs, launch it with
`python -m train.launch -m evaluation.run ...`; each process writes a shard in the run folder.

Without `adapters`, the base model runs the same pipeline with the same prompts and serves as the baseline. With
`--server`, an OpenAI-compatible server generates the answers, and this command loads no model weights.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_ft import config as configs
from echo_ft.data.dataset import Dataset, load_cases, load_dataset, read_digests, require_unchanged
from echo_ft.data.splits import UNLABELLED_SPLIT
from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import Generate, Outcome, run_cases_async, run_or_fail
from echo_ft.experts.roles import PROMPT_VERSION
from echo_ft.inference.liveness import check_adapters, local_backend, read_probe, served_backend
from echo_ft.inference.run_folder import Processes, RunFolder, failure_reasons, read_cut_warning
from echo_ft.model.adapters import Adapter, find_adapters, load_to_answer, require_whole_prompt, tuned_base
from echo_ft.model.loading import base_fingerprint, load_processor
from echo_ft.model.rows import RowBuilder
from echo_ft.model.training_overlap import BASE_MODEL, describe_training_data
from echo_ft.processes import join_processes
from echo_ft.provenance import (
    ANSWERING_MODULES,
    SUPPORTING_MODULES,
    code_fingerprint,
    commit,
    source_files,
    split_versions,
)
from echo_ft.records import Case
from echo_ft.terminal import LOGGER, progress
from evaluation.config import (
    BATCH_OPTIONS,
    RunConfig,
    answer_options,
    answer_tokens,
    batch_warnings,
    check_config,
    corruption,
    pipeline_config,
    server_model,
)

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from echo_ft.inference.engine import Engine
    from echo_ft.inference.generation_cache import GenerationCache
    from echo_ft.model.rows import RowBuilder


@dataclass(frozen=True)
class PreparedRun:
    """The checked inputs of a run."""

    config: RunConfig
    dataset: Dataset
    adapters: dict[str, Adapter]
    cases: list[Case]
    row_builder: RowBuilder
    notes: dict[str, Any]
    """Content of run.json that may differ when the run is resumed, such as its `warnings`."""

    @property
    def adapter_paths(self) -> dict[str, Path]:
        """Return the adapter folder of each role."""
        return {role: adapter.path for role, adapter in self.adapters.items()}


def main(argv: list[str]) -> int:
    """Check that all inputs match, then run the cases that are not done yet. Returns the exit status."""
    (config,) = configs.parse([RunConfig], argv)
    prepared = prepare_run(config)
    state = join_processes()
    if state.is_main_process:
        for warning in prepared.notes["warnings"]:
            LOGGER.warning(warning)
    run_remaining(prepared, state)
    failed = failure_reasons(Path(config.output)) if state.is_main_process else []
    if state.is_main_process:
        review = f"review it with `python -m evaluation.export_review {config.output} --format labelstudio`"
        score = f"score it with `python -m evaluation.score {config.output}`"
        print(f"done: {config.output}; {review if config.split == UNLABELLED_SPLIT else score}")
        if failed:
            LOGGER.warning(
                f"{len(failed)} predictions failed (first: {failed[0]}); rerun the same command to retry them"
            )
        cut = read_cut_warning(Path(config.output))
        if cut:
            LOGGER.warning(cut)
    state.destroy_process_group()
    return configs.PARTLY_DONE if failed else 0


def load_inputs(config: RunConfig) -> tuple[Dataset, dict[str, Adapter]]:
    """Load the dataset and find the adapters of a run.

    Raises EchoError for invalid options, a missing dataset or adapter, and adapters that do not fit the base model.
    """
    check_config(config)
    dataset = load_dataset(Path(config.dataset))
    if config.references is not None and not 1 <= config.references <= dataset.manifest["config"].get("k", 0):
        raise EchoError(
            f"references is {config.references}, but {config.dataset} was built with k "
            f"{dataset.manifest['config'].get('k')}; choose a number from 1 to that, or rebuild it with a larger --k"
        )
    if config.adapters is None:
        return dataset, {}
    base = config.model_name_or_path
    weights = None if config.server else base_fingerprint(base, config.model_revision)  # a server has its own weights
    adapters = find_adapters(Path(config.adapters), base, weights, config.min_pixels, config.max_pixels)
    if config.server is not None:
        require_whole_prompt(adapters, "a server")
    return dataset, adapters


def prepare_run(config: RunConfig) -> PreparedRun:
    """Load and check everything that a run reads.

    Raises EchoError as `load_inputs` does, or if the split has no case.
    """
    dataset, adapters = load_inputs(config)
    cases = load_cases(dataset, config.split, config.reference, config.references)
    if not cases:
        raise EchoError(f"{config.dataset} has no case in the split {config.split}; see its manifest.json")
    images = list(dict.fromkeys(case.seen.query for case in cases))
    tuned_model = tuned_base(config.model_name_or_path, config.min_pixels, config.max_pixels)
    tuned = adapters | ({BASE_MODEL: tuned_model} if tuned_model else {})
    training, warnings = describe_training_data(tuned, dataset, config.split, images)
    other_routings = {one.card.routing for one in tuned.values()} - {config.routing}
    if other_routings:
        trained = ", ".join(sorted(other_routings))
        remedy = f"; add --routing {trained}" if len(other_routings) == 1 else ""
        warnings.append(
            f"adapters or weights were trained with routing {trained}, but this run uses {config.routing}, so some "
            f"prompts differ from the training prompts{remedy}"
        )
    if read_digests(dataset) is None:
        warnings.append(
            f"{config.dataset} was built by an older version without image digests, so changed images cannot be "
            "detected; rebuild it"
        )
    warnings += batch_warnings(config)
    notes = {
        "adapters_folder": config.adapters,
        "server": config.server,
        **{name: getattr(config, name) for name in BATCH_OPTIONS if config.server is None},
        "trained_on": training,
        "warnings": warnings,
        "other_versions": split_versions(config.corruption is not None)[1],
        "commit": commit(),
    }
    row_builder = load_row_builder(
        config.model_name_or_path, config.model_revision, config.min_pixels, config.max_pixels
    )
    return PreparedRun(config, dataset, adapters, cases, row_builder, notes)


@cache
def load_row_builder(model_name_or_path: str, revision: str | None, min_pixels: int, max_pixels: int) -> RowBuilder:
    """Load the model's processor and return its row builder. Runs of the same model share the cached one."""
    return RowBuilder(load_processor(model_name_or_path, revision, min_pixels, max_pixels))


def run_remaining(
    prepared: PreparedRun,
    state: PartialState,
    make: Callable[[PreparedRun, torch.device], Engine] | None = None,
    generations: GenerationCache | None = None,
) -> None:
    """Run this process's share of the cases that are not done yet. All processes of a run call this.

    An ablation passes `make`, which may return an engine on a model that is already loaded, and the cache of
    `generations` that its cells share. Raises EchoError if the output folder holds another run, if an image has changed
    since the build, or if the backend fails.
    """
    config, cases = prepared.config, prepared.cases
    processes = Processes(state.process_index, state.num_processes, make_barrier(state))
    required = provenance(config, prepared.dataset, prepared.adapters)
    with RunFolder(Path(config.output), required, cases, prepared.notes, processes) as folder:
        # A server forms its own batches.
        batches = folder.batches(config.batch_size if config.server is None else 1)
        if processes.first:
            done = len(folder.done)
            print(f"split {config.split}: {len(cases)} cases, {done} done, {len(cases) - done} to run", flush=True)
        if batches:
            require_unchanged(prepared.dataset, shown_images(batches))
            count = sum(len(batch) for batch in batches)
            part = f", process 1 of {processes.count}" if processes.count > 1 else ""
            with progress(None, f"four experts{part}", "cases", count, disable=not processes.first) as bar:

                def write(case: Case, outcome: Outcome) -> None:
                    folder.write(case, outcome)
                    bar.update()

                if config.server is None:
                    generate = (make or load_engine)(prepared, state.device).generate
                    run_local(config, batches, generations.wrap(generate) if generations else generate, write)
                else:
                    asyncio.run(run_server(prepared, [case for (case,) in batches], generations, write))
        folder.finish()


def shown_images(batches: Iterable[Sequence[Case]]) -> list[str]:
    """List the query and the references of every case."""
    seen = [case.seen for batch in batches for case in batch]
    return [image for one in seen for image in (one.query, *(reference.image for reference in one.references))]


def make_barrier(state: PartialState) -> Callable[[], None]:
    """Return a function that waits for all other processes. It raises EchoError if one of them has stopped."""

    def wait() -> None:
        try:
            state.wait_for_everyone()
        except RuntimeError as error:  # torch raises this error for a closed connection
            raise EchoError(
                "another process of this run stopped; see its own error message, then rerun the same command to resume"
            ) from error

    return wait


def provenance(config: RunConfig, dataset: Dataset, adapters: dict[str, Adapter]) -> dict[str, Any]:
    """Return the part of run.json that must be equal when a run is resumed."""
    # The weights of a server may be on another machine.
    weights = None if config.server else base_fingerprint(config.model_name_or_path, config.model_revision)
    shows_all = config.references == dataset.manifest["config"].get("k")
    return {
        **answer_options(replace(config, references=None) if shows_all else config),
        "dataset": config.dataset,
        "dataset_fingerprint": dataset.fingerprint,
        "annotations_fingerprint": dataset.manifest.get("annotations_fingerprint"),
        "images_fingerprint": dataset.manifest.get("images_fingerprint"),
        "base_model": config.model_name_or_path,
        "base_fingerprint": weights,
        "adapters": {role: {"fingerprint": one.fingerprint, **asdict(one.card)} for role, one in adapters.items()},
        "prompt_version": PROMPT_VERSION,
        "versions": split_versions(config.corruption is not None)[0],
        # This covers only code that affects answers, so a run can resume after a change to the scoring code.
        "code": code_fingerprint(
            *source_files(*ANSWERING_MODULES, exclude=SUPPORTING_MODULES),
            Path(__file__).resolve(),
            Path(inspect.getfile(RunConfig)).resolve(),
        ),
    }


Write = Callable[[Case, Outcome], None]


def run_local(config: RunConfig, batches: Iterable[Sequence[Case]], generate: Generate, write: Write) -> None:
    """Run batches of cases on the model of this process."""
    for batch in batches:
        for case, outcome in zip(batch, run_or_fail(batch, generate, pipeline_config(config)), strict=True):
            write(case, outcome)


def load_engine(prepared: PreparedRun, device: torch.device) -> Engine:
    """Load a run's model, and return its engine."""
    return make_engine(prepared, load_run_model(prepared, device))


def load_run_model(prepared: PreparedRun, device: torch.device) -> Any:
    """Load a run's model, onto a GPU if `device` is one, attach its adapters, and check that they act."""
    config = prepared.config
    folder = config.adapters
    model = load_to_answer(
        config.model_name_or_path,
        config.model_revision,
        config.dtype,
        prepared.adapter_paths,
        attn_implementation=config.attn_implementation,
        device_map=str(device) if device.type == "cuda" else None,
    )
    if folder is not None:
        backend = local_backend(model, prepared.row_builder)
        check_adapters(backend, list(prepared.adapters), read_probe(Path(folder)), folder, prepared.row_builder)
    return model


def make_engine(prepared: PreparedRun, model: Any, **options: Any) -> Engine:
    """Return the engine of a run on a loaded model; `options` are passed on to Engine."""
    from echo_ft.inference.engine import Engine

    config = prepared.config
    return Engine(
        model,
        prepared.row_builder,
        prepared.dataset.root,
        config.max_new_tokens,
        answer_tokens=answer_tokens(config, prepared.cases),
        corruption=corruption(config),
        max_batch_tokens=config.max_batch_tokens,
        **options,
    )


async def run_server(
    prepared: PreparedRun, cases: Sequence[Case], generations: GenerationCache | None, write: Write
) -> None:
    """Run cases on a server, with many requests in flight.

    Raises EchoError if the server does not answer, or does not return probabilities that the run needs.
    """
    from echo_ft.inference.server import Server, call_in  # needs the extra `serving`

    config = prepared.config
    assert config.server is not None
    async with Server(
        config.server,
        server_model(config),
        prepared.row_builder,
        prepared.dataset.root,
        config.max_new_tokens,
        answer_tokens(config, prepared.cases),
        config.batch_size,
        config.server_timeout,
        config.server_patience,
        corruption(config),
    ) as server:
        if not await server.check():
            problem = f"{config.server} returns no token probabilities"
            if config.answer != "generate":
                raise EchoError(f"{problem}; set answer to generate, or serve the model with vLLM")
            LOGGER.warning(f"{problem}, so the run will have no P(option)")
        if config.adapters is not None:
            backend = served_backend(server, call_in(asyncio.get_running_loop()), config.model_name_or_path)
            record, roles = read_probe(Path(config.adapters)), list(prepared.adapters)
            await asyncio.to_thread(check_adapters, backend, roles, record, config.server, prepared.row_builder)
        generate = generations.wrap_async(server.generate) if generations else server.generate
        await run_cases_async(cases, generate, pipeline_config(config), config.batch_size, write)


if __name__ == "__main__":
    configs.run_main(main, "rerun the same command to resume")
