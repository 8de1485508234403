"""Commands in the documents: expand them with bash, add options for a small size, and run or only parse them."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS, ROOT
from tests.support.drawn_manifest import draw_manifest
from tests.support.folder_layouts import mvtec_ad

RECORDER = r"""
command_not_found_handle() {
  for name in $(compgen -e); do
    case $name in PATH|RECORD|PWD|OLDPWD|SHLVL|_) ;; *) printf '%s\0' "$name=${!name}" >> "$RECORD";; esac
  done
  printf '%s\0' "$@" >> "$RECORD"
  printf '\n\0' >> "$RECORD"
}
"""
"""Makes bash record each command and its variables instead of running it. Bash expands loops, variables and quotes."""

PYTHON_LAUNCHERS = {"python", "torchrun"}
TRAIN_LAUNCH = ["python", "-m", "train.launch"]

TINY_MODEL = ["--model_name_or_path", str(ECHO_TINY), "--dtype", "float32"]
TINY_PIXELS = ["--min_pixels", str(MIN_PIXELS), "--max_pixels", str(MAX_PIXELS)]
SMOKE_OPTIONS = {
    "data_prep.build": ["--descriptor", "skimage"],
    "data_prep.embed": ["--descriptor", "skimage"],
    "train.sft": [
        *TINY_MODEL, *TINY_PIXELS, "--bf16", "false", "--report_to", "none", "--dataloader_num_workers", "1",
        "--max_steps", "1", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1",
        "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "1",
    ],
    "evaluation.run": [*TINY_MODEL, *TINY_PIXELS, "--max_new_tokens", "3"],
    "evaluation.inspect": ["--threshold", "1"],  # the status is 1 if an image is flagged
    "evaluation.ablate": [*TINY_PIXELS, "--max_new_tokens", "3"],
}  # fmt: skip
"""Options added per module, so that commands use echo-tiny, few pixels, one step, short outputs and no downloads."""

VERDICTS = {"evaluation.score": (1, 3)}
"""Exit statuses that state a result, per module: with random weights, a gate fails or does not have enough parts."""

SMALL_DEMO = ["--parts", "12", "--fractions", "0.4", "0.3", "0.3"]
"""Options added to builds of the demo's dataset. With them, each split still has normal and defective parts."""


@dataclass(frozen=True)
class Command:
    """One command from a document, after expansion."""

    environment: dict[str, str]
    launcher: list[str]
    """`python`, or `python -m train.launch` or `torchrun` with their options; empty for other programs."""
    module: str | None
    """The module of this project that the command starts, such as `train.sft`; None for other programs."""
    words: list[str]
    """The whole command without its environment."""
    arguments: list[str]
    """The arguments of the module."""

    @property
    def text(self) -> str:
        """The command on one line."""
        return " ".join([*(f"{name}={value}" for name, value in self.environment.items()), *self.words])


def code_blocks(text: str, languages: set[str]) -> list[str]:
    """The contents of a document's code blocks in the given languages."""
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    return [content for language, content in found if language in languages]


def read_commands(document: Path, scratch: Path) -> list[Command]:
    """All commands in the bash blocks of a document, in order. Fails if bash reports an error."""
    found, record = [], scratch / "record"
    for block in code_blocks(document.read_text(encoding="utf-8"), {"bash", "sh"}):
        record.write_bytes(b"")
        done = subprocess.run(
            ["/bin/bash", "-uc", RECORDER + block],
            env={"PATH": "/nonexistent", "RECORD": str(record)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{document}: bash rejects\n{block}\n{done.stderr}"
        assert not done.stderr, f"{document}: bash reports\n{done.stderr}"
        found += [_command(entry.split("\0")[:-1]) for entry in record.read_text().split("\n\0")[:-1]]
    return found


def _command(words: list[str]) -> Command:
    """Split the words of a command into environment, launcher, module and arguments."""
    count = next(index for index, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    environment, words = dict(word.split("=", 1) for word in words[:count]), words[count:]
    first = len(TRAIN_LAUNCH) if words[: len(TRAIN_LAUNCH)] == TRAIN_LAUNCH else 0
    modules = (index for index, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    start = next((index for index in modules if index >= first), None)
    if start is not None and words[0] in PYTHON_LAUNCHERS:
        end = start + 1 + (words[start] == "-m")
        path = words[end - 1].removesuffix(".py").replace(".", "/")
        if (ROOT / f"{path}.py").is_file():
            return Command(environment, words[:start], path.replace("/", "."), words, words[end:])
    return Command(environment, [], None, words, [])


def check_launcher(command: Command) -> None:
    """Parse the options and config file of `python -m train.launch` or `torchrun` with the launcher's own parser."""
    if command.launcher[: len(TRAIN_LAUNCH)] == TRAIN_LAUNCH:
        from accelerate.commands.config.config_args import load_config_from_file
        from accelerate.commands.launch import launch_command_parser

        options = launch_command_parser().parse_args(command.words[len(TRAIN_LAUNCH) :])
        if options.config_file is not None:
            load_config_from_file(options.config_file)
    elif command.launcher[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args(command.words[1:])


class ConfigParsedError(BaseException):
    """Stops a command after it has parsed its config. The parser would turn an Exception into an EchoError."""


def check_config(command: Command, arguments: list[str]) -> None:
    """Parse the config and all options with the command's own parser, without running the command.

    Raises EchoError for an unknown key or option and for a value of the wrong type. Stops before the options become
    dataclasses, because some dataclasses need the processes of the launcher.
    """
    from transformers import HfArgumentParser

    def parse_and_stop(parser: HfArgumentParser, args: list[str], **_: object) -> None:
        parser.parse_args(args)
        raise ConfigParsedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigParsedError):
        patch.setattr(HfArgumentParser, "parse_args_into_dataclasses", parse_and_stop)
        importlib.import_module(command.module).main(arguments)


def run_in_process(command: Command, arguments: list[str]) -> None:
    """Call the main function of the command's module. Fails if the command raises or exits with an error."""
    try:
        status = importlib.import_module(command.module).main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert not status or status in VERDICTS.get(command.module or "", ()), f"{command.text}: {status}"


def run_in_shell(command: Command, arguments: list[str]) -> None:
    """Start the command as a reader does, with its launcher and environment. Fails unless its exit status is 0."""
    bin_folder, end = Path(sys.executable).parent, len(command.words) - len(command.arguments)
    done = subprocess.run(
        [str(bin_folder / command.words[0]), *command.words[1:end], *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **command.environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{command.text}\n{done.stdout}\n{done.stderr}"


def smoke_arguments(command: Command, replacements: Mapping[str, str]) -> list[str]:
    """The arguments of a command after `replacements`, with the options for a small size added."""
    text = "\0".join(command.arguments)
    for old, new in replacements.items():
        text = text.replace(old.replace(" ", "\0"), new.replace(" ", "\0"))
    added = [*SMOKE_OPTIONS.get(command.module or "", [])]
    if "recipes/tiny/data.yaml" in command.arguments:
        added += SMALL_DEMO
    if "--load_best_model_at_end" in command.arguments:
        added += ["--eval_strategy", "steps", "--eval_steps", "1"]
    return [*text.split("\0"), *added]


def make_project(folder: Path) -> None:
    """Create the files that the documents assume: recipes, parts.csv with its images, a folder layout, and answers."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("recipes", "train"):
        (folder / name).symlink_to(ROOT / name)
    manifest = draw_manifest(folder, ("gasket",), normals=8, defects=4)
    with open(folder / "parts.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "product", "condition", "group", "mask"])
        writer.writeheader()
        writer.writerows(json.loads(line) for line in manifest.read_text().splitlines())
    manifest.unlink()
    mvtec_ad(folder)
    for name, text in (("base", "A"), ("tuned", "B")):
        answer = {"kind": "Anomaly Detection", "question": "Any defect?", "options": {"A": "Yes.", "B": "No."}}
        answer |= {"image": "0.png", "answer": "B", "text": text}
        (folder / f"{name}.jsonl").write_text(json.dumps(answer) + "\n", encoding="utf-8")


def fill_in_knowledge(folder: Path) -> None:
    """Describe every condition in the templates that `data_prep.knowledge` wrote."""
    for path in folder.rglob("*.yaml"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for products in content.values():
            for conditions in products.values():
                conditions |= {name: f"The surface shows {name}. The part may leak later." for name in conditions}
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
