"""Small drawn datasets in the exact layout of each dataset that data_prep reads."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.sources import SourceConfig
from echo_ft.records import Inspection, Question, Rejection

SIZE = (32, 24)


def draw(path: Path, grey: int = 90, size: tuple[int, int] = SIZE) -> Path:
    """Draw a uniform grey image of (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path)
    return path


def draw_mask(path: Path, box: tuple[int, int, int, int] = (4, 6, 12, 10), value: int = 255) -> Path:
    """Draw a mask that marks the box (x0, y0, x1, y1), without its last row and column, with `value`."""
    marks = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    x0, y0, x1, y1 = box
    marks[y0:y1, x0:x1] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(marks).save(path)
    return path


def split_items(items) -> tuple[list[Inspection], list[Question], list[Rejection]]:
    """Split the items of a source into inspections, questions and rejections."""
    items = list(items)
    return tuple([item for item in items if isinstance(item, cls)] for cls in (Inspection, Question, Rejection))


def write_csv(path: Path, rows: list[dict], columns: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@dataclass(frozen=True)
class DatasetLayout:
    """A drawn dataset: its source config, and (condition, split) of every image."""

    config: SourceConfig
    images: dict[str, tuple[str, str | None]]
    masked: tuple[str, ...]
    """The images with a mask, polygon or box in their records."""
    groups: int | None = None
    """Number of physical parts, if that differs from the number of images."""


def mvtec_ad(folder: Path) -> DatasetLayout:
    root = folder / "mvtec_anomaly_detection"
    for product, defects in (("bottle", ("broken_large", "contamination")), ("cable", ("bent_wire", "combined"))):
        for number in range(3):
            draw(root / product / "train" / "good" / f"{number:03d}.png")
        for condition in ("good", *defects):
            draw(root / product / "test" / condition / "000.png")
            if condition != "good":
                draw_mask(root / product / "ground_truth" / condition / "000_mask.png")
        for name in ("license.txt", "readme.txt"):
            (root / product / name).write_text("CC BY-NC-SA 4.0")
    (root / "license.txt").write_text("CC BY-NC-SA 4.0")
    found = {f"{p}/train/good/{n:03d}.png": ("good", "train") for p in ("bottle", "cable") for n in range(3)}
    tests = (
        "bottle/good",
        "bottle/broken_large",
        "bottle/contamination",
        "cable/good",
        "cable/bent_wire",
        "cable/combined",
    )
    for product, condition in (name.split("/") for name in tests):
        found[f"{product}/test/{condition}/000.png"] = (condition, "test")
    masked = tuple(name for name, (condition, _) in found.items() if condition != "good")
    return DatasetLayout(SourceConfig(root), found, masked)


def mvtec_loco(folder: Path) -> DatasetLayout:
    root = folder / "mvtec_loco_anomaly_detection"
    product = root / "breakfast_box"
    for place in ("train/good/000", "train/good/001", "validation/good/000", "test/good/000"):
        draw(product / f"{place}.png")
    for condition, number, count in (
        ("logical_anomalies", 0, 2),
        ("logical_anomalies", 1, 1),
        ("structural_anomalies", 0, 3),
    ):
        draw(product / "test" / condition / f"{number:03d}.png")
        for index in range(count):  # pixel values encode the defect type, as in defects_config.json
            box = (4 + 8 * index, 6, 8 + 8 * index, 10)
            draw_mask(product / "ground_truth" / condition / f"{number:03d}" / f"{index:03d}.png", box, 255 - index)
    write_json(product / "defects_config.json", [{"defect_name": "missing_almonds", "pixel_value": 255}])
    for name in ("license.txt", "readme.txt"):
        (product / name).write_text("CC BY-NC-SA 4.0")
    images = {
        "breakfast_box/train/good/000.png": ("good", "train"),
        "breakfast_box/train/good/001.png": ("good", "train"),
        "breakfast_box/validation/good/000.png": ("good", "validation"),
        "breakfast_box/test/good/000.png": ("good", "test"),
        "breakfast_box/test/logical_anomalies/000.png": ("logical_anomalies", "test"),
        "breakfast_box/test/logical_anomalies/001.png": ("logical_anomalies", "test"),
        "breakfast_box/test/structural_anomalies/000.png": ("structural_anomalies", "test"),
    }
    return DatasetLayout(SourceConfig(root), images, tuple(p for p, (c, _) in images.items() if c != "good"))


VISA_COLUMNS = ["object", "split", "label", "image", "mask"]


def visa(folder: Path) -> DatasetLayout:
    root = folder / "VisA"
    rows, images = [], {}
    for product, labels in (("candle", ("wax melded out of the candle", "other")), ("pcb1", ("melt", "bent,melt"))):
        kinds = []
        for number, split in enumerate(("train", "train", "test")):
            image = f"{product}/Data/Images/Normal/{number:04d}.JPG"
            draw(root / image)
            rows.append({"object": product, "split": split, "label": "normal", "image": image, "mask": ""})
            kinds.append({"image": image, "label": "normal", "mask": ""})
            images[image] = ("good", split)
        for number, label in enumerate(labels):
            image, mask = (f"{product}/Data/{kind}/Anomaly/{number:03d}" for kind in ("Images", "Masks"))
            draw(root / f"{image}.JPG")
            draw_mask(root / f"{mask}.png", value=1 + number)  # VisA masks number the defect types
            row = {"image": f"{image}.JPG", "mask": f"{mask}.png"}
            rows.append({"object": product, "split": "test", "label": "anomaly", **row})
            kinds.append({"label": label, **row})
            images[f"{image}.JPG"] = (label.replace(",", "+"), "test")
        write_csv(root / product / "image_anno.csv", kinds, ["image", "label", "mask"])
    for name in ("1cls", "2cls_fewshot", "2cls_highshot"):
        listed = rows if name == "1cls" else [row for row in rows if row["object"] == "candle"]
        write_csv(root / "split_csv" / f"{name}.csv", listed, VISA_COLUMNS)
    (root / "LICENSE-DATASET").write_text("CC BY 4.0")
    return DatasetLayout(SourceConfig(root), images, tuple(name for name in images if "Anomaly" in name))


def goods_ad(folder: Path) -> DatasetLayout:
    root = folder / "GoodsAD"
    images = {}
    for product, condition in (("drink_can", "straw_missing"), ("cigarette_box", "opened")):
        for place, split in (("train/good", "train"), ("test/good", "test"), (f"test/{condition}", "test")):
            for name in ("001_001", "002_001"):
                image = f"{product}/{place}/{name}.jpg"
                draw(root / image)
                images[image] = (place.split("/")[1], split)
                if condition in place:
                    draw_mask(root / product / "ground_truth" / condition / f"{name}.png")
    return DatasetLayout(SourceConfig(root), images, tuple(p for p, (c, _) in images.items() if c != "good"))


REAL_IAD_CODES = {"OK": "good", "AK": "pit", "QS": "missing_parts"}


def real_iad(folder: Path) -> DatasetLayout:
    """Two products of three samples with three views each. In one view of a defective sample, the defect is hidden."""
    root = folder / "Real-IAD" / "realiad_1024"
    images, masked = {}, []
    for product, code in (("audiojack", "AK"), ("toy_brick", "QS")):
        lists: dict[str, list[dict]] = {"train": [], "test": []}
        for number, split, kind in ((1, "train", "OK"), (2, "test", "OK"), (1, "test", code)):
            place = f"OK/S{number:04d}" if kind == "OK" else f"NG/{kind}/S{number:04d}"
            sample = f"{place}/{product}_{number:04d}_{'OK' if kind == 'OK' else f'NG_{kind}'}"
            for view in (1, 2, 3):
                image = f"{sample}_C{view}_2023102114250{view}.jpg"
                draw(root / product / image)
                shows = kind != "OK" and view != 3
                mask = image.replace(".jpg", ".png") if shows else None
                if mask:
                    draw_mask(root / product / mask)
                    masked.append(f"{product}/{image}")
                anomaly = kind if shows else "OK"
                row = {"category": product, "anomaly_class": anomaly, "image_path": image, "mask_path": mask}
                lists[split].append(row)
                images[f"{product}/{image}"] = (REAL_IAD_CODES[anomaly], split)
        meta = {"prefix": f"{product}/", "normal_class": "OK", "pre_transform": None}
        write_json(root.parent / "realiad_jsons" / f"{product}.json", {"meta": meta, **lists})
    return DatasetLayout(SourceConfig(root), images, tuple(masked), groups=6)


def btad(folder: Path) -> DatasetLayout:
    root = folder / "BTech_Dataset_transformed"
    images = {}
    for product, suffix, mask in (("01", "bmp", "png"), ("02", "png", "png"), ("03", "bmp", "bmp")):
        for place, split in (("train/ok", "train"), ("test/ok", "test"), ("test/ko", "test")):
            image = f"{product}/{place}/0000.{suffix}"
            draw(root / image)
            images[image] = ("good" if "ok" in place else "defective", split)
        draw_mask(root / product / "ground_truth" / "ko" / f"0000.{mask}")
    (root / "README.txt").write_text("CC BY-SA")
    return DatasetLayout(SourceConfig(root), images, tuple(name for name in images if "/ko/" in name))


def mpdd(folder: Path) -> DatasetLayout:
    root = folder / "MPDD"
    images = {}
    for product, conditions in (
        ("bracket_brown", {"parts_mismatch": "parts_mismatch", "bend_and_parts_mismatch": "bend+parts_mismatch"}),
        ("metal_plate", {"scratches": "scratches"}),
    ):
        for place in ("train/good", "test/good", *(f"test/{name}" for name in conditions)):
            split, name = place.split("/")
            draw(root / product / place / "000.png")
            images[f"{product}/{place}/000.png"] = (conditions.get(name, name), split)
            if name in conditions:
                draw_mask(root / product / "ground_truth" / name / "000_mask.png")
    return DatasetLayout(SourceConfig(root), images, tuple(p for p, (c, _) in images.items() if c != "good"))


def folder(folder: Path) -> DatasetLayout:
    layout = mvtec_ad(folder)
    draw(layout.config.root / "cable" / "val" / "good" / "000.png")
    images = {**layout.images, "cable/val/good/000.png": ("good", "validation")}
    return DatasetLayout(layout.config, images, layout.masked)


def mmad_row(image: str, mask: str | None, templates: list[str], kind: str = "Anomaly Detection", answer: str = "A"):
    question = {"Question": "Is there any defect in the object?", "Answer": answer, "type": kind}
    question["Options"] = {"A": "Yes.", "B": "No."}
    row = {"image_path": image, "mask_path": mask, "conversation": [question], "random_templates": templates}
    return {**row, "similar_templates": []}


def mmad(folder: Path) -> DatasetLayout:
    """One query from each of MMAD's layouts, and two normal images per product."""
    rows = {
        "DS-MVTec/bottle/image/broken_large/000.png": mmad_row(
            "image/broken_large/000.png",
            "rbg_mask/broken_large/000_rbg_mask.png",
            ["MVTec-AD/bottle/train/good/001.png", "MVTec-AD/bottle/train/good/000.png"],
        ),
        "DS-MVTec/bottle/image/good/000.png": mmad_row("image/good/000.png", None, [], "Object Structure"),
        "MVTec-LOCO/pushpins/test/logical_anomalies/003.png": mmad_row(
            "test/logical_anomalies/003.png", "ground_truth/logical_anomalies/003/000.png", []
        ),
        "VisA/candle/test/bad/000.JPG": mmad_row("test/bad/000.JPG", "ground_truth/bad/000.png", [], "Object Details"),
        "GoodsAD/drink_can/test/opened/001_002.jpg": mmad_row("test/opened/001_002.jpg", None, []),
    }
    images = {}
    for key, row in rows.items():
        draw(folder / key)
        images[key] = (key.split("/")[-2], "test")
        if row["mask_path"]:
            draw_mask(folder / "/".join(key.split("/")[:2]) / row["mask_path"])
    for place in ("MVTec-AD/bottle", "MVTec-LOCO/pushpins", "VisA/candle", "GoodsAD/drink_can"):
        for number in range(2):
            image = f"{place}/train/good/{number:03d}{'.JPG' if 'VisA' in place else '.png'}"
            draw(folder / image)
            images[image] = ("good", "train")
    write_json(folder / "mmad.json", rows)
    masked = tuple(key for key, row in rows.items() if row["mask_path"])
    return DatasetLayout(SourceConfig(folder, folder / "mmad.json"), images, masked)


def magnetic_tile(folder: Path) -> DatasetLayout:
    images, masked = {}, []
    for kind, condition, numbers in (("MT_Free", "good", (100, 150, 999)), ("MT_Crack", "crack", (210, 271))):
        for exposure, number in enumerate(numbers, start=1):
            image = f"{kind}/Imgs/exp{exposure}_num_{number}.jpg"
            draw(folder / image)
            draw_mask(folder / image.replace(".jpg", ".png"), value=0 if condition == "good" else 255)
            images[image] = (condition, None)
            masked.append(image)
    (folder / "README.md").write_text("cite the paper")
    return DatasetLayout(SourceConfig(folder), images, tuple(masked), groups=3)


def manifest(folder: Path) -> DatasetLayout:
    rows = []
    for number, (condition, split) in enumerate((("good", "train"), ("dent", "test"), ("bent+melt", ""))):
        row = {"image": f"photos/{number}.png", "product": "cap", "condition": condition, "split": split, "mask": ""}
        draw(folder / row["image"])
        if condition != "good":
            row["mask"] = f"masks/{number}.png"
            draw_mask(folder / row["mask"])
        rows.append(row)
    path = write_csv(folder / "parts.csv", rows, list(rows[0]))
    images = {row["image"]: (row["condition"], row["split"] or None) for row in rows}
    return DatasetLayout(SourceConfig(folder, path), images, tuple(row["image"] for row in rows if row["mask"]))


SQUARE = [4.0, 6.0, 11.0, 6.0, 11.0, 9.0, 4.0, 9.0]
"""The outline of the default region of `draw_mask`, as COCO stores it."""


def coco(folder: Path) -> DatasetLayout:
    names = ["cap/0.jpg", "cap/1.jpg", "ring/2.jpg", "3.jpg"]
    images = [{"id": 10 + i, "file_name": name, "width": SIZE[0], "height": SIZE[1]} for i, name in enumerate(names)]
    for name in names:
        draw(folder / name)
    box = {"bbox": [4, 6, 8, 4], "area": 32, "iscrowd": 0}
    annotations = [
        {"id": 1, "image_id": 11, "category_id": 1, "segmentation": [SQUARE], **box},
        {"id": 2, "image_id": 12, "category_id": 1, **box},
        {"id": 3, "image_id": 13, "category_id": 2, "segmentation": [SQUARE, [20, 2, 24, 2, 20, 6]], **box},
        {"id": 4, "image_id": 13, "category_id": 1, "segmentation": [], **box},
    ]
    categories = [{"id": 1, "name": "dent", "supercategory": "defect"}, {"id": 2, "name": "crack"}]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    path = write_json(folder / "instances.json", content)
    conditions = dict(zip(names, ("good", "dent", "dent", "crack+dent"), strict=True))
    return DatasetLayout(SourceConfig(folder, path), {n: (c, None) for n, c in conditions.items()}, tuple(names[1:]))


def labelme_file(image: str, shapes: list[tuple[str, str, list]], size: tuple[int, int] = SIZE) -> dict:
    """Return the content of a labelme file. Shapes are (label, shape_type, points)."""
    rows = [
        {
            "label": label,
            "points": points,
            "group_id": None,
            "description": "",
            "shape_type": kind,
            "flags": {},
            "mask": None,
        }
        for label, kind, points in shapes
    ]
    content = {"version": "5.5.0", "flags": {}, "shapes": rows, "imagePath": image, "imageData": None}
    return {**content, "imageHeight": size[1], "imageWidth": size[0]}


def labelme(folder: Path) -> DatasetLayout:
    square = [[4, 6], [11, 6], [11, 9], [4, 9]]
    files = {
        "cap/0": ("0.png", []),
        "cap/1": ("1.png", [("dent", "polygon", square)]),
        "cap/2": ("2.png", [("dent", "rectangle", [[4, 6], [12, 10]])]),
        "labels/3": ("..\\ring\\3.png", [("crack", "circle", [[16, 12], [20, 12]]), ("dent", "polygon", square)]),
    }
    for name, (image, shapes) in files.items():
        draw(folder / name.split("/")[0] / image.replace("\\", "/"))
        write_json(folder / f"{name}.json", labelme_file(image, shapes))
    (folder / "labels" / "labels.txt").write_text("dent\ncrack\n")
    images = {"cap/0.png": "good", "cap/1.png": "dent", "cap/2.png": "dent", "ring/3.png": "crack+dent"}
    return DatasetLayout(SourceConfig(folder), {n: (c, None) for n, c in images.items()}, tuple(images)[1:])


LAYOUTS: dict[str, Callable[[Path], DatasetLayout]] = {
    "btad": btad,
    "folder": folder,
    "goods_ad": goods_ad,
    "magnetic_tile": magnetic_tile,
    "manifest": manifest,
    "manifest-coco": coco,
    "manifest-labelme": labelme,
    "mmad": mmad,
    "mpdd": mpdd,
    "mvtec_ad": mvtec_ad,
    "mvtec_loco": mvtec_loco,
    "real_iad": real_iad,
    "visa": visa,
}
"""Source, with its format if it reads several, to the function that draws its layout. `synthetic` needs none."""
