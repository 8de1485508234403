"""The mask loss: two linear heads learn from defect masks which image tokens of the query show the defect.

The completions of a case say little about where to look: one letter for hundreds of image tokens. The mask loss adds
one label per image token of the query. It reaches the language model through a head on its last hidden states, and a
trained vision tower through a head on the merger's output. Runs do not need the heads; they are saved next to the
adapter in `MASK_HEADS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import binary_cross_entropy_with_logits

from echo_ft.data.dataset import Dataset
from echo_ft.errors import EchoError
from echo_ft.files import read_jsonl
from echo_ft.images.decode import size_and_orientation
from echo_ft.images.masks import Mask, is_marked, load_mask
from echo_ft.model.rows import IGNORED, Row
from echo_ft.records import GOOD, Inspection
from echo_ft.terminal import LOGGER

MASK_HEADS = "mask_heads.safetensors"
"""File next to an adapter that holds the heads' weights."""

MIN_TOKEN_SHARE = 1 / 32
"""A token shows the defect if the mask covers at least this fraction of it, or covers no other token more."""


class MaskHeads(torch.nn.Module):
    """Linear heads on the language model's last hidden states and, if the merger is trained, on its output.

    The heads are part of the model and run in its forward pass, so every topology shards and synchronises them.
    """

    def __init__(self, hidden: int, tower: bool) -> None:
        super().__init__()
        self.language = torch.nn.Linear(hidden, 1)
        self.tower = torch.nn.Linear(hidden, 1) if tower else None
        self.batch: Mapping[str, Any] | None = None
        """The collated batch of the current forward pass; None computes no logits."""
        self.logits: dict[str, torch.Tensor] = {}
        """Logits (tokens,) of the current batch by head."""

    def loss(self) -> torch.Tensor:
        """Return the weighted sum of the tokens' losses in the current batch, averaged over the heads."""
        assert self.batch is not None
        targets = self.batch["mask_targets"]
        weights = token_weights(targets, self.batch["mask_rows"], self.batch["mask_labels"])
        losses = [
            binary_cross_entropy_with_logits(logits, targets.float(), weights, reduction="sum")
            for logits in self.logits.values()
        ]
        return torch.stack(losses).mean()


def attach_mask_heads(model: Any, checkpoint: str | None) -> MaskHeads:
    """Attach heads to a Qwen2-VL, with the weights in the folder `checkpoint` if a run resumes from it.

    Raises EchoError if the checkpoint has no heads.
    """
    core = model.model
    heads = MaskHeads(
        model.config.text_config.hidden_size, any(weight.requires_grad for weight in core.visual.parameters())
    )
    if checkpoint is not None:
        load_mask_heads(heads, Path(checkpoint))
    core.mask_heads = heads.to(model.device)

    def on_hidden_states(module: Any, args: Any, output: torch.Tensor) -> None:
        if heads.batch is not None:
            heads.logits["language"] = _logits(heads.language, output[0, heads.batch["mask_positions"]])

    def on_merged_patches(module: Any, args: Any, output: torch.Tensor) -> None:
        if heads.batch is not None and heads.tower is not None:
            heads.logits["tower"] = _logits(heads.tower, output[heads.batch["mask_features"]])

    core.language_model.norm.register_forward_hook(on_hidden_states)
    core.visual.merger.register_forward_hook(on_merged_patches)
    return heads


def _logits(head: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """Return the logits (tokens,) of `states` (tokens, hidden), in float32 and independent of the states' scale."""
    with torch.autocast(states.device.type, enabled=False):
        normal = torch.nn.functional.layer_norm(states.float(), states.shape[-1:])
        return head(normal.to(head.weight.dtype))[:, 0].float()  # type: ignore[no-any-return]


def load_mask_heads(heads: MaskHeads, folder: Path) -> None:
    """Load the heads' weights from a checkpoint. Raises EchoError if they are missing or differ in shape."""
    try:
        heads.load_state_dict(load_file(folder / MASK_HEADS))
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()  # torch names the weight on the second line
        raise EchoError(
            f"{folder} has no usable {MASK_HEADS} ({reason}); resume from a checkpoint that was trained with mask_loss"
        ) from error


def save_mask_heads(heads: MaskHeads, folder: Path, should_save: bool) -> None:
    """Save the heads' weights into `folder`. If processes share the weights, all of them must call this."""
    weights = {name: _whole(weight) for name, weight in heads.named_parameters()}
    if should_save:
        save_file(weights, folder / MASK_HEADS)


def _whole(weight: torch.nn.Parameter) -> torch.Tensor:
    """Return a copy of a weight in main memory, gathered from all processes if it is sharded."""
    if hasattr(weight, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().cpu().clone()
    whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # FSDP2
    return whole.detach().cpu().clone()  # type: ignore[no-any-return]


def load_marks(dataset: Dataset, report: bool) -> dict[str, Inspection]:
    """Return the inspections of training and validation, by id, whose mask is known.

    These are the good parts and the marked defects. With `report`, logs the counts of the training split. The result is
    empty if that split has no marked defect from which the heads could learn.
    """
    known: dict[str, Inspection] = {}
    good, marked, unmarked = 0, 0, 0
    for inspection in read_jsonl(dataset.folder / "inspections.jsonl", Inspection):
        if inspection.split not in ("train", "validation"):
            continue
        if inspection.condition == GOOD or is_marked(inspection):
            known[inspection.id] = inspection
        if inspection.split == "train":
            good += inspection.condition == GOOD
            marked += inspection.condition != GOOD and is_marked(inspection)
            unmarked += inspection.condition != GOOD and not is_marked(inspection)
    if not marked:
        if report:
            LOGGER.warning("mask_loss is off: no defect of the training images has a mask, box or polygon")
        return {}
    if report:
        LOGGER.info(
            "mask_loss: %d training images with a marked defect, %d good ones, %d with an unmarked defect (left out)",
            marked, good, unmarked,
        )  # fmt: skip
    return known


def check_mask_metric(metric: str | None, marks: Mapping[str, Inspection]) -> None:
    """Raise EchoError if the mask loss is to choose the best checkpoint, but `marks` cannot provide it."""
    if metric is None or metric.removeprefix("eval_") != "mask_loss":
        return
    if not any(inspection.split == "validation" for inspection in marks.values()):
        reason = "the validation split has no known mask" if marks else "no defect of the training images is marked"
        raise EchoError(f"metric_for_best_model cannot be {metric!r}, because {reason}; mark defects, or choose loss")


def token_marks(mask: Mask, grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which tokens of an image show the defect of its mask (height, width), row by row.

    `grid` is (rows, columns) in tokens. The whole image is resized to the token grid, so each token covers an equal
    part of it.
    """
    rows, columns = grid
    shares = np.asarray(Image.fromarray(mask.astype(np.float32)).resize((columns, rows), Image.Resampling.BOX)).ravel()
    marks: NDArray[np.bool_] = (shares > 0) & (shares >= min(MIN_TOKEN_SHARE, shares.max()))
    return marks


def token_weights(targets: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return weights (tokens,) that sum to `labels` (rows,) in each row; `targets` and `rows` are (tokens,).

    The marked and the unmarked tokens of a row have the same total weight. `rows` has the row of each token.
    """
    zeros = torch.zeros(len(labels), device=targets.device)
    marked = zeros.index_add(0, rows, targets.float())
    unmarked = zeros.index_add(0, rows, (~targets).float())
    kinds = (marked > 0).float() + (unmarked > 0).float()
    return (labels / kinds.clamp(min=1))[rows] / torch.where(targets, marked[rows], unmarked[rows])


def mask_inputs(
    rows: Sequence[Row],
    starts: Sequence[int],
    marks: Mapping[str, Inspection],
    root: Path,
    image_token: int,
    merge: int,
) -> dict[str, torch.Tensor]:
    """Return the entries of a collated batch for the mask loss: all image tokens of queries with a known mask.

    `starts` has the index of the query's first token in the merger's output, per row. The result has mask_positions
    (tokens,) in the packed row, mask_features (tokens,) in the merger's output, mask_targets (tokens,), mask_rows
    (tokens,), and mask_labels (rows,): the number of labels of each row. The tokens of a row have the same total weight
    as its labels. The loss of a step is therefore a mean over cases for any packing, accumulation and number of
    processes.
    """
    none = np.zeros(0, dtype=np.int64)
    positions, features, targets, numbers = [none], [none], [none.astype(np.bool_)], [none]
    offset = 0
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        inspection = marks.get(row.exchange.case)
        if inspection is not None:
            found = _query_marks(row, inspection, root, merge)
            positions.append(offset + np.flatnonzero(row.input_ids == image_token)[-len(found) :])
            features.append(start + np.arange(len(found)))
            targets.append(found)
            numbers.append(np.full(len(found), number))
        offset += len(row.input_ids)
    labels = [int((row.labels != IGNORED).sum()) for row in rows]
    return {
        "mask_positions": torch.from_numpy(np.concatenate(positions)),
        "mask_features": torch.from_numpy(np.concatenate(features)),
        "mask_targets": torch.from_numpy(np.concatenate(targets)),
        "mask_rows": torch.from_numpy(np.concatenate(numbers)),
        "mask_labels": torch.tensor(labels),
    }


def _query_marks(row: Row, inspection: Inspection, root: Path, merge: int) -> NDArray[np.bool_]:
    """Return `token_marks` of a row's query, which is its last image."""
    _, rows, columns = row.grids[-1] // merge
    mask = load_mask(inspection, root, *size_and_orientation(root / inspection.image))
    if mask is None:
        return np.zeros(rows * columns, dtype=np.bool_)
    return token_marks(mask, (rows, columns))
