"""Real-IAD (Wang et al., CVPR 2024, arXiv 2403.12580): 30 products, five views of each sample, with masks.

Layout: `realiad_1024/<product>/...` (or `realiad_512`, `_256`, `_raw`), which is the root, and beside it the lists
`realiad_jsons/<product>.json`, or `realiad_jsons/realiad_jsons/<product>.json` as the archive unpacks. `annotations`
takes one product's list instead, as that of a single view (`realiad_jsons_sv/<product>.json`). A list is
`{"meta": {"prefix", "normal_class"}, "train": [...], "test": [...]}` of `{"category", "anomaly_class", "image_path",
"mask_path"}`, paths relative to `<root>/<prefix>`.

The views of a sample, `<product>_<number>_<OK or NG_kind>_C<view>_<time>.jpg`, are one group. As in the authors' own
loader, a view without a mask is normal: the sample's defect does not show there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.sources import ItemPlace, Items, RowError, SourceConfig, locate, passed_over, unlisted
from echo_ft.errors import EchoError
from echo_ft.records import GOOD, Inspection, Rejection

CONDITIONS = {
    "AK": "pit",
    "BX": "deformation",
    "CH": "abrasion",
    "HS": "scratch",
    "PS": "damage",
    "QS": "missing_parts",
    "YW": "foreign_objects",
    "ZW": "contamination",
}
"""The dataset's codes of kinds of defect."""

VIEW = re.compile(r"(.+)_C\d+_[^/]*$")


def read(config: SourceConfig) -> Items:
    """The photographs of the lists, with their splits; raises EchoError where there is no list, or another file."""
    root = config.root
    lists = [config.annotations] if config.annotations else _lists(root)
    folders = set()
    for path in lists:
        content = _load(path)
        prefix = str(content["meta"].get("prefix", path.stem)).strip("/")
        folder = root / prefix
        folders.add(folder)
        used: set[str] = set()
        for split in ("train", "test"):
            for number, row in enumerate(content[split]):
                place = f"{path.name}:{split}[{number}]"
                try:
                    inspection = _inspection(root, prefix, row, split, content["meta"]["normal_class"])
                    used |= {inspection.image, inspection.mask or inspection.image}
                    yield ItemPlace(inspection.id, place)
                    yield inspection
                except RowError as error:
                    yield Rejection(place, str(error))
        if folder.is_dir():
            yield from unlisted(root, folder, used, f"belong to no row of {path.name} that can be used")
    yield from passed_over(root, root, folders, "no list that was read is about it", texts=True)


def _lists(root: Path) -> list[Path]:
    for folder in (root.parent / "realiad_jsons" / "realiad_jsons", root.parent / "realiad_jsons"):
        found = sorted(folder.glob("*.json"))
        if found:
            return found
    inner = sorted(path.name for path in root.glob("realiad_*") if path.is_dir() and "jsons" not in path.name)
    hint = (
        f"set root to {root / inner[0]}" if inner else "set root to Real-IAD's realiad_1024, or annotations to a list"
    )
    raise EchoError(f"there is no list realiad_jsons/<product>.json beside {root}; {hint}")


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EchoError(f"{path} cannot be read as JSON ({error}); download Real-IAD's lists again") from error
    whole = (
        isinstance(content, dict)
        and isinstance(content.get("meta"), dict)
        and "normal_class" in content["meta"]
        and all(isinstance(content.get(split), list) for split in ("train", "test"))
    )
    if not whole:
        raise EchoError(f"{path} has not meta with normal_class, train and test; take a list as Real-IAD publishes it")
    return dict(content)


def _inspection(root: Path, prefix: str, row: Any, split: str, normal: str) -> Inspection:
    if not isinstance(row, Mapping) or not all(isinstance(row.get(key), str) for key in ("category", "image_path")):
        raise RowError("it has no texts category and image_path")
    image = locate(root, f"{prefix}/{row['image_path']}", "image")
    code, mask = row.get("anomaly_class"), row.get("mask_path")
    if code != normal and code not in CONDITIONS:
        raise RowError(f"the anomaly_class {code!r} of {image} is none of {normal}, {', '.join(CONDITIONS)}")
    sample = VIEW.fullmatch(image)
    if not sample:
        raise RowError(f"{image} has no view _C<number>_ in its name, so its sample is unknown")
    defect = code != normal and mask is not None
    return Inspection(
        id=image,
        image=image,
        dataset="Real-IAD",
        product=row["category"],
        condition=CONDITIONS[code] if defect else GOOD,
        group=sample.group(1),
        split=split,
        mask=locate(root, f"{prefix}/{mask}", "mask") if defect else None,
    )
