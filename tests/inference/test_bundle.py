"""A bundle contains the whole pipeline: it works without its dataset, and names any part that is missing or changed."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from echo_ft.data.dataset import load_dataset
from echo_ft.errors import EchoError
from echo_ft.experts.roles import PROMPT_VERSION
from echo_ft.files import read_jsonl, write_jsonl
from echo_ft.inference.bundle import bundle_adapters, load_bundle_products, read_bundle, write_checksums
from echo_ft.inference.inspector import Inspector
from echo_ft.provenance import seal_folder
from echo_ft.records import ROLES, Inspection
from echo_ft.retrieval.products import load_products, read_products, save_products
from evaluation import inspect
from tests.conftest import ECHO_TINY, ROUNDING, draw
from train.export import main as export_main


@pytest.fixture
def copied(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def image(tmp_path):
    return tmp_path / draw(tmp_path / "new.png", (90, 70), 99)


def test_a_bundle_without_its_dataset_answers_as_the_adapters_do(bundle, adapters, image, monkeypatch):
    expected = Inspector.from_adapters(adapters, dtype="float32").predict(image)

    def no_dataset(folder):
        raise AssertionError(f"the dataset {folder} is not needed")

    monkeypatch.setattr("echo_ft.inference.inspector.load_dataset", no_dataset)
    found = Inspector.from_bundle(bundle).predict(image)
    assert found.pred_score == pytest.approx(expected.pred_score, abs=ROUNDING)
    assert [one.text for one in found.trace] == [one.text for one in expected.trace]
    assert [one.prompt for one in found.trace] == [one.prompt for one in expected.trace]
    assert found.reference.startswith(str(bundle / "references" / "images"))
    assert found.product == expected.product


def test_a_bundle_shows_the_prompts_of_all_roles(bundle):
    shown = json.loads((bundle / "prompts.json").read_text())
    assert [*dict.fromkeys(one["role"] for one in shown)] == list(ROLES)
    assert shown[0]["images"] == 3
    assert "Which candidate is the best baseline" in shown[0]["prompt"]
    assert read_bundle(bundle).prompt_version == PROMPT_VERSION


def test_the_command_for_vllm_knows_how_many_references_the_bundle_shows(adapters, tmp_path, monkeypatch):
    monkeypatch.setattr("echo_ft.export.vllm.LEAST_IMAGES", 1)
    export_main(["--adapters", str(adapters), "--output", str(tmp_path / "bundle"), "--merge", "none"])
    assert """--limit-mm-per-prompt '{"image": 3}'""" in (tmp_path / "bundle" / "README.md").read_text()


def test_the_command_inspects_with_a_bundle(bundle, image, capsys):
    inspect.main([str(image), "--bundle", str(bundle), "--threshold", "1"])
    assert f"{image}: ok, P(defect)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either a bundle or adapters: add --bundle DIR"),
        (["--bundle", "b", "--adapters", "a"], "give either a bundle or adapters"),
        (["--bundle", "b", "--dataset", "d"], "--dataset cannot be used with --bundle; remove it, or use --adapters"),
        (
            ["--bundle", "b", "--server", "http://h/v1", "--server_timeout", "0"],
            "server_timeout is 0; set it to more than 0",
        ),
        (["--adapters", "a", "--server", "http://h/v1"], "--server cannot be used with --adapters; .* or use --bundle"),
        (
            ["--bundle", "b", "--server", "http://h/v1", "--base_model", "m"],
            "--base_model cannot be used with --server",
        ),
        (["--bundle", "b"], "there is no b; write one with python -m train.export"),
        (["--bundle", "b", "--watch", "w"], "give images, a folder to watch, or --serve"),
        (["--bundle", "b", "--webhook", "file:///x"], "--webhook file:///x is not an address"),
    ],
)
def test_options_that_do_not_fit_together_are_named(image, options, message):
    with pytest.raises(EchoError, match=message):
        inspect.main([str(image), *options])


def test_checksums_are_those_of_sha256sum(bundle):
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=bundle, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "adapters/decision_maker/adapter_model.safetensors: OK" in done.stdout
    assert len(done.stdout.splitlines()) == len([path for path in bundle.rglob("*") if path.is_file()]) - 1


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


CHANGES = {
    "an adapter": (lambda b: flip_a_bit(b / "adapters/knowledge_guide/adapter_model.safetensors"), "has changed since"),
    "the knowledge": (lambda b: flip_a_bit(b / "references/knowledge.json"), r"knowledge.json has changed since.*1 of"),
    "a normal image": (lambda b: flip_a_bit(b / "references/images/train_0_2.png"), "train_0_2.png has changed since"),
    "the threshold": (lambda b: flip_a_bit(b / "bundle.json"), "bundle.json"),
    "a missing file": (lambda b: (b / "processor/tokenizer.json").unlink(), "tokenizer.json is missing"),
    "an added file": (lambda b: (b / "adapters/extra.py").write_text(""), "extra.py is not in SHA256SUMS"),
    "no checksums": (lambda b: (b / "SHA256SUMS").unlink(), "has no readable SHA256SUMS"),
    "another format": (
        lambda b: (b / "bundle.json").write_text('{"format": "echo-ft bundle 9"}'),
        "format 'echo-ft bund",
    ),
    "no JSON": (lambda b: (b / "bundle.json").write_text("[]"), "bundle.json is not a JSON object"),
    "no bundle": (lambda b: (b / "bundle.json").unlink(), "is not a bundle .it has no bundle.json"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_bundle_is_refused(copied, name):
    change, message = CHANGES[name]
    change(copied)
    with pytest.raises(EchoError, match=message):
        read_bundle(copied)


def test_the_model_card_may_be_edited_and_system_files_do_not_count(copied):
    (copied / "README.md").write_text("# Line 4\n")
    (copied / ".DS_Store").write_text("")
    assert read_bundle(copied).references == "copy"


def test_an_exchanged_adapter_is_named_even_with_new_checksums(copied):
    folder = copied / "adapters"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(folder / "knowledge_guide" / name, folder / "decision_maker" / name)
    seal_folder(folder / "decision_maker")
    write_checksums(copied)
    with pytest.raises(EchoError, match="decision_maker is not the adapter that was exported"):
        bundle_adapters(copied, read_bundle(copied), str(ECHO_TINY))


def test_an_adapter_that_acts_after_the_prefix_is_refused(copied):
    folder = copied / "adapters" / "decision_maker"
    card = json.loads((folder / "echo_ft.json").read_text())
    (folder / "echo_ft.json").write_text(json.dumps(card | {"adapt_from": "branch"}))
    seal_folder(folder)
    write_checksums(copied)
    with pytest.raises(EchoError, match=r"decision_maker acts only from the branch on .*, but a bundle applies"):
        bundle_adapters(copied, read_bundle(copied), str(ECHO_TINY))


def test_a_base_model_that_has_moved_is_named_with_the_remedy(copied):
    described = read_bundle(copied)
    with pytest.raises(EchoError, match=r"the base model no/where of .* is not here .*; pass its folder as base_model"):
        bundle_adapters(copied, described, "no/where")


def test_an_index_of_another_descriptor_is_named(copied):
    path = copied / "references" / "descriptors.npz"
    with np.load(path) as found:
        content = dict(found)
    np.savez(path, **(content | {"vectors": np.roll(content["vectors"], 7, axis=1)}))
    write_checksums(copied)
    with pytest.raises(EchoError, match="the descriptor skimage on this machine differs from the one in"):
        load_bundle_products(copied, read_bundle(copied))


def test_copies_outside_the_bundle_are_refused(copied, tmp_path):
    draw(tmp_path / "secret.png", (20, 20), 1)
    path = copied / "references" / "descriptors.npz"
    with np.load(path) as found:
        content = dict(found)
    content["images"] = np.array(["../../../secret.png", *content["images"][1:]])
    np.savez(path, **content)
    write_checksums(copied)
    with pytest.raises(EchoError, match=r"names \.\./\.\./\.\./secret.png, which lies outside"):
        load_bundle_products(copied, read_bundle(copied))


def test_images_by_path_must_stay_as_they_were(dataset, tmp_path):
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder)
    save_products(read_products(load_dataset(folder)), tmp_path / "references", "path")
    assert not (tmp_path / "references" / "images").exists()
    found = load_products(tmp_path / "references", tmp_path)
    assert found.root == folder / "images"
    flip_a_bit(folder / "images" / "train_3_2.png")
    with pytest.raises(EchoError, match=r"1 normal images of .* have changed since the export .*train_3_2.png"):
        load_products(tmp_path / "references", tmp_path)
    (folder / "images" / "train_3_2.png").unlink()
    with pytest.raises(EchoError, match=r"1 normal images of .* are missing .*export again with --references copy"):
        load_products(tmp_path / "references", tmp_path)


def test_normal_images_that_are_missing_are_reported_with_the_products_that_lose_all(dataset, tmp_path, caplog):
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder)
    images = read_products(load_dataset(folder)).search.images
    assert not caplog.messages
    for image in images["line", "cap"]:
        (folder / "images" / image).unlink()
    assert read_products(load_dataset(folder)).comparable == ["washer"]
    (message,) = caplog.messages
    assert "3 of 8 normal images" in message
    assert "images of cap would be taken for another product; restore them" in message


def test_defects_that_only_synthetic_images_show_are_left_out_as_in_the_test_split(dataset, tmp_path):
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder)
    rows = list(read_jsonl(folder / "inspections.jsonl", Inspection))
    scar = replace(rows[0], id="made", condition="scar", synthetic="scar")
    write_jsonl(folder / "inspections.jsonl", [*rows, scar])
    knowledge = json.loads((folder / "knowledge.json").read_text())
    knowledge["line"]["washer"]["scar"] = "scar"
    (folder / "knowledge.json").write_text(json.dumps(knowledge))
    products = read_products(load_dataset(folder))
    assert products.conditions["line", "washer"] == ["good", "stain"]
    assert list(products.knowledge["line"]["washer"]) == ["good", "stain"]


def test_a_bundle_that_answers_otherwise_after_reloading_is_not_written(adapters, tmp_path, monkeypatch):
    """Here, the knowledge is damaged while it is written. The cap of image 1 has no knowledge."""

    def damage(products, folder, choice):
        save_products(products, folder, choice)
        (folder / "knowledge.json").write_text("{}")

    monkeypatch.setattr("echo_ft.export.bundle.save_products", damage)
    with pytest.raises(
        EchoError, match="the reloaded bundle does not answer as the adapters do: a prompt differs, in image 2"
    ):
        export_main(["--adapters", str(adapters), "--output", str(tmp_path / "bundle"), "--merge", "none"])
    assert list(tmp_path.iterdir()) == []
