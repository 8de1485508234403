"""Run the four experts over a dataset: `python -m evaluation.run --config FILE [--adapters DIR] [--output DIR]`.

Writes predictions.jsonl, traces.jsonl and run.json as it goes; started again with the same options it goes on. Several
processes or GPUs share the cases: `accelerate launch -m evaluation.run ...`; each writes a shard in the run's folder.
Without `adapters` the untuned base model runs the same pipeline with the same prompts: the baseline. With `--server`
the models are not loaded here: a server that speaks OpenAI's chat protocol is asked.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_ft import config as configs
from echo_ft.adapters import Adapter
from echo_ft.dataset import Dataset
from echo_ft.pipeline import Outcome, Speak, run_at_once, run_or_fail
from echo_ft.records import Case, EchoError
from echo_ft.runs import Processes, RunFolder, failures
from evaluation import settings
from evaluation.settings import RunConfig, answer_tokens, answering, check, corruption, pipeline_settings, server_model

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from echo_ft.engine import Engine
    from echo_ft.layout import Layout
    from echo_ft.utterances import Utterances

LONGEST_WAIT = timedelta(days=30)
"""How long the processes of a run wait for the slowest; torch's own ten minutes are less than one's share may take."""


@dataclass(frozen=True)
class Prepared:
    """A run with all that it reads, checked."""

    config: RunConfig
    dataset: Dataset
    adapters: dict[str, Adapter]
    cases: list[Case]
    layout: Layout
    noted: dict[str, Any]
    """What run.json tells beside what must be the same for the run to go on; the `warnings` among it."""

    @property
    def adapter_paths(self) -> dict[str, Path]:
        """The adapters' folders, by role."""
        return {role: adapter.path for role, adapter in self.adapters.items()}


def main(argv: list[str]) -> None:
    """Check everything that must agree, then run what is not done yet."""
    (config,) = configs.parse([RunConfig], argv)
    prepared = prepare(config)
    state = join_processes()
    if state.is_main_process:
        for warning in prepared.noted["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)
    carry_out(prepared, state)
    if state.is_main_process:
        failed = failures(Path(config.output))
        told = [f"done: {config.output}", f"score it with `python -m evaluation.score {config.output}`"]
        if failed:
            told.insert(1, f"{len(failed)} predictions failed (the first: {failed[0]}), the same command asks again")
        print("; ".join(told))
    state.destroy_process_group()


def inputs(config: RunConfig) -> tuple[Dataset, dict[str, Adapter]]:
    """The dataset and the adapters of a run. Raises EchoError for options that cannot be run with them."""
    from echo_ft.adapters import find_adapters
    from echo_ft.dataset import load_dataset
    from echo_ft.model import base_fingerprint

    check(config)
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


def prepare(config: RunConfig) -> Prepared:
    """Everything that a run reads. Raises EchoError where it does not agree."""
    from echo_ft.adapters import BASE, training_sets, tuned_base
    from echo_ft.dataset import DIGESTS
    from echo_ft.dataset import cases as load_cases
    from echo_ft.provenance import ANSWERING, commit, versions

    dataset, adapters = inputs(config)
    cases = load_cases(dataset, config.split, config.reference, config.references)
    if not cases:
        raise EchoError(f"{config.dataset} has no case in the split {config.split}; see its manifest.json")
    images = list(dict.fromkeys(case.seen.query for case in cases))
    whole = tuned_base(config.model_name_or_path, config.min_pixels, config.max_pixels)
    tuned = adapters | ({BASE: whole} if whole else {})
    training, warnings = training_sets(tuned, dataset, config.split, images)
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
        "other_versions": {name: version for name, version in versions().items() if name not in ANSWERING},
        "commit": commit(),
    }
    layout = load_layout(config.model_name_or_path, config.model_revision, config.min_pixels, config.max_pixels)
    return Prepared(config, dataset, adapters, cases, layout, noted)


@cache
def load_layout(model_name_or_path: str, revision: str | None, min_pixels: int, max_pixels: int) -> Layout:
    """The layout of prompts with the model's processor; runs of one model share it."""
    from echo_ft.layout import Layout
    from echo_ft.model import load_processor

    return Layout(load_processor(model_name_or_path, revision, min_pixels, max_pixels))


def join_processes() -> PartialState:
    """This process among those that `accelerate launch` started."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)


def carry_out(
    prepared: Prepared,
    state: PartialState,
    engine_of: Callable[[Prepared, torch.device], Engine] | None = None,
    utterances: Utterances | None = None,
) -> None:
    """Run what is not done yet of one run, in each of its processes.

    An ablation gives `engine_of`, which may return one that has been in use, and the `utterances` that it keeps.
    """
    from tqdm import tqdm

    from echo_ft.dataset import require_unchanged

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
                    run_here(config, batches, utterances.before(engine.speak) if utterances else engine.speak, write)
                else:
                    asyncio.run(ask_server(prepared, [case for (case,) in batches], utterances, write))
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
    from echo_ft.model import base_fingerprint
    from echo_ft.provenance import ANSWERING, ANSWERING_MODULES, code_fingerprint, sources, versions
    from echo_ft.roles import PROMPT_VERSION

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
        "versions": {name: version for name, version in versions().items() if name in ANSWERING},
        # What makes the answers, not what scores them: a stopped run goes on after a change to the latter.
        "code": code_fingerprint(
            *sources(*ANSWERING_MODULES), Path(__file__).resolve(), Path(settings.__file__).resolve()
        ),
    }


Write = Callable[[Case, Outcome], None]


def run_here(config: RunConfig, batches: Iterable[Sequence[Case]], speak: Speak, write: Write) -> None:
    """Run the batches of cases through the model in this process."""
    for batch in batches:
        for case, outcome in zip(batch, run_or_fail(batch, speak, pipeline_settings(config)), strict=True):
            write(case, outcome)


def load_engine(prepared: Prepared, device: torch.device) -> Engine:
    """An engine of its own for a run, its model on a GPU if `device` is one."""
    return make_engine(prepared, load_weights(prepared, device))


def load_weights(prepared: Prepared, device: torch.device) -> Any:
    """The base model with the run's adapters."""
    from echo_ft.adapters import attach_adapters
    from echo_ft.model import load_model

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
    from echo_ft.engine import Engine

    config = prepared.config
    return Engine(
        model,
        prepared.layout,
        prepared.dataset.root,
        config.max_new_tokens,
        answer_tokens=answer_tokens(config),
        corruption=corruption(config),
        max_batch_tokens=config.max_batch_tokens,
        **options,
    )


async def ask_server(prepared: Prepared, cases: Sequence[Case], utterances: Utterances | None, write: Write) -> None:
    """Run the cases through the models of a server, many requests at once."""
    from echo_ft.server import Server

    config = prepared.config
    assert config.server is not None
    async with Server(
        config.server,
        server_model(config),
        prepared.layout,
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
            print(f"warning: {told}: the run will have no P(option)", file=sys.stderr)
        speak = utterances.before_later(server.speak) if utterances else server.speak
        await run_at_once(cases, speak, pipeline_settings(config), config.batch_size, write)


if __name__ == "__main__":
    configs.run_main(main, "the same command goes on where it stopped")
