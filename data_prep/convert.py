"""Convert the training rows of a dataset for other trainers, one row per question.

    python -m data_prep.convert --dataset data/parts --format trl|llamafactory|ms_swift --output FOLDER

Writes `<role>/<split>.parquet` for TRL, `<role>/<split>.jsonl` and `dataset_info.json` for LLaMA-Factory, or
`<role>/<split>.jsonl` for ms-swift, and a manifest.json that records the source of the rows. Rows refer to images by
absolute path. Images stay in place unless some library would read them differently from `echo_ft.images.decode`. Such
images are copied to `images/` in 8 bits.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from echo_ft.config import parse, run_main
from echo_ft.data.dataset import Dataset, load_dataset, require_unchanged
from echo_ft.data.export_rows import SHAREGPT, message_rows, prompt_completion_rows
from echo_ft.errors import EchoError
from echo_ft.files import atomic_folder, read_jsonl, write_json
from echo_ft.images.decode import READ_ERRORS, is_deep, load_image, open_image, orientation
from echo_ft.inputs import split_frame
from echo_ft.provenance import commit, versions
from echo_ft.records import ROLES, Exchange
from echo_ft.terminal import progress

PORTABLE_MODES = ("RGB", "L")
"""Pillow modes that every library converts to the same RGB pixels."""

ROWS_PER_GROUP = 1000
"""Rows per row group in a Parquet file."""

USAGE = {
    "trl": "datasets.load_dataset({folder!r}); set SFTConfig(max_length=None), because TRL truncates at 1,024 tokens",
    "llamafactory": "dataset_dir: {parent}, dataset: {role}_train, template: qwen2_vl, cutoff_len longer than any row",
    "ms_swift": "swift sft --template qwen2_vl --dataset {folder}/train.jsonl",
}
"""How to load the rows of a role in each trainer."""


@dataclass(frozen=True)
class ConvertConfig:
    """Options of `python -m data_prep.convert`."""

    dataset: Path = field(metadata={"help": "Dataset folder, made by `python -m data_prep.build`."})
    format: Literal["trl", "llamafactory", "ms_swift"] = field(
        metadata={"help": "Conversational Parquet, ShareGPT with dataset_info.json, or messages as JSON lines."}
    )
    output: Path = field(metadata={"help": "Folder to write; it must be new or empty."})


def main(argv: list[str]) -> None:
    """Convert the rows, then print how many there are and how to use them."""
    (config,) = parse([ConvertConfig], argv)
    counts = convert(load_dataset(config.dataset), config.format, config.output)
    for name, count in counts.items():
        print(f"{name:<32} {count:>8} rows" + ("" if count else ", so no file"))
    role = next((name.split("/")[0] for name, count in counts.items() if count), None)
    if role:
        folder = config.output.resolve()
        print(f"usage: {USAGE[config.format].format(folder=str(folder / role), parent=folder, role=role)}")


def convert(dataset: Dataset, row_format: str, output: Path) -> dict[str, int]:
    """Write the rows of every role and split into a new folder, completely or not at all.

    Returns the number of rows of each `<role>/<split>`. Raises EchoError if the folder is not empty or its path is a
    pattern. Also raises it if an image cannot be read or has changed since the build, or if any text contains a special
    token of a trainer.
    """
    target = str(output.resolve())
    if glob.escape(target) != target:  # datasets (5.2) would read the folder rows2 for the path rows[2]
        raise EchoError(
            f"the trainers load rows with the library datasets, which reads the path {target} as a pattern and may "
            "find other rows; choose an output without *, ? and [ in its path"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise EchoError(f"{output} already exists; choose another output or remove it")
    counts: dict[str, int] = {}
    with atomic_folder(output) as folder:
        paths = ImagePaths(dataset.root, folder / "images", output.resolve() / "images")
        for role in ROLES:
            for split in ("train", "validation"):
                path = dataset.folder / "sft" / role / f"{split}.jsonl"
                exchanges = progress(read_jsonl(path, Exchange), f"{role}, {split}", "cases")
                counts[f"{role}/{split}"] = _write_rows(exchanges, paths, row_format, folder / role / split)
        if row_format == "llamafactory":
            write_json(folder / "dataset_info.json", _dataset_info(counts))
        require_unchanged(dataset, paths.resolved)
        write_json(folder / "manifest.json", _manifest(dataset, row_format, counts))
    return counts


class ImagePaths:
    """Absolute image paths for other libraries. An image that they may misread is copied as 8-bit RGB."""

    def __init__(self, root: Path, copies: Path, final_copies: Path) -> None:
        """Image names are relative to `root`. Copies are written to `copies`, later renamed to `final_copies`."""
        self.root, self.copies, self.final_copies = root, copies, final_copies
        self.resolved: dict[str, str] = {}
        """Maps the name of each image to its absolute path."""

    def resolve(self, name: str) -> str:
        """Return the absolute path of an image. Raises EchoError if it cannot be read."""
        if name not in self.resolved:
            self.resolved[name] = self._resolve(name)
        return self.resolved[name]

    def _resolve(self, name: str) -> str:
        if is_portable(self.root / name):
            return str(self.root / name)
        copy = f"{name}.png"  # this keeps the old suffix, because part.tif and part.png may both exist
        (self.copies / copy).parent.mkdir(parents=True, exist_ok=True)
        load_image(self.root / name).save(self.copies / copy)
        return str(self.final_copies / copy)


def is_portable(path: Path) -> bool:
    """Return whether every library reads the same 8-bit pixels from an image.

    Pillow clips 16-bit values. Some libraries drop transparency, whereas others blend it. `datasets` rotates an image
    according to its EXIF orientation but leaves its mask unchanged. No library reads the path of a frame.
    """
    if split_frame(path)[1] is not None:
        return False
    try:
        with open_image(path) as image:
            return image.mode in PORTABLE_MODES and orientation(image) == 1 and not is_deep(image)
    except READ_ERRORS:
        return False  # `load_image` reports what is wrong with the file


def _write_rows(exchanges: Iterable[Exchange], paths: ImagePaths, row_format: str, path: Path) -> int:
    """Write one file of rows, or no file if there are no rows. Returns the number of rows."""
    convert_exchange = prompt_completion_rows if row_format == "trl" else message_rows
    rows = (
        row
        for exchange in exchanges
        for row in convert_exchange(exchange, [paths.resolve(name) for name in exchange.images])
    )
    path.parent.mkdir(exist_ok=True)
    target = path.with_suffix(".parquet" if row_format == "trl" else ".jsonl")
    count = write_parquet(target, rows) if row_format == "trl" else _write_lines(target, rows)
    if not count:  # the libraries fail on an empty file
        target.unlink()
    return count


def write_parquet(path: Path, rows: Iterator[Mapping[str, Any]]) -> int:
    """Write rows for TRL in constant memory, with images as paths that `datasets` opens. Returns the number of rows."""
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


def _manifest(dataset: Dataset, row_format: str, counts: Mapping[str, int]) -> dict[str, Any]:
    """Return the source of the rows and the versions that converted them."""
    return {
        "format": row_format,
        "dataset": str(dataset.folder.resolve()),
        "dataset_fingerprint": dataset.fingerprint,
        "prompt_version": dataset.manifest["prompt_version"],
        "rows": counts,
        "synthetic": dataset.manifest.get("counts", {}).get("synthetic", {}),
        "versions": versions(),
        "commit": commit(),
    }


def _dataset_info(counts: Mapping[str, int]) -> dict[str, Any]:
    """Return LLaMA-Factory's dataset_info.json, with a dataset `<role>_<split>` for each file."""
    names = [name for name, count in counts.items() if count]
    return {name.replace("/", "_"): {"file_name": f"{name}.jsonl", **SHAREGPT} for name in names}


if __name__ == "__main__":
    run_main(main)
