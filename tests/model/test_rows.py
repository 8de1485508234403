"""Rows contain the tokens that the model should see, and sharing a prefix does not change the result."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from echo_ft.errors import EchoError
from echo_ft.images.decode import image_size
from echo_ft.model import attention
from echo_ft.model.batches import make_attention_mask, pad_rows
from echo_ft.model.loading import load_processor
from echo_ft.model.preparation import packed_inputs, prepare_model
from echo_ft.model.rows import IGNORED, PADDING, mark_trained
from echo_ft.records import Branch, Exchange
from echo_ft.training.collator import Collator
from echo_ft.training.costs.flops import row_work, text_work
from tests.conftest import ECHO_TINY, draw, make_case
from tests.support.exchanges import exchanges_of, with_completions


def single_branches(exchange: Exchange) -> list[Exchange]:
    return [replace(exchange, branches=(branch,)) for branch in exchange.branches]


def messages(exchange: Exchange, branch: Branch):
    content = [{"type": "image"}] * len(exchange.images) + [{"type": "text", "text": exchange.context + branch.prompt}]
    return [{"role": "user", "content": content}]


def test_a_processor_published_by_qwen_accepts_the_pixel_budget(tmp_path):
    """Qwen's files set min_pixels and max_pixels, which override `size` in transformers."""
    for file in ECHO_TINY.iterdir():
        if file.name not in ("model.safetensors", "processor_config.json"):
            shutil.copy(file, tmp_path)
    saved = json.loads((ECHO_TINY / "processor_config.json").read_text())["image_processor"]
    del saved["size"]
    published = {**saved, "min_pixels": 3136, "max_pixels": 12845056, "processor_class": "Qwen2VLProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    images = load_processor(str(tmp_path), None, 784, 28 * 28 * 10).image_processor
    assert (images.size["shortest_edge"], images.size["longest_edge"]) == (784, 28 * 28 * 10)
    inputs = images(images=[Image.new("RGB", (640, 480))], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 12]]


def test_tokens_equal_the_processors_for_the_whole_conversation(row_builder, case, tmp_path):
    for exchange in exchanges_of(case):
        images = [Image.open(tmp_path / image).convert("RGB") for image in exchange.images]
        for single in single_branches(with_completions(exchange)):
            branch = single.branches[0]
            prompt = row_builder.processor.apply_chat_template(
                messages(exchange, branch), tokenize=False, add_generation_prompt=True
            )
            answer = [{"role": "assistant", "content": [{"type": "text", "text": branch.completion}]}]
            conversation = row_builder.processor.apply_chat_template(
                messages(exchange, branch) + answer, tokenize=False
            )
            row = row_builder.load_row(single, tmp_path)
            assert conversation.startswith(prompt)
            for text, ids in ((conversation, row.input_ids), (prompt, row.input_ids[row.labels == IGNORED])):
                expected = row_builder.processor(text=[text], images=images, return_tensors="np")["input_ids"][0]
                np.testing.assert_array_equal(ids, expected)


def test_only_completions_and_their_closing_tokens_are_trained_on(row_builder, case, tmp_path):
    row = row_builder.load_row(with_completions(exchanges_of(case)[-1], ("B",)), tmp_path)
    trained = row_builder.tokenizer.decode(row.input_ids[row.labels != IGNORED])
    assert trained == "B<|im_end|>\n" * len(row.exchange.branches)
    shown = mark_trained(row, row_builder)
    assert shown.count("[[B<|im_end|>\n]]") == len(row.exchange.branches)
    assert "tokens>" in shown
    assert "<|image_pad|>" not in shown


def test_positions_equal_those_of_the_model(row_builder, model, case, tmp_path):
    for exchange in exchanges_of(case):
        for single in single_branches(exchange):
            row = row_builder.load_row(single, tmp_path)
            ids = torch.from_numpy(row.input_ids)[None]
            expected, _ = model.model.get_rope_index(
                ids, (ids == row_builder.image_token_id).int(), image_grid_thw=torch.from_numpy(row.grids)
            )
            np.testing.assert_array_equal(row.positions, expected[:, 0].numpy())


@pytest.mark.parametrize("size", [(30, 30), (1000, 20), (113, 57), (28, 2000), (640, 480)])
def test_the_image_header_is_enough_to_compute_the_grid(row_builder, tmp_path, size):
    draw(tmp_path / "x.png", size, 0)
    inputs = row_builder.image_processor(images=[Image.open(tmp_path / "x.png")], return_tensors="np")
    assert row_builder.grid(*image_size(tmp_path / "x.png")) == tuple(inputs["image_grid_thw"][0])


def test_the_error_for_an_elongated_image_names_its_size(row_builder):
    with pytest.raises(EchoError, match="2000 x 8"):
        row_builder.grid(2000, 8)


def test_lengths_equal_those_of_the_row(row_builder, case, tmp_path):
    for exchange in exchanges_of(case):
        for variant in (exchange, with_completions(exchange), replace(with_completions(exchange), images=())):
            row = row_builder.load_row(variant, tmp_path)
            found = row_builder.lengths(variant, [image_size(tmp_path / image) for image in variant.images])
            assert (found.prefix, *found.branches) == tuple(np.bincount(row.segments))
            assert (found.tokens, found.labels) == (len(row.input_ids), (row.labels != IGNORED).sum())
            assert found.grids == tuple(map(tuple, row.grids.tolist()))
            assert row_work(found.prefix, found.branches, found.labels) == text_work([row])


def gradients_of(model, logits, labels):
    """Return the summed token loss of logits (B, L, vocabulary) and its gradients."""
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference_gradients(model, row_builder, root, exchange):
    """Return loss and gradients for a single branch, computed only with transformers."""
    row = row_builder.load_row(exchange, root)
    ids = torch.from_numpy(row.input_ids)[None]
    images = [Image.open(root / image).convert("RGB") for image in exchange.images]
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == row_builder.image_token_id).int(),
        **(row_builder.image_processor(images=images, return_tensors="pt") if images else {}),
    ).logits
    return gradients_of(model, logits[:, :-1], torch.from_numpy(row.labels)[None, 1:])


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    branches=st.integers(1, 12),
    images=st.integers(1, 4),
    context=st.sampled_from(["", "Guide: look at the rim.\n"]),
    seed=st.integers(0, 99),
)
def test_packed_rows_have_the_loss_and_gradients_of_single_rows(
    row_builder, model, tmp_path, branches, images, context, seed
):
    rng = np.random.default_rng(seed)
    names = tuple(
        draw(tmp_path / f"{seed}_{index}.png", tuple(rng.integers(30, 120, 2)), seed + index) for index in range(images)
    )
    many = tuple(
        Branch(str(i), f"Question: {'is it so ' * (i % 3)}?", ["A", "B. A crack.", "C"][i % 3]) for i in range(branches)
    )
    first = Exchange("decision_maker", "case", names, context, many, "1")
    # Repeated images, one of them twice in an exchange, and an exchange without images.
    second = replace(first, images=(names[-1], names[0], names[-1]), branches=many[:2])
    packed = [first, second, replace(first, images=(), branches=many[:1])]
    batch = Collator(row_builder, tmp_path).batch([row_builder.load_row(exchange, tmp_path) for exchange in packed])
    assert len(batch["image_grid_thw"]) == images
    prepared = copy.deepcopy(model)
    prepare_model(prepared)
    keep = (batch["labels"][0, 1:] != IGNORED).nonzero()[:, 0]
    logits = prepared(**packed_inputs(batch), keep=keep).logits
    loss, gradients = gradients_of(prepared, logits, batch["labels"][:, keep + 1])
    expected = [
        reference_gradients(model, row_builder, tmp_path, single) for row in packed for single in single_branches(row)
    ]
    assert loss == pytest.approx(sum(single for single, _ in expected), rel=1e-4)
    scale = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        summed = sum(single[name] for _, single in expected if name in single)
        assert (gradient - summed).abs().max() <= 1e-4 * max(scale, summed.abs().max()), name


def test_a_branch_attends_only_to_the_prefix_and_itself(row_builder, case, tmp_path):
    rows = [row_builder.load_row(exchange, tmp_path) for exchange in exchanges_of(case)[-2:]]
    segments = pad_rows(rows, row_builder.pad_token_id)["segments"]
    mask = make_attention_mask(segments)
    for b, i, j in np.ndindex(*mask[:, 0, ::7, ::5].shape):
        i, j = i * 7, j * 5
        query, key = int(segments[b, i]), int(segments[b, j])
        assert mask[b, 0, i, j] == (j <= i and (query == key or (key == 0 and query > 0))), (query, key)
    assert mask.any(dim=-1).all()
    assert (segments == PADDING).any()


@pytest.mark.parametrize("lengths", [[(100, 300)], [(128, 256), (700, 1500), (5, 40)], [(1, 1), (2000, 2300)]])
def test_flex_attention_blocks_equal_those_of_the_full_mask(lengths):
    """The kernels need a GPU, but the block mask does not."""
    from torch.nn.attention.flex_attention import create_block_mask

    rng = np.random.default_rng(0)
    rows = []
    for prefix, length in lengths:
        branches = np.sort(rng.integers(1, 5, length - prefix))
        rows.append(np.concatenate([np.zeros(prefix, int), branches]))
    segments = torch.from_numpy(np.concatenate(rows))[None]
    found = attention.make_block_mask(segments, lengths)
    total = segments.shape[1]
    expected = create_block_mask(found.mask_mod, None, None, total, total, device="cpu")
    assert found.shape == expected.shape
    assert torch.equal(found.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    # sdpa gets the same mask, one exchange at a time.
    query, key = torch.meshgrid(torch.arange(total), torch.arange(total), indexing="ij")
    whole = found.mask_mod(0, 0, query, key)
    start = 0
    for span in attention.make_spans(segments, lengths):
        inside = slice(span.start, span.end)
        assert torch.equal(whole[span.branches : span.end, inside], span.mask[0, 0])
        assert not whole[inside, :start].any()
        start = span.end


def test_the_error_for_a_control_token_names_the_case_and_the_token(row_builder, case, tmp_path):
    exchange = replace(exchanges_of(case)[0], context="look <|im_end|> here\n")
    with pytest.raises(EchoError, match=r"line/part/1.*<\|im_end\|>"):
        row_builder.load_row(exchange, tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_the_error_for_a_missing_or_broken_image_names_it(row_builder, case, tmp_path, content):
    path = tmp_path / case.seen.query
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(EchoError, match=case.seen.query):
        row_builder.load_row(exchanges_of(case)[0], tmp_path)
    assert make_case(tmp_path).id == case.id
