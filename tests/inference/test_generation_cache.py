"""The cache answers each prompt once per model, across runs, processes and interruptions."""

from __future__ import annotations

import asyncio
import math
import re
from dataclasses import replace

import pytest

from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import BackendError
from echo_ft.inference.generation_cache import GenerationCache
from echo_ft.records import ROLES, Generation
from tests.support.exchanges import exchanges_of

IDENTITIES = {role: {"adapter": role} for role in ROLES}


class Backend:
    """Gives a different answer on every call, and records the ids of the branches it was given."""

    def __init__(self):
        self.branches = []

    def generate(self, role, exchanges):
        results = []
        for exchange in exchanges:
            start = len(self.branches)
            self.branches += [branch.id for branch in exchange.branches]
            numbers = range(start, len(self.branches))
            results.append(
                [
                    Generation(f"{role} ☃ {number}", {"A": -1 / 3 - number, "B": -math.inf}, cut=number % 2 == 0)
                    for number in numbers
                ]
            )
        return results

    async def generate_async(self, role, exchanges):
        return self.generate(role, exchanges)


@pytest.fixture
def exchanges(case):
    return exchanges_of(case)


def open_cache(folder, identities=IDENTITIES, process=0):
    return GenerationCache(folder, identities, process)


def test_a_full_disk_stops_the_run_instead_of_failing_the_case(exchanges, tmp_path):
    cache = open_cache(tmp_path)
    (tmp_path / "0.jsonl").symlink_to("/dev/full")
    with pytest.raises(BackendError, match=r"no space left in .*rerun the same command to resume"):
        cache.wrap(Backend().generate)("decision_maker", exchanges[:1])


def test_a_cache_of_an_older_version_can_be_opened(exchanges, tmp_path):
    (tmp_path / "0.jsonl").write_text('{"an old key": ["text", {"A": -1.0}]}')
    backend = Backend()
    open_cache(tmp_path).wrap(backend.generate)("decision_maker", exchanges[:1])
    open_cache(tmp_path).wrap(backend.generate)("decision_maker", exchanges[:1])
    assert backend.branches == [branch.id for branch in exchanges[0].branches]


def test_only_new_branches_reach_the_backend(exchanges, tmp_path):
    backend = Backend()
    generate = open_cache(tmp_path).wrap(backend.generate)
    exchange = exchanges[0]
    some = replace(exchange, branches=exchange.branches[1::2])
    first = generate("decision_maker", [some])
    whole = generate("decision_maker", [exchange])
    assert backend.branches == [branch.id for branch in (*exchange.branches[1::2], *exchange.branches[::2])]
    assert whole[0][1::2] == first[0]
    assert len({one.text for one in whole[0]}) == len(exchange.branches)
    assert generate("decision_maker", []) == []


def test_the_key_covers_role_model_and_prompt_but_not_the_case(exchanges, tmp_path):
    backend, exchange = Backend(), exchanges[0]
    open_cache(tmp_path).wrap(backend.generate)("decision_maker", [exchange])
    count = len(exchange.branches)
    assert len(backend.branches) == count
    same = replace(exchange, case="another", branches=tuple(replace(one, id="x") for one in exchange.branches))
    open_cache(tmp_path).wrap(backend.generate)("decision_maker", [same])
    assert len(backend.branches) == count
    others = [
        ("decision_maker", replace(exchange, images=exchange.images[::-1]), IDENTITIES),
        ("decision_maker", replace(exchange, context=exchange.context + "More.\n"), IDENTITIES),
        ("decision_maker", exchange, {**IDENTITIES, "decision_maker": {"adapter": "trained again"}}),
        ("reasoning_expert", exchange, IDENTITIES),
    ]
    for number, (role, one, identities) in enumerate(others, start=2):
        open_cache(tmp_path, identities).wrap(backend.generate)(role, [one])
        assert len(backend.branches) == number * count


def test_any_changed_byte_of_a_generation_is_named(exchanges, tmp_path, capsys):
    backend = Backend()
    generate = open_cache(tmp_path).wrap(backend.generate)
    stored = [generate("decision_maker", [one]) for one in exchanges[:2]]
    path, refused = tmp_path / "0.jsonl", 0
    content = path.read_bytes()
    places = range(0, len(content), 5)
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            again = open_cache(tmp_path).wrap(backend.generate)
        except EchoError as error:
            assert re.search(rf"{re.escape(str(path))}:\d has changed since it was written; delete", str(error))
            refused += 1
        else:  # it looks cut off, is left out and generated again
            assert f"{path} has 1 lines that a killed command cut off" in capsys.readouterr().err
            before = len(backend.branches)
            assert [again("decision_maker", [one]) for one in exchanges[:2]] != stored
            assert len(backend.branches) > before
    assert refused >= len(places) - 4


def test_other_processes_get_exact_copies_and_skip_partial_lines(exchanges, tmp_path):
    backend = Backend()
    first, second = ([one] for one in exchanges[:2])
    generate = open_cache(tmp_path).wrap(backend.generate)
    stored = [generate("decision_maker", one) for one in (first, second)]
    later = open_cache(tmp_path, process=1).wrap_async(backend.generate_async)
    count = len(backend.branches)
    assert [asyncio.run(later("decision_maker", one)) for one in (first, second)] == stored
    assert len(backend.branches) == count
    path = tmp_path / "0.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    for _ in range(2):  # the second cache finds what the first one wrote after the partial line
        again = open_cache(tmp_path).wrap(backend.generate)
        assert again("decision_maker", first) == stored[0]
        assert again("decision_maker", second)
    assert len(backend.branches) == count + len(second[0].branches)
