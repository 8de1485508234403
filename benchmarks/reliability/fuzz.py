"""Run a parser on changed inputs: `python -m benchmarks.reliability.fuzz --parser coco --executions 100000`.

A parser must return or refuse an input with its own kind of error, within SECONDS. Everything else is a finding: the
command writes the input and the traceback to `--output`, continues, and exits with status 1 at the end.

`--engine hypothesis` changes parts of the JSON and pieces of the text in valid examples. `--engine atheris` changes
bytes and keeps the inputs that reach new lines of this project. It needs the package atheris (`pip install atheris`).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

if TYPE_CHECKING:
    from benchmarks.reliability.parsers import Parser

SECONDS = 10
"""Time limit of one execution. An ordinary one takes about a millisecond."""

PIECES = (
    *'"{}[]:,;\n\t\0 -.\\/&*!|>%#?()<', "\ufeff", "\u2028", "\ud83d\ude00", "é", "\\ud800", "null", "true", "NaN",
    "Infinity", "1e400", "-1", "0", "9" * 50, "../", "/", "good", "&a ", "*a", "<<: ", "!!int ''", "!!binary x",
    "---\n", "<|im_end|>", "<|box_start|>", "[" * 100, "A", "B.", "yes",
)  # fmt: skip
"""Strings that edits insert into an example."""

ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "../a.png", "/etc/hostname", "a.png", "good", "dent;crack", "x" * 5000, "\0", "\x1b[1m"]),
    st.sampled_from([[], {}, [[]], [{}], {"": None}, [None], [[0, 0, 1, 1]]]),
)


@dataclass
class Found:
    """The results of executing one parser."""

    executions: int = 0
    refused: int = 0
    slowest: float = 0.0
    """Seconds of the longest execution."""
    finds: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    """The shortest input and its traceback, by the type of the error and where it was raised."""


class HangError(BaseException):
    """Raised in an execution that exceeds its time limit.

    It is not an Exception, because `except Exception` in a parser would turn it into a refusal.
    """


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise HangError in the block after `seconds`."""

    def stop(*_: object) -> None:
        raise HangError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def execute(parser: Parser, content: bytes, folder: Path, found: Found) -> None:
    """Parse one input, and record the result in `found`."""
    found.executions += 1
    started = time.perf_counter()
    try:
        with time_limit(SECONDS):
            parser.read(content, folder)
    except parser.refusals:
        found.refused += 1
    except (Exception, HangError) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "benchmarks" not in frame.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "result"
        name = f"{type(error).__name__} at {place}"
        if name not in found.finds or len(content) < len(found.finds[name][0]):
            found.finds[name] = content, traceback.format_exc()
    found.slowest = max(found.slowest, time.perf_counter() - started)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Return the paths of all parts of parsed JSON."""
    yield path
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*path, key))


@st.composite
def changed_json(draw: st.DrawFn, example: bytes) -> bytes:
    """Return an example in which one to three parts of the JSON are replaced, removed or repeated."""
    value = json.loads(example)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        change = draw(st.sampled_from(["replace", "remove", "repeat"]))
        if change == "replace":
            holder[path[-1]] = copy.deepcopy(draw(ODD_VALUES))  # a copy, because the next edit may change the value
        elif change == "remove":
            del holder[path[-1]]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[path[-1]]))
        else:
            holder[draw(st.sampled_from(list(holder))) + draw(st.sampled_from(["", " ", "s", "_"]))] = copy.deepcopy(
                holder[path[-1]]
            )
    return json.dumps(value).encode()


@st.composite
def changed_text(draw: st.DrawFn, example: bytes) -> bytes:
    """Return an example in which one to four pieces of the text are replaced, removed or repeated."""
    content = example
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(start + 20, len(content))))
        kept = content[start:end] * draw(st.sampled_from([0, 0, 1, 2, 50]))
        piece = draw(st.one_of(st.sampled_from(PIECES).map(_bytes), st.binary(max_size=4)))
        content = content[:start] + piece + kept + content[end:]
    return content


def _bytes(piece: str) -> bytes:
    return piece.encode(errors="surrogatepass")


def contents(parser: Parser) -> st.SearchStrategy[bytes]:
    """Generate changed examples of a parser, and a few inputs of arbitrary bytes."""
    options: list[st.SearchStrategy[bytes]] = [st.binary(max_size=40)]
    for example in parser.examples:
        options.append(changed_text(example))
        if example.startswith((b"{", b"[")) and b"\n" not in example:
            options += [changed_json(example)] * 3
    return st.one_of(options)


def fuzz(parser: Parser, executions: int, folder: Path, seed: int = 0) -> Found:
    """Execute a parser on `executions` inputs from hypothesis.

    Failing inputs are not shrunk; the shortest finding is kept.
    """
    found = Found()

    @seeded(seed)
    @settings(
        max_examples=executions,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(contents(parser))
    def run(content: bytes) -> None:
        execute(parser, content, folder, found)

    for example in parser.examples:
        execute(parser, example, folder, found)
    run()
    return found


def fuzz_bytes(name: str, executions: int, folder: Path, seed: int, output: Path) -> None:
    """Execute a parser on `executions` inputs from atheris and write the findings to `output`.

    Then remove `folder` and end the process.
    """
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["echo_ft", "data_prep"]):
        parser = _known_parsers([name])[0]
        _parsers().prepare_folder(folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, example in enumerate(parser.examples):
        (corpus / str(number)).write_bytes(example)
    words = folder / "words.dict"
    escaped = ("".join(f"\\x{byte:02x}" for byte in _bytes(piece)) for piece in PIECES)
    words.write_text("".join(f'"{piece}"\n' for piece in escaped))
    found = Found()

    def run(content: bytes) -> None:
        execute(parser, content, folder, found)
        if found.executions >= executions:  # libFuzzer ends the process itself, without Python's clean-up
            report(name, found, output)
            sys.stdout.flush()
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(1 if found.finds else 0)

    limits = ["-max_len=4096", "-rss_limit_mb=3000", f"-seed={seed + 1}", "-verbosity=0", f"-dict={words}"]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], run)
    atheris.Fuzz()


def _parsers() -> ModuleType:
    return importlib.import_module("benchmarks.reliability.parsers")


def _known_parsers(names: Sequence[str]) -> list[Parser]:
    """Return the parsers with these names. Exits if one is unknown."""
    known = _parsers().PARSERS
    if not set(names) <= set(known):
        sys.exit(f"--parser {', '.join(names)} is unknown; choose from {', '.join(known)}")
    return [known[name] for name in names]


def report(name: str, found: Found, output: Path) -> None:
    """Print what was found, and write each finding to a separate file."""
    print(
        f"{name}: {found.executions:,} executions, {found.refused:,} refused, {len(found.finds)} findings, slowest "
        f"{found.slowest:.2f} s",
        flush=True,
    )
    for place, (content, text) in found.finds.items():
        output.mkdir(parents=True, exist_ok=True)
        path = output / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"
        path.write_bytes(content)
        path.with_suffix(".txt").write_text(text, encoding="utf-8", errors="backslashreplace")
        print(f"  {place}: {path}", flush=True)


def main() -> None:
    """Fuzz one parser, or all of them in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parser", default="all", help="Name of the parser in parsers.py; default: all of them.")
    parser.add_argument("--executions", type=int, default=10_000, help="Inputs per parser.")
    parser.add_argument(
        "--engine", choices=["hypothesis", "atheris"], default="hypothesis", help="The package that generates inputs."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed for the inputs.")
    parser.add_argument("--output", type=Path, default=Path("finds"), help="Folder for the findings.")
    options = parser.parse_args()
    if options.engine == "atheris":
        if options.parser == "all":
            parser.error("--engine atheris takes one parser per process; add --parser NAME")
        with tempfile.TemporaryDirectory() as folder:
            fuzz_bytes(options.parser, options.executions, Path(folder), options.seed, options.output)
    names = list(_parsers().PARSERS) if options.parser == "all" else [options.parser]
    finds = 0
    for name, chosen in zip(names, _known_parsers(names), strict=True):
        with tempfile.TemporaryDirectory() as folder:
            prepared = _parsers().prepare_folder(Path(folder))
            found = fuzz(chosen, options.executions, prepared, options.seed)
        report(name, found, options.output)
        finds += len(found.finds)
    sys.exit(1 if finds else 0)


if __name__ == "__main__":
    main()
