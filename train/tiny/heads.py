"""Linear heads that pretraining adds to echo-tiny, and their losses on masks. The saved model has none of them.

A completion contains only one word about a defect, which covers one image token in thirty. The heads predict what is at
every patch, image token and text token, which teaches more in the same time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, softplus

from echo_ft.images.masks import PLACES
from train.tiny.pool import COLOUR_NAMES, DEFECT_NAMES, KIND_NAMES, TONE_NAMES
from train.tiny.shifts import normal

SIDE = 6
"""Image tokens along one side of a pretraining image."""
PATCHES = 4
"""Patches along one side of an image token."""

MIN_PATCH_SHARE, MIN_TOKEN_SHARE = 0.15, 0.03
"""A patch or an image token shows a defect if the mask covers more than this fraction of it."""
POSITIVE_WEIGHT = 3.0
"""Weight of the few patches and tokens that are on a defect."""


class Heads(torch.nn.Module):
    """One linear head per location in the model. Inputs are normalised, so the scale of the states does not matter."""

    def __init__(self, patch_width: int, width: int) -> None:
        super().__init__()
        self.patch = torch.nn.Linear(patch_width, 1 + len(DEFECT_NAMES))
        self.token = torch.nn.Linear(width, 1 + len(DEFECT_NAMES) + len(TONE_NAMES))
        self.image = torch.nn.Linear(width, len(KIND_NAMES) + len(COLOUR_NAMES))
        # At image tokens in the language model, the heads predict whether there is a defect, its kind, and the token's
        # row and column.
        self.compared = torch.nn.Linear(width, 1 + len(DEFECT_NAMES) + 2 * SIDE)
        self.final = torch.nn.Linear(width, 1 + len(DEFECT_NAMES) + 2 * SIDE)
        # At text tokens in the language model, the heads predict whether there is a defect, its kind and its place.
        self.text = torch.nn.Linear(width, 1 + len(DEFECT_NAMES) + len(PLACES))


@dataclass(frozen=True)
class Targets:
    """The correct predictions of the heads for B query images."""

    shares: Any
    """(B, 24, 24): fraction of each patch that is on the defect, from 0 to 1."""
    defect: Any
    """(B,): index into DEFECT_NAMES, or -1 without a defect. The next three are indices too, or -1 if unknown."""
    tone: Any
    kind: Any
    hue: Any

    @property
    def token_shares(self) -> Any:
        """(B, 36): fraction of each image token that is on the defect."""
        count = len(self.shares)
        return self.shares.view(count, SIDE, PATCHES, SIDE, PATCHES).mean((2, 4)).flatten(1)

    @property
    def place(self) -> Any:
        """(B,): index into PLACES of the defect's centre. Meaningless without a defect."""
        return place_indices(self.shares)


def place_indices(shares: Any) -> Any:
    """Return the index into PLACES of each defect's centre in `shares` (B, 24, 24). Meaningless without a defect."""
    total, third = shares.sum((1, 2)).clamp(min=1e-6), shares.shape[1] // 3
    middle = torch.arange(shares.shape[1]) + 0.5
    row, column = ((shares.sum(axis) @ middle / total / third).long().clamp(0, 2) for axis in (2, 1))
    return 3 * row + column


def tower_loss(heads: Heads, patches: Any, tokens: Any, targets: Targets) -> Any:
    """Return the loss at the tower's patches (B, 24, 24, width) and merged tokens (B, 6, 6, hidden)."""
    shown = targets.shares > MIN_PATCH_SHARE
    at_patches = heads.patch(normal(patches))
    loss = _presence(at_patches[..., 0], shown)
    loss = loss + 0.3 * _named(at_patches[..., 1:], shown, targets.defect)

    covered = (targets.token_shares > MIN_TOKEN_SHARE).view(-1, SIDE, SIDE)
    at_tokens = heads.token(normal(tokens))
    loss = loss + _presence(at_tokens[..., 0], covered)
    names, tones = at_tokens[..., 1:].split([len(DEFECT_NAMES), len(TONE_NAMES)], dim=-1)
    loss = loss + 0.5 * _named(names, covered, targets.defect) + 0.15 * _named(tones, covered, targets.tone)

    kinds, hues = heads.image(normal(tokens).mean((1, 2))).split([len(KIND_NAMES), len(COLOUR_NAMES)], dim=-1)
    return loss + 0.2 * (_known(kinds, targets.kind) + _known(hues, targets.hue))


def token_loss(head: torch.nn.Linear, states: Any, targets: Targets) -> Any:
    """Return the loss of `head` at hidden states (B, 36, hidden) of the queries' image tokens."""
    covered = targets.token_shares > MIN_TOKEN_SHARE
    logits = head(normal(states))
    names, rows, columns = logits[..., 1:].split([len(DEFECT_NAMES), SIDE, SIDE], dim=-1)
    row, column = _grid(len(states))
    position = cross_entropy(rows.flatten(0, 1), row) + cross_entropy(columns.flatten(0, 1), column)
    return 1.5 * _presence(logits[..., 0], covered) + 0.4 * _named(names, covered, targets.defect) + 0.15 * position


def reference_loss(head: torch.nn.Linear, states: Any) -> Any:
    """Return the loss at hidden states (B, 36, hidden) of normal references, which have no defect."""
    return softplus(head(normal(states))[..., 0]).mean()


def text_loss(heads: Heads, states: Any, after: Any, targets: Targets) -> Any:
    """Return the loss at hidden states (B, L, hidden) of the text after the images, which `after` (B, L) selects."""
    present = targets.defect >= 0
    logits = heads.text(normal(states[after]))
    row = after.nonzero()[:, 0]
    names, places = logits[:, 1:].split([len(DEFECT_NAMES), len(PLACES)], dim=-1)
    loss = binary_cross_entropy_with_logits(logits[:, 0], present[row].float())
    known = present[row]
    if known.any():
        loss = loss + 0.3 * cross_entropy(names[known], targets.defect[row[known]])
        loss = loss + 0.3 * cross_entropy(places[known], targets.place[row[known]])
    return loss


def _grid(count: int) -> tuple[Any, Any]:
    """Return the rows and columns, each (count * 36,), of the image tokens of `count` images."""
    token = torch.arange(SIDE * SIDE).repeat(count)
    return token // SIDE, token % SIDE


def _presence(logits: Any, shown: Any) -> Any:
    return binary_cross_entropy_with_logits(logits, shown.float(), pos_weight=torch.tensor(POSITIVE_WEIGHT))


def _named(logits: Any, shown: Any, names: Any) -> Any:
    """Return the mean loss of the class at the positions that show it. `names` holds one class per image."""
    classes = names.view(-1, *(1,) * (shown.ndim - 1)).expand_as(shown)[shown]
    return _known(logits[shown], classes)


def _known(logits: Any, classes: Any) -> Any:
    """Return the mean loss of the known classes, or 0 if none is known."""
    return cross_entropy(logits, classes, ignore_index=-1, reduction="sum") / (classes >= 0).sum().clamp(min=1)
