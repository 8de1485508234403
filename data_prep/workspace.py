"""The output folder of a build. It is replaced as a whole or not at all, and only if a build wrote its content."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from echo_ft.data.dataset import DATASET_FORMAT, DIGESTS
from echo_ft.errors import EchoError
from echo_ft.files import atomic_folder
from echo_ft.inputs import read_json_object
from echo_ft.processes import PARTIAL

DATASET_ENTRIES = frozenset(
    {
        "audit.html",
        "audit.json",
        DIGESTS,
        "images",
        "inspections.jsonl",
        "knowledge.json",
        "manifest.json",
        "masks",
        "preview.html",
        "questions.jsonl",
        "references.jsonl",
        "rejected.jsonl",
        "sft",
    }
)
"""Files and folders at the top level of a dataset folder. A folder that contains anything else is never removed."""


@contextmanager
def workspace(output: Path, config: Mapping[str, Any], overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder to build in. It replaces `output` if the block succeeds; otherwise, it is removed.

    Raises EchoError before anything is built if `output` is not a dataset, or was built with a different config. With
    `overwrite`, the config may differ.
    """
    _check_replaceable(output, config, overwrite)
    with atomic_folder(output) as folder:
        yield folder


def _check_replaceable(output: Path, config: Mapping[str, Any], overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise EchoError(f"{output} is a file; choose another output")
    names = {path.name for path in output.iterdir()}
    if not names:
        return
    manifest = _read_manifest(output / "manifest.json")
    if manifest is None:
        raise EchoError(f"{output} holds files that are not a dataset of this project; choose another output")
    foreign = sorted(name for name in names if name.removesuffix(PARTIAL) not in DATASET_ENTRIES)
    if foreign:
        raise EchoError(
            f"{output} also holds {foreign[0]}, which a build would remove; move it or choose another output"
        )
    before = manifest.get("config", {})
    changed = sorted(key for key in {*before, *config} if before.get(key) != config.get(key))
    if changed and not overwrite:
        raise EchoError(
            f"{output} holds a dataset with a different config (it differs in {', '.join(changed)}); "
            "choose another output or add --overwrite"
        )


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """Return the manifest of a dataset that any version of the build wrote, or None."""
    try:
        manifest = read_json_object(path)
    except (OSError, ValueError):
        return None
    ours = isinstance(manifest, dict) and str(manifest.get("format", "")).startswith(DATASET_FORMAT.rsplit(" ", 1)[0])
    return manifest if ours else None
