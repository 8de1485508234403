"""echo-tiny has Qwen2-VL's classes, tokens and chat template, and trains on inputs equal to those of its processor."""

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
from train.tiny import inputs, pretrain, vision_pretraining
from train.tiny import model as tiny_model
from train.tiny.lessons import LessonRow, draw_row, draw_text_row

FOLDER = ROOT / "recipes" / "tiny" / "echo-tiny"
MAX_BYTES = 12_000_000
"""Maximum size of the committed folder."""


@pytest.fixture(scope="module")
def processor() -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(FOLDER, local_files_only=True).eval()


@pytest.fixture(scope="module")
def compared() -> LessonRow:
    """A row with a normal image and an inspected one."""
    return next(row for row in map(draw_row, range(100)) if len(row.images) == 2)


def messages(row: LessonRow, branch: int) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": Image.fromarray(image)} for image in row.images]
    lesson = row.branches[branch]
    return [
        {"role": "user", "content": [*images, {"type": "text", "text": row.context + lesson.prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": lesson.completion}]},
    ]


def encode(processor: Any, row: LessonRow, branch: int) -> Any:
    return processor.apply_chat_template(messages(row, branch), tokenize=True, return_dict=True, return_tensors="pt")


def test_it_is_a_small_qwen2_vl_in_float32(processor: Any, model: Any) -> None:
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2VLProcessor"
    assert type(processor.tokenizer).__name__ == "Qwen2Tokenizer"
    assert model.dtype == torch.float32
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= MAX_BYTES


def test_special_tokens_are_single_tokens_and_match_the_config(processor: Any, model: Any) -> None:
    tokenizer = processor.tokenizer
    for token in tiny_model.SPECIAL_TOKENS:
        assert len(tokenizer(token)["input_ids"]) == 1, token
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert model.config.vision_start_token_id == tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
    assert tokenizer.pad_token == "<|endoftext|>"
    assert len(tokenizer) <= model.config.text_config.vocab_size


def test_the_tokenizer_round_trips_any_text(processor: Any) -> None:
    text = "Ünknown wörds, 3.5 µm — 漢字\n\nA. B"
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


def test_the_chat_template_is_that_of_qwen2_vl(processor: Any) -> None:
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Look."}]}]
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Look.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_encoded_branch_matches_chat_template_and_positions(processor: Any, model: Any, compared: LessonRow) -> None:
    for branch, lesson in enumerate(compared.branches):
        expected = encode(processor, compared, branch)
        encoded = inputs.encode_row(dataclasses.replace(compared, branches=(lesson,)), processor.tokenizer)
        assert encoded.ids.tolist() == expected["input_ids"][0].tolist()
        positions, _ = model.model.get_rope_index(
            expected["input_ids"], expected["mm_token_type_ids"], image_grid_thw=expected["image_grid_thw"]
        )
        assert np.array_equal(encoded.positions, positions[:, 0].numpy())
        trained = processor.tokenizer.decode(encoded.ids[encoded.trained].tolist())
        assert trained == lesson.completion + inputs.TURN_END


def test_image_patches_equal_those_of_the_image_processor(processor: Any) -> None:
    rng = np.random.default_rng(0)
    style = parts.random_style(rng, "woven sheet")
    images = [parts.render_part(parts.Part(style, 1), 1, size).image for size in ((168, 168), (112, 252))]
    expected = processor.image_processor([Image.fromarray(image) for image in images], return_tensors="pt")
    values, grids = inputs.image_patches([torch.from_numpy(image) for image in images])
    assert torch.equal(grids, expected["image_grid_thw"])
    torch.testing.assert_close(values, expected["pixel_values"], rtol=0, atol=1e-5)


def test_branches_of_one_row_give_the_logits_of_separate_rows(processor: Any, model: Any, compared: LessonRow) -> None:
    rows = [compared, draw_text_row(0)]  # the second row is padded and has no images
    with torch.no_grad():
        together, labels = inputs.trained_logits(model, inputs.collate_rows(rows, processor.tokenizer))
        separate = []
        for row in rows:
            for branch, lesson in enumerate(row.branches):
                completion = len(processor.tokenizer(lesson.completion + inputs.TURN_END)["input_ids"])
                prompt = len(processor.tokenizer(lesson.prompt + inputs.ASSISTANT_OPENING)["input_ids"])
                trained = completion if row.images else prompt - 1 + completion
                separate.append(model(**encode(processor, row, branch)).logits[0, -trained - 1 : -1])
    assert len(labels) == len(together)
    torch.testing.assert_close(together, torch.cat(separate), rtol=1e-4, atol=1e-4)


def test_it_generates_an_answer_and_stops(processor: Any, model: Any, compared: LessonRow) -> None:
    prompt = processor.apply_chat_template(
        messages(compared, 0)[:1], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**prompt, max_new_tokens=60)
    assert output[0, -1].item() in model.generation_config.eos_token_id


def test_lessons_are_seeded_and_letters_are_balanced() -> None:
    first, second = draw_row(7), draw_row(7)
    assert first.branches == second.branches
    assert all(np.array_equal(a, b) for a, b in zip(first.images, second.images, strict=True))
    letters = [
        lesson.completion for row in map(draw_text_row, range(40)) for lesson in row.branches if lesson.is_letter
    ]
    assert {"A", "B", "C", "D"} == set(letters)
    assert letters.count("A") < 0.45 * len(letters)


def test_the_letter_names_the_stated_option() -> None:
    for row in map(draw_text_row, range(20)):
        for lesson in row.branches:
            if lesson.is_letter and "\nWhat is said about" not in lesson.prompt and ": the " in lesson.prompt:
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
    card = " ".join((tmp_path / "tiny" / "README.md").read_text(encoding="utf-8").split())
    assert "2 steps of vision pretraining and 2 steps of 2 rows" in card
    from transformers import AutoModelForImageTextToText

    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny").dtype == torch.float32


def without_training(card: str) -> str:
    """A model card without its paragraph on training, on one line."""
    start, end = card.index("- **Training**"), card.index("- **Data**")
    return " ".join((card[:start] + card[end:]).split())


def test_the_committed_card_has_the_wording_of_the_command(processor: Any, model: Any) -> None:
    committed = (FOLDER / "README.md").read_text(encoding="utf-8")
    unused = dict.fromkeys(("option", "seed", "vision_steps", "steps", "batch", "minutes", "threads", "date"), "")
    card = pretrain.CARD.format(
        millions=f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}",
        tokens=len(processor.tokenizer),
        kinds=pretrain.enumerate_names([*parts.PRETRAINING_KINDS]),
        defects=pretrain.enumerate_names([*parts.PRETRAINING_DEFECTS]),
        table="".join(line + "\n" for line in committed.splitlines() if line.startswith(("| caption", "| letter"))),
        **unused,
    )
    assert without_training(card) == without_training(committed)


def test_a_sample_labels_the_tokens_on_the_defect() -> None:
    samples = [vision_pretraining.draw_sample(seed, ease) for seed in range(40) for ease in (0.0, 1.0)]
    assert all(sample.defect >= 0 or not sample.share.any() for sample in samples)
    hard, easy = (sum(sample.share.sum() for sample in half) for half in (samples[::2], samples[1::2]))
    assert easy > 1.5 * hard
    again = vision_pretraining.draw_sample(0, 0.0)
    assert np.array_equal(again.image, samples[0].image)
    assert np.array_equal(again.share, samples[0].share)


def test_vision_pretraining_changes_only_the_tower() -> None:
    torch.manual_seed(0)
    model = tiny_model.build_model(tiny_model.build_tokenizer([draw_text_row(0)]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert vision_pretraining.pretrain_vision(model, 0, minutes=0.0, steps=2) == 2
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".visual." in name}


def test_an_output_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    command = [sys.executable, "-m", "train.tiny.pretrain", "--output", str(tmp_path), "--steps", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "choose an empty folder for --output" in done.stderr
    assert "Traceback" not in done.stderr
