"""Training cases of one role, loaded from sft/<role>/<split>.jsonl."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import datasets
import pyarrow as pa
from trl import SFTConfig

from echo_ft.data.dataset import Dataset
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl, write_jsonl
from echo_ft.images.corruptions import draw_corruption
from echo_ft.model.rows import RowBuilder
from echo_ft.records import Exchange
from echo_ft.terminal import LOGGER
from echo_ft.training.config import EchoConfig
from echo_ft.training.planning import Plan, case_starts, plan


def load_training_cases(
    row_builder: RowBuilder, dataset: Dataset, config: EchoConfig, sft: SFTConfig, split: str
) -> tuple[datasets.Dataset, Plan]:
    """The usable cases of one split and their plan. Unusable rows go to rejected_<split>.jsonl in output_dir.

    Raises EchoError if the split has no usable row.
    """
    path = dataset.folder / "sft" / config.role / f"{split}.jsonl"
    if not path.is_file():
        raise EchoError(f"there is no {path}; rebuild the dataset with data_prep.build")
    planned = plan(row_builder, read_jsonl(path, Exchange), dataset.root, config.max_tokens)
    if sft.process_index == 0:
        if not config.dry_run:
            write_jsonl(Path(str(sft.output_dir)) / f"rejected_{split}.jsonl", planned.rejected)
        LOGGER.info("%s, %s: %s", config.role, split, planned.summary())
        for rejection in planned.rejected[:3]:
            LOGGER.info("  rejected: %s: %s", rejection.item, rejection.reason)
    if not planned.rows:
        if planned.rejected:
            raise EchoError(f"{path} has no usable row: {planned.rejected[0].reason}")
        remedy = "give the split a larger share in the dataset's `fractions`, or add images if there are too few"
        raise EchoError(f"{path} is empty; {remedy}" + (', or set eval_strategy: "no"' if split != "train" else ""))
    exchanges = datasets.Dataset.from_json(str(path)).select([row.index for row in planned.rows])
    tokens = [sum(row.text.tokens for row in case) for case in planned.cases()]
    cases = group_by_case(exchanges).add_column(sft.length_column_name, tokens)
    if split == "train" and config.corrupted_share:
        drawn = [draw_corruption(case[0].case, config.corrupted_share, sft.seed) for case in planned.cases()]
        if sft.process_index == 0:
            corrupted = sum(corruption is not None for corruption in drawn)
            LOGGER.info("%s, %s: %d of %d cases have a corrupted query", config.role, split, corrupted, len(drawn))
        column = [None if corruption is None else asdict(corruption) for corruption in drawn]
        cases = cases.add_column("corruption", column)
    return cases, planned


def group_by_case(exchanges: datasets.Dataset) -> datasets.Dataset:
    """One row per case, with its adjacent `exchanges` as a list.

    A training step takes whole cases, because the exchanges of a case share their images. TRL (1.16) accepts only this
    class of dataset. The rows stay in Arrow.
    """
    table = exchanges.with_format("arrow")[:]
    first_ids = (branches[0]["id"].as_py() for branches in table["branches"])
    starts = case_starts(zip(table["case"].to_pylist(), first_ids, strict=True))
    # The texts of a column may exceed the 2 GiB that the 32-bit offsets of plain strings can address.
    large = table.cast(pa.schema([field.with_type(_large_strings(field.type)) for field in table.schema]))
    rows = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), large.to_struct_array().combine_chunks())
    return datasets.Dataset(pa.table({"exchanges": rows}))


def _large_strings(kind: pa.DataType) -> pa.DataType:
    """The Arrow type with 64-bit offsets for every string in it."""
    if pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_list(kind):
        return pa.list_(_large_strings(kind.value_type))
    if pa.types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return pa.struct([(field.name, _large_strings(field.type)) for field in fields])
    return kind
