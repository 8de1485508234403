"""An ablation's cells are runs as evaluation.run makes them, and its table is evaluation.compare's; nothing twice."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from echo_ft import config as configs
from echo_ft.data.dataset import load_cases, load_dataset
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl
from echo_ft.inference.engine import Engine
from echo_ft.inference.run_folder import PREDICTIONS, RUN_DESCRIPTION, TRACES, RunFolder
from echo_ft.metrics.comparison import ALL_QUESTIONS
from echo_ft.records import QUESTION_TYPES, ROLES, Prediction, Trace
from evaluation import ablate, ablation_table, compare
from evaluation import run as evaluation_run
from evaluation.config import RunConfig
from evaluation.run import main as run_main
from evaluation.run import prepare_run
from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS, ROOT, make_dataset, random_adapters
from tests.support.runs import make_run, predictions, require_self_contained

CELLS: dict[str, Any] = {
    "tuned": {},
    "base": {"adapters": None},
    "no reference": {"reference": "none"},
    "one of them": {"references": 1},
    "no reasoning": {"reasoning": False},  # as YAML reads a bare off
    "paper": {"routing": "paper"},
    "blurred": {"corruption": "blur", "severity": 3},
    "as tuned": {"routing": "full"},
}
RUNS = len(CELLS) - 1


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), train=1, validation=1, test=3)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, dataset):
    return random_adapters(tmp_path_factory.mktemp("adapters"), dataset)


@pytest.fixture(scope="module")
def shared(dataset, adapters):
    """What all cells have in common; batches of two, so that the last one is smaller."""
    options = {"dataset": str(dataset), "adapters": str(adapters), "model_name_or_path": str(ECHO_TINY)}
    options |= {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "max_new_tokens": 6, "batch_size": 2}
    return {**options, "dtype": "float32", "baseline": "tuned", "cells": CELLS}


def written(folder: Path, options: dict[str, Any]) -> list[str]:
    """The command's arguments, the file being in `folder` and the ablation in `folder/out`."""
    folder.mkdir(exist_ok=True)
    text = yaml.safe_dump({"output": str(folder / "out"), **options}, sort_keys=False)
    (folder / "ablation.yaml").write_text(text)
    return ["--config", str(folder / "ablation.yaml")]


@pytest.fixture(scope="module")
def done(shared, tmp_path_factory):
    """An ablation that nobody stopped, by the command of a user; what it printed lies in `printed`."""
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "printed").write_text(command([sys.executable], written(folder, shared)))
    return folder


def command(launcher: list[str], arguments: list[str]) -> str:
    """What the command of a user prints."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    words = [*launcher, "-m", "evaluation.ablate", *arguments]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def table_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "ablation.json").read_text())


def run_of(folder: Path, name: str) -> Path:
    """The run's folder of a cell."""
    return next(folder / "out" / cell["run"] for cell in table_of(folder)["cells"] if cell["name"] == name)


@pytest.mark.parametrize("name", ["base", "one of them", "no reasoning", "paper", "blurred"])
def test_a_cell_is_the_run_that_evaluation_run_makes_alone(done, shared, tmp_path, name):
    options = {**{key: value for key, value in shared.items() if key not in ("baseline", "cells")}, **CELLS[name]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**options, "output": str(tmp_path / "alone")}))
    run_main(["--config", str(tmp_path / "run.yaml")])
    cell, alone = run_of(done, name), tmp_path / "alone"
    assert json.loads((cell / RUN_DESCRIPTION).read_text()) == json.loads((alone / RUN_DESCRIPTION).read_text())
    assert list(read_jsonl(cell / TRACES, Trace)) == list(read_jsonl(alone / TRACES, Trace))
    for one, other in zip(*(read_jsonl(at / PREDICTIONS, Prediction) for at in (cell, alone)), strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
        assert dataclasses.replace(one, probabilities=other.probabilities) == other


def test_cells_of_equal_settings_are_one_run(done):
    assert len(list((done / "out").glob("*/run.json"))) == RUNS
    assert run_of(done, "as tuned") == run_of(done, "tuned") and run_of(done, "tuned").name.startswith("tuned-")
    rows = {cell["name"]: cell for cell in table_of(done)["cells"]}
    assert rows["as tuned"]["figures"] == rows["tuned"]["figures"] and rows["as tuned"]["difference"] is None
    assert "as tuned has the settings of tuned: one run." in (done / "printed").read_text()


def test_the_table_is_that_of_evaluation_compare(done, tmp_path):
    names = [name for name in CELLS if name != "as tuned"]
    compare.main([*(str(run_of(done, name)) for name in names), "--output", str(tmp_path)])
    expected = json.loads((tmp_path / "comparison.json").read_text())
    found = {cell["name"]: cell for cell in table_of(done)["cells"]}
    for name, run in zip(names, expected["runs"], strict=True):
        for key, figure in run["figures"].items():  # of three parts: too few for an interval
            assert found[name]["figures"][key] == {"value": figure["value"], "interval": None}
        assert found[name]["counts"] == run["counts"] and found[name]["cases"] == 3
    for name, difference in zip(names[1:], expected["differences"], strict=True):
        ours, test = found[name]["difference"], difference["mcnemar"][ALL_QUESTIONS]
        for key, figure in difference["figures"].items():
            assert ours["figures"][key] == {"difference": figure["difference"], "interval": None}
        assert (ours["won"], ours["lost"], ours["p_holm"]) == (test["only_run"], test["only_baseline"], test["p_holm"])
        assert (ours["questions"], ours["cases"]) == (21, 3)


def test_the_table_is_printed_and_written_with_its_numbers_of_questions(done):
    printed, markdown = (done / "printed").read_text(), (done / "out" / "ablation.md").read_text()
    header, _, *rows = markdown.split("\n\n")[0].splitlines()
    assert [row.split("|")[1].strip() for row in rows] == list(CELLS)
    assert [name.strip() for name in header.split("|")[-5:-1]] == ["unparsed, %", "questions", "cases", "seconds"]
    for name, row in zip(CELLS, rows, strict=True):
        assert [cell.strip() for cell in row.split("|")[-4:-2]] == ["21", "3"]
        assert " ".join(row.replace("|", " ").split()) in " ".join(printed.split()), name
    assert "Holm-corrected for 6 differences" in printed and "AD Anomaly Detection" in markdown
    page = (done / "out" / "ablation.html").read_text()
    require_self_contained(page)
    assert all(f'<th scope="row">{name}</th>' in page for name in CELLS) and "corruption: blur" in page


def asked_by(monkeypatch) -> tuple[list[Any], list[Any], list[Any]]:
    """What engines are asked from now on, what images they encode, and what models are loaded, as they come."""
    asked, looked, loaded = [], [], []
    generate, look, load = Engine.generate, Engine._load, evaluation_run.load_model

    def speaking(self, role, exchanges):
        for one in exchanges:
            words = [(role, self.adapted, self.corruption, one.images, one.context, b.prompt) for b in one.branches]
            asked.extend(words)
        return generate(self, role, exchanges)

    monkeypatch.setattr(Engine, "generate", speaking)
    monkeypatch.setattr(Engine, "_load", lambda self, view: looked.append((self.adapted, view)) or look(self, view))
    monkeypatch.setattr(evaluation_run, "load_model", lambda *some, **more: loaded.append(some) or load(*some, **more))
    return asked, looked, loaded


def test_nothing_is_computed_twice_and_a_finished_ablation_computes_nothing(done, shared, tmp_path, monkeypatch):
    asked, looked, loaded = asked_by(monkeypatch)
    ablate.main(written(tmp_path, shared))
    assert len(set(asked)) == len(asked) and len(set(looked)) == len(looked) and len(loaded) == 2
    for name in CELLS:
        for file in (PREDICTIONS, TRACES):
            assert (run_of(tmp_path, name) / file).read_bytes() == (run_of(done, name) / file).read_bytes()
    before, seconds = table_of(tmp_path), (tmp_path / "out" / ablate.SECONDS).read_text()
    for calls in (asked, looked, loaded):
        calls.clear()
    ablate.main(written(tmp_path, {**shared, "baseline": "base"}))
    assert not asked and not looked and not loaded
    assert (tmp_path / "out" / ablate.SECONDS).read_text() == seconds
    after = table_of(tmp_path)
    for one, other in zip(before["cells"], after["cells"], strict=True):
        assert one["figures"] == other["figures"] and one["run"] == other["run"]
    assert after["cells"][1]["difference"] is None and after["cells"][0]["difference"]["questions"] == 21


@pytest.mark.parametrize("stopped", [2, 11])
def test_a_stopped_ablation_goes_on_to_the_bytes_of_one_left_alone(done, shared, tmp_path, monkeypatch, stopped):
    """Stopped where the so manieth case would be written: in the first cell, and in one that shares much."""
    write, count = RunFolder.write, []

    def writing(self, case, outcome):
        count.append(case)
        if len(count) == stopped:
            raise KeyboardInterrupt
        write(self, case, outcome)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", writing)
        with pytest.raises(KeyboardInterrupt):
            ablate.main(written(tmp_path, shared))
    kept = tmp_path / "out" / "utterances" / "0.jsonl"
    kept.write_bytes(kept.read_bytes()[:-9])  # killed while it wrote what the decision makers said
    ablate.main(written(tmp_path, shared))
    for name in CELLS:
        for file in (PREDICTIONS, TRACES):
            assert (run_of(tmp_path, name) / file).read_bytes() == (run_of(done, name) / file).read_bytes()


@pytest.mark.slow
def test_two_processes_make_the_cells_of_one(done, shared, tmp_path):
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "2"]
    command(launcher, written(tmp_path, shared))
    assert len(list((tmp_path / "out" / "utterances").iterdir())) == 2
    for name in CELLS:
        for file in (PREDICTIONS, TRACES):
            ours, theirs = (run_of(folder, name) / file for folder in (tmp_path, done))
            assert sorted(ours.read_bytes().splitlines()) == sorted(theirs.read_bytes().splitlines())
    assert [one["figures"] for one in table_of(tmp_path)["cells"]] == [
        one["figures"] for one in table_of(done)["cells"]
    ]


def test_a_cell_that_is_added_finds_what_the_others_left(done, shared, tmp_path, monkeypatch):
    shutil.copytree(done / "out", tmp_path / "out")
    asked, _, _ = asked_by(monkeypatch)
    ablate.main(written(tmp_path, {**shared, "cells": {**CELLS, "late": {"knowledge": "none"}}}))
    assert {role for role, *_ in asked} <= {"reasoning_expert", "decision_maker"}, "the extractor was asked before"
    assert len(list((tmp_path / "out").glob("*/run.json"))) == RUNS + 1 and len(table_of(tmp_path)["cells"]) == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"cells": {"tuned": {}, "b": {"refrence": "none"}}},
            "^cell b: unknown key 'refrence'; did you mean 'reference'",
        ),
        ({"cels": {}}, "unknown key 'cels'; did you mean 'cells'"),
        (
            {"cells": {"tuned": {}, "b": {"reference": "nun"}}},
            "^cell b: reference cannot be 'nun'; choose from retrieved",
        ),
        ({"cells": {"tuned": {}, "b": {"adapters": "nowhere"}}}, "^cell b: there is no folder nowhere"),
        ({"cells": {"tuned": {}, "b": {"dataset": "nowhere"}}}, "^cell b: there is no dataset nowhere"),
        ({"cells": {"tuned": {}, "b": {"corruption": "blur"}}}, "^cell b: corruption is given and severity is not"),
        (
            {"cells": {"tuned": {}, "b": {"references": 0}}},
            "^cell b: references is 0, and .* choose a number from 1 to",
        ),
        ({"cells": {"tuned": {}, "b": {"references": 3}}}, "^cell b: references is 3, and .* was built with k 2"),
        (
            {"cells": {"tuned": {}, "b": {"reference": "none", "references": 1}}},
            "^cell b: references is 1, and reference none shows none; take one of the two options out",
        ),
        (
            {"cells": {"tuned": {}, "b": {"adapters": None, "model_name_or_path": "./nowhere"}}},
            "^cell b: there is no model folder nowhere",
        ),
        ({"cells": {"tuned": {}, "b": {"split": "left_out"}}}, "^cell b: .* has no case in the split left_out"),
        ({"cells": {"tuned": {}, "b": {"output": "x"}}}, "^cell b: its output is a folder under"),
        ({"cells": {"tuned": {}, "b": "base"}}, "^cell b: 'base' is no mapping"),
        ({"baseline": "tunde"}, "baseline is 'tunde', which is no cell; choose from tuned, base"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_runs(shared, tmp_path, changes, message):
    with pytest.raises(EchoError, match=message):
        ablate.main(written(tmp_path, {**shared, **changes}))
    assert not (tmp_path / "out").exists()


def test_cells_that_ask_two_servers_are_two_runs(shared):
    servers = {f"port {port}": {"server": f"http://127.0.0.1:{port}/v1"} for port in (8001, 8002)}
    given = {name: value for name, value in shared.items() if name not in ("baseline", "cells")}
    (run,) = configs.build([RunConfig], {**given, "output": "out"}, "the test")
    cells = ablate.read_cells(run, ablate.AblationConfig("port 8001", {**servers, "again": servers["port 8001"]}))
    assert cells[0].config.output == cells[2].config.output != cells[1].config.output


def test_what_one_server_said_is_not_taken_for_what_another_says(dataset, shared, tmp_path, monkeypatch):
    given = {name: value for name, value in shared.items() if name not in ("baseline", "cells")}
    speakers = []
    monkeypatch.setattr(ablate, "carry_out", lambda prepared, state, engines, kept: speakers.append(kept._identities))
    for port in (8001, 8001, 8002):
        server = {"server": f"http://127.0.0.1:{port}/v1", "output": str(tmp_path)}
        (config,) = configs.build([RunConfig], {**given, **server}, "the test")
        state = type("State", (), {"process_index": 0})()
        ablate.run_cell(prepare_run(config), state, ablate.Engines(1), tmp_path / "utterances")
    assert speakers[0] == speakers[1] and all(speakers[0][role] != speakers[2][role] for role in ROLES)


def test_as_many_references_as_the_dataset_has_are_the_default(shared, tmp_path, capsys):
    given = {name: value for name, value in shared.items() if name not in ("baseline", "cells")}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    run_main([*words, "--output", str(tmp_path / "run")])
    run_main([*words, "--output", str(tmp_path / "run"), "--references", "2"])
    assert "3 cases of test, 3 done before" in capsys.readouterr().out
    with pytest.raises(EchoError, match="holds a run whose references is None, not 1"):
        run_main([*words, "--output", str(tmp_path / "run"), "--references", "1"])


def test_as_many_references_are_shown_as_asked_for_the_best_ranked_first(dataset):
    for method in ("retrieved", "random"):
        every = load_cases(load_dataset(dataset), "test", method)
        best = load_cases(load_dataset(dataset), "test", method, 1)
        assert [one.seen.query for one in best] == [one.seen.query for one in every]
        assert all([one.rank for one in case.seen.references] == [1] for case in best if case.seen.references)
    assert all(len(case.seen.references) == 1 for case in load_cases(load_dataset(dataset), "test", "retrieved", 1))


def test_a_cell_on_other_questions_is_compared_on_those_that_both_were_asked(tmp_path):
    """Forty photographs, of which the second dataset has the last ten and ten of its own, and the third none."""
    first, second = predictions(0.9), predictions(0.4, seed=1, images=50)[60:]
    third = [dataclasses.replace(row, question_text="Another one?") for row in predictions(0.5)]
    folders = {
        "seen": make_run(tmp_path / "seen", first),
        "novel": make_run(tmp_path / "novel", second, dataset_fingerprint="beef", warnings=["odd"]),
        "other": make_run(tmp_path / "other", third, warnings=["odd", "new"]),
    }
    rows = [(name, {}, folder) for name, folder in folders.items()]
    table = ablation_table.tabulate(rows, "seen", dict.fromkeys(folders, 1.0))
    seen, novel, other = table["cells"]
    assert (novel["counts"]["questions"], novel["cases"]) == (40, 20)
    assert (novel["difference"]["questions"], novel["difference"]["cases"]) == (20, 10)
    compare.main([
        str(make_run(tmp_path / "a", first[60:])), str(make_run(tmp_path / "b", second[:20])),
        "--output", str(tmp_path / "compare"),
    ])  # fmt: skip
    expected = json.loads((tmp_path / "compare" / "comparison.json").read_text())["differences"][0]
    assert novel["difference"]["figures"] == expected["figures"] and expected["figures"]["AUROC"]["interval"]
    assert novel["difference"]["p_holm"] == expected["mcnemar"][ALL_QUESTIONS]["p"]
    assert other["difference"] is None and seen["difference"] is None
    assert table["warnings"] == ["novel, other: odd", "other: new"]
    told = ablation_table.text(table)
    assert "is on the 20 questions of 10 cases that both were asked" in told
    assert "other was asked other questions than seen, none of them the same" in told


def asked(first: int, last: int) -> list[Prediction]:
    """Answers about the photographs of these numbers."""
    return predictions(0.7, images=last)[2 * first :]


@pytest.mark.parametrize(("seen", "other", "common"), [((0, 20), (0, 40), 20), ((0, 40), (20, 40), 20)])
def test_a_cell_that_was_asked_more_or_less_is_compared_on_what_is_common_and_says_so(tmp_path, seen, other, common):
    folders = {"seen": make_run(tmp_path / "seen", asked(*seen)), "other": make_run(tmp_path / "other", asked(*other))}
    table = ablation_table.tabulate([(name, {}, folder) for name, folder in folders.items()], "seen", {})
    assert table["cells"][1]["difference"]["cases"] == common
    assert f"is on the {2 * common} questions of {common} cases that both were asked" in ablation_table.text(table)
    assert [row[-1] for row in ablation_table.columns(table)] == ["seconds", "–", "–"]


def test_few_parts_and_missing_sides_and_failures_are_told_in_the_place_of_intervals(tmp_path):
    """The second cell has three photographs in common with the first, all defective, the third none that failed."""
    few = [row for row in asked(30, 46) if row.condition != "good" or int(row.case.split("-")[1]) >= 40]
    few = [row for row in few if int(row.case.split("-")[1]) >= 34]
    broken = [dataclasses.replace(asked(0, 40)[0], parsed=None, error="broken image"), *asked(0, 40)[1:]]
    folders = {
        "seen": make_run(tmp_path / "seen", asked(0, 40)),
        "few": make_run(tmp_path / "few", few),
        "broken": make_run(tmp_path / "broken", broken),
    }
    table = ablation_table.tabulate([(name, {}, folder) for name, folder in folders.items()], "seen", {})
    _, cell, other = table["cells"]
    assert cell["difference"]["cases"] == 3 and other["difference"]["figures"]["Average"]["interval"]
    assert all(one["interval"] is None for one in cell["difference"]["figures"].values())
    assert cell["figures"]["Average"]["interval"] and cell["figures"]["specificity"]["interval"] is None
    assert re.search(r"\(–\)", ablation_table.columns(table)[2][2])
    assert table["warnings"] == [
        "few: Anomaly Detection has no interval if a class has fewer than 5 parts: the dataset tiles has 3 normal "
        "parts",
        "few: on the questions that seen was asked too, Anomaly Detection covers only one class: tiles "
        "(defective only)",
        "few: on the questions that seen was asked too, Anomaly Detection has no interval if a class has fewer "
        "than 5 parts: the dataset tiles has 3 defective parts",
        "broken: 1 predictions failed (broken image); the same command asks again",
    ]
    ablation_table.write(tmp_path, table)
    assert "1 predictions failed (broken image)" in (tmp_path / "ablation.html").read_text()


RECIPES = sorted((ROOT / "recipes").glob("*/ablation.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_every_recipe_of_an_ablation_has_cells_that_can_be_read(path):
    shared, ablation = configs.parse([RunConfig, ablate.AblationConfig], ["--config", str(path)])
    cells = ablate.read_cells(shared, ablation)
    assert len({cell.config.output for cell in cells}) == len(cells), "no two have the same settings"
    (run,) = configs.parse([RunConfig], ["--config", str(path.with_name("run.yaml"))])
    same = ("model_name_or_path", "dataset", "split", "routing", "min_pixels", "max_pixels", "dtype", "max_new_tokens")
    same += ("batch_size", "reference", "knowledge", "reasoning", "attn_implementation")
    assert [getattr(shared, name) for name in same] == [getattr(run, name) for name in same]
    differing = {option for cell in cells for option in cell.differs}
    assert differing >= {"adapters", "reference", "references", "knowledge", "reasoning", "routing", "corruption"}
    assert set(ablation_table.INITIALS) == set(QUESTION_TYPES) and len(set(ablation_table.INITIALS.values())) == len(
        QUESTION_TYPES
    )
