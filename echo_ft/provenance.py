"""What tells two datasets, adapters or runs apart: fingerprints, package versions, the commit."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Collection, Iterable
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

ANSWERING_PACKAGES = ("torch", "transformers", "peft")
"""Those of PACKAGES that a model's answers come out of; the rest train, build and read."""

ANSWERING_MODULES = (
    "inference.engine", "experts.pipeline", "inference.server", "data.dataset", "model.loading", "model.adapters",
)  # fmt: skip
"""The modules of this package that produce a model's answers, together with all that they import (`source_files`)."""

SUPPORTING_MODULES = ("errors", "provenance")
"""Imported by those, but unable to change an answer: a change to them does not stop a run from resuming."""


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


def code_fingerprint(*files: Path) -> str:
    """Fingerprint of source files.

    Unlike the commit it is the same after a change to the documents, differs between two uncommitted states, and is
    there outside a checkout.
    """
    return fingerprint_files(files, Path(os.path.commonpath([file.parent for file in files])))


def source_files(*modules: str, without: Collection[str] = ()) -> list[Path]:
    """The files of this package that `modules` of it need: their own, and those of everything these import from it.

    Modules are named from the package on, as in `inference.engine`. Neither those in `without`, nor what only these
    import, are followed.
    """
    package = Path(__file__).resolve().parent
    found, waiting = set[str](), [*modules]
    while waiting:
        module = waiting.pop()
        if module not in found and module not in without:
            found.add(module)
            waiting += _imported(package, _module_file(package, module).read_text(encoding="utf-8"))
    return [_module_file(package, module) for module in sorted(found)]


def _module_file(package: Path, module: str) -> Path:
    return package.joinpath(*module.split(".")).with_suffix(".py")


def _imported(package: Path, source: str) -> list[str]:
    """The modules of a package that a source imports anywhere, each by an absolute `from` import, as all do here."""
    froms = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module]
    named = [name for node in froms for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))]
    inside = [str(name).removeprefix(f"{package.name}.") for name in named if str(name).startswith(f"{package.name}.")]
    return [name for name in inside if _module_file(package, name).is_file()]


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
        digest.update(content_hash(path))
    return digest.hexdigest()[:16]


def content_hash(path: Path | str) -> bytes:
    """SHA-256 of a file's content, 32 bytes. Raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
