"""Real-IAD (Wang et al., CVPR 2024, arXiv 2403.12580): 30 products, five views of each sample, with masks.

Layout: the root is `realiad_1024/<product>/...` (or `realiad_512`, `_256`, `_raw`). The manifests are next to it in
`realiad_jsons/<product>.json`, or in `realiad_jsons/realiad_jsons/<product>.json` as the archive unpacks them. Set
`annotations` to use the manifest of one product instead, such as a single-view manifest (`realiad_jsons_sv`). A
manifest is `{"meta": {"prefix", "normal_class"}, "train": [...], "test": [...]}` with rows of `{"category",
"anomaly_class", "image_path", "mask_path"}`, and paths are relative to `<root>/<prefix>`.

The views of a sample, `<product>_<number>_<OK or NG_kind>_C<view>_<time>.jpg`, form a group. As in the authors' own
loader, a view without a mask is normal, because the defect is not visible in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.sources import ItemPlace, Items, RowError, SourceConfig, locate, reject_unlisted, reject_unused
from echo_ft.errors import EchoError
from echo_ft.files import list_folder
from echo_ft.inputs import read_json_file
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
"""Maps the dataset's defect codes to conditions."""

VIEW = re.compile(r"(.+)_C\d+_[^/]*$")


def read(config: SourceConfig) -> Items:
    """Yield the images of the manifests with their splits. Raises EchoError if a manifest is missing or malformed."""
    root = config.root
    manifests = [config.annotations] if config.annotations else _manifests(root)
    folders = set()
    for path in manifests:
        content = _load(path)
        prefix = str(content["meta"].get("prefix", path.stem)).strip("/")
        folder = root / prefix
        folders.add(folder)
        used: set[str] = set()
        for split in ("train", "test"):
            for number, row in enumerate(content[split]):
                place = f"{path.name}:{split}[{number}]"
                if isinstance(row, Mapping):
                    yield ItemPlace(f"{prefix}/{row.get('image_path')}", place)
                try:
                    inspection = _inspection(root, prefix, row, split, content["meta"]["normal_class"])
                    used |= {inspection.image, inspection.mask or inspection.image}
                    yield inspection
                except RowError as error:
                    yield Rejection(place, str(error))
        if folder.is_dir():
            yield from reject_unlisted(root, folder, used, f"no usable row of {path.name} lists them")
    yield from reject_unused(root, root, folders, "no manifest lists it", allow_text=True)


def _manifests(root: Path) -> list[Path]:
    lists = Path(os.path.abspath(root)).parent / "realiad_jsons"  # the root may be `.`
    for folder in (lists / "realiad_jsons", lists):
        content = list_folder(folder) if folder.is_dir() else []
        found = [path for path in content if path.suffix == ".json" and path.is_file()]
        if found:
            return found
    inner = sorted(path.name for path in root.glob("realiad_*") if path.is_dir() and "jsons" not in path.name)
    hint = (
        f"set root to {root / inner[0]}"
        if inner
        else "set root to Real-IAD's realiad_1024, or annotations to a manifest"
    )
    raise EchoError(f"there is no manifest realiad_jsons/<product>.json next to {root}; {hint}")


def _load(path: Path) -> dict[str, Any]:
    try:
        content = read_json_file(path)
    except (OSError, ValueError) as error:
        raise EchoError(f"{path} cannot be read as JSON ({error}); download Real-IAD's JSON files again") from error
    valid = (
        isinstance(content, dict)
        and isinstance(content.get("meta"), dict)
        and "normal_class" in content["meta"]
        and all(isinstance(content.get(split), list) for split in ("train", "test"))
    )
    if not valid:
        raise EchoError(f"{path} lacks meta.normal_class, train or test; use the JSON file that Real-IAD publishes")
    return dict(content)


def _inspection(root: Path, prefix: str, row: Any, split: str, normal: str) -> Inspection:
    if not isinstance(row, Mapping) or not all(isinstance(row.get(key), str) for key in ("category", "image_path")):
        raise RowError("category and image_path must be strings")
    image = locate(root, f"{prefix}/{row['image_path']}", "image")
    code, mask = str(row.get("anomaly_class")), row.get("mask_path")
    if code != normal and code not in CONDITIONS:
        raise RowError(f"the anomaly_class {code!r} of {image} is not one of {normal}, {', '.join(CONDITIONS)}")
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
