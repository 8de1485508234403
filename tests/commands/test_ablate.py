"""An ablation computes nothing twice, and its runs and table equal those of evaluation.run and evaluation.compare."""

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
from echo_ft.inference.run_folder import PREDICTIONS, ROW_DIGESTS, RUN_DESCRIPTION, TRACES, RunFolder
from echo_ft.metrics.comparison import ALL_QUESTIONS
from echo_ft.model.vision import ImageEncoder
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
    "no reasoning": {"reasoning": False},  # YAML reads an unquoted off as False
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
    """The options that all cells share. With batches of two, the last batch is smaller."""
    options = {"dataset": str(dataset), "adapters": str(adapters), "model_name_or_path": str(ECHO_TINY)}
    options |= {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "max_new_tokens": 6, "batch_size": 2}
    return {**options, "dtype": "float32", "baseline": "tuned", "cells": CELLS}


def write_config(folder: Path, options: dict[str, Any]) -> list[str]:
    """Write the config to `folder` and return the arguments of the command; the ablation's folder is `folder/out`."""
    folder.mkdir(exist_ok=True)
    text = yaml.safe_dump({"output": str(folder / "out"), **options}, sort_keys=False)
    (folder / "ablation.yaml").write_text(text)
    return ["--config", str(folder / "ablation.yaml")]


@pytest.fixture(scope="module")
def done(shared, tmp_path_factory):
    """An uninterrupted ablation, run from the command line. The file `printed` has its output."""
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "printed").write_text(run_command([sys.executable], write_config(folder, shared)))
    return folder


def run_command(launcher: list[str], arguments: list[str]) -> str:
    """Run the command and return what it prints."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, "-m", "evaluation.ablate", *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def load_table(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "ablation.json").read_text())


def run_folder(folder: Path, name: str) -> Path:
    """The run folder of a cell."""
    return next(folder / "out" / cell["run"] for cell in load_table(folder)["cells"] if cell["name"] == name)


def require_equal_runs(folder: Path, other: Path) -> None:
    """Check that the runs of all cells are byte-identical."""
    for name in CELLS:
        for file in (PREDICTIONS, TRACES):
            ours, theirs = (run_folder(each, name) / file for each in (folder, other))
            assert ours.read_bytes() == theirs.read_bytes(), (name, file)


@pytest.mark.parametrize("name", ["base", "one of them", "no reasoning", "paper", "blurred"])
def test_a_cell_equals_a_run_of_evaluation_run(done, shared, tmp_path, name):
    options = {**{key: value for key, value in shared.items() if key not in ("baseline", "cells")}, **CELLS[name]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**options, "output": str(tmp_path / "single")}))
    run_main(["--config", str(tmp_path / "run.yaml")])
    cell, single = run_folder(done, name), tmp_path / "single"
    described = [json.loads((folder / RUN_DESCRIPTION).read_text()) for folder in (cell, single)]
    for one in described:
        del one[ROW_DIGESTS]  # the probabilities may differ by rounding
    assert described[0] == described[1]
    assert list(read_jsonl(cell / TRACES, Trace)) == list(read_jsonl(single / TRACES, Trace))
    for one, other in zip(*(read_jsonl(at / PREDICTIONS, Prediction) for at in (cell, single)), strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
        assert dataclasses.replace(one, probabilities=other.probabilities) == other


def test_cells_with_equal_options_share_one_run(done):
    assert len(list((done / "out").glob("*/run.json"))) == RUNS
    assert run_folder(done, "as tuned") == run_folder(done, "tuned")
    assert run_folder(done, "tuned").name.startswith("tuned-")
    rows = {cell["name"]: cell for cell in load_table(done)["cells"]}
    assert rows["as tuned"]["figures"] == rows["tuned"]["figures"]
    assert rows["as tuned"]["difference"] is None
    assert '"as tuned" has the same options as "tuned", so they share one run.' in (done / "printed").read_text()


def test_the_table_equals_that_of_evaluation_compare(done, tmp_path):
    names = [name for name in CELLS if name != "as tuned"]
    compare.main([*(str(run_folder(done, name)) for name in names), "--output", str(tmp_path)])
    expected = json.loads((tmp_path / "comparison.json").read_text())
    found = {cell["name"]: cell for cell in load_table(done)["cells"]}
    for name, run in zip(names, expected["runs"], strict=True):
        for key, figure in run["figures"].items():  # three parts are too few for an interval
            assert found[name]["figures"][key] == {"value": figure["value"], "interval": None}
        assert found[name]["counts"] == run["counts"]
        assert found[name]["cases"] == 3
    for name, difference in zip(names[1:], expected["differences"], strict=True):
        ours, test = found[name]["difference"], difference["mcnemar"][ALL_QUESTIONS]
        for key, figure in difference["figures"].items():
            assert ours["figures"][key] == {"difference": figure["difference"], "interval": None}
        assert (ours["won"], ours["lost"], ours["p_holm"]) == (test["only_run"], test["only_baseline"], test["p_holm"])
        assert (ours["questions"], ours["cases"]) == (21, 3)


def test_the_table_is_printed_and_written_with_numbers_of_questions(done):
    printed, markdown = (done / "printed").read_text(), (done / "out" / "ablation.md").read_text()
    header, _, *rows = markdown.split("\n\n")[0].splitlines()
    assert [row.split("|")[1].strip() for row in rows] == list(CELLS)
    last_columns = [name.strip() for name in header.split("|")[-5:-1]]
    assert last_columns == ["unparsed + failed, %", "questions", "cases", "seconds"]
    for name, row in zip(CELLS, rows, strict=True):
        assert [cell.strip() for cell in row.split("|")[-4:-2]] == ["21", "3"]
        assert " ".join(row.replace("|", " ").split()) in " ".join(printed.split()), name
    assert "Holm-corrected for 6 differences" in printed
    assert f": answers differ from the base model's: {', '.join(ROLES)}" in printed, "the adapters were checked"
    assert "AD Anomaly Detection" in markdown
    page = (done / "out" / "ablation.html").read_text()
    require_self_contained(page)
    assert all(f'<th scope="row">{name}</th>' in page for name in CELLS)
    assert "corruption: blur" in page


def record_calls(monkeypatch) -> tuple[list[Any], list[Any], list[Any]]:
    """Record the prompts that engines answer, the images that they load, and the models that are loaded."""
    prompts, images, models = [], [], []
    generate, load_image, load_model = Engine.generate, ImageEncoder._load, evaluation_run.load_to_answer

    def recorded(self, role, exchanges):
        for one in exchanges:
            if one.case == "probe":
                continue
            prefix = (role, self.adapted, self.corruption, one.images, one.context)
            prompts.extend((*prefix, branch.prompt) for branch in one.branches)
        return generate(self, role, exchanges)

    def load_recorded_image(self, view):
        if "echo-ft-probe-" not in str(view.path):
            images.append((id(self), view))
        return load_image(self, view)

    def load_recorded_model(*arguments, **options):
        models.append(arguments)
        return load_model(*arguments, **options)

    monkeypatch.setattr(Engine, "generate", recorded)
    monkeypatch.setattr(ImageEncoder, "_load", load_recorded_image)
    monkeypatch.setattr(evaluation_run, "load_to_answer", load_recorded_model)
    return prompts, images, models


def test_nothing_is_computed_twice_and_a_finished_ablation_not_at_all(done, shared, tmp_path, monkeypatch):
    prompts, images, models = record_calls(monkeypatch)
    ablate.main(write_config(tmp_path, shared))
    assert len(set(prompts)) == len(prompts)
    assert len(set(images)) == len(images)
    assert len(models) == 2
    require_equal_runs(tmp_path, done)
    before, seconds = load_table(tmp_path), (tmp_path / "out" / ablate.SECONDS).read_text()
    for calls in (prompts, images, models):
        calls.clear()
    ablate.main(write_config(tmp_path, {**shared, "baseline": "base"}))
    assert not prompts
    assert not images
    assert not models
    assert (tmp_path / "out" / ablate.SECONDS).read_text() == seconds
    after = load_table(tmp_path)
    for one, other in zip(before["cells"], after["cells"], strict=True):
        assert one["figures"] == other["figures"]
        assert one["run"] == other["run"]
    assert after["cells"][1]["difference"] is None
    assert after["cells"][0]["difference"]["questions"] == 21


@pytest.mark.parametrize("stopped", [2, 11])
def test_a_resumed_ablation_is_byte_identical(done, shared, tmp_path, monkeypatch, stopped):
    """Stop before writing case number `stopped`: 2 is in the first cell, 11 in a cell that uses much of the cache."""
    write, cases = RunFolder.write, []

    def stop_at_case(self, case, outcome):
        cases.append(case)
        if len(cases) == stopped:
            raise KeyboardInterrupt
        write(self, case, outcome)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", stop_at_case)
        with pytest.raises(KeyboardInterrupt):
            ablate.main(write_config(tmp_path, shared))
    cache = tmp_path / "out" / ablate.CACHE_FOLDER / "0.jsonl"
    cache.write_bytes(cache.read_bytes()[:-9])  # as if killed while writing the last generations
    ablate.main(write_config(tmp_path, shared))
    require_equal_runs(tmp_path, done)


@pytest.mark.slow
def test_two_processes_give_the_same_cells_as_one(done, shared, tmp_path):
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "2"]
    run_command(launcher, write_config(tmp_path, shared))
    assert len(list((tmp_path / "out" / ablate.CACHE_FOLDER).iterdir())) == 2
    for name in CELLS:
        for file in (PREDICTIONS, TRACES):
            ours, theirs = (run_folder(folder, name) / file for folder in (tmp_path, done))
            assert sorted(ours.read_bytes().splitlines()) == sorted(theirs.read_bytes().splitlines())
    ours, theirs = ([cell["figures"] for cell in load_table(folder)["cells"]] for folder in (tmp_path, done))
    assert ours == theirs


def test_a_cell_that_is_added_later_uses_the_cache(done, shared, tmp_path, monkeypatch):
    shutil.copytree(done / "out", tmp_path / "out")
    prompts, _, _ = record_calls(monkeypatch)
    ablate.main(write_config(tmp_path, {**shared, "cells": {**CELLS, "late": {"knowledge": "none"}}}))
    assert {role for role, *_ in prompts} <= {"reasoning_expert", "decision_maker"}, "the extractor's are cached"
    assert len(list((tmp_path / "out").glob("*/run.json"))) == RUNS + 1
    assert len(load_table(tmp_path)["cells"]) == 9


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
        ({"cells": {"tuned": {}, "b": {"corruption": "blur"}}}, "^cell b: corruption is set but severity is not"),
        (
            {"cells": {"tuned": {}, "b": {"references": 0}}},
            "^cell b: references is 0, but .* choose a number from 1 to",
        ),
        ({"cells": {"tuned": {}, "b": {"references": 3}}}, "^cell b: references is 3, but .* was built with k 2"),
        (
            {"cells": {"tuned": {}, "b": {"reference": "none", "references": 1}}},
            "^cell b: references is 1, but reference is none; remove one of the two options",
        ),
        (
            {"cells": {"tuned": {}, "b": {"adapters": None, "model_name_or_path": "./nowhere"}}},
            "^cell b: there is no model folder nowhere",
        ),
        ({"cells": {"tuned": {}, "b": {"split": "left_out"}}}, "^cell b: .* has no case in the split left_out"),
        ({"cells": {"tuned": {}, "b": {"output": "x"}}}, "^cell b: its output is always a folder under"),
        ({"cells": {"tuned": {}, "b": "base"}}, "^cell b: 'base' is not a mapping"),
        (
            {"cells": {"tuned": {}, "{reference}": {"reference": "none"}}},
            "^cell {reference}: give a list of values for reference, or remove {reference}",
        ),
        (
            {"cells": {"tuned": {}, "{reference}": {"reference": ["none", "nun"]}}},
            "^cell nun: reference cannot be 'nun'; choose from retrieved",
        ),
        (
            {"cells": {"tuned": {}, "none": {}, "{reference}": {"reference": ["none"]}}},
            "^cell {reference}: there is already a cell none; rename one of them",
        ),
        ({"features_gib": -1}, "^features_gib is -1; set it to 0 or more"),
        ({"baseline": "tunde"}, "baseline is 'tunde', which is not a cell; choose from tuned, base"),
    ],
)
def test_an_invalid_config_is_refused_before_anything_runs(shared, tmp_path, changes, message):
    with pytest.raises(EchoError, match=message):
        ablate.main(write_config(tmp_path, {**shared, **changes}))
    assert not (tmp_path / "out").exists()


def test_failed_predictions_give_the_exit_status_of_a_run(shared, tmp_path, monkeypatch, capsys):
    """The status is 3 until a later call has retried them."""
    rows = predictions(0.7, images=4)
    failed = [dataclasses.replace(rows[0], parsed=None, probabilities=None, error="no space left"), *rows[1:]]
    arguments = write_config(tmp_path, {**shared, "cells": {"tuned": {}, "paper": {"routing": "paper"}}})
    for answers, status in ((failed, configs.PARTLY_DONE), (rows, 0)):
        monkeypatch.setattr(
            ablate, "run_cell", lambda run, *_, answers=answers: make_run(Path(run.config.output), answers)
        )
        assert ablate.main(arguments) == status
        warned = "2 predictions failed (first: no space left); rerun the same command to retry them"
        assert (warned in capsys.readouterr().err) == bool(status)
    assert len(load_table(tmp_path)["cells"]) == 2, "the table is written all the same"


def test_options_in_braces_make_a_cell_for_each_combination():
    late = {"adapters": "late", "corruption": ["blur", "jpeg"], "severity": [1, 5]}
    assert [*ablate.expand_cells({"tuned": None, "late, {corruption} {severity}": late})] == [
        ("tuned", {}),
        ("late, blur 1", {"adapters": "late", "corruption": "blur", "severity": 1}),
        ("late, blur 5", {"adapters": "late", "corruption": "blur", "severity": 5}),
        ("late, jpeg 1", {"adapters": "late", "corruption": "jpeg", "severity": 1}),
        ("late, jpeg 5", {"adapters": "late", "corruption": "jpeg", "severity": 5}),
    ]


def test_cells_with_different_servers_are_different_runs(shared):
    servers = {f"port {port}": {"server": f"http://127.0.0.1:{port}/v1"} for port in (8001, 8002)}
    given = {name: value for name, value in shared.items() if name not in ("baseline", "cells")}
    (run,) = configs.build([RunConfig], {**given, "output": "out"}, "the test")
    cells = ablate.read_cells(run, ablate.AblationConfig("port 8001", {**servers, "again": servers["port 8001"]}))
    assert cells[0].config.output == cells[2].config.output != cells[1].config.output


def test_generations_of_different_servers_are_cached_separately(dataset, shared, tmp_path, monkeypatch):
    given = {name: value for name, value in shared.items() if name not in ("baseline", "cells")}
    identities = []
    monkeypatch.setattr(
        ablate, "run_remaining", lambda prepared, state, engines, cache: identities.append(cache._identities)
    )
    for port in (8001, 8001, 8002):
        server = {"server": f"http://127.0.0.1:{port}/v1", "output": str(tmp_path)}
        (config,) = configs.build([RunConfig], {**given, **server}, "the test")
        state = type("State", (), {"process_index": 0})()
        ablate.run_cell(prepare_run(config), state, ablate.EngineFactory(1), tmp_path / ablate.CACHE_FOLDER)
    assert identities[0] == identities[1]
    assert all(identities[0][role] != identities[2][role] for role in ROLES)


def test_all_references_of_the_dataset_are_the_default(shared, tmp_path, capsys):
    given = {name: value for name, value in shared.items() if name not in ("baseline", "cells")}
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    run_main([*options, "--output", str(tmp_path / "run")])
    run_main([*options, "--output", str(tmp_path / "run"), "--references", "2"])
    assert "split test: 3 cases, 3 done, 0 to run" in capsys.readouterr().out
    with pytest.raises(EchoError, match="holds a run in which references is None, not 1"):
        run_main([*options, "--output", str(tmp_path / "run"), "--references", "1"])


def test_the_best_ranked_references_are_shown_first(dataset):
    for method in ("retrieved", "random"):
        every = load_cases(load_dataset(dataset), "test", method)
        best = load_cases(load_dataset(dataset), "test", method, 1)
        assert [one.seen.query for one in best] == [one.seen.query for one in every]
        assert all([one.rank for one in case.seen.references] == [1] for case in best if case.seen.references)
    assert all(len(case.seen.references) == 1 for case in load_cases(load_dataset(dataset), "test", "retrieved", 1))


def test_a_cell_with_other_questions_is_compared_on_the_shared_ones(tmp_path):
    """The second dataset has the last ten of the first's forty images and ten new ones. The third shares nothing."""
    first, second = predictions(0.9), predictions(0.4, seed=1, images=50)[60:]
    third = [dataclasses.replace(row, question_text="Another one?") for row in predictions(0.5)]
    folders = {
        "seen": make_run(tmp_path / "seen", first),
        "novel": make_run(tmp_path / "novel", second, dataset_fingerprint="beef", warnings=["odd"]),
        "other": make_run(tmp_path / "other", third, warnings=["odd", "new"]),
    }
    rows = [(name, {}, folder) for name, folder in folders.items()]
    table = ablation_table.build_table(rows, "seen", dict.fromkeys(folders, 1.0))
    seen, novel, other = table["cells"]
    assert (novel["counts"]["questions"], novel["cases"]) == (40, 20)
    assert (novel["difference"]["questions"], novel["difference"]["cases"]) == (20, 10)
    compare.main([
        str(make_run(tmp_path / "a", first[60:])), str(make_run(tmp_path / "b", second[:20])),
        "--output", str(tmp_path / "compare"),
    ])  # fmt: skip
    expected = json.loads((tmp_path / "compare" / "comparison.json").read_text())["differences"][0]
    assert novel["difference"]["figures"] == expected["figures"]
    assert expected["figures"]["AUROC"]["interval"]
    assert novel["difference"]["p_holm"] == expected["mcnemar"][ALL_QUESTIONS]["p"]
    assert other["difference"] is None
    assert seen["difference"] is None
    assert table["warnings"] == ["novel, other: odd", "other: new"]
    text = ablation_table.text(table)
    assert 'cover only the 20 questions (10 cases) it shares with "seen"' in text
    assert '"other" shares no question with "seen", so there is no difference' in text


def test_questions_about_other_parts_are_not_shared(tmp_path):
    rows = predictions(0.5)
    folders = {
        "seen": make_run(tmp_path / "seen", rows),
        "regrouped": make_run(tmp_path / "regrouped", [dataclasses.replace(row, group="one") for row in rows[20:]]),
    }
    table = ablation_table.build_table([(name, {}, folder) for name, folder in folders.items()], "seen", {})
    assert table["cells"][1]["difference"] is None


def test_other_question_types_are_summed_up_and_missing_probabilities_stated(tmp_path):
    folders = {}
    for name, skill in (("weak", 0.2), ("strong", 0.9)):
        rows = [dataclasses.replace(row, kind=f"Other {row.kind}") for row in predictions(skill)]
        folders[name] = make_run(tmp_path / name, rows)
    table = ablation_table.build_table([(name, {}, folder) for name, folder in folders.items()], "weak", {})
    difference = table["cells"][1]["difference"]["figures"]["Average of other types"]
    header, _, strong = ablation_table.table_rows(table)
    cells = dict(zip(header, strong, strict=True))
    assert cells["difference"].startswith(f"+{difference['difference']:.1f} (+")
    average = table["cells"][1]["figures"]["Average of other types"]["value"]
    assert cells["average, %"].startswith(f"{average:.1f} (")
    assert "in percent; AUROC" in ablation_table.text(table)
    assert "The average covers question types that are not part of MMAD." in ablation_table.text(table)
    ablation_table.write(tmp_path, table)
    assert f"{average:.1f}" in (tmp_path / "ablation.html").read_text()
    detects = predictions(0.5)
    few = [dataclasses.replace(row, probabilities=None) if place < 20 else row for place, row in enumerate(detects)]
    for name, rows in (("all", detects), ("few", few)):
        folders[name] = make_run(tmp_path / name, rows)
    table = ablation_table.build_table([(name, {}, folders[name]) for name in ("all", "few")], "all", {})
    assert table["warnings"] == [
        "all, few: AUROC covers only 30 of 40 images, because it needs their P(defect) from every run (few has one for "
        "30)"
    ]


def predictions_of(first: int, last: int) -> list[Prediction]:
    """Predictions for the images from number `first` up to `last`, which is excluded."""
    return predictions(0.7, images=last)[2 * first :]


@pytest.mark.parametrize(("seen", "other", "shared"), [((0, 20), (0, 40), 20), ((0, 40), (20, 40), 20)])
def test_a_cell_with_more_or_fewer_questions_names_the_shared_number(tmp_path, seen, other, shared):
    folders = {
        "seen": make_run(tmp_path / "seen", predictions_of(*seen)),
        "other": make_run(tmp_path / "other", predictions_of(*other)),
    }
    table = ablation_table.build_table([(name, {}, folder) for name, folder in folders.items()], "seen", {})
    assert table["cells"][1]["difference"]["cases"] == shared
    assert f"cover only the {2 * shared} questions ({shared} cases) it shares with" in ablation_table.text(table)
    assert [row[-1] for row in ablation_table.table_rows(table)] == ["seconds", "–", "–"]


def test_few_parts_one_class_and_failures_are_reported(tmp_path):
    """The second cell shares three images with the first, all of them defective. The third has a failed prediction."""
    few = [row for row in predictions_of(30, 46) if row.condition != "good" or int(row.case.split("-")[1]) >= 40]
    few = [row for row in few if int(row.case.split("-")[1]) >= 34]
    broken = [
        dataclasses.replace(predictions_of(0, 40)[0], parsed=None, error="broken image"),
        *predictions_of(0, 40)[1:],
    ]
    folders = {
        "seen": make_run(tmp_path / "seen", predictions_of(0, 40)),
        "few": make_run(tmp_path / "few", few),
        "broken": make_run(tmp_path / "broken", broken),
    }
    table = ablation_table.build_table([(name, {}, folder) for name, folder in folders.items()], "seen", {})
    _, cell, other = table["cells"]
    assert cell["difference"]["cases"] == 3
    assert other["difference"]["figures"]["Average"]["interval"]
    assert all(one["interval"] is None for one in cell["difference"]["figures"].values())
    assert cell["figures"]["Average"]["interval"]
    assert cell["figures"]["specificity"]["interval"] is None
    assert re.search(r"\(–\)", ablation_table.table_rows(table)[2][2])
    assert table["warnings"] == [
        "few: Anomaly Detection has no interval if a class has fewer than 5 parts: the dataset tiles has 3 normal "
        "parts",
        "few: on the questions shared with seen, Anomaly Detection covers only one class: tiles (defective only)",
        "few: on the questions shared with seen, Anomaly Detection has no interval if a class has fewer "
        "than 5 parts: the dataset tiles has 3 defective parts",
        "broken: 1 predictions failed (first: broken image); rerun the same command to retry them",
        "seen, broken: AUROC covers only 39 of 40 images, because it needs their P(defect) from every run (broken has "
        "one for 39)",
    ]
    ablation_table.write(tmp_path, table)
    assert "1 predictions failed (first: broken image)" in (tmp_path / "ablation.html").read_text()


RECIPES = sorted((ROOT / "recipes").glob("*/ablation.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_every_ablation_recipe_has_distinct_valid_cells(path):
    shared, ablation = configs.parse([RunConfig, ablate.AblationConfig], ["--config", str(path)])
    cells = ablate.read_cells(shared, ablation)
    assert len({cell.config.output for cell in cells}) == len(cells), "no two have the same settings"
    (run,) = configs.parse([RunConfig], ["--config", str(path.with_name("run.yaml"))])
    same = ("model_name_or_path", "dataset", "split", "routing", "min_pixels", "max_pixels", "dtype", "max_new_tokens")
    same += ("batch_size", "reference", "knowledge", "reasoning", "attn_implementation")
    assert [getattr(shared, name) for name in same] == [getattr(run, name) for name in same]
    differing = {option for cell in cells for option in cell.differs}
    assert differing >= {"adapters", "reference", "references", "knowledge", "reasoning", "routing", "corruption"}
    assert set(ablation_table.INITIALS) == set(QUESTION_TYPES)
    assert len(set(ablation_table.INITIALS.values())) == len(QUESTION_TYPES)
