"""A server in the engine's place: the same prompts, pixels and records, and no answer lost to a bad connection."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import BackendError, PipelineConfig, run_cases_async
from echo_ft.files import read_jsonl
from echo_ft.inference import server as server_module
from echo_ft.inference.server import Server
from echo_ft.model.loading import load_processor
from echo_ft.model.rows import RowBuilder
from echo_ft.records import ROLES, Prediction, Trace
from evaluation.run import main as run_main
from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS, draw, make_case, make_dataset, random_adapters
from tests.support.exchanges import exchanges_of
from tests.support.servers import LETTERS, Answer, FakeServer, ask_server, completion, shown_images, text_of

pytest.importorskip("openai", reason="needs the extra `serving`")

BUDGET = (12544, 28224)
"""Of echo-tiny's own processor, which `transformers serve` uses."""


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    found = FakeServer()
    yield found
    found.close()


pytestmark = pytest.mark.filterwarnings("ignore:.*trying again")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_RETRY_WAIT", 0.01)
    monkeypatch.setattr(server_module, "LONGEST_RETRY_WAIT", 0.05)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), train=1, validation=1, test=3)


@pytest.fixture(scope="module")
def wide() -> RowBuilder:
    return RowBuilder(load_processor(str(ECHO_TINY), None, *BUDGET))


def run(dataset: Path, output: Path, *more: Any, budget: tuple[int, int] = BUDGET) -> None:
    options = {"dataset": dataset, "output": output, "model_name_or_path": ECHO_TINY, "dtype": "float32"}
    options |= {"min_pixels": budget[0], "max_pixels": budget[1], "max_new_tokens": 12, "batch_size": 6}
    run_main([str(part) for name, value in options.items() for part in (f"--{name}", value)] + [str(m) for m in more])


def rows(folder: Path, name: str, cls: type) -> list[Any]:
    return sorted(read_jsonl(folder / name, cls), key=str)


def records(folder: Path) -> tuple[list[Any], list[Any]]:
    return rows(folder, "predictions.jsonl", Prediction), rows(folder, "traces.jsonl", Trace)


def test_a_request_is_the_renderers_prompt_with_its_images_first(fake, row_builder, case, tmp_path):
    for role in ROLES:
        exchanges = [exchange for exchange in exchanges_of(case) if exchange.role == role]
        fake.asked.clear()
        ask_server(fake, row_builder, tmp_path, exchanges, role)
        wanted = {e.context + b.prompt: e.images for e in exchanges for b in e.branches}
        assert sorted(map(text_of, fake.asked)) == sorted(wanted)
        for body in fake.asked:
            images = wanted[text_of(body)]
            assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url"] * len(images) + ["text"]
            assert len(body["messages"]) == 1 and body["model"] == f"echo-{role}"
            for name, image in zip(images, shown_images(body), strict=True):
                _, high, wide = row_builder.grid(*Image.open(tmp_path / name).size)
                assert image.size == (14 * wide, 14 * high)
            assert (body["temperature"], body["max_tokens"]) == (0, 12)
            assert ("logprobs" in body) == (role == "decision_maker")


@pytest.mark.parametrize("size", [(37, 400), (900, 700), (20, 20), (168, 168)])
def test_the_server_sees_the_pixels_that_training_saw(fake, wide, case, tmp_path, size):
    name = draw(tmp_path / "odd.png", size, seed=3)
    ask_server(fake, wide, tmp_path, [replace(exchanges_of(case)[-1], images=(name,))])
    (sent,) = shown_images(fake.asked[0])
    ours = wide.image_processor(images=[Image.open(tmp_path / name)], return_tensors="np")
    theirs = wide.image_processor(images=[sent], return_tensors="np")
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

    async def asked() -> None:
        async with Server(fake.url, "echo", row_builder, root, 12, max_concurrent=4, **options) as server:
            await run_cases_async(
                cases, server.generate, settings, 4, lambda case, outcome: found.update({case.id: outcome})
            )

    asyncio.run(asked())
    return [found[case.id] for case in cases]


def test_probabilities_come_from_the_letters_among_the_servers_top_tokens(fake, row_builder, case, tmp_path):
    (outcome,) = outcomes(fake, row_builder, tmp_path, [case])
    by_kind = {one.kind: one for one in outcome.predictions}
    odds = math.exp(-3.0 + 0.5)
    assert by_kind["Anomaly Detection"].probabilities == pytest.approx({"A": odds / (1 + odds), "B": 1 / (1 + odds)})
    assert set(by_kind["Defect Classification"].probabilities) == set("ABCD")
    assert all(one.parsed == "B" and one.text == "B" for one in outcome.predictions)


@pytest.mark.parametrize("missing", ["every probability", "a letter's"])
def test_what_the_server_does_not_tell_is_not_guessed(fake, row_builder, case, tmp_path, monkeypatch, missing):
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
    told = "B" if missing == "a letter's" else None  # the one that is missing is less probable than any that is there
    assert all(one.parsed == told for one in outcome.predictions)


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
def test_a_request_is_tried_again_until_it_is_answered(fake, row_builder, case, tmp_path, fault):
    exchange = exchanges_of(case)[-1]
    tries: dict[str, int] = {}

    def answer(body: dict[str, Any]) -> Any:
        tries[text_of(body)] = tries.get(text_of(body), 0) + 1
        return FAULTS[fault](body) if tries[text_of(body)] < 3 else completion(body)

    fake.answer = answer
    with pytest.warns(UserWarning, match=r"127\.0\.0\.1.*; trying again for 600 s"):
        (said,) = ask_server(fake, row_builder, tmp_path, [exchange], timeout=0.5 if fault == "late" else 300)
    assert [one.text for one in said] == ["B"] * len(exchange.branches)
    assert len(tries) == len(exchange.branches)
    assert set(tries.values()) == {3} or fault == "late", "on a busy machine a good reply may be late too"


@pytest.mark.parametrize("fault", ["not ready", "cut", "late", "no JSON"])
def test_a_server_that_stays_away_stops_the_run_in_one_sentence(fake, row_builder, case, tmp_path, fault):
    fake.answer = FAULTS[fault]
    with pytest.raises(BackendError, match=r"127.0.0.1.* did not answer for 0\.2 s .*goes on where it stopped"):
        outcomes(fake, row_builder, tmp_path, [case], patience=0.2, timeout=0.1)


@pytest.mark.parametrize(("asked_for", "waits"), [(None, [1, 2, 4, 8, 8]), ("3", [3, 6, 8, 8, 8])])
def test_tries_come_ever_more_slowly_and_not_before_the_server_wants_them(
    fake, row_builder, case, tmp_path, monkeypatch, asked_for, waits
):
    kept, sleep = [], asyncio.sleep
    monkeypatch.setattr(server_module, "FIRST_RETRY_WAIT", 1)
    monkeypatch.setattr(server_module, "LONGEST_RETRY_WAIT", 8)
    monkeypatch.setattr(server_module.random, "uniform", lambda low, high: high)
    monkeypatch.setattr(server_module.asyncio, "sleep", lambda seconds: kept.append(seconds) or sleep(0))
    exchange = exchanges_of(case)[-1]
    exchange = replace(exchange, branches=exchange.branches[:1])
    headers = {} if asked_for is None else {"Retry-After": asked_for}
    failures = iter(waits)
    fake.answer = lambda body: (503, {}, headers) if next(failures, None) else completion(body)
    ask_server(fake, row_builder, tmp_path, [exchange])
    assert kept == waits


def test_one_prompt_that_the_server_cannot_answer_fails_its_case_alone(fake, row_builder, tmp_path):
    cases = [make_case(tmp_path, f"line/part/{index}", seed=7 * index) for index in range(5)]
    marked = replace(cases[1], seen=replace(cases[1].seen, knowledge=()))
    odd = marked.seen.questions[3]
    marked = replace(marked, seen=replace(marked.seen, questions=(replace(odd, text="Unanswerable?"),)))

    def answer(body: dict[str, Any]) -> Any:
        if "Unanswerable" in text_of(body):
            return state, {"error": {"message": "maximum context length"}}
        time.sleep(0.01)  # the others go on meanwhile
        return completion(body)

    fake.answer = answer
    for state in (400, 500):
        found = outcomes(fake, row_builder, tmp_path, [cases[0], marked, *cases[2:]], patience=0.1)
        failed = [[one.error for one in outcome.predictions] for outcome in found]
        assert failed[0] == failed[2] == failed[3] == failed[4] == [None] * 7
        assert len(failed[1]) == 1 and f"{state}: " in failed[1][0] and "maximum context length" in failed[1][0]


def test_a_broken_image_fails_its_case_alone(fake, row_builder, tmp_path):
    cases = [make_case(tmp_path, f"line/part/{index}", seed=7 * index) for index in range(3)]
    (tmp_path / cases[1].seen.query).write_bytes(b"no image")
    found = outcomes(fake, row_builder, tmp_path, cases)
    assert [[one.error is None for one in outcome.predictions] for outcome in found] == [
        [True] * 7,
        [False] * 7,
        [True] * 7,
    ]
    assert "cannot be read" in found[1].predictions[0].error


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_the_model_stops_the_run(fake, row_builder, case, tmp_path, status):
    fake.answer = lambda _: (status, {"error": {"message": "The model `echo` does not exist"}})
    with pytest.raises(BackendError, match=rf"refuses .*'echo' .*{status}.*does not exist.*check --server,"):
        outcomes(fake, row_builder, tmp_path, [case])
    assert len(fake.asked) <= 4, "and is not asked again"


def test_a_server_that_counts_other_tokens_is_refused(fake, row_builder, case, tmp_path):
    fake.answer = lambda body: {**completion(body), "usage": {"prompt_tokens": 7, "completion_tokens": 1}}
    with pytest.raises(BackendError, match=r"makes 7 tokens of a prompt that has \d+ here.*max_pixels 12544"):
        outcomes(fake, row_builder, tmp_path, [case])


def test_requests_are_under_way_together_and_no_more_than_allowed(fake, row_builder, tmp_path):
    fake.answer = lambda body: time.sleep(0.02) or completion(body)
    cases = [make_case(tmp_path, f"line/part/{index}", seed=7 * index) for index in range(6)]
    outcomes(fake, row_builder, tmp_path, cases)
    assert fake.most_under_way == 4


def test_a_run_that_lost_its_server_goes_on_and_ends_like_an_uninterrupted_one(dataset, fake, tmp_path):
    run(dataset, tmp_path / "whole", "--server", fake.url)
    left = iter(range(40))
    fake.answer = lambda body: completion(body) if next(left, None) is not None else None
    # One request at a time: an answer that is under way while another fails would make that one's case fail alone.
    with pytest.raises(BackendError, match="did not answer"):
        run(dataset, tmp_path / "cut", "--server", fake.url, "--server_patience", 0.2, "--batch_size", 1)
    done = {one.case for one in rows(tmp_path / "cut", "predictions.jsonl", Prediction)}
    assert 0 < len(done) < 3 and json.loads((tmp_path / "cut" / "run.json").read_text())["complete"] is False
    fake.answer = completion
    other = FakeServer()  # as where the server comes back on another machine
    try:
        run(dataset, tmp_path / "cut", "--server", other.url)
    finally:
        other.close()
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert len(other.asked) == 1 + (3 - len(done)) * 17, "what is done is not asked again"
    whole, cut = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "cut"))
    assert cut["complete"] and cut["server_model"] == str(ECHO_TINY) and cut["base_fingerprint"] is None
    assert cut["continued_with"] == [{"server": other.url}] and whole["server"] == cut["server"] == fake.url


def test_probabilities_alone_can_decide_and_one_token_is_asked_for(dataset, fake, tmp_path, monkeypatch):
    monkeypatch.setitem(LETTERS, "A", 0.0)
    run(dataset, tmp_path / "run", "--server", fake.url, "--answer", "logits", "--server_model", "{role}")
    found = rows(tmp_path / "run", "predictions.jsonl", Prediction)
    assert all((one.parsed, one.text) == ("A", "A") for one in found)
    assert {one.text for one in rows(tmp_path / "run", "traces.jsonl", Trace) if one.role == "decision_maker"} == {"B"}
    decisions = [body for body in fake.asked if body["model"] == "decision_maker"]
    assert {body["max_tokens"] for body in decisions} == {1} and {b["model"] for b in fake.asked} == set(ROLES)
    fake.answer = lambda body: completion(body, logprobs=False)
    with pytest.raises(EchoError, match=r"does not tell the probabilities .*set answer to generate"):
        run(dataset, tmp_path / "other", "--server", fake.url, "--answer", "logits")


def test_probabilities_decide_in_a_run_without_a_server_too(dataset, tmp_path):
    for answer in ("generate", "logits"):
        run(dataset, tmp_path / answer, "--answer", answer)
    by_text, by_logits = (rows(tmp_path / name, "predictions.jsonl", Prediction) for name in ("generate", "logits"))
    for one, other in zip(by_text, by_logits, strict=True):
        assert other.probabilities == pytest.approx(one.probabilities, abs=1e-6)
        best = max(one.probabilities.values())
        assert one.probabilities[other.parsed] == pytest.approx(best, abs=1e-6) and other.text == other.parsed
    with pytest.raises(EchoError, match="answer is 'generate', not 'logits'"):
        run(dataset, tmp_path / "generate", "--answer", "logits")


def test_a_client_of_served_adapters_needs_no_weights_of_the_base(dataset, fake, tmp_path):
    base = tmp_path / "echo-tiny"
    shutil.copytree(ECHO_TINY, base)
    adapters = random_adapters(tmp_path / "adapters", dataset)
    (base / "model.safetensors").unlink()
    served = ["--server", fake.url, "--adapters", adapters, "--model_name_or_path", base]
    run(dataset, tmp_path / "served", *served, budget=(MIN_PIXELS, MAX_PIXELS))
    described = json.loads((tmp_path / "served" / "run.json").read_text())
    assert described["base_fingerprint"] is None and set(described["adapters"]) == set(ROLES)
    card = adapters / "decision_maker" / "echo_ft.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "base_fingerprint": "another"}))
    with pytest.raises(EchoError, match="was trained on another base model"):
        run(dataset, tmp_path / "mixed", *served, budget=(MIN_PIXELS, MAX_PIXELS))


def test_a_wrong_option_of_a_server_is_one_sentence(dataset, tmp_path):
    with pytest.raises(EchoError, match="server_model needs a server; add --server URL"):
        run(dataset, tmp_path / "run", "--server_model", "echo")
    with pytest.raises(EchoError, match="server_timeout is 0"):
        run(dataset, tmp_path / "run", "--server", "http://127.0.0.1:9/v1", "--server_timeout", 0)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def serving(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`transformers serve` of echo-tiny, as a user starts it."""
    command = [Path(sys.executable).with_name("transformers"), "serve", ECHO_TINY, "--device", "cpu"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(list(map(str, command)), env={**os.environ, "HF_HUB_OFFLINE": "1"}, **quiet)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def require_the_same_words(engine: Path, server: Path, questions: int) -> None:
    (ours, traced), (theirs, heard) = records(engine), records(server)
    assert heard == traced and {trace.role for trace in heard} == set(ROLES), "the same prompts and the same words"
    assert theirs == [replace(one, probabilities=None) for one in ours], "this server tells no probabilities"
    assert len(theirs) == questions and all(one.error is None for one in theirs)


def test_a_real_server_says_what_the_engine_says(dataset, tmp_path):
    pytest.importorskip("uvicorn", reason="needs the extra `serving`")
    run(dataset, tmp_path / "engine")
    with serving(port := free_port()):
        server = "--server", f"http://127.0.0.1:{port}/v1", "--server_patience", 200
        run(dataset, tmp_path / "server", *server)
        with pytest.raises(EchoError, match=r"tokens of a prompt that has \d+ here: .*max_pixels 12544"):
            run(dataset, tmp_path / "other", *server, budget=(784, 12544))
    require_the_same_words(tmp_path / "engine", tmp_path / "server", 3 * 7)


@pytest.mark.slow
def test_a_real_server_may_be_killed_and_started_again_in_the_middle(tmp_path):
    pytest.importorskip("uvicorn", reason="needs the extra `serving`")
    dataset = make_dataset(tmp_path / "data", train=1, validation=1, test=12)
    run(dataset, tmp_path / "engine")
    written = tmp_path / "server" / "predictions.jsonl"
    port, ended, killed = free_port(), threading.Event(), []

    def kill_and_start(process: subprocess.Popen[bytes]) -> None:
        for count in (1, 30):
            while not ended.is_set() and not (written.is_file() and len(written.read_bytes().splitlines()) >= count):
                time.sleep(0.01)
            process.kill()
            process.wait()
            killed.append(len(written.read_bytes().splitlines()))
            process = again.enter_context(serving(port))
        ended.wait()

    with ExitStack() as again, serving(port) as first:
        watching = threading.Thread(target=kill_and_start, args=(first,))
        watching.start()
        try:
            address = f"http://127.0.0.1:{port}/v1"
            run(dataset, tmp_path / "server", "--server", address, "--batch_size", 4, "--server_patience", 300)
        finally:
            ended.set()
            watching.join()
    assert 0 < killed[0] < killed[1] < 12 * 7, "killed twice in the middle"
    require_the_same_words(tmp_path / "engine", tmp_path / "server", 12 * 7)
    assert json.loads((tmp_path / "server" / "run.json").read_text())["complete"]
