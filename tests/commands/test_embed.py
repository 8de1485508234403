"""Descriptors computed ahead of a build are kept in shards, and several processes never compute one twice."""

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
from tests.support.drawn_manifest import draw_manifest, draw_part, make_config

SMALL_SHARDS = (
    "import sys; from echo_ft.retrieval import descriptor_cache; descriptor_cache.SHARD_SIZE = 4\n"
    "from data_prep.embed import main; from echo_ft.config import run_main\n"
    "run_main(main)\n"
)
"""`python -m data_prep.embed` with shards of four images, because a test does not have thousands of images."""

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def parts_file(tmp_path_factory) -> Path:
    """A manifest of 80 images."""
    return draw_manifest(tmp_path_factory.mktemp("raw"), ("cap", "ring"), normals=12, defects=4)


def options(parts_file: Path, cache: Path) -> list[str]:
    given = {"source": "manifest", "annotations": parts_file, "output": cache.parent / "parts", "descriptor": "skimage"}
    return [str(text) for key, value in {**given, "cache": cache}.items() for text in (f"--{key}", value)]


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def shards(cache: Path) -> dict[str, tuple[int, list[str]]]:
    """Modification time and hashes of each finished shard."""
    return {
        path.name: (path.stat().st_mtime_ns, np.load(path)["hashes"].tolist())
        for path in (cache / f"features-{ScikitImage.key}").glob("*.npz")
    }


def test_after_a_kill_no_finished_shard_is_computed_again(parts_file, tmp_path):
    cache = tmp_path / "cache"
    process = start([sys.executable, "-c", SMALL_SHARDS, *options(parts_file, cache)])
    while process.poll() is None and len(shards(cache)) < 3:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = shards(cache)
    assert 3 <= len(finished) < 20, "the process was killed halfway"
    process = start(
        [str(BIN / "accelerate"), "launch", "--quiet", "-m", "data_prep.embed", *options(parts_file, cache)]
    )
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    known = sum(len(hashes) for _, hashes in finished.values())
    assert f"80 images, {known} of them already in the cache" in output
    everything = shards(cache)
    assert {name: everything[name] for name in finished} == finished
    counts = Counter(digest for _, hashes in everything.values() for digest in hashes)
    assert len(counts) == 80
    assert set(counts.values()) == {1}


def test_two_processes_compute_the_same_descriptors_as_one(parts_file, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    embed(make_config(parts_file, tmp_path / "parts", cache=one))
    script = tmp_path / "embed.py"
    script.write_text(SMALL_SHARDS)
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2"]
    process = start([*torchrun, str(script), *options(parts_file, two)])
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "80 images, 0 of them already in the cache" in output
    store = {name: DescriptorCache(ScikitImage(), cache) for name, cache in (("one", one), ("two", two))}
    counts = Counter(digest for _, hashes in shards(two).values() for digest in hashes)
    assert set(counts) == store["one"].known()
    assert set(counts.values()) == {1}
    rows = {digest: row for row, digest in enumerate(counts)}
    np.testing.assert_array_equal(store["two"].gather(rows), store["one"].gather(rows))


def test_a_build_uses_cached_descriptors(parts_file, tmp_path, monkeypatch):
    plain = build(make_config(parts_file, tmp_path / "plain"))
    embed(make_config(parts_file, tmp_path / "parts", cache=tmp_path / "cache"))
    monkeypatch.setattr(ScikitImage, "_describe", None)  # nothing is left to compute
    assert (
        build(make_config(parts_file, tmp_path / "parts", cache=tmp_path / "cache"))["fingerprint"]
        == plain["fingerprint"]
    )


def test_an_unreadable_image_is_counted_and_left_to_the_build(tmp_path, capsys):
    parts_file = draw_manifest(tmp_path / "raw", ("cap",), normals=6, defects=3)
    (parts_file.parent / "cap" / "good-0-1.png").write_bytes(b"broken")
    for cached in (0, 23):
        embed(make_config(parts_file, tmp_path / "parts", cache=tmp_path / "cache"))
        output = capsys.readouterr().out
        assert f"24 images, {cached} of them already in the cache" in output
        assert "unreadable images: 1; the build lists them with the reasons" in output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "no cache folder is given; add --cache DIR"),
        ({"cache": Path("c"), "source": "synthetic", "annotations": None}, "draws its images during the build"),
        ({"cache": Path("c"), "descriptor": "scikit"}, "did you mean skimage"),
    ],
)
def test_configs_without_descriptors_to_compute_are_refused(parts_file, tmp_path, changes, message):
    with pytest.raises(EchoError, match=message):
        embed(make_config(parts_file, tmp_path / "parts", **changes))


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_images_keep_their_order_whatever_number_is_decoded_ahead(tmp_path, monkeypatch, ahead):
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
            assert pixels is None
            assert "broken" in fault
        else:
            assert fault is None
            assert (pixels == descriptors.decode.decode(path)).all()


@pytest.mark.parametrize("extractor", [ScikitImage(), OpenClip("ViT-S-32-alt", None)], ids=["skimage", "open_clip"])
def test_descriptors_in_shards_equal_those_of_single_images(tmp_path, monkeypatch, extractor):
    monkeypatch.setattr(descriptor_cache, "SHARD_SIZE", 3)
    names = [f"{number}.png" for number in range(7)]
    for number, name in enumerate(names):
        draw_part(tmp_path / name, number)
    (tmp_path / "copy.png").write_bytes((tmp_path / "5.png").read_bytes())
    found, rejections = extract_descriptors([*names, "copy.png"], tmp_path, extractor, tmp_path / "cache")
    assert not rejections
    assert len(found.matrix) == 7
    assert found.rows["copy.png"] == found.rows["5.png"]
    for name in names:
        np.testing.assert_allclose(found.vector(name), extractor.vectors([tmp_path / name])[0][0], atol=1e-5)


def test_processes_that_write_the_same_shard_leave_it_complete(tmp_path):
    draw_part(tmp_path / "part.png", 0)
    hashes, _ = hash_files(["part.png"], tmp_path)
    for _ in range(2):
        store = DescriptorCache(ScikitImage(), tmp_path / "cache")
        store.known = set  # like a process that looked before the other one wrote
        assert list(extract_missing(hashes, tmp_path, ScikitImage(), store)) == [{}]
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1 == len(list((tmp_path / "cache").rglob("*.*")))
