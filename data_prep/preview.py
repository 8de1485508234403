"""Write preview.html, a self-contained page that shows a dataset. It needs no network."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from data_prep.manifest import rejection_summary
from data_prep.prepare import TRAINING_SPLITS, DatasetDraft
from echo_ft.data.dataset import make_cases
from echo_ft.data.splits import LEFT_OUT, REFERENCE_SPLIT, SPLITS, UNLABELLED_SPLIT, stratum_of
from echo_ft.files import to_json
from echo_ft.html import jpeg_uri, render_page
from echo_ft.images import masks
from echo_ft.images.boxes import Box, parse_boxes
from echo_ft.images.decode import load_image, size_and_orientation
from echo_ft.inputs import from_dict, open_text
from echo_ft.records import BOX_END, BOX_START, GOOD, GROUNDING, ROLES, Case, Exchange, Inspection, Question, Reference
from echo_ft.strict_yaml import read_json

_R = TypeVar("_R")

TYPICAL_CARDS = 48
"""Number of cases on the page if this is enough to show every condition of every product."""

MAX_CARDS = 400
"""Maximum number of cases on the page, so that it opens in any browser."""

LARGE_SIDE, SMALL_SIDE = 224, 144
"""Longer sides of images on the page, in pixels: for the query and its best reference, and for other references."""

CASE_FIELD = re.compile(r'"(?:case|inspection)": ("[^"\\]*(?:\\.[^"\\]*)*")')
"""Finds the case that a line of JSON belongs to. Parsing all 200,000 rows to show a few would take most of the time."""


@dataclass(frozen=True)
class Picture:
    """An image on the page."""

    uri: str
    """A data URI."""
    width: int
    height: int
    outlines: str = ""
    """Outlines of the marked regions, as an SVG path in pixels."""
    boxes: tuple[Box, ...] = ()
    """The boxes that a question asks for, in thousandths of the width and height."""


@dataclass(frozen=True)
class Card:
    """One case on the page."""

    case: Case
    inspection: Inspection
    query: Picture
    references: tuple[tuple[int, Picture, Reference], ...]
    """Candidate number, image and record of each reference: the best-ranked first, then the rest by number."""
    targets: Mapping[str, Sequence[Exchange]]
    """Maps each role to its training rows."""

    def names(self) -> dict[str, str]:
        """Map the path of each image to its name on the page."""
        named = {row.image: f"candidate {number}" for number, _, row in self.references}
        return {**named, self.case.seen.query: "query"}

    def filters(self) -> dict[str, str]:
        """Return the values that the page's filters compare. `role` lists all roles that the case has rows for."""
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
    """A bar chart of counts, with a bar per row and a segment per column."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, Sequence[int]]]
    """The name of each row and its count per column."""
    filter: str = ""
    """The filter that the names of the rows belong to, if any."""

    @property
    def longest(self) -> int:
        """Return the total of the longest bar, but at least 1."""
        return max((sum(counts) for _, counts in self.rows), default=0) or 1


def write_preview(folder: Path, root: Path, manifest: Mapping[str, Any], draft: DatasetDraft) -> None:
    """Write preview.html into the dataset folder: counts, warnings, and cases of every product and condition."""
    asked = [inspection for inspection in draft.inspections if inspection.id in draft.questions.inspections]
    inspections = [inspection for inspection in asked if inspection.split != UNLABELLED_SPLIT]
    sampled = sample_inspections(inspections, TYPICAL_CARDS, MAX_CARDS)
    cards = _cards(sampled, folder, root)
    strata = set(map(stratum_of, inspections))
    page = render_page(
        Path(__file__).parent / "preview.html.jinja",
        name=folder.name,
        manifest=manifest,
        charts=_charts(manifest["counts"]),
        filters=_filters(cards),
        held_out_references=manifest["counts"]["photographs"].get(REFERENCE_SPLIT, 0),
        good=GOOD,
        rejections=rejection_summary(manifest),
        is_marked=masks.is_marked,
        box_tokens=(BOX_START, BOX_END),
        roles=ROLES,
        cards=cards,
        total=len(inspections),
        strata=len(strata),
        missing_strata=len(strata - set(map(stratum_of, sampled))),
    )
    (folder / "preview.html").write_text(page, encoding="utf-8")


def _charts(counts: Mapping[str, Any]) -> list[Chart]:
    """Return four charts that summarise the dataset."""
    charts = []
    for title, key, name in (("Cases by condition", "cases", "condition"), ("Cases by product", "products", "product")):
        labels = {label for found in counts[key].values() for label in found}
        rows = [(label, [found.get(label, 0) for found in counts[key].values()]) for label in labels]
        rows.sort(key=lambda row: (row[0] != GOOD, -sum(row[1]), row[0]))
        charts.append(Chart(title, tuple(counts[key]), rows, name))
    charts.append(Chart("Questions by type", ("questions",), [(kind, [n]) for kind, n in counts["questions"].items()]))
    rows = []
    for role in ROLES:
        train = counts["sft_sides"][f"{role}/train"]
        validation = counts["sft_rows"][f"{role}/validation"]
        rows.append((role, [train["normal"]["rows"], train["defective"]["rows"], validation]))
    charts.append(Chart("Training rows by role", ("normal", "defective", "validation"), rows, "role"))
    return charts


def _filters(cards: Sequence[Card]) -> dict[str, list[str]]:
    """Return the values of each filter: `good` first, splits and roles in their usual order, the rest by name."""
    found: dict[str, set[str]] = defaultdict(set)
    for card in cards:
        for name, value in card.filters().items():
            found[name] |= set(value.split()) if name == "role" else {value}
    order = {value: position for position, value in enumerate((GOOD, *SPLITS, LEFT_OUT, *ROLES))}
    filters = {
        name: sorted(values, key=lambda value: (order.get(value, len(order)), value)) for name, values in found.items()
    }
    return {name: values for name, values in filters.items() if len(values) > 1 or name not in ("dataset", "synthetic")}


def _rows(path: Path, cls: type[_R], cases: Collection[str]) -> Iterator[_R]:
    """Yield the rows of a file that belong to these cases."""
    encoded = {to_json(case) for case in cases}
    with open_text(path) as file:
        for line in file:
            case = CASE_FIELD.search(line)
            if case and case.group(1) in encoded:
                yield from_dict(cls, read_json(line, unique_keys=False))


def _cards(sampled: Sequence[Inspection], folder: Path, root: Path) -> list[Card]:
    ids = {inspection.id for inspection in sampled}
    targets: dict[str, dict[str, list[Exchange]]] = defaultdict(lambda: defaultdict(list))
    for role in ROLES:
        for split in TRAINING_SPLITS:
            for row in _rows(folder / "sft" / role / f"{split}.jsonl", Exchange, ids):
                if row not in targets[row.case][role]:  # balancing may have repeated the case
                    targets[row.case][role].append(row)
    references = list(_rows(folder / "references.jsonl", Reference, ids))
    questions = list(_rows(folder / "questions.jsonl", Question, ids))
    cards = []
    for inspection, case in zip(sampled, make_cases(list(sampled), references, questions, {}), strict=True):
        candidates = list(enumerate(case.seen.references, start=1))
        best = min((row.rank for _, row in candidates), default=0)
        ranked = sorted(candidates, key=lambda item: (item[1].rank != best, item[0]))
        pictures = [
            (number, _picture(load_scaled(root / row.image, LARGE_SIDE if place == 0 else SMALL_SIDE)), row)
            for place, (number, row) in enumerate(ranked)
        ]
        cards.append(Card(case, inspection, _query_picture(case, root), tuple(pictures), targets[case.id]))
    return cards


def sample_inspections(inspections: Sequence[Inspection], typical: int, limit: int) -> list[Inspection]:
    """Return a sample.

    It covers first every condition of every product, then these conditions in every split, and then repeats.

    It has `typical` inspections, or more if needed to cover every condition of every product, but never more than
    `limit`. Inspections of one split, product and condition are adjacent, and those of the training split come first.
    """
    split_order = {split: index for index, split in enumerate((*SPLITS, LEFT_OUT))}
    strata: dict[tuple[Any, ...], list[Inspection]] = defaultdict(list)
    for inspection in inspections:
        strata[(split_order[str(inspection.split)], *stratum_of(inspection))].append(inspection)
    ranked: list[tuple[int, int, Inspection]] = []
    covered: set[tuple[Any, ...]] = set()
    for number, (key, members) in enumerate(sorted(strata.items())):
        # Adjacent images of a source often show the same part.
        drawn = random.Random(0).sample(members, min(len(members), typical))
        first = 0 if key[1:] not in covered else 1
        covered.add(key[1:])
        ranked += [(first if depth == 0 else depth + 1, number, one) for depth, one in enumerate(drawn)]
    ranked.sort(key=lambda item: item[:2])
    sampled = ranked[: min(max(typical, len(covered)), limit)]
    return [inspection for _, _, inspection in sorted(sampled, key=lambda item: (item[1], item[0]))]


def _query_picture(case: Case, root: Path) -> Picture:
    """Return the query image with the outlines of its defect and the boxes that a question asks for."""
    path = root / case.seen.query
    image = load_scaled(path)
    asked = [case.truth.answers[question.id] for question in case.seen.questions if question.kind == GROUNDING]
    boxes = tuple(box for answer in asked for box in parse_boxes(answer) or ())
    mask = masks.load_mask(case.truth, root, *size_and_orientation(path))
    if mask is None or not mask.any():
        return _picture(image, boxes=boxes)
    return _picture(image, masks.outline_path(masks.resize_mask(mask, image.size)), boxes)


def load_scaled(path: Path, side: int = LARGE_SIDE) -> Image.Image:
    """Load an image, scaled so that its longer side is `side` pixels. Small images are enlarged to keep outlines sharp.

    Raises EchoError if the image is missing or cannot be read.
    """
    image = load_image(path, min_size=(2 * side, 2 * side))
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _picture(image: Image.Image, outline_path: str = "", boxes: tuple[Box, ...] = ()) -> Picture:
    return Picture(jpeg_uri(image), *image.size, outline_path, boxes)
