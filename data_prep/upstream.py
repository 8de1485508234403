"""Predicted upstream outputs for training rows (`upstream: predicted`), read from the traces of runs.

The adapters of a run must not have been trained on the cases that it covers. Each case is replayed as in the run: every
role's prompt is rendered from the outputs of earlier roles. The prompt must equal that in the trace, so that the
outputs fit the training rows that show them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.prepare import DatasetDraft
from echo_ft.data.dataset import load_dataset
from echo_ft.data.splits import LEFT_OUT
from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import update_upstream
from echo_ft.experts.roles import ROUTINGS, render
from echo_ft.inference.run_folder import RUN_DESCRIPTION, TRACES, changed_file
from echo_ft.inputs import from_dict, open_input, read_json_object
from echo_ft.model.adapters import ADAPTER_CARD, read_card
from echo_ft.model.training_overlap import images_trained_on
from echo_ft.provenance import fingerprint_files
from echo_ft.records import ROLES, Case, Trace, Upstream
from echo_ft.strict_yaml import read_json

UPSTREAM_ROLES = ROLES[:-1]
"""The roles whose outputs are shown to later roles."""

REQUIRED_OPTIONS = {
    "reference": "retrieved",
    "references": None,
    "knowledge": "guided",
    "reasoning": "on",
    "corruption": None,
}
"""Required values of the run's options that change what the roles see."""

TRACES_REMEDY = (
    f"for one run per fold, use data_prep.build --folds N --fold I, training, and evaluation.run --split {LEFT_OUT}"
)


@dataclass(frozen=True)
class UpstreamRun:
    """A complete run of evaluation.run."""

    folder: Path
    description: Mapping[str, Any]
    """The content of its run.json."""
    trace_offsets: Mapping[str, int]
    """Maps a case id to the byte offset of the case's first trace in traces.jsonl. Its traces are contiguous."""


def read_runs(folders: Sequence[Path], routing: str) -> list[UpstreamRun]:
    """Read the runs.

    Raises EchoError if a run is incomplete, if one of its files has changed since it ended, or if its options differ
    from those of training rows with `routing`.
    """
    return [_read_run(folder, {**REQUIRED_OPTIONS, "routing": routing}) for folder in folders]


def _read_run(folder: Path, required: Mapping[str, Any]) -> UpstreamRun:
    try:
        run = read_json_object(folder / RUN_DESCRIPTION)
        if not run["complete"]:
            raise EchoError(f"the run {folder} is not complete; rerun its command to resume it")
        for name, value in required.items():
            if run.get(name) != value:
                raise EchoError(
                    f"the run {folder} has {name} {run.get(name)}, but training rows have {value}; "
                    f"rerun it with {name} {value}"
                )
        fault = changed_file(folder, run)
        if fault:
            raise EchoError(f"{fault} since the run ended; restore it, or run again into another output")
        offsets: dict[str, int] = {}
        offset = 0
        with open_input(folder / TRACES) as file:
            for line in file:
                offsets.setdefault(read_json(line.decode(), unique_keys=False)["case"], offset)
                offset += len(line)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EchoError(
            f"traces: {folder} is not a run folder from evaluation.run ({error}); check the path"
        ) from error
    return UpstreamRun(folder, run, offsets)


def check_runs(runs: Sequence[UpstreamRun], draft: DatasetDraft, root: Path) -> None:
    """Raise EchoError if no run covers a train or validation case, or its adapters were trained on that case.

    The training dataset is read from the adapter cards, and its images are compared by content. A missing or rebuilt
    training dataset is also an error, because its images are then unknown.
    """
    inspections = [*draft.queries("train"), *draft.queries("validation")]
    uncovered = [one for one in inspections if not any(one.id in run.trace_offsets for run in runs)]
    if uncovered:
        first = uncovered[0]
        remedy = TRACES_REMEDY if first.split == "train" else f"use evaluation.run --split {first.split}"
        raise EchoError(
            f"no run in traces covers {first.id} of the {first.split} split ({len(uncovered)} of {len(inspections)} "
            f"cases are not covered); add a run that covers them: {remedy}; to retry cases that failed in a run, rerun "
            "its command"
        )
    for run in runs:
        covered = {one.image: one.id for one in inspections if one.id in run.trace_offsets}
        for (dataset, fingerprint), weights in _training_sets(run).items():
            known = images_trained_on(dataset, fingerprint, root, list(covered))
            if known is None:
                raise EchoError(
                    f"the run {run.folder} uses {weights} trained on {dataset} ({fingerprint}), which is missing or "
                    "was rebuilt, so their training images are unknown; rebuild that dataset with its original config"
                )
            if known:
                raise EchoError(
                    f"the run {run.folder} covers {covered[known[0]]} with {weights} that were trained on it, in "
                    f"{dataset} ({len(known)} such cases); use a run with adapters that were not: {TRACES_REMEDY}"
                )


def _training_sets(run: UpstreamRun) -> dict[tuple[str, str], str]:
    """Map the (dataset, fingerprint) of all training data behind a run's upstream outputs to the weights trained on it.

    Raises EchoError if the run used a server whose models have unknown training data.
    """
    roles_of: dict[tuple[str, str], list[str]] = defaultdict(list)
    for role in UPSTREAM_ROLES:
        card = run.description["adapters"].get(role)
        if card is not None:
            roles_of[card["dataset"], card["dataset_fingerprint"]].append(role)
    served = run.description.get("server_model")
    if not roles_of and served not in (None, run.description["base_model"]):
        raise EchoError(
            f"the run {run.folder} used the server model {served} without --adapters, so the training data of its "
            "models is unknown; pass their adapters to evaluation.run too"
        )
    found = {key: f"adapters ({', '.join(roles)})" for key, roles in roles_of.items()}
    base = Path(run.description["base_model"])
    if (base / ADAPTER_CARD).is_file():  # the base model is a fully fine-tuned model of echo-ft
        card = read_card(base)
        found.setdefault((card.dataset, card.dataset_fingerprint), f"weights ({base})")
    return found


def check_images(runs: Sequence[UpstreamRun], images_fingerprint: str) -> None:
    """Raise EchoError if the images of a run's dataset differ from the build's, or if it was rebuilt after the run."""
    for run in runs:
        folder = run.description["dataset"]
        dataset = load_dataset(Path(folder))
        if dataset.fingerprint != run.description["dataset_fingerprint"]:
            raise EchoError(f"{folder} was rebuilt after the run {run.folder} on it; rerun evaluation.run")
        if dataset.manifest["images_fingerprint"] != images_fingerprint:
            raise EchoError(
                f"the run {run.folder} used {folder}, whose images differ from those of this dataset; build both from "
                "the same files with the same config"
            )


def predicted_upstream(case: Case, runs: Sequence[UpstreamRun], routing: str) -> Upstream:
    """Return the outputs of earlier roles for a case, from the first run that covers it.

    Raises EchoError if a role's output is missing, or if its prompt or images differ from those that it would get now.
    """
    run = next(run for run in runs if case.id in run.trace_offsets)
    traces = {(trace.role, trace.branch): trace for trace in _read_traces(run, case.id)}
    upstream = Upstream()
    for role in UPSTREAM_ROLES:
        outputs: dict[str, str] = {}
        for exchange in render(role, case.id, case.seen, upstream, ROUTINGS[routing]):
            for branch in exchange.branches:
                trace = traces.get((role, branch.id))
                shown = exchange.images, exchange.context, branch.prompt
                if trace is None or (trace.images, trace.context, trace.prompt) != shown:
                    fault = (
                        f"has no output from {role}"
                        if trace is None
                        else f"gave {role} a different prompt or different images from this dataset"
                    )
                    raise EchoError(
                        f"the run {run.folder} {fault} for {case.id} ({branch.id}); build the run's dataset and this "
                        "one with the same config, and rerun evaluation.run"
                    )
                outputs[branch.id] = trace.text
        upstream = update_upstream(role, case, upstream, outputs)
    return upstream


def _read_traces(run: UpstreamRun, case: str) -> Iterator[Trace]:
    with open_input(run.folder / TRACES) as file:
        file.seek(run.trace_offsets[case])
        for line in file:
            row = read_json(line.decode(), unique_keys=False)
            if row["case"] != case:
                return
            yield from_dict(Trace, row)


def describe_runs(runs: Sequence[UpstreamRun]) -> list[dict[str, Any]]:
    """Return the runs as the manifest lists them: their outputs, adapters and datasets, each with a fingerprint."""
    return [
        {
            "run": str(run.folder),
            "traces_fingerprint": fingerprint_files([run.folder / TRACES], run.folder),
            "dataset_fingerprint": run.description["dataset_fingerprint"],
            "base_fingerprint": run.description["base_fingerprint"],
            "adapters": {role: card["fingerprint"] for role, card in run.description["adapters"].items()},
            "cases": len(run.trace_offsets),
        }
        for run in runs
    ]
