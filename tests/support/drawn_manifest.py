"""Drawn parts, a manifest that lists them, and helpers to build datasets from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.config import BuildConfig
from echo_ft.files import read_jsonl
from tests.conftest import ROOT


def draw_part(path: Path, seed: int, defect: bool = False, shade: float = 1.0) -> None:
    """Draw a noisy 48 x 40 part, darker by `shade`. A defective one has a black square and a mask `<stem>_mask.png`."""
    rng = np.random.default_rng(seed)
    pixels = (np.linspace(60, 200, 48)[None, :] * shade + rng.normal(0, 12, (40, 48))).clip(0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    if defect:
        mask = np.zeros((40, 48), np.uint8)
        y, x = rng.integers(4, 28, 2)
        mask[y : y + 8, x : x + 8] = 255
        pixels[mask > 0] = 5
        Image.fromarray(mask).save(path.with_name(f"{path.stem}_mask.png"))
    Image.fromarray(pixels).save(path)


def draw_manifest(root: Path, products: tuple[str, ...], normals: int, defects: int) -> Path:
    """Draw parts with two exposures each and two types of defect; returns the path of the manifest parts.jsonl."""
    rows = []
    for product in products:
        for condition, count in (("good", normals), ("dent", defects), ("stain", defects)):
            for number in range(count):
                for exposure in (1, 2):
                    name = f"{product}/{condition}-{number}-{exposure}.png"
                    bad = condition != "good"
                    draw_part(root / name, len(rows) // 2 + 1000 * exposure, bad, 1 / exposure)
                    row = {"image": name, "product": product, "condition": condition}
                    row |= {"group": f"{condition}-{number}"}
                    rows.append(row | ({"mask": name.replace(".png", "_mask.png")} if bad else {}))
    path = root / "parts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(manifest: Path, output: Path, **changes) -> BuildConfig:
    """The config of a build from the manifest with small descriptors; `changes` override its options."""
    values = {"source": "manifest", "annotations": manifest, "output": output, "descriptor": "skimage", "k": 2}
    return BuildConfig(**{**values, **changes})


def read_rows(folder: Path, name: str, cls: type) -> list:
    return list(read_jsonl(folder / name, cls))


def edit_rows(manifest: Path, change) -> None:
    """Apply `change` to every row of the manifest."""
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for line in lines:
        change(line)
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_part_knowledge(folder: Path) -> Path:
    """Write knowledge about both products, so that every question type is asked; returns its path."""
    text = {"good": "An even ramp.", "dent": "A black square. It causes leaks.", "stain": "A blot. It causes rust."}
    (folder / "knowledge.yaml").write_text(json.dumps({"parts": {"cap": text, "ring": text}}))
    return folder / "knowledge.yaml"


def run_build(*arguments: object, threads: int = 1) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "data_prep.build", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def flags(**values: object) -> list[str]:
    """The options of a command as they would be typed in a terminal."""
    return [text for key, value in values.items() for text in (f"--{key}", *str(value).split())]
