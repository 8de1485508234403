"""Images without a condition are run, and change nothing else: no split, training row, audit or score."""

from __future__ import annotations

import dataclasses
import io
import json
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest

from data_prep import audit
from data_prep.build import build
from data_prep.build import main as build_main
from data_prep.collect import usable_images
from echo_ft.data.dataset import load_cases, load_dataset
from echo_ft.data.splits import UNLABELLED_SPLIT
from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import PipelineConfig, run_cases
from echo_ft.files import write_jsonl
from echo_ft.metrics.loading import load_run
from echo_ft.records import GROUNDING, UNLABELLED, Inspection, Prediction, Question
from echo_ft.retrieval.products import read_products
from evaluation import export_review, score
from tests.support.backends import ScriptedBackend
from tests.support.drawn_manifest import draw_manifest, draw_part, flags, make_config, read_rows
from tests.support.scripted_runs import WORDS, write_scripted_run


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path, str]:
    """The same parts as two datasets, the second with three images without a condition, and what its build prints."""
    folder = tmp_path_factory.mktemp("unlabelled")
    manifest = draw_manifest(folder, ("cap", "ring"), normals=5, defects=4)
    build(make_config(manifest, folder / "labelled", grounding=True))
    names = [f"cap/new-{number}.png" for number in range(3)]
    for number, name in enumerate(names):
        draw_part(folder / name, 500 + number, defect=number == 1)
    rows = [{"image": name, "product": "cap", "condition": ""} for name in names]
    with open(manifest, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    options = flags(source="manifest", annotations=manifest, output=folder / "mixed", descriptor="skimage", k=2)
    with redirect_stdout(io.StringIO()) as printed:
        build_main([*options, "--grounding", "true"])
    return folder / "labelled", folder / "mixed", printed.getvalue()


@pytest.fixture
def folders(built) -> tuple[Path, Path]:
    return built[:2]


def test_they_change_nothing_about_the_labelled_images(folders):
    labelled, mixed = folders
    for name, cls in (("inspections.jsonl", Inspection), ("questions.jsonl", Question)):
        kept = [row for row in read_rows(mixed, name, cls) if "new-" not in row.id]
        assert kept == read_rows(labelled, name, cls)
    rows = sorted(path.relative_to(labelled) for path in (labelled / "sft").rglob("*.jsonl"))
    assert len(rows) == 8
    assert all((labelled / path).read_bytes() == (mixed / path).read_bytes() for path in rows)
    assert read_products(load_dataset(mixed)).conditions == read_products(load_dataset(labelled)).conditions


def test_their_questions_depend_on_no_truth(folders):
    cases = load_cases(load_dataset(folders[1]), UNLABELLED_SPLIT)
    assert [case.seen.query for case in cases] == [f"cap/new-{number}.png" for number in range(3)]
    for case in cases:
        asked = [(one.kind, list(one.options.values())) for one in case.seen.questions]
        assert asked == [
            ("Anomaly Detection", ["Yes.", "No."]),
            ("Defect Classification", ["dent", "stain"]),
            (GROUNDING, []),
        ]
        assert case.truth.condition == UNLABELLED
        assert {*case.truth.answers.values()} == {""}
        assert case.seen.references


def test_the_build_and_the_audit_say_that_they_skip_them(built, capsys):
    _, mixed, printed = built
    assert "unlabelled      3 cases: without a condition, so only for runs" in printed
    with suppress(SystemExit):  # parts this small look alike, so there may be a leak
        audit.main([str(mixed)])
    assert "unlabelled            3  images without a condition were skipped" in capsys.readouterr().out


def test_the_preview_counts_them_without_a_filter_that_finds_nothing(folders):
    page = (folders[1] / "preview.html").read_text()
    assert '<th scope="row">not known</th>' in page
    assert 'data-value=""' not in page and 'data-value="good"' in page


def test_the_build_warns_if_only_some_images_have_no_condition(folders):
    labelled, mixed = (load_dataset(folder).manifest["warnings"] for folder in folders)
    assert [text for text in mixed if text not in labelled] == [
        "3 of 55 images have no condition, so they are only for runs: cap/new-0.png, cap/new-1.png, cap/new-2.png; "
        "if you forgot to label them, add their condition"
    ]


def test_scores_leave_them_out_and_say_how_many(folders, tmp_path, capsys):
    labelled = write_scripted_run(tmp_path / "labelled", folders[0])
    mixed = write_scripted_run(tmp_path / "mixed", folders[1])
    cases = load_cases(load_dataset(folders[1]), UNLABELLED_SPLIT)
    outcomes = run_cases(cases, ScriptedBackend(dict(WORDS)), PipelineConfig())
    answers = [one for outcome in outcomes for one in outcome.predictions]
    assert [one.answer for one in answers] == [""] * 9
    known = read_rows(mixed, "predictions.jsonl", Prediction)
    write_jsonl(mixed / "predictions.jsonl", [*known, *answers])
    run = json.loads((mixed / "run.json").read_text())
    (mixed / "run.json").write_text(json.dumps(run | {"cases": run["cases"] + 3}))
    found = load_run(mixed)
    assert [*found.predictions, *found.grounding] == [
        *load_run(labelled).predictions,
        *load_run(labelled).grounding,
    ]
    score.main([str(mixed)])
    said = "9 answers about 3 images without a condition are left out of all scores"
    report = json.loads((mixed / "report.json").read_text())
    assert said in report["warnings"]
    score.main([str(labelled)])
    assert report["tables"] == json.loads((labelled / "report.json").read_text())["tables"]
    write_jsonl(mixed / "predictions.jsonl", answers)
    with pytest.raises(EchoError, match="has only answers about images without a condition"):
        load_run(mixed)


@pytest.fixture
def run(folders, tmp_path) -> Path:
    """A run on the images without a condition, in which every answer gives a defect a probability of 0.8."""
    folder = write_scripted_run(tmp_path / "run", folders[1], WORDS | {"decide": "A"}, split=UNLABELLED_SPLIT)
    answers = read_rows(folder, "predictions.jsonl", Prediction)
    sure = {"A": 0.8, "B": 0.2}
    write_jsonl(
        folder / "predictions.jsonl",
        [dataclasses.replace(one, probabilities=sure if one.options else None) for one in answers],
    )
    return folder


def test_their_run_can_be_reviewed_and_the_new_truth_read_back(folders, run, tmp_path, capsys):
    export_review.main([str(run), "--format", "labelstudio"])
    assert "3 images (none tagged) for labelstudio" in capsys.readouterr().out, "without a truth, no answer is wrong"
    path = run / "review_labelstudio" / "tasks.json"
    tasks = json.loads(path.read_text())
    assert [(one["data"]["path"], one["annotations"]) for one in tasks] == [
        (f"cap/new-{number}.png", []) for number in range(3)
    ]
    for task in tasks:
        assert task["predictions"][0]["score"] == pytest.approx(0.8)
        assert "decision_maker: A" in task["data"]["answers"]
        assert "truth" not in task["data"]["answers"]
        assert "wrong" not in task["data"]["tags"]
    interface = (path.parent / "config.xml").read_text()
    assert all(f'<Choice value="{name}"/>' in interface for name in ("good", "dent", "stain"))
    config = make_config(folders[1].parent / "parts.jsonl", tmp_path / "unused", corrections=path)
    source = usable_images(dataclasses.replace(config, corrections=None), tmp_path).inspections
    assert usable_images(config, tmp_path).inspections == source, "an unchanged file changes nothing"
    outline = {"x": 0, "y": 0, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["dent"]}
    size = {"original_width": 48, "original_height": 40}
    marked = {**size, "type": "rectanglelabels", "from_name": "box", "to_name": "image", "value": outline}
    normal = {"type": "choices", "from_name": "condition", "to_name": "image", "value": {"choices": ["good"]}}
    tasks[0]["annotations"], tasks[1]["annotations"] = [{"result": [normal]}], [{"result": [marked]}]
    path.write_text(json.dumps(tasks))
    known = {one.image: one for one in usable_images(config, tmp_path).inspections}
    assert [known[f"cap/new-{number}.png"].condition for number in range(3)] == ["good", "dent", UNLABELLED]
    assert known["cap/new-1.png"].boxes == ((0.0, 0.0, 24.0, 20.0),)
    build(dataclasses.replace(config, output=tmp_path / "grown"))
    splits = {one.image: one.split for one in read_rows(tmp_path / "grown", "inspections.jsonl", Inspection)}
    assert splits["cap/new-2.png"] == UNLABELLED_SPLIT
    assert UNLABELLED_SPLIT not in {splits["cap/new-0.png"], splits["cap/new-1.png"]}


def test_their_review_in_fiftyone_states_no_condition_and_coco_refuses_them(run):
    export_review.main([str(run), "--format", "fiftyone"])
    samples = json.loads((run / "review_fiftyone" / "samples.json").read_text())["samples"]
    assert [(one["condition"], one["p_defect"]) for one in samples] == [(None, pytest.approx(0.8))] * 3
    with pytest.raises(EchoError, match=r"3 images of .* have no condition, but in COCO .*; use --format labelstudio"):
        export_review.main([str(run), "--format", "coco"])
