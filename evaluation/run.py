"""Run the four experts over a dataset: `python -m evaluation.run --config FILE [--adapters DIR] [--output DIR]`.

Writes predictions.jsonl, traces.jsonl and run.json as it goes; started again with the same options it goes on.
Without `adapters` the untuned base model runs the same pipeline with the same prompts: the baseline.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import echo_ft
from echo_ft import config as configs
from echo_ft.model import DTYPES


@dataclass(frozen=True)
class RunConfig:
    """Options of `python -m evaluation.run`."""

    dataset: str = field(metadata={"help": "A dataset folder, made by `python -m data_prep.build`."})
    model_name_or_path: str = field(metadata={"help": "The base model: a folder or a hub name."})
    output: str = field(metadata={"help": "The run's folder."})
    min_pixels: int = field(metadata={"help": "Fewest pixels of an image; as the adapters were trained."})
    max_pixels: int = field(metadata={"help": "Most pixels of an image; as the adapters were trained."})
    adapters: str | None = field(default=None, metadata={"help": "Folder with an adapter a role; absent: the base."})
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the base model on the hub."})
    split: str = field(default="test", metadata={"help": "Which cases.", "choices": ["train", "validation", "test"]})
    routing: str = field(default="full", metadata={"help": "Experts by question kind.", "choices": ["full", "paper"]})
    reference: str = field(
        default="retrieved", metadata={"help": "Normal references.", "choices": ["retrieved", "random", "none"]}
    )
    knowledge: str = field(default="guided", metadata={"help": "Knowledge.", "choices": ["guided", "all", "none"]})
    reasoning: str = field(default="on", metadata={"help": "The reasoning expert.", "choices": ["on", "off"]})
    batch_size: int = field(default=8, metadata={"help": "Cases that run through a role together."})
    max_new_tokens: int = field(default=128, metadata={"help": "Most tokens that an expert may say; MMAD's limit."})
    dtype: str = field(
        default="auto", metadata={"help": "Weights' type; auto: the checkpoint's.", "choices": list(DTYPES)}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, which is the default; others take no mask of branches."}
    )


def main(argv: list[str]) -> None:
    """Check everything that must agree, then run what is not done yet."""
    (config,) = configs.parse([RunConfig], argv)
    import torch
    from tqdm import tqdm

    from echo_ft.dataset import cases as load_cases
    from echo_ft.dataset import load_dataset
    from echo_ft.engine import Engine
    from echo_ft.layout import Layout
    from echo_ft.model import (
        Adapter,
        attach_adapters,
        base_fingerprint,
        find_adapters,
        load_model,
        load_processor,
        training_sets,
    )
    from echo_ft.pipeline import Settings, run_or_fail
    from echo_ft.provenance import ANSWERING, code_fingerprint, commit, versions
    from echo_ft.records import EchoError
    from echo_ft.roles import PROMPT_VERSION
    from echo_ft.runs import RunFolder

    for name in ("batch_size", "max_new_tokens"):
        if getattr(config, name) < 1:
            raise EchoError(f"{name} is {getattr(config, name)}; it must be at least 1")
    if config.attn_implementation not in (None, "sdpa"):
        raise EchoError(f"attn_implementation {config.attn_implementation} takes no mask of branches; set it to sdpa")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EchoError("evaluation.run is one process; start it with python, not with a launcher")
    dataset = load_dataset(Path(config.dataset))
    cases = load_cases(dataset, config.split, config.reference)
    if not cases:
        raise EchoError(f"{config.dataset} has no case in the split {config.split}; see its manifest.json")
    processor = load_processor(config.model_name_or_path, config.model_revision, config.min_pixels, config.max_pixels)
    adapters: dict[str, Adapter] = {}
    if config.adapters is not None:
        adapters = find_adapters(
            Path(config.adapters),
            config.model_name_or_path,
            config.model_revision,
            config.min_pixels,
            config.max_pixels,
        )
    images = list(dict.fromkeys(case.seen.query for case in cases))
    training, warnings = training_sets(adapters, dataset, config.split, images)
    trained_for = {adapter.card.routing for adapter in adapters.values()} - {config.routing}
    if trained_for:
        warnings.append(
            f"adapters trained on routing {', '.join(sorted(trained_for))} run under {config.routing}: some "
            "prompts are unlike those they were trained on"
        )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    options = asdict(config)
    for name in ("output", "batch_size", "dataset", "adapters"):
        options.pop(name)
    provenance = {
        **options,
        "dataset": config.dataset,
        "dataset_fingerprint": dataset.fingerprint,
        "base_model": config.model_name_or_path,
        "base_fingerprint": base_fingerprint(config.model_name_or_path, config.model_revision),
        "adapters": {role: {"fingerprint": one.fingerprint, **asdict(one.card)} for role, one in adapters.items()},
        "prompt_version": PROMPT_VERSION,
        "versions": {name: version for name, version in versions().items() if name in ANSWERING},
        # What makes the answers, not what scores them: a stopped run goes on after a change to the latter.
        "code": code_fingerprint(Path(echo_ft.__file__).parent, Path(__file__)),
    }
    noted = {
        "adapters_folder": config.adapters,
        "trained_on": training,
        "warnings": warnings,
        "other_versions": {name: version for name, version in versions().items() if name not in ANSWERING},
        "commit": commit(),
    }
    with RunFolder(Path(config.output), provenance, cases, noted) as folder:
        remaining = [case for case in cases if case.id not in folder.done]
        print(
            f"{len(cases)} cases of {config.split}, {len(folder.done)} done before, {len(remaining)} to go", flush=True
        )
        if remaining:
            model = load_model(
                config.model_name_or_path,
                config.model_revision,
                config.dtype,
                attn_implementation=config.attn_implementation,
                device_map="cuda" if torch.cuda.is_available() else None,
            )
            model = attach_adapters(model, {role: adapter.path for role, adapter in adapters.items()})
            engine = Engine(model, Layout(processor), dataset.root, config.max_new_tokens)
            settings = Settings(config.routing, config.reference, config.knowledge, config.reasoning)
            with tqdm(total=len(cases), initial=len(folder.done), unit="case", desc="four experts") as progress:
                for start in range(0, len(remaining), config.batch_size):
                    batch = remaining[start : start + config.batch_size]
                    for case, outcome in zip(batch, run_or_fail(batch, engine.speak, settings), strict=True):
                        folder.write(case, outcome)
                    progress.update(len(batch))
        folder.finish(complete=len(folder.done) == len(cases))
    print(f"done: {config.output}; score it with `python -m evaluation.score {config.output}`")


if __name__ == "__main__":
    configs.run_main(main)
