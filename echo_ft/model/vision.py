"""Encode each image of a batch once, or once for all epochs if the vision tower is frozen.

Shapes: P patches; features are (tokens, hidden) per image.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from transformers.modeling_outputs import BaseModelOutputWithPooling

from echo_ft.errors import EchoError
from echo_ft.files import atomic_file
from echo_ft.images import corruptions
from echo_ft.images.decode import READER_THREADS
from echo_ft.images.views import View
from echo_ft.inputs import image_file, read_bytes
from echo_ft.model.batches import image_inputs
from echo_ft.model.rows import RowBuilder
from echo_ft.processes import remove_left_over_files
from echo_ft.provenance import code_fingerprint
from echo_ft.terminal import LOGGER

FEATURES_FORMAT = 2
"""A file of features holds a safetensors file and its SHA-256. Earlier formats had no checksum and are not read."""

CORRUPTION_FINGERPRINT = code_fingerprint(Path(corruptions.__file__))
"""Fingerprint of the corruption code, which determines the features of corrupted images."""


RECENT_IMAGES = 128
"""Number of recently used images with cached features. It is larger than a batch."""

ImageFeature = tuple[torch.Tensor, tuple[int, int]]
"""The vision tower's features of an image, (tokens, hidden), and the image's (width, height) in pixels."""


class ImageFeatureCache:
    """Cache of image features, shared by engines with the same model and pixel budget.

    It keeps the first features that fit into `max_bytes` and evicts nothing. Every run visits the images in the same
    order, so an LRU cache that cannot hold them all would never hit.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._features: dict[tuple[str, View], ImageFeature] = {}

    def get(self, key: tuple[str, View]) -> ImageFeature | None:
        """Return the features of a view for a role, or None if they are not cached."""
        return self._features.get(key)

    def add(self, key: tuple[str, View], feature: ImageFeature) -> None:
        """Cache the features of a view for a role if they fit."""
        if self.used_bytes + feature[0].nbytes <= self.max_bytes:
            self.used_bytes += feature[0].nbytes
            self._features[key] = feature


class ImageEncoder:
    """Encodes images with the vision tower of a loaded Qwen2-VL and keeps the features of RECENT_IMAGES."""

    def __init__(self, model: Any, row_builder: RowBuilder, shared: ImageFeatureCache | None) -> None:
        self.model = model
        self.row_builder = row_builder
        self._shared = shared
        self._recent: OrderedDict[tuple[str, View], ImageFeature] = OrderedDict()

    def encode(self, owner: str, images: Sequence[View]) -> list[ImageFeature]:
        """Return the features of each image, from the caches or the vision tower.

        `owner` is the role whose adapter changes the vision tower, or empty if none does.
        """
        found = {view: feature for view in images if (feature := self._find((owner, view))) is not None}
        missing = [view for view in dict.fromkeys(images) if view not in found]
        with ThreadPoolExecutor(READER_THREADS) as pool:
            # Images are encoded one at a time. In a batch, the lowest bits would depend on which images are cached.
            for view, (inputs, size) in zip(missing, pool.map(self._load, missing), strict=True):
                (encoded,) = self.model.model.get_image_features(
                    inputs["pixel_values"].to(self.model.device),
                    inputs["image_grid_thw"].to(self.model.device),
                    return_dict=True,
                ).pooler_output
                found[view] = encoded, size
                if self._shared is not None:
                    self._shared.add((owner, view), found[view])
        for view, feature in found.items():
            self._recent[owner, view] = feature
            self._recent.move_to_end((owner, view))
        while len(self._recent) > RECENT_IMAGES:
            self._recent.popitem(last=False)
        return [found[view] for view in images]

    def _find(self, key: tuple[str, View]) -> ImageFeature | None:
        shared = None if self._shared is None else self._shared.get(key)
        return shared or self._recent.get(key)

    def _load(self, view: View) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
        """Load the model inputs of an image and its (width, height). Raises EchoError if it cannot be used."""
        image = view.load()
        self.row_builder.grid(*image.size)  # otherwise, the processor raises a ValueError for a long and narrow image
        return image_inputs(self.row_builder, [image]), image.size


class TowerFeatureStore:
    """Image features on disk, shared by all epochs, roles and processes that use the same vision tower.

    Files are replaced atomically: a killed process leaves no partial file, and processes that write the same file write
    the same content. In /dev/shm, the store is kept in memory.
    """

    def __init__(self, folder: Path, configuration: str, max_bytes: int, processes: int = 1) -> None:
        """Open the store in `folder`.

        `configuration` identifies everything except the image that features depend on: model, pixel budget, precision
        and versions. `max_bytes` limits `folder` for all configurations together; features that no longer fit are
        recomputed. Each of the `processes` may use an equal part of the free space. Raises EchoError if `folder` cannot
        be written.
        """
        self.folder = folder / hashlib.sha256(f"{FEATURES_FORMAT} {configuration}".encode()).hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EchoError(
                f"features cannot be stored in {folder} ({error.strerror}); choose another folder"
            ) from error
        self.free_bytes = (max_bytes - _bytes_in(folder)) // processes
        self.full = False

    def path(self, view: View) -> Path:
        """Return the file for a view; a changed or corrupted image has a different file."""
        stat = image_file(view.path).stat()
        key = f"{view.path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"
        if view.corruption is not None:
            key += f"\n{view.image}\n{view.corruption}\n{CORRUPTION_FINGERPRINT}"
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def load(self, view: View) -> torch.Tensor | None:
        """Return the features (tokens, hidden) of a view, or None if they are not stored."""
        try:
            content = read_bytes(self.path(view))
        except FileNotFoundError:
            return None
        if hashlib.sha256(content[:-32]).digest() != content[-32:]:
            raise EchoError(f"{self.path(view)} has changed since it was stored; delete it to compute it again")
        return load(content[:-32])["features"]

    def save(self, view: View, features: torch.Tensor) -> None:
        """Store the features (tokens, hidden) of a view if they fit."""
        path = self.path(view)
        if path.exists():
            return
        if features.nbytes > self.free_bytes:
            if not self.full:
                LOGGER.info(
                    "%s has reached features_gib; further features are recomputed in each epoch", self.folder.parent
                )
            self.full = True
            return
        self.free_bytes -= features.nbytes
        with atomic_file(path, unique=True) as partial:
            # save_file (safetensors 0.8) would write to another file, without the lock, and rename it.
            content = save({"features": features.detach().cpu().clone()})
            partial.write_bytes(content + hashlib.sha256(content).digest())


def _bytes_in(folder: Path) -> int:
    """Return the size of all stored features, and remove the files that killed processes left."""
    total = 0
    for part in folder.glob("*/"):
        remove_left_over_files(part)
    for path in folder.glob("*/*"):
        with suppress(FileNotFoundError):  # another process has renamed the file
            total += path.stat().st_size
    return total


@dataclass(frozen=True)
class BatchImages:
    """The distinct images of a batch: first those to encode, then those with stored features."""

    order: Sequence[int]
    """The index of the distinct image for every image of the packed row."""
    views: Sequence[View | None]
    """Images to encode. None is a blank image, encoded because other processes encode images at the same time."""
    known: Sequence[torch.Tensor]
    """Stored features (tokens, hidden) of the other images."""


def require_frozen_tower(model: Any) -> None:
    """Raise EchoError if `model` trains the vision tower or the merger, because stored features would be outdated."""
    if any(".visual." in f".{name}" and weight.requires_grad for name, weight in model.named_parameters()):
        raise EchoError(
            "features cannot be stored because the vision tower is trained; remove `features` from the config, or "
            "the modules of the tower and the merger from lora_target_modules (with use_peft: false, set their "
            "learning rates to 0)"
        )


def encode_images_once(model: Any, store: TowerFeatureStore | None) -> None:
    """Patch a Qwen2-VL to accept `images=BatchImages(...)` along with the pixels of the images to encode.

    A frozen tower runs without a graph. Otherwise, with checkpointing, transformers (5.23) makes the output of the
    patch embedding require gradients (`enable_input_require_grads`), and the backward pass would recompute the tower
    and run through it. Raises EchoError if there is a `store` but the tower is trained, because its features change
    with every step.
    """
    core = model.model
    frozen = not any(parameter.requires_grad for parameter in core.visual.parameters())
    if store is not None:
        require_frozen_tower(model)
    encode = core.get_image_features

    def get_image_features(
        pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, images: BatchImages | None = None, **kwargs: Any
    ) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            if images is None:
                return encode(pixel_values, image_grid_thw, **kwargs)
            # The other arguments belong to the language model.
            new = encode(pixel_values, image_grid_thw, return_dict=True).pooler_output if images.views else ()
        if store is not None:
            for view, encoded in zip(images.views, new, strict=True):
                if view is not None:
                    store.save(view, encoded)
        distinct = (*new, *images.known)
        # The type that transformers declares, a single tensor, is wrong. For a row without images, pass an empty part
        # of the first image's features.
        features: Any = tuple(distinct[index] for index in images.order) or (distinct[0][:0],)
        return BaseModelOutputWithPooling(pooler_output=features)

    core.get_image_features = get_image_features
