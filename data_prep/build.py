"""Build a dataset folder from raw photographs.

    python -m data_prep.build --config recipes/tiny/data.yaml [--key value ...]

Writes inspections.jsonl, references.jsonl, questions.jsonl, knowledge.json, sft/<role>/{train,validation}.jsonl,
manifest.json, rejected.jsonl and preview.html. The same inputs and config give the same JSON lines, byte by byte.

Training rows are half of normal and half of defective cases in each product, for every role that is consulted about
both. With `routing: paper` the knowledge guide and the reasoning expert are consulted for defects only, in a run as in
training: not for Anomaly Detection, nor for the two Object kinds, and normal parts are asked nothing else. The manifest
has each role's cases and rows by side (`counts.sft_sides`) and a warning where one side is missing.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from pathlib import Path
from typing import Any

from data_prep import sources
from data_prep.output import make_manifest, rejected_words, workspace, write_json
from data_prep.prepare import Material, balanced, collect, prepare, progress
from data_prep.settings import BuildConfig
from echo_ft.config import parse, run_main
from echo_ft.records import GOOD, ROLES, EchoError, Exchange, write_jsonl
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

    module = _source(config.source)
    _check(config)
    with workspace(config.output, config.settings(), config.overwrite) as folder:
        root = _root(config, folder)
        root.mkdir(exist_ok=True)
        source = sources.SourceConfig(root, config.annotations, config.seed, config.parts)
        items = list(progress(module.read(source), "reading", "records"))
        describer(config.descriptor)  # a wrong name is told before the photographs are looked at
        inspections, questions, rejections = collect(items, root)
        if not inspections:
            first = f"; the first: {rejections[0].item}: {rejections[0].reason}" if rejections else ""
            raise EchoError(f"the source {config.source} holds no usable photograph in {root}{first}")
        material = prepare(inspections, questions, rejections, root, config)
        write_jsonl(folder / "inspections.jsonl", material.inspections)
        write_jsonl(folder / "references.jsonl", material.references)
        write_jsonl(folder / "questions.jsonl", material.questions)
        write_jsonl(folder / "rejected.jsonl", material.rejections)
        write_json(folder / "knowledge.json", material.knowledge)
        write_sft(material, folder, root, config)
        manifest = make_manifest(material, folder, root, config) | {"held_out": material.held_out}
        write_json(folder / "manifest.json", manifest)
        write_preview(folder, root, manifest, material)
    return manifest


def write_sft(material: Material, folder: Path, root: Path, config: BuildConfig) -> None:
    """Write each role's training and validation rows; see `balanced` for the order and number of the former.

    Balanced are the cases that the role has rows for: a role that is consulted for defects only has nothing to balance.
    """
    from echo_ft.targets import gold_upstream, training_exchanges

    for split in ("train", "validation"):
        cases = material.cases(split)
        # One role at a time would read each photograph four times; the rows of a split fit in memory.
        rows: dict[tuple[str, str], list[Exchange]] = {}
        for case in progress(cases, f"writing {split}", "cases"):
            gold = gold_upstream(case, root)
            for role in ROLES:
                rows[role, case.id] = training_exchanges(case, role, root, config.routing, gold=gold)
        for role in ROLES:
            own = [case for case in cases if rows[role, case.id]]
            if split == "train" and config.balance:
                own = balanced(own, config.seed)
            write_jsonl(folder / "sft" / role / f"{split}.jsonl", (row for case in own for row in rows[role, case.id]))


def _source(name: str) -> Any:
    if name not in sources.NAMES:
        near = difflib.get_close_matches(name, sources.NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sources.NAMES)}"
        raise EchoError(f"no source is named {name!r}; {hint}")
    return importlib.import_module(f"data_prep.sources.{name}")


def _check(config: BuildConfig) -> None:
    """Raise EchoError for whatever can be told to be wrong before the photographs are read."""
    for key in ("annotations", "knowledge"):
        path = getattr(config, key)
        if path is not None and not path.is_file():
            raise EchoError(f"{key}: there is no file {path}; check the path")
    check_fractions(config.fractions)
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
