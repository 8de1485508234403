"""Configs: one YAML file per run, in which every key is also a flag (`--key value`).

An unknown key is an error, and the message suggests the closest known key. transformers' HfArgumentParser derives the
flags, their types and their help from the dataclasses.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import logging
import math
import os
import re
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from echo_ft.errors import EchoError
from echo_ft.inputs import read_yaml_file
from echo_ft.processes import TerminatedError, handled_signals, lost_process
from echo_ft.strict_yaml import read_json
from echo_ft.terminal import LOGGER, PrintableStream, log_to_terminal

COMMAND_LINE = "the command line"

_LIST_OR_TEXT = ("lora_target_modules",)
"""Options that TRL (1.16) declares as a list, but for which PEFT also accepts a string (`all-linear` or a pattern)."""

DESCRIPTION = "--config FILE reads these options from a YAML file of key: value lines. Flags override the file."


def parse(types: Sequence[Any], argv: Sequence[str]) -> tuple[Any, ...]:
    """Build one instance of each dataclass in `types` from `--config FILE` and `--key value` flags.

    Flags override the file. Raises EchoError if the file is missing or not a mapping. Also raises it if a key is
    unknown (the message suggests a similar one), or if a value is missing or has the wrong type.
    """
    file, flags = _split([_with_home(flag) for flag in argv])
    return build(types, _load(Path(file)) if file else {}, file or COMMAND_LINE, flags)


def build(types: Sequence[Any], config: Mapping[str, Any], source: str, flags: Sequence[str] = ()) -> tuple[Any, ...]:
    """Build the dataclasses from a mapping instead of a file. Raises EchoError as `parse` does.

    Error messages refer to the mapping as `source`. `flags` override its values.
    """
    from transformers import HfArgumentParser  # this import takes seconds, for which `--help` should not wait

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
    mappings = {name for cls in types for name, kind in get_type_hints(cls).items() if _takes_mapping(kind)}
    # A value in the file satisfies a required flag and is validated like a flag.
    for action in parser._actions:
        if action.dest in config:
            action.required = False
        action.type = _mapping if action.dest in mappings else _STRICT.get(action.type, action.type)
    parser.error = _error_handler(source)
    parser.set_defaults(**{key: _checked(parser, key, value, source) for key, value in config.items()})
    for action in parser._actions:
        if action.const is False:  # HfArgumentParser gives --no_key the help of --key and the default False
            action.help, action.default = f"Same as --{action.dest} false.", argparse.SUPPRESS
    try:
        *found, unused = parser.parse_args_into_dataclasses(
            args=list(flags), return_remaining_strings=True, look_for_args_file=False
        )
        if unused:
            raise EchoError(f"{COMMAND_LINE}: {unused[0]!r} belongs to no option; quote values that contain spaces")
        return tuple(found)
    except EchoError:
        raise
    except Exception as error:  # the checks of another library's dataclass may raise anything
        given = {**config, **{flag[2:]: value for flag, value in pairwise(flags) if flag[:2] == "--"}}
        given |= {name: _mapping(given[name]) for name in mappings & given.keys() if isinstance(given[name], str)}
        raise EchoError(f"{source}: {_blamed(error, given)}{error}") from error


def is_true(argv: Sequence[str], key: str) -> bool:
    """Return whether the option `key` is true in what `parse` would read. A value that `parse` refuses is not."""
    file, flags = _split([_with_home(flag) for flag in argv])
    value = _load(Path(file)).get(key) if file else None
    for flag, following in pairwise([*flags, "--"]):
        name, _, given = flag.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_") == key:
            value = given or (True if following.startswith("--") else following)
    return str(value).lower() in ("yes", "true", "t", "y", "1")  # as in HfArgumentParser


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
        config = read_yaml_file(path) or {}
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise EchoError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise EchoError(f"{path} contains a {type(config).__name__}; a config must be a mapping of key: value lines")
    return config


def _checked(parser: Any, key: str, value: Any, source: str) -> Any:
    action = next(action for action in parser._actions if action.dest == key)
    if value is None:
        return value
    if isinstance(value, dict):
        if action.type is not _mapping:
            raise EchoError(f"{source}: {key} takes {'a list' if action.nargs else 'one value'}, not {value!r}")
        return _with_numbers(value)
    if isinstance(value, str) and key in _LIST_OR_TEXT:
        value = [value]
    if isinstance(value, list) != (action.nargs in ("+", "*")):
        raise EchoError(f"{source}: {key} takes {'one value' if isinstance(value, list) else 'a list'}, not {value!r}")
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, str) and "\0" in item for item in items):
        raise EchoError(f"{source}: {key} has a NUL character; remove it")
    items = [_with_home(item) if isinstance(item, str) else item for item in items]
    for yes, no in (("on", "off"), ("true", "false"), ("yes", "no")):
        # YAML 1.1 reads these words as booleans, unless they are quoted.
        words = {True: yes, False: no}
        items = [
            words[item] if isinstance(item, bool) and words[item] in (action.choices or ()) else item for item in items
        ]
    try:
        # YAML 1.1 reads 2e-4 as a string. The flag's type converts both spellings to a number.
        kind = action.type or (lambda item: item)
        numeric = kind in (_whole, _finite)
        converted = [kind(item if numeric and _is_number(item) else str(item)) for item in items]
    except Exception as error:
        raise EchoError(f"{source}: {key} cannot be {value!r} ({error})") from error
    for item in converted:
        if action.choices is not None and item not in action.choices:
            raise EchoError(f"{source}: {key} cannot be {item!r}; choose from {', '.join(map(str, action.choices))}")
    return converted if isinstance(value, list) else converted[0]


def _whole(item: Any) -> int:
    """Like `int`, but raises ArgumentTypeError for 2.7 instead of truncating it, and for more than 64 bits."""
    try:
        number = int(item)
    except (ValueError, OverflowError):
        number = None
    if number is None or (isinstance(item, float) and number != item) or abs(number) >= 2**63:
        raise argparse.ArgumentTypeError(f"invalid int value: {item!r}")
    return number


def _finite(item: Any) -> float:
    """Like `float`, but raises ArgumentTypeError for NaN and infinity."""
    try:
        number = float(item)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"invalid float value: {item!r}")
    return number


def _path(text: str) -> Path:
    """Like `Path`, but raises ArgumentTypeError for an empty text, which would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; give a path, or leave the option out")
    return Path(text)


_STRICT: dict[Any, Callable[[Any], Any]] = {int: _whole, float: _finite, Path: _path}


def _takes_mapping(kind: Any) -> bool:
    return any((get_origin(option) or option) is dict for option in (kind, *get_args(kind)))


def _mapping(text: str) -> Any:
    """Parse a JSON mapping, or return the name of an existing file. Raises ArgumentTypeError for anything else."""
    if text.startswith("{"):
        try:
            return _with_numbers(read_json(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from error
    if Path(text).is_file():
        return text
    raise argparse.ArgumentTypeError(f'{text!r} is neither a file nor a mapping such as {{"name": 1}}')


def _with_numbers(value: Any) -> Any:
    """Convert strings such as 1e-6 to numbers. YAML 1.1, which PyYAML (6.0) reads, requires a dot in floats."""
    if isinstance(value, dict):
        return {name: _with_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _blamed(error: Exception, given: Mapping[str, Any]) -> str:
    """Return `name: ` for the option that caused `error`, or an empty string if `error` names it already."""
    text = str(error)
    if any(re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE) for name in given):
        return ""
    for name, value in given.items():
        parts = value if isinstance(value, (dict, list)) else [value]
        if any(repr(str(part)) in text for part in parts):
            return f"{name}: "
    return ""


def _with_home(text: str) -> str:
    """Replace `~` with the home folder in a path or in `--option=path`. Shells expand it only after a space.

    No option accepts any other value that starts with `~/`.
    """
    return re.sub(r"^(--[\w-]+=)?~(?=/)", lambda found: (found[1] or "") + os.path.expanduser("~"), text)


def _is_number(item: Any) -> bool:
    return isinstance(item, (int, float)) and not isinstance(item, bool)


def _nearest(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    return f"; did you mean {near[0]!r}?" if near else "; run with --help for the list"


def _error_handler(source: str) -> Callable[[str], None]:
    def error(message: str) -> None:
        # If argparse names an argument, its value came from a flag, because values from the file were validated
        # earlier.
        where = COMMAND_LINE if message.startswith("argument ") else source
        raise EchoError(f"{where}: {message}; run with --help for the list")

    return error


PARTLY_DONE = 3
"""Exit status of a command that finished, but not for all images: some failed or, with --strict, were rejected."""


def run_main(main: Callable[[list[str]], int | None], resume_hint: str = "rerun the command to start again") -> None:
    """Run a command's `main(argv)` and exit with its status. After an error, print a one-line message to stderr.

    The status is what `main` returns (0 by default), or 2 for an error. As in a shell, it is 130 for Ctrl-C, 143 for
    SIGTERM and 141 for a closed pipe. It is 1 only if a command returns 1, as `evaluation.inspect` does for a flagged
    image. `evaluation.score --gate` exits with 1 or 3 for some verdicts. After Ctrl-C, the message ends with
    `resume_hint`. The traceback of an unexpected error is written to a file that the message names.
    """
    # When peft imports bitsandbytes (0.50), bitsandbytes warns that it does not use a kernel from the Hugging Face Hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # TRL (1.16) and peft (0.21) use names that transformers (5.23) has deprecated. Users cannot change them.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing` is deprecated", category=FutureWarning)
    # Pillow (13.0.0) warns about broken metadata and large images. `images.decode` refuses what cannot be used.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    log_to_terminal()
    # Names in datasets and runs may contain anything, so whatever a command prints is escaped.
    safe: Any = PrintableStream(sys.stdout)
    with handled_signals(resume_hint) as ending, redirect_stdout(safe):
        try:
            try:
                status = main(sys.argv[1:])
            except BrokenPipeError:  # `... | head` closed the pipe
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(141)
            except Exception as error:
                if ending.signals:  # torch (2.15) turns a KeyboardInterrupt in some of its loaders into a RuntimeError
                    ending.stop()
                LOGGER.error("%s", error if isinstance(error, EchoError) else _explain(error, resume_hint))
                sys.exit(2)
        except (KeyboardInterrupt, TerminatedError):  # a launcher may send SIGTERM while an error is reported
            ending.stop()
    if status:
        sys.exit(status)


def _explain(error: Exception, resume_hint: str) -> str:
    """Return a message about an unexpected error. It names the file with the traceback, unless a path is at fault."""
    reason = (str(error).strip().splitlines() or [""])[0]
    if lost_process(error):
        return f"another process has ended or cannot be reached ({reason[:200]}); see its error message; {resume_hint}"
    kind = type(error)
    if kind.__module__.partition(".")[0] == "wandb":
        return f"W&B: {error}; run wandb login, set WANDB_MODE=offline, or remove report_to"
    what = f"{kind.__name__}{': ' if reason else ''}{reason}"
    remedy = "check what the message mentions, or report the error with that file"
    # Torch.OutOfMemoryError, by its name, because torch may not be imported.
    if isinstance(error, MemoryError) or kind.__name__ == "OutOfMemoryError":
        what, remedy = f"out of memory ({what})", "use smaller batches or images, or a machine with more memory"
    elif isinstance(error, OSError) and error.filename:
        what, remedy = f"{error.filename}: {error.strerror}", "check the path, its permissions and the disk"
        if error.errno != errno.ENOENT:  # a missing file may also be a mistake in this project
            return f"{what}; {remedy}"
    elif isinstance(error, RuntimeError) and reason.startswith("Symlink loop"):  # from pathlib in Python 3.11 and 3.12
        return f"{reason}; remove the link or choose another path"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="echo_ft-error-", suffix=".txt", delete=False) as file:
            file.write(f"{shlex.join(sys.argv)}\n\n{''.join(traceback.format_exception(error))}")
    except OSError:  # the file cannot be written if the disk is full
        traceback.print_exception(error)
        return f"{what}; {remedy}"
    return f"{what}; {remedy}; the traceback is in {file.name}"


def named_first(argv: Sequence[str], flag: str) -> list[str]:
    """Pass positional arguments before the first option to `flag`.

    With the flag `--run`, `RUN_DIR --output X` becomes `--run RUN_DIR --output X`.
    """
    count = next((index for index, argument in enumerate(argv) if argument.startswith("-")), len(argv))
    return [flag, *argv] if count else list(argv)
