"""The benchmarks of data preparation at a small size: they draw what they say, and measure what a build really does."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

from benchmarks.data import embedding, index, rows
from data_prep.build import build
from data_prep.config import BuildConfig
from echo_ft.files import read_jsonl
from echo_ft.records import Inspection
from tests.conftest import ROOT


def test_drawn_vectors_have_the_cosines_that_are_stated():
    vectors, queries = index.draw(4000, 400, products=40, seed=0)
    assert vectors.dtype == queries.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    product = np.repeat(np.arange(40), 100)
    cosines = vectors @ vectors.T
    own = product[:, None] == product[None, :]
    assert cosines[~own].mean() == pytest.approx(0.60, abs=0.02)
    assert cosines[own & ~np.eye(4000, dtype=bool)].mean() == pytest.approx(0.85, abs=0.02)
    nearest = (queries @ vectors.T).argmax(axis=1)
    assert (product[nearest] == np.repeat(np.arange(40), 10)).all()


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_recall_is_counted_against_the_exact_search(kind):
    found = index._measure(kind, 2000, products=4, queries=128, seed=1)
    assert found.kind == kind and found.recall > 0.98 and found.query_ms > 0 and found.peak_gib > 0
    assert found.recall == 1 or kind == "hnsw"


def test_codes_find_the_nearest_of_one_product_too():
    """Within one product there are no clusters that would tell where to look."""
    found = index._measure("ivf_pq", 12_000, products=1, queries=512, seed=0)
    assert found.kind == "ivf_pq" and found.recall > 0.99


def test_a_list_of_many_names_of_few_photographs_is_built_whole(tmp_path):
    listed = rows.draw(tmp_path, 60)
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert len({entry["image"] for entry in entries}) == 60
    assert sum(entry["condition"] != "good" for entry in entries) == 24
    assert all(entry["condition"] != "good" for entry in entries if "mask" in entry)
    assert sum("mask" in entry for entry in entries) == 6
    contents = {(tmp_path / entry["image"]).stat().st_ino for entry in entries}
    assert len(contents) == rows.SOURCES
    found = rows.measure(listed, tmp_path / "dataset")
    assert found.rows == 60 == len(list(read_jsonl(tmp_path / "dataset" / "inspections.jsonl", Inspection)))
    lines = sum(path.read_text().count("\n") for path in (tmp_path / "dataset" / "sft").glob("*/*.jsonl"))
    assert found.training_rows == lines > 0
    assert 0 < found.image_work < found.processor and found.peak_mib > 50


def test_image_work_is_counted_once_in_whatever_thread_it_is_done(monkeypatch):
    """Two threads at a time, each with a call within a call that takes it a second."""
    clock, both = threading.local(), threading.Barrier(2, timeout=120)

    def inner():
        both.wait()
        clock.now = 1.0
        both.wait()

    module = types.ModuleType("measured")
    module.inner, module.outer = inner, lambda: module.inner()
    monkeypatch.setitem(sys.modules, "measured", module)
    monkeypatch.setattr(rows, "IMAGE_WORK", {"measured": ("inner", "outer")})
    monkeypatch.setattr(rows, "time", types.SimpleNamespace(thread_time=lambda: getattr(clock, "now", 0.0)))
    seconds = [0.0]
    with rows.timed(seconds):
        threads = [threading.Thread(target=module.outer) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seconds == [2.0]


def test_a_dataset_without_retrieved_references_to_compare_ends_in_one_sentence(tmp_path):
    listed = rows.draw(tmp_path, 30)
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    one, other, *_ = (entry["image"] for entry in entries if entry["condition"] == "good")
    named = [entry | {"reference": other if entry["image"] == one else one} for entry in entries]
    listed.write_text("".join(json.dumps(entry) + "\n" for entry in named))
    build(BuildConfig("manifest", tmp_path / "dataset", annotations=listed, descriptor="skimage", k=1))
    command = [sys.executable, "-m", "benchmarks.data.references", str(tmp_path / "dataset")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.endswith("has no case with retrieved and random references; nothing can be compared\n")
    assert done.stderr.count("\n") == 1


def test_both_ways_to_describe_give_the_same_features(tmp_path):
    cells = [cell.strip() for cell in embedding.measure(tmp_path, "skimage", 6, 56, 1, 1).split("|")[1:-1]]
    name, where, *figures = cells
    assert name == "skimage" and where.startswith("1 x (") and where.endswith(" reading threads, 1 of torch)")
    plain, ours, _, difference, again = map(float, figures)
    assert plain > 0 and ours > 0 and again > 0 and difference <= 1e-5
