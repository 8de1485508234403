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
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_ft import config as configs
from echo_ft.corruptions import KINDS, SEVERITIES, Corruption
from echo_ft.dataset import Dataset
from echo_ft.model import DTYPES, Adapter
from echo_ft.pipeline import Outcome, Settings, Speak, run_at_once, run_or_fail
from echo_ft.records import Case, EchoError
from echo_ft.runs import Processes, RunFolder, failures
from echo_ft.splits import LEFT_OUT, SPLITS

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from echo_ft.engine import Engine
    from echo_ft.layout import Layout
    from echo_ft.utterances import Utterances

LONGEST_WAIT = timedelta(days=30)
"""How long the processes of a run wait for the slowest; torch's own ten minutes are less than one's share may take."""


@dataclass(frozen=True)
class RunConfig:
    """Options of `python -m evaluation.run`."""

    dataset: str = field(metadata={"help": "A dataset folder, made by `python -m data_prep.build`."})
    model_name_or_path: str = field(metadata={"help": "The base model: a folder or a hub name."})
    output: str = field(metadata={"help": "The run's folder."})
    min_pixels: int = field(metadata={"help": "Fewest pixels of an image; as the adapters were trained."})
    max_pixels: int = field(metadata={"help": "Most pixels of an image; as the adapters were trained."})
    adapters: str | None = field(
        default=None,
        metadata={"help": "Folder with an adapter a role; absent: the base. With a server: those that it serves."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the base model on the hub."})
    split: str = field(default="test", metadata={"help": "Which cases.", "choices": [*SPLITS, LEFT_OUT]})
    routing: str = field(default="full", metadata={"help": "Experts by question kind.", "choices": ["full", "paper"]})
    reference: str = field(
        default="retrieved", metadata={"help": "Normal references.", "choices": ["retrieved", "random", "none"]}
    )
    references: int | None = field(
        default=None,
        metadata={"help": "How many of a case's references are shown, the best ranked; absent: all that it has."},
    )
    knowledge: str = field(default="guided", metadata={"help": "Knowledge.", "choices": ["guided", "all", "none"]})
    reasoning: str = field(default="on", metadata={"help": "The reasoning expert.", "choices": ["on", "off"]})
    corruption: str | None = field(
        default=None,
        metadata={"help": "How every query is degraded; the references stay good photographs.", "choices": [*KINDS]},
    )
    severity: int | None = field(
        default=None, metadata={"help": "How much it is degraded (with corruption).", "choices": list(SEVERITIES)}
    )
    answer: str = field(
        default="generate",
        metadata={
            "help": "What decides: the text, read strictly, beside which the options' probabilities are kept; or these "
            "probabilities alone; or their mean over the orders of the options (with option_order cyclic).",
            "choices": ["generate", "logits", "averaged"],
        },
    )
    option_order: str = field(
        default="given",
        metadata={
            "help": "Order of the options; cyclic: every cyclic permutation of it too, kept in permutations.jsonl.",
            "choices": ["given", "cyclic"],
        },
    )
    batch_size: int = field(
        default=8, metadata={"help": "Cases that run through a role together; with a server, requests under way."}
    )
    max_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens in the cache: branches x (prefix + branch + max_new_tokens), padded; cases that need "
            "more go through a role in parts. Absent: batch_size alone decides. Memory, not answers, depends on it."
        },
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Most tokens that an expert may say; MMAD's limit."})
    dtype: str = field(
        default="auto", metadata={"help": "Weights' type; auto: the checkpoint's.", "choices": list(DTYPES)}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, which is the default; others take no mask of branches."}
    )
    server: str | None = field(
        default=None,
        metadata={"help": "Address of an OpenAI-compatible server, http://HOST:PORT/v1; absent: the model runs here."},
    )
    server_model: str | None = field(
        default=None,
        metadata={
            "help": "The model's name on the server, {role} in it for the role's; absent: {role} with adapters, "
            "else model_name_or_path."
        },
    )
    server_timeout: float = field(default=300.0, metadata={"help": "Seconds that a request may take."})
    server_patience: float = field(
        default=600.0, metadata={"help": "Seconds that a request which fails is tried again before the run stops."}
    )


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
    from echo_ft.dataset import load_dataset
    from echo_ft.model import find_adapters

    check(config)
    dataset = load_dataset(Path(config.dataset))
    if config.references is not None and not 1 <= config.references <= dataset.manifest["config"]["k"]:
        raise EchoError(
            f"references is {config.references}, and {config.dataset} was built with k "
            f"{dataset.manifest['config']['k']}; choose a number from 1 to that, or build it with a larger --k"
        )
    if config.adapters is None:
        return dataset, {}
    folder, base, revision = Path(config.adapters), config.model_name_or_path, config.model_revision
    return dataset, find_adapters(folder, base, revision, config.min_pixels, config.max_pixels)


def prepare(config: RunConfig) -> Prepared:
    """Everything that a run reads. Raises EchoError where it does not agree."""
    from echo_ft.dataset import DIGESTS
    from echo_ft.dataset import cases as load_cases
    from echo_ft.model import training_sets
    from echo_ft.provenance import ANSWERING, commit, versions

    dataset, adapters = inputs(config)
    cases = load_cases(dataset, config.split, config.reference, config.references)
    if not cases:
        raise EchoError(f"{config.dataset} has no case in the split {config.split}; see its manifest.json")
    images = list(dict.fromkeys(case.seen.query for case in cases))
    training, warnings = training_sets(adapters, dataset, config.split, images)
    trained_for = {adapter.card.routing for adapter in adapters.values()} - {config.routing}
    if trained_for:
        trained = ", ".join(sorted(trained_for))
        remedy = f"; add --routing {trained}" if len(trained_for) == 1 else ""
        warnings.append(
            f"adapters trained on routing {trained} run under {config.routing}: some prompts are unlike those they "
            f"were trained on{remedy}"
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


def check(config: RunConfig) -> None:
    """Raise EchoError for options that cannot be run."""
    for name in ("batch_size", "max_batch_tokens", "max_new_tokens", "server_timeout", "server_patience"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise EchoError(f"{name} is {value}; it must be more than 0")
    if config.server is not None and config.max_batch_tokens is not None:
        raise EchoError(
            "max_batch_tokens is of a model that runs here, and a server makes its own batches; take it out"
        )
    if config.attn_implementation not in (None, "sdpa"):
        raise EchoError(f"attn_implementation {config.attn_implementation} takes no mask of branches; set it to sdpa")
    if config.answer == "averaged" and config.option_order == "given":
        raise EchoError("answer averaged is over several orders of the options; set option_order to cyclic")
    if config.reference == "none" and config.references is not None:
        raise EchoError(
            f"references is {config.references}, and reference none shows none; take one of the two options out"
        )
    if (config.corruption is None) != (config.severity is None):
        given, lacking = ("corruption", "severity") if config.severity is None else ("severity", "corruption")
        raise EchoError(f"{given} is given and {lacking} is not; add --{lacking} or take --{given} out")
    if config.server is None and config.server_model is not None:
        raise EchoError("server_model names a model of a server; give --server its address, or take it out")


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
        "code": code_fingerprint(*sources(*ANSWERING_MODULES), Path(__file__).resolve()),
    }


def answering(config: RunConfig) -> dict[str, Any]:
    """The options that the answers depend on, beside the dataset and the adapters."""
    options = asdict(config)
    passing = (
        "output",
        "batch_size",
        "max_batch_tokens",
        "dataset",
        "adapters",
        "server",
        "server_timeout",
        "server_patience",
    )
    for name in passing if config.server is None else (*passing, "dtype", "attn_implementation"):
        options.pop(name)
    if config.server is not None:
        options["server_model"] = server_model(config)
    return options


def server_model(config: RunConfig) -> str:
    """The name of the model on the server, `{role}` in it for the role's."""
    return config.server_model or ("{role}" if config.adapters else config.model_name_or_path)


def settings(config: RunConfig) -> Settings:
    """What the pipeline needs to know of the options."""
    return Settings(
        config.routing, config.reference, config.knowledge, config.reasoning, config.answer, config.option_order
    )


def corruption(config: RunConfig) -> Corruption | None:
    """How the queries are degraded."""
    if config.corruption is None or config.severity is None:
        return None
    return Corruption(config.corruption, config.severity)


Write = Callable[[Case, Outcome], None]


def run_here(config: RunConfig, batches: Iterable[Sequence[Case]], speak: Speak, write: Write) -> None:
    """Run the batches of cases through the model in this process."""
    for batch in batches:
        for case, outcome in zip(batch, run_or_fail(batch, speak, settings(config)), strict=True):
            write(case, outcome)


def load_engine(prepared: Prepared, device: torch.device) -> Engine:
    """An engine of its own for a run, its model on a GPU if `device` is one."""
    return make_engine(prepared, load_weights(prepared, device))


def load_weights(prepared: Prepared, device: torch.device) -> Any:
    """The base model with the run's adapters."""
    from echo_ft.model import attach_adapters, load_model

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
        await run_at_once(cases, speak, settings(config), config.batch_size, write)


def answer_tokens(config: RunConfig) -> int | None:
    """Where probabilities decide, the decision maker's first token is all that is needed of its text."""
    return 1 if config.answer != "generate" else None


if __name__ == "__main__":
    configs.run_main(main)
