"""A bundle for inference: the four adapters, a merged model where wanted, the processor, and how to serve them.

Everything in the bundle is loaded again and compared with the original's logits on a drawn probe before it counts.
"""

from __future__ import annotations

import gc
import json
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
from echo_ft.files import atomic_folder
from echo_ft.model.adapters import ADAPTER_CARD, ADAPTER_FILES, Adapter, attach_adapters
from echo_ft.model.batches import image_inputs, pad_rows
from echo_ft.model.loading import load_model, load_processor
from echo_ft.model.rows import RowBuilder
from echo_ft.records import Branch, Exchange

ALLOWED_ERROR_SHARE, MAX_ERROR_SHARE = 0.02, 0.25
"""How far a part may be from the trained adapter, as a share of what the adapter changes: SHARE, or what the weights'
type rounds away, but never more than MOST, so that a lost update (a share of 1) is noticed however small it is."""

ROUNDING_UNITS = 8
"""Rounding that is accepted, in units of the type's own: the logits of a model merged in bfloat16 or float16 differ
by about one from those of base and adapter apart (measured on echo-tiny); deeper models round more often."""


@dataclass(frozen=True)
class Fidelity:
    """How near a part of the bundle comes to the trained adapter, by the logits on the probe."""

    difference: float
    """The largest difference of any logit."""
    share: float
    """Root mean square of the differences, over that of what the adapter changes in the base model's logits."""


def export_bundle(
    adapters: Mapping[str, Adapter], output: Path, merge: Sequence[str], dtype: str = "auto"
) -> dict[str, Fidelity]:
    """Write the bundle to `output`; returns how near each part comes to the trained adapter.

    Layout: `adapters/<role>/`, `merged/<role>/` for the roles in `merge`, `processor/`, `bundle.json`, `README.md`.
    Raises EchoError where a part does not reproduce the original's logits. However it fails, nothing is left.
    """
    if output.exists():
        raise EchoError(f"{output} exists already; choose another --output or delete it")
    unknown = [role for role in merge if role not in adapters]
    if unknown:
        raise EchoError(f"cannot merge {unknown[0]!r}; the roles are {', '.join(adapters)}")
    with atomic_folder(output) as folder:
        return _fill(folder, adapters, merge, dtype)


def _fill(folder: Path, adapters: Mapping[str, Adapter], merge: Sequence[str], dtype: str) -> dict[str, Fidelity]:
    card = next(iter(adapters.values())).card
    for role, adapter in adapters.items():
        (folder / "adapters" / role).mkdir(parents=True)
        # What is used for inference; optimizer states, checkpoints and pickles stay behind.
        for name in (*ADAPTER_FILES, ADAPTER_CARD):
            shutil.copyfile(adapter.path / name, folder / "adapters" / role / name)
    processor = load_processor(card.base_model, card.base_revision, card.min_pixels, card.max_pixels)
    processor.save_pretrained(folder / "processor")

    def base() -> Any:
        return load_model(card.base_model, card.base_revision, dtype)

    probe = _probe(RowBuilder(processor))
    original = attach_adapters(base(), {role: adapter.path for role, adapter in adapters.items()})
    expected = {role: _logits(original, probe, role) for role in adapters}
    with original.disable_adapter():
        untuned = _logits(original, probe)
    del original
    gc.collect()

    def check(part: str, found: torch.Tensor) -> None:
        fidelity[part] = _compare(found, expected[part.split("/")[1]], untuned, part)

    fidelity: dict[str, Fidelity] = {}
    reloaded = attach_adapters(base(), {role: folder / "adapters" / role for role in adapters})
    for role in adapters:
        check(f"adapters/{role}", _logits(reloaded, probe, role))
    del reloaded
    gc.collect()
    for role in merge:
        target = folder / "merged" / role
        merged = attach_adapters(base(), {role: folder / "adapters" / role}).merge_and_unload()
        merged.save_pretrained(target)
        processor.save_pretrained(target)
        # What it was trained on travels with it: a run on it is not one of an untuned model.
        shutil.copyfile(folder / "adapters" / role / ADAPTER_CARD, target / ADAPTER_CARD)
        del merged
        gc.collect()
        again = load_model(str(target), dtype=dtype).eval()
        check(f"merged/{role}", _logits(again, probe))
        del again
        gc.collect()
    _describe(folder, adapters, fidelity)
    return fidelity


def _probe(row_builder: RowBuilder) -> dict[str, torch.Tensor]:
    """A batch of two drawn images and a question: the same for every export."""
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


def _compare(found: torch.Tensor, expected: torch.Tensor, untuned: torch.Tensor, part: str) -> Fidelity:
    """Compare `found` with what the trained adapter says, by the scale of what it changes in what the base says."""
    kind, found, expected, untuned = expected.dtype, found.float(), expected.float(), untuned.float()
    error, update = _size(found - expected), _size(expected - untuned)
    allowed = min(
        max(ALLOWED_ERROR_SHARE * update, ROUNDING_UNITS * torch.finfo(kind).eps * _size(expected)),
        MAX_ERROR_SHARE * update,
    )
    # `not <=` so that NaN fails too.
    if not error <= allowed:
        remedy = "" if kind == torch.float32 else "export with --dtype float32, or "
        raise EchoError(
            f"{part} does not reproduce the trained adapter: its logits are off by {error:.2g}, where the adapter "
            f"changes the base model's by {update:.2g} and {allowed:.2g} would be accepted for {kind} (root mean "
            f"squares on a probe); {remedy}train longer if the adapter hardly changes anything, or check the base model"
        )
    return Fidelity(float((found - expected).abs().max()), error / update if update else 0.0)


def _size(logits: torch.Tensor) -> float:
    """Root mean square: the largest of a hundred thousand would be a matter of rounding luck."""
    return float(logits.square().mean().sqrt())


def _describe(folder: Path, adapters: Mapping[str, Adapter], fidelity: Mapping[str, Fidelity]) -> None:
    """bundle.json for programs, README.md for people."""
    card = next(iter(adapters.values())).card
    configs = {
        role: json.loads((folder / "adapters" / role / "adapter_config.json").read_text(encoding="utf-8"))
        for role in adapters
    }
    rank = max(config["r"] for config in configs.values())
    tower = any(_names_the_tower(config["target_modules"]) for config in configs.values())
    budget = json.dumps({"min_pixels": card.min_pixels, "max_pixels": card.max_pixels})
    served = [role for role, config in configs.items() if not config.get("use_dora")]
    local = Path(card.base_model).is_dir()
    command = [
        f"vllm serve {Path(card.base_model).resolve() if local else card.base_model}"
        + ("" if local else f" --revision {card.base_revision}"),
        f"--enable-lora --max-lora-rank {rank}" + (" --enable-tower-connector-lora" if tower else ""),
        "--lora-modules " + " ".join(f"{role}=adapters/{role}" for role in served),
        f"--mm-processor-kwargs '{budget}'",
        f"--limit-mm-per-prompt '{json.dumps({'image': 8})}'",
    ]
    bundle = {
        "base_model": card.base_model,
        "base_revision": card.base_revision,
        "base_fingerprint": card.base_fingerprint,
        "prompt_version": card.prompt_version,
        "min_pixels": card.min_pixels,
        "max_pixels": card.max_pixels,
        "max_lora_rank": rank,
        "tower_is_adapted": tower,
        "adapters": {role: adapter.fingerprint for role, adapter in adapters.items()},
        "largest_logit_difference": {part: one.difference for part, one in fidelity.items()},
        "share_of_the_update": {part: one.share for part, one in fidelity.items()},
    }
    (folder / "bundle.json").write_text(json.dumps(bundle, indent=2) + "\n", encoding="utf-8")
    lines = [
        "# Adapters for the four experts",
        "",
        f"Base model: `{card.base_model}`, revision `{card.base_revision}`, weights `{card.base_fingerprint}`.",
        f"Prompts: version {card.prompt_version} of echo_ft.experts.roles. Pixels of an image: {card.min_pixels} to "
        f"{card.max_pixels}.",
        "",
        "| part | largest logit difference to the trained adapter | differences to what the adapter changes |",
        "|---|---|---|",
        *(f"| {part} | {one.difference:.2g} | {one.share:.2%} |" for part, one in fidelity.items()),
        "",
        "In echo-ft: `python -m evaluation.run --config ... --adapters adapters`. In PEFT: "
        "`PeftModel.from_pretrained(base, 'adapters/decision_maker')`. In vLLM, from this folder:",
        "",
        "```",
        " \\\n  ".join(command),
        "```",
        "",
    ]
    if len(served) < len(configs):
        lines.insert(-1, "vLLM does not serve DoRA adapters; export those with `--merge ROLE` and serve merged/ROLE.")
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _names_the_tower(targets: str | Sequence[str]) -> bool:
    names = [targets] if isinstance(targets, str) else targets
    return any(part in name for name in names for part in ("visual", "merger", "qkv", "attn.proj", "fc1", "fc2"))
