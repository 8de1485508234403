"""Going on with a stopped training: which checkpoint, and which W&B run."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from echo_ft.errors import EchoError
from echo_ft.files import write_text
from echo_ft.model.adapters import ADAPTER_CARD, AdapterCard, read_card
from echo_ft.terminal import LOGGER

if TYPE_CHECKING:
    from trl import SFTConfig


WHOLE = "whole"
"""The file in a checkpoint that is written last."""

_SAME = (
    "role", "dataset_fingerprint", "base_fingerprint", "prompt_version", "min_pixels", "max_pixels", "corrupted_share",
    "quantization",
)  # fmt: skip

WANDB_RUN = "wandb_run_id.txt"
"""The file in an output folder that names its W&B run."""


def find_checkpoint(sft: SFTConfig, card: AdapterCard) -> str | None:
    """The checkpoint to go on from: `resume_from_checkpoint` is a folder, or `true` for the newest in output_dir.

    With `true`, a run without a checkpoint starts from the beginning, with a word. Raises EchoError where the folder is
    missing, where its adapter is of another role, dataset, base model, prompt version, pixel budget, share of
    degraded queries or quantization than `card`, and where a new run would replace a finished adapter.
    """
    wanted, output = sft.resume_from_checkpoint, Path(str(sft.output_dir))
    newest = wanted is not None and wanted.lower() == "true"
    if newest:
        wanted = newest_checkpoint(output)
    new = wanted is None or wanted.lower() == "false"
    if (output / ADAPTER_CARD).is_file() and (new or Path(str(wanted)).resolve().parent != output.resolve()):
        raise EchoError(
            f"{output} holds a finished adapter, which would be replaced; choose another output_dir or delete it"
        )
    if (sft.resume_from_checkpoint or "false").lower() == "false" and any(output.glob("checkpoint-*")):
        raise EchoError(
            f"{output} holds checkpoints of an earlier run; go on with it by --resume_from_checkpoint true, choose "
            "another output_dir or delete it"
        )
    if wanted is None or new:
        if newest and sft.process_index == 0:
            LOGGER.info("there is no checkpoint in %s: training starts from the beginning", output)
        return None
    if not Path(wanted).is_dir():
        raise EchoError(f"there is no checkpoint {wanted}; give its folder, or true for the newest in output_dir")
    if not (Path(wanted) / WHOLE).is_file():
        raise EchoError(f"{wanted} is half written; give another one, or true for the newest that is whole")
    found = read_card(Path(wanted))
    for name in _SAME:
        before, now = getattr(found, name), getattr(card, name)
        if before != now:
            raise EchoError(
                f"{wanted} was trained with {name} {before or 'none'}, not {now or 'none'}; go on with the same "
                "config, or choose another output_dir to start anew"
            )
    if sft.process_index == 0:
        LOGGER.info("training resumes from %s", wanted)
    return str(wanted)


def newest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in `folder` that is whole; those that are not are passed over with a word."""
    numbers = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    for path in sorted((p for p, n in numbers.items() if n.isdigit()), key=lambda p: int(numbers[p]), reverse=True):
        if (path / WHOLE).is_file():
            return str(path)
        LOGGER.warning("skipping %s: it is incomplete (the run was killed while saving it)", path)
    return None


def continue_wandb(sft: SFTConfig) -> None:
    """Let a run that goes on with an earlier one go on with its W&B run too.

    transformers' callback starts a new one each time, unless W&B's own variables say otherwise; where they are set,
    they stand.
    """
    if "wandb" not in (sft.report_to or ()) or sft.process_index != 0 or "WANDB_RUN_ID" in os.environ:
        return
    folder = Path(str(sft.output_dir))
    file = folder / WANDB_RUN
    if (sft.resume_from_checkpoint or "false").lower() == "false" or not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, uuid.uuid4().hex[:8])
    os.environ["WANDB_RUN_ID"] = file.read_text(encoding="utf-8").strip()
    os.environ.setdefault("WANDB_RESUME", "allow")
