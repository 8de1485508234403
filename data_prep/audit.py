"""Does what is trained on show what is evaluated on?

    python -m data_prep.audit TRAIN EVAL [--output DIR] [--shared_products]
    python -m data_prep.audit DATASET

Both are dataset folders of data_prep.build. What TRAIN trains on, its train and validation splits and the references
beside them, is compared with what EVAL asks about, its test split; a single folder is compared with itself.

A leak is a test photograph that is a file of the training side, or shows the same surface as one (re-encoded, resized,
cropped, brighter, or the same part under another light); one that stands beside training cases as their reference;
a part whose photographs are on both sides by their records; and a product on both sides where products should be apart:
in two folders, unless --shared_products, and in one that is split by product or by dataset.

Writes audit.json and audit.html into `output` (TRAIN, if absent) and the verdict into TRAIN's manifest.json, from where
training takes it into the adapter. Exit status: 0 without a leak, 1 with one, 2 after a mistake.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo_ft import config as configs
from echo_ft.data.dataset import Dataset, load_dataset, require_unchanged
from echo_ft.data.knowledge import ALIASES
from echo_ft.data.splits import part
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl, write_text
from echo_ft.html import jpeg_uri, render_page, thumbnail
from echo_ft.images.decode import load_image
from echo_ft.leakage.matches import BEYOND, SAME, Match, digests, find_matches
from echo_ft.leakage.perceptual_hash import CANDIDATES, NEAREST_HASHES
from echo_ft.provenance import commit, versions
from echo_ft.records import Inspection, Reference

AUDIT_FORMAT = "echo-ft audit 1"

TRAINED, ASKED = ("train", "validation"), ("test",)
"""Splits that training reads, and splits that an evaluation asks about."""

MAX_PROMPTS_APART = ("by_product", "by_dataset")
"""Values of a build's `split` that promise products on one side only."""

MAX_PAIRS = 60
"""Pairs on the page."""

PAIR_SIDE = 224
"""Longer side of its images, in pixels."""


@dataclass(frozen=True)
class AuditConfig:
    """Options of `python -m data_prep.audit`."""

    folders: list[Path] = field(
        metadata={"help": "dataset to train on, and dataset to evaluate on if another; may stand first, without a flag"}
    )
    output: Path | None = field(default=None, metadata={"help": "where the report goes; the first folder if absent"})
    shared_products: bool = field(
        default=False, metadata={"help": "two folders may have products in common: only their parts must be apart"}
    )


@dataclass(frozen=True)
class Side:
    """One side of the comparison."""

    dataset: Dataset
    cases: dict[str, Inspection]
    """Photographs that are trained on, or asked about, by path."""
    references: frozenset[str]
    """Photographs that stand beside them as normal references."""
    products: dict[str, str]
    """Of every photograph of the dataset that the records name, by path."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for."""

    name: str
    leak: bool
    """Whether finding any of it is a leak."""
    count: int
    words: str
    examples: tuple[str, ...]


def main(argv: list[str]) -> None:
    """Audit, write the report, say what was found."""
    (config,) = configs.parse([AuditConfig], configs.named_first(argv, "--folders"))
    report = audit(config)
    for finding in report["findings"]:
        print(f"  {finding['name']:<16} {finding['count']:>6}  {finding['words']}")
    print(f"look at it: {Path(report['output']) / 'audit.html'}")
    print(report["verdict"], file=sys.stderr if report["leak"] else sys.stdout)
    if report["leak"]:
        sys.exit(1)


def audit(config: AuditConfig) -> dict[str, Any]:
    """Compare, and write audit.json, audit.html and the verdict in the manifest; returns what audit.json holds.

    Raises EchoError for folders that are no datasets, a side without photographs, and photographs that are gone or
    are not those that the dataset was built from.
    """
    if not 1 <= len(config.folders) <= 2:
        raise EchoError(
            f"{len(config.folders)} folders were given; name the dataset that is trained on, then the evaluation's"
        )
    train, evaluation = load_dataset(config.folders[0]), load_dataset(config.folders[-1])
    trained, asked = _side(train, TRAINED), _side(evaluation, ASKED)
    seen = sorted(trained.cases.keys() | trained.references)
    queries = sorted(asked.cases)
    products = [trained.products.get(path, "") for path in seen]
    require_unchanged(train, seen)
    require_unchanged(evaluation, queries)
    matches = find_matches([train.root / path for path in seen], products, [evaluation.root / path for path in queries])
    pairs = [_pair(match, seen[match.trained], queries[match.asked], trained, asked) for match in matches]
    findings = [*_by_pixels(pairs, trained, asked), *_by_records(trained, asked, _apart(config, train))]
    found = [finding for finding in findings if finding.leak and finding.count]
    output = config.output or train.folder
    report = {
        "format": AUDIT_FORMAT,
        "verdict": _verdict(found, train, evaluation),
        "leak": bool(found),
        "output": str(output),
        "train": _described(trained, TRAINED),
        "evaluation": _described(asked, ASKED),
        "findings": [vars(finding) for finding in findings],
        "pairs": pairs,
        "thresholds": {"similarity": SAME, "excess": BEYOND},
        "versions": versions(),
        "commit": commit(),
    }
    _write(report, trained, asked, output)
    return report


def _side(dataset: Dataset, splits: Sequence[str]) -> Side:
    inspections = list(read_jsonl(dataset.folder / "inspections.jsonl", Inspection))
    cases = {inspection.image: inspection for inspection in inspections if inspection.split in splits}
    if not cases:
        raise EchoError(
            f"{dataset.folder} has no photograph in the split {' or '.join(splits)}; choose another dataset"
        )
    ids = {inspection.id for inspection in cases.values()}
    rows = read_jsonl(dataset.folder / "references.jsonl", Reference)
    products = {inspection.image: f"{inspection.dataset}/{inspection.product}" for inspection in inspections}
    return Side(dataset, cases, frozenset(row.image for row in rows if row.inspection in ids), products)


def _apart(config: AuditConfig, train: Dataset) -> bool:
    """Whether a product on both sides is a leak."""
    if len(config.folders) == 2:
        return not config.shared_products
    return train.manifest["config"].get("split") in MAX_PROMPTS_APART


def _pair(match: Match, seen: str, query: str, trained: Side, asked: Side) -> dict[str, Any]:
    case, inspection = trained.cases.get(seen), asked.cases[query]
    roles = {"case": case is not None, "reference": seen in trained.references}
    return {
        "kind": "copy" if match.copy else "near-duplicate",
        "trained": seen,
        "as": [role for role, holds in roles.items() if holds],
        "asked": query,
        "similarity": match.similarity,
        "product": inspection.product,
        "condition": inspection.condition,
        "same_part_by_records": case is not None and part(case) == part(inspection),
    }


def _by_pixels(pairs: Sequence[Mapping[str, Any]], trained: Side, asked: Side) -> list[Finding]:
    total = len(asked.cases)

    def photographs(name: str, words: str, chosen: Sequence[Mapping[str, Any]]) -> Finding:
        names = tuple(dict.fromkeys(pair["asked"] for pair in chosen))
        return Finding(name, True, len(names), f"of {total} test photographs {words}", names)

    copies = [pair for pair in pairs if pair["kind"] == "copy"]
    near = [pair for pair in pairs if pair["kind"] != "copy"]
    references = [pair for pair in pairs if "reference" in pair["as"]]
    return [
        photographs("copies", "are files of the training side", copies),
        photographs("near-duplicates", "show the same surface as a photograph of the training side", near),
        photographs("references", "were shown beside training cases as a normal reference", references),
    ]


def _by_records(trained: Side, asked: Side, apart: bool) -> list[Finding]:
    elsewhere = trained.dataset.root != asked.dataset.root
    groups = _groups(trained, elsewhere) & _groups(asked, elsewhere)
    products = _products(trained) & _products(asked)
    beside = _contents(asked, sorted(asked.references))
    known = beside.keys() & _contents(trained, sorted(trained.cases)).keys() if beside else set()
    names = {name for _, name in _products(trained)} & {name for _, name in _products(asked)}
    namesakes = names - {name for _, name in products}
    seen = Counter(trained.products.get(path, "") for path in {*trained.cases, *trained.references})
    many = [name for name, count in seen.items() if count > NEAREST_HASHES]
    allowed = "" if apart else ", as this split allows"
    return [
        Finding("groups", True, len(groups), "groups have photographs on both sides", _names(groups)),
        Finding("products", apart, len(products), f"products are on both sides{allowed}", _names(products)),
        Finding(
            "same names",
            False,
            len(namesakes),
            "products have the name of one on the other side, under another dataset's: if they are one, that leaks",
            tuple(sorted(namesakes)),
        ),
        Finding(
            "crowded",
            False,
            len(many),
            f"products have more than {NEAREST_HASHES} photographs on the training side: among so many, some crops may be missed",
            tuple(sorted(many)),
        ),
        Finding(
            "tested beside",
            False,
            len(known),
            "references of test photographs are trained on, which shows nothing of the test photographs themselves",
            tuple(sorted(beside[content] for content in known)),
        ),
    ]


def _groups(side: Side, elsewhere: bool) -> set[tuple[str, ...]]:
    """The parts of a side's cases.

    Where the other side's images are `elsewhere`, a photograph that is its own group is none: its group is its path,
    and below another root that is another file.
    """
    return {part(one) for one in side.cases.values() if not (elsewhere and one.group == one.image)}


def _contents(side: Side, images: Sequence[str]) -> dict[bytes, str]:
    return dict(zip(digests([side.dataset.root / image for image in images]), images, strict=True))


def _products(side: Side) -> set[tuple[str, ...]]:
    """(dataset, product), by one name where MMAD has another for the dataset than its own source."""
    return {(ALIASES.get(one.dataset, one.dataset), one.product) for one in side.cases.values()}


def _names(keys: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple("/".join(key) for key in sorted(keys))


def _verdict(found: Sequence[Finding], train: Dataset, evaluation: Dataset) -> str:
    if not found:
        return f"no leak found: nothing that {train.folder} trains on is in the test split of {evaluation.folder}"
    what = "; ".join(f"{finding.count} {finding.words}" for finding in found)
    return f"LEAK: what {train.folder} trains on is in the test split of {evaluation.folder}: {what}"


def _described(side: Side, splits: Sequence[str]) -> dict[str, Any]:
    return {
        "dataset": str(side.dataset.folder),
        "fingerprint": side.dataset.fingerprint,
        "splits": list(splits),
        "photographs": len(side.cases),
        "references": len(side.references),
    }


def _write(report: Mapping[str, Any], trained: Side, asked: Side, output: Path) -> None:
    train = load_dataset(trained.dataset.folder)  # as it is now: other audits may have ended since this one began
    if train.fingerprint != trained.dataset.fingerprint:
        raise EchoError(f"{train.folder} was built anew during the audit; audit it again")
    verdict = {key: report[key] for key in ("leak", "verdict", "evaluation", "commit")}
    audits = {**train.manifest.get("audits", {}), asked.dataset.fingerprint: verdict}
    manifest = {**train.manifest, "audits": audits}
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "audit.json", _text(report))
        write_text(output / "audit.html", _page(report, trained, asked))
        write_text(train.folder / "manifest.json", _text(manifest))
    except OSError as error:
        raise EchoError(f"the report cannot be written ({error}); choose another output") from error


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _page(report: Mapping[str, Any], trained: Side, asked: Side) -> str:
    """The self-contained page: of each test photograph its most similar pair, the least certain first."""
    best = {pair["asked"]: pair for pair in sorted(report["pairs"], key=lambda pair: pair["similarity"])}
    order = sorted(best.values(), key=lambda pair: pair["similarity"])
    shown = [order[index * len(order) // MAX_PAIRS] for index in range(MAX_PAIRS)] if len(order) > MAX_PAIRS else order
    others = Counter(pair["asked"] for pair in report["pairs"])
    cards = [
        {
            **pair,
            "others": others[pair["asked"]] - 1,
            "asked_image": _thumbnail(asked.dataset.root / pair["asked"]),
            "trained_image": _thumbnail(trained.dataset.root / pair["trained"]),
        }
        for pair in shown
    ]
    template = Path(__file__).parent / "audit.html.jinja"
    return render_page(template, report=report, cards=cards, photographs=len(order), nearest=CANDIDATES)


def _thumbnail(path: Path) -> str:
    image = load_image(path, least=(2 * PAIR_SIDE, 2 * PAIR_SIDE))
    return jpeg_uri(thumbnail(image, PAIR_SIDE), quality=85)


if __name__ == "__main__":
    configs.run_main(main)
