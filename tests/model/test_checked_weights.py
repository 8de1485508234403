"""Changed, missing, extra or absurd weights of an adapter or the base model are refused, and the message names them."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from echo_ft.errors import EchoError
from echo_ft.model.adapters import ADAPTER_CARD, ADAPTER_FILES, attach_adapters, find_adapters
from echo_ft.model.loading import base_fingerprint, load_model
from echo_ft.provenance import CHECKSUMS, fingerprint_bytes, same_weights
from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS, make_dataset, random_adapters


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    return random_adapters(root / "adapters", make_dataset(root / "data", train=1, validation=0, test=1))


@pytest.fixture
def adapters(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "adapters")
    return tmp_path / "adapters"


@pytest.mark.parametrize("name", [*ADAPTER_FILES, ADAPTER_CARD, CHECKSUMS])
def test_any_changed_byte_of_an_adapter_is_refused_with_the_name_of_its_file(adapters: Path, name: str) -> None:
    path = adapters / "knowledge_guide" / name
    content, weights = path.read_bytes(), base_fingerprint(str(ECHO_TINY))
    found = find_adapters(adapters, str(ECHO_TINY), weights, MIN_PIXELS, MAX_PIXELS)
    assert len(found) == 4
    for place in random.Random(name).sample(range(len(content)), 8):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(EchoError, match=r"since it was saved|cannot be read|no readable") as refused:
            find_adapters(adapters, str(ECHO_TINY), weights, MIN_PIXELS, MAX_PIXELS)
        assert name == CHECKSUMS or name in str(refused.value)
    path.unlink()
    if name != CHECKSUMS:
        with pytest.raises(EchoError, match=rf"{name} is missing since|no readable {name}|there is no adapter in"):
            find_adapters(adapters, str(ECHO_TINY), weights, MIN_PIXELS, MAX_PIXELS)


def test_merged_models_differ_in_their_fingerprint_although_both_ends_are_equal(tmp_path: Path) -> None:
    content = (ECHO_TINY / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    offsets = [one["data_offsets"] for one in json.loads(content[8:length]).values() if "data_offsets" in one]
    found = []
    for change in (0, 1, 2):
        changed = bytearray(content)
        for first, last in offsets:  # like a merge, which changes tensors between the first and the last
            if first > 1 << 16 and length + last < len(content) - (1 << 16):
                changed[length + first] ^= change
        (tmp_path / "model.safetensors").write_bytes(changed)
        found.append(base_fingerprint(str(tmp_path)))
    assert found[0] == base_fingerprint(str(ECHO_TINY))
    assert len(set(found)) == 3
    assert len({one.partition("-")[0] for one in found}) == 1


def test_an_adapter_of_an_older_version_still_fits_its_base(adapters: Path) -> None:
    content = (ECHO_TINY / "model.safetensors").read_bytes()
    header, size, end = 8 + int.from_bytes(content[:8], "little"), len(content), 1 << 16
    recorded = fingerprint_bytes(content[: header + end] + content[max(header, size - end) :])
    for card in adapters.glob(f"*/{ADAPTER_CARD}"):
        card.write_text(json.dumps({**json.loads(card.read_text()), "base_fingerprint": recorded}))
        (card.parent / CHECKSUMS).unlink()
    weights = base_fingerprint(str(ECHO_TINY))
    assert len(find_adapters(adapters, str(ECHO_TINY), weights, MIN_PIXELS, MAX_PIXELS)) == 4
    with pytest.raises(EchoError, match=r"base model .* than .*weights 0"):
        find_adapters(adapters, str(ECHO_TINY), f"0{weights[1:]}", MIN_PIXELS, MAX_PIXELS)


def test_fingerprints_of_older_versions_are_compared_by_what_they_recorded() -> None:
    assert same_weights("aa-bb", "aa-bb") and same_weights("aa", "aa-bb") and same_weights("aa-bb", "aa")
    assert not same_weights("aa-bb", "aa-cc") and not same_weights("aa", "ab-bb") and not same_weights(None, "aa")
    assert same_weights(None, None)


def not_finite(weights: dict[str, torch.Tensor], value: float) -> str:
    name = sorted(weights)[1]
    weights[name].view(-1)[-1] = value
    return name


def missing(weights: dict[str, torch.Tensor]) -> str:
    name = sorted(weights)[1]
    del weights[name]
    return name


def extra(weights: dict[str, torch.Tensor]) -> str:
    name = sorted(weights)[1]
    weights[name.replace("layers.0", "layers.77")] = weights[name].clone()
    return name.replace("layers.0", "layers.77")


def integers(weights: dict[str, torch.Tensor]) -> str:
    name = sorted(weights)[0]
    weights[name] = (100 * weights[name]).to(torch.int8)
    return name


CHANGES: list[Callable[[dict[str, torch.Tensor]], str]] = [
    lambda weights: not_finite(weights, float("nan")),
    lambda weights: not_finite(weights, float("-inf")),
    missing,
    extra,
]
NAMES = ["nan", "infinite", "missing", "extra"]


@pytest.mark.parametrize("change", [*CHANGES, integers], ids=[*NAMES, "integers"])
def test_weights_of_an_adapter_that_are_not_finite_missing_extra_or_integers_are_refused(
    adapters: Path, change: Callable[[dict[str, torch.Tensor]], str]
) -> None:
    folder = adapters / "decision_maker"
    weights = load_file(folder / ADAPTER_FILES[0])
    name = change(weights)
    save_file(weights, folder / ADAPTER_FILES[0], {"format": "pt"})
    with pytest.raises(EchoError, match=f"{re.escape(str(folder))}.*{re.escape(name)}"):
        attach_adapters(load_model(str(ECHO_TINY), dtype="float32"), {"decision_maker": folder})


@pytest.mark.parametrize("changes", [{"lora_alpha": 1e9}, {"lora_alpha": 0}, {"lora_alpha": -8}, {"lora_alpha": 1e400}])
def test_an_absurd_scale_of_an_adapter_is_refused(adapters: Path, changes: dict[str, Any]) -> None:
    path = adapters / "decision_maker" / ADAPTER_FILES[1]
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(EchoError, match=r"decision_maker has the scale .* is not between 0 and 1000; correct"):
        attach_adapters(load_model(str(ECHO_TINY), dtype="float32"), {"decision_maker": path.parent})


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_weights_of_a_base_model_that_are_not_finite_missing_or_extra_are_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], str]
) -> None:
    shutil.copytree(ECHO_TINY, tmp_path / "tiny")
    weights = load_file(tmp_path / "tiny" / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "tiny" / "model.safetensors", {"format": "pt"})
    with pytest.raises(EchoError, match=r"tiny has (1 (missing|unexpected) tensors \(first: |a weight .* in )\S+"):
        load_model(str(tmp_path / "tiny"), dtype="float32")
