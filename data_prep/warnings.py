"""Warnings of a build, for users to read before they trust figures from the dataset."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_prep.config import BuildConfig
from data_prep.prepare import REFERENCE_LEFT_OUT, DatasetDraft, train_split_remedy
from data_prep.sources import LinkOutside
from data_prep.training_rows import MAX_REPEATS
from echo_ft.data.knowledge import first_names
from echo_ft.data.splits import divided_parts, part_key
from echo_ft.images.masks import is_marked, mask_files
from echo_ft.records import GOOD, ROLES, UNLABELLED, Inspection


def build_warnings(
    draft: DatasetDraft,
    digests: Mapping[str, str],
    counts: Mapping[str, Any],
    unused: Sequence[Inspection],
    config: BuildConfig,
) -> list[str]:
    """Return all warnings of a build, one sentence each.

    `digests` maps the path of each image to its SHA-256, and `counts` holds the manifest's counts. `unused` lists the
    inspections that balancing left out of all training rows.
    """
    cases = [inspection for inspection in draft.inspections if inspection.id in draft.questions.inspections]
    return [
        *_truth_warnings(draft, digests),
        *_split_warnings(draft.inspections, cases, config),
        *_training_image_warnings(draft),
        *draft.knowledge_warnings,
        *_leakage_warnings(draft, cases, digests),
        *_one_sided_roles(counts, config.routing),
        *_balanced_away(draft, unused),
        *(_without_boxes(cases) if config.grounding else ()),
        *_uneven_depths(draft),
        *_readings(draft),
        *_links(draft),
    ]


def _truth_warnings(draft: DatasetDraft, digests: Mapping[str, str]) -> Iterator[str]:
    """Warn about missing annotations or conditions, conflicting copies, defective references and shared masks."""
    if draft.unannotated:
        yield (
            f"{len(draft.unannotated)} images without annotations were read as {GOOD}: "
            f"{first_names(draft.unannotated)}; remove images that were not checked"
        )
    unlabelled = [inspection.image for inspection in draft.inspections if inspection.condition == UNLABELLED]
    if 0 < len(unlabelled) < len(draft.inspections):
        yield (
            f"{len(unlabelled)} of {len(draft.inspections)} images have no condition, so they are only for runs: "
            f"{first_names(unlabelled)}; if you forgot to label them, add their condition"
        )
    copies: dict[str, list[Inspection]] = defaultdict(list)
    by_mask: dict[str, list[Inspection]] = defaultdict(list)
    for inspection in draft.inspections:
        copies[digests[inspection.image]].append(inspection)
        for mask in mask_files(inspection):
            by_mask[mask].append(inspection)
    contradicting = [
        " = ".join(f"{one.image} ({one.condition})" for one in found)
        for found in copies.values()
        if len({one.condition for one in found} - {UNLABELLED}) > 1
    ]
    if contradicting:
        yield (
            f"the same image has different conditions in different files: {first_names(contradicting)}; "
            "correct or remove the wrong ones"
        )
    defective = {digests[one.image] for one in draft.inspections if one.condition not in (GOOD, UNLABELLED)}
    named = [one.image for one in draft.inspections if one.reference and digests[one.reference] in defective]
    if named:
        yield (
            f"the named references of {len(named)} images are copies of images that show a defect: "
            f"{first_names(named)}; name normal images as references"
        )
    shared = [
        f"{mask} of {' and '.join(one.image for one in found[:2])}"
        for mask, found in sorted(by_mask.items())
        if len({(*part_key(one), one.condition) for one in found}) > 1
    ]
    if shared:
        yield (
            f"one mask belongs to images of different parts or conditions: {first_names(shared)}; "
            "correct the manifest if it marks only one of them"
        )


def _split_warnings(
    inspections: Sequence[Inspection], cases: Sequence[Inspection], config: BuildConfig
) -> Iterator[str]:
    """Warn about splits without cases, and about splits or products with only normal or only defective cases."""
    if not any(inspection.split == "train" for inspection in cases):
        yield (
            "the train split has only normal images: they serve as references and the training rows are empty; "
            f"to train on this data, {train_split_remedy(inspections, config, defects=True)}"
        )
    for split in ("validation", "test"):
        conditions = {inspection.condition == GOOD for inspection in cases if inspection.split == split}
        if not conditions and split == "validation":
            seeded = ", or set split to seeded if the source gives the splits" if config.split == "given" else ""
            yield (
                "the validation split has no case (synthetic defects never count): add images, give validation a "
                f"larger fraction in fractions{seeded}, or train with --eval_strategy no"
            )
        elif not conditions:
            yield f"the {split} split has no case"
        elif len(conditions) == 1:
            side, other = ("normal", "defective") if True in conditions else ("defective", "normal")
            yield (
                f"the {split} split has only {side} cases: its results do not cover {other} ones, and it cannot be "
                f"used for calibration; give {split} a larger fraction in fractions, or add images"
            )
    training = [inspection for inspection in cases if inspection.split == "train"]
    products = sorted({(i.dataset, i.product) for i in training})
    sides = {(i.dataset, i.product, i.condition == GOOD) for i in training}
    one_sided = ["/".join(product) for product in products if not {(*product, True), (*product, False)} <= sides]
    if one_sided:
        yield (
            "products with only normal or only defective training cases, which cannot be balanced: "
            f"{first_names(one_sided)}"
        )


def _training_image_warnings(draft: DatasetDraft) -> Iterator[str]:
    """Warn about synthetic defects, and about named references that training may not show."""
    synthetic = Counter(inspection.synthetic for inspection in draft.inspections if inspection.synthetic)
    if synthetic:
        methods = ", ".join(f"{count} by {method}" for method, count in sorted(synthetic.items()))
        yield (
            f"{synthetic.total()} training images have synthetic defects ({methods}) instead of photographed ones; "
            "validation and test have none"
        )
    hidden = sum(rejection.reason == REFERENCE_LEFT_OUT for rejection in draft.rejections)
    if hidden:
        yield (
            f"the named references of {hidden} training images belong to the left-out fold; retrieved references "
            "replace them"
        )


def _leakage_warnings(draft: DatasetDraft, cases: Sequence[Inspection], digests: Mapping[str, str]) -> Iterator[str]:
    """Warn about cases without a reference, parts in several splits, and test images that occur elsewhere."""
    without_reference = [one.image for one in cases if one.id not in draft.references.inspections]
    if without_reference:
        yield f"{len(without_reference)} cases have no reference: {first_names(without_reference)}"
    divided = divided_parts(draft.inspections)
    if divided:
        groups = first_names([group for _, _, group in divided])
        yield f"the source puts {len(divided)} groups into more than one split: {groups}"
    test = [inspection for inspection in cases if inspection.split == "test"]
    elsewhere = {digests[inspection.image] for inspection in draft.inspections if inspection.split != "test"}
    copies = [inspection.image for inspection in test if digests[inspection.image] in elsewhere]
    if copies:
        yield f"{len(copies)} test images are copies of images in other splits: {first_names(copies)}"
    test_digests = {digests[inspection.image] for inspection in test}
    named = [i.image for i in cases if i.reference is not None and digests[i.reference] in test_digests]
    if named:
        yield f"the named references of {len(named)} cases are test images themselves: {first_names(named)}"


def _one_sided_roles(counts: Mapping[str, Any], routing: str) -> Iterator[str]:
    """Warn about roles that are trained on only one side even though the training cases have both."""
    cases = counts["cases"]["train"]
    if not 0 < cases.get(GOOD, 0) < sum(cases.values()):
        return
    for role in ROLES:
        sides = counts["sft_sides"][f"{role}/train"]
        (missing, fewer), (present, more) = sorted(sides.items(), key=lambda side: side[1]["cases"])
        if fewer["cases"] == 0 < more["cases"]:
            by_design = routing == "paper" and missing == "normal"
            reason = "; the paper's routing consults it about defects only, in evaluation too" if by_design else ""
            yield (
                f"{role} has {more['rows']} training rows of {present} cases but none of {missing} ones, so they "
                f"cannot be balanced{reason}"
            )


def _without_boxes(cases: Sequence[Inspection]) -> Iterator[str]:
    """Warn about defective images without marks, because nothing is known about their boxes."""
    defective = [one for one in cases if one.condition not in (GOOD, UNLABELLED)]
    unmarked = [one.image for one in defective if not is_marked(one)]
    if unmarked:
        yield (
            f"{len(unmarked)} of {len(defective)} defective images have no mask, polygon or box, so they get no "
            f"grounding question: {first_names(unmarked)}; mark their defects, or the model learns to answer none"
        )


def _balanced_away(draft: DatasetDraft, unused: Sequence[Inspection]) -> Iterator[str]:
    """Warn about training images that balancing leaves out of all rows, by product."""
    if not unused:
        return
    total = Counter((i.dataset, i.product, i.condition == GOOD) for i in draft.queries("train"))
    left = Counter((i.dataset, i.product, i.condition == GOOD) for i in unused)
    products = [
        f"{dataset}/{product}: {count} of {total[dataset, product, good]} {'normal' if good else 'defective'}"
        for (dataset, product, good), count in left.most_common()
    ]
    yield (
        f"{len(unused)} training images are in no row ({first_names(products)}): in each product, balancing uses at "
        f"most {MAX_REPEATS} times as many images of one side as there are of the other; add images of the rarer side, "
        "or set balance: false to train on all"
    )


def _uneven_depths(draft: DatasetDraft) -> Iterator[str]:
    """Warn about products whose images of more than 8 bits are scaled in different ways."""
    depths: dict[str, Counter[int]] = defaultdict(Counter)
    for inspection in draft.inspections:
        bits = draft.readings.bits.get(inspection.image)
        if bits is not None:
            depths[f"{inspection.dataset}/{inspection.product}"][bits] += 1
    for product, found in sorted(depths.items()):
        if len(found) > 1:
            scales = ", ".join(f"{count} from {bits} bits" for bits, count in sorted(found.items()))
            yield (
                f"the images of {product} are scaled to 8 bits from different depths, each from the smallest that "
                f"holds its brightest pixel ({scales}), so "
                "their exposures are no longer comparable; if one camera took them, convert them to 8 bits yourself, "
                "all with the same scale"
            )


def _readings(draft: DatasetDraft) -> Iterator[str]:
    """Warn about images and masks that are read differently from how a viewer shows them."""
    used = {inspection.image for inspection in draft.inspections}
    rotated = [image for image in draft.readings.rotated if image in used]
    if rotated:
        yield (
            f"{len(rotated)} images have an EXIF orientation and are turned upright by it, as viewers show them: "
            f"{first_names(rotated)}"
        )
    lossy = [image for image in draft.readings.lossy if image in used]
    if lossy:
        yield (
            f"the masks of {len(lossy)} images are in a lossy format, so only pixels brighter than half count: "
            f"{first_names(lossy)}; save masks as PNG"
        )


def _links(draft: DatasetDraft) -> Iterator[str]:
    """Warn about linked folders that lead out of the root."""
    links = [rejection.item for rejection in draft.rejections if isinstance(rejection, LinkOutside)]
    if links:
        yield (
            f"{len(links)} linked folders lead out of the root and are skipped: {first_names(links)}; set root to "
            "a folder above both, or copy them"
        )
