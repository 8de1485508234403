"""VisA (Zou et al., ECCV 2022, arXiv 2207.14315): 12 products, listed by its CSV files, with masks.

Layout: `<product>/Data/Images/{Normal,Anomaly}/<name>.JPG`, masks `<product>/Data/Masks/Anomaly/<name>.png`, and
`split_csv/1cls.csv`, `2cls_fewshot.csv` or `2cls_highshot.csv` with the columns object, split, label, image, mask.
`annotations` selects one of these files. The default is `1cls.csv`, whose train split has only normal parts.

The split files only say `anomaly`. `<product>/image_anno.csv` (image, label, mask) has the names of the defects;
`bent,melt` means two defects in one image. Without this file, defects have no names.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_prep.sources import (
    UNNAMED_DEFECT,
    ItemPlace,
    Items,
    RowError,
    SourceConfig,
    locate,
    reject_unlisted,
    reject_unused,
)
from echo_ft.data.splits import join_defects
from echo_ft.errors import EchoError
from echo_ft.files import list_folder
from echo_ft.inputs import lines, open_text
from echo_ft.records import GOOD, Inspection, Rejection

SPLIT_FILES = "split_csv"
DEFECT_NAMES_FILE = "image_anno.csv"


def read(config: SourceConfig) -> Items:
    """Yield the images and splits that one split file lists. Raises EchoError if the file is missing or malformed."""
    root = config.root
    path = config.annotations or root / SPLIT_FILES / "1cls.csv"
    rows = list(_rows(path, ("object", "split", "label", "image", "mask")))
    names = {row["object"] for _, row in rows}
    folders = [folder for folder in list_folder(root) if folder.is_dir() and folder.name in names]
    defect_names = {folder.name: _defect_names(folder / DEFECT_NAMES_FILE) for folder in folders}
    used = {f"{folder.name}/{DEFECT_NAMES_FILE}" for folder in folders}
    for line, row in rows:
        yield ItemPlace(row["image"], f"{path.name}:{line}")
        try:
            inspection = _inspection(root, row, defect_names.get(row["object"], {}))
        except RowError as error:
            yield Rejection(f"{path.name}:{line}", str(error))
            continue
        used.add(inspection.image)
        if row["mask"]:
            try:
                inspection = dataclasses.replace(inspection, mask=locate(root, row["mask"], "mask"))
                used.add(str(inspection.mask))
            except RowError as error:
                yield Rejection(row["mask"], f"{error}; {inspection.image} is used without it", "mask")
        yield inspection
    splits = root / SPLIT_FILES
    yield from reject_unused(root, root, [*folders, splits, path], f"{path.name} lists nothing in it", allow_text=True)
    if splits.is_dir():
        lists = {path for path in list_folder(splits) if path.suffix == ".csv"}
        yield from reject_unused(root, splits, lists, "this folder should contain only split files")
    for folder in folders:
        yield from reject_unlisted(root, folder, used, f"no usable row of {path.name} lists them")


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the line number and cells of each row of a CSV file.

    Raises EchoError if the file is missing, cannot be parsed or has unexpected columns.
    """
    if not path.is_file():
        raise EchoError(f"there is no file {path}; set root to VisA's folder, which contains {SPLIT_FILES}")
    try:
        with open_text(path, "utf-8-sig", newline="") as file:
            reader = csv.DictReader(lines(file), restkey="more", restval="")
            if tuple(reader.fieldnames or ()) != columns:
                raise EchoError(
                    f"{path} does not have the columns {', '.join(columns)}; use the file that VisA publishes"
                )
            for row in reader:
                yield reader.line_num, row
    except (OSError, ValueError, csv.Error) as error:
        raise EchoError(f"{path} cannot be read as CSV ({error}); download it again") from error


def _defect_names(path: Path) -> dict[str, str]:
    """Return the defect names, or `normal`, of each image. Empty if the product has no file with these names."""
    names: dict[str, str] = {}
    for _, row in _rows(path, ("image", "label", "mask")) if path.is_file() else ():
        names[row["image"]] = ",".join(filter(None, (names.get(row["image"]), row["label"])))
    return names


def _inspection(root: Path, row: Mapping[str, str], defect_names: Mapping[str, str]) -> Inspection:
    if "more" in row:
        raise RowError("it has more than five columns")
    if row["split"] not in ("train", "test"):
        raise RowError(f"the split {row['split']!r} is neither train nor test")
    if row["label"] not in ("normal", "anomaly"):
        raise RowError(f"the label {row['label']!r} is neither normal nor anomaly")
    image = locate(root, row["image"], "image")
    if not image.startswith(f"{row['object']}/"):
        raise RowError(f"{image} is not in the folder of its object {row['object']!r}")
    named = defect_names.get(row["image"])
    defects = {name.strip() for name in (named or UNNAMED_DEFECT).split(",")}
    agrees = defects == {"normal"} if row["label"] == "normal" else "normal" not in defects
    if named is not None and not agrees:
        raise RowError(f"{image} is {row['label']} here but {named!r} in {row['object']}/{DEFECT_NAMES_FILE}")
    return Inspection(
        id=image,
        image=image,
        dataset="VisA",
        product=row["object"],
        condition=GOOD if row["label"] == "normal" else join_defects(defects),
        group=image,
        split=row["split"],
    )
