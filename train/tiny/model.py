"""echo-tiny: its tokenizer, processor and model, built from Qwen2-VL's own classes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from echo_ft.experts import roles
from train.tiny.attention import READING, prepare_reading, reset_layer
from train.tiny.inputs import ASSISTANT_OPENING
from train.tiny.lessons import INSTRUCTION, LessonRow
from train.tiny.shifts import prepare_shifts
from train.tiny.words import PHRASES, WORDS

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
"""The published chat template of Qwen2-VL."""

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
"""The special tokens of Qwen2-VL, in the order of their ids."""

VOCABULARY_SIZE = 3072

PATCH_SIZE, MERGE_SIZE = 7, 4
"""A token has 28 x 28 pixels, as in Qwen2-VL, but 4 x 4 patches, so it learns small patterns at 16 positions."""


def build_tokenizer(rows: Iterable[LessonRow]) -> Any:
    """Train a byte-level BPE tokenizer with Qwen2's pre-tokenizer and special tokens on lessons, words and phrases."""
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    prompts = [value for name, value in vars(roles).items() if name.isupper() and isinstance(value, str)]
    capitals = [word.capitalize() for word in WORDS]
    texts = [f"{row.context}{lesson.prompt}\n{lesson.completion}" for row in rows for lesson in row.branches]
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
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(texts, trainer)
    model = json.loads(bare.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],  # type: ignore[misc]  # transformers annotates pairs as strings
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,  # type: ignore[arg-type]  # as in Qwen2
        model_max_length=4096,
    )
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL_TOKENS)})
    return tokenizer


def build_processor(tokenizer: Any) -> Any:
    """Return Qwen2-VL's processor. By default, an image becomes at most 36 image tokens, as in pretraining."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 112 * 112, "longest_edge": 168 * 168}
    patches: dict[str, Any] = {"size": size, "patch_size": PATCH_SIZE, "merge_size": MERGE_SIZE}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**patches),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Any) -> Any:
    """Return a small Qwen2-VL with float32 weights, random except for the prepared embeddings and attention."""
    from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    token = tokenizer.convert_tokens_to_ids
    width = 128
    config = Qwen2VLConfig(
        text_config={
            "dtype": "float32",
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": width,
            "intermediate_size": 384,
            "num_hidden_layers": READING.stop,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.05,
            # Qwen2-VL assigns its highest frequencies to time and its lowest to width. With its theta and sections,
            # heads of 32 channels could not distinguish adjacent columns in a grid of 6. The slowest channels must be
            # kept, because they match words at any distance.
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [1, 1, 14]},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
        vision_config={
            "dtype": "float32",
            "depth": 4,
            "embed_dim": 64,
            "num_heads": 4,
            "hidden_size": width,
            "mlp_ratio": 4,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
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
    prepare_shifts(model.model.visual)
    for layer in model.model.language_model.layers[: READING.start]:
        reset_layer(layer)
    _prepare_embeddings(model, tokenizer)
    # This is the distance from the predicted letter back to the last word before the instruction.
    prepare_reading(model, len(tokenizer(f".\n{INSTRUCTION}{ASSISTANT_OPENING}")["input_ids"]))
    return model


def _prepare_embeddings(model: Any, tokenizer: Any) -> None:
    """Initialise all spellings of a word (upper or lower case, with or without a leading space) close to each other.

    The embeddings also serve as the output matrix. If they were smaller, a copied token could hardly raise its own
    logit.
    """
    import torch

    embeddings = model.model.language_model.embed_tokens.weight
    words = [tokenizer.decode([token]).strip().lower() for token in range(len(embeddings))]
    first = torch.tensor([words.index(word) for word in words])
    with torch.no_grad():
        own, shared = torch.randn_like(embeddings), torch.randn_like(embeddings)[first]
        embeddings.copy_(0.15 * (0.6 * own + 0.8 * shared))


def save_model(model: Any, processor: Any, folder: Path) -> None:
    """Save the model and its processor. Also round the weights of `model` to bfloat16.

    bfloat16 halves the size of the file. The weights load as float32, which CPUs compute in.
    """
    import torch

    processor.save_pretrained(folder)
    halves = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=halves)  # the embeddings serve as the output matrix
    model.load_state_dict(halves, strict=False)  # later measurements use the saved weights
