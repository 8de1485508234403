"""Inputs of echo-tiny: rows drawn from a pool, their tokens and batches, and the language model's states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from echo_ft.images.boxes import format_boxes, mask_boxes, to_thousandths
from echo_ft.images.masks import PLACES
from train.tiny.heads import MIN_PATCH_SHARE, SIDE, Targets, place_indices
from train.tiny.lessons import LessonRow, PartLabels, image_lessons
from train.tiny.pool import COLOUR_NAMES, DEFECT_NAMES, EXTENT_NAMES, IMAGES_PER_PRODUCT, KIND_NAMES, TONE_NAMES, Pool

QUERY_SHARES = (0.4, 0.3, 0.3)
"""Fractions of queries that show the normal part and each of the two defective parts."""

TOKEN_SIDE = 28
"""Side length of an image token, in pixels: 4 x 4 merged patches of 7 pixels."""

USER_OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ASSISTANT_OPENING = "<|im_end|>\n<|im_start|>assistant\n"
TURN_END = "<|im_end|>\n"


@dataclass(frozen=True)
class TokenRow:
    """A row as L tokens: a prefix followed by its branches, which do not attend to each other."""

    ids: np.ndarray
    """(L,)"""
    positions: np.ndarray
    """(3, L): M-RoPE positions in time, height and width. Every branch starts right after the prefix."""
    branch: np.ndarray
    """(L,): 0 in the prefix, otherwise the index of the branch."""
    trained: np.ndarray
    """(L,): true for tokens that contribute to the loss."""


def encode_row(row: LessonRow, tokenizer: Any) -> TokenRow:
    """Encode a row with the chat template. Every branch ends the user's turn and has its own answer."""
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids, positions = [], []
    position = 0

    def add(new: list[int], start: int) -> None:
        ids.append(np.asarray(new))
        positions.append(np.broadcast_to(start + np.arange(len(new)), (3, len(new))))

    text = USER_OPENING
    for image in row.images:
        opening = encode(text + "<|vision_start|>")
        add(opening, position)
        position += len(opening)
        rows, columns = image.shape[0] // TOKEN_SIDE, image.shape[1] // TOKEN_SIDE
        ids.append(np.full(rows * columns, image_token))
        down, right = np.divmod(np.arange(rows * columns), columns)
        positions.append(position + np.stack([np.zeros_like(down), down, right]))
        position += max(rows, columns)
        text = "<|vision_end|>"
    shared = encode(text + row.context)
    add(shared, position)
    position += len(shared)
    branch = [np.zeros(sum(map(len, ids)), np.int64)]
    trained = [np.zeros(len(branch[0]), bool)]
    for number, lesson in enumerate(row.branches, start=1):
        prompt, completion = encode(lesson.prompt + ASSISTANT_OPENING), encode(lesson.completion + TURN_END)
        add(prompt + completion, position)
        branch.append(np.full(len(prompt) + len(completion), number))
        # In rows of text, prompts are trained too. They repeat the words of options, which teaches copying. The first
        # token of a branch has no loss, because it follows the tokens of another branch.
        trained.append(np.repeat([False, not row.images, True], [1, len(prompt) - 1, len(completion)]))
    return TokenRow(*(np.concatenate(parts, axis=-1) for parts in (ids, positions, branch, trained)))


def collate_rows(rows: list[LessonRow], tokenizer: Any) -> dict[str, Any]:
    """Pad rows to length L. Return ids and labels (B, L), positions (3, B, L) and the attention mask (B, 1, L, L).

    `is_image` (B, L) is true for image tokens.
    """
    encoded = [encode_row(row, tokenizer) for row in rows]
    length = max(len(row.ids) for row in encoded)
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), -100)
    positions = torch.zeros(3, len(rows), length, dtype=torch.long)
    branch = torch.full((len(rows), length), -1)
    for index, row in enumerate(encoded):
        end = len(row.ids)
        ids[index, :end] = torch.from_numpy(row.ids)
        labels[index, :end] = torch.from_numpy(np.where(row.trained, row.ids, -100))
        positions[:, index, :end] = torch.from_numpy(row.positions)
        branch[index, :end] = torch.from_numpy(row.branch)
    same = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
    return {
        "ids": ids,
        "labels": labels,
        "positions": positions,
        "attention": same.tril()[:, None],
        "is_image": ids == tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    }


def text_states(language: Any, batch: dict[str, Any], tokens: Any, first: int, last: int) -> list[Any]:
    """Run layers `first` to `last` - 1 of a language model on a batch of rows.

    `tokens` are the merged image tokens of all images in order, (images, ..., hidden), or None without images. Returns
    the embeddings and then each layer's output, all (B, L, hidden).
    """
    states = language.embed_tokens(batch["ids"])
    if tokens is not None:
        states = states.masked_scatter(batch["is_image"][..., None], tokens.reshape(-1, tokens.shape[-1]))
    rotary = language.rotary_emb(states, batch["positions"])
    outputs = [states]
    for layer in language.layers[first:last]:
        states = layer(states, attention_mask=batch["attention"], position_embeddings=rotary)
        outputs.append(states)
    return outputs


def trained_logits(model: Any, batch: dict[str, Any], states: Any) -> tuple[Any, Any]:
    """Return the logits (N, vocabulary) for the N trained tokens of a batch, and these tokens (N,).

    `states` (B, L, hidden) is the output of the last layer.
    """
    labels = batch["labels"][:, 1:]
    return model.lm_head(model.model.language_model.norm(states[:, :-1][labels != -100])), labels[labels != -100]


def query_tokens(batch: dict[str, Any]) -> tuple[Any, Any]:
    """Return indices into hidden states (B, L, hidden) of the tokens (B, 36) of each row's last image."""
    at = torch.stack([row.nonzero()[-(SIDE**2) :, 0] for row in batch["is_image"]])
    return torch.arange(len(at))[:, None], at


@dataclass(frozen=True)
class DrawnRows:
    """Rows about images from a pool, with the targets of their queries."""

    rows: tuple[LessonRow, ...]
    targets: Targets
    images: Any
    """(images, 168, 168, 3): all images in order, each in its row's light."""
    queries: Any
    """(B,): index among the images of each row's query, which is the last image of the row."""


def draw_rows(rng: np.random.Generator, pool: Pool, count: int, branches: int) -> DrawnRows:
    """Draw rows with at most `branches` lessons. Most have one reference; some have none or two candidates."""
    rows, images, shares, indices, lights = [], [], [], [], []
    for _ in range(count):
        normals = int(rng.choice([0, 1, 2], p=[0.18, 0.7, 0.12]))
        product = int(rng.integers(pool.products))
        first = IMAGES_PER_PRODUCT * product
        index = first + int(rng.choice([1, 2, 3], p=QUERY_SHARES))
        shown = [first] * min(1, normals)
        if normals == 2:  # the other candidate is another part of the same product, or of another product
            foreign = index == first + 1 or rng.random() < 0.5
            shown.append(IMAGES_PER_PRODUCT * int(rng.integers(pool.products)) if foreign else first + 1)
            shown = [shown[n] for n in rng.permutation(2)]
        turns, mirrored = int(rng.integers(4)), rng.random() < 0.5
        row = [turn(pool.images[n], turns, mirrored) for n in [*shown, index]]
        share = turn(pool.shares[index], turns, mirrored)
        best = int(np.argmin([_misfit(image, row[-1]) for image in row[:-1]])) if normals == 2 else None
        context, lessons = image_lessons(rng, part_labels(pool, index, share), normals, best)
        rows.append(LessonRow(tuple(row), context, lessons[:branches]))
        gain, offset = rng.uniform(0.5, 1.15), rng.uniform(-25, 60)
        lights += [(gain * rng.uniform(0.95, 1.05), offset * (1.15 - gain)) for _ in row]
        images += row
        shares.append(share)
        indices.append(index)
    gains, offsets = torch.tensor(lights, dtype=torch.float32).view(-1, 2, 1, 1, 1).unbind(1)
    lit = torch.from_numpy(np.stack(images)).float() * gains + offsets
    queries = torch.tensor([len(row.images) for row in rows]).cumsum(0) - 1
    targets = targets_of(pool, np.asarray(indices), torch.from_numpy(np.stack(shares)))
    return DrawnRows(tuple(rows), targets, lit, queries)


def turn(array: NDArray[Any], turns: int, mirrored: bool) -> NDArray[Any]:
    """Turn an array (height, width, ...) by quarter turns, and mirror it if requested."""
    turned = np.rot90(array, turns)
    return np.ascontiguousarray(turned[:, ::-1] if mirrored else turned)


def part_labels(pool: Pool, index: int, shares: NDArray[np.uint8]) -> PartLabels:
    """Return what lessons can ask about image `index`. The defect's place and boxes come from its turned `shares`."""
    label = pool.labels[index]

    def name(field: str, names: Sequence[str]) -> str:
        return names[label[field]] if label[field] >= 0 else ""

    part = name("kind", KIND_NAMES), name("colour", COLOUR_NAMES)
    if label["defect"] < 0:
        return PartLabels(*part)
    defect = name("defect", DEFECT_NAMES), name("tone", TONE_NAMES), name("extent", EXTENT_NAMES)
    place = PLACES[int(place_indices(torch.tensor(shares).float()[None]))]
    # The patches that the defect covers give its boxes to 42 thousandths.
    covered = shares > min(255 * MIN_PATCH_SHARE, shares.max() / 2)
    found = [to_thousandths(box, covered.shape[::-1]) for box in mask_boxes(covered)]
    return PartLabels(*part, *defect, place, format_boxes(found))


def _misfit(image: NDArray[np.uint8], query: NDArray[np.uint8]) -> float:
    return float(np.abs(image[::4, ::4].astype(np.float32) - query[::4, ::4]).mean())


def targets_of(pool: Pool, indices: NDArray[np.int64], shares: Any) -> Targets:
    """Return the correct predictions of the heads for images `indices` (B,).

    Their turned `shares` (B, 24, 24) range from 0 to 255.
    """
    labels = pool.labels[indices]
    fields = (torch.from_numpy(labels[field].astype(np.int64)) for field in ("defect", "tone", "kind", "colour"))
    return Targets(shares.float() / 255, *fields)
