"""MMAD (Jiang et al., ICLR 2025, arXiv 2410.09453): mmad.json and the images of its four datasets.

A key in mmad.json is the path of a query image, `<dataset>/<product>/...`, and its folder is the condition. Masks are
under `rbg_mask` or `rgb_mask` (DS-MVTec) or `ground_truth`. Normal images are in `<dataset>/<product>/train/good`;
DS-MVTec uses MVTec AD's, in `MVTec-AD`. Queries form the test split, and normal images form the train split. Any other
file in a folder of queries or normal images is rejected and named. Other folders are not read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.faults import list_images
from data_prep.sources import Items, SourceConfig, reject_unused
from echo_ft.errors import EchoError
from echo_ft.inputs import read_json_file, stays_inside
from echo_ft.metrics.mmad import MERGED_TYPES
from echo_ft.records import GOOD, LETTERS, QUESTION_TYPES, Inspection, Question, Rejection

NORMAL_FOLDERS = {"DS-MVTec": "MVTec-AD"}
"""Maps a dataset to the folder with its normal images, if that is not its own folder."""


def read(config: SourceConfig) -> Items:
    """Yield query images with their questions and first random template, then the normal images of their products.

    Raises EchoError if mmad.json cannot be read or if no query image is found.
    """
    root = config.root
    rows = _load(config.annotations)
    missing = [key for key in rows if not _exists(root, key)]
    if len(missing) == len(rows):
        raise _no_image_found(missing, root, config.annotations)
    absent = set(missing)
    products: dict[tuple[str, str], None] = {}
    folders: set[Path] = set()
    for key, row in rows.items():
        parts = key.split("/")
        fault = _row_fault(key, row)
        if fault:
            yield Rejection(key, fault)
            continue
        products[parts[0], parts[1]] = None
        if key in absent:
            yield Rejection(key, "the image does not exist under the root")
            continue
        folders.add((root / key).parent)
        yield from _query(key, row, root)
    listed = {root / key for key in rows}
    for folder in sorted(folders):
        reason = "mmad.json has no questions about it"
        yield from reject_unused(root, folder, listed, reason, reason)
    for dataset, product in products:
        yield from _normals(dataset, product, root)


def _load(path: Path | None) -> dict[str, Any]:
    if path is None or not path.is_file():
        raise EchoError(f"the annotations {path} are not a file; set annotations to MMAD's mmad.json")
    try:
        rows = read_json_file(path)
    except (OSError, ValueError) as error:
        raise EchoError(f"{path} is not JSON ({error}); download mmad.json again") from error
    if not isinstance(rows, dict) or not rows:
        raise EchoError(f"{path} is not a mapping of images to questions; set annotations to MMAD's mmad.json")
    return rows


def _no_image_found(missing: list[str], root: Path, annotations: Path | None) -> EchoError:
    counts = ", ".join(f"{name} {count}" for name, count in sorted(Counter(k.split("/")[0] for k in missing).items()))
    return EchoError(
        f"all {len(missing)} images that {annotations} lists are missing ({counts}); looked in {root.resolve()} "
        f"for {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; download MMAD's images (dataset "
        "jiang-cc/MMAD on the Hugging Face hub) and set --root to the folder that contains "
        f"{', '.join(sorted({key.split('/')[0] for key in missing}))}"
    )


def _query(key: str, row: Mapping[str, Any], root: Path) -> Items:
    dataset, product, *_, condition, _ = key.split("/")
    mask = _mask(f"{dataset}/{product}/{row['mask_path']}", root) if row.get("mask_path") else None
    if mask and not _exists(root, mask):
        yield Rejection(mask, f"the mask of {key} is missing; the image is used without it", "mask")
        mask = None
    templates = row.get("random_templates") or []
    reference = templates[0] if templates else None
    if reference and not _exists(root, reference):
        reason = f"the reference that MMAD gives for {key} is missing; one is retrieved instead"
        yield Rejection(reference, reason, "reference")
        reference = None
    yield Inspection(
        id=key,
        image=key,
        dataset=dataset,
        product=product,
        condition=condition,
        group=key,
        split="test",
        mask=mask,
        reference=reference,
    )
    for index, item in enumerate(row["conversation"]):
        yield _question(f"{key}#{index}", key, item)


def _exists(root: Path, name: str) -> bool:
    """Return whether a file exists in the root."""
    # Path.is_file (Python 3.11) raises OSError for a name that is too long.
    return stays_inside(name) and os.path.isfile(root / name)


def _row_fault(key: str, row: Any) -> str | None:
    """Return why a query in mmad.json cannot be used, or None."""
    if len(key.split("/")) < 4 or not stays_inside(key) or not isinstance(row, dict):
        return "the key is not <dataset>/<product>/.../<condition>/<file>, or its value is not an object"
    for name, kind, what in (
        ("mask_path", str, "a text"),
        ("random_templates", list, "a list of strings"),
        ("conversation", list, "a list of questions"),
    ):
        if row.get(name) is not None and not isinstance(row[name], kind):
            return f"its {name} is {str(row[name])[:60]!r}, not {what}; download mmad.json again"
    if row.get("conversation") is None:
        return "it has no conversation, which holds its questions; download mmad.json again"
    paths = [("random_templates", path) for path in row.get("random_templates") or []]
    if row.get("mask_path"):
        paths.append(("mask_path", row["mask_path"]))
    for name, path in paths:
        if not isinstance(path, str) or not stays_inside(path):
            return f"its {name} has {str(path)[:60]!r}, which is not a path in the root; download mmad.json again"
    return None


def _mask(path: str, root: Path) -> str:
    """Return the path of a mask, with the other spelling of its folder if only that one exists."""
    if _exists(root, path):
        return path
    here, other = ("rbg_mask", "rgb_mask") if "rbg_mask" in path else ("rgb_mask", "rbg_mask")
    swapped = path.replace(here, other)
    return swapped if _exists(root, swapped) else path


def _question(name: str, inspection: str, item: Any) -> Question | Rejection:
    if not isinstance(item, dict):
        return Rejection(name, "the question is not an object")
    kind = MERGED_TYPES.get(str(item.get("type")), str(item.get("type")))
    options, answer = item.get("Options"), item.get("Answer")
    if kind not in QUESTION_TYPES:
        return Rejection(name, f"the type {item.get('type')!r} is not one of MMAD's nine question types")
    if not isinstance(options, dict) or len(options) < 2 or not set(options) <= set(LETTERS):
        letters = f"{LETTERS[0]} to {LETTERS[-1]}"
        return Rejection(name, f"expected at least two options, each a string labelled with a letter from {letters}")
    if not isinstance(answer, str) or answer not in options:
        return Rejection(name, f"the answer {answer!r} is not one of the options {', '.join(options)}")
    if not isinstance(item.get("Question"), str) or not item["Question"].strip():
        return Rejection(name, "the question has no text")
    return Question(name, inspection, kind, item["Question"], {k: str(v) for k, v in options.items()}, answer)


def _normals(dataset: str, product: str, root: Path) -> Items:
    folder = root / NORMAL_FOLDERS.get(dataset, dataset) / product / "train" / GOOD
    normals = list(list_images(folder))
    if folder.is_dir():
        yield from reject_unused(root, folder, set(normals), "normal images must be directly in it")
    for path in normals:
        image = path.relative_to(root).as_posix()
        yield Inspection(
            id=image, image=image, dataset=dataset, product=product, condition=GOOD, group=image, split="train"
        )
    if not normals:
        yield Rejection(folder.relative_to(root).as_posix(), "the folder contains no normal image of this product")
