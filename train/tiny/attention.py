"""The attention that echo-tiny's language model starts from.

Random weights do not learn to compare images, to find positions or to answer with letters in the available time.
"""

from __future__ import annotations

import math
from typing import Any

import torch

COMPARING, BRINGING = 0, 1
"""Layers of the language model that compare the query with the reference and bring the result to the text.

Text without images passes through these layers unchanged. The layers after them read and answer.
"""
READING = slice(2, 6)
"""The layers that read and answer."""


def prepare_reading(model: Any, answer: int) -> None:
    """Initialise the reading layers so that the model can answer with a letter.

    Three groups of channels hold a token's own word, a word to search for, and a letter. The first reading layer writes
    an option's letter next to its words (two and three tokens back). The second-to-last layer fetches the words before
    the instruction, `answer` tokens back. The last layer finds the option with these words and predicts its letter. In
    training, the model then learns to find answers elsewhere: further back in the text, and in images. The second
    reading layer starts with queries equal to keys, and every output matrix undoes its value matrix, as in mimetic
    initialization (Trockman and Kolter, arXiv 2305.09828). The other heads attend equally to all tokens.
    """
    language = model.model.language_model
    rotary, embeddings, layers = language.rotary_emb, language.embed_tokens.weight, language.layers[READING]
    size, width = embeddings.shape[1], layers[0].self_attn.head_dim
    with torch.no_grad():
        word, target, letter = torch.nn.init.orthogonal_(torch.empty(size, size))[: 3 * width].split(width)
        for channels in (target, letter):
            embeddings -= 0.8 * embeddings @ channels.T @ channels
        for number, layer in enumerate(layers):
            _init_mimetic(layer.self_attn, equal_queries=number == 1)
        first, fetch, match = layers[0].self_attn, layers[-2].self_attn, layers[-1].self_attn
        for attention, source in ((first, word), (fetch, word), (match, letter)):
            _heads(attention.v_proj.weight, width)[0] = source
        _attend_back(first, rotary.inv_freq, (2, 3, 1, 1))
        _write_to(first, 0, letter)
        _write_to(first, 1, 0.5 * letter)
        _attend_back(fetch, rotary.inv_freq, (answer, answer + 1))
        for head in range(2):
            _write_to(fetch, head, target)
            _write_to(match, head, word)
        # Match only in slowly rotating channels, so that the distance does not matter.
        slow = (rotary.inv_freq < 0.02).repeat(2)
        keys, queries = _heads(match.k_proj.weight, width), _heads(match.q_proj.weight, width)
        keys[0], queries[:2] = 0, 0
        keys[0, slow] = 1.5 * word[: int(slow.sum())]
        queries[:2, slow] = 1.5 * target[: int(slow.sum())]


def prepare_comparison(model: Any, tokenizer: Any) -> None:
    """Initialise two heads of the comparing layer to compare images, and the other two to encode positions.

    The first two attend to the token at the same position in the previous image. The grids of two images of 6 x 6
    tokens are 8 positions apart in time, height and width. The image takes 6, and the two special tokens between them
    take one each. What these heads write starts small.
    """
    language = model.model.language_model
    layer, frequencies = language.layers[COMPARING], language.rotary_emb.inv_freq
    attention, half = layer.self_attn, len(frequencies)
    rotating = torch.where(torch.arange(half) < 6, 1.0, 0.0)
    with torch.no_grad():
        reset_layer(layer)
        keys, queries = attention.k_proj.bias.view(-1, 2, half), attention.q_proj.bias.view(-1, 2, half)
        _heads(attention.k_proj.weight, 2 * half)[1] = 0
        _heads(attention.q_proj.weight, 2 * half)[2:] = 0
        keys[1, 0] = 20.0 * rotating
        for head, sharpness in ((2, 20.0), (3, 5.0)):
            queries[head, 0] = sharpness * rotating * torch.cos(8 * frequencies)
            queries[head, 1] = -sharpness * rotating * torch.sin(8 * frequencies)
        output = attention.o_proj.weight
        output[:, output.shape[1] // 2 :].normal_(std=0.005)
        layer.mlp.down_proj.weight.normal_(std=0.01)
        _prepare_positions(language, tokenizer)


def _prepare_positions(language: Any, tokenizer: Any) -> None:
    """Initialise two heads of the comparing layer to write each image token's row and column.

    The tower knows only relative positions, so image tokens do not know their own. Each head divides its attention
    between the start of the token's image and the starts of turns. The logit of the image's start falls with the
    distance in height (first head) or width (second head). It is far lower if the token belongs to another image or to
    text further on. The logit of a turn's start is constant, and its value is zero. Rows of text have no images, so
    they do not change.
    """
    attention, frequencies = language.layers[COMPARING].self_attn, language.rotary_emb.inv_freq
    half = len(frequencies)
    width, slowest = 2 * half, half - 1  # the slowest channel hardly rotates, so the distance does not matter
    starts = language.embed_tokens.weight[tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|im_start|>"])]
    starts = starts / starts.square().mean(1, keepdim=True).sqrt()  # as the norm before the attention leaves them
    image, turn = torch.linalg.pinv(starts).T  # the product with one of the two starts is 1, with the other 0
    keys, values = _heads(attention.k_proj.weight, width)[0], _heads(attention.v_proj.weight, width)[0]
    queries, unit = attention.q_proj.bias.view(-1, 2, half), width**0.5 / 5  # `unit` times a key of 5 is a logit of 1
    near, strength, turns = [4, 5, 6], 8.0, 2  # two turns start before the images
    middle = 3.5  # tokens from an image's start to the middle of its rows and columns
    keys.zero_()
    keys[[0, 1, 2, *near]] = 5 * image
    keys[slowest] = 5 * turn
    values -= values @ starts[1, :, None] @ turn[None]
    _heads(attention.q_proj.weight, width)[:2] = 0
    for head, axis, slope in ((0, 1, 2.5), (1, 2, 4.5)):
        # Tokens of an image are one token from its start in time, and few in width.
        for channels, distance in (([0], 1.0), (near, middle)):
            queries[head, 0, channels] = strength * unit * torch.cos(distance * frequencies[channels])
            queries[head, 1, channels] = -strength * unit * torch.sin(distance * frequencies[channels])
        queries[head, 0, axis] = slope * unit * torch.sin(middle * frequencies[axis])
        queries[head, 1, axis] = slope * unit * torch.cos(middle * frequencies[axis])
        queries[head, 0, slowest] = unit * (strength * (1 + len(near)) - math.log(turns))
    attention.o_proj.weight[:, : 2 * width].normal_(std=0.03)


def prepare_bringing(model: Any, found: Any) -> None:
    """Initialise two heads of the bringing layer to attend to the image tokens that show a defect.

    `found` (hidden,) is the direction in which the comparing layer encodes that a token shows a defect.
    """
    language = model.model.language_model
    layer = language.layers[BRINGING]
    attention, width = layer.self_attn, layer.self_attn.head_dim
    slowest = width // 2 - 1  # this channel hardly rotates, so the distance does not matter
    with torch.no_grad():
        reset_layer(layer)
        keys, queries = _heads(attention.k_proj.weight, width), _heads(attention.q_proj.weight, width)
        keys[0], queries[:2] = 0, 0
        keys[0, slowest] = (found - found.mean()) / layer.input_layernorm.weight
        for head, sharpness in enumerate((1.2, 0.5)):
            attention.q_proj.bias.view(-1, width)[head, slowest] = sharpness * width**0.5
        values = _heads(attention.v_proj.weight, width)[0]
        for head in range(2):
            _write_to(attention, head, 0.07 * values)
        layer.mlp.down_proj.weight.normal_(std=0.01)


def reset_layer(layer: Any) -> None:
    """Initialise a layer so that it has no effect yet."""
    with torch.no_grad():
        for matrix in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
            matrix.weight.normal_(std=0.09)
        torch.nn.init.orthogonal_(layer.self_attn.v_proj.weight)
        for matrix in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            matrix.bias.zero_()
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def _heads(matrix: Any, width: int) -> Any:
    """Return a view of a projection's rows (heads x width, hidden) as (heads, width, hidden)."""
    return matrix.view(-1, width, matrix.shape[1])


def _init_mimetic(attention: Any, equal_queries: bool) -> None:
    """Initialise keys and values as orthogonal matrices, and the output as the transpose of the values."""
    width, group = attention.head_dim, attention.num_key_value_groups
    torch.nn.init.orthogonal_(attention.k_proj.weight)
    torch.nn.init.orthogonal_(attention.v_proj.weight)
    if equal_queries:
        keys = _heads(attention.k_proj.weight, width).repeat_interleave(group, dim=0)
        _heads(attention.q_proj.weight, width).add_(keys)
    values = _heads(attention.v_proj.weight, width).repeat_interleave(group, dim=0)
    attention.o_proj.weight.copy_(0.5 * values.flatten(0, 1).T)


def _attend_back(attention: Any, frequencies: Any, distances: tuple[int, ...]) -> None:
    """Make each head attend to the token at its distance, by position only."""
    half = len(frequencies)
    rotating = frequencies > 0.1
    keys, queries = attention.k_proj.bias.view(-1, 2, half), attention.q_proj.bias.view(-1, 2, half)
    keys[:, 0] = 6.0 * rotating
    for head, distance in enumerate(distances):
        queries[head, 0] = 6.0 * rotating * torch.cos(distance * frequencies)
        queries[head, 1] = -6.0 * rotating * torch.sin(distance * frequencies)
        _heads(attention.q_proj.weight, 2 * half)[head] = 0


def _write_to(attention: Any, head: int, channels: Any) -> None:
    """Make a head write its output (width) to `channels` (width, hidden)."""
    output = attention.o_proj.weight
    output.view(output.shape[0], -1, channels.shape[0])[:, head] = channels.T
