"""The inspector answers about any image as the pipeline does, using what the adapters' cards name."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import echo_ft
from benchmarks.evaluation.inspector import draw_images, measure_inspector
from benchmarks.evaluation.overhead import memory_mib
from echo_ft.config import PARTLY_DONE
from echo_ft.data.dataset import load_cases, load_dataset
from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import BackendError, PipelineConfig, run_cases
from echo_ft.files import read_jsonl, write_json
from echo_ft.images import snapshot as snapshot_module
from echo_ft.images.decode import load_image
from echo_ft.images.snapshot import ScaleCheck, list_images, snapshot
from echo_ft.inference.decision import Calibration, load_calibration
from echo_ft.inference.inspector import Inspector
from echo_ft.metrics.calibration import TEMPERATURE_BOUNDS
from echo_ft.model.adapters import find_adapters
from echo_ft.model.loading import base_fingerprint
from echo_ft.provenance import seal_folder
from echo_ft.records import ROLES, Inspection
from evaluation import inspect
from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS, ROUNDING, draw
from tests.support.runs import make_report


def test_a_file_an_image_and_an_array_give_the_same_result(inspector, image):
    with Image.open(image) as opened:
        pixels = np.asarray(opened)
        results = [inspector.predict(one, "washer") for one in (image, str(image), opened, pixels)]
    assert [result.image for result in results] == [str(image), str(image), "", ""]
    for result in results:
        assert result.pred_score == results[0].pred_score
        assert result.reference == results[0].reference
        assert [answer.text for answer in result.answers] == [answer.text for answer in results[0].answers]
        assert [one.prompt for one in result.trace] == [one.prompt for one in results[0].trace]
        assert [one.images[:-1] for one in result.trace] == [one.images[:-1] for one in results[0].trace]
    assert all(trace.images[-1] == str(image) for trace in results[0].trace)


def ramp(top, dtype):
    return np.tile(np.linspace(0, top, 80).astype(dtype), (40, 1))


@pytest.mark.parametrize(
    ("suffix", "values"), [("png", ramp(4095, "<u2")), ("tif", ramp(4095, "<i4")), ("tif", ramp(1, "<f4"))]
)
@pytest.mark.parametrize("loaded", [False, True])
def test_deep_greys_in_memory_become_the_8_bits_of_their_file(tmp_path, suffix, values, loaded):
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(path)
    with Image.open(path) as opened:
        taken = snapshot(opened.copy() if loaded else opened, tmp_path)
    np.testing.assert_array_equal(np.asarray(load_image(taken)), np.asarray(load_image(path)))
    assert np.asarray(load_image(taken)).mean() == pytest.approx(127.5, abs=1)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("loaded", [False, True])
def test_images_in_memory_stand_upright_as_their_file_does(tmp_path, suffix, loaded):
    path = tmp_path / draw(tmp_path / f"turned.{suffix}", (80, 40), 1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    with Image.open(path) as flat:
        flat.convert("RGB").save(path, exif=exif)
    with Image.open(path) as opened:
        taken = snapshot(opened.convert("RGB") if loaded else opened, tmp_path)
    assert load_image(taken).size == (40, 80)
    np.testing.assert_array_equal(np.asarray(load_image(taken)), np.asarray(load_image(path)))


def test_unusable_images_in_memory_are_refused(tmp_path):
    colours = np.dstack([ramp(4095, "<u2")] * 3)
    cv2.imwrite(str(tmp_path / "colours.png"), colours)
    for _ in range(2):
        with (
            Image.open(tmp_path / "colours.png") as opened,
            pytest.raises(EchoError, match="pass the path of the file"),
        ):
            snapshot(opened, tmp_path)
    with pytest.raises(EchoError, match="the Pillow image cannot be read: its values range from -1 to"):
        snapshot(Image.fromarray(ramp(4095, "<i4") - 1), tmp_path)
    with Image.open(tmp_path / draw(tmp_path / "closed.png", (8, 8), 1)) as closed:
        pass
    with pytest.raises(EchoError, match="the Pillow image cannot be read"):
        snapshot(closed, tmp_path)
    for empty in (np.zeros((0, 5, 3), np.uint8), Image.new("RGB", (5, 0))):
        with pytest.raises(EchoError, match="the image has 5 x 0 pixels; pass an image with pixels"):
            snapshot(empty, tmp_path)


def test_images_in_memory_and_overwritten_files_are_seen_afresh(inspector, tmp_path):
    """The engine caches features by path, so no two images may have the same path."""
    images = [np.random.default_rng(index).integers(0, 255, (60, 60, 3), dtype=np.uint8) for index in range(10)]
    results = inspector.predict(images, "washer")
    for index in (0, 8, 9):
        alone = inspector.predict(images[index], "washer")
        assert alone.pred_score == pytest.approx(results[index].pred_score, abs=ROUNDING)
    assert len({round(result.pred_score, 9) for result in results}) == 10
    for index in (0, 1):
        Image.fromarray(images[index]).save(tmp_path / "current.png")
        current = inspector.predict(tmp_path / "current.png", "washer")
        assert current.pred_score == pytest.approx(results[index].pred_score, abs=ROUNDING)


def test_batches_do_not_change_results(inspector, tmp_path):
    images = [tmp_path / draw(tmp_path / f"{index}.png", (60 + 5 * index, 70), index) for index in range(10)]
    together = inspector.predict(images)
    assert [result.image for result in together] == [str(path) for path in images]
    for index in (0, 7, 9):
        alone = inspector.predict(images[index])
        assert alone.pred_score == pytest.approx(together[index].pred_score, abs=ROUNDING)
        assert alone.reference == together[index].reference
    assert [one.image for one in inspector.stream(tmp_path)] == [str(tmp_path / f"{index}.png") for index in range(10)]


def test_hidden_companions_of_images_are_left_out_of_a_folder(tmp_path):
    draw(tmp_path / "001.png", (60, 70), 1)
    (tmp_path / "._001.png").write_bytes(b"\0\5\x16\7")  # macOS writes one per file to other file systems
    assert list_images(tmp_path) == [tmp_path / "001.png"]
    (tmp_path / "001.png").unlink()
    with pytest.raises(EchoError, match="has no image file"):
        list_images(tmp_path)


def test_an_unreadable_image_does_not_cost_the_results_before_it(inspector, tmp_path):
    images = [tmp_path / draw(tmp_path / f"{index}.png", (60, 70), index) for index in range(3)]
    (tmp_path / "2.png").write_bytes(b"broken")
    found = []
    with pytest.raises(EchoError, match=r"2\.png cannot be read"):
        for result in inspector.stream(tmp_path):
            found.append(result.image)
    assert found == [str(image) for image in images[:2]]


def test_an_image_that_is_scaled_differently_from_its_normal_images_is_named_once_per_product(tmp_path, case, caplog):
    """Both images are of one camera, but one has a pixel that needs another bit depth."""
    tops = {"query.png": 1024, "same.png": 1500, "darker.png": 1023, "eight.png": None}
    for name, top in tops.items():
        values = ramp(255, "u1") if top is None else ramp(top, "<u2")
        Image.fromarray(values).save(tmp_path / name)

    def warnings(checks, normals, product="cap", query="query.png"):
        caplog.clear()
        references = tuple(replace(case.seen.references[0], image=name) for name in normals)
        seen = replace(case.seen, query=str(tmp_path / query), references=references)
        checks.check("new.png", replace(case, product=product, seen=seen), tmp_path)
        return caplog.messages

    checks = ScaleCheck()
    assert warnings(checks, ["same.png", "darker.png"]) == []  # one of the normal images has the same scale
    assert warnings(checks, ["eight.png"]) == warnings(checks, []) == []
    assert warnings(checks, ["darker.png"], query="eight.png") == []
    (message,) = warnings(checks, ["darker.png", "eight.png"])
    assert (
        "new.png is scaled to 8 bits from 12 bits, but the most similar normal images of cap from 10, each" in message
    )
    assert warnings(checks, ["darker.png"]) == []
    assert len(warnings(checks, ["darker.png"], product="bolt")) == 1


def test_the_inspector_compares_the_scales_of_an_image_and_its_normal_images(inspector, image, monkeypatch, caplog):
    root = inspector.products.root
    monkeypatch.setattr(snapshot_module, "bit_depth", lambda path: 12 if path.is_relative_to(root) else 10)
    for _ in range(2):
        inspector.predict(image, "washer")
    (message,) = caplog.messages
    assert message.startswith(f"the image {image} is scaled to 8 bits from 10 bits")


def test_the_experts_see_what_they_see_in_a_run(inspector, dataset):
    """Given the references and questions of a dataset's case, the inspector makes the same prompts as a run."""
    loaded = load_dataset(dataset)
    case = load_cases(loaded, "test")[0]
    result = inspector.predict(loaded.root / case.seen.query, "washer")
    found = inspector._case(loaded.root / case.seen.query, "washer")  # its candidates have the order of another id
    same = replace(case, seen=replace(case.seen, references=found.seen.references, questions=found.seen.questions))
    same = replace(same, truth=replace(same.truth, answers=found.truth.answers))
    (outcome,) = run_cases([same], inspector.generate, inspector.pipeline)
    assert [trace.prompt for trace in outcome.traces] == [trace.prompt for trace in result.trace]
    assert [trace.context for trace in outcome.traces] == [trace.context for trace in result.trace]
    assert outcome.predictions[0].probabilities == result.answers[0].probabilities


def test_the_nearest_normal_image_decides_the_product_and_is_never_the_image_itself(inspector, dataset):
    loaded = load_dataset(dataset)
    rows = [row for row in read_jsonl(dataset / "inspections.jsonl", Inspection) if row.split == "train"]
    for row in (rows[0], rows[6]):
        twin = np.asarray(Image.open(loaded.root / row.image).convert("RGB")).copy()
        twin[0, 0] ^= 1  # another file, so the normal image itself is its nearest reference
        result = inspector.predict(twin)
        assert result.product == row.product
        found = inspector._case(loaded.root / row.image, row.product).seen.references
        assert row.image not in [reference.image for reference in found]
        assert len(found) == 2


def test_the_score_is_calibrated_and_compared_with_the_threshold(inspector, image, tmp_path):
    raw = inspector.predict(image).pred_score
    write_json(
        tmp_path / "report.json",
        {"calibration": {"temperature": 2.0, "thresholds": {"f1": {"threshold": 0.4}, "best": {"threshold": 0.1}}}},
    )
    found = load_calibration(tmp_path / "report.json")
    assert found == Calibration(2.0, 0.4)
    assert found.score(raw) == pytest.approx(1 / (1 + math.exp(-math.log(raw / (1 - raw)) / 2)))
    for temperature in TEMPERATURE_BOUNDS:
        scores = [Calibration(temperature).score(value) for value in (0.0, 1e-4, 0.5, 1 - 1e-4, 1.0)]
        assert scores == sorted(scores)
        assert scores[2] == 0.5
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(EchoError, match="has neither a calibration nor a gate; write one with python -m"):
        load_calibration(tmp_path / "report.json")


def test_a_report_gives_the_inspector_the_options_of_its_run_and_must_be_of_its_adapters(adapters, tmp_path):
    found = find_adapters(adapters, str(ECHO_TINY), base_fingerprint(str(ECHO_TINY)), MIN_PIXELS, MAX_PIXELS)
    report = make_report(tmp_path / "report.json", found, {"dtype": "bfloat16"})
    inspector = Inspector.from_adapters(adapters, calibration=report)
    assert inspector.generate.__self__.base.model.language_model.dtype == torch.bfloat16
    assert inspector.pipeline == PipelineConfig(knowledge="all", reasoning="off", answer="logits")
    assert inspector.calibration == Calibration(2.0, 0.4)
    assert inspector.products.search.k == 1
    assert inspector.generate.__self__.max_new_tokens == 48
    other = make_report(tmp_path / "other.json", found, {"adapters": {}})
    with pytest.raises(EchoError, match=r"other.json measures a different reference_extractor adapter than"):
        Inspector.from_adapters(adapters, calibration=other)


def test_a_dataset_that_was_rebuilt_since_the_training_must_be_named(adapters, dataset, tmp_path):
    folder = tmp_path / "adapters"
    shutil.copytree(adapters, folder)
    card = json.loads((folder / ROLES[0] / "echo_ft.json").read_text())
    (folder / ROLES[0] / "echo_ft.json").write_text(json.dumps(card | {"dataset_fingerprint": "other"}))
    seal_folder(folder / ROLES[0])
    with pytest.raises(EchoError, match=r"was rebuilt since the training .*other.; pass the folder as --dataset"):
        Inspector.from_adapters(folder)
    assert Inspector.from_adapters(folder, dataset=dataset).products.source == dataset


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: folder / "absent.png",
            "absent.png cannot be opened .No such file or directory.; check the path",
        ),
        (lambda folder: folder / "inspector.txt", "inspector.txt cannot be read: .*; replace it"),
        (lambda folder: np.zeros((4, 4), dtype=np.float32), "an array of float32 with shape .* is not an image"),
        (lambda folder: np.zeros((4, 4, 2), dtype=np.uint8), "is not an image; pass uint8 values"),
    ],
)
def test_unusable_images_are_named(inspector, tmp_path, make, message):
    (tmp_path / "inspector.txt").write_text("no image")
    with pytest.raises(EchoError, match=message):
        inspector.predict(make(tmp_path))


def test_unusable_folders_are_named_before_the_model_loads(tmp_path, adapters):
    for path, message in ((tmp_path / "absent", "there is no image or folder"), (tmp_path, "has no image file")):
        with pytest.raises(EchoError, match=message):
            inspect.main([str(path), "--adapters", "nowhere"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "50"], "threshold is 50; set a probability from 0 to 1"),
        (["--threshold", "-0.1"], "threshold is -0.1; set a probability"),
        (["--port", "0"], "--port cannot be used without --serve; remove it"),
        (["--host", "0.0.0.0"], "--host cannot be used without --serve"),
    ],
)
def test_options_without_a_meaning_are_refused(image, adapters, arguments, message):
    with pytest.raises(EchoError, match=message):
        inspect.main([str(image), "--adapters", str(adapters), *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["a.png", "b.png", "c.png"],
            r"3 images or folders are given .a.png, b.png, ....; give one image, or the folder",
        ),
        (["--images", "line", "4.png"], r"2 images or folders are given .line, 4.png.; .* quote a path that contains"),
    ],
)
def test_several_images_are_refused_with_the_folder_as_the_remedy(arguments, message):
    with pytest.raises(EchoError, match=message):
        inspect.main([*arguments, "--bundle", "nowhere"])


def test_the_results_before_an_image_that_cannot_be_inspected_are_yielded(inspector, tmp_path):
    images = [tmp_path / draw(tmp_path / name, size, 1) for name, size in (("a.png", (60, 60)), ("b.png", (1601, 8)))]
    results = inspector.stream([images[0], images[1], images[0]])
    assert next(results).image == str(images[0])
    with pytest.raises(EchoError, match=r"the image .*b.png cannot be inspected: an image of 1601 x 8 pixels"):
        next(results)


def test_images_that_cannot_be_inspected_cost_no_other_image_of_a_folder(inspector, tmp_path, monkeypatch, capsys):
    sizes = {"0.png": (60, 60), "2.png": (1601, 8), "3.png": (60, 60), "5.png": (70, 60)}
    for index, (name, size) in enumerate(sizes.items()):
        draw(tmp_path / name, size, index)
    for name in ("1.png", "4.png"):
        (tmp_path / name).write_bytes(b"broken")
    good = {str(tmp_path / name) for name in ("0.png", "3.png", "5.png")}
    monkeypatch.setattr(inspect, "load_inspector", lambda config: inspector)
    status = inspect.inspect_images(tmp_path, inspect.InspectConfig(json=True))
    printed = capsys.readouterr()
    records = [json.loads(line) for line in printed.out.splitlines()]
    assert status == PARTLY_DONE
    assert [record["image"] for record in records] == [str(tmp_path / f"{index}.png") for index in range(6)]
    assert {record["image"] for record in records if "pred_score" in record} == good
    assert ["error" in record for record in records] == [record["image"] not in good for record in records]
    warnings = printed.err.splitlines()
    assert [name in line for name, line in zip(("1.png", "2.png", "4.png"), warnings, strict=True)] == [True] * 3
    assert all(line.startswith("warning: ") and line.endswith("; it was not inspected") for line in warnings)
    assert inspect.inspect_images(tmp_path, inspect.InspectConfig()) == PARTLY_DONE
    assert re.search(r"^\d of 6 images flagged, 3 not inspected$", capsys.readouterr().out, re.MULTILINE)
    for name in ("1.png", "2.png", "4.png"):
        with pytest.raises(EchoError, match=f"{name} cannot be"):
            inspect.inspect_images(tmp_path / name, inspect.InspectConfig())


def test_what_stops_every_image_of_a_folder_stops_the_command(inspector, tmp_path, monkeypatch):
    draw(tmp_path / "a.png", (60, 60), 1)

    def fail(role, exchanges):
        raise BackendError("the server does not answer")

    monkeypatch.setattr(inspect, "load_inspector", lambda config: Inspector(fail, inspector.products))
    with pytest.raises(BackendError, match="the server does not answer"):
        inspect.inspect_images(tmp_path, inspect.InspectConfig())
    with pytest.raises(EchoError, match="product 'bolt' is not in"):
        inspect.inspect_images(tmp_path, inspect.InspectConfig(product="bolt"))


def test_a_line_about_an_image_is_one_line(inspector, image):
    result = replace(
        inspector.predict(image), image="a\nb.png", explanation="No\n\n1. defect\x1b[2J.\n", condition="x\ny"
    )
    (line,) = inspect.describe(replace(result, pred_label=True)).splitlines()
    assert line.startswith(r"a\nb.png: DEFECT x\ny, P(defect)")
    assert line.endswith(r"No 1. defect\x1b[2J.")


def test_an_unknown_product_is_refused_with_the_known_ones(inspector, image):
    with pytest.raises(EchoError, match=r"product 'bolt' is not in .*; choose from cap, washer"):
        inspector.predict(image, "bolt")


def test_a_product_without_normal_images_is_refused_before_any_image_is_inspected(inspector):
    """A watch would otherwise report every image as one that cannot be inspected, and never look at it again."""
    products = replace(inspector.products, conditions={**inspector.products.conditions, ("line", "bolt"): ["good"]})
    other = Inspector(inspector.generate, products)
    with pytest.raises(EchoError, match=r"product 'bolt' has no normal image in .*; choose from cap, washer"):
        other.possible_products("bolt")
    assert other.possible_products(None) == inspector.possible_products(None)


def test_the_command_prints_lines_or_json_and_its_status_tells(adapters, image, tmp_path, capsys):
    with pytest.raises(SystemExit) as flagged:
        inspect.main([str(tmp_path), "--adapters", str(adapters), "--threshold", "0", "--json", "true"])
    assert flagged.value.code == 1
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())  # nothing else is in stdout
    assert record["image"] == str(image)
    assert record["pred_label"] is True
    assert {trace["role"] for trace in record["trace"]} >= {"reference_extractor", "decision_maker"}
    inspect.main([str(image), "--adapters", str(adapters), "--threshold", "1"])
    printed = capsys.readouterr().out
    assert f"{image}: ok, P(defect) {record['pred_score']:.3f} (threshold 1)" in printed
    assert "0 of 1 images flagged" in printed


def test_the_benchmark_divides_the_time_between_engine_and_inspector(inspector, tmp_path):
    generate = inspector.generate
    whole, engine, early, late = measure_inspector(inspector, draw_images(tmp_path, 3, 64))
    assert 0 < engine < whole
    assert 0 < early <= 2 * late
    assert inspector.generate == generate


@pytest.mark.slow
def test_a_folder_of_1000_images_runs_in_flat_memory(bundle, tmp_path):
    inspector = Inspector.from_bundle(bundle)
    draw_images(tmp_path, 1000, 96)
    sizes = [memory_mib() for _ in inspector.stream(tmp_path)]
    assert len(sizes) == 1000
    assert max(sizes[200:]) - sizes[200] < 30, "MiB"


def test_the_package_exports_the_inspector():
    assert echo_ft.Inspector is Inspector
