"""What the earlier roles said about a case in runs of adapters that were not trained on it: `upstream: predicted`.

A run's traces are gone through as in the run itself: each role's prompt is rendered from what the roles before it said,
and must be the one that the trace shows, so that the words fit the rows that they get into.
"""

from __future__ import annotations

import json
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
from echo_ft.files import from_dict
from echo_ft.inference.run_folder import RUN_DESCRIPTION, TRACES
from echo_ft.model.adapters import ADAPTER_CARD, read_card
from echo_ft.model.training_overlap import images_trained_on
from echo_ft.provenance import fingerprint_files
from echo_ft.records import ROLES, Case, Trace, Upstream

EARLIER = ROLES[:-1]
"""The roles whose words others are shown."""

AS_TRAINED = {
    "reference": "retrieved",
    "references": None,
    "knowledge": "guided",
    "reasoning": "on",
    "corruption": None,
}
"""What a run must have of the switches that change what roles see."""

REMEDY_FOR_TRACES = (
    f"data_prep.build --folds N --fold I, training and evaluation.run --split {LEFT_OUT} make one of each fold"
)


@dataclass(frozen=True)
class UpstreamRun:
    """A run of evaluation.run that is complete."""

    folder: Path
    description: Mapping[str, Any]
    """Its run.json."""
    places: Mapping[str, int]
    """Where the traces of each case begin in traces.jsonl, in bytes; a case's traces stand together."""


def read_runs(folders: Sequence[Path], routing: str) -> list[UpstreamRun]:
    """The runs, checked to show what a dataset of that routing shows. Raises EchoError where one does not."""
    return [_read_run(folder, {**AS_TRAINED, "routing": routing}) for folder in folders]


def _read_run(folder: Path, wanted: Mapping[str, Any]) -> UpstreamRun:
    try:
        run = json.loads((folder / RUN_DESCRIPTION).read_text(encoding="utf-8"))
        if not run["complete"]:
            raise EchoError(f"the run {folder} is not complete; its command goes on where it stopped")
        for name, value in wanted.items():
            if run.get(name) != value:
                raise EchoError(
                    f"the run {folder} has {name} {run.get(name)}, and training rows have {value}; run it again so"
                )
        places: dict[str, int] = {}
        place = 0
        with open(folder / TRACES, "rb") as file:
            for line in file:
                places.setdefault(json.loads(line)["case"], place)
                place += len(line)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EchoError(f"traces: {folder} is not a run of evaluation.run ({error}); check the path") from error
    return UpstreamRun(folder, run, places)


def check_runs(runs: Sequence[UpstreamRun], material: DatasetDraft, root: Path) -> None:
    """Raise EchoError where a train or validation case is described by no run, or by adapters that were trained on it.

    The latter is told by the photographs' content, in the train split of the dataset that is named in the adapters'
    cards; where that is gone or was built anew it cannot be told, which is an error too.
    """
    inspections = [*material.asked("train"), *material.asked("validation")]
    bare = [one for one in inspections if not any(one.id in run.places for run in runs)]
    if bare:
        remedy = REMEDY_FOR_TRACES if bare[0].split == "train" else f"evaluation.run --split {bare[0].split} makes it"
        raise EchoError(
            f"no run in traces describes {bare[0].id}, of the split {bare[0].split} (of {len(inspections)} cases "
            f"{len(bare)} are not described); give a run over it too: {remedy}; a case that failed in a run is asked "
            "again by the run's own command"
        )
    for run in runs:
        named = {one.image: one.id for one in inspections if one.id in run.places}
        for (where, fingerprint), who in _training(run).items():
            known = images_trained_on(where, fingerprint, root, list(named))
            if known is None:
                raise EchoError(
                    f"the run {run.folder} has {who} trained on {where} ({fingerprint}), which is gone or was built "
                    "anew, so nobody can tell which cases they know; build it again as it was"
                )
            if known:
                raise EchoError(
                    f"the run {run.folder} describes {named[known[0]]} by {who} that were trained on it, in "
                    f"{where} ({len(known)} such cases); give a run of adapters that were not: {REMEDY_FOR_TRACES}"
                )


def _training(run: UpstreamRun) -> dict[tuple[str, str], str]:
    """Dataset and fingerprint of all that a run's earlier roles were trained on, with who was."""
    who: dict[tuple[str, str], list[str]] = defaultdict(list)
    for role in EARLIER:
        card = run.description["adapters"].get(role)
        if card is not None:
            who[card["dataset"], card["dataset_fingerprint"]].append(role)
    served = run.description.get("server_model")
    if not who and served not in (None, run.description["base_model"]):
        raise EchoError(
            f"the run {run.folder} asked a server for {served} without --adapters, so nobody can tell which cases its "
            "models were trained on; give evaluation.run their adapters too"
        )
    found = {key: f"adapters ({', '.join(roles)})" for key, roles in who.items()}
    base = Path(run.description["base_model"])
    if (base / ADAPTER_CARD).is_file():  # a whole model that was tuned here
        card = read_card(base)
        found.setdefault((card.dataset, card.dataset_fingerprint), f"weights ({base})")
    return found


def check_photographs(runs: Sequence[UpstreamRun], images_fingerprint: str) -> None:
    """Raise EchoError where a run was over other photographs than those of the dataset that is built."""
    for run in runs:
        where = run.description["dataset"]
        dataset = load_dataset(Path(where))
        if dataset.fingerprint != run.description["dataset_fingerprint"]:
            raise EchoError(f"{where} was built anew after the run {run.folder} over it; run it again")
        if dataset.manifest["images_fingerprint"] != images_fingerprint:
            raise EchoError(
                f"the run {run.folder} is over {where}, whose photographs are not those of this dataset; build both "
                "from the same files with the same config"
            )


def predicted(case: Case, runs: Sequence[UpstreamRun], routing: str) -> Upstream:
    """What the earlier roles said about a case, in the first of the runs that describes it.

    Raises EchoError where they were shown or asked something else than they would be now, and where one is missing.
    """
    run = next(run for run in runs if case.id in run.places)
    said = {(trace.role, trace.branch): trace for trace in _traces(run, case.id)}
    upstream = Upstream()
    for role in EARLIER:
        words: dict[str, str] = {}
        for exchange in render(role, case.id, case.seen, upstream, ROUTINGS[routing]):
            for branch in exchange.branches:
                trace = said.get((role, branch.id))
                shown = exchange.images, exchange.context, branch.prompt
                if trace is None or (trace.images, trace.context, trace.prompt) != shown:
                    what = "was not asked" if trace is None else "was shown something else than"
                    raise EchoError(
                        f"in the run {run.folder}, {role} {what} what it is asked about {case.id} now ({branch.id}); "
                        "build the dataset of the run and this one with the same config, and run it again"
                    )
                words[branch.id] = trace.text
        upstream = update_upstream(role, case, upstream, words)
    return upstream


def _traces(run: UpstreamRun, case: str) -> Iterator[Trace]:
    with open(run.folder / TRACES, "rb") as file:
        file.seek(run.places[case])
        for line in file:
            row = json.loads(line)
            if row["case"] != case:
                return
            yield from_dict(Trace, row)


def described(runs: Sequence[UpstreamRun]) -> list[dict[str, Any]]:
    """The runs as a manifest has them: what was said, by which adapters, over which dataset."""
    return [
        {
            "run": str(run.folder),
            "traces_fingerprint": fingerprint_files([run.folder / TRACES], run.folder),
            "dataset_fingerprint": run.description["dataset_fingerprint"],
            "base_fingerprint": run.description["base_fingerprint"],
            "adapters": {role: card["fingerprint"] for role, card in run.description["adapters"].items()},
            "cases": len(run.places),
        }
        for run in runs
    ]
