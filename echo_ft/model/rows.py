"""Rows: an `Exchange` as tokens, with one shared prefix and several branches.

A row is `prefix | branch 1 | branch 2 | ...`. The prefix holds the images and the shared context. A branch holds its
prompt and, in training, its completion with the closing tokens of the chat template. A branch attends to the prefix and
to itself, and its M-RoPE positions restart after the prefix. Every branch therefore computes exactly what it would
compute in a separate row (Qwen2-VL's M-RoPE: arXiv 2409.12191).

Shapes: B rows, L tokens in the longest row, P patches, C = 3 * temporal_patch_size * patch_size^2 values per patch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echo_ft.data.text import without_box_tokens
from echo_ft.errors import EchoError
from echo_ft.images.decode import image_size
from echo_ft.records import Branch, Exchange

IGNORED = -100
"""Label of tokens that are not trained on."""

ADAPT_FROM = ("prefix", "branch", "answer")
"""Where an adapter begins to act: everywhere, from the branch on, or from the answer on."""

PADDING = -1
"""Segment of padding tokens. The prefix is segment 0; branches count from 1."""

_PLACEHOLDER = "\u241e"  # stands for the context, and then for the completion, in the chat template


@dataclass(frozen=True)
class Row:
    """The tokens of one exchange. All arrays are (tokens,) unless noted."""

    exchange: Exchange
    input_ids: np.ndarray
    labels: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    """(3, tokens): temporal, height and width positions."""
    grids: np.ndarray
    """(images, 3): (t, h, w) of each image, in patches."""

    @property
    def prefix_length(self) -> int:
        """Number of tokens that all branches share."""
        return int((self.segments == 0).sum())

    def select(self, tokens: Any) -> Row:
        """Return the row with only some tokens; `tokens` indexes the arrays."""
        arrays = (self.input_ids[tokens], self.labels[tokens], self.segments[tokens], self.positions[:, tokens])
        return Row(self.exchange, *arrays, self.grids)


@dataclass(frozen=True)
class Lengths:
    """Token counts of a row: its prefix, each branch, and the tokens that are trained on."""

    prefix: int
    branches: tuple[int, ...]
    completions: tuple[int, ...]
    """Tokens of each completion up to the one that ends it, as a run must generate them."""
    answers: tuple[int, ...]
    """Tokens of each branch from the generation prompt on."""
    labels: int
    grids: tuple[tuple[int, int, int], ...]
    """(t, h, w) of each image, in patches."""
    look: int
    """Tokens up to the last image."""

    @property
    def tokens(self) -> int:
        """Number of tokens in the whole row."""
        return self.prefix + sum(self.branches)


class RowBuilder:
    """Builds rows with one processor (tokenizer, chat template, pixel budget)."""

    def __init__(self, processor: Any) -> None:
        """Raises EchoError if the chat template fails."""
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_processor = processor.image_processor
        self.image_token_id: int = processor.image_token_id
        self.pad_token_id: int = self.tokenizer.pad_token_id
        self.merge: int = self.image_processor.merge_size
        self._control = sorted(token for token in self.tokenizer.get_added_vocab() if token.startswith("<|"))
        self._encoded: dict[str, list[int]] = {}
        self._templates: dict[int, tuple[str, str, str]] = {}
        self.generation_prompt = self._generation_prompt()
        """The tokens with which the chat template begins every answer."""

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """Return (t, h, w) in patches for an image of this size in pixels, by the processor's resizing rule.

        Raises EchoError if one side of the image is more than 200 times as long as the other.
        """
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        patch, size = self.image_processor.patch_size, self.image_processor.size
        try:
            rows, columns = smart_resize(height, width, patch * self.merge, size["shortest_edge"], size["longest_edge"])
        except ValueError as error:
            raise EchoError(f"an image of {width} x {height} pixels cannot be used ({error}); crop it") from error
        return 1, rows // patch, columns // patch

    def row(self, exchange: Exchange, sizes: Sequence[tuple[int, int]]) -> Row:
        """Build the row of an exchange; `sizes` has the (width, height) of each image in pixels.

        Raises EchoError if any text contains a control token of the chat template, if an image is too long and narrow,
        or if the chat template has the wrong number of image placeholders.
        """
        grids = np.array([self.grid(*size) for size in sizes], dtype=np.int64).reshape(-1, 3)
        encoded = self._encode(self._texts(exchange))
        prefix = self._expand(encoded[0], grids, exchange)
        input_ids, labels, segments = [prefix], [np.full(len(prefix), IGNORED)], [np.zeros(len(prefix), dtype=np.int64)]
        prefix_positions = self._prefix_positions(prefix, grids)
        start = int(prefix_positions.max()) + 1
        positions = [prefix_positions]
        for number, (prompt, completion) in enumerate(zip(encoded[1::2], encoded[2::2], strict=True), start=1):
            ids = np.array(prompt + completion, dtype=np.int64)
            input_ids.append(ids)
            labels.append(np.array([IGNORED] * len(prompt) + completion, dtype=np.int64))
            segments.append(np.full(len(ids), number, dtype=np.int64))
            positions.append(np.broadcast_to(start + np.arange(len(ids)), (3, len(ids))))
        return Row(
            exchange,
            np.concatenate(input_ids),
            np.concatenate(labels),
            np.concatenate(segments),
            np.concatenate(positions, axis=1),
            grids,
        )

    def adapted_tokens(self, row: Row, adapt_from: str) -> np.ndarray:
        """Return which tokens of a row an adapter acts on, (tokens,) bool; `adapt_from` is one of ADAPT_FROM.

        From `branch` on, these are the branches. From `answer` on, they are the generation prompt of the chat template,
        as in PEFT's aLoRA (arXiv 2504.12397), and the completion.
        """
        if adapt_from == "prefix":
            return np.ones(len(row.segments), dtype=np.bool_)
        adapted = row.segments > 0
        if adapt_from == "answer":
            for number in range(1, len(row.exchange.branches) + 1):
                (places,) = np.nonzero(row.segments == number)
                prompt = places[row.labels[places] == IGNORED]
                adapted[prompt[: -len(self.generation_prompt)]] = False
        return adapted

    def look_length(self, row: Row) -> int:
        """Return the number of tokens up to the last image, which all rows with these images share."""
        images = np.flatnonzero(row.input_ids == self.image_token_id)
        return int(images[-1]) + 1 if len(images) else 1  # every row has a first token

    def _generation_prompt(self) -> list[int]:
        messages = [{"role": "user", "content": [{"type": "text", "text": _PLACEHOLDER}]}]
        question, prompt = self._rendered(messages), self._rendered(messages, add_generation_prompt=True)
        return self._encode([prompt.removeprefix(question)])[0]

    def load_row(self, exchange: Exchange, root: Path) -> Row:
        """Like `row`, with the image sizes read from the file headers. Also raises EchoError for an unreadable file."""
        return self.row(exchange, [image_size(root / image) for image in exchange.images])

    def lengths(self, exchange: Exchange, sizes: Sequence[tuple[int, int]]) -> Lengths:
        """Return the token counts of `row` without building it, in a fraction of the time. Raises the same errors."""
        grids = [self.grid(*size) for size in sizes]
        prefix, *parts = self._encode(self._texts(exchange))
        self._check_placeholders(prefix.count(self.image_token_id), len(grids), exchange)
        tokens = sum(math.prod(grid) for grid in grids) // self.merge**2
        look = len(prefix) - prefix[::-1].index(self.image_token_id) - len(grids) + tokens if grids else 1
        # Number of tokens that the template adds after the end token.
        ends = len(self._encode([self._template(exchange)[2]])[0]) - 1
        prompts, completions = list(map(len, parts[::2])), list(map(len, parts[1::2]))
        branches = tuple(prompt + completion for prompt, completion in zip(prompts, completions, strict=True))
        generated = tuple(length - ends for length in completions if length)
        answers = tuple(len(self.generation_prompt) + length for length in completions)
        length, labels = len(prefix) - len(grids) + tokens, sum(completions)
        return Lengths(length, branches, generated, answers, labels, tuple(grids), look)

    def pretokenize(self, exchanges: Sequence[Exchange]) -> None:
        """Tokenize the text of several exchanges in one call, which uses all cores."""
        texts: list[str] = []
        for exchange in exchanges:
            with contextlib.suppress(EchoError):  # building the row raises the error again
                texts += self._texts(exchange)
        self._encode(texts)

    def without_control_tokens(self, text: str) -> str:
        """Return a generated text without control tokens, as the tokenizer decodes it when it skips special tokens."""
        for token in self._control if "<|" in text else ():
            text = text.replace(token, "")
        return text

    def _texts(self, exchange: Exchange) -> list[str]:
        """Return the strings to tokenize separately: the prefix, then each branch's prompt and completion."""
        head, opening, closing = self._template(exchange)
        texts = [head + exchange.context]
        for branch in exchange.branches:
            texts += [branch.prompt + opening, "" if branch.completion is None else branch.completion + closing]
        return texts

    def _template(self, exchange: Exchange) -> tuple[str, str, str]:
        """Return the template's text before the context, between prompt and completion, and after the completion."""
        for text in (exchange.context, *map(_checked_text, exchange.branches)):
            token = next((token for token in self._control if token in text), None) if "<|" in text else None
            if token is not None:
                raise EchoError(
                    f"case {exchange.case}: its text contains the control token {token}; remove it from the source"
                )
        images = len(exchange.images)
        if images not in self._templates:
            content = [*({"type": "image"} for _ in exchange.images), {"type": "text", "text": _PLACEHOLDER}]
            messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
            head, opening = self._rendered(messages, add_generation_prompt=True).rsplit(_PLACEHOLDER, 1)
            messages.append({"role": "assistant", "content": [{"type": "text", "text": _PLACEHOLDER}]})
            self._templates[images] = (head, opening, self._rendered(messages).rsplit(_PLACEHOLDER, 1)[1])
        return self._templates[images]

    def _rendered(self, messages: list[dict[str, Any]], **options: bool) -> str:
        """Render a conversation that ends with the placeholder. Raises EchoError if the chat template does not."""
        try:
            text: str = self.processor.apply_chat_template(messages, tokenize=False, **options)
            reason = None if _PLACEHOLDER in text else "it leaves out the text of a message"
        except Exception as error:  # a template is a program, which may raise anything
            reason = str(error) or type(error).__name__
        if reason:
            raise EchoError(f"the chat template of the model fails ({reason}); use that of a Qwen2-VL model")
        return text

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        # Templates and instructions recur in every row, so this cache saves most of the tokenization when a dataset is
        # planned.
        if len(self._encoded) > 50_000:
            self._encoded.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._encoded]
        if new:  # This is one call, because a call takes longer than the tokenization itself.
            self._encoded |= zip(new, self.tokenizer(new, add_special_tokens=False)["input_ids"], strict=True)
        return [self._encoded[text] for text in texts]

    def _expand(self, ids: Sequence[int], grids: np.ndarray, exchange: Exchange) -> np.ndarray:
        array = np.array(ids, dtype=np.int64)
        images = array == self.image_token_id
        self._check_placeholders(int(images.sum()), len(grids), exchange)
        repeats = np.ones(len(array), dtype=np.int64)
        repeats[images] = grids.prod(axis=1) // self.merge**2
        return np.repeat(array, repeats)

    def _check_placeholders(self, placeholders: int, images: int, exchange: Exchange) -> None:
        if placeholders != images:
            raise EchoError(
                f"case {exchange.case}: the chat template has {placeholders} placeholders for {images} images; use a "
                "processor with Qwen2-VL's chat template"
            )

    def _prefix_positions(self, prefix: np.ndarray, grids: np.ndarray) -> np.ndarray:
        """Return positions (3, tokens) as Qwen2VLModel.get_rope_index does, for one prefix of text and still images."""
        positions = np.empty((3, len(prefix)), dtype=np.int64)
        start, position, images = 0, 0, iter(grids)
        while start < len(prefix):
            if prefix[start] == self.image_token_id:
                t, h, w = next(images)
                h, w = h // self.merge, w // self.merge
                end = start + t * h * w
                positions[:, start:end] = position + np.indices((t, h, w)).reshape(3, -1)
                position += max(h, w)
            else:
                image_tokens = np.flatnonzero(prefix[start:] == self.image_token_id)
                end = start + int(image_tokens[0]) if len(image_tokens) else len(prefix)
                positions[:, start:end] = position + np.arange(end - start)
                position += end - start
            start = end
        return positions


def _checked_text(branch: Branch) -> str:
    """Return the text of a branch. Raises EchoError if it contains a control token."""
    return branch.prompt + without_box_tokens(branch.completion or "")


def mark_trained(row: Row, row_builder: RowBuilder, start: str = "[[", end: str = "]]") -> str:
    """Return the row's text as the model sees it, with trained tokens between `start` and `end`.

    Each image is replaced by its number of tokens.
    """
    pieces: list[str] = []
    kinds = np.where(row.input_ids == row_builder.image_token_id, 2, (row.labels != IGNORED).astype(int))
    # Split at branch boundaries too, so that adjacent branches are marked separately.
    edges = np.flatnonzero((np.diff(kinds) != 0) | (np.diff(row.segments) != 0)) + 1
    for run in np.split(np.arange(len(kinds)), edges):
        text = row_builder.tokenizer.decode(row.input_ids[run])
        if kinds[run[0]] == 2:
            pieces.append(f"<image: {len(run)} tokens>")
        else:
            pieces.append(f"{start}{text}{end}" if kinds[run[0]] else text)
    return "".join(pieces)
