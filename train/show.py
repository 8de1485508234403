"""Print one row per role as the model sees it, with trained tokens marked: `python -m train.show --dataset DIR`."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from echo_ft import config as configs
from echo_ft.data.dataset import load_dataset
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl
from echo_ft.model.loading import load_processor
from echo_ft.model.rows import IGNORED, RowBuilder, mark_trained
from echo_ft.records import ROLES, Exchange


@dataclass(frozen=True)
class ShowConfig:
    """Options of `python -m train.show`."""

    dataset: str = field(metadata={"help": "Dataset folder, made by `python -m data_prep.build`."})
    model_name_or_path: str = field(
        default="recipes/tiny/echo-tiny",
        metadata={"help": "Model that provides the tokenizer and the chat template: a folder or a hub name."},
    )
    min_pixels: int = field(default=12544, metadata={"help": "Minimum number of pixels of a resized image."})
    max_pixels: int = field(default=28224, metadata={"help": "Maximum number of pixels of a resized image."})
    row: int = field(default=0, metadata={"help": "Index (from 0) of the row in each role's train.jsonl."})


def main(argv: list[str]) -> None:
    """Print one block per role: images, token counts and text with trained tokens in [[...]]."""
    (config,) = configs.parse([ShowConfig], argv)
    if config.row < 0:
        raise EchoError(f"row is {config.row}; rows are numbered from 0")
    dataset = load_dataset(Path(config.dataset))
    row_builder = RowBuilder(load_processor(config.model_name_or_path, None, config.min_pixels, config.max_pixels))
    for role in ROLES:
        path = dataset.folder / "sft" / role / "train.jsonl"
        exchange = next(islice(read_jsonl(path, Exchange), config.row, None), None)
        if exchange is None:
            raise EchoError(f"{path} has no row {config.row}; give a smaller --row")
        row = row_builder.load_row(exchange, dataset.root)
        trained = int((row.labels != IGNORED).sum())
        print(f"=== {role}, case {exchange.case}: {len(exchange.images)} images, {row.prefix_length} shared tokens,")
        print(f"    {len(exchange.branches)} branches, {len(row.input_ids)} tokens, {trained} of them trained")
        print("\n".join(f"    image: {dataset.root / image}" for image in exchange.images))
        print(mark_trained(row, row_builder))


if __name__ == "__main__":
    configs.run_main(main)
