"""Export a bundle for inference: the four adapters, optional merged models, the processor, and serving instructions.

Each part of the bundle is reloaded, and its logits on a synthetic probe are compared with those of the trained adapter.
"""

from __future__ import annotations

import gc
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from echo_ft.errors import EchoError
from echo_ft.experts.roles import DECIDE_INSTRUCTION, PROMPT_VERSION
from echo_ft.files import atomic_folder, explain_full_disk, write_json, write_text
from echo_ft.inference.published_form import save_model, save_processor
from echo_ft.inputs import read_json_object
from echo_ft.model.adapters import ADAPTER_CARD, ADAPTER_FILES, Adapter, AdapterCard, attach_adapters
from echo_ft.model.batches import image_inputs, make_attention_mask, pad_rows
from echo_ft.model.loading import load_model, load_processor
from echo_ft.model.rows import RowBuilder
from echo_ft.records import Branch, Exchange

ALLOWED_ERROR, MAX_ERROR = 0.02, 0.25
"""Allowed error of a part, relative to the adapter's effect on the logits. Rounding in the weights' data type may raise
it above ALLOWED_ERROR, but never above MAX_ERROR, so that even a small update cannot get lost (error 1) unnoticed."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM (0.32) accepts for --max-lora-rank."""

VLLM_INITIALIZATIONS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Named initializations of an adapter that vLLM (0.32) accepts, because they leave the base model unchanged."""

ALLOWED_EPSILONS = 8
"""Allowed rounding error, in machine epsilons. Logits of a model merged in bfloat16 or float16 differ by about one
epsilon from those of the unmerged adapter (measured on echo-tiny); deeper models round more often."""


@dataclass(frozen=True)
class Fidelity:
    """How closely a part of the bundle reproduces the trained adapter's logits on the probe."""

    max_difference: float
    """Largest absolute difference of a logit."""
    relative_error: float
    """RMS of the differences, divided by the RMS of the adapter's changes to the base model's logits."""


@dataclass(frozen=True)
class Bundle:
    """What an export has written."""

    fidelity: dict[str, Fidelity]
    """The fidelity of each part, by its path in the bundle."""
    failed: dict[str, str]
    """Why the merged model of a role is missing, by role."""


def export_bundle(adapters: Mapping[str, Adapter], output: Path, merge: Sequence[str], dtype: str = "auto") -> Bundle:
    """Write the bundle to `output`.

    Layout: `adapters/<role>/`, `merged/<role>/` for the roles in `merge`, `processor/`, `bundle.json`, `README.md`.
    Raises EchoError if `output` exists, a role in `merge` is unknown, or an adapter does not reproduce its trained
    logits. It leaves no files behind then. A merge that fails costs only the merged model.
    """
    if output.exists():
        raise EchoError(f"{output} already exists; choose another --output or delete it")
    unknown = [role for role in merge if role not in adapters]
    if unknown:
        raise EchoError(f"cannot merge {unknown[0]!r}; the roles are {', '.join(adapters)}")
    with explain_full_disk(output.parent, "free some space and export again"), atomic_folder(output) as folder:
        return _fill_bundle(folder, adapters, merge, dtype)


def _fill_bundle(folder: Path, adapters: Mapping[str, Adapter], merge: Sequence[str], dtype: str) -> Bundle:
    card = next(iter(adapters.values())).card
    for role, adapter in adapters.items():
        (folder / "adapters" / role).mkdir(parents=True)
        # Only files for inference, without optimizer states, checkpoints and pickles.
        for name in (*ADAPTER_FILES, ADAPTER_CARD):
            shutil.copyfile(adapter.path / name, folder / "adapters" / role / name)
    processor = load_processor(card.base_model, card.base_revision, card.min_pixels, card.max_pixels)
    save_processor(processor, folder / "processor")

    def load_base() -> Any:
        return load_model(card.base_model, card.base_revision, dtype)

    probe = _make_probe(RowBuilder(processor))
    original = attach_adapters(load_base(), {role: adapter.path for role, adapter in adapters.items()})
    expected = {role: _logits(original, probe, role) for role in adapters}
    with original.disable_adapter():
        untuned = _logits(original, probe)
    del original
    gc.collect()

    fidelity: dict[str, Fidelity] = {}

    def check(part: str, logits: torch.Tensor) -> None:
        fidelity[part] = _compare(logits, expected[part.split("/")[1]], untuned, part)

    reloaded = attach_adapters(load_base(), {role: folder / "adapters" / role for role in adapters})
    for role in adapters:
        check(f"adapters/{role}", _logits(reloaded, probe, role))
    del reloaded
    gc.collect()
    failed: dict[str, str] = {}
    for role in merge:
        target = folder / "merged" / role
        try:
            _merge(load_base(), folder / "adapters" / role, target, processor)
            gc.collect()
            check(f"merged/{role}", _logits(load_model(str(target), dtype=dtype).eval(), probe))
        except Exception as error:  # whatever it is, it must not cost the adapters
            failed[role] = str(error) if isinstance(error, EchoError) else f"{type(error).__name__}: {error}"
            shutil.rmtree(target, ignore_errors=True)
        gc.collect()
    bundle = Bundle(fidelity, failed)
    _write_descriptions(folder, adapters, bundle)
    return bundle


def _merge(base: Any, adapter: Path, target: Path, processor: Any) -> None:
    """Write the merged model of a base model and an adapter, with the adapter's card and the processor."""
    save_model(attach_adapters(base, {adapter.name: adapter}).merge_and_unload(), target)
    save_processor(processor, target)
    # The card lets a run on the merged model check what it was trained on.
    shutil.copyfile(adapter / ADAPTER_CARD, target / ADAPTER_CARD)


def _make_probe(row_builder: RowBuilder) -> dict[str, torch.Tensor]:
    """Make a batch of two random images and a question, identical for every export."""
    values = np.random.default_rng(0).integers(0, 255, (2, 96, 128, 3), dtype=np.uint8)
    images = [Image.fromarray(value) for value in values]
    branch = Branch("probe", f"Question: Is there any defect in the object?\nA. Yes.\nB. No.\n{DECIDE_INSTRUCTION}")
    exchange = Exchange("decision_maker", "probe", ("a", "b"), "Two images.\n", (branch,), PROMPT_VERSION)
    batch = {
        **pad_rows([row_builder.row(exchange, [image.size for image in images])], row_builder.pad_token_id),
        **image_inputs(row_builder, images),
    }
    batch["attention_mask"] = make_attention_mask(batch.pop("segments"))
    del batch["labels"]
    return batch


@torch.inference_mode()
def _logits(model: Any, probe: Mapping[str, torch.Tensor], role: str | None = None) -> torch.Tensor:
    if role is not None:
        model.set_adapter(role)
    return model(**{name: tensor.to(model.device) for name, tensor in probe.items()}).logits.cpu()


def _compare(logits: torch.Tensor, expected: torch.Tensor, untuned: torch.Tensor, part: str) -> Fidelity:
    """Compare logits with those of the trained adapter, relative to the adapter's changes to the base model's."""
    dtype, logits, expected, untuned = expected.dtype, logits.float(), expected.float(), untuned.float()
    error, update = _rms(logits - expected), _rms(expected - untuned)
    allowed = min(
        max(ALLOWED_ERROR * update, ALLOWED_EPSILONS * torch.finfo(dtype).eps * _rms(expected)),
        MAX_ERROR * update,
    )
    # `not <=` also rejects NaN.
    if not error <= allowed:
        remedy = "" if dtype == torch.float32 else "export with --dtype float32, or "
        raise EchoError(
            f"{part} does not reproduce the trained adapter: its logits differ by {error:.2g}, but {dtype} allows only "
            f"{allowed:.2g}, and the adapter changes the base model's logits by {update:.2g} (RMS on a probe); "
            f"{remedy}train longer if the adapter has hardly any effect, or check the base model"
        )
    return Fidelity(float((logits - expected).abs().max()), error / update if update else 0.0)


def _rms(logits: torch.Tensor) -> float:
    """Return the root mean square, because the maximum of 100,000 logits depends too much on rounding."""
    return float(logits.square().mean().sqrt())


def _write_descriptions(folder: Path, adapters: Mapping[str, Adapter], bundle: Bundle) -> None:
    """Write bundle.json for programs and README.md for readers."""
    card = next(iter(adapters.values())).card
    configs, names = {}, {}
    for role in adapters:
        path = folder / "adapters" / role
        configs[role] = read_json_object(path / "adapter_config.json")
        with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
            names[role] = list(file.keys())
    refusals = {role: vllm_refusal(config, names[role]) for role, config in configs.items()}
    served = [role for role, refusal in refusals.items() if refusal is None]
    rank = vllm_rank([configs[role] for role in served or configs])
    adapts_vision = any(".visual." in name for role in adapters for name in names[role])
    described = {
        "base_model": card.base_model,
        "base_revision": card.base_revision,
        "base_fingerprint": card.base_fingerprint,
        "prompt_version": card.prompt_version,
        "min_pixels": card.min_pixels,
        "max_pixels": card.max_pixels,
        "max_lora_rank": rank,
        "tower_is_adapted": adapts_vision,
        "adapters": {role: adapter.fingerprint for role, adapter in adapters.items()},
        "largest_logit_difference": {part: one.max_difference for part, one in bundle.fidelity.items()},
        "share_of_the_update": {part: one.relative_error for part, one in bundle.fidelity.items()},
        "not_merged": bundle.failed,
    }
    write_json(folder / "bundle.json", described)
    lines = [
        "# Adapters for the four experts",
        "",
        f"- Base model: `{card.base_model}`, revision `{card.base_revision}`, weights `{card.base_fingerprint}`",
        f"- Prompts: version {card.prompt_version} of `echo_ft.experts.roles`",
        f"- Pixel budget: {card.min_pixels} to {card.max_pixels} pixels per image",
        "",
        "Every part was reloaded, and its logits on a probe were compared with those of the trained adapter. The RMS",
        "error is relative to the adapter's own changes to the base model's logits.",
        "",
        "| part | largest difference | relative RMS error |",
        "|---|---|---|",
        *(f"| {part} | {one.max_difference:.2g} | {one.relative_error:.2%} |" for part, one in bundle.fidelity.items()),
        "",
        *(f"`merged/{role}` is missing: {reason}\n" for role, reason in bundle.failed.items()),
        "- echo-ft: pass the folder `adapters` to `python -m evaluation.run --config ... --adapters adapters`.",
        "- PEFT: load an adapter with `PeftModel.from_pretrained(base, 'adapters/decision_maker')`.",
    ]
    served_command = _vllm_command(card, served, rank, adapts_vision) if served else []
    merged = [part.split("/")[1] for part in bundle.fidelity if part.startswith("merged/")]
    lines += _serving_lines(served_command, {role: why for role, why in refusals.items() if why}, merged, card)
    write_text(folder / "README.md", "\n".join(lines))


def _serving_lines(
    command: Sequence[str], refusals: Mapping[str, str], merged: Sequence[str], card: AdapterCard
) -> list[str]:
    """Return the lines of the README about serving.

    `command` serves the adapters that vLLM takes, if any; `refusals` says for each other role why vLLM refuses its
    adapter; `merged` are the roles with a merged model.
    """
    lines = []
    if command:
        lines += ["- vLLM: run this command in this folder:", "", "```", " \\\n  ".join(command), "```", ""]
    if merged:
        example = [f"vllm serve merged/{merged[0]} --served-model-name {merged[0]}", *_vllm_limits(card)]
        lines += [
            "- Merged models have the form of the published checkpoints, which transformers 4, transformers 5 and vLLM",
            "  read. An example for vLLM:",
            "",
            "```",
            " \\\n  ".join(example),
            "```",
            "",
        ]
    for role, why in refusals.items():
        remedy = (
            f"serve `merged/{role}`" if role in merged else f"export with `--merge {role}` and serve `merged/{role}`"
        )
        lines += [f"vLLM does not serve the adapter of {role}, because it has {why}; {remedy}.", ""]
    return lines


def _vllm_command(card: AdapterCard, served: Sequence[str], rank: int, adapts_vision: bool) -> list[str]:
    """Return the lines of the command that serves the bundle, quoted for a shell."""
    local = Path(card.base_model).is_dir()
    base = str(Path(card.base_model).resolve()) if local else card.base_model
    return [
        f"vllm serve {shlex.quote(base)}" + ("" if local else f" --revision {shlex.quote(str(card.base_revision))}"),
        # Runs ask for the base by the name in the card.
        f"--served-model-name {shlex.quote(card.base_model)}",
        f"--enable-lora --max-loras {len(served)} --max-lora-rank {rank}"
        + (" --enable-tower-connector-lora" if adapts_vision else ""),
        "--lora-modules " + " ".join(f"{role}=adapters/{role}" for role in served),
        *_vllm_limits(card),
    ]


def _vllm_limits(card: AdapterCard) -> list[str]:
    """Return the lines of a command of vLLM that make it read and generate as a run does."""
    budget = json.dumps({"min_pixels": card.min_pixels, "max_pixels": card.max_pixels})
    return [
        "--generation-config vllm",  # the model's own may set a repetition penalty
        f"--mm-processor-kwargs {shlex.quote(budget)}",
        f"--limit-mm-per-prompt {shlex.quote(json.dumps({'image': 8}))}",
    ]


def vllm_refusal(config: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return what vLLM (0.32, lora/peft_helper.py) does not serve of an adapter, or None if it serves the adapter.

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

    If a rank is too large for vLLM, return the largest rank; `vllm_refusal` names that adapter.
    """
    largest = max(map(_largest_rank, configs))
    return next((rank for rank in VLLM_RANKS if rank >= largest), largest)


def _largest_rank(config: Mapping[str, Any]) -> int:
    return max([config["r"], *config.get("rank_pattern", {}).values()])
