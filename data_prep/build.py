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

from typing import Any

from data_prep.collect import check_config, usable_images
from data_prep.config import BuildConfig
from data_prep.manifest import image_digests, make_manifest, rejected_words
from data_prep.prepare import prepare
from data_prep.preview import write_preview
from data_prep.progress import first_rejection
from data_prep.training_rows import write_sft
from data_prep.upstream import check_photographs, check_runs, described, read_runs
from data_prep.workspace import workspace
from echo_ft.config import parse, run_main
from echo_ft.data.dataset import images_fingerprint
from echo_ft.errors import EchoError
from echo_ft.files import write_json, write_jsonl
from echo_ft.records import GOOD
from echo_ft.retrieval.descriptors import describer
from echo_ft.terminal import LOGGER


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
        LOGGER.warning(warning)
    print(rejected_words(manifest))
    print(f"look at it: {config.output / 'preview.html'}")


def build(config: BuildConfig) -> dict[str, Any]:
    """Build the dataset folder `config.output`, whole or not at all; returns its manifest.

    Raises EchoError for an unknown source, a missing root, an output folder that is something else, and where
    nothing usable is left.
    """

    check_config(config)
    runs = read_runs(config.traces, config.routing)
    with workspace(config.output, config.settings(), config.overwrite) as folder:
        describer(config.descriptor)  # a wrong name is told before the photographs are looked at
        root, inspections, questions, rejections = usable_images(config, folder)
        try:
            material = prepare(inspections, questions, rejections, root, folder, config)
        except EchoError as error:  # rejected.jsonl goes with the folder
            raise EchoError(f"{error}{first_rejection(rejections)}") from error
        if runs:
            check_runs(runs, material, root)
        digests = image_digests(material.inspections, root)
        check_photographs(runs, images_fingerprint(digests))
        write_jsonl(folder / "rejected.jsonl", material.rejections)
        write_json(folder / "knowledge.json", material.knowledge)
        sides, unused = write_sft(material, root, config, runs)
        manifest = make_manifest(material, sides, unused, digests, root, config) | {"held_out": material.held_out}
        manifest |= {"upstream": config.upstream, "upstream_runs": described(runs)}
        write_json(folder / "manifest.json", manifest)
        write_preview(folder, root, manifest, material)
    return manifest


if __name__ == "__main__":
    run_main(main)
