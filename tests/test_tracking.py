"""W&B gets the whole experiment: data, adapters, evaluations and their lineage, with the figures of the reports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb
from PIL import Image

from data_prep.build import main as build
from echo_ft import tracking
from echo_ft.config import parse
from echo_ft.data.dataset import load_dataset, write_manifest
from echo_ft.errors import EchoError
from echo_ft.experts.roles import PROMPT_VERSION
from echo_ft.model.adapters import ADAPTER_FILES, Adapter, AdapterCard, write_card
from echo_ft.provenance import fingerprint_files
from echo_ft.records import ROLES
from evaluation import compare, run_groups, score, wandb_log
from tests.conftest import ROOT, make_dataset
from tests.support.drawn_manifest import draw_manifest
from tests.support.scripted_runs import WORDS, write_scripted_run
from tests.support.training import SAME_TRAINING, logged_state, run_in_process, tiny_options
from tests.support.wandb_files import LoggedRun, read_runs
from train import export, sft

CARD = AdapterCard(
    "reasoning_expert", "echo-tiny", "main", "cafe", PROMPT_VERSION, 784, 12544, "data/caps", "f00d", "full", {}, "abc",
    leaks={"beef": "LEAK: 3 parts are in both splits"}, training={"learning_rate": 1e-4},
)  # fmt: skip
BASE, TUNED, ADAPTERS, BUNDLE = (f"runs/caps/{name}" for name in ("base", "tuned", "adapters", "bundle"))


@dataclass(frozen=True)
class OwnOptions:
    """Stands for EchoConfig."""

    role: str = "reasoning_expert"
    max_tokens: int = 32768


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """An empty folder with W&B offline."""
    set_offline(monkeypatch, tmp_path)
    return tmp_path


def set_offline(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.chdir(folder)
    for name in ("PROJECT", "RUN_GROUP", "NAME", "API_KEY", "RUN_ID", "RESUME"):
        patch.delenv(f"WANDB_{name}", raising=False)
    for name, value in {"MODE": "offline", "DIR": folder, "DATA_DIR": folder / "wandb data", "SILENT": "true"}.items():
        patch.setenv(f"WANDB_{name}", str(value))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The working directory after a build, a training, two evaluations, a comparison and an export, all logged."""
    folder = tmp_path_factory.mktemp("an experiment")
    with pytest.MonkeyPatch.context() as patch:
        set_offline(patch, folder)
        run_experiment(patch)
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, LoggedRun]:
    """What the commands logged, by job type; `base` is the first evaluation."""
    build, train, base, evaluate, compare, export = read_runs(folder)
    return {"build": build, "train": train, "base": base, "evaluate": evaluate, "compare": compare, "export": export}


def run_experiment(patch: pytest.MonkeyPatch) -> None:
    manifest = draw_manifest(Path("raw").absolute(), ("cap",), normals=10, defects=5)
    source = ["--source", "manifest", "--annotations", str(manifest), "--descriptor", "skimage", "--split", "seeded"]
    build([*source, "--k", "2", "--output", "data/caps", "--report_to", "wandb"])
    adapters = {role: write_adapter(Path(ADAPTERS) / role) for role in ROLES}
    train(patch, load_dataset(Path("data/caps")), f"{ADAPTERS}/reasoning_expert")
    write_scripted_run(Path(BASE), Path("data/caps"))
    described = {role: {"fingerprint": one.fingerprint} for role, one in adapters.items()}
    changes = {"adapters": described, "adapters_folder": ADAPTERS, "routing": "full"}
    write_scripted_run(Path(TUNED), Path("data/caps"), {**WORDS, "decide": "A"}, **changes)
    for run in (BASE, TUNED):
        score.main([run, "--report_to", "wandb"])
    compare.main([BASE, TUNED, "--report_to", "wandb"])
    Path(BUNDLE, "processor").mkdir(parents=True)
    Path(BUNDLE, "bundle.json").write_text(json.dumps({"base_model": "echo-tiny"}))
    Path(BUNDLE, "processor", "tokenizer.json").write_text("{}")
    options = export.ExportConfig(
        ADAPTERS,
        BUNDLE,
        report=f"{TUNED}/report.json",
        report_to="wandb",
        registry="wandb-registry-model/caps",
        aliases=["staging"],
    )
    export.log_export(options, adapters)


def write_adapter(folder: Path) -> Adapter:
    folder.mkdir(parents=True)
    for name in ADAPTER_FILES:
        (folder / name).write_text(folder.name)
    write_card(folder, replace(CARD, role=folder.name))
    return Adapter(folder, CARD, fingerprint_files([folder / name for name in ADAPTER_FILES], folder))


def train(patch: pytest.MonkeyPatch, dataset: Any, output: str) -> None:
    """What train/sft.py logs around a training that itself logs one loss."""
    options = SimpleNamespace(
        report_to=["wandb"], process_index=0, output_dir=output, run_name=None, resume_from_checkpoint=None
    )
    checked: Any = SimpleNamespace(dataset=dataset, cards={".": CARD})
    with sft.log_training(checked, OwnOptions(), options):  # type: ignore[arg-type]
        assert wandb.run is not None
        wandb.run.log({"train/loss": 0.5})
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        patch.delenv(name)


def numbers(value: Any, path: str = "") -> dict[str, float]:
    """The numbers of a report by path, written independently of `tracking.numbers_by_path`."""
    if isinstance(value, dict):
        return {name: one for key in value for name, one in numbers(value[key], f"{path}/{key}").items()}
    if isinstance(value, list):
        bounds = dict(zip(("low", "high"), value, strict=False)) if len(value) == 2 else {}
        return numbers(bounds, path) if all(type(one) in (int, float) for one in bounds.values()) else {}
    return {path[1:]: value} if type(value) in (int, float) else {}


def test_an_experiment_has_one_group_and_a_run_per_job(runs):
    described = [(one.run.job_type, one.run.run_group, one.run.display_name, one.run.project) for one in runs.values()]
    names = ("caps", "reasoning_expert", "base", "tuned", "compare", "bundle")
    jobs = ("build", "train", "evaluate", "evaluate", "compare", "export")
    assert described == [(job, "caps", name, "echo-ft") for job, name in zip(jobs, names, strict=True)]


def test_the_logged_figures_equal_those_of_report_json(folder, runs):
    report = json.loads((folder / TUNED / "report.json").read_text())
    expected = numbers({key: part for key, part in report.items() if key not in ("bootstrap", "provenance")})
    assert {"tables/strict/Average/Average", "detection/All/auroc", "counts/questions"} <= expected.keys()
    assert any(key.endswith("/low") for key in expected)
    (logged,) = runs["evaluate"].history
    assert {key: logged[key] for key in expected} == expected
    assert {key: runs["evaluate"].summary[key] for key in expected} == expected
    assert not [key for key in logged if key not in expected and not key.startswith(("_", "cases/"))]


def test_lineage_leads_from_the_dataset_to_the_bundle(runs):
    dataset, adapters = "dataset-caps", {f"caps-{role}" for role in ROLES}
    lineage = {job: (one.names(used=True), one.names(used=False)) for job, one in runs.items()}
    assert lineage == {
        "build": (set(), {dataset}),
        "train": ({dataset}, {"caps-reasoning_expert"}),
        "base": ({dataset}, {"caps-base"}),
        "evaluate": ({dataset, *adapters}, {"caps-tuned"}),
        "compare": ({"caps-base", "caps-tuned"}, set()),
        "export": ({*adapters, "caps-tuned"}, {"caps-bundle"}),
    }
    for name in (dataset, "caps-reasoning_expert", "caps-tuned"):
        digests = {one.artifacts[name].digest for one in runs.values() if name in one.artifacts}
        assert len(digests) == 1, f"{name} must be one version in W&B"


def test_a_dataset_is_a_reference_with_fingerprint_audit_and_preview(folder, runs):
    contents, facts = runs["build"].contents("dataset-caps"), runs["build"].metadata("dataset-caps")
    manifest = json.loads((folder / "data/caps/manifest.json").read_text())
    assert facts["fingerprint"] == manifest["fingerprint"]
    assert (facts["counts"], facts["audits"]) == (manifest["counts"], "not audited")
    assert contents["preview.html"].local_path
    inspections = contents["inspections.jsonl"]
    assert not inspections.local_path
    assert inspections.ref == (folder / "data/caps/inspections.jsonl").resolve().as_uri()
    assert "sft/decision_maker/train.jsonl" in contents
    manifest["audits"] = {"beef": {"leak": True, "verdict": "LEAK: 3 parts"}}
    assert tracking.dataset_artifact(folder / "data/caps", manifest).metadata["audits"] == {"beef": "LEAK: 3 parts"}


def test_a_training_logs_its_options_its_card_and_its_adapter(folder, runs):
    config, adapter = runs["train"].config, runs["train"].metadata("caps-reasoning_expert")
    assert (config["role"], config["max_tokens"]) == ("reasoning_expert", 32768)
    assert config["card"]["leaks"] == adapter["leaks"] == CARD.leaks
    assert adapter["training"] == {"learning_rate": 1e-4}
    assert {*runs["train"].contents("caps-reasoning_expert")} == {*ADAPTER_FILES, "echo_ft.json", "README.md"}
    assert runs["train"].history[0]["train/loss"] == 0.5
    saved = (folder / ADAPTERS / "reasoning_expert" / "wandb_run_id.txt").read_text()
    assert runs["train"].run.run_id == saved, "a resumed training continues this run"


def test_the_table_shows_what_each_expert_saw_and_said(folder, runs):
    table = runs["evaluate"].table("cases")
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    predictions = [json.loads(line) for line in (folder / TUNED / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == len(predictions) > 10
    for row, said in zip(rows, predictions, strict=True):
        assert (row["case"], row["kind"], row["condition"]) == (said["case"], said["kind"], said["condition"])
        assert row["reference_extractor"] == "1\nAn even ramp."
        assert row["knowledge_guide"] == WORDS["guide"]
        assert row["decision_maker"] == "A"
        assert row["P"] == pytest.approx(said["probabilities"][said["answer"]])
        assert row["answer"] == f"A. {said['options']['A']}"
        assert row["right"] == (said["answer"] == "A")
        assert ("wrong" in row["tags"].split()) != row["right"]
        assert row["reference"]["_type"] == "image-file"
        assert ("masks" in row["query"]) == (said["condition"] != "good")
    assert {row["reasoning_expert"] for row in rows} >= {WORDS["reason"]}


def test_a_picture_shows_mask_and_predicted_boxes_and_is_stored_once(offline):
    mask = np.zeros((20, 40), dtype=np.bool_)
    mask[:5, :5] = True
    picture = tracking.Picture(Image.new("RGB", (40, 20)), mask, "dent", ((0, 250, 500, 750),))
    with tracking.log_run("evaluate", "one", "caps", {}) as run:
        run.log({"cases": tracking.make_table(["query", "kind"], [[picture, "a"], [picture, "b"]])})
    (logged,) = read_runs(offline)
    first, second = (row[0] for row in logged.table("cases")["data"])
    assert first == second
    contents = logged.artifacts[next(iter(logged.artifacts))].manifest.contents
    (box,) = first["boxes"]["predicted"]
    assert box["position"] == {"minX": 0, "minY": 0.25, "maxX": 0.5, "maxY": 0.75}
    (path,) = [entry.local_path for entry in contents if entry.path.endswith(".mask.png")]
    with Image.open(path) as stored:
        assert np.array_equal(np.asarray(stored) > 0, mask)


def test_the_config_of_an_evaluation_is_that_of_its_run(runs):
    config = runs["evaluate"].config
    assert (config["routing"], config["split"]) == ("full", "test")
    assert config["score"]["false_alarms"] == 0.05


def test_a_report_outside_its_run_folder_is_named_and_gives_no_lineage(folder, offline, capsys):
    shutil.copytree(folder / BUNDLE, BUNDLE)
    shutil.copy(folder / TUNED / "report.json", offline)
    export.log_export(export.ExportConfig(ADAPTERS, BUNDLE, report="report.json", report_to="wandb"), {})
    assert "no run as an input of the bundle: report.json is not in a run folder" in capsys.readouterr().err
    (logged,) = read_runs(offline)
    assert (logged.names(used=True), logged.names(used=False)) == (set(), {"caps-bundle"})


def test_a_registry_is_linked_online_only(runs, capsys, folder):
    assert {"bundle.json", "processor/tokenizer.json"} == {*runs["export"].contents("caps-bundle")}
    artifact = tracking.bundle_artifact(folder / BUNDLE, {})
    linked: list[object] = []
    online: Any = SimpleNamespace(offline=False, link_artifact=lambda *given: linked.append(given))
    tracking.link_bundle(online, artifact, "wandb-registry-model/caps", ["staging"])
    assert linked == [(artifact, "wandb-registry-model/caps", ["staging"])]
    tracking.link_bundle(SimpleNamespace(offline=True), artifact, "wandb-registry-model/caps", [])  # type: ignore[arg-type]
    assert "the bundle is not linked to wandb-registry-model/caps" in capsys.readouterr().err


@pytest.fixture
def no_variables(offline, monkeypatch) -> Path:
    """Like `offline`, but without WANDB_MODE, and with no API key anywhere."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(offline / "netrc"))
    return offline


def test_without_a_key_a_run_is_offline_and_says_how_to_sync(no_variables, capsys):
    assert not tracking.has_api_key()
    with tracking.log_run("build", "one", "caps", {"path": Path("a")}) as run:
        assert run.offline
        folder = Path(run.dir).parent
    assert f"there is no API key (wandb login). Upload the run with: wandb sync {folder}" in capsys.readouterr().err
    (logged,) = read_runs(no_variables)
    assert logged.config["path"] == "a"


def test_without_a_server_a_run_is_offline_but_a_wrong_key_is_an_error(no_variables, monkeypatch, capsys):
    initialize, modes = wandb.init, []

    def init(mode: str, **options: Any) -> Any:
        modes.append(mode)
        if mode == "online":
            raise error
        return initialize(mode=mode, **options)

    monkeypatch.setattr(tracking, "has_api_key", lambda: True)
    monkeypatch.setattr(wandb, "init", init)
    error: Exception = wandb.errors.CommError("no such host\nhint")
    with tracking.log_run("build", "one", "caps", {}) as run:
        assert run.offline
    assert modes == ["online", "offline"]
    assert "the run cannot start online (no such host). Upload" in capsys.readouterr().err
    error = wandb.errors.AuthenticationError("invalid key")
    with pytest.raises(wandb.errors.AuthenticationError), tracking.log_run("build", "one", "caps", {}):
        pass
    monkeypatch.setenv("WANDB_MODE", "online")  # a user who asks for it does not get another mode
    error = wandb.errors.CommError("no such host")
    with pytest.raises(wandb.errors.CommError), tracking.log_run("build", "one", "caps", {}):
        pass


def test_variables_of_wandb_take_precedence(offline, monkeypatch):
    for name in ("PROJECT", "RUN_GROUP", "NAME"):
        monkeypatch.setenv(f"WANDB_{name}", f"my-{name.lower()}")
    with pytest.raises(ZeroDivisionError), tracking.log_run("train", "one", "caps", {}):
        raise ZeroDivisionError
    (logged,) = read_runs(offline)
    assert (logged.run.project, logged.run.run_group, logged.run.display_name) == (
        "my-project",
        "my-run_group",
        "my-name",
    )
    assert logged.exit_code == 1, "a run that failed must not look finished"


def test_experiments_are_named_after_the_folder_around_the_output():
    assert tracking.experiment_name(Path("runs/demo/tuned")) == "demo"
    assert tracking.experiment_name(Path("runs/demo/adapters/decision_maker")) == "demo"
    assert tracking.experiment_name(Path("runs/demo/late_adapters/decision_maker")) == "demo"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("runs/demo/adapters/decision_maker", "demo-decision_maker"),
        ("runs/demo/decision_maker", "demo-decision_maker"),
        ("runs/demo/late_adapters/decision_maker", "demo-late_adapters-decision_maker"),
    ],
)
def test_adapters_of_different_trainings_are_different_artifacts(folder, name):
    assert tracking.adapter_artifact(Path(folder), {}).name == name


class FakeApi:
    """Stands for `wandb.Api`: `entity/echo-ft/k3v9x2ab` has logged the run folder `source`."""

    source: Path

    def run(self, path: str) -> FakeApi:
        if path != "entity/echo-ft/k3v9x2ab":
            raise ValueError(f"Could not find run {path}\nhint")
        return self

    def logged_artifacts(self) -> list[Any]:
        artifact = tracking.evaluation_artifact(self.source)
        return [SimpleNamespace(type="model"), SimpleNamespace(
            type="evaluation", metadata=artifact.metadata, download=lambda root: shutil.copytree(self.source, root)
        )]  # fmt: skip


def test_compare_takes_wandb_runs_as_well_as_folders(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(wandb, "Api", FakeApi)
    monkeypatch.setattr(FakeApi, "source", Path(TUNED), raising=False)
    monkeypatch.setattr(tracking, "has_api_key", lambda: True)
    compare.main([BASE, TUNED, "--output", str(tmp_path / "local")])
    expected = json.loads((tmp_path / "local" / "comparison.json").read_text())
    address = "https://wandb.ai/entity/echo-ft/runs/k3v9x2ab?nw=1"
    for place, run in enumerate(("entity/echo-ft/k3v9x2ab", address, f"tuned={address}")):
        monkeypatch.setenv("WANDB_ARTIFACT_DIR", str(tmp_path / str(place)))
        compare.main([BASE, run, "--output", str(tmp_path / "logged")])
        found = json.loads((tmp_path / "logged" / "comparison.json").read_text())
        assert found["differences"] == expected["differences"]
        downloaded = tmp_path / str(place) / "entity/echo-ft/k3v9x2ab/caps/tuned"
        assert tracking.evaluation_artifact(downloaded).digest == tracking.evaluation_artifact(Path(TUNED)).digest
    with pytest.raises(EchoError, match=r"no folder runs/demo/lost, and W&B finds no run runs/demo/lost \(Could not"):
        compare.main([BASE, "runs/demo/lost"])
    foreign = [{}, {"experiment": "caps", "run": ".."}, {"experiment": "..", "run": "tuned"}, {"experiment": "caps"}]
    artifacts = [SimpleNamespace(type="evaluation", metadata=place) for place in foreign]
    for artifact in (SimpleNamespace(type="model"), *artifacts):
        monkeypatch.setattr(FakeApi, "logged_artifacts", lambda _, artifact=artifact: [artifact])
        with pytest.raises(EchoError, match=r"has no evaluation; log one with python -m evaluation.score RUN_DIR"):
            compare.main([BASE, address])


def test_without_a_key_an_address_is_refused_and_a_path_is_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "has_api_key", lambda: False)
    with pytest.raises(EchoError, match="is a W&B run, but there is no API key; run wandb login"):
        tracking.local_run("https://wandb.ai/entity/echo-ft/runs/k3v9x2ab")
    with pytest.raises(EchoError, match="there is no folder runs/demo/lost; create a run"):
        run_groups.read_groups(["runs/demo/lost", str(tmp_path)])
    monkeypatch.setattr(tracking, "has_api_key", lambda: pytest.fail("a local path needs no W&B"))
    for text in ("../runs/demo/lost", "./a/b/c", "a/b", "/a/b/c", "runs/demo/seeds/lost"):
        assert tracking.local_run(text) == Path(text)


def test_what_changed_since_a_run_is_named_and_left_out(folder, offline, capsys):
    for name in ("data", "runs"):
        shutil.copytree(folder / name, offline / name)
    Path(ADAPTERS, "decision_maker", ADAPTER_FILES[0]).write_text("other weights")
    shutil.rmtree(Path(ADAPTERS, "knowledge_guide"))
    manifest = json.loads(Path("data/caps/manifest.json").read_text())
    write_manifest(Path("data/caps"), manifest | {"fingerprint": "0" * 16})
    score.main([TUNED, "--report_to", "wandb"])
    warned = capsys.readouterr().err
    assert (
        f"does not get the decision_maker adapter: {ADAPTERS}/decision_maker has different weights than in the run"
        in warned
    )
    assert "W&B does not get the knowledge_guide adapter: " in warned
    assert "W&B gets no dataset and no table of cases: data/caps has been rebuilt since the run" in warned
    (logged,) = read_runs(offline)
    assert logged.names(used=True) == {"caps-reference_extractor", "caps-reasoning_expert"}


def test_scores_of_an_answer_file_are_logged_with_their_report(offline, capsys):
    prediction = {"image": "MVTec-AD/nut/test/bent/000.png", "question": {"text": "Is there any defect in the object?"},
                  "question_type": "Anomaly Detection", "options": {"A": "Yes.", "B": "No."}, "correct_answer": "A",
                  "gpt_answer": "A"}  # fmt: skip
    Path("answers.json").write_text(json.dumps([prediction]))
    score.main(["--answers", "answers.json", "--output", "runs/others/scored", "--report_to", "wandb"])
    (logged,) = read_runs(offline)
    assert (logged.run.run_group, logged.run.display_name) == ("others", "scored")
    files = {"report.json", "report.html", "run.json", "predictions.jsonl"}  # `evaluation.compare` reads the last two
    assert {*logged.contents("others-scored")} == files
    assert logged.history[0]["counts/questions"] == 1
    assert "answers.json is not a run folder" in capsys.readouterr().err


def test_a_long_table_is_cut_with_a_message(monkeypatch, capsys):
    cases: Any = list(range(10))
    assert wandb_log.chosen_cases(cases) is cases
    monkeypatch.setattr(wandb_log, "TABLE_CASES", 4)
    assert wandb_log.chosen_cases(cases) == [0, 2, 5, 7]
    assert "the W&B table shows 4 of 10 cases" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"registry": "models/caps"}, "registry needs W&B; add --report_to wandb"),
        ({"report_to": "wandb", "aliases": ["staging"]}, "aliases need a collection in the registry; add --registry"),
    ],
)
def test_an_export_refuses_options_without_effect(options, message):
    with pytest.raises(EchoError, match=message):
        export.check_tracking(export.ExportConfig("adapters", "bundle", **options))


@pytest.mark.slow
def test_a_real_training_logs_its_curves_into_the_run(offline, tmp_path):
    dataset, output = make_dataset(tmp_path / "data" / "parts"), tmp_path / "runs" / "parts" / "adapters" / ROLES[2]
    steps = [*SAME_TRAINING, "--per_device_train_batch_size", "4", "--report_to", "wandb"]
    run_in_process(*tiny_options(ROLES[2], dataset, output, *steps))
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        os.environ.pop(name)
    (logged,) = read_runs(offline)
    assert (logged.run.job_type, logged.run.run_group) == ("train", "parts")
    losses = {row["step"]: row["loss"] for row in logged_state(output)["log_history"] if "loss" in row}
    curve = {row["train/global_step"]: row["train/loss"] for row in logged.history if "train/loss" in row}
    assert curve == losses and len(losses) == 3
    card = json.loads((output / "echo_ft.json").read_text())
    assert logged.config["card"] == card
    assert (logged.config["max_tokens"], logged.config["learning_rate"]) == (32768, 1e-2), "own options and TRL's"
    assert logged.names(used=True) == {"dataset-parts"}
    assert logged.metadata("parts-reasoning_expert")["training"] == card["training"]


def test_the_agent_of_the_sweep_starts_a_training_with_its_options(tmp_path, monkeypatch):
    """wandb's agent composes the command. It sets WANDB_RUN_ID, and bash must pass on every option."""
    from wandb.sdk.launch.sweeps import utils

    sweep = utils.load_sweep_config(str(ROOT / "recipes/sweeps/decision_maker_lora.yaml"))
    assert sweep is not None
    values = {"learning_rate": {"value": 0.0003}, "lora_r": {"value": 8}}
    assert {*sweep["parameters"]} == {*values}
    arguments = utils.create_sweep_command_args({"args": values})
    command = [part for chunk in utils.create_sweep_command(sweep["command"])
               for part in (arguments["args"] if chunk == "${args}" else [chunk])]  # fmt: skip
    recorder = tmp_path / "python"
    recorder.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    recorder.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "trial1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    start = words.index("train/sft.py")
    assert Path(ROOT, words[words.index("--config_file") + 1]).is_file()
    from trl import ModelConfig

    from echo_ft.training.config import EchoConfig, TrainingConfig

    config, options, model = parse(
        [EchoConfig, TrainingConfig, ModelConfig], [*words[start + 1 :], "--use_cpu", "true"]
    )
    assert (config.role, options.learning_rate, model.lora_r) == ("decision_maker", 0.0003, 8)
    assert options.output_dir == "runs/sweep/trial1/adapters/decision_maker"
    assert options.report_to == ["wandb"]
    assert (sweep["metric"]["name"], options.eval_strategy) == ("eval/loss", "epoch"), "the metric must be logged"
