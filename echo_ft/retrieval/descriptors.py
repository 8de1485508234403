"""Image features for retrieval: open_clip's, or a descriptor from scikit-image that needs no weights."""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from echo_ft.errors import EchoError
from echo_ft.images import decode
from echo_ft.provenance import fingerprint_bytes

Vector = NDArray[np.float32]
Loaded = TypeVar("Loaded")

IMAGES_PER_BATCH = 64
"""Images in one forward pass, and decoded images held at once."""

DECODER = "8bit"
"""Names the rule by which files become pixels, so that features kept from before another rule are not taken."""

WITHOUT_WEIGHTS = "or set `descriptor: skimage`, which needs no weights"


class Describer(Protocol):
    """What turns image files into features."""

    key: str
    """Tells the features of two describers apart, in a form that can be a file's name."""

    def vectors(self, paths: Sequence[Path]) -> tuple[list[Vector | None], list[str | None]]:
        """For each path a feature of length 1, float32 (d,), or None and why the image cannot be read."""
        ...


def describer(name: str) -> Describer:
    """The describer that a config names: `skimage`, or open_clip's `<model>/<pretrained>`.

    Raises EchoError where there is no such model or pretrained tag, naming the nearest.
    """
    if name == "skimage":
        return ScikitImage()
    if name.startswith(("hf-hub:", "local-dir:")):
        return OpenClip(name, None)
    import open_clip

    model, _, pretrained = name.partition("/")
    models = open_clip.list_models()
    if model not in models:
        near = difflib.get_close_matches(model, [*models, "skimage"], n=3) or ["skimage", "ViT-B-16/openai"]
        raise EchoError(f"descriptor: open_clip has no model {model!r}; did you mean {' or '.join(near)}?")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained not in tags and not Path(pretrained).is_file():
        near = difflib.get_close_matches(pretrained, tags, n=1)
        choice = (
            f"did you mean {model}/{near[0]}?" if near else f"choose from {', '.join(f'{model}/{tag}' for tag in tags)}"
        )
        raise EchoError(f"descriptor: open_clip has no weights {pretrained!r} for {model}; {choice}")
    return OpenClip(model, pretrained)


class ScikitImage:
    """Four parts, weighted and joined: a grey thumbnail less its mean, HOG, and histograms of grey and of colour.

    Each part has length 1 before weighting, so that a small defect moves none of them far. The weights were chosen on
    magnetic tiles with drawn spots of 12 % width: nearest normals whose grey values outside the spot differ by 0.049
    on average, where the best possible choice has 0.045, HOG alone 0.145 and a random normal 0.181.
    """

    key = f"skimage-1-{DECODER}"

    def vectors(self, paths: Sequence[Path]) -> tuple[list[Vector | None], list[str | None]]:
        """As `Describer.vectors`; d = 2116."""
        described = [one for batch in _batches(paths, self._describe) for one in batch]
        return [vector for vector, _ in described], [fault for _, fault in described]

    @staticmethod
    def _describe(image: Image.Image) -> Vector:
        from skimage.feature import hog

        grey = np.asarray(image.convert("L").resize((64, 64), Image.Resampling.BOX), dtype=np.float32) / 255
        rgb = np.asarray(image.resize((64, 64), Image.Resampling.BOX))
        small = grey.reshape(16, 4, 16, 4).mean(axis=(1, 3))
        edges = hog(grey, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2))
        greys = np.histogram(grey, bins=32, range=(0, 1))[0]
        colours = np.bincount((rgb // 64).reshape(-1, 3) @ np.array([16, 4, 1]), minlength=64)
        parts = ((1.0, small - small.mean()), (0.5, edges), (1.0, np.sqrt(greys)), (0.5, np.sqrt(colours)))
        return _unit(np.concatenate([weight * _unit(part.ravel()) for weight, part in parts]))


class OpenClip:
    """Image features of an open_clip model, on the GPU where there is one; loaded when the first image needs it."""

    def __init__(self, model: str, pretrained: str | None) -> None:
        """`model` is a name of open_clip's or `local-dir:FOLDER`, which holds the weights too.

        `pretrained` is a tag of open_clip's, a checkpoint file, or None for random weights (tests).
        """
        self.model, self.pretrained = model, pretrained
        self.key = re.sub(r"[^\w.]+", "-", f"{model}-{pretrained or ''}-{DECODER}").strip("-")
        folder = Path(model.removeprefix("local-dir:"))
        if pretrained and Path(pretrained).is_file():
            state = Path(pretrained).stat()
            self.key += f"-{state.st_size}-{state.st_mtime_ns}"
        elif model.startswith("local-dir:") and folder.is_dir():
            files = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
            states = [f"{name}/{state.st_size}/{state.st_mtime_ns}" for name, state in files]
            self.key += "-" + fingerprint_bytes(*map(str.encode, (str(folder.resolve()), *states)))
        self._loaded: tuple[Any, Any, str] | None = None

    def vectors(self, paths: Sequence[Path]) -> tuple[list[Vector | None], list[str | None]]:
        """As `Describer.vectors`. Raises EchoError as `load` does."""
        import torch

        vectors: list[Vector | None] = []
        faults: list[str | None] = []
        if not paths:
            return vectors, faults
        model, preprocess, device = self.load()
        # A GPU need not wait for the next images to be decoded; on a CPU the two would take each other's time.
        for decoded in _batches(paths, preprocess, ahead=int(device == "cuda")):
            tensors = [tensor for tensor, _ in decoded if tensor is not None]
            rows = iter(())
            if tensors:
                with torch.inference_mode():
                    images_bchw = torch.stack(tensors).to(device)
                    features_bd = model.encode_image(images_bchw, normalize=True).float().cpu().numpy()
                rows = iter(features_bd)
            vectors += [None if tensor is None else next(rows) for tensor, _ in decoded]
            faults += [fault for _, fault in decoded]
        return vectors, faults

    def load(self) -> tuple[Any, Any, str]:
        """The model, what prepares an image for it, and the device. Raises EchoError without its weights."""
        if self._loaded is None:
            import open_clip
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
            config = open_clip.get_pretrained_cfg(self.model, self.pretrained) if self.pretrained else {}
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model, _, preprocess = open_clip.create_model_and_transforms(
                        self.model,
                        pretrained=self.pretrained,
                        device=device,
                        # OpenAI's weights were trained with QuickGELU; by its plain name the model has GELU.
                        force_quick_gelu=config.get("quick_gelu", False),
                    )
            except Exception as error:  # hub, network, archive and pickle errors of many libraries
                name = f"{self.model}/{self.pretrained}" if self.pretrained else self.model
                raise EchoError(
                    f"descriptor {name}: its weights cannot be loaded ({type(error).__name__}); "
                    f"connect to the internet once to fetch them, {WITHOUT_WEIGHTS}"
                ) from error
            self._loaded = model.eval(), preprocess, device
        return self._loaded


def _batches(
    paths: Sequence[Path], prepare: Callable[[Image.Image], Loaded], ahead: int = 0
) -> Iterator[list[tuple[Loaded | None, str | None]]]:
    """BATCH images at a time, in RGB and prepared; or None and why one cannot be read.

    While a batch is in use, `ahead` further ones are decoded.
    """

    def one(path: Path) -> tuple[Loaded | None, str | None]:
        try:
            rgb = decode.decode(path)
        except decode.UNREADABLE as error:
            return None, decode.fault(error)
        return prepare(rgb), None

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        waiting: deque[Iterator[tuple[Loaded | None, str | None]]] = deque()
        for start in range(0, len(paths), IMAGES_PER_BATCH):
            waiting.append(pool.map(one, paths[start : start + IMAGES_PER_BATCH]))
            if len(waiting) > ahead:
                yield list(waiting.popleft())
        while waiting:
            yield list(waiting.popleft())


def _unit(values: NDArray[Any]) -> Vector:
    vector = np.asarray(values, dtype=np.float32)
    length = float(np.linalg.norm(vector))
    return vector / length if length else vector
