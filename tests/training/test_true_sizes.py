"""Precision, memory and large collections, which matter only at the sizes of the published models."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import ModelConfig, SFTConfig

from echo_ft.errors import EchoError
from echo_ft.export.vllm import VLLM_RANKS, vllm_rank
from echo_ft.model.attention import make_spans
from echo_ft.model.batches import make_attention_mask, pack_rows
from echo_ft.model.loading import load_model
from echo_ft.model.preparation import keep_adapter_input_dtype, packed_inputs, prepare_model
from echo_ft.training.cases import EXCHANGE_SCHEMA, group_by_case
from echo_ft.training.checkpoints import COMPLETE_MARKER, find_checkpoint
from echo_ft.training.checks import check_options
from echo_ft.training.collator import Collator
from tests.conftest import ECHO_TINY, make_case
from tests.support.exchanges import exchanges_of, with_completions


def exchange_rows(count: int, text: str) -> pa.Table:
    branch = {"id": "q", "prompt": text, "completion": "A"}
    fixed = {"role": "decision_maker", "images": ["a.png"], "context": text, "prompt_version": "1"}
    rows = [{**fixed, "case": f"c{index // 2}", "branches": [branch]} for index in range(count)]
    return pa.Table.from_pylist(rows, EXCHANGE_SCHEMA)


def test_rows_of_a_split_hold_strings_with_64_bit_offsets():
    exchanges = exchange_rows(6, "a context")
    cases = group_by_case(exchanges)
    assert [row for case in cases for row in case["exchanges"]] == exchanges.to_pylist()
    kind = cases.data.schema.field("exchanges").type.value_type
    assert kind.field("context").type == pa.large_string()
    assert kind.field("branches").type.value_type.field("prompt").type == pa.large_string()


@pytest.mark.slow
def test_texts_of_a_split_may_exceed_two_gibibytes():
    one = exchange_rows(1, "x" * 2**20)
    many = pa.concat_tables([one] * 1100)
    assert len(group_by_case(many)) >= 1


def test_branch_masks_are_rows_of_the_whole_mask_and_nothing_more(row_builder, tmp_path):
    exchanges = [with_completions(one) for one in exchanges_of(make_case(tmp_path))]
    packed = pack_rows([row_builder.load_row(one, tmp_path) for one in exchanges])
    start = 0
    for span, (prefix, length) in zip(
        make_spans(packed["segments"], packed["lengths"]), packed["lengths"], strict=True
    ):
        whole = make_attention_mask(packed["segments"][:, start : start + length])
        assert torch.equal(span.mask, whole[:, :, prefix:])
        assert span.mask.untyped_storage().nbytes() == span.mask.numel()
        start += length


def test_adapters_compute_in_autocast_to_the_rounding_of_bfloat16(row_builder, tmp_path):
    torch.manual_seed(0)
    base = load_model(str(ECHO_TINY), dtype="bfloat16")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(base, config, autocast_adapter_dtype=True)
    prepare_model(model.get_base_model())
    exchanges = [with_completions(one) for one in exchanges_of(make_case(tmp_path))]
    rows = [row_builder.load_row(one, tmp_path) for one in exchanges]
    batch = Collator(row_builder, tmp_path, pixel_dtype=torch.bfloat16).batch(rows)
    assert batch["pixel_values"].dtype == torch.bfloat16

    def logits() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(**packed_inputs(batch)).logits.float()

    before = logits()
    widened = []
    layer = next(module for name, module in model.named_modules() if name.endswith("lora_A.default"))
    layer.register_forward_pre_hook(lambda _, inputs: widened.append(inputs[0].dtype))
    logits()
    keep_adapter_input_dtype(model)
    after = logits()
    assert widened == [torch.float32, torch.bfloat16]
    assert (after - before).abs().max() < 0.02 * before.abs().max()


def test_zero_checkpoint_of_another_number_of_processes_is_refused(tmp_path):
    checkpoint = tmp_path / "checkpoint-5"
    (checkpoint / "global_step5").mkdir(parents=True)
    (checkpoint / COMPLETE_MARKER).touch()
    for rank in range(4):
        (checkpoint / "global_step5" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    sft = SFTConfig(output_dir=str(tmp_path), resume_from_checkpoint="true", report_to="none", use_cpu=True, bf16=False)
    with pytest.raises(EchoError, match="ZeRO optimizer states of 4 processes and cannot be resumed by 1"):
        find_checkpoint(sft, {})


def test_processes_do_not_search_for_unused_parameters(tmp_path):
    sft = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    check_options(sft, ModelConfig(model_name_or_path="m", use_peft=True, lora_target_modules=["q_proj"]))
    assert sft.ddp_find_unused_parameters is False


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (4, 8), (8, 8), (12, 16), (48, 64), (512, 512)])
def test_bundle_asks_vllm_for_a_rank_that_it_takes(rank, served):
    assert vllm_rank([{"r": 1}, {"r": rank}]) == served
    assert vllm_rank([{"r": 1, "rank_pattern": {"q_proj": rank}}]) == served
    assert served in VLLM_RANKS
