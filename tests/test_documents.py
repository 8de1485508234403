"""Commands, options, files and links in the documents exist; tests/commands/test_documented_commands.py runs them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import shlex
import subprocess
import sys

import pytest

from echo_ft import config as configs
from tests.conftest import ROOT
from tests.support.documented_commands import code_blocks

DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md"))
)
MODULES = r"(?:data_prep|train|evaluation)(?:\.\w+)+"


def commands(text: str) -> list[str]:
    """The command lines in a document's code blocks, with continued lines joined."""
    lines = "\n".join(code_blocks(text, {"bash", "sh"})).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


class OptionsFoundError(Exception):
    """Stops a command once its options are known."""


def options(module: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The options of a command: the fields of the dataclasses that it parses its command line into."""

    def build(types, *_):
        raise OptionsFoundError({field.name for cls in types for field in dataclasses.fields(cls) if field.init})

    with monkeypatch.context() as patch, pytest.raises(OptionsFoundError) as seen:
        patch.setattr(configs, "build", build)
        importlib.import_module(module).main([])
    return {"config", *seen.value.args[0]}


def flags(command: str) -> list[tuple[str, list[str]]]:
    """The commands of this project in a line of a document, as (module, flags that follow it)."""
    found = []
    for part in re.split(r"[;|&]|\s#", command):
        named = re.search(rf"-m (?!train\.launch\b)({MODULES})|\b(train/\w+)\.py", part)
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


def test_an_unknown_option_in_a_document_is_found(monkeypatch):
    line = "python -m train.launch train/sft.py --config a.yaml --refrences 1; python -m evaluation.run --output x"
    (first, given), (second, other) = flags(line)
    assert (first, second) == ("train.sft", "evaluation.run")
    assert set(given) - options(first, monkeypatch) == {"refrences"}
    assert not set(other) - options(second, monkeypatch)


def test_benchmark_commands_have_only_options_that_parse(monkeypatch):
    parse, found = argparse.ArgumentParser.parse_args, 0

    def parse_and_stop(parser, *given):
        parse(parser, *given)
        raise OptionsFoundError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    for document in DOCUMENTS:
        for command in commands((ROOT / document).read_text(encoding="utf-8")):
            if named := re.search(r"-m (benchmarks[.\w]*)([^#|;]*)", command):
                module = "benchmarks.training.__main__" if named[1] == "benchmarks.training" else named[1]
                monkeypatch.setattr(sys, "argv", [module, *shlex.split(named[2])])
                with pytest.raises(OptionsFoundError):
                    importlib.import_module(module).main()
                found += 1
    assert found >= 10


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_only_commands_and_files_that_exist(document):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for command in commands((ROOT / document).read_text(encoding="utf-8")):
        for module in re.findall(rf"-m ({MODULES})", command):
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), command
        for path in re.findall(r"(?:^|\s)((?:train|recipes)/[\w./-]+\.(?:py|yaml))", command):
            assert (ROOT / path).is_file(), command
        for target in re.findall(r"(?:^|\s)make ([\w-]+)", command):
            assert target in targets, command


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_the_text_of_documents_exist(document):
    path = ROOT / document
    prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for name in re.findall(r"`([\w.-]+/[\w./-]+\.(?:py|yaml|md|sh))`", prose):
        assert (ROOT / name).is_file() or (path.parent / name).is_file(), f"{document} names {name}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_have_a_target(document):
    path = ROOT / document
    for name, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([\w-]+))?\)", path.read_text(encoding="utf-8")):
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{document} links to {name}"
        if anchor:
            headings = re.findall(r"^#+ +(.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{document} links to {name}#{anchor}"


def test_the_makefile_makes_every_picture_of_the_documents():
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    for picture in (ROOT / "docs" / "images").glob("*.png"):
        assert f"docs/images/{picture.name}" in recipe


def test_make_clean_keeps_the_datasets_and_runs_of_users(tmp_path):
    kept = {tmp_path / folder / name for folder in ("data", "runs") for name in ("parts", "echo-tiny")}
    for folder in (*kept, tmp_path / "runs" / "demo", tmp_path / "data" / "demo"):
        folder.mkdir(parents=True)
    subprocess.run(["make", "-f", str(ROOT / "Makefile"), "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert {*tmp_path.glob("*/*")} == kept
