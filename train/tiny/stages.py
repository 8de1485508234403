"""The five stages of echo-tiny's pretraining, each a function that returns the losses of one drawn step.

1. `read`: the reading layers learn to answer questions about text with a letter. They do not see images yet.
2. `look`: the vision tower learns what patches and image tokens show.
3. `compare`: the comparing layer learns what differs from a normal reference at the same position.
4. `bring`: the bringing layer copies what was found, and where, to the text after the images.
5. `answer`: all layers learn to answer about images.

The heads of earlier stages stay active. The comparing and bringing layers learn to leave text without images unchanged,
so that the model keeps the letters it learned in the first stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from train.tiny import heads as on
from train.tiny.attention import BRINGING, COMPARING, READING, prepare_bringing, prepare_comparison
from train.tiny.inputs import (
    QUERY_SHARES,
    DrawnRows,
    collate_rows,
    draw_rows,
    query_tokens,
    targets_of,
    text_states,
    trained_logits,
)
from train.tiny.lessons import LessonRow, draw_binding_row, draw_text_row
from train.tiny.loop import StepLosses, adamw
from train.tiny.model import PATCH_SIZE
from train.tiny.pool import IMAGES_PER_PRODUCT, Pool
from train.tiny.shifts import encode_as_shifts, normalize, scale_tokens

READ_BATCH, LOOK_BATCH, PAIR_BATCH, ROW_BATCH, TEXT_ROWS = 8, 32, 16, 16, 4
"""Number per step of rows of text, images, pairs and rows with images, and of rows of text added to the last two."""
TOKEN_DEVIATION = 0.22
"""Standard deviation of image tokens for the language model: one and a half times that of its embeddings."""
KEEP_TEXT = 3.0
"""Weight of the loss that keeps text without images unchanged."""
LETTER_WEIGHT = 2.0
"""Weight of letters among the trained tokens, because they are few and the hardest to learn."""


@dataclass(frozen=True)
class Student:
    """Everything that pretraining trains."""

    model: Any
    """A Qwen2VLForConditionalGeneration."""
    heads: on.Heads
    tokenizer: Any

    @property
    def language(self) -> Any:
        return self.model.model.language_model

    @property
    def visual(self) -> Any:
        return self.model.model.visual

    @property
    def seeing(self) -> Any:
        """Return the comparing layer and the bringing layer."""
        return self.language.layers[: READING.start]

    @property
    def reading(self) -> Any:
        """Embeddings, the layers that read and answer, and the last norm."""
        language = self.language
        return torch.nn.ModuleList([language.embed_tokens, *language.layers[READING], language.norm])

    def modules(self, *names: str) -> torch.nn.ModuleDict:
        """Some of `reading`, `seeing`, `visual` and `heads`, to save and load together."""
        return torch.nn.ModuleDict({name: getattr(self, name) for name in names})

    def look(self, images: Any) -> tuple[Any, Any]:
        """Encode images (B, 168, 168, 3) from 0 to 255 as patches (B, 24, 24, width) and tokens (B, 6, 6, hidden)."""
        return encode_as_shifts(self.visual, normalize(images, PATCH_SIZE))


@dataclass(frozen=True)
class Stage:
    """What a stage trains, and how."""

    trained: torch.nn.ModuleDict
    optimizers: Sequence[torch.optim.Optimizer]
    losses: StepLosses


def read(student: Student, pool: None) -> Stage:
    """Learn to read from rows of text alone, first to recall the last words, then earlier ones. Needs no pool."""
    matrices, others = _split_matrices(student.language.layers[READING], student.reading)

    def losses(rng: np.random.Generator, done: float) -> dict[str, torch.Tensor]:
        rows = [draw_reading_row(rng, done) for _ in range(READ_BATCH)]
        batch = collate_rows(rows, student.tokenizer)
        states = text_states(student.language, batch, None, READING.start, READING.stop)
        return {"words": _weighted_words(student, batch, states[-1])}

    return Stage(student.modules("reading"), [_muon(matrices, 3e-3), adamw(others, 1.5e-3)], losses)


def draw_reading_row(rng: np.random.Generator, done: float) -> LessonRow:
    """Draw a row of text: letters bound to words just read, then also to earlier words, then rows of all kinds."""
    seed = int(rng.integers(2**40))
    if done < 0.05:
        return draw_binding_row(seed, after_share=1.0)
    return draw_binding_row(seed, after_share=0.3) if done < 0.55 else draw_text_row(seed)


def look(student: Student, pool: Pool) -> Stage:
    """Learn what is at each patch and image token."""
    matrices, others = _split_matrices(student.visual.blocks, student.visual)
    optimizers = [_muon(matrices, 6e-3), adamw([*others, *student.heads.parameters()], 2e-3)]

    def losses(rng: np.random.Generator, done: float) -> dict[str, torch.Tensor]:
        # Sort the indices, so that the memory-mapped file is read in order.
        indices = np.sort(rng.choice(len(pool.images), LOOK_BATCH, replace=False))
        images, shares = _turn(rng, torch.from_numpy(pool.images[indices]), torch.from_numpy(pool.shares[indices]))
        gain, offset = _light(rng, LOOK_BATCH)
        patches, tokens = student.look(images.float() * gain + offset)
        return {"tower": on.tower_loss(student.heads, patches, tokens, targets_of(pool, indices, shares))}

    return Stage(student.modules("visual", "heads"), optimizers, losses)


def compare(student: Student, pool: Pool) -> Stage:
    """Learn what differs from a normal reference at the same position."""
    with torch.no_grad():
        sample = student.look(torch.tensor(pool.images[:64]).float())[1]
    scale_tokens(student.visual, sample, TOKEN_DEVIATION)
    prepare_comparison(student.model, student.tokenizer)
    layer, heads = student.language.layers[COMPARING], student.heads
    matrices, others = _split_matrices(student.visual.blocks, student.visual)
    optimizers = [_muon(matrices, 3e-3), adamw([*others, *layer.parameters(), *heads.parameters()], 1.5e-3)]
    blank = np.zeros((168, 168, 3), np.uint8)
    pair = collate_rows([LessonRow((blank, blank), "", ())], student.tokenizer)
    at = pair["is_image"][0].nonzero()[:, 0]
    reference, query = at[: len(at) // 2], at[len(at) // 2 :]
    batch = {
        "ids": pair["ids"].expand(PAIR_BATCH, -1),
        "is_image": pair["is_image"].expand(PAIR_BATCH, -1),
        "positions": pair["positions"].expand(-1, PAIR_BATCH, -1),
        "attention": pair["attention"],
    }

    def losses(rng: np.random.Generator, done: float) -> dict[str, torch.Tensor]:
        first = IMAGES_PER_PRODUCT * rng.integers(pool.products, size=PAIR_BATCH)
        indices = first + rng.choice([1, 2, 3], size=PAIR_BATCH, p=QUERY_SHARES)
        normals, queries = (torch.from_numpy(pool.images[at]) for at in (first, indices))
        normals, queries, shares = _turn(rng, normals, queries, torch.from_numpy(pool.shares[indices]))
        gain, offset = _light(rng, PAIR_BATCH)
        other = gain * torch.from_numpy(rng.uniform(0.93, 1.07, (PAIR_BATCH, 1, 1, 1)).astype(np.float32))
        patches, tokens = student.look(torch.cat([queries.float() * gain + offset, normals.float() * other + offset]))
        targets = targets_of(pool, indices, shares)
        both = torch.stack([tokens[PAIR_BATCH:], tokens[:PAIR_BATCH]], dim=1)
        states = text_states(student.language, batch, both, COMPARING, COMPARING + 1)[-1]
        return {
            "tower": on.tower_loss(heads, patches[:PAIR_BATCH], tokens[:PAIR_BATCH], targets),
            "compared": on.token_loss(heads.compared, states[:, query], targets),
            "reference": 0.45 * on.reference_loss(heads.compared, states[:, reference]),
            "text kept": KEEP_TEXT * _change_of_text(student, rng, COMPARING + 1),
        }

    return Stage(student.modules("seeing", "visual", "heads"), optimizers, losses)


def bring(student: Student, pool: Pool) -> Stage:
    """Learn to bring what was found to the text after the images."""
    prepare_bringing(student.model, student.heads.compared.weight[0])
    optimizers = [
        adamw([*student.seeing.parameters(), *student.heads.parameters()], 1.5e-3, decay=0.01),
        adamw(list(student.visual.parameters()), 2e-4, decay=0.01),
    ]

    def losses(rng: np.random.Generator, done: float) -> dict[str, torch.Tensor]:
        drawn = draw_rows(rng, pool, ROW_BATCH, branches=2)
        parts, batch, tokens = _tower_parts(student, drawn)
        states = text_states(student.language, batch, tokens, 0, READING.start)
        parts |= _found_parts(student, drawn, batch, states)
        return parts | {"text kept": KEEP_TEXT * _change_of_text(student, rng, READING.start)}

    return Stage(student.modules("seeing", "visual", "heads"), optimizers, losses)


def answer(student: Student, pool: Pool) -> Stage:
    """Learn to answer about images. Three in ten steps use text, so that the model keeps answering about text."""
    layers = student.language.layers
    optimizers = [
        adamw(list(student.seeing.parameters()), 6e-4),
        adamw(list(student.reading.parameters()), 4e-4),
        adamw(list(student.visual.parameters()), 2e-4),
        adamw(list(student.heads.parameters()), 2e-3),
    ]

    def losses(rng: np.random.Generator, done: float) -> dict[str, torch.Tensor]:
        if rng.random() < 0.3:
            rows = [draw_text_row(int(rng.integers(2**40))) for _ in range(ROW_BATCH // 2)]
            batch = collate_rows(rows, student.tokenizer)
            states = text_states(student.language, batch, None, 0, len(layers))
            kept = KEEP_TEXT * _change(states[: READING.start + 1])
            return {"text": _weighted_words(student, batch, states[-1]), "text kept": kept}
        drawn = draw_rows(rng, pool, ROW_BATCH, branches=3)
        parts, batch, tokens = _tower_parts(student, drawn)
        states = text_states(student.language, batch, tokens, 0, len(layers))
        at = query_tokens(batch)
        parts |= _found_parts(student, drawn, batch, states)
        parts["final"] = on.token_loss(student.heads.final, states[-1][at], drawn.targets)
        parts["words"] = _weighted_words(student, batch, states[-1])
        return parts

    return Stage(student.modules("reading", "seeing", "visual", "heads"), optimizers, losses)


STAGES: dict[str, Callable[[Student, Any], Stage]] = {
    "read": read, "look": look, "compare": compare, "bring": bring, "answer": answer
}  # fmt: skip


def _turn(rng: np.random.Generator, *batches: Any) -> list[Any]:
    """Turn and mirror each quarter of a batch (B, height, width, ...) in another way, but the same in all `batches`."""
    ways = [(int(rng.integers(4)), rng.random() < 0.5) for _ in range(4)]
    turned = []
    for batch in batches:
        quarters = [
            quarter.rot90(turns, (1, 2)).flip(2) if mirrored else quarter.rot90(turns, (1, 2))
            for quarter, (turns, mirrored) in zip(batch.chunk(4), ways, strict=True)
        ]
        turned.append(torch.cat(quarters))
    return turned


def _light(rng: np.random.Generator, count: int) -> tuple[Any, Any]:
    """Draw a gain and an offset, both (count, 1, 1, 1), that put images in a different light."""
    gain = rng.uniform(0.5, 1.15, (count, 1, 1, 1)).astype(np.float32)
    offset = rng.uniform(-25, 60, (count, 1, 1, 1)).astype(np.float32)
    return torch.from_numpy(gain), torch.from_numpy(offset * (1.15 - gain))


def _tower_parts(student: Student, drawn: DrawnRows) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Return the tower's loss at the queries, the batch of the rows, and the tokens of all images."""
    batch = collate_rows(list(drawn.rows), student.tokenizer)
    patches, tokens = student.look(drawn.images)
    at = drawn.queries
    return {"tower": 0.5 * on.tower_loss(student.heads, patches[at], tokens[at], drawn.targets)}, batch, tokens


def _found_parts(student: Student, drawn: DrawnRows, batch: dict[str, Any], states: list[Any]) -> dict[str, Any]:
    """Return the losses of the comparing layer at the queries and of the bringing layer at the text after them."""
    rows, at = query_tokens(batch)
    after = torch.arange(batch["ids"].shape[1])[None] > at[:, -1:]
    after = after & (batch["ids"] != student.tokenizer.pad_token_id)
    heads = student.heads
    return {
        "compared": on.token_loss(heads.compared, states[COMPARING + 1][rows, at], drawn.targets),
        "brought": 2 * on.text_loss(heads, states[BRINGING + 1], after, drawn.targets),
    }


def _change_of_text(student: Student, rng: np.random.Generator, layers: int) -> Any:
    """Return how much the first `layers` layers change rows of text."""
    rows = [draw_text_row(int(rng.integers(2**40))) for _ in range(TEXT_ROWS)]
    return _change(text_states(student.language, collate_rows(rows, student.tokenizer), None, 0, layers))


def _change(states: list[Any]) -> Any:
    """Return the sum of the relative squared changes from the first states to each later one."""
    before, *after = states
    before = before.detach()
    return torch.stack([(states - before).square().mean() / before.square().mean() for states in after]).sum()


def _weighted_words(student: Student, batch: dict[str, Any], states: Any) -> Any:
    """Return the loss of the trained tokens. Letters are averaged separately and weighted more."""
    logits, labels = trained_logits(student.model, batch, states)
    losses = cross_entropy(logits, labels, reduction="none")
    is_letter = letter_mask(student.tokenizer, batch)
    letters = losses[is_letter].sum() / is_letter.sum().clamp(min=1)
    return losses[~is_letter].mean() + LETTER_WEIGHT * letters


def letter_mask(tokenizer: Any, batch: dict[str, Any]) -> Any:
    """Return which of a batch's N trained tokens are letters that end a completion, as booleans (N,)."""
    letters = torch.tensor(tokenizer.convert_tokens_to_ids(list("ABCD")))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    labels = batch["labels"][:, 1:]
    following = torch.cat([batch["ids"][:, 2:], batch["ids"][:, :1]], dim=1)
    return (torch.isin(labels, letters) & (following == end))[labels != -100]


def _split_matrices(layers: Any, module: Any) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Split the weights of `module` into the matrices of its `layers`, which Muon trains, and all others."""
    matrices = [weight for weight in layers.parameters() if weight.ndim == 2]
    chosen = set(map(id, matrices))
    return matrices, [weight for weight in module.parameters() if id(weight) not in chosen]


def _muon(matrices: list[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
