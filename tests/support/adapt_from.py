"""The logits of an adapter that acts after the prefix, one question at a time, with transformers and PEFT alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache

from echo_ft.model.rows import Row, RowBuilder


def plain_inputs(row_builder: RowBuilder, root: Path, row: Row) -> dict[str, torch.Tensor]:
    """The inputs that transformers takes for a row with one branch."""
    ids = torch.from_numpy(row.input_ids)[None]
    images = [Image.open(root / image).convert("RGB") for image in row.exchange.images]
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == row_builder.image_token_id).int(),
        **(row_builder.image_processor(images=images, return_tensors="pt") if images else {}),
    }


def logits_of_one_row(tuned: Any, adapt_from: str, inputs: dict[str, torch.Tensor], row: Row) -> torch.Tensor:
    """The logits (tokens, vocabulary) of `plain_inputs`, in which more tokens may follow those of the row.

    For `branch`, the logits of the prefix are zero.
    """
    if adapt_from == "answer":  # PEFT finds the generation prompt in the tokens
        logits: torch.Tensor = tuned(**inputs).logits[0]
        return logits
    length = row.prefix_length
    cache = DynamicCache(config=tuned.config.get_text_config())
    start = inputs | {name: inputs[name][:, :length] for name in ("input_ids", "mm_token_type_ids")}
    with torch.no_grad(), tuned.disable_adapter():
        tuned(**start, past_key_values=cache, use_cache=True)
    ids = inputs["input_ids"][:, length:]
    positions = int(row.positions[:, :length].max()) + 1 + torch.arange(ids.shape[1])
    after = tuned(input_ids=ids, position_ids=positions.expand(3, 1, -1), past_key_values=cache).logits[0]
    return torch.cat([after.new_zeros(length, after.shape[-1]), after])
