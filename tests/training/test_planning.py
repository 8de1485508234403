"""Before step 1, the plan rejects and names unusable rows, groups cases and finds the largest batch."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest
import torch

from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl, write_jsonl
from echo_ft.model.loading import load_processor
from echo_ft.model.preparation import check_gradients
from echo_ft.model.rows import RowBuilder
from echo_ft.records import MAX_NEW_TOKENS, Exchange
from echo_ft.training.cases import EXCHANGE_SCHEMA, group_by_case
from echo_ft.training.costs.flops import WorkCounts
from echo_ft.training.planning import Plan, PlannedRow, plan
from evaluation.config import RunConfig
from tests.conftest import ECHO_TINY, draw, make_dataset
from tests.support.training import run_in_process, tiny_options


def test_broken_and_missing_images_are_rejected_by_name(tmp_path):
    folder = make_dataset(tmp_path / "data", train=4)
    (folder / "images" / "train_1_2.png").write_bytes(b"no image")
    (folder / "images" / "train_2_2.png").unlink()
    draw(folder / "images" / "train_3_2.png", (1200, 900), 0)
    row_builder = RowBuilder(load_processor(str(ECHO_TINY), None, 784, 28 * 28 * 2000))
    rows = list(read_jsonl(folder / "sft" / "knowledge_guide" / "train.jsonl", Exchange))
    planned = plan(row_builder, rows, folder / "images", max_tokens=1000)
    assert [row.index for row in planned.rows] == [0]
    assert [rejection.item for rejection in planned.rejected] == [f"knowledge_guide train/{i}" for i in (1, 2, 3)]
    assert "train_1_2.png" in planned.rejected[0].reason
    assert "train_2_2.png" in planned.rejected[1].reason
    assert "more than max_tokens 1000" in planned.rejected[2].reason


def test_completions_that_a_run_would_cut_are_reported(tmp_path, row_builder, capsys):
    folder = make_dataset(tmp_path / "data", train=4)
    path = folder / "sft" / "knowledge_guide" / "train.jsonl"
    rows = list(read_jsonl(path, Exchange))

    def with_words(row, count):
        return replace(row, branches=tuple(replace(branch, completion=" a" * count) for branch in row.branches))

    assert plan(row_builder, rows, folder / "images", 32768).long_completions() is None
    fits, cut = (len(row_builder.tokenizer(" a" * count)["input_ids"]) for count in (127, 200))
    changed = [with_words(rows[0], 127), with_words(rows[1], 200), with_words(rows[2], 128), rows[3]]
    planned = plan(row_builder, changed, folder / "images", 32768)
    assert (fits, planned.too_long) == (127, [cut + 1, 129])  # a run generates the token that ends the text, too
    write_jsonl(path, changed)
    run_in_process(*tiny_options("knowledge_guide", folder, tmp_path / "out", "--eval_strategy", "no", "--dry_run"))
    warning = "knowledge_guide, train: 2 completions are longer than the 128 tokens that a run generates by default"
    assert f"{warning}, and the longest has {cut + 1}; raise max_new_tokens to {cut + 1}" in capsys.readouterr().err
    assert RunConfig("data", "model", "out", 1, 2).max_new_tokens == MAX_NEW_TOKENS


def test_the_largest_batch_repeats_a_case_only_after_all_others():
    sizes = [("a", 5), ("b", 9), ("a", 5), ("c", 7), ("b", 9)]
    rows = [PlannedRow(i, case, "q", 1, 1, WorkCounts(tokens=size), {}) for i, (case, size) in enumerate(sizes)]
    assert Plan(rows).largest_batch(2) == [1, 3]
    assert Plan(rows).largest_batch(4) == [1, 3, 0, 4]
    assert sorted(Plan(rows).largest_batch(9)) == [0, 1, 2, 3, 4]
    rows[2] = replace(rows[2], text=WorkCounts(tokens=12))  # in a joined plan, a role may lack one of the repeats
    assert Plan(rows).largest_batch(1) == [2]
    assert Plan(rows).largest_batch(4) == [2, 1, 3, 4]


def test_a_case_that_balancing_repeats_is_a_separate_case():
    rows = [("a", "1"), ("a", "2"), ("a", "1"), ("a", "2"), ("b", "1"), ("a", "1"), ("a", "2")]
    made = [{"case": case, "branches": [{"id": f"{case}{branch}"}]} for case, branch in rows]
    cases = group_by_case(pa.Table.from_pylist(made, EXCHANGE_SCHEMA))
    found = ["".join(exchange["branches"][0]["id"] for exchange in case["exchanges"]) for case in cases]
    assert found == ["a1a2", "a1a2", "b1", "a1a2"]


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"a.q_proj": [1.0], "a.visual.b": [0.0]}, "names the vision tower, but no gradient reaches these modules"),
        ({"a.q_proj": None, "a.visual.merger.b": None}, "the language model and the merger"),
        ({"a.q_proj": [float("nan")]}, "the first gradient of a.q_proj is not finite"),
    ],
)
def test_a_part_without_a_finite_gradient_is_named(gradients, message):
    with pytest.raises(EchoError, match=message):
        check_gradients({name: None if values is None else torch.tensor(values) for name, values in gradients.items()})
    check_gradients({"a.lora_A": torch.zeros(2), "a.lora_B": torch.ones(2)})
