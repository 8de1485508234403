"""MVTec AD (Bergmann et al., CVPR 2019): 15 products and textures, 73 kinds of defect, each defect with its mask.

Layout: that of `folder`, with `<product>/ground_truth/<condition>/<stem>_mask.png`. The train split holds normal parts
alone. `combined` (cable, pill, wood, zipper) shows several defects of its product at once without saying which.
"""

from __future__ import annotations

from data_prep.sources import Items, SourceConfig
from data_prep.sources.folder import read_tree


def read(config: SourceConfig) -> Items:
    """Photographs of the products under the root, with the dataset's own train and test splits."""
    yield from read_tree(config.root, "MVTec-AD")
