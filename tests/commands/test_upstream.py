"""Training rows with predicted upstream outputs come from runs whose adapters were not trained on their cases."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from data_prep.build import main as build_main
from echo_ft.data.dataset import load_cases, load_dataset
from echo_ft.data.splits import LEFT_OUT, leave_out_fold
from echo_ft.errors import EchoError
from echo_ft.experts.roles import one_line, parse_best
from echo_ft.files import write_jsonl
from echo_ft.model.adapters import make_card, read_card, write_card
from echo_ft.records import ROLES, Exchange, Inspection, Question, Reference, Trace
from evaluation.run import main as run_main
from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS, random_adapters
from tests.support.drawn_manifest import draw_manifest, read_rows, run_build, write_part_knowledge

ROUTING = "full"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Images of one product, with two images of each part."""
    folder = tmp_path_factory.mktemp("upstream")
    draw_manifest(folder / "raw", ("cap",), normals=6, defects=4)
    write_part_knowledge(folder / "raw")
    return folder


def options(place: Path, output: Path, *more: object) -> list[str]:
    source = ["--source", "manifest", "--annotations", place / "raw" / "parts.jsonl"]
    source += ["--knowledge", place / "raw" / "knowledge.yaml", "--descriptor", "skimage", "--k", 2]
    source += ["--fractions", 0.6, 0.2, 0.2, "--output", output]
    return [str(part) for part in (*source, *more)]


@pytest.fixture(scope="module")
def whole(place) -> Path:
    build_main(options(place, place / "whole"))
    return place / "whole"


@pytest.fixture(scope="module")
def folds(place) -> list[Path]:
    for fold in range(2):
        build_main(options(place, place / f"fold{fold}", "--folds", 2, "--fold", fold))
    return [place / f"fold{fold}" for fold in range(2)]


@pytest.fixture(scope="module")
def runs(place, folds) -> dict[str, Path]:
    """A run on each left-out fold, one on the validation split, and one on the training images of fold 0."""
    for fold in folds:
        random_adapters(place / "adapters" / fold.name, fold)
    wanted = [(fold, LEFT_OUT) for fold in folds] + [(folds[0], "validation"), (folds[0], "train")]
    done = {}
    for fold, split in wanted:
        output = done[f"{fold.name} {split}"] = place / "runs" / fold.name / split
        given = {"dataset": fold, "adapters": place / "adapters" / fold.name, "split": split, "output": output}
        given |= {"model_name_or_path": ECHO_TINY, "dtype": "float32", "max_new_tokens": 5}
        given |= {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "routing": ROUTING}
        run_main([str(part) for name, value in given.items() for part in (f"--{name}", value)])
    return done


@pytest.fixture(scope="module")
def clean(runs) -> list[Path]:
    return [runs[name] for name in (f"fold0 {LEFT_OUT}", f"fold1 {LEFT_OUT}", "fold0 validation")]


def exchanges(folder: Path, role: str, split: str) -> list[Exchange]:
    return read_rows(folder, f"sft/{role}/{split}.jsonl", Exchange)


def predict(place: Path, output: Path, runs: list[Path], *more: object) -> None:
    build_main(options(place, output, "--upstream", "predicted", "--traces", *runs, *more))


def test_folds_divide_the_train_split_by_part(whole, folds):
    before = {one.id: one for one in read_rows(whole, "inspections.jsonl", Inspection)}
    train = {name for name, one in before.items() if one.split == "train"}
    left = []
    for folder in folds:
        now = {one.id: one for one in read_rows(folder, "inspections.jsonl", Inspection)}
        left.append({name for name, one in now.items() if one.split == LEFT_OUT})
        assert {name for name, one in now.items() if one.split == "train"} == train - left[-1]
        assert list(now) == list(before)
        assert all(now[name].split == before[name].split for name in before if name not in train)
        assert read_rows(folder, "questions.jsonl", Question) == read_rows(whole, "questions.jsonl", Question)
        assert json.loads((folder / "manifest.json").read_text())["counts"]["cases"][LEFT_OUT]
    assert left[0] | left[1] == train and not left[0] & left[1]
    assert not {before[name].group for name in left[0]} & {before[name].group for name in left[1]}


def test_left_out_fold_is_never_a_training_reference(whole, folds):
    own = {(r.inspection, r.image, r.rank, r.similarity) for r in read_rows(whole, "references.jsonl", Reference)}
    for folder in folds:
        split = {one.id: one.split for one in read_rows(folder, "inspections.jsonl", Inspection)}
        left = {one.image for one in read_rows(folder, "inspections.jsonl", Inspection) if one.split == LEFT_OUT}
        training = [row for role in ROLES for row in exchanges(folder, role, "train")]
        assert training
        assert not {image for row in training for image in row.images} & left
        others = [r for r in read_rows(folder, "references.jsonl", Reference) if split[r.inspection] != "train"]
        assert {(r.inspection, r.image, r.rank, r.similarity) for r in others} <= own
        shown = {one.id: one.seen for one in load_cases(load_dataset(whole), "train")}
        assert all(one.seen == shown[one.id] for one in load_cases(load_dataset(folder), LEFT_OUT))


def test_server_models_with_unknown_training_data_are_refused(place, runs, tmp_path):
    """Without --adapters, only a base model that is served under its own name is accepted."""
    copies = [Path(shutil.copytree(run, tmp_path / name)) for name, run in runs.items() if not name.endswith(" train")]

    def served_as(model: str) -> list[Path]:
        for copy in copies:
            described = json.loads((copy / "run.json").read_text())
            (copy / "run.json").write_text(json.dumps({**described, "adapters": {}, "server_model": model}))
        return copies

    predicted = ["--upstream", "predicted", "--traces"]
    with pytest.raises(EchoError, match=r"used the server model \{role\} without --adapters"):
        build_main(options(place, tmp_path / "tuned", *predicted, *served_as("{role}")))
    build_main(options(place, tmp_path / "base", *predicted, *served_as(str(ECHO_TINY))))


def test_a_named_reference_in_the_left_out_fold_is_not_shown_in_training(place, whole, tmp_path):
    """This includes copies of its images. Other named references are kept."""
    shutil.copytree(place / "raw", tmp_path / "raw")
    parts_file = tmp_path / "raw" / "parts.jsonl"
    given = [json.loads(line) for line in parts_file.read_text().splitlines()]
    split = {one.image: one.split for one in read_rows(whole, "inspections.jsonl", Inspection)}
    normals = [row["image"] for row in given if row["condition"] == "good" and split[row["image"]] == "train"]
    original = {}
    for number, row in enumerate(given):
        others = [name for name in normals if name != row["image"]]
        row["reference"] = others[number % len(others)]
        if number % 2:
            copy = f"copies/{number}.png"
            (tmp_path / "raw/copies").mkdir(exist_ok=True)
            shutil.copyfile(tmp_path / "raw" / row["reference"], tmp_path / "raw" / copy)
            original[copy] = row["reference"]
            row["reference"] = copy
    parts_file.write_text("".join(json.dumps(row) + "\n" for row in given))
    build_main(options(tmp_path, tmp_path / "fold", "--folds", 2, "--fold", 0))
    inspections = read_rows(tmp_path / "fold", "inspections.jsonl", Inspection)
    left = {one.image for one in inspections if one.split == LEFT_OUT}
    hidden = {
        one.id for one in inspections if one.split == "train" and original.get(one.reference, one.reference) in left
    }
    assert {one.reference in original for one in inspections if one.id in hidden} == {True, False}
    references = read_rows(tmp_path / "fold", "references.jsonl", Reference)
    stand = {row.inspection for row in references if row.method == "given"}
    assert stand == {one.id for one in inspections} - hidden
    assert hidden <= {row.inspection for row in references if row.method == "retrieved"}
    shown = {name for role in ROLES for row in exchanges(tmp_path / "fold", role, "train") for name in row.images}
    assert not {original.get(name, name) for name in shown} & left
    manifest = json.loads((tmp_path / "fold" / "manifest.json").read_text())
    assert manifest["dropped"]["reference"] == len(hidden)
    assert any(
        f"references of {len(hidden)} training images belong to the left-out fold" in one
        for one in manifest["warnings"]
    )


def test_folds_share_every_condition_whatever_the_order():
    kinds = ["good"] * 9 + ["dent"] * 4 + ["stain"] * 3
    made = [
        Inspection(f"{number}-{view}", f"{number}-{view}.png", "line", "cap", kind, str(number), "train")
        for number, kind in enumerate(kinds)
        for view in range(2)
    ] + [Inspection("t", "t.png", "line", "cap", "dent", "t", "test")]
    folds = [{one.id for one in leave_out_fold(made, 3, fold, seed=0) if one.split == LEFT_OUT} for fold in range(3)]
    assert Counter(name for fold in folds for name in fold) == Counter(one.id for one in made if one.split == "train")
    for kind, least in (("good", 6), ("dent", 2), ("stain", 2)):
        assert all(sum(one.condition == kind for one in made if one.id in fold) >= least for fold in folds)
    assert folds[1] == {one.id for one in leave_out_fold(made[::-1], 3, 1, seed=0) if one.split == LEFT_OUT}
    assert folds[1] != {one.id for one in leave_out_fold(made, 3, 1, seed=1) if one.split == LEFT_OUT}
    with pytest.raises(EchoError, match="no fold 3 of 3"):
        leave_out_fold(made, 3, 3, seed=0)
    with pytest.raises(EchoError, match="no defects remain to train on"):
        leave_out_fold([one for one in made if one.condition == "good" or one.id[0] == "9"], 2, 0, seed=0)


def test_rows_show_predicted_outputs_but_completions_stay_true(place, whole, clean):
    output = place / "predicted"
    done = run_build(*options(place, output, "--upstream", "predicted", "--traces", *clean))
    assert done.returncode == 0, done.stderr
    outputs = {
        (one.case, one.role, one.branch): one.text
        for folder in clean
        for one in read_rows(folder, "traces.jsonl", Trace)
    }
    seen = {case.id: case.seen for split in ("train", "validation") for case in load_cases(load_dataset(whole), split)}
    assert all(any(text for (_, who, _), text in outputs.items() if who == role) for role in ROLES)
    for split in ("train", "validation"):
        for role in ROLES:
            now, gold = exchanges(output, role, split), exchanges(whole, role, split)
            assert completions(now) == completions(gold)
            assert [row.case for row in now] == [row.case for row in gold]
        assert exchanges(output, ROLES[0], split) == exchanges(whole, ROLES[0], split)
        for row in exchanges(output, "decision_maker", split):
            references = seen[row.case].references
            named = parse_best(outputs[row.case, "reference_extractor", "best"], len(references))
            best = references[named] if named is not None else min(references, key=lambda one: one.rank)
            assert row.images[0] == best.image
            for branch in row.branches:
                reason = one_line(outputs[row.case, "reasoning_expert", branch.id])
                assert not reason or f"\nReasoning: {reason}\n" in branch.prompt
                assert "Observe:" not in branch.prompt, "gold reasons are not shown"
            guide = one_line(outputs[row.case, "knowledge_guide", "guide"])
            if guide and "object-classification" not in row.branches[0].id:
                assert f"Guide: {guide}\n" in row.context
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["upstream"] == "predicted"
    assert json.loads((whole / "manifest.json").read_text())["upstream"] == "gold"
    for entry, folder in zip(manifest["upstream_runs"], clean, strict=True):
        described_by = json.loads((folder / "run.json").read_text())
        assert entry["run"] == str(folder)
        assert entry["dataset_fingerprint"] == described_by["dataset_fingerprint"]
        assert entry["adapters"] == {role: described_by["adapters"][role]["fingerprint"] for role in ROLES}
    card = make_card("decision_maker", str(ECHO_TINY), None, MIN_PIXELS, MAX_PIXELS, load_dataset(output))
    assert card.upstream == "predicted"


def completions(made: list[Exchange]) -> list[tuple[str, str | None]]:
    return [(branch.id, branch.completion) for row in made for branch in row.branches]


def test_a_run_on_training_cases_of_its_adapters_is_refused(place, runs, clean, tmp_path):
    """The error names the run, the case and the remedy. Images are recognised by content, even in another folder."""
    leaking = runs["fold0 train"]
    case = read_rows(leaking, "traces.jsonl", Trace)[0].case
    with pytest.raises(EchoError) as caught:
        predict(place, tmp_path / "out", [*clean, leaking])
    for text in (str(leaking), case, "--folds N --fold I", "--split left_out", "fold0"):
        assert text in str(caught.value)
    assert not (tmp_path / "out").exists()
    moved = tmp_path / "moved"
    shutil.copytree(place / "raw", moved / "raw")
    with pytest.raises(EchoError, match=r"covers \S+ with adapters .* that were trained on it"):
        predict(moved, tmp_path / "out", [*clean, leaking])


def test_adapters_with_unknown_training_images_are_refused(place, clean, tmp_path):
    changed_run = Path(shutil.copytree(clean[1], tmp_path / "run"))
    edit(
        changed_run / "run.json", lambda run: run["adapters"]["knowledge_guide"].update(dataset=str(tmp_path / "gone"))
    )
    with pytest.raises(
        EchoError, match=r"adapters \(knowledge_guide\) trained on .*gone.* their training images are unknown"
    ):
        predict(place, tmp_path / "out", [clean[0], changed_run, clean[2]])
    edit(changed_run / "run.json", lambda run: run["adapters"]["knowledge_guide"].update(dataset_fingerprint="0" * 16))
    with pytest.raises(EchoError, match="their training images are unknown"):
        predict(place, tmp_path / "out", [clean[0], changed_run, clean[2]])


def test_a_fully_tuned_base_model_counts_as_trained_on_its_dataset(place, runs, clean, tmp_path):
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "config.json").write_text("{}")
    write_card(tuned, read_card(place / "adapters" / "fold0" / "decision_maker"))
    changed_run = Path(shutil.copytree(runs["fold0 train"], tmp_path / "run"))
    edit(changed_run / "run.json", lambda run: run.update(adapters={}, base_model=str(tuned)))
    with pytest.raises(EchoError, match=r"with weights \(.*tuned\) that were trained on it"):
        predict(place, tmp_path / "out", [*clean, changed_run])


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_case_that_no_run_covers_is_named(place, folds, clean, tmp_path):
    with pytest.raises(EchoError) as caught:
        predict(place, tmp_path / "out", [clean[0], clean[2]])
    left = [case.id for case in load_cases(load_dataset(folds[1]), LEFT_OUT)]
    assert f"no run in traces covers {left[0]} of the train split" in str(caught.value)
    assert f"({len(left)} of " in str(caught.value)
    with pytest.raises(EchoError, match="of the validation split"):
        predict(place, tmp_path / "out", clean[:2])
    changed_run = Path(shutil.copytree(clean[2], tmp_path / "run"))
    traces = read_rows(changed_run, "traces.jsonl", Trace)
    write_jsonl(changed_run / "traces.jsonl", [trace for trace in traces if trace.role != "knowledge_guide"])
    edit(changed_run / "run.json", lambda run: run.pop("digests"))
    with pytest.raises(EchoError, match=r"has no output from knowledge_guide for "):
        predict(place, tmp_path / "out", [*clean[:2], changed_run])


@pytest.mark.parametrize("name", ["traces.jsonl", "predictions.jsonl"])
def test_a_run_that_has_changed_since_it_ended_is_refused(place, clean, tmp_path, name):
    changed_run = Path(shutil.copytree(clean[0], tmp_path / "run"))
    lines = (changed_run / name).read_text().splitlines(keepends=True)
    (changed_run / name).write_text("".join([lines[0].replace('"text": "', '"text": "x', 1), *lines[1:]]))
    with pytest.raises(EchoError, match=rf"run/{name} has changed since the run ended; restore it, or run again"):
        predict(place, tmp_path / "out", [changed_run, *clean[1:]])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"complete": False}, "is not complete; rerun its command to resume"),
        ({"routing": "paper"}, "has routing paper, but training rows have full"),
        ({"reasoning": "off"}, "has reasoning off, but training rows have on"),
        ({"corruption": "blur"}, "has corruption blur, but training rows have None"),
    ],
)
def test_a_run_with_other_options_than_training_rows_is_refused(place, clean, tmp_path, change, message):
    changed_run = Path(shutil.copytree(clean[0], tmp_path / "run"))
    edit(changed_run / "run.json", lambda run: run.update(change))
    with pytest.raises(EchoError, match=message):
        predict(place, tmp_path / "out", [changed_run, *clean[1:]])
    (changed_run / "run.json").unlink()
    with pytest.raises(EchoError, match="is not a run folder from"):
        predict(place, tmp_path / "out", [changed_run, *clean[1:]])


def test_outputs_about_other_references_or_images_are_refused(place, whole, clean, tmp_path, monkeypatch):
    with pytest.raises(EchoError, match=r"gave reference_extractor a different prompt .* with the same config"):
        predict(place, tmp_path / "out", clean, "--k", 1)
    moved = tmp_path / "moved"
    shutil.copytree(place / "raw", moved / "raw")
    test = next(one for one in read_rows(whole, "inspections.jsonl", Inspection) if one.split == "test")
    shutil.copyfile(moved / "raw" / "cap" / "good-0-1.png", moved / "raw" / test.image)
    monkeypatch.delattr("data_prep.build.write_training_rows")  # the error comes before hours of writing rows
    with pytest.raises(EchoError, match="whose images differ from those of this dataset"):
        predict(moved, tmp_path / "out", clean)


@pytest.mark.parametrize("more", [("--folds", 2), ("--fold", 0), ("--upstream", "predicted"), ("--traces", "runs/x")])
def test_options_that_need_each_other_are_refused_separately(place, tmp_path, more):
    with pytest.raises(EchoError, match="must be set together; give both or neither"):
        build_main(options(place, tmp_path / "out", *more))


def test_only_the_test_split_knows_a_held_out_condition_in_runs(place, tmp_path):
    build_main(options(place, tmp_path / "out", "--split", "by_condition", "--held_out", "dent"))
    dataset = load_dataset(tmp_path / "out")
    known = {
        split: {entry.condition for case in load_cases(dataset, split) for entry in case.seen.knowledge}
        for split in ("train", "validation", "test")
    }
    assert known == {"train": {"good", "stain"}, "validation": {"good", "stain"}, "test": {"good", "stain", "dent"}}
