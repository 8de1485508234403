"""Rows of the table that need a dataset, a checkpoint, a run or an export, and rows whose result is checked too."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from echo_ft.data.dataset import load_dataset
from echo_ft.files import read_jsonl
from echo_ft.images.decode import TURNS, load_image, size_and_orientation
from echo_ft.images.masks import load_mask
from echo_ft.inference.run_folder import ROW_DIGESTS
from echo_ft.provenance import row_digests
from echo_ft.records import Inspection
from tests.conftest import ECHO_TINY
from tests.faults.fields import ANSWER
from tests.faults.folders import (
    CARD,
    CONFIG,
    Change,
    content,
    cut,
    evaluated,
    flipped,
    four_adapters,
    gone,
    json_file,
    kept,
    planned,
    small_dataset,
)
from tests.faults.inputs import Arguments, Fault, answers, build, frames, listed, picture, run, second
from tests.support import folder_layouts
from tests.support.training import SAME_TRAINING, run_in_process, tiny_options

# Images as people see them


def among_others(write: Callable[[Path], object], *options: str, **cells: Any) -> Callable[[Path], Arguments]:
    """A list with a normal image for training, and an odd image in the test split."""

    def make(root: Path) -> Arguments:
        picture(root / "raw" / "normal.png", seed=1)
        write(root / "raw" / "odd.png")
        rows = [
            {"image": "normal.png", "product": "cap", "condition": "good", "split": "train"},
            {"image": "odd.png", "product": "cap", "condition": "dent", "split": "test", **cells},
        ]
        (root / "raw" / "parts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [*build(root, source="manifest", annotations=root / "raw" / "parts.jsonl"), *options]

    return make


def odd_record(root: Path) -> tuple[Path, Inspection]:
    """The root of the images, and the record of the odd one."""
    data = load_dataset(root / "out")
    (one,) = (one for one in read_jsonl(data.folder / "inspections.jsonl", Inspection) if one.split == "test")
    return data.root, one


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


def shown(values: Any, orientation: int) -> np.ndarray:
    """The values (height, width, ...) as viewers show them."""
    return np.asarray(Image.fromarray(values).transpose(TURNS[orientation]))


def deep(colours: bool) -> np.ndarray:
    """An image from a camera of 12 bits."""
    return np.random.default_rng(0).integers(0, 4096, (32, 48, 3) if colours else (32, 48), dtype=np.uint16)


def write_deep(path: Path, colours: bool, orientation: int) -> None:
    import cv2

    encoded = cv2.imencode(".png", deep(colours)[..., ::-1] if colours else deep(colours))[1].tobytes()
    tags = exif(orientation).tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(tags)) + b"eXIf" + tags + struct.pack(">I", zlib.crc32(b"eXIf" + tags))
    path.write_bytes(encoded[:33] + chunk + encoded[33:])  # after the header of 33 bytes


def upright(values: Callable[[], Any], orientation: int) -> Callable[[Path], None]:
    """Check that the odd image is read as viewers show these values."""

    def check(root: Path) -> None:
        folder, one = odd_record(root)
        expected = shown(values(), orientation)
        found = np.asarray(load_image(folder / one.image, "RGB" if expected.ndim == 3 else "L"))
        np.testing.assert_array_equal(found, expected)

    return check


def plain() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)  # as `picture` draws it


def scaled(colours: bool) -> np.ndarray:
    return np.rint(deep(colours) * (255 / 4095)).astype(np.uint8)


def masked(orientation: int) -> Callable[[Path], None]:
    """An image with this orientation, and a mask of the stored size."""

    def write(path: Path) -> None:
        picture(path, exif=exif(orientation))
        drawn_mask().save(path.with_name("m.png"))

    return write


def drawn_mask() -> Image.Image:
    marks = np.zeros((32, 48), np.uint8)
    marks[4:10, 5:12] = 255
    return Image.fromarray(marks)


def mask_follows(root: Path) -> None:
    folder, one = odd_record(root)
    expected = shown(np.asarray(drawn_mask()), 6) > 0
    np.testing.assert_array_equal(load_mask(one, folder, *size_and_orientation(folder / one.image)), expected)


def mask_is_left_out(root: Path) -> None:
    assert odd_record(root)[1].mask is None


def first_frame(root: Path) -> None:
    folder, one = odd_record(root)
    assert one.image == "odd.png#frame=0"
    np.testing.assert_array_equal(np.asarray(load_image(folder / one.image)), plain())


def with_options(make: Callable[[Path], Arguments], *options: str) -> Callable[[Path], Arguments]:
    return lambda root: [*make(root), *options]


TURNED = "1 images have an EXIF orientation and are turned upright by it"


def images() -> Iterator[Fault]:
    for one in (2, 3, 6):
        yield Fault(
            f"EXIF orientation {one}", among_others(lambda path, one=one: picture(path, exif=exif(one))), TURNED, 0,
            upright(plain, one),
        )  # fmt: skip
        for colours in (False, True):
            yield Fault(
                f"12 bits in {'colour' if colours else 'grey'}, EXIF orientation {one}",
                among_others(lambda path, one=one, colours=colours: write_deep(path, colours, one)), TURNED, 0,
                upright(lambda colours=colours: scaled(colours), one),
            )  # fmt: skip
    yield Fault("EXIF 6, mask as stored", among_others(masked(6), mask="m.png"), TURNED, 0, mask_follows)
    either = r"1 mask dropped .*; see rejected\.jsonl\n  first: odd\.png: .* may be drawn on either view"
    yield Fault("EXIF 3, mask of either view", among_others(masked(3), mask="m.png"), either, 0, mask_is_left_out)
    yield Fault("frame chosen", among_others(frames, "--frame", "0"), "0 rejected", 0, first_frame)
    for value, says in (("9", r"odd\.tif#frame=9: the file has no frame 9"), ("-1", "frame is -1; set a value from 0")):
        yield Fault(f"frame {value}", with_options(listed(frames, "odd.tif"), "--frame", value), says)


def empty_product(root: Path) -> Arguments:
    folder_layouts.mvtec_ad(root)
    (root / "mvtec_anomaly_detection" / "nut" / "train" / "good").mkdir(parents=True)
    return build(root, source="folder", root=root / "mvtec_anomaly_detection")


NO_IMAGE = r"1 rejected; see rejected\.jsonl\n  first: nut: folder ignored \(files: 0\): it has no image"


# Answers and runs

LONG = f"A x{' ' * 200_000}y"
REPEATED = [ANSWER, {**ANSWER, "gpt_answer": "B"}]


def finished_run(change: Change) -> Callable[[Path], Arguments]:
    """A run that has ended, and a change after its end."""

    def make(root: Path) -> Arguments:
        arguments = run()(root)
        folder = root / "run"
        (folder / "traces.jsonl").write_text("".join(json.dumps({"case": name}) + "\n" for name in "abcdefgh"))
        json_file("run.json", **{ROW_DIGESTS: row_digests(folder, ("predictions.jsonl", "traces.jsonl"))})(folder)
        change(folder)
        return arguments

    return make


def replaced(name: str, before: str, after: str) -> Change:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert before in text
        (folder / name).write_text(text.replace(before, after))

    return change


RUNS = {
    "parsed turned": (replaced("predictions.jsonl", '"parsed": "', '"parsed": "x'), "predictions"),
    "traces half": (cut("traces.jsonl"), "traces"),
    "trace a number": (replaced("traces.jsonl", '"a"', "3"), "traces"),
    "digests of another type": (json_file("run.json", **{ROW_DIGESTS: 3}), None),
}


def runs() -> Iterator[Fault]:
    for name, (change, file) in RUNS.items():
        says = rf"{file}\.jsonl has changed since the run ended" if file else r"run\.json has no usable digests"
        yield Fault(f"finished run {name}", finished_run(change), says)


def _report_folder(root: Path) -> Arguments:
    arguments = run()(root)
    (root / "run" / "report.json").mkdir()
    return arguments


# Datasets that a build has written


@cache
def built_dataset() -> Path:
    from data_prep.build import main

    main(build(kept("built"), source="synthetic", parts=8)[1:])
    return kept("built") / "out"


def lines(name: str, change: Callable[[list[str]], list[str]]) -> Change:
    def change_lines(folder: Path) -> None:
        before = (folder / name).read_text().splitlines(keepends=True)
        after = change(before)
        assert after != before
        (folder / name).write_text("".join(after))

    return change_lines


def without_fingerprint(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["images_fingerprint"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


ROWS = "sft/decision_maker/train.jsonl"
BUILT: dict[str, tuple[str, Change, str]] = {
    "answers turned": (
        "run", lines("questions.jsonl", lambda rows: [row.replace('"answer": "B"', '"answer": "A"') for row in rows]),
        r"questions\.jsonl has changed",
    ),
    "manifest without images": ("audit", without_fingerprint, r"manifest\.json has changed"),
    "references gone": ("audit", gone("references.jsonl"), r"references\.jsonl is missing"),
    "half of the rows": ("train", lines(ROWS, lambda rows: rows[: len(rows) // 2]), r"train\.jsonl has changed"),
    "completions turned": (
        "train", lines(ROWS, lambda rows: [row.replace('"completion": "B"', '"completion": "A"') for row in rows]),
        r"train\.jsonl has changed",
    ),
}  # fmt: skip


def built() -> Iterator[Fault]:
    def made(command: str, change: Change) -> Callable[[Path], Arguments]:
        def make(root: Path) -> Arguments:
            folder = root / "data"
            shutil.copytree(built_dataset(), folder)
            change(folder)
            if command == "audit":
                return ["data_prep.audit", str(folder)]
            return evaluated(root, ECHO_TINY, folder) if command == "run" else planned(root, folder)

        return make

    for name, (command, change, says) in BUILT.items():
        yield Fault(f"built {name}", made(command, change), f"{says} since the dataset was built")


# Training


def without_completions(rows: list[str]) -> list[str]:
    found = [json.loads(row) for row in rows]
    return [
        json.dumps({**row, "branches": [{**branch, "completion": None} for branch in row["branches"]]}) + "\n"
        for row in found
    ]


def noise(folder: Path) -> None:
    for seed, path in enumerate(sorted((folder / "images").rglob("*.png"))):
        picture(path, seed)


def trained_on(change: Change, *options: str) -> Callable[[Path], Arguments]:
    def make(root: Path) -> Arguments:
        shutil.copytree(small_dataset(), root / "data")
        change(root / "data")
        arguments = planned(root, root / "data")
        return [*arguments, *options] if not options else [*arguments[:-1], *options]

    return make


@cache
def checkpoint() -> Path:
    output = kept("trained")
    options = [*SAME_TRAINING, "--max_steps", 1, "--save_strategy", "steps", "--save_steps", 1]
    run_in_process(*tiny_options("decision_maker", small_dataset(), output, *options))
    return output / "checkpoint-1"


CHECKPOINTS: dict[str, tuple[Change, str]] = {
    "optimizer gone": (gone("optimizer.pt"), r"optimizer\.pt is missing"),
    "optimizer cut": (cut("optimizer.pt"), r"optimizer\.pt has changed"),
    "optimizer flipped": (flipped("optimizer.pt"), r"optimizer\.pt has changed"),
    "adapter flipped": (flipped("adapter_model.safetensors"), r"adapter_model\.safetensors has changed"),
    "state of text": (content("trainer_state.json", "x"), r"trainer_state\.json has changed"),
}


def checkpoints() -> Iterator[Fault]:
    def made(change: Change) -> Callable[[Path], Arguments]:
        def make(root: Path) -> Arguments:
            folder = root / "out" / "checkpoint-1"
            shutil.copytree(checkpoint(), folder)
            change(folder)
            options = [*SAME_TRAINING, "--max_steps", 2, "--resume_from_checkpoint", folder]
            return ["train.sft", *map(str, tiny_options("decision_maker", small_dataset(), root / "out", *options))]

        return make

    for name, (change, says) in CHECKPOINTS.items():
        yield Fault(f"checkpoint {name}", made(change), f"{says} since it was saved; give another checkpoint")


# Models that other commands load, and exports


def with_code(*arguments: str) -> Callable[[Path], Arguments]:
    def make(root: Path) -> Arguments:
        shutil.copytree(ECHO_TINY, root / "model")
        (root / "model" / "evil.py").write_text(f"open({str(root / 'pwned')!r}, 'w')")
        json_file(CONFIG, model_type="evil", auto_map={"AutoConfig": "evil.Evil"})(root / "model")
        command, *more = arguments or planned(root, small_dataset())
        return [command, *more, "--model_name_or_path", str(root / "model")]

    return make


MEMORY = ("train.memory", "--config", "recipes/tiny/decision_maker.yaml")
CODE = "has the key 'auto_map', which loads code"


def exported(base: Callable[[Path], str]) -> Callable[[Path], Arguments]:
    """The export of adapters whose cards name this base model."""

    def make(root: Path) -> Arguments:
        shutil.copytree(four_adapters(), root / "adapters")
        for folder in (root / "adapters").iterdir():
            json_file(CARD, base_model=base(root))(folder)
            (folder / "SHA256SUMS").unlink()
        return [
            "train.export", "--adapters", str(root / "adapters"), "--output", str(root / "out"), "--references", "none",
        ]  # fmt: skip

    return make


COMMAND = "$(touch pwned)/x"


def odd_folder(root: Path) -> str:
    folder = root / "a b; touch pwned; #$(id)"
    shutil.copytree(ECHO_TINY, folder, dirs_exist_ok=True)
    return str(folder)


def serving_command_is_quoted(root: Path) -> None:
    text = (root / "out" / "README.md").read_text()
    command = text[text.index("vllm serve") :].split("```")[0].replace("\\\n", " ")
    assert shlex.split(command)[:3] == ["vllm", "serve", str(root / "a b; touch pwned; #$(id)")]


# Configs


def unwritable(root: Path) -> Arguments:
    (root / "c.yaml").write_text('source: synthetic\noutput: "a\\0b"\n')
    return ["data_prep.build", "--config", str(root / "c.yaml")]


def changed_index(root: Path) -> Arguments:
    from data_prep.build import main

    folder_layouts.mvtec_ad(root)
    options = {"source": "folder", "root": root / "mvtec_anomaly_detection", "cache": root / "cache", "index": "hnsw"}
    for seed, path in enumerate(options["root"].rglob("good/*.png")):
        picture(path, seed)
    main(build(root, **options)[1:])
    shutil.rmtree(root / "out")
    indexes = [path for path in (root / "cache").rglob("*") if path.is_file() and path.suffix not in (".npz", ".lock")]
    assert indexes
    for path in indexes:
        flipped(path.name)(path.parent)
    return build(root, **options)


def nothing_ran(root: Path) -> None:
    assert not (root / "pwned").exists() and not Path("pwned").exists()


OUTCOMES = [
    *images(), *runs(), *built(), *checkpoints(),
    Fault("empty product", empty_product, NO_IMAGE, 0),
    Fault("answers repeated", answers(json.dumps(REPEATED)), r"1 questions have several answers, which all count", 0),
    Fault("kind with an escape", run(second(kind="\x1b[2Jx")), r"\\x1b\[2Jx", 0),
    Fault("gate too small", with_options(run(), "--gate", "escapes<=1e-320"), "no run has enough parts to show that"),
    Fault("report a folder", _report_folder, r"report\.json.*: Is a directory; check the path"),
    Fault("answers long", answers(json.dumps([{**ANSWER, "gpt_answer": LONG}])), r"\b1 unparsed answers", 0),
    Fault("training no completions", trained_on(lines(ROWS, without_completions)), "is a row without a completion"),
    Fault(
        "training on noise", trained_on(noise, "--max_steps", "1", "--use_cpu", "true", "--eval_strategy", "no"),
        "has changed since the dataset was built; restore it or rebuild the dataset",
    ),
    Fault("code in train.memory", with_code(*MEMORY), CODE, 2, nothing_ran),
    Fault("code in train.sft", with_code(), CODE, 2, nothing_ran),
    Fault("export of a base by command", exported(lambda _: COMMAND), re.escape(COMMAND), 2, nothing_ran),
    Fault("export of a base in an odd folder", exported(odd_folder), "done: ", 0, serving_command_is_quoted),
    Fault("config output NUL", unwritable, "output has a NUL character"),
    Fault("run huge budget", lambda root: [*evaluated(root), "--max_pixels", str(10**15)], "done: ", 0),
    Fault("index changed", changed_index, "the index .* has changed since it was written; delete it"),
]  # fmt: skip
"""Every row of this file."""
