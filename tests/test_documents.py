"""What the documents promise: their commands, options, files, links and Python all exist."""

from __future__ import annotations

import dataclasses
import importlib
import re

import pytest

from echo_ft import config as configs
from tests.conftest import ROOT

DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md"))
)
MODULES = r"(?:data_prep|train|evaluation)(?:\.\w+)+"


def blocks(text: str, languages: set[str]) -> list[str]:
    """The contents of a document's code blocks in some languages."""
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    return [content for language, content in found if language in languages]


def commands(text: str) -> list[str]:
    """The command lines of a document's code blocks, continued lines joined."""
    lines = "\n".join(blocks(text, {"bash", "sh"})).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


class OptionsSeenError(Exception):
    """Ends a command where it knows what it wants of its command line."""


def options(module: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The options of a command: the fields of the dataclasses that it has its command line read into."""

    def build(types, *_):
        raise OptionsSeenError({field.name for cls in types for field in dataclasses.fields(cls) if field.init})

    with monkeypatch.context() as patch, pytest.raises(OptionsSeenError) as seen:
        patch.setattr(configs, "build", build)
        importlib.import_module(module).main([])
    return {"config", *seen.value.args[0]}


def flags(command: str) -> list[tuple[str, list[str]]]:
    """Each command of ours in a line of a document, as a module, and the flags that follow it."""
    found = []
    for part in re.split(r"[;|&]|\s#", command):
        named = re.search(rf"-m ({MODULES})|\b(train/\w+)\.py", part)
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


def test_unknown_option_in_a_document_is_seen(monkeypatch):
    line = "accelerate launch --quiet train/sft.py --config a.yaml --refrences 1; python -m evaluation.run --output x"
    (first, given), (second, other) = flags(line)
    assert (first, second) == ("train.sft", "evaluation.run")
    assert set(given) - options(first, monkeypatch) == {"refrences"}
    assert not set(other) - options(second, monkeypatch)


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
def test_links_between_documents_lead_somewhere(document):
    path = ROOT / document
    for name, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([\w-]+))?\)", path.read_text(encoding="utf-8")):
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{document} links to {name}"
        if anchor:
            headings = re.findall(r"^#+ +(.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{document} links to {name}#{anchor}"


def test_pictures_in_documents_are_made_by_one_command():
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    for picture in (ROOT / "docs" / "images").glob("*.png"):
        assert f"docs/images/{picture.name}" in recipe
