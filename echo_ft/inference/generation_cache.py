"""What roles said, kept in files: what another run of the same model was asked in the same words is not asked again.

An answer depends on the model and on what is asked: images, context and prompt. On what it is computed beside depend
its last bits alone (tests/inference/test_engine.py), so it may be shared by runs that differ in what else they ask.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from echo_ft.experts.pipeline import AsyncGenerate, Generate
from echo_ft.provenance import fingerprint_bytes
from echo_ft.records import Exchange, Generation


class GenerationCache:
    """The utterances in a folder, read at the start; this process adds to a file of its own.

    All that one call was answered is one line: a run that was stopped asks again together what it had asked together,
    and so ends with the bytes of a run left alone.
    """

    def __init__(self, folder: Path, speakers: Mapping[str, Any], process: int = 0) -> None:
        """`speakers` tells of each role all that its answers depend on beside what it is asked."""
        self._speakers = {role: json.dumps(speaker, sort_keys=True) for role, speaker in speakers.items()}
        self._said = dict(said for path in sorted(folder.glob("*.jsonl")) for said in _read(path))
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{process}.jsonl"

    def wrap(self, generate: Generate) -> Generate:
        """`generate`, asked only for what is not there yet."""

        def recall(role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
            missing = self._missing(role, exchanges)
            if missing:
                self._keep(role, missing, generate(role, missing))
            return self._recall(role, exchanges)

        return recall

    def wrap_async(self, generate: AsyncGenerate) -> AsyncGenerate:
        """As `before`, for a backend that is awaited."""

        async def recall(role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
            missing = self._missing(role, exchanges)
            if missing:
                self._keep(role, missing, await generate(role, missing))
            return self._recall(role, exchanges)

        return recall

    def _missing(self, role: str, exchanges: Sequence[Exchange]) -> list[Exchange]:
        """The exchanges with those of their branches that were not answered yet; none without any."""
        missing = []
        for exchange in exchanges:
            new = [key not in self._said for key in self._keys(role, exchange)]
            if any(new):
                branches = tuple(branch for branch, asked in zip(exchange.branches, new, strict=True) if asked)
                missing.append(replace(exchange, branches=branches))
        return missing

    def _keep(self, role: str, exchanges: Sequence[Exchange], said: Sequence[Sequence[Any]]) -> None:
        new = {
            key: Generation(utterance.text, dict(utterance.letters))
            for exchange, generations in zip(exchanges, said, strict=True)
            for key, utterance in zip(self._keys(role, exchange), generations, strict=True)
        }
        rows = {key: [utterance.text, utterance.letters] for key, utterance in new.items()}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(rows, ensure_ascii=False))  # after what a killed process left of its last line
        self._said |= new

    def _recall(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        return [[self._said[key] for key in self._keys(role, exchange)] for exchange in exchanges]

    def _keys(self, role: str, exchange: Exchange) -> list[str]:
        """What tells each branch from all others: who is asked, what is shown, and the words."""
        shared = json.dumps([role, self._speakers[role], exchange.images, exchange.context])
        return [fingerprint_bytes(shared.encode(), branch.prompt.encode()) for branch in exchange.branches]


def _read(path: Path) -> Iterator[tuple[str, Generation]]:
    """The utterances of a file, some of whose lines may be half written."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                rows = json.loads(line)
            except ValueError:
                continue
            for key, (text, letters) in rows.items():
                yield key, Generation(text, letters)
