"""Features of many files: described in shards that are kept by content, so that nothing is described twice."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo_ft.errors import EchoError
from echo_ft.files import atomic_file
from echo_ft.provenance import content_hash, fingerprint_bytes
from echo_ft.records import Rejection
from echo_ft.retrieval.descriptors import Describer, Vector

SHARD = 2048
"""Files described between two writes: what a process that is killed loses at most."""


@dataclass(frozen=True)
class DescriptorTable:
    """Features of image files: `matrix[rows[path]]` belongs to `path`, `hashes[path]` is its content's SHA-256.

    Files of equal content share a row.
    """

    rows: dict[str, int]
    hashes: dict[str, str]
    matrix: Vector
    """(n, d) float32, rows of length 1."""

    def of(self, path: str) -> Vector:
        """The feature (d,) of one file."""
        return self.matrix[self.rows[path]]

    def stack(self, paths: Sequence[str]) -> Vector:
        """The features (n, d) of several files."""
        return self.matrix[[self.rows[path] for path in paths]]


class DescriptorCache:
    """Features by content hash, in shards: files of one folder that are whole or absent, or memory without a folder.

    Several processes may write into one folder at the same time.
    """

    def __init__(self, describe: Describer, cache: Path | None) -> None:
        """The features of `describe` below the folder `cache`, or for this process alone."""
        self.folder = cache / f"features-{describe.key}" if cache else None
        self._held: list[tuple[list[str], Vector]] = []

    def add(self, hashes: Sequence[str], vectors: Vector) -> None:
        """Keep the rows of `vectors` (n, d) under `hashes`, as one shard."""
        if self.folder is None:
            self._held.append((list(hashes), vectors))
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{fingerprint_bytes(*map(str.encode, hashes))}.npz"
        with atomic_file(path, unique=True) as partial, open(partial, "wb") as file:
            np.savez(file, hashes=np.array(hashes), vectors=vectors)

    def known(self) -> set[str]:
        """The hashes under which there is a feature. Raises EchoError for a file that cannot be read."""
        return {digest for hashes, _ in self._shards() for digest in hashes}

    def gather(self, rows: Mapping[str, int]) -> Vector:
        """The features (len(rows), d), each in the row that its hash has in `rows`; a row without a feature is zero.

        Raises EchoError for a file that cannot be read.
        """
        matrix: Vector | None = None
        for hashes, read in self._shards():
            found = [(rows[digest], place) for place, digest in enumerate(hashes) if digest in rows]
            if found:
                vectors = read()
                if matrix is None:
                    matrix = np.zeros((len(rows), vectors.shape[1]), np.float32)
                to, of = zip(*found, strict=True)
                matrix[list(to)] = vectors[list(of)]
        return np.zeros((0, 1), np.float32) if matrix is None else matrix

    def _shards(self) -> Iterator[tuple[list[str], Callable[[], Vector]]]:
        """The hashes of each shard, and what reads its vectors."""
        for hashes, vectors in self._held:
            yield hashes, partial(np.asarray, vectors)
        for path in sorted(self.folder.glob("*.npz")) if self.folder else ():
            yield _read(path, "hashes").tolist(), partial(_read, path, "vectors")


def _read(path: Path, name: str) -> NDArray[Any]:
    try:
        with np.load(path, allow_pickle=False) as content:
            return content[name]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise EchoError(f"the feature cache {path} cannot be read ({type(error).__name__}); delete it") from error


def hash_files(paths: Sequence[str], root: Path) -> tuple[dict[str, str], list[Rejection]]:
    """SHA-256 of each file by path, in the order given, and a rejection for every one that cannot be opened."""
    hashes: dict[str, str] = {}
    rejections = []
    for path in paths:
        try:
            hashes[path] = content_hash(os.path.join(root, path)).hex()
        except OSError as error:
            rejections.append(Rejection(path, f"the image cannot be opened ({error.strerror}): {root / path}"))
    return hashes, rejections


def describe_new(
    hashes: dict[str, str], root: Path, describe: Describer, store: DescriptorCache
) -> Iterator[dict[str, str]]:
    """Describe what the store lacks of the files in `hashes` (path to SHA-256), SHARD at a time, each kept at once.

    Yields for each shard the hashes of files that are no images, and why.
    """
    known = store.known()
    new = list({digest: path for path, digest in reversed(hashes.items()) if digest not in known}.items())[::-1]
    for start in range(0, len(new), SHARD):
        part = new[start : start + SHARD]
        vectors, faults = describe.vectors([root / path for _, path in part])
        made = [(digest, vector) for (digest, _), vector in zip(part, vectors, strict=True) if vector is not None]
        if made:
            store.add([digest for digest, _ in made], np.stack([vector for _, vector in made]))
        yield {digest: fault for (digest, _), fault in zip(part, faults, strict=True) if fault is not None}


def describe_files(
    paths: Sequence[str], root: Path, describe: Describer, cache: Path | None
) -> tuple[DescriptorTable, list[Rejection]]:
    """Features of the files that can be read, and a rejection for every other, by path.

    With `cache`, a file whose content has been described before is not read again but for its hash.
    """
    hashes, rejections = hash_files(paths, root)
    store = DescriptorCache(describe, cache)
    broken: dict[str, str] = {}
    for faults in describe_new(hashes, root, describe, store):
        broken |= faults
    rejections += [Rejection(path, broken[digest]) for path, digest in hashes.items() if digest in broken]
    numbers = {digest: row for row, digest in enumerate(dict.fromkeys(hashes.values()))}
    rows = {path: numbers[digest] for path, digest in hashes.items() if digest not in broken}
    return DescriptorTable(rows, hashes, store.gather(numbers)), sorted(
        rejections, key=lambda rejection: rejection.item
    )
