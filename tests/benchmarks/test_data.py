"""At a small size, the data benchmarks draw what they claim to draw and measure what a build really does."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

from benchmarks.data import embedding, index, rows, verification
from data_prep.build import build
from data_prep.config import BuildConfig
from echo_ft.files import read_jsonl
from echo_ft.records import Inspection
from tests.conftest import ROOT


def test_drawn_vectors_have_the_stated_cosines():
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
def test_recall_is_relative_to_exact_search(kind):
    found = index._measure(kind, 2000, products=4, queries=128, seed=1)
    assert found.kind == kind
    assert found.recall > 0.98
    assert found.recall == 1 or kind == "hnsw"
    assert found.query_ms > 0
    assert found.peak_gib > 0


@pytest.mark.slow
def test_ivf_pq_finds_the_nearest_image_within_one_product():
    """Within a single product, there are no clusters to guide the search."""
    found = index._measure("ivf_pq", 12_000, products=1, queries=512, seed=0)
    assert found.kind == "ivf_pq"
    assert found.recall > 0.99


def test_a_manifest_with_many_names_for_few_images_is_built_completely(tmp_path):
    manifest = rows.draw(tmp_path, 60)
    entries = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert len({entry["image"] for entry in entries}) == 60
    assert sum(entry["condition"] != "good" for entry in entries) == 24
    assert all(entry["condition"] != "good" for entry in entries if "mask" in entry)
    assert sum("mask" in entry for entry in entries) == 6
    contents = {(tmp_path / entry["image"]).stat().st_ino for entry in entries}
    assert len(contents) == rows.SOURCES
    found = rows.measure(manifest, tmp_path / "dataset")
    assert found.rows == 60
    assert len(list(read_jsonl(tmp_path / "dataset" / "inspections.jsonl", Inspection))) == 60
    lines = sum(path.read_text().count("\n") for path in (tmp_path / "dataset" / "sft").glob("*/*.jsonl"))
    assert found.training_rows == lines > 0
    assert 0 < found.image_work < found.processor
    assert found.peak_mib > 50


def test_image_work_is_counted_once_in_every_thread(monkeypatch):
    """Each of two concurrent threads makes a nested call that takes one second."""
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


def test_a_dataset_without_retrieved_references_is_refused_in_one_line(tmp_path):
    manifest = rows.draw(tmp_path, 30)
    entries = [json.loads(line) for line in manifest.read_text().splitlines()]
    one, other, *_ = (entry["image"] for entry in entries if entry["condition"] == "good")
    named = [entry | {"reference": other if entry["image"] == one else one} for entry in entries]
    manifest.write_text("".join(json.dumps(entry) + "\n" for entry in named))
    build(BuildConfig("manifest", tmp_path / "dataset", annotations=manifest, descriptor="skimage", k=1))
    command = [sys.executable, "-m", "benchmarks.data.references", str(tmp_path / "dataset")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.endswith("has no case with both retrieved and random references; there is nothing to compare\n")
    assert done.stderr.count("\n") == 1


def test_both_contenders_compute_the_same_descriptors(tmp_path):
    cells = [cell.strip() for cell in embedding.measure(tmp_path, "skimage", 6, 56, 1, 1).split("|")[1:-1]]
    name, device, *figures = cells
    assert name == "skimage"
    assert device.startswith("1 x (")
    assert device.endswith(" reader threads, 1 torch thread)")
    baseline, ours, _, difference, cached = map(float, figures)
    assert min(baseline, ours, cached) > 0
    assert difference <= 1e-5


@pytest.mark.slow
def test_no_process_is_without_an_image(tmp_path):
    assert embedding.measure(tmp_path, "skimage", 2, 56, 3, 1).startswith("| skimage | 2 x (")


@pytest.mark.slow
def test_a_failing_process_ends_the_benchmark(tmp_path):
    names = embedding.draw(tmp_path, 2, 56)
    descriptor = f"ViT-B-16/{tmp_path / 'missing.pt'}"
    with pytest.raises(SystemExit, match="a process that computes descriptors failed"):
        embedding.time_processes(names, tmp_path, descriptor, tmp_path / "cache", 2, False)


def test_verification_counts_every_part_and_leaves_the_modules_as_they_were(tmp_path):
    before = [getattr(module, name) for module, name in verification.ADDED_TO_BUILD]
    found = verification.measure(tmp_path, 60, images=20)
    assert [*found] == ["second build", "training's start", "reading 20 images"]
    assert all(added > 0 and without > 0 for added, without in found.values())
    assert [getattr(module, name) for module, name in verification.ADDED_TO_BUILD] == before
