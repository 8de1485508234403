"""BTAD, beanTech Anomaly Detection (Mishra et al., ISIE 2021, arXiv 2104.10036): three products, with masks.

Layout: that of `folder` in `BTech_Dataset_transformed/{01,02,03}`, but normal parts are `ok` and defective ones `ko`;
masks are `ground_truth/ko/<stem>.png` or `.bmp`. BTAD does not name its defects.
"""

from __future__ import annotations

from data_prep.sources import UNNAMED, Items, SourceConfig
from data_prep.sources.folder import read_tree
from echo_ft.records import GOOD


def read(config: SourceConfig) -> Items:
    """Photographs of the products under the root, with the dataset's own train and test splits."""
    yield from read_tree(config.root, "BTAD", {"ok": GOOD, "ko": UNNAMED})
