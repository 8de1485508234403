"""Pretrain echo-tiny's vision tower with linear heads that classify each image token. The heads are dropped afterwards.

A caption has one word for a defect that covers one token in thirty. A label at every token teaches a tower without
convolutions more in the same time. Large defects on plain surfaces teach more than the small ones that come later.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo_ft.drawn.parts import (
    COLOURS,
    IMAGE_SIZE,
    PRETRAINING_DEFECTS,
    PRETRAINING_KINDS,
    SURFACES,
    Part,
    random_defect,
    random_style,
    render_part,
)
from train.tiny.inputs import TOKEN_SIDE, image_patches

KIND_CLASSES, DEFECT_CLASSES, COLOUR_CLASSES = tuple(PRETRAINING_KINDS), tuple(PRETRAINING_DEFECTS), tuple(COLOURS)
MIN_DEFECT_SHARE = 0.04
"""Minimum share of a token's pixels on the defect for the token to count as defective."""
SAMPLES_PER_STEP = 8
"""Number of images per step."""
PEAK_LEARNING_RATE = 1e-3
EASING_SHARE = 0.6
"""Share of the time during which defects shrink to their final size and plain surfaces to their final frequency."""
LOG_EVERY = 250
"""Number of steps between two lines of progress."""


@dataclass(frozen=True)
class Sample:
    """An image and the labels of its tokens."""

    image: NDArray[np.uint8]
    """(height, width, 3), with sides that are multiples of 28."""
    share: NDArray[np.float32]
    """(tokens,): share of the token's pixels on the defect, from 0 to 1."""
    defect: int
    """Index into DEFECT_CLASSES, or -1 without a defect."""
    kind: int
    colour: int


def draw_sample(seed: int, ease: float) -> Sample:
    """Draw sample number `seed`. `ease` 1 doubles the size of defects and makes plain surfaces more frequent than 0."""
    rng = np.random.default_rng((seed, 9))
    style = random_style(rng, str(rng.choice(list(SURFACES))) if rng.random() < 0.7 * ease else None)
    defect = random_defect(rng, style) if rng.random() < 0.6 else None
    if defect:
        defect = dataclasses.replace(defect, size=min(0.6, defect.size * (1 + ease)))
    part_seed, camera_seed = rng.integers(2**31, size=2).tolist()
    rendered = render_part(Part(style, part_seed, defect), camera_seed, IMAGE_SIZE)
    rows, columns = IMAGE_SIZE[0] // TOKEN_SIDE, IMAGE_SIZE[1] // TOKEN_SIDE
    share = rendered.mask.reshape(rows, TOKEN_SIDE, columns, TOKEN_SIDE).mean(axis=(1, 3), dtype=np.float32).ravel()
    found = DEFECT_CLASSES.index(defect.name) if defect else -1
    return Sample(rendered.image, share, found, KIND_CLASSES.index(style.kind), COLOUR_CLASSES.index(style.colour))


def collate_samples(samples: Sequence[Sample]) -> dict[str, Any]:
    """A batch of B samples: images, share (B, tokens), and the class indices defect, kind and colour (B,)."""
    import torch

    return {
        "images": [torch.from_numpy(sample.image) for sample in samples],
        "share": torch.from_numpy(np.stack([sample.share for sample in samples])),
        **{name: torch.tensor([getattr(sample, name) for sample in samples]) for name in ("defect", "kind", "colour")},
    }


def encode_images(model: Any, images: list[Any]) -> Any:
    """Features (B, tokens, hidden) of images with the same size."""
    import torch

    values, grids = image_patches(images)
    return torch.stack(model.model.get_image_features(values, grids, return_dict=True).pooler_output)


def pretrain_vision(model: Any, first: int, minutes: float, steps: int) -> int:
    """Train the vision tower and its merger for `minutes`, or for `steps` if not 0. Returns the number of steps.

    `first` is the seed of the first sample.
    """
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

    tower = model.model.visual
    heads = torch.nn.ModuleDict(
        {
            name: torch.nn.Linear(tower.config.hidden_size, size)
            for name, size in (
                ("share", 1),
                ("defect", len(DEFECT_CLASSES)),
                ("kind", len(KIND_CLASSES)),
                ("colour", len(COLOUR_CLASSES)),
            )
        }
    )
    matrices = [p for p in tower.parameters() if p.ndim >= 2]
    others = [p for p in tower.parameters() if p.ndim < 2] + list(heads.parameters())
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98))
    start, losses = time.monotonic(), np.zeros(4)
    for step in itertools.count():
        passed = (time.monotonic() - start) / 60
        done = step / steps if steps else passed / minutes
        if done >= 1:
            return step
        if step and step % LOG_EVERY == 0:
            means = "  ".join(f"{name} {loss:.3f}" for name, loss in zip(heads, losses / LOG_EVERY, strict=True))
            print(f"vision pretraining, step {step:5d}  {passed:5.1f} min  {means}", flush=True)
            losses[:] = 0
        for group in optimizer.param_groups:
            group["lr"] = (
                PEAK_LEARNING_RATE * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))
            )
        # Draw in this process: another one would take a core from the two that compute and wait for each other.
        ease = max(0.0, 1 - done / EASING_SHARE)
        batch = collate_samples(
            [draw_sample(first + step * SAMPLES_PER_STEP + index, ease) for index in range(SAMPLES_PER_STEP)]
        )
        features = encode_images(model, batch["images"])
        covered = batch["share"] > MIN_DEFECT_SHARE
        defects = batch["defect"][:, None].expand_as(covered)[covered]
        pooled = features.mean(dim=1)
        share_loss = binary_cross_entropy_with_logits(
            heads["share"](features)[..., 0], covered.float(), pos_weight=torch.tensor(3.0)
        )
        defect_loss = cross_entropy(heads["defect"](features[covered]), defects, reduction="sum") / max(1, len(defects))
        kind_loss = cross_entropy(heads["kind"](pooled), batch["kind"])
        colour_loss = cross_entropy(heads["colour"](pooled), batch["colour"])
        (share_loss + 0.5 * defect_loss + 0.3 * kind_loss + 0.3 * colour_loss).backward()
        torch.nn.utils.clip_grad_norm_([*matrices, *others], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses += [loss.item() for loss in (share_loss, defect_loss, kind_loss, colour_loss)]
    raise AssertionError("unreachable: the loop returns")
