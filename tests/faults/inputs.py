"""Hostile and broken inputs: a function that writes each, the command that reads it, and the message expected."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from tests.support import folder_layouts
from tests.support.folder_layouts import labelme_file, write_json
from tests.support.predictions import mixed_predictions

Arguments = list[str]
"""The module of a command, and its arguments."""

DEEP = "[" * 200_000
HUGE = "9" * 5000
SURROGATE = '"\\ud800"'


@dataclass(frozen=True)
class Fault:
    """One input and what its command must say about it."""

    name: str
    make: Callable[[Path], Arguments]
    says: str
    """A regular expression for the output."""
    status: int = 2
    """The exit status. 0 means that the rest of the input is used and the output is written."""
    holds: Callable[[Path], object] = lambda _: None
    """Checks what the command has written below the folder of the input."""


def build(root: Path, /, **options: object) -> Arguments:
    values = {"descriptor": "skimage", "output": root / "out", **options}
    return ["data_prep.build", *(str(part) for name, value in values.items() for part in (f"--{name}", value))]


def picture(path: Path, seed: int = 0, **saving: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(values).save(path, **saving)
    return path


# Images, each alone in a list: the build ends with the reason why the image cannot be used.


def listed(write: Callable[[Path], object], name: str = "odd.png", **cells: Any) -> Callable[[Path], Arguments]:
    def make(root: Path) -> Arguments:
        write(root / "raw" / name)
        row = {"image": name, "product": "cap", "condition": "good", **cells}
        (root / "raw").mkdir(exist_ok=True)
        (root / "raw" / "parts.jsonl").write_text(json.dumps(row) + "\n")
        return build(root, source="manifest", annotations=root / "raw" / "parts.jsonl")

    return make


def frames(path: Path) -> None:
    picture(path, format=None, save_all=True, append_images=[Image.new("RGB", (48, 32), "red")])


def changed(path: Path, form: str) -> None:
    """An image whose bytes differ from byte 60 onwards."""
    picture(path, format=form)
    content = bytearray(path.read_bytes())
    content[60:] = bytes(255 - value for value in content[60:])
    path.write_bytes(content)


def linked(path: Path) -> None:
    picture(path.parent.parent / "outside.png")
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("../outside.png")


def linked_folder(path: Path) -> None:
    picture(path.parent.parent.parent / "outside" / path.name)
    path.parent.parent.mkdir(exist_ok=True)
    path.parent.symlink_to("../outside")


def pipe(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def raw(content: bytes) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return write


def bomb(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("1", (13_000, 13_000)).save(path)


def sparse(path: Path) -> None:
    picture(path)
    os.truncate(path, 2**31)


def tiff(values: Any, **options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, values, **options)

    return write


BROKEN = r"odd\.\w+: the image is broken or has an unknown format \(\w+\)"
FRAMES = r"odd\.\w+: the file has several frames, so it is unclear which one to use; append one to its path"
LINK = "is a link out of the root to .*; copy the file, set root"

IMAGES = [
    *(Fault(f"frames {kind}", listed(frames, f"odd.{kind}"), FRAMES) for kind in ("gif", "tif", "png", "webp", "mpo")),
    *(
        Fault(f"changed {form}", listed(lambda path, form=form: changed(path, form)), BROKEN)
        for form in ("JPEG", "TIFF", "GIF", "PNG")
    ),
    *(
        Fault(f"format {form}", listed(lambda path, form=form: picture(path, format=form)), BROKEN)
        for form in ("DDS", "TGA", "PCX", "SGI", "EPS", "ICO")
    ),
    Fault(
        "aspect", listed(lambda path: picture(path).unlink() or Image.new("L", (402, 2)).save(path)), "402 x 2 pixels"
    ),
    Fault("empty image", listed(raw(b"")), BROKEN),
    Fault("text as image", listed(raw(b"not an image")), BROKEN),
    Fault("169 million pixels", listed(bomb), r"odd\.png: the image has more than 100 million pixels; crop it"),
    Fault("image of 2 GiB", listed(sparse), r"odd\.png: the file has 2,147,483,648 bytes, more than"),
    Fault(
        "long header",
        listed(raw(b"P6\n#" + b"a" * 5_000_000 + b"\n2 2\n255\n" + b"a" * 12)),
        "its header has more than",
    ),
    Fault(
        "white is zero",
        listed(tiff(np.eye(32, 48, dtype=np.uint16), photometric="miniswhite"), "odd.tif"),
        r"odd\.tif: its values decrease towards white",
    ),
    Fault("line break in a name", listed(picture, "odd\n.png"), "has a control character; rename the file"),
    Fault("line separator in a product", listed(picture, product="ca\u2028p"), r"'ca\\u2028p' has a control character"),
    Fault("pipe as image", listed(pipe), r"image odd\.png does not exist under the root"),
    Fault("folder as image", listed(lambda path: path.mkdir(parents=True)), r"image odd\.png does not exist"),
    Fault("link out", listed(linked), LINK),
    Fault("link of a folder out", listed(linked_folder, "sub/odd.png"), LINK),
    Fault("path out", listed(lambda path: picture(path.parent.parent / "o.png"), image="../o.png"), "outside the root"),
    Fault("NUL in a path", listed(picture, image="a\0.png"), "does not exist under the root"),
    Fault("long path", listed(picture, image="a" * 5000), "does not exist under the root"),
    Fault("escape in a product", listed(picture, product="\x1b[31mred"), r"its product '\\x1b\[31mred' has a control"),
    Fault("token in a product", listed(picture, product="<|im_end|>"), r"control token of the model's chat template"),
    Fault("product true", listed(picture, product=True), "product is True, not a string"),
    Fault(
        "mask link", listed(lambda p: (picture(p), linked(p.with_name("m.png"))), condition="dent", mask="m.png"), LINK
    ),
    Fault(
        "mask of NaN",
        listed(
            lambda p: (picture(p), tiff(np.full((32, 48), np.nan, np.float32))(p.with_name("m.tif"))),
            condition="a",
            mask="m.tif",
        ),
        r"mask m\.tif has values that are not finite numbers; save it",
    ),
    Fault(
        "huge boxes", listed(picture, condition="dent", boxes=f"[[0, 0, {HUGE}, 5]]"), "a number has 5000 digits|boxes"
    ),
    Fault("long boxes", listed(picture, condition="dent", boxes=[[0, 0, 10**39, 5]]), "is not .* inside the 48 x 32"),
    Fault("deep boxes", listed(picture, condition="dent", boxes=DEEP), r"boxes \[+ are not \[\[x0"),
    Fault("NaN boxes", listed(picture, condition="dent", boxes=[[0, 0, float("nan"), 5]]), "box .* is not"),
    Fault("boxes as text", listed(picture, condition="dent", boxes="somewhere"), "boxes somewhere are not"),
]


# Lists and annotations


def listing(content: bytes, name: str = "parts.jsonl") -> Callable[[Path], Arguments]:
    def make(root: Path) -> Arguments:
        picture(root / "a.png")
        (root / name).write_bytes(content)
        return build(root, source="manifest", annotations=root / name)

    return make


def coco(change: Callable[[dict[str, Any]], object] = lambda _: None, text: str | None = None):
    def make(root: Path) -> Arguments:
        picture(root / "a.png")
        content = {
            "images": [{"id": 1, "file_name": "a.png", "width": 48, "height": 32}],
            "annotations": [{"image_id": 1, "category_id": 1, "bbox": [4, 6, 8, 4]}],
            "categories": [{"id": 1, "name": "dent"}],
        }
        change(content)
        (root / "c.json").write_text(json.dumps(content) if text is None else text)
        return build(root, source="manifest", annotations=root / "c.json")

    return make


def labelme(change: Callable[[dict[str, Any]], object] = lambda _: None, text: str | None = None):
    def make(root: Path) -> Arguments:
        picture(root / "raw" / "a.png")
        content = labelme_file("a.png", [("dent", "rectangle", [[1, 1], [5, 5]])], (48, 32))
        change(content)
        (root / "raw" / "a.json").write_text(json.dumps(content) if text is None else text)
        return build(root, source="manifest", root=root / "raw")

    return make


def bomb_mask(content: dict[str, Any]) -> None:
    file = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(file, "PNG")
    mask = base64.b64encode(file.getvalue()).decode()
    content["shapes"] = [{"label": "dent", "shape_type": "mask", "points": [[0, 0], [5, 5]], "mask": mask}]


def mmad(change: Callable[[dict[str, Any]], object], text: str | None = None) -> Callable[[Path], Arguments]:
    def make(root: Path) -> Arguments:
        folder_layouts.mmad(root / "raw")
        picture(root / "outside" / "secret.png")
        rows = json.loads((root / "raw" / "mmad.json").read_text())
        key = "VisA/candle/test/bad/000.JPG"
        rows = {key: rows[key]}
        change(rows)
        (root / "raw" / "mmad.json").write_text(json.dumps(rows) if text is None else text)
        return build(root, source="mmad", root=root / "raw", annotations=root / "raw" / "mmad.json")

    return make


def only(rows: dict[str, Any], **changes: Any) -> None:
    (row,) = rows.values()
    row.update(changes)


def piped_list(root: Path) -> Arguments:
    pipe(root / "p.csv")
    return build(root, source="manifest", annotations=root / "p.csv")


KEY_TWICE = b'{"image": "a.png", "product": "cap", "condition": "good", "condition": "dent"}\n'
VISA = "VisA/candle/test/bad/000.JPG"

LISTS = [
    Fault("key twice", listing(KEY_TWICE), "the line is ambiguous .duplicate key 'condition'.; remove one of the two"),
    Fault("key twice, then more", listing(KEY_TWICE.rstrip() + b"}"), "the line is not JSON .Extra data"),
    Fault("key twice in half a line", listing(b'{"condition": ' + KEY_TWICE), "the line is not JSON .Expecting"),
    Fault("key twice beside half of a pair", listing(KEY_TWICE.replace(b"a.png", b"\\ud800")), "an unpaired surrogate"),
    Fault("deep line", listing(DEEP.encode()), "the line is not JSON .it is nested too deeply"),
    Fault("list of huge number", listing(b'{"image": %s}' % HUGE.encode()), "a number has 5000 digits"),
    Fault("half of a pair", listing(b'{"image": "\\ud800", "product": "a"}'), "an unpaired surrogate"),
    Fault("not UTF-8", listing(b'{"image": "\xff"}'), "is not a UTF-8 text file"),
    Fault("CSV not UTF-8", listing(b"image,product,condition\n\xff,a,good\n", "p.csv"), "is not a UTF-8 text file"),
    Fault("column twice", listing(b"image,product,condition,condition\n", "p.csv"), "several columns 'condition'"),
    Fault("null characters", listing(b"\0\0\0", "p.csv"), "null characters"),
    Fault("pipe as list", piped_list, "annotations: there is no file"),
    Fault("COCO deep", coco(text=DEEP), r"c\.json cannot be read as JSON \(it is nested too deeply\); export it again"),
    Fault("COCO id a list", coco(lambda c: c["images"][0].update(id=[1])), "belong to no image|no usable image"),
    Fault("COCO huge box", coco(lambda c: c["annotations"][0].update(bbox=[0, 0, 10**39, 5])), "is not .* inside"),
    Fault("COCO NaN", coco(lambda c: c["annotations"][0].update(bbox=[0, 0, float("nan"), 5])), "box .* is not"),
    Fault(
        "COCO not an object", coco(text="[1]"), "is not an export of Label Studio"
    ),  # a JSON list is read as its tasks
    Fault("labelme deep", labelme(text=DEEP), "cannot be read as JSON .it is nested too deeply"),
    Fault(
        "labelme huge", labelme(lambda c: c["shapes"][0].update(points=[[0, 0], [10**39, 1e308]])), "is not .* inside"
    ),
    Fault(
        "labelme circle",
        labelme(lambda c: c["shapes"][0].update(shape_type="circle", points=[[1e308, 0], [-1e308, 0]])),
        r"a circle from .* has no finite radius; draw it again or delete it",
    ),
    Fault("labelme bomb", labelme(bomb_mask), "a shape's mask cannot be read|more than 100 million pixels"),
    Fault("mmad deep", mmad(lambda _: None, text=DEEP), "is not JSON .it is nested too deeply"),
    Fault(
        "mmad mask out",
        mmad(lambda rows: only(rows, mask_path="../../../outside/secret.png")),
        "not a path in the root",
    ),
    Fault(
        "mmad template out",
        mmad(lambda rows: only(rows, random_templates=["../outside/secret.png"])),
        "not a path in the root",
    ),
    Fault(
        "mmad key out",
        mmad(lambda rows: rows.update({"DS/p/../../../outside/secret.png": rows.pop(VISA)})),
        "all 1 images that .* lists are missing",
    ),
    Fault("mmad long key", mmad(lambda rows: rows.update({f"DS/p/bad/{'a' * 5000}": rows.pop(VISA)})), "are missing"),
    Fault("mmad conversation", mmad(lambda rows: only(rows, conversation=3)), "its conversation is '3', not a list"),
    Fault("mmad mask a number", mmad(lambda rows: only(rows, mask_path=3)), "its mask_path is '3', not a text"),
]


# Configs


def linked_to_itself(root: Path) -> Path:
    (root / "loop").symlink_to("loop")
    return root / "loop"


def merges() -> str:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 10)]
    return "\n".join(lines)


def config(text: str) -> Callable[[Path], Arguments]:
    def make(root: Path) -> Arguments:
        (root / "c.yaml").write_text(f"source: synthetic\ndescriptor: skimage\n{text}\n")
        return ["data_prep.build", "--config", str(root / "c.yaml"), "--output", str(root / "out")]

    return make


def raw_config(root: Path, content: bytes) -> Arguments:
    (root / "c.yaml").write_bytes(content)
    return ["data_prep.build", "--config", str(root / "c.yaml"), "--output", str(root / "out")]


CONFIGS = [
    Fault("config merges", config(merges()), "aliases and merge keys repeat .* values"),
    Fault("config aliases", config("a: &a [1]\nb: &b [*a, *a]\nk: *b"), "unknown key|k takes one value"),
    Fault("config deep", config("k: " + DEEP[:5000]), "nested too deeply"),
    Fault("config huge", config(f"seed: {HUGE}"), "c.yaml is not valid YAML: a value cannot be read"),
    Fault("config NaN", config("fractions: [.nan, .nan, .nan]"), "fractions cannot be"),
    Fault("config mapping", config("k: {a: 1}"), "k takes one value"),
    Fault("config float", config("parts: 2.7"), "parts cannot be 2.7"),
    Fault("config timestamp", config("seed: !!timestamp x"), "a value cannot be read"),
    Fault("config NUL", config('root: "a\\0b"'), "root has a NUL character"),
    Fault("config twice", config("seed: 1\nseed: 2"), "duplicate key 'seed'"),
    Fault("config not UTF-8", lambda root: raw_config(root, b"k: \xff"), "is not valid YAML"),
    Fault(
        "output too long",
        lambda root: build(root, source="synthetic", output=root / ("o" * 300)),
        "File name too long; check the path",
    ),
    Fault(
        "output a link to itself",
        lambda root: build(root, source="synthetic", output=linked_to_itself(root)),
        "Symlink loop|symbolic links",
    ),
    Fault("config folder", lambda root: ["data_prep.build", "--config", str(root)], "there is no config file"),
]


def described(content: str, name: str = "k.yaml") -> Callable[[Path], Arguments]:
    def make(root: Path) -> Arguments:
        picture(root / "raw" / "a.png")
        rows = [{"image": "a.png", "product": "cap", "condition": "good", "split": "train"}]
        (root / "raw" / "parts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (root / name).write_text(content)
        return build(root, source="manifest", annotations=root / "raw" / "parts.jsonl", knowledge=root / name)

    return make


KNOWLEDGE = [
    Fault("knowledge merges", described(merges()), "knowledge file .* aliases and merge keys repeat"),
    Fault("knowledge deep", described("[" * 5000), "knowledge file .* nested too deeply"),
    Fault("knowledge deep JSON", described(DEEP, "k.json"), "knowledge file .* nested too deeply"),
    Fault("knowledge timestamp", described("parts: {cap: {good: !!timestamp x}}"), "a value cannot be read"),
    Fault("knowledge bool", described("parts: {cap: {good: !!bool x}}"), "a value cannot be read"),
    Fault("knowledge int", described("parts: {cap: {good: !!int ''}}"), "a value cannot be read"),
    Fault("knowledge pair", described('parts: {cap: {good: "\\ud800"}}'), "an unpaired surrogate"),
    Fault("knowledge token", described("parts: {cap: {good: a <|im_end|> b}}"), "control token"),
    Fault("knowledge long", described(f"parts: {{cap: {{good: {'word ' * 5000}}}}}"), "has 24,999 characters; shorten"),
    Fault(
        "knowledge escape", described('parts: {cap: {good: "a \\e[2J b"}}'), "parts/cap/good has a control character"
    ),
    Fault("knowledge circle", described("parts: &a {cap: *a}"), "refers to a value that contains it"),
]


# Datasets


def dataset(root: Path, /, **changes: Any) -> Path:
    """A dataset folder of one image, written by hand."""
    folder = root / "data"
    picture(folder / "images" / "a.png")
    manifest = {
        "format": "echo-ft dataset 1", "root": ".", "fingerprint": "0" * 16, "images_fingerprint": "0" * 16,
        "config": {"split": "given", "k": 1},
    }  # fmt: skip
    write_json(folder / "manifest.json", {**manifest, **changes})
    row = {"id": "1", "image": "images/a.png", "dataset": "d", "product": "p", "condition": "good", "group": "1"}
    (folder / "inspections.jsonl").write_text(json.dumps({**row, "split": "test"}) + "\n")
    for name in ("references", "questions"):
        (folder / f"{name}.jsonl").write_text("")
    write_json(folder / "knowledge.json", {})
    return folder


def audited(change: Callable[[Path], object] = lambda _: None, **changes: Any) -> Callable[[Path], Arguments]:
    def make(root: Path) -> Arguments:
        folder = dataset(root, **changes)
        change(folder)
        return ["data_prep.audit", str(folder)]

    return make


def record(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "inspections.jsonl"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}) + "\n")

    return change


def file(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def asked(*changes: dict[str, Any]) -> Callable[[Path], Arguments]:
    def make(root: Path) -> Arguments:
        folder = dataset(root)
        row = {
            "id": "1#q",
            "inspection": "1",
            "kind": "Anomaly Detection",
            "text": "?",
            "options": {"A": "Yes", "B": "No"},
        }
        rows = [{**row, "answer": "A", **change} for change in changes]
        (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        return [
            "evaluation.run",
            "--config",
            "recipes/tiny/run.yaml",
            "--dataset",
            str(folder),
            "--output",
            str(root / "out"),
        ]

    return make


ROW = r"inspections\.jsonl:1 is not a Inspection row \("

DATASETS = [
    Fault("manifest deep", audited(file("manifest.json", DEEP.encode())), "is not JSON .it is nested too deeply"),
    Fault("manifest a list", audited(file("manifest.json", b"[]")), "it holds a list, not an object"),
    Fault("manifest root", audited(root=3), "has no usable root .3.; rebuild the dataset"),
    Fault("manifest config", audited(config="x"), "has no usable config"),
    Fault("manifest fingerprint", audited(fingerprint=None), "has no usable fingerprint"),
    Fault("record image", audited(record(image=3)), ROW + r"image: 3 is not a path in the root"),
    Fault("record out", audited(record(image="../../secret.png")), ROW + "image: .* is not a path in the root"),
    Fault("record absolute", audited(record(image="/secret.png")), ROW + "image: .* is not a path in the root"),
    Fault("record product", audited(record(product=["p"])), ROW + r'product: \["p"\] is not a text'),
    Fault("record boxes", audited(record(boxes=[[1, 2, 3]])), ROW + r"boxes: \[1, 2, 3\] is not a list of 4"),
    Fault("record field", audited(record(extra=1)), ROW + "Inspection has no field 'extra'"),
    Fault("record deep", audited(file("inspections.jsonl", DEEP.encode())), ROW + "it is nested too deeply"),
    Fault("record not UTF-8", audited(file("inspections.jsonl", b"\xff\n")), "cannot be read after line 0"),
    Fault("record a number", audited(file("inspections.jsonl", b"3\n")), ROW + "it is 3, not an object"),
]


ASKED = r"questions\.jsonl:\d is not a "

QUESTIONS = [
    Fault("options none", asked({"options": {}}), ASKED + "valid question .it has fewer than two options"),
    Fault("answer outside", asked({"answer": "C"}), ASKED + "valid question .the answer 'C' is not one"),
    Fault("ids alike", asked({}, {}), ASKED + "valid question .the id '1#q' occurs twice"),
    Fault(
        "option a number", asked({"options": {"A": 1, "B": "No"}}), ASKED + r"Question row \(options: 1 is not a text"
    ),
    Fault("question null", asked({"text": None}), ASKED + r"Question row \(text: null is not a text"),
]


# Runs and answers


def run(
    change: Callable[[list[dict[str, Any]]], object] = lambda _: None, **files: bytes
) -> Callable[[Path], Arguments]:
    def make(root: Path) -> Arguments:
        rows = [asdict(one) for one in mixed_predictions(images=4)]
        counts = {"cases": len({row["case"] for row in rows}), "questions": len(rows)}
        change(rows)
        folder = root / "run"
        folder.mkdir()
        write_json(folder / "run.json", {"complete": True, **counts})
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, content in files.items():
            (folder / name.replace("_", ".")).write_bytes(content)
        return ["evaluation.score", str(folder)]

    return make


def second(**changes: Any) -> Callable[[list[dict[str, Any]]], object]:
    return lambda rows: rows[1].update(changes)


def answers(content: str) -> Callable[[Path], Arguments]:
    def make(root: Path) -> Arguments:
        (root / "answers.json").write_text(content)
        return ["evaluation.score", "--answers", str(root / "answers.json"), "--output", str(root / "out")]

    return make


def piped_answers(root: Path) -> Arguments:
    pipe(root / "answers.json")
    return ["evaluation.score", "--answers", str(root / "answers.json"), "--output", str(root / "out")]


PREDICTION = r"predictions\.jsonl:2 is not a prediction \("

RUNS = [
    Fault("text null", run(second(text=None)), PREDICTION + "text: null is not a text"),
    Fault("parsed a number", run(second(parsed=1)), PREDICTION + "parsed: 1 is not a text"),
    Fault("options a list", run(second(options=[])), PREDICTION + r"options: \[\] is not an object"),
    Fault(
        "probabilities texts", run(second(probabilities={"A": "x"})), PREDICTION + "probabilities: .* is not a number"
    ),
    Fault("probabilities NaN", run(second(probabilities={"A": float("nan")})), PREDICTION + "probabilities: NaN"),
    Fault("image out", run(second(image="../../outside/secret.png")), PREDICTION + "image: .* not a path in the root"),
    Fault("image absolute", run(second(image="/etc/hostname")), PREDICTION + "image: .* not a path in the root"),
    Fault("run deep", run(run_json=DEEP.encode()), r"run\.json is not JSON \(it is nested too deeply\)"),
    Fault("run a list", run(run_json=b"[]"), r"run\.json is not JSON \(it holds a list, not an object\)"),
    Fault("predictions not UTF-8", run(predictions_jsonl=b"\xff\n{}\n"), r"predictions\.jsonl:1 is not a prediction"),
    Fault("predictions half", run(predictions_jsonl=b'{"case": "1"'), r"predictions\.jsonl:1 is not a prediction"),
    Fault("answers deep", answers(DEEP), r"answers\.json is not JSON \(it is nested too deeply\)"),
    Fault("answers surrogate", answers(f"[{SURROGATE}]"), "an unpaired surrogate"),
    Fault("answers a number", answers("[3]"), "row 1: not an object"),
    Fault("answers huge", answers(f"[{HUGE}]"), "a number has 5000 digits"),
    Fault("answers pipe", piped_answers, "there is no answer file"),
]

FAULTS = [*IMAGES, *LISTS, *CONFIGS, *KNOWLEDGE, *DATASETS, *QUESTIONS, *RUNS]
