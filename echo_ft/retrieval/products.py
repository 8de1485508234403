"""The data of an inspector about products: their conditions, their knowledge and their normal images.

This information comes from a dataset, or from the folder `references` of a bundle:

    products.json     the products with their conditions and normal images, the descriptor, and where the images are
    descriptors.npz   the descriptors of the normal images, the SHA-256 of each file, and their rows
    images/           the normal images, if they are copied
    knowledge.json    the knowledge, in the schema of a dataset's file
"""

from __future__ import annotations

import shutil
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echo_ft.data.dataset import Dataset, require_unchanged, stored_knowledge, without_synthetic
from echo_ft.data.splits import conditions_of, reference_pool
from echo_ft.errors import EchoError
from echo_ft.files import leads_outside, read_jsonl, write_json
from echo_ft.inputs import image_file, read_json_object, restore
from echo_ft.records import Inspection, Knowledge
from echo_ft.retrieval.descriptor_cache import DescriptorTable, extract_descriptors, hash_files
from echo_ft.retrieval.descriptors import load_extractor
from echo_ft.retrieval.references import ReferenceSearch
from echo_ft.terminal import LOGGER

REFERENCE_CHOICES = ("copy", "path", "none")
"""How a bundle stores the normal images: as copies, as the path to the dataset's images, or not at all."""

SAME_DESCRIPTOR = 0.999
"""Smallest cosine between a normal image's stored descriptor and the one that is recomputed on loading."""


@dataclass(frozen=True)
class ProductData:
    """The data of an inspector about products. The keys are (dataset, product)."""

    source: Path
    """The dataset or the bundle, for error messages."""
    root: Path
    """The folder that the paths of the normal images are relative to."""
    conditions: Mapping[tuple[str, str], Sequence[str]]
    """The conditions of each product, `good` first."""
    knowledge: Knowledge
    search: ReferenceSearch
    descriptor: str
    """The name of the descriptor, as in the dataset's config."""
    grounding: bool = False
    """Whether the dataset asks for the boxes of defects, so that adapters trained on it give them."""

    @property
    def comparable(self) -> list[str]:
        """The names of the products that have a normal image to compare with."""
        return sorted({product for _, product in self.search.images})


def read_products(dataset: Dataset, k: int | None = None) -> ProductData:
    """Read the products of a dataset and compute descriptors of its normal images. A search returns `k` references.

    By default, `k` is the dataset's own. Conditions and knowledge are those of the test split, so defects that only
    synthetic images show are left out. Warns about normal images that cannot be read. Raises EchoError if the dataset
    has no readable normal image, or if one has changed since the build.
    """
    config = dataset.manifest["config"]
    inspections = list(read_jsonl(dataset.folder / "inspections.jsonl", Inspection))
    knowledge = stored_knowledge(dataset.folder)
    normals: dict[tuple[str, str], list[str]] = defaultdict(list)
    for normal in reference_pool(inspections):
        normals[normal.dataset, normal.product].append(normal.image)
    if not normals:
        raise EchoError(f"{dataset.folder} has no normal image to compare with; add some and rebuild it")
    extractor = load_extractor(config["descriptor"])
    images = sorted({image for pool in normals.values() for image in pool})
    require_unchanged(dataset, images)
    descriptors, rejections = extract_descriptors(images, dataset.root, extractor, None)
    search = ReferenceSearch(normals, descriptors, extractor, k or config["k"])
    if not search.images:
        raise EchoError(
            f"no normal image under {dataset.root} can be read ({rejections[0].item}: {rejections[0].reason}); restore "
            "the images or rebuild the dataset"
        )
    if rejections:
        lost = ", ".join(sorted({product for _, product in normals.keys() - search.images.keys()}))
        LOGGER.warning(
            f"{len(rejections)} of {len(images)} normal images of {dataset.folder} cannot be read and are left out "
            f"(first: {rejections[0].item}, {rejections[0].reason})"
            + (f"; images of {lost} would be taken for another product" if lost else "")
            + "; restore them"
        )
    return ProductData(
        source=dataset.folder,
        root=dataset.root,
        conditions=conditions_of([one for one in inspections if one.synthetic is None]),
        knowledge=without_synthetic(knowledge, inspections),
        search=search,
        descriptor=config["descriptor"],
        grounding=bool(config.get("grounding")),
    )


def save_products(products: ProductData, folder: Path, choice: str) -> None:
    """Write the products to `folder`, with copies of the normal images if `choice` is `copy`.

    Raises EchoError if an image lies outside the dataset's root.
    """
    folder.mkdir(parents=True)
    search, copies = products.search, folder / "images"
    images = sorted({image for pool in search.images.values() for image in pool})
    if choice == "copy":
        for image in images:
            target = image_file(copies / image)
            if leads_outside(target, copies):
                raise EchoError(f"{image} lies outside {products.root}, so it cannot be copied; use --references path")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image_file(products.root / image), target)
    write_json(
        folder / "products.json",
        {
            "descriptor": products.descriptor,
            "k": search.k,
            "grounding": products.grounding,
            "root": "images" if choice == "copy" else str(products.root.resolve()),
            "products": [
                {
                    "dataset": dataset,
                    "product": product,
                    "conditions": list(conditions),
                    "normal_images": list(search.images.get((dataset, product), ())),
                }
                for (dataset, product), conditions in products.conditions.items()
            ],
        },
    )
    write_json(folder / "knowledge.json", products.knowledge)
    with open(folder / "descriptors.npz", "wb") as file:
        np.savez(
            file,
            images=np.array(images),
            hashes=np.array([search.descriptors.hashes[image] for image in images]),
            vectors=search.descriptors.vectors(images),
        )


def load_products(folder: Path, source: Path) -> ProductData:
    """Load the products that `save_products` wrote. `source` is the bundle, for error messages.

    Raises EchoError if a file is damaged, or if a normal image is missing or has changed. Also raises it if descriptors
    on this machine differ from those in the index.
    """
    try:
        found = read_json_object(folder / "products.json")
        knowledge: Knowledge = restore(Knowledge, read_json_object(folder / "knowledge.json"))
        keys = [(str(one["dataset"]), str(one["product"])) for one in found["products"]]
        conditions = {key: list(one["conditions"]) for key, one in zip(keys, found["products"], strict=True)}
        normals = {key: list(one["normal_images"]) for key, one in zip(keys, found["products"], strict=True)}
        k, descriptor, root = int(found["k"]), str(found["descriptor"]), folder / str(found["root"])
        grounding = bool(found.get("grounding", False))
        with np.load(folder / "descriptors.npz", allow_pickle=False) as stored:
            images, hashes, vectors = stored["images"].tolist(), stored["hashes"].tolist(), stored["vectors"]
        if not images:
            raise ValueError("they have no normal image")
        table = DescriptorTable(
            {image: row for row, image in enumerate(images)}, dict(zip(images, hashes, strict=True)), vectors
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise EchoError(f"the products in {folder} cannot be read ({error}); export the bundle again") from error
    _require_images(table, root, source)
    extractor = load_extractor(descriptor)
    (vector,), (reason,) = extractor.vectors([root / images[0]])
    if vector is None:
        raise EchoError(f"image {root / images[0]} cannot be read: {reason}; export {source} again")
    if vector.shape != vectors[0].shape or float(vector @ vectors[0]) < SAME_DESCRIPTOR:
        raise EchoError(
            f"the descriptor {descriptor} on this machine differs from the one in {source}; install the package "
            "versions that its bundle.json names, or export it again here"
        )
    search = ReferenceSearch(normals, table, extractor, k)
    return ProductData(source, root, conditions, knowledge, search, descriptor, grounding)


def _require_images(table: DescriptorTable, root: Path, source: Path) -> None:
    """Raise EchoError if a normal image is missing, has changed, or is a copy outside the bundle."""
    outside = [image for image in table.rows if leads_outside(image_file(root / image), root)]
    if outside and root.is_relative_to(source):
        raise EchoError(f"{source} names {outside[0]}, which lies outside {root}; export it again")
    found, missing = hash_files(list(table.rows), root)
    if missing:
        raise EchoError(
            f"{len(missing)} normal images of {source} are missing (first: {root / missing[0].item}); put them back, "
            "or export again with --references copy"
        )
    changed = [image for image, digest in found.items() if digest != table.hashes[image]]
    if changed:
        raise EchoError(
            f"{len(changed)} normal images of {source} have changed since the export (first: {root / changed[0]}); "
            "restore them or export again"
        )
