"""Load a built dataset folder and make cases from its records."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_ft.data.splits import UNLABELLED_SPLIT, held_out_conditions, readable_name
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl, write_json
from echo_ft.images.decode import READER_THREADS
from echo_ft.inputs import check_fields, read_json_object, restore
from echo_ft.provenance import content_hash, digests_of, fingerprint_bytes, first_change
from echo_ft.records import (
    GROUNDING,
    SYNTHETIC_DESCRIPTIONS,
    Case,
    Entry,
    Inspection,
    Knowledge,
    Question,
    Reference,
    Seen,
    Truth,
)

DATASET_FORMAT = "echo-ft dataset 1"
"""Value of `format` in manifest.json. Any other value means that another version built the folder."""

MANIFEST, DIGESTS = "manifest.json", "digests.json"
"""The manifest, with the SHA-256 of all records, and {path: SHA-256} of every image, mask and named reference."""

KNOWLEDGE = "knowledge.json"

MANIFEST_FIELDS = {
    **dict.fromkeys(("annotations_fingerprint", "images_fingerprint", "prompt_version", "source"), str | None),
    "audits": dict[str, dict[str, Any]],
    "counts": dict[str, Any],
    "held_out": tuple[str, ...],
}
COUNT_FIELDS = {"photographs": dict[str, int], "synthetic": dict[str, Any]}
CONFIG_FIELDS = {"k": int, **dict.fromkeys(("routing", "split", "scope", "descriptor", "index"), str)}
"""The types of the fields of manifest.json, and of its `counts` and `config`, that other commands read."""

REFERENCE_METHODS = ("retrieved", "random", "none")


@dataclass(frozen=True)
class Dataset:
    """A dataset folder as `python -m data_prep.build` writes it. Image paths are relative to `root`."""

    folder: Path
    root: Path
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Identifier of the dataset's content: 16 hex digits over its records and images."""
        return str(self.manifest["fingerprint"])


def load_dataset(folder: Path) -> Dataset:
    """Load the dataset in `folder`.

    Raises EchoError if there is no dataset or another version built it, or if images have moved or records have changed
    since then. The images themselves are not read (`require_unchanged`), and the records of datasets that older
    versions built have no checksums.
    """
    path = folder / MANIFEST
    if not path.is_file():
        problem = (
            f"{folder} is not a dataset (it has no manifest.json)"
            if folder.is_dir()
            else f"there is no dataset {folder}"
        )
        raise EchoError(f"{problem}; build it with python -m data_prep.build --config FILE")
    try:
        manifest = read_json_object(path)
    except (OSError, ValueError) as error:
        raise EchoError(f"{path} is not JSON ({error}); rebuild the dataset") from error
    found = manifest.get("format")
    if found != DATASET_FORMAT:
        raise EchoError(
            f"{path} has the format {found!r}, not {DATASET_FORMAT!r}; rebuild the dataset with this version"
        )
    for key, kind in (("root", str), ("fingerprint", str), ("config", dict)):
        if not isinstance(manifest.get(key), kind) or manifest[key] == "" or "\0" in manifest[key]:
            raise EchoError(f"{path} has no usable {key} ({manifest.get(key)!r}); rebuild the dataset")
    try:
        check_fields(manifest, MANIFEST_FIELDS)
        check_fields(manifest.get("counts", {}), COUNT_FIELDS)
        check_fields(manifest["config"], CONFIG_FIELDS)
    except TypeError as error:
        raise EchoError(f"{path} has been changed by hand ({error}); rebuild the dataset") from error
    root = (folder / manifest["root"]).resolve()
    if not root.is_dir():
        raise EchoError(f"the images of {folder} are no longer in {root}; put them back or rebuild the dataset")
    _require_unchanged_records(folder, manifest)
    return Dataset(folder, root, manifest)


def require_not_rebuilt(dataset: Dataset, fingerprint: str) -> None:
    """Raise EchoError if a dataset no longer has the fingerprint that it had during training."""
    if dataset.fingerprint != fingerprint:
        raise EchoError(
            f"{dataset.folder} was rebuilt since the training (fingerprint {dataset.fingerprint}, not {fingerprint}); "
            "pass the folder as --dataset to use it anyway"
        )


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of the dataset in `folder`, and include a checksum of the manifest itself."""
    write_json(folder / MANIFEST, {**manifest, "manifest_fingerprint": _manifest_fingerprint(manifest)})


def _manifest_fingerprint(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "manifest_fingerprint"}
    return fingerprint_bytes(json.dumps(content, sort_keys=True).encode())


def record_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of records, training rows, knowledge and digests in `folder`, keyed by name."""
    records = [path for path in folder.rglob("*.jsonl") if path.name != "rejected.jsonl"]
    names = sorted(path.relative_to(folder).as_posix() for path in records)
    return digests_of(folder, [*names, KNOWLEDGE, DIGESTS])


def _require_unchanged_records(folder: Path, manifest: Mapping[str, Any]) -> None:
    path = folder / MANIFEST
    if manifest.get("manifest_fingerprint", _manifest_fingerprint(manifest)) != _manifest_fingerprint(manifest):
        raise EchoError(f"{path} has changed since the dataset was built; restore it or rebuild the dataset")
    try:
        digests = restore(dict[str, str], manifest.get("files", {}))
    except TypeError as error:
        raise EchoError(f"{path} has no usable files ({error}); rebuild the dataset") from error
    fault = first_change(folder, digests)
    if fault:
        raise EchoError(f"{fault} since the dataset was built; restore it or rebuild the dataset")


def images_fingerprint(digests: Mapping[str, str]) -> str:
    """Return one fingerprint for all images, given the SHA-256 of each path."""
    return fingerprint_bytes(*(f"{path}\0{digests[path]}".encode() for path in sorted(digests)))


def require_unchanged(dataset: Dataset, images: Iterable[str]) -> None:
    """Raise EchoError if an image differs in any byte from the one that the dataset was built from.

    Missing images are ignored here, because reading them reports the problem. Datasets without digests, built by an
    older version, are not checked. Also raises the errors of `read_digests`.
    """
    digests = read_digests(dataset)
    if digests is None:
        return
    unique = list(dict.fromkeys(images))
    with ThreadPoolExecutor(READER_THREADS) as pool:
        differs = pool.map(lambda image: is_changed(dataset.root, image, digests), unique)
        found = [image for image, differing in zip(unique, differs, strict=True) if differing]
    if found:
        raise EchoError(
            f"{len(found)} of {len(unique)} images have changed since {dataset.folder} was built (first: {found[0]}); "
            "restore the files or rebuild the dataset"
        )


def read_digests(dataset: Dataset) -> dict[str, str] | None:
    """Read the SHA-256 of each image of a dataset, keyed by path. Returns None if an older version built the dataset.

    Raises EchoError if the file is missing or broken, or belongs to another dataset.
    """
    path, expected = dataset.folder / DIGESTS, dataset.manifest.get("images_fingerprint")
    if expected is None:
        return None
    try:
        digests: dict[str, str] = restore(dict[str, str], read_json_object(path))
    except FileNotFoundError as error:
        raise EchoError(f"{path} is missing, so changed images would not be noticed; rebuild the dataset") from error
    except (OSError, ValueError, TypeError) as error:
        raise EchoError(f"{path} does not contain digests as JSON ({error}); rebuild the dataset") from error
    if images_fingerprint(digests) != expected:
        raise EchoError(f"{path} does not match this dataset's manifest.json; rebuild the dataset")
    return digests


def is_changed(root: Path, image: str, digests: Mapping[str, str]) -> bool:
    """Return whether an image no longer matches its SHA-256 in `digests`. A missing image counts as unchanged."""
    try:
        return content_hash(root / image).hex() != digests.get(image)
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True


def load_cases(
    dataset: Dataset, split: str, reference: str = "retrieved", max_references: int | None = None
) -> list[Case]:
    """Load the cases of one split, in dataset order: the images that have questions.

    `reference` selects the normal images that a case shows: `retrieved`, `random` (the control) or `none`. If the
    source names a reference, `retrieved` shows only that one. At most `max_references` are kept, best-ranked first.
    Each keeps its rank, but `candidate_order` shuffles them. Raises EchoError for any other `reference`.
    """
    folder = dataset.folder
    inspections = list(read_jsonl(folder / "inspections.jsonl", Inspection))
    references = list(read_jsonl(folder / "references.jsonl", Reference))
    questions = list(read_jsonl(folder / "questions.jsonl", Question))
    unlabelled = {inspection.id for inspection in inspections if inspection.split == UNLABELLED_SPLIT}
    _check_questions(folder / "questions.jsonl", questions, unlabelled)
    knowledge = stored_knowledge(folder)
    untrained = split in ("test", UNLABELLED_SPLIT)
    if not untrained and dataset.manifest["config"].get("split") == "by_condition":
        knowledge = without_held_out(knowledge, dataset.manifest["held_out"])
    if untrained:
        knowledge = without_synthetic(knowledge, inspections)
    chosen = [inspection for inspection in inspections if inspection.split == split]
    return make_cases(chosen, references, questions, knowledge, reference, max_references)


def _check_questions(path: Path, questions: Sequence[Question], unlabelled: Collection[str]) -> None:
    """Raise EchoError for a question with fewer than two options, an answer outside them, or a duplicate id.

    Only questions about the inspections in `unlabelled` may have no answer.
    """
    seen = set()
    for number, one in enumerate(questions, start=1):
        fault = None
        if one.id in seen:
            fault = f"the id {one.id!r} occurs twice"
        elif one.kind != GROUNDING and len(one.options) < 2:
            fault = "it has fewer than two options"
        elif (
            one.kind != GROUNDING and one.answer not in one.options and (one.answer or one.inspection not in unlabelled)
        ):
            fault = f"the answer {one.answer!r} is not one of its options"
        if fault:
            raise EchoError(f"{path}:{number} is not a valid question ({fault}); rebuild the dataset")
        seen.add(one.id)


def stored_knowledge(folder: Path) -> Knowledge:
    """Read the knowledge of the dataset in `folder`. Raises EchoError if it is missing or broken."""
    path = folder / KNOWLEDGE
    try:
        knowledge: Knowledge = restore(Knowledge, read_json_object(path))
    except (OSError, ValueError, TypeError) as error:
        raise EchoError(f"{path} cannot be read ({error}); rebuild the dataset") from error
    return knowledge


def without_held_out(knowledge: Knowledge, held_out: Sequence[str]) -> Knowledge:
    """Return the knowledge without the entries of conditions that are held out for the test.

    In training, these conditions would only ever appear as wrong options and entries. The model would learn to avoid
    them in the test.
    """
    left: dict[str, dict[str, dict[str, str]]] = {}
    for dataset, products in knowledge.items():
        for product, entries in products.items():
            away = held_out_conditions(entries, held_out)
            kept = {condition: text for condition, text in entries.items() if condition not in away}
            left.setdefault(dataset, {})[product] = kept
    return left


def without_synthetic(knowledge: Knowledge, inspections: Sequence[Inspection]) -> Knowledge:
    """Return the knowledge without the entries that exist only because of synthetic defects.

    Only synthetic images show these conditions, and their text is the method's default description or just the name. A
    description written by a person stays, even if no real image shows the defect. The test is therefore the same with
    and without synthetic defects in training.
    """
    generic = set(SYNTHETIC_DESCRIPTIONS.values())
    real = {(i.dataset, i.product, i.condition) for i in inspections if i.synthetic is None}
    only_synthetic = {(i.dataset, i.product, i.condition) for i in inspections} - real
    return {
        dataset: {
            product: {
                name: text
                for name, text in entries.items()
                if (dataset, product, name) not in only_synthetic or text not in {*generic, readable_name(name)}
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
    max_references: int | None = None,
) -> list[Case]:
    """Make cases from records, as `load_cases` describes. An inspection without questions is not a case."""
    if reference not in REFERENCE_METHODS:
        raise EchoError(f"reference cannot be {reference!r}; choose from {', '.join(REFERENCE_METHODS)}")
    references_by: dict[tuple[str, str], list[Reference]] = defaultdict(list)
    for row in references:
        references_by[row.inspection, row.method].append(row)
    questions_by: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        questions_by[question.inspection].append(question)
    cases = []
    for inspection in inspections:
        own = questions_by.get(inspection.id)
        if not own:
            continue
        available = references_by.get((inspection.id, reference), [])
        if reference == "retrieved":
            available = references_by.get((inspection.id, "given"), available)
        best = sorted(available, key=lambda one: one.rank)[:max_references]
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
        cases.append(Case(inspection.id, inspection.dataset, inspection.product, inspection.group, seen, truth))
    return cases


def candidate_order(case_id: str, references: Sequence[Reference]) -> tuple[Reference, ...]:
    """Shuffle the references of a case, so that the best one is not always first. The order depends only on the id."""
    ordered = sorted(references, key=lambda reference: (reference.method, reference.rank, reference.image))
    random.Random(f"candidates/{case_id}").shuffle(ordered)
    return tuple(ordered)
