"""Long operations show a progress bar on a terminal and plain lines in a log."""

from __future__ import annotations

import io
import json
import re
import sys
import time

import pytest

from echo_ft import terminal
from echo_ft.terminal import printable, progress


class Stream(io.StringIO):
    """A stream that can claim to be a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def run(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, seconds: float = 0.0, **options) -> str:
    """What three items write to stderr if each of them takes some seconds."""
    stream = Stream(is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    assert [item for item in progress("abc", "reading", "records", **options) if not time.sleep(seconds)] == [*"abc"]
    return stream.getvalue()


def test_an_escaped_text_stays_valid_json():
    text = json.dumps("a\x1b\x7f\x85\u202eb", ensure_ascii=False)
    assert printable(text) == r'"a\u001b\u007f\u0085\u202eb"'


def test_a_log_gets_lines_that_say_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "QUIET_SECONDS", 0.02)
    written = run(monkeypatch, False, seconds=0.05)
    assert "\r" not in written
    lines = written.splitlines()
    assert 1 <= len(lines) <= 3
    assert all(re.fullmatch(r"reading: \d of 3 records, \d\d:\d\d elapsed, \d\d:\d\d left", line) for line in lines)


def test_short_work_leaves_a_log_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, False) == ""
    assert run(monkeypatch, True, disable=True) == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.search(r"\rreading: 100%\|.*\| 3/3 \[.*records/s\]\n$", run(monkeypatch, True))


def test_work_without_items_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "QUIET_SECONDS", 0.02)
    stream = Stream(False)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(None, "four experts", "cases", 4) as bar:
        for _ in range(2):
            time.sleep(0.05)
            bar.update(2)
    assert re.search(r"^four experts: [24] of 4 cases, ", stream.getvalue())
