"""Load exported rows with LLaMA-Factory or ms-swift on a CPU, each in its own environment.

`PYTHON -m tests.support.other_trainers NAME MODEL PATH...` prints one line of JSON. It has one list per file, with the
token ids, the labels and the sum of the pixels of each row. PYTHON is the interpreter of the tool's environment.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any


def llamafactory(model: str, path: Path) -> list[dict[str, Any]]:
    """Load a dataset named in dataset_info.json with the loader and collator of SFT; `path` is its folder and name."""
    # LLaMA-Factory (0.9.5) imports torchaudio (2.11), which rejects a torch built for another CUDA version.
    sys.modules["torchaudio"] = importlib.util.module_from_spec(ModuleSpec("torchaudio", None))
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    with tempfile.TemporaryDirectory() as out:
        options = {
            "stage": "sft", "do_train": True, "model_name_or_path": model, "finetuning_type": "lora", "use_cpu": True,
            "template": "qwen2_vl", "dataset_dir": str(path.parent), "dataset": path.name, "output_dir": out,
            "disable_shuffling": True, "report_to": "none", "overwrite_cache": True,
        }  # fmt: skip
        model_args, data_args, training_args, _, _ = get_train_args(options)
        loaded = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(loaded["tokenizer"], data_args)
        rows = get_dataset(template, model_args, data_args, training_args, stage="sft", **loaded)["train_dataset"]
        collator = SFTDataCollatorWith4DAttentionMask(template=template, label_pad_token_id=-100, **loaded)
        return [collator([row]) for row in rows]


def ms_swift(model: str, path: Path) -> list[dict[str, Any]]:
    """Load a JSON-lines file with the loader and template of `swift sft`, whose collator would need a model."""
    from swift.dataset import load_dataset
    from swift.model import get_processor
    from swift.template import get_template
    from swift.template.templates.qwen import Qwen2VLTemplate

    # ms-swift (4.6) knows only Qwen's own image token id; with another one it silently drops the images.
    Qwen2VLTemplate.image_token_id = json.loads((Path(model) / "config.json").read_text())["image_token_id"]
    processor = get_processor(model, model_type="qwen2_vl")
    template = get_template(processor, template_type="qwen2_vl", max_length=None)
    template.set_mode("train")
    rows, _ = load_dataset(str(path), shuffle=False)
    return [template.encode(row) for row in rows]


def summarize(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a row that the test compares, from lists or tensors."""
    import torch

    lists = {key: torch.as_tensor(batch[key]).flatten().tolist() for key in ("input_ids", "labels", "image_grid_thw")}
    return lists | {"pixels": batch["pixel_values"].double().sum().item()}


if __name__ == "__main__":
    name, given, *files = sys.argv[1:]
    load = {"llamafactory": llamafactory, "ms_swift": ms_swift}[name]
    print(json.dumps([[summarize(batch) for batch in load(given, Path(file))] for file in files]))
