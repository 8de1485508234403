"""echo-tiny has Qwen2-VL's classes, tokens and chat template, and trains on the same inputs as its processor makes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from echo_ft.images.boxes import parse_boxes
from tests.conftest import ROOT
from train.tiny import attention, inputs, loop, measure, pretrain, stages
from train.tiny import model as tiny_model
from train.tiny.lessons import STATEMENTS, LessonRow, draw_text_row, image_lessons, random_labels
from train.tiny.pool import IMAGES_PER_PRODUCT, LABELS, Pool, draw_pool, open_pool
from train.tiny.shifts import encode_as_shifts, normalize

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
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    folder = tmp_path_factory.mktemp("pool") / "pool"
    draw_pool(folder, products=16, first=0)
    return open_pool(folder)


@pytest.fixture(scope="module")
def drawn(pool: Pool) -> inputs.DrawnRows:
    return inputs.draw_rows(np.random.default_rng(0), pool, count=12, branches=4)


@pytest.fixture(scope="module")
def compared(drawn: inputs.DrawnRows) -> LessonRow:
    """A row with a normal image and an inspected one."""
    return next(row for row in drawn.rows if len(row.images) == 2)


@pytest.fixture
def student(tmp_path_factory: pytest.TempPathFactory) -> stages.Student:
    """echo-tiny before its pretraining."""
    return pretrain.build_student(0, tmp_path_factory.mktemp("work"), ())  # type: ignore[no-any-return]


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


def test_shifts_give_the_features_of_transformers_own_tower(
    processor: Any, model: Any, drawn: inputs.DrawnRows
) -> None:
    images = [image for row in drawn.rows[:2] for image in row.images]
    read = processor.image_processor([Image.fromarray(image) for image in images], return_tensors="pt")
    with torch.no_grad():
        expected = model.get_image_features(**read, return_dict=True).pooler_output
        patches = normalize(torch.from_numpy(np.stack(images)).float(), tiny_model.PATCH_SIZE)
        _, tokens = encode_as_shifts(model.model.visual, patches)
    expected = torch.stack(list(expected)).view_as(tokens)
    assert (tokens - expected).abs().mean() < 0.02 * expected.std()


def test_branches_of_one_row_give_the_logits_of_separate_rows(processor: Any, model: Any, compared: LessonRow) -> None:
    rows = [compared, draw_text_row(0)]  # the second row is padded and has no images
    read = processor.image_processor([Image.fromarray(image) for image in compared.images], return_tensors="pt")
    with torch.no_grad():
        tokens = torch.cat(list(model.get_image_features(**read, return_dict=True).pooler_output))
        batch = inputs.collate_rows(rows, processor.tokenizer)
        language = model.model.language_model
        states = inputs.text_states(language, batch, tokens, 0, len(language.layers))[-1]
        together, labels = inputs.trained_logits(model, batch, states)
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


def test_lessons_are_seeded_and_letters_are_balanced(pool: Pool) -> None:
    first, second = (inputs.draw_rows(np.random.default_rng(7), pool, count=3, branches=3) for _ in range(2))
    assert [row.branches for row in first.rows] == [row.branches for row in second.rows]
    assert torch.equal(first.images, second.images)
    letters = [
        lesson.completion for row in map(draw_text_row, range(40)) for lesson in row.branches if lesson.is_letter
    ]
    assert {"A", "B", "C", "D"} == set(letters)
    assert letters.count("A") < 0.45 * len(letters)


def test_lessons_tell_the_truth_about_the_query(pool: Pool) -> None:
    drawn = inputs.draw_rows(np.random.default_rng(3), pool, count=40, branches=4)
    asked = 0
    for row, defect in zip(drawn.rows, drawn.targets.defect.tolist(), strict=True):
        for lesson in row.branches:
            if lesson.is_letter and lesson.skill == "detection":
                option = next(line for line in lesson.prompt.splitlines() if line.startswith(f"{lesson.completion}. "))
                assert option[3:] == ("Yes." if defect >= 0 else "No.")
                asked += 1
    assert asked > 20


def test_lessons_name_the_boxes_around_what_the_mask_covers(pool: Pool) -> None:
    drawn = inputs.draw_rows(np.random.default_rng(4), pool, count=40, branches=5)
    asked = 0
    for row, shares in zip(drawn.rows, drawn.targets.shares.numpy(), strict=True):
        for lesson in row.branches:
            if lesson.skill == "boxes":
                boxes = parse_boxes(lesson.completion)
                assert boxes is not None
                assert bool(boxes) == shares.any()
                clear = {(int(1000 * (x + 0.5) / 24), int(1000 * (y + 0.5) / 24)) for y, x in np.argwhere(shares > 0.5)}
                assert all(any(x0 < x < x1 and y0 < y < y1 for x0, y0, x1, y1 in boxes) for x, y in clear)
                asked += 1
    assert asked > 5


def test_the_letter_names_the_stated_option() -> None:
    for row in map(draw_text_row, range(20)):
        for lesson in row.branches:
            if lesson.is_letter and "\nWhat is said about" not in lesson.prompt and ": the " in lesson.prompt:
                stated = lesson.prompt.split(": the ", 1)[1].split(" is ", 1)[1].splitlines()[0]
                option = next(line for line in lesson.prompt.splitlines() if line.startswith(f"{lesson.completion}. "))
                assert option[3:].lower() == stated.lower()


def test_the_letter_names_what_is_stated_beside_images() -> None:
    asked = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        context, branches = image_lessons(rng, random_labels(rng), normals=1)
        for lesson in branches:
            if lesson.skill == "stated":
                options = {line[0]: line[3:] for line in lesson.prompt.splitlines() if line[1:3] == ". "}
                statements = [line for line in f"{context}{lesson.prompt}".splitlines() if line.startswith(STATEMENTS)]
                named = [letter for letter, option in options.items() if option.lower()[:-1] in statements[0].lower()]
                assert lesson.completion in named
                asked += 1
    assert asked > 20


TINY = ["--steps_share", "0.0005", "--products", "10", "--held_out", "6"]
"""Two or three steps of each stage."""


def test_the_command_pretrains_and_writes_a_model_card(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.tiny.pretrain", "--output", str(tmp_path / "tiny")]
    done = subprocess.run([*command, "--work", str(tmp_path / "work"), *TINY], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "tiny" / "README.md").read_text(encoding="utf-8")
    for stage in pretrain.STEPS:
        figures = json.loads((tmp_path / "work" / f"{stage}.json").read_text(encoding="utf-8"))
        assert f"| {stage} | {figures['steps']} |" in card
    assert "| answer | letter | 0." in card
    from transformers import AutoModelForImageTextToText

    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny").dtype == torch.float32


@pytest.mark.slow
def test_a_stage_that_was_killed_before_its_figures_is_measured(tmp_path: Path) -> None:
    command = ["--output", str(tmp_path / "o"), "--work", str(tmp_path / "w"), "--stages", "read", *TINY]
    pretrain.main(command)
    weights, figures = tmp_path / "w" / "read.pt", tmp_path / "w" / "read.json"
    before, measured = weights.read_bytes(), figures.read_text()
    figures.unlink()
    pretrain.main(command)
    assert weights.read_bytes() == before
    assert figures.read_text() == measured


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "1"], "has stages of --seed 0, not 1; use the same or another --work"),
        (["--products", "3"], "--products is 3; set it to 8 or more"),
        (["--held_out", "2"], "--held_out is 2; set it to 5 or more"),
        (["--threads", "0"], "--threads is 0; set it to 1 or more"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "options.json").write_text(json.dumps({"seed": 0}))
    with pytest.raises(pretrain.EchoError, match=message):
        pretrain.main(["--output", str(tmp_path / "o"), "--work", str(tmp_path), *options])


def test_stages_of_other_tokens_are_refused(tmp_path: Path) -> None:
    pretrain.check_tokens({"a": 0, "b": 1}, tmp_path)
    pretrain.check_tokens({"b": 1, "a": 0}, tmp_path)
    with pytest.raises(pretrain.EchoError, match="tokens of other lessons or prompts; use another --work"):
        pretrain.check_tokens({"a": 1, "b": 0}, tmp_path)


def test_stages_wait_for_those_that_they_start_from(tmp_path: Path) -> None:
    with pytest.raises(pretrain.EchoError, match="train the stage look first"):
        pretrain.main(["--output", str(tmp_path / "o"), "--work", str(tmp_path / "w"), "--stages", "compare", *TINY])
    with pytest.raises(pretrain.EchoError, match="--stages: there is no stage 'see'; choose from read, look"):
        pretrain.main(["--output", str(tmp_path / "o"), "--stages", "see"])


def without_training(card: str) -> str:
    """A model card on one line, without its figures and its paragraph on training."""
    start, end = card.index("- **Training**"), card.index("- **Data**")
    lines = (card[:start] + card[end:]).splitlines()
    text = " ".join(" ".join(line for line in lines if not line.startswith("|")).split())
    return text[: text.index("In rows of text")] + text[text.index("Limits") :]


def test_the_committed_card_has_the_wording_of_the_command(model: Any) -> None:
    figures = {
        "known: letter by skill, a": 0.5,
        "known: letter by skill, b": 0.5,
        "known: tower": 0.5,
        "new: tower": 0.5,
        "letters in text": 0.5,
    }
    results = {stage: {"steps": 1, "minutes": 1.0, "figures": figures} for stage in pretrain.STEPS}
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    card = pretrain.model_card(results, millions, pretrain.PretrainConfig(output=""))
    committed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert without_training(card) == without_training(committed)


def test_a_query_without_a_visible_defect_counts_as_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    products = 8
    count = products * IMAGES_PER_PRODUCT
    labels = np.full(count, -1, np.int16).astype(LABELS)
    labels["defect"][2::IMAGES_PER_PRODUCT] = 0
    labels["defect"][2] = -1  # the drawn defect of the first product cannot be seen
    scores = iter(labels["defect"].reshape(products, -1)[:, [1, 2]].ravel() + 1.0)

    def exact(_stage: str, _student: Any, rows: list[LessonRow]) -> dict[str, Any]:
        return {"tower": torch.tensor([next(scores) for _ in rows])}

    monkeypatch.setattr(measure, "_detection_scores", exact)
    pool = Pool(np.zeros((count, 1, 1, 3), np.uint8), np.zeros((count, 1, 1), np.uint8), labels)
    student: Any = None
    assert measure.measure_detection("look", student, pool) == {"tower": 1.0}


@pytest.mark.parametrize(("stage", "trained"), [("read", {"reading"}), ("look", {"visual", "heads"})])
def test_the_first_stages_change_only_their_part(stage: str, trained: set[str], student: Any, pool: Pool) -> None:
    modules = student.modules("reading", "seeing", "visual", "heads")
    before = {name: value.clone() for name, value in modules.state_dict().items()}
    parts = stages.STAGES[stage](student, pool)
    sum(parts.losses(np.random.default_rng(0), 0.5).values()).backward()
    for optimizer in parts.optimizers:
        optimizer.step()
    changed = {name for name, value in modules.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == trained == set(parts.trained)


def test_looking_leaves_the_shifts_as_they_are(student: Any, pool: Pool) -> None:
    parts = stages.look(student, pool)
    width = student.visual.config.embed_dim
    fixed = [block.attn.qkv.bias[: 2 * width].clone() for block in student.visual.blocks]
    for step in range(2):
        sum(parts.losses(np.random.default_rng(step), 0.5).values()).backward()
        for optimizer in parts.optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for block, bias in zip(student.visual.blocks, fixed, strict=True):
        assert not block.attn.qkv.weight[: 2 * width].any()
        assert torch.equal(block.attn.qkv.bias[: 2 * width], bias)


def test_new_layers_start_without_a_change_to_text(student: Any) -> None:
    batch = inputs.collate_rows([draw_text_row(1)], student.tokenizer)
    with torch.no_grad():
        before, *after = inputs.text_states(student.language, batch, None, 0, attention.READING.start)
    assert all(torch.equal(states, before) for states in after)


def comparing_attention(student: Any, row: LessonRow) -> tuple[dict[str, Any], Any]:
    """Return the batch of a row, and the attention (heads, L, L) of the comparing layer before it is trained."""
    attention.prepare_comparison(student.model, student.tokenizer)
    batch = inputs.collate_rows([row], student.tokenizer)
    student.model.set_attn_implementation("eager")
    language = student.language
    with torch.no_grad():
        states = language.embed_tokens(batch["ids"])
        layer = language.layers[attention.COMPARING]
        mask = torch.where(batch["attention"], 0.0, -torch.inf)
        rotary = language.rotary_emb(states, batch["positions"])
        _, weights = layer.self_attn(layer.input_layernorm(states), position_embeddings=rotary, attention_mask=mask)
    return batch, weights[0]


def test_the_comparing_layer_starts_at_the_same_place_of_the_reference(student: Any, compared: LessonRow) -> None:
    batch, weights = comparing_attention(student, dataclasses.replace(compared, branches=()))
    reference, query = batch["is_image"][0].nonzero()[:, 0].split(36)
    sharp = weights[2, query]
    assert torch.equal(sharp.argmax(1), reference)
    assert sharp.gather(1, reference[:, None]).mean() > 0.5


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_comparing_layer_starts_by_telling_rows_and_columns(student: Any, drawn: Any, count: int) -> None:
    image = drawn.rows[0].images[0]
    batch, weights = comparing_attention(student, LessonRow((image,) * count, "Look at the part.\n", ()))
    starts = (batch["ids"][0] == student.tokenizer.convert_tokens_to_ids("<|vision_start|>")).nonzero()[:, 0]
    for start, tokens in zip(starts, batch["is_image"][0].nonzero()[:, 0].split(36), strict=True):
        rows, columns = (weights[head, tokens, start].view(6, 6) for head in (0, 1))
        for shares in (rows, columns.T):
            assert (shares.mean(1).diff() < -0.03).all()
            assert shares[0].min() > 0.75 and shares[-1].max() < 0.25
            assert shares.std(1).max() < 0.02
        elsewhere = starts[starts != start]
        assert (weights[:2][:, tokens][:, :, elsewhere] < 0.01).all()


def test_the_heads_for_rows_and_columns_start_without_a_change_to_text(student: Any) -> None:
    attention.prepare_comparison(student.model, student.tokenizer)
    layer = student.language.layers[attention.COMPARING]
    batch = inputs.collate_rows([draw_text_row(1)], student.tokenizer)
    with torch.no_grad():
        for other in (layer.self_attn.o_proj.weight[:, 64:], layer.mlp.down_proj.weight):
            other.zero_()
        before, after = inputs.text_states(student.language, batch, None, 0, attention.COMPARING + 1)
    assert 0 < (after - before).norm() < 0.02 * before.norm()


def test_a_stopped_stage_ends_in_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)

    def train(folder: Path, stop_at: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        optimizers = [
            torch.optim.Muon([layer.weight], lr=0.1, adjust_lr_fn="match_rms_adamw"),
            loop.adamw([layer.bias], 0.1),
        ]
        steps = 0

        def losses(rng: np.random.Generator, done: float) -> dict[str, torch.Tensor]:
            nonlocal steps
            steps += 1
            if steps == stop_at:
                raise KeyboardInterrupt
            return {"all": layer(torch.from_numpy(rng.normal(size=(3, 4)).astype(np.float32))).square().mean()}

        loop.train_stage("look", (0, 1), folder, layer, optimizers, losses, loop.Schedule(9))
        assert steps == (9 if stop_at is None else 9 - first)
        return layer.weight.detach()

    first = 0
    whole = train(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", 5)
    first = 4
    resumed = train(tmp_path / "stopped", 99)
    assert torch.equal(whole, resumed)
    assert [file.name for file in (tmp_path / "stopped").iterdir()] == ["look.pt"]


def test_an_output_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(pretrain.EchoError, match="choose an empty folder for --output"):
        pretrain.main(["--output", str(tmp_path)])
