"""What tells two datasets, adapters or runs apart: fingerprints, package versions, the commit."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "datasets",
    "open_clip_torch",
    "faiss-cpu",
    "scikit-image",
)

ANSWERING = ("torch", "transformers", "peft")
"""Those of PACKAGES that a model's answers come out of; the rest train, build and read."""


def versions() -> dict[str, str]:
    """Python's version and those of the packages that results depend on; `absent` where one is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def commit() -> str:
    """The git commit of this code, with `-dirty` where tracked files differ from it; `unknown` outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        head = _git(here, "rev-parse", "HEAD")
        return head + ("-dirty" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def code_fingerprint(*paths: Path) -> str:
    """Fingerprint of Python sources: each of `paths` is a file, or a folder whose own .py files count.

    Unlike the commit it is the same after a change to the documents, differs between two uncommitted states, and is
    there outside a checkout.
    """
    files = [file for path in paths for file in (path.glob("*.py") if path.is_dir() else [path])]
    return fingerprint_files(files, Path(os.path.commonpath([file.parent for file in files])))


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def fingerprint_bytes(*chunks: bytes) -> str:
    """SHA-256 over the chunks, 16 hex digits; where one chunk ends and the next begins counts."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(len(chunk).to_bytes(8, "big") + chunk)
    return digest.hexdigest()[:16]


def fingerprint_files(paths: Iterable[Path], root: Path) -> str:
    """Fingerprint of files by content and by their path relative to `root`; the order given does not matter."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
