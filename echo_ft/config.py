"""Configs: one YAML file a run, every key also a flag (`--key value`), unknown keys refused with the nearest known one.

The flags, their types and their help come from the dataclasses, by transformers' HfArgumentParser.
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

DESCRIPTION = "--config FILE reads these options from a YAML file of key: value lines; flags win over it."


def parse(types: Sequence[Any], argv: Sequence[str]) -> tuple[Any, ...]:
    """One instance of each dataclass in `types` from `--config FILE` and `--key value` flags; flags win.

    Raises EchoError for a file that is missing or not a mapping, an unknown key (naming the nearest known one), a value
    of the wrong type, and a missing required value.
    """
    file, flags = _split(argv)
    return build(types, _load(Path(file)) if file else {}, file or COMMAND_LINE, flags)


def build(types: Sequence[Any], config: Mapping[str, Any], source: str, flags: Sequence[str] = ()) -> tuple[Any, ...]:
    """`parse` for a mapping that is there already; `source` names it in errors."""
    from transformers import HfArgumentParser  # takes seconds to import, and `--help` of a script should not

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
                raise EchoError(f"{source}: {name} is empty; give it a value, or take the line out")

    parser: Any = HfArgumentParser(list(types), description=DESCRIPTION)
    # A value in the file satisfies a required flag, and is checked as a flag would be.
    for action in parser._actions:
        if action.dest in config:
            action.required = False
    parser.error = _raise(source)
    parser.set_defaults(**{key: _checked(parser, key, value, source) for key, value in config.items()})
    for action in parser._actions:
        if action.const is False:  # --no_key, which has the help of --key and the default False
            action.help, action.default = f"the same as --{action.dest} false", argparse.SUPPRESS
    try:
        return tuple(parser.parse_args_into_dataclasses(args=list(flags), look_for_args_file=False))
    except (ValueError, TypeError) as error:
        raise EchoError(f"{source}: {error}") from error


def _split(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    flags, config = list(argv), None
    for index, flag in enumerate(flags):
        if flag == "--config":
            if index + 1 == len(flags):
                raise EchoError("--config needs a YAML file after it")
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
        raise EchoError(f"{path} holds a {type(config).__name__}; a config is a mapping of key: value lines")
    return config


def _checked(parser: Any, key: str, value: Any, source: str) -> Any:
    action = next(action for action in parser._actions if action.dest == key)
    if value is None or isinstance(value, dict):
        return value
    if isinstance(value, list) != (action.nargs in ("+", "*")):
        raise EchoError(f"{source}: {key} takes {'one value' if isinstance(value, list) else 'a list'}, not {value!r}")
    items = value if isinstance(value, list) else [value]
    if action.choices is not None and "on" in action.choices:  # YAML 1.1 reads a bare on and off as booleans
        items = [{True: "on", False: "off"}[item] if isinstance(item, bool) else item for item in items]
    try:
        # YAML 1.1 reads 2e-4 as text; the flag's own type turns both spellings into the number.
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


def _raise(source: str) -> Callable[[str], None]:
    def error(message: str) -> None:
        # argparse names the argument whose value is wrong; values of the file are checked before it sees them.
        where = COMMAND_LINE if message.startswith("argument ") else source
        raise EchoError(f"{where}: {message}; run with --help for the list")

    return error


def run_main(main: Callable[[list[str]], None], how_to_go_on: str = "the same command starts anew") -> None:
    """Run a script's `main(argv)`: an EchoError becomes one line on stderr and exit status 2, Ctrl-C status 130."""
    # bitsandbytes (0.50) warns when it is imported, by peft, that it does without a kernel of the hub's.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # TRL (1.16) and peft (0.21) use names that transformers (5.23) calls otherwise now; a user can change none of them.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing` is deprecated", category=FutureWarning)
    log_to_terminal()
    try:
        main(sys.argv[1:])
    except EchoError as error:
        LOGGER.error("%s", error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped by Ctrl-C; {how_to_go_on}\n")
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
    """Words before the first option, given to `flag`: `RUN_DIR --output X` is `--run RUN_DIR --output X`."""
    count = next((place for place, word in enumerate(argv) if word.startswith("-")), len(argv))
    return [flag, *argv] if count else list(argv)
