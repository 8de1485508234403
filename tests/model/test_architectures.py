"""Model configs load without running any code that comes with a model folder."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest

from echo_ft.errors import EchoError
from echo_ft.model.architectures import model_config
from echo_ft.model.loading import base_fingerprint, checkpoint_dtype, load_processor
from tests.conftest import ECHO_TINY


def test_the_code_of_a_model_folder_never_runs(tmp_path, monkeypatch):
    config = json.loads((ECHO_TINY / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass EvilConfig: pass\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(EchoError, match=r"config\.json has the key 'auto_map', which loads code"):
        model_config(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_broken_config_is_named_with_the_reason(tmp_path):
    shutil.copy(ECHO_TINY / "config.json", tmp_path)
    assert model_config(str(tmp_path)).model_type == "qwen2_vl"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EchoError, match=r"has no usable config.json \(Expecting property name"):
        model_config(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"attn_implementation": "someone/kernels"},
            "sets attn_implementation to 'someone/kernels', which may load code",
        ),
        ({"text_config": {"_attn_implementation": "flash"}}, "sets _attn_implementation to 'flash'"),
        ({"text_config": {"num_hidden_layers": 10**6}}, "sets num_hidden_layers to 1000000"),
        ({"vision_config": {"depth": "3"}}, "sets depth to '3'"),
        ({"vision_config": {"auto_map": {"AutoConfig": "a.B"}}}, "has the key 'auto_map'"),
    ],
)
def test_keys_of_a_config_that_load_code_or_build_for_ever_are_refused_by_name(tmp_path, changes, reason):
    config = json.loads((ECHO_TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    for read in (model_config, checkpoint_dtype):
        with pytest.raises(EchoError, match=reason):
            read(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["a.B", null]}}')
    with pytest.raises(EchoError, match=r"tokenizer_config\.json has the key 'auto_map', which loads code"):
        load_processor(str(tmp_path), None, 784, 12544)


@pytest.mark.parametrize("content", ["[]", "[" * 200_000, '"text"', '{"a": 1, "a": 2}'])
def test_a_config_of_another_form_is_one_sentence(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(EchoError, match=r"has no usable config\.json \("):
        model_config(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": {"a": 1}}', '{"weight_map": []}'])
def test_a_broken_index_of_the_weights_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(EchoError, match=r"model\.safetensors\.index\.json does not list the weight files .*; copy or"):
        base_fingerprint(str(tmp_path))


def test_cut_weights_are_named(tmp_path):
    whole = (ECHO_TINY / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(EchoError, match=r"model\.safetensors is truncated"):
        base_fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"[]")
    with pytest.raises(EchoError, match=r"model\.safetensors is truncated or not a safetensors file"):
        base_fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(EchoError, match=r"model\.safetensors is truncated or not a safetensors file; copy or download"):
        base_fingerprint(str(tmp_path))
