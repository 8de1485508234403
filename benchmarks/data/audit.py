"""Measure what the leakage audit finds: `python -m benchmarks.data.audit [--images 5000] [--products 20]`.

The benchmark draws images of several products, one fifth for testing and the rest for training. Each image shows a
different part. 200 test images (one in 25 of all images) are leaks made from a training image: a copy of the file, a
JPEG of quality 50 to 90, the image at half size, a random crop of 90% of each side (half of the crops are scaled
back), or a version that is 20% brighter or darker. A second measurement splits by product. With `--magnetic_tile`,
the audit also compares magnetic tiles, using only pixels, under a split by image and a split by group, with three
seeds each.

Grainy sheets are excluded. Their grain comes from one shared table, so different parts show the same surface at
different positions.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.sources import SourceConfig, magnetic_tile
from echo_ft.data.splits import assign_splits
from echo_ft.drawn import parts
from echo_ft.leakage.matches import Match, find_matches
from echo_ft.records import Inspection

LEAK_TYPES = ("copy", "re-encoding", "half size", "crop", "brightness")


@dataclass(frozen=True)
class DrawnImage:
    """An image and the part that it shows."""

    path: Path
    product: int
    part: int
    leak: str = ""
    """One of LEAK_TYPES if the image was made from a training image."""


def draw_splits(
    folder: Path, products: int, training: int, clean: int, leaks: int, seed: int
) -> tuple[list[DrawnImage], list[DrawnImage]]:
    """Draw `training` and `clean` images per product, and make `leaks` of each type from the training images.

    Returns the training images and the test images.
    """
    rng = np.random.default_rng(seed)
    kinds = [kind for kind in parts.PRETRAINING_KINDS if kind != "grainy sheet"]
    styles = list(parts.DEMO_PRODUCTS.values())[:products]
    while len(styles) < products:
        styles.append(parts.random_style(rng, kinds[len(styles) % len(kinds)], marks=len(styles) % 2 == 0))
    splits: tuple[list[DrawnImage], list[DrawnImage]] = [], []
    for product, style in enumerate(styles):
        for part in range(training + clean):
            defect = parts.random_defect(rng, style) if part % 3 == 0 else None
            drawn = parts.Part(style, int(rng.integers(2**31)), defect)
            pixels = parts.render_part(drawn, int(rng.integers(2**31))).image
            path = folder / f"{product}" / f"{part}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, compress_level=1)
            splits[part >= training].append(DrawnImage(path, product, part))
    sources = rng.permutation(len(splits[0]))[: leaks * len(LEAK_TYPES)]
    for number, index in enumerate(sources):
        source, leak = splits[0][index], LEAK_TYPES[number % len(LEAK_TYPES)]
        path = make_leak(source.path, folder / "leaks" / str(number), leak, rng)
        splits[1].append(DrawnImage(path, source.product, source.part, leak))
    return splits


def make_leak(source: Path, stem: Path, leak: str, rng: np.random.Generator) -> Path:
    """Write a leak of the given type, named `stem` plus a suffix; returns its path."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    if leak == "copy":
        return Path(shutil.copy(source, stem.with_suffix(source.suffix)))
    image = Image.open(source).convert("RGB")
    width, height = image.size
    coin = bool(rng.integers(2))
    if leak == "re-encoding":
        path = stem.with_suffix(".jpg")
        image.save(path, quality=int(rng.integers(50, 91)))
        return path
    if leak == "half size":
        image = image.resize((width // 2, height // 2), Image.Resampling.BICUBIC)
    elif leak == "crop":
        size = round(0.9 * width), round(0.9 * height)
        left, top = int(rng.integers(width - size[0] + 1)), int(rng.integers(height - size[1] + 1))
        image = image.crop((left, top, left + size[0], top + size[1]))
        image = image.resize((width, height), Image.Resampling.BICUBIC) if coin else image
    else:
        factor = 1.2 if coin else 0.8
        image = Image.fromarray(np.clip(np.asarray(image) * factor, 0, 255).astype(np.uint8))
    path = stem.with_suffix(".png")
    image.save(path, compress_level=1)
    return path


def audit_drawn(training: Sequence[DrawnImage], test: Sequence[DrawnImage]) -> list[Match]:
    """Run the audit on drawn images."""
    return find_matches(
        [one.path for one in training], [str(one.product) for one in training], [one.path for one in test]
    )


def measure_drawn(folder: Path, images: int, products: int, seed: int) -> None:
    """Print what the audit finds among drawn images."""
    leaks = images // 25 // len(LEAK_TYPES)
    training, test = draw_splits(
        folder, products, images * 4 // 5 // products, (images // 5 - images // 25) // products, leaks, seed
    )
    started = time.perf_counter()
    matches = audit_drawn(training, test)
    seconds = time.perf_counter() - started
    found, false_alarms = Counter[str](), set()
    flagged = {match.query_index for match in matches}
    pairs = set()
    for match in matches:
        source = training[match.train_index]
        pairs.add((source.product, source.part, match.query_index))
    for index, one in enumerate(test):
        found[one.leak] += (one.product, one.part, index) in pairs
        if index in flagged and not one.leak:
            false_alarms.add(index)
    leak_pairs = [(training[m.train_index], test[m.query_index]) for m in matches if test[m.query_index].leak]
    wrong_pairs = sum(source.part != leak.part for source, leak in leak_pairs)
    clean = sum(not one.leak for one in test)
    print(f"{len(training)} training images, {len(test)} test images, {products} products in both splits")
    print("| leak | found |\n|---|---|")
    for leak in LEAK_TYPES:
        print(f"| {leak} | {found[leak]} of {sum(one.leak == leak for one in test)} |")
    print(f"| all | {sum(found[leak] for leak in LEAK_TYPES)} of {len(test) - clean} |")
    print(f"false alarms: {len(false_alarms)} of {clean} clean images ({100 * len(false_alarms) / clean:.2f}%)")
    print(f"pairs of a leak with the wrong part: {wrong_pairs}")
    print(f"{seconds:.0f} s, peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")
    everything = [*training, *(one for one in test if not one.leak)]
    first_new = products * 4 // 5
    if not first_new:
        return
    known, new = ([one for one in everything if (one.product < first_new) == is_known] for is_known in (True, False))
    flagged = {match.query_index for match in audit_drawn(known, new)}
    print(
        f"split by product: {len(flagged)} of {len(new)} images of new products flagged, {len(known)} training images"
    )


def measure_tiles(root: Path) -> None:
    """Print what the audit finds on magnetic tiles, using only pixels, under a split by image and one by group."""
    inspections = [one for one in magnetic_tile.read(SourceConfig(root)) if isinstance(one, Inspection)]
    print("| split | seed | test images | with a group in training | found among these | found among others |")
    print("|---|---|---|---|---|---|")
    for seed in range(3):
        shuffled = random.Random(seed).sample(inspections, len(inspections))
        cut = round(0.7 * len(shuffled))
        by_group = assign_splits(inspections, seed, (0.7, 0.0, 0.3))
        splits = {
            "by image": (shuffled[:cut], shuffled[cut:]),
            "by group": tuple([one for one in by_group if one.split == split] for split in ("train", "test")),
        }
        for name, (training, test) in splits.items():
            print(f"| {name} | {seed} | {_tile_row(root, training, test)} |", flush=True)


def _tile_row(root: Path, training: Sequence[Inspection], test: Sequence[Inspection]) -> str:
    products = ["tile"] * len(training)
    matches = find_matches([root / one.image for one in training], products, [root / one.image for one in test])
    groups = {one.group for one in training}
    flagged = {match.query_index for match in matches}
    known = {index for index, one in enumerate(test) if one.group in groups}
    return f"{len(test)} | {len(known)} | {len(flagged & known)} | {len(flagged - known)}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000, help="Drawn images in both splits together.")
    parser.add_argument("--products", type=int, default=20, help="Drawn products.")
    parser.add_argument("--seed", type=int, default=0, help="Seed for the drawn images.")
    parser.add_argument("--magnetic_tile", type=Path, help="The folder that contains MT_Blowhole to MT_Uneven.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure_drawn(Path(folder), options.images, options.products, options.seed)
    if options.magnetic_tile:
        measure_tiles(options.magnetic_tile)


if __name__ == "__main__":
    main()
