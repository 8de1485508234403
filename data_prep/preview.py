"""preview.html: a look at a dataset on one page that needs nothing else, not even a network."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from data_prep.manifest import rejected_words
from data_prep.prepare import DatasetDraft
from echo_ft.data.dataset import make_cases
from echo_ft.data.splits import LEFT_OUT, REFERENCE, SPLITS, stratum_of
from echo_ft.files import from_dict, to_json
from echo_ft.html import jpeg_uri, render_page
from echo_ft.images import masks
from echo_ft.images.decode import image_size, load_image
from echo_ft.records import GOOD, ROLES, Case, Exchange, Inspection, Question, Reference

_R = TypeVar("_R")

MAX_CARDS = 48
"""Cases on the page, where this is enough to show every condition of every product."""

LIMIT = 400
"""Cases on the page at most: it should open in any browser."""

CARD_SIDE, ASIDE = 224, 144
"""Longer side of its images, in pixels: of the photograph and its first reference, and of further references."""

OWNER = re.compile(r'"(?:case|inspection)": ("[^"\\]*(?:\\.[^"\\]*)*")')
"""Whose row a line of JSON is. Of 200,000 rows few are on the page, and parsing all would take most of its time."""


@dataclass(frozen=True)
class Picture:
    """An image as it is shown: a data URI, its size, and the outlines of what is marked, as an SVG path."""

    uri: str
    width: int
    height: int
    outlines: str = ""


@dataclass(frozen=True)
class Card:
    """One case on the page."""

    case: Case
    inspection: Inspection
    query: Picture
    references: tuple[tuple[int, Picture, Reference], ...]
    """Number as a candidate, image and record of each, the best ranked first."""
    targets: Mapping[str, Sequence[Exchange]]
    """Role to its training rows."""

    def names(self) -> dict[str, str]:
        """What the page calls each image."""
        named = {row.image: f"candidate {number}" for number, _, row in self.references}
        return {**named, self.case.seen.query: "under inspection"}

    def filters(self) -> dict[str, str]:
        """What the page's filters compare, by their names; of `role` all that it has rows for."""
        return {
            "dataset": self.inspection.dataset,
            "product": self.inspection.product,
            "condition": self.inspection.condition,
            "split": str(self.inspection.split),
            "role": " ".join(role for role in ROLES if self.targets.get(role)),
            "synthetic": self.inspection.synthetic or "no",
        }


@dataclass(frozen=True)
class Chart:
    """Bars of counts: a row has a name and a count for each column."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, Sequence[int]]]
    filter: str = ""
    """The filter that takes the rows' names, if any."""

    @property
    def most(self) -> int:
        """What the longest bar stands for."""
        return max((sum(counts) for _, counts in self.rows), default=0) or 1


def write_preview(folder: Path, root: Path, manifest: Mapping[str, Any], material: DatasetDraft) -> None:
    """Write `preview.html` into a dataset folder: counts, warnings, and some cases of every product and condition."""
    inspections = [inspection for inspection in material.inspections if inspection.id in material.questions.inspections]
    chosen = choose(inspections, MAX_CARDS, LIMIT)
    cards = _cards(chosen, folder, root)
    page = render_page(
        Path(__file__).parent / "preview.html.jinja",
        name=folder.name,
        manifest=manifest,
        settings=json.dumps(manifest["config"], indent=2, ensure_ascii=False),
        charts=_charts(manifest["counts"]),
        filters=_filters(cards),
        apart=manifest["counts"]["photographs"].get(REFERENCE, 0),
        good=GOOD,
        rejected=rejected_words(manifest),
        is_marked=masks.is_marked,
        roles=ROLES,
        cards=cards,
        total=len(inspections),
        places=len(set(map(stratum_of, inspections))),
        left_out=len(set(map(stratum_of, inspections)) - set(map(stratum_of, chosen))),
    )
    (folder / "preview.html").write_text(page, encoding="utf-8")


def _charts(counts: Mapping[str, Any]) -> list[Chart]:
    """The dataset in four charts."""
    charts = []
    for title, key, name in (("Cases by condition", "cases", "condition"), ("Cases by product", "products", "product")):
        labels = {label for found in counts[key].values() for label in found}
        rows = [(label, [found.get(label, 0) for found in counts[key].values()]) for label in labels]
        rows.sort(key=lambda row: (row[0] != GOOD, -sum(row[1]), row[0]))
        charts.append(Chart(title, tuple(counts[key]), rows, name))
    charts.append(Chart("Questions by kind", ("questions",), [(kind, [n]) for kind, n in counts["questions"].items()]))
    rows = []
    for role in ROLES:
        train = counts["sft_sides"][f"{role}/train"]
        validation = counts["sft_rows"][f"{role}/validation"]
        rows.append((role, [train["normal"]["rows"], train["defective"]["rows"], validation]))
    charts.append(Chart("Training rows by role", ("normal", "defective", "validation"), rows, "role"))
    return charts


def _filters(cards: Sequence[Card]) -> dict[str, list[str]]:
    """The values of each filter: `good` first, splits and roles in their own order, the others by name."""
    found: dict[str, set[str]] = defaultdict(set)
    for card in cards:
        for name, value in card.filters().items():
            found[name] |= set(value.split()) if name == "role" else {value}
    first = {value: place for place, value in enumerate((GOOD, *SPLITS, LEFT_OUT, *ROLES))}
    filters = {name: sorted(them, key=lambda v: (first.get(v, len(first)), v)) for name, them in found.items()}
    return {name: them for name, them in filters.items() if len(them) > 1 or name not in ("dataset", "synthetic")}


def _rows(path: Path, cls: type[_R], owners: Collection[str]) -> Iterator[_R]:
    """The rows of a file that belong to these cases."""
    written = {to_json(owner) for owner in owners}
    with open(path, encoding="utf-8") as file:
        for line in file:
            owner = OWNER.search(line)
            if owner and owner.group(1) in written:
                yield from_dict(cls, json.loads(line))


def _cards(chosen: Sequence[Inspection], folder: Path, root: Path) -> list[Card]:
    ids = {inspection.id for inspection in chosen}
    targets: dict[str, dict[str, list[Exchange]]] = defaultdict(lambda: defaultdict(list))
    for role in ROLES:
        for split in ("train", "validation"):
            for row in _rows(folder / "sft" / role / f"{split}.jsonl", Exchange, ids):
                if row not in targets[row.case][role]:  # balancing repeats cases
                    targets[row.case][role].append(row)
    references = list(_rows(folder / "references.jsonl", Reference, ids))
    questions = list(_rows(folder / "questions.jsonl", Question, ids))
    cards = []
    for inspection, case in zip(chosen, make_cases(list(chosen), references, questions, {}), strict=True):
        ranked = sorted(enumerate(case.seen.references, start=1), key=lambda item: item[1].rank)
        beside = [
            (number, _picture(_small(root / row.image, CARD_SIDE if place == 0 else ASIDE)), row)
            for place, (number, row) in enumerate(ranked)
        ]
        cards.append(Card(case, inspection, _outlined(case, root), tuple(beside), targets[case.id]))
    return cards


def choose(inspections: Sequence[Inspection], most: int, limit: int) -> list[Inspection]:
    """A sample by split, product and condition: one of every condition of every product, then of each split, and so on.

    Up to `most`, or as many as it takes to have one of every condition of every product, but never above `limit`. All
    of a split, product and condition stand together, the training split first.
    """
    order = {split: index for index, split in enumerate((*SPLITS, LEFT_OUT))}
    strata: dict[tuple[Any, ...], list[Inspection]] = defaultdict(list)
    for inspection in inspections:
        strata[(order[str(inspection.split)], *stratum_of(inspection))].append(inspection)
    ranked: list[tuple[int, int, Inspection]] = []
    seen: set[tuple[Any, ...]] = set()
    for number, (key, members) in enumerate(sorted(strata.items())):
        # Neighbours in a source often show the same part.
        some = random.Random(0).sample(members, min(len(members), most))
        first = 0 if key[1:] not in seen else 1
        seen.add(key[1:])
        ranked += [(first if depth == 0 else depth + 1, number, one) for depth, one in enumerate(some)]
    ranked.sort(key=lambda item: item[:2])
    chosen = ranked[: min(max(most, len(seen)), limit)]
    return [inspection for _, _, inspection in sorted(chosen, key=lambda item: (item[1], item[0]))]


def _outlined(case: Case, root: Path) -> Picture:
    """The photograph, with the outlines of its defect."""

    path = root / case.seen.query
    image = _small(path)
    mask = masks.load_mask(case.truth, root, image_size(path))
    if mask is None or not mask.any():
        return _picture(image)
    if mask.shape[0] < image.height:
        return _picture(image, outlines(np.asarray(Image.fromarray(mask).resize(image.size))))
    return _picture(image, outlines(masks.resize_mask(mask, image.size)))


def outlines(mask: masks.Mask) -> str:
    """The borders of a mask (height, width) as an SVG path in its pixels, one closed line around each part or hole."""
    from skimage.measure import approximate_polygon, find_contours

    lines = []
    for contour in find_contours(np.pad(mask, 1).astype(float), 0.5):  # padded: a line around what touches the border
        # Contours go through the centres of pixels, whose corners are the path's whole numbers.
        points = approximate_polygon(contour, 0.4)[:-1] - 0.5
        lines.append("M" + "L".join(f"{x:.1f} {y:.1f}" for y, x in points) + "Z")
    return "".join(lines)


def _small(path: Path, side: int = CARD_SIDE) -> Image.Image:
    image = load_image(path, least=(2 * side, 2 * side))
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _picture(image: Image.Image, outlined: str = "") -> Picture:
    return Picture(jpeg_uri(image), *image.size, outlined)
