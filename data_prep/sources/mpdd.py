"""MPDD, Metal Parts Defect Detection (Jezek et al., ICUMT 2021): six metal parts, with masks.

Layout: the same as for `folder`, with `<product>/ground_truth/<condition>/<stem>_mask.png`. One condition combines two
defects. It is renamed to both defects' names, because a split by condition must know them.
"""

from __future__ import annotations

from data_prep.sources import Items, SourceConfig
from data_prep.sources.folder import read_folder_layout
from echo_ft.data.splits import join_defects


def read(config: SourceConfig) -> Items:
    """Yield the images of all products under the root, with the dataset's own train and test splits."""
    both = join_defects(["bend", "parts_mismatch"])
    yield from read_folder_layout(config.root, "MPDD", {"bend_and_parts_mismatch": both})
