"""Descriptors of many files, cached in shards by file content, so that no image is processed twice."""

from __future__ import annotations

import hashlib
import io
import os
import struct
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
from echo_ft.processes import remove_left_over_files
from echo_ft.provenance import content_hash
from echo_ft.records import Rejection
from echo_ft.retrieval.descriptors import DescriptorExtractor, FloatArray

SHARD_SIZE = 2048
"""Number of files between two writes. A killed process loses at most this many descriptors."""


@dataclass(frozen=True)
class DescriptorTable:
    """The descriptors of image files. Files with equal content share a row."""

    rows: dict[str, int]
    """Maps a path to its row in `matrix`."""
    hashes: dict[str, str]
    """Maps a path to the SHA-256 of the file's content, in hex."""
    matrix: FloatArray
    """(n, d) float32, rows of length 1."""

    def vector(self, path: str) -> FloatArray:
        """Return the descriptor (d,) of one file."""
        return self.matrix[self.rows[path]]

    def vectors(self, paths: Sequence[str]) -> FloatArray:
        """Return the descriptors (n, d) of several files."""
        return self.matrix[[self.rows[path] for path in paths]]


class DescriptorCache:
    """Descriptors keyed by content hash. Shards are atomically written files, or held in memory if there is no folder.

    Several processes may write to the same folder at once.
    """

    def __init__(self, extractor: DescriptorExtractor, cache: Path | None) -> None:
        """Open the cache of `extractor` below the folder `cache`, or in memory if `cache` is None."""
        self.folder = cache / f"features-{extractor.key}" if cache else None
        for folder in (cache, self.folder) if cache and self.folder else ():
            remove_left_over_files(folder)
        self._memory: list[tuple[list[str], FloatArray]] = []

    def add(self, hashes: Sequence[str], vectors: FloatArray) -> None:
        """Store the rows of `vectors` (n, d) under their `hashes` as one shard."""
        if self.folder is None:
            self._memory.append((list(hashes), vectors))
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez(buffer, hashes=np.array(hashes), vectors=vectors)
        content = buffer.getvalue()
        with atomic_file(self.folder / f"{hashlib.sha256(content).hexdigest()}.npz", unique=True) as partial:
            partial.write_bytes(content)

    def known(self) -> set[str]:
        """Return the hashes of all stored descriptors. Raises EchoError if a shard cannot be read."""
        return {digest for hashes, _ in self._shards() for digest in hashes}

    def gather(self, rows: Mapping[str, int]) -> FloatArray:
        """Return the descriptors (len(rows), d), where `rows` maps each hash to its row.

        Rows of unknown hashes are zero. Raises EchoError if a shard cannot be read or is damaged.
        """
        matrix: FloatArray | None = None
        for hashes, read in self._shards():
            found = [(rows[digest], position) for position, digest in enumerate(hashes) if digest in rows]
            if found:
                vectors = read()
                wide = vectors.shape[1:] if matrix is None else matrix.shape[1:]
                if vectors.shape != (len(hashes), *wide) or len(wide) != 1 or not np.isfinite(vectors).all():
                    raise EchoError(
                        f"the descriptor cache {self.folder} is damaged (a shard of {vectors.shape} values for "
                        f"{len(hashes)} images, or a value that is not a number); delete it"
                    )
                if matrix is None:
                    matrix = np.zeros((len(rows), vectors.shape[1]), np.float32)
                target, source = zip(*found, strict=True)
                matrix[list(target)] = vectors[list(source)]
        return np.zeros((0, 1), np.float32) if matrix is None else matrix

    def _shards(self) -> Iterator[tuple[list[str], Callable[[], FloatArray]]]:
        """Yield the hashes of each shard and a function that reads its vectors."""
        for hashes, vectors in self._memory:
            yield hashes, partial(np.asarray, vectors)
        for path in sorted(self.folder.glob("*.npz")) if self.folder else ():
            yield _read(path, "hashes").tolist(), partial(_read_vectors, path)


def _read_vectors(path: Path) -> FloatArray:
    require_unchanged_shard(path)
    return _read(path, "vectors")


def require_unchanged_shard(path: Path) -> None:
    """Raise EchoError if a shard does not match the SHA-256 in its name. Older names do not have one."""
    if len(path.stem) != 16 and content_hash(path).hex() != path.stem:
        raise EchoError(f"the descriptor cache {path} has changed since it was written; delete it")


def _read(path: Path, name: str) -> NDArray[Any]:
    try:
        with np.load(path, allow_pickle=False) as content:
            return content[name]
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, struct.error, zipfile.BadZipFile) as error:
        raise EchoError(f"the descriptor cache {path} cannot be read ({type(error).__name__}); delete it") from error


def hash_files(paths: Sequence[str], root: Path) -> tuple[dict[str, str], list[Rejection]]:
    """Return the SHA-256 of each file, keyed by path in the given order, and a rejection for each unreadable file."""
    hashes: dict[str, str] = {}
    rejections = []
    for path in paths:
        try:
            hashes[path] = content_hash(os.path.join(root, path)).hex()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            rejections.append(Rejection(path, f"the image cannot be opened ({reason}): {root / path}"))
    return hashes, rejections


def extract_missing(
    hashes: dict[str, str], root: Path, extractor: DescriptorExtractor, cache: DescriptorCache
) -> Iterator[dict[str, str]]:
    """Extract the descriptors that the cache lacks, SHARD_SIZE files at a time, and store each shard immediately.

    `hashes` maps the path of each file to its SHA-256. For each shard, yields the errors of unreadable images, keyed by
    hash.
    """
    known = cache.known()
    new = list({digest: path for path, digest in reversed(hashes.items()) if digest not in known}.items())[::-1]
    for start in range(0, len(new), SHARD_SIZE):
        shard = new[start : start + SHARD_SIZE]
        vectors, errors = extractor.vectors([root / path for _, path in shard])
        extracted = [(digest, vector) for (digest, _), vector in zip(shard, vectors, strict=True) if vector is not None]
        if extracted:
            cache.add([digest for digest, _ in extracted], np.stack([vector for _, vector in extracted]))
        yield {digest: error for (digest, _), error in zip(shard, errors, strict=True) if error is not None}


def extract_descriptors(
    paths: Sequence[str], root: Path, extractor: DescriptorExtractor, cache: Path | None
) -> tuple[DescriptorTable, list[Rejection]]:
    """Return the descriptors of all readable files, and rejections of all other files, sorted by path.

    If a `cache` folder is given, files whose descriptors it holds are read only to compute their hashes. Raises
    EchoError if a shard of the cache cannot be read.
    """
    hashes, rejections = hash_files(paths, root)
    descriptors = DescriptorCache(extractor, cache)
    broken: dict[str, str] = {}
    for errors in extract_missing(hashes, root, extractor, descriptors):
        broken |= errors
    rejections += [Rejection(path, broken[digest]) for path, digest in hashes.items() if digest in broken]
    row_of = {digest: row for row, digest in enumerate(dict.fromkeys(hashes.values()))}
    rows = {path: row_of[digest] for path, digest in hashes.items() if digest not in broken}
    rejections = sorted(rejections, key=lambda rejection: rejection.item)
    return DescriptorTable(rows, hashes, descriptors.gather(row_of)), rejections
