"""The training rows of a dataset for other trainers, a row a question.

    python -m data_prep.convert --dataset data/parts --format trl|llamafactory|ms_swift --output FOLDER

Writes `<role>/<split>.parquet` for TRL, `<role>/<split>.jsonl` and `dataset_info.json` for LLaMA-Factory, and
`<role>/<split>.jsonl` for ms-swift; and manifest.json, which says where the rows come from. Images stay where they are
and are named by their absolute path, but those that not every library would read as `echo_ft.images.decode` does: of these the
folder gets 8-bit copies in `images/`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from PIL import ExifTags, Image

from data_prep.progress import progress
from echo_ft.config import parse, run_main
from echo_ft.data.dataset import Dataset, load_dataset, require_unchanged
from echo_ft.data.export_rows import SHAREGPT, chats, conversations
from echo_ft.errors import EchoError
from echo_ft.files import atomic_folder, read_jsonl, write_json
from echo_ft.images.decode import UNREADABLE, load_image
from echo_ft.provenance import commit, versions
from echo_ft.records import ROLES, Exchange

PLAIN = ("RGB", "L")
"""Pillow's modes that every library turns into the same RGB pixels."""

ROWS_PER_GROUP = 1000
"""Rows of a group in a Parquet file."""

USE = {
    "trl": "datasets.load_dataset({folder!r}); SFTConfig(max_length=None), as TRL would cut rows at 1,024 tokens",
    "llamafactory": "dataset_dir: {parent}, dataset: {role}_train, template: qwen2_vl, cutoff_len above any row",
    "ms_swift": "swift sft --template qwen2_vl --dataset {folder}/train.jsonl",
}
"""How each trainer is told about the rows of a role."""


@dataclass(frozen=True)
class ConvertConfig:
    """Options of `python -m data_prep.convert`."""

    dataset: Path = field(metadata={"help": "a dataset folder, made by python -m data_prep.build"})
    format: Literal["trl", "llamafactory", "ms_swift"] = field(
        metadata={"help": "conversational Parquet, ShareGPT with its dataset_info.json, or messages as JSON lines"}
    )
    output: Path = field(metadata={"help": "folder to write; it must be new or empty"})


def main(argv: list[str]) -> None:
    """Command line: convert, and say what was written and how to use it."""
    (config,) = parse([ConvertConfig], argv)
    counts = convert(load_dataset(config.dataset), config.format, config.output)
    for name, count in counts.items():
        print(f"{name:<32} {count:>8} rows" + ("" if count else ", so no file"))
    role = next((name.split("/")[0] for name, count in counts.items() if count), None)
    if role:
        folder = config.output.resolve()
        print(f"use it: {USE[config.format].format(folder=str(folder / role), parent=folder, role=role)}")


def convert(dataset: Dataset, form: str, output: Path) -> dict[str, int]:
    """Write the rows of every role and split into a new folder, whole or not at all; returns their numbers by file.

    Raises EchoError where the folder holds something, an image cannot be read or is not the one that the dataset was
    built from, or a text holds a token of a trainer.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise EchoError(f"{output} is there already; choose another output or remove it")
    counts: dict[str, int] = {}
    with atomic_folder(output) as folder:
        places = ImagePaths(dataset.root, folder / "images", output.resolve() / "images")
        for role in ROLES:
            for split in ("train", "validation"):
                path = dataset.folder / "sft" / role / f"{split}.jsonl"
                exchanges = progress(read_jsonl(path, Exchange), f"{role}, {split}", "cases")
                counts[f"{role}/{split}"] = _write(exchanges, places, form, folder / role / split)
        if form == "llamafactory":
            write_json(folder / "dataset_info.json", _described(counts))
        require_unchanged(dataset, places.known)
        write_json(folder / "manifest.json", _manifest(dataset, form, counts))
    return counts


class ImagePaths:
    """Where images lie for other libraries: in their own place, or as a copy in a folder of 8-bit RGB."""

    def __init__(self, root: Path, copies: Path, final: Path) -> None:
        self.root, self.copies = root, copies
        self.final = final
        """Where `copies` will lie in the end."""
        self.known: dict[str, str] = {}
        """The absolute paths by the images' names."""

    def of(self, name: str) -> str:
        """The absolute path of an image. Raises EchoError where it cannot be read."""
        if name not in self.known:
            self.known[name] = self._place(name)
        return self.known[name]

    def _place(self, name: str) -> str:
        if plain(self.root / name):
            return str(self.root / name)
        copy = f"{name}.png"  # with the old suffix, as part.tif and part.png may lie side by side
        (self.copies / copy).parent.mkdir(parents=True, exist_ok=True)
        load_image(self.root / name).save(self.copies / copy)
        return str(self.final / copy)


def plain(path: Path) -> bool:
    """Whether every library reads the same 8-bit pixels from an image.

    Pillow clips 16 bits, transparency is dropped by some and painted over by others, and `datasets` turns a photograph
    as its EXIF says, which masks are not.
    """
    try:
        with Image.open(path) as image:
            return image.mode in PLAIN and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except UNREADABLE:
        return False  # `load_image` says what is wrong with it


def _write(exchanges: Iterable[Exchange], places: ImagePaths, form: str, path: Path) -> int:
    """Write one file of rows, or none where there are no rows; returns how many there are."""
    make = conversations if form == "trl" else chats
    rows = (row for exchange in exchanges for row in make(exchange, [places.of(name) for name in exchange.images]))
    path.parent.mkdir(exist_ok=True)
    target = path.with_suffix(".parquet" if form == "trl" else ".jsonl")
    count = write_parquet(target, rows) if form == "trl" else _write_lines(target, rows)
    if not count:  # no library loads an empty file
        target.unlink()
    return count


def write_parquet(path: Path, rows: Iterator[Mapping[str, Any]]) -> int:
    """Write TRL's rows in flat memory, their images as paths that `datasets` opens as images; returns how many."""
    import datasets
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = {"images": [datasets.Image()], "prompt": [message], "completion": [message]}
    schema = datasets.Features(features).arrow_schema
    count = 0
    with ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, ROWS_PER_GROUP)):
            table = [{**row, "images": [{"bytes": None, "path": name} for name in row["images"]]} for row in group]
            writer.write_table(pyarrow.Table.from_pylist(table, schema=schema))
            count += len(group)
    return count


def _write_lines(path: Path, rows: Iterator[Mapping[str, Any]]) -> int:
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _manifest(dataset: Dataset, form: str, counts: Mapping[str, int]) -> dict[str, Any]:
    """What the rows were made from and by."""
    return {
        "format": form,
        "dataset": str(dataset.folder.resolve()),
        "dataset_fingerprint": dataset.fingerprint,
        "prompt_version": dataset.manifest["prompt_version"],
        "rows": counts,
        "synthetic": dataset.manifest.get("counts", {}).get("synthetic", {}),
        "versions": versions(),
        "commit": commit(),
    }


def _described(counts: Mapping[str, int]) -> dict[str, Any]:
    """LLaMA-Factory's dataset_info.json: the datasets `<role>_<split>`."""
    found = [name for name, count in counts.items() if count]
    return {name.replace("/", "_"): {"file_name": f"{name}.jsonl", **SHAREGPT} for name in found}


if __name__ == "__main__":
    run_main(main)
