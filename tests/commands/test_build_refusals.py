"""A build rejects unusable input, rejects wrong options, and leaves no trace when it is interrupted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from data_prep.build import build, main
from data_prep.manifest import rejection_summary
from echo_ft.config import PARTLY_DONE
from echo_ft.data.dataset import load_dataset
from echo_ft.errors import EchoError
from echo_ft.records import Inspection, Question, Reference, Rejection
from echo_ft.terminal import printable
from tests.support.drawn_manifest import draw_manifest, edit_rows, flags, make_config, read_rows, run_build


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return draw_manifest(tmp_path_factory.mktemp("raw"), ("cap", "ring"), normals=12, defects=4)


def test_broken_images_and_contradicting_masks_are_rejected_by_name(small_manifest, tmp_path):
    root = small_manifest.parent
    (root / "cap/good-0-1.png").write_bytes(b"not an image")
    whole = (root / "cap/good-1-1.png").read_bytes()
    (root / "cap/good-1-1.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (20, 20), 255).save(root / "cap/dent-0-1_mask.png")
    Image.new("L", (48, 40), 0).save(root / "cap/dent-1-1_mask.png")
    (root / "cap/dent-2-1_mask.png").write_bytes(b"")
    Image.new("L", (48, 40), 255).save(root / "mark.png")
    edit_rows(small_manifest, lambda r: r.update(mask="mark.png") if r["image"] == "cap/good-2-1.png" else None)
    manifest = build(make_config(small_manifest, tmp_path / "out"))
    rejections = read_rows(tmp_path / "out", "rejected.jsonl", Rejection)
    reasons = {r.item: r.reason for r in rejections}
    lines = {row["image"]: n for n, row in enumerate(map(json.loads, small_manifest.read_text().splitlines()), start=1)}
    assert all(reason.endswith(f" (parts.jsonl:{lines[image]})") for image, reason in reasons.items())
    assert manifest["rejected"] == 5
    assert manifest["dropped"] == {"mask": 1}
    assert len(reasons) == 6
    assert [r.item for r in rejections if r.dropped] == ["cap/dent-1-1.png"]
    summary = "5 rejected; 1 mask dropped (the images are still used); see rejected.jsonl"
    assert rejection_summary(manifest) == summary
    assert f"{summary}." in (tmp_path / "out" / "preview.html").read_text()
    assert "broken" in reasons["cap/good-0-1.png"]
    assert "broken" in reasons["cap/good-1-1.png"]
    assert "20 x 20 pixels but its image has 48 x 40" in reasons["cap/dent-0-1.png"]
    assert "marks nothing" in reasons["cap/dent-1-1.png"]
    assert "used without it" in reasons["cap/dent-1-1.png"]
    assert "dent-2-1_mask.png" in reasons["cap/dent-2-1.png"]
    assert "labelled good" in reasons["cap/good-2-1.png"]
    kept = {i.image: i for i in read_rows(tmp_path / "out", "inspections.jsonl", Inspection)}
    assert len(kept) == 19
    assert kept["cap/dent-1-1.png"].mask is None
    used = {r.image for r in read_rows(tmp_path / "out", "references.jsonl", Reference)}
    assert used <= set(kept)


def test_a_named_reference_to_itself_or_to_a_defect_is_dropped(small_manifest, tmp_path):
    named = {"cap/dent-0-1.png": "cap/dent-0-1.png", "cap/dent-1-1.png": "cap/stain-0-1.png"}
    named |= {"cap/dent-2-1.png": "cap/good-0-1.png"}
    edit_rows(small_manifest, lambda row: row.update(reference=named.get(row["image"])))
    manifest = build(make_config(small_manifest, tmp_path / "out"))
    rejected = read_rows(tmp_path / "out", "rejected.jsonl", Rejection)
    reasons = {r.item: r.reason for r in rejected if r.dropped == "reference"}
    assert set(reasons) == {"cap/dent-0-1.png", "cap/stain-0-1.png"}
    assert manifest["dropped"] == {"reference": 2}
    assert "is its own reference; cap/dent-0-1.png gets a retrieved reference" in reasons["cap/dent-0-1.png"]
    assert "shows a defect (stain); cap/dent-1-1.png gets a retrieved" in reasons["cap/stain-0-1.png"]
    references = read_rows(tmp_path / "out", "references.jsonl", Reference)
    given = {r.inspection: r.image for r in references if r.method == "given"}
    assert given == {"cap/dent-2-1.png": "cap/good-0-1.png"}


def test_boxes_replace_a_mask_and_must_lie_inside_the_image(small_manifest, tmp_path):
    def box(row: dict) -> None:
        if row.pop("mask", None):
            row["boxes"] = [[40, 30, 60, 38]] if row["image"] == "cap/dent-0-1.png" else [[4, 4, 12, 12]]

    edit_rows(small_manifest, box)
    build(make_config(small_manifest, tmp_path / "out"))
    (rejection,) = read_rows(tmp_path / "out", "rejected.jsonl", Rejection)
    assert rejection.item == "cap/dent-0-1.png"
    assert "48 x 40" in rejection.reason
    places = {
        q.options[q.answer] for q in read_rows(tmp_path / "out", "questions.jsonl", Question) if "Where" in q.text
    }
    assert places == {"top left"}


def test_an_interrupted_build_leaves_only_the_old_dataset(small_manifest, tmp_path, monkeypatch):
    build(make_config(small_manifest, tmp_path / "out"))
    before = (tmp_path / "out" / "manifest.json").read_bytes()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_prep.build.write_preview", stop)
    with pytest.raises(KeyboardInterrupt):
        build(make_config(small_manifest, tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):
        build(make_config(small_manifest, tmp_path / "new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_only_a_dataset_of_the_same_config_is_replaced(small_manifest, tmp_path):
    output = tmp_path / "out"
    output.mkdir()  # an empty folder may be used
    build(make_config(small_manifest, output))
    build(make_config(small_manifest, output))
    with pytest.raises(EchoError, match=r"a different config \(it differs in seed\).*--overwrite"):
        build(make_config(small_manifest, output, seed=1))
    first = load_dataset(output).fingerprint
    assert build(make_config(small_manifest, output, seed=1, overwrite=True))["fingerprint"] != first
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(EchoError, match=r"thesis\.txt"):
        build(make_config(small_manifest, output, seed=1))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    with pytest.raises(EchoError, match="not a dataset"):
        build(make_config(small_manifest, tmp_path / "images", overwrite=True))
    assert (output / "thesis.txt").is_file()
    assert (tmp_path / "images" / "a.png").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "manifets"}, "did you mean 'manifest'"),
        ({"source": "folder", "root": "nowhere"}, "root: there is no folder nowhere"),
        ({"source": "folder"}, "needs root"),
        ({"annotations": "nowhere.csv"}, "there is no file nowhere.csv"),
        ({"knowledge": "nowhere.yaml"}, "there is no file nowhere.yaml"),
        ({"fractions": "0.5 0.2 0.2"}, "three numbers that add up to 1"),
        ({"split": "random"}, "split"),
        ({"output": "pyproject.toml/data"}, "pyproject.toml cannot be written"),
        ({"k": "0"}, "k is 0"),
        ({"sede": "1"}, "did you mean 'seed'"),
    ],
)
def test_a_wrong_option_gets_one_clear_sentence(raw, tmp_path, changes, message):
    options = {"source": "manifest", "output": tmp_path / "out", "descriptor": "skimage"}
    if changes.get("source") != "folder":
        options["annotations"] = raw
    with pytest.raises(EchoError, match=re.escape(message)) as caught:
        main(flags(**{**options, **changes}))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda row: False, "no usable image in .*; it lists none: add a row per image"),
        (lambda row: row["condition"] != "good", "no normal image.* with; add normal images, with condition"),
        (lambda row: row["condition"] == "good" and row.update(split="train") is None, "; add images of defects$"),
        (lambda row: not row.update(split="train" if row["condition"] != "good" else "test"), "; set split to seeded$"),
        (
            lambda row: row["condition"] != "good" or not row.update(condition="ok"),
            r"no normal image.*; \d+ rejected \(first: .* 'ok' must be spelled 'good'",
        ),
    ],
)
def test_data_without_a_usable_case_is_an_error_with_a_remedy(raw, tmp_path, keep, message):
    lines = [row for row in map(json.loads, raw.read_text().splitlines()) if keep(row)]
    source = raw.with_name(f"{tmp_path.name}.jsonl")
    source.write_text("".join(json.dumps(row) + "\n" for row in lines))
    with pytest.raises(EchoError, match=message):
        build(make_config(source, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_build_says_last_what_it_rejected_and_strict_makes_it_a_status(small_manifest, tmp_path, capsys):
    broken = small_manifest.parent / "cap" / "\x1b[31m.png"
    broken.write_bytes(b"")
    with open(small_manifest, "a") as file:
        file.write(json.dumps({"image": f"cap/{broken.name}", "product": "cap", "condition": "good"}) + "\n")
    given = {"source": "manifest", "annotations": small_manifest, "descriptor": "skimage", "output": tmp_path / "out"}
    arguments = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    assert main(arguments) == 0
    *_, summary, first = capsys.readouterr().out.splitlines()
    assert summary == "1 rejected; see rejected.jsonl"
    # run_main escapes what is printed
    assert printable(first).startswith("  first: cap/\\x1b[31m.png: the name of the image, its mask ")
    assert main([*arguments, "--strict"]) == PARTLY_DONE, "the option does not change the dataset"


def test_a_user_mistake_ends_without_a_traceback(tmp_path):
    (tmp_path / "mmad.json").write_text(json.dumps({"VisA/candle/test/bad/000.JPG": {}}))
    done = run_build(*flags(source="mmad", annotations=tmp_path / "mmad.json", output=tmp_path / "out"))
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: all 1 ")
    assert "Traceback" not in done.stderr
    assert "VisA/candle/test/bad/000.JPG" in error
    assert str(tmp_path) in error


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no dataset"), ("", "not JSON"), ('{"format": "other"}', "format"), ('{"root": 1}', "format")],
)
def test_a_folder_that_is_not_a_dataset_is_refused_with_a_remedy(tmp_path, content, message):
    folder = tmp_path / "data"
    if content is not None:
        folder.mkdir()
        (folder / "manifest.json").write_text(content)
    with pytest.raises(EchoError, match=f"{message}.*build"):
        load_dataset(folder)


def test_an_error_about_moved_images_names_their_old_folder(small_manifest, tmp_path):
    build(make_config(small_manifest, tmp_path / "out"))
    small_manifest.parent.rename(tmp_path / "moved")
    with pytest.raises(EchoError, match=r"no longer in .*raw"):
        load_dataset(tmp_path / "out")
