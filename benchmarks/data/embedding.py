"""How much faster photographs are described in batches and processes than one by one.

    python -m benchmarks.data.embedding [--descriptor ViT-B-16 ViT-B-32 skimage]

Drawn parts, PNG files of --side pixels, are described by `skimage`, or by the architecture of an open_clip model with
random weights, which take as long as trained ones. One at a time is what a paper's code does: open the file, prepare
it, encode a batch of one, in one process with --plain_threads threads (by default as many as torch takes). Against it
stands what each process of `data_prep.embed` does, in --processes of them, or in one on a GPU. Each process reads and
prepares images in up to 16 threads, no more than there are processors, which for `skimage` is all there is to do; torch
has one thread in each, but on a GPU as many as it takes. What is loaded once is loaded before the clock starts. The
features of both are compared; then all is asked for once more, which takes the time of hashing the files.

Both are timed --repeats times in turn, and the median counts: nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
from PIL import Image

from echo_ft.drawn import parts
from echo_ft.images.decode import decode
from echo_ft.retrieval.descriptor_cache import DescriptorCache, describe_new, hash_files
from echo_ft.retrieval.descriptors import Describer, OpenClip, ScikitImage, Vector, describer


def draw(folder: Path, images: int, side: int) -> list[str]:
    """Draw `images` photographs; returns their names."""
    products = list(parts.DEMO_PRODUCTS)
    names = [f"{number:06d}.png" for number in range(images)]
    for number, name in enumerate(names):
        part = parts.demo_part(products[number % len(products)], "good", number)
        photograph = Image.fromarray(parts.photograph(part, number).image)
        photograph.resize((side, side), Image.Resampling.BICUBIC).save(folder / name)
    return names


def weights(folder: Path, name: str) -> str:
    """The descriptor: `skimage`, or open_clip's model of that name with random weights, kept in a file."""
    if name == "skimage":
        return name
    import open_clip
    import torch

    torch.manual_seed(0)
    torch.save(open_clip.create_model(name).state_dict(), folder / "weights.pt")
    return f"{name}/{folder / 'weights.pt'}"


def one_at_a_time(paths: list[Path], describe: Describer) -> tuple[float, Vector]:
    """Seconds and features (n, d) of the plain way."""
    encode = _plain(describe)
    encode(paths[0])
    started = time.perf_counter()
    vectors = [encode(path) for path in paths]
    return time.perf_counter() - started, np.stack(vectors)


def _plain(describe: Describer) -> Callable[[Path], Vector]:
    if isinstance(describe, ScikitImage):
        return lambda path: describe._describe(decode(path))
    assert isinstance(describe, OpenClip)
    import torch

    model, preprocess, device = describe.load()

    def encode(path: Path) -> Vector:
        with torch.inference_mode():
            pixels = preprocess(Image.open(path).convert("RGB")).unsqueeze(0).to(device)
            feature = model.encode_image(pixels)
            return (feature / feature.norm(dim=-1, keepdim=True)).float().cpu().numpy()[0]

    return encode


def _share(names: list[str], root: Path, descriptor: str, cache: Path, threads: int | None, barrier: Barrier) -> None:
    """One process of several: everything is loaded, all wait for each other, then it describes its share."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    describe = describer(descriptor)
    describe.vectors([root / names[0]])
    barrier.wait()
    hashes, _ = hash_files(names, root)
    for _ in describe_new(hashes, root, describe, DescriptorCache(describe, cache)):
        pass
    barrier.wait()


def in_processes(names: list[str], root: Path, descriptor: str, cache: Path, processes: int, gpu: bool) -> float:
    """Seconds of `processes` that describe a share each into `cache`."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes + 1)
    threads = None if gpu else 1
    shares = [names[rank::processes] for rank in range(processes)]
    workers = [context.Process(target=_share, args=(s, root, descriptor, cache, threads, barrier)) for s in shares]
    for worker in workers:
        worker.start()
    barrier.wait()
    started = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - started
    for worker in workers:
        worker.join()
    return seconds


def measure(folder: Path, name: str, images: int, side: int, processes: int, repeats: int) -> str:
    """A row of the table."""
    import torch

    gpu = torch.cuda.is_available() and name != "skimage"
    processes = 1 if gpu else processes
    names = draw(folder, images, side)
    descriptor = weights(folder, name)
    describe = describer(descriptor)
    plain, ours = [], []
    for repeat in range(repeats):
        cache = folder / f"cache-{repeat}"
        seconds, expected = one_at_a_time([folder / one for one in names], describe)
        plain.append(seconds)
        ours.append(in_processes(names, folder, descriptor, cache, processes, gpu))
    again = in_processes(names, folder, descriptor, cache, processes, gpu)
    hashes, _ = hash_files(names, folder)
    found = DescriptorCache(describe, cache).gather({digest: row for row, digest in enumerate(hashes.values())})
    difference = float(np.abs(found - expected).max())
    before, after = statistics.median(plain), statistics.median(ours)
    readers = min(16, os.cpu_count() or 1)
    where = torch.cuda.get_device_name() if gpu else f"{processes} x ({readers} reading threads, 1 of torch)"
    return (
        f"| {name} | {where} | {images / before:.1f} | {images / after:.1f} | {before / after:.2f} | {difference:.1e} "
        f"| {images / again:.0f} |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--descriptor", nargs="+", default=["ViT-B-16", "ViT-B-32", "skimage"])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--plain_threads", type=int)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.plain_threads:
        import torch

        torch.set_num_threads(options.plain_threads)
    print(f"{options.images} PNG files of {options.side} x {options.side} pixels, images a second")
    print("| descriptor | where | one at a time | data_prep.embed | ratio | largest difference | from the cache |")
    print("|---|---|---|---|---|---|---|")
    for name in options.descriptor:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(Path(folder), name, options.images, options.side, options.processes, options.repeats)
        print(row, flush=True)


if __name__ == "__main__":
    main()
