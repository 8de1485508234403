"""Export trained adapters for inference: `python -m train.export --adapters DIR --output BUNDLE`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from echo_ft import config as configs
from echo_ft.model.adapters import find_adapters, read_card
from echo_ft.model.loading import DTYPES, base_fingerprint
from echo_ft.records import ROLES


@dataclass(frozen=True)
class ExportConfig:
    """Options of `python -m train.export`."""

    adapters: str = field(metadata={"help": "Folder with an adapter a role, made by train/sft.py."})
    output: str = field(metadata={"help": "The bundle's folder; must not exist."})
    merge: list[str] = field(
        default_factory=lambda: ["decision_maker"],
        metadata={"help": "Roles to also write as whole merged models, for servers without LoRA; `none` for none."},
    )
    base_model: str | None = field(default=None, metadata={"help": "Where the base model is now; default: as trained."})
    dtype: str = field(
        default="auto", metadata={"help": "Weights' type; auto: the checkpoint's.", "choices": list(DTYPES)}
    )


def main(argv: list[str]) -> None:
    """Check, export, compare, say so."""
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
    for part, one in export_bundle(adapters, Path(config.output), merge, config.dtype).items():
        print(
            f"{part}: reloaded, logits within {one.difference:.2g} of the trained adapter's, {one.share:.2%} of what "
            "it changes"
        )
    print(f"done: {config.output}; its README.md says how to serve it")


if __name__ == "__main__":
    configs.run_main(main)
