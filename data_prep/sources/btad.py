"""BTAD, beanTech Anomaly Detection (Mishra et al., ISIE 2021, arXiv 2104.10036): three products, with masks.

Layout: the same as for `folder`, in `BTech_Dataset_transformed/{01,02,03}`, except that normal parts are in `ok` and
defective parts in `ko`. Masks are `ground_truth/ko/<stem>.png` or `.bmp`. BTAD does not name its defects.
"""

from __future__ import annotations

from data_prep.sources import UNNAMED_DEFECT, Items, SourceConfig
from data_prep.sources.folder import read_folder_layout
from echo_ft.records import GOOD


def read(config: SourceConfig) -> Items:
    """Yield the images of all products under the root, with the dataset's own train and test splits."""
    yield from read_folder_layout(config.root, "BTAD", {"ok": GOOD, "ko": UNNAMED_DEFECT})
