"""echo-tiny itself: tokenizer, processor and model of Qwen2-VL's own classes, and rows of lessons as its inputs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from echo_ft.experts import roles
from train.tiny.lessons import INSTRUCTION, PHRASES, WORDS, Row

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2-VL's published chat template."""

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
"""Qwen2-VL's special tokens, in the order of their ids."""

VOCABULARY = 3072
MERGE = 28
"""Pixels of one image token's side: patches of 14, merged 2 x 2."""

OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
TURN = "<|im_end|>\n<|im_start|>assistant\n"
CLOSING = "<|im_end|>\n"


def build_tokenizer(rows: Iterable[Row]) -> Any:
    """Byte-level BPE with Qwen2's pre-tokenizer and special tokens, trained on lessons, words and phrases."""
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    prompts = [value for value in vars(roles).values() if isinstance(value, str)]
    capitals = [word.capitalize() for word in WORDS]
    texts = [f"{r.context}{lesson.prompt}\n{lesson.completion}" for r in rows for lesson in r.branches]
    texts += 200 * [*PHRASES, *prompts, " ".join(["", *WORDS, *capitals]), "\n".join([*capitals, *WORDS])]
    bare = Tokenizer(models.BPE())
    bare.normalizer = normalizers.NFC()
    bare.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(texts, trainer)
    model = json.loads(bare.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],  # type: ignore[misc]  # pairs, though annotated as strings
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,  # type: ignore[arg-type]  # Qwen2's has none either
        model_max_length=4096,
    )
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL_TOKENS)})
    return tokenizer


def build_processor(tokenizer: Any) -> Any:
    """Qwen2-VL's processor; by default a photograph becomes at most 36 image tokens, as in pretraining."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 112 * 112, "longest_edge": 168 * 168}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Any) -> Any:
    """Qwen2-VL, small, with random float32 weights."""
    from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    token = tokenizer.convert_tokens_to_ids
    width = 128
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": width,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.05,
            # Qwen2-VL gives its highest frequencies to time and its lowest to width. With its theta and sections, heads
            # of 32 channels could not tell one column of a grid of 6 from the next; the slowest channels, which match
            # words at any distance, must stay.
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [1, 1, 14]},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 3,
            "embed_dim": 128,
            "num_heads": 4,
            "hidden_size": width,
            "mlp_ratio": 4,
            "initializer_range": 0.05,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        dtype="float32",
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=[token("<|im_end|>"), token("<|endoftext|>")],
        pad_token_id=token("<|endoftext|>"),
        do_sample=False,
    )
    _prepare_embeddings(model, tokenizer)
    # From where the letter is said, so many tokens back to the last word before the instruction.
    _prepare_attention(model, len(tokenizer(f".\n{INSTRUCTION}{TURN}")["input_ids"]))
    return model


def _prepare_embeddings(model: Any, tokenizer: Any) -> None:
    """Start a word's tokens, in upper and lower case, with and without a space before them, near each other.

    Embeddings are also the output matrix: with smaller ones, a copied token could hardly raise its own logit.
    """
    import torch

    embeddings = model.model.language_model.embed_tokens.weight
    words = [tokenizer.decode([token]).strip().lower() for token in range(len(embeddings))]
    first = torch.tensor([words.index(word) for word in words])
    with torch.no_grad():
        apart, shared = torch.randn_like(embeddings), torch.randn_like(embeddings)[first]
        embeddings.copy_(0.15 * (0.6 * apart + 0.8 * shared))


def _prepare_attention(model: Any, answer: int) -> None:
    """Start attention as what answering by letter takes, which random weights do not find in a training this short.

    Of the channels, a third each hold a token's own word, a word that was looked for and a letter. The first layer
    writes an option's letter beside its words (two and three tokens back); the last but one fetches, `answer` tokens
    back, the words stated before the instruction; the last finds the option with these words and says its letter.
    From there on it is training that finds answers elsewhere: in text further away, and in photographs. The second
    layer starts with queries equal to keys, and all outputs undo values, as in mimetic initialization (Trockman and
    Kolter, arXiv 2305.09828); the other heads attend to everything alike, photographs too.
    """
    import torch

    language = model.model.language_model
    rotary, embeddings, layers = language.rotary_emb, language.embed_tokens.weight, language.layers
    size, width = embeddings.shape[1], layers[0].self_attn.head_dim
    half = width // 2
    turning, still = rotary.inv_freq > 0.1, rotary.inv_freq < 0.02

    def heads(matrix: Any) -> Any:
        return matrix.view(-1, width, size)

    def look_back(attention: Any, backs: tuple[int, ...]) -> None:
        keys, queries = attention.k_proj.bias.view(-1, 2, half), attention.q_proj.bias.view(-1, 2, half)
        keys[:, 0] = 6.0 * turning
        for head, back in enumerate(backs):
            queries[head, 0] = 6.0 * turning * torch.cos(back * rotary.inv_freq)
            queries[head, 1] = -6.0 * turning * torch.sin(back * rotary.inv_freq)
            heads(attention.q_proj.weight)[head] = 0  # by place alone

    def write(attention: Any, head: int, channels: Any) -> None:
        attention.o_proj.weight.view(size, -1, width)[:, head] = channels.T

    with torch.no_grad():
        word, looked_for, letter = torch.nn.init.orthogonal_(torch.empty(size, size))[: 3 * width].split(width)
        for channels in (looked_for, letter):
            embeddings -= 0.8 * embeddings @ channels.T @ channels
        for number, layer in enumerate(layers):
            attention = layer.self_attn
            group = attention.num_key_value_groups
            torch.nn.init.orthogonal_(attention.k_proj.weight)
            torch.nn.init.orthogonal_(attention.v_proj.weight)
            if number == 1:
                heads(attention.q_proj.weight).add_(heads(attention.k_proj.weight).repeat_interleave(group, dim=0))
            values = heads(attention.v_proj.weight).repeat_interleave(group, dim=0)
            attention.o_proj.weight.copy_(0.5 * values.flatten(0, 1).T)
        first, fetch, match = layers[0].self_attn, layers[-2].self_attn, layers[-1].self_attn
        for attention, source in ((first, word), (fetch, word), (match, letter)):
            heads(attention.v_proj.weight)[0] = source
        look_back(first, (2, 3, 1, 1))
        write(first, 0, letter)
        write(first, 1, 0.5 * letter)
        look_back(fetch, (answer, answer + 1))
        for head in range(2):
            write(fetch, head, looked_for)
            write(match, head, word)
        # Only channels that turn slowly match, for distance not to matter.
        slow = still.repeat(2)
        keys, queries = heads(match.k_proj.weight), heads(match.q_proj.weight)
        keys[0], queries[:2] = 0, 0
        keys[0, slow] = 1.5 * word[: int(slow.sum())]
        queries[:2, slow] = 1.5 * looked_for[: int(slow.sum())]


@dataclass
class TokenSpan:
    """A row as token ids (length L): one prefix, then its branches, which do not see each other."""

    ids: np.ndarray
    """(L,)"""
    positions: np.ndarray
    """(3, L): M-RoPE's time, height and width; every branch starts after the prefix."""
    branch: np.ndarray
    """(L,): 0 in the prefix, then the branch's number."""
    trained: np.ndarray
    """(L,): true where the token is to be predicted."""


def lay_out(r: Row, tokenizer: Any) -> TokenSpan:
    """The row through the chat template, the user's turn closed and answered once a branch."""
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids, places = [], []
    position = 0

    def add(new: list[int], start: int) -> None:
        ids.append(np.asarray(new))
        places.append(np.broadcast_to(start + np.arange(len(new)), (3, len(new))))

    text = OPENING
    for photo in r.photos:
        opening = encode(text + "<|vision_start|>")
        add(opening, position)
        position += len(opening)
        rows, columns = photo.shape[0] // MERGE, photo.shape[1] // MERGE
        ids.append(np.full(rows * columns, image))
        down, right = np.divmod(np.arange(rows * columns), columns)
        places.append(position + np.stack([np.zeros_like(down), down, right]))
        position += max(rows, columns)
        text = "<|vision_end|>"
    shared = encode(text + r.context)
    add(shared, position)
    position += len(shared)
    branch = [np.zeros(sum(map(len, ids)), np.int64)]
    trained = [np.zeros(len(branch[0]), bool)]
    for number, lesson in enumerate(r.branches, start=1):
        asked, said = encode(lesson.prompt + TURN), encode(lesson.completion + CLOSING)
        add(asked + said, position)
        branch.append(np.full(len(asked) + len(said), number))
        # Text is trained on as a whole: answers that repeat an option's words are what teaches to match and copy.
        # Not its first token: in a row, that follows another branch.
        trained.append(np.repeat([False, not r.photos, True], [1, len(asked) - 1, len(said)]))
    return TokenSpan(*(np.concatenate(parts, axis=-1) for parts in (ids, places, branch, trained)))


def collate(rows: list[Row], tokenizer: Any) -> dict[str, Any]:
    """Rows as tensors, padded to length L: ids and labels (B, L), positions (3, B, L), attention (B, 1, L, L)."""
    import torch

    layouts = [lay_out(r, tokenizer) for r in rows]
    length = max(len(layout.ids) for layout in layouts)
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), -100)
    positions = torch.zeros(3, len(rows), length, dtype=torch.long)
    branch = torch.full((len(rows), length), -1)
    for index, layout in enumerate(layouts):
        end = len(layout.ids)
        ids[index, :end] = torch.from_numpy(layout.ids)
        labels[index, :end] = torch.from_numpy(np.where(layout.trained, layout.ids, -100))
        positions[:, index, :end] = torch.from_numpy(layout.positions)
        branch[index, :end] = torch.from_numpy(layout.branch)
    same = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
    photos = [torch.from_numpy(photo) for r in rows for photo in r.photos]
    return {"ids": ids, "labels": labels, "positions": positions, "attention": same.tril()[:, None], "photos": photos}


def patches(photos: list[Any]) -> tuple[Any, Any]:
    """What Qwen2-VL's image processor makes of photographs (height, width, 3) whose sides are multiples of 28.

    Returns pixel values (patches, 1176) and grids (photographs, 3), without the processor's resizing, for speed.
    """
    import torch
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, deviation = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    values, grids = [], []
    for photo in photos:
        rows, columns = photo.shape[0] // 14, photo.shape[1] // 14
        pixels = (photo.float() / 255 - mean) / deviation
        blocks = pixels.view(rows // 2, 2, 14, columns // 2, 2, 14, 3).permute(0, 3, 1, 4, 6, 2, 5)
        values.append(blocks.unsqueeze(5).expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(rows * columns, -1))
        grids.append([1, rows, columns])
    return torch.cat(values), torch.tensor(grids)


def answer_logits(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Logits (N, vocabulary) at the N trained tokens of a batch, and these tokens (N,)."""
    vision = {}
    if batch["photos"]:
        vision["pixel_values"], vision["image_grid_thw"] = patches(batch["photos"])
    hidden = model.model(
        input_ids=batch["ids"],
        attention_mask=batch["attention"],
        position_ids=batch["positions"],
        use_cache=False,
        **vision,
    ).last_hidden_state
    labels = batch["labels"][:, 1:]
    return model.lm_head(hidden[:, :-1][labels != -100]), labels[labels != -100]


def save(model: Any, processor: Any, folder: Path) -> None:
    """Weights rounded to bfloat16 to halve the file; they load as float32, in which a CPU computes."""
    import torch

    processor.save_pretrained(folder)
    halves = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=halves)  # without the output matrix, which is the embeddings
    model.load_state_dict(halves, strict=False)  # what is measured after this is what was saved
