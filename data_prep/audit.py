"""Check whether training data leaks into evaluation data.

    python -m data_prep.audit TRAIN EVAL [--output DIR] [--shared_products]
    python -m data_prep.audit DATASET

Both are dataset folders from data_prep.build. The audit compares the data that TRAIN trains on (the train and
validation splits and their references) with the test split of EVAL. A single folder is compared with itself.

These are leaks:

- a test image that is identical to a training image;
- a test image that shows the same surface as a training image (re-encoded, resized, cropped, brighter, or the same part
  under another light);
- a test image that was shown as a normal reference in training;
- a part that, according to the records, has images on both sides;
- a product on both sides that should be on only one: in two folders without --shared_products, or in a dataset that is
  split by product or by dataset.

Writes audit.json and audit.html into `output` (default: TRAIN), and the verdict into TRAIN's manifest.json. Training
copies the verdict into the adapter card. The exit status is 0 without a leak, 1 with a leak, and 2 after an error.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.truth import default_group
from echo_ft import config as configs
from echo_ft.data.dataset import Dataset, load_dataset, require_unchanged, write_manifest
from echo_ft.data.knowledge import DATASET_ALIASES
from echo_ft.data.splits import UNLABELLED_SPLIT, part_key
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl, write_json, write_text
from echo_ft.html import jpeg_uri, render_page, thumbnail
from echo_ft.images.decode import load_image
from echo_ft.leakage.matches import MIN_EXCESS, MIN_SIMILARITY, Match, file_digests, find_matches
from echo_ft.leakage.perceptual_hash import MAX_CANDIDATES, NEAREST_HASHES
from echo_ft.provenance import commit, versions
from echo_ft.records import Inspection, Reference

AUDIT_FORMAT = "echo-ft audit 1"
"""`format` in audit.json."""

TRAINING_SPLITS, EVALUATION_SPLITS = ("train", "validation"), ("test",)
"""Splits that training uses, and splits that evaluation uses."""

DISJOINT_PRODUCT_SPLITS = ("by_product", "by_dataset")
"""Values of a build's `split` that promise that each product is on only one side."""

FEW_IMAGES = 20
"""With fewer training images of a product, two of its parts may be mistaken for one."""

MAX_PAIRS = 60
"""Maximum number of pairs on the page."""

PAIR_SIDE = 224
"""Longer side of the images on the page, in pixels."""


@dataclass(frozen=True)
class AuditConfig:
    """Options of `python -m data_prep.audit`."""

    folders: list[Path] = field(
        metadata={
            "help": "Dataset to train on, then the dataset to evaluate on if it is a different one. The flag --folders "
            "may be omitted."
        }
    )
    output: Path | None = field(default=None, metadata={"help": "Folder for the report; by default the first dataset."})
    shared_products: bool = field(
        default=False, metadata={"help": "Allow two folders to have products in common; parts must still differ."}
    )


@dataclass(frozen=True)
class Side:
    """The training side or the evaluation side of an audit."""

    dataset: Dataset
    cases: dict[str, Inspection]
    """Maps the path of each image that is trained on or evaluated to its inspection."""
    references: frozenset[str]
    """Paths of the normal references of these cases."""
    products: dict[str, str]
    """Maps the path of every image in the dataset's records to `dataset/product`."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    leak: bool
    """Whether a count above 0 is a leak."""
    count: int
    words: str
    """The rest of a sentence that starts with the count and says what it means."""
    examples: tuple[str, ...]


def main(argv: list[str]) -> None:
    """Audit, write the report, and print the findings."""
    (config,) = configs.parse([AuditConfig], configs.named_first(argv, "--folders"))
    report = audit(config)
    for finding in report["findings"]:
        print(f"  {finding['name']:<16} {finding['count']:>6}  {finding['words']}")
    print(f"report: {Path(report['output']) / 'audit.html'}")
    print(report["verdict"], file=sys.stderr if report["leak"] else sys.stdout)
    if report["leak"]:
        sys.exit(1)


def audit(config: AuditConfig) -> dict[str, Any]:
    """Compare both sides and write audit.json, audit.html and the verdict in the manifest. Returns the report.

    Raises EchoError if a folder is not a dataset, if a side has no images, or if an image is missing or has changed
    since the build.
    """
    if not 1 <= len(config.folders) <= 2:
        raise EchoError(
            f"{len(config.folders)} folders were given; give the dataset to train on, then the one to evaluate on"
        )
    train, evaluation = load_dataset(config.folders[0]), load_dataset(config.folders[-1])
    training, evaluated = _load_side(train, TRAINING_SPLITS), _load_side(evaluation, EVALUATION_SPLITS)
    train_images = sorted(training.cases.keys() | training.references)
    queries = sorted(evaluated.cases)
    products = [training.products.get(path, "") for path in train_images]
    require_unchanged(train, train_images)
    require_unchanged(evaluation, queries)
    matches = find_matches(
        [train.root / path for path in train_images], products, [evaluation.root / path for path in queries]
    )
    pairs = [
        _describe_pair(match, train_images[match.train_index], queries[match.query_index], training, evaluated)
        for match in matches
    ]
    findings = [
        *_findings_by_pixels(pairs, training, evaluated),
        *_findings_by_records(training, evaluated, _products_must_differ(config, train)),
    ]
    unlabelled = evaluation.manifest.get("counts", {}).get("photographs", {}).get(UNLABELLED_SPLIT, 0)
    if unlabelled:
        findings.append(Finding("unlabelled", False, unlabelled, "images without a condition were skipped", ()))
    leaks = [finding for finding in findings if finding.leak and finding.count]
    output = config.output or train.folder
    report = {
        "format": AUDIT_FORMAT,
        "verdict": _verdict(findings, train, evaluation),
        "leak": bool(leaks),
        "output": str(output),
        "train": _describe_side(training, TRAINING_SPLITS),
        "evaluation": _describe_side(evaluated, EVALUATION_SPLITS),
        "findings": [vars(finding) for finding in findings],
        "pairs": pairs,
        "thresholds": {"similarity": MIN_SIMILARITY, "excess": MIN_EXCESS},
        "versions": versions(),
        "commit": commit(),
    }
    _write_report(report, training, evaluated, output)
    return report


def _load_side(dataset: Dataset, splits: Sequence[str]) -> Side:
    inspections = list(read_jsonl(dataset.folder / "inspections.jsonl", Inspection))
    cases = {inspection.image: inspection for inspection in inspections if inspection.split in splits}
    if not cases:
        raise EchoError(f"{dataset.folder} has no image in the split {' or '.join(splits)}; choose another dataset")
    ids = {inspection.id for inspection in cases.values()}
    references = read_jsonl(dataset.folder / "references.jsonl", Reference)
    products = {inspection.image: f"{inspection.dataset}/{inspection.product}" for inspection in inspections}
    return Side(dataset, cases, frozenset(one.image for one in references if one.inspection in ids), products)


def _products_must_differ(config: AuditConfig, train: Dataset) -> bool:
    """Return whether a product on both sides is a leak."""
    if len(config.folders) == 2:
        return not config.shared_products
    return train.manifest["config"].get("split") in DISJOINT_PRODUCT_SPLITS


def _describe_pair(match: Match, train_image: str, query: str, training: Side, evaluated: Side) -> dict[str, Any]:
    case, inspection = training.cases.get(train_image), evaluated.cases[query]
    uses = {"case": case is not None, "reference": train_image in training.references}
    return {
        "kind": "copy" if match.copy else "near-duplicate",
        "trained": train_image,
        "as": [use for use, applies in uses.items() if applies],
        "asked": query,
        "similarity": match.similarity,
        "product": inspection.product,
        "condition": inspection.condition,
        "same_part_by_records": case is not None and part_key(case) == part_key(inspection),
    }


def _findings_by_pixels(pairs: Sequence[Mapping[str, Any]], training: Side, evaluated: Side) -> list[Finding]:
    total, trained = len(evaluated.cases), _images_per_product(training)

    def finding(name: str, predicate: str, found: Sequence[Mapping[str, Any]], leak: bool = True) -> Finding:
        images = tuple(dict.fromkeys(pair["asked"] for pair in found))
        return Finding(name, leak, len(images), f"of {total} test images {predicate}", images)

    copies = [pair for pair in pairs if pair["kind"] == "copy"]
    near = [pair for pair in pairs if pair["kind"] != "copy"]
    references = [pair for pair in pairs if "reference" in pair["as"]]
    doubtful = [pair for pair in near if trained[training.products.get(pair["trained"], "")] < FEW_IMAGES]
    return [
        finding("copies", "are identical to a training image", copies),
        finding("near-duplicates", "show the same surface as a training image", near),
        finding("references", "were shown as a normal reference in training", references),
        finding("few images", f"match in a product with fewer than {FEW_IMAGES} training images", doubtful, leak=False),
    ]


def _images_per_product(side: Side) -> Counter[str]:
    return Counter(side.products.get(path, "") for path in {*side.cases, *side.references})


def _findings_by_records(training: Side, evaluated: Side, products_must_differ: bool) -> list[Finding]:
    separate_roots = training.dataset.root != evaluated.dataset.root
    groups = _groups(training, separate_roots) & _groups(evaluated, separate_roots)
    products = _products(training) & _products(evaluated)
    test_references = _contents(evaluated, sorted(evaluated.references))
    trained_references = set[bytes]()
    if test_references:
        trained_references = test_references.keys() & _contents(training, sorted(training.cases)).keys()
    names = {name for _, name in _products(training)} & {name for _, name in _products(evaluated)}
    namesakes = names - {name for _, name in products}
    crowded = [name for name, count in _images_per_product(training).items() if count > NEAREST_HASHES]
    allowed = "" if products_must_differ else ", as this split allows"
    return [
        Finding("groups", True, len(groups), "groups have images on both sides", _joined(groups)),
        Finding(
            "products", products_must_differ, len(products), f"products are on both sides{allowed}", _joined(products)
        ),
        Finding(
            "same names",
            False,
            len(namesakes),
            "products share their name with a product of another dataset on the other side; "
            "if they are the same product, that is a leak",
            tuple(sorted(namesakes)),
        ),
        Finding(
            "crowded",
            False,
            len(crowded),
            f"products have more than {NEAREST_HASHES} training images; some crops among so many may be missed",
            tuple(sorted(crowded)),
        ),
        Finding(
            "test references",
            False,
            len(trained_references),
            "references of test images are trained on, which reveals nothing about the test images themselves",
            tuple(sorted(test_references[content] for content in trained_references)),
        ),
    ]


def _groups(side: Side, separate_roots: bool) -> set[tuple[str, ...]]:
    """Return the parts of a side's cases.

    An image without a group uses its file as its group. If the two sides have `separate_roots`, the same path may be a
    different file on each side, so these groups are skipped.
    """
    return {part_key(one) for one in side.cases.values() if not (separate_roots and one.group == default_group(one))}


def _contents(side: Side, images: Sequence[str]) -> dict[bytes, str]:
    """Map the digest of each file to its path."""
    return dict(zip(file_digests([side.dataset.root / image for image in images]), images, strict=True))


def _products(side: Side) -> set[tuple[str, ...]]:
    """Return the (dataset, product) pairs of a side's cases. MMAD's dataset names are replaced with a common name."""
    return {(DATASET_ALIASES.get(one.dataset, one.dataset), one.product) for one in side.cases.values()}


def _joined(keys: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple("/".join(key) for key in sorted(keys))


def _verdict(findings: Sequence[Finding], train: Dataset, evaluation: Dataset) -> str:
    leaks = [f"{finding.count} {finding.words}" for finding in findings if finding.leak and finding.count]
    if not leaks:
        return f"no leak found: no training data of {train.folder} is in the test split of {evaluation.folder}"
    doubtful = next(finding.count for finding in findings if finding.name == "few images")
    if doubtful:
        leaks.append(f"look at the pairs: {doubtful} may be different parts, because their product has few images")
    return f"LEAK: training data of {train.folder} is in the test split of {evaluation.folder}: {'; '.join(leaks)}"


def _describe_side(side: Side, splits: Sequence[str]) -> dict[str, Any]:
    return {
        "dataset": str(side.dataset.folder),
        "fingerprint": side.dataset.fingerprint,
        "splits": list(splits),
        "images": len(side.cases),
        "references": len(side.references),
    }


def _write_report(report: Mapping[str, Any], training: Side, evaluated: Side, output: Path) -> None:
    train = load_dataset(training.dataset.folder)  # another audit may have finished in the meantime
    if train.fingerprint != training.dataset.fingerprint:
        raise EchoError(f"{train.folder} was rebuilt during the audit; rerun the audit")
    verdict = {key: report[key] for key in ("leak", "verdict", "evaluation", "commit")}
    audits = {**train.manifest.get("audits", {}), evaluated.dataset.fingerprint: verdict}
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "audit.json", report)
        write_text(output / "audit.html", _render(report, training, evaluated))
        write_manifest(train.folder, {**train.manifest, "audits": audits})
    except OSError as error:
        raise EchoError(f"the report cannot be written ({error}); choose another output") from error


def _render(report: Mapping[str, Any], training: Side, evaluated: Side) -> str:
    """Render the self-contained page with the most similar pair of each leaked test image, the least certain first."""
    best = {pair["asked"]: pair for pair in sorted(report["pairs"], key=lambda pair: pair["similarity"])}
    order = sorted(best.values(), key=lambda pair: pair["similarity"])
    shown = [order[index * len(order) // MAX_PAIRS] for index in range(MAX_PAIRS)] if len(order) > MAX_PAIRS else order
    matches_of = Counter(pair["asked"] for pair in report["pairs"])
    cards = [
        {
            **pair,
            "others": matches_of[pair["asked"]] - 1,
            "test_image": _thumbnail_uri(evaluated.dataset.root / pair["asked"]),
            "train_image": _thumbnail_uri(training.dataset.root / pair["trained"]),
        }
        for pair in shown
    ]
    template = Path(__file__).parent / "audit.html.jinja"
    return render_page(template, report=report, cards=cards, leaked=len(order), candidates=MAX_CANDIDATES)


def _thumbnail_uri(path: Path) -> str:
    image = load_image(path, min_size=(2 * PAIR_SIDE, 2 * PAIR_SIDE))
    return jpeg_uri(thumbnail(image, PAIR_SIDE), quality=85)


if __name__ == "__main__":
    configs.run_main(main)
