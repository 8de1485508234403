"""Export the tuned pipeline as a bundle, whose layout echo_ft.inference.bundle describes.

Each part of the bundle is reloaded. Its logits on a synthetic probe are compared with the trained adapter's, and the
reloaded pipeline's answers with those of the original.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from echo_ft.data.dataset import Dataset
from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import PipelineConfig
from echo_ft.export.card import licence_notes, model_card
from echo_ft.export.published_form import save_model, save_processor
from echo_ft.export.vllm import adapts_vision, read_lora, served_loras, vllm_rank
from echo_ft.files import atomic_folder, explain_full_disk, write_json, write_text
from echo_ft.inference.bundle import (
    BUNDLE_DESCRIPTION,
    EXAMPLE_PROMPTS,
    BundleDescription,
    bundle_adapters,
    load_bundle_products,
    load_bundle_rows,
    read_bundle,
    write_checksums,
)
from echo_ft.inference.decision import Measurement
from echo_ft.inference.engine import Engine
from echo_ft.inference.inspector import Inspector, Result
from echo_ft.inference.liveness import (
    PROBE_TOKENS,
    check_adapters,
    load_probe_images,
    local_backend,
    make_probe,
    read_probe,
    record_probe,
    write_probe,
)
from echo_ft.model.adapters import ADAPTER_CARD, ADAPTER_FILES, Adapter, attach_adapters, require_whole_prompt
from echo_ft.model.batches import image_inputs, make_attention_mask, pad_rows
from echo_ft.model.loading import load_model, load_processor
from echo_ft.model.rows import RowBuilder
from echo_ft.provenance import commit, seal_folder, versions
from echo_ft.records import MAX_NEW_TOKENS
from echo_ft.retrieval.products import ProductData, read_products, save_products

ALLOWED_ERROR, MAX_ERROR = 0.02, 0.25
"""Allowed error of a part, relative to the adapter's effect on the logits. Rounding in the weights' data type may raise
it above ALLOWED_ERROR, but never above MAX_ERROR. The loss of even a small update is an error of 1, so it cannot go
unnoticed."""

ALLOWED_EPSILONS = 8
"""Allowed rounding error, in machine epsilons. Logits of a model merged in bfloat16 or float16 differ by about one
epsilon from those of the unmerged adapter (measured on echo-tiny); deeper models round more often."""

COMPARED_IMAGES = 2
"""Number of normal images that the original and the reloaded pipeline inspect."""

ALLOWED_PROBABILITY_ERROR = 1e-4
"""Largest allowed difference in a probability between the original and the reloaded pipeline."""


@dataclass(frozen=True)
class Fidelity:
    """How closely a part of the bundle reproduces the trained adapter's logits on the probe."""

    max_difference: float
    """Largest absolute difference between two logits."""
    relative_error: float
    """RMS of the differences, divided by the RMS of the adapter's changes to the base model's logits."""


@dataclass(frozen=True)
class ExportPlan:
    """What an export writes."""

    adapters: Mapping[str, Adapter]
    dataset: Dataset | None = None
    """The dataset with the normal images and the knowledge; None for a bundle without them."""
    references: str = "none"
    """One of `REFERENCE_CHOICES`."""
    measurement: Measurement | None = None
    """The results for the model card, with the calibration and the options of the run that gave them."""
    licence: str | None = None
    """Statement in the model card about the licence of the normal images and the knowledge."""
    merge: Sequence[str] = ()
    dtype: str = "auto"


@dataclass(frozen=True)
class Bundle:
    """What an export has written."""

    fidelity: dict[str, Fidelity]
    """The fidelity of each part, by its path in the bundle."""
    failed: dict[str, str]
    """Why the merged model of a role is missing, by role."""
    compared: int = 0
    """The number of images for which the reloaded pipeline gave the same answers as the original one."""


def export_bundle(plan: ExportPlan, output: Path) -> Bundle:
    """Write the bundle to `output`.

    Raises EchoError if `output` exists, an adapter acts only after the prefix, a role to merge is unknown, an adapter
    does not reproduce its trained logits, or the reloaded bundle gives other answers. After an error, it leaves no
    files behind. If a merge fails, only the merged model is missing.
    """
    if output.exists():
        raise EchoError(f"{output} already exists; choose another --output or delete it")
    require_whole_prompt(plan.adapters, "a bundle")  # vLLM, merged models and plain PEFT need such adapters
    unknown = [role for role in plan.merge if role not in plan.adapters]
    if unknown:
        raise EchoError(f"cannot merge {unknown[0]!r}; the roles are {', '.join(plan.adapters)}")
    with explain_full_disk(output.parent, "free some space and export again"), atomic_folder(output) as folder:
        return _fill_bundle(folder, plan)


def _fill_bundle(folder: Path, plan: ExportPlan) -> Bundle:
    adapters = plan.adapters
    card = next(iter(adapters.values())).card
    for role, adapter in adapters.items():
        (folder / "adapters" / role).mkdir(parents=True)
        # Copy only files for inference: no optimizer states, checkpoints or pickles.
        for name in (*ADAPTER_FILES, ADAPTER_CARD):
            shutil.copyfile(adapter.path / name, folder / "adapters" / role / name)
        seal_folder(folder / "adapters" / role)
    processor = load_processor(card.base_model, card.base_revision, card.min_pixels, card.max_pixels)
    save_processor(processor, folder / "processor")
    builder = RowBuilder(processor)
    products = (
        None if plan.dataset is None else read_products(plan.dataset, plan.measurement.k if plan.measurement else None)
    )
    if products is not None:
        save_products(products, folder / "references", plan.references)

    probe = _probe_inputs(builder)
    original = attach_adapters(_load_base(plan), {role: adapter.path for role, adapter in adapters.items()})
    expected = {role: _logits(original, probe, role) for role in adapters}
    with original.disable_adapter():
        untuned = _logits(original, probe)
    write_probe(record_probe(original, builder, list(adapters), _dtype(original)), folder / "adapters")
    results = _inspect(original, builder, products, plan)
    if results:
        # A product without knowledge has no prompt of the knowledge guide.
        example = max(results, key=lambda one: len({trace.role for trace in one.trace}))
        write_json(folder / EXAMPLE_PROMPTS, [asdict(one) | {"images": len(one.images)} for one in example.trace])
    dtype = _dtype(original)
    del original
    gc.collect()

    merged: dict[str, Fidelity] = {}
    failed: dict[str, str] = {}
    for role in plan.merge:
        part = f"merged/{role}"
        try:
            _merge(_load_base(plan), folder / "adapters" / role, folder / part, processor)
            gc.collect()
            logits = _logits(load_model(str(folder / part), dtype=plan.dtype).eval(), probe)
            merged[part] = _compare(logits, expected[role], untuned, part)
        except Exception as error:  # no error in a merge may prevent the export of the adapters
            failed[role] = str(error) if isinstance(error, EchoError) else f"{type(error).__name__}: {error}"
            shutil.rmtree(folder / part, ignore_errors=True)
        gc.collect()
    reloaded = attach_adapters(_load_base(plan), {role: folder / "adapters" / role for role in adapters})
    parts = {
        f"adapters/{role}": _compare(_logits(reloaded, probe, role), expected[role], untuned, f"adapters/{role}")
        for role in adapters
    }
    bundle = Bundle({**parts, **merged}, failed, len(results))
    _write_descriptions(folder, plan, products, bundle, dtype, builder.merge)
    write_checksums(folder)
    _check_reloaded(folder, reloaded, results, plan)
    return bundle


def _load_base(plan: ExportPlan) -> Any:
    card = next(iter(plan.adapters.values())).card
    return load_model(card.base_model, card.base_revision, plan.dtype)


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _write_descriptions(
    folder: Path, plan: ExportPlan, products: ProductData | None, bundle: Bundle, dtype: str, merge_size: int
) -> None:
    """Write bundle.json for programs and README.md for readers."""
    card = next(iter(plan.adapters.values())).card
    loras = {role: read_lora(folder / "adapters" / role) for role in plan.adapters}
    measured = plan.measurement
    described = BundleDescription(
        base_model=card.base_model,
        base_revision=card.base_revision,
        base_fingerprint=card.base_fingerprint,
        prompt_version=card.prompt_version,
        min_pixels=card.min_pixels,
        max_pixels=card.max_pixels,
        dtype=dtype,
        pipeline=PipelineConfig(routing=card.routing) if measured is None else measured.pipeline,
        max_new_tokens=MAX_NEW_TOKENS if measured is None else measured.max_new_tokens,
        calibration=None if measured is None else measured.calibration,
        references=plan.references,
        adapters={role: adapter.fingerprint for role, adapter in plan.adapters.items()},
        licences=licence_notes(plan.adapters, products, plan.licence),
        versions=versions(),
        commit=commit(),
        max_lora_rank=vllm_rank([lora.config for lora in served_loras(loras).values() or loras.values()]),
        tower_is_adapted=adapts_vision(loras.values()),
        largest_logit_difference={part: one.max_difference for part, one in bundle.fidelity.items()},
        share_of_the_update={part: one.relative_error for part, one in bundle.fidelity.items()},
        not_merged=bundle.failed,
    )
    write_json(folder / BUNDLE_DESCRIPTION, asdict(described))
    references = 0 if products is None else products.search.k
    write_text(folder / "README.md", model_card(described, measured, card, loras, merge_size, references))


def _inspect(model: Any, row_builder: RowBuilder, products: ProductData | None, plan: ExportPlan) -> list[Result]:
    """Inspect some normal images with short outputs, to compare the original and the reloaded pipeline."""
    if products is None:
        return []
    engine = Engine(model, row_builder, products.root, PROBE_TOKENS)
    measured = plan.measurement
    routing = next(iter(plan.adapters.values())).card.routing
    pipeline = PipelineConfig(routing=routing) if measured is None else measured.pipeline
    inspector = Inspector(engine.generate, products, pipeline)
    images = [products.root / products.search.images[key][0] for key in sorted(products.search.images)]
    return [inspector.predict(image) for image in images[:COMPARED_IMAGES]]


def _check_reloaded(folder: Path, model: Any, expected: Sequence[Result], plan: ExportPlan) -> None:
    """Read the bundle as an inspector does, and compare the answers of `model`, to which its adapters are attached.

    Raises EchoError if a letter, an output text, a reference or a probability differs from the `expected` one.
    """
    described = read_bundle(folder)
    adapters = bundle_adapters(folder, described, next(iter(plan.adapters.values())).card.base_model)
    builder = load_bundle_rows(folder, described)
    check_adapters(local_backend(model, builder), list(adapters), read_probe(folder / "adapters"), folder.name, builder)
    if not expected:
        return
    products = load_bundle_products(folder, described)
    for number, (before, now) in enumerate(zip(expected, _inspect(model, builder, products, plan), strict=True)):
        error = _difference(before, now)
        if error:
            raise EchoError(
                f"the reloaded bundle does not answer as the adapters do: {error}, in image {number + 1} of "
                f"{len(expected)} ({before.image}); report this with the versions of torch, transformers and peft"
            )


def _difference(before: Result, now: Result) -> str:
    """Return what differs between two results of the same image, or an empty string if they are equal."""

    def listed(result: Result) -> dict[str, list[str | None]]:
        return {
            "a prompt": [one.context + one.prompt for one in result.trace],
            "a letter": [one.parsed for one in result.answers],
            "a text": [one.text for one in result.trace],
        }

    ours, theirs = listed(before), listed(now)
    different = [name for name in ours if ours[name] != theirs[name]]
    if different:
        return f"{different[0]} differs"
    for one, other in zip(before.answers, now.answers, strict=True):
        for letter, probability in (one.probabilities or {}).items():
            error = abs(probability - (other.probabilities or {})[letter])
            if not error <= ALLOWED_PROBABILITY_ERROR:
                return f"P({letter}) differs by {error:.2g}"
    return ""


def _merge(base: Any, adapter: Path, target: Path, processor: Any) -> None:
    """Write the merged model of a base model and an adapter, with the adapter's card and the processor."""
    save_model(attach_adapters(base, {adapter.name: adapter}).merge_and_unload(), target)
    save_processor(processor, target)
    # With the card, a run on the merged model can check which images it was trained on.
    shutil.copyfile(adapter / ADAPTER_CARD, target / ADAPTER_CARD)
    seal_folder(target)


def _probe_inputs(row_builder: RowBuilder) -> dict[str, torch.Tensor]:
    """Return the model's inputs for the probe of `liveness`, which has all its branches in one row."""
    with make_probe() as exchange:
        images = load_probe_images(exchange)
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
