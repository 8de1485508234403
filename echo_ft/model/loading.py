"""Load the base model and its processor, and fingerprint its weights."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from types import MethodType
from typing import Any

from PIL import Image

from echo_ft.errors import EchoError
from echo_ft.inputs import open_input, read_json_object, restore
from echo_ft.provenance import fingerprint_bytes
from echo_ft.strict_yaml import read_json

PARAMETER_GROUPS = ("language model", "vision tower", "merger")
"""Parts of Qwen2-VL that can have their own learning rate."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Data types for the weights; `auto` is the type in the checkpoint."""


def parameter_group(name: str) -> str:
    """Return the part of the model, one of PARAMETER_GROUPS, to which the parameter `name` belongs."""
    if ".merger." in name:
        return "merger"
    return "vision tower" if ".visual." in name else "language model"


def check_lora_targets(model: Any, targets: list[str] | str) -> list[str]:
    """Check that `targets`, in PEFT's format, are linear layers of `model`, and return their names.

    A name in a list matches the end of a module's name. PEFT itself ignores a name without a match if another name has
    one. A string is `all-linear` (every linear layer but the output layer, including the vision tower and the merger)
    or a regular expression for full names. A string that is just a name counts as a list, because TRL (1.16) turns
    `[q_proj]` into `q_proj`. For `all-linear` and patterns, the result has the shortest names that match the same
    modules.

    Raises EchoError if a target matches no module, with the nearest valid name, or if it also matches the output layer
    or a module that is not linear (Qwen2-VL has a convolution named `proj`).
    """
    import torch

    modules = {name: module for name, module in model.named_modules() if name}
    linear = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    output = {name for name in linear if modules[name] is model.get_output_embeddings()}
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return _shortest_names(linear - output, modules)
    pattern = isinstance(targets, str) and re.search(r"[][()*+?|\\^$]", targets) is not None
    names = [targets] if isinstance(targets, str) else list(targets)
    matched: list[str] = []
    for target in names:
        found = _matches(target, modules, pattern)
        if not found:
            known = {".".join(name.split(".")[-size:]) for name in linear for size in (1, 2, 3)}
            near = difflib.get_close_matches(target, sorted(known), n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else "the language model has q_proj, k_proj, v_proj, ..."
            raise EchoError(f"lora_target_modules: the model has no module {target}; {hint}")
        other = next((name for name in found if name not in linear - output), None)
        if other is not None:
            # TRL (1.16) computes the loss from the weights of the output layer, so an adapter there would not learn.
            kind = "the output layer" if other in output else f"a {type(modules[other]).__name__}"
            raise EchoError(
                f"lora_target_modules: {target} also matches {other}, {kind}; name only other linear layers, such as "
                "attn.proj"
            )
        matched += found
    return _shortest_names(matched, modules) if pattern else names


def _matches(target: str, modules: Iterable[str], pattern: bool) -> list[str]:
    if not pattern:
        return [name for name in modules if name == target or name.endswith(f".{target}")]
    try:
        return [name for name in modules if re.fullmatch(target, name)]
    except re.error as error:
        raise EchoError(f"lora_target_modules: {target} is not a regular expression ({error}); correct it") from error


def _shortest_names(chosen: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Return the shortest readable endings of names that match all `chosen` modules and no other module."""

    def endings(name: str) -> list[str]:
        parts = name.split(".")
        # A name that ends in a number keeps three parts, such as merger.mlp.0.
        last = len(parts) - (3 if parts[-1].isdigit() else 1)
        return [".".join(parts[start:]) for start in range(last, -1, -1) if not parts[start].isdigit()]

    chosen = set(chosen)
    others = {ending for name in modules if name not in chosen for ending in endings(name)}
    return sorted({next((ending for ending in endings(name) if ending not in others), name) for name in chosen})


CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)
"""The JSON files from which transformers builds a model and its processor."""

CODE_KEYS = ("auto_map", "custom_generate", "custom_pipelines", "trust_remote_code")
"""Keys of CONFIG_FILES that make transformers (5.23) load code from a model folder."""

_PROBE_SIDE = 56
"""Side length in pixels of a small image that every processor accepts."""

TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of CONFIG_FILES that hold one or several token ids."""

ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
"""Keys of config.json that make transformers (5.23) fetch attention code from the hub."""

MAX_LAYERS = 1000
"""Largest accepted number of layers. Building the modules of a million layers would take hours."""


def check_config_files(folder: Path) -> None:
    """Raise EchoError if a config file of a model folder is broken, loads code, or describes a model of absurd size."""
    for path in (folder / name for name in CONFIG_FILES):
        if not path.is_file():
            continue
        try:
            parts = [read_json_object(path)]
        except (OSError, ValueError) as error:
            raise EchoError(
                f"{folder} has no usable {path.name} ({error}); copy or download the model again"
            ) from error
        for part in parts:  # grows
            parts += [value for value in part.values() if isinstance(value, dict)]
            for key in CODE_KEYS:
                if part.get(key):
                    raise EchoError(f"{path} has the key {key!r}, which loads code; use a model without custom code")
            for key in ATTENTION_KEYS:
                if part.get(key) not in (None, "eager", "sdpa"):
                    raise EchoError(f"{path} sets {key} to {part[key]!r}, which may load code; remove the key")
            for key in TOKEN_KEYS:
                numbers = part.get(key)
                numbers = numbers if isinstance(numbers, list) else [numbers]
                if not all(number is None or type(number) is int for number in numbers):
                    raise EchoError(f"{path} sets {key} to {part[key]!r}; use the config of a Qwen2-VL model")
            for key in ("num_hidden_layers", "depth"):
                value = part.get(key, 1)
                if type(value) is not int or not 1 <= value <= MAX_LAYERS:
                    raise EchoError(f"{path} sets {key} to {value!r}; use the config of a Qwen2-VL model")


def why_unusable(error: Exception) -> str:
    """Return the first line of an error from transformers, PEFT or safetensors, which raise many kinds of errors."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def load_processor(model_name_or_path: str, revision: str | None, min_pixels: int, max_pixels: int) -> Any:
    """Load the model's processor and set its pixel budget, in pixels per image after resizing.

    Raises EchoError if the budget is invalid, or if the processor cannot be loaded or ignores the budget.
    """
    from transformers import AutoProcessor

    if not 0 < min_pixels <= max_pixels:
        raise EchoError(f"min_pixels {min_pixels} and max_pixels {max_pixels}: choose 0 < min_pixels <= max_pixels")
    processor = _from_hub(
        AutoProcessor,
        model_name_or_path,
        revision=revision,
        size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
        # The published processors set these two, which override `size`.
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )
    size = processor.image_processor.size
    if (size["shortest_edge"], size["longest_edge"]) != (min_pixels, max_pixels):
        raise EchoError(f"the processor of {model_name_or_path} ignores the pixel budget; use a Qwen2-VL model")
    try:
        processor.image_processor(Image.new("RGB", (_PROBE_SIDE, _PROBE_SIDE)))
    except Exception as error:  # a processor's config sets the arguments of many functions, so any error may occur
        raise EchoError(
            f"the processor of {model_name_or_path} cannot process an image ({why_unusable(error)}); copy or download "
            "the model again"
        ) from error
    return processor


def load_model(model_name_or_path: str, revision: str | None = None, dtype: str = "auto", **options: Any) -> Any:
    """Load the base model from a local folder or the hub, from safetensors and without remote code.

    `options` are passed to `from_pretrained` (`attn_implementation`, `quantization_config`, ...). Raises EchoError if
    `dtype` is not in DTYPES, if the model cannot be loaded, if a tensor is missing or unexpected, or if a weight is not
    finite.
    """
    if dtype not in DTYPES:
        raise EchoError(f"dtype cannot be {dtype!r}; choose from {', '.join(DTYPES)}")
    from transformers import AutoModelForImageTextToText

    options |= {"revision": revision, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    model, found = _from_hub(AutoModelForImageTextToText, model_name_or_path, **options)
    for problem in ("missing", "unexpected"):
        names = sorted(found[f"{problem}_keys"])
        if names:
            raise EchoError(
                f"{model_name_or_path} has {len(names)} {problem} tensors (first: {names[0]}); copy or download it "
                "again, or use a Qwen2-VL model"
            )
    require_finite(model.named_parameters(), model_name_or_path)
    return model


def require_finite(weights: Iterable[tuple[str, Any]], source: Path | str) -> None:
    """Raise EchoError if a named weight of a model or adapter, from `source`, is NaN or infinite."""
    for name, weight in weights:
        # Quantized weights are integers, weights under ZeRO-3 are spread over processes, and those of a plan have no
        # values.
        if weight.is_floating_point() and weight.numel() and not weight.is_meta:
            low, high = weight.detach().aminmax()
            if not bool(low.isfinite() & high.isfinite()):
                raise EchoError(f"{source} has a weight that is not a finite number, in {name}; copy or train it again")


def project_patches(model: Any) -> None:
    """Replace the convolution of a Qwen2-VL's patch embedding with a matrix product, which differs only in rounding.

    The convolution has a single position, because each patch is a separate input. For this case, torch (2.15) takes
    five times as long on a CPU: 16% of a training step with one question per case. On GPUs, torch 2.9 was reported to
    take 10 to 20 times as long in bfloat16 (pytorch #174051). Remove this workaround once torch treats this case as a
    matrix product.
    """
    convolution = model.model.visual.patch_embed.proj
    convolution.forward = MethodType(_project, convolution)


def _project(convolution: Any, patches: Any) -> Any:
    from torch.nn.functional import linear

    return linear(patches.flatten(1), convolution.weight.flatten(1), convolution.bias)


def _from_hub(auto: Any, model_name_or_path: str, **options: Any) -> Any:
    local = Path(model_name_or_path)
    # The folder of a bundle's processor has no config.json.
    if local.is_dir() and not any((local / name).is_file() for name in ("config.json", "processor_config.json")):
        raise EchoError(f"{local} has no config.json; set model_name_or_path to a model folder or a hub name")
    if not local.is_dir() and (model_name_or_path.count("/") != 1 or model_name_or_path.startswith((".", "/"))):
        raise EchoError(f"there is no model folder {local}; set model_name_or_path to a model folder or a hub name")
    if local.is_dir():
        check_config_files(local)
    try:
        return auto.from_pretrained(model_name_or_path, trust_remote_code=False, **options)
    except MemoryError:
        raise
    except Exception as error:
        raise EchoError(
            f"{model_name_or_path} could not be loaded ({why_unusable(error)}); check the name and the connection, or "
            "download it with `hf download` and pass its folder"
        ) from error


def checkpoint_dtype(model_name_or_path: str, revision: str | None = None, tower: bool = False) -> str:
    """Return the dtype that a checkpoint's config names, such as `bfloat16`; `float32` if it names none.

    With `tower`, return the one that it names for the vision tower, or an empty string if it names none.
    """
    from transformers import AutoConfig

    config = _from_hub(AutoConfig, model_name_or_path, revision=revision)
    named = config.vision_config.dtype or "" if tower else config.dtype or "float32"
    return str(named).removeprefix("torch.")


def indexed_files(index: Path) -> list[str]:
    """Return the names of the weight files in model.safetensors.index.json. Raises EchoError if it is broken."""
    try:
        return sorted(set(restore(dict[str, str], read_json_object(index)["weight_map"]).values()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EchoError(f"{index} does not list the weight files ({error}); copy or download it again") from error


def base_fingerprint(model_name_or_path: str, revision: str | None = None) -> str:
    """Fingerprint a base model's weights cheaply: two groups of 16 hex digits, joined by a hyphen.

    The first comes from the header and both ends of each safetensors file, the second from the first 4 KiB of each
    tensor. A merged adapter changes no tensor at the ends. Compare fingerprints with `provenance.same_weights`, because
    older versions recorded only the first group.

    Raises EchoError if the model is not found, if a weight file is missing, truncated or not in safetensors format, or
    if the weight index is invalid.
    """
    from transformers.utils import cached_file

    def find(name: str) -> Path | None:
        try:
            found = cached_file(
                model_name_or_path, name, revision=revision, _raise_exceptions_for_missing_entries=False
            )
        except (OSError, ValueError) as error:  # huggingface_hub (1.x) raises a ValueError for an invalid name
            reason = f"{name} of {model_name_or_path} is not found ({why_unusable(error)})"
            raise EchoError(f"{reason}; give a model folder or a hub name") from error
        return None if found is None else Path(found)

    index = find("model.safetensors.index.json")
    names = indexed_files(index) if index else ["model.safetensors"]
    ends, slices = [], []
    for name in names:
        path = find(name)
        if path is None:
            if Path(model_name_or_path).is_dir():
                raise EchoError(f"{model_name_or_path} has no {name}; convert the weights to safetensors")
            raise EchoError(
                f"{name} of {model_name_or_path} is not on this machine; connect to the internet once to download it, "
                "or use a model with safetensors weights"
            )
        with open_input(path) as file:
            size, header = path.stat().st_size, file.read(8)
            length = int.from_bytes(header, "little")
            if len(header) + length > size:
                raise EchoError(f"{path} is truncated or not a safetensors file; copy or download it again")
            header += file.read(length)
            start = file.read(1 << 16)
            file.seek(max(len(header), size - (1 << 16)))
            ends.append(header + start + file.read())
            for first, last in _tensor_bytes(path, header, size):
                file.seek(first)
                slices.append(file.read(min(last - first, _SLICE)))
    return f"{fingerprint_bytes(*ends)}-{fingerprint_bytes(*slices)}"


_SLICE = 4096
"""Number of bytes of each tensor that `base_fingerprint` reads."""


def _tensor_bytes(path: Path, header: bytes, size: int) -> list[tuple[int, int]]:
    """Return where each tensor of a safetensors file starts and ends. Raises EchoError if the header is not usable."""
    try:
        entries = read_json(header[8:].decode(), unique_keys=False).items()
        offsets = [one["data_offsets"] for name, one in entries if name != "__metadata__"]
        places = sorted(
            (len(header) + first, len(header) + last) for first, last in restore(list[tuple[int, int]], offsets)
        )
        if any(not len(header) <= first <= last <= size for first, last in places):
            raise ValueError("a tensor is not in the file")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EchoError(f"{path} is truncated or not a safetensors file; copy or download it again") from error
    return places
