"""Measure a small convolutional network on a dataset: `python -m benchmarks.evaluation.small_cnn DATASET [--seeds 5]`.

DATASET is a folder written by `data_prep.build`, with masks. The network sees the inspected image alone, with the
pixels that echo-tiny gets in its recipes. It learns which cells of the training images show the defect, and the score
of an image is the mean of its highest cells. The network of the epoch with the best AUROC on the validation split is
kept. It scores the test split once.

AUROC and its 95% interval over parts come from the functions of `evaluation.score`, for the same images: those with an
Anomaly Detection question. Times are processor time on one thread, including validation.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from echo_ft.data.dataset import Dataset, load_cases, load_dataset, require_unchanged
from echo_ft.data.splits import SPLITS
from echo_ft.images.decode import load_image, size_and_orientation
from echo_ft.images.masks import is_marked, load_mask, mask_files
from echo_ft.metrics.detection import ALL_IMAGES, auroc, score_detection
from echo_ft.metrics.metric_values import DETECTION_INDEX
from echo_ft.metrics.prediction_table import make_prediction_table
from echo_ft.model.batches import image_inputs
from echo_ft.model.loading import load_processor
from echo_ft.model.rows import RowBuilder
from echo_ft.records import GOOD, QUESTION_TYPES, Case, Prediction
from echo_ft.training.mask_loss import token_marks, token_weights

MODEL, MIN_PIXELS, MAX_PIXELS = "recipes/tiny/echo-tiny", 12544, 28224
"""The processor and the pixel budget of the recipes for echo-tiny."""

CELL = 4
"""Height and width in pixels of the cells that the network scores."""

BATCH_SIZE, LEARNING_RATE = 8, 4e-3

TOP_SHARE = 0.01
"""The score of an image is the mean of this share of its cells: those with the highest probability."""

KIND = QUESTION_TYPES[DETECTION_INDEX]


@dataclass(frozen=True)
class Sample:
    """An image as the network sees it, and its truth."""

    case: Case
    pixels: torch.Tensor
    """(3, height, width), as the processor normalises them."""
    marks: torch.Tensor
    """(height / CELL, width / CELL) bool: the cells that show the defect."""

    @property
    def defective(self) -> bool:
        """Whether the image shows a defect."""
        return self.case.truth.condition != GOOD


def load_samples(dataset: Dataset, split: str) -> list[Sample]:
    """Load the images of a split that have an Anomaly Detection question.

    Raises EchoError if a file is unusable or has changed since the dataset was built.
    """
    cases = [case for case in load_cases(dataset, split) if any(one.kind == KIND for one in case.seen.questions)]
    require_unchanged(dataset, (name for case in cases for name in (case.seen.query, *mask_files(case.truth))))
    builder = RowBuilder(load_processor(MODEL, None, MIN_PIXELS, MAX_PIXELS))
    return [_load_sample(case, dataset.root, builder) for case in cases]


def _load_sample(case: Case, root: Path, builder: RowBuilder) -> Sample:
    path, patch, merge = root / case.seen.query, builder.image_processor.patch_size, builder.merge
    inputs = image_inputs(builder, [load_image(path)])
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    # The processor orders the patches by token and repeats the image as two frames.
    patches = inputs["pixel_values"].view(rows // merge, columns // merge, merge, merge, 3, -1, patch, patch)
    pixels = patches[..., 0, :, :].permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * patch, columns * patch)
    grid = (rows * patch // CELL, columns * patch // CELL)
    mask = load_mask(case.truth, root, *size_and_orientation(path))
    marks = np.zeros(grid, np.bool_) if mask is None else token_marks(mask, grid).reshape(grid)
    return Sample(case, pixels, torch.from_numpy(marks))


def make_network() -> nn.Sequential:
    """Return a network from pixels (B, 3, height, width) to the logits (B, 1, height / CELL, width / CELL) of cells."""

    def layer(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
        return [convolution, nn.GroupNorm(8, outputs), nn.ReLU()]

    shrink = [*layer(3, 16, stride=2), *layer(16, 32, stride=2)]
    widen = [*layer(32, 32), *layer(32, 32, dilation=2), *layer(32, 32, dilation=4)]
    return nn.Sequential(*shrink, *widen, nn.Conv2d(32, 1, 1))


def draw_batches(samples: Sequence[Sample], draw: random.Random) -> list[list[Sample]]:
    """Return all samples once in random order, in batches of images of one size."""
    open_batches: dict[Any, list[Sample]] = {}
    batches = []
    for sample in draw.sample(samples, len(samples)):
        size = sample.pixels.shape
        open_batches.setdefault(size, []).append(sample)
        if len(open_batches[size]) == BATCH_SIZE:
            batches.append(open_batches.pop(size))
    batches += open_batches.values()
    draw.shuffle(batches)
    return batches


def compute_loss(network: nn.Module, batch: Sequence[Sample], draw: random.Random) -> torch.Tensor:
    """Return the loss of a batch, mirrored and brightened at random. Cells are weighted as tokens in the mask loss."""
    sides = [side for side in (-2, -1) if draw.random() < 0.5]
    gain, offset = torch.empty(2, len(batch), 1, 1, 1).uniform_(-1, 1)
    pixels = torch.stack([one.pixels for one in batch]).flip(sides)
    targets = torch.stack([one.marks for one in batch]).flip(sides).flatten()
    rows = torch.arange(len(batch)).repeat_interleave(batch[0].marks.numel())
    weights = token_weights(targets, rows, torch.full((len(batch),), 1 / len(batch)))
    logits = network((1 + 0.2 * gain) * pixels + 0.3 * offset).flatten()
    return binary_cross_entropy_with_logits(logits, targets.float(), weights, reduction="sum")


def train(samples: Sequence[Sample], validation: Sequence[Sample], epochs: int, seed: int) -> tuple[nn.Module, float]:
    """Train a network; returns the one after the epoch with the best AUROC on `validation`, and that AUROC."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    network, best = make_network(), -1.0
    kept: nn.Module = network
    steps = [draw_batches(samples, draw) for _ in range(epochs)]
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, sum(map(len, steps)), pct_start=0.1)
    defective = np.array([one.defective for one in validation])
    for batches in steps:
        for batch in batches:
            optimizer.zero_grad()
            compute_loss(network, batch, draw).backward()
            optimizer.step()
            schedule.step()
        found = float(auroc(np.ones((1, len(validation))), score(network, validation), defective)[0])
        if found > best:
            kept, best = copy.deepcopy(network), found
    return kept, best


@torch.inference_mode()
def score(network: nn.Module, samples: Sequence[Sample]) -> np.ndarray:
    """Return the score of each image, (images,), from 0 to 1."""
    found = []
    for sample in samples:
        cells = network(sample.pixels[None]).double().sigmoid().flatten()
        found.append(cells.topk(math.ceil(TOP_SHARE * len(cells))).values.mean().item())
    return np.array(found)


def measure_auroc(samples: Sequence[Sample], scores: np.ndarray) -> tuple[float, list[float] | None]:
    """Return the AUROC and its interval as `evaluation.score` reports them; `scores` (images,) are P(defect)."""
    predictions = [_predict(one.case, float(value)) for one, value in zip(samples, scores, strict=True)]
    row = score_detection(make_prediction_table(predictions))[ALL_IMAGES]
    return row["auroc"], row["intervals"]["auroc"]


def _predict(case: Case, p_defect: float) -> Prediction:
    answer, parsed = "B" if case.truth.condition == GOOD else "A", "A" if p_defect >= 0.5 else "B"
    return Prediction(
        case.id, case.id, case.dataset, case.product, case.group, case.seen.query, case.truth.condition, KIND,
        "Is there a defect?", {"A": "Yes.", "B": "No."}, answer, parsed, parsed, {"A": p_defect, "B": 1 - p_defect},
    )  # fmt: skip


def main() -> None:
    """Train a network with each seed and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="A dataset folder written by data_prep.build.")
    parser.add_argument("--seeds", type=int, default=5, help="Number of seeds, counted from 0.")
    parser.add_argument("--epochs", type=int, default=20, help="Epochs per seed.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset(options.dataset)
    splits = {split: load_samples(dataset, split) for split in SPLITS}
    # A defect without a mask, polygon or box would be taken for a good part.
    known = [one for one in splits["train"] if is_marked(one.case.truth) or not one.defective]
    for samples in (known, splits["validation"], splits["test"]):
        if len({one.defective for one in samples}) < 2:
            raise SystemExit(
                f"{dataset.folder} needs good and defective images in each split, and masks; build it with both"
            )
    print("| seed | AUROC on validation | on test | processor minutes |\n|---|---|---|---|")
    found = []
    for seed in range(options.seeds):
        began = time.process_time()
        network, best = train(known, splits["validation"], options.epochs, seed)
        minutes = (time.process_time() - began) / 60
        value, interval = measure_auroc(splits["test"], score(network, splits["test"]))
        bounds = "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"
        print(f"| {seed} | {best:.3f} | {value:.3f}{bounds} | {minutes:.1f} |", flush=True)
        found.append(value)
    spread = f", standard deviation {statistics.stdev(found):.3f}" if len(found) > 1 else ""
    print(f"\nTest AUROC: mean {statistics.mean(found):.3f}{spread}, from {min(found):.3f} to {max(found):.3f}")


if __name__ == "__main__":
    main()
