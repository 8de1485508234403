"""Describing photographs ahead of a build: in shards, in several processes, nothing twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.build import build
from data_prep.embed import embed
from echo_ft.errors import EchoError
from echo_ft.retrieval import descriptor_cache, descriptors
from echo_ft.retrieval.descriptor_cache import DescriptorCache, extract_descriptors, extract_missing, hash_files
from echo_ft.retrieval.descriptors import OpenClip, ScikitImage
from tests.conftest import ROOT
from tests.support.drawn_manifest import config, draw_manifest, draw_part

SMALL_SHARDS = (
    "import sys; from echo_ft.retrieval import descriptor_cache; descriptor_cache.SHARD_SIZE = 4\n"
    "from data_prep.embed import main; from echo_ft.config import run_main\n"
    "run_main(main)\n"
)
"""`python -m data_prep.embed` with shards of four photographs, as a test has no thousands."""

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def listed(tmp_path_factory) -> Path:
    """80 photographs."""
    return draw_manifest(tmp_path_factory.mktemp("raw"), ("cap", "ring"), normals=12, defects=4)


def options(listed: Path, cache: Path) -> list[str]:
    given = {"source": "manifest", "annotations": listed, "output": cache.parent / "parts", "descriptor": "skimage"}
    return [str(word) for key, value in {**given, "cache": cache}.items() for word in (f"--{key}", value)]


def start(words: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, cwd=ROOT, env=environment, **pipes)


def shards(cache: Path) -> dict[str, tuple[int, list[str]]]:
    """Time of writing and hashes of each finished shard."""
    return {
        path.name: (path.stat().st_mtime_ns, np.load(path)["hashes"].tolist())
        for path in (cache / f"features-{ScikitImage.key}").glob("*.npz")
    }


def test_killed_it_repeats_no_finished_shard(listed, tmp_path):
    cache = tmp_path / "cache"
    process = start([sys.executable, "-c", SMALL_SHARDS, *options(listed, cache)])
    while process.poll() is None and len(shards(cache)) < 3:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = shards(cache)
    assert 3 <= len(finished) < 20, "it was killed in the middle"
    process = start([str(BIN / "accelerate"), "launch", "--quiet", "-m", "data_prep.embed", *options(listed, cache)])
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    known = sum(len(hashes) for _, hashes in finished.values())
    assert f"80 photographs, {known} of them described before" in said
    everything = shards(cache)
    assert {name: everything[name] for name in finished} == finished
    counts = Counter(digest for _, hashes in everything.values() for digest in hashes)
    assert len(counts) == 80 and set(counts.values()) == {1}


def test_two_processes_describe_each_photograph_once_as_one_does(listed, tmp_path):
    alone, two = tmp_path / "alone", tmp_path / "two"
    embed(config(listed, tmp_path / "parts", cache=alone))
    script = tmp_path / "embed.py"
    script.write_text(SMALL_SHARDS)
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2"]
    process = start([*torchrun, str(script), *options(listed, two)])
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert "80 photographs, 0 of them described before" in said
    store = {name: DescriptorCache(ScikitImage(), cache) for name, cache in (("alone", alone), ("two", two))}
    counts = Counter(digest for _, hashes in shards(two).values() for digest in hashes)
    assert set(counts) == store["alone"].known() and set(counts.values()) == {1}
    rows = {digest: row for row, digest in enumerate(counts)}
    np.testing.assert_array_equal(store["two"].gather(rows), store["alone"].gather(rows))


def test_a_build_takes_what_was_described_before_it(listed, tmp_path, monkeypatch):
    plain = build(config(listed, tmp_path / "plain"))
    embed(config(listed, tmp_path / "parts", cache=tmp_path / "cache"))
    monkeypatch.setattr(ScikitImage, "_describe", None)  # nothing is left to describe
    assert build(config(listed, tmp_path / "parts", cache=tmp_path / "cache"))["fingerprint"] == plain["fingerprint"]


def test_a_photograph_that_cannot_be_read_is_counted_and_left_to_the_build(tmp_path, capsys):
    listed = draw_manifest(tmp_path / "raw", ("cap",), normals=6, defects=3)
    (listed.parent / "cap" / "good-0-1.png").write_bytes(b"broken")
    for again in (0, 23):
        embed(config(listed, tmp_path / "parts", cache=tmp_path / "cache"))
        said = capsys.readouterr().out
        assert f"24 photographs, {again} of them described before" in said
        assert "1 cannot be read; the build says which and why" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "nowhere to keep the features; give --cache DIR"),
        ({"cache": Path("c"), "source": "synthetic", "annotations": None}, "draws its photographs when a dataset is"),
        ({"cache": Path("c"), "descriptor": "scikit"}, "did you mean skimage"),
    ],
)
def test_what_cannot_be_described_ahead_is_refused(listed, tmp_path, changes, message):
    with pytest.raises(EchoError, match=message):
        embed(config(listed, tmp_path / "parts", **changes))


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_images_come_in_their_order_however_many_batches_are_decoded_ahead(tmp_path, monkeypatch, ahead):
    monkeypatch.setattr(descriptors, "IMAGES_PER_BATCH", 3)
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for number, path in enumerate(paths):
        draw_part(path, number)
    paths[4].write_bytes(b"broken")
    sizes, found = [], []
    for batch in descriptors._batches(paths, np.asarray, ahead):
        sizes.append(len(batch))
        found += batch
    assert sizes == [3, 3, 2]
    for path, (pixels, fault) in zip(paths, found, strict=True):
        if path == paths[4]:
            assert pixels is None and "broken" in fault
        else:
            assert fault is None and (pixels == descriptors.decode.decode(path)).all()


@pytest.mark.parametrize("describe", [ScikitImage(), OpenClip("ViT-S-32-alt", None)], ids=["skimage", "open_clip"])
def test_features_in_shards_are_those_of_one_image_at_a_time(tmp_path, monkeypatch, describe):
    monkeypatch.setattr(descriptor_cache, "SHARD_SIZE", 3)
    names = [f"{number}.png" for number in range(7)]
    for number, name in enumerate(names):
        draw_part(tmp_path / name, number)
    (tmp_path / "copy.png").write_bytes((tmp_path / "5.png").read_bytes())
    found, rejections = extract_descriptors([*names, "copy.png"], tmp_path, describe, tmp_path / "cache")
    assert not rejections and len(found.matrix) == 7 and found.rows["copy.png"] == found.rows["5.png"]
    for name in names:
        np.testing.assert_allclose(found.of(name), describe.vectors([tmp_path / name])[0][0], atol=1e-5)


def test_processes_that_write_the_same_shard_leave_it_whole(tmp_path):
    draw_part(tmp_path / "part.png", 0)
    hashes, _ = hash_files(["part.png"], tmp_path)
    for _ in range(2):
        store = DescriptorCache(ScikitImage(), tmp_path / "cache")
        store.known = set  # as a process that has looked before the other wrote
        assert list(extract_missing(hashes, tmp_path, ScikitImage(), store)) == [{}]
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1 == len(list((tmp_path / "cache").rglob("*.*")))
