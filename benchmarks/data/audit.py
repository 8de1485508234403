"""What the leakage audit finds: `python -m benchmarks.data.audit [--images 5000] [--products 20]`.

Drawn photographs of several products, a fifth of them asked about and the others trained on, every one of another part;
200 of those asked about (one in 25 of all) are made from a photograph that is trained on: a copy of the file, a JPEG
of quality 50 to 90, half the size, a random crop of 90 % of each side (every other one scaled back), or a fifth
brighter or darker. Then products that are asked about against other products that are trained on. With magnetic tiles:
a split by photograph and one by group, three seeds each, from the pixels alone.

The drawn world's grainy sheets are left out: their grain is cut out of one table, so that different parts do show the
same surface, at another place.
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

KINDS = ("copy", "re-encoding", "half size", "crop", "brightness")


@dataclass(frozen=True)
class Planted:
    """A photograph and where it comes from."""

    path: Path
    product: int
    part: int
    kind: str = ""
    """One of KINDS where it is made from a photograph that is trained on."""


def plant(
    folder: Path, products: int, trained: int, clean: int, leaks: int, seed: int
) -> tuple[list[Planted], list[Planted]]:
    """Draw `trained` and `clean` photographs of each product, and make `leaks` of each of KINDS from the former.

    Returns the photographs that are trained on and those that are asked about.
    """
    rng = np.random.default_rng(seed)
    kinds = [kind for kind in parts.PRETRAINING_KINDS if kind != "grainy sheet"]
    styles = list(parts.DEMO_PRODUCTS.values())[:products]
    while len(styles) < products:
        styles.append(parts.random_style(rng, kinds[len(styles) % len(kinds)], marks=len(styles) % 2 == 0))
    sides: tuple[list[Planted], list[Planted]] = [], []
    for product, style in enumerate(styles):
        for part in range(trained + clean):
            defect = parts.random_defect(rng, style) if part % 3 == 0 else None
            drawn = parts.Part(style, int(rng.integers(2**31)), defect)
            pixels = parts.photograph(drawn, int(rng.integers(2**31))).image
            path = folder / f"{product}" / f"{part}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, compress_level=1)
            sides[part >= trained].append(Planted(path, product, part))
    sources = rng.permutation(len(sides[0]))[: leaks * len(KINDS)]
    for number, place in enumerate(sources):
        source, kind = sides[0][place], KINDS[number % len(KINDS)]
        path = alter(source.path, folder / "leaks" / str(number), kind, rng)
        sides[1].append(Planted(path, source.product, source.part, kind))
    return sides


def alter(source: Path, stem: Path, kind: str, rng: np.random.Generator) -> Path:
    """Write what `kind` makes of an image beside `stem`; returns the new file's path."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    if kind == "copy":
        return Path(shutil.copy(source, stem.with_suffix(source.suffix)))
    image = Image.open(source).convert("RGB")
    width, height = image.size
    other = bool(rng.integers(2))
    if kind == "re-encoding":
        path = stem.with_suffix(".jpg")
        image.save(path, quality=int(rng.integers(50, 91)))
        return path
    if kind == "half size":
        image = image.resize((width // 2, height // 2), Image.Resampling.BICUBIC)
    elif kind == "crop":
        kept = round(0.9 * width), round(0.9 * height)
        left, top = int(rng.integers(width - kept[0] + 1)), int(rng.integers(height - kept[1] + 1))
        image = image.crop((left, top, left + kept[0], top + kept[1]))
        image = image.resize((width, height), Image.Resampling.BICUBIC) if other else image
    else:
        factor = 1.2 if other else 0.8
        image = Image.fromarray(np.clip(np.asarray(image) * factor, 0, 255).astype(np.uint8))
    path = stem.with_suffix(".png")
    image.save(path, compress_level=1)
    return path


def find(trained: Sequence[Planted], asked: Sequence[Planted]) -> list[Match]:
    """What the audit finds among planted photographs."""
    return find_matches(
        [one.path for one in trained], [str(one.product) for one in trained], [one.path for one in asked]
    )


def drawn(folder: Path, images: int, products: int, seed: int) -> None:
    """Print what is found among drawn photographs."""
    leaks = images // 25 // len(KINDS)
    trained, asked = plant(
        folder, products, images * 4 // 5 // products, (images // 5 - images // 25) // products, leaks, seed
    )
    started = time.perf_counter()
    matches = find(trained, asked)
    seconds = time.perf_counter() - started
    right, wrong = Counter[str](), set()
    flagged = {match.asked for match in matches}
    pairs = {(trained[match.trained].product, trained[match.trained].part, match.asked) for match in matches}
    for place, one in enumerate(asked):
        right[one.kind] += (one.product, one.part, place) in pairs
        if place in flagged and not one.kind:
            wrong.add(place)
    strange = sum(trained[m.trained].part != asked[m.asked].part for m in matches if asked[m.asked].kind)
    clean = sum(not one.kind for one in asked)
    print(f"{len(trained)} photographs trained on, {len(asked)} asked about, {products} products on both sides")
    print("| planted | found |\n|---|---|")
    for kind in KINDS:
        print(f"| {kind} | {right[kind]} of {sum(one.kind == kind for one in asked)} |")
    print(f"| all | {sum(right[kind] for kind in KINDS)} of {len(asked) - clean} |")
    print(f"false alarms: {len(wrong)} of {clean} clean photographs ({100 * len(wrong) / clean:.2f} %)")
    print(f"pairs of a planted photograph with another part: {strange}")
    print(f"{seconds:.0f} s, peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")
    everything = [*trained, *(one for one in asked if not one.kind)]
    parted = products * 4 // 5
    if not parted:
        return
    known, new = ([one for one in everything if (one.product < parted) == side] for side in (True, False))
    found = {match.asked for match in find(known, new)}
    print(f"split by product: {len(found)} of {len(new)} photographs of new products flagged, {len(known)} trained on")


def tiles(root: Path) -> None:
    """Print what is found on magnetic tiles, split by photograph and by group, from the pixels alone."""
    inspections = [one for one in magnetic_tile.read(SourceConfig(root)) if isinstance(one, Inspection)]
    print("| split | seed | asked about | of a group that is trained on | found of those | found of others |")
    print("|---|---|---|---|---|---|")
    for seed in range(3):
        shuffled = random.Random(seed).sample(inspections, len(inspections))
        cut = round(0.7 * len(shuffled))
        by_group = assign_splits(inspections, seed, (0.7, 0.0, 0.3))
        splits = {
            "by photograph": (shuffled[:cut], shuffled[cut:]),
            "by group": tuple([one for one in by_group if one.split == split] for split in ("train", "test")),
        }
        for name, (trained, asked) in splits.items():
            print(f"| {name} | {seed} | {_tile_row(root, trained, asked)} |", flush=True)


def _tile_row(root: Path, trained: Sequence[Inspection], asked: Sequence[Inspection]) -> str:
    products = ["tile"] * len(trained)
    matches = find_matches([root / one.image for one in trained], products, [root / one.image for one in asked])
    groups = {one.group for one in trained}
    flagged = {match.asked for match in matches}
    known = {place for place, one in enumerate(asked) if one.group in groups}
    return f"{len(asked)} | {len(known)} | {len(flagged & known)} | {len(flagged - known)}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--products", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--magnetic_tile", type=Path, help="the folder that holds MT_Blowhole to MT_Uneven")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        drawn(Path(folder), options.images, options.products, options.seed)
    if options.magnetic_tile:
        tiles(options.magnetic_tile)


if __name__ == "__main__":
    main()
