"""How fast and in how much memory a long list becomes a dataset: `python -m benchmarks.data.rows [--rows 200000]`.

The list names a few drawn photographs under many names (hard links), each name a part of its own: `data_prep.build`
reads, checks and describes every one, but there is nothing to see in them that it has not seen. Three products, three
normal rows to two defective ones, one in four of which has a mask; features of scikit-image, three references, all four
roles. The build runs in a process of its own, whose peak memory counts.

Rates are of processor time, that of all threads, so that what else runs on the machine counts little. Image work is the
part of it that is spent in opening and hashing files and in looking at their pixels (`IMAGE_WORK`), in whichever
thread. The rate of rows is without it, and it is printed beside: what it costs with real photographs depends on them.
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

from echo_ft.drawn import parts  # nothing that imports what IMAGE_WORK names: that is for the process that builds

IMAGE_WORK = {
    "echo_ft.provenance": ("content_hash",),
    "echo_ft.images.decode": ("image_size", "load_image", "decode", "depth"),
    "echo_ft.images.masks": ("measure", "load_mask", "load_grey", "resize_mask", "misfit", "contrast"),
    "echo_ft.experts.targets": ("load_compared",),
    "data_prep.faults": ("image_fault", "mask_fault", "boxes_fault"),
}
"""Functions that look at files or pixels, by module, each module after those that it imports."""

SOURCES = 30
"""Photographs that are drawn; the rows are names of them."""

SIZE = (56, 56)
"""Their height and width: as small as defects can still be seen, as image work is not what is measured."""

GOOD, DEFECTS = "good", ("scratch", "stain")

KNOWLEDGE = {
    GOOD: "An even surface without marks. It works as it should.",
    "scratch": "Thin bright straight lines across the surface. They open a path for leaks.",
    "stain": "A brown translucent blot with a darker rim. It starts corrosion.",
}


@dataclass(frozen=True)
class Measured:
    """What a build took."""

    seconds: float
    """Wall clock."""
    processor: float
    """Processor time of all threads, in seconds."""
    image_work: float
    """The part of it inside IMAGE_WORK."""
    peak_mib: float
    rows: int
    """Photographs in the dataset."""
    training_rows: int


def draw(folder: Path, rows: int) -> Path:
    """Draw SOURCES photographs, give them `rows` names, and list those in rows.jsonl; returns the list's path."""
    products = list(parts.DEMO_PRODUCTS)
    shown = []
    for number in range(SOURCES):
        product = products[number % len(products)]
        condition = GOOD if number % 5 < 3 else DEFECTS[number % 5 - 3]
        photo = parts.photograph(parts.demo_part(product, condition, number), number, SIZE)
        names = [f"{number}.png", f"{number}-mask.png"] if number % 10 == 3 else [f"{number}.png"]
        for name, pixels in zip(names, (photo.image, photo.mask), strict=False):
            Image.fromarray(pixels).save(folder / name)
        shown.append((product, condition, names))
    listed = folder / "rows.jsonl"
    with open(listed, "w", encoding="utf-8") as file:
        for row in range(rows):
            product, condition, names = shown[row % SOURCES]
            place = f"{row // 1000:04d}"
            if row % 1000 == 0:
                (folder / place).mkdir()
            linked = [f"{place}/{row:07d}-{name}" for name in names]
            for name, link in zip(names, linked, strict=True):
                os.link(folder / name, folder / link)
            entry = {"image": linked[0], "product": product, "condition": condition, "group": str(row)}
            file.write(json.dumps(entry | ({"mask": linked[1]} if linked[1:] else {})) + "\n")
    return listed


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """While it lasts, add up in `seconds[0]` the processor time inside IMAGE_WORK, each thread's own.

    A call within another does not count twice. Modules that bind these functions by name have to be imported inside.
    """
    here, adding = threading.local(), threading.Lock()

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if getattr(here, "inside", False):
                return function(*arguments, **options)
            here.inside, started = True, time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                here.inside = False
                with adding:
                    seconds[0] += time.thread_time() - started

        return call

    plain: list[tuple[Any, str, Any]] = []
    try:
        for name, functions in IMAGE_WORK.items():
            module = importlib.import_module(name)
            for function in functions:
                plain.append((module, function, getattr(module, function)))
                setattr(module, function, clocked(getattr(module, function)))
        yield
    finally:
        for module, name, function in plain:
            setattr(module, name, function)


def measure(listed: Path, output: Path) -> Measured:
    """Build the list in a process of its own, with features of scikit-image and all four roles."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_build, listed, output).result()


def _build(listed: Path, output: Path) -> Measured:
    image_work = [0.0]
    with timed(image_work):
        from data_prep.build import build
        from data_prep.config import BuildConfig

        knowledge = listed.with_name("knowledge.json")
        knowledge.write_text(json.dumps({listed.stem: dict.fromkeys(parts.DEMO_PRODUCTS, KNOWLEDGE)}))
        config = BuildConfig("manifest", output, annotations=listed, knowledge=knowledge, descriptor="skimage")
        image_work[0], started, processor = 0.0, time.perf_counter(), time.process_time()
        counts = build(config)["counts"]
        return Measured(
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
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--folder", type=Path, help="where to draw and build, on one disk; a temporary one if absent")
    options = parser.parse_args()
    print("| rows | training rows | wall s | processor s | of it image work | rows/s without it | peak MiB |")
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
