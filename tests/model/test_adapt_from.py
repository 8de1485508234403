"""An adapter that acts after the prefix has the gradients of separate rows whose prefix the base model computes."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.flop_counter import FlopCounterMode

from echo_ft.model import attention
from echo_ft.model.preparation import packed_inputs, prepare_model
from echo_ft.model.rows import IGNORED
from echo_ft.records import Branch, Exchange
from echo_ft.training.collator import Collator
from echo_ft.training.costs.flops import WorkCounts, unit_costs
from tests.conftest import draw
from tests.support.adapt_from import logits_of_one_row, plain_inputs
from tests.support.exchanges import exchanges_of, with_completions

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model, **options):
    """A copy of the model with a random adapter on all layers of its language model."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=rf".*language_model.*\.({'|'.join(TARGETS)})", init_lora_weights=False)
    for name, value in options.items():
        setattr(config, name, value)
    config.task_type = "CAUSAL_LM"
    return get_peft_model(copy.deepcopy(model), config)


def token_loss(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def gradients(model, loss):
    """The gradients of the adapter, by parameter name."""
    found = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return dict(zip(found, torch.autograd.grad(loss, list(found.values())), strict=True))


def packed_loss(tuned, batch):
    """The loss of a collated batch, as the trainer computes it without TRL."""
    keep = (batch["labels"][0, 1:] != IGNORED).nonzero()[:, 0]
    return token_loss(tuned(**packed_inputs(batch), keep=keep).logits[0], batch["labels"][0, keep + 1])


def require_gradients_of_single_rows(model, row_builder, root, packed, adapt_from, tolerance, checkpointing=False):
    """Compare with PEFT, one question at a time. `tolerance` is relative to the largest gradient."""
    plain = adapted(model, alora_invocation_tokens=row_builder.generation_prompt if adapt_from == "answer" else None)
    singles = [replace(row, branches=(branch,)) for row in packed for branch in row.branches]
    expected = torch.zeros((), dtype=model.dtype)
    for single in singles:
        row = row_builder.load_row(single, root)
        inputs = plain_inputs(row_builder, root, row)
        inputs |= {"pixel_values": inputs["pixel_values"].to(model.dtype)} if single.images else {}
        logits = logits_of_one_row(plain, adapt_from, inputs, row)
        expected = expected + token_loss(logits[:-1], torch.from_numpy(row.labels)[1:])
    tuned = adapted(model)
    prepare_model(tuned.get_base_model())
    if checkpointing:
        tuned.enable_input_require_grads()
        tuned.gradient_checkpointing_enable({"use_reentrant": False})
        tuned.train()
    rows = [row_builder.load_row(exchange, root) for exchange in packed]
    collator = Collator(row_builder, root, pixel_dtype=model.dtype, adapt_from=adapt_from)
    loss = packed_loss(tuned, collator.batch(rows))
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    summed, found = gradients(plain, expected), gradients(tuned, loss)
    assert found.keys() == summed.keys()
    scale = max(gradient.abs().max() for gradient in summed.values())
    for name, gradient in found.items():
        assert (gradient - summed[name]).abs().max() <= tolerance * scale, name


def packed_rows(root, branches, images, context, seed):
    """Exchanges of `branches` and `images`, with the same images, with other images and without images."""
    rng = np.random.default_rng(seed)
    names = tuple(
        draw(root / f"{seed}_{index}.png", tuple(rng.integers(30, 90, 2)), seed + index) for index in range(images)
    )
    many = tuple(
        Branch(str(i), f"Question: {'is it so ' * (i % 3)}?", ["A", "B. A crack.", "C"][i % 3]) for i in range(branches)
    )
    first = Exchange("decision_maker", "case", names, context, many, "1")
    again = replace(first, images=(names[-1], names[0]), branches=many[:2])
    same = replace(first, context=f"Normal: an even surface.\n{context}", branches=many[-2:])
    return [first, again, replace(first, images=(), branches=many[:1]), same]


@pytest.mark.parametrize("adapt_from", ["branch", "answer"])
def test_a_packed_row_has_the_gradients_of_single_rows_in_float32(row_builder, model, tmp_path, adapt_from):
    packed = packed_rows(tmp_path, 3, 2, "Guide: look at the rim.\n", 5)
    require_gradients_of_single_rows(model, row_builder, tmp_path, packed, adapt_from, 1e-5, checkpointing=True)


@pytest.fixture(scope="module")
def double(model):
    """The model in double precision, so that rounding can neither hide nor imitate a difference."""
    return copy.deepcopy(model).double()


@pytest.mark.slow
@pytest.mark.parametrize("adapt_from", ["branch", "answer"])
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    branches=st.integers(1, 12),
    images=st.integers(1, 4),
    context=st.sampled_from(["", "Guide: look at the rim.\n"]),
    checkpointing=st.booleans(),
    seed=st.integers(0, 99),
)
def test_packed_rows_have_the_gradients_of_single_rows(
    row_builder, double, tmp_path, adapt_from, branches, images, context, checkpointing, seed
):
    packed = packed_rows(tmp_path, branches, images, context, seed)
    require_gradients_of_single_rows(double, row_builder, tmp_path, packed, adapt_from, 1e-12, checkpointing)


def test_flex_attention_blocks_equal_those_of_the_mask_of_sdpa(row_builder, case, tmp_path):
    """The kernels need a GPU, but the block masks do not."""
    rows = [row_builder.load_row(with_completions(exchange), tmp_path) for exchange in exchanges_of(case)]
    for start in ("branch", "answer"):
        batch = Collator(row_builder, tmp_path, adapt_from=start).batch(rows)
        blocks, spans = (attention.make_split(batch, name) for name in ("flex_attention", "sdpa"))
        (part,), (plain,) = blocks.parts, spans.parts
        found = part.spans
        queries, keys = found.seq_lengths
        expected = create_block_mask(found.mask_mod, None, None, queries, keys, device="cpu")
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        whole = found.mask_mod(0, 0, torch.arange(queries)[:, None], torch.arange(keys)[None])
        base = len(batch["base_tokens"])
        for span in plain.spans:
            seen = [*range(span.base_start, span.base_end), *range(base + span.start, base + span.end)]
            assert torch.equal(whole[span.start : span.end, seen], span.mask[0, 0])
            whole[span.start : span.end, seen] = False
        assert not whole.any()
        assert blocks.base_spans.seq_lengths == (base, base)


def test_flex_attention_gives_the_hidden_states_of_sdpa(row_builder, model, case, tmp_path, monkeypatch):
    """Uses torch's plain implementation, which needs no compiler but has no backward pass on a CPU."""

    def plain(module, query, key, value, spans, scaling=None, **kwargs):
        found = flex_attention(query, key, value, block_mask=spans, scale=scaling, enable_gqa=True)
        return found.transpose(1, 2), None

    monkeypatch.setattr(attention, "flex_attention_forward", plain)
    rows = [row_builder.load_row(with_completions(exchange), tmp_path) for exchange in exchanges_of(case)]
    tuned = adapted(model)
    prepare_model(tuned.get_base_model())
    for start in ("branch", "answer"):
        batch = Collator(row_builder, tmp_path, adapt_from=start).batch(rows)
        keep = (batch["labels"][0, 1:] != IGNORED).nonzero()[:, 0]
        with torch.no_grad():
            sdpa, flex = (
                tuned(**packed_inputs(batch, name), keep=keep).logits[0] for name in ("sdpa", "flex_attention")
            )
        assert (sdpa - flex).abs().max() <= 1e-5 * sdpa.abs().max()


def test_the_adapter_acts_from_the_generation_prompt_on(row_builder, case, tmp_path):
    row = row_builder.load_row(with_completions(exchanges_of(case)[-1], ("B",)), tmp_path)
    shown = row_builder.tokenizer.decode(row.input_ids[row_builder.adapted_tokens(row, "answer")])
    assert shown == "<|im_start|>assistant\nB<|im_end|>\n" * len(row.exchange.branches)
    assert (row_builder.adapted_tokens(row, "branch") == (row.segments > 0)).all()
    assert row_builder.adapted_tokens(row, "prefix").all()
    prompt = row_builder.load_row(exchanges_of(case)[-1], tmp_path)
    shown = row_builder.tokenizer.decode(prompt.input_ids[row_builder.adapted_tokens(prompt, "answer")])
    assert shown == "<|im_start|>assistant\n" * len(row.exchange.branches)


@pytest.mark.parametrize("start", ["branch", "answer"])
def test_the_prefix_has_no_backward_pass_and_the_count_of_operations_knows_it(
    row_builder, model, case, tmp_path, start
):
    rows = [row_builder.load_row(with_completions(exchange), tmp_path) for exchange in exchanges_of(case)]
    tuned = adapted(model)
    prepare_model(tuned.get_base_model())
    batch = Collator(row_builder, tmp_path, adapt_from=start).batch(rows)
    with FlopCounterMode(display=False) as counter:
        packed_loss(tuned, batch).backward()
    linear = sum(
        count for name, count in counter.get_flop_counts()["Global"].items() if str(name) in ("aten.mm", "aten.addmm")
    )
    counts = replace(WorkCounts(*batch["work_counts"]), pairs=0, base_pairs=0, patch_pairs=0)
    assert unit_costs(tuned.get_base_model()).flops(counts) == pytest.approx(linear, rel=0.05)
    assert counts.base_tokens == len(batch["base_tokens"])
