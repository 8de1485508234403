"""Configs of models load without running code that a model folder brings along."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest

from echo_ft.errors import EchoError
from echo_ft.model.architectures import model_config
from tests.conftest import ECHO_TINY


def test_the_code_of_a_model_folder_never_runs(tmp_path, monkeypatch):
    config = json.loads((ECHO_TINY / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass EvilConfig: pass\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(EchoError, match=r"has no usable config.json \(.*contains custom code"):
        model_config(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_broken_config_is_named_with_the_reason(tmp_path):
    shutil.copy(ECHO_TINY / "config.json", tmp_path)
    assert model_config(str(tmp_path)).model_type == "qwen2_vl"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EchoError, match=r"has no usable config.json \(.*not a valid JSON"):
        model_config(str(tmp_path))
