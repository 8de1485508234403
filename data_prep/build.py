"""Build a dataset folder from raw photographs.

    python -m data_prep.build --config recipes/tiny/data.yaml [--key value ...]

Writes inspections.jsonl, references.jsonl, questions.jsonl, knowledge.json, sft/<role>/{train,validation}.jsonl,
manifest.json, rejected.jsonl and preview.html. The same inputs and config give the same JSON lines, byte by byte.

Training rows are half of normal and half of defective cases in each product, for every role that is consulted about
both. With `routing: paper` the knowledge guide and the reasoning expert are consulted for defects only, in a run as in
training: not for Anomaly Detection, nor for the two Object kinds, and normal parts are asked nothing else. The manifest
has each role's cases and rows by side (`counts.sft_sides`) and a warning where one side is missing.

`--folds N --fold I` keeps a share of the train split out of the training rows, for adapters that have not seen it;
`--upstream predicted --traces RUN RUN ...` shows each role what the earlier ones said in runs of such adapters.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from data_prep import sources
from data_prep.output import Sides, Spool, image_digests, make_manifest, rejected_words, workspace, write_json
from data_prep.prepare import TRAINING, Material, balanced, collect, prepare, progress
from data_prep.settings import BuildConfig
from data_prep.upstream import Run, check_photographs, check_runs, described, predicted, read_runs
from echo_ft.config import parse, run_main
from echo_ft.dataset import images_fingerprint
from echo_ft.records import GOOD, ROLES, EchoError, Inspection, Question, Rejection, write_jsonl
from echo_ft.splits import check_fractions


def main(argv: list[str]) -> None:
    """Command line: build the dataset that the config describes and say what it holds."""
    (config,) = parse([BuildConfig], argv)
    manifest = build(config)
    counts = manifest["counts"]
    print(f"{config.output}: {sum(counts['photographs'].values())} photographs, split {manifest['splits']}")
    for split, conditions in counts["cases"].items():
        total, good = sum(conditions.values()), conditions.get(GOOD, 0)
        print(f"  {split:<10} {total:>6} cases: {good} normal, {total - good} defective")
    print(f"  references {counts['reference_pool']:>6} normal photographs")
    for warning in manifest["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(rejected_words(manifest))
    print(f"look at it: {config.output / 'preview.html'}")


def build(config: BuildConfig) -> dict[str, Any]:
    """Build the dataset folder `config.output`, whole or not at all; returns its manifest.

    Raises EchoError for an unknown source, a missing root, an output folder that is something else, and where
    nothing usable is left.
    """
    from data_prep.preview import write_preview
    from echo_ft.features import describer

    check(config)
    runs = read_runs(config.traces, config.routing)
    with workspace(config.output, config.settings(), config.overwrite) as folder:
        describer(config.descriptor)  # a wrong name is told before the photographs are looked at
        root, inspections, questions, rejections = photographs(config, folder)
        try:
            material = prepare(inspections, questions, rejections, root, folder, config)
        except EchoError as error:  # rejected.jsonl goes with the folder
            raise EchoError(f"{error}{_first(rejections)}") from error
        if runs:
            check_runs(runs, material, root)
        digests = image_digests(material.inspections, root)
        check_photographs(runs, images_fingerprint(digests))
        write_jsonl(folder / "rejected.jsonl", material.rejections)
        write_json(folder / "knowledge.json", material.knowledge)
        sides = write_sft(material, root, config, runs)
        manifest = make_manifest(material, sides, digests, root, config) | {"held_out": material.held_out}
        manifest |= {"upstream": config.upstream, "upstream_runs": described(runs)}
        write_json(folder / "manifest.json", manifest)
        write_preview(folder, root, manifest, material)
    return manifest


def photographs(config: BuildConfig, folder: Path) -> tuple[Path, list[Inspection], list[Question], list[Rejection]]:
    """The root of the config's source, and what is in it as `collect` has it; one that draws, draws into `folder`.

    Raises EchoError where nothing in it can be used.
    """
    root, items = records(config, folder)
    inspections, questions, rejections = collect(progress(items, "reading", "records"), root)
    if not inspections:
        where = config.annotations or root
        raise EchoError(f"the source {config.source} holds no usable photograph in {where}{_first(rejections)}")
    return root, inspections, questions, rejections


def _first(rejections: Sequence[Rejection]) -> str:
    """How many photographs and rows were rejected, and why the first one was."""
    if not rejections:
        return ""
    return f"; {len(rejections)} rejected, the first: {rejections[0].item}: {rejections[0].reason}"


def records(config: BuildConfig, folder: Path) -> tuple[Path, sources.Items]:
    """The root of the config's source, and what the source yields; one that draws, draws into `folder`."""
    root = _root(config, folder)
    root.mkdir(exist_ok=True)
    source = sources.SourceConfig(root, config.annotations, config.seed, config.parts)
    return root, _source(config.source).read(source)


def write_sft(material: Material, root: Path, config: BuildConfig, runs: Sequence[Run] = ()) -> dict[str, Sides]:
    """Write each role's training and validation rows; see `balanced` for the order and number of the former.

    What earlier roles said is taken from `runs`, where there are any, and is what they should say otherwise.
    Balanced are the cases that the role has rows for: a role that is consulted for defects only has nothing to balance.
    Returns what each file under sft holds, by `<role>/<split>`.
    """
    from echo_ft.targets import gold_upstream, training_exchanges

    sides = {}
    with ExitStack() as stack:
        spools = {
            (role, split): Spool(stack.enter_context(TemporaryFile(dir=material.folder)))
            for role in ROLES
            for split in TRAINING
        }
        # One role at a time would read each photograph four times.
        for inspection, case in progress(material.training_cases(), "writing", "cases"):
            said = predicted(case, runs, config.routing) if runs else None
            gold = gold_upstream(case, root, said)
            for role in ROLES:
                rows = training_exchanges(case, role, root, config.routing, said, gold)
                if rows:
                    spools[role, str(inspection.split)].add(inspection, rows)
        for (role, split), spool in spools.items():
            order = balanced(spool.cases, config.seed) if split == "train" and config.balance else spool.cases
            sides[f"{role}/{split}"] = spool.write(order, material.folder / "sft" / role / f"{split}.jsonl")
    return sides


def _source(name: str) -> Any:
    if name not in sources.NAMES:
        near = difflib.get_close_matches(name, sources.NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sources.NAMES)}"
        raise EchoError(f"no source is named {name!r}; {hint}")
    return importlib.import_module(f"data_prep.sources.{name}")


def check(config: BuildConfig) -> None:
    """Raise EchoError for whatever can be told to be wrong before the photographs are read."""
    _source(config.source)
    for key in ("annotations", "knowledge"):
        path = getattr(config, key)
        if path is not None and not (path.is_file() or (key == "knowledge" and path.is_dir())):
            raise EchoError(f"{key}: there is no file {path}; check the path")
    check_fractions(config.fractions)
    for pair, there in {
        "folds and fold": (config.folds is not None, config.fold is not None),
        "upstream predicted and traces": (config.upstream == "predicted", bool(config.traces)),
    }.items():
        if there[0] != there[1]:
            raise EchoError(f"{pair} go together; give both or neither")
    if config.source == "synthetic":
        if config.root is not None:
            raise EchoError("the source synthetic draws its images into the dataset folder; leave root out")
        return
    root = _root(config, config.output)
    if not root.is_dir():
        raise EchoError(f"root: there is no folder {root} (looked from {Path.cwd()}); check the path")
    if root.resolve().is_relative_to(config.output.resolve()):
        raise EchoError(f"the images in {root} lie inside the output {config.output}; choose another output")


def _root(config: BuildConfig, folder: Path) -> Path:
    if config.source == "synthetic":
        return folder  # it draws into images/ and masks/ there
    if config.root is not None:
        return config.root
    if config.annotations is not None:
        return config.annotations.parent
    raise EchoError(f"the source {config.source} needs root: the folder that holds its images")


if __name__ == "__main__":
    run_main(main)
