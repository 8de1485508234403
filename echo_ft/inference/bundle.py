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

from echo_ft.errors import EchoError
from echo_ft.experts.roles import DECIDE_INSTRUCTION, PROMPT_VERSION
from echo_ft.files import atomic_folder, write_json, write_text
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


def export_bundle(
    adapters: Mapping[str, Adapter], output: Path, merge: Sequence[str], dtype: str = "auto"
) -> dict[str, Fidelity]:
    """Write the bundle to `output`; returns the fidelity of each part.

    Layout: `adapters/<role>/`, `merged/<role>/` for the roles in `merge`, `processor/`, `bundle.json`, `README.md`.
    Raises EchoError if `output` exists, a role in `merge` is unknown, or a part does not reproduce the trained
    adapter's logits. If the export fails, it leaves no files behind.
    """
    if output.exists():
        raise EchoError(f"{output} already exists; choose another --output or delete it")
    unknown = [role for role in merge if role not in adapters]
    if unknown:
        raise EchoError(f"cannot merge {unknown[0]!r}; the roles are {', '.join(adapters)}")
    with atomic_folder(output) as folder:
        return _fill_bundle(folder, adapters, merge, dtype)


def _fill_bundle(
    folder: Path, adapters: Mapping[str, Adapter], merge: Sequence[str], dtype: str
) -> dict[str, Fidelity]:
    card = next(iter(adapters.values())).card
    for role, adapter in adapters.items():
        (folder / "adapters" / role).mkdir(parents=True)
        # Only files for inference, without optimizer states, checkpoints and pickles.
        for name in (*ADAPTER_FILES, ADAPTER_CARD):
            shutil.copyfile(adapter.path / name, folder / "adapters" / role / name)
    processor = load_processor(card.base_model, card.base_revision, card.min_pixels, card.max_pixels)
    processor.save_pretrained(folder / "processor")

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
    for role in merge:
        target = folder / "merged" / role
        merged = attach_adapters(load_base(), {role: folder / "adapters" / role}).merge_and_unload()
        merged.save_pretrained(target)
        processor.save_pretrained(target)
        # The card lets a run on the merged model check what it was trained on.
        shutil.copyfile(folder / "adapters" / role / ADAPTER_CARD, target / ADAPTER_CARD)
        del merged
        gc.collect()
        merged = load_model(str(target), dtype=dtype).eval()
        check(f"merged/{role}", _logits(merged, probe))
        del merged
        gc.collect()
    _write_descriptions(folder, adapters, fidelity)
    return fidelity


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


def _write_descriptions(folder: Path, adapters: Mapping[str, Adapter], fidelity: Mapping[str, Fidelity]) -> None:
    """Write bundle.json for programs and README.md for readers."""
    card = next(iter(adapters.values())).card
    configs = {
        role: json.loads((folder / "adapters" / role / "adapter_config.json").read_text(encoding="utf-8"))
        for role in adapters
    }
    rank = vllm_rank([*configs.values()])
    adapts_vision = any(_targets_vision(config["target_modules"]) for config in configs.values())
    served = [role for role, config in configs.items() if not config.get("use_dora")]
    command = _vllm_command(card, served, rank, adapts_vision)
    bundle = {
        "base_model": card.base_model,
        "base_revision": card.base_revision,
        "base_fingerprint": card.base_fingerprint,
        "prompt_version": card.prompt_version,
        "min_pixels": card.min_pixels,
        "max_pixels": card.max_pixels,
        "max_lora_rank": rank,
        "tower_is_adapted": adapts_vision,
        "adapters": {role: adapter.fingerprint for role, adapter in adapters.items()},
        "largest_logit_difference": {part: one.max_difference for part, one in fidelity.items()},
        "share_of_the_update": {part: one.relative_error for part, one in fidelity.items()},
    }
    write_json(folder / "bundle.json", bundle)
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
        *(f"| {part} | {one.max_difference:.2g} | {one.relative_error:.2%} |" for part, one in fidelity.items()),
        "",
        "- echo-ft: pass the folder `adapters` to `python -m evaluation.run --config ... --adapters adapters`.",
        "- PEFT: load an adapter with `PeftModel.from_pretrained(base, 'adapters/decision_maker')`.",
        "- vLLM: run this command in this folder:",
        "",
        "```",
        " \\\n  ".join(command),
        "```",
        "",
    ]
    if len(served) < len(configs):
        lines.insert(-1, "vLLM cannot serve DoRA adapters. Export them with `--merge ROLE` and serve `merged/ROLE`.")
    write_text(folder / "README.md", "\n".join(lines))


def _vllm_command(card: AdapterCard, served: Sequence[str], rank: int, adapts_vision: bool) -> list[str]:
    """Return the lines of the command that serves the bundle, quoted for a shell."""
    budget = json.dumps({"min_pixels": card.min_pixels, "max_pixels": card.max_pixels})
    local = Path(card.base_model).is_dir()
    base = str(Path(card.base_model).resolve()) if local else card.base_model
    return [
        f"vllm serve {shlex.quote(base)}" + ("" if local else f" --revision {shlex.quote(str(card.base_revision))}"),
        # Runs ask for the base by the name in the card. The base's own generation config may set a repetition penalty.
        f"--served-model-name {shlex.quote(card.base_model)} --generation-config vllm",
        f"--enable-lora --max-loras {max(1, len(served))} --max-lora-rank {rank}"
        + (" --enable-tower-connector-lora" if adapts_vision else ""),
        "--lora-modules " + " ".join(f"{role}=adapters/{role}" for role in served),
        f"--mm-processor-kwargs {shlex.quote(budget)}",
        f"--limit-mm-per-prompt {shlex.quote(json.dumps({'image': 8}))}",
    ]


def vllm_rank(configs: Sequence[Mapping[str, Any]]) -> int:
    """Return the smallest --max-lora-rank that vLLM accepts for all of these adapter configs."""
    largest = max(max([config["r"], *config.get("rank_pattern", {}).values()]) for config in configs)
    return next((rank for rank in VLLM_RANKS if rank >= largest), largest)


def _targets_vision(targets: str | Sequence[str]) -> bool:
    names = [targets] if isinstance(targets, str) else targets
    return any(part in name for name in names for part in ("visual", "merger", "qkv", "attn.proj", "fc1", "fc2"))
