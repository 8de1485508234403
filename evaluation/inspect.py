"""Inspect images with trained adapters: `python -m evaluation.inspect IMAGE_OR_FOLDER --adapters DIR [--json]`.

Prints one line per image: the verdict, P(defect) against the threshold, and what the experts say. The exit status is 1
if an image was flagged, and 0 if none was.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from echo_ft import config as configs
from echo_ft.config import named_first
from echo_ft.errors import EchoError
from echo_ft.inference.inspector import Inspector, Result, list_images


@dataclass(frozen=True)
class InspectConfig:
    """Options of `python -m evaluation.inspect`."""

    images: str = field(metadata={"help": "An image, or a folder of images. --images itself is optional."})
    adapters: str = field(metadata={"help": "Folder with one adapter per role, written by train/sft.py."})
    product: str | None = field(
        default=None,
        metadata={"help": "Product in the images. Default: that of the most similar normal image."},
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Dataset with the normal references. Default: the one that the adapters were trained on."},
    )
    calibration: str | None = field(
        default=None,
        metadata={"help": "report.json of `evaluation.score --calibration`, for temperature and threshold."},
    )
    threshold: float | None = field(
        default=None,
        metadata={"help": "P(defect) from which an image is flagged. Default: the calibration's, otherwise 0.5."},
    )
    json: bool = field(default=False, metadata={"help": "Print one JSON object per image."})


def main(argv: list[str]) -> None:
    """Inspect the images and print the results. Exits with 1 if an image was flagged."""
    (config,) = configs.parse([InspectConfig], named_first(argv, "--images"))
    path = Path(config.images)
    images = list_images(path) if path.is_dir() else [path]
    if not images[0].is_file():
        raise EchoError(f"there is no image or folder {path}; check the path")
    inspector = Inspector.from_adapters(
        config.adapters, dataset=config.dataset, calibration=config.calibration, threshold=config.threshold
    )
    flagged = 0
    for result in inspector.stream(images, config.product):
        flagged += result.pred_label
        print(json.dumps(asdict(result), ensure_ascii=False) if config.json else describe(result), flush=True)
    if not config.json:
        print(f"{flagged} of {len(images)} images flagged")
    if flagged:
        sys.exit(1)


def describe(result: Result) -> str:
    """Return one line about an image."""
    verdict = "DEFECT" if result.pred_label else "ok"
    named = f" {result.condition}" if result.condition else ""
    score = f"P(defect) {result.pred_score:.3f} (threshold {result.threshold:g})"
    return f"{result.image}: {verdict}{named}, {score}, {result.product}. {result.explanation}".rstrip()


if __name__ == "__main__":
    configs.run_main(main)
