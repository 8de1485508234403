"""Measure what checksums and flushes add to a build and to a training: `python -m benchmarks.data.verification`.

The manifest is that of `benchmarks.data.rows`. The dataset is built twice with the same descriptor cache. The second
build overwrites the first and finds all descriptors in the cache. The added work is computing checksums of the
records and of the cache, and flushing files to disk. The start of training means planning the rows for one role,
without loading a model. There, the added work is computing checksums of the dataset. Training also hashes each image
when it first reads it; this time is compared with the time for decoding.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import data_prep.manifest
import echo_ft.data.dataset
import echo_ft.files
import echo_ft.retrieval.descriptor_cache
from benchmarks.data.rows import KNOWLEDGE, draw
from data_prep.build import build
from data_prep.config import BuildConfig
from echo_ft.data.dataset import is_changed, load_dataset, read_digests
from echo_ft.drawn import parts
from echo_ft.files import read_jsonl, write_json
from echo_ft.images.decode import load_image
from echo_ft.model.loading import load_processor
from echo_ft.model.rows import RowBuilder
from echo_ft.records import Exchange
from echo_ft.training.planning import plan

ADDED_TO_BUILD = (
    (data_prep.manifest, "record_digests"),
    (echo_ft.retrieval.descriptor_cache, "require_unchanged_shard"),
    (echo_ft.files, "flush"),
    (echo_ft.files, "flush_tree"),
)
"""The functions with which a build survives a power failure and notices changes."""


@contextmanager
def clocked(functions: tuple[tuple[Any, str], ...]) -> Iterator[list[float]]:
    """Yield a list whose only item is the seconds spent in the functions so far. A call inside a call counts once."""
    seconds, inside = [0.0], [False]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if inside[0]:
                return function(*arguments)
            inside[0], start = True, time.perf_counter()
            try:
                return function(*arguments)
            finally:
                inside[0] = False
                seconds[0] += time.perf_counter() - start

        return call

    originals = [(module, name, getattr(module, name)) for module, name in functions]
    try:
        for module, name, function in originals:
            setattr(module, name, timed(function))
        yield seconds
    finally:
        for module, name, function in originals:
            setattr(module, name, function)


def measure(folder: Path, rows: int, images: int = 1000) -> dict[str, tuple[float, float]]:
    """Return (seconds added, seconds without) of the second build, of training's start, and of reading `images`."""
    manifest = draw(folder, rows)
    write_json(folder / "knowledge.json", {manifest.stem: dict.fromkeys(parts.DEMO_PRODUCTS, KNOWLEDGE)})
    config = BuildConfig(
        "manifest", folder / "dataset", annotations=manifest, knowledge=folder / "knowledge.json",
        descriptor="skimage", cache=folder / "cache",
    )  # fmt: skip
    build(config)
    with clocked(ADDED_TO_BUILD) as added:
        start = time.perf_counter()
        build(config)
        whole = time.perf_counter() - start
    found = {"second build": (added[0], whole - added[0])}

    start = time.perf_counter()
    dataset = load_dataset(config.output)
    digests = read_digests(dataset) or {}
    verified = time.perf_counter()
    row_builder = RowBuilder(load_processor("recipes/tiny/echo-tiny", None, 28 * 28, 112 * 112))
    plan(row_builder, read_jsonl(config.output / "sft/decision_maker/train.jsonl", Exchange), dataset.root, 32768)
    found["training's start"] = (verified - start, time.perf_counter() - verified)

    names = list(digests)[:images]
    start = time.perf_counter()
    for name in names:
        is_changed(dataset.root, name, digests)
    hashed = time.perf_counter()
    for name in names:
        load_image(dataset.root / name)
    found[f"reading {len(names)} images"] = (hashed - start, time.perf_counter() - hashed)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000, help="Number of images in the manifest.")
    parser.add_argument(
        "--folder",
        type=Path,
        help="Folder in which to draw the images and build the dataset; defaults to a temporary folder.",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(Path(folder), options.rows)
    print("| step | without s | added s | added |\n|---|---|---|---|")
    for name, (added, without) in found.items():
        print(f"| {name} | {without:.2f} | {added:.3f} | {added / without:.1%} |")


if __name__ == "__main__":
    main()
