"""Build a dataset folder from raw images.

    python -m data_prep.build --config recipes/tiny/data.yaml [--key value ...]

Writes inspections.jsonl, references.jsonl, questions.jsonl, knowledge.json, sft/<role>/{train,validation}.jsonl,
manifest.json, rejected.jsonl and preview.html. The same inputs and config give byte-identical JSON lines.

For every role that is consulted about both normal and defective parts, half of each product's training cases are normal
and half are defective. With `routing: paper`, the knowledge guide and the reasoning expert are consulted only about
defects, in evaluation as in training. They are not consulted about Anomaly Detection and the two Object question types,
and normal parts get no other questions. The manifest counts each role's cases and rows for each side
(`counts.sft_sides`) and warns if a side is missing.

`--folds N --fold I` leaves part of the train split out of the training rows, so that the adapters have not seen it.
`--upstream predicted --traces RUN RUN ...` shows each role what earlier roles produced in runs with such adapters.
"""

from __future__ import annotations

from typing import Any

from data_prep.collect import check_config, usable_images
from data_prep.config import BuildConfig
from data_prep.manifest import condition_summary, image_digests, make_manifest, rejection_summary
from data_prep.prepare import draft_dataset
from data_prep.preview import write_preview
from data_prep.rejections import first_rejection
from data_prep.training_rows import write_training_rows
from data_prep.upstream import check_images, check_runs, describe_runs, read_runs
from data_prep.workspace import workspace
from echo_ft.config import PARTLY_DONE, parse, run_main
from echo_ft.data.dataset import images_fingerprint, write_manifest
from echo_ft.data.splits import UNLABELLED_SPLIT
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl, write_json, write_jsonl
from echo_ft.records import GOOD, Rejection
from echo_ft.retrieval.descriptors import load_extractor
from echo_ft.terminal import LOGGER
from echo_ft.tracking import dataset_artifact, log_run, numbers_by_path

UNLABELLED_USE = "without a condition, so only for runs: no training, no audit, no scores"
"""Note on UNLABELLED_SPLIT in the summary."""


def main(argv: list[str]) -> int:
    """Build the dataset that the config describes and print a summary. Returns the exit status."""
    (config,) = parse([BuildConfig], argv)
    manifest = build(config)
    counts = manifest["counts"]
    print(f"{config.output}: {sum(counts['photographs'].values())} images, split {manifest['splits']}")
    for split, conditions in counts["cases"].items():
        total, good = sum(conditions.values()), conditions.get(GOOD, 0)
        sides = f"{good} normal, {total - good} defective" if split != UNLABELLED_SPLIT else UNLABELLED_USE
        print(f"  {split:<10} {total:>6} cases: {sides}")
    print(f"  conditions {condition_summary(manifest)}")
    print(f"  references {counts['reference_pool']:>6} normal images")
    for warning in manifest["warnings"]:
        LOGGER.warning(warning)
    if config.report_to == "wandb":
        log_build(config, manifest)
    print(f"preview: {config.output / 'preview.html'}")
    print(rejection_summary(manifest))
    first = next(read_jsonl(config.output / "rejected.jsonl", Rejection), None)
    if first:
        print(f"  first: {first.item}: {first.reason}")
    return PARTLY_DONE if first and config.strict else 0


def log_build(config: BuildConfig, manifest: dict[str, Any]) -> None:
    """Log the dataset to Weights & Biases, with its image counts."""
    name = config.output.resolve().name
    with log_run("build", name, name, config.dataset_options()) as run:
        run.log(numbers_by_path({"counts": manifest["counts"], "rejected": manifest["rejected"]}))
        run.log_artifact(dataset_artifact(config.output, manifest))


def build(config: BuildConfig) -> dict[str, Any]:
    """Build the dataset folder `config.output`, completely or not at all, and return its manifest.

    Raises EchoError for an unknown source, a missing root, an output folder that must not be replaced, or traces that
    do not match. Also raises it if no usable image is left.
    """
    check_config(config)
    runs = read_runs(config.traces, config.routing)
    with workspace(config.output, config.dataset_options(), config.overwrite) as folder:
        load_extractor(config.descriptor)  # this reports an unknown name before any image is read
        usable = usable_images(config, folder)
        root = usable.root
        try:
            draft = draft_dataset(usable, folder, config)
        # The folder and its rejected.jsonl will be removed, so the message has the first rejection.
        except EchoError as error:
            raise EchoError(f"{error}{first_rejection(usable.rejections)}") from error
        if runs:
            check_runs(runs, draft, root)
        digests = image_digests(draft.inspections, root)
        check_images(runs, images_fingerprint(digests))
        write_jsonl(folder / "rejected.jsonl", draft.rejections)
        write_json(folder / "knowledge.json", draft.knowledge)
        side_counts, unused = write_training_rows(draft, root, config, runs)
        manifest = make_manifest(draft, side_counts, unused, digests, root, config) | {"held_out": draft.held_out}
        manifest |= {"upstream": config.upstream, "upstream_runs": describe_runs(runs)}
        write_manifest(folder, manifest)
        write_preview(folder, root, manifest, draft)
    return manifest


if __name__ == "__main__":
    run_main(main)
