"""Inputs of echo-tiny: lesson rows as tokens, batches and image patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from train.tiny.lessons import LessonRow

TOKEN_SIDE = 28
"""Side of one image token in pixels: 2 x 2 merged patches of 14 pixels."""

USER_OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ASSISTANT_OPENING = "<|im_end|>\n<|im_start|>assistant\n"
TURN_END = "<|im_end|>\n"


@dataclass
class TokenRow:
    """A row as L tokens: one prefix, then its branches, which do not attend to each other."""

    ids: np.ndarray
    """(L,)"""
    positions: np.ndarray
    """(3, L): M-RoPE positions in time, height and width. Every branch starts right after the prefix."""
    branch: np.ndarray
    """(L,): 0 in the prefix, then the number of the branch."""
    trained: np.ndarray
    """(L,): true for the tokens that are trained."""


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
        # In rows of text, prompts are trained too: they repeat the words of options, which teaches copying.
        # No loss is computed on the first token, because in a row it follows another branch.
        trained.append(np.repeat([False, not row.images, True], [1, len(prompt) - 1, len(completion)]))
    return TokenRow(*(np.concatenate(parts, axis=-1) for parts in (ids, positions, branch, trained)))


def collate_rows(rows: list[LessonRow], tokenizer: Any) -> dict[str, Any]:
    """Rows as tensors padded to length L: ids and labels (B, L), positions (3, B, L), attention mask (B, 1, L, L).

    `images` lists the images of all rows, each (height, width, 3).
    """
    import torch

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
    images = [torch.from_numpy(image) for lesson_row in rows for image in lesson_row.images]
    return {"ids": ids, "labels": labels, "positions": positions, "attention": same.tril()[:, None], "images": images}


def image_patches(images: list[Any]) -> tuple[Any, Any]:
    """The output of Qwen2-VL's image processor for images (height, width, 3) with sides that are multiples of 28.

    Returns pixel values (patches, 1176) and grids (images, 3). It skips the processor's resizing, for speed.
    """
    import torch
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, deviation = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    values, grids = [], []
    for image in images:
        rows, columns = image.shape[0] // 14, image.shape[1] // 14
        pixels = (image.float() / 255 - mean) / deviation
        blocks = pixels.view(rows // 2, 2, 14, columns // 2, 2, 14, 3).permute(0, 3, 1, 4, 6, 2, 5)
        values.append(blocks.unsqueeze(5).expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(rows * columns, -1))
        grids.append([1, rows, columns])
    return torch.cat(values), torch.tensor(grids)


def trained_logits(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Logits (N, vocabulary) for the N trained tokens of a batch, and these tokens (N,)."""
    vision = {}
    if batch["images"]:
        vision["pixel_values"], vision["image_grid_thw"] = image_patches(batch["images"])
    hidden = model.model(
        input_ids=batch["ids"],
        attention_mask=batch["attention"],
        position_ids=batch["positions"],
        use_cache=False,
        **vision,
    ).last_hidden_state
    labels = batch["labels"][:, 1:]
    return model.lm_head(hidden[:, :-1][labels != -100]), labels[labels != -100]
