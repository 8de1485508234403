"""Adapters on disk: their cards, what must agree with a run before anything starts, and putting them on a model."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from echo_ft.data.dataset import Dataset, load_dataset
from echo_ft.errors import EchoError
from echo_ft.experts.roles import PROMPT_VERSION
from echo_ft.files import from_dict, read_jsonl, write_text
from echo_ft.model.loading import base_fingerprint
from echo_ft.provenance import commit, content_hash, fingerprint_files, versions
from echo_ft.records import ROLES, Inspection

ADAPTER_CARD = "echo_ft.json"
"""The file in an adapter's folder that says what the adapter is."""


ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
"""What PEFT makes an adapter of."""


BASE_MODEL = "the base model"
"""Stands for a role where it is the whole model that was tuned."""


@dataclass(frozen=True)
class AdapterCard:
    """What an adapter was trained for and on; it travels in the adapter's folder."""

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
    """Which experts stood behind each kind of question in the dataset's rows."""
    versions: dict[str, str]
    commit: str
    leaks: dict[str, str] = field(default_factory=dict)
    """What data_prep.audit found, by the fingerprint of the dataset that training overlaps."""
    corrupted_share: float = 0.0
    """Share of the training cases whose query was degraded."""
    synthetic: dict[str, int] = field(default_factory=dict)
    """How many of the dataset's training photographs have a synthetic defect, by the method that made it."""
    upstream: str = "gold"
    """What the dataset's rows show of earlier roles: what they should say (gold), or what they said (predicted)."""
    quantization: str = ""
    """`4bit` or `8bit` where the base was loaded so in training; a run and an export load it whole."""


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk."""

    path: Path
    card: AdapterCard
    fingerprint: str
    """Over ADAPTER_FILES in full: the card says how an adapter was trained, this says which one it is."""


def audit_leaks(dataset: Dataset) -> dict[str, str]:
    """What data_prep.audit found, by the fingerprint of the dataset that training on this one overlaps."""
    return {name: found["verdict"] for name, found in dataset.manifest.get("audits", {}).items() if found["leak"]}


def make_card(
    role: str,
    base_model: str,
    revision: str | None,
    min_pixels: int,
    max_pixels: int,
    dataset: Dataset,
    corrupted_share: float = 0.0,
    quantization: str = "",
) -> AdapterCard:
    """The card of an adapter that is trained now, with this code and these packages."""
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
    )


def write_card(folder: Path, card: AdapterCard) -> None:
    """Put the card into the adapter's folder, and before it a README.md that says the same to people."""
    write_text(folder / "README.md", _readme(card))  # in the place of the template that PEFT or TRL leaves
    write_text(folder / ADAPTER_CARD, json.dumps(asdict(card), indent=2) + "\n")


def _readme(card: AdapterCard) -> str:
    told = asdict(card)
    values = {name: json.dumps(value, ensure_ascii=False) for name, value in told.items() if value not in ({}, 0.0, "")}
    table = "\n".join(f"| {name} | {value} |" for name, value in values.items())
    leaks = "".join(f"\n**{verdict}**\n" for verdict in card.leaks.values())
    return (
        f"---\nbase_model: {card.base_model}\n---\n\n# {card.role}\n\nOne of the four experts of echo-ft, tuned on "
        f"`{card.dataset}` for `{card.base_model}`. It takes the prompts of this version and images within this pixel "
        f"budget; `python -m evaluation.run --adapters FOLDER` checks that.\n{leaks}\n| | |\n|---|---|\n{table}\n"
    )


def read_card(folder: Path) -> AdapterCard:
    """The card of the adapter, or of the whole tuned model, in `folder`. Raises EchoError where there is none."""
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise EchoError(f"there is no adapter in {folder}; train one with `accelerate launch train/sft.py`")
    try:
        return from_dict(AdapterCard, json.loads((folder / ADAPTER_CARD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise EchoError(
            f"{folder} has no readable {ADAPTER_CARD} ({error}); it was not trained by train/sft.py or is not finished"
        ) from error


def find_adapters(
    folder: Path, base_model: str, base_weights: str | None, min_pixels: int, max_pixels: int
) -> dict[str, Adapter]:
    """The adapters of the four roles under `folder`, each in a folder of the role's name, checked against the run.

    `base_weights` is the base model's `base_fingerprint`; None where a server holds it, and the adapters have to agree
    among themselves. Raises EchoError where one is missing, is of another role, base model, prompt version or pixel
    budget.
    """
    if not folder.is_dir():
        raise EchoError(f"there is no folder {folder}; adapters are made by train/sft.py, one folder a role")
    found: dict[str, Adapter] = {}
    for role in ROLES:
        path = folder / role
        if not path.is_dir():
            raise EchoError(
                f"{folder} has no adapter for {role}; train it, or run without --adapters for the base model"
            )
        card = read_card(path)
        if (path / "config.json").is_file():
            raise EchoError(
                f"{path} is a whole model, not an adapter; give it as model_name_or_path, and run without --adapters"
            )
        if card.role != role:
            raise EchoError(
                f"{path} holds an adapter of the role {card.role}, not {role}; put each into its own folder"
            )
        base_weights = base_weights or card.base_fingerprint
        if card.base_fingerprint != base_weights:
            raise EchoError(
                f"{path} was trained on another base model ({card.base_model}, weights {card.base_fingerprint}) than "
                f"{base_model} (weights {base_weights}); use that one"
            )
        _require_fit(path, card, min_pixels, max_pixels)
        files = [path / name for name in ADAPTER_FILES]
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise EchoError(f"{path} has no {missing.name}; weights must be safetensors: train it with train/sft.py")
        found[role] = Adapter(path, card, fingerprint_files(files, path))
    return found


def tuned_base(base_model: str, min_pixels: int, max_pixels: int) -> Adapter | None:
    """The base model where it was itself tuned here (full tuning, a merged adapter); None for any other.

    Raises EchoError where it is of another prompt version or pixel budget.
    """
    path = Path(base_model)
    if not (path / ADAPTER_CARD).is_file():
        return None
    card = read_card(path)
    _require_fit(path, card, min_pixels, max_pixels)
    return Adapter(path, card, base_fingerprint(base_model))


def describe_training_data(
    adapters: Mapping[str, Adapter], dataset: Dataset, split: str, images: Sequence[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """What the adapters, and the tuned `BASE_MODEL`, were trained on, for a run's description, and what to warn readers of.

    `images` are the photographs of `dataset`'s `split` that the run asks about. Those that are in an adapter's train
    split are counted by content, so copies under other names count too. None where that dataset is not there any more
    or was built anew since: then nobody can tell.
    """
    roles: dict[str, list[str]] = defaultdict(list)
    for role, adapter in adapters.items():
        roles[adapter.card.dataset_fingerprint].append(role)
    found, warnings = [], []
    if len(roles) > 1:
        sources = (f"{', '.join(names)} on {fingerprint}" for fingerprint, names in roles.items())
        warnings.append(
            f"the adapters were trained on {len(roles)} different datasets ({'; '.join(sources)}): a part that one has "
            "not seen another may have; train the four roles on one dataset"
        )
    quantized = [role for role, adapter in adapters.items() if adapter.card.quantization]
    if quantized:
        warnings.append(
            f"the adapters of {', '.join(quantized)} were trained on a quantized base and answer on the whole one, "
            "whose weights differ a little: compare with a run of adapters that were trained on the whole one"
        )
    for fingerprint, names in roles.items():
        places = list(dict.fromkeys(adapters[name].card.dataset for name in names))  # a dataset may have moved
        known_of = {where: images_trained_on(where, fingerprint, dataset.root, images, dataset) for where in places}
        where = next((where for where, known in known_of.items() if known is not None), places[0])
        memorised = known_of[where]
        count = None if memorised is None else len(memorised)
        found.append(
            {
                "dataset": where,
                "dataset_fingerprint": fingerprint,
                "roles": names,
                "photographs_trained_on": count,
                "of_photographs": len(images),
            }
        )
        roles_of = ", ".join(name for name in names if name != BASE_MODEL)
        who = " and ".join(
            [*([f"the adapters of {roles_of}"] if roles_of else []), *([BASE_MODEL] if BASE_MODEL in names else [])]
        )
        # An audit may have been made between the training of one role and of another.
        told = dict.fromkeys(adapters[name].card.leaks.get(dataset.fingerprint) for name in names)
        warnings += [leak for leak in told if leak]
        if memorised:
            warnings.append(
                f"{count} OF {len(images)} PHOTOGRAPHS OF THE SPLIT {split} WERE TRAINED ON, such as {memorised[0]}: "
                f"{who} have them in their train split ({where}); figures over them measure memory, so evaluate on "
                "photographs of no training split"
            )
        if fingerprint != dataset.fingerprint:
            known = (
                "that dataset is not there to compare with"
                if count is None
                else "files were compared, and parts photographed again are not told by that"
            )
            warnings.append(
                f"{who} were trained on another dataset ({where}, {fingerprint}) than {dataset.folder} "
                f"({dataset.fingerprint}): photographs of the split {split} may have been trained on; {known}"
            )
    return found, warnings


def images_trained_on(
    where: str, fingerprint: str, root: Path, images: Sequence[str], asked: Dataset | None = None
) -> list[str] | None:
    """Those of `images`, under `root`, that are photographs of the train split of the dataset `where`, by content.

    `asked` is read instead where it is that dataset. None where it is not there any more, or was built anew since.
    """
    try:
        source = asked if asked is not None and asked.fingerprint == fingerprint else load_dataset(Path(where))
        if source.fingerprint != fingerprint:
            return None
        inspections = read_jsonl(source.folder / "inspections.jsonl", Inspection)
        paths = {(source.root / one.image).resolve() for one in inspections if one.split == "train"}
        sizes: dict[int, list[Path]] = defaultdict(list)
        for path in paths:
            sizes[path.stat().st_size].append(path)
        digests: dict[Path, bytes] = {}

        def content(path: Path) -> bytes:
            if path not in digests:
                digests[path] = content_hash(path)
            return digests[path]

        def known(path: Path) -> bool:
            # Files of another size have another content: few are read.
            if path in paths or not path.is_file():
                return path in paths
            return any(content(path) == content(other) for other in sizes.get(path.stat().st_size, ()))

        return [image for image in images if known((root / image).resolve())]
    except (EchoError, OSError, KeyError):
        return None


def _require_fit(path: Path, card: AdapterCard, min_pixels: int, max_pixels: int) -> None:
    run = {"prompt_version": PROMPT_VERSION, "min_pixels": min_pixels, "max_pixels": max_pixels}
    for name, wanted in run.items():
        trained = getattr(card, name)
        remedy = "train it again with this code" if name == "prompt_version" else f"set {name} to {trained}"
        if trained != wanted:
            raise EchoError(f"{path} was trained with {name} {trained}, this run has {wanted}; {remedy}")


def attach_adapters(model: Any, adapters: Mapping[str, Path]) -> Any:
    """One copy of the base model with one named LoRA adapter a role; `set_adapter(role)` switches.

    Raises EchoError where an adapter's weights do not fit the model exactly.
    """
    from peft import PeftModel

    for role, path in adapters.items():
        try:
            if isinstance(model, PeftModel):
                result = model.load_adapter(str(path), adapter_name=role, low_cpu_mem_usage=True)
                missing = [key for key in result.missing_keys if f".{role}." in key]
                if missing or result.unexpected_keys:
                    raise ValueError(f"{len(missing)} weights missing, {len(result.unexpected_keys)} left over")
            else:
                model = PeftModel.from_pretrained(model, str(path), adapter_name=role)
            _check_weights(model, role, path)
        except (ValueError, RuntimeError, OSError) as error:
            raise EchoError(f"the adapter in {path} does not fit the base model: {error}") from error
    return model.eval()


def _check_weights(model: Any, role: str, path: Path) -> None:
    """Every tensor of the file is in the model, and the other way round: nothing loads silently untrained."""
    from peft import get_peft_model_state_dict

    with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    loaded = set(get_peft_model_state_dict(model, adapter_name=role))
    if saved != loaded:
        raise ValueError(f"weights differ, for example {sorted(saved ^ loaded)[0]}")
