"""GoodsAD (Zhang et al., RA-L 2024, arXiv 2307.04956): six categories of supermarket goods, 484 goods, with masks.

Layout: that of `folder`, with `<category>/ground_truth/<condition>/<stem>.png`. A file is named `<goods>_<number>.jpg`;
which photographs show one and the same item is not known, so each is a group of its own, and the category is the
product: a normal reference of the same goods is found by its looks.
"""

from __future__ import annotations

from data_prep.sources import Items, SourceConfig
from data_prep.sources.folder import read_tree


def read(config: SourceConfig) -> Items:
    """Photographs of the categories under the root, with the dataset's own train and test splits."""
    yield from read_tree(config.root, "GoodsAD")
