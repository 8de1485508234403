"""What echo-tiny promises: Qwen2-VL's classes, tokens and template, and inputs equal to the processor's own."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from echo_ft.drawn import parts
from tests.conftest import ROOT
from train.tiny import model as tiny_model
from train.tiny import vision_pretraining
from train.tiny.lessons import Row, row, text_row

FOLDER = ROOT / "recipes" / "tiny" / "echo-tiny"
LIMIT = 12_000_000
"""Bytes that the committed folder may take."""


@pytest.fixture(scope="module")
def processor() -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(FOLDER, local_files_only=True).eval()


@pytest.fixture(scope="module")
def compared() -> Row:
    """A row with a normal photograph and an inspected one."""
    return next(made for made in map(row, range(100)) if len(made.photos) == 2)


def messages(made: Row, branch: int) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": Image.fromarray(photo)} for photo in made.photos]
    lesson = made.branches[branch]
    return [
        {"role": "user", "content": [*images, {"type": "text", "text": made.context + lesson.prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": lesson.completion}]},
    ]


def encode(processor: Any, made: Row, branch: int) -> Any:
    return processor.apply_chat_template(messages(made, branch), tokenize=True, return_dict=True, return_tensors="pt")


def test_it_is_a_qwen2_vl_in_float32_and_small_enough(processor: Any, model: Any) -> None:
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2VLProcessor"
    assert type(processor.tokenizer).__name__ == "Qwen2Tokenizer"
    assert model.dtype == torch.float32
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= LIMIT


def test_special_tokens_are_single_tokens_and_the_config_agrees(processor: Any, model: Any) -> None:
    tokenizer = processor.tokenizer
    for token in tiny_model.SPECIAL_TOKENS:
        assert len(tokenizer(token)["input_ids"]) == 1, token
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert model.config.vision_start_token_id == tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
    assert tokenizer.pad_token == "<|endoftext|>"
    assert len(tokenizer) <= model.config.text_config.vocab_size


def test_the_tokenizer_returns_any_text(processor: Any) -> None:
    text = "Ünknown wörds, 3.5 µm — 漢字\n\nA. B"
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


def test_the_chat_template_is_qwen2_vls(processor: Any) -> None:
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Look."}]}]
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Look.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_laid_out_branch_equals_the_chat_template_and_the_models_positions(
    processor: Any, model: Any, compared: Row
) -> None:
    for branch, lesson in enumerate(compared.branches):
        expected = encode(processor, compared, branch)
        row_builder = tiny_model.lay_out(dataclasses.replace(compared, branches=(lesson,)), processor.tokenizer)
        assert row_builder.ids.tolist() == expected["input_ids"][0].tolist()
        positions, _ = model.model.get_rope_index(
            expected["input_ids"], expected["mm_token_type_ids"], image_grid_thw=expected["image_grid_thw"]
        )
        assert np.array_equal(row_builder.positions, positions[:, 0].numpy())
        said = processor.tokenizer.decode(row_builder.ids[row_builder.trained].tolist())
        assert said == lesson.completion + tiny_model.CLOSING


def test_patches_equal_the_image_processors(processor: Any) -> None:
    rng = np.random.default_rng(0)
    style = parts.random_style(rng, "woven sheet")
    photos = [parts.render_part(parts.Part(style, 1), 1, size).image for size in ((168, 168), (112, 252))]
    expected = processor.image_processor([Image.fromarray(photo) for photo in photos], return_tensors="pt")
    values, grids = tiny_model.patches([torch.from_numpy(photo) for photo in photos])
    assert torch.equal(grids, expected["image_grid_thw"])
    torch.testing.assert_close(values, expected["pixel_values"], rtol=0, atol=1e-5)


def test_branches_of_one_row_give_the_logits_of_separate_rows(processor: Any, model: Any, compared: Row) -> None:
    rows = [compared, text_row(0)]  # the second pads, and has no photographs
    with torch.no_grad():
        together, labels = tiny_model.answer_logits(model, tiny_model.collate(rows, processor.tokenizer))
        alone = []
        for made in rows:
            for branch, lesson in enumerate(made.branches):
                inputs = encode(processor, made, branch)
                said = len(processor.tokenizer(lesson.completion + tiny_model.CLOSING)["input_ids"])
                asked = len(processor.tokenizer(lesson.prompt + tiny_model.TURN)["input_ids"])
                trained = said if made.photos else asked - 1 + said
                alone.append(model(**inputs).logits[0, -trained - 1 : -1])
    assert len(labels) == len(together)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_it_answers_and_stops(processor: Any, model: Any, compared: Row) -> None:
    inputs = processor.apply_chat_template(
        messages(compared, 0)[:1], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    made = model.generate(**inputs, max_new_tokens=60)
    assert made[0, -1].item() in model.generation_config.eos_token_id


def test_lessons_are_seeded_and_letters_are_mixed() -> None:
    first, second = row(7), row(7)
    assert first.branches == second.branches
    assert all(np.array_equal(a, b) for a, b in zip(first.photos, second.photos, strict=True))
    letters = [lesson.completion for made in map(text_row, range(40)) for lesson in made.branches if lesson.letter]
    assert {"A", "B", "C", "D"} == set(letters)
    assert letters.count("A") < 0.45 * len(letters)


def test_the_right_option_is_the_one_its_letter_names() -> None:
    for made in map(text_row, range(20)):
        for lesson in made.branches:
            if lesson.letter and "\nWhat is said about" not in lesson.prompt and ": the " in lesson.prompt:
                stated = lesson.prompt.split(": the ", 1)[1].split(" is ", 1)[1].splitlines()[0]
                option = next(line for line in lesson.prompt.splitlines() if line.startswith(f"{lesson.completion}. "))
                assert option[3:].lower() == stated.lower()


def test_the_command_pretrains_and_writes_a_model_card(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.tiny.pretrain", "--output", str(tmp_path / "tiny")]
    done = subprocess.run(
        [*command, "--looks", "2", "--steps", "2", "--batch", "2", "--held_out", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 steps of\n  looking, then 2 steps" in (tmp_path / "tiny" / "README.md").read_text(encoding="utf-8")
    from transformers import AutoModelForImageTextToText

    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny").dtype == torch.float32


def test_a_glimpse_names_the_tokens_on_which_the_defect_lies() -> None:
    made = [vision_pretraining.draw_sample(seed, ease) for seed in range(40) for ease in (0.0, 1.0)]
    assert all((g.defect >= 0) or not g.share.any() for g in made)
    assert sum(g.share.sum() for g in made[1::2]) > 1.5 * sum(g.share.sum() for g in made[::2])
    again = vision_pretraining.draw_sample(0, 0.0)
    assert np.array_equal(again.photo, made[0].photo) and np.array_equal(again.share, made[0].share)


def test_looking_changes_the_tower_alone() -> None:
    torch.manual_seed(0)
    model = tiny_model.build_model(tiny_model.build_tokenizer([text_row(0)]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert vision_pretraining.pretrain_vision(model, 0, minutes=0.0, steps=2) == 2
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".visual." in name}


def test_an_output_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    command = [sys.executable, "-m", "train.tiny.pretrain", "--output", str(tmp_path), "--steps", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and "choose an empty --output" in done.stderr
    assert "Traceback" not in done.stderr
