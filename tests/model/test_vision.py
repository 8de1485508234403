"""Each image is encoded once per batch, or only once across epochs and runs if there is a feature store."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader
from trl import ModelConfig

from echo_ft.errors import EchoError
from echo_ft.files import atomic_file
from echo_ft.images.corruptions import Corruption
from echo_ft.images.views import View
from echo_ft.model.loading import load_model, project_patches
from echo_ft.model.preparation import packed_inputs, prepare_model
from echo_ft.model.vision import TowerFeatureStore, encode_images_once
from echo_ft.provenance import versions
from echo_ft.records import Branch, Exchange
from echo_ft.training.collator import Collator
from tests.conftest import ECHO_TINY, draw
from train.sft import feature_store

GIB = 2**30


@pytest.fixture
def frozen(model):
    prepared = copy.deepcopy(model)
    prepared.model.visual.requires_grad_(False)
    return prepared


def exchanges_over(root, *cases: tuple[int, ...]) -> list[Exchange]:
    """Return one exchange per tuple of image numbers."""
    names = {number: draw(root / f"{number}.png", (60 + number, 90), number) for case in cases for number in case}
    branch = Branch("1", "Question: Is it so?\nA. Yes.\nB. No.\n", "A")
    return [
        Exchange("decision_maker", str(case), tuple(names[number] for number in case), "", (branch,), "1")
        for case in cases
    ]


def batch_of(collator, exchanges):
    return collator.batch([collator.row_builder.load_row(exchange, collator.root) for exchange in exchanges])


def test_the_matrix_product_equals_the_convolution_of_patches(row_builder):
    model, projected = (load_model(str(ECHO_TINY), dtype="float32") for _ in range(2))
    project_patches(projected)
    patches = torch.randn(24, 3 * 2 * row_builder.image_processor.patch_size**2)
    found, expected = projected.model.visual.patch_embed(patches), model.model.visual.patch_embed(patches)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for embedding in (projected, model):
        embedding.zero_grad()
        (embedding.model.visual.patch_embed(patches) ** 2).sum().backward()
    gradients = [one.model.visual.patch_embed.proj.weight.grad for one in (projected, model)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_stored_features_are_exact_and_invalid_for_a_changed_image(tmp_path):
    image = View(tmp_path, draw(tmp_path / "a.png", (60, 40), 1))
    store, features = TowerFeatureStore(tmp_path / "kept", "a tower", GIB), torch.randn(6, 8, dtype=torch.bfloat16)
    assert store.load(image) is None
    store.save(image, features)
    assert torch.equal(store.load(image), features)
    assert TowerFeatureStore(tmp_path / "kept", "another tower", GIB).load(image) is None
    draw(tmp_path / "a.png", (64, 40), 2)
    assert store.load(image) is None


def test_the_store_respects_its_size_limit(tmp_path):
    images = [View(tmp_path, draw(tmp_path / f"{index}.png", (60, 40), index)) for index in range(3)]
    features = torch.zeros(16, 16)
    store = TowerFeatureStore(tmp_path / "kept", "a tower", 2 * features.nbytes)
    for image in images:
        store.save(image, features)
    assert [store.load(image) is not None for image in images] == [True, True, False]
    again = TowerFeatureStore(tmp_path / "kept", "a tower", 2 * features.nbytes)
    again.save(images[2], features)
    assert again.load(images[2]) is None
    assert not list(again.folder.glob("*.[0-9]*"))


def test_processes_share_the_space_that_the_folder_has_left(tmp_path, capsys):
    images = [View(tmp_path, draw(tmp_path / f"{index}.png", (60, 40), index)) for index in range(8)]
    features = torch.zeros(64, 64)
    limit = 6 * (features.nbytes + 200)  # a file has a header
    first = TowerFeatureStore(tmp_path / "kept", "a tower", limit)
    for image in images[:2]:
        first.save(image, features)
    ranks = [TowerFeatureStore(tmp_path / "kept", "another tower", limit, processes=2) for _ in range(2)]
    for index, image in enumerate(images):
        ranks[index % 2].save(image, features)
    assert len(list(ranks[0].folder.glob("*.safetensors"))) == 4
    assert capsys.readouterr().out.count("has reached features_gib") == 2


def test_any_changed_byte_of_a_stored_feature_is_refused_with_the_name_of_its_file(tmp_path):
    image = View(tmp_path, draw(tmp_path / "a.png", (60, 40), 1))
    store = TowerFeatureStore(tmp_path / "kept", "a tower", GIB)
    store.save(image, torch.arange(8.0))
    (path,) = store.folder.iterdir()
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(EchoError, match=f"{path} has changed since it was stored; delete it"):
            store.load(image)
    path.write_bytes(content)
    assert torch.equal(store.load(image), torch.arange(8.0))


def test_partial_files_of_a_killed_process_are_deleted_and_those_of_a_living_one_stay(tmp_path):
    image = View(tmp_path, draw(tmp_path / "a.png", (60, 40), 1))
    store = TowerFeatureStore(tmp_path / "kept", "a tower", GIB)
    store.save(image, torch.zeros(4, 4))
    dead = store.folder / f"a.safetensors.{'0' * 32}.partial"
    dead.write_bytes(b"partial")
    with atomic_file(store.folder / "b.safetensors", unique=True) as living:
        living.write_bytes(b"partial")
        TowerFeatureStore(tmp_path / "kept", "another tower", GIB)
        assert living.exists()
    assert not dead.exists()
    assert store.load(image) is not None


def test_the_error_for_an_unwritable_folder_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EchoError, match=r"features cannot be stored in .*file"):
        TowerFeatureStore(tmp_path / "file", "a tower", GIB)


def test_stored_features_give_the_logits_of_computed_ones(row_builder, frozen, tmp_path):
    exchanges = exchanges_over(tmp_path, (0, 1), (2, 1), (1, 3))
    prepared, store = copy.deepcopy(frozen), TowerFeatureStore(tmp_path / "kept", "a tower", GIB)
    prepare_model(frozen)
    prepare_model(prepared, store)
    plain, storing = Collator(row_builder, tmp_path), Collator(row_builder, tmp_path, store)
    first = batch_of(storing, exchanges[:2])
    assert len(first["image_grid_thw"]) == 3  # image 1 occurs twice
    for batch in (first, batch_of(storing, exchanges)):
        found = prepared(**packed_inputs(batch)).logits
        expected = frozen(**packed_inputs(batch_of(plain, exchanges[: len(batch["lengths"])]))).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(batch_of(storing, exchanges)["image_grid_thw"]) == 0
    assert prepared(
        **packed_inputs(batch_of(storing, exchanges))
    ).logits.requires_grad  # the language model keeps its graph


def test_loader_workers_find_features_that_are_stored_meanwhile(row_builder, frozen, tmp_path):
    exchanges = exchanges_over(tmp_path, (0, 1))
    store = TowerFeatureStore(tmp_path / "kept", "a tower", GIB)
    collator = Collator(row_builder, tmp_path, store)
    prepare_model(frozen, store)
    loader = DataLoader(
        [0, 0, 0, 0], collate_fn=lambda _: batch_of(collator, exchanges), num_workers=1, prefetch_factor=1
    )
    new = []
    for batch in loader:
        new.append(len(batch["image_grid_thw"]))
        with torch.no_grad():
            frozen(**packed_inputs(batch))
    assert new[0] == 2 and new[-1] == 0


def test_a_corrupted_query_is_not_confused_with_the_clean_image(row_builder, frozen, tmp_path):
    """Image 1 is the clean query of the first case and a reference in the second case, whose query is corrupted."""
    exchanges = exchanges_over(tmp_path, (0, 1), (1, 2), (2, 1))
    corruptions = [None, Corruption("blur", 5), Corruption("blur", 5)]
    prepared, store = copy.deepcopy(frozen), TowerFeatureStore(tmp_path / "kept", "a tower", GIB)
    prepare_model(frozen)
    prepare_model(prepared, store)
    plain, storing = Collator(row_builder, tmp_path), Collator(row_builder, tmp_path, store)

    single = [
        logits_of(frozen, plain, exchanges[index : index + 1], corruptions[index : index + 1]) for index in range(3)
    ]
    for _ in range(2):  # computed, then stored
        found = logits_of(prepared, storing, exchanges, corruptions)
        torch.testing.assert_close(found, torch.cat(single, dim=1), rtol=1e-4, atol=1e-4)
    assert len(list(store.folder.glob("*.safetensors"))) == 5  # 0, 1 and 2 clean, 1 and 2 corrupted
    clean = logits_of(frozen, plain, exchanges[2:], [None])
    assert (clean - single[2]).abs().max() > 0.01


def logits_of(model, collator, exchanges, corruptions):
    rows = [collator.row_builder.load_row(exchange, collator.root) for exchange in exchanges]
    return model(**packed_inputs(collator.batch(rows, corruptions))).logits


def test_features_of_a_trained_tower_are_never_stored(model, tmp_path):
    with pytest.raises(EchoError, match="features cannot be stored because the vision tower is trained"):
        encode_images_once(copy.deepcopy(model), TowerFeatureStore(tmp_path, "a tower", GIB))


def test_features_depend_on_all_packages_that_make_pixels_or_run_the_tower(tmp_path):
    config = SimpleNamespace(min_pixels=1, max_pixels=2, features=str(tmp_path), features_gib=1.0)
    sft = SimpleNamespace(bf16=False, fp16=False, world_size=1)

    def folder(**changed: str) -> Path:
        card = SimpleNamespace(base_fingerprint="base", versions={**versions(), **changed})
        return feature_store(card, config, sft, ModelConfig(), "{}").folder

    names = ("torch", "torchvision", "transformers", "pillow", "opencv-python-headless", "scipy", "bitsandbytes")
    assert len({folder(), folder(), *(folder(**{name: "0"}) for name in names)}) == 1 + len(names)
    assert folder(wandb="0") == folder()
