"""Save a Qwen2-VL in the form of the published checkpoints, which transformers 4, transformers 5 and vLLM read.

transformers 5 (5.23) moves the language model's settings to `text_config`, renames the rotary embedding and the special
tokens, and writes no preprocessor_config.json. From those files, transformers 4 (4.57) would silently use a default
rotary embedding, and would fail to load the tokenizer and the image processor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from echo_ft.files import write_json
from echo_ft.inputs import read_json_object


def save_model(model: Any, folder: Path) -> None:
    """Save a Qwen2-VL with the weight names and the config of the published checkpoints.

    The config says that the output layer shares the input embedding only if it really does. If an adapter has trained
    the output layer, PEFT (0.21) marks the model as untied only in the outer config.
    """
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied
    model.save_pretrained(folder)
    saved = read_json_object(folder / "config.json")
    write_json(folder / "config.json", publish_config(saved))


def publish_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a Qwen2-VL config as saved by transformers 5 in the published form."""
    outer = {key: value for key, value in config.items() if key not in ("text_config", "dtype")}
    text = {key: value for key, value in config["text_config"].items() if key not in ("rope_parameters", "dtype")}
    rope = dict(config["text_config"]["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    rope["type"] = "mrope" if kind == "default" else kind
    return {**text, **outer, "rope_scaling": rope, "rope_theta": theta, "torch_dtype": config["dtype"]}


def save_processor(processor: Any, folder: Path) -> None:
    """Save a processor with the preprocessor_config.json and the token names of the published checkpoints."""
    processor.save_pretrained(folder)
    tokenizer = read_json_object(folder / "tokenizer_config.json")
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
        write_json(folder / "tokenizer_config.json", tokenizer)
    saved = read_json_object(folder / "processor_config.json")["image_processor"]
    size = saved["size"]
    # Before 4.49, transformers read only these two keys.
    budget = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    write_json(folder / "preprocessor_config.json", {**saved, **budget, "processor_class": "Qwen2VLProcessor"})
