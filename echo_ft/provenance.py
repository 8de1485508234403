"""Provenance of datasets, adapters and runs: fingerprints, package versions and the git commit."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from echo_ft.errors import EchoError
from echo_ft.files import flush_tree, write_text
from echo_ft.inputs import open_input, read_text, split_frame

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
    "torchvision",
    "pillow",
    "opencv-python-headless",
    "numpy",
    "scipy",
)

ANSWERING_PACKAGES = ("torch", "transformers", "peft", "torchvision", "pillow", "opencv-python-headless")
"""The PACKAGES that a model's answers depend on: those that decode and resize images, and those that run the model."""

CORRUPTING_PACKAGES = ("numpy", "scipy")
"""The PACKAGES on which the answers of a run with corruption depend as well."""

ANSWERING_MODULES = (
    "inference.engine", "experts.pipeline", "inference.server", "data.dataset", "model.loading", "model.adapters",
)  # fmt: skip
"""The modules of this package that produce a model's answers. `source_files` adds everything that they import."""

SUPPORTING_MODULES = ("errors", "processes", "provenance", "terminal")
"""Modules that ANSWERING_MODULES import but that cannot change an answer. A run resumes after changes to them."""


def versions() -> dict[str, str]:
    """Return the versions of Python and all PACKAGES, keyed by name. A package that is not installed is `absent`."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def split_versions(corrupted: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Return the versions of the packages that a run's answers depend on, and those of Python and all others.

    `corrupted` says whether the run degrades its queries.
    """
    found, answering = versions(), ANSWERING_PACKAGES + (CORRUPTING_PACKAGES if corrupted else ())
    others = {name: version for name, version in found.items() if name not in answering}
    return {name: found[name] for name in answering}, others


def commit() -> str:
    """Return the git commit of this code, or `unknown` outside a checkout.

    The suffix `-dirty` means that tracked files have uncommitted changes.
    """
    here = Path(__file__).resolve().parent
    try:
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)  # it fails in an environment in another checkout
        head = _git(here, "rev-parse", "HEAD")
        return head + ("-dirty" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def code_fingerprint(*files: Path) -> str:
    """Fingerprint source files.

    Unlike the git commit, the fingerprint ignores changes to documentation, distinguishes uncommitted changes, and
    also works outside a checkout. Raises OSError if a file cannot be read.
    """
    return fingerprint_files(files, Path(os.path.commonpath([file.parent for file in files])))


def source_files(*modules: str, exclude: Collection[str] = ()) -> list[Path]:
    """Return the source files of `modules` and of everything that they import from this package, sorted by module.

    Module names omit the package, as in `inference.engine`. Modules in `exclude` are left out, together with modules
    that only they import.
    """
    package = Path(__file__).resolve().parent
    found, pending = set[str](), [*modules]
    while pending:
        module = pending.pop()
        if module not in found and module not in exclude:
            found.add(module)
            pending += _imported(package, _module_file(package, module).read_text(encoding="utf-8"))
    return [_module_file(package, module) for module in sorted(found)]


def _module_file(package: Path, module: str) -> Path:
    return package.joinpath(*module.split(".")).with_suffix(".py")


def _imported(package: Path, source: str) -> list[str]:
    """Return the modules of a package that some source code imports, including imports inside functions.

    Only absolute `from` imports count, because this package imports its own modules in no other way.
    """
    froms = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module]
    named = [name for node in froms for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))]
    own = [str(name).removeprefix(f"{package.name}.") for name in named if str(name).startswith(f"{package.name}.")]
    return [name for name in own if _module_file(package, name).is_file()]


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def fingerprint_bytes(*chunks: bytes) -> str:
    """Return the first 16 hex digits of a SHA-256 over the chunks. Chunk boundaries affect the result."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(len(chunk).to_bytes(8, "big") + chunk)
    return digest.hexdigest()[:16]


def same_weights(one: str | None, other: str | None) -> bool:
    """Return whether two fingerprints of a base model (`model.loading.base_fingerprint`) are of the same weights.

    Older versions recorded only the part before the hyphen. If one of them lacks the rest, the first part decides.
    """
    if one is None or other is None or ("-" in one and "-" in other):
        return one == other
    return one.partition("-")[0] == other.partition("-")[0]


def fingerprint_files(paths: Iterable[Path], root: Path) -> str:
    """Fingerprint the contents and paths (relative to `root`) of files, in any order, as 16 hex digits.

    Raises OSError if a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(content_hash(path))
    return digest.hexdigest()[:16]


HASHING_THREADS = 8
"""Number of files that are hashed at the same time. Hashing releases Python's lock."""


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the hex SHA-256 of files in a folder, keyed by name in the order of `names`.

    Raises OSError or InputError if a file cannot be read.
    """
    names = list(names)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: content_hash(folder / name).hex(), names), strict=True))


def row_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the hex SHA-256 of the lines, in any order, of each of these files that exists in a folder.

    Raises OSError or InputError if a file cannot be read.
    """
    found = {}
    for name in names:
        if (folder / name).is_file():
            with open_input(folder / name) as file:
                lines = sorted(hashlib.sha256(line).digest() for line in file)
            found[name] = hashlib.sha256(b"".join(lines)).hexdigest()
    return found


def first_change(folder: Path, digests: Mapping[str, str]) -> str | None:
    """Return what is wrong with the first file that does not match its SHA-256, such as `PATH has changed`, or None.

    `digests` maps names of files in `folder` to their hex SHA-256.
    """
    missing = [name for name in digests if not (folder / name).is_file()]
    if missing:
        return f"{folder / missing[0]} is missing"
    try:
        found = digests_of(folder, digests)
    except (OSError, ValueError) as error:
        return f"a file of {folder} cannot be read ({error})"
    changed = [name for name, digest in found.items() if digest != digests[name]]
    return f"{folder / changed[0]} has changed" if changed else None


CHECKSUMS = "SHA256SUMS"
"""The checksums of files in a folder, in the format of sha256sum."""


def write_sums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write CHECKSUMS with the hex SHA-256 of files in a folder, keyed by name."""
    write_text(folder / CHECKSUMS, "".join(f"{digest}  {name}\n" for name, digest in digests.items()))


def read_sums(folder: Path) -> dict[str, str]:
    """Read what `write_sums` wrote. Raises OSError, and ValueError for any other content."""
    lines = read_text(folder / CHECKSUMS).removesuffix("\n").split("\n")
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def seal_folder(folder: Path) -> None:
    """Flush everything in a folder to disk, and write CHECKSUMS for all its files."""
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    write_sums(folder, digests_of(folder, sorted(name for name in files if name != CHECKSUMS)))
    flush_tree(folder)


def require_sealed(folder: Path, remedy: str) -> bool:
    """Raise EchoError with `remedy` if a file listed in the folder's CHECKSUMS has changed or is missing.

    Returns False if there are no CHECKSUMS, as in folders from older versions.
    """
    try:
        digests = read_sums(folder)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise EchoError(f"{folder / CHECKSUMS} cannot be read ({error}); {remedy}") from error
    fault = first_change(folder, digests)
    if fault:
        raise EchoError(f"{fault} since it was saved; {remedy}")
    return True


def content_hash(path: Path | str) -> bytes:
    """Return the SHA-256 of a file's content, 32 bytes. It depends on the frame if the path names one.

    Raises OSError or InputError if the file cannot be read.
    """
    name, frame = split_frame(Path(path))
    with open_input(name) as file:
        digest = hashlib.file_digest(file, "sha256")
    if frame is not None:  # two frames of a file are two images
        digest.update(f"#frame={frame}".encode())
    return digest.digest()
