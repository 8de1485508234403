"""Every hostile or broken input in the table gives its own message, without a traceback or a hang."""

from __future__ import annotations

import importlib
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from echo_ft.config import run_main
from tests.faults.annotations import ANNOTATIONS
from tests.faults.fields import FIELDS
from tests.faults.folders import FOLDERS
from tests.faults.inputs import FAULTS, Fault
from tests.faults.outcomes import OUTCOMES

SECONDS = 180
"""Time limit of a command. It takes seconds on an idle machine, and the first one of a kind also imports torch."""

TABLE = [*FAULTS, *FIELDS, *ANNOTATIONS, *FOLDERS, *OUTCOMES]

pytestmark = pytest.mark.faults


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"the command takes more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("fault", TABLE, ids=[fault.name for fault in TABLE])
def test_the_input_gets_its_sentence(fault: Fault, tmp_path, monkeypatch, capsys):
    module, *arguments = fault.make(tmp_path)
    main = importlib.import_module(module).main
    monkeypatch.setattr("sys.argv", [module, *arguments])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status: object = 0
    with time_limit():
        try:
            run_main(main)
        except SystemExit as ended:
            status = ended.code or 0
    said = "".join(capsys.readouterr())
    assert "Traceback" not in said and "the traceback is in" not in said, said
    assert "\x1b[2J" not in said, "a terminal would clear its screen"
    assert re.search(fault.says, said), said
    assert status == fault.status
    fault.holds(tmp_path)
    if module.startswith("data_prep"):  # a run and a training keep what they have, and resume
        assert (tmp_path / "out").exists() == (status == 0), "a refused input leaves nothing behind"


def test_names_of_the_table_are_unique():
    assert len({fault.name for fault in TABLE}) == len(TABLE) >= 1000
