"""Export trained adapters for inference: `python -m train.export --adapters DIR --output BUNDLE`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from echo_ft import config as configs
from echo_ft.errors import EchoError
from echo_ft.model.adapters import find_adapters, read_card
from echo_ft.model.loading import DTYPES, base_fingerprint
from echo_ft.records import ROLES


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
    base_model: str | None = field(
        default=None, metadata={"help": "Current location of the base model; default: the one used in training."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "Data type of the exported weights; auto: that of the checkpoint.", "choices": list(DTYPES)},
    )


def main(argv: list[str]) -> None:
    """Check the adapters, export them, and report how far the reloaded logits deviate.

    Raises EchoError after the export if a merged model is missing.
    """
    (config,) = configs.parse([ExportConfig], argv)

    from echo_ft.inference.bundle import export_bundle

    folder = Path(config.adapters)
    card = read_card(folder / ROLES[0])
    base = config.base_model or card.base_model
    weights = base_fingerprint(base, card.base_revision)
    adapters = {
        role: replace(found, card=replace(found.card, base_model=base))
        for role, found in find_adapters(folder, base, weights, card.min_pixels, card.max_pixels).items()
    }
    merge = [] if config.merge == ["none"] else config.merge
    bundle = export_bundle(adapters, Path(config.output), merge, config.dtype)
    for part, fidelity in bundle.fidelity.items():
        print(
            f"{part}: the reloaded logits are within {fidelity.max_difference:.2g} of those of the trained adapter, "
            f"{fidelity.relative_error:.2%} of its effect"
        )
    print(f"done: {config.output}; its README.md describes how to serve it")
    if bundle.failed:
        reasons = "; ".join(f"{role}: {reason}" for role, reason in bundle.failed.items())
        raise EchoError(
            f"{config.output} has all adapters but no merged model of {reasons}. The adapters work without it; "
            "--merge none exports no merged model"
        )


if __name__ == "__main__":
    configs.run_main(main)
