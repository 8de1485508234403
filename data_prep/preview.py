"""preview.html: a look at a dataset on one page that needs nothing else, not even a network."""

from __future__ import annotations

import base64
import io
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep.output import rejected_words
from data_prep.prepare import Material
from echo_ft import geometry
from echo_ft.images import image_size, load_image
from echo_ft.records import GOOD, ROLES, Case, Exchange, Reference, from_dict
from echo_ft.splits import REFERENCE, SPLITS

MOST = 48
"""Cases on the page."""

SIDE = 224
"""Longer side of its images, in pixels."""

OUTLINE = (255, 45, 85)


@dataclass(frozen=True)
class Card:
    """One case on the page; images are data URIs."""

    case: Case
    split: str
    group: str
    query: str
    references: tuple[tuple[int, str, Reference], ...]
    """Number as a candidate, image and record of each."""
    targets: Mapping[str, Sequence[Exchange]]
    """Role to its training rows."""


def write_preview(folder: Path, root: Path, manifest: Mapping[str, Any], material: Material) -> None:
    """Write `preview.html` into a dataset folder: counts, warnings, and up to 48 cases of every split and condition."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("preview.html.jinja").render(
        name=folder.name,
        manifest=manifest,
        settings=json.dumps(manifest["config"], indent=2, ensure_ascii=False),
        conditions=_conditions(manifest),
        splits=SPLITS,
        apart=manifest["counts"]["photographs"].get(REFERENCE, 0),
        good=GOOD,
        rejected=rejected_words(manifest),
        is_marked=geometry.is_marked,
        roles=ROLES,
        cards=_cards(folder, root, material),
    )
    (folder / "preview.html").write_text(page, encoding="utf-8")


def _conditions(manifest: Mapping[str, Any]) -> list[str]:
    counts = manifest["counts"]["cases"].values()
    return sorted({name for found in counts for name in found}, key=lambda name: (name != GOOD, name))


def _cards(folder: Path, root: Path, material: Material) -> list[Card]:
    chosen = choose({split: material.cases(split) for split in SPLITS}, MOST)
    ids = {case.id for _, case in chosen}
    groups = {inspection.id: inspection.group for inspection in material.inspections}
    targets: dict[str, dict[str, list[Exchange]]] = defaultdict(lambda: defaultdict(list))
    for role in ROLES:
        for split in ("train", "validation"):
            for row in _rows(folder / "sft" / role / f"{split}.jsonl", ids):
                if row not in targets[row.case][role]:  # balancing repeats cases
                    targets[row.case][role].append(row)
    return [
        Card(
            case,
            split,
            groups[case.id],
            _outlined(case, root),
            tuple(
                (number, _data_uri(_small(root / row.image)), row)
                for number, row in enumerate(case.seen.references, start=1)
            ),
            targets[case.id],
        )
        for split, case in chosen
    ]


def _rows(path: Path, cases: set[str]) -> Iterator[Exchange]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row["case"] in cases:
                yield from_dict(Exchange, row)


def choose(found: Mapping[str, Sequence[Case]], most: int) -> list[tuple[str, Case]]:
    """Up to `most` cases with their split, as many of each split, product and condition as of any other."""
    strata: dict[tuple[str, ...], list[Case]] = defaultdict(list)
    for split, members in found.items():
        for case in members:
            strata[split, case.dataset, case.product, case.truth.condition].append(case)
    for members in strata.values():
        random.Random(0).shuffle(members)  # neighbours in a source often show the same part
    chosen: list[tuple[int, str, Case]] = []
    for depth in range(max(map(len, strata.values()), default=0)):
        for number, (key, members) in enumerate(sorted(strata.items())):
            if depth < len(members) and len(chosen) < most:
                chosen.append((number, key[0], members[depth]))
    order = {split: index for index, split in enumerate(SPLITS)}
    return [(split, case) for _, split, case in sorted(chosen, key=lambda item: (order[item[1]], item[0]))]


def _outlined(case: Case, root: Path) -> str:
    """The photograph with the outline of its defect."""
    import numpy as np
    from skimage.morphology import dilation

    path = root / case.seen.query
    image = _small(path)
    mask = geometry.load_mask(case.truth, root, image_size(path))
    if mask is not None and mask.any():
        grown = Image.fromarray(mask).resize(image.size) if mask.shape[0] < image.height else None
        small = np.asarray(grown) if grown else geometry.resize_mask(mask, image.size)
        edge = dilation(small, np.ones((5, 5))) & ~dilation(small, np.ones((3, 3)))
        pixels = np.array(image)
        pixels[edge] = OUTLINE
        image = Image.fromarray(pixels)
    return _data_uri(image)


def _small(path: Path) -> Image.Image:
    image = load_image(path, least=(2 * SIDE, 2 * SIDE))
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
