"""One module opens files from outside, and accepts only regular files within limits and records of the right types."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from PIL import Image

from echo_ft import inputs
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl, to_json
from echo_ft.images.decode import MAX_PIXELS, READ_ERRORS, decode, describe_read_error
from echo_ft.records import Inspection, Prediction, Reference
from echo_ft.strict_yaml import read_json, read_yaml

PREDICTION = Prediction(
    case="c",
    question="q",
    dataset="d",
    product="p",
    group="g",
    image="a.png",
    condition="good",
    kind="Anomaly Detection",
    question_text="?",
    options={"A": "Yes", "B": "No"},
    answer="A",
    text="A",
    parsed="A",
    probabilities={"A": 1, "B": 0.0},
)


def test_a_byte_order_mark_before_json_is_skipped(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert inputs.read_json_object(tmp_path / "a.json") == {"a": 1}


def test_pipes_and_folders_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "pipe", "a pipe or a device"),
        (tmp_path, "it is a folder"),
        (Path("/dev/zero"), "a device"),
    ):
        for read in (inputs.read_bytes, inputs.read_text, inputs.read_json_file, inputs.read_yaml_file, decode):
            with pytest.raises(inputs.InputError, match=reason):
                read(path)


def test_sizes_and_lines_are_bounded(tmp_path):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(inputs.MAX_BYTES + 1)  # sparse
    with pytest.raises(inputs.InputError, match="more than 1,073,741,824"):
        inputs.read_text(path)
    path.write_bytes(b"a" * (inputs.MAX_LINE + 1))
    with pytest.raises(EchoError, match=r"large cannot be read after line 0 \(it has a line of more than"):
        list(read_jsonl(path, Reference))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 65 + "1" + "}" * 65, "more than 64 levels"),
        ("9" * 5000, "a number has 5000 digits"),
        ('["\\ud800"]', "an unpaired surrogate"),
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ("{" + ", ".join(f'"{number % 99_999}": 1' for number in range(100_000)) + "}", "duplicate key '0'"),
    ],
)
def test_bounds_of_json(text, reason):
    with pytest.raises(ValueError, match=reason):
        read_json(text)
    assert read_json('["\\ud83d\\ude00"]') == ["😀"]
    assert read_json('{"a": 1, "a": 2}', unique_keys=False) == {"a": 2}


def merges(levels: int) -> str:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (merges(10), "aliases and merge keys repeat"),
        ("a: &a [*a]", "refers to a value that contains it"),
        ("[" * 5_000, "nested too deeply"),
        ("[" * 65 + "]" * 65, "more than 64 levels"),
        ("a: !!timestamp x", "a value cannot be read"),
        ("a: !!bool x", "a value cannot be read"),
        ("a: !!int ''", "a value cannot be read"),
        ("a: 2026-13-01", "a value cannot be read"),
        (f"a: {'9' * 5000}", "a value cannot be read"),
        ('a: "\\ud800"', "an unpaired surrogate"),
    ],
)
def test_bounds_of_yaml(text, reason):
    with pytest.raises(yaml.YAMLError, match=reason):
        read_yaml(text)
    assert read_yaml("base: &base {x: 1}\nmore: {<<: *base, y: 2}") == {"base": {"x": 1}, "more": {"x": 1, "y": 2}}


def test_a_mapping_with_its_own_merge_can_be_merged_again_further_up():
    text = "base: &base {x: 1, y: 2}\ndeep: {deeper: {deepest: {own: &own {<<: *base, x: 3}}}}\nmore: {<<: *own}"
    assert read_yaml(text) == yaml.safe_load(text)
    assert read_yaml(text)["more"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text": None}, "text: null is not a text"),
        ({"parsed": 3}, "parsed: 3 is not a text"),
        ({"options": ["Yes"]}, 'options: ["Yes"] is not an object'),
        ({"options": {"A": 1}}, "options: 1 is not a text"),
        ({"probabilities": {"A": "1"}}, 'probabilities: "1" is not a number'),
        ({"probabilities": {"A": float("nan")}}, "probabilities: NaN is not a number"),
        ({"probabilities": {"A": True}}, "probabilities: true is not a number"),
        ({"image": "../../outside.png"}, 'image: "../../outside.png" is not a path in the root'),
        ({"image": "/outside.png"}, "is not a path in the root"),
        ({"image": "a\0.png"}, "is not a path in the root"),
        ({"extra": 1}, "Prediction has no field 'extra'"),
    ],
)
def test_a_record_of_other_types_is_named_with_file_line_and_field(tmp_path, change, reason):
    path = tmp_path / "predictions.jsonl"
    path.write_text(f"{to_json(PREDICTION)}\n{json.dumps({**asdict(PREDICTION), **change})}\n")
    with pytest.raises(EchoError) as error:
        list(read_jsonl(path, Prediction))
    assert f"{path}:2 is not a Prediction row" in str(error.value)
    assert reason in str(error.value)


def test_nested_records_and_tuples_are_restored_and_checked():
    row = {**asdict(Inspection("1", "a.png", "d", "p", "dent", "1")), "boxes": [[1, 2, 3, 4]]}
    assert inputs.from_dict(Inspection, row).boxes == ((1, 2, 3, 4),)
    for boxes in ([[1, 2, 3]], [[1, 2, 3, "4"]], [[1, 2, 3, float("inf")]], 4, [4]):
        with pytest.raises(TypeError, match="boxes: "):
            inputs.from_dict(Inspection, {**row, "boxes": boxes})
    with pytest.raises(TypeError, match="it is 3, not an object"):
        inputs.from_dict(Inspection, 3)


def test_a_line_that_is_not_utf8_or_a_missing_file_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xff\n")
    with pytest.raises(EchoError, match=r"rows\.jsonl cannot be read after line 0 .*; rebuild the file"):
        list(read_jsonl(path, Prediction))
    with pytest.raises(EchoError, match=r"there is no file .*gone\.jsonl; rebuild"):
        list(read_jsonl(tmp_path / "gone.jsonl", Prediction))


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.png", "a.webp", "a.mpo"])
def test_an_image_of_several_frames_is_refused(tmp_path, name):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    with pytest.raises(inputs.InputError, match="several frames, so it is unclear which one to use"):
        decode(tmp_path / name)
    frames[0].save(tmp_path / name)
    assert decode(tmp_path / name).size == (32, 32)


def test_images_are_bounded_and_of_known_formats(tmp_path):
    side = 10_001
    Image.new("1", (side, MAX_PIXELS // side + 1)).save(tmp_path / "bomb.png")
    with pytest.raises(inputs.InputError, match="more than 100 million pixels; crop it or scale it down"):
        decode(tmp_path / "bomb.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "part.png", "TGA")
    with pytest.raises(READ_ERRORS) as error:
        decode(tmp_path / "part.png")
    assert describe_read_error(error.value) == "the image is broken or has an unknown format (UnidentifiedImageError)"


def test_any_error_of_a_decoder_is_a_read_error(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a decoder of its own kind")

    Image.new("RGB", (8, 8)).save(tmp_path / "part.png")
    monkeypatch.setattr(Image.Image, "convert", broken)
    with pytest.raises(inputs.InputError, match=r"broken or has an unknown format \(RuntimeError\)"):
        decode(tmp_path / "part.png")


def test_web_addresses_have_hosts_that_can_be_asked():
    for text in ("http://localhost:8000/v1", "https://münchen.de/x", "http://[::1]/", "http://a_b.c."):
        assert inputs.is_web_address(text), text
    for text in (
        "localhost",
        "ftp://a/b",
        "http://",
        "http://a..b/x",
        f"http://{'a' * 64}.de/",
        "http://a:99999",
        "http://a b",
    ):
        assert not inputs.is_web_address(text), text
