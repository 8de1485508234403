"""MVTec AD (Bergmann et al., CVPR 2019): 15 products and textures, 73 defect types, a mask for each defect.

Layout: the same as for `folder`, with `<product>/ground_truth/<condition>/<stem>_mask.png`. The train split has only
normal parts. `combined` (cable, pill, wood, zipper) shows several defects at once without naming them.
"""

from __future__ import annotations

from data_prep.sources import Items, SourceConfig
from data_prep.sources.folder import read_folder_layout


def read(config: SourceConfig) -> Items:
    """Yield the images of all products under the root, with the dataset's own train and test splits."""
    yield from read_folder_layout(config.root, "MVTec-AD")
