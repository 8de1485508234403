"""Make synthetic defects on the normal photographs of a source, for products without photographs of defects.

    python -m data_prep.synthesize --config recipes/data/manifest.yaml --annotations parts.csv --output parts_and_made
    python -m data_prep.build --source manifest --annotations parts_and_made/parts.jsonl \
        --knowledge parts_and_made/knowledge.yaml --output data/parts

Takes the config of a build, whose source, root, annotations, knowledge and seed count here. Writes a folder that the
source `manifest` reads: the source's photographs (hard links where the disk allows it, copies elsewhere), the synthetic
ones with their masks under synthetic/, a list of all of them, knowledge.yaml with what is known and a description of
each synthetic condition, rejected.jsonl, and manifest.json with how it was made. The list has the name of the source's
own list, or of its folder where that names the dataset, so that a build splits the photographs as one of the source
does; parts.jsonl otherwise. The source is only read; the same input and seed give the same files.

A synthetic photograph belongs to the same part as the normal that it was made from, and to training alone: none is made
of a photograph that the source gives to validation or test, and a build that deals splits itself leaves out those whose
part is not in the train split, or whose condition it holds out for the test.
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
from data_prep.progress import progress
from data_prep.sources import place_name
from data_prep.sources.manifest import COLUMNS
from data_prep.workspace import workspace
from echo_ft.config import parse, run_main
from echo_ft.data.knowledge import load_knowledge, products_of
from echo_ft.errors import EchoError
from echo_ft.files import write_json, write_jsonl, write_text
from echo_ft.images.decode import UNREADABLE, decode, fault, image_size
from echo_ft.images.masks import load_mask
from echo_ft.images.synthetic_defects import METHODS, SyntheticDefect, make_defect
from echo_ft.provenance import commit, versions
from echo_ft.records import GOOD, Inspection, Knowledge, Question, Rejection

SYNTHETIC_FORMAT = "echo-ft synthetic 1"
"""`format` in manifest.json."""

REJECTED = "rejected.jsonl"

FOLDER = "synthetic"
"""Where the synthetic photographs and all masks that the command draws lie in the output."""


@dataclass(frozen=True)
class SynthesizeConfig:
    """What `python -m data_prep.synthesize` needs beside the config of a build."""

    methods: list[str] = field(
        default_factory=lambda: [*METHODS], metadata={"help": "How defects are made.", "choices": [*METHODS]}
    )
    per_normal: int = field(
        default=1,
        metadata={
            "help": "Synthetic photographs for each normal one, each by a method that the seed draws, or by another "
            "where that one makes nothing that can be seen."
        },
    )


def main(argv: list[str]) -> None:
    """Command line: write the folder and say what is in it."""
    source, config = parse([BuildConfig, SynthesizeConfig], argv)
    manifest = synthesize(source, config)
    made = manifest["counts"]["synthetic"]
    counts = ", ".join(f"{count} by {method}" for method, count in made.items())
    print(f"{source.output}: {sum(made.values())} synthetic photographs: {counts}")
    print(f"{manifest['rejected']} rejected" + (" (see rejected.jsonl)" if manifest["rejected"] else ""))
    print(
        "next: python -m data_prep.build with the same --config and --source manifest "
        f"--root {source.output} --annotations {source.output / manifest['list']} "
        f"--knowledge {source.output / 'knowledge.yaml'} --output DATASET"
    )


def synthesize(source: BuildConfig, config: SynthesizeConfig) -> dict[str, Any]:
    """Write the folder `source.output`, whole or not at all; returns its manifest.

    Raises EchoError where the config of the build is wrong, the output holds something, the source has questions of its
    own (a list has no place for them) or no normal photograph that training may see, and where no defect can be made.
    """
    check_config(source)
    if config.per_normal < 1:
        raise EchoError(f"per_normal is {config.per_normal}; it must be 1 or more")
    if source.output.is_dir() and any(source.output.iterdir()):
        raise EchoError(f"{source.output} holds files already; choose another output, and build the dataset from it")
    known = load_knowledge(source.knowledge) if source.knowledge else {}
    with workspace(source.output, {}, overwrite=False) as folder:
        root, inspections, questions, rejections = usable_images(source, folder)
        normals = usable(source, inspections, questions)
        # A build deals a dataset that the list names as one of any name, and others by their own (`prepare.divide`).
        listed = f"{place_name(source.source, root, source.annotations) or 'parts'}.jsonl"
        if listed == REJECTED:
            raise EchoError(f"the list would be called {REJECTED}, as what is rejected is; rename the source's list")
        synthetic: list[Inspection] = []
        for made in draw(normals, root, folder, source.seed, config):
            if isinstance(made, Inspection):
                synthetic.append(made)
            else:
                rejections.append(made)
        if not synthetic:
            raise EchoError(f"no defect could be made on any of {len(normals)} normal photographs; try other methods")
        rows = [*(bring(one, root, folder) for one in inspections), *map(row, synthetic)]
        write_jsonl(folder / REJECTED, rejections)
        write_text(folder / listed, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows))
        text = yaml.safe_dump(describe(known, synthetic), allow_unicode=True, sort_keys=False, width=120)
        write_text(folder / "knowledge.yaml", text)
        manifest = {
            "format": SYNTHETIC_FORMAT,
            "list": listed,
            "config": source.settings() | dataclasses.asdict(config),
            "counts": {
                "photographs": len(inspections),
                "normals": len(normals),
                "synthetic": dict(sorted(Counter(str(one.synthetic) for one in synthetic).items())),
            },
            "rejected": len(rejections),
            "versions": versions(),
            "commit": commit(),
        }
        write_json(folder / "manifest.json", manifest)
    return manifest


def usable(source: BuildConfig, inspections: Sequence[Inspection], questions: Sequence[Question]) -> list[Inspection]:
    """The normal photographs that training may see; raises EchoError where there is none, or none may be listed."""
    if questions:
        raise EchoError(
            f"the source {source.source} has questions of its own, which a list cannot hold: it is there to be tested "
            "on, and needs no defects"
        )
    taken = next((one.image for one in inspections if one.image.startswith(f"{FOLDER}/")), None)
    if taken is not None:
        raise EchoError(f"the source has {taken}, and the output needs the folder {FOLDER} for itself; rename it")
    normals = [one for one in inspections if one.condition == GOOD and one.split in (None, "train")]
    if not normals:
        raise EchoError(
            f"the source {source.source} has no normal photograph outside validation and test, and synthetic defects "
            "are for training alone; add some"
        )
    return normals


def draw(
    normals: Sequence[Inspection], root: Path, folder: Path, seed: int, config: SynthesizeConfig
) -> Iterator[Inspection | Rejection]:
    """The synthetic photographs of each normal, in files of `folder`, and a rejection for each that failed."""
    for normal in progress(normals, "making defects", "photographs"):
        try:
            image = np.asarray(decode(root / normal.image))
        except UNREADABLE as error:  # which a look at the file's header and checksums does not tell
            yield Rejection(normal.image, fault(error))
            continue
        for number in range(1, config.per_normal + 1):
            words = f"{seed}/{normal.image}/{number}"
            for method in random.Random(words).sample(config.methods, len(config.methods)):
                anomaly = make_defect(method, image, words)
                if anomaly is not None:
                    yield write(anomaly, method, f"{FOLDER}/{normal.image}/{method}-{number}", normal, folder)
                    break
            else:
                yield Rejection(
                    normal.image, f"no defect by {', '.join(config.methods)} can be seen on it (draw {number})"
                )


def write(anomaly: SyntheticDefect, method: str, stem: str, normal: Inspection, folder: Path) -> Inspection:
    """The photograph and its mask as files `<stem>.png` and `<stem>_mask.png`, without loss, and their record."""
    image, mask = f"{stem}.png", f"{stem}_mask.png"
    (folder / image).parent.mkdir(parents=True, exist_ok=True)
    grey = bool((anomaly.image == anomaly.image[..., :1]).all())
    Image.fromarray(anomaly.image[..., 0] if grey else anomaly.image).save(folder / image)
    Image.fromarray(anomaly.mask.astype(np.uint8) * 255).save(folder / mask)
    return replace(normal, id=image, image=image, condition=METHODS[method].condition, mask=mask, synthetic=method)


def bring(inspection: Inspection, root: Path, folder: Path) -> dict[str, Any]:
    """The row of a photograph of the source, which comes into `folder` with its mask and its reference.

    Several masks, and polygons, become one mask: a list has one column for it.
    """
    one = inspection
    if one.masks or one.polygons:
        mask = f"{FOLDER}/{one.image}/mask.png"
        marks = load_mask(one, root, image_size(root / one.image))
        (folder / mask).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(marks, np.uint8) * 255).save(folder / mask)
        one = replace(one, mask=mask, masks=(), polygons=(), boxes=())
    for name in (one.image, one.mask, one.reference):
        # What is there has come with another photograph, was drawn above, or by the source itself.
        if name is not None and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link((root / name).resolve(), folder / name)
            except OSError:  # another disk, or one without links
                shutil.copy2(root / name, folder / name)
    return row(one)


def row(inspection: Inspection) -> dict[str, Any]:
    """An inspection as the source `manifest` reads it, without the columns that it leaves empty."""
    columns = {name: getattr(inspection, name) for name in COLUMNS}
    return {name: value for name, value in columns.items() if value}


def describe(known: Knowledge, synthetic: Sequence[Inspection]) -> dict[str, dict[str, dict[str, str]]]:
    """What is known, with a description of each product's synthetic conditions; what is written already stands."""

    def copied(products: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
        return {product: dict(entries) for product, entries in products.items()}

    knowledge = {dataset: copied(products) for dataset, products in known.items()}
    for one in synthetic:
        products = knowledge.setdefault(one.dataset, copied(products_of(known, one.dataset)))
        products.setdefault(one.product, {}).setdefault(one.condition, METHODS[str(one.synthetic)].description)
    return knowledge


if __name__ == "__main__":
    run_main(main)
