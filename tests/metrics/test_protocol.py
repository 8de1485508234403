"""Every run says which protocol its scores follow: the training data, the audit and the references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from echo_ft.data.dataset import DATASET_FORMAT, DIGESTS, images_fingerprint
from echo_ft.metrics.loading import Run, describe_protocol
from echo_ft.records import ROLES


def make_dataset(folder: Path, fingerprint: str, source: str = "mmad", **more: Any) -> str:
    config = {"split": "given", "k": 3, "named_references": False, **more.pop("config", {})}
    folder.mkdir()
    manifest = {"format": DATASET_FORMAT, "root": ".", "fingerprint": fingerprint, "source": source, "config": config}
    (folder / "manifest.json").write_text(json.dumps({**manifest, **more}))
    return str(folder)


def protocol(dataset: str, *trained_on: dict[str, Any], **provenance: Any) -> str:
    run = {
        "dataset": dataset,
        "dataset_fingerprint": "eval",
        "split": "test",
        "reference": "retrieved",
        "references": None,
    }
    return describe_protocol(Run(Path("run"), [], {**run, "trained_on": list(trained_on), **provenance}, [], []))


def source(dataset: str, fingerprint: str, seen: int | None = 0) -> dict[str, Any]:
    return {
        "dataset": dataset, "dataset_fingerprint": fingerprint, "photographs_trained_on": seen, "of_photographs": 89
    }  # fmt: skip


def test_the_base_model_follows_mmads_protocol_only_with_the_reference_that_mmad_names(tmp_path: Path) -> None:
    retrieved = make_dataset(tmp_path / "retrieved", "eval")
    named = make_dataset(tmp_path / "named", "eval", config={"named_references": True})
    other = make_dataset(tmp_path / "other", "eval", source="visa")
    assert protocol(retrieved) == "not trained; 3 retrieved references per image instead of MMAD's 1-shot"
    assert protocol(retrieved, references=1) == "not trained; 1 retrieved reference per image instead of MMAD's 1-shot"
    assert protocol(named) == "not trained; 3 retrieved references per image instead of MMAD's 1-shot"
    assert protocol(named, references=1) == "not trained; MMAD's 1-shot, with the reference that MMAD gives"
    assert protocol(named, reference="none") == "not trained; no reference instead of MMAD's 1-shot"
    assert protocol(other, reference="random", references=2) == "not trained; 2 random references per image"


@pytest.mark.parametrize(
    ("rule", "split", "expected"),
    [
        ("seeded", "test", "trained on some of MMAD's own images"),
        ("given", "test", "trained on some of MMAD's own images"),
        ("by_dataset", "test", "across datasets"),
        ("by_product", "test", "across products"),
        ("by_condition", "test", "across defects"),
        ("by_dataset", "validation", "trained on some of MMAD's own images"),  # validation has train's datasets
    ],
)
def test_training_on_the_same_dataset_is_named_by_its_split(
    tmp_path: Path, rule: str, split: str, expected: str
) -> None:
    dataset = make_dataset(tmp_path / "mmad", "eval", config={"split": rule})
    found = protocol(dataset, source(dataset, "eval"), split=split)
    assert found == f"{expected} (not audited); 3 retrieved references per image instead of MMAD's 1-shot"


def test_the_verdict_of_the_audit_is_part_of_the_protocol(tmp_path: Path) -> None:
    clean = {"eval": {"leak": False, "verdict": "no leak found: no training data of a is in the test split of b"}}
    evaluated = make_dataset(tmp_path / "visa", "eval", source="visa")
    trained = make_dataset(tmp_path / "goods", "train", source="goods_ad", audits=clean)
    assert protocol(evaluated, source(trained, "train")).startswith(
        f"across datasets, trained on {trained} (no leak found)"
    )
    rebuilt = source(trained, "older")
    assert "(not audited)" in protocol(evaluated, rebuilt), "the audit is of another version of the dataset"
    cards = {role: {"dataset_fingerprint": "older", "leaks": {"eval": "LEAK: 3 groups"}} for role in ROLES}
    assert "(LEAK: 3 groups)" in protocol(evaluated, rebuilt, adapters=cards)
    assert "(not audited)" in protocol(evaluated, rebuilt, adapters={ROLES[0]: {"leaks": {"another": "LEAK"}}})
    assert protocol(evaluated, source(evaluated, "eval", seen=4)).startswith("trained on 4 of these 89 images; ")


def test_another_build_of_the_same_images_is_not_another_dataset(tmp_path: Path) -> None:
    """The images may have been built with another k, or with images that were added later."""

    def build(name: str, **images: str) -> str:
        folder = make_dataset(tmp_path / name, name, images_fingerprint=images_fingerprint(images))
        (tmp_path / name / DIGESTS).write_text(json.dumps(images))
        return folder

    evaluated = build("eval", **{"a.png": "1", "b.png": "2"})
    earlier, other = build("earlier", **{"old/a.png": "1"}), build("other", **{"a.png": "3"})
    assert protocol(evaluated, source(earlier, "earlier")).startswith(
        f"trained on {earlier}, another build with some of the same images (not audited); "
    )
    assert protocol(evaluated, source(other, "other")).startswith(
        f"across datasets, trained on {other} (not audited); "
    )
    (tmp_path / "earlier" / DIGESTS).unlink()
    assert protocol(evaluated, source(earlier, "earlier")).startswith("across datasets, ")


def test_adapters_of_two_datasets_name_both(tmp_path: Path) -> None:
    evaluated = make_dataset(tmp_path / "visa", "eval", source="visa")
    found = protocol(evaluated, source(evaluated, "eval"), source("elsewhere", "train", seen=None))
    first = "trained on some of the dataset's own images (not audited)"
    assert found.startswith(f"{first} and across datasets, trained on elsewhere (not audited);")


def test_a_leak_is_stated_only_for_its_own_training_data() -> None:
    cards = {
        "knowledge_guide": {"dataset": "one", "dataset_fingerprint": "1", "leaks": {"eval": "LEAK: 3 copies"}},
        "decision_maker": {"dataset": "two", "dataset_fingerprint": "2", "leaks": {}},
    }
    found = protocol("gone", source("one", "1"), source("two", "2"), adapters=cards)
    assert found.startswith(
        "across datasets, trained on one (LEAK: 3 copies) and across datasets, trained on two (not audited);"
    )


def test_a_run_without_its_dataset_and_an_older_run_are_described_from_the_cards(tmp_path: Path) -> None:
    card = {"dataset": "gone", "dataset_fingerprint": "eval", "leaks": {}}
    assert protocol("gone", trained_on=None, adapters={"decision_maker": card}) == (
        "trained on some of the dataset's own images (not audited); all retrieved references per image"
    )
    answers = Run(Path("answers.json"), [], {"answers": "answers.json"}, [], [])
    assert describe_protocol(answers) == "unknown training data: the answers come from another program"
