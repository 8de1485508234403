"""How vLLM serves the parts of a bundle: the command, and the adapters that vLLM refuses."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from echo_ft.inputs import read_json_object
from echo_ft.model.adapters import AdapterCard

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM (0.32) accepts for --max-lora-rank."""

VLLM_INITIALIZATIONS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Named initializations of an adapter that vLLM (0.32) accepts, because they leave the base model unchanged."""

VLLM_MERGE_SIZE = 2
"""Patches along each side of an image token in the published Qwen2-VL models. vLLM (0.32) loads no other number."""


LEAST_IMAGES = 8
"""Smallest limit on images per prompt in the command, for runs on datasets with more references than the bundle's."""


@dataclass(frozen=True)
class LoraFiles:
    """The properties of an adapter that decide how vLLM serves it."""

    config: dict[str, Any]
    """The content of adapter_config.json."""
    names: tuple[str, ...]
    """The names of the adapter's weights."""


def read_lora(folder: Path) -> LoraFiles:
    """Read the config and the names of the weights of the adapter in `folder`."""
    config = read_json_object(folder / "adapter_config.json")
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return LoraFiles(config, tuple(file.keys()))


def adapts_vision(loras: Iterable[LoraFiles]) -> bool:
    """Return whether an adapter has weights in the vision tower."""
    return any(".visual." in name for lora in loras for name in lora.names)


def served_loras(loras: Mapping[str, LoraFiles]) -> dict[str, LoraFiles]:
    """Return the adapters that vLLM serves, by role."""
    return {role: lora for role, lora in loras.items() if vllm_refusal(lora.config, lora.names) is None}


def serving_lines(
    loras: Mapping[str, LoraFiles], merged: Sequence[str], card: AdapterCard, merge_size: int, references: int
) -> list[str]:
    """Return the lines of the model card about serving.

    `merged` are the roles with a merged model. `merge_size` is the number of patches along each side of an image token.
    `references` is the number of references that the reference extractor sees next to the query.
    """
    lines, served = [], served_loras(loras)
    if served:
        rank = vllm_rank([lora.config for lora in served.values()])
        command = _vllm_command(card, list(served), rank, adapts_vision(loras.values()))
        command += _vllm_limits(card, references)
        lines += ["- vLLM: run this command in this folder:", "", "```", " \\\n  ".join(command), "```", ""]
    if merged:
        example = [f"vllm serve merged/{merged[0]} --served-model-name {merged[0]}", *_vllm_limits(card, references)]
        lines += [
            "- Merged models have the form of the published checkpoints, which transformers 4, transformers 5 and vLLM",
            "  read. An example for vLLM:",
            "",
            "```",
            " \\\n  ".join(example),
            "```",
            "",
        ]
    for role, lora in loras.items():
        why = vllm_refusal(lora.config, lora.names)
        remedy = (
            f"serve `merged/{role}`" if role in merged else f"export with `--merge {role}` and serve `merged/{role}`"
        )
        if why:
            lines += [f"vLLM does not serve the adapter of {role}, because it has {why}; {remedy}.", ""]
    if merge_size != VLLM_MERGE_SIZE:
        ours, theirs = (f"{size} x {size}" for size in (merge_size, VLLM_MERGE_SIZE))
        lines += [
            f"The base model has {ours} patches per image token, but vLLM (0.32) loads only models with {theirs}.",
            "Correct its file `vllm/model_executor/models/qwen2_vl.py`: in `Qwen2VisionTransformer`, pass",
            "`spatial_merge_size=spatial_merge_size` to `Qwen2VisionPatchMerger`.",
            "",
        ]
    return lines


def _vllm_command(card: AdapterCard, served: Sequence[str], rank: int, adapts_vision: bool) -> list[str]:
    """Return the lines of the command that serves the bundle, quoted for a shell."""
    local = Path(card.base_model).is_dir()
    base = str(Path(card.base_model).resolve()) if local else card.base_model
    return [
        f"vllm serve {shlex.quote(base)}" + ("" if local else f" --revision {shlex.quote(str(card.base_revision))}"),
        # Runs request the base model by its name in the card.
        f"--served-model-name {shlex.quote(card.base_model)}",
        f"--enable-lora --max-loras {len(served)} --max-lora-rank {rank}"
        + (" --enable-tower-connector-lora" if adapts_vision else ""),
        "--lora-modules " + " ".join(f"{role}=adapters/{role}" for role in served),
    ]


def _vllm_limits(card: AdapterCard, references: int) -> list[str]:
    """Return the lines of a vLLM command that make vLLM read images and generate as a run does."""
    budget = json.dumps({"min_pixels": card.min_pixels, "max_pixels": card.max_pixels})
    images = json.dumps({"image": max(references + 1, LEAST_IMAGES)})
    return [
        "--generation-config vllm",  # the generation config of the model may set a repetition penalty
        f"--mm-processor-kwargs {shlex.quote(budget)}",
        f"--limit-mm-per-prompt {shlex.quote(images)}",
    ]


def vllm_refusal(config: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the part of an adapter that vLLM (0.32, lora/peft_helper.py) cannot serve, or None if it serves all.

    `config` is the adapter_config.json, and `names` are the names of the adapter's weights.
    """
    if config.get("use_dora"):
        return "DoRA magnitudes"
    if config.get("modules_to_save"):
        return f"fully trained modules ({', '.join(config['modules_to_save'])})"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        return "trained biases"
    rank = _largest_rank(config)
    if rank > VLLM_RANKS[-1]:
        return f"rank {rank}, above {VLLM_RANKS[-1]}"
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower() not in VLLM_INITIALIZATIONS:
        return f"the initialization {initial}, which changes the base model"
    other = next((name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight"))), None)
    # Qwen2-VL's class in vLLM has no LoRA for the embedding and the output layer.
    other = other or next((name for name in names if "embed_tokens" in name or "lm_head" in name), None)
    return f"the weight {other}" if other else None


def vllm_rank(configs: Sequence[Mapping[str, Any]]) -> int:
    """Return the smallest --max-lora-rank that vLLM accepts for all of these adapter configs.

    If a rank is too large for vLLM, return the largest rank of the configs; `vllm_refusal` rejects that adapter.
    """
    largest = max(map(_largest_rank, configs))
    return next((rank for rank in VLLM_RANKS if rank >= largest), largest)


def _largest_rank(config: Mapping[str, Any]) -> int:
    return max([config["r"], *config.get("rank_pattern", {}).values()])
