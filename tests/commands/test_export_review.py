"""A review in Label Studio or COCO can be read back: unchanged files change nothing, and corrections take effect."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.build import build
from data_prep.collect import usable_images
from echo_ft.errors import EchoError
from echo_ft.images.outlines import Outlines, same_outlines
from echo_ft.metrics.loading import load_run
from echo_ft.records import GOOD, GROUNDING, Inspection
from evaluation import export_review
from evaluation.review import review_cases, run_dataset
from tests.conftest import ROOT
from tests.support.drawn_manifest import draw_manifest, draw_part, make_config, read_rows
from tests.support.scripted_runs import WORDS, write_scripted_run

FILES = {"labelstudio": "tasks.json", "coco": "instances.json", "fiftyone": "samples.json"}
TRUTH = ("condition", "mask", "boxes", "polygons")


@dataclasses.dataclass(frozen=True)
class Project:
    """A folder with a dataset that has only a test split, and a run on it."""

    folder: Path
    manifest: Path

    def build_config(self, output: str, **changes: Any) -> Any:
        return make_config(self.manifest, self.folder / output, split="given", **changes)

    def inspections(self, **changes: Any) -> dict[str, Inspection]:
        """What a build would read about each image."""
        return {
            one.image: one for one in usable_images(self.build_config("unused", **changes), self.folder).inspections
        }


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """Masks, single and several boxes, a defect without a mark, two defects in one image, and good parts."""
    folder = tmp_path_factory.mktemp("review")
    manifest = draw_manifest(folder / "raw", ("cap",), normals=6, defects=3)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    defective = [row for row in rows if row["condition"] != GOOD and row["group"] != "dent-0"]
    for row, boxes in zip(defective, ([[3.25, 4, 9, 11.5]], [[1, 2, 5, 6], [20, 21, 30.5, 33]], None), strict=False):
        del row["mask"]
        if boxes:
            row["boxes"] = boxes
    defective[1]["condition"] = defective[3]["condition"] = "dent+stain"
    for row in rows:
        row["split"] = "train" if row["group"] in ("good-0", "good-1", "good-2", "dent-0") else "test"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    project = Project(folder, manifest)
    build(project.build_config("data"))
    write_scripted_run(folder / "run", folder / "data")
    return project


def export(project: Project, form: str, output: Path, *more: str) -> Path:
    export_review.main([str(project.folder / "run"), "--format", form, "--output", str(output), *more])
    return output / FILES[form]


@pytest.mark.parametrize("form", ["labelstudio", "coco"])
def test_a_round_trip_changes_nothing(project, tmp_path, form, capsys):
    path = export(project, form, tmp_path / "review")
    before = (project.folder / "data" / "inspections.jsonl").read_bytes()
    tested = [one for one in read_rows(project.folder / "data", "inspections.jsonl", Inspection) if one.split == "test"]
    kinds = {(bool(one.mask), len(one.boxes)) for one in tested if one.condition != GOOD}
    assert {(True, 0), (False, 1), (False, 2), (False, 0)} <= kinds
    manifest = build(project.build_config("again", corrections=path, overwrite=True))
    assert (project.folder / "again" / "inspections.jsonl").read_bytes() == before
    assert manifest["fingerprint"] == json.loads((project.folder / "data" / "manifest.json").read_text())["fingerprint"]
    assert f"corrections: 0 of {len(tested)} reviewed images changed" in capsys.readouterr().out


def correct_tasks(path: Path, changes: dict[str, Callable[[dict[str, Any]], None]]) -> Path:
    """Change the annotations of tasks, given by image, as a reviewer would in Label Studio."""
    tasks = json.loads(path.read_text())
    for task in tasks:
        if task["data"]["path"] in changes:
            changes[task["data"]["path"]](task)
    path.write_text(json.dumps(tasks))
    return path


def results(task: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [one for one in task["annotations"][0]["result"] if one["type"] == kind]


def relabel(task: dict[str, Any], name: str) -> None:
    for result in results(task, "choices"):
        result["value"]["choices"] = [name]
    for result in results(task, "rectanglelabels"):
        result["value"]["rectanglelabels"] = [name]


def outline(task: dict[str, Any], name: str) -> None:
    """Mark the upper left quarter with a rectangle, and add a triangle, on a part that was good."""
    common = {"to_name": "image", "original_width": 48, "original_height": 40}
    box = {"x": 0, "y": 0, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": [name]}
    triangle = {"points": [[50, 50], [100, 50], [100, 100]], "polygonlabels": [name]}
    task["annotations"][0]["result"] = [
        {**common, "type": "rectanglelabels", "from_name": "box", "value": box},
        {**common, "type": "polygonlabels", "from_name": "outline", "value": triangle},
    ]


def move(task: dict[str, Any]) -> None:
    results(task, "rectanglelabels")[0]["value"]["x"] += 10  # percent of 48 pixels


def test_corrections_of_label_studio_replace_the_truth(project, tmp_path):
    before = project.inspections()
    masked = [image for image, one in before.items() if one.mask and one.split == "test"]
    normal = next(image for image, one in before.items() if one.condition == GOOD and one.split == "test")
    renamed, moved, cleared = masked[:3]
    changes = {renamed: lambda t: relabel(t, "chip"), moved: move, normal: lambda t: outline(t, "crack"),
               cleared: lambda t: t["annotations"][0].update(result=results(t, "choices"))}  # fmt: skip
    path = correct_tasks(export(project, "labelstudio", tmp_path / "review"), changes)
    after = project.inspections(corrections=path)
    assert {image for image in before if before[image] != after[image]} == {*changes}
    assert after[renamed] == dataclasses.replace(before[renamed], condition="chip"), "the mask stays"
    assert (after[normal].condition, after[normal].boxes) == ("crack", ((0.0, 0.0, 24.0, 20.0),))
    assert after[normal].polygons == ((24.0, 20.0, 48.0, 20.0, 48.0, 40.0),)
    assert (after[moved].mask, after[moved].condition, len(after[moved].boxes)) == (None, before[moved].condition, 1)
    assert (after[cleared].mask, after[cleared].boxes) == (None, ())
    assert after[cleared].condition == before[cleared].condition
    assert {one.split for one in after.values()} == {"train", "test"}, "the split is that of the source"


def test_a_corrected_condition_keeps_the_splits_that_a_build_drew(project, tmp_path):
    path = export(project, "labelstudio", tmp_path / "review")
    config = dataclasses.replace(project.build_config("drawn"), split="seeded")
    build(config)
    before = {one.image: one for one in read_rows(config.output, "inspections.jsonl", Inspection)}
    image = next(task["data"]["path"] for task in json.loads(path.read_text()) if results(task, "rectanglelabels"))
    correct_tasks(path, {image: lambda t: relabel(t, "chip")})
    build(dataclasses.replace(config, corrections=path, overwrite=True))
    after = {one.image: one for one in read_rows(config.output, "inspections.jsonl", Inspection)}
    assert after[image].condition == "chip"
    assert {name: one.split for name, one in after.items()} == {name: one.split for name, one in before.items()}


def write_choices(path: Path, conditions: dict[str, str]) -> Path:
    """Write a file of Label Studio that states the conditions of images and marks nothing."""
    tasks = [
        {"data": {"path": image}, "annotations": [{"result": [{"type": "choices", "value": {"choices": [name]}}]}]}
        for image, name in conditions.items()
    ]
    path.write_text(json.dumps(tasks))
    return path


def test_a_correction_drops_the_answers_of_a_benchmark_that_it_contradicts(tmp_path):
    queries = [f"VisA/candle/test/good/{number}.png" for number in range(2)]
    for image in (*queries, "VisA/candle/train/good/2.png"):
        draw_part(tmp_path / image, len(image))
    asked = {"type": "Anomaly Detection", "Question": "Is there any defect?", "Options": {"A": "Yes.", "B": "No."}}
    asked["Answer"] = "B"
    annotations = tmp_path / "mmad.json"
    annotations.write_text(json.dumps({image: {"conversation": [asked, asked]} for image in queries}))
    path = write_choices(tmp_path / "tasks.json", {queries[0]: "crack", queries[1]: GOOD})
    config = make_config(annotations, tmp_path / "out", source="mmad", root=tmp_path, corrections=path)
    usable = usable_images(config, tmp_path)
    assert {one.image: one.condition for one in usable.inspections}[queries[0]] == "crack"
    assert {one.inspection for one in usable.questions} == {queries[1]}, "an unchanged image keeps its questions"
    dropped = [one for one in usable.rejections if one.item.startswith(queries[0])]
    assert [one.item for one in dropped] == [f"{queries[0]}#0", f"{queries[0]}#1"]
    assert {one.reason for one in dropped} == {"the truth of its image was corrected, which its answer may contradict"}


def test_reviewed_images_are_not_good_only_by_convention(tmp_path):
    names = ["a.png", "b.png", "c.png"]
    for number, name in enumerate(names):
        draw_part(tmp_path / name, number)
    images = [{"id": number, "file_name": name, "width": 48, "height": 40} for number, name in enumerate(names)]
    coco = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "crack"}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    path = write_choices(tmp_path / "tasks.json", {"a.png": "crack", "b.png": GOOD})
    config = make_config(tmp_path / "coco.json", tmp_path / "out", corrections=path)
    assert usable_images(dataclasses.replace(config, corrections=None), tmp_path).unannotated == names
    assert usable_images(config, tmp_path).unannotated == ["c.png"]


def test_corrections_of_coco_replace_the_truth(project, tmp_path):
    path = export(project, "coco", tmp_path / "review")
    content, before = json.loads(path.read_text()), project.inspections()
    names = {image["id"]: image["file_name"] for image in content["images"]}
    masked = next(one for one in content["annotations"] if before[names[one["image_id"]]].mask)
    masked["bbox"][2] += 5
    good = next(one["image_id"] for one in content["annotations"] if before[names[one["image_id"]]].boxes)
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != good]
    path.write_text(json.dumps(content))
    after = project.inspections(corrections=path)
    assert {image for image in before if before[image] != after[image]} == {names[masked["image_id"]], names[good]}
    x, y, width, height = masked["bbox"]
    assert after[names[masked["image_id"]]].boxes == ((x, y, x + width, y + height),)
    assert (after[names[good]].condition, after[names[good]].boxes) == (GOOD, ())


def test_reviewed_files_are_manifests_too(project, tmp_path):
    before = project.inspections()
    root = project.manifest.parent
    for form, name in (("labelstudio", "tasks"), ("coco", "instances")):
        path = export(project, form, tmp_path / form)
        config = make_config(path, tmp_path / "unused", root=root, split="seeded")
        found = {one.image: one for one in usable_images(config, tmp_path).inspections}
        assert {*found} == {image for image, one in before.items() if one.split == "test"}
        for image, one in found.items():
            assert (one.condition, one.product, one.group) == (
                before[image].condition, before[image].product, before[image].group
            )  # fmt: skip
            assert one.dataset == name
            if before[image].boxes:
                assert same_outlines(Outlines(one.boxes), Outlines(before[image].boxes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["annotations"].append({"result": []}), "it has 2 annotations; keep the correct one"),
        (
            lambda t: results(t, "choices")[0]["value"].update(choices=["good"]),
            "the condition is 'good' by its choice but",
        ),
        (lambda t: results(t, "rectanglelabels")[0].update(type="brushlabels"), "type 'brushlabels' are not supported"),
        (lambda t: results(t, "rectanglelabels")[0].update(original_width=47), "its annotations are for 47 x 40"),
        (lambda t: results(t, "rectanglelabels")[0]["value"].update(x="left"), "is not a rectangle in percent"),
        (lambda t: results(t, "rectanglelabels")[0]["value"].update(x=1e999), "coordinate that is not a number"),
        (lambda t: t["annotations"][0].update(result={"a": 1}), "its result is not a list of objects"),
        (lambda t: t.update(annotations="none"), "its annotations are not a list of objects"),
        (lambda t: results(t, "choices")[0].pop("value"), "one of its results has no value"),
        (lambda t: results(t, "choices")[0]["value"].update(choices=[3]), "its choices [3] are not a list of names"),
        (lambda t: results(t, "rectanglelabels")[0]["value"].update(rectanglelabels="dent"), "are not a list of names"),
        (lambda t: results(t, "rectanglelabels")[0]["value"].pop("rectanglelabels"), "has no label"),
        (lambda t: t["data"].update(path=7.5), "path is 7.5, not a string"),
        (lambda t: t["data"].update(path="cap/lost.png"), "image cap/lost.png does not exist under the root"),
        (lambda t: t["data"].update(path="", image="/data/upload/1/a.png"), "set data.path to the path of the image"),
    ],
)
def test_a_correction_that_cannot_be_used_stops_the_build(project, tmp_path, change, message):
    image = next(image for image, one in project.inspections().items() if one.mask and one.split == "test")
    path = correct_tasks(export(project, "labelstudio", tmp_path / "review"), {image: change})
    with pytest.raises(EchoError, match=r"corrections: 1 entries of .*tasks.json cannot be used .*") as error:
        project.inspections(corrections=path)
    assert message in str(error.value)


def test_a_task_that_nobody_annotated_and_a_foreign_image_are_told_apart(project, tmp_path):
    path = export(project, "labelstudio", tmp_path / "review")
    tasks = json.loads(path.read_text())
    for task in tasks[:3]:
        task["annotations"] = [{"was_cancelled": True, "result": []}] if task is tasks[0] else []
    path.write_text(json.dumps(tasks))
    assert project.inspections(corrections=path) == project.inspections()
    shutil.copytree(project.folder / "raw", tmp_path / "raw")
    shutil.copy(tmp_path / "raw/cap/good-0-1.png", tmp_path / "raw/cap/other.png")
    tasks[5]["data"]["path"] = "cap/other.png"
    path.write_text(json.dumps(tasks))
    with pytest.raises(EchoError, match=r"has 1 images that the source does not have \(first: cap/other.png\)"):
        project.inspections(corrections=path, root=tmp_path / "raw")


def shown_by_image(form: str, content: Any, root: Path) -> dict[str, Any]:
    """What a review file shows about each image."""
    if form == "labelstudio":
        return {task["data"]["path"]: task["data"] for task in content}
    if form == "coco":
        return {image["file_name"]: image["review"] for image in content["images"]}
    return {Path(sample["filepath"]).relative_to(root).as_posix(): sample for sample in content["samples"]}


def test_each_format_shows_words_answers_and_tags(project, tmp_path):
    run = load_run(project.folder / "run")
    cases = {case.inspection.image: case for case in review_cases(run, run_dataset(run))}
    assert cases and all(case.predicted == () for case in cases.values())
    assert {tag for case in cases.values() for tag in case.tags} == {"wrong", "disagreement"}
    for form in FILES:
        path = export(project, form, tmp_path / form)
        shown = shown_by_image(form, json.loads(path.read_text()), project.manifest.parent)
        assert shown.keys() == cases.keys()
        for image, case in cases.items():
            text = json.dumps(shown[image])
            for word in (WORDS["normal"], WORDS["guide"], WORDS["reason"], *case.tags, case.references[0]):
                assert json.dumps(word)[1:-1] in text, f"{form} lacks {word!r}"
            for question in case.questions:
                assert json.dumps(question.prediction.question_text)[1:-1] in text
    interface = ElementTree.fromstring((tmp_path / "labelstudio" / "config.xml").read_text())
    assert [one.get("value") for one in interface.iter("Choice")] == ["good", "dent", "dent+stain", "stain"]
    fields = {one.get("value", "")[1:] for one in interface.iter() if one.get("value", "").startswith("$")}
    task = json.loads((tmp_path / "labelstudio" / "tasks.json").read_text())[0]
    assert fields <= {*task["data"]}, "the interface shows a field that tasks lack"
    assert task["predictions"][0]["score"] == pytest.approx(cases[task["data"]["path"]].p_defect)


def test_predicted_boxes_are_shown_apart_from_the_truth(project, tmp_path):
    shutil.copytree(project.folder / "run", tmp_path / "run")
    with open(tmp_path / "run" / "predictions.jsonl", "a", encoding="utf-8") as file:
        row = json.loads((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()[0])
        boxes = "<|box_start|>(0,250),(500,750)<|box_end|>"
        row |= {"kind": GROUNDING, "question": "boxes", "options": {}, "answer": "none", "parsed": boxes}
        file.write(json.dumps(row | {"text": boxes, "probabilities": None}) + "\n")
    for form in FILES:
        export_review.main([str(tmp_path / "run"), "--format", form, "--output", str(tmp_path / form)])
    (task,) = [
        task
        for task in json.loads((tmp_path / "labelstudio" / "tasks.json").read_text())
        if task["predictions"][0]["result"]
    ]
    assert task["data"]["path"] == row["image"]
    value = task["predictions"][0]["result"][0]["value"]
    assert (value["x"], value["y"], value["width"], value["height"]) == (0, 25, 50, 50)
    assert '<Label value="predicted"/>' in (tmp_path / "labelstudio" / "config.xml").read_text()
    samples = json.loads((tmp_path / "fiftyone" / "samples.json").read_text())["samples"]
    (sample,) = [sample for sample in samples if sample["predictions"]["detections"]]
    assert sample["predictions"]["detections"][0]["bounding_box"] == [0, 0.25, 0.5, 0.5]
    images = json.loads((tmp_path / "coco" / "instances.json").read_text())["images"]
    assert [image["review"]["predicted_boxes"] for image in images if image["review"]["predicted_boxes"]] == [
        [[0, 250, 500, 750]]
    ]
    for form in ("labelstudio", "coco"):
        assert project.inspections(corrections=tmp_path / form / FILES[form]) == project.inspections()
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    (tmp_path / "run" / "predictions.jsonl").write_text(lines[-1] + "\n")
    export_review.main([str(tmp_path / "run"), "--format", "coco", "--output", str(tmp_path / "alone")])
    (image,) = json.loads((tmp_path / "alone" / "instances.json").read_text())["images"]
    assert image["review"]["predicted_boxes"] == [[0, 250, 500, 750]], "a case may have no other question"


@pytest.mark.slow
@pytest.mark.parametrize("form", [*FILES])
def test_the_tool_itself_reads_the_export(project, tmp_path, form):
    python = os.environ.get(f"ECHO_FT_{form.upper()}")
    if python is None:
        pytest.skip(f"ECHO_FT_{form.upper()} is not set; set it to a Python that has it: tests/support/review_tools.py")
    path = export(project, form, tmp_path / form)
    command = [python, "-m", "tests.support.review_tools", form, str(path.parent)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    tested = [one for one in project.inspections().values() if one.split == "test"]
    boxes = sum(1 if one.mask else len(one.boxes) for one in tested)
    assert found.get("errors", []) == []
    assert found["images"] == len(tested)
    if form == "labelstudio":
        assert found["regions"] == len(tested) + boxes, "a choice per image, and a region per box"
    else:
        assert len(found["boxes"]) == boxes


def test_only_images_with_the_given_tags_are_exported(project, tmp_path):
    run = load_run(project.folder / "run")
    tagged = {one.inspection.image for one in review_cases(run, run_dataset(run)) if "wrong" in one.tags}
    tasks = json.loads(export(project, "labelstudio", tmp_path / "wrong", "--tags", "wrong").read_text())
    assert {task["data"]["path"] for task in tasks} == tagged
    with pytest.raises(EchoError, match=r"no image of .* has a tag of unparsed"):
        export(project, "labelstudio", tmp_path / "none", "--tags", "unparsed")
    with pytest.raises(EchoError, match="already exists; choose another --output"):
        export(project, "labelstudio", tmp_path / "wrong")


@pytest.mark.parametrize("form", [*FILES])
def test_a_missing_image_does_not_cost_the_review_of_the_others(project, tmp_path, form, caplog):
    run = load_run(project.folder / "run")
    images = [one.inspection.image for one in review_cases(run, run_dataset(run))]
    lost = run_dataset(run).root / images[0]
    lost.rename(tmp_path / "lost")
    try:
        content = export(project, form, tmp_path / form).read_text()
    finally:
        (tmp_path / "lost").rename(lost)
    assert images[0] not in content
    assert all(image in content for image in images[1:])
    (message,) = caplog.messages
    assert f"1 images cannot be read and are left out (first: there is no image {lost}" in message


def test_a_rebuilt_dataset_is_not_reviewed(project, tmp_path):
    shutil.copytree(project.folder / "run", tmp_path / "run")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(run | {"dataset_fingerprint": "0" * 16}))
    with pytest.raises(EchoError, match="has been rebuilt since the run"):
        export_review.main([str(tmp_path / "run"), "--format", "coco"])
