"""On-disk cache of generations, shared by runs of the same model, so that no prompt is answered twice.

A generation depends on the model and on its images, context and prompt. The rest of the batch affects only its lowest
bits (tests/inference/test_engine.py), so runs with different sets of questions can share the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import AsyncGenerate, BackendError, Generate
from echo_ft.files import RESUME_REMEDY, explain_full_disk, open_append
from echo_ft.inputs import open_input, restore
from echo_ft.provenance import fingerprint_bytes
from echo_ft.records import Exchange, Generation
from echo_ft.strict_yaml import read_json
from echo_ft.terminal import LOGGER


class GenerationCache:
    """Generations stored in a folder. They are read once, and each process appends to its own file.

    The results of one call are one line of the file: their SHA-256 and their JSON. An interrupted run therefore repeats
    whole calls, and its final files are bit-identical to those of an uninterrupted run.
    """

    def __init__(self, folder: Path, identities: Mapping[str, Any], process: int = 0) -> None:
        """Open the cache in `folder`; `process` numbers the file that this process appends to.

        `identities` holds, for each role, everything except the prompt that its generations depend on. Raises EchoError
        for a line that has changed. Lines that a killed process left incomplete are reported and left out.
        """
        self._identities = {role: json.dumps(identity, sort_keys=True) for role, identity in identities.items()}
        self._generations = dict(item for path in sorted(folder.glob("*.jsonl")) for item in _read(path))
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{process}.jsonl"

    def wrap(self, generate: Generate) -> Generate:
        """Wrap `generate` so that it is called only for branches that are not in the cache."""

        def cached(role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
            missing = self._missing(role, exchanges)
            if missing:
                self._store(role, missing, generate(role, missing))
            return self._lookup(role, exchanges)

        return cached

    def wrap_async(self, generate: AsyncGenerate) -> AsyncGenerate:
        """Like `wrap`, for an asynchronous backend."""

        async def cached(role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
            missing = self._missing(role, exchanges)
            if missing:
                self._store(role, missing, await generate(role, missing))
            return self._lookup(role, exchanges)

        return cached

    def _missing(self, role: str, exchanges: Sequence[Exchange]) -> list[Exchange]:
        """Return the exchanges with only the branches that are not in the cache; exchanges without any are left out."""
        missing = []
        for exchange in exchanges:
            new = [key not in self._generations for key in self._keys(role, exchange)]
            if any(new):
                branches = tuple(branch for branch, is_new in zip(exchange.branches, new, strict=True) if is_new)
                missing.append(replace(exchange, branches=branches))
        return missing

    def _store(self, role: str, exchanges: Sequence[Exchange], results: Sequence[Sequence[Any]]) -> None:
        new = {
            key: replace(generation, letters=dict(generation.letters))
            for exchange, generations in zip(exchanges, results, strict=True)
            for key, generation in zip(self._keys(role, exchange), generations, strict=True)
        }
        rows = {key: [one.text, one.letters, one.cut] for key, one in new.items()}
        # BackendError stops the run; an EchoError would fail only the case.
        with explain_full_disk(self._path.parent, RESUME_REMEDY, BackendError), open_append(self._path) as file:
            line = json.dumps(rows, ensure_ascii=False)
            # Start on a new line, because a killed process may have left a partial one.
            file.write(f"\n{hashlib.sha256(line.encode()).hexdigest()} {line}")
        self._generations |= new

    def _lookup(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        return [[self._generations[key] for key in self._keys(role, exchange)] for exchange in exchanges]

    def _keys(self, role: str, exchange: Exchange) -> list[str]:
        """Return a key per branch, derived from the role, its identity, the images, the context and the prompt."""
        shared = json.dumps([role, self._identities[role], exchange.images, exchange.context])
        return [fingerprint_bytes(shared.encode(), branch.prompt.encode()) for branch in exchange.branches]


def _read(path: Path) -> Iterator[tuple[str, Generation]]:
    """Yield the generations of a file, without those in partial lines. Raises EchoError for a line that has changed."""
    cut = 0
    with open_input(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.removesuffix(b"\n")
            # Older versions wrote no digest.
            digest, content = (b"", line) if line.startswith(b"{") else (line[:64], line[65:])
            if digest and hashlib.sha256(content).hexdigest().encode() + b" " != line[:65] and line.endswith(b"]}"):
                raise EchoError(f"{path}:{number} has changed since it was written; delete the file")
            try:
                rows = restore(dict[str, tuple[Any, ...]], read_json(content.decode(), unique_keys=False))
                found = [(key, _generation(*row)) for key, row in rows.items()]
            except (ValueError, TypeError):
                cut += bool(line)
                continue
            yield from found
    if cut:
        LOGGER.warning("%s has %d lines that a killed command cut off; they are generated again", path, cut)


def _generation(text: Any, letters: Any, cut: Any = False) -> Generation:
    """Return a stored generation; an older version stored no `cut`. Raises TypeError for values of another type."""
    # A letter that is ruled out has the log-probability -Infinity, which Python's JSON can hold; only NaN is invalid.
    known = isinstance(letters, dict) and all(type(one) in (int, float) and one == one for one in letters.values())
    if not isinstance(text, str) or not known or not isinstance(cut, bool):
        raise TypeError("not a generation")
    return Generation(text, letters, cut)
