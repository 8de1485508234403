"""MPDD, Metal Parts Defect Detection (Jezek et al., ICUMT 2021): six metal parts, with masks.

Layout: that of `folder`, with `<product>/ground_truth/<condition>/<stem>_mask.png`. One condition is two defects at
once and is named by both, as a split by condition has to know.
"""

from __future__ import annotations

from data_prep.sources import Items, SourceConfig
from data_prep.sources.folder import read_tree
from echo_ft.data.splits import join_kinds


def read(config: SourceConfig) -> Items:
    """Photographs of the products under the root, with the dataset's own train and test splits."""
    both = join_kinds(["bend", "parts_mismatch"])
    yield from read_tree(config.root, "MPDD", {"bend_and_parts_mismatch": both})
