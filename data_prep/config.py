"""Options of a build."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.sources import SOURCE_NAMES
from echo_ft.tracking import REPORT_TO


@dataclass(frozen=True)
class BuildConfig:
    """Options of `python -m data_prep.build`."""

    source: str = field(
        metadata={"help": f"Layout of the raw data: {', '.join(SOURCE_NAMES)} (see data_prep/sources)."}
    )
    output: Path = field(metadata={"help": "Dataset folder to write."})
    root: Path | None = field(
        default=None, metadata={"help": "Folder that image paths are relative to; by default that of annotations."}
    )
    annotations: Path | None = field(
        default=None,
        metadata={
            "help": "File that lists the images: mmad.json, a VisA split, or a manifest as CSV, JSONL, COCO JSON or "
            "Label Studio JSON."
        },
    )
    good: list[str] | None = field(
        default=None,
        metadata={
            "help": "Words in the manifest, annotations or folder names that mean a part without a defect, besides "
            "good."
        },
    )
    frame: int | None = field(
        default=None,
        metadata={
            "help": "Index (from 0) of the frame to use from each image file. Without it, every file must have a "
            "single frame. A manifest may name a frame per image: stack.tif#frame=2."
        },
    )
    corrections: Path | None = field(
        default=None,
        metadata={
            "help": "Reviewed truth that replaces the source's: Label Studio JSON or COCO JSON, exported by "
            "evaluation.export_review and corrected."
        },
    )
    knowledge: Path | None = field(
        default=None,
        metadata={
            "help": "Domain knowledge: {dataset: {product: {condition: description}}} as JSON or YAML, or a folder of "
            "such files (see python -m data_prep.knowledge)."
        },
    )
    descriptor: str = field(
        default="ViT-B-16/openai",
        metadata={"help": "Image descriptor for retrieval: an open_clip model/weights, or skimage (needs no weights)."},
    )
    k: int = field(default=3, metadata={"help": "Number of references per image."})
    index: Literal["auto", "flat", "hnsw", "ivf_pq"] = field(
        default="auto",
        metadata={
            "help": "Search index over the normal images of a product, or of all products (scope all). flat "
            "compares with every image, hnsw is the paper's, ivf_pq suits millions; auto chooses by their count."
        },
    )
    scope: Literal["product", "all"] = field(
        default="product", metadata={"help": "Where references come from: the image's own product, or all products."}
    )
    named_references: bool = field(
        default=True, metadata={"help": "Use the reference that the source gives (MMAD: its 1-shot template), if any."}
    )
    split: Literal["given", "seeded", "by_product", "by_condition", "by_dataset"] = field(
        default="given",
        metadata={
            "help": "Keep the splits of the source, re-split everything by group, or test on products, defect types or "
            "datasets that training never sees."
        },
    )
    held_out: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Products, conditions or datasets for the test split only. By default, some are drawn with the "
            "seed."
        },
    )
    fractions: list[float] = field(
        default_factory=lambda: [0.6, 0.1, 0.3], metadata={"help": "Fractions of train, validation and test."}
    )
    routing: Literal["full", "paper"] = field(
        default="full", metadata={"help": "Experts to consult for each question type."}
    )
    grounding: bool = field(
        default=False, metadata={"help": "Also ask for the boxes of the defects (question type Defect Grounding)."}
    )
    unanswerable: float = field(
        default=0.0,
        metadata={
            "help": "Fraction of the images, from 0 to 1, with an extra question about another product or an absent "
            "defect (question type Unanswerable), and a similar question that fits (Answerable)."
        },
    )
    folds: int | None = field(
        default=None,
        metadata={"help": "Divide the train split into this many folds, to train without one of them (with fold)."},
    )
    fold: int | None = field(
        default=None,
        metadata={"help": "Index (from 0) of the fold to exclude from training; it becomes the split left_out."},
    )
    upstream: Literal["gold", "predicted"] = field(
        default="gold",
        metadata={"help": "Outputs from earlier roles to show to a role: gold, or predicted (from traces)."},
    )
    traces: list[Path] = field(
        default_factory=list,
        metadata={
            "help": "Run folders written by evaluation.run, for upstream predicted. Together they must cover the "
            "train and validation cases with adapters that were not trained on them; if several cover a case, the "
            "first is used."
        },
    )
    balance: bool = field(
        default=True, metadata={"help": "Train on as many normal as defective cases for each product."}
    )
    cache: Path | None = field(
        default=None,
        metadata={"help": "Folder that keeps image descriptors between builds, keyed by file content."},
    )
    parts: int = field(default=100, metadata={"help": "Parts per product that the source synthetic draws."})
    seed: int = field(default=0, metadata={"help": "Seed for splits, random references, questions and balancing."})
    allow_links: bool = field(default=False, metadata={"help": "Follow links to images and masks outside the root."})
    strict: bool = field(
        default=False, metadata={"help": "Exit with status 3 if anything is rejected. The dataset is still written."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace a dataset in output that was built with a different config."}
    )
    report_to: str = field(default="none", metadata=REPORT_TO)

    def dataset_options(self) -> dict[str, Any]:
        """Return the options that determine the dataset, as types that JSON can hold."""
        values = dataclasses.asdict(self)
        for key in ("output", "overwrite", "cache", "report_to", "strict"):
            del values[key]
        if not self.allow_links:  # datasets of older versions do not have these options
            del values["allow_links"]
        if self.frame is None:
            del values["frame"]
        values["traces"] = [str(folder) for folder in self.traces]
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
