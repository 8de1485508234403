"""Commands and Python code in the documents run at a small size. Those that cannot run here are parsed, with a reason.

tests/test_documents.py checks that commands, options and links exist.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.build import main as build
from tests.conftest import ROOT, random_adapters
from tests.support import documented_commands as documented
from tests.support.documented_commands import Command
from tests.support.servers import FakeServer
from train.export import main as export

FOLDERS = ("data_prep", "train", "evaluation", "recipes")
DOCUMENTS = [
    "README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    *(f"{folder}/README.md" for folder in FOLDERS),
]

NOT_RUN = {
    "make demo": "takes 8 minutes; the documents contain its steps",
    "make adapt-from": "trains nine sets of adapters on the demo",
    "make tiles": "needs real data and trains with several seeds",
    "make test": "runs this test suite",
    "make style types test": "runs this test suite",
    "UPDATE_GOLDEN=1 python -m pytest": "rewrites the golden prompts",
    "git diff tests/golden": "shows nothing without changed prompts",
    "pip install": "needs a package index",
    "pip uninstall": "changes the environment",
    "wandb sweep": "needs a W&B account",
    "transformers serve": "starts a server that never ends",
    "--watch": "waits for images until Ctrl-C",
    "--serve": "serves until Ctrl-C",
    "curl": "needs a server that runs",
    "ddp.yaml --num_processes 4": "needs four GPUs",
    "recipes/magnetic_tile/": "needs the magnetic tiles",
    "runs/magnetic_tile/": "needs the magnetic tiles",
    "RobustMAD_MCQ.json": "needs RobustMAD",
    "recipes/tiny/curves.yaml": "needs two more sets of adapters",
    "evaluation.curves": "needs the ablation of recipes/tiny/curves.yaml",
    "train.tiny.pretrain": "takes more than an hour",
    "tests/commands/test_published_2b.py": "computes with a whole 2B for 15 minutes",
}
"""Part of a command to the reason why it does not run here. Commands of this project are still parsed completely."""

SLOW = {
    "torchrun --nproc_per_node 2": "starts two processes",
    "DS_ACCELERATOR=cpu": "starts two processes under DeepSpeed",
    "recipes/tiny/ablation.yaml": "evaluates 14 cells",
}
"""Part of a command to the reason why only the slow tests run it. By default it is parsed completely."""

REPLACEMENTS = {"--root FOLDER --output data/parts": "--root mvtec_anomaly_detection --output data/folder"}
"""Arguments that stand for something the reader has, and what the tests use instead."""

BUILDS_PARTS = "--config recipes/data/manifest.yaml"
"""A document with this build creates data/parts itself."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A project folder after `make demo`, with random adapters, and with the reader's own dataset."""
    folder = tmp_path_factory.mktemp("demo")
    documented.make_project(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        build(["--config", "recipes/tiny/data.yaml", *documented.SMALL_DEMO])
        build([*BUILDS_PARTS.split(), "--annotations", "parts.csv", "--descriptor", "skimage"])
        random_adapters(Path("runs/demo/adapters"), Path("data/demo"))
        for run, *adapters in (("base",), ("tuned", "--adapters", "runs/demo/adapters")):
            config = ["evaluation.run", "--config", "recipes/tiny/run.yaml", *adapters, "--output", f"runs/demo/{run}"]
            command = documented.Command({}, ["python"], config[0], config, config[1:])
            documented.run_in_process(command, documented.smoke_arguments(command, {}))
        export(["--adapters", "runs/demo/adapters", "--output", "runs/demo/bundle", "--merge", "none"])
    return folder


@pytest.fixture
def project(demo, tmp_path, monkeypatch) -> Path:
    """A copy of the demo's folder, which is the working directory; data/mmad is another copy of the demo's dataset.

    W&B is offline and keeps its files there.
    """
    folder = tmp_path / "project"
    shutil.copytree(demo, folder, symlinks=True)
    shutil.copytree(folder / "data" / "demo", folder / "data" / "mmad")
    monkeypatch.chdir(folder)
    for name, value in {"MODE": "offline", "DIR": folder, "DATA_DIR": folder / "wandb data"}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    return folder


@pytest.fixture
def replacements() -> Iterator[dict[str, str]]:
    """REPLACEMENTS, and the address of a server that answers."""
    server = FakeServer()
    yield {**REPLACEMENTS, "http://127.0.0.1:8000/v1": server.url}
    server.close()


def reason(reasons: dict[str, str], command: Command) -> str | None:
    return next((reasons[part] for part in reasons if part in command.text), None)


def prepare(command: Command) -> None:
    """Do what the reader does before this command."""
    if "--check" in command.arguments:
        documented.fill_in_knowledge(Path("knowledge"))
    if BUILDS_PARTS in command.text and "--overwrite" not in command.arguments and "data/parts" in command.arguments:
        shutil.rmtree("data/parts", ignore_errors=True)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_a_document_run(document, project, replacements, tmp_path):
    for command in documented.read_commands(ROOT / document, tmp_path):
        if command.module is None:
            assert reason(NOT_RUN, command), f"{command.text}: add it to NOT_RUN with a reason"
            continue
        documented.check_launcher(command)
        arguments = documented.smoke_arguments(command, replacements)
        if reason(NOT_RUN | SLOW, command):
            documented.check_config(command, arguments)
        else:
            prepare(command)
            documented.run_in_process(command, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_slow_commands_of_a_document_run(document, project, replacements, tmp_path):
    for command in documented.read_commands(ROOT / document, tmp_path):
        if reason(SLOW, command):
            prepare(command)
            documented.run_in_shell(command, documented.smoke_arguments(command, replacements))


def test_every_reason_belongs_to_a_command(tmp_path):
    texts = [c.text for document in DOCUMENTS for c in documented.read_commands(ROOT / document, tmp_path)]
    unused = [part for part in (*NOT_RUN, *SLOW) if not any(part in text for text in texts)]
    assert not unused


def test_a_command_that_returns_an_error_fails(monkeypatch):
    command = Command({}, ["python", "-m"], "evaluation.run", ["python", "-m", "evaluation.run"], [])
    monkeypatch.setattr("evaluation.run.main", lambda _: 0)
    documented.run_in_process(command, [])
    monkeypatch.setattr("evaluation.run.main", lambda _: 3)
    with pytest.raises(AssertionError, match=r"python -m evaluation.run: 3"):
        documented.run_in_process(command, [])


def test_bash_expands_loops_variables_and_environment(tmp_path):
    text = "```bash\nfor a in x:1 y:2; do\n  A_B=c python -m train.show --dataset 'd e' --row ${a#*:}\ndone\n```\n"
    (tmp_path / "page.md").write_text(text)
    first, second = documented.read_commands(tmp_path / "page.md", tmp_path)
    assert (first.environment, first.launcher, first.module) == ({"A_B": "c"}, ["python"], "train.show")
    assert first.arguments == ["--dataset", "d e", "--row", "1"]
    assert second.arguments[-1] == "2"


@pytest.mark.parametrize("document", ["README.md", "docs/inspecting.md"])
def test_python_in_a_document_runs(document, project, capsys):
    (block,) = documented.code_blocks((ROOT / document).read_text(encoding="utf-8"), {"python"})
    namespace: dict[str, object] = {}
    exec(compile(block, document, "exec"), namespace)
    assert namespace["result"].trace
    assert re.search(r"(True|False) 0\.\d+ ", capsys.readouterr().out)
