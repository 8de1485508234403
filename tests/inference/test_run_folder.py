"""An interrupted run resumes without lost, duplicate or mixed rows."""

from __future__ import annotations

import errno
import importlib
import io
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from echo_ft import files, provenance
from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import PipelineConfig, run_cases, run_or_fail
from echo_ft.files import read_jsonl, write_text
from echo_ft.inference import run_folder
from echo_ft.inference.run_folder import PREDICTIONS, RUN_DESCRIPTION, SHARDS, TRACES, Processes, RunFolder
from echo_ft.metrics.loading import load_run
from echo_ft.processes import LOCK_FILE
from echo_ft.provenance import ANSWERING_MODULES, SUPPORTING_MODULES, code_fingerprint, source_files
from echo_ft.records import Prediction, Trace
from tests.conftest import make_case
from tests.support.backends import ScriptedBackend

PROVENANCE = {"prompt_version": "1", "max_pixels": 100, "adapters": {}}


@pytest.fixture
def cases(tmp_path):
    return [make_case(tmp_path / "images", f"line/part/{index}") for index in range(4)]


def run(folder, cases, provenance=PROVENANCE, stop_after=99, notes=None):
    with RunFolder(folder, provenance, cases, notes) as opened:
        for (case,) in opened.batches(1)[:stop_after]:
            opened.write(case, run_cases([case], ScriptedBackend(), PipelineConfig())[0])
        opened.finish()
    return opened


def content(folder):
    return {name: (folder / name).read_bytes() for name in (PREDICTIONS, TRACES, RUN_DESCRIPTION)}


@pytest.mark.parametrize("cut", [1, 37, 400, 2500])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, cases, cut):
    run(tmp_path / "whole", cases)
    run(tmp_path / "cut", cases, stop_after=2)
    for name in (PREDICTIONS, TRACES):  # as if the process had been killed during a write
        path = tmp_path / "cut" / name
        path.write_bytes(path.read_bytes()[:-cut])
    assert json.loads((tmp_path / "cut" / RUN_DESCRIPTION).read_text())["complete"] is False
    run(tmp_path / "cut", cases)
    for name, expected in content(tmp_path / "whole").items():
        assert sorted(content(tmp_path / "cut")[name].splitlines()) == sorted(expected.splitlines())


@pytest.mark.parametrize("name", [PREDICTIONS, TRACES])
def test_a_change_after_the_end_of_a_run_is_noticed(tmp_path, cases, name, capsys):
    folder = tmp_path / "run"
    run(folder, cases)
    lines = (folder / name).read_text().splitlines(keepends=True)
    (folder / name).write_text("".join(reversed(lines)))
    assert len(load_run(folder).predictions) == len((folder / PREDICTIONS).read_text().splitlines())
    for changed in (lines[:-1], [lines[0].replace('"text": "', '"text": "x', 1), *lines[1:]]):
        (folder / name).write_text("".join(changed))
        with pytest.raises(EchoError, match=rf"{name} has changed since the run ended; restore it, or run again"):
            load_run(folder)
    run(folder, cases)
    assert f"{name} has changed since the run ended; the run keeps every whole case in it" in capsys.readouterr().err


def test_resuming_a_finished_run_changes_nothing(tmp_path, cases):
    run(tmp_path / "run", cases)
    before = content(tmp_path / "run")
    assert len(run(tmp_path / "run", cases).done) == 4
    assert content(tmp_path / "run") == before
    assert len(list(read_jsonl(tmp_path / "run" / PREDICTIONS, Prediction))) == 28
    assert len(list(read_jsonl(tmp_path / "run" / TRACES, Trace))) == 4 * 17


def test_the_error_for_another_run_names_the_difference(tmp_path, cases):
    run(tmp_path / "run", cases, stop_after=1)
    with pytest.raises(EchoError, match="max_pixels is 100, not 200"):
        run(tmp_path / "run", cases, {**PROVENANCE, "max_pixels": 200})
    with pytest.raises(EchoError, match="cases is 4, not 3"):
        run(tmp_path / "run", cases[:3])


def test_the_error_names_nested_and_missing_values(tmp_path, cases):
    tuned = {**PROVENANCE, "adapters": {"decision_maker": {"fingerprint": "aaaa", "routing": "full"}}}
    other = {**PROVENANCE, "adapters": {"decision_maker": {"fingerprint": "bbbb", "routing": "paper"}}}
    run(tmp_path / "run", cases, tuned, stop_after=1)
    with pytest.raises(EchoError, match=r"adapters\.decision_maker\.fingerprint is 'aaaa', not 'bbbb'; choose another"):
        run(tmp_path / "run", cases, other)
    with pytest.raises(EchoError, match=r"adapters\.decision_maker is '2 values', not None"):
        run(tmp_path / "run", cases)


def test_a_run_resumes_without_the_versions_that_it_did_not_record(tmp_path, cases):
    older, newer = {"torch": "2"}, {"torch": "2", "pillow": "13"}
    run(tmp_path / "run", cases, {**PROVENANCE, "versions": older}, stop_after=1)
    with pytest.raises(EchoError, match=r"versions\.torch is '2', not '3'"):
        run(tmp_path / "run", cases, {**PROVENANCE, "versions": {**newer, "torch": "3"}})
    run(tmp_path / "run", cases, {**PROVENANCE, "versions": newer}, stop_after=1)
    with pytest.raises(EchoError, match=r"versions\.pillow is '13', not '14'"):
        run(tmp_path / "run", cases, {**PROVENANCE, "versions": {**newer, "pillow": "14"}})
    run(tmp_path / "run", cases, {**PROVENANCE, "versions": newer})
    assert json.loads((tmp_path / "run" / RUN_DESCRIPTION).read_text())["versions"] == newer


def test_different_notes_do_not_stop_a_run_and_are_recorded(tmp_path, cases):
    first, second = {"commit": "one", "warnings": []}, {"commit": "two", "warnings": []}
    run(tmp_path / "run", cases, notes=first, stop_after=1)
    run(tmp_path / "run", cases, notes=second, stop_after=0)
    assert "continued_with" not in json.loads((tmp_path / "run" / RUN_DESCRIPTION).read_text()), (
        "this process wrote no answer"
    )
    run(tmp_path / "run", cases, notes=second, stop_after=1)
    run(tmp_path / "run", cases, notes=first)
    run(tmp_path / "run", cases, notes={"commit": "three", "warnings": []})
    description = json.loads((tmp_path / "run" / RUN_DESCRIPTION).read_text())
    assert description["commit"] == "one"
    assert description["continued_with"] == [{"commit": "two"}]
    assert description["complete"]
    assert description["questions"] == 28


def test_a_second_process_is_refused_and_the_first_loses_nothing(tmp_path, cases):
    with RunFolder(tmp_path / "run", PROVENANCE, cases) as opened:
        opened.write(cases[0], run_cases([cases[0]], ScriptedBackend(), PipelineConfig())[0])
        with pytest.raises(EchoError, match="another process is writing to"):
            run(tmp_path / "run", cases)
        opened.write(cases[1], run_cases([cases[1]], ScriptedBackend(), PipelineConfig())[0])
    assert len(run(tmp_path / "run", cases, stop_after=0).done) == 2


def test_a_refused_run_releases_the_folder(tmp_path, cases):
    run(tmp_path / "run", cases, stop_after=1)
    with pytest.raises(EchoError) as refusal:  # its traceback keeps the object alive
        run(tmp_path / "run", cases, {**PROVENANCE, "max_pixels": 200})
    assert len(run(tmp_path / "run", cases).done) == 4, refusal
    (tmp_path / "run" / RUN_DESCRIPTION).write_text("{")
    with pytest.raises(EchoError, match=r"run\.json is not JSON"):
        run(tmp_path / "run", cases)


def test_the_code_fingerprint_depends_only_on_sources(tmp_path):
    (tmp_path / "library").mkdir()
    source, script, page = tmp_path / "library" / "a.py", tmp_path / "run.py", tmp_path / "library" / "README.md"
    for path in (source, script, page):
        path.write_text("x = 1")
    before = code_fingerprint(source, script)
    page.write_text("more text")
    assert code_fingerprint(source, script) == before
    for path in (source, script):
        path.write_text("x = 2")
        assert code_fingerprint(source, script) != before
        path.write_text("x = 1")
    assert code_fingerprint(source.rename(source.with_name("b.py")), script) != before


def test_only_answering_modules_decide_whether_a_run_may_resume():
    package = Path(provenance.__file__).parent
    files = source_files(*ANSWERING_MODULES, exclude=SUPPORTING_MODULES)
    found = {".".join(path.relative_to(package).with_suffix("").parts) for path in files}
    assert len(found) <= 26
    assert found >= {
        *ANSWERING_MODULES,
        "experts.roles",
        "model.rows",
        "model.batches",
        "images.corruptions",
        "records",
    }
    assert {name.split(".")[0] for name in found} <= {
        "data", "experts", "files", "images", "inference", "inputs", "model", "records", "strict_yaml",
    }  # fmt: skip
    for name in found:
        values = vars(importlib.import_module(f"echo_ft.{name}")).values()
        owners = [getattr(value, "__name__" if isinstance(value, ModuleType) else "__module__", "") for value in values]
        ours = {owner.removeprefix("echo_ft.") for owner in map(str, owners) if owner.startswith("echo_ft.")}
        assert ours <= found | {*SUPPORTING_MODULES}, f"{name} uses a module that the fingerprint leaves out"


def test_a_failed_write_keeps_the_previous_file(tmp_path):
    write_text(tmp_path / "card.json", "whole")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "card.json", "half" * 10000 + "\ud800")
    assert (tmp_path / "card.json").read_text() == "whole"


def test_a_folder_with_other_content_is_left_alone(tmp_path, cases):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(EchoError, match="holds no run"):
        run(tmp_path / "mine", cases)


def test_a_failed_case_is_retried_when_its_image_is_back(tmp_path, cases):
    opened = RunFolder(tmp_path / "run", PROVENANCE, cases)
    broken = ScriptedBackend(broken=cases[1].seen.query)
    for case, outcome in zip(cases, run_or_fail(cases, broken, PipelineConfig()), strict=True):
        opened.write(case, outcome)
    opened.close()
    assert cases[1].id not in run(tmp_path / "run", cases, stop_after=0).done
    run(tmp_path / "run", cases)
    rows = list(read_jsonl(tmp_path / "run" / PREDICTIONS, Prediction))
    assert len(rows) == 28
    assert all(row.error is None for row in rows)


def test_a_partial_run_json_does_not_block_the_folder(tmp_path, cases):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json.partial").write_text("{")
    assert len(run(tmp_path / "run", cases).done) == 4


class FullDisk(io.FileIO):
    """A file on a disk with only a few bytes left. It accepts what fits and then fails."""

    left = 0

    def write(self, data):
        if not FullDisk.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = super().write(bytes(data)[: FullDisk.left])
        FullDisk.left -= written
        return written


@pytest.mark.parametrize("left", [0, 100, 9000, 30000])
def test_a_full_disk_ends_a_run_in_one_sentence_and_the_run_resumes(tmp_path, cases, monkeypatch, left):
    run(tmp_path / "whole", cases)
    run(tmp_path / "run", cases, stop_after=1)
    monkeypatch.setattr(FullDisk, "left", left)
    with monkeypatch.context() as patch:
        patch.setattr(
            run_folder, "open_append", lambda path: io.TextIOWrapper(io.BufferedWriter(FullDisk(path, "a")), "utf-8")
        )
        with pytest.raises(EchoError, match=r"^no space left in .*run; free some space and rerun the same command to"):
            run(tmp_path / "run", cases)
    assert cases[0].id in run(tmp_path / "run", cases, stop_after=0).done
    run(tmp_path / "run", cases)
    require_equal_runs(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_when_a_run_starts_or_ends_is_named_too(tmp_path, cases, monkeypatch, code):
    run(tmp_path / "run", cases)

    def fail(source, target):
        raise OSError(code, "full")

    with monkeypatch.context() as patch, RunFolder(tmp_path / "run", PROVENANCE, cases) as opened:
        patch.setattr(files.os, "replace", fail)
        with pytest.raises(EchoError, match="no space left in"):
            opened.finish()
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", fail)
        with pytest.raises(EchoError, match="no space left in"):
            run(tmp_path / "run", cases)
        code = errno.EIO
        with pytest.raises(OSError, match="full"):
            run(tmp_path / "run", cases)
    assert len(run(tmp_path / "run", cases, stop_after=0).done) == 4


def test_cut_texts_are_counted_per_role_over_resumes_and_processes(tmp_path, many):
    def cutting(role, exchanges):
        """Mark the first reasoning in each of a case's two exchanges as cut, and all output of the decision maker."""
        return [
            [replace(one, cut=role == "decision_maker" or (role == "reasoning_expert" and not i)) for i, one in whole]
            for whole in map(enumerate, ScriptedBackend()(role, exchanges))
        ]

    run_together(tmp_path / "run", many, 2, stop_after=1, backend=cutting)
    assert "cut" not in json.loads((tmp_path / "run" / RUN_DESCRIPTION).read_text()), "the run is not complete"
    run_together(tmp_path / "run", many, 3, backend=cutting)
    described = json.loads((tmp_path / "run" / RUN_DESCRIPTION).read_text())
    assert described["cut"] == {"reasoning_expert": 22, "decision_maker": 77}
    run(tmp_path / "run", many)
    assert json.loads((tmp_path / "run" / RUN_DESCRIPTION).read_text()) == described
    (outcome,) = run_cases(many[:1], cutting, PipelineConfig(answer="logits"))
    assert {trace.role for trace in outcome.traces if trace.cut} == {"reasoning_expert"}, (
        "the decision maker generates one token on purpose"
    )


class KilledError(Exception):
    """Simulates `kill -9`."""


def run_together(folder, cases, count, stop_after=99, backend=None):
    """Run `count` processes, as threads; each is killed after `stop_after` batches of two cases."""
    barrier = threading.Barrier(count, timeout=120)

    def process(index):
        with RunFolder(folder, PROVENANCE, cases, processes=Processes(index, count, barrier.wait)) as opened:
            for done, batch in enumerate(opened.batches(2)):
                if done == stop_after:
                    raise KilledError
                for case, outcome in zip(
                    batch, run_or_fail(batch, backend or ScriptedBackend(), PipelineConfig()), strict=True
                ):
                    opened.write(case, outcome)
            opened.finish()
        return opened

    with ThreadPoolExecutor(count) as pool:
        return [started.exception() or started.result() for started in [pool.submit(process, n) for n in range(count)]]


@pytest.fixture
def many(tmp_path):
    return [make_case(tmp_path / "images", f"line/part/{index}") for index in range(11)]


def require_equal_runs(folder, whole):
    for name, expected in content(whole).items():
        assert sorted((folder / name).read_bytes().splitlines()) == sorted(expected.splitlines())
    assert {path.name for path in folder.iterdir()} == {PREDICTIONS, TRACES, RUN_DESCRIPTION, LOCK_FILE}


@pytest.mark.parametrize("count", [2, 3, 8])
def test_several_processes_write_the_run_of_one(tmp_path, many, count):
    run(tmp_path / "whole", many)
    first, *others = (opened.done for opened in run_together(tmp_path / "shared", many, count))
    require_equal_runs(tmp_path / "shared", tmp_path / "whole")
    assert len(first) == len(many), "the first process merges all shards"
    assert sum(map(len, others)) == len(set.union(*others)) < len(many), "no case was run twice"


@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 1), (2, 3), (1, 2)])
@pytest.mark.parametrize("cut", [0, 1, 400, 2500])
def test_any_number_of_processes_can_resume_a_run(tmp_path, many, before, after, cut):
    run(tmp_path / "whole", many)
    ended = run_together(tmp_path / "run", many, before, stop_after=1)
    assert all(isinstance(one, KilledError) for one in ended)
    shards = list((tmp_path / "run" / SHARDS).glob("*")) or [tmp_path / "run"]
    assert len(shards) == before
    for name in (PREDICTIONS, TRACES):  # as if one process had been killed during a write
        path = shards[-1] / name
        path.write_bytes(path.read_bytes()[: -cut or None])
    run_together(tmp_path / "run", many, after)
    require_equal_runs(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2])
def test_a_kill_during_the_merge_loses_and_duplicates_nothing(tmp_path, many, stop, after, monkeypatch):
    run(tmp_path / "whole", many)
    run_together(tmp_path / "run", many, 3, stop_after=1)
    steps = []

    def killed_at(function):
        def step(*arguments):
            steps.append(function)
            if len(steps) == stop:
                raise KilledError
            return function(*arguments)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_jsonl", killed_at(run_folder.write_jsonl))
        patch.setattr(shutil, "rmtree", killed_at(shutil.rmtree))
        with pytest.raises(KilledError):
            run(tmp_path / "run", many)
    run_together(tmp_path / "run", many, after)
    require_equal_runs(tmp_path / "run", tmp_path / "whole")


def test_an_orphan_process_blocks_resuming(tmp_path, many):
    run_together(tmp_path / "run", many, 2, stop_after=1)
    orphan = RunFolder(tmp_path / "run", PROVENANCE, many, processes=Processes(1, 2))
    with pytest.raises(EchoError, match=r"another process is writing to .*shards/1;"):
        run(tmp_path / "run", many)
    orphan.close()
    assert len(run(tmp_path / "run", many).done) == 11


def test_failed_cases_of_a_shard_are_kept_and_retried(tmp_path, many):
    run(tmp_path / "whole", many)
    run_together(tmp_path / "run", many, 2, backend=ScriptedBackend(broken=many[5].seen.query))
    rows = list(read_jsonl(tmp_path / "run" / PREDICTIONS, Prediction))
    assert {row.case for row in rows if row.error} == {many[5].id}
    assert len(rows) == 77
    assert json.loads((tmp_path / "run" / RUN_DESCRIPTION).read_text())["complete"]
    run_together(tmp_path / "run", many, 2)
    require_equal_runs(tmp_path / "run", tmp_path / "whole")


def test_batches_are_fixed_and_done_cases_stay_unchanged(tmp_path, many):
    def ids(batches):
        return [[case.id for case in batch] for batch in batches]

    with RunFolder(tmp_path / "run", PROVENANCE, many) as opened:
        whole = ids(opened.batches(4))
        assert [len(batch) for batch in whole] == [4, 4, 3]
        for case in (*many[:4], many[5]):
            opened.write(case, run_cases([case], ScriptedBackend(), PipelineConfig())[0])
        assert ids(opened.batches(4)) == whole[1:]
        before = content(tmp_path / "run")
        opened.write(
            many[5],
            run_cases([many[5]], ScriptedBackend({**ScriptedBackend().texts, "decide": "A"}), PipelineConfig())[0],
        )
        assert content(tmp_path / "run") == before


def test_notes_of_several_processes_are_recorded_too(tmp_path, many):
    run(tmp_path / "run", many, notes={"commit": "one"}, stop_after=1)
    with RunFolder(tmp_path / "run", PROVENANCE, many, {"commit": "two"}, Processes(0, 2)):
        pass
    assert json.loads((tmp_path / "run" / RUN_DESCRIPTION).read_text())["continued_with"] == [{"commit": "two"}]
