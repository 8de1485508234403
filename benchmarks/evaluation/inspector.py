"""Measure what an inspector costs besides its engine: `python -m benchmarks.evaluation.inspector --bundle DIR`.

Inspects drawn images one by one, as a camera delivers them. Reports the processor time of the inspector relative to
that of its engine, and memory after a tenth of the images and at the end.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.evaluation.overhead import memory_mib
from echo_ft.inference.inspector import Inspector
from echo_ft.records import Exchange, Generation


@dataclass
class EngineTime:
    """The backend of an inspector, which adds up the processor time of its calls."""

    inspector: Inspector
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.generate_untimed = self.inspector.generate
        self.inspector.generate = self.generate

    def generate(self, role: str, exchanges: Sequence[Exchange]) -> Sequence[Sequence[Generation]]:
        """Generate as the inspector's engine does."""
        began = time.process_time()
        try:
            return self.generate_untimed(role, exchanges)
        finally:
            self.seconds += time.process_time() - began


def draw_images(folder: Path, count: int, width: int) -> list[Path]:
    """Write `count` square images of noise on a gradient, and return their paths."""
    rng = np.random.default_rng(0)
    gradient = np.linspace(60, 190, width, dtype=np.float32)[None, :, None]
    paths = [folder / f"{index:05d}.png" for index in range(count)]
    for path in paths:
        values = gradient + rng.normal(0, 12, (width, width, 3))
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(path, compress_level=1)
    return paths


def measure_inspector(inspector: Inspector, paths: Sequence[Path]) -> tuple[float, float, float, float]:
    """Inspect images one by one.

    Returns the processor time per image of the inspector and of its engine, in seconds, and the memory of this process
    after a tenth of the images and at the end, in MiB.
    """
    inspector.predict(paths[0])  # the first call loads the model and other files, so it is not timed
    engine, early = EngineTime(inspector), 0.0
    began = time.process_time()
    for index, path in enumerate(paths, start=1):
        inspector.predict(path)
        if index == max(1, len(paths) // 10):
            early = memory_mib()
    seconds = time.process_time() - began
    inspector.generate = engine.generate_untimed
    return seconds / len(paths), engine.seconds / len(paths), early, memory_mib()


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", required=True, help="Bundle written by train.export.")
    parser.add_argument("--images", type=int, default=1000, help="Number of images.")
    parser.add_argument("--width", type=int, default=256, help="Width and height of the images in pixels.")
    options = parser.parse_args()
    inspector = Inspector.from_bundle(options.bundle)
    with tempfile.TemporaryDirectory() as name:
        paths = draw_images(Path(name), options.images, options.width)
        whole, engine, early, late = measure_inspector(inspector, paths)
    print("| images | s per image | s in the engine | ratio | MiB after a tenth | MiB at the end |")
    print("|---|---|---|---|---|---|")
    print(f"| {len(paths)} | {whole:.3f} | {engine:.3f} | {whole / engine:.3f} | {early:.0f} | {late:.0f} |")


if __name__ == "__main__":
    main()
