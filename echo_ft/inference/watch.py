"""Watch a folder for new images, yield each one once when its file is finished, and post results to a webhook."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

import httpx

from echo_ft.errors import EchoError
from echo_ft.files import escape_surrogates, list_folder, open_append, read_complete_rows, to_json, write_jsonl
from echo_ft.images.decode import READ_ERRORS, decode, describe_read_error
from echo_ft.images.snapshot import IMAGE_SUFFIXES
from echo_ft.inputs import is_web_address
from echo_ft.processes import lock_folder
from echo_ft.terminal import LOGGER

STATE_FILE = ".echo-ft-inspected.jsonl"
"""Hidden file in a watched folder that lists the images that are done."""

SETTLED_SECONDS = 2.0
"""How long an image must stay unchanged before it counts as finished."""

BROKEN_SECONDS = 30.0
"""How long an unreadable image must stay unchanged before it counts as broken, because a camera may write in pauses.

A warning names an image that keeps changing for as long.
"""

MANY_CHANGES = 5
"""How often such an image must have been seen to change, because scans are rare while others are inspected."""

POLL_SECONDS = 0.5
"""Time between two scans of the folder."""

WEBHOOK_SECONDS, WEBHOOK_PATIENCE = 10.0, 600.0
"""How long one request to a webhook may take, and how long a failed request is repeated."""


UNFIT_STATUSES = (400, 413, 422)
"""HTTP statuses with which a webhook rejects one result. Others, such as 404, would reject all of them."""


class RejectedResultError(EchoError):
    """A webhook rejects the content of one result, but may accept others."""


@dataclass(frozen=True)
class InspectedFile:
    """An image that is done. A file with a different size or time counts as a new image."""

    image: str
    """The file name, with `escape_surrogates` applied."""
    size: int
    modified: int
    """Time of the last change in nanoseconds."""
    error: str | None = None
    """Why the image could not be inspected, or why the webhook rejected its result."""


@dataclass
class _NewFile:
    """An image that is not done. Times are those of the watch's clock."""

    version: tuple[int, int]
    """The size, and the time of the last change in nanoseconds."""
    since: float
    """When this version was first seen."""
    first: float
    """When the first version was seen."""
    changes: int = 0
    """How many versions were seen after the first one."""
    warned: bool = False
    """Whether a warning said that it keeps changing."""
    unreadable: float | None = None
    """When this version could not be read for the first time."""


class FolderWatch:
    """The new images of a folder. Use it in a `with` block: only one process can watch a folder at a time."""

    def __init__(
        self,
        folder: Path,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Read which images of `folder` are done. Raises EchoError if it is missing or another process watches it."""
        if not folder.is_dir():
            raise EchoError(f"there is no folder {folder} to watch; create it or check the path")
        self.folder, self.clock, self.sleep = folder, clock, sleep
        self._state = folder / STATE_FILE
        self._new: dict[str, _NewFile] = {}
        """The images that are not done, by name."""
        self._error: str | None = None
        """Why the image that was yielded last could not be inspected."""
        self._problem: str | None = None
        """Why the folder cannot be used at the moment."""
        try:
            self._lock = lock_folder(folder, "folder")
            present = {escape_surrogates(path.name) for path in list_folder(folder)}
            rows = [row for row in read_complete_rows(self._state, InspectedFile) if row.image in present]
            self._done = {row.image: (row.size, row.modified) for row in rows}
            write_jsonl(self._state, rows)  # this leaves out a line that a crash has cut off
        except OSError as error:
            raise EchoError(
                f"{folder} cannot be written ({error.strerror}), so images would be inspected again after a restart; "
                "give write permission"
            ) from error

    def __enter__(self) -> FolderWatch:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._lock.close()

    def images(self) -> Iterator[tuple[Path, str | None]]:
        """Yield each finished image, oldest first, with the reason if it is unreadable. Waits for new ones forever.

        An image is done when the caller asks for the next one. If the caller stops before that, the image is yielded
        again after a restart. While the folder cannot be used, for example because its network drive is away, a
        warning says so once, and the watch tries again until it succeeds.
        """
        while True:
            for path, new in self._settled():
                error = _read_error(path)  # only now, because the folder may have thousands of new images
                if not _has_version(path, new.version):  # it was deleted or changed while others were inspected
                    continue
                if error is not None:
                    new.unreadable = self.clock() if new.unreadable is None else new.unreadable
                    if self.clock() - new.unreadable < BROKEN_SECONDS:
                        continue
                self._error = error
                yield path, error
                if self._error is None or _has_version(path, new.version):  # it may have failed because the folder went
                    self._record(InspectedFile(escape_surrogates(path.name), *new.version, self._error))
            self.sleep(POLL_SECONDS)

    def fail(self, error: str) -> None:
        """Record why the image that `images` yielded last could not be inspected, or its result not be posted."""
        self._error = error

    def _settled(self) -> list[tuple[Path, _NewFile]]:
        """Return the new images that have not changed for a while, oldest first."""
        now, found, names, problem = self.clock(), [], set(), None
        try:
            paths = list_folder(self.folder)
        except EchoError as error:
            self._report(str(error))
            return []
        for path in paths:
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            name = escape_surrogates(path.name)
            names.add(name)
            try:
                version = _version(path)
            except OSError as error:
                problem = problem or f"{path} cannot be read ({error.strerror})"
                continue
            if version is None or self._done.get(name) == version:
                continue
            new = self._new.setdefault(name, _NewFile(version, now, now))
            if new.version != version:
                self._change(path, new, version)
            elif now - new.since >= SETTLED_SECONDS:
                found.append((path, new))
        self._report(problem)
        if names:  # a folder without images may be the empty mount point of a drive that is away
            for gone in (*self._done.keys() - names, *self._new.keys() - names):
                self._done.pop(gone, None)
                self._new.pop(gone, None)
        return sorted(found, key=lambda one: (one[1].version[1], one[0].name))

    def _change(self, path: Path, new: _NewFile, version: tuple[int, int]) -> None:
        """Note that an image has changed before it was done, and warn once if it does not stop changing."""
        now = self.clock()
        new.version, new.since, new.unreadable, new.changes = version, now, None, new.changes + 1
        if not new.warned and new.changes >= MANY_CHANGES and now - new.first >= BROKEN_SECONDS:
            new.warned = True
            LOGGER.warning(
                f"{path} has kept changing for {now - new.first:.0f} s, so it was not inspected; write each image to a "
                f"new file, or leave it unchanged for {SETTLED_SECONDS:g} s"
            )

    def _record(self, row: InspectedFile) -> None:
        """Record that an image is done, as soon as the folder can be written."""
        line, failed = to_json(row) + "\n", False
        while True:
            try:
                with open_append(self._state) as file:  # opened anew, because a drive that returns may refuse old files
                    file.write(line)
                break
            except OSError as error:
                self._report(f"{self._state} cannot be written ({error.strerror})")
                line, failed = f"\n{to_json(row)}\n", True  # a full disk may have cut off the line
                self.sleep(POLL_SECONDS)
        if failed:
            self._report(None)
        self._done[row.image] = row.size, row.modified
        self._new.pop(row.image, None)

    def _report(self, problem: str | None) -> None:
        """Warn once when the folder cannot be used, and say when it can be used again."""
        if problem is not None and problem != self._problem:
            LOGGER.warning(f"{problem}; the watch tries again until it succeeds")
        elif problem is None and self._problem is not None:
            LOGGER.info(f"the folder {self.folder} can be used again")
        self._problem = problem


def _version(path: Path) -> tuple[int, int] | None:
    """Return the size of a file and the time of its last change in nanoseconds, or None if it is not there.

    Raises OSError if the folder cannot be used.
    """
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return (stat.st_size, stat.st_mtime_ns) if S_ISREG(stat.st_mode) else None


def _has_version(path: Path, version: tuple[int, int]) -> bool:
    try:
        return _version(path) == version
    except OSError:  # the next scan reports it
        return False


def _read_error(path: Path) -> str | None:
    try:
        decode(path)
    except READ_ERRORS as error:
        return describe_read_error(error)
    return None


def check_webhook(url: str) -> None:
    """Raise EchoError if `url` is not the address of a webhook."""
    if not is_web_address(url):
        raise EchoError(f"--webhook {url} is not an address; give one such as https://HOST/PATH")


def post(
    url: str, content: Any, sleep: Callable[[float], None] = time.sleep, patience: float = WEBHOOK_PATIENCE
) -> None:
    """Post JSON to a webhook, and repeat the request for `patience` seconds while the webhook is not available.

    No redirect is followed, because it could send the results to another host. Raises RejectedResultError if the
    webhook rejects this content. Raises EchoError if it redirects, rejects all requests or stays unavailable.
    """
    waited, wait = 0.0, 1.0
    while True:
        try:
            status, location = _request(url, to_json(content).encode())
        except httpx.HTTPError as error:
            problem = f"no connection: {error}"
        else:
            if 200 <= status < 300:
                return
            problem = f"status {status}"
            if location is not None and 300 <= status < 400:
                raise EchoError(
                    f"the webhook {url} redirects to {location}, which is not followed; give the final address"
                )
            if status in UNFIT_STATUSES:
                raise RejectedResultError(
                    f"the webhook {url} rejects this result ({problem}); check which results it accepts"
                )
            if status < 500 and status not in (408, 429):
                raise EchoError(
                    f"the webhook {url} rejects a result ({problem}); check the address and its permissions"
                )
        if waited >= patience:
            raise EchoError(
                f"the webhook {url} did not accept a result for {patience:g} s ({problem}); start it and rerun the "
                "same command, which inspects that image again"
            )
        if waited == 0:
            LOGGER.warning(f"the webhook {url} does not accept results ({problem}); repeating for {patience:g} s")
        sleep(wait)
        waited, wait = waited + wait, min(2 * wait, 30.0)


def _request(url: str, body: bytes) -> tuple[int, str | None]:
    """Post JSON. Return the status and the Location of the reply, whose body is not read, because it may never end."""
    options: dict[str, Any] = {"headers": {"Content-Type": "application/json"}, "timeout": WEBHOOK_SECONDS}
    with httpx.stream("POST", url, content=body, follow_redirects=False, **options) as reply:
        return reply.status_code, reply.headers.get("location")
