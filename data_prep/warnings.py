from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.config import BuildConfig
from data_prep.prepare import REFERENCE_LEFT_OUT, DatasetDraft, remedy
from data_prep.training_rows import MAX_REPEATS
from echo_ft.data.knowledge import first_names
from echo_ft.data.splits import divided_parts
from echo_ft.images.decode import depth
from echo_ft.records import GOOD, ROLES, Inspection


def _warnings(material: DatasetDraft, digests: Mapping[str, str], config: BuildConfig) -> list[str]:
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
        found.append(f"only normal or only defective training cases, so no balance: {first_names(lacking)}")
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
        found.append(f"{len(bare)} cases have no reference: {first_names(bare)}")
    divided = divided_parts(inspections)
    if divided:
        found.append(
            f"{len(divided)} groups are in more than one split, as the source has it: {first_names([d[2] for d in divided])}"
        )
    elsewhere = {digests[inspection.image] for inspection in inspections if inspection.split != "test"}
    copies = [inspection.image for inspection in test if digests[inspection.image] in elsewhere]
    if copies:
        found.append(f"{len(copies)} test photographs are copies of photographs of other splits: {first_names(copies)}")
    held_out = {digests[inspection.image] for inspection in test}
    named = [i.image for i in cases if i.reference is not None and digests[i.reference] in held_out]
    if named:
        found.append(
            f"the references named for {len(named)} cases are themselves test photographs: {first_names(named)}"
        )
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


def _balanced_away(material: DatasetDraft, unused: Sequence[Inspection]) -> list[str]:
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
        f"{len(unused)} training photographs are in no row ({first_names(places)}): of each product balance takes at most "
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
