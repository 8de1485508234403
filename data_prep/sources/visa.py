"""VisA (Zou et al., ECCV 2022, arXiv 2207.14315): 12 products, listed by its CSV files, with masks.

Layout: `<product>/Data/Images/{Normal,Anomaly}/<name>.JPG`, masks `<product>/Data/Masks/Anomaly/<name>.png`, and
`split_csv/1cls.csv`, `2cls_fewshot.csv` or `2cls_highshot.csv` with the columns object, split, label, image, mask.
`annotations` chooses one of them; by default it is `1cls.csv`, whose train split holds normal parts alone.

The split files say `anomaly`; what kind it is stands in `<product>/image_anno.csv` (image, label, mask), where
`bent,melt` are two kinds in one photograph. Without that file a defect has no name.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_prep.sources import UNNAMED, ItemPlace, Items, RowError, SourceConfig, entries, locate, passed_over, unlisted
from echo_ft.data.splits import join_kinds
from echo_ft.errors import EchoError
from echo_ft.records import GOOD, Inspection, Rejection

SPLIT_FILES = "split_csv"
KINDS = "image_anno.csv"


def read(config: SourceConfig) -> Items:
    """The photographs of one split file, with its splits; raises EchoError where it is missing or another file."""
    root = config.root
    path = config.annotations or root / SPLIT_FILES / "1cls.csv"
    rows = list(_rows(path, ("object", "split", "label", "image", "mask")))
    names = {row["object"] for _, row in rows}
    folders = [folder for folder in entries(root) if folder.is_dir() and folder.name in names]
    kinds = {folder.name: _kinds(folder / KINDS) for folder in folders}
    used = {f"{folder.name}/{KINDS}" for folder in folders}
    for line, row in rows:
        try:
            inspection = _inspection(root, row, kinds.get(row["object"], {}))
        except RowError as error:
            yield Rejection(f"{path.name}:{line}", str(error))
            continue
        used.add(inspection.image)
        yield ItemPlace(inspection.id, f"{path.name}:{line}")
        if row["mask"]:
            try:
                inspection = dataclasses.replace(inspection, mask=locate(root, row["mask"], "mask"))
                used.add(str(inspection.mask))
            except RowError as error:
                yield Rejection(row["mask"], f"{error}; {inspection.image} is used without it", "mask")
        yield inspection
    splits = root / SPLIT_FILES
    yield from passed_over(root, root, [*folders, splits, path], f"{path.name} lists nothing in it", texts=True)
    if splits.is_dir():
        yield from passed_over(root, splits, set(splits.glob("*.csv")), "it is for split files")
    for folder in folders:
        yield from unlisted(root, folder, used, f"belong to no row of {path.name} that can be used")


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with exactly these columns, each with its line number."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey="more", restval="")
            if tuple(reader.fieldnames or ()) != columns:
                raise EchoError(f"{path} has not the columns {', '.join(columns)}; take the file as VisA publishes it")
            for row in reader:
                yield reader.line_num, row
    except FileNotFoundError as error:
        raise EchoError(f"there is no {path}; set root to VisA's folder, which holds {SPLIT_FILES}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EchoError(f"{path} cannot be read as CSV ({error}); download it again") from error


def _kinds(path: Path) -> dict[str, str]:
    """Photograph to the names of its defects, or to `normal`; empty where the product has no such file."""
    return {row["image"]: row["label"] for _, row in _rows(path, ("image", "label", "mask"))} if path.is_file() else {}


def _inspection(root: Path, row: Mapping[str, str], kinds: Mapping[str, str]) -> Inspection:
    if "more" in row:
        raise RowError("it has more than the five columns")
    if row["split"] not in ("train", "test"):
        raise RowError(f"the split {row['split']!r} is neither train nor test")
    if row["label"] not in ("normal", "anomaly"):
        raise RowError(f"the label {row['label']!r} is neither normal nor anomaly")
    image = locate(root, row["image"], "image")
    if not image.startswith(f"{row['object']}/"):
        raise RowError(f"{image} does not lie in the folder of its object {row['object']!r}")
    named = kinds.get(row["image"])
    if named is not None and (named == "normal") != (row["label"] == "normal"):
        raise RowError(f"{image} is {row['label']} there and {named!r} in {row['object']}/{KINDS}")
    defects = [name.strip() for name in (named or UNNAMED).split(",")]
    return Inspection(
        id=image,
        image=image,
        dataset="VisA",
        product=row["object"],
        condition=GOOD if row["label"] == "normal" else join_kinds(defects),
        group=image,
        split=row["split"],
    )
