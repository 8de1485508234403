"""How echo-tiny's vision tower learns to see: linear heads, dropped afterwards, say what each of its tokens shows.

A caption has one word for a mark that covers one token in thirty; a label at every token teaches a tower of no
convolutions more in the same time, and large marks on plain surfaces more than the small ones that come later.
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
    PRETRAINING_DEFECTS,
    PRETRAINING_KINDS,
    IMAGE_SIZE,
    SURFACES,
    Part,
    render_part,
    random_defect,
    random_style,
)
from train.tiny.model import MERGE, patches

SAMPLED_SHAPES, SAMPLED_DEFECTS, SAMPLED_HUES = tuple(PRETRAINING_KINDS), tuple(PRETRAINING_DEFECTS), tuple(COLOURS)
COVERED = 0.04
"""A token shows the defect from this share of its pixels."""
SAMPLES_PER_STEP = 8
"""Photographs a step."""
PEAK = 1e-3
"""Learning rate."""
EASED = 0.6
"""Share of the time in which defects shrink to their size and surfaces become as rare as they are."""
LOG_EVERY = 250
"""Steps between two lines of progress."""


@dataclass(frozen=True)
class Sample:
    """A photograph and what its tokens show."""

    photo: NDArray[np.uint8]
    """(height, width, 3), sides multiples of 28."""
    share: NDArray[np.float32]
    """(tokens,): of the token's pixels, how many lie on the defect, 0 to 1."""
    defect: int
    """Index into DEFECTS, -1 without a defect."""
    kind: int
    colour: int


def draw_sample(seed: int, ease: float) -> Sample:
    """Photograph number `seed`; with `ease` 1, more plain surfaces, and defects twice as large as with 0."""
    rng = np.random.default_rng((seed, 9))
    style = random_style(rng, str(rng.choice(list(SURFACES))) if rng.random() < 0.7 * ease else None)
    defect = random_defect(rng, style) if rng.random() < 0.6 else None
    if defect:
        defect = dataclasses.replace(defect, size=min(0.6, defect.size * (1 + ease)))
    seed, camera = rng.integers(2**31, size=2).tolist()
    shot = render_part(Part(style, seed, defect), camera, IMAGE_SIZE)
    rows, columns = IMAGE_SIZE[0] // MERGE, IMAGE_SIZE[1] // MERGE
    share = shot.mask.reshape(rows, MERGE, columns, MERGE).mean(axis=(1, 3), dtype=np.float32).ravel()
    found = SAMPLED_DEFECTS.index(defect.name) if defect else -1
    return Sample(shot.image, share, found, SAMPLED_SHAPES.index(style.kind), SAMPLED_HUES.index(style.colour))


def collate_samples(made: Sequence[Sample]) -> dict[str, Any]:
    """A batch: photos, share (B, tokens), and of each photograph defect, kind and colour (B,)."""
    import torch

    return {
        "photos": [torch.from_numpy(g.photo) for g in made],
        "share": torch.from_numpy(np.stack([g.share for g in made])),
        **{name: torch.tensor([getattr(g, name) for g in made]) for name in ("defect", "kind", "colour")},
    }


def encode_samples(model: Any, photos: list[Any]) -> Any:
    """Features (B, tokens, hidden) of photographs of one size."""
    import torch

    values, grids = patches(photos)
    return torch.stack(model.model.get_image_features(values, grids, return_dict=True).pooler_output)


def pretrain_vision(model: Any, first: int, minutes: float, steps: int) -> int:
    """Train the vision tower and its merger over `minutes`, or `steps` where they are given; returns the steps made."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

    tower = model.model.visual
    heads = torch.nn.ModuleDict(
        {
            name: torch.nn.Linear(tower.config.hidden_size, size)
            for name, size in (
                ("share", 1),
                ("defect", len(SAMPLED_DEFECTS)),
                ("kind", len(SAMPLED_SHAPES)),
                ("colour", len(SAMPLED_HUES)),
            )
        }
    )
    matrices = [p for p in tower.parameters() if p.ndim >= 2]
    others = [p for p in tower.parameters() if p.ndim < 2] + list(heads.parameters())
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.98))
    start, losses = time.monotonic(), np.zeros(4)
    for step in itertools.count():
        passed = (time.monotonic() - start) / 60
        done = step / steps if steps else passed / minutes
        if done >= 1:
            return step
        if step and step % LOG_EVERY == 0:
            words = "  ".join(f"{name} {loss:.3f}" for name, loss in zip(heads, losses / LOG_EVERY, strict=True))
            print(f"looking, step {step:5d}  {passed:5.1f} min  {words}", flush=True)
            losses[:] = 0
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))
        # Drawn here: a process of its own would take a core from the two that compute, which wait for each other.
        ease = max(0.0, 1 - done / EASED)
        batch = collate_samples(
            [draw_sample(first + step * SAMPLES_PER_STEP + index, ease) for index in range(SAMPLES_PER_STEP)]
        )
        features = encode_samples(model, batch["photos"])
        covered = batch["share"] > COVERED
        of_defect = batch["defect"][:, None].expand_as(covered)[covered]
        image = features.mean(dim=1)
        marked = binary_cross_entropy_with_logits(
            heads["share"](features)[..., 0], covered.float(), pos_weight=torch.tensor(3.0)
        )
        named = cross_entropy(heads["defect"](features[covered]), of_defect, reduction="sum") / max(1, len(of_defect))
        kinds = cross_entropy(heads["kind"](image), batch["kind"])
        colours = cross_entropy(heads["colour"](image), batch["colour"])
        (marked + 0.5 * named + 0.3 * kinds + 0.3 * colours).backward()
        torch.nn.utils.clip_grad_norm_([*matrices, *others], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses += [part.item() for part in (marked, named, kinds, colours)]
    raise AssertionError("the steps above end it")
