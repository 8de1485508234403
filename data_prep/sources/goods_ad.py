"""GoodsAD (Zhang et al., RA-L 2024, arXiv 2307.04956): six categories of supermarket goods, 484 goods, with masks.

Layout: the same as for `folder`, with `<category>/ground_truth/<condition>/<stem>.png`. Files are named
`<goods>_<number>.jpg`. The dataset does not say which images show the same item, so each image is its own group. The
category is the product, and retrieval finds a normal reference of the same goods by visual similarity.
"""

from __future__ import annotations

from data_prep.sources import Items, SourceConfig
from data_prep.sources.folder import read_folder_layout


def read(config: SourceConfig) -> Items:
    """Yield the images of all categories under the root, with the dataset's own train and test splits."""
    yield from read_folder_layout(config.root, "GoodsAD")
