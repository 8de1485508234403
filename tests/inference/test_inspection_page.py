"""The page shows each expert's words as soon as that expert is done, and does not keep uploads."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.evaluation.inspector import draw_images
from echo_ft.errors import EchoError
from echo_ft.inference.inspector import Inspector, Progress
from echo_ft.records import GROUNDING, ROLES, Generation
from evaluation import inspect, inspection_page
from tests.conftest import ROOT

STOPPED = "stopped by SIGTERM; rerun the same command; with --watch, it continues where it stopped"

ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")


def test_steps_tell_what_is_known_before_each_role_and_end_with_the_result(inspector, image):
    *steps, result = inspector.steps(image, "washer")
    assert [step.role for step in steps] == [*ROLES]
    assert [{one.role for one in step.trace} for step in steps] == [{*ROLES[:done]} for done in range(4)]
    whole = inspector.predict(image, "washer")
    assert [step.reference for step in steps] == [None, *[whole.reference] * 3]
    assert (result.pred_score, result.answers, result.reference) == (whole.pred_score, whole.answers, whole.reference)
    assert all(isinstance(step, Progress) and step.product == "washer" for step in steps)
    texts = [[one.text for one in shown.trace] for shown in (*steps, whole)]
    assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(texts))


def test_boxes_are_asked_for_if_the_dataset_does_and_are_in_pixels(inspector, image):
    def generate(role, exchanges):
        asked = [[one.id for one in exchange.branches] for exchange in exchanges]
        said = {True: "(100,200),(500,1000)", False: "A"}
        letters = {"A": -0.1, "B": -2.0, "C": -3.0, "D": -3.0}
        return [[Generation(said["grounding" in name], letters) for name in own] for own in asked]

    asking = Inspector(generate, replace(inspector.products, grounding=True))
    result = asking.predict(image, "washer")
    assert [answer.kind for answer in result.answers][-1] == GROUNDING
    assert result.pred_boxes == ((9, 14, 45, 70),)
    assert result.condition != "A"
    assert '<rect x="9" y="14" width="36" height="56"/>' in inspection_page.show(
        result, {"query": "data:,", "size": (90, 70)}
    )
    silent = Inspector(generate, inspector.products).predict(image, "washer")
    assert silent.pred_boxes is None
    assert GROUNDING not in {answer.kind for answer in silent.answers}


def test_an_upload_is_shown_step_by_step_and_removed(inspector, image):
    whole = inspector.predict(image, "washer")
    shown = list(inspection_page.inspect_upload(inspector, image, "washer"))
    assert not image.exists()
    assert len(shown) == 5
    assert ["working …" in one for one in shown] == [True] * 4 + [False]
    assert [one.count("data:image/jpeg;base64,") for one in shown] == [1, 2, 2, 2, 2]
    assert f"P(defect) {whole.pred_score:.3f} (threshold 0.5)" in shown[-1]
    assert Path(str(whole.reference)).name in shown[-1]


def test_a_broken_upload_is_named_without_its_folder_and_removed(inspector, tmp_path):
    path = tmp_path / "<img src=x onerror=alert(1)>.png"
    path.write_text("no image")
    (shown,) = inspection_page.inspect_upload(inspector, path, None)
    assert "&lt;img src=x onerror=alert(1)&gt;.png cannot be read" in shown
    assert "<img" not in shown
    assert str(tmp_path) not in shown
    assert not path.exists()


def test_an_upload_goes_also_if_the_reader_leaves(inspector, image):
    steps = inspection_page.inspect_upload(inspector, image, None)
    next(steps)
    steps.close()
    assert not image.exists()


def test_other_websites_and_more_than_one_upload_are_refused():
    largest = inspection_page.MAX_UPLOAD_BYTES + inspection_page.FORM_BYTES
    here = {"host": "127.0.0.1:7860"}
    taken = [here, {**here, "origin": "http://127.0.0.1:7860"}, {**here, "content-length": str(largest)}]
    assert [inspection_page.refusal(headers) for headers in taken] == [None] * 3
    refused = {
        403: [{"origin": origin} for origin in ("http://evil.example", "http://127.0.0.1:80", "null", "")],
        411: [{"transfer-encoding": "chunked"}],
        413: [{"content-length": str(largest + 1)}],
    }
    for status, cases in refused.items():
        for headers in cases:
            found = inspection_page.refusal(here | headers)
            assert found is not None
            assert found[0] == status


def test_an_upload_is_kept_for_longer_than_the_queue_takes():
    assert inspection_page.UPLOAD_SECONDS > (inspection_page.WAITING + 1) * 60 * 60


def test_only_products_with_a_normal_image_are_offered(inspector, image):
    known = inspector.products
    conditions = {**known.conditions, ("line", "bolt"): []}  # a product with only unlabelled images
    bolts = Inspector(inspector.generate, replace(known, conditions=conditions))
    assert bolts.products.comparable == ["cap", "washer"]
    with pytest.raises(EchoError, match=r"'nut' is not in .*; choose from cap, washer$"):
        bolts.predict(image, "nut")


def test_what_the_page_lacks_is_said_before_the_model_loads(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(EchoError, match="--json cannot be used with --serve; remove it"):
        inspect.main(["--serve", "--bundle", "nowhere", "--json", "true"])
    with pytest.raises(EchoError, match=r"the page needs Gradio .*; install echo-ft\[serving\]"):
        inspect.main(["--serve", "--bundle", "nowhere", "--port", "0"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(EchoError, match=rf"cannot use port {port} of 127.0.0.1 .*; choose another --port"):
            inspect.main(["--serve", "--bundle", "nowhere", "--port", port])
    with pytest.raises(EchoError, match="give images, a folder to watch, or --serve"):
        inspect.main(["part.png", "--serve", "--bundle", "nowhere"])
    with pytest.raises(EchoError, match="--product cannot be used with --serve"):
        inspect.main(["--serve", "--bundle", "nowhere", "--product", "washer"])


@pytest.mark.slow
def test_the_served_page_inspects_uploads_only_and_keeps_nothing(bundle, tmp_path, monkeypatch):
    python = os.environ.get("ECHO_FT_GRADIO")
    if python is None:
        pytest.skip("ECHO_FT_GRADIO is not set; set it to the Python of an environment with echo-ft[serving]")
    (tmp_path / "temporary").mkdir()
    (image,) = draw_images(tmp_path, 1, 80)
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(inspection_page.MAX_UPLOAD_BYTES + 1)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")}
    command = [python, "-m", "evaluation.inspect", "--serve", "--bundle", str(bundle), "--port", "0"]
    pipe = subprocess.PIPE
    served = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)
    try:
        assert served.stdout is not None
        address = next(found.group() for line in served.stdout if (found := ADDRESS.search(line)))
        client = [python, "-m", "tests.support.page_client", address, str(image), str(tmp_path / "large.png")]
        done = subprocess.run(client, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        kept = [path for path in (tmp_path / "temporary").rglob("*") if path.is_file()]
    finally:
        served.send_signal(signal.SIGTERM)
        _, said = served.communicate(timeout=60)
    found = json.loads(done.stdout.splitlines()[-1])
    score = Inspector.from_bundle(bundle).predict(image, "washer").pred_score
    assert len(found["steps"]) == 5
    assert f"P(defect) {score:.3f} " in found["steps"][-1]
    assert found["again"] == found["steps"][-1:]
    assert "cannot be read: the image is broken or has an unknown format" in found["broken"][-1]
    assert [found[name].startswith("event: error") for name in ("server_file", "address")] == [True, True]
    assert [f"P(defect) {score:.3f} " in events for events in found["same"]] == [True, True]
    assert (found["large"], found["other_host"], found["other_website"], found["file"]) == (413, 400, 403, 403)
    assert "default-src 'self'" in found["policy"]
    assert kept == []
    assert served.returncode == 128 + signal.SIGTERM
    assert said.splitlines()[-1:] == [STOPPED]
    assert list((tmp_path / "temporary").iterdir()) == []
