"""Add synthetic defects to the normal images of a source, for products without images of defects.

    python -m data_prep.synthesize --config recipes/data/manifest.yaml --annotations parts.csv --output parts_synthetic
    python -m data_prep.build --source manifest --annotations parts_synthetic/parts.jsonl \
        --knowledge parts_synthetic/knowledge.yaml --output data/parts

Takes the config of a build and uses its source, root, annotations, knowledge and seed. Writes a folder for the source
`manifest` with:

- the source's images, as hard links if the disk supports them and as copies otherwise;
- the synthetic images and their masks in synthetic/;
- a manifest of all images;
- knowledge.yaml, with the given knowledge and a description of each synthetic condition;
- rejected.jsonl, and manifest.json with the options and versions.

The manifest of images is named after the source's annotations file, or after its folder if the dataset is named after
the folder. A build therefore splits the images as it splits those of the source. Otherwise, the manifest is called
parts.jsonl. The source is never changed, and the same input and seed give the same files.

A synthetic image belongs to the same part as the normal image it was made from, and is only for training. No image from
the source's validation or test split is used. A build may assign the splits itself. It then rejects a synthetic image
whose part is not in the train split or whose condition is held out for the test split.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from data_prep.collect import check_config, usable_images
from data_prep.config import BuildConfig
from data_prep.sources import inferred_dataset_name
from data_prep.sources._rows import condition_cell, with_record_names
from data_prep.sources.manifest import COLUMNS
from data_prep.workspace import workspace
from echo_ft.config import parse, run_main
from echo_ft.data.knowledge import load_knowledge, products_of
from echo_ft.errors import EchoError
from echo_ft.files import write_json, write_jsonl, write_text
from echo_ft.images.decode import READ_ERRORS, SIDEWAYS, decode, describe_read_error, size_and_orientation
from echo_ft.images.masks import load_mask
from echo_ft.images.synthetic_defects import DEFECT_METHODS, SyntheticDefect, make_defect
from echo_ft.inputs import image_file, with_frame
from echo_ft.provenance import commit, versions
from echo_ft.records import GOOD, Inspection, Knowledge, Question, Rejection
from echo_ft.terminal import progress

SYNTHETIC_FORMAT = "echo-ft synthetic 1"
"""`format` in manifest.json."""

MAX_PER_NORMAL = 1000
"""Largest number of synthetic images per normal image."""

REJECTED_FILE = "rejected.jsonl"

SYNTHETIC_FOLDER = "synthetic"
"""Folder in the output for the synthetic images and for all masks that the command writes."""


@dataclass(frozen=True)
class SynthesizeConfig:
    """Options of `python -m data_prep.synthesize` in addition to those of a build."""

    methods: list[str] = field(
        default_factory=lambda: [*DEFECT_METHODS],
        metadata={"help": "Methods that make defects.", "choices": [*DEFECT_METHODS]},
    )
    per_normal: int = field(
        default=1,
        metadata={
            "help": "Synthetic images per normal image. The method of each is drawn with the seed; if it makes no "
            "visible defect, another one is used."
        },
    )


def main(argv: list[str]) -> None:
    """Write the folder and print what it contains."""
    source, config = parse([BuildConfig, SynthesizeConfig], argv)
    manifest = synthesize(source, config)
    methods = manifest["counts"]["synthetic"]
    counts = ", ".join(f"{count} by {method}" for method, count in methods.items())
    print(f"{source.output}: {sum(methods.values())} synthetic images: {counts}")
    print(f"{manifest['rejected']} rejected" + ("; see rejected.jsonl" if manifest["rejected"] else ""))
    print(
        "next: python -m data_prep.build with the same --config and --source manifest "
        f"--root {source.output} --annotations {source.output / manifest['list']} "
        f"--knowledge {source.output / 'knowledge.yaml'} --output DATASET"
    )


def synthesize(source: BuildConfig, config: SynthesizeConfig) -> dict[str, Any]:
    """Write the folder `source.output`, completely or not at all, and return its manifest.json.

    Raises EchoError if the build config is wrong, if the output is not empty, or if no defect can be made. Also raises
    it if the source has questions, which a manifest cannot hold, or no normal image for training.
    """
    check_config(source)
    if not 1 <= config.per_normal <= MAX_PER_NORMAL:
        raise EchoError(f"per_normal is {config.per_normal}; set it to a number from 1 to {MAX_PER_NORMAL}")
    if source.output.is_dir() and any(source.output.iterdir()):
        raise EchoError(f"{source.output} is not empty; choose another output, and build the dataset from it")
    known = load_knowledge(source.knowledge) if source.knowledge else {}
    with workspace(source.output, {}, overwrite=False) as folder:
        usable = usable_images(source, folder)
        root, inspections, questions, rejections = usable.root, usable.inspections, usable.questions, usable.rejections
        known = with_record_names(known, {one.condition for one in inspections}, tuple(source.good or ()))
        normals = normals_for_training(source, inspections, questions)
        # Splits ignore a dataset name that comes from this file, but not other names (`assign_configured_splits`).
        listed = f"{inferred_dataset_name(source.source, root, source.annotations) or 'parts'}.jsonl"
        if listed == REJECTED_FILE:
            raise EchoError(
                f"the manifest would be called {REJECTED_FILE}, like the list of rejections; "
                "rename the annotations of the source"
            )
        synthetic: list[Inspection] = []
        for result in draw_defects(normals, root, folder, source.seed, config):
            if isinstance(result, Inspection):
                synthetic.append(result)
            else:
                rejections.append(result)
        if not synthetic:
            raise EchoError(f"no defect could be made on any of {len(normals)} normal images; try other methods")
        # A build with the same config adds its frame to each path without one, but a drawn file has only the frame 0.
        frame = None if source.frame is None else 0
        named = [replace(one, image=with_frame(one.image, frame)) for one in synthetic]
        rows = [*(import_image(one, root, folder) for one in inspections), *map(manifest_row, named)]
        write_jsonl(folder / REJECTED_FILE, rejections)
        write_text(folder / listed, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows))
        text = yaml.safe_dump(extend_knowledge(known, synthetic), allow_unicode=True, sort_keys=False, width=120)
        write_text(folder / "knowledge.yaml", text)
        manifest = {
            "format": SYNTHETIC_FORMAT,
            "list": listed,
            "config": source.dataset_options() | dataclasses.asdict(config),
            "counts": {
                "images": len(inspections),
                "normals": len(normals),
                "synthetic": dict(sorted(Counter(str(one.synthetic) for one in synthetic).items())),
            },
            "rejected": len(rejections),
            "versions": versions(),
            "commit": commit(),
        }
        write_json(folder / "manifest.json", manifest)
    return manifest


def normals_for_training(
    source: BuildConfig, inspections: Sequence[Inspection], questions: Sequence[Question]
) -> list[Inspection]:
    """Return the normal images that training may see.

    Raises EchoError if there are none, or if a manifest cannot represent the source.
    """
    if questions:
        raise EchoError(
            f"the source {source.source} has its own questions, which a manifest cannot hold; it is a benchmark and "
            "needs no synthetic defects"
        )
    taken = next((one.image for one in inspections if one.image.startswith(f"{SYNTHETIC_FOLDER}/")), None)
    if taken is not None:
        raise EchoError(f"the source has {taken}, but the output needs the folder {SYNTHETIC_FOLDER}; rename it")
    normals = [one for one in inspections if one.condition == GOOD and one.split in (None, "train")]
    if not normals:
        raise EchoError(
            f"the source {source.source} has no normal image outside validation and test, and synthetic defects are "
            "for training only; add normal images"
        )
    return normals


def draw_defects(
    normals: Sequence[Inspection], root: Path, folder: Path, seed: int, config: SynthesizeConfig
) -> Iterator[Inspection | Rejection]:
    """Yield the synthetic images of each normal image, saved in `folder`, and a rejection for each failure."""
    for normal in progress(normals, "drawing defects", "images"):
        try:
            image = np.asarray(decode(root / normal.image))
        except READ_ERRORS as error:  # header and checksums may be valid although the pixels are broken
            yield Rejection(normal.image, describe_read_error(error))
            continue
        for number in range(1, config.per_normal + 1):
            draw_seed = f"{seed}/{normal.image}/{number}"
            for method in random.Random(draw_seed).sample(config.methods, len(config.methods)):
                defect = make_defect(method, image, draw_seed)
                if defect is not None:
                    stem = f"{SYNTHETIC_FOLDER}/{normal.image}/{method}-{number}"
                    yield save_defect(defect, method, stem, normal, folder)
                    break
            else:
                methods = ", ".join(config.methods)
                yield Rejection(normal.image, f"no defect by {methods} is visible on the image (draw {number})")


def save_defect(defect: SyntheticDefect, method: str, stem: str, normal: Inspection, folder: Path) -> Inspection:
    """Save the image and its mask losslessly as `<stem>.png` and `<stem>_mask.png` in `folder`.

    Returns their record.
    """
    image, mask = f"{stem}.png", f"{stem}_mask.png"
    (folder / image).parent.mkdir(parents=True, exist_ok=True)
    grey = bool((defect.image == defect.image[..., :1]).all())
    Image.fromarray(defect.image[..., 0] if grey else defect.image).save(folder / image)
    Image.fromarray(defect.mask.astype(np.uint8) * 255).save(folder / mask)
    condition = DEFECT_METHODS[method].condition
    return replace(normal, id=image, image=image, condition=condition, mask=mask, synthetic=method)


def import_image(inspection: Inspection, root: Path, folder: Path) -> dict[str, Any]:
    """Link or copy an image of the source, its mask and its reference into `folder`. Returns its manifest row.

    Several masks, and polygons, are merged into one mask, because a manifest has only one column for masks. So are
    boxes on an image that viewers turn sideways, because a manifest cannot say which view its boxes are for.
    """
    one = inspection
    size, orientation = size_and_orientation(root / one.image)
    if one.masks or one.polygons or (one.boxes and orientation in SIDEWAYS and size[0] != size[1]):
        mask = f"{SYNTHETIC_FOLDER}/{one.image}/mask.png"
        pixels = load_mask(one, root, size, orientation)
        (folder / mask).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(pixels, np.uint8) * 255).save(folder / mask)
        one = replace(one, mask=mask, masks=(), polygons=(), boxes=())
    for name in (one.image, one.mask, one.reference):
        if name is None:
            continue
        source, target = image_file(root / name), image_file(folder / name)
        # Existing files came with another image, or were drawn above or by the source itself.
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source.resolve(), target)
            except OSError:  # the output is on another disk, or on one without hard links
                shutil.copy2(source, target)
    return manifest_row(one)


def manifest_row(inspection: Inspection) -> dict[str, Any]:
    """Return an inspection as a row for the source `manifest`, without empty columns other than the condition."""
    columns = {name: getattr(inspection, name) for name in COLUMNS}
    columns["condition"] = condition_cell(inspection.condition)
    return {name: value for name, value in columns.items() if value or name == "condition"}


def extend_knowledge(known: Knowledge, synthetic: Sequence[Inspection]) -> dict[str, dict[str, dict[str, str]]]:
    """Add a description of each product's synthetic conditions to the knowledge. Existing descriptions are kept."""

    def copied(products: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
        return {product: dict(entries) for product, entries in products.items()}

    knowledge = {dataset: copied(products) for dataset, products in known.items()}
    for one in synthetic:
        products = knowledge.setdefault(one.dataset, copied(products_of(known, one.dataset)))
        descriptions = products.setdefault(one.product, {})
        descriptions.setdefault(one.condition, DEFECT_METHODS[str(one.synthetic)].description)
    return knowledge


if __name__ == "__main__":
    run_main(main)
