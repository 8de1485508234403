"""Training cases of one role or of all, loaded from sft/<role>/<split>.jsonl."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from trl import SFTConfig

from echo_ft.data.dataset import Dataset
from echo_ft.errors import EchoError
from echo_ft.experts.roles import PROMPT_VERSION
from echo_ft.files import read_jsonl, write_jsonl
from echo_ft.images.corruptions import draw_corruption
from echo_ft.inputs import lines, open_text
from echo_ft.model.rows import RowBuilder
from echo_ft.records import Exchange
from echo_ft.strict_yaml import read_json
from echo_ft.terminal import LOGGER
from echo_ft.training.config import EchoConfig, adapter_folder, trained_roles
from echo_ft.training.planning import Plan, case_starts, case_work, join_plans, plan

TEXT = pa.large_string()
"""Strings with 64-bit offsets: a column may exceed the 2 GiB that ordinary Arrow strings can address."""

EXCHANGE_SCHEMA = pa.schema(
    {
        "role": TEXT,
        "case": TEXT,
        "images": pa.list_(TEXT),
        "context": TEXT,
        "branches": pa.list_(pa.struct({"id": TEXT, "prompt": TEXT, "completion": TEXT})),
        "prompt_version": TEXT,
    }
)
"""Arrow types of the fields of `Exchange`."""

ROWS_PER_BATCH = 1000
"""Number of rows that are converted to Arrow together."""


def load_training_cases(
    row_builder: RowBuilder, dataset: Dataset, config: EchoConfig, sft: SFTConfig, split: str
) -> tuple[datasets.Dataset, Plan]:
    """Return the usable cases of one split, and their plan.

    Unusable rows go to rejected_<split>.jsonl beside the adapter.

    Raises EchoError if the split has no usable row of a trained role.
    """
    roles = trained_roles(config)
    plans = [_plan_role(row_builder, dataset, config, sft, split, role) for role in roles]
    tables = [
        read_exchanges(dataset.folder / "sft" / role / f"{split}.jsonl", {row.index for row in planned.rows})
        for role, planned in zip(roles, plans, strict=True)
    ]
    planned, exchanges = plans[0], tables[0]
    if len(roles) > 1:
        planned, order = join_plans(plans)
        exchanges = pa.concat_tables(tables).combine_chunks().take(order)
    tokens = [case_work(case).tokens for case in planned.cases()]
    cases = group_by_case(exchanges, planned.starts).add_column(sft.length_column_name, tokens)
    if split == "train" and config.shuffle_options:
        cases = cases.add_column("options_seed", [sft.seed] * len(cases))
    if split == "train" and config.corrupted_share:
        drawn = [draw_corruption(case[0].case, config.corrupted_share, sft.seed) for case in planned.cases()]
        if sft.process_index == 0:
            corrupted = sum(corruption is not None for corruption in drawn)
            LOGGER.info("%s, %s: %d of %d cases have a corrupted query", config.role, split, corrupted, len(drawn))
        column = [None if corruption is None else asdict(corruption) for corruption in drawn]
        cases = cases.add_column("corruption", column)
    return cases, planned


def _plan_role(
    row_builder: RowBuilder, dataset: Dataset, config: EchoConfig, sft: SFTConfig, split: str, role: str
) -> Plan:
    """Plan and report the rows of one role. Raises EchoError if none is usable."""
    path = dataset.folder / "sft" / role / f"{split}.jsonl"
    if not path.is_file():
        raise EchoError(f"there is no {path}; rebuild the dataset with data_prep.build")
    planned = plan(row_builder, _read_rows(path, role), dataset.root, config.max_tokens, config.adapt_from)
    if sft.process_index == 0:
        if not config.dry_run:
            folder = adapter_folder(config, Path(str(sft.output_dir)), role)
            folder.mkdir(parents=True, exist_ok=True)
            write_jsonl(folder / f"rejected_{split}.jsonl", planned.rejected)
        LOGGER.info("%s, %s: %s", role, split, planned.summary())
        for rejection in planned.rejected[:3]:
            LOGGER.info("  rejected: %s: %s", rejection.item, rejection.reason)
        if warning := planned.long_completions():
            LOGGER.warning("%s, %s: %s", role, split, warning)
    if not planned.rows:
        if planned.rejected:
            raise EchoError(f"{path} has no usable row: {planned.rejected[0].reason}")
        remedy = (
            "build the dataset with a larger share in `fractions` (and with `--split seeded` if the source gives the "
            "splits), or add images if there are too few"
        )
        raise EchoError(f"{path} is empty; {remedy}" + (', or set eval_strategy: "no"' if split != "train" else ""))
    return planned


def _read_rows(path: Path, role: str) -> Iterator[Exchange]:
    """Yield the rows of a file. Raises EchoError for one that is not a training row of the role."""
    for number, row in enumerate(read_jsonl(path, Exchange), start=1):
        fault = (
            f"for the role {row.role}" if row.role != role
            else f"with the prompt version {row.prompt_version}" if row.prompt_version != PROMPT_VERSION
            else "without branches" if not row.branches
            else "without a completion" if not all(branch.completion for branch in row.branches)
            else None
        )  # fmt: skip
        if fault:
            raise EchoError(f"{path}:{number} is a row {fault}, so {role} cannot learn from it; rebuild the dataset")
        yield row


def read_exchanges(path: Path, indices: Collection[int]) -> pa.Table:
    """Read the rows with these indices from a file of valid exchanges.

    The package datasets (5.2) would treat the path as a pattern, so it would read `parts2` for `parts[2]`. It would
    also keep a copy of all rows in its cache.
    """
    batches = []
    with open_text(path) as file:
        chosen = (line for index, line in enumerate(lines(file)) if index in indices)
        rows = (read_json(line, unique_keys=False) for line in chosen)
        while chunk := list(islice(rows, ROWS_PER_BATCH)):
            batches.append(pa.RecordBatch.from_pylist(chunk, EXCHANGE_SCHEMA))
    return pa.Table.from_batches(batches, EXCHANGE_SCHEMA)


def group_by_case(exchanges: pa.Table, starts: Sequence[int] | None = None) -> datasets.Dataset:
    """Return one row per case. Its field `exchanges` lists the adjacent exchanges of the case (EXCHANGE_SCHEMA).

    `starts` has the index of the first exchange of each case, and their number; by default, that of `case_starts`.
    A training step takes whole cases, because the exchanges of a case share their images. TRL (1.16) accepts only this
    class of dataset. The rows stay in Arrow.
    """
    if starts is None:
        first_ids = pc.struct_field(pc.list_element(exchanges["branches"], 0), "id").to_pylist()
        starts = case_starts(zip(exchanges["case"].to_pylist(), first_ids, strict=True))
    rows = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), exchanges.to_struct_array().combine_chunks())
    return datasets.Dataset(pa.table({"exchanges": rows}))


def pad_cases(cases: datasets.Dataset, multiple: int, tokens: str) -> datasets.Dataset:
    """Return `cases`, followed by copies of the first one without completions, up to a multiple of `multiple` cases.

    All processes must take the same number of batches. accelerate (1.15) repeats cases for this, and the repeated cases
    would count twice. A case without completions has no trained tokens and adds nothing to the loss. `tokens` is the
    column with the number of tokens of each case. It is 0 for the copies.
    """
    missing = -len(cases) % multiple
    if not missing:
        return cases
    empty = {**cases[0], tokens: 0}
    for branch in (branch for exchange in empty["exchanges"] for branch in exchange["branches"]):
        branch["completion"] = None
    padding = datasets.Dataset.from_list([empty] * missing, features=cases.features)
    return datasets.concatenate_datasets([cases, padding])


def require_a_batch(cases: int, sft: SFTConfig) -> None:
    """Raise EchoError if `dataloader_drop_last` would drop all training cases."""
    batch = sft.per_device_train_batch_size * sft.world_size
    if sft.dataloader_drop_last and cases < batch:
        raise EchoError(
            f"dataloader_drop_last drops all {cases} training cases, because a batch of all processes has {batch}; set "
            "dataloader_drop_last: false, or a smaller per_device_train_batch_size"
        )
