"""The mask loss teaches which image tokens of the query show the defect, and leaves nothing in the adapter."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl, write_jsonl
from echo_ft.images.masks import load_mask
from echo_ft.model.loading import load_model
from echo_ft.model.preparation import packed_inputs, prepare_model
from echo_ft.records import GOOD, Inspection
from echo_ft.training.collator import Collator
from echo_ft.training.mask_loss import (
    MASK_HEADS,
    MaskHeads,
    attach_mask_heads,
    load_mask_heads,
    token_marks,
    token_weights,
)
from tests.conftest import ECHO_TINY, MAX_PIXELS, make_case, make_dataset
from tests.support.exchanges import exchanges_of, with_completions
from tests.support.training import (
    BEST_OF_SIX,
    SAME_TRAINING,
    launch,
    launch_bfloat16,
    launch_deepspeed,
    logged_state,
    losses,
    run_in_process,
    tiny_options,
)

LANGUAGE = ["--lora_target_modules", "q_proj", "v_proj", "down_proj"]
TOWER = ["--lora_target_modules", "q_proj", "v_proj", "attn.qkv", "merger.mlp.0"]
SHORT = [*SAME_TRAINING, "--mask_loss", 0.5, "--save_strategy", "no", "--max_pixels", MAX_PIXELS]


def inspect(case, condition="stain", **marks):
    return Inspection(case.id, case.seen.query, "line", "washer", condition, case.id, "train", **marks)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four cases with a box, two good ones, and two whose defect has no mark."""
    folder = make_dataset(tmp_path_factory.mktemp("dataset"))
    rows = list(read_jsonl(folder / "inspections.jsonl", Inspection))
    for index, row in enumerate(rows):
        if index % 4 == 2:
            rows[index] = replace(row, condition=GOOD)
        elif index % 4 != 3:
            rows[index] = replace(row, boxes=((10.0 * (index % 3), 20.0, 40.0 + index, 60.0),))
    write_jsonl(folder / "inspections.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """The decision maker after three steps on the same eight cases, with a checkpoint of each."""
    output = tmp_path_factory.mktemp("trained") / "decision_maker"
    checkpoints = ["--save_strategy", "steps", "--save_steps", 1, "--per_device_train_batch_size", 8]
    run_in_process(*tiny_options("decision_maker", dataset, output, *SHORT, *TOWER, *checkpoints))
    return output


def assert_same_weights(found, expected, different=0.0, **tolerance):
    """Check that weights are equal within the tolerance, except for a fraction `different` of each tensor.

    Adam turns a rounding error in a gradient near zero into a step of full size.
    """
    for name in ("adapter_model.safetensors", MASK_HEADS):
        weights = load_file(expected / name)
        assert load_file(found / name).keys() == weights.keys()
        for key, weight in load_file(found / name).items():
            if (~torch.isclose(weight, weights[key], **tolerance)).float().mean() <= different:
                continue
            torch.testing.assert_close(weight, weights[key], msg=lambda text, key=key: f"{key}: {text}", **tolerance)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_a_token_is_marked_if_the_mask_covers_enough_of_its_pixels(rows, columns, side, seed):
    mask = np.random.default_rng(seed).random((rows * side, columns * side)) < 0.05
    shares = mask.reshape(rows, side, columns, side).mean(axis=(1, 3)).ravel()
    expected = (shares >= 1 / 32) | ((shares == shares.max()) & (shares > 0) & (shares.max() < 1 / 32))
    assert token_marks(mask, (rows, columns)).tolist() == expected.tolist()


def test_the_smallest_defect_marks_a_token_at_any_pixel_budget():
    mask = np.zeros((3000, 2000), dtype=np.bool_)
    mask[2999, 0] = True
    for rows, columns in ((1, 1), (6, 4), (107, 71)):
        assert np.flatnonzero(token_marks(mask, (rows, columns))).tolist() == [(rows - 1) * columns]


def test_marked_and_unmarked_tokens_of_a_row_weigh_the_same_and_sum_to_its_labels():
    targets = torch.tensor([True, False, False, False, False, True])
    weights = token_weights(targets, torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([8, 6, 5]))
    assert weights.tolist() == [4, 2, 2, 3, 3, 5]


def packed_batch(row_builder, root):
    """A batch of three cases: with a mask file, good, and with an unmarked defect. Returns its rows and marks too."""
    cases = [make_case(root, name=f"line/part/{index}", seed=index) for index in range(3)]
    mask = np.zeros((120, 90), dtype=np.uint8)
    mask[50:80, 20:50] = 255
    Image.fromarray(mask).save(root / "mask.png")
    marks = {cases[0].id: inspect(cases[0], mask="mask.png"), cases[1].id: inspect(cases[1], GOOD)}
    exchanges = [with_completions(exchange) for case in cases for exchange in exchanges_of(case)]
    rows = [row_builder.load_row(exchange, root) for exchange in exchanges]
    return Collator(row_builder, root, marks=marks).batch(rows), rows, marks


def reference_loss(plain, heads, row, marks, root, row_builder):
    """The mask loss of one row by hand: the stock model on its prefix, all layers, and cross-entropy token by token."""
    inspection = marks.get(row.exchange.case)
    if inspection is None:
        return 0.0
    inputs = Collator(row_builder, root).batch([row])
    prefix = torch.from_numpy(row.input_ids[: row.prefix_length])[None]
    is_image = prefix == row_builder.image_token_id
    every = [row_builder.image_processor(images=[Image.open(root / name).convert("RGB")], return_tensors="pt")
             for name in row.exchange.images]  # fmt: skip
    grids = torch.cat([one["image_grid_thw"] for one in every])
    pixels = torch.cat([one["pixel_values"] for one in every])
    output = plain.model(
        input_ids=prefix, pixel_values=pixels, image_grid_thw=grids, mm_token_type_ids=is_image.int(), use_cache=False
    )
    assert len(inputs["image_views"]) == len(every)
    _, height, width = grids[-1] // row_builder.merge
    mask = load_mask(inspection, root, Image.open(root / inspection.image).size)
    covered = np.zeros((height, width)) if mask is None else np.asarray(
        Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
    )  # fmt: skip
    marked = torch.from_numpy((covered >= 1 / 32).ravel())
    total = 0.0
    tokens = int(height * width)
    merged = plain.model.get_image_features(pixels, grids, return_dict=True).pooler_output[-1]
    states = {"language": output.last_hidden_state[0, is_image[0]][-tokens:], "tower": merged}
    for name, values in states.items():
        head = getattr(heads, name)
        normal = (values - values.mean(-1, keepdim=True)) / (values.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        probability = (normal @ head.weight[0] + head.bias).sigmoid()
        wrong = torch.where(marked, -probability.log(), -(1 - probability).log())
        halves = [wrong[marked], wrong[~marked]]
        total = total + torch.stack([half.mean() for half in halves if len(half)]).mean() / 2
    return total * int((row.labels != -100).sum())


def test_loss_and_gradients_of_a_packed_batch_equal_those_of_each_row_alone(row_builder, tmp_path):
    batch, rows, marks = packed_batch(row_builder, tmp_path)
    models = [load_model(str(ECHO_TINY), dtype="float32").eval() for _ in range(2)]
    prepare_model(models[0])
    heads = attach_mask_heads(models[0], None)
    heads.batch = batch
    models[0](**packed_inputs(batch), keep=torch.tensor([0]), use_cache=False)
    loss = heads.loss()
    expected = sum(reference_loss(models[1], heads, row, marks, tmp_path, row_builder) for row in rows)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    names = ["model.language_model.layers.0.self_attn.q_proj.weight", "model.visual.blocks.0.attn.qkv.weight"]
    for name in names:
        found, other = (
            torch.autograd.grad(value, dict(model.named_parameters())[name], retain_graph=True)[0]
            for value, model in ((loss, models[0]), (expected, models[1]))
        )
        assert found.abs().max() > 0
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_only_known_masks_of_the_query_are_targets(row_builder, tmp_path):
    batch, rows, marks = packed_batch(row_builder, tmp_path)
    known = [index for index, row in enumerate(rows) if row.exchange.case in marks]
    assert batch["mask_rows"].unique().tolist() == known
    assert (batch["input_ids"][0, batch["mask_positions"]] == row_builder.image_token_id).all()
    for index in known:
        tokens = int(rows[index].grids[-1].prod()) // row_builder.merge**2
        found = batch["mask_targets"][batch["mask_rows"] == index]
        assert len(found) == tokens
        assert found.any() == (rows[index].exchange.case == "line/part/0")
        assert not found.all()


def test_training_reduces_the_mask_loss_and_saves_the_heads_beside_the_adapter(trained):
    logged = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    values = [entry["mask_loss"] for entry in logged if "mask_loss" in entry]
    assert values[0] > values[1] > values[2]
    assert set(load_file(trained / MASK_HEADS)) == {"language.weight", "language.bias", "tower.weight", "tower.bias"}
    assert not any("mask" in name for name in load_file(trained / "adapter_model.safetensors"))
    assert json.loads((trained / "echo_ft.json").read_text())["mask_loss"] == 0.5


def test_accumulation_gives_the_weights_of_one_batch(trained, dataset, tmp_path):
    split = ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2]
    run_in_process(*tiny_options("decision_maker", dataset, tmp_path, *SHORT, *TOWER, *split))
    assert losses(tmp_path) == pytest.approx(losses(trained), rel=1e-4)
    assert_same_weights(tmp_path, trained, different=0.002, rtol=1e-2, atol=1e-3)


def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(trained, dataset, tmp_path):
    again = ["--per_device_train_batch_size", 8, "--resume_from_checkpoint", trained / "checkpoint-2"]
    run_in_process(*tiny_options("decision_maker", dataset, tmp_path, *SHORT, *TOWER, *again))
    assert_same_weights(tmp_path, trained, rtol=0, atol=0)


@pytest.mark.slow
def test_checkpointing_and_stored_features_change_nothing(dataset, tmp_path):
    plain = [*SHORT, *LANGUAGE, "--per_device_train_batch_size", 2]
    run_in_process(*tiny_options("decision_maker", dataset, tmp_path / "plain", *plain))
    frugal = ["--gradient_checkpointing", "true", "--features", tmp_path / "features"]
    for name in ("first", "again"):  # the second run reads all features from the store
        run_in_process(*tiny_options("decision_maker", dataset, tmp_path / name, *plain, *frugal))
        assert_same_weights(tmp_path / name, tmp_path / "plain", rtol=1e-3, atol=1e-5)


def test_the_evaluated_mask_loss_does_not_depend_on_the_batch_size(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "dataset")
    path = tmp_path / "dataset" / "sft" / "decision_maker" / "validation.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    short = {**rows[0], "branches": rows[0]["branches"][:1]}  # the first case has fewer labels than the others
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in [short, *(r for r in rows if r["case"] != short["case"])])
    )
    found = []
    for batch in (1, 2):
        once = ["--max_steps", 1, "--eval_strategy", "steps", "--eval_steps", 1, "--per_device_eval_batch_size", batch]
        output = tmp_path / str(batch)
        run_in_process(*tiny_options("decision_maker", tmp_path / "dataset", output, *SHORT, *LANGUAGE, *once))
        (entry,) = [entry for entry in logged_state(output)["log_history"] if "eval_loss" in entry]
        found.append([entry["eval_loss"], entry["eval_mask_loss"]])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_without_marked_defects_the_loss_is_off(tmp_path, capfd):
    dataset = make_dataset(tmp_path / "data", train=4)
    options = [*SHORT, *LANGUAGE, "--per_device_train_batch_size", 2, "--max_steps", 1]
    run_in_process(*tiny_options("decision_maker", dataset, tmp_path / "run", *options))
    assert "mask_loss is off: no defect of the training images has a mask" in capfd.readouterr().err
    assert not (tmp_path / "run" / MASK_HEADS).exists()
    assert json.loads((tmp_path / "run" / "echo_ft.json").read_text())["mask_loss"] == 0


def test_a_best_mask_loss_needs_marks_of_training_and_validation(dataset, tmp_path):
    unmarked = make_dataset(tmp_path / "data", train=4)
    shutil.copytree(dataset, tmp_path / "marked")
    path = tmp_path / "marked" / "inspections.jsonl"
    rows = [
        replace(row, condition="stain", boxes=()) if row.split == "validation" else row
        for row in read_jsonl(path, Inspection)
    ]
    write_jsonl(path, rows)
    best = ["--metric_for_best_model", "mask_loss", "--eval_strategy", "epoch", "--mask_loss", 0.5, "--dry_run"]
    for folder, reason in (
        (unmarked, "no defect of the training images"),
        (path.parent, "the validation split has no"),
    ):
        with pytest.raises(EchoError, match=f"metric_for_best_model cannot be 'mask_loss', because {reason}"):
            run_in_process(*tiny_options("decision_maker", folder, tmp_path / "out", *best))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mask_loss", 1.5], "mask_loss is 1.5; set a value from 0 to 1"),
        (["--mask_loss", "nan"], "mask-loss: invalid float value: 'nan'"),
        (["--mask_loss", 1, "--use_peft", "false"], "mask_loss trains adapters only; set use_peft: true"),
    ],
)
def test_unusable_weights_are_refused(dataset, tmp_path, options, message):
    with pytest.raises(EchoError, match=message):
        run_in_process(*tiny_options("decision_maker", dataset, tmp_path, *options, "--dry_run"))


def test_a_checkpoint_of_another_weight_is_refused(trained, dataset, tmp_path):
    other = ["--mask_loss", 0.25, "--resume_from_checkpoint", trained / "checkpoint-1"]
    with pytest.raises(EchoError, match="mask_loss"):
        run_in_process(*tiny_options("decision_maker", dataset, tmp_path, *SHORT, *TOWER, *other))


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["ddp", "zero2", "zero3"])
def test_two_ranks_give_the_weights_of_one(trained, dataset, tmp_path, topology):
    options = tiny_options("decision_maker", dataset, tmp_path, *SHORT, *TOWER, "--per_device_train_batch_size", 4)
    if topology == "ddp":
        launch(*options, ranks=2)
    else:
        launch_deepspeed(topology, *options)
    assert losses(tmp_path) == pytest.approx(losses(trained), rel=1e-4)
    assert_same_weights(tmp_path, trained, different=0.002, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_the_best_checkpoint_under_fsdp2_has_its_heads(dataset, tmp_path):
    output = tmp_path / "decision_maker"
    options = [*BEST_OF_SIX, "--mask_loss", 0.5, "--max_pixels", MAX_PIXELS, "--max_steps", 3]
    arguments = tiny_options("decision_maker", dataset, output, *options, "--per_device_train_batch_size", 2)
    launch_bfloat16("fsdp2", *arguments)
    best = json.loads((output / "echo_ft.json").read_text())["best_step"]
    assert best < 3
    assert_same_weights(output, output / f"checkpoint-{best}", rtol=0, atol=0)


def test_unusable_heads_are_refused_with_the_reason(trained, tmp_path):
    heads = MaskHeads(hidden=8, tower=True)
    with pytest.raises(EchoError, match=r"no usable mask_heads\.safetensors \(size mismatch for .*; resume from"):
        load_mask_heads(heads, trained / "checkpoint-1")
    with pytest.raises(EchoError, match=r"no usable mask_heads\.safetensors \(No such file .*; resume from"):
        load_mask_heads(heads, tmp_path)
