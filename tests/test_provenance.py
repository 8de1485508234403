"""A run uses only images that are unchanged since the build, and runs with different protocols are not compared."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.build import main as build_main
from echo_ft import provenance
from echo_ft.data.dataset import DIGESTS, Dataset, load_dataset, require_unchanged
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl
from echo_ft.records import Inspection, Prediction, Reference
from evaluation import compare
from evaluation.run import main as run_main
from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS, make_dataset
from tests.support.runs import make_run, predictions


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "data"
    build_main(["--config", "recipes/tiny/data.yaml", "--output", str(folder), "--parts", "8"])
    return folder


@pytest.fixture
def built(drawn: Path, tmp_path: Path) -> Dataset:
    shutil.copytree(drawn, tmp_path / "data")
    return load_dataset(tmp_path / "data")


def test_build_stores_the_digest_of_every_image_that_a_run_can_show(built: Dataset) -> None:
    inspections = read_jsonl(built.folder / "inspections.jsonl", Inspection)
    references = read_jsonl(built.folder / "references.jsonl", Reference)
    require_unchanged(built, [*(i.image for i in inspections), *(r.image for r in references)])
    with pytest.raises(EchoError, match=r"1 of 1 images have changed .*first: manifest\.json"):
        require_unchanged(built, ["manifest.json"])


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (lambda images: images[0].write_bytes(images[0].read_bytes() + b"."), 1),
        (lambda images: images[0].write_bytes(b""), 1),
        (lambda images: swap(images[0], images[1]), 2),
        (lambda images: images[0].touch(), 0),
        (lambda images: images[0].unlink(), 0),  # reported by the code that reads the image
    ],
)
def test_images_changed_since_the_build_are_detected_by_content(
    built: Dataset, change: Callable[[list[Path]], Any], count: int
) -> None:
    names = [one.image for one in read_jsonl(built.folder / "inspections.jsonl", Inspection)][:5]
    change([built.root / name for name in names])
    if not count:
        require_unchanged(built, names)
        return
    message = (
        rf"{count} of 5 images have changed since .* was built \(first: {names[0]}\); restore the files or rebuild"
    )
    with pytest.raises(EchoError, match=message):
        require_unchanged(built, [*names, *names])


def test_digests_of_another_dataset_are_rejected(built: Dataset) -> None:
    digests = json.loads((built.folder / DIGESTS).read_text())
    digests[min(digests)] = "0" * 64
    (built.folder / DIGESTS).write_text(json.dumps(digests))
    with pytest.raises(EchoError, match=r"digests.json does not match this dataset's manifest.json"):
        require_unchanged(built, [])
    (built.folder / DIGESTS).write_text("{")
    with pytest.raises(EchoError, match=r"digests.json does not contain digests as JSON .*; rebuild the dataset"):
        require_unchanged(built, [])


def run(dataset: Path, output: Path) -> None:
    options = {"dataset": dataset, "output": output, "model_name_or_path": ECHO_TINY, "dtype": "float32"}
    options |= {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "max_new_tokens": 3, "answer": "logits"}
    run_main([str(argument) for name, value in options.items() for argument in (f"--{name}", value)])


def test_run_rejects_changed_images_and_counts_failures_from_missing_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(tmp_path / "data", train=1, validation=1, test=2)
    query, reference = (dataset / "images" / name for name in ("test_0_2.png", "test_1_0.png"))
    for changed in (query, reference):
        original = changed.read_bytes()
        changed.write_bytes(original[:-1])
        with pytest.raises(EchoError, match=f"1 of 6 images have changed .*first: {changed.name}"):
            run(dataset, tmp_path / "run")
        changed.write_bytes(original)
    content = query.read_bytes()
    query.unlink()
    run(dataset, tmp_path / "run")
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith(f"done: {tmp_path / 'run'}; score it with")
    (warning,) = [
        line for line in printed.err.splitlines() if line.startswith("warning: 7 predictions failed (first: ")
    ]
    assert query.name in warning
    assert warning.endswith("rerun the same command to retry them")
    query.write_bytes(content)
    run(dataset, tmp_path / "run")
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"done: {tmp_path / 'run'}; score it with")
    assert len(list(read_jsonl(tmp_path / "run" / "predictions.jsonl", Prediction))) == 14

    described = json.loads((tmp_path / "run" / "run.json").read_text())
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert described["images_fingerprint"] == manifest["images_fingerprint"]
    assert described["warnings"] == []
    (dataset / DIGESTS).unlink()
    with pytest.raises(EchoError, match=r"digests\.json is missing, so changed images would not be noticed; rebuild"):
        run(dataset, tmp_path / "older")
    del manifest["images_fingerprint"]
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    run(dataset, tmp_path / "older")
    assert "built by an older version" in json.loads((tmp_path / "older" / "run.json").read_text())["warnings"][0]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("answer", ("generate", "logits")),
        ("option_order", ("given", "cyclic")),
        ("max_new_tokens", (64, 128)),
        ("min_pixels", (784, 3136)),
        ("max_pixels", (28224, 50176)),
        ("prompt_version", ("2", "3")),
    ],
)
def test_runs_with_different_protocols_are_compared_only_on_request(
    tmp_path: Path, key: str, values: tuple[Any, Any]
) -> None:
    base, other = (make_run(tmp_path / name, predictions(0.5), **{key: value})
                   for name, value in zip(("base", "other"), values, strict=True))  # fmt: skip
    message = (
        f"base and other cannot be compared: their {key} differs .{values[0]} and {values[1]}.; .*--compared {key}"
    )
    with pytest.raises(EchoError, match=message):
        compare.main([str(base), str(other)])
    compare.main([str(base), str(other), "--compared", key])
    assert (tmp_path / "compare" / "comparison.json").is_file()


def test_settings_under_comparison_may_differ(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", predictions(0.5), routing="full", corruption=None, references=None)
    other = make_run(
        tmp_path / "other", predictions(0.5), routing="paper", reference="none", references=1, knowledge="all",
        reasoning="off", corruption="blur", severity=3, base_model="another", base_fingerprint="beef",
        adapters={"decision_maker": {"fingerprint": "beef"}}, dtype="bfloat16", code="beef", versions={"torch": "3"},
    )  # fmt: skip
    compare.main([str(base), str(other)])


@pytest.mark.parametrize("corrupted", [False, True])
def test_the_packages_that_corrupt_queries_matter_only_to_runs_with_corruption(corrupted: bool) -> None:
    answering, others = provenance.split_versions(corrupted)
    assert ("scipy" in answering, "scipy" in others) == (corrupted, not corrupted)
    assert {"torchvision", "pillow", "opencv-python-headless"} <= set(answering)
    assert {**answering, **others} == provenance.versions()
    assert "absent" not in answering.values()


def test_the_commit_is_that_of_the_code_and_not_of_a_repository_around_an_installed_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / ".venv" / "provenance.py"
    installed.parent.mkdir()
    installed.write_text("")
    (tmp_path / ".gitignore").write_text(".venv\n")

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".gitignore")
    git("commit", "-qm", "user's own")
    monkeypatch.setattr(provenance, "__file__", str(installed))
    assert provenance.commit() == "unknown"
    git("add", "-f", str(installed))
    git("commit", "-qm", "a checkout of the code")
    assert provenance.commit() == git("rev-parse", "HEAD")
