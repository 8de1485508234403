"""Measure time and memory of building a large dataset: `python -m benchmarks.data.rows [--rows 200000]`.

The manifest lists a few drawn images under many names (hard links). Each name counts as a separate part.
`data_prep.build` reads, checks and describes every name, but the pixels repeat. There are three products, with three
normal rows for every two defective ones. A quarter of the defective rows have masks. The build uses scikit-image
descriptors, three references and all four roles. It runs in its own process, and the benchmark reports the peak memory
of that process.

Rates use processor time, summed over all threads, so other processes on the machine have little effect. Image work is
the processor time spent in IMAGE_WORK: opening and hashing files and processing their pixels, in any thread. The row
rate excludes image work, because its cost depends on the images. The table lists it separately.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

# Import nothing here that imports the modules in IMAGE_WORK: only the build process may load them, after patching.
from echo_ft.drawn import parts

IMAGE_WORK = {
    "echo_ft.provenance": ("content_hash",),
    "echo_ft.images.decode": ("image_size", "load_image", "decode", "bit_depth"),
    "echo_ft.images.masks": ("measure", "load_mask", "load_grey", "resize_mask", "misfit", "contrast"),
    "echo_ft.experts.targets": ("load_compared",),
    "data_prep.faults": ("check_image", "mask_fault", "boxes_fault"),
}
"""Functions that read files or pixels, by module. A module follows the modules that it imports."""

SOURCES = 30
"""Number of images to draw; every row names one of them."""

SIZE = (56, 56)
"""Height and width of an image: small, because image work is not measured, but large enough to show defects."""

GOOD, DEFECTS = "good", ("scratch", "stain")

KNOWLEDGE = {
    GOOD: "An even surface without marks. It works as it should.",
    "scratch": "Thin bright straight lines across the surface. They open a path for leaks.",
    "stain": "A brown translucent blot with a darker rim. It starts corrosion.",
}


@dataclass(frozen=True)
class Measurement:
    """Time, memory and size of one build."""

    seconds: float
    """Wall-clock time."""
    processor: float
    """Processor time of all threads, in seconds."""
    image_work: float
    """Processor time inside IMAGE_WORK, in seconds."""
    peak_mib: float
    rows: int
    """Images in the dataset."""
    training_rows: int


def draw(folder: Path, rows: int) -> Path:
    """Draw SOURCES images, link them under `rows` names and list these in rows.jsonl; returns its path."""
    products = list(parts.DEMO_PRODUCTS)
    drawn = []
    for number in range(SOURCES):
        product = products[number % len(products)]
        condition = GOOD if number % 5 < 3 else DEFECTS[number % 5 - 3]
        photo = parts.render_part(parts.demo_part(product, condition, number), number, SIZE)
        names = [f"{number}.png", f"{number}-mask.png"] if number % 10 == 3 else [f"{number}.png"]
        for name, pixels in zip(names, (photo.image, photo.mask), strict=False):
            Image.fromarray(pixels).save(folder / name)
        drawn.append((product, condition, names))
    manifest = folder / "rows.jsonl"
    with open(manifest, "w", encoding="utf-8") as file:
        for row in range(rows):
            product, condition, names = drawn[row % SOURCES]
            subfolder = f"{row // 1000:04d}"
            if row % 1000 == 0:
                (folder / subfolder).mkdir()
            linked = [f"{subfolder}/{row:07d}-{name}" for name in names]
            for name, link in zip(names, linked, strict=True):
                os.link(folder / name, folder / link)
            entry = {"image": linked[0], "product": product, "condition": condition, "group": str(row)}
            file.write(json.dumps(entry | ({"mask": linked[1]} if linked[1:] else {})) + "\n")
    return manifest


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Add the processor time inside IMAGE_WORK, summed over threads, to `seconds[0]`.

    Nested calls count once. Import modules that bind these functions by name inside this context.
    """
    thread, total_lock = threading.local(), threading.Lock()

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if getattr(thread, "inside", False):
                return function(*arguments, **options)
            thread.inside, started = True, time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                thread.inside = False
                with total_lock:
                    seconds[0] += time.thread_time() - started

        return call

    originals: list[tuple[Any, str, Any]] = []
    try:
        for name, functions in IMAGE_WORK.items():
            module = importlib.import_module(name)
            for function in functions:
                originals.append((module, function, getattr(module, function)))
                setattr(module, function, clocked(getattr(module, function)))
        yield
    finally:
        for module, name, function in originals:
            setattr(module, name, function)


def measure(manifest: Path, output: Path) -> Measurement:
    """Build the dataset in a separate process, with scikit-image descriptors and all four roles."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_build, manifest, output).result()


def _build(manifest: Path, output: Path) -> Measurement:
    image_work = [0.0]
    with timed(image_work):
        from data_prep.build import build
        from data_prep.config import BuildConfig

        knowledge = manifest.with_name("knowledge.json")
        knowledge.write_text(json.dumps({manifest.stem: dict.fromkeys(parts.DEMO_PRODUCTS, KNOWLEDGE)}))
        config = BuildConfig("manifest", output, annotations=manifest, knowledge=knowledge, descriptor="skimage")
        image_work[0], started, processor = 0.0, time.perf_counter(), time.process_time()
        counts = build(config)["counts"]
        return Measurement(
            time.perf_counter() - started,
            time.process_time() - processor,
            image_work[0],
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
            sum(counts["photographs"].values()),
            sum(counts["sft_rows"].values()),
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000], help="Rows per manifest.")
    parser.add_argument(
        "--folder",
        type=Path,
        help="Folder in which to draw the images and build the dataset; defaults to a temporary folder.",
    )
    options = parser.parse_args()
    print("| rows | training rows | wall s | processor s | image work s | rows/s without image work | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = measure(draw(Path(folder), rows), Path(folder) / "dataset")
        rate = found.rows / (found.processor - found.image_work)
        print(
            f"| {found.rows} | {found.training_rows} | {found.seconds:.0f} | {found.processor:.0f} "
            f"| {found.image_work:.0f} | {rate:.0f} | {found.peak_mib:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
