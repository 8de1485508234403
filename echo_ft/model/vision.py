"""Every image of a batch through the vision tower once, and with a frozen tower, by choice, once for all epochs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_outputs import BaseModelOutputWithPooling

from echo_ft.errors import EchoError
from echo_ft.files import atomic_file
from echo_ft.images import corruptions
from echo_ft.images.views import View
from echo_ft.provenance import code_fingerprint
from echo_ft.terminal import LOGGER

CORRUPTION_CODE = code_fingerprint(Path(corruptions.__file__))
"""Another code of theirs makes other features of degraded images."""


class TowerFeatureStore:
    """Features of images as files of one folder, for all epochs, roles and processes that see with the same tower.

    A file is written beside its place and then moved there: a process that dies leaves no half of one, and two that
    write the same are of one mind. On /dev/shm, the folder is memory.
    """

    def __init__(self, folder: Path, look: str, most_bytes: int, processes: int = 1) -> None:
        """`look` names all that features depend on but the image: model, pixel budget, precision and versions.

        Beyond `most_bytes` in `folder`, of all models and budgets together, features are computed again; each of so
        many `processes` may fill an equal part of what is left. Raises EchoError where `folder` cannot be written.
        """
        self.folder = folder / hashlib.sha256(look.encode()).hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EchoError(f"features cannot be kept in {folder} ({error.strerror}); choose another folder") from error
        self.room = (most_bytes - _bytes_in(folder)) // processes
        self.full = False

    def path(self, view: View) -> Path:
        """The file for an image; an image that has changed has another, and so has a degraded one."""
        stat = view.path.stat()
        key = f"{view.path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"
        if view.corruption is not None:
            key += f"\n{view.image}\n{view.corruption}\n{CORRUPTION_CODE}"
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def load(self, view: View) -> torch.Tensor | None:
        """Features (tokens, hidden), or None where they are not kept."""
        try:
            return load_file(self.path(view))["features"]
        except FileNotFoundError:
            return None

    def save(self, view: View, features: torch.Tensor) -> None:
        """Keep the features of an image, while there is room."""
        path = self.path(view)
        if path.exists():
            return
        if features.nbytes > self.room:
            if not self.full:
                LOGGER.info(
                    "%s is as large as features_gib allows; further features are computed again", self.folder.parent
                )
            self.full = True
            return
        self.room -= features.nbytes
        with atomic_file(path, unique=True) as partial:
            save_file({"features": features.detach().cpu().clone()}, partial)


def _bytes_in(folder: Path) -> int:
    """Size of all kept features; halves that a killed process left an hour ago or more are deleted."""
    total = 0
    for path in folder.glob("*/*"):
        try:
            stat = path.stat()
            if path.suffix != ".safetensors" and time.time() - stat.st_mtime > 3600:
                path.unlink()
            else:
                total += stat.st_size
        except FileNotFoundError:  # another process moved it into its place
            continue
    return total


@dataclass(frozen=True)
class BatchImages:
    """The images of a batch: first those that are encoded, then those whose features are known."""

    order: Sequence[int]
    """For every image of the packed row, which of the different images it is."""
    views: Sequence[View | None]
    """The encoded ones; None is a blank image, encoded because other processes encode images at the same time."""
    known: Sequence[torch.Tensor]
    """Features (tokens, hidden) of the others."""


def project_patches(model: Any) -> None:
    """Let a Qwen2-VL's patch embedding multiply matrices instead of convolving; only the rounding differs.

    Each patch comes alone, so its convolution has one position; torch (2.15) takes five times as long for it on a CPU,
    16 % of a training step with one question a case.
    """
    convolution = model.model.visual.patch_embed.proj
    convolution.forward = MethodType(_project, convolution)


def _project(convolution: torch.nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(patches.flatten(1), convolution.weight.flatten(1), convolution.bias)


def encode_images_once(model: Any, store: TowerFeatureStore | None) -> None:
    """Let a Qwen2-VL take `images=BatchImages(...)` beside the pixels of the images of a batch that are to be encoded.

    A frozen tower runs without a graph: with checkpointing, transformers (5.23) makes the output of the patch embedding
    require gradients too (`enable_input_require_grads`), and it would be kept, computed again and gone through
    backward. Raises EchoError where a tower that is trained has a store: its features change with every step.
    """
    core = model.model
    frozen = not any(parameter.requires_grad for parameter in core.visual.parameters())
    if store is not None and not frozen:
        raise EchoError(
            "features cannot be kept of a vision tower that is trained; take `features` out of the config, or the "
            "tower's and merger's modules out of lora_target_modules (with use_peft: false, set their rates to 0)"
        )
    encode = core.get_image_features

    def get_image_features(
        pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, images: BatchImages | None = None, **kwargs: Any
    ) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            if images is None:
                return encode(pixel_values, image_grid_thw, **kwargs)
            # The other arguments are the language model's.
            new = encode(pixel_values, image_grid_thw, return_dict=True).pooler_output if images.views else ()
        if store is not None:
            for view, encoded in zip(images.views, new, strict=True):
                if view is not None:
                    store.save(view, encoded)
        different = (*new, *images.known)
        # transformers types it as one tensor. No place for an image: none of the first one's tokens.
        features: Any = tuple(different[index] for index in images.order) or (different[0][:0],)
        return BaseModelOutputWithPooling(pooler_output=features)

    core.get_image_features = get_image_features
