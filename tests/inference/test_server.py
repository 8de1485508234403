"""A server gets the engine's prompts and pixels, yields the same records, and no bad connection loses an answer."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import BackendError, Outcome, PipelineConfig, run_cases_async
from echo_ft.files import read_jsonl
from echo_ft.inference import server as server_module
from echo_ft.inference.server import Server
from echo_ft.model.loading import load_processor
from echo_ft.model.rows import RowBuilder
from echo_ft.provenance import seal_folder
from echo_ft.records import ROLES, Prediction, Trace
from evaluation.run import main as run_main
from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS, draw, make_case, make_dataset, random_adapters
from tests.support.exchanges import exchanges_of
from tests.support.real_servers import address, free_port, transformers_serve
from tests.support.servers import LETTERS, Answer, FakeServer, ask_server, completion, shown_images, text_of

pytest.importorskip("openai", reason="needs the extra `serving`")

BUDGET = (12544, 28224)
"""Pixel budget of echo-tiny's own processor, which `transformers serve` uses."""


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


pytestmark = pytest.mark.filterwarnings("ignore:.*retrying for")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_RETRY_WAIT", 0.01)
    monkeypatch.setattr(server_module, "LONGEST_RETRY_WAIT", 0.05)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), train=1, validation=1, test=3)


@pytest.fixture(scope="module")
def served_builder() -> RowBuilder:
    return RowBuilder(load_processor(str(ECHO_TINY), None, *BUDGET))


def run(dataset: Path, output: Path, *options: Any, budget: tuple[int, int] = BUDGET) -> None:
    values = {"dataset": dataset, "output": output, "model_name_or_path": ECHO_TINY, "dtype": "float32"}
    values |= {"min_pixels": budget[0], "max_pixels": budget[1], "max_new_tokens": 12, "batch_size": 6}
    arguments = [part for name, value in values.items() for part in (f"--{name}", value)]
    run_main([str(argument) for argument in (*arguments, *options)])


def rows(folder: Path, name: str, cls: type) -> list[Any]:
    return sorted(read_jsonl(folder / name, cls), key=str)


def records(folder: Path) -> tuple[list[Any], list[Any]]:
    return rows(folder, "predictions.jsonl", Prediction), rows(folder, "traces.jsonl", Trace)


def test_a_request_has_the_images_and_then_the_rendered_prompt(fake, row_builder, case, tmp_path):
    for role in ROLES:
        exchanges = [exchange for exchange in exchanges_of(case) if exchange.role == role]
        fake.requests.clear()
        ask_server(fake, row_builder, tmp_path, exchanges, role)
        expected = {e.context + b.prompt: e.images for e in exchanges for b in e.branches}
        assert sorted(map(text_of, fake.requests)) == sorted(expected)
        for body in fake.requests:
            images = expected[text_of(body)]
            assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url"] * len(images) + ["text"]
            assert len(body["messages"]) == 1
            assert body["model"] == f"echo-{role}"
            for name, image in zip(images, shown_images(body), strict=True):
                _, rows, columns = row_builder.grid(*Image.open(tmp_path / name).size)
                assert image.size == (7 * columns, 7 * rows)
            assert (body["temperature"], body["max_tokens"]) == (0, 12)
            assert ("logprobs" in body) == (role == "decision_maker")


def test_a_reply_that_ends_at_the_token_limit_is_marked(fake, row_builder, case, tmp_path):
    def cut(body):
        reply = completion(body)
        reply["choices"][0]["finish_reason"] = "length" if "the object in" in text_of(body) else "stop"
        return reply

    fake.answer = cut
    exchanges = [exchange for exchange in exchanges_of(case) if exchange.role == "decision_maker"]
    marks = [one.cut for own in ask_server(fake, row_builder, tmp_path, exchanges) for one in own]
    assert marks == ["the object in" in branch.prompt for exchange in exchanges for branch in exchange.branches]
    assert {*marks} == {True, False}


def test_control_tokens_in_a_reply_are_dropped_as_an_engine_does(fake, row_builder, case, tmp_path):
    def boxed(body):
        reply = completion(body)
        reply["choices"][0]["message"]["content"] = "a dent <|box_start|>(1,2),(30,40)<|box_end|><|im_end|>"
        return reply

    fake.answer = boxed
    exchange = next(exchange for exchange in exchanges_of(case) if exchange.role == "knowledge_guide")
    (own,) = ask_server(fake, row_builder, tmp_path, [exchange], "knowledge_guide")
    assert {one.text for one in own} == {"a dent (1,2),(30,40)"}


@pytest.mark.parametrize("takes", [True, False])
def test_the_penalty_of_the_models_config_is_switched_off_where_the_server_takes_it(fake, dataset, tmp_path, takes):
    """vLLM accepts this field; `transformers serve` rejects unknown fields and reads frequency_penalty instead."""

    def strict(body):
        return completion(body) if takes or "repetition_penalty" not in body else (422, {"detail": "Unexpected fields"})

    fake.answer = strict
    run(dataset, tmp_path / "run", "--server", fake.url, "--server_patience", 1)
    sent = [body.get("repetition_penalty") for body in fake.requests]
    assert sent == [1.0] * len(sent) if takes else sent == [1.0] + [None] * (len(sent) - 1)
    assert {body["frequency_penalty"] for body in fake.requests} == {0}


@pytest.mark.parametrize("size", [(37, 400), (900, 700), (20, 20), (168, 168)])
def test_the_server_gets_the_pixels_that_training_used(fake, served_builder, case, tmp_path, size):
    name = draw(tmp_path / "odd.png", size, seed=3)
    ask_server(fake, served_builder, tmp_path, [replace(exchanges_of(case)[-1], images=(name,))])
    (sent,) = shown_images(fake.requests[0])
    ours = served_builder.image_processor(images=[Image.open(tmp_path / name)], return_tensors="np")
    theirs = served_builder.image_processor(images=[sent], return_tensors="np")
    np.testing.assert_array_equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    np.testing.assert_array_equal(ours["pixel_values"], theirs["pixel_values"])


def outcomes(
    fake: FakeServer,
    row_builder: RowBuilder,
    root: Path,
    cases,
    settings: PipelineConfig = PipelineConfig(),
    **options: Any,
):
    found: dict[str, Any] = {}

    async def run_all() -> None:
        async with Server(fake.url, "echo", row_builder, root, 12, max_concurrent=4, **options) as server:
            await run_cases_async(
                cases, server.generate, settings, 4, lambda case, outcome: found.update({case.id: outcome})
            )

    asyncio.run(run_all())
    return [found[case.id] for case in cases]


def test_probabilities_come_from_the_servers_top_tokens(fake, row_builder, case, tmp_path):
    (outcome,) = outcomes(fake, row_builder, tmp_path, [case])
    by_kind = {one.kind: one for one in outcome.predictions}
    odds = math.exp(-3.0 + 0.5)
    assert by_kind["Anomaly Detection"].probabilities == pytest.approx({"A": odds / (1 + odds), "B": 1 / (1 + odds)})
    assert set(by_kind["Defect Classification"].probabilities) == set("ABCD")
    assert all(one.parsed == "B" and one.text == "B" for one in outcome.predictions)


@pytest.mark.parametrize("missing", ["every probability", "a letter's"])
def test_missing_probabilities_are_not_guessed(fake, row_builder, case, tmp_path, monkeypatch, missing):
    if missing == "a letter's":
        monkeypatch.delitem(LETTERS, "D")
    else:
        fake.answer = lambda body: completion(body, logprobs=False)
    (outcome,) = outcomes(fake, row_builder, tmp_path, [case])
    unknown = [one.kind for one in outcome.predictions if one.probabilities is None]
    assert unknown == (["Defect Classification"] if missing == "a letter's" else [o.kind for o in outcome.predictions])
    assert all(one.parsed == "B" for one in outcome.predictions), "the text decides"
    (outcome,) = outcomes(fake, row_builder, tmp_path, [case], PipelineConfig(answer="logits"))
    assert [one.kind for one in outcome.predictions if one.probabilities is None] == unknown
    best = "B" if missing == "a letter's" else None  # the missing letter is less likely than those in the reply
    assert all(one.parsed == best for one in outcome.predictions)


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ({"A": -0.5, "B": -3.0}, {"A": -0.5, "B": -3.0}),
        ({"A": -0.01, " A": -6.0, "Yes": -9.0}, {"A": -0.01, "B": -9.0}),  # B is at most as likely as the last token
        ({"A": -1e-4, "Yes": -2.0}, {"A": -1e-4, "B": math.log(1e-6)}),  # nothing is left for B
        ({"B": 0.0}, {"B": 0.0, "A": math.log(1e-6)}),
        ({"C": -0.1, "Yes": -9.0}, {}),  # then nothing is known about A and B
    ],
)
def test_an_inspector_bounds_a_letter_that_the_server_leaves_out(fake, row_builder, case, tmp_path, top, expected):
    fake.answer = likely(*top.items())
    exchange = exchanges_of(case)[-1]
    (own,) = ask_server(fake, row_builder, tmp_path, [exchange], bounds_letters=True)
    assert {letter: own[0].letters[letter] for letter in expected} == pytest.approx(expected)
    assert ("B" in own[0].letters) == ("B" in expected)
    (plain,) = ask_server(fake, row_builder, tmp_path, [exchange])
    assert plain[0].letters == {letter: value for letter, value in top.items() if letter in "ABCDE"}


FAULTS: dict[str, Answer] = {
    "overloaded": lambda _: (429, {"error": {"message": "too many"}}),
    "not ready": lambda _: (503, {"error": {"message": "loading"}}),
    "broken": lambda _: (500, b"Internal Server Error"),
    "cut": lambda _: None,
    "late": lambda _: time.sleep(0.6) or None,
    "no JSON": lambda _: b"<html>",
    "half a JSON": lambda body: json.dumps(completion(body)).encode()[:-9],
    "no choice": lambda _: {"choices": []},
    "no message": lambda _: {"choices": [{"index": 0}]},
    "another thing": lambda _: ["completion"],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_is_retried_until_it_is_answered(fake, row_builder, case, tmp_path, fault):
    exchange = exchanges_of(case)[-1]
    tries: dict[str, int] = {}

    def answer(body: dict[str, Any]) -> Any:
        tries[text_of(body)] = tries.get(text_of(body), 0) + 1
        return FAULTS[fault](body) if tries[text_of(body)] < 3 else completion(body)

    fake.answer = answer
    with pytest.warns(UserWarning, match=r"127\.0\.0\.1.*; retrying for 600 s"):
        (generations,) = ask_server(fake, row_builder, tmp_path, [exchange], timeout=0.5 if fault == "late" else 300)
    assert [one.text for one in generations] == ["B"] * len(exchange.branches)
    assert len(tries) == len(exchange.branches)
    assert set(tries.values()) == {3} or fault == "late", "a good reply may also be late on a busy machine"


@pytest.mark.parametrize("fault", ["not ready", "cut", "late", "no JSON"])
def test_an_unavailable_server_stops_the_run_with_one_message(fake, row_builder, case, tmp_path, fault):
    fake.answer = FAULTS[fault]
    with pytest.raises(BackendError, match=r"127.0.0.1.* did not answer for 0\.2 s .*rerun the same command to resume"):
        outcomes(fake, row_builder, tmp_path, [case], patience=0.2, timeout=0.1)


@pytest.mark.parametrize(("asked", "waits"), [(0, [1, 2, 4, 8, 8]), (60, [1, 2, 4, 8, 8])])
def test_retries_slow_down_and_respect_the_servers_retry_after(
    fake, row_builder, case, tmp_path, monkeypatch, asked, waits
):
    slept, sleep = [], asyncio.sleep
    monkeypatch.setattr(server_module, "FIRST_RETRY_WAIT", 1)
    monkeypatch.setattr(server_module, "LONGEST_RETRY_WAIT", 8)
    monkeypatch.setattr(server_module.asyncio, "sleep", lambda seconds: slept.append(seconds) or sleep(0))
    exchange = exchanges_of(case)[-1]
    exchange = replace(exchange, branches=exchange.branches[:1])
    failures = iter(waits)
    headers = {"Retry-After": str(asked)} if asked else {}
    fake.answer = lambda body: (503, {}, headers) if next(failures, None) else completion(body)
    ask_server(fake, row_builder, tmp_path, [exchange])
    assert len(slept) == len(waits)
    assert all(asked + wait / 2 <= one <= asked + wait for one, wait in zip(slept, waits, strict=True))


def changed(**changes: Any) -> Answer:
    """A completion whose choice has these values instead."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        reply = completion(body)
        (choice,) = reply["choices"]
        choice.update({name: value for name, value in changes.items() if name in ("message", "logprobs")})
        return {**reply, **{name: value for name, value in changes.items() if name == "usage"}}

    return answer


def likely(*tokens: tuple[str, Any]) -> Answer:
    top = [{"token": token, "logprob": value, "bytes": None} for token, value in tokens]
    return changed(logprobs={"content": [{"token": "A", "logprob": -1.0, "bytes": None, "top_logprobs": top}]})


UNUSABLE: dict[str, tuple[Answer, str]] = {
    "content a list": (changed(message={"role": "assistant", "content": ["B"]}), r"unusable content \['B'\]"),
    "content a number": (changed(message={"role": "assistant", "content": 3}), "unusable content 3"),
    "half of a pair": (changed(message={"role": "assistant", "content": "\ud800"}), "unusable content"),
    "usage a list": (changed(usage=[]), "not a chat completion"),
    "usage a text": (changed(usage={"prompt_tokens": "9"}), "unusable prompt_tokens '9'"),
    "logprobs a text": (changed(logprobs={"content": "text"}), "unusable logprobs 'text'"),
    "logprobs of numbers": (changed(logprobs={"content": [1]}), "not a chat completion"),
    "top logprobs of numbers": (changed(logprobs={"content": [{"top_logprobs": [1, 2]}]}), "not a chat completion"),
    "logprob NaN": (likely(("A", math.nan), ("B", -1.0)), "unusable logprob nan of A"),
    "logprob infinite": (likely(("A", -math.inf)), "unusable logprob -inf of A"),
    "logprob null": (likely(("A", None)), "unusable logprob None of A"),
    "logprob a text": (likely(("A", "x")), "unusable logprob 'x' of A"),
    "logprob positive": (likely(("A", 2.0)), "unusable logprob 2.0 of A"),
    "a letter twice": (likely(("A", -1.0), ("A", -2.0)), "a letter twice among the likely tokens"),
    "deep": (lambda _: b"[" * 9_000, "not a chat completion"),
    "endless": (lambda _: b" " * 20_000, "the reply has more than 10,000 bytes"),
    "compressed": (lambda _: (200, b"", {"Content-Encoding": "gzip"}), "the reply is compressed"),
    "late for ever": (lambda _: (429, {}, {"Retry-After": "9" * 5000}), "429"),
    "byte by byte": (lambda _: iter(lambda: time.sleep(0.05) or b" ", None), "no answer within 0.3 s"),
}


@pytest.mark.parametrize("fault", UNUSABLE)
def test_a_reply_of_another_form_is_named_and_never_used(fake, row_builder, case, tmp_path, monkeypatch, fault):
    monkeypatch.setattr("echo_ft.inference.replies.MAX_REPLY_BYTES", 10_000)
    fake.answer, reason = UNUSABLE[fault]
    exchange = exchanges_of(case)[-1]
    exchange = replace(exchange, branches=exchange.branches[:1])
    timeout = 0.3 if fault == "byte by byte" else 60
    with pytest.raises(EchoError, match=f"did not answer for 0 s .*{reason}"):
        ask_server(fake, row_builder, tmp_path, [exchange], patience=0, timeout=timeout)


def test_no_image_is_sent_to_the_host_of_a_redirect(fake, row_builder, case, tmp_path):
    other = FakeServer()
    fake.answer = lambda _: (307, b"", {"Location": f"{other.url}/chat/completions"})
    with pytest.raises(BackendError, match=rf"redirects to {other.url}.*, and no image is sent there; set --server"):
        ask_server(fake, row_builder, tmp_path, exchanges_of(case)[-1:])
    other.close()
    assert fake.requests and not other.requests


def test_an_unanswerable_prompt_fails_only_its_case(fake, row_builder, tmp_path):
    cases = [make_case(tmp_path, f"line/part/{index}", seed=7 * index) for index in range(5)]
    failing = replace(cases[1], seen=replace(cases[1].seen, knowledge=()))
    question = failing.seen.questions[3]
    failing = replace(failing, seen=replace(failing.seen, questions=(replace(question, text="Unanswerable?"),)))

    def answer(body: dict[str, Any]) -> Any:
        if "Unanswerable" in text_of(body):
            return status, {"error": {"message": "maximum context length"}}
        time.sleep(0.01)  # so that the other cases continue meanwhile
        return completion(body)

    fake.answer = answer
    for status in (400, 500):
        found = outcomes(fake, row_builder, tmp_path, [cases[0], failing, *cases[2:]], patience=0.1)
        errors = [[one.error for one in outcome.predictions] for outcome in found]
        assert errors[0] == errors[2] == errors[3] == errors[4] == [None] * 7
        (error,) = errors[1]
        assert f"{status}: " in error
        assert "maximum context length" in error


def test_a_broken_image_fails_only_its_case(fake, row_builder, tmp_path):
    cases = [make_case(tmp_path, f"line/part/{index}", seed=7 * index) for index in range(3)]
    (tmp_path / cases[1].seen.query).write_bytes(b"no image")
    found = outcomes(fake, row_builder, tmp_path, cases)
    assert [[one.error is None for one in outcome.predictions] for outcome in found] == [
        [True] * 7,
        [False] * 7,
        [True] * 7,
    ]
    assert "cannot be read" in found[1].predictions[0].error


def test_an_image_that_could_not_be_read_is_read_again(fake, row_builder, case, tmp_path):
    """An inspector may run for weeks, and a network folder may be away for a moment."""
    reference = tmp_path / case.seen.references[0].image
    content = reference.read_bytes()

    async def ask_twice() -> list[bool]:
        found: list[bool] = []
        async with Server(fake.url, "echo", row_builder, tmp_path, 12) as server:
            for change in (reference.unlink, lambda: reference.write_bytes(content)):
                change()
                await run_cases_async(
                    [case], server.generate, PipelineConfig(), 1, lambda _, one: found.append(_failed(one))
                )
        return found

    assert asyncio.run(ask_twice()) == [True, False]


def _failed(outcome: Outcome) -> bool:
    return any(one.error is not None for one in outcome.predictions)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_without_the_model_stops_the_run(fake, row_builder, case, tmp_path, status):
    fake.answer = lambda _: (status, {"error": {"message": "The model `echo` does not exist"}})
    with pytest.raises(BackendError, match=rf"rejects .*'echo' .*{status}.*does not exist.*check --server,"):
        outcomes(fake, row_builder, tmp_path, [case])
    assert len(fake.requests) <= 4, "no request is retried"


def test_a_server_with_another_token_count_stops_the_run(fake, row_builder, case, tmp_path):
    fake.answer = lambda body: {**completion(body), "usage": {"prompt_tokens": 7, "completion_tokens": 1}}
    with pytest.raises(BackendError, match=r"counts 7 tokens for a prompt that has \d+ tokens here.*max_pixels 12544"):
        outcomes(fake, row_builder, tmp_path, [case])


def test_concurrent_requests_reach_but_never_exceed_the_limit(fake, row_builder, tmp_path):
    fake.answer = lambda body: time.sleep(0.02) or completion(body)
    cases = [make_case(tmp_path, f"line/part/{index}", seed=7 * index) for index in range(6)]
    outcomes(fake, row_builder, tmp_path, cases)
    assert fake.max_in_flight == 4


def test_a_run_resumes_on_another_server_like_an_uninterrupted_one(dataset, fake, tmp_path):
    run(dataset, tmp_path / "whole", "--server", fake.url)
    remaining = iter(range(40))
    fake.answer = lambda body: completion(body) if next(remaining, None) is not None else None
    # Send one request at a time: if another request succeeded meanwhile, only the case of the failing one would fail.
    with pytest.raises(BackendError, match="did not answer"):
        run(dataset, tmp_path / "cut", "--server", fake.url, "--server_patience", 0.2, "--batch_size", 1)
    done = {one.case for one in rows(tmp_path / "cut", "predictions.jsonl", Prediction)}
    assert 0 < len(done) < 3
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["complete"] is False
    fake.answer = completion
    other = FakeServer()  # as if the server restarted on another machine
    try:
        run(dataset, tmp_path / "cut", "--server", other.url)
    finally:
        other.close()
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert len(other.requests) == 1 + (3 - len(done)) * 17, "done cases are not repeated"
    whole, cut = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "cut"))
    assert cut["complete"]
    assert cut["server_model"] == str(ECHO_TINY)
    assert cut["base_fingerprint"] is None
    assert cut["continued_with"] == [{"server": other.url}]
    assert whole["server"] == cut["server"] == fake.url


def test_answers_from_probabilities_need_only_one_token(dataset, fake, tmp_path, monkeypatch):
    monkeypatch.setitem(LETTERS, "A", 0.0)
    run(dataset, tmp_path / "run", "--server", fake.url, "--answer", "logits", "--server_model", "{role}")
    found = rows(tmp_path / "run", "predictions.jsonl", Prediction)
    assert all((one.parsed, one.text) == ("A", "A") for one in found)
    assert {one.text for one in rows(tmp_path / "run", "traces.jsonl", Trace) if one.role == "decision_maker"} == {"B"}
    decisions = [body for body in fake.requests if body["model"] == "decision_maker"]
    assert {body["max_tokens"] for body in decisions} == {1}
    assert {body["model"] for body in fake.requests} == set(ROLES)
    fake.answer = lambda body: completion(body, logprobs=False)
    with pytest.raises(EchoError, match=r"returns no token probabilities; set answer to generate"):
        run(dataset, tmp_path / "other", "--server", fake.url, "--answer", "logits")


def test_a_local_run_can_answer_from_probabilities_too(dataset, tmp_path):
    for answer in ("generate", "logits"):
        run(dataset, tmp_path / answer, "--answer", answer)
    by_text, by_logits = (rows(tmp_path / name, "predictions.jsonl", Prediction) for name in ("generate", "logits"))
    for one, other in zip(by_text, by_logits, strict=True):
        assert other.probabilities == pytest.approx(one.probabilities, abs=1e-6)
        best = max(one.probabilities.values())
        assert one.probabilities[other.parsed] == pytest.approx(best, abs=1e-6)
        assert other.text == other.parsed
    with pytest.raises(EchoError, match="answer is 'generate', not 'logits'"):
        run(dataset, tmp_path / "generate", "--answer", "logits")


def test_a_client_of_served_adapters_needs_no_base_weights(dataset, fake, tmp_path):
    base = tmp_path / "echo-tiny"
    shutil.copytree(ECHO_TINY, base)
    adapters = random_adapters(tmp_path / "adapters", dataset)
    (base / "model.safetensors").unlink()
    served = ["--server", fake.url, "--adapters", adapters, "--model_name_or_path", base]
    run(dataset, tmp_path / "served", *served, budget=(MIN_PIXELS, MAX_PIXELS))
    description = json.loads((tmp_path / "served" / "run.json").read_text())
    assert description["base_fingerprint"] is None
    assert set(description["adapters"]) == set(ROLES)
    card = adapters / "decision_maker" / "echo_ft.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "base_fingerprint": "another"}))
    seal_folder(card.parent)
    with pytest.raises(EchoError, match="was trained on a different base model"):
        run(dataset, tmp_path / "mixed", *served, budget=(MIN_PIXELS, MAX_PIXELS))


def test_the_errors_for_wrong_server_options_are_one_message(dataset, tmp_path):
    with pytest.raises(EchoError, match="server_model needs a server; add --server URL"):
        run(dataset, tmp_path / "run", "--server_model", "echo")
    with pytest.raises(EchoError, match="server_timeout is 0"):
        run(dataset, tmp_path / "run", "--server", "http://127.0.0.1:9/v1", "--server_timeout", 0)


def require_equal_records(engine: Path, server: Path, questions: int) -> None:
    (predictions, traces), (served_predictions, served_traces) = records(engine), records(server)
    assert served_traces == traces, "prompts and generations are equal"
    assert {trace.role for trace in served_traces} == set(ROLES)
    without_probabilities = [replace(one, probabilities=None) for one in predictions]
    assert served_predictions == without_probabilities, "this server returns no probabilities"
    assert len(served_predictions) == questions
    assert all(one.error is None for one in served_predictions)


def test_a_real_server_gives_the_answers_of_the_engine(dataset, tmp_path):
    pytest.importorskip("uvicorn", reason="needs the extra `serving`")
    run(dataset, tmp_path / "engine")
    with transformers_serve(port := free_port(), ECHO_TINY):
        server = "--server", address(port), "--server_patience", 200
        run(dataset, tmp_path / "server", *server)
        with pytest.raises(EchoError, match=r"tokens for a prompt that has \d+ tokens here, .*max_pixels 12544"):
            run(dataset, tmp_path / "other", *server, budget=(784, 12544))
    require_equal_records(tmp_path / "engine", tmp_path / "server", 3 * 7)


@pytest.mark.slow
def test_a_run_survives_killing_and_restarting_a_real_server(tmp_path):
    pytest.importorskip("uvicorn", reason="needs the extra `serving`")
    dataset = make_dataset(tmp_path / "data", train=1, validation=1, test=12)
    run(dataset, tmp_path / "engine")
    predictions = tmp_path / "server" / "predictions.jsonl"
    port, ended, killed = free_port(), threading.Event(), []

    def kill_and_restart(process: subprocess.Popen[bytes]) -> None:
        for count in (1, 30):
            while not ended.is_set() and not (
                predictions.is_file() and len(predictions.read_bytes().splitlines()) >= count
            ):
                time.sleep(0.01)
            process.kill()
            process.wait()
            killed.append(len(predictions.read_bytes().splitlines()))
            process = restarted.enter_context(transformers_serve(port, ECHO_TINY))
        ended.wait()

    with ExitStack() as restarted, transformers_serve(port, ECHO_TINY) as first:
        watcher = threading.Thread(target=kill_and_restart, args=(first,))
        watcher.start()
        try:
            url = address(port)
            run(dataset, tmp_path / "server", "--server", url, "--batch_size", 4, "--server_patience", 300)
        finally:
            ended.set()
            watcher.join()
    assert 0 < killed[0] < killed[1] < 12 * 7, "the server was killed twice during the run"
    require_equal_records(tmp_path / "engine", tmp_path / "server", 12 * 7)
    assert json.loads((tmp_path / "server" / "run.json").read_text())["complete"]
