"""The rules of the tree, each held by a test."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import subprocess
from pathlib import Path

import pytest

from echo_ft import config as configs
from tests.conftest import ROOT

PARTS = ("echo_ft", "data_prep", "train", "evaluation")
FILES = sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_imports_no_script_and_scripts_never_each_other(path):
    part = path.relative_to(ROOT).parts[0]
    allowed = {"echo_ft", part}
    assert imported(path) & set(PARTS) <= allowed


def test_models_load_from_safetensors_and_never_run_remote_code():
    text = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    assert not re.search(r"trust_remote_code\s*=\s*True", text)
    assert not re.search(r"torch\.load\(|pickle\.load", text)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_no_path_of_a_machine_is_committed():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".json", ".jinja"} and path.is_file():
            found = re.search(r"(?<![\w.])/(?:home|root|Users|tmp)/\w+", path.read_text(encoding="utf-8"))
            assert not found, f"{name}: {found.group()}"


def commands(text: str) -> list[str]:
    """The command lines of a document's code blocks, continued lines joined."""
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


DOCUMENTS = ["README.md", "recipes/README.md", "data_prep/README.md", "train/README.md", "evaluation/README.md"]


class AskedError(Exception):
    """Ends a command where it knows what it wants of its command line."""


def options(module: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The options of a command: the fields of the dataclasses that it has its command line read into."""

    def build(types, *_):
        raise AskedError({field.name for cls in types for field in dataclasses.fields(cls) if field.init})

    with monkeypatch.context() as patch, pytest.raises(AskedError) as asked:
        patch.setattr(configs, "build", build)
        importlib.import_module(module).main([])
    return {"config", *asked.value.args[0]}


def flags(command: str) -> list[tuple[str, list[str]]]:
    """Each command of ours in a line of a document, as a module, and the flags that follow it."""
    found = []
    for part in re.split(r"[;|&]|\s#", command):
        named = re.search(r"-m ((?:data_prep|train|evaluation)\.\w+)|\b(train/\w+)\.py", part)
        if named:
            module = named[1] or named[2].replace("/", ".")
            found.append((module, re.findall(r"\s\[?--(\w+)", part[named.end() :])))
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_only_options_that_their_commands_have(document, monkeypatch):
    for command in commands((ROOT / document).read_text(encoding="utf-8")):
        for module, given in flags(command):
            unknown = set(given) - options(module, monkeypatch) if given else set()
            assert not unknown, command


def test_an_option_that_a_command_does_not_have_is_seen(monkeypatch):
    line = "accelerate launch --quiet train/sft.py --config a.yaml --refrences 1; python -m evaluation.run --output x"
    (first, given), (second, other) = flags(line)
    assert (first, second) == ("train.sft", "evaluation.run")
    assert set(given) - options(first, monkeypatch) == {"refrences"}
    assert not set(other) - options(second, monkeypatch)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_only_commands_and_files_that_exist(document):
    found = commands((ROOT / document).read_text(encoding="utf-8"))
    assert found
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for command in found:
        for module in re.findall(r"-m ((?:data_prep|train|evaluation)\.\w+)", command):
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), command
        for path in re.findall(r"(?:^|\s)((?:train|recipes)/[\w./-]+\.(?:py|yaml))", command):
            assert (ROOT / path).is_file(), command
        for target in re.findall(r"(?:^|\s)make ([\w-]+)", command):
            assert target in targets, command


def test_the_map_names_every_module_of_the_library():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    mapped = readme[readme.index("## Map") : readme.index("data_prep/     ")]
    missing = {path.stem for path in (ROOT / "echo_ft").glob("[a-z]*.py")} - set(re.findall(r"\w+", mapped))
    assert not missing
