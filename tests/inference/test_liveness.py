"""An adapter that does not behave as it did in training is named, with the cause, before the first answer counts."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import threading
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import BackendError
from echo_ft.inference import server as server_module
from echo_ft.inference.bundle import write_checksums
from echo_ft.inference.inspector import Inspector
from echo_ft.inference.liveness import (
    BASE,
    PROBE_FILE,
    WITHOUT_VISION,
    check_adapters,
    local_backend,
    read_probe,
    scaled_adapter,
)
from echo_ft.model.adapters import ADAPTER_CARD, attach_adapters
from echo_ft.model.loading import load_model, load_processor
from echo_ft.model.rows import RowBuilder
from echo_ft.provenance import seal_folder
from echo_ft.records import ROLES, Generation
from evaluation.run import main as run_main
from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS
from tests.support.servers import FakeServer, model_answers
from train.export import main as export_main

EXTRACTOR, GUIDE, REASONER, DECIDER = ROLES


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(server_module, "FIRST_RETRY_WAIT", 0.01)


@pytest.fixture
def said(caplog, monkeypatch):
    """What the library prints in the terminal."""
    monkeypatch.setattr(logging.getLogger("echo_ft"), "propagate", True)
    caplog.set_level(logging.INFO, logger="echo_ft")
    return caplog


def paths(bundle):
    return {role: bundle / "adapters" / role for role in ROLES}


def load_tuned(bundle, base=None):
    return attach_adapters(base or load_model(str(ECHO_TINY), dtype="float32"), paths(bundle))


@pytest.fixture(scope="module")
def tuned(bundle):
    """echo-tiny with the adapters of the bundle."""
    return load_tuned(bundle)


def builder(bundle, max_pixels=MAX_PIXELS, words=("", "")):
    """The row builder of a bundle, with `words` of the chat template replaced."""
    processor = load_processor(str(bundle / "processor"), None, MIN_PIXELS, max_pixels)
    assert words[0] in processor.chat_template
    processor.chat_template = processor.chat_template.replace(*words) if words[0] else processor.chat_template
    return RowBuilder(processor)


def changed_base(bundle, change):
    """A tuned model whose base model has different weights in the layers of the language model."""
    base = load_model(str(ECHO_TINY), dtype="float32")
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if "language_model" in name and weight.ndim == 2:
                weight.copy_(change(weight))
    return load_tuned(bundle, base)


def rounded(weight):
    """Round to 15 levels per row, as in a 4-bit base model."""
    step = weight.abs().amax(dim=1, keepdim=True) / 7
    return (weight / step).round() * step


def moved(weight):
    return weight + 0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))


def merged_into_the_base(bundle):
    merged = attach_adapters(load_model(str(ECHO_TINY), dtype="float32"), {DECIDER: paths(bundle)[DECIDER]})
    return load_tuned(bundle, merged.merge_and_unload())


BASE_DIFFERS = (
    "the base model itself does not answer as in the export, by .* nats: it is quantized, .*revision.*template"
)

FAULTS = {
    "requests without the adapter": (
        {"served": lambda role: BASE},
        f"{EXTRACTOR} adapter does not behave as it did in training: it answers as the base model does",
    ),
    "one request without the adapter": (
        {"served": lambda role: BASE if role == REASONER else role},
        f"{REASONER} adapter does not behave as it did in training: it answers as the base model does",
    ),
    "swapped roles": (
        {"served": lambda role: {DECIDER: GUIDE, GUIDE: DECIDER}.get(role, role)},
        f"{GUIDE} adapter does not behave as it did in training: it answers as the {DECIDER} does, so two roles are "
        "swapped",
    ),
    "merged and applied again": (
        {"model": merged_into_the_base},
        f"the base model answers as the {DECIDER}, whose .* merged",
    ),
    "applied twice": ({"scaled": (DECIDER, 2, "")}, f"{DECIDER} .* applied twice or with a different lora_alpha"),
    "another scale": ({"scaled": (DECIDER, 0.5, "")}, f"{DECIDER} .* by .* nats, .*; its scale .lora_alpha"),
    "ignored modules": ({"scaled": (DECIDER, 0, "v_proj")}, f"{DECIDER} .*scale .* or some of its weights differ"),
    "ignored vision tower": (
        {"scaled": (REASONER, 0, ".visual.")},
        f"{REASONER} .* without its weights in the vision tower; .*--enable-tower-connector-lora",
    ),
    "quantized base": ({"model": lambda bundle: changed_base(bundle, rounded)}, BASE_DIFFERS),
    "another revision": ({"model": lambda bundle: changed_base(bundle, moved)}, BASE_DIFFERS),
    "another template": ({"words": ("a helpful", "helpful a")}, BASE_DIFFERS),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_without_another_trace_is_named(bundle, tuned, name):
    fault, message = FAULTS[name]
    model = fault["model"](bundle) if "model" in fault else tuned
    backend = local_backend(model, builder(bundle, words=fault.get("words", ("", ""))))
    served = fault.get("served", lambda role: role)
    with ExitStack() as stack:
        if "scaled" in fault:
            stack.enter_context(scaled_adapter(model, *fault["scaled"]))
        with pytest.raises(BackendError, match=message):
            check_adapters(
                lambda role, probe: backend(served(role), probe),
                ROLES,
                read_probe(bundle / "adapters"),
                "server",
                builder(bundle),
            )


def test_texts_decide_if_a_server_returns_no_probabilities(bundle, tuned, said):
    backend, record = local_backend(tuned, builder(bundle)), read_probe(bundle / "adapters")

    def texts(role, probe):
        return [Generation(one.text, {}) for one in backend(role, probe)]

    check_adapters(texts, ROLES, record, "server", builder(bundle))
    assert "server: answers differ from the base model's and equal those of the trained adapter" in said.text
    with pytest.raises(BackendError, match="it answers as the base model does"):
        check_adapters(lambda _, probe: texts(BASE, probe), ROLES, record, "server", builder(bundle))


def test_equal_texts_without_probabilities_are_no_sign_of_a_weak_adapter(bundle, tuned, said):
    backend, record = local_backend(tuned, builder(bundle)), read_probe(bundle / "adapters")
    base = replace(record.answers[BASE], texts=record.answers[DECIDER].texts)
    record = replace(record, answers={**record.answers, BASE: base})
    silent = replace(base, letters=record.answers[DECIDER].letters)
    for effect, words in ((True, f"nothing shows that the adapters for {DECIDER} act"), (False, "hardly any effect")):
        said.clear()
        known = record if effect else replace(record, answers={**record.answers, BASE: silent})
        check_adapters(
            lambda role, probe: [Generation(one.text, {}) for one in backend(role, probe)],
            [DECIDER],
            known,
            "server",
            builder(bundle),
        )
        assert words in said.text


def test_the_record_leaves_the_model_unchanged_and_knows_the_vision_tower(bundle, tuned):
    record = read_probe(bundle / "adapters")
    assert [name for name in record.answers if WITHOUT_VISION in name] == [f"{REASONER} {WITHOUT_VISION}"]
    assert record.dtype == "float32"
    backend = local_backend(tuned, builder(bundle))
    check_adapters(backend, ROLES, record, "model", builder(bundle))
    plain = local_backend(load_model(str(ECHO_TINY), dtype="float32"), builder(bundle))
    with pytest.raises(BackendError, match="answers as the base model does"):
        check_adapters(plain, ROLES, record, "model", builder(bundle))


@pytest.mark.parametrize(
    ("options", "served", "message"),
    [
        ({}, lambda name: name, None),
        (
            {},
            lambda name: BASE,
            f"{EXTRACTOR} adapter does not behave as it did in training: it answers as the base model does",
        ),
        (
            {"max_pixels": MAX_PIXELS // 2},
            lambda name: name,
            r"counts \d+ tokens .* \d+ tokens here, .*pixel budget differs",
        ),
        ({"words": ("helpful", "very helpful")}, lambda name: name, r"counts \d+ tokens .* chat template"),
    ],
)
def test_an_inspector_trusts_a_server_only_with_the_adapters_of_the_bundle(
    bundle, tuned, tmp_path, said, options, served, message
):
    pytest.importorskip("openai", reason="needs the extra `serving`")
    server = FakeServer(model_answers(tuned, builder(bundle, **options), tmp_path, served))
    try:
        if message is None:
            inspector = Inspector.from_server(server.url, bundle, timeout=70)
            assert inspector.generate.__self__.server.timeout == 70
            image = next((bundle / "references" / "images").iterdir())
            ours, theirs = (one.predict(image, "washer") for one in (Inspector.from_bundle(bundle), inspector))
            assert theirs.pred_score == pytest.approx(ours.pred_score, abs=1e-4)
            assert [one.text for one in theirs.trace] == [one.text for one in ours.trace]
            assert theirs.reference == ours.reference
            assert f"{server.url}: answers differ from the base model's and equal those of the trained" in said.text
            assert client_threads(), "it serves this inspector"
            del inspector
        else:
            with pytest.raises(BackendError, match=message):
                Inspector.from_server(server.url, bundle)
        gc.collect()
        for thread in client_threads():
            thread.join(timeout=60)
        assert not client_threads(), "nothing is left of the client"
    finally:
        server.close()


def client_threads():
    return [one for one in threading.enumerate() if one.name == "echo-ft server"]


def test_a_run_stops_before_its_first_answer_if_two_roles_are_swapped(bundle, dataset, tmp_path):
    """The cards are swapped too, so that only the answers reveal it."""
    folder = tmp_path / "adapters"
    shutil.copytree(bundle / "adapters", folder)
    (folder / GUIDE).rename(tmp_path / "other")
    (folder / DECIDER).rename(folder / GUIDE)
    (tmp_path / "other").rename(folder / DECIDER)
    for role in (GUIDE, DECIDER):
        card = json.loads((folder / role / ADAPTER_CARD).read_text())
        (folder / role / ADAPTER_CARD).write_text(json.dumps(card | {"role": role}))
        seal_folder(folder / role)
    options = {"dataset": dataset, "adapters": folder, "model_name_or_path": ECHO_TINY, "output": tmp_path / "run"}
    options |= {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "dtype": "float32", "max_new_tokens": 4}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    with pytest.raises(BackendError, match=f"{GUIDE} .* answers as the {DECIDER} does, so two roles are swapped"):
        run_main(arguments)
    assert not (tmp_path / "run" / "predictions.jsonl").read_text()


def copy_bundle(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_weights_with_wrong_module_names_are_named(bundle, dataset, tmp_path):
    folder = copy_bundle(bundle, tmp_path) / "adapters"
    path = folder / GUIDE / "adapter_model.safetensors"
    wrong = {name.replace("language_model.", ""): weight for name, weight in load_file(path).items()}
    save_file(wrong, path, metadata={"format": "pt"})
    seal_folder(path.parent)
    with pytest.raises(
        EchoError, match=f"the adapter in .*{GUIDE} does not fit the base model: .* unexpected, such as .*q_proj"
    ):
        Inspector.from_adapters(folder, dataset=dataset)


def test_an_edited_template_of_a_bundle_is_named(bundle, tmp_path):
    """The checksums are written again, so that only the tokens reveal it."""
    folder = copy_bundle(bundle, tmp_path)
    path = folder / "processor" / "chat_template.jinja"
    path.write_text(path.read_text().replace("a helpful", "helpful a"))
    write_checksums(folder)
    with pytest.raises(
        BackendError, match="the tokens of the probe differ from those in the export, so the tokenizer, the chat"
    ):
        Inspector.from_bundle(folder)


def test_an_adapter_without_effect_is_named_by_export_and_inspector(adapters, tmp_path, said):
    folder = tmp_path / "adapters"
    shutil.copytree(adapters, folder)
    path = folder / DECIDER / "adapter_model.safetensors"
    save_file({name: 0 * weight for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})
    seal_folder(path.parent)
    export_main(["--adapters", str(folder), "--output", str(tmp_path / "bundle"), "--merge", "none"])
    silent = (
        f"the base model gives the same answers to the probe as the adapters for {DECIDER}: they have hardly any effect"
    )
    assert silent in said.text
    said.clear()
    Inspector.from_adapters(folder)
    assert silent in said.text
    assert f"answers differ from the base model's: {EXTRACTOR}, {GUIDE}, {REASONER}" in said.text


@pytest.mark.parametrize("answers", ["{", "[]", '{"base": {"texts": [], "letters": [{"A": "x"}]}}'])
def test_a_broken_record_is_named(tmp_path, answers):
    (tmp_path / PROBE_FILE).write_text(f'{{"tokens": "a", "dtype": "float32", "answers": {answers}}}')
    with pytest.raises(EchoError, match=r"probe\.json cannot be read .*; export the bundle again"):
        read_probe(tmp_path)
