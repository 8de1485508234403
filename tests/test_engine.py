"""The engine says what asking one question at a time would say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from echo_ft.engine import Engine
from tests.conftest import make_case
from tests.test_layout import alone, exchanges_of


def ask_one(model, layout, exchange, root, max_new_tokens):
    """Plain transformers: one question, one `generate`. Returns the text and the first token's log-probabilities."""
    content = [{"type": "image"}] * len(exchange.images)
    content.append({"type": "text", "text": exchange.context + exchange.branches[0].prompt})
    text = layout.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    images = [Image.open(root / image).convert("RGB") for image in exchange.images]
    inputs = layout.processor(text=[text], images=images, return_tensors="pt")
    out = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    said = layout.tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said.strip(), torch.log_softmax(out.logits[0][0].float(), dim=-1)


@pytest.fixture
def exchanges(tmp_path):
    cases = [
        make_case(tmp_path),
        make_case(tmp_path, "line/part/2", ((40, 40), (80, 56), (56, 110)), seed=9),
    ]
    return [exchange for case in cases for exchange in exchanges_of(case)]


def test_every_answer_is_that_of_one_question_at_a_time(model, layout, exchanges, tmp_path):
    engine = Engine(model, layout, tmp_path, max_new_tokens=12)
    said = engine.speak("decision_maker", exchanges)
    for exchange, utterances in zip(exchanges, said, strict=True):
        for single, utterance in zip(alone(exchange), utterances, strict=True):
            text, scores = ask_one(model, layout, single, tmp_path, 12)
            assert utterance.text == text
            for letter, value in utterance.letters.items():
                expected = scores[layout.tokenizer.convert_tokens_to_ids(letter)].exp().item()
                assert torch.tensor(value).exp().item() == pytest.approx(expected, abs=1e-5)


def texts(said):
    return [[utterance.text for utterance in utterances] for utterances in said]


def test_one_answer_token_is_the_first_and_takes_no_step_of_decoding(model, layout, exchanges, tmp_path, monkeypatch):
    steps = []
    step = Engine._step
    monkeypatch.setattr(Engine, "_step", lambda self, *inputs: steps.append(1) or step(self, *inputs))
    first = Engine(model, layout, tmp_path, max_new_tokens=6, answer_tokens=1)
    answers, steps_of_answers = first.speak("decision_maker", exchanges), len(steps)
    words = first.speak("reasoning_expert", exchanges)
    full = Engine(model, layout, tmp_path, max_new_tokens=6).speak("decision_maker", exchanges)
    assert steps_of_answers == 1 < len(steps) - 1
    for short, long in zip(answers, full, strict=True):
        for one, other in zip(short, long, strict=True):
            assert one.letters == pytest.approx(other.letters, abs=1e-6)
            assert other.text.startswith(one.text) and one.text.count(" ") == 0
    assert texts(words) == texts(full) != texts(answers), "what the others say is not cut"


def test_batch_order_and_kept_features_change_nothing(model, layout, exchanges, tmp_path):
    engine = Engine(model, layout, tmp_path, max_new_tokens=8)
    together = engine.speak("decision_maker", exchanges)
    again = engine.speak("decision_maker", exchanges)
    one_by_one = [engine.speak("decision_maker", [exchange])[0] for exchange in reversed(exchanges)][::-1]
    small = Engine(model, layout, tmp_path, max_new_tokens=8, kept_images=1).speak("decision_maker", exchanges)
    for other in (again, one_by_one, small):
        assert texts(other) == texts(together)


def test_an_image_is_encoded_once_however_often_it_is_shown(model, layout, exchanges, tmp_path, monkeypatch):
    seen = []
    original = model.model.get_image_features
    monkeypatch.setattr(
        model.model,
        "get_image_features",
        lambda pixels, grid, **options: seen.append(len(grid)) or original(pixels, grid, **options),
    )
    engine = Engine(model, layout, tmp_path, max_new_tokens=1)
    engine.speak("decision_maker", exchanges)
    engine.speak("reasoning_expert", exchanges)
    assert sum(seen) == len({image for exchange in exchanges for image in exchange.images})


def test_an_exchange_without_references_can_be_asked(model, layout, case, tmp_path):
    engine = Engine(model, layout, tmp_path, max_new_tokens=2)
    bare = replace(exchanges_of(case)[-1], images=(case.seen.query,))
    assert len(engine.speak("decision_maker", [bare])[0]) == len(bare.branches)
    assert engine.speak("decision_maker", []) == []
