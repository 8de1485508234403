"""Adapters on disk: their cards, the checks before a run, and attaching them to a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from echo_ft.data.dataset import Dataset
from echo_ft.errors import EchoError
from echo_ft.experts.roles import PROMPT_VERSION
from echo_ft.files import flush, write_json, write_text
from echo_ft.inputs import from_dict, read_json_object
from echo_ft.model.adapter_layers import act_when_switched_on, check_patterns, check_weights
from echo_ft.model.loading import base_fingerprint, checkpoint_dtype, load_model, why_unusable
from echo_ft.provenance import commit, digests_of, fingerprint_files, require_sealed, same_weights, versions, write_sums
from echo_ft.records import ROLES

ADAPTER_CARD = "echo_ft.json"
"""File in an adapter's folder that holds its card."""


ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
"""Files from which PEFT loads an adapter."""


SAVE_REMEDY = "copy it again, or train it again"


@dataclass(frozen=True)
class AdapterCard:
    """How an adapter was trained. The card is stored in the adapter's folder."""

    role: str
    base_model: str
    base_revision: str
    base_fingerprint: str
    prompt_version: str
    min_pixels: int
    max_pixels: int
    dataset: str
    dataset_fingerprint: str
    routing: str
    """The experts that the dataset's rows consult for each question type."""
    versions: dict[str, str]
    commit: str
    leaks: dict[str, str] = field(default_factory=dict)
    """Verdicts of data_prep.audit, keyed by the fingerprint of the dataset that the training data overlap."""
    corrupted_share: float = 0.0
    """Fraction of the training cases whose query is corrupted."""
    synthetic: dict[str, int] = field(default_factory=dict)
    """Number of training images with a synthetic defect, per method."""
    upstream: str = "gold"
    """The outputs of earlier roles in the dataset's rows: `gold` or `predicted`."""
    quantization: str = ""
    """`4bit` or `8bit` if training quantized the base model; runs and exports load it unquantized."""
    mask_loss: float = 0.0
    """Weight of the mask loss relative to the loss of the completions."""
    adapt_from: str = "prefix"
    """Where the adapter begins to act, one of rows.ADAPT_FROM."""
    invocation_tokens: list[int] = field(default_factory=list)
    """For an adapter that acts from the answer on, the tokens at which it begins to act."""
    best_step: int = 0
    """Step of the checkpoint that load_best_model_at_end chose; 0 if these are the weights of the last step."""
    cases: int = 0
    """Number of training cases; 0 in cards of older versions."""
    training: dict[str, Any] = field(default_factory=dict)
    """The options that decide what is learnt (echo_ft.training.option_changes); empty in cards of older versions."""
    resumed: list[str] = field(default_factory=list)
    """The options that were changed when training resumed, one sentence each."""


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk."""

    path: Path
    card: AdapterCard
    fingerprint: str
    """Hash of the complete ADAPTER_FILES. It identifies the adapter; the card only describes its training."""


def audit_leaks(dataset: Dataset) -> dict[str, str]:
    """Return the leaks that data_prep.audit found, keyed by the fingerprint of the dataset that `dataset` overlaps."""
    audits = dataset.manifest.get("audits", {})
    return {name: str(found.get("verdict")) for name, found in audits.items() if found.get("leak")}


def make_card(
    role: str,
    base_model: str,
    revision: str | None,
    min_pixels: int,
    max_pixels: int,
    dataset: Dataset,
    corrupted_share: float = 0.0,
    quantization: str = "",
    mask_loss: float = 0.0,
    training: Mapping[str, Any] | None = None,
    adapt_from: str = "prefix",
    invocation_tokens: Sequence[int] = (),
) -> AdapterCard:
    """Make the card for an adapter that is being trained with the current code and packages.

    `training` holds JSON values. `invocation_tokens` is RowBuilder.generation_prompt if the adapter acts from the
    answer on.

    Raises EchoError if the base model's weights are not found (`base_fingerprint`).
    """
    return AdapterCard(
        role=role,
        base_model=base_model,
        base_revision=revision or "main",
        base_fingerprint=base_fingerprint(base_model, revision),
        prompt_version=PROMPT_VERSION,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        dataset=str(dataset.folder),
        dataset_fingerprint=dataset.fingerprint,
        routing=dataset.manifest["config"]["routing"],
        versions=versions(),
        commit=commit(),
        leaks=audit_leaks(dataset),
        corrupted_share=corrupted_share,
        synthetic=dataset.manifest.get("counts", {}).get("synthetic", {}),
        upstream=dataset.manifest.get("upstream", "gold"),
        quantization=quantization,
        mask_loss=mask_loss,
        adapt_from=adapt_from,
        invocation_tokens=list(invocation_tokens),
        training=dict(training or {}),
    )


def write_card(folder: Path, card: AdapterCard) -> None:
    """Write a README.md with the card's facts into the adapter's folder, the checksums of its files, and the card.

    An adapter that acts from the answer on becomes an aLoRA in PEFT's format, whose weights are those of a LoRA. The
    card comes last, because it marks the adapter as complete.
    """
    if card.invocation_tokens:
        config = folder / "adapter_config.json"
        write_json(config, read_json_object(config) | {"alora_invocation_tokens": card.invocation_tokens})
    write_text(folder / "README.md", _readme(card))  # this replaces the template that PEFT or TRL writes
    text = json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n"
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".jinja"))
    names = [name for name in names if name not in (ADAPTER_CARD, "trainer_state.json")]
    for name in names:
        flush(folder / name)
    write_sums(folder, {**digests_of(folder, names), ADAPTER_CARD: hashlib.sha256(text.encode()).hexdigest()})
    write_text(folder / ADAPTER_CARD, text)


def _readme(card: AdapterCard) -> str:
    fields = asdict(card)
    fields |= fields.pop("training")
    facts = {name: value for name, value in fields.items() if value not in ({}, [], None, 0.0, "")}
    table = "\n".join(f"| {name} | {json.dumps(value, ensure_ascii=False)} |" for name, value in facts.items())
    verdicts = "".join(f"\n**{verdict}**\n" for verdict in card.leaks.values())
    return (
        f"---\nbase_model: {card.base_model}\n---\n\n# {card.role}\n\nOne of the four experts of echo-ft, fine-tuned "
        f"from `{card.base_model}` on `{card.dataset}`. It expects the prompt version and the pixel budget in the "
        "table below. `python -m evaluation.run --adapters FOLDER` checks both before a run.\n"
        f"{_where_it_acts(card)}{verdicts}\n| field | value |\n|---|---|\n{table}\n"
    )


def _where_it_acts(card: AdapterCard) -> str:
    if card.adapt_from == "prefix":
        return ""
    plain = "PEFT does the same." if card.adapt_from == "answer" else "PEFT alone also applies it to the images."
    return (
        f"\nIt acts from the {card.adapt_from} on: the base model computes the images and what all questions share. "
        f"{plain}\n"
    )


def read_card(folder: Path) -> AdapterCard:
    """Read the card of the adapter, or of the fully fine-tuned model, in `folder`.

    Raises EchoError if there is no adapter or no readable card.
    """
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise EchoError(f"there is no adapter in {folder}; train one with `python -m train.launch train/sft.py`")
    try:
        return from_dict(AdapterCard, read_json_object(folder / ADAPTER_CARD))
    except (OSError, ValueError, TypeError) as error:
        raise EchoError(
            f"{folder} has no readable {ADAPTER_CARD} ({error}); train the adapter with train/sft.py, and use it "
            "once training has finished"
        ) from error


def find_adapters(
    folder: Path, base_model: str, base_weights: str | None, min_pixels: int, max_pixels: int
) -> dict[str, Adapter]:
    """Find the adapters of the four roles under `folder`, one subfolder per role, and check them against the run.

    `base_weights` is the base model's `base_fingerprint`. If it is None because a server holds the weights, the
    adapters must only agree with each other. Raises EchoError if an adapter is missing, or if its role, base model,
    prompt version or pixel budget differs.
    """
    if not folder.is_dir():
        raise EchoError(f"there is no folder {folder}; train/sft.py writes adapters, one folder per role")
    found: dict[str, Adapter] = {}
    for role in ROLES:
        path = folder / role
        if not path.is_dir():
            raise EchoError(f"{folder} has no adapter for {role}; train it, or omit --adapters to run the base model")
        card = read_card(path)
        require_sealed(path, SAVE_REMEDY)
        if (path / "config.json").is_file():
            raise EchoError(
                f"{path} is a full model, not an adapter; pass it as model_name_or_path and omit --adapters"
            )
        if card.role != role:
            raise EchoError(
                f"{path} holds an adapter for {card.role}, not {role}; put each adapter into its role's folder"
            )
        base_weights = base_weights or card.base_fingerprint
        if not same_weights(card.base_fingerprint, base_weights):
            raise EchoError(
                f"{path} was trained on a different base model ({card.base_model}, weights {card.base_fingerprint}) "
                f"than {base_model} (weights {base_weights}); run it with its own base model"
            )
        _require_match(path, card, min_pixels, max_pixels)
        files = [path / name for name in ADAPTER_FILES]
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise EchoError(f"{path} has no {missing.name}; train the adapter with train/sft.py, which writes it")
        found[role] = Adapter(path, card, fingerprint_files(files, path))
    return found


def tuned_base(base_model: str, min_pixels: int, max_pixels: int) -> Adapter | None:
    """Return the base model as an `Adapter` if echo-ft trained it (full fine-tuning or a merged adapter), else None.

    Raises EchoError if its prompt version or pixel budget differs from the run's.
    """
    path = Path(base_model)
    if not (path / ADAPTER_CARD).is_file():
        return None
    card = read_card(path)
    require_sealed(path, SAVE_REMEDY)
    _require_match(path, card, min_pixels, max_pixels)
    return Adapter(path, card, base_fingerprint(base_model))


def _require_match(path: Path, card: AdapterCard, min_pixels: int, max_pixels: int) -> None:
    run = {"prompt_version": PROMPT_VERSION, "min_pixels": min_pixels, "max_pixels": max_pixels}
    for name, required in run.items():
        trained = getattr(card, name)
        remedy = "retrain it with this code" if name == "prompt_version" else f"set {name} to {trained}"
        if trained != required:
            raise EchoError(f"{path} was trained with {name} {trained}, but this run uses {required}; {remedy}")


def require_whole_prompt(adapters: Mapping[str, Adapter], user: str) -> None:
    """Raise EchoError if one of the `adapters` acts only after the prefix. `user` applies adapters to whole prompts."""
    for role, adapter in adapters.items():
        if adapter.card.adapt_from != "prefix":
            raise EchoError(
                f"{adapter.path} acts only from the {adapter.card.adapt_from} on (adapt_from), but {user} applies an "
                f"adapter to the whole prompt; train {role} with adapt_from: prefix, or use the folder of adapters "
                "with a local model: evaluation.run, or Inspector.from_adapters"
            )


def load_to_answer(
    model_name_or_path: str, revision: str | None, dtype: str, adapters: Mapping[str, Path], **options: Any
) -> Any:
    """Load a base model to answer with, and attach one adapter per role if there are `adapters`.

    In a 16-bit `dtype`, the vision tower keeps float32 if the model's config names it for the tower, except with flash
    attention, which needs 16 bits. echo-tiny's config names it, because its tower is sensitive to rounding
    (docs/experiments.md). Those of the published models do not. `options` are passed to `load_model`. Raises EchoError
    if `load_model` or `attach_adapters` does.
    """
    model = load_model(model_name_or_path, revision, dtype, **options)
    flash = "flash" in str(options.get("attn_implementation"))
    if dtype != "float32" and not flash and checkpoint_dtype(model_name_or_path, revision, tower=True) == "float32":
        model.model.visual.float()
    return attach_adapters(model, adapters)


def attach_adapters(model: Any, adapters: Mapping[str, Path]) -> Any:
    """Attach one LoRA adapter per role to a single base model, named after the role; `set_adapter(role)` switches.

    Adapters take the dtype of the base model. PEFT would load them in float32 and widen every activation of a bfloat16
    model: 5.6 GiB at 7B. The attribute `adapt_from` of the result says where each role's adapter begins to act. Raises
    EchoError if an adapter has no card, or if its weights do not fit the model exactly.
    """
    from peft import PeftModel

    starts = {role: read_card(path).adapt_from for role, path in adapters.items()}
    for role, path in adapters.items():
        try:
            check_patterns(path, (name for name, _ in model.named_modules()))
            if isinstance(model, PeftModel):
                result = model.load_adapter(
                    str(path), adapter_name=role, low_cpu_mem_usage=True, autocast_adapter_dtype=False
                )
                missing = [key for key in result.missing_keys if f".{role}." in key]
                if missing or result.unexpected_keys:
                    unexpected = [*result.unexpected_keys, *missing]
                    raise ValueError(
                        f"{len(missing)} weights missing, {len(result.unexpected_keys)} unexpected, such as "
                        f"{unexpected[0]}"
                    )
            else:
                model = PeftModel.from_pretrained(model, str(path), adapter_name=role, autocast_adapter_dtype=False)
            check_weights(model, role, path)
            act_when_switched_on(model, role)
        except (MemoryError, EchoError):
            raise
        except Exception as error:
            raise EchoError(
                f"the adapter in {path} does not fit the base model: {why_unusable(error)}; train it again, or use its "
                "own base model"
            ) from error
    model.adapt_from = starts
    return model.eval()


def gather_adapter(model: Any, device: Any) -> dict[str, Any]:
    """Return the trained weights of a model that FSDP2 shards, in main memory; empty in all but the first process.

    Every process must call this. The weights are gathered on `device`, one at a time. torch (2.15) could skip the
    frozen ones too (`ignore_frozen_params`), but would gather a tied output layer.
    """
    import torch.distributed as dist

    gathered = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        if weight.requires_grad:
            whole = weight.detach().to(device).full_tensor()
            if dist.get_rank() == 0:
                gathered[name] = whole.cpu()
    return gathered
