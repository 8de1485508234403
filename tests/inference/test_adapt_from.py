"""With adapters that act after the prefix, the engine answers as PEFT does and encodes images once for all roles."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from echo_ft.inference.engine import Engine
from echo_ft.model.adapters import attach_adapters
from echo_ft.model.loading import load_model
from echo_ft.records import LETTERS, ROLES
from tests.conftest import ECHO_TINY, ROUNDING, make_case, make_dataset, random_adapters
from tests.support.adapt_from import logits_of_one_row, plain_inputs
from tests.support.exchanges import exchanges_of

LANGUAGE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STARTS = {"knowledge_guide": "branch", "reasoning_expert": "answer", "decision_maker": "branch"}
NEW_TOKENS = 2


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("late")
    dataset = make_dataset(folder / "data", train=1, validation=1, test=1)
    return random_adapters(folder / "adapters", dataset, dict.fromkeys(ROLES, LANGUAGE), STARTS)


@pytest.fixture(scope="module")
def tuned(adapters):
    return attach_adapters(load_model(str(ECHO_TINY), dtype="float32"), {role: adapters / role for role in ROLES})


@pytest.fixture
def exchanges(tmp_path):
    """The exchanges of two cases with images of different sizes, by role."""
    cases = [make_case(tmp_path), make_case(tmp_path, "line/part/2", ((40, 40), (80, 56), (56, 110)), seed=9)]
    found = [exchange for case in cases for exchange in exchanges_of(case)]
    return {role: [exchange for exchange in found if exchange.role == role] for role in ROLES}


@torch.no_grad()
def plain_answer(plain, start, row_builder, root, exchange):
    """The generated tokens and the letters' probabilities for an exchange with one branch, without our own caches."""
    row = row_builder.load_row(exchange, root)
    inputs = plain_inputs(row_builder, root, row)
    tokens, letters = [], {}
    while len(tokens) < NEW_TOKENS:
        logits = logits_of_one_row(plain, start, inputs, row)[-1]
        if not letters:
            scores = logits.softmax(dim=-1)
            letters = {one: float(scores[row_builder.tokenizer.convert_tokens_to_ids(one)]) for one in LETTERS}
        token = int(logits.argmax())
        if token in plain.generation_config.eos_token_id:
            break
        tokens.append(token)
        for name, value in (("input_ids", token), ("mm_token_type_ids", 0)):
            inputs[name] = torch.cat([inputs[name], inputs[name].new_tensor([[value]])], dim=1)
    return row_builder.tokenizer.decode(tokens, skip_special_tokens=True).strip(), letters


@pytest.mark.parametrize("role", STARTS)
def test_answers_equal_those_of_one_question_at_a_time(adapters, tuned, row_builder, exchanges, tmp_path, role):
    engine = Engine(tuned, row_builder, tmp_path, max_new_tokens=NEW_TOKENS)
    asked = [replace(exchange, branches=exchange.branches[:2]) for exchange in exchanges[role]]
    answers = engine.generate(role, asked)
    plain = PeftModel.from_pretrained(load_model(str(ECHO_TINY), dtype="float32"), adapters / role).eval()
    assert bool(plain.peft_config["default"].alora_invocation_tokens) == (STARTS[role] == "answer")
    changed = 0
    for exchange, generations in zip(asked, answers, strict=True):
        for branch, generation in zip(exchange.branches, generations, strict=True):
            single = replace(exchange, branches=(branch,))
            text, letters = plain_answer(plain, STARTS[role], row_builder, tmp_path, single)
            assert generation.text == text
            for letter, value in generation.letters.items():
                assert math.exp(value) == pytest.approx(letters[letter], abs=ROUNDING)
            with plain.disable_adapter():
                changed += plain_answer(plain, "branch", row_builder, tmp_path, single)[0] != text
    assert changed, "the adapter acts"


def test_roles_that_see_the_same_images_share_their_prefill(tuned, row_builder, exchanges, tmp_path, monkeypatch):
    runs = Counter()
    run = Engine._run_prefixes

    def counting(self, prefixes, features):
        runs.update((prefix.exchange.images, len(prefix.input_ids)) for prefix in prefixes)
        return run(self, prefixes, features)

    monkeypatch.setattr(Engine, "_run_prefixes", counting)
    engine = Engine(tuned, row_builder, tmp_path, max_new_tokens=2)
    together = {role: engine.generate(role, exchanges[role]) for role in STARTS}
    assert set(runs.values()) == {1}
    seen = {exchange.images for role in STARTS for exchange in exchanges[role]}
    assert {images for images, _ in runs} == seen
    for role in STARTS:
        alone = Engine(tuned, row_builder, tmp_path, max_new_tokens=2).generate(role, exchanges[role])
        assert alone == together[role], "what ran before changes no bit"


def test_looks_that_do_not_fit_or_are_no_longer_needed_are_not_kept(
    tuned, row_builder, exchanges, tmp_path, monkeypatch
):
    engine = Engine(tuned, row_builder, tmp_path, max_new_tokens=2)
    expected = engine.generate("decision_maker", exchanges["decision_maker"])
    engine.generate("decision_maker", exchanges["decision_maker"][:1])
    assert len(engine._looks) == 1
    monkeypatch.setattr("echo_ft.inference.engine.LOOK_TOKENS", 1)
    small = Engine(tuned, row_builder, tmp_path, max_new_tokens=2)
    assert small.generate("decision_maker", exchanges["decision_maker"]) == expected
    assert not small._looks
