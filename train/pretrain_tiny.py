"""Pretrain echo-tiny from nothing on drawn parts: `python -m train.pretrain_tiny --output DIR [--minutes 25]`.

echo-tiny is a Qwen2-VL of a few million parameters with Qwen2-VL's own classes, special tokens and chat template. It
learns from rows that ask several things about the same photographs (train.tiny_lessons), laid out so that the
photographs are computed once a row; the loss is on completions alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from echo_ft.config import parse, run_main
from echo_ft.records import EchoError
from train.tiny_lessons import PHRASES, WORDS, Lesson, Row, row, text_row

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
FIRST_TRAINED = 10**7
"""Rows below this number are never trained on."""
EVERY = 25
"""Steps between two lines of progress."""
CAPTION = re.compile(r"At the (?P<place>.+) there is a (?P<extent>\w+) (?P<mark>.+)\. It is a defect, a (?P<defect>.+)\.")
OPTION = re.compile(r"^[A-D]\. ", re.MULTILINE)
MERGE = 28
"""Pixels of one image token's side: patches of 14, merged 2 x 2."""

OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
TURN = "<|im_end|>\n<|im_start|>assistant\n"
CLOSING = "<|im_end|>\n"


@dataclass(frozen=True)
class PretrainConfig:
    """Options of the pretraining."""

    output: str = field(metadata={"help": "folder to write the model to"})
    minutes: float = field(default=25.0, metadata={"help": "how long to train; ignored where --steps is given"})
    steps: int = field(default=0, metadata={"help": "how many steps to train instead"})
    batch: int = field(default=16, metadata={"help": "rows a step"})
    reading: float = field(default=0.3, metadata={"help": "share of the training on text alone, at the beginning"})
    lr: float = field(default=2e-3, metadata={"help": "peak learning rate"})
    seed: int = field(default=0, metadata={"help": "seed of weights and lessons"})
    held_out: int = field(default=256, metadata={"help": "rows kept for the final measurement"})


def build_tokenizer(rows: Iterable[Row]) -> Any:
    """Byte-level BPE with Qwen2's pre-tokenizer and special tokens, trained on lessons, words and phrases."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    from echo_ft import roles

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
    import json

    model = json.loads(bare.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
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
            # words over any distance, must stay.
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 11]},
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
    _prepare_attention(model)
    return model


def _prepare_attention(model: Any) -> None:
    """Start attention as matching and copying, which random weights take most of a short training to find.

    Output projections undo value projections and, after the first layer, queries equal keys, as in mimetic initialization
    (Trockman and Kolter, arXiv 2305.09828); three heads of the first layer attend one, two and three tokens back.
    """
    import torch

    rotary = model.model.language_model.rotary_emb
    fast, strength = rotary.inv_freq > 0.1, 4.5
    with torch.no_grad():
        # Embeddings are also the output matrix: with smaller ones, a copied token could hardly raise its own logit.
        torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.15)
        layers = model.model.language_model.layers
        for layer in layers:
            attention = layer.self_attn
            heads, width = attention.num_heads, attention.head_dim
            group = attention.num_key_value_groups
            torch.nn.init.orthogonal_(attention.k_proj.weight)
            torch.nn.init.orthogonal_(attention.v_proj.weight)
            keys = attention.k_proj.weight.view(-1, width, attention.hidden_size)
            values = attention.v_proj.weight.view(-1, width, attention.hidden_size)
            queries = attention.q_proj.weight.view(heads, width, attention.hidden_size)
            if layer is not layers[0]:
                queries += keys.repeat_interleave(group, dim=0)
            attention.o_proj.weight.copy_(0.3 * values.repeat_interleave(group, dim=0).flatten(0, 1).T)
        first = layers[0].self_attn
        half = first.head_dim // 2
        keys, queries = first.k_proj.bias.view(-1, 2, half), first.q_proj.bias.view(-1, 2, half)
        keys[:, 0] = strength * fast
        for head, back in enumerate((1, 2, 3)):
            queries[head, 0] = strength * fast * torch.cos(back * rotary.inv_freq)
            queries[head, 1] = -strength * fast * torch.sin(back * rotary.inv_freq)


@dataclass
class Layout:
    """A row as token ids (length L): one prefix, then its branches, which do not see each other."""

    ids: np.ndarray
    """(L,)"""
    positions: np.ndarray
    """(3, L): M-RoPE's time, height and width; every branch starts after the prefix."""
    branch: np.ndarray
    """(L,): 0 in the prefix, then the branch's number."""
    trained: np.ndarray
    """(L,): true where the token is to be predicted."""


def lay_out(r: Row, tokenizer: Any) -> Layout:
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
        trained.append(np.repeat([False, True], [len(asked), len(said)]))
    return Layout(*(np.concatenate(parts, axis=-1) for parts in (ids, places, branch, trained)))


def collate(rows: list[Row], tokenizer: Any) -> dict[str, Any]:
    """Rows as tensors, padded to the longest: ids (B, L), positions (3, B, L), attention (B, 1, L, L), labels (B, L)."""
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


def lesson_batches(config: PretrainConfig, tokenizer: Any, reading: Any) -> Iterator[dict[str, Any]]:
    """Endless batches, drawn by a process of its own; rows of text alone while the shared flag `reading` is set."""
    from torch.utils.data import DataLoader, IterableDataset

    class Lessons(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for step in itertools.count():
                make = text_row if reading.value else row
                first = FIRST_TRAINED + config.seed * 10**9 + step * config.batch
                yield collate([make(first + index) for index in range(config.batch)], tokenizer)

    return iter(DataLoader(Lessons(), batch_size=None, num_workers=1, prefetch_factor=4))


def pretrain(model: Any, tokenizer: Any, config: PretrainConfig) -> int:
    """AdamW with warm-up and cosine decay over --steps or --minutes; returns the number of steps.

    The first part, --reading of the whole, is text alone: without it, matching an answer with its letter, which needs
    no photograph, is not found in the time of the whole.
    """
    import torch
    from torch.nn.functional import cross_entropy

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))
    letters = torch.tensor(tokenizer.convert_tokens_to_ids(list("ABCD")))
    reading = torch.multiprocessing.Value("b", 1)
    model.train()
    start, loss_sum, hits, asked = time.monotonic(), 0.0, 0, 0
    for step, batch in enumerate(lesson_batches(config, tokenizer, reading), start=1):
        minutes = (time.monotonic() - start) / 60
        done = (step - 1) / config.steps if config.steps else minutes / config.minutes
        if done >= 1:
            break
        reading.value = done < config.reading
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, step / 100) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))
        logits, labels = answer_logits(model, batch)
        loss = cross_entropy(logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        chosen = torch.isin(labels, letters)
        loss_sum += loss.item()
        hits += int((logits.argmax(-1) == labels)[chosen].sum())
        asked += int(chosen.sum())
        if step % EVERY == 0:
            kind = "text " if reading.value else "mixed"
            figures = f"loss {loss_sum / EVERY:.3f}  letters {hits / max(asked, 1):.3f}"
            print(f"step {step:5d}  {minutes:5.1f} min  {kind}  {figures}", flush=True)
            loss_sum, hits, asked = 0.0, 0, 0
    return step - 1


def measure(model: Any, tokenizer: Any, rows: list[Row]) -> dict[str, tuple[int, float, float]]:
    """Held-out figures: {what: (count, percent right, percent by chance)}.

    Letters are right where the likeliest of all tokens is the letter. Captions are said freely from the photographs,
    and their parts counted one by one; chance is then not defined, and given as 0.
    """
    import torch

    counts: dict[str, list[float]] = {}

    def count(what: str, right: bool, chance: float = 0.0) -> None:
        total = counts.setdefault(what, [0, 0, 0])
        total[0] += 1
        total[1] += right
        total[2] += chance

    model.eval()
    for r in rows:
        for lesson in r.branches:
            compared = lesson.skill == "caption" and len(r.photos) > 1
            if not lesson.letter and not compared:
                continue
            said = say(model, tokenizer, r, lesson, 2 if lesson.letter else 40)
            if lesson.letter:
                count(f"letter, {lesson.skill}", said == lesson.completion, 1 / len(OPTION.findall(lesson.prompt)))
            elif found := CAPTION.fullmatch(lesson.completion):
                match = CAPTION.fullmatch(said)
                count("caption, a defect is seen", match is not None)
                for part in ("place", "extent", "mark", "defect"):
                    count(f"caption, {part}", match is not None and match[part] == found[part])
            elif lesson.completion.startswith("Nothing"):
                count("caption, no defect is seen where there is none", said == lesson.completion)
    model.train()
    return {what: (int(n), 100 * right / n, 100 * chance / n) for what, (n, right, chance) in sorted(counts.items())}


def say(model: Any, tokenizer: Any, r: Row, lesson: Lesson, most: int) -> str:
    """What the model says to one lesson of a row, greedily, at most `most` tokens."""
    import torch

    asked = dataclasses.replace(r, branches=(lesson._replace(completion=""),))
    layout = lay_out(asked, tokenizer)
    keep = ~layout.trained  # the closing of the empty completion
    ids = torch.from_numpy(layout.ids[keep])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if r.photos:
        image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        inputs["mm_token_type_ids"] = (ids == image).int()
        inputs["pixel_values"], inputs["image_grid_thw"] = patches([torch.from_numpy(photo) for photo in r.photos])
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=most)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
