"""A built dataset folder, and the cases in it."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_ft.data.splits import readable, withheld
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl
from echo_ft.images.decode import READERS
from echo_ft.provenance import content_hash, fingerprint_bytes
from echo_ft.records import SYNTHETIC_DESCRIPTIONS, Case, Entry, Inspection, Knowledge, Question, Reference, Seen, Truth

DATASET_FORMAT = "echo-ft dataset 1"
"""`format` in manifest.json; another one means that the folder was built by another version."""

DIGESTS = "digests.json"
"""{path: SHA-256} of every photograph, mask and named reference, as they were when the dataset was built."""


REFERENCES = ("retrieved", "random", "none")


@dataclass(frozen=True)
class Dataset:
    """A dataset folder as `python -m data_prep.build` writes it. Images are relative to `root`."""

    folder: Path
    root: Path
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """What tells this dataset's records from another's: 16 hex digits over its records and images."""
        return str(self.manifest["fingerprint"])


def load_dataset(folder: Path) -> Dataset:
    """The dataset in `folder`.

    Raises EchoError where there is none, where another version built it, and where its images have moved away.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        what = (
            f"{folder} is not a dataset (it has no manifest.json)"
            if folder.is_dir()
            else f"there is no dataset {folder}"
        )
        raise EchoError(f"{what}; build it with python -m data_prep.build --config FILE")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EchoError(f"{path} is not JSON ({error}); build the dataset again") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != DATASET_FORMAT:
        raise EchoError(
            f"{path} has the format {found!r}, not {DATASET_FORMAT!r}; build the dataset again with this version"
        )
    root = (folder / manifest["root"]).resolve()
    if not root.is_dir():
        raise EchoError(f"the images of {folder} are no longer in {root}; put them back or build the dataset again")
    return Dataset(folder, root, manifest)


def images_fingerprint(digests: Mapping[str, str]) -> str:
    """One fingerprint of all images, from their SHA-256 by path."""
    return fingerprint_bytes(*(f"{path}\0{digests[path]}".encode() for path in sorted(digests)))


def require_unchanged(dataset: Dataset, images: Iterable[str]) -> None:
    """Raise EchoError where an image is not, byte for byte, the one that the dataset was built from.

    An image that is missing is left to whoever reads it. A dataset that has no digests, as an older version built it,
    cannot tell.
    """
    path = dataset.folder / DIGESTS
    if not path.is_file():
        return
    try:
        digests = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EchoError(f"{path} is not JSON ({error}); build the dataset again") from error
    if images_fingerprint(digests) != dataset.manifest["images_fingerprint"]:
        raise EchoError(f"{path} is not the one of this dataset's manifest.json; build the dataset again")
    asked = list(dict.fromkeys(images))

    def changed(image: str) -> bool:
        try:
            return content_hash(dataset.root / image).hex() != digests.get(image)
        except FileNotFoundError:
            return False

    with ThreadPoolExecutor(READERS) as pool:
        found = [image for image, differs in zip(asked, pool.map(changed, asked), strict=True) if differs]
    if found:
        raise EchoError(
            f"{len(found)} of {len(asked)} images that are used are not those that {dataset.folder} was built from "
            f"(such as {found[0]}); put the files back, or build the dataset again"
        )


def load_cases(dataset: Dataset, split: str, reference: str = "retrieved", most: int | None = None) -> list[Case]:
    """The cases of one split, in the dataset's order: the photographs that have questions.

    `reference` chooses the normals beside each: `retrieved` (where the source names a reference, that one alone),
    `random` (the control) or `none`; of several, the `most` best ranked. They come in the order of `candidate_order`,
    each with its rank. Raises EchoError for another word.
    """
    folder = dataset.folder
    inspections = list(read_jsonl(folder / "inspections.jsonl", Inspection))
    references = list(read_jsonl(folder / "references.jsonl", Reference))
    questions = list(read_jsonl(folder / "questions.jsonl", Question))
    knowledge = json.loads((folder / "knowledge.json").read_text(encoding="utf-8"))
    if split != "test" and dataset.manifest["config"].get("split") == "by_condition":
        knowledge = less_held_out(knowledge, dataset.manifest["held_out"])
    if split == "test":
        knowledge = less_synthetic(knowledge, inspections)
    chosen = [inspection for inspection in inspections if inspection.split == split]
    return make_cases(chosen, references, questions, knowledge, reference, most)


def less_held_out(knowledge: Knowledge, held_out: Sequence[str]) -> Knowledge:
    """The knowledge without the entries of conditions that are held out for the test.

    In training they would be options and entries that are never right, and the tuned model would avoid them in a test.
    """
    left: dict[str, dict[str, dict[str, str]]] = {}
    for dataset, products in knowledge.items():
        for product, entries in products.items():
            away = withheld(entries, held_out)
            seen = {condition: text for condition, text in entries.items() if condition not in away}
            left.setdefault(dataset, {})[product] = seen
    return left


def less_synthetic(knowledge: Knowledge, inspections: Sequence[Inspection]) -> Knowledge:
    """The knowledge without the entries that there are because of synthetic defects.

    They are of conditions that these alone show, and say no more than the method's own words or the condition's name:
    what a person wrote of a defect that was not photographed stands. So a test is the same with and without synthetic
    defects in the training.
    """
    generic = set(SYNTHETIC_DESCRIPTIONS.values())
    seen = {(i.dataset, i.product, i.condition) for i in inspections if i.synthetic is None}
    made = {(i.dataset, i.product, i.condition) for i in inspections} - seen
    return {
        dataset: {
            product: {
                name: text
                for name, text in entries.items()
                if (dataset, product, name) not in made or text not in {*generic, readable(name)}
            }
            for product, entries in products.items()
        }
        for dataset, products in knowledge.items()
    }


def make_cases(
    inspections: list[Inspection],
    references: list[Reference],
    questions: list[Question],
    knowledge: Knowledge,
    reference: str = "retrieved",
    most: int | None = None,
) -> list[Case]:
    """Cases from records; an inspection without a question is not a case. See `cases`."""
    if reference not in REFERENCES:
        raise EchoError(f"reference cannot be {reference!r}; choose from {', '.join(REFERENCES)}")
    found: dict[tuple[str, str], list[Reference]] = defaultdict(list)
    for row in references:
        found[row.inspection, row.method].append(row)
    asked: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        asked[question.inspection].append(question)
    made = []
    for inspection in inspections:
        own = asked.get(inspection.id)
        if not own:
            continue
        beside = found.get((inspection.id, reference), [])
        if reference == "retrieved":
            beside = found.get((inspection.id, "given"), beside)
        best = sorted(beside, key=lambda one: one.rank)[:most]
        candidates = candidate_order(inspection.id, best)
        entries = knowledge.get(inspection.dataset, {}).get(inspection.product, {})
        seen = Seen(
            query=inspection.image,
            references=candidates,
            knowledge=tuple(Entry(condition, description) for condition, description in entries.items()),
            questions=tuple(Question(one.id, one.inspection, one.kind, one.text, one.options) for one in own),
        )
        answers = {question.id: question.answer for question in own if question.answer is not None}
        truth = Truth(
            inspection.condition,
            inspection.mask,
            inspection.boxes,
            answers,
            masks=inspection.masks,
            polygons=inspection.polygons,
        )
        made.append(Case(inspection.id, inspection.dataset, inspection.product, inspection.group, seen, truth))
    return made


def candidate_order(case_id: str, references: Sequence[Reference]) -> tuple[Reference, ...]:
    """References as candidates of a case: an order that the case's id alone decides, so that 1 is not always best."""
    ordered = sorted(references, key=lambda reference: (reference.method, reference.rank, reference.image))
    random.Random(f"candidates/{case_id}").shuffle(ordered)
    return tuple(ordered)
