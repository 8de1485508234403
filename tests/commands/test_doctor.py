"""`train.doctor` says what a machine can run, and names the command to get whatever is missing."""

from __future__ import annotations

import http.server
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT
from train import doctor
from train.doctor import ABILITIES, GIB, TOOLS, WEIGHTS, Check, list_abilities


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test contacts the real hub or depends on what this machine stores."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not" / "there"))


def test_the_result_names_what_is_there_and_the_command_for_what_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "find_gpus", lambda: [("H200", 140 * GIB)])
    monkeypatch.setattr(doctor, "total_memory", lambda: 8 * GIB)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None if name == "npm" else f"/usr/bin/{name}")
    doctor.main([])
    printed = capsys.readouterr().out
    assert re.search(r"^ok +packages +\d+ of \d+ installed$", printed, re.MULTILINE)
    assert re.search(r"^ok +memory +8\.0 GiB of memory, \d+ CPU core", printed, re.MULTILINE)
    assert re.search(r"^ok +gpu +H200 with 140\.0 GiB$", printed, re.MULTILINE)
    assert re.search(r"^optional +npm +not found; for the tests with the published vocabulary$", printed, re.MULTILINE)
    assert "\nOther commands need:\n" in printed
    assert "  npm: apt install npm\n" in printed
    assert "  hub: unset HF_HUB_OFFLINE to download weights\n" in printed
    assert "  Qwen2-VL-2B-Instruct: hf download Qwen/Qwen2-VL-2B-Instruct\n" in printed
    assert "The demo needs" not in printed
    assert "  yes  train the 7B at MMAD's pixel budget\n" in printed


def test_a_machine_without_torch_and_a_mac_are_diagnosed_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["absent-package"])
    with pytest.raises(SystemExit):
        doctor.main([])
    printed = capsys.readouterr().out
    assert "absent-package is not installed" in printed
    assert re.search(r"GiB of memory, \d+ CPU core", printed)


def test_a_machine_that_cannot_run_the_demo_gets_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "find_gpus", list)
    monkeypatch.setattr(doctor, "total_memory", lambda: 3 * GIB)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["torch>=99", "absent-package", "pillow"])
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--json"])
    assert ended.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ready"] is False
    missing = {check["name"]: check for check in found["checks"] if check["state"] == "missing"}
    assert set(missing) == {"packages", "memory"}
    assert re.fullmatch(r"torch is \S+, not >=99; absent-package is not installed", missing["packages"]["found"])
    assert missing["packages"]["remedy"] == "pip install -c constraints.txt -e ."
    assert list(found["abilities"].values()) == [True] + [False] * len(ABILITIES)


def test_extras_are_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ["pillow", 'absent-package; extra == "serving"', "absent-package; extra == 'dev'"]
    _, core, serving, dev = doctor.check_packages([*requirements, "echo-ft[quantization]; extra == 'dev'"])
    assert (core.name, core.state) == ("packages", "ok")
    assert (serving.name, serving.state) == ("packages serving", "optional")
    assert serving.remedy == "python3 -m venv env-page && env-page/bin/pip install -e '.[serving]'"
    assert dev.remedy == "pip install -c constraints.txt -e '.[dev]'"
    assert doctor.package_fault(Requirement("pillow>=1,<2")).startswith("pillow is ")


def test_an_interrupted_download_is_not_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = next(iter(WEIGHTS))
    snapshot = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    for constants in ("huggingface_hub.constants", "huggingface_hub.file_download.constants"):
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path))
    assert doctor.check_weights()[0].found == f"not in {tmp_path}"
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "model-1.safetensors").touch()
    found = doctor.check_weights()[0]
    assert (found.found, found.remedy) == (f"incomplete in {tmp_path}", f"hf download {name}")
    (snapshot / "model-2.safetensors").touch()
    assert doctor.check_weights()[0] == Check(found.name, f"stored in {tmp_path}")


def test_a_full_disk_is_named_with_what_is_lacking(tmp_path: Path) -> None:
    assert doctor.check_disk(tmp_path, 100 * GIB).state == "ok"
    full = doctor.check_disk(tmp_path, GIB // 2)
    assert (full.state, full.remedy) == ("missing", "free 1.5 GiB more, or work on another disk")


@pytest.mark.parametrize(
    ("memory", "possible"),
    [(0, 0), (11.9, 2), (23.6, 4), (39.5, 5), (79.2, 6)],
    ids=["no GPU", "12 GB", "24 GB", "40 GB", "80 GB"],
)
def test_abilities_follow_the_memory_of_the_largest_gpu(memory: float, possible: int) -> None:
    found = list(list_abilities([int(memory * GIB), GIB]).values())
    assert found.count(True) == 1 + possible


def test_estimates_are_those_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"({gib} GiB)" in readme for _, gib in ABILITIES)
    named = "".join(path.read_text() for path in ROOT.glob("recipes/qwen2_vl_*/run.yaml"))
    assert all(name in named for name in WEIGHTS)
    assert TOOLS.keys() >= {"git", "make"}


@pytest.fixture
def hub() -> Iterator[str]:
    """A server that answers every request with 404, as a mirror might."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_hub_is_asked_unless_it_is_switched_off(hub: str) -> None:
    assert doctor.check_hub({"HF_ENDPOINT": hub}) == Check("hub", f"{hub} answers")
    assert doctor.check_hub({"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "1"}).found == "switched off by HF_HUB_OFFLINE"
    closed = doctor.check_hub({"HF_ENDPOINT": "http://127.0.0.1:1"})
    assert "does not answer" in closed.found
    assert "HF_ENDPOINT" in closed.remedy
    assert doctor.check_hub({"HF_ENDPOINT": "no address"}).state == "optional"
