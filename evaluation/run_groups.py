"""Groups of runs to compare: parse their names, load them, and reject runs that cannot be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from echo_ft.errors import EchoError
from echo_ft.metrics.comparison import RunGroup
from echo_ft.metrics.loading import Run, load_run
from echo_ft.metrics.prediction_table import PredictionTable, make_prediction_table
from echo_ft.metrics.report import SAME_MODEL_KEYS
from echo_ft.provenance import same_weights
from echo_ft.tracking import local_run

PROTOCOL = ("answer", "option_order", "max_new_tokens", "min_pixels", "max_pixels", "prompt_version")
"""Provenance keys that say how questions are asked and answers are read.

They must be equal in all compared runs, unless the comparison measures one of them. Model, adapters, routing, switches
of the experts and corruption may differ."""


def read_groups(specs: Sequence[str], compared: Sequence[str] = ()) -> list[RunGroup]:
    """Load the groups of runs given as `[NAME=]DIR[,DIR...]`.

    The runs may differ in the keys of PROTOCOL listed in `compared`. Raises EchoError if a run cannot be loaded, if the
    runs cannot be compared, or if a group's runs differ in more than the training of their adapters.
    """
    labels, folders = zip(*map(_parse_spec, specs), strict=True)
    names = run_names([folder for some in folders for folder in some])
    runs = [load_run(folder) for some in folders for folder in some]
    tables = [make_prediction_table(run.predictions) for run in runs]
    require_same_questions(names, runs, tables)
    require_same_protocol(names, runs, compared)
    groups, start = [], 0
    for label, some in zip(labels, folders, strict=True):
        chosen = slice(start, start := start + len(some))
        groups.append(RunGroup(label or ", ".join(names[chosen]), names[chosen], runs[chosen], tables[chosen]))
        require_same_setup(groups[-1])
    if len({group.name for group in groups}) < len(groups):
        raise EchoError(f"two of the groups {', '.join(group.name for group in groups)} have the same name; rename one")
    return groups


def _parse_spec(spec: str) -> tuple[str, list[Path]]:
    """Return the name, or "" if none is given, and the folders. Paths of existing folders may contain `=` and `,`.

    W&B runs are downloaded.
    """
    label, sign, rest = spec.partition("=")
    if not sign or "/" in label or Path(spec).is_dir():
        label, rest = "", spec
    return label, [Path(rest)] if Path(rest).is_dir() else [local_run(run) for run in rest.split(",")]


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest endings that distinguish the paths. Raises EchoError for a duplicate folder."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise EchoError("the same run is given twice; give each run once")
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def require_same_setup(group: RunGroup) -> None:
    """Raise EchoError if runs of a group differ in more than the training of their adapters.

    Their adapters must be for the same roles.
    """
    for key in (*SAME_MODEL_KEYS, "answer"):
        for name, run in zip(group.members[1:], group.runs[1:], strict=True):
            first, other = group.runs[0].provenance.get(key), run.provenance.get(key)
            if key == "adapters":
                first, other = (", ".join(sorted(adapters or {})) or "none" for adapters in (first, other))
            if first != other and not (key == "base_fingerprint" and same_weights(first, other)):
                raise EchoError(
                    f"{group.members[0]} and {name} cannot be one group: their {key} differs ({first} and {other}); "
                    "separate them with a space instead of a comma"
                )


def require_same_questions(names: Sequence[str], runs: Sequence[Run], tables: Sequence[PredictionTable]) -> None:
    """Raise EchoError if a run's dataset, split or set of questions differs from that of the first run."""
    first = {(one.case, one.question): one for one in (*tables[0].predictions, *runs[0].grounding)}
    compared_fields = (
        "dataset", "product", "group", "image", "condition", "kind", "question_text", "options", "answer",
    )  # fmt: skip
    for name, run, table in zip(names[1:], runs[1:], tables[1:], strict=True):
        cannot = f"{names[0]} and {name} cannot be compared: "
        # An answer file names no dataset. Its questions are compared one by one below.
        given = "answers" in runs[0].provenance or "answers" in run.provenance
        for key in () if given else ("dataset_fingerprint", "split"):
            ours, theirs = runs[0].provenance.get(key), run.provenance.get(key)
            if ours != theirs:
                raise EchoError(f"{cannot}their {key} differs ({ours} and {theirs}); run both on the same dataset")
        other = {(one.case, one.question): one for one in (*table.predictions, *run.grounding)}
        missing, surplus = sorted(first.keys() - other.keys()), sorted(other.keys() - first.keys())
        if missing or surplus:
            example = (missing or surplus)[0]
            remedy = "add the missing answers to the file" if given else "finish both runs with evaluation.run"
            raise EchoError(
                f"{cannot}{len(missing)} questions are only in the first run and {len(surplus)} only in the second "
                f"(such as question {example[1]} of case {example[0]}); {remedy}"
            )
        for (case, question), one in first.items():
            twin = other[case, question]
            differing = [field for field in compared_fields if getattr(one, field) != getattr(twin, field)]
            if differing:
                name = "part" if differing[0] == "group" else differing[0]
                remedy = "write the same into both files" if given else "run both on the same dataset"
                raise EchoError(f"{cannot}the {name} of question {question} of case {case} differs; {remedy}")


def require_same_protocol(names: Sequence[str], runs: Sequence[Run], compared: Sequence[str]) -> None:
    """Raise EchoError if a run differs from the first one in a key of PROTOCOL that is not in `compared`.

    A key that an older version did not record in a run is not checked.
    """
    first = runs[0].provenance
    for name, run in zip(names[1:], runs[1:], strict=True):
        for key in PROTOCOL:
            differs = key in first and key in run.provenance and first[key] != run.provenance[key]
            if differs and key not in compared:
                raise EchoError(
                    f"{names[0]} and {name} cannot be compared: their {key} differs ({first[key]} and "
                    f"{run.provenance[key]}); run both with the same value, or add --compared {key} to compare them"
                )
