"""The model card of a bundle: its content, its measured results, its use and the licences that apply."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

from echo_ft.export.vllm import LoraFiles, serving_lines
from echo_ft.inference.bundle import BundleDescription
from echo_ft.inference.decision import Measurement, describe_decision
from echo_ft.model.adapters import Adapter, AdapterCard
from echo_ft.retrieval.products import ProductData

REFERENCE_TEXTS = {
    "copy": "copies in `references/images`",
    "path": "not in this folder; `references/products.json` has their paths",
    "none": "none, so `evaluation.inspect` cannot use this bundle",
}


def licence_notes(adapters: Mapping[str, Adapter], products: ProductData | None, note: str | None) -> dict[str, str]:
    """Return the licences that apply to each part of a bundle. `note` is the exporter's statement about the images."""
    card = next(iter(adapters.values())).card
    licence = _licence_of(card.base_model, card.base_revision)
    notes = {
        "base model": f"{card.base_model}: {licence or 'see its model card'}",
        "adapters and merged models": "derived from the base model and the training images; their licences apply",
    }
    if products is not None:
        datasets = ", ".join(sorted({dataset for dataset, _ in products.conditions}))
        notes["normal images and knowledge"] = note or f"from {datasets}: see the licences of these datasets"
    return notes


def _licence_of(model_name_or_path: str, revision: str) -> str:
    """Return the licence in a model's own card; empty if the card is not on this machine or names none."""
    from transformers.utils import cached_file

    found = cached_file(
        model_name_or_path,
        "README.md",
        revision=revision,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    try:
        return str((metadata_load(found) or {}).get("license") or "") if found else ""
    except (ValueError, yaml.YAMLError):  # a README with broken metadata still loads as a model
        return ""


def model_card(
    bundle: BundleDescription,
    measured: Measurement | None,
    card: AdapterCard,
    loras: Mapping[str, LoraFiles],
    merge_size: int,
    references: int,
) -> str:
    """Return the README.md of a bundle. `merge_size` and `references` are as in `serving_lines`."""
    merged = [part.split("/")[1] for part in bundle.share_of_the_update if part.startswith("merged/")]
    header: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "image-text-to-text"}
    if not Path(bundle.base_model).is_dir():
        header["base_model"] = bundle.base_model
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=True).strip(),
        "---",
        "",
        "# Four experts for industrial inspection",
        "",
        f"- Base model: `{bundle.base_model}`, revision `{bundle.base_revision}`, weights `{bundle.base_fingerprint}`",
        f"- Prompts: version {bundle.prompt_version} of `echo_ft.experts.roles`, routing `{bundle.pipeline.routing}`",
        f"- Pixel budget: {bundle.min_pixels} to {bundle.max_pixels} pixels per image",
        f"- Training data: `{card.dataset}`, fingerprint `{card.dataset_fingerprint}`",
        f"- Normal images: {REFERENCE_TEXTS[bundle.references]}",
        f"- Decision: {describe_decision(measured)}",
        "",
        "`SHA256SUMS` has the checksums of all files. `adapters/probe.json` has the answers of every adapter to a "
        "fixed probe. With them, echo-ft proves that an adapter has its effect. "
        + ("" if bundle.references == "none" else "`prompts.json` shows the prompts of all roles for one image."),
        "",
        "## Measured results",
        "",
        *(_results(measured.report) if measured else ["None. Export with `--report` to add those of a run.", ""]),
        "## Fidelity",
        "",
        "Every part was reloaded, and its logits on a probe were compared with those of the trained adapter. The RMS",
        "error is relative to the adapter's own changes to the base model's logits.",
        "",
        "| part | largest difference | relative RMS error |",
        "|---|---|---|",
        *(
            f"| {part} | {difference:.2g} | {bundle.share_of_the_update[part]:.2%} |"
            for part, difference in bundle.largest_logit_difference.items()
        ),
        "",
        *(f"`merged/{role}` is missing: {reason}\n" for role, reason in bundle.not_merged.items()),
        "## Use",
        "",
        "- echo-ft: `python -m evaluation.inspect IMAGE --bundle .`, or `Inspector.from_bundle` in Python. A run on a",
        "  dataset takes the folder `adapters`: `python -m evaluation.run --config ... --adapters adapters`.",
        "- PEFT: load an adapter with `PeftModel.from_pretrained(base, 'adapters/decision_maker')`.",
        *serving_lines(loras, merged, card, merge_size, references),
        "## Licences",
        "",
        *(f"- {part}: {note}" for part, note in bundle.licences.items()),
        "",
    ]
    return "\n".join(lines)


def _results(report: Mapping[str, Any]) -> list[str]:
    """Return a table of the strict accuracies of a report, and the detection scores, with 95% intervals."""
    run, row = report["provenance"], report["tables"]["strict"]["Average"]
    intervals = report["intervals"]["strict"].get("Average", {})
    questions = sum(counts["questions"] for counts in report["kinds"].values())
    lines = [
        f"The run has answers to {questions} questions of MMAD's types about {report['counts']['images']} images of "
        f"the split `{run['split']}` of `{run['dataset']}`. Unparsed answers count as wrong.",
        "",
        "| strict accuracy | % | 95% interval |",
        "|---|---|---|",
        *(
            f"| {kind} | {value:.1f} | {_interval(intervals.get(kind))} |"
            for kind, value in row.items()
            if value is not None
        ),
        "",
    ]
    detection = report["detection"].get("All", {})
    scores = [name for name in ("auroc", "recall", "specificity") if detection.get(name) is not None]
    if scores:
        lines += ["| detection | value | 95% interval |", "|---|---|---|"]
        found = detection.get("intervals", {})
        lines += [f"| {name} | {detection[name]:.3f} | {_interval(found.get(name), 3)} |" for name in scores]
        lines += [""]
    return lines + [f"Warning: {warning}\n" for warning in report["warnings"]]


def _interval(bounds: Any, digits: int = 1) -> str:
    """Return an interval as text; a report has none if there are too few parts."""
    return f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}" if bounds else "too few parts"
