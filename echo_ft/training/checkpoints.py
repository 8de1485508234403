"""Resume an interrupted training run: find its checkpoint, and compare it with the new run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_ft.errors import EchoError
from echo_ft.model.adapters import ADAPTER_CARD, AdapterCard, read_card
from echo_ft.provenance import require_sealed, same_weights
from echo_ft.terminal import LOGGER
from echo_ft.training.option_changes import compare_options, require_equal

if TYPE_CHECKING:
    from trl import SFTConfig


COMPLETE_MARKER = "whole"
"""Name of the file that is written into a checkpoint last."""

_MUST_MATCH = (
    "role", "dataset_fingerprint", "base_fingerprint", "prompt_version", "min_pixels", "max_pixels", "corrupted_share",
    "quantization", "mask_loss", "adapt_from",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to resume from."""

    path: str
    resumed: dict[str, list[str]]
    """For each adapter's card, the options changed whenever training resumed, this time included, one sentence each."""
    cases: int = 0
    """Number of training cases; 0 if an older version saved the checkpoint."""


def find_checkpoint(sft: SFTConfig, cards: Mapping[str, AdapterCard]) -> Checkpoint | None:
    """Return the checkpoint to resume from: the folder `resume_from_checkpoint`, or if `true` the newest one.

    With `true`, a run without a checkpoint starts from the beginning and logs this. Raises EchoError if the folder does
    not exist, is incomplete or has changed. Raises EchoError if an adapter differs from its card in role, dataset, base
    model, prompt version, pixel budget, fraction of corrupted queries, quantization or an option in FIXED; options in
    FREE that differ are logged. Raises EchoError if it has no optimizer state, or the ZeRO optimizer states of another
    number of processes. Raises EchoError if a new run would replace a finished adapter or the checkpoints of an earlier
    run, or if output_dir has a later checkpoint than the one to resume from.

    The keys of `cards` are the adapters' folders in output_dir and in a checkpoint. That of a single
    adapter is `.`.
    """
    wanted, output = sft.resume_from_checkpoint, Path(str(sft.output_dir))
    newest = wanted is not None and wanted.lower() == "true"
    if newest:
        wanted = newest_checkpoint(output)
    new = wanted is None or wanted.lower() == "false"
    finished = any((output / name / ADAPTER_CARD).is_file() for name in cards)
    if finished and (new or Path(str(wanted)).resolve().parent != output.resolve()):
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
    if sft.process_index == 0 and not require_sealed(Path(wanted), "give another checkpoint"):
        LOGGER.warning("%s has no checksums (an older version saved it), so changes would not be noticed", wanted)
    # DeepSpeed (0.19) cannot redistribute the optimizer states of one number of processes to another.
    shards = len([*Path(wanted).glob("global_step*/*_optim_states.pt")])
    if shards and shards != sft.world_size:
        raise EchoError(
            f"{wanted} holds the ZeRO optimizer states of {shards} processes and cannot be resumed by "
            f"{sft.world_size}; start {shards} processes, or train with DDP, which resumes with any number "
            "if the cases per step stay the same"
        )
    _require_states(Path(wanted), sft)
    found, changes = _compare_cards(Path(wanted), cards)
    _require_steps(Path(wanted), sft)
    if not newest:
        _require_last(Path(wanted), output)
    if sft.process_index == 0:
        LOGGER.info("training resumes from %s", wanted)
        for change in dict.fromkeys(chain.from_iterable(changes.values())):
            LOGGER.warning("the resumed run changes %s", change)
    resumed = {folder: [*found[folder].resumed, *changes[folder]] for folder in cards}
    return Checkpoint(str(wanted), resumed, max(card.cases for card in found.values()))


def require_cases(checkpoint: Checkpoint, cases: int) -> None:
    """Raise EchoError unless a resumed run has as many `cases` as before.

    The order of an epoch depends on their number, so some cases would come twice in it and others never.
    """
    if checkpoint.cases not in (0, cases):
        raise EchoError(
            f"{checkpoint.path} was trained on {checkpoint.cases} cases, not {cases}; rejected_train.jsonl lists those "
            "left out: restore their images and max_tokens, or start the epoch again with ignore_data_skip: true"
        )


def _compare_cards(
    checkpoint: Path, cards: Mapping[str, AdapterCard]
) -> tuple[dict[str, AdapterCard], dict[str, list[str]]]:
    """The checkpoint's own cards, and what `compare_options` says of each. Raises EchoError if one does not match."""
    found = {folder: read_card(checkpoint / folder) for folder in cards}
    for folder, card in cards.items():
        for name in _MUST_MATCH:
            before, now = getattr(found[folder], name), getattr(card, name)
            if name != "base_fingerprint" or not same_weights(before, now):
                require_equal(checkpoint, name, before, now)
    return found, {
        folder: compare_options(checkpoint, found[folder].training, card.training) for folder, card in cards.items()
    }


def _require_states(checkpoint: Path, sft: SFTConfig) -> None:
    """Raise EchoError unless `checkpoint` has the optimizer and schedule states, in the form that this run reads.

    transformers (5.23) silently starts the optimizer over if it does not find its state.
    """
    sharded = [*checkpoint.glob("global_step*/*_optim_states.pt")]
    fully_sharded = [*checkpoint.glob("optimizer_[0-9]*"), *checkpoint.glob("optimizer.bin")]
    whole = (checkpoint / "optimizer.pt").is_file()
    if not (sharded or fully_sharded or whole) or not (checkpoint / "trainer_state.json").is_file():
        raise EchoError(
            f"{checkpoint} has no optimizer state (save_only_model: true), so training cannot resume from it; give "
            "another checkpoint, or choose another output_dir to start a new run"
        )
    zero = sft.deepspeed_plugin is not None
    fsdp = bool(sft.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if (zero and not sharded) or (fsdp and not fully_sharded) or not (zero or fsdp or whole):
        kind = "ZeRO" if sharded else "FSDP" if fully_sharded else "a run without ZeRO or FSDP"
        raise EchoError(
            f"{checkpoint} holds the optimizer state of {kind}; resume it with the accelerate config that started it, "
            "or choose another output_dir to start a new run"
        )


def _state(checkpoint: Path) -> dict[str, Any]:
    """Read what the Trainer saved about its progress."""
    found: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return found


def _require_steps(checkpoint: Path, sft: SFTConfig) -> None:
    """Raise EchoError if `checkpoint` was trained for longer than this run would be."""
    state = _state(checkpoint)
    name, done, most = "num_train_epochs", state["epoch"] or 0, sft.num_train_epochs
    if sft.max_steps > 0:
        name, done, most = "max_steps", state["global_step"], sft.max_steps
    if done > most:
        raise EchoError(
            f"{checkpoint} was trained for longer ({done:g}) than {name} {most:g}; give an earlier checkpoint, or set "
            f"a larger {name}"
        )


def _require_last(checkpoint: Path, output: Path) -> None:
    """Raise EchoError if `output` has a later checkpoint, from which `true` would resume if this run is stopped."""
    newest = newest_checkpoint(output)
    if newest is not None and int(newest.rpartition("-")[2]) > _state(checkpoint)["global_step"]:
        raise EchoError(
            f"{newest} is later than {checkpoint}, and this run would resume from it if it is stopped; delete it, or "
            "choose another output_dir"
        )


def newest_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint in `folder`, or None. Logs a warning for each incomplete one."""
    numbers = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    for path in sorted((p for p, n in numbers.items() if n.isdigit()), key=lambda p: int(numbers[p]), reverse=True):
        if (path / COMPLETE_MARKER).is_file():
            return str(path)
        LOGGER.warning("skipping %s: it is incomplete (the run was killed while saving it)", path)
    return None


def moved_best_checkpoint(state: Any, output: Path) -> str | None:
    """Return the best checkpoint of a resumed run's `state`, or None. It is found even if `output` has moved since.

    If the recorded path of the best checkpoint does not exist, transformers (5.23) forgets the path but not the step.
    """
    moved = output / f"checkpoint-{state.best_global_step}"
    if state.best_model_checkpoint is None and (moved / COMPLETE_MARKER).is_file():
        return str(moved)
    return state.best_model_checkpoint  # type: ignore[no-any-return]
