"""Apply corrections of a source's truth, exported from Label Studio or as COCO after a review.

`evaluation.export_review` writes the files that people correct. A corrected file contains the condition and the
outlines of each reviewed image. If nobody has moved the outlines, the record keeps the marks from its source, including
the mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from data_prep.sources import SourceConfig
from data_prep.sources._coco import read_coco
from data_prep.sources._labelstudio import NOT_ANNOTATED, is_task_list, read_labelstudio
from data_prep.truth import SourceRecords, merge_records
from echo_ft.errors import EchoError
from echo_ft.images.masks import is_marked
from echo_ft.images.outlines import Outlines, outlines_of, same_outlines
from echo_ft.records import GOOD, Inspection, Rejection
from echo_ft.terminal import LOGGER


def apply_corrections(records: SourceRecords, path: Path, config: SourceConfig) -> SourceRecords:
    """Return the records with the conditions and outlines of a corrected file.

    Products, groups, splits and references still come from the source. Tasks without an annotation change nothing. The
    source's own questions about a changed image are rejected, because their answers may contradict its new truth.
    Raises EchoError if an entry in the file cannot be used or if the source does not have its image.
    """
    read = read_labelstudio if is_task_list(path) else read_coco
    corrected = merge_records(read(config, path))
    faults = [one for one in corrected.rejections if not one.reason.startswith(NOT_ANNOTATED)]
    if faults:
        raise EchoError(
            f"corrections: {len(faults)} entries of {path} cannot be used (first: {faults[0].item}: "
            f"{faults[0].reason}); correct them and export again"
        )
    found = {one.image: one for one in corrected.inspections}
    unknown = sorted(found.keys() - {one.image for one in records.inspections})
    if unknown:
        raise EchoError(
            f"corrections: {path} has {len(unknown)} images that the source does not have (first: {unknown[0]}); pass "
            "the file that was exported for this dataset"
        )
    inspections = [
        _corrected(one, found[one.image], config.root) if one.image in found else one for one in records.inspections
    ]
    changed = sum(one != other for one, other in zip(inspections, records.inspections, strict=True))
    LOGGER.info("corrections: %d of %d reviewed images changed (%s)", changed, len(found), path)
    relabelled = {
        one.id: one.condition
        for one, other in zip(records.inspections, inspections, strict=True)
        if one.condition != other.condition
    }
    return dataclasses.replace(
        _without_stale_questions(records, inspections),
        inspections=inspections,
        unannotated=records.unannotated - {one.id for one in inspections if one.image in found},
        source_conditions=relabelled,
    )


def _without_stale_questions(records: SourceRecords, corrected: Sequence[Inspection]) -> SourceRecords:
    """Return the records without the questions whose image has a new condition, or new marks instead of its old ones.

    `corrected` has the inspections of the records in the same order.
    """
    stale = {
        before.id
        for before, after in zip(records.inspections, corrected, strict=True)
        if before.condition != after.condition or (before != after and is_marked(before))
    }
    questions = [one for one in records.questions if one.inspection not in stale]
    reason = "the truth of its image was corrected, which its answer may contradict"
    dropped = [Rejection(one.id, reason) for one in records.questions if one.inspection in stale]
    return dataclasses.replace(records, questions=questions, rejections=[*records.rejections, *dropped])


def _corrected(before: Inspection, after: Inspection, root: Path) -> Inspection:
    """Return a record from the source with the truth from its correction."""
    marks = Outlines(after.boxes, after.polygons)
    unmarked = dataclasses.replace(before, condition=after.condition, mask=None, masks=(), boxes=(), polygons=())
    if after.condition == GOOD:
        return before if before.condition == GOOD else unmarked
    try:
        shown = outlines_of(before, root)
    except EchoError:  # the mask cannot be used, so neither the dataset nor its review has it
        shown = Outlines()
    if same_outlines(shown, marks):
        return dataclasses.replace(before, condition=after.condition)
    return dataclasses.replace(unmarked, boxes=marks.boxes, polygons=marks.polygons)
