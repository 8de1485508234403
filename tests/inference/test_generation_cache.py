"""What was said once is not asked again: by role, speaker, images and words, whoever asks, before and after a stop."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest

from echo_ft.inference.generation_cache import GenerationCache
from echo_ft.records import ROLES, Generation
from tests.support.exchanges import exchanges_of

SPEAKERS = {role: {"adapter": role} for role in ROLES}


class Backend:
    """Says something else whenever it is asked, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def generate(self, role, exchanges):
        said = []
        for exchange in exchanges:
            start = len(self.asked)
            self.asked += [branch.id for branch in exchange.branches]
            numbers = range(start, len(self.asked))
            said.append(
                [Generation(f"{role} ☃ {number}", {"A": -1 / 3 - number, "B": -math.inf}) for number in numbers]
            )
        return said

    async def generate_async(self, role, exchanges):
        return self.generate(role, exchanges)


@pytest.fixture
def asked(case):
    return exchanges_of(case)


def kept(folder, speakers=SPEAKERS, process=0):
    return GenerationCache(folder, speakers, process)


def test_only_what_is_new_is_asked_and_every_branch_gets_its_own_answer(asked, tmp_path):
    backend = Backend()
    generate = kept(tmp_path).wrap(backend.generate)
    exchange = asked[0]
    some = replace(exchange, branches=exchange.branches[1::2])
    first = generate("decision_maker", [some])
    whole = generate("decision_maker", [exchange])
    assert backend.asked == [branch.id for branch in (*exchange.branches[1::2], *exchange.branches[::2])]
    assert whole[0][1::2] == first[0] and len({one.text for one in whole[0]}) == len(exchange.branches)
    assert generate("decision_maker", []) == []


def test_who_is_asked_and_what_is_shown_tell_answers_apart_and_the_case_does_not(asked, tmp_path):
    backend, exchange = Backend(), asked[0]
    kept(tmp_path).wrap(backend.generate)("decision_maker", [exchange])
    count = len(exchange.branches)
    assert len(backend.asked) == count
    same = replace(exchange, case="another", branches=tuple(replace(one, id="x") for one in exchange.branches))
    kept(tmp_path).wrap(backend.generate)("decision_maker", [same])
    assert len(backend.asked) == count
    others = [
        ("decision_maker", replace(exchange, images=exchange.images[::-1]), SPEAKERS),
        ("decision_maker", replace(exchange, context=exchange.context + "More.\n"), SPEAKERS),
        ("decision_maker", exchange, {**SPEAKERS, "decision_maker": {"adapter": "trained again"}}),
        ("reasoning_expert", exchange, SPEAKERS),
    ]
    for number, (role, one, speakers) in enumerate(others, start=2):
        kept(tmp_path, speakers).wrap(backend.generate)(role, [one])
        assert len(backend.asked) == number * count


def test_another_process_finds_it_bit_for_bit_and_half_a_line_is_asked_again(asked, tmp_path):
    backend = Backend()
    first, second = ([one] for one in asked[:2])
    generate = kept(tmp_path).wrap(backend.generate)
    said = [generate("decision_maker", one) for one in (first, second)]
    later = kept(tmp_path, process=1).wrap_async(backend.generate_async)
    count = len(backend.asked)
    assert [asyncio.run(later("decision_maker", one)) for one in (first, second)] == said
    assert len(backend.asked) == count
    path = tmp_path / "0.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    for _ in range(2):  # what is written after half a line is found the next time
        again = kept(tmp_path).wrap(backend.generate)
        assert again("decision_maker", first) == said[0] and again("decision_maker", second)
    assert len(backend.asked) == count + len(second[0].branches)
