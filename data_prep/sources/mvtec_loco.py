"""MVTec LOCO AD (Bergmann et al., IJCV 2022): five products with structural defects, as dents, and logical ones, as
a part that is missing or too many.

Layout: that of `folder` with train, validation and test; the conditions are `good`, `logical_anomalies` and
`structural_anomalies`. A defect has a folder of masks, `ground_truth/<condition>/<stem>/000.png` and so on: one for
each defect of the photograph, or for each place where a missing part could be. Here they count as one mask.
"""

from __future__ import annotations

from data_prep.sources import Items, SourceConfig
from data_prep.sources.folder import read_tree


def read(config: SourceConfig) -> Items:
    """Photographs of the products under the root, with the dataset's own three splits."""
    yield from read_tree(config.root, "MVTec-LOCO", companions=("defects_config.json",))
