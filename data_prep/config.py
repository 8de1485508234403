"""The config of a build."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.sources import NAMES


@dataclass(frozen=True)
class BuildConfig:
    """What to build, from what, and how."""

    source: str = field(metadata={"help": f"layout of the raw data: {', '.join(NAMES)} (see data_prep/sources)"})
    output: Path = field(metadata={"help": "dataset folder to write"})
    root: Path | None = field(
        default=None, metadata={"help": "folder that image paths are relative to; by default that of annotations"}
    )
    annotations: Path | None = field(
        default=None,
        metadata={"help": "the list of photographs: mmad.json, a split of VisA, a manifest's CSV, JSONL or COCO JSON"},
    )
    knowledge: Path | None = field(
        default=None,
        metadata={
            "help": "domain knowledge: {dataset: {product: {condition: description}}} in JSON or YAML, or a folder of "
            "such files (python -m data_prep.knowledge)"
        },
    )
    descriptor: str = field(
        default="ViT-B-16/openai",
        metadata={"help": "retrieval features: an open_clip model/weights, or skimage, which needs no weights"},
    )
    k: int = field(default=3, metadata={"help": "references for each photograph"})
    index: Literal["auto", "flat", "hnsw", "ivf_pq"] = field(
        default="auto",
        metadata={
            "help": "how the normals of a product (with scope all: of all products) are searched: flat compares with "
            "every one, hnsw is the paper's, ivf_pq is for very many; auto chooses by their number"
        },
    )
    scope: Literal["product", "all"] = field(
        default="product", metadata={"help": "where references come from: the photograph's product, or all of them"}
    )
    named_references: bool = field(
        default=True, metadata={"help": "use the reference that the source names (MMAD: its 1-shot template), if any"}
    )
    split: Literal["given", "seeded", "by_product", "by_condition", "by_dataset"] = field(
        default="given",
        metadata={
            "help": "keep the source's splits; split everything anew by group; or test on products, kinds of defect "
            "or datasets that training never sees"
        },
    )
    held_out: list[str] = field(
        default_factory=list,
        metadata={"help": "products, conditions or datasets for the test alone; by default the seed draws some"},
    )
    fractions: list[float] = field(
        default_factory=lambda: [0.6, 0.1, 0.3], metadata={"help": "shares of train, validation and test"}
    )
    routing: Literal["full", "paper"] = field(
        default="full", metadata={"help": "which experts stand behind each kind of question"}
    )
    folds: int | None = field(
        default=None,
        metadata={"help": "deal the train split into so many folds, to train without one of them (with fold)"},
    )
    fold: int | None = field(
        default=None,
        metadata={"help": "the fold, from 0, that is not trained on and becomes the split left_out"},
    )
    upstream: Literal["gold", "predicted"] = field(
        default="gold",
        metadata={"help": "what a role is shown of earlier ones: what they should say, or what they said in traces"},
    )
    traces: list[Path] = field(
        default_factory=list,
        metadata={
            "help": "with upstream predicted: folders of runs (evaluation.run) that describe the train and validation "
            "cases by adapters that were not trained on them; of several, the first counts"
        },
    )
    balance: bool = field(
        default=True, metadata={"help": "as many normal as defective cases in each product's training rows"}
    )
    cache: Path | None = field(
        default=None, metadata={"help": "folder that keeps retrieval features between builds (by content of the files)"}
    )
    parts: int = field(default=100, metadata={"help": "parts of each product that the source synthetic draws"})
    seed: int = field(default=0, metadata={"help": "seed of splits, random references, questions and balancing"})
    overwrite: bool = field(
        default=False, metadata={"help": "replace a dataset in output that was built with another config"}
    )

    def settings(self) -> dict[str, Any]:
        """What tells one dataset's config from another's, as JSON can hold it."""
        values = dataclasses.asdict(self)
        for key in ("output", "overwrite", "cache"):
            del values[key]
        values["traces"] = [str(folder) for folder in self.traces]
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
