"""Run LLaMA-Factory or ms-swift on the same rows, with its own training function and in its own environment.

`PYTHON -m benchmarks.training.other_trainers NAME FOLDER WORKLOAD computed`, with the interpreter of that environment.

The options make the work equal (LoRA, precision, order of rows, optimizer, pixel budget) or are needed on a CPU. All
other options keep their defaults.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.measurement import Steps, main
from benchmarks.training.workload import Workload, make_exchanges, rows_for
from echo_ft.data.export_rows import SHAREGPT, message_rows


def write_rows(folder: Path, workload: Workload) -> Path:
    """Write the questions as JSON lines, one row each, next to their images; returns the path of the rows."""
    path = folder / f"rows_{workload.questions}.jsonl"
    lines = (json.dumps(row) + "\n" for row in rows_for(make_exchanges(folder, workload), folder, message_rows))
    path.write_text("".join(lines))
    return path


def copy_with_budget(folder: Path, workload: Workload) -> Path:
    """Copy the model, set the pixel budget of its processor to the workload's, and return the copy's folder.

    LLaMA-Factory uses the pixel budget of the model's processor.
    """
    copy = Path(tempfile.mkdtemp(dir=folder))
    for file in Path(workload.model).resolve().iterdir():
        if file.suffix == ".safetensors":
            (copy / file.name).symlink_to(file)
        else:
            shutil.copy(file, copy)
    path = copy / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["size"] = {"shortest_edge": workload.pixels, "longest_edge": workload.pixels}
    path.write_text(json.dumps(config))
    return copy


def common(folder: Path, workload: Workload) -> dict[str, Any]:
    """Return the options that have the same name in both trainers."""
    return {
        "template": "qwen2_vl", "lora_rank": 8, "lora_alpha": 16, "learning_rate": 1e-4, "seed": 0,
        "use_cpu": not torch.cuda.is_available(), "bf16": torch.cuda.is_available(), "lr_scheduler_type": "constant",
        "per_device_train_batch_size": workload.rows, "gradient_accumulation_steps": 1, "max_steps": workload.steps,
        "dataloader_num_workers": workload.workers, "logging_steps": 1, "report_to": "none", "save_strategy": "no",
        "output_dir": tempfile.mkdtemp(dir=folder),
    }  # fmt: skip


def llama_factory(folder: Path, workload: Workload, stored: bool) -> Steps:
    """Run LLaMA-Factory's `run_exp`, which `llamafactory-cli train` calls."""
    # LLaMA-Factory (0.9.5) imports torchaudio (2.11), which rejects a torch built for another CUDA version. This
    # benchmark uses no audio, so an empty module replaces it.
    sys.modules["torchaudio"] = importlib.util.module_from_spec(ModuleSpec("torchaudio", None))
    from llamafactory.train.tuner import run_exp

    described = {"file_name": write_rows(folder, workload).name, **SHAREGPT}
    (folder / "dataset_info.json").write_text(json.dumps({"cases": described}))
    steps = Steps()
    options = common(folder, workload) | {
        "stage": "sft", "do_train": True, "model_name_or_path": str(copy_with_budget(folder, workload)),
        "flash_attn": "sdpa", "finetuning_type": "lora", "lora_target": "all", "dataset_dir": str(folder),
        "dataset": "cases", "disable_shuffling": True, "image_max_pixels": workload.pixels,
        "disable_gradient_checkpointing": True, "dataloader_persistent_workers": workload.workers > 0,
    }  # fmt: skip
    run_exp(options, callbacks=[steps])
    return steps


def ms_swift(folder: Path, workload: Workload, stored: bool) -> Steps:
    """Run ms-swift's `sft_main`, which `swift sft` calls."""
    from swift.callbacks import callbacks_map
    from swift.pipelines import sft_main
    from swift.template.templates.qwen import Qwen2VLTemplate

    # ms-swift (4.6) expects Qwen's own image token id and silently drops the images of a model with another one.
    Qwen2VLTemplate.image_token_id = json.loads((Path(workload.model) / "config.json").read_text())["image_token_id"]
    steps = Steps()
    callbacks_map["steps"] = lambda args, trainer: steps
    options = common(folder, workload) | {
        "model": copy_with_budget(folder, workload), "model_type": "qwen2_vl", "attn_impl": "sdpa",
        "torch_dtype": "bfloat16" if torch.cuda.is_available() else "float32",
        "tuner_type": "lora", "target_modules": "all-linear", "lora_dropout": 0, "weight_decay": 0, "adam_beta2": 0.999,
        "dataset": write_rows(folder, workload), "dataset_shuffle": False, "train_dataloader_shuffle": False,
        "max_pixels": workload.pixels, "check_model": False, "gradient_checkpointing": False, "callbacks": "steps",
    }  # fmt: skip
    sft_main([argument for name, value in options.items() for argument in (f"--{name}", str(value))])
    return steps


if __name__ == "__main__":
    main({"llamafactory": llama_factory, "ms-swift": ms_swift}, *sys.argv[1:])
