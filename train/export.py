"""Export the tuned pipeline for inference: `python -m train.export --adapters DIR --output BUNDLE`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from echo_ft import config as configs
from echo_ft.data.dataset import Dataset, load_dataset, require_not_rebuilt
from echo_ft.errors import EchoError
from echo_ft.inference.decision import describe_decision, measured_dtype, read_measurement
from echo_ft.inputs import read_json_object
from echo_ft.model.adapters import Adapter, AdapterCard, find_adapters, read_card
from echo_ft.model.loading import DTYPES, base_fingerprint
from echo_ft.records import ROLES
from echo_ft.retrieval.products import REFERENCE_CHOICES
from echo_ft.terminal import LOGGER
from echo_ft.tracking import (
    REPORT_TO,
    adapter_artifact,
    bundle_artifact,
    evaluation_artifact,
    experiment_name,
    link_bundle,
    log_run,
    use_artifact,
)


@dataclass(frozen=True)
class ExportConfig:
    """Options of `python -m train.export`."""

    adapters: str = field(metadata={"help": "Folder with one adapter per role, made by train/sft.py."})
    output: str = field(metadata={"help": "Folder to write the bundle to. It must not exist."})
    merge: list[str] = field(
        default_factory=lambda: ["decision_maker"],
        metadata={
            "help": "Roles to export as merged full models too, for servers without LoRA. `none` exports no merged "
            "model."
        },
    )
    references: str = field(
        default="copy",
        metadata={
            "help": "How the bundle stores the normal images. copy: as copies, so it needs no dataset. path: as paths "
            "into the dataset. none: not at all, so it cannot inspect images.",
            "choices": list(REFERENCE_CHOICES),
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Dataset with the normal images and the knowledge. Default: the one that the adapters "
            "were trained on."
        },
    )
    report: str | None = field(
        default=None,
        metadata={
            "help": "report.json of a run with these adapters. Its results go into the model card. The bundle uses "
            "the options of the run and its calibration, if there is one. W&B shows the run as an input of the bundle."
        },
    )
    licence: str | None = field(
        default=None, metadata={"help": "Licence for the normal images and the knowledge, for the model card."}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Current location of the base model; default: the one used in training."}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Data type of the exported weights; auto: as in the report's run, or else as in the checkpoint.",
            "choices": list(DTYPES),
        },
    )
    report_to: str = field(default="none", metadata=REPORT_TO)
    registry: str | None = field(
        default=None,
        metadata={
            "help": "Collection in the W&B registry to link the bundle to, such as wandb-registry-model/inspection; "
            "needs report_to wandb."
        },
    )
    aliases: list[str] = field(
        default_factory=list, metadata={"help": "Aliases for the bundle in the registry, such as staging."}
    )


def main(argv: list[str]) -> None:
    """Check the adapters, export them, and report how much the reloaded logits deviate.

    Raises EchoError after the export if a merged model is missing.
    """
    (config,) = configs.parse([ExportConfig], argv)
    check_tracking(config)

    from echo_ft.export.bundle import ExportPlan, export_bundle

    folder = Path(config.adapters)
    card = read_card(folder / ROLES[0])
    base = config.base_model or card.base_model
    weights = base_fingerprint(base, card.base_revision)
    adapters = {
        role: replace(found, card=replace(found.card, base_model=base))
        for role, found in find_adapters(folder, base, weights, card.min_pixels, card.max_pixels).items()
    }
    measurement = None if config.report is None else read_measurement(Path(config.report), adapters)
    plan = ExportPlan(
        adapters,
        dataset=find_dataset(config, card),
        references=config.references,
        measurement=measurement,
        licence=config.licence,
        merge=[] if config.merge == ["none"] else list(dict.fromkeys(config.merge)),
        dtype=measured_dtype(config.dtype, measurement, replace(card, base_model=base)),
    )
    bundle = export_bundle(plan, Path(config.output))
    for part, fidelity in bundle.fidelity.items():
        print(
            f"{part}: the reloaded logits are within {fidelity.max_difference:.2g} of those of the trained adapter, "
            f"{fidelity.relative_error:.2%} of its effect"
        )
    if bundle.compared:
        print(f"the reloaded bundle gives the adapters' letters and probabilities for {bundle.compared} images")
    print(f"decision: {describe_decision(measurement)}")
    print(f"done: {config.output}; its README.md describes how to use and serve it")
    if config.report_to == "wandb":
        log_export(config, find_adapters(folder, base, weights, card.min_pixels, card.max_pixels))
    if bundle.failed:
        reasons = "; ".join(f"{role}: {reason}" for role, reason in bundle.failed.items())
        raise EchoError(
            f"{config.output} has all adapters but no merged model for {reasons}. The adapters work without it; "
            "--merge none exports no merged model"
        )


def find_dataset(config: ExportConfig, card: AdapterCard) -> Dataset | None:
    """Return the dataset of the bundle's normal images, or None if it has none.

    Raises EchoError if the dataset is missing, or if the default dataset was rebuilt since the training.
    """
    if config.references == "none":
        return None
    try:
        dataset = load_dataset(Path(config.dataset or card.dataset))
    except EchoError as error:
        raise EchoError(f"{error}. Pass its folder as --dataset, or use --references none") from error
    if config.dataset is None:
        require_not_rebuilt(dataset, card.dataset_fingerprint)
    return dataset


def check_tracking(config: ExportConfig) -> None:
    """Raise EchoError for options of W&B that have no effect."""
    if config.registry is not None and config.report_to != "wandb":
        raise EchoError("registry needs W&B; add --report_to wandb or remove registry")
    if config.aliases and config.registry is None:
        raise EchoError("aliases need a collection in the registry; add --registry or remove aliases")


def log_export(config: ExportConfig, adapters: Mapping[str, Adapter]) -> None:
    """Log the bundle to Weights & Biases, with its adapters and the run of its report as inputs."""
    output = Path(config.output)
    with log_run("export", output.resolve().name, experiment_name(output), asdict(config)) as run:
        for adapter in adapters.values():
            use_artifact(run, adapter_artifact(adapter.path, asdict(adapter.card)))
        if config.report is not None:
            evaluation = Path(config.report).parent
            if (evaluation / "run.json").is_file():
                use_artifact(run, evaluation_artifact(evaluation))
            else:
                LOGGER.warning("W&B shows no run as an input of the bundle: %s is not in a run folder", config.report)
        bundle = bundle_artifact(output, read_json_object(output / "bundle.json"))
        run.log_artifact(bundle)
        if config.registry is not None:
            link_bundle(run, bundle, config.registry, config.aliases)


if __name__ == "__main__":
    configs.run_main(main)
