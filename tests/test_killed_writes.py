"""A file or folder that is replaced is at any time either the old or the new one, and kills leave nothing behind."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.build import build
from data_prep.config import BuildConfig
from echo_ft import files, processes
from echo_ft.data.dataset import load_cases, load_dataset
from echo_ft.files import atomic_file, atomic_folder, write_json
from echo_ft.processes import remove_left_over_files, scratch_folder

KILLABLE = ((os, "rename"), (os, "replace"), (files, "_swap"), (shutil, "rmtree"))
"""The calls that change what a file name refers to."""


def every_call() -> Iterator[tuple[int, bool]]:
    """Yield (number of a call, whether to kill after it), without end."""
    return ((place, after) for place in itertools.count() for after in (False, True))


def kill_at(place: int, after: bool, function: Callable[[], Any]) -> bool:
    """Run a function in a child that kills itself at its call number `place` of KILLABLE; return whether it got there.

    The child dies before the call, or `after` it.
    """
    child = os.fork()
    if child == 0:
        counter = itertools.count()

        def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                number = next(counter)
                if number == place and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = call(*arguments, **options)
                if number == place:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return run

        try:
            for module, name in KILLABLE:
                setattr(module, name, deadly(getattr(module, name)))
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed for another reason"
    return os.WIFSIGNALED(status)


def replace(output: Path, text: str) -> None:
    with atomic_folder(output) as folder:
        write_json(folder / "manifest.json", text)
        (folder / "images").mkdir()
        (folder / "images" / "a").write_text(text)


@pytest.mark.parametrize("swaps", [True, False], ids=["swap", "two renames"])
def test_a_folder_that_is_replaced_is_the_old_or_the_new_one_after_a_kill_at_any_rename(tmp_path, monkeypatch, swaps):
    if not swaps:  # as on a file system without renameat2
        monkeypatch.setattr(files, "_swap", lambda *_: False)
    output = tmp_path / "out"
    replace(output, "old")
    places, states = 0, set()
    for place, after in every_call():
        if not kill_at(place, after, lambda: replace(output, "new")):
            break
        places += 1
        if not swaps and not output.exists():  # only here may the name be free, until the next start
            files._remove_left_over(output)
        states.add((output / "images" / "a").read_text())
        assert (output / "manifest.json").read_text().strip('"\n') == (output / "images" / "a").read_text()
        replace(output, "old")
        assert [path.name for path in tmp_path.iterdir()] == ["out"], "the next start removes what was left"
    assert places >= 6
    assert states == {"old", "new"}


@pytest.mark.parametrize("name", ["out", "replaced", "out.replaced"])
def test_a_folder_whose_block_fails_does_not_appear(tmp_path, name):
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / name) as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_command_left_is_named_and_what_a_living_one_uses_stays(tmp_path, capsys):
    output = tmp_path / "out"
    assert kill_at(1, False, lambda: replace(output, "new"))
    (left,) = tmp_path.iterdir()
    others = [tmp_path / name for name in (".out.settings", ".out.12345678", "out.1234abcd")]
    for other in others:  # names that others may choose
        (other / "mine").mkdir(parents=True)
    with atomic_folder(output) as living:
        assert f"warning: removing {left}, which a killed command left" in capsys.readouterr().err
        replace(output, "second")  # an overlapping command
        assert living.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", *(other.name for other in others)])


def test_partial_files_and_scratch_folders_of_killed_commands_are_removed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    target = tmp_path / "vectors.npz"

    def write() -> None:
        with scratch_folder("echo-ft-") as folder, atomic_file(target, unique=True) as partial:
            (folder / "image.png").write_text("some")
            partial.write_text("some")

    assert kill_at(0, False, write)
    assert len(list(tmp_path.iterdir())) == 2
    with atomic_file(tmp_path / "living", unique=True) as living, scratch_folder("echo-ft-") as folder:
        living.write_text("some")
        processes._remove_left_over_scratch.cache_clear()
        with scratch_folder("echo-ft-"):
            assert folder.is_dir()
        remove_left_over_files(tmp_path)
        assert living.is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["living"]
    assert capsys.readouterr().err.count("which a killed command left") == 2


def test_what_another_process_is_removing_is_no_left_over(tmp_path, monkeypatch, capsys):
    """The lock of a removed file or folder is free, but there is nothing left to remove."""
    gone = [tmp_path / f"vectors.{'a' * 32}.partial", tmp_path / ".out.abcd1234"]
    gone[0].write_text("some")
    (gone[1] / "out").mkdir(parents=True)

    @contextmanager
    def late(path: Path) -> Iterator[bool]:
        path.unlink() if path.is_file() else shutil.rmtree(path)
        yield True

    monkeypatch.setattr(processes, "held", late)
    remove_left_over_files(tmp_path)
    assert list(processes.left_over_folders(tmp_path, ".out.")) == []
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_a_new_folder_takes_the_place_that_a_link_points_to(tmp_path):
    (tmp_path / "big").mkdir()
    for name in ("there", "missing"):
        link, place = tmp_path / f"to-{name}", tmp_path / "big" / name
        link.symlink_to(place)
        if name == "there":
            replace(place, "old")
        with atomic_folder(link) as new:
            assert new.parent.parent == place.parent, "the new folder must be on the disk of the old one"
            (new / "images").mkdir()
            (new / "images" / "a").write_text("new")
        assert link.is_symlink()
        assert (place / "images" / "a").read_text() == "new"
    assert sorted(path.name for path in (tmp_path / "big").iterdir()) == ["missing", "there"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "report.json"
    write_json(target, 1)
    for unique in (False, True):
        with pytest.raises(KeyboardInterrupt), atomic_file(target, unique) as partial:
            partial.write_text("2")
            raise KeyboardInterrupt
    assert target.read_text() == "1\n"
    assert list(tmp_path.iterdir()) == [target]


def test_files_and_folders_reach_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    events: list[tuple[str, str]] = []
    sync, rename, swap = os.fsync, os.replace, files._swap

    def note_sync(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("name", str(a))), rename(a, b))[1])
    monkeypatch.setattr(files, "_swap", lambda a, b: (events.append(("swap", str(a))), swap(a, b))[1])
    write_json(tmp_path / "report.json", 1)
    partial = str(tmp_path / "report.json.partial")
    assert events == [("sync", partial), ("name", partial), ("sync", str(tmp_path))]
    replace(tmp_path / "out", "old")
    events.clear()
    replace(tmp_path / "out", "new")
    place = next(index for index, (kind, _) in enumerate(events) if kind == "swap")
    folder = events[place][1]
    flushed = {path.removeprefix(folder) for kind, path in events[:place] if kind == "sync"}
    assert {"", "/images", "/images/a", "/manifest.json"} <= flushed
    assert events[place + 1] == ("sync", str(tmp_path))


@pytest.mark.slow
def test_an_overwriting_build_killed_at_its_renames_and_at_random_leaves_one_whole_dataset(small_manifest, tmp_path):
    def config(seed: int) -> BuildConfig:
        return BuildConfig(
            "manifest", tmp_path / "out", annotations=small_manifest, descriptor="skimage", seed=seed, overwrite=True,
            cache=tmp_path / "cache",
        )  # fmt: skip

    new, old = build(config(1))["fingerprint"], build(config(0))["fingerprint"]
    found = []

    def check() -> None:
        dataset = load_dataset(tmp_path / "out")
        assert load_cases(dataset, "test")
        found.append(dataset.fingerprint)
        assert build(config(0))["fingerprint"] == old
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "raw"]

    for place, after in every_call():
        if not kill_at(place, after, lambda: build(config(1))):
            break
        check()
    assert len(found) >= 16
    assert {*found} == {old, new}
    longest = min(timeit.repeat(lambda: build(config(0)), number=1, repeat=3))
    for share in np.random.default_rng(0).uniform(0, 1, 20):
        child = os.fork()
        if child == 0:
            signal.setitimer(signal.ITIMER_REAL, max(share * longest, 1e-6))  # without a handler, SIGALRM kills
            build(config(1))
            os._exit(0)
        os.waitpid(child, 0)
        check()
