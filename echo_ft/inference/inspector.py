"""Inspect single images: everything that the four experts need, loaded once from the cards of trained adapters."""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from echo_ft.data.dataset import Dataset, candidate_order, load_dataset, stored_knowledge
from echo_ft.data.questions import open_questions
from echo_ft.data.splits import conditions_of, reference_pool
from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import Generate, Outcome, PipelineConfig, run_cases
from echo_ft.files import read_jsonl
from echo_ft.images.decode import READ_ERRORS, decode, describe_read_error
from echo_ft.inference.decision import Calibration, load_calibration
from echo_ft.inputs import read_bytes
from echo_ft.model.adapters import attach_adapters, find_adapters, read_card
from echo_ft.model.loading import base_fingerprint, load_model, load_processor
from echo_ft.model.rows import RowBuilder
from echo_ft.records import ROLES, Case, Entry, Inspection, Prediction, Seen, Trace, Truth
from echo_ft.retrieval.references import ReferenceSearch

BATCH_SIZE = 8
"""Number of images that run through the experts at once."""

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Suffixes of the files that count as images in a folder."""

Input = str | Path | Image.Image | NDArray[Any]
"""An image file, a Pillow image, or an array (height, width, 3) or (height, width) of uint8."""


@dataclass(frozen=True)
class Result:
    """What the experts say about one image. The names of the first three fields are those of anomalib."""

    image: str
    """The image file; empty for an image in memory."""
    pred_score: float
    """Calibrated P(defect), from 0 to 1."""
    pred_label: bool
    """Whether the image is flagged as defective: `pred_score` reaches `threshold`."""
    threshold: float
    product: str
    condition: str | None
    """The defect that the decision maker names, for a flagged image of a product with two to four known defects."""
    reference: str | None
    """The normal image that the reference extractor chose."""
    explanation: str
    """What the reasoning expert says about the defect, or the knowledge guide if the routing has no reasoning."""
    answers: tuple[Prediction, ...]
    trace: tuple[Trace, ...]


class Inspector:
    """The tuned pipeline for images without a known condition.

    It holds the model with its adapters, and the dataset that they were trained on: its normal images as references,
    its product knowledge and its products.
    """

    def __init__(
        self,
        generate: Generate,
        dataset: Dataset,
        pipeline: PipelineConfig = PipelineConfig(),
        calibration: Calibration = Calibration(),
    ) -> None:
        """`generate` is an engine's. Raises EchoError if the dataset has no normal image to compare with."""
        self.generate = generate
        self.dataset = dataset
        self.pipeline = pipeline
        self.calibration = calibration
        self.knowledge = stored_knowledge(dataset.folder)
        config = dataset.manifest["config"]
        inspections = list(read_jsonl(dataset.folder / "inspections.jsonl", Inspection))
        self.conditions = conditions_of(inspections)
        self._references = ReferenceSearch(reference_pool(inspections), dataset.root, config["descriptor"], config["k"])

    @classmethod
    def from_adapters(
        cls,
        folder: str | Path,
        *,
        dataset: str | Path | None = None,
        calibration: str | Path | None = None,
        threshold: float | None = None,
        dtype: str = "auto",
        max_new_tokens: int = 128,
        max_batch_tokens: int = 32_768,
    ) -> Inspector:
        """Load the four adapters in `folder` with the base model, pixel budget, routing and dataset of their cards.

        `dataset` replaces the dataset folder of the cards, for example for other references. `calibration` is a
        report.json with a calibration, and `threshold` replaces its threshold; without both, the threshold is 0.5.
        `max_batch_tokens` limits the key-value cache, as in `evaluation.run`. Raises EchoError if a part is missing or
        does not fit the others.
        """
        import torch

        from echo_ft.inference.engine import Engine

        card = read_card(Path(folder) / ROLES[0])
        base, revision = card.base_model, card.base_revision
        weights = base_fingerprint(base, revision)
        adapters = find_adapters(Path(folder), base, weights, card.min_pixels, card.max_pixels)
        found = load_calibration(Path(calibration)) if calibration is not None else Calibration()
        if threshold is not None:
            found = replace(found, threshold=threshold)
        loaded = load_dataset(Path(card.dataset if dataset is None else dataset))
        device = "cuda" if torch.cuda.is_available() else None
        model = load_model(base, revision, dtype, device_map=device)
        model = attach_adapters(model, {role: adapter.path for role, adapter in adapters.items()})
        builder = RowBuilder(load_processor(base, revision, card.min_pixels, card.max_pixels))
        engine = Engine(model, builder, loaded.root, max_new_tokens, max_batch_tokens=max_batch_tokens)
        return cls(engine.generate, loaded, PipelineConfig(routing=card.routing), found)

    @overload
    def predict(self, images: Input, product: str | None = None) -> Result: ...  # type: ignore[overload-overlap]  # str
    @overload
    def predict(self, images: Sequence[Input], product: str | None = None) -> list[Result]: ...
    def predict(self, images: Input | Sequence[Input], product: str | None = None) -> Result | list[Result]:
        """Inspect one image, or several, for which the result is a list.

        `product` names the product in all of them. Without it, the product of the most similar normal image counts.
        Raises EchoError for an unknown product, and for an image that cannot be read.
        """
        if isinstance(images, str | Path | Image.Image | np.ndarray):
            return next(self.stream([images], product))
        return list(self.stream(images, product))

    def stream(self, images: str | Path | Sequence[Input], product: str | None = None) -> Iterator[Result]:
        """Yield the result of each image as soon as its batch is done. A path is a folder of image files."""
        images = list_images(Path(images)) if isinstance(images, str | Path) else images
        with TemporaryDirectory(prefix="echo-ft-") as scratch:
            for start in range(0, len(images), BATCH_SIZE):
                batch = images[start : start + BATCH_SIZE]
                cases = [self._case(_snapshot(image, Path(scratch)), product) for image in batch]
                outcomes = run_cases(cases, self.generate, self.pipeline)
                for image, case, outcome in zip(batch, cases, outcomes, strict=True):
                    yield self._result(str(image) if isinstance(image, str | Path) else "", case, outcome)

    def _case(self, path: Path, product: str | None) -> Case:
        """Return the case of an image file that `_snapshot` made. Only its content decides the order of candidates."""
        keys = [key for key in self.conditions if product in (None, key[1])]
        if not keys:
            known = ", ".join(sorted({name for _, name in self.conditions}))
            raise EchoError(f"product {product!r} is not in {self.dataset.folder}; choose from {known}")
        key, references = self._references.find(path, keys)
        entries = self.knowledge.get(key[0], {}).get(key[1], {})
        identifier = path.stem
        questions = open_questions(identifier, self.conditions[key])
        seen = Seen(
            query=str(path),
            references=candidate_order(identifier, references),
            knowledge=tuple(Entry(condition, text) for condition, text in entries.items()),
            questions=questions,
        )
        # Nobody knows the truth of this image. Prompts never show it, and the predictions carry empty answers.
        truth = Truth("", None, (), {question.id: "" for question in questions})
        return Case(identifier, *key, group=identifier, seen=seen, truth=truth)

    def _result(self, image: str, case: Case, outcome: Outcome) -> Result:
        detection = outcome.predictions[0]
        if detection.probabilities is None:
            raise EchoError("the backend returns no probabilities, so there is no P(defect); use a local model")
        score = self.calibration.score(detection.probabilities["A"])
        flagged = score >= self.calibration.threshold
        named = [one for one in outcome.predictions[1:] if one.parsed is not None]
        shown = next((one.images for one in outcome.traces if one.role == "decision_maker"), ())
        texts: defaultdict[str, str] = defaultdict(str)
        for one in outcome.traces:
            if one.branch == detection.question or one.role == "knowledge_guide":
                texts[one.role] = one.text
        return Result(
            image=image,
            pred_score=score,
            pred_label=flagged,
            threshold=self.calibration.threshold,
            product=case.product,
            condition=named[0].options[str(named[0].parsed)] if flagged and named else None,
            reference=str(self.dataset.root / shown[0]) if len(shown) > 1 else None,
            explanation=texts["reasoning_expert"] or texts["knowledge_guide"],
            answers=tuple(replace(one, image=image) for one in outcome.predictions),
            trace=tuple(replace(one, images=(*one.images[:-1], image)) for one in outcome.traces),  # the query is last
        )


def list_images(folder: Path) -> list[Path]:
    """Return the image files directly in a folder, by name. Raises EchoError if there are none."""
    if not folder.is_dir():
        raise EchoError(f"there is no folder {folder}; give a folder of images")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise EchoError(f"{folder} has no image file ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def _snapshot(image: Input, folder: Path) -> Path:
    """Copy an image into `folder`, under the hash of its content.

    The engine remembers images by path, and a camera may write its next image to the same file. Raises EchoError if the
    image cannot be read.
    """
    if isinstance(image, str | Path):
        try:
            content = read_bytes(image)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise EchoError(f"image {image} cannot be opened ({reason}); check the path") from error
    else:
        content = _png(image)
    path = (
        folder
        / f"{hashlib.sha256(content).hexdigest()}{Path(image).suffix if isinstance(image, str | Path) else '.png'}"
    )
    path.write_bytes(content)
    try:
        decode(path)
    except READ_ERRORS as error:
        raise EchoError(f"image {image} cannot be read: {describe_read_error(error)}; replace it") from error
    return path


def _png(image: Image.Image | NDArray[Any]) -> bytes:
    """Return an image in memory as a PNG file. Raises EchoError if an array is not an image of uint8."""
    if not isinstance(image, Image.Image):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
            raise EchoError(
                f"an array of {image.dtype} with shape {image.shape} is no image; pass uint8 values of shape (height, "
                "width, 3) in RGB, or (height, width)"
            )
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.convert("RGB").save(file, "png")
    return file.getvalue()
