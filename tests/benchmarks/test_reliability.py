"""The fuzzers find errors that no parser may raise, and find none in this project; the kill loop notices a fault."""

from __future__ import annotations

import time

import pytest

from benchmarks.reliability.fuzz import Found, execute, fuzz, report
from benchmarks.reliability.parsers import PARSERS, Parser, prepare_folder
from echo_ft.errors import EchoError
from echo_ft.experts.roles import parse_best
from echo_ft.metrics.answer_files.robustmad import parse_cut_letter


@pytest.mark.parametrize("name", PARSERS)
def test_no_parser_raises_anything_but_its_refusal(name, tmp_path):
    found = fuzz(PARSERS[name], 60, prepare_folder(tmp_path))
    assert found.executions >= 60
    assert not found.finds


@pytest.mark.parametrize("name", PARSERS)
def test_every_example_is_valid(name, tmp_path):
    found = Found()
    for example in PARSERS[name].examples:
        execute(PARSERS[name], example, prepare_folder(tmp_path), found)
    assert (found.refused, found.finds) == (0, {})


def test_fuzzer_keeps_the_shortest_input_of_each_find(tmp_path, capsys, monkeypatch):
    def read(content: bytes, folder) -> None:
        if len(content) < 3:
            raise EchoError("too short")
        if b"a" in content:
            raise KeyError(content)
        if b"h" in content:
            time.sleep(9)

    monkeypatch.setattr("benchmarks.reliability.fuzz.SECONDS", 0.01)
    found = Found()
    for content in (b"", b"bcd", b"bcda", b"bca", b"hhh"):
        execute(Parser(read, ()), content, tmp_path, found)
    assert (found.executions, found.refused, len(found.finds)) == (5, 1, 2)
    report("mine", found, tmp_path / "finds")
    assert "mine: 5 executions, 1 refused, 2 finds" in capsys.readouterr().out
    stored = {path.read_bytes() for path in (tmp_path / "finds").iterdir() if not path.suffix}
    assert stored == {b"bca", b"hhh"}
    assert "KeyError" in next(
        path.read_text() for path in (tmp_path / "finds").glob("*.txt") if "bca" in path.read_text()
    )


def test_numbers_of_an_answer_may_be_long_and_are_parsed_in_linear_time():
    start = time.process_time()
    assert parse_best("9" * 100_000, 3) is None
    assert parse_best("2" + " " * 1_000_000 + "x", 3) is None
    assert parse_best(" " * 1_000_000 + "candidate" + " " * 1_000_000 + "2", 3) == 1
    assert parse_cut_letter("A x" + " " * 1_000_000 + "y", {"A": "x z"}) is None
    assert time.process_time() - start < 5  # the square of a million steps takes hours
