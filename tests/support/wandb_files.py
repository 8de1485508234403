"""Read the file of an offline W&B run, `run-ID.wandb`, with W&B's own messages.

wandb (0.31) reads these files only in its compiled service, so the frames are unpacked here. They are those of a
LevelDB log (https://github.com/google/leveldb/blob/main/doc/log_format.md) after a header of seven bytes.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER, BLOCK, FRAME = b":W&B", 32768, struct.Struct("<IHB")
FULL, LAST = 1, 4


@dataclass(frozen=True)
class LoggedRun:
    """The content of an offline run."""

    run: Any
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    artifacts: dict[str, Any]
    """The artifacts that the run logs or uses, keyed by name."""
    exit_code: int | None

    def names(self, used: bool) -> set[str]:
        """The artifacts that the run uses, or those that it logs, except for those that W&B creates for tables."""
        return {
            name for name, one in self.artifacts.items() if one.use_after_commit == used and one.type != "run_table"
        }

    def metadata(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.artifacts[name].metadata)
        return found

    def contents(self, name: str) -> dict[str, Any]:
        """The entries of an artifact by path."""
        return {entry.path: entry for entry in self.artifacts[name].manifest.contents}

    def table(self, key: str) -> dict[str, Any]:
        """Read the table that was logged under a key from its artifact."""
        artifact = next(one for one in self.artifacts.values() if one.type == "run_table" and key in one.name)
        (entry,) = [one for one in artifact.manifest.contents if one.path == f"{key}.table.json"]
        found: dict[str, Any] = json.loads(Path(entry.local_path).read_text())
        return found


def read_runs(folder: Path) -> list[LoggedRun]:
    """The offline runs in WANDB_DIR, in the order in which they started."""
    runs = [read_run(path) for path in folder.glob("wandb/offline-run-*/run-*.wandb")]
    return sorted(runs, key=lambda one: one.run.start_time.ToNanoseconds())


def read_run(path: Path) -> LoggedRun:
    """Read a run once it is whole: offline, `finish` returns before the service has written everything (0.31)."""
    end = time.monotonic() + 60
    while (found := _read(path)).exit_code is None:
        assert time.monotonic() < end, f"{path} has no end"
        time.sleep(0.05)
    return found


def _read(path: Path) -> LoggedRun:
    run, config, history, summary, artifacts, exit_code = None, {}, [], {}, {}, None
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            config |= _values(record.run.config.update)
        elif kind == "config":
            config |= _values(record.config.update)
        elif kind == "history":
            history.append(_values(record.history.item))
        elif kind == "summary":
            summary |= _values(record.summary.update)
        elif kind == "artifact":
            artifacts[record.artifact.name] = record.artifact
        elif kind == "exit":
            exit_code = record.exit.exit_code
    return LoggedRun(run, config, history, summary, artifacts, exit_code)


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    assert data.startswith(HEADER) or not data
    position, message = 7, b""
    while position < len(data):
        if BLOCK - position % BLOCK < FRAME.size:  # zeros fill the end of a block
            position += BLOCK - position % BLOCK
            continue
        if position + FRAME.size > len(data):
            return
        _, length, kind = FRAME.unpack_from(data, position)
        position += FRAME.size
        if position + length > len(data):  # it is being written
            return
        message += data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            yield Record.FromString(message)
            message = b""
