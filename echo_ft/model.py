"""Loading: base model, processor and adapters, with what must agree checked before anything runs."""

from __future__ import annotations

import difflib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from echo_ft.dataset import Dataset, load_dataset
from echo_ft.provenance import commit, content_hash, fingerprint_bytes, fingerprint_files, versions
from echo_ft.records import ROLES, EchoError, Inspection, from_dict, read_jsonl, write_whole
from echo_ft.roles import PROMPT_VERSION

GROUPS = ("language model", "vision tower", "merger")
"""Parts of Qwen2-VL that can be tuned with a learning rate of their own."""

ADAPTER_CARD = "echo_ft.json"
"""The file in an adapter's folder that says what the adapter is."""

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
"""What PEFT makes an adapter of."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Types of weights that models are run in; `auto` is the checkpoint's own."""


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


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk."""

    path: Path
    card: AdapterCard
    fingerprint: str
    """Over ADAPTER_FILES in full: the card says how an adapter was trained, this says which one it is."""


def part_of(name: str) -> str:
    """Which of GROUPS a parameter belongs to, by its name."""
    if ".merger." in name:
        return "merger"
    return "vision tower" if ".visual." in name else "language model"


def check_targets(model: Any, names: list[str] | str) -> list[str]:
    """`names` as a list, every one of which finds linear layers of `model`, by PEFT's rule: the end of a module's name.

    PEFT itself passes over names that find nothing where another does. A single name counts as a list of one: TRL
    (1.16) turns `[q_proj]` into `q_proj`, which PEFT reads as a pattern for whole names; while it does, this undoes it.
    Raises EchoError naming the first that finds nothing, with the nearest that would, and the first that finds
    something else than a linear layer (Qwen2-VL's `proj` is also a convolution).
    """
    import torch

    modules = {name: module for name, module in model.named_modules() if name}
    linear = [name.split(".") for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    known = {".".join(parts[-size:]) for parts in linear for size in (1, 2, 3)}
    names = [names] if isinstance(names, str) else list(names)
    for wanted in names:
        found = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        if not found:
            near = difflib.get_close_matches(wanted, sorted(known), n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else "the language model's are q_proj, k_proj, v_proj, ..."
            raise EchoError(f"lora_target_modules: the model has no module {wanted}; {hint}")
        other = next((name for name in found if not isinstance(modules[name], torch.nn.Linear)), None)
        if other is not None:
            kind = type(modules[other]).__name__
            raise EchoError(
                f"lora_target_modules: {wanted} also finds {other}, a {kind}; name linear layers alone, "
                "such as attn.proj"
            )
    return names


def load_processor(model_name_or_path: str, revision: str | None, min_pixels: int, max_pixels: int) -> Any:
    """The model's own processor with this pixel budget (pixels of one image, after resizing)."""
    from transformers import AutoProcessor

    if not 0 < min_pixels <= max_pixels:
        raise EchoError(f"min_pixels {min_pixels} and max_pixels {max_pixels}: need 0 < min_pixels <= max_pixels")
    processor = _from_hub(
        AutoProcessor,
        model_name_or_path,
        revision=revision,
        size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
    )
    size = processor.image_processor.size
    if (size["shortest_edge"], size["longest_edge"]) != (min_pixels, max_pixels):
        raise EchoError(f"the processor of {model_name_or_path} did not take the pixel budget; is it a Qwen2-VL model?")
    return processor


def load_model(model_name_or_path: str, revision: str | None = None, dtype: str = "auto", **options: Any) -> Any:
    """The base model from a local folder or the hub; safetensors only, no remote code.

    `options` go to `from_pretrained` (`attn_implementation`, `quantization_config`, ...). Raises EchoError for a dtype
    that is none of DTYPES.
    """
    if dtype not in DTYPES:
        raise EchoError(f"dtype cannot be {dtype!r}; choose from {', '.join(DTYPES)}")
    from transformers import AutoModelForImageTextToText

    return _from_hub(
        AutoModelForImageTextToText, model_name_or_path, revision=revision, dtype=dtype, use_safetensors=True, **options
    )


def _from_hub(auto: Any, model_name_or_path: str, **options: Any) -> Any:
    local = Path(model_name_or_path)
    if local.is_dir() and not (local / "config.json").is_file():
        raise EchoError(f"{local} has no config.json; model_name_or_path takes a model's folder or a hub name")
    if not local.is_dir() and (model_name_or_path.count("/") != 1 or model_name_or_path.startswith((".", "/"))):
        raise EchoError(f"there is no model folder {local}; model_name_or_path takes a model's folder or a hub name")
    try:
        return auto.from_pretrained(model_name_or_path, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EchoError(
            f"{model_name_or_path} could not be loaded ({reason}); check the name and the connection, or download it "
            "with `hf download` and give its folder"
        ) from error


def base_fingerprint(model_name_or_path: str, revision: str | None = None) -> str:
    """Tells base models apart by their weights, cheaply: the header and both ends of each safetensors file."""
    from transformers.utils import cached_file

    def find(name: str) -> Path | None:
        found = cached_file(model_name_or_path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    index = find("model.safetensors.index.json")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index else ["model.safetensors"]
    chunks = []
    for name in names:
        path = find(name)
        if path is None:
            raise EchoError(f"{model_name_or_path} has no {name}; weights must be safetensors")
        with open(path, "rb") as file:
            header = file.read(8)
            header += file.read(int.from_bytes(header, "little"))
            start = file.read(1 << 16)
            file.seek(max(len(header), path.stat().st_size - (1 << 16)))
            chunks.append(header + start + file.read())
    return fingerprint_bytes(*chunks)


def make_card(
    role: str,
    base_model: str,
    revision: str | None,
    min_pixels: int,
    max_pixels: int,
    dataset: Dataset,
    corrupted_share: float = 0.0,
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
        leaks={name: found["verdict"] for name, found in dataset.manifest.get("audits", {}).items() if found["leak"]},
        corrupted_share=corrupted_share,
        synthetic=dataset.manifest.get("counts", {}).get("synthetic", {}),
        upstream=dataset.manifest.get("upstream", "gold"),
    )


def write_card(folder: Path, card: AdapterCard) -> None:
    """Put the card into the adapter's folder."""
    write_whole(folder / ADAPTER_CARD, json.dumps(asdict(card), indent=2) + "\n")


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
    folder: Path, base_model: str, revision: str | None, min_pixels: int, max_pixels: int
) -> dict[str, Adapter]:
    """The adapters of the four roles under `folder`, each in a folder of the role's name, checked against the run.

    Raises EchoError where one is missing, is of another role, base model, prompt version or pixel budget.
    """
    if not folder.is_dir():
        raise EchoError(f"there is no folder {folder}; adapters are made by train/sft.py, one folder a role")
    expected = {
        "base_fingerprint": base_fingerprint(base_model, revision),
        "prompt_version": PROMPT_VERSION,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
    }
    found = {}
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
        _require(path, card, expected, base_model)
        files = [path / name for name in ADAPTER_FILES]
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise EchoError(f"{path} has no {missing.name}; weights must be safetensors: train it with train/sft.py")
        found[role] = Adapter(path, card, fingerprint_files(files, path))
    return found


def training_sets(
    adapters: Mapping[str, Adapter], dataset: Dataset, split: str, images: Sequence[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """What the adapters were trained on, for a run's description, and what a reader of the run must be warned of.

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
    for fingerprint, names in roles.items():
        where = adapters[names[0]].card.dataset
        memorised = trained_on(where, fingerprint, dataset.root, images, dataset)
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
        who = f"the adapters of {', '.join(names)}"
        leak = adapters[names[0]].card.leaks.get(dataset.fingerprint)
        if leak:
            warnings.append(leak)
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


def trained_on(
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


def _require(path: Path, card: AdapterCard, expected: Mapping[str, Any], base_model: str) -> None:
    if card.base_fingerprint != expected["base_fingerprint"]:
        raise EchoError(
            f"{path} was trained on another base model ({card.base_model}, weights {card.base_fingerprint}) than "
            f"{base_model} (weights {expected['base_fingerprint']}); use that one"
        )
    for name in ("prompt_version", "min_pixels", "max_pixels"):
        trained, wanted = getattr(card, name), expected[name]
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
    from safetensors import safe_open

    with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    loaded = set(get_peft_model_state_dict(model, adapter_name=role))
    if saved != loaded:
        raise ValueError(f"weights differ, for example {sorted(saved ^ loaded)[0]}")
