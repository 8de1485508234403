"""A bundle for inference: the four adapters, a merged model where wanted, the processor, and how to serve them.

Everything in the bundle is loaded again and compared with the original's logits on a drawn probe before it counts.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from echo_ft.layout import Layout, attention_mask, pad, pixels
from echo_ft.model import ADAPTER_CARD, AdapterCard, attach_adapters, load_model, load_processor
from echo_ft.records import Branch, EchoError, Exchange
from echo_ft.roles import DECIDE_INSTRUCTION, PROMPT_VERSION

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest accepted difference of any logit, by the weights' type: merging rounds the sum of base and update."""

# What is used for inference; optimizer states, checkpoints and pickles stay behind.
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", ADAPTER_CARD)


def export(
    adapters: Mapping[str, tuple[Path, AdapterCard]], output: Path, merge: Sequence[str], dtype: str = "auto"
) -> dict[str, float]:
    """Write the bundle to `output`; returns the largest logit difference of each part.

    Layout: `adapters/<role>/`, `merged/<role>/` for the roles in `merge`, `processor/`, `bundle.json`, `README.md`.
    Raises EchoError where a part does not reproduce the original's logits; nothing is left at `output` then.
    """
    if output.exists():
        raise EchoError(f"{output} exists already; choose another --output or delete it")
    unknown = [role for role in merge if role not in adapters]
    if unknown:
        raise EchoError(f"cannot merge {unknown[0]!r}; the roles are {', '.join(adapters)}")
    card = next(iter(adapters.values()))[1]
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for role, (path, _) in adapters.items():
        (partial / "adapters" / role).mkdir(parents=True)
        for name in _ADAPTER_FILES:
            shutil.copyfile(path / name, partial / "adapters" / role / name)
    processor = load_processor(card.base_model, card.base_revision, card.min_pixels, card.max_pixels)
    processor.save_pretrained(partial / "processor")

    def base() -> Any:
        return load_model(card.base_model, card.base_revision, dtype)

    probe = _probe(Layout(processor))
    original = attach_adapters(base(), {role: path for role, (path, _) in adapters.items()})
    expected = {role: _logits(original, probe, role) for role in adapters}
    del original
    gc.collect()

    differences = {}
    reloaded = attach_adapters(base(), {role: partial / "adapters" / role for role in adapters})
    for role in adapters:
        differences[f"adapters/{role}"] = _compare(_logits(reloaded, probe, role), expected[role], f"adapters/{role}")
    del reloaded
    gc.collect()
    for role in merge:
        folder = partial / "merged" / role
        merged = attach_adapters(base(), {role: partial / "adapters" / role}).merge_and_unload()
        merged.save_pretrained(folder)
        processor.save_pretrained(folder)
        del merged
        gc.collect()
        again = load_model(str(folder), dtype=dtype).eval()
        differences[f"merged/{role}"] = _compare(_logits(again, probe), expected[role], f"merged/{role}")
        del again
        gc.collect()
    _describe(partial, adapters, differences)
    partial.rename(output)
    return differences


def _probe(layout: Layout) -> dict[str, torch.Tensor]:
    """A batch of two drawn images and a question: the same for every export."""
    values = np.random.default_rng(0).integers(0, 255, (2, 96, 128, 3), dtype=np.uint8)
    images = [Image.fromarray(value) for value in values]
    branch = Branch("probe", f"Question: Is there any defect in the object?\nA. Yes.\nB. No.\n{DECIDE_INSTRUCTION}")
    exchange = Exchange("decision_maker", "probe", ("a", "b"), "Two images.\n", (branch,), PROMPT_VERSION)
    batch = {
        **pad([layout.row(exchange, [image.size for image in images])], layout.pad_token_id),
        **pixels(layout, images),
    }
    batch["attention_mask"] = attention_mask(batch.pop("segments"))
    del batch["labels"]
    return batch


@torch.inference_mode()
def _logits(model: Any, probe: Mapping[str, torch.Tensor], role: str | None = None) -> torch.Tensor:
    if role is not None:
        model.set_adapter(role)
    return model(**{name: tensor.to(model.device) for name, tensor in probe.items()}).logits.cpu()


def _compare(found: torch.Tensor, expected: torch.Tensor, part: str) -> float:
    difference = float((found.float() - expected.float()).abs().max())
    # `not <=` so that NaN fails too.
    if not difference <= TOLERANCE[expected.dtype]:
        raise EchoError(
            f"{part} does not reproduce the trained adapter: logits differ by {difference:.2g} (at most "
            f"{TOLERANCE[expected.dtype]:g} for {expected.dtype}); export with --dtype float32, or check the base model"
        )
    return difference


def _describe(folder: Path, adapters: Mapping[str, tuple[Path, AdapterCard]], differences: Mapping[str, float]) -> None:
    """bundle.json for programs, README.md for people."""
    card = next(iter(adapters.values()))[1]
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
        "largest_logit_difference": dict(differences),
    }
    (folder / "bundle.json").write_text(json.dumps(bundle, indent=2) + "\n", encoding="utf-8")
    lines = [
        "# Adapters for the four experts",
        "",
        f"Base model: `{card.base_model}`, revision `{card.base_revision}`, weights `{card.base_fingerprint}`.",
        f"Prompts: version {card.prompt_version} of echo_ft.roles. Pixels of an image: {card.min_pixels} to "
        f"{card.max_pixels}.",
        "",
        "| part | largest logit difference to the trained adapter |",
        "|---|---|",
        *(f"| {part} | {difference:.2g} |" for part, difference in differences.items()),
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
