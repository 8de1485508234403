"""Corruptions are reproducible, grow with severity, and affect only the query, in training and in runs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from trl import SFTConfig

from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl
from echo_ft.images.corruptions import CORRUPTIONS, SEVERITIES, Corruption, corrupt, draw_corruption
from echo_ft.images.views import View, views
from echo_ft.inference.engine import Engine
from echo_ft.model.adapters import read_card
from echo_ft.model.batches import image_inputs
from echo_ft.records import Prediction
from echo_ft.training.cases import EXCHANGE_SCHEMA, group_by_case
from echo_ft.training.checkpoints import find_checkpoint
from echo_ft.training.collator import Collator
from tests.conftest import ROUNDING, make_case, make_dataset
from tests.support.exchanges import exchanges_of, with_completions
from tests.support.runs import run_evaluation
from tests.support.servers import FakeServer, ask_server, shown_images
from tests.support.training import run_in_process, tiny_options
from train.sft import main as sft_main


def pattern(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Coarse and fine stripes and patches without values near black or white."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    bands = [
        0.5 + 0.2 * np.sin(2 * np.pi * f * (x + 0.4 * y)) + 0.15 * np.sin(2 * np.pi * 3 * f * y) for f in (4, 9, 17)
    ]
    return Image.fromarray((np.stack(bands, axis=-1) * 255).astype(np.uint8)).convert(mode)


def change(image: Image.Image, other: Image.Image) -> float:
    """Return the mean absolute difference of two images."""
    return float(np.abs(np.asarray(image, float) - np.asarray(other, float)).mean())


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_severities_increase_and_size_and_mode_stay(kind, mode):
    image = pattern(301, 190, mode)
    for seed in range(3):
        corrupted = [corrupt(image, kind, severity, seed) for severity in SEVERITIES]
        assert {(one.size, one.mode) for one in corrupted} == {(image.size, mode)}
        changes = [change(image, one) for one in corrupted]
        assert changes[0] > 0.3
        assert changes == sorted(set(changes))
        assert len(changes) == 5


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_same_seed_gives_the_same_image_and_keeps_the_original(kind):
    image = pattern(120, 90)
    before = image.tobytes()
    first, again = (corrupt(image, kind, 3, "0/part.png").tobytes() for _ in range(2))
    assert first == again
    assert image.tobytes() == before
    drawn = {corrupt(image, kind, 3, f"{seed}/part.png").tobytes() for seed in range(12)}
    assert len(drawn) == {"noise": 12, "motion": 12, "exposure": 2}.get(kind, 1)


@pytest.mark.parametrize("kind", ["blur", "low_resolution", "motion", "noise"])
def test_severity_has_the_same_effect_at_any_image_size(kind):
    """An image and a version with sides three times as long change equally when compared at the same size."""
    small, large = pattern(224, 224), pattern(672, 672)
    found = change(small, corrupt(small, kind, 3, 0))
    shown = change(small, corrupt(large, kind, 3, 0).resize(small.size, Image.Resampling.BOX))
    assert shown == pytest.approx(found, rel=0.35)


def test_blur_is_a_gaussian_of_the_stated_standard_deviation():
    image = pattern(448, 448, "L")
    expected = gaussian_filter(np.asarray(image, float), 2 * 4.0, mode="nearest", truncate=4)
    found = np.asarray(corrupt(image, "blur", 4, 0), float)
    assert np.abs(found - expected)[40:-40, 40:-40].max() < 3  # Pillow approximates it by three box blurs


def test_motion_turns_a_point_into_a_line_through_its_position():
    values = np.zeros((225, 225), np.uint8)
    values[112, 112] = 255
    wide = Image.fromarray(np.asarray(Image.fromarray(values).resize((675, 675), Image.Resampling.NEAREST)))
    found = np.asarray(corrupt(wide, "motion", 2, 1), float)
    y, x = np.indices(found.shape) - 337.0
    weights = found / found.sum()
    centre = (weights * x).sum(), (weights * y).sum()
    spread = np.cov(np.stack([x.ravel(), y.ravel()]), aweights=weights.ravel())
    values, vectors = np.linalg.eigh(spread)
    angle = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])) % 180
    assert np.abs(centre).max() < 1
    assert values[1] > 50 * values[0]
    assert min(angle, 180 - angle) <= 45


def test_exposure_multiplies_the_light_and_keeps_grey():
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    light = ((100 / 255 + 0.055) / 1.055) ** 2.4
    expected = {
        round(255 * (1.055 * (light * gain) ** (1 / 2.4) - 0.055)) for gain in (2**-1, 2**1)
    }  # severity 2 is one stop
    found = {corrupt(grey, "exposure", 2, seed).getpixel((0, 0)) for seed in range(12)}
    assert found == {(value,) * 3 for value in expected}
    noisy = np.asarray(corrupt(pattern(60, 60, "L").convert("RGB"), "noise", 3, 0))
    assert (noisy == noisy[:, :, :1]).all()


@pytest.mark.parametrize(("kind", "severity", "message"), [("fog", 3, "noise, jpeg"), ("blur", 6, "1, 2, 3, 4, 5")])
def test_unknown_kind_or_severity_error_lists_the_known_ones(kind, severity, message):
    with pytest.raises(EchoError, match=message):
        corrupt(pattern(20, 20), kind, severity, 0)


def test_only_the_query_is_corrupted(case, tmp_path):
    corruption = Corruption("noise", 5)
    for exchange in exchanges_of(case):
        *references, query = views(exchange, tmp_path, corruption)
        assert (query.image, query.corruption) == (case.seen.query, corruption)
        assert all(view.corruption is None for view in references)
        assert len(references) == len(exchange.images) - 1
    clean = View(tmp_path, case.seen.query).load()
    corrupted = View(tmp_path, case.seen.query, corruption).load()
    assert change(clean, corrupted) > 20
    assert clean.size == corrupted.size
    other = View(tmp_path, case.seen.query, dataclasses.replace(corruption, seed=1)).load()
    assert change(corrupted, other) > 20, "the draw depends on the seed"


def test_run_keeps_a_query_apart_from_the_same_image_as_reference(model, row_builder, tmp_path):
    """The first case's query is the second's reference. Cached features of one are not used for the other."""
    first, second = make_case(tmp_path), make_case(tmp_path, "line/part/2", seed=9)
    first_as_reference = [
        dataclasses.replace(one, images=(first.seen.query, second.seen.query)) for one in exchanges_of(second)[-1:]
    ]
    exchanges = [*exchanges_of(first)[-1:], *first_as_reference]
    corruption = Corruption("blur", 5)
    together = Engine(model, row_builder, tmp_path, max_new_tokens=1, corruption=corruption).generate(
        "decision_maker", exchanges
    )
    for exchange, generations in zip(exchanges, together, strict=True):
        references, query = exchange.images[:-1], exchange.images[-1]
        View(tmp_path, query, corruption).load().save(tmp_path / f"corrupted_{query}")
        swapped = dataclasses.replace(exchange, images=(*references, f"corrupted_{query}"))
        (expected,) = Engine(model, row_builder, tmp_path, max_new_tokens=1).generate("decision_maker", [swapped])
        (clean,) = Engine(model, row_builder, tmp_path, max_new_tokens=1).generate("decision_maker", [exchange])
        for one, other, untouched in zip(generations, expected, clean, strict=True):
            assert one.letters == pytest.approx(other.letters, abs=ROUNDING) != untouched.letters


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), train=12, validation=2, test=2)


def test_run_records_its_corruption_and_resumes_only_with_the_same(dataset, tmp_path):
    run_evaluation(dataset, tmp_path / "clean", "--max_new_tokens", 1)
    noisy = ("--max_new_tokens", 1, "--corruption", "noise", "--severity", 5)
    run_evaluation(dataset, tmp_path / "noisy", *noisy)
    run_evaluation(dataset, tmp_path / "noisy", *noisy)  # resume
    rows = [list(read_jsonl(tmp_path / name / "predictions.jsonl", Prediction)) for name in ("clean", "noisy")]
    assert [row.question for row in rows[0]] == [row.question for row in rows[1]]
    assert [row.image for row in rows[0]] == [row.image for row in rows[1]], "image names stay the same"
    assert [row.probabilities for row in rows[0]] != [row.probabilities for row in rows[1]]
    described = json.loads((tmp_path / "noisy" / "run.json").read_text())
    assert (described["corruption"], described["severity"]) == ("noise", 5)
    with pytest.raises(EchoError, match=r"severity is 5, not 4; choose another --output"):
        run_evaluation(dataset, tmp_path / "noisy", *noisy[:-1], 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--corruption", "noise"), "corruption is set but severity is not; add --severity"),
        (("--severity", "2"), "severity is set but corruption is not; add --corruption"),
        (("--corruption", "fog", "--severity", "2"), "'fog'"),
        (("--corruption", "blur", "--severity", "6"), "6"),
    ],
)
def test_incomplete_corruption_options_are_rejected(dataset, tmp_path, flags, message):
    with pytest.raises(EchoError, match=message):
        run_evaluation(dataset, tmp_path / "run", *flags)


def test_server_gets_the_corrupted_query_and_clean_references(row_builder, case, tmp_path):
    corruption, exchange, server = Corruption("motion", 4), exchanges_of(case)[-1], FakeServer()
    ask_server(server, row_builder, tmp_path, [exchange], corruption=corruption)
    server.close()
    for body in server.requests:
        for sent, view in zip(shown_images(body), views(exchange, tmp_path, corruption), strict=True):
            expected, found = (
                row_builder.image_processor(images=[image], return_tensors="np") for image in (view.load(), sent)
            )
            np.testing.assert_array_equal(expected["pixel_values"], found["pixel_values"])


def test_training_draws_follow_the_share_and_the_seed():
    names = [f"line/part/{index}" for index in range(3000)]
    drawn = [draw_corruption(name, 0.3, 7) for name in names]
    corrupted = [one for one in drawn if one is not None]
    assert 0.26 < len(corrupted) / len(names) < 0.34
    pairs = {(one.kind, one.severity) for one in corrupted}
    assert pairs == {(kind, severity) for kind in CORRUPTIONS for severity in SEVERITIES}
    assert drawn == [draw_corruption(name, 0.3, 7) for name in names] != [draw_corruption(n, 0.3, 8) for n in names]
    assert all(draw_corruption(name, 0.0, 7) is None for name in names)
    more = [draw_corruption(name, 0.6, 7) for name in names]
    assert all(one is None or one == other for one, other in zip(drawn, more, strict=True)), (
        "a larger share keeps all draws of a smaller one"
    )


def test_training_batch_contains_the_corrupted_query(row_builder, case, tmp_path):
    exchange = asdict(with_completions(exchanges_of(case)[-1], ["B"] * 7))
    corruption = Corruption("jpeg", 3, seed=5)
    rows = group_by_case(pa.Table.from_pylist([exchange], EXCHANGE_SCHEMA)).add_column(
        "corruption", [asdict(corruption)]
    )
    batch = Collator(row_builder, tmp_path)([rows[0]])
    expected = image_inputs(row_builder, [view.load() for view in views(exchanges_of(case)[-1], tmp_path, corruption)])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert not torch.equal(
        Collator(row_builder, tmp_path)([{"exchanges": [exchange]}])["pixel_values"], batch["pixel_values"]
    )


def test_training_reports_corrupted_queries_and_resumes_only_alike(dataset, tmp_path, capsys):
    output = tmp_path / "decision_maker"
    flags = ["--max_steps", 1, "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", 1]
    run_in_process(*tiny_options("decision_maker", dataset, output, *flags, "--corrupted_share", 0.7))
    printed = capsys.readouterr().out
    count = sum(draw_corruption(f"train/{index}", 0.7, 0) is not None for index in range(12))
    assert 0 < count < 12
    assert f"decision_maker, train: {count} of 12 cases have a corrupted query" in printed
    assert json.loads((output / "echo_ft.json").read_text())["corrupted_share"] == 0.7
    card = read_card(output)
    again = SFTConfig(output_dir=str(output), resume_from_checkpoint="true", max_steps=1, use_cpu=True, bf16=False)
    assert find_checkpoint(again, {".": card}).path == str(output / "checkpoint-1")
    with pytest.raises(EchoError, match=r"trained with corrupted_share 0\.7, not 0\.2"):
        find_checkpoint(again, {".": dataclasses.replace(card, corrupted_share=0.2)})
    with pytest.raises(EchoError, match="trained with quantization none, not 4bit"):
        find_checkpoint(again, {".": dataclasses.replace(card, quantization="4bit")})


def test_share_above_one_is_rejected(dataset, tmp_path):
    with pytest.raises(EchoError, match=r"corrupted_share is 1\.5; set a value from 0 to 1"):
        sft_main(
            [
                str(one)
                for one in tiny_options("decision_maker", dataset, tmp_path, "--corrupted_share", 1.5, "--dry_run")
            ]
        )
