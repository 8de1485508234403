"""The dataset folder on disk, which appears whole or not at all, and its manifest."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.prepare import REFERENCE_LEFT_OUT, Material, reference_pool, remedy, some
from data_prep.raw import progress
from data_prep.settings import BuildConfig
from data_prep.training_rows import MAX_REPEATS, Sides
from echo_ft.dataset import DIGESTS, FORMAT, images_fingerprint
from echo_ft.geometry import mask_files
from echo_ft.images import depth
from echo_ft.provenance import commit, content_hash, fingerprint_bytes, fingerprint_files, versions
from echo_ft.records import GOOD, ROLES, EchoError, Inspection
from echo_ft.roles import PROMPT_VERSION
from echo_ft.splits import LEFT_OUT, SPLITS, divided_parts

CONTENT = frozenset(
    {
        "audit.html",
        "audit.json",
        DIGESTS,
        "images",
        "inspections.jsonl",
        "knowledge.json",
        "manifest.json",
        "masks",
        "preview.html",
        "questions.jsonl",
        "references.jsonl",
        "rejected.jsonl",
        "sft",
    }
)
"""What a dataset folder holds at its top; a folder with anything else in it is never removed."""


@contextmanager
def workspace(output: Path, config: Mapping[str, Any], overwrite: bool) -> Iterator[Path]:
    """A folder to build in. It takes the place of `output` when the block ends well, and is removed when it does not.

    Raises EchoError, before anything is built, where `output` is something else than a dataset, or one that was built
    with another config (`overwrite` allows that).
    """
    _check_replaceable(output, config, overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise EchoError(f"{output.parent} cannot be written ({error.strerror}); choose another output") from error
    folder, old = partial / output.name, partial / "replaced"
    try:
        folder.mkdir()  # with the user's own permissions, which mkdtemp's folder has not
        yield folder
        if output.exists():
            output.rename(old)
        folder.rename(output)
    finally:
        if old.exists() and not output.exists():  # stopped between the two
            old.rename(output)
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(output: Path, config: Mapping[str, Any], overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise EchoError(f"{output} is a file; choose another output")
    names = {path.name for path in output.iterdir()}
    if not names:
        return
    manifest = _manifest(output / "manifest.json")
    if manifest is None:
        raise EchoError(f"{output} holds files that are not a dataset of this project; choose another output")
    foreign = sorted(names - CONTENT)
    if foreign:
        raise EchoError(
            f"{output} also holds {foreign[0]}, which a build would remove; move it or choose another output"
        )
    before = manifest.get("config", {})
    changed = sorted(key for key in {*before, *config} if before.get(key) != config.get(key))
    if changed and not overwrite:
        raise EchoError(
            f"{output} holds a dataset of another config (it differs in {', '.join(changed)}); "
            "choose another output or add --overwrite"
        )


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(manifest, dict) and str(manifest.get("format", "")).startswith(FORMAT.rsplit(" ", 1)[0])
    return manifest if ours else None


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_manifest(
    material: Material,
    sides: Mapping[str, Sides],
    unused: Sequence[Inspection],
    digests: Mapping[str, str],
    root: Path,
    config: BuildConfig,
) -> dict[str, Any]:
    """What the dataset holds, how it was made, and what to beware of; its images' digests go into its folder too.

    `sides` and `unused` are as `write_sft` gives them; `digests` is as `image_digests` gives it.
    """
    folder = material.folder
    write_json(folder / DIGESTS, digests)
    images = images_fingerprint(digests)
    names = [path for path in sorted(folder.rglob("*.jsonl")) if path.name != "rejected.jsonl"]
    counts = _counts(material, sides) | {"balanced_away": len(unused)}
    return {
        "format": FORMAT,
        "source": config.source,
        "root": root.relative_to(folder).as_posix() if root.is_relative_to(folder) else str(root.resolve()),
        "config": config.settings(),
        "seed": config.seed,
        "prompt_version": PROMPT_VERSION,
        "splits": material.split_words,
        "counts": counts,
        "products_without_knowledge": material.unknown_products,
        "rejected": sum(rejection.dropped is None for rejection in material.rejections),
        "dropped": _sorted(Counter(rejection.dropped for rejection in material.rejections if rejection.dropped)),
        "warnings": [
            *_warnings(material, digests, config),
            *_one_sided(counts, config.routing),
            *_balanced_away(material, unused),
            *_uneven_depths(material.inspections, root),
        ],
        "fingerprint": fingerprint_bytes(
            fingerprint_files([*names, folder / "knowledge.json"], folder).encode(), images.encode()
        ),
        "annotations_fingerprint": fingerprint_bytes(config.annotations.read_bytes()) if config.annotations else None,
        "images_fingerprint": images,
        "versions": versions(),
        "commit": commit(),
    }


def rejected_words(manifest: Mapping[str, Any]) -> str:
    """How much was rejected, and apart from that how much was dropped of photographs that are used."""
    dropped = [f"{count} {what}{'s' if count > 1 else ''} dropped" for what, count in manifest["dropped"].items()]
    words = f"{manifest['rejected']} rejected"
    if dropped:
        words += f"; {', '.join(dropped)}, the photographs are used"
    return words + (" (see rejected.jsonl)" if manifest["rejected"] or dropped else "")


def _counts(material: Material, sides: Mapping[str, Sides]) -> dict[str, Any]:
    splits = (*SPLITS, LEFT_OUT) if any(i.split == LEFT_OUT for i in material.inspections) else SPLITS
    cases: dict[str, Counter[str]] = {split: Counter() for split in splits}
    products: dict[str, Counter[str]] = {split: Counter() for split in splits}
    for inspection in material.inspections:
        if inspection.id in material.questions.inspections:
            cases[str(inspection.split)][inspection.condition] += 1
            products[str(inspection.split)][inspection.product] += 1
    return {
        "photographs": _sorted(Counter(str(inspection.split) for inspection in material.inspections)),
        "reference_pool": len(reference_pool(material.inspections)),
        "cases": {split: _sorted(found) for split, found in cases.items()},
        "products": {split: _sorted(found) for split, found in products.items()},
        "questions": _sorted(material.questions.kinds),
        "references": _sorted(material.references.kinds),
        "synthetic": _sorted(Counter(i.synthetic for i in material.inspections if i.synthetic)),
        "sft_rows": {name: sum(side["rows"] for side in found.values()) for name, found in sorted(sides.items())},
        "sft_sides": dict(sorted(sides.items())),
    }


def _sorted(counter: Counter[str]) -> dict[str, int]:
    return {key: counter[key] for key in sorted(counter)}


def image_digests(inspections: Sequence[Inspection], root: Path) -> dict[str, str]:
    """SHA-256 of every photograph, mask and named reference, by path."""
    paths = {path for i in inspections for path in (i.image, *mask_files(i), i.reference) if path is not None}
    return {
        path: content_hash(os.path.join(root, path)).hex() for path in progress(sorted(paths), "fingerprint", "files")
    }


def _warnings(material: Material, digests: Mapping[str, str], config: BuildConfig) -> list[str]:
    """What a user should know before trusting a number that comes from this dataset."""
    inspections = material.inspections
    cases = [inspection for inspection in inspections if inspection.id in material.questions.inspections]
    test = [inspection for inspection in cases if inspection.split == "test"]
    found = []
    if not any(inspection.split == "train" for inspection in cases):
        found.append(
            "the train split holds normal photographs only: they serve as references and the training rows are empty; "
            f"to train on this data, {remedy(inspections, config, defects=True)}"
        )
    for split in ("validation", "test"):
        conditions = {inspection.condition == GOOD for inspection in cases if inspection.split == split}
        if not conditions:
            found.append(f"no case is in the {split} split")
        elif len(conditions) == 1:
            side = "normal" if True in conditions else "defective"
            found.append(
                f"the {split} split has {side} cases alone: its figures say nothing of the others, and nothing can be "
                f"calibrated on it; give {split} a larger share in fractions, or add photographs"
            )
    alone = sorted({(i.dataset, i.product) for i in cases if i.split == "train"})
    sides = {(i.dataset, i.product, i.condition == GOOD) for i in cases if i.split == "train"}
    lacking = ["/".join(place) for place in alone if (*place, True) not in sides or (*place, False) not in sides]
    if lacking:
        found.append(f"only normal or only defective training cases, so no balance: {some(lacking)}")
    made = Counter(inspection.synthetic for inspection in inspections if inspection.synthetic)
    if made:
        methods = ", ".join(f"{count} by {method}" for method, count in sorted(made.items()))
        found.append(
            f"the defects of {made.total()} training photographs are synthetic ({methods}): no camera saw them; "
            "validation and test have none"
        )
    hidden = sum(rejection.reason == REFERENCE_LEFT_OUT for rejection in material.rejections)
    if hidden:
        found.append(
            f"the references named for {hidden} training photographs are of the fold that is left out: retrieved ones "
            "stand in for them"
        )
    found += material.knowledge_doubts
    bare = [inspection.image for inspection in cases if inspection.id not in material.references.inspections]
    if bare:
        found.append(f"{len(bare)} cases have no reference: {some(bare)}")
    divided = divided_parts(inspections)
    if divided:
        found.append(
            f"{len(divided)} groups are in more than one split, as the source has it: {some([d[2] for d in divided])}"
        )
    elsewhere = {digests[inspection.image] for inspection in inspections if inspection.split != "test"}
    copies = [inspection.image for inspection in test if digests[inspection.image] in elsewhere]
    if copies:
        found.append(f"{len(copies)} test photographs are copies of photographs of other splits: {some(copies)}")
    held_out = {digests[inspection.image] for inspection in test}
    named = [i.image for i in cases if i.reference is not None and digests[i.reference] in held_out]
    if named:
        found.append(f"the references named for {len(named)} cases are themselves test photographs: {some(named)}")
    return found


def _one_sided(counts: Mapping[str, Any], routing: str) -> list[str]:
    """A warning for each role that is trained on one side alone of training cases that have both."""
    cases = counts["cases"]["train"]
    if not 0 < cases.get(GOOD, 0) < sum(cases.values()):
        return []
    found = []
    for role in ROLES:
        sides = counts["sft_sides"][f"{role}/train"]
        (fewer, none), (other, most) = sorted(sides.items(), key=lambda side: side[1]["cases"])
        if none["cases"] == 0 < most["cases"]:
            paper = routing == "paper" and fewer == "normal"
            why = "; the paper's routing consults it for defects only, in a run too" if paper else ""
            found.append(
                f"{role} has {most['rows']} training rows of {other} cases and none of {fewer} ones, so no balance{why}"
            )
    return found


def _balanced_away(material: Material, unused: Sequence[Inspection]) -> list[str]:
    """A warning where balance leaves training photographs out of all rows: how many, and of which products."""
    if not unused:
        return []
    of = Counter((i.dataset, i.product, i.condition == GOOD) for i in material.asked("train"))
    left = Counter((i.dataset, i.product, i.condition == GOOD) for i in unused)
    places = [
        f"{dataset}/{product}: {count} of {of[dataset, product, good]} {'normal' if good else 'defective'}"
        for (dataset, product, good), count in left.most_common()
    ]
    return [
        f"{len(unused)} training photographs are in no row ({some(places)}): of each product balance takes at most "
        f"{MAX_REPEATS} times as many of one side as the other has; add photographs of the rarer side, or set "
        "balance: false to train on all"
    ]


def _uneven_depths(inspections: Sequence[Inspection], root: Path) -> list[str]:
    """A warning for each product whose photographs of more than 8 bits are scaled in different ways."""
    depths: dict[str, Counter[int]] = defaultdict(Counter)
    for inspection in inspections:
        bits = depth(root / inspection.image)
        if bits is not None:
            depths[f"{inspection.dataset}/{inspection.product}"][bits] += 1
    return [
        f"the grey values of {product} are scaled to 8 bits from different depths, each the smallest that holds the "
        f"photograph's brightest pixel ({', '.join(f'{n} from {bits} bits' for bits, n in sorted(found.items()))}): "
        "exposures no longer compare; if one camera took them, convert them to 8 bits yourself, by one scale"
        for product, found in sorted(depths.items())
        if len(found) > 1
    ]
