"""Inspect single images. Everything that the four experts need is loaded once from adapters, a bundle or a server."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from echo_ft.data.dataset import candidate_order, load_dataset, require_not_rebuilt
from echo_ft.data.questions import open_questions
from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import Generate, Outcome, PipelineConfig, run_case, run_or_fail
from echo_ft.images import boxes
from echo_ft.images.decode import image_size
from echo_ft.images.snapshot import ImageInput, ScaleCheck, list_images, snapshot, snapshots
from echo_ft.inference.bundle import bundle_adapters, load_bundle_products, load_bundle_rows, read_bundle
from echo_ft.inference.decision import Calibration, measured_dtype, read_measurement, with_threshold
from echo_ft.inference.liveness import check_adapters, local_backend, read_probe, served_backend
from echo_ft.model.adapters import Adapter, find_adapters, load_to_answer, read_card
from echo_ft.model.loading import base_fingerprint, load_processor
from echo_ft.model.rows import RowBuilder
from echo_ft.processes import scratch_folder
from echo_ft.records import GROUNDING, MAX_NEW_TOKENS, ROLES, Case, Entry, Prediction, Question, Seen, Trace, Truth
from echo_ft.retrieval.products import ProductData, read_products

BATCH_SIZE = 8
"""Number of images that run through the experts at once."""

MAX_BATCH_TOKENS = 32_768
"""Largest number of tokens in the key-value cache by default."""


@dataclass(frozen=True)
class Result:
    """What the experts say about one image. The names `image` and `pred_...` are the same as in anomalib."""

    image: str
    """The image file; empty for an image in memory."""
    pred_score: float
    """Calibrated P(defect), from 0 to 1."""
    pred_label: bool
    """Whether the image is flagged as defective: `pred_score` reaches `threshold`.

    A gate's threshold is compared before the calibration, because `pred_score` and `threshold` may both round to 1.
    """
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
    pred_boxes: tuple[boxes.Box, ...] | None = None
    """The boxes from the decision maker, in pixels of the upright image. They have no influence on `pred_label`.

    None if it was not asked, because its dataset does not ask for boxes, or if its answer is unparsed.
    """


@dataclass(frozen=True)
class Progress:
    """The experts' outputs for one image so far."""

    role: str
    """The role that is running now."""
    product: str
    questions: tuple[Question, ...]
    reference: str | None
    """The normal image that the reference extractor chose; None before that, or if no reference is used."""
    trace: tuple[Trace, ...]


class Inspector:
    """The tuned pipeline for images without a known condition.

    It holds the model with its adapters, or the server that has loaded them. It also holds the normal images, knowledge
    and conditions of the products.
    """

    def __init__(
        self,
        generate: Generate,
        products: ProductData,
        pipeline: PipelineConfig = PipelineConfig(),
        calibration: Calibration = Calibration(),
    ) -> None:
        """`generate` is the method of an engine or a server."""
        self.generate = generate
        self.products = products
        self.pipeline = pipeline
        self.calibration = calibration
        self.scales = ScaleCheck()

    @classmethod
    def from_adapters(
        cls,
        folder: str | Path,
        *,
        dataset: str | Path | None = None,
        calibration: str | Path | None = None,
        threshold: float | None = None,
        dtype: str = "auto",
        max_new_tokens: int | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ) -> Inspector:
        """Load the four adapters in `folder` with the base model, pixel budget, routing and dataset of their cards.

        `dataset` replaces the dataset folder of the cards, for example for other references. `calibration` is the
        report.json of a run with these adapters, which gives the calibration, the options and, if `dtype` is `auto`,
        the data type. `threshold` replaces its threshold; without both, the threshold is 0.5. `max_batch_tokens` limits
        the key-value cache, as in `evaluation.run`. Raises EchoError if a component is missing or does not match the
        others.
        """
        card = read_card(Path(folder) / ROLES[0])
        weights = base_fingerprint(card.base_model, card.base_revision)
        adapters = find_adapters(Path(folder), card.base_model, weights, card.min_pixels, card.max_pixels)
        measured = None if calibration is None else read_measurement(Path(calibration), adapters, calibrated=True)
        found = with_threshold(None if measured is None else measured.calibration, threshold)
        pipeline = measured.pipeline if measured else PipelineConfig(routing=card.routing)
        tokens = max_new_tokens or (measured.max_new_tokens if measured else MAX_NEW_TOKENS)
        loaded = load_dataset(Path(card.dataset if dataset is None else dataset))
        if dataset is None:
            require_not_rebuilt(loaded, card.dataset_fingerprint)
        products = read_products(loaded, measured.k if measured else None)
        builder = RowBuilder(load_processor(card.base_model, card.base_revision, card.min_pixels, card.max_pixels))
        model = load_tuned_model(adapters, builder, measured_dtype(dtype, measured, card), str(folder))
        return cls(_engine(model, builder, products, tokens, max_batch_tokens), products, pipeline, found)

    @classmethod
    def from_bundle(
        cls,
        folder: str | Path,
        *,
        base_model: str | Path | None = None,
        threshold: float | None = None,
        dtype: str | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ) -> Inspector:
        """Load a bundle that `train.export` wrote. It needs no dataset.

        `base_model` is the current folder of the base model, if it has moved since training. `threshold` and `dtype`
        replace those of the bundle. Raises EchoError if a file of the bundle has changed, if a component does not match
        the others, or if an adapter does not behave as it did in the export.
        """
        path = Path(folder)
        description = read_bundle(path)
        calibration = with_threshold(description.calibration, threshold)
        products = load_bundle_products(path, description)
        adapters = bundle_adapters(path, description, str(base_model or description.base_model))
        builder = load_bundle_rows(path, description)
        model = load_tuned_model(adapters, builder, dtype or description.dtype, str(folder))
        generate = _engine(model, builder, products, description.max_new_tokens, max_batch_tokens)
        return cls(generate, products, description.pipeline, calibration)

    @classmethod
    def from_server(
        cls,
        url: str,
        folder: str | Path,
        *,
        model: str = "{role}",
        threshold: float | None = None,
        max_concurrent: int = BATCH_SIZE,
        timeout: float = 300.0,
    ) -> Inspector:
        """Use the adapters of a bundle that a server has loaded; the base model is not needed here.

        `url` is that of an OpenAI-compatible server, and `model` is the name of the adapters there, with `{role}` in
        place of the role. If the server requires a key, set the environment variable OPENAI_API_KEY. A request that
        takes more than `timeout` seconds is retried. If only one of the answers Yes and No is among the most likely
        tokens, `pred_score` is the bound on P(defect) that is nearest to 0.5. The connections close once the inspector
        is no longer used. Raises EchoError if the server returns no token probabilities, counts tokens differently, or
        does not answer like the bundle's adapters.
        """
        from echo_ft.inference.server import Server, ServerThread

        path = Path(folder)
        description = read_bundle(path)
        products = load_bundle_products(path, description)
        adapters = bundle_adapters(path, description, description.base_model, has_weights=False)
        builder = load_bundle_rows(path, description)
        calibration, tokens = with_threshold(description.calibration, threshold), description.max_new_tokens
        client = Server(
            url, model, builder, products.root, tokens, None, max_concurrent, timeout=timeout, bounds_letters=True
        )
        with ExitStack() as on_error:
            server = ServerThread(client)
            on_error.callback(server.close)
            if not server.call(client.check()):
                raise EchoError(f"{url} returns no token probabilities, so there is no P(defect); serve with vLLM")
            backend = served_backend(client, server.call, description.base_model)
            check_adapters(backend, list(adapters), read_probe(path / "adapters"), url, builder)
            on_error.pop_all()
        inspector = cls(server.generate, products, description.pipeline, calibration)
        weakref.finalize(inspector, server.close).atexit = False  # a process that ends closes all connections
        return inspector

    @overload
    def predict(self, images: ImageInput, product: str | None = None) -> Result: ...  # type: ignore[overload-overlap]  # str
    @overload
    def predict(self, images: Sequence[ImageInput], product: str | None = None) -> list[Result]: ...
    def predict(self, images: ImageInput | Sequence[ImageInput], product: str | None = None) -> Result | list[Result]:
        """Inspect one image and return its result, or inspect several and return a list.

        `product` names the product in all of them. Without it, each image is assumed to show the product of the most
        similar normal image. Raises EchoError for an unknown product, and for an image that cannot be read.
        """
        if isinstance(images, str | Path | Image.Image | np.ndarray):
            return next(self.stream([images], product))
        return list(self.stream(images, product))

    def stream(self, images: str | Path | Sequence[ImageInput], product: str | None = None) -> Iterator[Result]:
        """Yield the result of each image as soon as its batch is done. A path is a folder of image files.

        Raises EchoError as `predict` does, after the results of the images before the one that cannot be inspected.
        """
        images = list_images(Path(images)) if isinstance(images, str | Path) else images
        for start in range(0, len(images), BATCH_SIZE):
            batch = images[start : start + BATCH_SIZE]
            with scratch_folder("echo-ft-") as scratch:
                copies, unreadable = snapshots(batch, scratch)
                cases = [self._case(copy, product) for copy in copies]
                outcomes = run_or_fail(cases, self.generate, self.pipeline) if cases else []
                for image, case, outcome in zip(batch[: len(cases)], cases, outcomes, strict=True):
                    yield self._result(str(image) if isinstance(image, str | Path) else "", case, outcome)
                if unreadable is not None:
                    raise unreadable

    def steps(self, image: ImageInput, product: str | None = None) -> Iterator[Progress | Result]:
        """Inspect one image, and yield the outputs so far before each role starts. The result comes last.

        Raises EchoError as `predict` does.
        """
        with scratch_folder("echo-ft-") as scratch:
            case = self._case(snapshot(image, scratch), product)
            traces: list[Trace] = []
            run = run_case(case, self.pipeline, traces)
            role, exchanges = next(run)
            reference = None
            while True:
                if role != ROLES[0] and exchanges and len(exchanges[0].images) > 1:
                    reference = str(self.products.root / exchanges[0].images[0])
                yield Progress(role, case.product, case.seen.questions, reference, tuple(traces))
                try:
                    role, exchanges = run.send(self.generate(role, exchanges))
                except StopIteration as end:
                    outcome = end.value
                    break
            yield self._result(str(image) if isinstance(image, str | Path) else "", case, outcome)

    def possible_products(self, product: str | None) -> list[tuple[str, str]]:
        """Return the (dataset, product) that an image may show, given the name of its product or None.

        Raises EchoError for an unknown product, and for one without normal images.
        """
        known = [key for key in self.products.conditions if product in (None, key[1])]
        found = [key for key in known if key in self.products.search.images]
        if not found:
            problem = "has no normal image" if known else "is not"
            comparable = ", ".join(self.products.comparable)
            raise EchoError(f"product {product!r} {problem} in {self.products.source}; choose from {comparable}")
        return found

    def _case(self, path: Path, product: str | None) -> Case:
        """Return the case of an image file that `snapshot` made. Only its content decides the order of candidates."""
        products = self.products
        key, references = products.search.find(path, self.possible_products(product))
        entries = products.knowledge.get(key[0], {}).get(key[1], {})
        identifier = path.stem
        questions = open_questions(identifier, products.conditions[key], products.grounding)
        seen = Seen(
            query=str(path),
            references=candidate_order(identifier, references),
            knowledge=tuple(Entry(condition, text) for condition, text in entries.items()),
            questions=questions,
        )
        # The truth of this image is not known. Prompts never show the truth, and the predictions carry empty answers.
        truth = Truth("", None, (), {question.id: "" for question in questions})
        return Case(identifier, *key, group=identifier, seen=seen, truth=truth)

    def _result(self, image: str, case: Case, outcome: Outcome) -> Result:
        self.scales.check(image or case.id, case, self.products.root)
        detection = outcome.predictions[0]
        if detection.error is not None:
            raise EchoError(f"the image {image or case.id} cannot be inspected: {detection.error}")
        if detection.probabilities is None:
            raise EchoError(
                f"the image {image or case.id} has no P(defect), because the server returned no probability of A or B; "
                "use a local model"
            )
        probability = detection.probabilities["A"]
        flagged = self.calibration.flags(probability)
        named = [one for one in outcome.predictions[1:] if one.parsed is not None and one.options]
        boxed = next((one.parsed for one in outcome.predictions if one.kind == GROUNDING), None)
        found = None if boxed is None else boxes.parse_boxes(boxed)
        size = image_size(Path(case.seen.query))
        shown = next((one.images for one in outcome.traces if one.role == "decision_maker"), ())
        texts: defaultdict[str, str] = defaultdict(str)
        for one in outcome.traces:
            if one.branch == detection.question or one.role == "knowledge_guide":
                texts[one.role] = one.text
        return Result(
            image=image,
            pred_score=self.calibration.score(probability),
            pred_label=flagged,
            threshold=self.calibration.threshold,
            product=case.product,
            condition=named[0].options[str(named[0].parsed)] if flagged and named else None,
            reference=str(self.products.root / shown[0]) if len(shown) > 1 else None,
            explanation=texts["reasoning_expert"] or texts["knowledge_guide"],
            answers=tuple(replace(one, image=image) for one in outcome.predictions),
            # The query is the last image.
            trace=tuple(replace(one, images=(*one.images[:-1], image)) for one in outcome.traces),
            pred_boxes=None if found is None else tuple(boxes.to_pixels(box, size) for box in found),
        )


def load_tuned_model(adapters: Mapping[str, Adapter], row_builder: RowBuilder, dtype: str, where: str) -> Any:
    """Load the base model of the adapters' cards with the adapters, onto a GPU if there is one.

    Checks that every adapter has its effect (echo_ft.inference.liveness). Messages refer to the adapters as `where`.
    Raises EchoError if an adapter does not fit the base model, or does not behave as it did in the export that
    recorded its answers.
    """
    import torch

    first = next(iter(adapters.values()))
    device = "cuda" if torch.cuda.is_available() else None
    paths = {role: adapter.path for role, adapter in adapters.items()}
    model = load_to_answer(first.card.base_model, first.card.base_revision, dtype, paths, device_map=device)
    check_adapters(local_backend(model, row_builder), list(adapters), read_probe(first.path.parent), where, row_builder)
    return model


def _engine(
    model: Any, row_builder: RowBuilder, products: ProductData, max_new_tokens: int, max_batch_tokens: int
) -> Generate:
    from echo_ft.inference.engine import Engine

    return Engine(model, row_builder, products.root, max_new_tokens, max_batch_tokens=max_batch_tokens).generate
