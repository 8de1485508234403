"""Configs: one YAML file per run, in which every key is also a flag (`--key value`).

Unknown keys are an error that names the nearest known one. transformers' HfArgumentParser derives the flags, their
types and their help from the dataclasses.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from echo_ft.errors import EchoError
from echo_ft.strict_yaml import read_yaml
from echo_ft.terminal import LOGGER, log_to_terminal

COMMAND_LINE = "the command line"

DESCRIPTION = "--config FILE reads these options from a YAML file of key: value lines. Flags override the file."


def parse(types: Sequence[Any], argv: Sequence[str]) -> tuple[Any, ...]:
    """Build one instance of each dataclass in `types` from `--config FILE` and `--key value` flags.

    Flags override the file. Raises EchoError if the file is missing or not a mapping, if a key is unknown (the message
    names the nearest known one), if a value has the wrong type, or if a required value is missing.
    """
    file, flags = _split(argv)
    return build(types, _load(Path(file)) if file else {}, file or COMMAND_LINE, flags)


def build(types: Sequence[Any], config: Mapping[str, Any], source: str, flags: Sequence[str] = ()) -> tuple[Any, ...]:
    """Build the dataclasses from a mapping instead of a file. Raises EchoError like `parse`.

    Error messages call the mapping `source`. `flags` override its values.
    """
    from transformers import HfArgumentParser  # takes seconds to import, which `--help` should not need

    known = {field.name for cls in types for field in dataclasses.fields(cls) if field.init}
    for key in map(str, config):
        if key not in known:
            raise EchoError(f"{source}: unknown key {key!r}{_nearest(key, known)}")
    for flag in flags:
        option = flag.removeprefix("--").split("=")[0].replace("-", "_") if flag.startswith("--") else "help"
        if option not in known and option.removeprefix("no_") not in known and option != "help":
            raise EchoError(f"unknown option {flag.split('=')[0]}{_nearest(option, known)}")

    for cls in types:
        for name, kind in get_type_hints(cls).items():
            if name in config and config[name] is None and type(None) not in get_args(kind) and kind is not Any:
                raise EchoError(f"{source}: {name} is empty; set a value or remove the line")

    parser: Any = HfArgumentParser(list(types), description=DESCRIPTION)
    # A value in the file satisfies a required flag and is validated like a flag.
    for action in parser._actions:
        if action.dest in config:
            action.required = False
    parser.error = _error_handler(source)
    parser.set_defaults(**{key: _checked(parser, key, value, source) for key, value in config.items()})
    for action in parser._actions:
        if action.const is False:  # --no_key, to which HfArgumentParser gives the help of --key and the default False
            action.help, action.default = f"Same as --{action.dest} false.", argparse.SUPPRESS
    try:
        return tuple(parser.parse_args_into_dataclasses(args=list(flags), look_for_args_file=False))
    except (ValueError, TypeError) as error:
        raise EchoError(f"{source}: {error}") from error


def _split(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    flags, config = list(argv), None
    for index, flag in enumerate(flags):
        if flag == "--config":
            if index + 1 == len(flags):
                raise EchoError("--config has no value; pass a YAML file")
            config = flags[index + 1]
            return config, flags[:index] + flags[index + 2 :]
        if flag.startswith("--config="):
            return flag.removeprefix("--config="), flags[:index] + flags[index + 1 :]
    return config, flags


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path(".")
        names = sorted(str(p) for p in folder.glob("*.yaml"))
        near = difflib.get_close_matches(str(path), names, n=1) or names[:1]
        hint = f"; did you mean {near[0]}?" if near else f" (looked in {Path.cwd()}); check the path"
        raise EchoError(f"there is no config file {path}{hint}")
    try:
        config = read_yaml(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EchoError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise EchoError(f"{path} contains a {type(config).__name__}; a config must be a mapping of key: value lines")
    return config


def _checked(parser: Any, key: str, value: Any, source: str) -> Any:
    action = next(action for action in parser._actions if action.dest == key)
    if value is None or isinstance(value, dict):
        return value
    if isinstance(value, list) != (action.nargs in ("+", "*")):
        raise EchoError(f"{source}: {key} takes {'one value' if isinstance(value, list) else 'a list'}, not {value!r}")
    items = value if isinstance(value, list) else [value]
    if action.choices is not None and "on" in action.choices:  # YAML 1.1 reads unquoted on and off as booleans
        items = [{True: "on", False: "off"}[item] if isinstance(item, bool) else item for item in items]
    try:
        # YAML 1.1 reads 2e-4 as a string. The flag's type converts both spellings to a number.
        kind = action.type or (lambda item: item)
        converted = [kind(item if _is_number(item) else str(item)) for item in items]
    except Exception as error:
        raise EchoError(f"{source}: {key} cannot be {value!r} ({error})") from error
    for item in converted:
        if action.choices is not None and item not in action.choices:
            raise EchoError(f"{source}: {key} cannot be {item!r}; choose from {', '.join(map(str, action.choices))}")
    return converted if isinstance(value, list) else converted[0]


def _is_number(item: Any) -> bool:
    return isinstance(item, (int, float)) and not isinstance(item, bool)


def _nearest(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "; run with --help for the list"


def _error_handler(source: str) -> Callable[[str], None]:
    def error(message: str) -> None:
        # If argparse names an argument, its value came from a flag: values from the file were validated before.
        where = COMMAND_LINE if message.startswith("argument ") else source
        raise EchoError(f"{where}: {message}; run with --help for the list")

    return error


def run_main(main: Callable[[list[str]], None], resume_hint: str = "rerun the command to start again") -> None:
    """Run a command's `main(argv)` and turn errors into one line on stderr and an exit status.

    The status is 2 for an EchoError or a W&B error, 130 for Ctrl-C and 1 for a closed pipe. After Ctrl-C, the line
    ends with `resume_hint`.
    """
    # When peft imports bitsandbytes (0.50), it warns that it falls back from a kernel of the Hugging Face Hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # TRL (1.16) and peft (0.21) use names that transformers (5.23) has deprecated. Users cannot change them.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing` is deprecated", category=FutureWarning)
    log_to_terminal()
    try:
        main(sys.argv[1:])
    except EchoError as error:
        LOGGER.error("%s", error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped by Ctrl-C; {resume_hint}\n")
        sys.exit(130)
    except BrokenPipeError:  # `... | head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "wandb":
            raise
        LOGGER.error("W&B: %s; run wandb login, set WANDB_MODE=offline, or remove report_to", error)
        sys.exit(2)


def named_first(argv: Sequence[str], flag: str) -> list[str]:
    """Pass positional arguments before the first option to `flag`.

    With the flag `--run`, `RUN_DIR --output X` becomes `--run RUN_DIR --output X`.
    """
    count = next((index for index, argument in enumerate(argv) if argument.startswith("-")), len(argv))
    return [flag, *argv] if count else list(argv)
