"""Resume an interrupted training run: find its checkpoint and its W&B run."""

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


COMPLETE_MARKER = "whole"
"""Name of the file that is written into a checkpoint last."""

WANDB_RUN_FILE = "wandb_run_id.txt"
"""Name of the file in output_dir that holds the id of the W&B run."""

_MUST_MATCH = (
    "role", "dataset_fingerprint", "base_fingerprint", "prompt_version", "min_pixels", "max_pixels", "corrupted_share",
    "quantization", "mask_loss",
)  # fmt: skip


def find_checkpoint(sft: SFTConfig, card: AdapterCard) -> str | None:
    """The checkpoint to resume from: `resume_from_checkpoint` names a folder, or `true` takes the newest in output_dir.

    With `true`, a run without a checkpoint starts from the beginning and logs this. Raises EchoError if the folder does
    not exist or is incomplete. Raises EchoError if its adapter differs from `card` in role, dataset, base model, prompt
    version, pixel budget, share of corrupted queries or quantization. Raises EchoError if it holds the ZeRO optimizer
    states of another number of processes. Raises EchoError if a new run would replace a finished adapter or the
    checkpoints of an earlier run.
    """
    wanted, output = sft.resume_from_checkpoint, Path(str(sft.output_dir))
    newest = wanted is not None and wanted.lower() == "true"
    if newest:
        wanted = newest_checkpoint(output)
    new = wanted is None or wanted.lower() == "false"
    if (output / ADAPTER_CARD).is_file() and (new or Path(str(wanted)).resolve().parent != output.resolve()):
        raise EchoError(
            f"{output} holds a finished adapter, and this run would replace it; choose another output_dir or delete it"
        )
    if (sft.resume_from_checkpoint or "false").lower() == "false" and any(output.glob("checkpoint-*")):
        raise EchoError(
            f"{output} holds checkpoints of an earlier run; resume it with --resume_from_checkpoint true, choose "
            "another output_dir or delete it"
        )
    if wanted is None or new:
        if newest and sft.process_index == 0:
            LOGGER.info("there is no checkpoint in %s: training starts from the beginning", output)
        return None
    if not Path(wanted).is_dir():
        raise EchoError(f"there is no checkpoint {wanted}; give its folder, or true for the newest in output_dir")
    if not (Path(wanted) / COMPLETE_MARKER).is_file():
        raise EchoError(f"{wanted} is incomplete; give another checkpoint, or true for the newest complete one")
    # DeepSpeed (0.19) cannot redistribute the optimizer states of one number of processes to another.
    shards = len([*Path(wanted).glob("global_step*/*_optim_states.pt")])
    if shards and shards != sft.world_size:
        raise EchoError(
            f"{wanted} holds the ZeRO optimizer states of {shards} processes and cannot be resumed by "
            f"{sft.world_size}; start {shards} processes, or train with DDP, which resumes with any number"
        )
    found = read_card(Path(wanted))
    for name in _MUST_MATCH:
        before, now = getattr(found, name), getattr(card, name)
        if before != now:
            raise EchoError(
                f"{wanted} was trained with {name} {before or 'none'}, not {now or 'none'}; resume with the same "
                "config, or choose another output_dir to start a new run"
            )
    if sft.process_index == 0:
        LOGGER.info("training resumes from %s", wanted)
    return str(wanted)


def newest_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in `folder`, or None. Logs a warning for each incomplete one that it skips."""
    numbers = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    for path in sorted((p for p, n in numbers.items() if n.isdigit()), key=lambda p: int(numbers[p]), reverse=True):
        if (path / COMPLETE_MARKER).is_file():
            return str(path)
        LOGGER.warning("skipping %s: it is incomplete (the run was killed while saving it)", path)
    return None


def resume_wandb_run(sft: SFTConfig) -> None:
    """Let a resumed training run continue its W&B run.

    transformers' callback starts a new W&B run each time unless W&B's own environment variables say otherwise. If the
    user has set those variables, they take precedence.
    """
    if "wandb" not in (sft.report_to or ()) or sft.process_index != 0 or "WANDB_RUN_ID" in os.environ:
        return
    folder = Path(str(sft.output_dir))
    file = folder / WANDB_RUN_FILE
    if (sft.resume_from_checkpoint or "false").lower() == "false" or not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, uuid.uuid4().hex[:8])
    os.environ["WANDB_RUN_ID"] = file.read_text(encoding="utf-8").strip()
    os.environ.setdefault("WANDB_RESUME", "allow")
