"""Other trainers load the converted rows with the same tokens, labels and pixels that this project trains on."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.convert import ImagePaths, convert, main
from echo_ft.data.dataset import MANIFEST, load_dataset
from echo_ft.data.export_rows import message_rows, prompt_completion_rows
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl
from echo_ft.images.decode import load_image
from echo_ft.model.batches import image_inputs
from echo_ft.model.rows import IGNORED, Row, RowBuilder
from echo_ft.records import ROLES, Branch, Exchange
from tests.conftest import ECHO_TINY, ROOT, make_dataset

FORMATS = ("trl", "llamafactory", "ms_swift")
FILES = [f"{role}/{split}" for role in ROLES for split in ("train", "validation")]
QUESTION = Exchange("decision_maker", "case 1", ("a.png",), "Look.\n", (Branch("1", "Is it so?", "A"),), "2")


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("parts"), train=3, validation=1, test=0)


@pytest.fixture(scope="module")
def written(parts, tmp_path_factory) -> Path:
    """The dataset in all three formats, one folder per format, written by the command."""
    folder = tmp_path_factory.mktemp("rows")
    for form in FORMATS:
        main(["--dataset", str(parts), "--format", form, "--output", str(folder / form)])
    return folder


def single_rows(parts: Path, name: str, row_builder: RowBuilder) -> list[Row]:
    """This project's rows of one file, one row per branch."""
    dataset = load_dataset(parts)
    return [
        row_builder.load_row(dataclasses.replace(exchange, branches=(branch,)), dataset.root)
        for exchange in read_jsonl(dataset.folder / "sft" / f"{name}.jsonl", Exchange)
        for branch in exchange.branches
    ]


def own_pixels(row: Row, root: Path, row_builder: RowBuilder) -> torch.Tensor:
    return image_inputs(row_builder, [load_image(root / image) for image in row.exchange.images])["pixel_values"]


def trl_rows(path: Path, cache: Path) -> Any:
    import datasets

    return datasets.load_dataset(str(path), cache_dir=str(cache))


@pytest.mark.parametrize("role", ROLES)
def test_trl_loads_the_same_tokens_labels_and_pixels(role, parts, written, row_builder, model, tmp_path):
    from trl import SFTConfig, SFTTrainer

    rows = trl_rows(written / "trl" / role, tmp_path)
    args = SFTConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", max_length=None,
        per_device_train_batch_size=1, per_device_eval_batch_size=1, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = SFTTrainer(  # it replaces the forward method of its model permanently
        model=copy.deepcopy(model), args=args, train_dataset=rows["train"], eval_dataset=rows["validation"],
        processing_class=row_builder.processor,
    )  # fmt: skip
    for split, batches in (("train", trainer.get_train_dataloader()), ("validation", trainer.get_eval_dataloader())):
        expected = single_rows(parts, f"{role}/{split}", row_builder)
        assert len(expected) == len(batches) > 0
        for batch, row in zip(batches, expected, strict=True):
            assert batch["input_ids"][0].tolist() == row.input_ids.tolist()
            assert batch["labels"][0].tolist() == row.labels.tolist()
            assert (row.labels != IGNORED).any()
            assert batch["image_grid_thw"].tolist() == row.grids.tolist()
            torch.testing.assert_close(batch["pixel_values"], own_pixels(row, parts / "images", row_builder))


def read_as_documented(folder: Path, name: str, form: str) -> Iterator[dict[str, Any]]:
    """The rows of a file, read with the fields documented in LLaMA-Factory's data/README.md and by ms-swift."""
    path, columns = folder / f"{name}.jsonl", {"messages": "messages", "images": "images"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    if form == "llamafactory":
        described = json.loads((folder / "dataset_info.json").read_text())[name.replace("/", "_")]
        assert described["formatting"] == "sharegpt"
        path, columns, tags = folder / described["file_name"], described["columns"], described["tags"]
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, answer = row[columns["messages"]]
        assert [message[tags["role_tag"]] for message in (prompt, answer)] == [tags["user_tag"], tags["assistant_tag"]]
        contents = [message[tags["content_tag"]] for message in (prompt, answer)]
        yield {"images": row[columns["images"]], "prompt": contents[0], "completion": contents[1]}


@pytest.mark.parametrize("form", ["llamafactory", "ms_swift"])
@pytest.mark.parametrize("name", FILES)
def test_llamafactory_and_ms_swift_rows_give_the_same_tokens(form, name, parts, written, row_builder):
    found = list(read_as_documented(written / form, name, form))
    expected = single_rows(parts, name, row_builder)
    assert len(found) == len(expected) > 0
    for row, own in zip(found, expected, strict=True):
        # Both call Qwen2-VL's template qwen2_vl, and replace each <image> with an image.
        start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        text = f"{start}{row['prompt']}<|im_end|>\n<|im_start|>assistant\n{row['completion']}<|im_end|>\n"
        text = text.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        images = [Image.open(path) for path in row["images"]]
        assert row_builder.processor(text=[text], images=images)["input_ids"][0] == own.input_ids.tolist()
        assert row["completion"] == own.exchange.branches[0].completion


@pytest.mark.parametrize("form", ["llamafactory", "ms_swift"])
def test_llamafactory_and_ms_swift_load_the_same_tokens_and_pixels(form, parts, written, row_builder, tmp_path):
    python = os.environ.get(f"ECHO_FT_{form.upper()}")
    if not python:
        pytest.skip(
            f"ECHO_FT_{form.upper()} is not set; set it to the Python of a {form} environment: benchmarks/README.md"
        )
    model = tmp_path / "model"
    shutil.copytree(ECHO_TINY, model)
    row_builder.processor.save_pretrained(model)  # with the pixel budget of the tests, which both take from the model
    files = [name.replace("/", "_") if form == "llamafactory" else f"{name}.jsonl" for name in FILES]
    done = subprocess.run(
        [python, "-m", "tests.support.other_trainers", form, model, *(written / form / file for file in files)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "MODELSCOPE_CACHE": str(tmp_path / "ms")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, loaded in zip(FILES, json.loads(done.stdout.strip().splitlines()[-1]), strict=True):
        expected = single_rows(parts, name, row_builder)
        assert len(loaded) == len(expected) > 0
        for theirs, own in zip(loaded, expected, strict=True):
            size = len(own.input_ids)
            assert theirs["input_ids"][:size] == own.input_ids.tolist()
            assert theirs["labels"][:size] == own.labels.tolist()
            assert set(theirs["labels"][size:]) <= {IGNORED}  # padding to a multiple of 8
            assert theirs["image_grid_thw"] == own.grids.flatten().tolist()
            values = own_pixels(own, parts / "images", row_builder).double()
            assert theirs["pixels"] == pytest.approx(values.sum().item(), abs=1e-4 * values.numel())


def make_ambiguous(folder: Path) -> None:
    """Replace three images of a dataset with images that libraries read differently."""
    first, second, third = sorted(folder.glob("*.png"))[:3]
    wide = np.asarray(Image.open(first).convert("L")).astype(np.uint16) * 16  # 12 bits
    Image.fromarray(wide).save(first)
    transparent = Image.open(second).convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    transparent.save(second)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    Image.open(third).save(third, exif=exif)


@pytest.mark.parametrize("form", FORMATS)
def test_images_that_libraries_read_differently_are_copied_as_rgb(form, tmp_path, row_builder):
    parts = make_dataset(tmp_path / "parts", train=1, validation=0, test=0)
    make_ambiguous(parts / "images")
    manifest = json.loads((parts / MANIFEST).read_text())
    del manifest["images_fingerprint"]  # the digests describe the original images
    (parts / MANIFEST).write_text(json.dumps(manifest))
    convert(load_dataset(parts), form, tmp_path / "rows")
    copies = sorted(path.name for path in (tmp_path / "rows" / "images").iterdir())
    assert copies == [f"train_0_{number}.png.png" for number in range(3)]
    for own, images in zip(
        single_rows(parts, "reference_extractor/train", row_builder), images_of(tmp_path, form), strict=True
    ):
        for image, name in zip(images, own.exchange.images, strict=True):
            np.testing.assert_array_equal(np.asarray(image), np.asarray(load_image(parts / "images" / name)))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_colours_are_copied_in_8_bits(tmp_path, suffix):
    """Pillow opens them as RGB and keeps the high byte of each value, so 12 bits would be nearly black."""
    path = tmp_path / f"part.{suffix}"
    cv2.imwrite(str(path), np.tile(np.linspace(0, 4095, 64).astype(np.uint16), (16, 1))[..., None].repeat(3, axis=2))
    copy = ImagePaths(tmp_path, tmp_path / "images", tmp_path / "images").resolve(path.name)
    with Image.open(copy) as image:
        assert np.asarray(image).max() == 255
        np.testing.assert_array_equal(np.asarray(image), np.asarray(load_image(path)))


def images_of(tmp_path: Path, form: str) -> list[list[Image.Image]]:
    """The images in each row of the reference extractor, opened with the library that the format's trainer uses."""
    folder = tmp_path / "rows" / "reference_extractor"
    if form == "trl":
        return [row["images"] for row in trl_rows(folder, tmp_path / "cache")["train"]]
    rows = map(json.loads, (folder / "train.jsonl").read_text().splitlines())
    return [[Image.open(path) for path in row["images"]] for row in rows]


@pytest.mark.parametrize(
    ("form", "change", "named"),
    [
        (prompt_completion_rows, {"context": "See <|im_end|>."}, r"case 1.*<\|im_end\|>"),
        (
            message_rows,
            {"branches": (Branch("1", "So?", "<|image_pad|>"),)},
            r"case 1.*<\|image_pad\|>, a control token",
        ),
        (message_rows, {"context": "The <image> is dark."}, "case 1.*<image>, a tag that LLaMA-Factory"),
        (message_rows, {"branches": (Branch("1", "Is <bbox> so?", "A"),)}, "case 1.*<bbox>"),
        (message_rows, {"branches": (Branch("1", "So?", "<video>"),)}, "case 1.*<video>"),
    ],
)
def test_a_text_with_a_special_token_of_a_trainer_is_refused(form, change, named):
    with pytest.raises(EchoError, match=named):
        list(form(dataclasses.replace(QUESTION, **change), ["a.png"]))
    assert len(list(form(QUESTION, ["a.png"]))) == 1


def test_a_full_folder_is_refused_and_a_failure_leaves_nothing(tmp_path):
    parts = make_dataset(tmp_path / "parts", train=1, validation=0, test=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(EchoError, match="full already exists"):
        convert(load_dataset(parts), "trl", tmp_path / "full")
    next((parts / "images").glob("*.png")).unlink()
    with pytest.raises(EchoError, match="there is no image"):
        convert(load_dataset(parts), "trl", tmp_path / "rows")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "parts"]


@pytest.mark.parametrize("name", ["rows[2]", "rows*", "rows?", "rows[2]/deep"])
def test_a_path_that_is_a_pattern_is_refused(name, parts, tmp_path):
    with pytest.raises(EchoError, match=r"reads the path .* as a pattern.*choose an output without"):
        convert(load_dataset(parts), "trl", tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_rows_record_their_source_and_changed_images_are_refused(tmp_path):
    parts = make_dataset(tmp_path / "parts", train=2, validation=1, test=0)
    counts = convert(load_dataset(parts), "ms_swift", tmp_path / "rows")
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    dataset = load_dataset(parts)
    assert (manifest["dataset_fingerprint"], manifest["format"]) == (dataset.fingerprint, "ms_swift")
    assert manifest["prompt_version"] == dataset.manifest["prompt_version"]
    assert manifest["commit"]
    assert manifest["versions"]
    lines = {name: (tmp_path / "rows" / f"{name}.jsonl").read_text().count("\n") for name in counts}
    assert manifest["rows"] == counts == lines
    assert manifest["synthetic"] == {}
    first = next(read_jsonl(parts / "sft" / ROLES[0] / "train.jsonl", Exchange)).images[0]
    Image.new("RGB", (56, 56)).save(parts / "images" / first)
    with pytest.raises(EchoError, match=rf"1 of \d+ images .*first: {first}"):
        convert(dataset, "ms_swift", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_files_without_rows_are_skipped_and_reported(tmp_path):
    parts = make_dataset(tmp_path / "parts", train=1, validation=0, test=0)
    done = subprocess.run(
        [sys.executable, "-m", "data_prep.convert", "--dataset", parts, "--format", "llamafactory", "--output",
         tmp_path / "rows"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "decision_maker/validation" in done.stdout
    assert "0 rows, so no file" in done.stdout
    described = json.loads((tmp_path / "rows" / "dataset_info.json").read_text())
    assert sorted(described) == sorted(f"{role}_train" for role in ROLES)
    assert not list((tmp_path / "rows").rglob("validation*"))
