"""MVTec LOCO AD (Bergmann et al., IJCV 2022): five products with structural and logical defects.

Dents are structural defects, for example, and missing or surplus parts are logical ones.

Layout: the same as for `folder`, with train, validation and test. The conditions are `good`, `logical_anomalies` and
`structural_anomalies`. A defective image has a folder of masks, `ground_truth/<condition>/<stem>/000.png` and so on:
one per defect, or per place where a missing part could be. They count as one mask here.
"""

from __future__ import annotations

from data_prep.sources import Items, SourceConfig
from data_prep.sources.folder import read_folder_layout


def read(config: SourceConfig) -> Items:
    """Yield the images of all products under the root, with the dataset's own three splits."""
    yield from read_folder_layout(config.root, "MVTec-LOCO", companions=("defects_config.json",))
