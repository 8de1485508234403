"""Compare two ways to compute image descriptors: in batches by several processes, and one by one.

    python -m benchmarks.data.embedding [--descriptor ViT-B-16 ViT-B-32 skimage]

The benchmark draws parts as PNG files of --side x --side pixels. The descriptor is `skimage` or the architecture of an
open_clip model with random weights; trained weights take as long.

The baseline does what a paper's code does: open the file, prepare it and encode a batch of one. It uses one process
with --plain_threads threads, by default as many as torch chooses. The other implementation does what each process of
`data_prep.embed` does, in --processes processes, or in one process on a GPU. Each process reads and prepares images in
up to 16 threads, but at most one per processor. For `skimage`, this is the whole work. On a CPU, torch gets one thread
per process; on a GPU, it chooses the number itself.

Everything that needs loading only once is loaded before the clock starts. The benchmark compares the features of both.
It then requests all features once more, which takes only the time to hash the files.

The two alternate, --repeats times each, and the table shows medians. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
from PIL import Image

from echo_ft.drawn import parts
from echo_ft.images.decode import decode
from echo_ft.retrieval.descriptor_cache import DescriptorCache, extract_missing, hash_files
from echo_ft.retrieval.descriptors import DescriptorExtractor, FloatArray, OpenClip, ScikitImage, load_extractor


def draw(folder: Path, images: int, side: int) -> list[str]:
    """Draw `images` images of `side` x `side` pixels; returns their file names."""
    products = list(parts.DEMO_PRODUCTS)
    names = [f"{number:06d}.png" for number in range(images)]
    for number, name in enumerate(names):
        part = parts.demo_part(products[number % len(products)], "good", number)
        image = Image.fromarray(parts.render_part(part, number).image)
        image.resize((side, side), Image.Resampling.BICUBIC).save(folder / name)
    return names


def prepare_descriptor(folder: Path, name: str) -> str:
    """Return `skimage`, or save open_clip's model of that name with random weights and return its descriptor."""
    if name == "skimage":
        return name
    import open_clip
    import torch

    torch.manual_seed(0)
    torch.save(open_clip.create_model(name).state_dict(), folder / "weights.pt")
    return f"{name}/{folder / 'weights.pt'}"


def one_at_a_time(paths: list[Path], extractor: DescriptorExtractor) -> tuple[float, FloatArray]:
    """Return the seconds and the features (n, d) of the baseline."""
    encode = _baseline(extractor)
    encode(paths[0])
    started = time.perf_counter()
    vectors = [encode(path) for path in paths]
    return time.perf_counter() - started, np.stack(vectors)


def _baseline(extractor: DescriptorExtractor) -> Callable[[Path], FloatArray]:
    if isinstance(extractor, ScikitImage):
        return lambda path: extractor._describe(decode(path))
    assert isinstance(extractor, OpenClip)
    import torch

    model, preprocess, device = extractor.load()

    def encode(path: Path) -> FloatArray:
        with torch.inference_mode():
            pixels = preprocess(Image.open(path).convert("RGB")).unsqueeze(0).to(device)
            feature = model.encode_image(pixels)
            return (feature / feature.norm(dim=-1, keepdim=True)).float().cpu().numpy()[0]

    return encode


def _embed_share(
    names: list[str], root: Path, descriptor: str, cache: Path, threads: int | None, barrier: Barrier
) -> None:
    """Load everything, wait for the other processes, then describe the images assigned to this process."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    extractor = load_extractor(descriptor)
    extractor.vectors([root / names[0]])
    barrier.wait()
    hashes, _ = hash_files(names, root)
    for _ in extract_missing(hashes, root, extractor, DescriptorCache(extractor, cache)):
        pass
    barrier.wait()


def time_processes(names: list[str], root: Path, descriptor: str, cache: Path, processes: int, gpu: bool) -> float:
    """Return the seconds that `processes` processes take to describe equal parts of the images into `cache`.

    There must be at least one image per process. Exits if a process fails.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes + 1)
    threads = None if gpu else 1
    shares = [names[rank::processes] for rank in range(processes)]
    workers = [
        context.Process(target=_embed_share, args=(s, root, descriptor, cache, threads, barrier)) for s in shares
    ]
    for worker in workers:
        worker.start()
    threading.Thread(target=_abort_after_failure, args=(workers, barrier), daemon=True).start()
    try:
        barrier.wait()
        started = time.perf_counter()
        barrier.wait()
        return time.perf_counter() - started
    except threading.BrokenBarrierError as error:
        raise SystemExit("a process that computes descriptors failed; see its error above") from error
    finally:
        for worker in workers:
            worker.join()


def _abort_after_failure(workers: list[SpawnProcess], barrier: Barrier) -> None:
    """Break the barrier if a worker fails, because the others would wait for it forever."""
    running = list(workers)
    while running:
        wait([worker.sentinel for worker in running])
        if any(worker.exitcode for worker in running):
            barrier.abort()
        running = [worker for worker in running if worker.exitcode is None]


def measure(folder: Path, name: str, images: int, side: int, processes: int, repeats: int) -> str:
    """Measure one descriptor; returns a row of the table."""
    import torch

    gpu = torch.cuda.is_available() and name != "skimage"
    processes = 1 if gpu else min(processes, images)
    names = draw(folder, images, side)
    descriptor = prepare_descriptor(folder, name)
    extractor = load_extractor(descriptor)
    baseline, ours = [], []
    for repeat in range(repeats):
        cache = folder / f"cache-{repeat}"
        seconds, expected = one_at_a_time([folder / one for one in names], extractor)
        baseline.append(seconds)
        ours.append(time_processes(names, folder, descriptor, cache, processes, gpu))
    cached = time_processes(names, folder, descriptor, cache, processes, gpu)
    hashes, _ = hash_files(names, folder)
    found = DescriptorCache(extractor, cache).gather({digest: row for row, digest in enumerate(hashes.values())})
    difference = float(np.abs(found - expected).max())
    before, after = statistics.median(baseline), statistics.median(ours)
    readers = min(16, os.cpu_count() or 1)
    device = torch.cuda.get_device_name() if gpu else f"{processes} x ({readers} reader threads, 1 torch thread)"
    return (
        f"| {name} | {device} | {images / before:.1f} | {images / after:.1f} | {before / after:.2f} | {difference:.1e} "
        f"| {images / cached:.0f} |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--descriptor", nargs="+", default=["ViT-B-16", "ViT-B-32", "skimage"], help="Descriptors to time."
    )
    parser.add_argument("--images", type=int, default=256, help="Images to draw.")
    parser.add_argument("--side", type=int, default=512, help="Side length of an image, in pixels.")
    parser.add_argument(
        "--plain_threads", type=int, help="Number of threads for the baseline; by default, torch decides."
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="Processes on a CPU.")
    parser.add_argument("--repeats", type=int, default=3, help="Runs per implementation.")
    options = parser.parse_args()
    if options.plain_threads:
        import torch

        torch.set_num_threads(options.plain_threads)
    print(f"{options.images} PNG files of {options.side} x {options.side} pixels, figures in images per second")
    print("| descriptor | device | one at a time | data_prep.embed | ratio | largest difference | from the cache |")
    print("|---|---|---|---|---|---|---|")
    for name in options.descriptor:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(Path(folder), name, options.images, options.side, options.processes, options.repeats)
        print(row, flush=True)


if __name__ == "__main__":
    main()
