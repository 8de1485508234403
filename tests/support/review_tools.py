"""Load an exported review with Label Studio's SDK, pycocotools or FiftyOne, each in its own environment.

`PYTHON -m tests.support.review_tools NAME FOLDER` prints one line of JSON about what the tool has read. PYTHON is the
interpreter of the tool's environment: `pip install label-studio-sdk`, `pip install pycocotools` or
`pip install fiftyone`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock


def labelstudio(folder: Path) -> dict[str, Any]:
    """The faults that Label Studio's SDK finds, and its numbers of tasks, regions and tasks with outlines for COCO."""
    from label_studio_sdk.label_interface import LabelInterface

    interface = LabelInterface((folder / "config.xml").read_text(encoding="utf-8"))
    interface.validate()
    tasks = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
    errors = []
    for task in tasks:
        missing = [one.value_name for one in interface.objects if task["data"].get(one.value_name) is None]
        errors += [f"task {task['id']} has no {name}" for name in missing]
        errors += [text for one in task["annotations"] for text in interface._validate_object_logic(one)]
        errors += [text for one in task["predictions"] for text in interface.validate_prediction(one, True)]
    regions = sum(len(one["result"]) for task in tasks for one in task["annotations"])
    return {"errors": errors, "images": len(tasks), "regions": regions}


def coco(folder: Path) -> dict[str, Any]:
    """The images and boxes that pycocotools reads, and the pixels of its masks."""
    from pycocotools.coco import COCO

    loaded = COCO(str(folder / "instances.json"))
    shapes = [one for one in loaded.loadAnns(loaded.getAnnIds()) if "bbox" in one]
    outlined = [one for one in shapes if one["segmentation"]]
    return {
        "images": len(loaded.getImgIds()),
        "boxes": [one["bbox"] for one in shapes],
        "mask_pixels": [int(loaded.annToMask(one).sum()) for one in outlined],
    }


def fiftyone(folder: Path) -> dict[str, Any]:
    """The samples that FiftyOne's own importer reads. A dataset in FiftyOne would also need MongoDB."""
    import mongoengine
    import pymongo

    # fiftyone (1.22) connects to MongoDB when it is imported.
    pymongo.MongoClient = mongoengine.connect = MagicMock()  # type: ignore[misc]
    import fiftyone.core.odm as odm

    odm.establish_db_conn = odm.database.establish_db_conn = lambda config: None
    from fiftyone.utils.data.importers import LegacyFiftyOneDatasetImporter

    importer = LegacyFiftyOneDatasetImporter(dataset_dir=str(folder))
    importer.setup()
    samples = list(importer)
    return {
        "images": len(samples),
        "tags": sum(len(sample.tags) for sample in samples),
        "boxes": [one.bounding_box for sample in samples for one in sample.ground_truth.detections],
    }


if __name__ == "__main__":
    os.environ["FIFTYONE_DO_NOT_TRACK"] = "true"
    print(json.dumps({"labelstudio": labelstudio, "coco": coco, "fiftyone": fiftyone}[sys.argv[1]](Path(sys.argv[2]))))
