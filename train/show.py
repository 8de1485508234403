"""Print one row of each role as the model will see it, trained tokens marked: `python -m train.show --dataset DIR`."""

from __future__ import annotations

import sys
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

    dataset: str = field(metadata={"help": "A dataset folder, made by `python -m data_prep.build`."})
    model_name_or_path: str = field(
        default="recipes/tiny/echo-tiny",
        metadata={"help": "Whose tokenizer and chat template: a folder or a hub name."},
    )
    min_pixels: int = field(default=12544, metadata={"help": "Fewest pixels of an image."})
    max_pixels: int = field(default=28224, metadata={"help": "Most pixels of an image."})
    row: int = field(default=0, metadata={"help": "Which row of each role's train.jsonl, from 0."})


def main(argv: list[str]) -> None:
    """One block a role: images, tokens, text with the trained tokens in [[...]], green on a terminal."""
    (config,) = configs.parse([ShowConfig], argv)

    dataset = load_dataset(Path(config.dataset))
    row_builder = RowBuilder(load_processor(config.model_name_or_path, None, config.min_pixels, config.max_pixels))
    marks = ("\033[32m[[", "]]\033[0m") if sys.stdout.isatty() else ("[[", "]]")
    for role in ROLES:
        path = dataset.folder / "sft" / role / "train.jsonl"
        exchange = next(islice(read_jsonl(path, Exchange), config.row, None), None)
        if exchange is None:
            raise EchoError(f"{path} has no row {config.row}; give a smaller --row")
        row = row_builder.load_row(exchange, dataset.root)
        trained = int((row.labels != IGNORED).sum())
        print(f"=== {role}, case {exchange.case}: {len(exchange.images)} images, {row.prefix_length} shared tokens,")
        print(f"    {len(exchange.branches)} branches, {len(row.input_ids)} tokens, {trained} of them trained on")
        print("\n".join(f"    image: {dataset.root / image}" for image in exchange.images))
        print(mark_trained(row, row_builder, *marks))


if __name__ == "__main__":
    configs.run_main(main)
