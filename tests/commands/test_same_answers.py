"""The demo's bundle gives the same answers by every way to run it: PEFT, the inspector and two kinds of servers.

Each way answers the questions of the test split, and is compared with the local run that the demo scores. The demo is
a small one, or the one in the folder ECHO_FT_DEMO. `-rP` prints how far the probabilities differ.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from echo_ft.data.dataset import load_cases, load_dataset
from echo_ft.experts.pipeline import run_cases
from echo_ft.experts.roles import parse_letter
from echo_ft.files import read_jsonl
from echo_ft.inference.bundle import read_bundle
from echo_ft.inference.inspector import Inspector
from echo_ft.records import ROLES, Case, Prediction, Trace
from tests.conftest import ROOT
from tests.support.plain_peft import answer_traces
from tests.support.real_servers import address, free_port, transformers_serve, vllm_serve
from tests.support.small_demo import BASE, SmallDemo, make_small_demo, take_demo

pytest.importorskip("openai", reason="needs the extra `serving`")
pytest.importorskip("uvicorn", reason="needs the extra `serving`")
pytestmark = pytest.mark.slow

PATIENT = ["--server_timeout", 1200, "--server_patience", 1200]
"""Options of runs on servers that share a busy machine with other programs."""


@dataclass(frozen=True)
class Answers:
    """What the four experts say about a split."""

    letters: dict[str, str | None]
    """By question."""
    texts: dict[tuple[str, str, str], str]
    """By case, role and branch."""
    probabilities: dict[str, dict[str, float]]
    """By question, where they are known."""


def collect(predictions: Iterable[Prediction], traces: Iterable[Trace]) -> Answers:
    rows = list(predictions)
    assert all(one.error is None for one in rows)
    return Answers(
        {one.question: one.parsed for one in rows},
        {(one.case, one.role, one.branch): one.text for one in traces},
        {one.question: one.probabilities for one in rows if one.probabilities is not None},
    )


def read_run(folder: Path) -> Answers:
    return collect(read_jsonl(folder / "predictions.jsonl", Prediction), read_jsonl(folder / "traces.jsonl", Trace))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDemo]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the recipes name their files relative to it
        made, folder = os.environ.get("ECHO_FT_DEMO"), tmp_path_factory.mktemp("demo")
        yield take_demo(Path(made), folder) if made else make_small_demo(folder)


@pytest.fixture(scope="module")
def vllm(demo: SmallDemo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of vLLM with the bundle."""
    python = os.environ.get("ECHO_FT_VLLM")
    if not python:
        pytest.skip("ECHO_FT_VLLM is not set; set it to the Python of an environment with vLLM (docs/serving.md)")
    port = free_port()
    with vllm_serve(Path(python), demo.bundle, tmp_path_factory.mktemp("vllm") / "log", port):
        yield address(port)


def cases_of(demo: SmallDemo) -> list[Case]:
    """The cases of the test split, with absolute paths of their images."""
    dataset = load_dataset(demo.dataset)
    cases = []
    for case in load_cases(dataset, "test", "retrieved", None):
        references = tuple(replace(one, image=str(dataset.root / one.image)) for one in case.seen.references)
        seen = replace(case.seen, query=str(dataset.root / case.seen.query), references=references)
        cases.append(replace(case, seen=seen))
    return cases


def by_peft(demo: SmallDemo, folder: Path) -> Answers:
    """Answer the prompts of the local run with transformers and PEFT alone."""
    traces = list(read_jsonl(demo.run / "traces.jsonl", Trace))
    predictions = {one.question: one for one in read_jsonl(demo.run / "predictions.jsonl", Prediction)}
    limit = read_bundle(demo.bundle).max_new_tokens
    found = answer_traces(BASE, demo.bundle, traces, load_dataset(demo.dataset).root, limit)
    texts = [replace(trace, text=text) for trace, (text, _) in zip(traces, found, strict=True)]
    decisions = []
    for trace, (text, scores) in zip(traces, found, strict=True):
        if trace.role == "decision_maker":
            one = predictions[trace.branch]
            weights = {letter: math.exp(scores[letter]) for letter in one.options}
            shares = {letter: weight / sum(weights.values()) for letter, weight in weights.items()}
            decisions.append(replace(one, parsed=parse_letter(text, one.options), probabilities=shares))
    return collect(decisions, texts)


def by_inspector(demo: SmallDemo, folder: Path) -> Answers:
    """Answer with what the inspector has loaded from the bundle."""
    inspector = Inspector.from_bundle(demo.bundle)
    outcomes = run_cases(cases_of(demo), inspector.generate, inspector.pipeline)
    return collect(
        (one for outcome in outcomes for one in outcome.predictions),
        (one for outcome in outcomes for one in outcome.traces),
    )


def by_transformers_serve(demo: SmallDemo, folder: Path) -> Answers:
    """`transformers serve` has no LoRA, so it serves the merged models, each under the name of its folder."""
    with transformers_serve(port := free_port()):
        merged = demo.bundle / "merged" / "{role}"
        demo.run_again(folder / "run", "--server", address(port), "--server_model", merged, *PATIENT)
    return read_run(folder / "run")


def by_vllm(demo: SmallDemo, folder: Path, url: str) -> Answers:
    """Answer with vLLM, which serves the adapters by the bundle's own command."""
    demo.run_again(folder / "run", "--server", url, *PATIENT)
    return read_run(folder / "run")


WAYS = {"PEFT": by_peft, "Inspector": by_inspector, "transformers serve": by_transformers_serve, "vLLM": by_vllm}


@pytest.mark.parametrize("way", WAYS)
def test_the_bundle_gives_the_answers_of_the_local_run(demo, tmp_path, request, way):
    served = {"url": request.getfixturevalue("vllm")} if way == "vLLM" else {}
    expected, found = read_run(demo.run), WAYS[way](demo, tmp_path, **served)
    assert len(expected.letters) >= 40
    assert {role for _, role, _ in expected.texts} == set(ROLES)
    assert found.letters == expected.letters
    assert found.texts == expected.texts
    assert expected.probabilities.keys() == expected.letters.keys()
    if way == "transformers serve":
        assert not found.probabilities, "this server returns none"
        return
    # A server tells the most likely tokens, which lack letters where the text names no option.
    untold = expected.probabilities.keys() - found.probabilities.keys()
    assert way == "vLLM" or not untold
    assert all(expected.letters[question] is None for question in untold)
    differences = [
        abs(probabilities[letter] - p)
        for question, probabilities in found.probabilities.items()
        for letter, p in expected.probabilities[question].items()
    ]
    print(f"{way}: {len(expected.letters)} letters, {len(expected.texts)} texts,", end=" ")
    print(f"differences of P up to {max(differences):.1e}, median {statistics.median(differences):.1e}")
    assert max(differences) <= 1e-4


def test_vllm_lists_the_adapters_of_the_bundle_and_the_base_model(demo, vllm):
    with urllib.request.urlopen(f"{vllm}/models", timeout=600) as reply:
        listed = {one["id"] for one in json.load(reply)["data"]}
    assert listed == {BASE, *ROLES}


def test_an_inspector_on_vllm_gives_the_results_of_the_bundle(demo, vllm):
    images = [Path(case.seen.query) for case in cases_of(demo)[:4]]
    served, local = Inspector.from_server(vllm, demo.bundle, timeout=1200), Inspector.from_bundle(demo.bundle)
    for one, other in zip(served.predict(images), local.predict(images), strict=True):
        assert one.pred_score == pytest.approx(other.pred_score, abs=1e-4)
        assert (one.pred_label, one.condition, one.reference) == (other.pred_label, other.condition, other.reference)
        assert [trace.text for trace in one.trace] == [trace.text for trace in other.trace]
        assert one.explanation == other.explanation
